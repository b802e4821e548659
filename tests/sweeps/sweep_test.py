"""The sweep's command: every mistake is one line, and every finished point is kept."""

import csv
import json
from collections import Counter
from types import SimpleNamespace

import jax
import pytest
from sweep_cases import CONFIG, sweep_file

from fedqsn_jax.cli.sweep import main
from fedqsn_jax.config import command_line
from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.config.schema import Config, ConfigError, with_fields
from fedqsn_jax.sweeps import run
from fedqsn_jax.sweeps.grid import make_plan, read_grids
from fedqsn_jax.sweeps.results import SweepDirectory
from fedqsn_jax.sweeps.sources import Sources

GRID = {"algorithm": ["fedsn"], "p1": [0.0, 0.3], "p2": [0.2], "seed": [0, 1]}

MISTAKES = {
    "unknown field": ({"p3": [0.1]}, [], "unknown field p3; did you mean p2?"),
    "no list": ({"p1": 0.1}, [], "p1 = 0.1: allowed is a list of at least one value"),
    "empty": ({"p1": []}, [], "p1 = []: allowed is a list of at least one value"),
    "no grid": (7, [], "get_sweep returned no grid"),
    "a list of no grid": ([7], [], "7 is no grid"),
    "a point out of range": (
        {"p2": [0.2], "p1": [0.1, 1.0]},
        [],
        "p1 = 1.0: allowed is 0 to below 1 (at the sweep's point p2=0.2 p1=1.0)",
    ),
    "a method that does not exist": ({"algorithm": ["fedavg", "fedfoo"]}, [], "'fedfoo'"),
    "a method that does not fit": (
        {"model.name": ["cnn", "mlp"]},
        [],
        "model.name = 'cnn' does not fit data.name = 'digits'",
    ),
    "sites that do not exist": ({"sites": ["residual", "all"]}, [], "no mask site found"),
    "no rounds": (GRID, ["--config.rounds=0"], "rounds = 0: in a sweep allowed is 1 or more"),
    "set twice": (GRID, ["--config.p1=0.5"], "--config.p1: the sweep sets it; use --sweep.p1"),
    "unknown override": (GRID, ["--sweep.sede=1"], "unknown field sede; did you mean seed?"),
    "override without value": (GRID, ["--sweep.seed"], "--sweep.seed: a value is missing"),
    "rows on the host": (
        GRID,
        ["--at_once=2", "--config.data.resident=host"],
        "--at_once=2: allowed is 0 or 1 where",
    ),
    "side by side": (GRID, ["--at_once=x"], "--at_once=x: allowed is 0 or more"),
}


def refusal(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, tmp_path, capsys):
    grid, arguments, expected = MISTAKES[mistake]
    directory = tmp_path / "sweep"
    option = sweep_file(tmp_path, grid)
    message = refusal(capsys, [*CONFIG, option, f"--workdir={directory}", *arguments])
    assert expected in message
    assert not directory.exists()


def test_a_missing_sweep_or_directory(tmp_path, capsys):
    assert "no --sweep" in refusal(capsys, [*CONFIG, f"--workdir={tmp_path / 'x'}"])
    assert "no --workdir" in refusal(capsys, [*CONFIG, sweep_file(tmp_path, GRID)])
    message = refusal(capsys, [*CONFIG, f"--sweep={tmp_path}/no.py", f"--workdir={tmp_path / 'x'}"])
    assert "no.py: no such file" in message


def test_the_default_sweep_has_64_settings_of_three_seeds(monkeypatch, tmp_path):
    grids = read_grids("configs/sweeps/privacy_utility.py", [])
    plan = make_plan(read_config("configs/digits.py", []), grids)
    assert plan.varied == ["algorithm", "p1", "p2", "bits"]
    assert len({str(point.settings) for point in plan.points}) == 64
    assert len(plan.points) == 3 * 64
    assert {point.config.rounds for point in plan.points} == {30}
    assert len(run.by_program(plan.points)) == 4
    # An installed package has its own copy.
    carried = tmp_path / "carried" / "sweeps"
    carried.mkdir(parents=True)
    (carried / "mine.py").write_text("def get_sweep():\n    return {'p1': [0.5]}\n")
    monkeypatch.setattr(command_line, "PACKAGED_CONFIGS", carried.parent)
    monkeypatch.chdir(tmp_path)
    assert read_grids("configs/sweeps/mine.py", []) == [{"p1": [0.5]}]


def test_what_an_algorithm_does_not_use_is_not_swept_over():
    grid = {"algorithm": ["fedavg", "fedq", "fedqsn"], "p1": [0.1, 0.3], "bits": [2, 4]}
    plan = make_plan(Config(), [grid])
    settings = [tuple(point.settings.values()) for point in plan.points]
    masked = [("fedqsn", p1, bits) for p1 in (0.1, 0.3) for bits in (2, 4)]
    assert settings == [("fedavg", 0.0, None), ("fedq", 0.0, 2), ("fedq", 0.0, 4), *masked]
    assert plan.repeated == 12 - 7
    # FedAvg is FedSN without masks, and runs in its program.
    config = plan.points[0].config
    assert (config.algorithm, config.p1, config.p2) == ("fedsn", 0.0, 0.0)


