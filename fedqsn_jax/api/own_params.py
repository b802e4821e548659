"""Parameters that a user brings, in any tree: what of them is trained, and under which names.

The rounds see nested dictionaries of floating-point arrays with text for names. A tree of another
form (lists, tuples, numbers as names, one array alone) becomes such dictionaries on its way in, and
itself again where the model is called. What is no floating-point array (counters, flags, random
keys) is a constant of the model's function: nobody trains it, and it does not travel.

A mistake is a `ValueError` of one line: which tensor, what is wrong, what is allowed.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedqsn_jax.core.arrays import ALLOWED, NUMBERS, check_values, read_array
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Key, Params

_ALONE = "params"
"""The name of an array that is the whole tree."""


@dataclasses.dataclass(frozen=True)
class OwnTree:
    """The form of a user's parameters.

    Attributes:
      structure: The user's tree.
      names: For each of its leaves the names on the way to it; None: it is a constant.
      constants: Those of its leaves that are no parameters, in order.
    """

    structure: Any
    names: tuple[tuple[str, ...] | None, ...]
    constants: tuple[Any, ...]

    def join(self, params: Params) -> Any:
        """Returns the user's tree.

        Args:
          params: Nested dictionaries, as `read_params` gives them.
        """
        constants = iter(self.constants)
        leaves = [next(constants) if path is None else _at(params, path) for path in self.names]
        return jax.tree.unflatten(self.structure, leaves)

    def adapt(self, apply_fn: ApplyFn) -> ApplyFn:
        """Returns a function of the user's tree as one of nested dictionaries."""

        def apply(params: Params, batch: Batch, key: Key | None) -> Array:
            return apply_fn(self.join(params), batch, key)

        return apply


def read_params(tree: Any) -> tuple[OwnTree, Params]:
    """Returns the form of a tree, and its parameters as nested dictionaries on the device.

    Floating-point arrays and Python's floats are parameters; integers, booleans and random keys are
    constants.

    Args:
      tree: The user's parameters.

    Raises:
      ValueError: A leaf is none of these, two have the same name, or there is no parameter.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    params: Params = {}
    names: list[tuple[str, ...] | None] = []
    constants = []
    for key_path, value in leaves:
        path = _names_of(key_path)
        leaf = _read(value, f"params: {'/'.join(path)!r}")
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating):
            _put(params, path, leaf)
            names.append(path)
        else:
            constants.append(leaf)
            names.append(None)
        if isinstance(leaf, jax.Array) and not _is_finite(leaf):
            warnings.warn(
                f"params: {'/'.join(path)!r} has values that are not finite", stacklevel=4
            )
    if not params:
        raise ValueError("params: there is no floating-point array; there is nothing to train")
    return OwnTree(structure, tuple(names), tuple(constants)), params


def _names_of(key_path: Sequence[Any]) -> tuple[str, ...]:
    """The names on the way to a leaf; a name with a slash, such as Haiku's, is several."""
    text = (jax.tree_util.keystr((key,), simple=True) for key in key_path)
    return tuple(name for each in text for name in each.split("/") if name) or (_ALONE,)


def _read(value: Any, where: str) -> Any:
    """A leaf: a floating-point array on the device, or a constant."""
    if isinstance(value, bool | int):
        return value
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return value
        if value.dtype.name not in NUMBERS:
            raise ValueError(f"{where} is of dtype {value.dtype}; allowed are {ALLOWED}")
        return value
    array = read_array(value, where, scalar=True)
    check_values(array, where)
    return jnp.asarray(array)


def _is_finite(leaf: Array) -> bool:
    return not jnp.issubdtype(leaf.dtype, jnp.floating) or bool(jnp.isfinite(leaf).all())


def _put(params: Params, path: tuple[str, ...], leaf: Array) -> None:
    branch = params
    for name in path[:-1]:
        branch = branch.setdefault(name, {})
        if not isinstance(branch, dict):
            break
    if not isinstance(branch, dict) or path[-1] in branch:
        raise ValueError(
            f"params: two tensors are called {'/'.join(path)!r}, or one is called as a part of "
            f"the other's path; rename one"
        )
    branch[path[-1]] = leaf


def _at(params: Params, path: tuple[str, ...]) -> Any:
    for name in path:
        params = params[name]
    return params
