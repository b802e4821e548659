"""A sweep warns of what its points' runs would, each thing once."""

import pytest
from sweep_cases import CONFIG, sweep_file

from fedqsn_jax.cli.sweep import main
from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.config.schema import Config, with_fields
from fedqsn_jax.sweeps.grid import make_plan
from fedqsn_jax.sweeps.results import SweepDirectory
from fedqsn_jax.sweeps.warnings import warnings_after_sweep


def test_broken_promises_are_said_once_with_the_points_concerned():
    """Row-major blocks tell of hidden columns, where there are such."""
    base = with_fields(Config(), {"blocks": "row", "codebook": "symmetric_normal_float"})
    masks = {"p1": [0.0, 0.2, 0.4], "p2": [0.3], "seed": [0, 1]}
    grids = [{"algorithm": ["fedsn"], **masks}, {"algorithm": ["fedqsn"], **masks}]
    (line,) = make_plan(base, grids).warnings
    assert line.endswith("tells of hidden columns' values (algorithm=fedqsn, 4 of 12 points)")
    (line,) = make_plan(base, [{"algorithm": ["fedqsn"], "p1": [0.2]}]).warnings
    assert line.endswith(" (1 of 1 points)")
    assert make_plan(base, [{"algorithm": ["fedavg", "fedsn"], "p1": [0.2]}]).warnings == []


def test_settings_without_effect_are_said_with_the_points_concerned():
    grid = {"algorithm": ["fedavg", "fedsn"], "p1": [0.1, 0.2], "seed": [0, 1]}
    base = with_fields(Config(), {"bits": 2, "sampling": "fixed_count"})
    assert make_plan(base, [grid]).warnings == []
    assert make_plan(base, [grid], ["bits", "sampling"]).warnings == [
        "sampling = 'fixed_count' has no effect with algorithm = 'fedavg' (algorithm=fedavg "
        "p1=0.0, 2 of 6 points)",
        "bits = 2 has no effect with algorithm = 'fedavg' (algorithm=fedavg p1=0.0, 2 of 6 points)",
        "bits = 2 has no effect with algorithm = 'fedsn' (algorithm=fedsn, 4 of 6 points)",
    ]
    # A field that the sweep varies is meant for the methods that use it, if there is one.
    assert make_plan(Config(), [{**grid, "bits": [2]}]).warnings == [
        "bits = 2 has no effect with algorithm = 'fedavg' (algorithm=fedavg p1=0.0, 2 of 6 points)",
        "bits = 2 has no effect with algorithm = 'fedsn' (algorithm=fedsn, 4 of 6 points)",
    ]
    both = [grid, {"algorithm": ["fedq"], "bits": [3]}]
    assert make_plan(Config(), both).warnings == []
    # Also of values that leave no point of their own.
    prompted = read_config("configs/sst2_minilm.py:fedsp", [])
    plan = make_plan(prompted, [{"fedsp.auxiliary_rate": [1e-4, 0.5]}])
    assert (len(plan.points), plan.repeated) == (1, 1)
    assert plan.warnings[1] == (
        "fedsp.auxiliary_rate = 0.5 has no effect with fedsp.auxiliary_share = 0.0 (1 of 1 points)"
    )


def test_a_dry_run_says_it_too(tmp_path, capsys):
    released = ["--config=configs/digits.py:released", *CONFIG[1:]]
    option = sweep_file(tmp_path, {"p1": [0.0, 0.2], "seed": [0, 1]})
    assert main([*released, option, "--dry_run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("warning:") == 1
    assert "warning: fedqsn with blocks = 'row' does not keep what" in shown
    assert "(p1=0.2, 2 of 4 points)" in shown


def test_what_came_of_it_is_said_once():
    points = [{"rate": rate, "bits": None, "seed": seed} for rate in (0.1, 9.0) for seed in (0, 1)]
    fine = {"clients/rejected": 0, "clients/returned": 3, "global/loss": 0.5}
    ends = [
        (Config(), {**fine, "global/loss": None}),
        (Config(), fine),
        (Config(), {**fine, "clients/rejected": 3}),
        (Config(), {**fine, "clients/rejected": 2}),
    ]
    assert warnings_after_sweep(ends, points) == [
        "5 of 6 clients' updates were rejected because they were not finite, in the last round "
        "evaluated: their rows hold NaN, or their training diverges (rate=9.0, 2 of 4 points)",
        "the training diverged; its loss is no number. Lower the learning rates (rate=0.1 seed=0, "
        "1 of 4 points)",
    ]
    assert warnings_after_sweep(ends[1:2], points[1:2]) == []
    asked = with_fields(Config(), {"participation.nan": 0.5})
    assert warnings_after_sweep([(asked, ends[2][1])], points[:1]) == []


@pytest.mark.usefixtures("quick_compilation")
def test_a_sweep_warns_of_rates_that_are_too_large(tmp_path, capsys):
    grid = {"client.learning_rate": [0.1, 1e30], "p1": [0.2]}
    config = [option for option in CONFIG if "client.steps" not in option]
    arguments = [*config, sweep_file(tmp_path, grid), f"--workdir={tmp_path / 'sweep'}"]
    for _ in range(2):
        # Again, from the records, where nothing is left to run.
        assert main(arguments) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.count("warning:") == 1
        assert "3 of 3 clients' updates were rejected" in shown
        assert "(learning_rate=1e+30, 1 of 2 points)" in shown.replace("client.", "")
    assert len(SweepDirectory(tmp_path / "sweep").read()) == 2
