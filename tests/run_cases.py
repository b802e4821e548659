"""What a run leaves behind, made without running it."""

import json

import jax
import jax.numpy as jnp
from locations import LANGUAGE_GOLDENS

from fedqsn_jax.host.checkpoints import Checkpoints
from fedqsn_jax.models.language.pretrained import load_pretrained


def make_run(directory, name, rounds=(3, 5), **overrides):
    """A configuration and checkpoints, with parameters that changed by the number of the round."""
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
