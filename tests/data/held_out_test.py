"""Held-out rows of clients: whose they are, and what is said of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounds_cases import fast

from fedqsn_jax import federate
from fedqsn_jax.config.schema import ConfigError, DataConfig
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.data.held_out import hold_out
from fedqsn_jax.data.population import from_clients
from fedqsn_jax.data.streamed import HostData
from fedqsn_jax.generation.language_tasks import conditional_generation
from fedqsn_jax.reporting.summary import Costs, summarize
from fedqsn_jax.rounds.evaluation import make_client_evaluator

SIZES = (10, 1, 0, 7, 20, 3, 8)
OFFSETS = np.cumsum([0, *SIZES])


def population():
    """Each row says whose it is, and which."""
    owner = np.repeat(np.arange(len(SIZES)), SIZES)
    return HostData({"owner": owner, "row": np.arange(OFFSETS[-1])}, OFFSETS)


def held(share, clients, seed=0):
    config = DataConfig(held_out_share=share, held_out_clients=clients)
    return hold_out(population(), config, np.random.default_rng(seed))


def test_every_row_is_in_one_place_and_stays_with_its_client():
    train, groups = held(0.3, 2)
    own, new = groups["own"], groups["new"]
    everywhere = [train.examples["row"], own.examples["row"], new.examples["row"]]
    assert sorted(np.concatenate(everywhere).tolist()) == list(range(OFFSETS[-1]))
    assert (train.clients, own.clients, new.clients) == (5, 5, 2)
    owners = set()
    for client in range(5):
        rows = [
            each.examples["owner"][each.offsets[client] : each.offsets[client + 1]].tolist()
            for each in (train, own)
        ]
        size = len(rows[0]) + len(rows[1])
        assert len(rows[1]) == min(round(0.3 * size), max(size - 1, 0))
        assert len(set(rows[0] + rows[1])) == min(size, 1)
        owners |= set(rows[0])
    assert owners.isdisjoint(new.examples["owner"].tolist())
    assert held(0.3, 2, seed=1)[1]["new"].examples["row"].tolist() != everywhere[2].tolist()


def test_nothing_is_drawn_or_copied_without_need():
    data, generator = population(), np.random.default_rng(0)
    train, groups = hold_out(data, DataConfig(), generator)
    assert train is data
    assert groups == {}
    assert generator.random() == np.random.default_rng(0).random()
    assert set(held(0.0, 2)[1]) == {"new"}
    assert set(held(0.5, 0)[1]) == {"own"}


@pytest.mark.parametrize(
    ("share", "clients", "message"),
    [
        (0.0, 7, r"^data.held_out_clients = 7: allowed is less than the number of clients, 7$"),
        (0.001, 0, r"^data.held_out_share = 0.001: not a single row is held out"),
    ],
)
def test_what_cannot_be_held_out_is_refused(share, clients, message):
    with pytest.raises(ConfigError, match=message):
        held(share, clients)


def test_clients_are_numpys(model):
    """Client by client, of twelve clients of which one has no rows; in batches that cut clients."""
    rng = np.random.default_rng(3)
    clients = [
        {
            "x": rng.normal(size=(rows, 6)).astype(np.float32),
            "label": rng.integers(0, 3, rows).astype(np.int32),
        }
        for rows in (4, 1, 0, 9, 5, 2, 6, 3, 3, 8, 1, 7)
    ]
    evaluate = fast(make_client_evaluator(model.apply_fn, classification(), 8))
    metrics = evaluate(model.params, from_clients(clients))
    scores, losses = [], []
    for rows in clients:
        if len(rows["label"]):
            logits = np.asarray(model.apply_fn(model.params, rows, None), np.float64)
            scores.append((logits.argmax(-1) == rows["label"]).mean())
            log_odds = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            losses.append(-log_odds[np.arange(len(logits)), rows["label"]].mean())
    # Eleven clients have rows: a tenth of them is two.
    expected = {
        "accuracy": np.mean(scores),
        "accuracy_worst_decile": np.mean(sorted(scores)[:2]),
        "accuracy_spread": np.std(scores),
        "loss": np.mean(losses),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_clients_that_write_are_their_tokens():
    """Perplexity and accuracy of tokens, client by client, of logits that are the data."""
    rng = np.random.default_rng(4)
    clients = [
        {
            "tokens": rng.integers(0, 5, (rows, 4)).astype(np.int32),
            "loss_mask": rng.random((rows, 4)) < 0.7,
            "logits": rng.normal(size=(rows, 4, 5)).astype(np.float32),
        }
        for rows in (3, 0, 5, 2)
    ]
    evaluate = fast(
        make_client_evaluator(lambda _, batch, key: batch["logits"], conditional_generation(), 4)
    )
    metrics = evaluate({}, from_clients(clients))
    expected = {"token_accuracy": [], "loss": [], "perplexity": []}
    for client in clients:
        if len(client["tokens"]):
            predicted, true = client["logits"][:, :-1], client["tokens"][:, 1:]
            counts = client["loss_mask"][:, 1:]
            log_odds = predicted - np.log(np.exp(predicted).sum(-1, keepdims=True))
            nats = -np.take_along_axis(log_odds, true[..., None], -1)[..., 0][counts].mean()
            expected["token_accuracy"].append((predicted.argmax(-1) == true)[counts].mean())
            expected["loss"].append(nats)
            expected["perplexity"].append(np.exp(nats))
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], np.mean(values), rtol=1e-5, err_msg=name)
    lowest = min(expected["token_accuracy"])
    np.testing.assert_allclose(metrics["token_accuracy_worst_decile"], lowest, rtol=1e-5)


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_tells_of_its_clients(model):
    """A model that is never trained, so that what is said of it can be said at once."""
    rng = np.random.default_rng(0)

    def rows(count):
        return {
            "x": rng.normal(size=(count, 6)).astype(np.float32),
            "label": rng.integers(0, 3, count).astype(np.int32),
        }

    result = federate(
        (model.apply_fn, model.params),
        [rows(count) for count in (6, 9, 4, 8)],
        rows(10),
        rounds=1,
        client={"learning_rate": 0.0, "steps": 1},
        data={"held_out_share": 0.5, "held_out_clients": 1},
        evaluation={"attackers": (1,), "proxy_samples": 2},
    )
    start, end = result.history
    assert result.simulation.config.cohort.size == 3
    views = ("global", "server", "proxy", "attacker_1")
    for group in ("own", "new"):
        names = {name for name in end if name.startswith(f"{group}/")}
        metrics = ("accuracy", "accuracy_worst_decile", "accuracy_spread", "loss")
        wanted = {f"{group}/{view}/{metric}" for view in views for metric in metrics}
        assert names == wanted | {f"{group}/proxy/accuracy_std"}
        assert start[f"{group}/global/loss"] == end[f"{group}/global/loss"]
        assert end[f"{group}/global/accuracy_worst_decile"] <= end[f"{group}/global/accuracy"]
    # One client is its own worst tenth.
    assert end["new/global/accuracy_worst_decile"] == end["new/global/accuracy"]
    assert end["new/global/accuracy_spread"] == 0
    summary = summarize(result.history, Costs(1, 1, 1, 1), 1.0)
    assert list(summary["clients"]) == ["own", "new"]
    assert summary["clients"]["own"]["global"] == {
        "mean": end["own/global/accuracy"],
        "worst_decile": end["own/global/accuracy_worst_decile"],
        "spread": end["own/global/accuracy_spread"],
    }
    assert jnp.isfinite(jnp.asarray(list(jax.tree.leaves(summary["clients"])))).all()
