"""Finds a model's task head by what it does, because users' own models do not name it."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Key, Params

_PROBE_ROWS = 3


class Head(NamedTuple):
    """A task head.

    Attributes:
      kernel: Its path.
      bias: Its bias's path; None: it has none.
    """

    kernel: str
    bias: str | None


def find_heads(apply_fn: ApplyFn, params: Params, rows: Batch, key: Key) -> tuple[Head, ...]:
    """Returns the kernels whose columns are the outputs' last axis.

    A kernel is the task head if changing its columns, and its bias's entries, changes the outputs
    in the same way: rolling the columns rolls the outputs, or, where there is one column only,
    doubling it doubles them. That is tried with random values in every tensor, twice. A head's
    columns may be its rows, too, as those of an embedding that is used once more at the end
    (``embed.attend``): then those of tokens that no row has are rolled.

    Args:
      apply_fn: The model.
      params: Its parameters.
      rows: Rows that it may be given; only their shapes, and integers' values, are used first.
      key: The key of the random values.
    """
    for probe, number in zip(_probes(rows), range(3), strict=False):
        keys = jax.random.split(fold_in_name(key, f"probe {number}"))
        first, second = (_Trial(apply_fn, params, probe, each).heads() for each in keys)
        found = tuple(head for head in first if head in second)
        if found:
            return found
    return ()


def _probes(rows: Batch) -> Iterator[Batch]:
    """Batches to look at a model with: the user's rows may be zero, or no numbers.

    First with random numbers, and integers that occur in the rows; then with one integer for all;
    then the rows themselves, for models that take nothing else.
    """
    generator = np.random.default_rng(0)
    host = {name: np.asarray(array) for name, array in rows.items()}

    def floats(array: np.ndarray) -> bool:
        return bool(jnp.issubdtype(array.dtype, jnp.floating))

    def random(array: np.ndarray) -> np.ndarray:
        shape = (_PROBE_ROWS, *array.shape[1:])
        if floats(array):
            return generator.normal(size=shape).astype(array.dtype)
        return generator.choice(np.unique(array), shape).astype(array.dtype)

    def single(array: np.ndarray) -> np.ndarray:
        return np.full_like(random(array), array.max())

    varied = {name: random(array) for name, array in host.items()}
    for probe in (
        varied,
        {name: varied[name] if floats(each) else single(each) for name, each in host.items()},
        {name: each[:_PROBE_ROWS] for name, each in host.items()},
    ):
        yield {name: jnp.asarray(array) for name, array in probe.items()}


class _Trial:
    """A model with random values in every tensor, on some rows."""

    def __init__(self, apply_fn: ApplyFn, params: Params, rows: Batch, key: Key) -> None:
        self._apply_fn, self._rows = apply_fn, rows
        self._structure = jax.tree.structure(params)
        self._values = {
            path: _random(fold_in_name(key, path), leaf)
            for path, leaf in leaves_by_path(params).items()
        }
        self._plain = self._outputs({})
        size = self._plain.shape[-1]
        self._all = np.arange(size)
        used = [
            np.asarray(a).ravel() for a in rows.values() if jnp.issubdtype(a.dtype, jnp.integer)
        ]
        self._unused = np.setdiff1d(self._all, np.concatenate(used) if used else [])

    def heads(self) -> list[Head]:
        if not jnp.isfinite(self._plain).all() or self._is_close(self._plain, self._all):
            return []
        found = []
        for path, leaf in self._values.items():
            if leaf.ndim >= 2 and leaf.shape[-1] == len(self._all):
                found += self._head(path, leaf.ndim - 1, self._all)
            if found and found[-1].kernel == path:
                continue
            if leaf.ndim == 2 and leaf.shape[0] == len(self._all) and len(self._unused) > 1:
                found += self._head(path, 0, self._unused)
        return found

    def _head(self, path: str, axis: int, columns: np.ndarray) -> list[Head]:
        kernel = {path: _changed(self._values[path], axis, columns)}
        for bias in (*self._biases(path, anywhere=axis == 0), None):
            values = {bias: _changed(self._values[bias], 0, columns)} if bias else {}
            if self._is_close(self._outputs(kernel | values), columns):
                return [Head(path, bias)]
        return []

    def _biases(self, path: str, anywhere: bool) -> list[str]:
        """The vectors that a kernel's outputs may be added to: those named so first.

        Args:
          path: The kernel's.
          anywhere: Whether they need not stand beside it, as that of an embedding does not.
        """
        parent = path.rpartition("/")[0]
        found = [
            other
            for other, value in self._values.items()
            if value.shape == self._plain.shape[-1:]
            and (anywhere or other.rpartition("/")[0] == parent)
        ]
        return sorted(found, key=lambda other: other.rpartition("/")[2] not in ("bias", "b"))

    def _outputs(self, changed: dict[str, Array]) -> Array:
        values = list((self._values | changed).values())
        return self._apply_fn(jax.tree.unflatten(self._structure, values), self._rows, None)

    def _is_close(self, outputs: Array, columns: np.ndarray) -> bool:
        expected = _changed(self._plain, self._plain.ndim - 1, columns)
        tolerance = 1e-3 * jnp.abs(expected).max()
        return bool(jnp.allclose(outputs, expected, rtol=1e-3, atol=tolerance))


def _random(key: Key, leaf: Array) -> Array:
    fan_in = max(math.prod(leaf.shape[:-1]), 1)
    return (jax.random.normal(key, leaf.shape) / math.sqrt(fan_in)).astype(leaf.dtype)


def _changed(array: Array, axis: int, columns: Sequence[int] | np.ndarray) -> Array:
    """The array with some columns rolled, or with its only column doubled."""
    if len(columns) == 1:
        return 2 * array
    order = np.arange(array.shape[axis])
    order[columns] = np.roll(columns, 1)
    return jnp.take(array, jnp.asarray(order), axis=axis)
