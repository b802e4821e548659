"""A device that runs out of memory is answered with what to set."""

import jax
import pytest

from fedqsn_jax.config.schema import Config
from fedqsn_jax.simulation.memory import OutOfMemoryError, answer_out_of_memory


def fail(chunk, message="RESOURCE_EXHAUSTED: Out of memory", **others):
    with answer_out_of_memory(Config(), chunk, **others):
        raise jax.errors.JaxRuntimeError(message)


def test_running_out_of_memory_names_the_setting():
    with pytest.raises(OutOfMemoryError, match=r"^cohort.chunk_size = 32: .* 16.*'scan'.*; ok$"):
        fail(32, outcome=lambda: "ok")
    with pytest.raises(OutOfMemoryError, match=r"client\.batch_size = 32.*'host'$"):
        fail(1)
    with pytest.raises(OutOfMemoryError, match=r"^--at_once=6: .* try 3$"):
        fail(32, points=6)


def test_other_errors_pass():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fail(32, "INTERNAL: something else")