def test_points_that_differ_in_nothing_that_is_used_are_one():
    plan = make_plan(Config(), [{"algorithm": ["fedavg", "fedq"], "sites": ["all", "residual"]}])
    assert [tuple(point.settings.values()) for point in plan.points] == [
        ("fedavg", None),
        ("fedq", "all"),
        ("fedq", "residual"),
    ]
    assert plan.repeated == 1


def test_the_sweep_of_minilm_calls_methods_without_masks_by_their_names():
    grids = read_grids("configs/sweeps/sst2_minilm.py", [])
    plan = make_plan(read_config("configs/sst2_minilm.py", []), grids)
    assert (len(plan.points), plan.repeated) == (70, 0)
    counts = Counter(point.settings["algorithm"] for point in plan.points)
    assert counts == {"fedavg": 4, "fedsn": 6, "fedq": 12, "fedqsn": 44, "fedlpp": 4}
    masks = {
        name: {(p.settings["p1"], p.settings["p2"]) for p in plan.points if name in str(p.settings)}
        for name in ("'fedsn'", "'fedqsn'")
    }
    assert all((0.0, 0.0) not in pairs for pairs in masks.values())


@pytest.mark.parametrize(
    ("fixed", "without", "used"),
    [
        ({"algorithm": ["fedq", "fedsn"]}, "blocks", [("fedq", "column"), ("fedq", "row")]),
        ({"upload.bits": [4, 0]}, "upload.block_size", [(4, 16), (4, 32)]),
        (
            {"participation.stragglers": [0.5, 0.0]},
            "participation.straggler_share",
            [(0.5, 0.1), (0.5, 0.2)],
        ),
    ],
)
def test_settings_of_what_is_left_out_are_not_swept_over(fixed, without, used):
    values = {"blocks": ["column", "row"], "upload.block_size": [16, 32]}
    plan = make_plan(Config(), [{**fixed, without: values.get(without, [0.1, 0.2])}])
    by_name = [(p.settings[next(iter(fixed))], p.settings[without]) for p in plan.points]
    assert sorted(by_name, key=str) == sorted([*used, (fixed.popitem()[1][1], None)], key=str)


class FakeProgram:
    """In place of a compiled program, which `sweep_program_test` and `notebooks_test` run."""

    def __init__(self, experiment):
        self.simulation = experiment.simulation

    def run_one(self, config, start):
        for finished in (2, config.rounds):
            yield finished, None, fake_entry(config, finished)

    def run_all(self, configs, starts):
        # Strict promotion of dtypes is for users' own programs.
        assert jax.config.values["jax_numpy_dtype_promotion"] == "standard"
        for finished in (2, configs[0].rounds):
            yield finished, None, [fake_entry(config, finished) for config in configs]


class FakeSources(Sources):
    """Without the server's own training."""

    def start(self, experiment):
        return SimpleNamespace(score=0.5)


def fake_entry(config, finished):
    views = {"global": 0.9 + config.seed / 64, "proxy": 0.9 - config.p1, "attacker_2": 0.8}
    scores = {f"{view}/accuracy": value for view, value in views.items()}
    return {"round": finished, **scores, "bytes/down_per_client": 1000.0}


