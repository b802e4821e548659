"""Sweeps that audit every point: U and P, what is refused, the picture; one with real audits."""

import csv
import json
import math

import numpy as np
import pytest
from scipy import stats
from sweep_cases import CONFIG, sweep_file

from fedqsn_jax.cli import sweep as command
from fedqsn_jax.cli.sweep import main
from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.sweeps import frontier, run
from fedqsn_jax.sweeps.audits import coalitions, mechanism, with_shares
from fedqsn_jax.sweeps.estimates import Estimate, Setting, estimate, ratio
from fedqsn_jax.sweeps.grid import make_plan, read_grids
from fedqsn_jax.sweeps.results import SweepDirectory, over_seeds, record_of

GRIDS = [
    {"algorithm": ["fedavg"], "seed": [0, 1]},
    {"algorithm": ["fedqsn"], "p1": [0.0], "p2": [0.3], "mask_per": ["round", "client"],
     "seed": [0, 1]},
]  # fmt: skip


def test_a_ratio_of_means_has_the_interval_of_its_residuals():
    parts, wholes = [0.01, 0.03, 0.02], [0.05, 0.04, 0.06]
    share, half = ratio(parts, wholes)
    assert share == pytest.approx(sum(parts) / sum(wholes))
    rests = np.array(parts) - share * np.array(wholes)
    expected = stats.t.ppf(0.975, 2) * stats.sem(rests) / np.mean(wholes)
    assert half == pytest.approx(expected)
    # Of the same whole everywhere it is the interval of the mean.
    assert ratio(parts, [0.5] * 3) == pytest.approx(estimate([2 * part for part in parts]))
    # Exact where all seeds agree, also with a seed of which nothing can be said.
    assert ratio([0.1, 0.2, 0.0], [0.2, 0.4, 0.0]) == pytest.approx((0.5, 0.0))
    for unknown in (ratio([None], [0.1]), ratio([0.1], [0.0])):
        assert all(map(math.isnan, unknown))


def plan_of(grids, overrides=()):
    return make_plan(read_config("configs/digits.py", [*CONFIG[1:], *overrides]), grids)


def records_of(plan, figures):
    return [
        record_of(point, {**figures(point.config), "start/accuracy": 0.8}) for point in plan.points
    ]


def made_up(config):
    """By hand: FedAvg .9 and .94, the others 2 points less; one client has .6 alone, three .95."""
    own = 0.9 + 0.04 * config.seed - (0.02 if config.p2 else 0)
    attack = {"round": own, "client": 0.72}[config.mask_per] if config.p2 else 0.5
    audit = {"alone/1": 0.6, "attack/1": attack, "strongest/1": attack + 0.01}
    audit |= {"alone/3": 0.95, "attack/3": 0.95, "strongest/3": 0.95}
    return {"global/accuracy": own, **{f"audit/{name}": value for name, value in audit.items()}}


def test_benefit_and_shares_by_hand():
    plan = plan_of(GRIDS)
    records = records_of(plan, made_up)
    settings = over_seeds(records, run._order(plan))
    fedavg, each_round, sticky = with_shares(settings, records, plan)
    assert fedavg.metrics["U"] == pytest.approx((1.0, 0.0))
    # (.88 + .92 - 1.6) / (.9 + .94 - 1.6)
    assert sticky.metrics["U"].mean == pytest.approx(0.2 / 0.24)
    assert each_round.metrics["P/1"] == pytest.approx((0.0, 0.0), abs=1e-9)
    assert sticky.metrics["P/1"].mean == pytest.approx((1.8 - 1.44) / (1.8 - 1.2))
    assert sticky.metrics["P_at_least/1"].mean == pytest.approx((1.8 - 1.46) / (1.8 - 1.2))
    # An attack that is worse than no attack is not made.
    assert fedavg.metrics["P/1"] == pytest.approx((1.0, 0.0))
    assert math.isnan(sticky.metrics["P/3"].mean), "there is nothing to protect"
    assert coalitions([fedavg, sticky]) == ["1", "3"]
    # While a FedAvg is missing U is unknown.
    some = records[1:]
    settings = over_seeds(some, run._order(plan))
    _, *others = with_shares(settings, some, plan)
    assert all(math.isnan(each.metrics["U"].mean) for each in others)


def test_mechanisms_are_called_by_what_they_do():
    assert mechanism({"algorithm": "fedqsn", "mask_per": "client", "p1": 0.1}) == "fedqsn, sticky"
    assert mechanism({"algorithm": "fedq", "mask_per": None, "broadcast.every": 0}) == (
        "fedq, one-way"
    )
    rare = {"algorithm": "fedq", "broadcast.every": 5, "broadcast.share": 0.5}
    assert mechanism(rare) == "fedq, sent every 5 rounds, 0.5 of it sent"
    assert mechanism({"p1": 0.1}) == "all"


