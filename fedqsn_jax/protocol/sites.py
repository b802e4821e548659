"""Mask sites: which columns of which kernels can be hidden.

A *site* is one kernel with its bias. A *column* is one index of the kernel's column axes, together
with the bias entry of that index. Whatever the kernel's shape, a site can be seen as matrices
``[layers, inputs, columns]``, and anything said about its columns (masks, counts, factors) is an
array ``[layers, columns]``, kept in a dictionary by the kernel's path. All sites of a model
together are `Sites`.

Sites are found by *rules*, which are text: ``"PATTERN: ROLE ROLE ..."`` names a role for each
axis of the kernels whose path matches the pattern. Roles are ``layer`` (a scanned stack),
``input`` and ``column``. ``"PATTERN: none"`` says that a tensor is no site.
``"PATTERN: whole ROLE ROLE ..."`` makes a site that is quantized but never hidden. The first rule
that matches decides.

How a pattern is compared with a path is said in `trees`.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import jax.numpy as jnp

from fedqsn_jax.core.trees import exact_pattern, leaves_by_path, matches_any
from fedqsn_jax.core.types import Array, Params

SiteSelection = Literal["all", "residual"]

DEFAULT_RULES: tuple[str, ...] = (
    # The task head, embeddings and norms are never hidden.
    "*/head/kernel: none",
    "*/*_head/kernel: none",
    "*/lmhead/kernel: none",
    "*/*classifier*/*/kernel: none",
    "*/logits/kernel: none",
    "*/*_logits/kernel: none",
    "*/*embed*/*: none",
    "*/*norm*/*: none",
    # Attention as flax.linen and flax.nnx lay it out.
    "*/query/kernel: input column column",
    "*/key/kernel: input column column",
    "*/value/kernel: input column column",
    "*/out/kernel: input input column",
    # The same in a scanned stack.
    "*/query/kernel: layer input column column",
    "*/key/kernel: layer input column column",
    "*/value/kernel: layer input column column",
    "*/out/kernel: layer input input column",
    # Feed-forward layers in a scanned stack.
    "*/*layers/mlp/*/kernel: layer input column",
    # Convolutions: spatial axes and input channels are inputs.
    "*/*conv*/kernel: input input column",
    "*/kernel: input input input column",
    "*/*conv*/kernel: input input input input column",
    # Dense layers.
    "*/kernel: input column",
    # The same with Haiku's names.
    "*/*conv*/w: input input column",
    "*/w: input input input column",
    "*/w: input column",
)
"""The rules that follow the user's own. A rule whose number of axes differs does not match."""

NEVER_HIDDEN: tuple[str, ...] = tuple(
    rule.removesuffix(": none")
    for rule in DEFAULT_RULES
    if rule.endswith(": none") and "embed" not in rule
)
"""What task heads and norms are usually called."""

RESIDUAL_PATTERNS: tuple[str, ...] = (
    "*/*attention*/*/out/kernel",
    "*/*attention*/*/output/kernel",
    "*/*attn*/*/out/kernel",
    "*/*mlp/down/kernel",
    "*/*mlp/output/kernel",
    "*/*feed_forward/output/kernel",
)
"""The layers that write to a transformer's residual stream (``sites="residual"``)."""

_EMBEDDINGS = {"*/*embed*/*/embedding": "column input", "*/*lm_head/kernel": "input column"}

_ROLES = ("layer", "input", "column")


