"""Rows of a user's own in which nothing is to be predicted: they weigh nothing, and are told."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax import HostData, Task, federate
from fedqsn_jax.core.tasks import mean

SHORT = {
    "rounds": 1,
    "algorithm": "fedavg",
    "client": {"steps": 1, "batch_size": 16, "optimizer": "sgd", "learning_rate": 0.5},
    "evaluation": {"proxy_samples": 2, "attackers": ()},
}


def masked_task():
    """Squared error of those entries of ``y`` that ``has`` says are known."""

    def error(outputs, batch, valid):
        counts = batch["has"] & valid[:, None]
        return jnp.where(counts, (outputs - batch["y"]) ** 2, 0).sum(), counts

    def loss(outputs, batch, valid):
        total, counts = error(outputs, batch, valid)
        return total / jnp.maximum(counts.sum(), 1)

    def statistics(outputs, batch, valid):
        total, counts = error(outputs, batch, valid)
        rows = counts.any(axis=1).sum(dtype=jnp.float32)
        return {"error": total, "entries": counts.sum(dtype=jnp.float32), "count": rows}

    def summarize(sums):
        found = mean(sums["error"], sums["entries"])
        return {"loss": found, "fit": -found}

    return Task(loss, statistics, summarize, score="fit")


def rows(*targets):
    """Rows with x = 1 whose first entry of y is a target, or that have none (None)."""
    known = np.array([[target is not None, False] for target in targets], bool).reshape(-1, 2)
    y = np.array([[target or 0.0, 9.0] for target in targets], np.float32).reshape(-1, 2)
    return {"x": np.ones((len(targets), 1), np.float32), "y": y, "has": known}


def trained(clients, private=None, **settings):
    model = (lambda params, batch, key: batch["x"] @ params["w"], {"w": jnp.zeros((1, 2))})
    result = federate(
        model, clients, rows(1.0, None), task=masked_task(), private=private, **SHORT | settings
    )
    return float(result.params["w"][0, 0])


def test_clients_weigh_as_their_rows_with_a_target():
    """One step from w = 0 with rate .5 makes w the mean target; 3 rows of 1 and 1 of 5 give 2."""
    clients = [rows(1.0, 1.0, 1.0), rows(5.0, None, None, None), rows()]
    with (
        pytest.warns(UserWarning, match=r"clients: 3 of 7 rows are left out, .* no target"),
        pytest.warns(UserWarning, match=r"test: 1 of 2 rows are left out"),
    ):
        assert trained(clients) == pytest.approx(2.0, abs=1e-6)
    joined = {name: np.concatenate([c[name] for c in clients]) for name in clients[0]}
    # The first row is nobody's.
    with pytest.warns(UserWarning, match=r"clients: 3 of 6|test: 1 of 2"):
        assert trained(HostData(joined, np.array([1, 3, 7, 7]))) == pytest.approx(7 / 3, abs=1e-6)


def test_rows_without_any_target_are_refused():
    with pytest.raises(ValueError, match=r"^clients: none of the 2 rows has a target: nothing is"):
        trained([rows(None, None)])
    with (
        pytest.raises(ValueError, match=r"^private: none of the 1 rows has a target"),
        pytest.warns(UserWarning, match="test: 1 of 2"),
    ):
        trained([rows(1.0)], private=rows(None))