def test_the_picture_names_settings_and_draws_the_front(tmp_path):
    def setting(algorithm, p1, benefit, share, half):
        metrics = {
            "U": Estimate(benefit, 0.1),
            "P/1": Estimate(share, math.nan),
            "P/half": Estimate(half, 0.1),
        }
        return Setting({"algorithm": algorithm, "p1": p1}, 2, metrics)

    nothing = math.nan
    settings = [
        setting("fedavg", None, 1.0, 0.0, nothing),
        setting("fedqsn", 0.1, 0.7, 0.4, nothing),
        setting("fedqsn", 0.2, 0.5, 0.3, nothing),
        setting("fed$qsn", 0.3, nothing, 0.9, nothing),
    ]
    figure = frontier.draw(settings, tmp_path / "x.png", "digits $1")
    first, second = figure.axes
    (front,) = [line for line in first.lines if line.get_drawstyle() == "steps-pre"]
    assert front.get_xydata().tolist() == [[0.7, 0.4], [1.0, 0.0]]
    assert {text.get_text() for text in first.texts} == {"1", "2", "3"}
    assert second.get_title() == "half of the clients collude: nothing to protect"
    names = [text.get_text() for text in figure.texts]
    assert any("2  fedqsn, p1 0.1\n" in name and "4  fed$qsn, p1 0.3" in name for name in names)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    # Nothing beside the axes lies outside the picture.
    for text in figure.texts:
        box = text.get_window_extent()
        assert box.x1 <= figure.bbox.x1
        assert box.y0 >= 0


def test_the_frontier_has_a_fedavg_of_every_seed():
    grids = read_grids("configs/sweeps/frontier.py", [])
    plan = make_plan(read_config("configs/digits.py", []), grids)
    assert plan.repeated == 0
    assert len({str(point.settings) for point in plan.points}) == 10
    assert len(plan.points) == 3 * 10
    assert run.references(plan).keys() == {0, 1, 2}
    kinds = {mechanism(point.settings) for point in plan.points}
    assert {"fedavg", "fedqsn, sticky", "fedq, one-way", "fedqsn, sticky, one-way"} <= kinds


@pytest.mark.parametrize(
    ("grids", "options", "message"),
    [
        (GRIDS, ["--colluders=1"], "--colluders: it is of audits; add --audit"),
        (GRIDS, ["--steps=1"], "--steps: it is of audits; add --audit"),
        (GRIDS, ["--audit", "--colluders=21"], "at most the number of clients, 20"),
        (GRIDS, ["--audit", "--colluders=0"], "integers of 1 or more, or half"),
        (GRIDS, ["--audit", "--steps=x"], "integers of 0 or more"),
        (GRIDS[1:], ["--audit"], "no point of FedAvg with seed 0, 1"),
        (GRIDS, ["--audit", "--sweep.algorithm=fedqsn"], "no point of FedAvg with seed"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(grids, options, message, tmp_path, capsys):
    directory = tmp_path / "sweep"
    assert main([*CONFIG, sweep_file(tmp_path, grids), f"--workdir={directory}", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not directory.exists()


def test_audited_points_are_audited_once(tmp_path, capsys, monkeypatch):
    """With real rounds and real attacks; then shown again, in turn and side by side."""
    grids = [{**grid, "seed": [0]} for grid in GRIDS]
    shared = [*CONFIG, sweep_file(tmp_path, grids), "--audit", "--colluders=2", "--steps=4"]
    tables = {}
    for at_once in (1, 2):
        directory = tmp_path / f"sweep_{at_once}"
        arguments = [*shared, f"--workdir={directory}", f"--at_once={at_once}"]
        assert main(arguments) == 0
        with (directory / "results.csv").open(newline="") as file:
            tables[at_once] = list(csv.DictReader(file))
    shown = capsys.readouterr().out
    assert "U, the kept benefit, and P, the protected share" in shown
    assert "benefit_and_protection.png" in shown
    for name in ("U", "P/2", "audit/alone/2", "audit/attack/2"):
        in_turn, side_by_side = ([row[name] for row in tables[n]] for n in (1, 2))
        values = [[float(cell or "nan") for cell in column] for column in (in_turn, side_by_side)]
        np.testing.assert_allclose(*values, atol=1e-6)
    assert float(tables[1][0]["U"]) == 1
    files = SweepDirectory(directory)
    records = files.read()
    for record in records:
        assert record["metrics"]["audit/replay_difference"] < 1e-5
    folders = sorted(path.name for path in files.audits.iterdir())
    assert folders[0] == "0000_algorithm=fedavg_p2=0.0_seed=0"
    assert len(folders) == 3
    for name in folders:
        kept = {path.name for path in (files.audits / name).iterdir()}
        assert kept == {"audit.json", "audit.png", "audit.html"}
    report = json.loads((files.audits / folders[2] / "audit.json").read_text())
    assert report["run"]["mask_per"] == "client"
    assert report["adversaries"]["2"]["alone"]["score"]["value"] == pytest.approx(
        float(tables[2][2]["audit/alone/2"])
    )
    assert files.frontier_picture.read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(command, "_audit", lambda options: _Never(files))
    assert main(arguments) == 0
    assert files.read() == records
    assert main([each for each in arguments if not each.startswith(("--audit", "--coll", "--st"))])
    assert "made by another sweep: its audit differs" in capsys.readouterr().err


class _Never:
    """An audit with the settings of the sweep that is there, which must not be asked for more."""

    def __init__(self, files):
        self.described = json.loads((files.path / "sweep.json").read_text())["audit"]

    def check(self, experiment):
        raise AssertionError("nothing is left to be audited")

    __call__ = check