@dataclasses.dataclass(frozen=True)
class MaskSite:
    """One kernel whose columns can be hidden; static, and public.

    Attributes:
      path: The kernel's path in the parameter tree, keys joined by ``/``.
      shape: The kernel's shape.
      layer_axes: Axes of stacked layers; every layer has columns of its own.
      input_axes: Axes that a column runs along. Their sizes multiply to the fan-in.
      column_axes: Axes that index the columns.
      bias_path: Path of the bias that belongs to the columns, or None.
      hideable: False for tensors that are quantized but never hidden.
      quantized: False for tensors whose columns are hidden but that no quantizer changes.
      follows: The path of the site whose masks and factors this one has, in place of its own; its
        layers and columns are the same.
    """

    path: str
    shape: tuple[int, ...]
    layer_axes: tuple[int, ...]
    input_axes: tuple[int, ...]
    column_axes: tuple[int, ...]
    bias_path: str | None = None
    hideable: bool = True
    # Not shown, so that the fingerprints of payloads of sites without them are those of version 1.
    quantized: bool = dataclasses.field(default=True, repr=False)
    follows: str | None = dataclasses.field(default=None, repr=False)

    @property
    def mask_path(self) -> str:
        """The name that its masks and factors have: its own path, or that of whom it follows."""
        return self.follows or self.path

    @property
    def draws(self) -> bool:
        """Whether masks of its own are drawn for it."""
        return self.hideable and self.follows is None

    @property
    def layers(self) -> int:
        """Number of stacked layers (1 without layer axes)."""
        return math.prod(self.shape[axis] for axis in self.layer_axes)

    @property
    def fan_in(self) -> int:
        """Number of kernel entries in one column."""
        return math.prod(self.shape[axis] for axis in self.input_axes)

    @property
    def columns(self) -> int:
        """Number of columns in one layer."""
        return math.prod(self.shape[axis] for axis in self.column_axes)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape that a bias of this site has: its layer and column axes, in the kernel's order."""
        return tuple(n for axis, n in enumerate(self.shape) if axis not in self.input_axes)

    @property
    def _matrix_axes(self) -> tuple[int, ...]:
        return self.layer_axes + self.input_axes + self.column_axes

    def of_one_layer(self) -> "MaskSite":
        """Returns the same of a stack of one layer only."""
        ones = (1 if axis in self.layer_axes else n for axis, n in enumerate(self.shape))
        return dataclasses.replace(self, shape=tuple(ones))

    def to_matrices(self, kernel: Array) -> Array:
        """Rearranges a kernel ``[*shape]`` to ``[layers, inputs, columns]``."""
        return kernel.transpose(self._matrix_axes).reshape(self.layers, self.fan_in, self.columns)

    def from_matrices(self, matrices: Array) -> Array:
        """Rearranges ``[layers, inputs, columns]`` to the kernel's shape."""
        axes = self._matrix_axes
        inverse = sorted(range(len(axes)), key=axes.__getitem__)
        return matrices.reshape([self.shape[axis] for axis in axes]).transpose(inverse)

    def to_bias(self, columns: Array) -> Array:
        """Rearranges ``[layers, columns]`` to the shape of the site's bias."""
        axes = self.layer_axes + self.column_axes
        order = sorted(range(len(axes)), key=axes.__getitem__)
        return columns.reshape([self.shape[axis] for axis in axes]).transpose(order)

    def from_bias(self, bias: Array) -> Array:
        """Rearranges the site's bias to ``[layers, columns]``."""
        kept = sorted(self.layer_axes + self.column_axes)
        order = [kept.index(axis) for axis in self.layer_axes + self.column_axes]
        return bias.transpose(order).reshape(self.layers, self.columns)

    def to_kernel(self, columns: Array) -> Array:
        """Rearranges ``[layers, columns]`` so that it broadcasts against the kernel."""
        return jnp.expand_dims(self.to_bias(columns), self.input_axes)

    def to_tensor(self, path: str, columns: Array) -> Array:
        """Rearranges ``[layers, columns]`` so that it broadcasts against the tensor at a path.

        Args:
          path: The kernel's path, or the bias's.
          columns: What is said about the columns.
        """
        return self.to_kernel(columns) if path == self.path else self.to_bias(columns)


class Sites(tuple[MaskSite, ...]):
    """The mask sites of a model: an immutable, hashable sequence, with look-up by path.

    Example::

      sites = find_sites(params)
      sites.of("encoder/hidden_0/bias").columns
    """

    @functools.cached_property
    def by_kernel(self) -> Mapping[str, MaskSite]:
        """The sites by their kernels' paths."""
        return {site.path: site for site in self}

    @functools.cached_property
    def by_bias(self) -> Mapping[str, MaskSite]:
        """The sites that have a bias, by its path."""
        return {site.bias_path: site for site in self if site.bias_path}

    def of(self, path: str) -> MaskSite | None:
        """Returns the site whose kernel or bias is at a path; None where it is no site's."""
        return self.by_kernel.get(path) or self.by_bias.get(path)

    def masked_by(self, mask_paths: Collection[str]) -> "Sites":
        """Returns the sites whose masks have one of these names; see `MaskSite.mask_path`."""
        return Sites(site for site in self if site.mask_path in mask_paths)

    @property
    def quantized(self) -> "Sites":
        """The sites whose kernels quantizers change."""
        return Sites(site for site in self if site.quantized)

    @property
    def drawing(self) -> "Sites":
        """The sites that draw masks of their own."""
        return Sites(site for site in self if site.draws)

    @property
    def tensors(self) -> frozenset[str]:
        """The paths of all kernels and biases."""
        return frozenset(self.by_kernel) | frozenset(self.by_bias)