@pytest.mark.parametrize("at_once", [1, 3])
def test_an_interrupted_sweep_keeps_its_points_and_goes_on(at_once, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "Program", FakeProgram)
    monkeypatch.setattr(run, "Sources", FakeSources)
    directory = tmp_path / "sweep"
    arguments = [*CONFIG, sweep_file(tmp_path, GRID), f"--workdir={directory}"]
    arguments.append(f"--at_once={at_once}")
    files = SweepDirectory(directory)
    append = SweepDirectory.append

    def stop_after_it(self, records):
        append(self, records)
        if len(self.read()) >= 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SweepDirectory, "append", stop_after_it)
        assert main(arguments) == 130
    assert capsys.readouterr().err == (
        "fedqsn_jax: interrupted; finished points are kept, the same command runs the others\n"
    )
    before = files.records.read_text()
    kept = before.count("\n")
    assert kept == max(2, at_once)
    with files.points.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == kept
    # As a process that was killed while it wrote would leave it.
    files.records.write_text(before + '{"settings": {"p1"')

    other = sweep_file(tmp_path, {**GRID, "p1": [0.5]})
    assert "made by another sweep: its grids differ" in refusal(capsys, [*arguments, other])
    message = refusal(capsys, [*arguments, "--config.client.steps=2"])
    assert "made by another sweep: client.steps = 2 (there: 1)" in message

    sweep_file(tmp_path, GRID)
    with jax.numpy_dtype_promotion("strict"):
        assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"4 points, {kept} of them finished before; 1 program to compile" in shown
    assert "4/4  p1=0.3 seed=1  global 0.916  proxy 0.600  attacker_2 0.800" in shown
    assert "\x1b" not in shown
    assert files.records.read_text().startswith(before)
    records = files.read()
    assert [(each["settings"], each["seed"]) for each in records] == [
        ({"p1": p1}, seed) for seed in (0, 1) for p1 in (0.0, 0.3)
    ]
    assert {path.name for path in directory.iterdir()} == {
        "sweep.json",
        "results.jsonl",
        "results.csv",
        "points.csv",
        "global_and_attacker.png",
        "global_and_proxy.png",
    }
    with files.table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["p1"], row["seeds"]) for row in rows] == [("0.0", "2"), ("0.3", "2")]
    values = [each["metrics"]["global/accuracy"] for each in records if each["settings"]["p1"] == 0]
    assert float(rows[0]["global/accuracy"]) == pytest.approx(sum(values) / 2)
    # Two values: half their distance times Student's t for one degree of freedom.
    half = 12.7062047 * abs(values[0] - values[1]) / 2
    assert float(rows[0]["global/accuracy ±"]) == pytest.approx(half)
    with files.points.open(newline="") as file:
        points = list(csv.DictReader(file))
    assert [float(row["global/accuracy"]) for row in points] == [
        each["metrics"]["global/accuracy"] for each in records
    ]

    # A finished sweep is shown again, and nothing runs.
    monkeypatch.setattr(run, "Program", None)
    assert main(arguments) == 0
    assert files.read() == records
    assert json.loads((directory / "sweep.json").read_text())["grids"] == [GRID]


def test_a_sweep_that_is_at_work_can_be_looked_at_but_not_run(tmp_path, capsys):
    directory, option = tmp_path / "sweep", sweep_file(tmp_path, GRID)
    arguments = [*CONFIG, option, f"--workdir={directory}"]
    plan = make_plan(read_config("configs/digits.py", CONFIG[1:]), [GRID])
    with SweepDirectory(directory).claim(plan):
        assert main([*arguments, "--dry_run"]) == 0
        assert "4 points" in capsys.readouterr().out
        assert "another run is at work in it" in refusal(capsys, arguments)
        assert [path.name for path in directory.iterdir()] == ["sweep.json"]
    assert not directory.exists()


def test_a_refused_sweep_leaves_the_other_ones_definition(tmp_path):
    """As where both found an empty directory, and the other one claimed it first."""
    (tmp_path / "sweep.json").write_text("{}")
    plan = make_plan(Config(), [GRID])
    claim = SweepDirectory(tmp_path).claim(plan)
    with pytest.raises(ConfigError, match="it was made by another sweep"), claim:
        pass
    assert (tmp_path / "sweep.json").read_text() == "{}"


def test_what_has_no_effect_in_any_point_does_not_make_it_another_sweep(tmp_path):
    def claim(values, grid):
        plan = make_plan(with_fields(Config(), values), [grid])
        with SweepDirectory(tmp_path).claim(plan):
            SweepDirectory(tmp_path).records.touch()

    claim({"algorithm": "fedavg", "fedsp.prompts": 3, "p2": 0.1, "bits": 4}, GRID)
    claim({"algorithm": "fedqsn", "fedsp.prompts": 4, "p2": 0.3, "bits": 2}, GRID)
    claim({"algorithm": "fedavg", "checkpoint.every": 3}, GRID)
    with pytest.raises(ConfigError, match=r"another sweep: model\.hidden = \(?\[?8"):
        claim({"model.hidden": (8,), "fedsp.prompts": 5}, GRID)
    both = {"algorithm": ["fedsn", "fedqsn"]}
    with pytest.raises(ConfigError, match=r"another sweep: p2 = .*, its grids differ$"):
        claim({}, both)
    for path in tmp_path.iterdir():
        path.unlink()
    claim({"bits": 4}, both)
    with pytest.raises(ConfigError, match=r"another sweep: bits = 2 \(there: 4\)$"):
        claim({"bits": 2}, both)


def test_what_remains_is_told_of_damaged_results_too(tmp_path):
    files = SweepDirectory(tmp_path)
    nothing = "no point was finished, the same command starts again"
    assert files.what_remains() == nothing
    files.records.write_text('{"half')
    assert files.what_remains() == nothing
    files.records.write_text("damaged\n")
    assert files.what_remains().startswith("finished points are kept")


def test_a_directory_that_cannot_serve(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    option = sweep_file(tmp_path, GRID)
    message = refusal(capsys, [*CONFIG, option, f"--workdir={tmp_path}"])
    assert "it holds other files and no sweep.json" in message
    message = refusal(capsys, [*CONFIG, option, f"--workdir={tmp_path / 'file'}"])
    assert "is not a directory" in message
