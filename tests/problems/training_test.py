"""The server's own training: on which rows, of which tensors, and what follows."""

import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.schema import resolve
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.problems.training import Preparation, pretrain

PARAMS = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3), "other": jnp.ones(2)}
ROWS = {
    "image": jnp.asarray(np.random.default_rng(0).normal(size=(9, 2)), jnp.float32),
    "label": jnp.arange(9, dtype=jnp.int32) % 3,
}


def linear(params, batch, key):
    return batch["image"] @ params["kernel"] + jnp.expand_dims(params["bias"], 0)


def test_the_first_rows_are_labelled_and_what_follows_sees_all():
    seen = []

    def finish(settings, key, params, private):
        assert settings.batch_size == 4
        seen.append(private["label"].shape)
        return {**params, "other": 2 * params["other"]}

    def train(rows, private, preparation=None):
        config = resolve({"pretraining": {"steps": 5, "batch_size": 4, "rows": rows}})
        return pretrain(config, linear, classification(), PARAMS, private, preparation)

    some = train(4, ROWS, Preparation(frozenset({"kernel"}), finish))
    whole = train(0, {name: rows[:4] for name, rows in ROWS.items()})
    assert seen == [(9,)]
    np.testing.assert_array_equal(some["bias"], PARAMS["bias"])
    np.testing.assert_array_equal(some["other"], 2 * PARAMS["other"])
    assert (np.asarray(whole["bias"]) != 0).all()
    only = train(
        0,
        {name: rows[:4] for name, rows in ROWS.items()},
        Preparation(frozenset({"kernel"}), lambda *arguments: arguments[2]),
    )
    np.testing.assert_array_equal(some["kernel"], only["kernel"])
    assert (np.asarray(some["kernel"]) != np.asarray(train(0, ROWS)["kernel"])).any()
