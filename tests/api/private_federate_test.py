"""Clients' privacy of a model of one's own: kept in the directory, and warned of."""

import jax.numpy as jnp
import numpy as np
import pytest
from run_cases import rows

from fedqsn_jax import federate


@pytest.mark.usefixtures("quick_compilation")
def test_a_directory_keeps_the_noise_and_a_large_delta_is_warned_of(tmp_path):
    rng = np.random.default_rng(0)
    params = {
        name: {
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "bias": jnp.zeros(shape[1]),
        }
        for name, shape in {"hidden": (4, 8), "head": (8, 2)}.items()
    }

    def apply(params, batch, key):
        del key
        x = jnp.tanh(batch["image"] @ params["hidden"]["kernel"])
        return x @ params["head"]["kernel"]

    def run(rounds):
        with pytest.warns(UserWarning, match=r"delta = 0\.2: it should be well below 1 / 6"):
            return federate(
                (apply, params),
                [rows(count) for count in range(5, 11)],
                rows(20),
                rounds=rounds,
                workdir=tmp_path / "run",
                privacy={"clip": 1.0, "epsilon": 4.0, "delta": 0.2},
                server={"weighting": "uniform"},
                cohort={"size": 3, "sampling": "poisson"},
                on_progress=lambda finished, entries: None,
            )

    first, longer = run(2), run(3)
    assert longer.simulation.account == first.simulation.account
    assert 3.9 < first.history[-1]["privacy/epsilon"] <= 4 < longer.history[-1]["privacy/epsilon"]
