"""Summaries of a run: best rounds, gaps, bytes and the order of views."""

import json
import math

import pytest
from reporting_cases import COSTS, VIEWS, make_history

from fedqsn_jax.reporting.summary import Costs, add_reference, main_views_of, summarize, views_of


@pytest.fixture
def history():
    return make_history()


def test_summary_agrees_with_a_hand_computation(history):
    summary = summarize(history, COSTS, seconds=10)
    assert (summary["score"], summary["rounds"], summary["hides"]) == ("accuracy", 20, True)
    assert list(summary["views"]) == list(VIEWS)
    view = summary["views"]["global"]
    assert view["start"] == {"round": 0, "accuracy": 0.5, "loss": 2.0}
    assert view["best"] == {"round": 5, "accuracy": 0.9, "loss": 1.0}  # the earlier of two equals
    assert view["end"] == {"round": 20, "accuracy": 0.875, "loss": 0.5}
    proxy = summary["views"]["proxy"]
    assert proxy["best"] == {"round": 5, "accuracy": 0.7, "accuracy_std": 0.06, "loss": 1.0}
    assert summary["gaps"] == {
        "attack": {"attacker_1": 0.25, "attacker_10": 0.0625},
        "forgetting": 0.1875,
    }
    down, up = summary["bytes"]["down"], summary["bytes"]["up"]
    assert down == {"per_client": 300.0, "expected": 300.0, "fedavg": 1000.0, "ratio": 0.3}
    assert up == {"per_client": 500.0, "expected": 700.0, "fedavg": 1400.0, "ratio": 500 / 1400}
    assert summary["seconds"] == {"total": 10.0, "per_round": 0.5}
    json.dumps(summary, allow_nan=False)


def test_the_kept_benefit_agrees_with_a_hand_computation(history):
    """From .5 to .875, where FedAvg came to 1: three quarters."""
    summary = summarize(history, COSTS, seconds=10)
    add_reference(summary, 1.0)
    assert summary["kept_benefit"] == {"value": 0.75, "start": 0.5, "end": 0.875, "fedavg": 1.0}
    add_reference(summary, 0.75)
    assert summary["kept_benefit"]["value"] == 1.5
    for gained_nothing in (0.5, 0.25):
        add_reference(summary, gained_nothing)
        assert summary["kept_benefit"]["value"] is None
    json.dumps(summary, allow_nan=False)


def test_summary_of_a_run_without_rounds_or_attackers():
    only = {"round": 0, "global/accuracy": 0.5, "global/loss": 2.0, "train/loss": None}
    summary = summarize([only], Costs(1, 2, 0, 4), seconds=0)
    assert list(summary["views"]) == ["global"]
    assert summary["gaps"] == {"attack": {}, "forgetting": None}
    assert summary["bytes"]["down"]["ratio"] is None
    assert summary["bytes"]["up"] == {
        "per_client": 2.0,
        "expected": 2.0,
        "fedavg": 4.0,
        "ratio": 0.5,
    }
    assert summary["seconds"]["per_round"] is None
    with pytest.raises(ValueError, match="no entry"):
        summarize([], COSTS, 0)


def test_bytes_down_of_one_way_rounds_are_told_of_all_rounds_at_the_end():
    history = [{"round": 0, "global/accuracy": 0.5}] + [
        {
            "round": t,
            "global/accuracy": 0.5,
            "clients/sent": sent,
            "bytes/down_per_client": down,
            "bytes/up_per_client": 100.0 * t,
        }
        for t, sent, down in ((1, 10, 400.0), (2, 0, 200.0))
    ]
    summary = summarize(history, COSTS, 1.0)
    assert summary["bytes"]["down"]["per_client"] == 200.0
    assert summary["bytes"]["up"]["per_client"] == 150.0


def test_best_is_by_the_tasks_score_and_ignores_what_is_no_number():
    history = [
        {"round": r, "global/log_likelihood": score, "global/accuracy": 1.0 - r}
        for r, score in enumerate((-3.0, math.nan, -1.0, -2.0, math.inf))
    ]
    summary = summarize(history, COSTS, 1, score="log_likelihood")
    assert summary["views"]["global"]["best"]["round"] == 2
    diverged = summarize(history[1:2], COSTS, 1, score="log_likelihood")
    assert math.isnan(diverged["views"]["global"]["best"]["log_likelihood"])


def test_views_are_in_reading_order():
    names = [f"{view}/accuracy" for view in ("attacker_10", "attacker_2", "server", "global")]
    names += ["train/accuracy", "round", "proxy/loss", "visible/a/kernel"]
    assert views_of(names) == ["global", "server", "attacker_2", "attacker_10"]
    assert main_views_of(names) == ["global", "server", "attacker_10"]
    assert views_of(names, "loss") == ["proxy"]


def test_what_is_absent_stays_absent():
    start = {"round": 0, "global/accuracy": 0.5, "proxy/accuracy": None}
    end = {"round": 1, "global/accuracy": 0.75, "own/global/accuracy": 0.5, "train/loss": None}
    end |= {"own/global/accuracy_spread": math.nan, "bytes/down_per_client": math.nan}
    summary = summarize([start, end], COSTS, 1.0)
    assert list(summary["views"]) == ["global"]
    assert summary["clients"]["own"]["global"] == {
        "mean": 0.5, "worst_decile": None, "spread": None
    }  # fmt: skip
    assert summary["bytes"]["down"]["per_client"] == COSTS.down
    assert summary["gaps"] == {"attack": {}, "forgetting": None}
    json.dumps(summary, allow_nan=False)