def find_sites(
    params: Params,
    rules: Iterable[str] = (),
    selection: SiteSelection = "all",
    *,
    needed: bool = True,
) -> Sites:
    """Finds the mask sites of a parameter tree.

    Args:
      params: The parameters, or their shapes (anything with ``shape`` at the leaves).
      rules: The user's rules; they go before `DEFAULT_RULES`, and name kernels by path.
      selection: ``"all"``: every kernel that a rule matches; ``"residual"``: of those, the ones
        that write to the residual stream (`RESIDUAL_PATTERNS`), and every one that a rule of the
        user's names.
      needed: Whether anything is hidden or quantized, so that a model without sites, or with a
        kernel that no rule knows, is a mistake.

    Returns:
      The sites, in the order of the tree.

    Raises:
      ValueError: A rule is malformed or matches nothing, no rule decides on a tensor named
        ``kernel`` (it would travel whole), or no site was found.
    """
    user_rules = [parse_rule(rule) for rule in rules]
    default_rules = [parse_rule(rule) for rule in DEFAULT_RULES]
    leaves = leaves_by_path(params)
    unused = {pattern for pattern, _ in user_rules}
    sites = []
    for path, leaf in leaves.items():
        by_user = _first_match(user_rules, path, leaf.ndim)
        # A rule that an earlier one overrules has matched all the same.
        unused -= {rule[0] for rule in user_rules if _first_match([rule], path, leaf.ndim)}
        rule = by_user or _first_match(default_rules, path, leaf.ndim)
        if rule is None and path.endswith("kernel") and selection == "all" and needed:
            exact = exact_pattern(path)
            raise ValueError(
                f"no rule says which axes of {path!r}, shape {tuple(leaf.shape)}, are columns; add "
                f"one such as '{exact}: layer input column', or '{exact}: none' to send it whole"
            )
        if rule is None or rule[1] == ("none",):
            continue
        if selection == "residual" and by_user is None and not matches_any(path, RESIDUAL_PATTERNS):
            continue
        sites.append(_make_site(path, leaf.shape, rule[1], leaves))
    if unused:
        raise ValueError(
            f"site rule for {sorted(unused)[0]!r} matches no tensor with that many axes; "
            f"tensors: {', '.join(leaves)}"
        )
    if needed and not any(site.hideable for site in sites):
        raise ValueError(
            f"no mask site found with sites={selection!r}; add a rule such as "
            f"'PATTERN: input column' for one of: {', '.join(leaves)}"
        )
    return Sites(_without_shared_biases(sites))


def embedding_rules(params: Params) -> tuple[str, ...]:
    """Returns rules that quantize embeddings and output layers, and never hide them.

    In float32 they would dominate what travels: they are nearly a third of RoBERTa-base. Blocks of
    the quantizer run along the features of one token's row.

    Args:
      params: The parameters, or their shapes.
    """
    return tuple(
        f"{exact_pattern(path)}: whole {roles}"
        for path, leaf in leaves_by_path(params).items()
        for pattern, roles in _EMBEDDINGS.items()
        if leaf.ndim == 2 and matches_any(path, (pattern,))
    )


def _without_shared_biases(sites: list[MaskSite]) -> list[MaskSite]:
    """Gives a bias that several tensors could claim to the one that is named ``kernel``."""

    def claimed_elsewhere(site: MaskSite) -> bool:
        rivals = [other.path for other in sites if other.bias_path == site.bias_path]
        owner = next((path for path in rivals if path.rpartition("/")[2] == "kernel"), rivals[0])
        return site.bias_path is not None and owner != site.path

    return [
        dataclasses.replace(site, bias_path=None) if claimed_elsewhere(site) else site
        for site in sites
    ]


def parse_rule(rule: str) -> tuple[str, tuple[str, ...]]:
    """Splits a rule into its pattern and its words; ValueError where it is malformed."""
    pattern, separator, words = rule.rpartition(":")
    roles = tuple(words.split())
    axes = roles[1:] if roles[:1] == ("whole",) else roles
    well_formed = roles == ("none",) or (
        "input" in axes and "column" in axes and all(role in _ROLES for role in axes)
    )
    if not separator or not pattern.strip() or not well_formed:
        raise ValueError(
            f"site rule {rule!r} is not 'PATTERN: none' or 'PATTERN: [whole] ROLE ROLE ...' "
            f"with a role of {', '.join(_ROLES)} for each axis, at least one input and one column"
        )
    pattern = pattern.lstrip()
    # A path may end with a blank, a pattern of the user's does not.
    return (pattern if pattern.startswith(exact_pattern("")) else pattern.rstrip()), roles


def _first_match(
    rules: list[tuple[str, tuple[str, ...]]], path: str, rank: int
) -> tuple[str, tuple[str, ...]] | None:
    for pattern, roles in rules:
        axes = len(roles) - (roles[0] == "whole")
        if matches_any(path, (pattern,)) and (roles == ("none",) or axes == rank):
            return pattern, roles
    return None


def _make_site(
    path: str, shape: tuple[int, ...], roles: tuple[str, ...], leaves: dict[str, Any]
) -> MaskSite:
    hideable = roles[0] != "whole"
    axes = roles if hideable else roles[1:]
    layer_axes, input_axes, column_axes = (
        tuple(axis for axis, role in enumerate(axes) if role == wanted) for wanted in _ROLES
    )
    site = MaskSite(
        path,
        tuple(shape),
        layer_axes=layer_axes,
        input_axes=input_axes,
        column_axes=column_axes,
        bias_path=None,
        hideable=hideable,
    )
    parent, _, name = path.rpartition("/")
    bias = "b" if name == "w" else "bias"
    bias_path = f"{parent}/{bias}" if parent else bias
    if bias_path in leaves and tuple(leaves[bias_path].shape) == site.bias_shape:
        site = dataclasses.replace(site, bias_path=bias_path)
    return site
