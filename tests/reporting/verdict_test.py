"""The final word of a run, against cases that were judged by hand."""

import math

import pytest
from reporting_cases import COSTS

from fedqsn_jax.config.schema import Config, with_fields
from fedqsn_jax.reporting.summary import Costs, add_trained_attackers, summarize
from fedqsn_jax.reporting.verdict import verdict


def judged(one, ten=None, owner=0.964, config=None, costs=COSTS, idle=(), **end):
    names = {"global": owner, "attacker_1": one, "attacker_10": ten}
    last = {f"{view}/accuracy": value for view, value in names.items() if value is not None}
    start = dict.fromkeys(last, 0.1) | {"global/accuracy": 0.8, "global/loss": 1.0}
    history = [{"round": 0, **start}, {"round": 9, "global/loss": 0.5, **last, **end}]
    return verdict(summarize(history, costs, 1.0), config or Config(), idle)


@pytest.mark.parametrize(
    ("reached", "protection"),
    [(0.972, "none"), (0.964, "none"), (0.9545, "none"), (0.95, "little"), (0.80, "little"),
     (0.79, "some"), (0.1, "some")],
)  # fmt: skip
def test_colluders_above_level_and_below(reached, protection):
    word = judged(reached)
    assert word["protection"] == protection
    assert word["attackers"]["attacker_1"] == {
        "colluders": 1, "score": reached, "owner": 0.964, "trained": None,
        "protection": protection,
    }  # fmt: skip


def test_the_words():
    assert judged(0.972)["text"].startswith(
        "verdict: 1 colluder has 97.2% of accuracy where the owner has 96.4%: no protection. "
        "A p1 above 0.2 hides more"
    )
    assert judged(0.5)["text"] == (
        "verdict: 1 colluder has 50.0% of accuracy where the owner has 96.4%: protection, less "
        "than the owner had before the first round (80.0%). They might do better after training "
        "it on rows of their own, which was not tried (evaluation.fine_tuned_attackers)."
    )


def trained_and_judged(**scores):
    last = {"global/accuracy": 0.964, "attacker_1/accuracy": 0.5, "attacker_10/accuracy": 0.6}
    history = [{"round": 0, "global/accuracy": 0.8}, {"round": 9, "global/loss": 0.5, **last}]
    summary = summarize(history, COSTS, 1.0)
    facts = {"rate": 1e-3, "steps": 50, "rows": 57, "held_rows": 15}
    trained = {f"attacker_{name[1:]}": {"score": s, **facts} for name, s in scores.items()}
    add_trained_attackers(summary, trained, 100)
    return summary, verdict(summary, Config())


@pytest.mark.parametrize(
    ("score", "protection"), [(0.96, "none"), (0.9, "little"), (0.7, "some"), (0.3, "some")]
)
def test_a_gap_that_training_closes_is_no_protection(score, protection):
    summary, word = trained_and_judged(_1=score, _10=0.55)
    kinds = {name: facts["protection"] for name, facts in word["attackers"].items()}
    assert kinds == {"attacker_1": protection, "attacker_10": "some"}
    assert word["protection"] == protection
    assert summary["gaps"]["attack"]["attacker_1"] == pytest.approx(0.464)
    assert summary["gaps"]["fine_tuned"]["attacker_1"] == pytest.approx(0.964 - score)
    assert f"1 colluder has 50.0% of accuracy, {100 * score:.1f}% after training on" in word["text"]
    assert "not tried" not in word["text"]


def test_what_was_not_tried_for_all_is_said():
    assert "not tried" in trained_and_judged(_1=0.5)[1]["text"]


def test_a_run_is_as_good_as_its_worst_case():
    word = judged(0.5, 0.96)
    kinds = {name: facts["protection"] for name, facts in word["attackers"].items()}
    assert kinds == {"attacker_1": "some", "attacker_10": "none"}
    assert word["protection"] == "none"
    assert "10 colluders have 96.0%" in word["text"]


def test_absent_idle_and_diverged():
    for word in (judged(None), judged(0.1, idle=["attacker_1"])):
        assert (word["protection"], word["attackers"]) == (None, {})
        assert "nothing is known of protection" in word["text"]
        assert "evaluation.attackers" in word["text"]
    for end in ({"owner": math.nan}, {"global/loss": math.nan}, {"global/loss": math.inf}):
        word = judged(0.5, **end)
        assert word["protection"] is None
        assert "diverged" in word["text"]


def test_a_loss_that_was_never_a_number_is_no_divergence():
    """As with a NaN among the test rows."""
    history = [{"round": n, "global/accuracy": 0.5, "global/loss": math.nan} for n in (0, 9)]
    word = verdict(summarize(history, COSTS, 1.0), Config())
    assert word["protection"] is None
    assert "diverged" not in word["text"]
    assert "before the first round, so nothing can be said" in word["text"]


def test_a_method_that_hides_nothing_and_no_server_mask():
    costs = Costs(1, 1, 1, 1, hides=False)
    word = judged(0.5, config=with_fields(Config(), {"algorithm": "fedavg"}), costs=costs)
    assert word["protection"] == "none"
    assert "No column is hidden from clients: no protection." in word["text"]
    assert "algorithm = 'fedqsn'" in word["text"]
    assert judged(None, config=Config(), costs=costs)["protection"] == "none"
    assert "set p1 above 0" in judged(0.96, config=with_fields(Config(), {"p1": 0.0}))["text"]


@pytest.mark.parametrize(
    ("settings", "told", "not_told"),
    [
        ({}, ["mask_per = 'client'", "clients after each round", "broadcast.every = 0"], []),
        ({"p2": 0.0}, ["broadcast.every = 0"], ["mask_per"]),
        ({"mask_per": "client"}, ["A p1 above 0.2"], ["mask_per = 'client'"]),
        # Ten colluders miss a column with probability .2 ** 10.
        ({"mask_per": "client", "p1": 0.0}, ["10 of them see 100%"], ["in time"]),
        ({"mask_per": "client", "p1": 0.0, "p2": 0.9}, ["10 of them see 65.1%"], ["in time"]),
        ({"p1": 0.0}, ["collect every column in time"], []),
        ({"broadcast.every": 3}, ["(after every 3 rounds)", "broadcast.every = 0 it is not"], []),
        ({"broadcast.share": 0.5}, ["(a share of 0.5)", "broadcast.every = 0 it is not"], []),
        ({"broadcast.every": 0}, ["not sent already", "A p1 above"], ["= 0 it is not", "arms"]),
    ],
)
def test_advice_knows_kept_masks_and_what_is_sent_back(settings, told, not_told):
    text = judged(0.964, 0.964, config=with_fields(Config(), settings))["text"]
    assert all(words in text for words in told), text
    assert not any(words in text for words in not_told), text


def test_one_way_rounds_protect_without_hidden_columns():
    """What colluders lack there is what was learned."""
    costs = Costs(1, 1, 1, 1, hides=False)
    config = with_fields(Config(), {"algorithm": "fedavg", "broadcast.every": 0})
    word = judged(0.8, config=config, costs=costs)
    assert word["protection"] == "little"
    assert "No column is hidden" not in word["text"]
    assert "algorithm = 'fedqsn'" in word["text"]
    assert judged(0.7, config=config, costs=costs)["protection"] == "some"
    assert judged(0.964, config=config, costs=costs)["protection"] == "none"
