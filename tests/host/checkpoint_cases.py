"""States and a check that the tests of checkpoints share."""

import jax
import jax.numpy as jnp
import pytest


def weights(value: float, size: int = 3) -> dict[str, jax.Array]:
    return {"weights": jnp.full(size, value, jnp.float32)}


def noise(size: int = 1 << 18) -> dict[str, jax.Array]:
    """Does not compress, so that it takes its time and its space on disk."""
    return {"weights": jax.random.normal(jax.random.key(0), (size,))}


def assert_one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message
