"""Pallas with its Triton backend, in which the kernels here are written, where this JAX has it.

JAX 0.11 deprecates the backend. Where it is gone nothing here may be called, and models compute by
plain JAX: see `gpu_blocks.applies`.
"""

from typing import Any

pallas: Any = None
"""The module ``jax.experimental.pallas``, or None."""

triton: Any = None
"""The module ``jax.experimental.pallas.triton``, or None."""

try:
    from jax.experimental import pallas
    from jax.experimental.pallas import triton
except ImportError:
    pallas = triton = None


def exists() -> bool:
    """Returns whether this JAX has the backend."""
    return triton is not None
