"""Trees of parameters: paths of tensors, patterns of paths, and trees that hold only some tensors.

A path is the names on the way to a tensor, joined by ``/``. A pattern is compared with the whole
path, name by name, in the shell's style and without regard to case: ``conv_*`` stands for one name
that begins so. A name that is ``*`` alone stands for any number of names, none included. So
``*/head/kernel`` is the kernel of every ``head``, at any depth, and of no ``overhead``. A pattern
that begins with ``=`` is a path, letter by letter and with its case: ``=l[2]/kernel``. Whatever the
package makes itself is written so (`exact_pattern`), since layers may be called anything.

A tree *with gaps* has None where a tensor is left out. To JAX that is a tree with fewer leaves, so
whatever is done to every leaf (gradients, optimizer states, sums of deltas) takes neither time nor
memory for the others. A selection of None means every tensor, and leaves nothing to be done.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedqsn_jax.core.types import Params

Selection = frozenset[str] | None
"""The paths of some tensors of a model; None means all of them."""

TRAINED_NAMES: dict[str, tuple[str, ...]] = {
    "all": ("*",),
    "lora": ("*/*_lora_[ab]",),
    "biases": ("*/bias",),
    "norms": ("*/*norm*/*",),
    "head": (
        "*/head/*",
        "*/*_head/*",
        "*/lmhead/*",
        "*/*classifier*/*",
        "*/logits/*",
        "*/*_logits/*",
    ),
}
"""Patterns of the tensors that are commonly trained, by the names of ``client.trained``."""

_EXACT = "="
"""What a pattern begins with that is a path and nothing else."""


class TensorRoles(NamedTuple):
    """Which of a model's tensors go where.

    By default all of them are sent, trained and returned.

    Attributes:
      sent: Those that clients receive.
      trained: Those that clients train.
      returned: Those of them that travel back, and that the server changes.
      withheld: Those that nobody but the server has. What is neither sent nor withheld is public.
    """

    sent: Selection = None
    trained: Selection = None
    returned: Selection = None
    withheld: Selection = frozenset()


def path_of(key_path: Sequence[Any]) -> str:
    """Returns a pytree key path as text, for example ``encoder/hidden_0/kernel``."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def leaves_by_path(tree: Params, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a tree by their path, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    named = {path_of(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two tensors have the same path; rename one, or keep '/' out of names")
    return named


def map_by_path(
    function: Callable[[str, Any], Any],
    tree: Params,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Params:
    """Returns the tree with ``function(path, leaf)`` at each leaf; paths as in `path_of`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_of(path), leaf), tree, is_leaf=is_leaf
    )


def exact_pattern(path: str) -> str:
    """Returns the pattern that fits one path and no other, whatever its names are made of."""
    return _EXACT + path


def matches_any(path: str, patterns: Iterable[str]) -> bool:
    """Returns whether one of the patterns fits a path, names joined by ``/``."""
    names = path.lower().split("/")
    return any(
        path == pattern.removeprefix(_EXACT)
        if pattern.startswith(_EXACT)
        else _matches(names, pattern.lower().split("/"))
        for pattern in patterns
    )


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    if pattern[0] in ("*", "**"):
        return any(_matches(names[skipped:], pattern[1:]) for skipped in range(len(names) + 1))
    return (
        bool(names)
        and fnmatch.fnmatchcase(names[0], pattern[0])
        and _matches(names[1:], pattern[1:])
    )


def select_trained(params: Params, trained: Sequence[str]) -> Selection:
    """Finds the tensors that are trained.

    Args:
      params: The parameters, or their shapes.
      trained: Names in `TRAINED_NAMES`, or patterns of paths.

    Returns:
      The tensors that any of them names.

    Raises:
      ValueError: One of them names no tensor.
    """
    paths = list(leaves_by_path(params))
    chosen: set[str] = set()
    for name in trained:
        found = {path for path in paths if matches_any(path, TRAINED_NAMES.get(name, (name,)))}
        if not found:
            raise ValueError(
                f"{name!r} names no tensor; allowed are {', '.join(TRAINED_NAMES)}, as far as the "
                f"model has such, or patterns of: {', '.join(paths)}"
            )
        chosen |= found
    return None if len(chosen) == len(paths) else frozenset(chosen)


def select(tree: Params, selection: Selection) -> Params:
    """Returns a tree with gaps: the selected tensors only."""
    if selection is None:
        return tree
    return map_by_path(lambda path, leaf: leaf if path in selection else None, tree)


def exclude(tree: Params, selection: Selection) -> Params:
    """Returns a tree with gaps: the tensors that are not selected."""
    return map_by_path(
        lambda path, leaf: None if selection is None or path in selection else leaf, tree
    )


def combine(*trees: Params) -> Params:
    """Joins trees with gaps of one structure: at each place the first tensor that is there."""

    def first(*leaves: Any) -> Any:
        return next((leaf for leaf in leaves if leaf is not None), None)

    return jax.tree.map(first, *trees, is_leaf=lambda leaf: leaf is None)


def add_delta(params: Params, delta: Params) -> Params:
    """Returns the parameters with a delta added, in their dtypes.

    Args:
      params: The parameters.
      delta: Arrays in their structure, with gaps for tensors that stay as they are.
    """
    moved = jax.tree.map(
        lambda change, old: None if change is None else (old + change).astype(old.dtype),
        delta,
        params,
        is_leaf=lambda leaf: leaf is None,
    )
    return combine(moved, params)


def in_float32(params: Params, trained: Selection) -> Params:
    """Returns the parameters with those that are trained, of floating-point numbers, as float32.

    Args:
      params: The parameters, of which frozen ones may be stored in a narrower dtype.
      trained: The tensors that are trained; None: all of them.
    """

    def widen(path: str, leaf: Any) -> Any:
        is_narrow = leaf.dtype in (jnp.bfloat16, jnp.float16)
        return (
            leaf.astype(jnp.float32) if is_narrow and (trained is None or path in trained) else leaf
        )

    return map_by_path(widen, params)


def tree_bytes(tree: Any) -> int:
    """Bytes of a pytree of arrays or of their shapes; a pseudo-random key counts 8."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        total += math.prod(leaf.shape) * (8 if is_key else leaf.dtype.itemsize)
    return total
