"""Small runs, rows and working directories that tests of several folders share."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from locations import LANGUAGE_GOLDENS

from fedqsn_jax.host.checkpoints import Checkpoints
from fedqsn_jax.models.language.pretrained import load_pretrained

SMALL = [
    "--config=configs/digits.py",
    "--config.rounds=4",
    "--config.rounds_per_call=2",
    "--config.evaluation.every=2",
    "--config.evaluation.proxy_samples=2",
    "--config.checkpoint.every=2",
    "--config.pretraining.steps=5",
    "--config.client.steps=1",
    "--config.cohort.size=3",
    "--config.model.hidden=(16,)",
]
"""Flags of a run on the digits that takes seconds."""


def rows(count, width=4):
    random = np.random.default_rng(count)
    x = random.normal(size=(count, width)).astype(np.float32)
    return {"image": x, "label": (x[:, 0] > 0).astype(np.int32)}


CLIENTS = [rows(5), rows(8)]
"""Two clients' rows, for a model of one's own."""


def make_run(directory, name, rounds=(3, 5), **overrides):
    """What a run leaves behind: its configuration and checkpoints, with parameters that changed."""
    loaded = load_pretrained(LANGUAGE_GOLDENS / name, jax.random.key(0), **overrides)
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps({"model": {"pretrained": str(LANGUAGE_GOLDENS / name)}, "seed": 0})
    )
    with Checkpoints(directory / "checkpoints", keep_latest=2, keep_best=1) as checkpoints:
        for number in rounds:
            params = jax.tree.map(lambda leaf: jnp.asarray(leaf) + number, loaded.params)  # noqa: B023
            state = {"params": params, "attackers": params, "key": jax.random.key(0)}
            checkpoints.save(number, state, [{"round": number}], score=0.5)
    return loaded
