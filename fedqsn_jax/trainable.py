"""Which parameters are trained, and trees that hold only some of a model's tensors.

A tree *with gaps* has None where a tensor is left out. To JAX that is a tree with fewer leaves, so
whatever is done to every leaf (gradients, optimizer states, sums of deltas) takes neither time nor
memory for the others. A selection of None means every tensor, and leaves nothing to be done.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from fedqsn_jax.masking import leaves_by_path, path_of
from fedqsn_jax.patterns import matches_any
from fedqsn_jax.types import Params

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


class Parts(NamedTuple):
    """Which of a model's tensors go where.

    Attributes:
      sent: Those that clients receive.
      trained: Those that clients train.
      returned: Those of them that travel back, and that the server changes.
      withheld: Those that nobody but the server has. What is neither sent nor withheld is public.
    """

    sent: Selection
    trained: Selection
    returned: Selection
    withheld: Selection = frozenset()


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


def keep(tree: Params, selection: Selection) -> Params:
    """Returns a tree with gaps: the selected tensors only."""
    if selection is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path_of(path) in selection else None, tree
    )


def drop(tree: Params, selection: Selection) -> Params:
    """Returns a tree with gaps: the tensors that are not selected."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if selection is None or path_of(path) in selection else leaf, tree
    )


def fill(*trees: Params) -> Params:
    """Joins trees with gaps of one structure: at each place the first tensor that is there."""

    def first(*leaves: Any) -> Any:
        return next((leaf for leaf in leaves if leaf is not None), None)

    return jax.tree.map(first, *trees, is_leaf=lambda leaf: leaf is None)
