"""Low-rank adapters (LoRA, arXiv 2106.09685) as a parameterisation of any model.

A matrix ``W`` gets two tensors beside it, ``A`` and ``B``, and the model computes with
``W + (alpha / rank) A B``. ``A`` is random and ``B`` zero, so training starts from the model as it
was. The model's own function sees merged matrices only, so nothing about it need be known but the
axes of its matrices, and these the rules of mask sites tell: ``A`` has ``W``'s layer and input axes
and then ``rank``, ``B`` its layer axes, ``rank``, and ``W``'s column axes.

Where ``W`` is a mask site, ``B`` follows it: a column of ``W`` that is hidden from a client hides
the same column of ``B``, and both have the same factor. So a client computes with
``(W_j + (alpha / rank) A B_j) / kappa`` in a visible column j, whose expectation over the masks is
the adapted column, and with nothing in a hidden one. ``A`` is seen by all: it has no part of any
one column.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.trees import matches_any
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Key, Params
from fedqsn_jax.protocol.sites import MaskSite, Sites, find_sites


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of one matrix; static.

    Attributes:
      matrix: The matrix, as a mask site.
      rank: Columns of ``A``, which are rows of ``B``.
    """

    matrix: MaskSite
    rank: int

    @property
    def a_path(self) -> str:
        """Path of ``A``, beside the matrix."""
        return f"{self.matrix.path}_lora_a"

    @property
    def b_path(self) -> str:
        """Path of ``B``, beside the matrix."""
        return f"{self.matrix.path}_lora_b"

    @property
    def a_shape(self) -> tuple[int, ...]:
        """``[*layers, *inputs, rank]``."""
        axes = self.matrix.layer_axes + self.matrix.input_axes
        return (*(self.matrix.shape[axis] for axis in axes), self.rank)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """``[*layers, rank, *columns]``."""
        layers, columns = (
            tuple(self.matrix.shape[axis] for axis in axes)
            for axes in (self.matrix.layer_axes, self.matrix.column_axes)
        )
        return (*layers, self.rank, *columns)

    def product(self, a: Array, b: Array) -> Array:
        """Returns ``A B`` in the matrix's shape, float32.

        Args:
          a: ``[*layers, *inputs, rank]``.
          b: ``[*layers, rank, *columns]``.
        """
        site = self.matrix
        rows = a.astype(jnp.float32).reshape(site.layers, site.fan_in, self.rank)
        columns = b.astype(jnp.float32).reshape(site.layers, self.rank, site.columns)
        return site.from_matrices(jnp.matmul(rows, columns, precision="highest"))


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a model; static.

    Attributes:
      adapters: One for each adapted matrix, in the order of the tree.
      scale: What products are multiplied by, ``alpha / rank``.
    """

    adapters: tuple[Adapter, ...]
    scale: float

    def add(self, key: Key, params: Params) -> Params:
        """Returns a model's parameters with adapters that change nothing yet.

        Args:
          key: The key of ``A``, whose entries are normal with variance ``1 / inputs``; a matrix's
            depend on the key and its path only.
          params: The model's parameters.

        Raises:
          ValueError: A matrix does not stand in a dictionary, or the adapter's name is taken.
        """
        new: dict[str, Array] = {}
        for adapter in self.adapters:
            noise = jax.random.normal(fold_in_name(key, adapter.a_path), adapter.a_shape)
            new[adapter.a_path] = noise * adapter.matrix.fan_in**-0.5
            new[adapter.b_path] = jnp.zeros(adapter.b_shape, jnp.float32)

        def beside(path: str, branch: dict[str, Any]) -> dict[str, Any]:
            names = [f"{name}_lora_{letter}" for name in branch for letter in "ab"]
            found = {name: new.pop(path + name) for name in names if path + name in new}
            if set(found) & set(branch):
                raise ValueError(f"{path}{min(set(found) & set(branch))}: the name is an adapter's")
            return branch | found

        adapted = _rebuild(params, beside)
        if new:
            raise ValueError(f"{next(iter(new))}: an adapted matrix must stand in a dictionary")
        return adapted

    def merge(self, params: Params) -> Params:
        """Returns the plain model's parameters that compute the same, without adapters.

        Args:
          params: The parameters with adapters.
        """
        by_path = {adapter.matrix.path: adapter for adapter in self.adapters}
        removed = {path for one in self.adapters for path in (one.a_path, one.b_path)}

        def join(path: str, branch: dict[str, Any]) -> dict[str, Any]:
            def merged(name: str) -> Any:
                adapter = by_path.get(path + name)
                if adapter is None:
                    return branch[name]
                product = adapter.product(branch[f"{name}_lora_a"], branch[f"{name}_lora_b"])
                return (branch[name] + self.scale * product).astype(branch[name].dtype)

            return {name: merged(name) for name in branch if path + name not in removed}

        return _rebuild(params, join)

    def adapt(self, apply_fn: ApplyFn) -> ApplyFn:
        """Returns the model as a function of parameters with adapters."""

        def apply(params: Params, batch: Batch, key: Key | None) -> Array:
            return apply_fn(self.merge(params), batch, key)

        return apply

    def sites(self, sites: Sites, *, quantize: bool, public: bool, flat: bool = False) -> Sites:
        """Returns the mask sites of the model with adapters.

        Args:
          sites: Those of the plain model.
          quantize: Whether adapters are quantized; blocks then run along one column.
          public: Whether the model's own tensors are public: its sites are then gone, and each
            ``B`` draws masks of its own where its matrix would have.
          flat: Whether the quantizer's blocks run through a layer's whole ``A`` and whole ``B``
            instead, row by row; nothing of an adapter can then be hidden.
        """
        added = []
        for adapter in self.adapters:
            base = sites.by_kernel.get(adapter.matrix.path)
            masked = base is not None and base.hideable and not flat
            layers = len(adapter.matrix.layer_axes)
            a, b = (
                _adapter_site(path, shape, layers=layers, columns=columns, flat=flat)
                for path, shape, columns in (
                    (adapter.a_path, adapter.a_shape, 1),
                    (adapter.b_path, adapter.b_shape, len(adapter.matrix.column_axes)),
                )
            )
            if quantize:
                added.append(a)
            if masked:
                follows = None if public else adapter.matrix.path
                added.append(
                    dataclasses.replace(b, hideable=True, quantized=quantize, follows=follows)
                )
            elif quantize:
                added.append(b)
        return Sites((*(() if public else sites), *added))


def find_adapters(
    params: Params, rules: Sequence[str], matrices: Sequence[str], rank: int, alpha: float
) -> Lora:
    """Finds the matrices that get adapters.

    Args:
      params: The plain model's parameters, or their shapes.
      rules: The user's rules of mask sites, which go before the package's own; they tell axes.
      matrices: Patterns of the matrices' paths; none: every matrix that is hidden under
        ``sites="all"``, which leaves heads, embeddings and norms as they are.
      rank: The adapters' rank.
      alpha: Products are multiplied by ``alpha / rank``.

    Raises:
      ValueError: A pattern fits no matrix whose axes are known.
    """
    found = find_sites(params, rules)
    for pattern in matrices:
        if not any(matches_any(site.path, (pattern,)) for site in found):
            raise ValueError(
                f"{pattern!r} fits no matrix; allowed are patterns of: "
                f"{', '.join(site.path for site in found)}"
            )
    chosen = [
        site for site in found if (matches_any(site.path, matrices) if matrices else site.hideable)
    ]
    return Lora(tuple(Adapter(site, rank) for site in chosen), alpha / rank)


def without_adapters(params: Params) -> Params:
    """Returns the plain model's parameters, adapters left out; what they held is not merged."""

    def plain(path: str, branch: dict[str, Any]) -> dict[str, Any]:
        return {name: branch[name] for name in branch if not name.endswith(("_lora_a", "_lora_b"))}

    return _rebuild(params, plain)


def _adapter_site(
    path: str, shape: tuple[int, ...], layers: int, columns: int, flat: bool
) -> MaskSite:
    """A site that is quantized and never hidden; flat, all of a layer is one column."""
    axes = tuple(range(len(shape)))
    end = len(shape) if flat else len(shape) - columns
    return MaskSite(
        path,
        shape,
        layer_axes=axes[:layers],
        input_axes=axes[layers:end],
        column_axes=axes[end:],
        hideable=False,
    )


def _rebuild(tree: Any, change: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Any:
    """Copies nested dictionaries and lists, each dictionary as ``change(path/, branch)`` says."""

    def visit(path: str, branch: Any) -> Any:
        if isinstance(branch, Mapping):
            inner = {name: visit(f"{path}{name}/", value) for name, value in branch.items()}
            return change(path, inner)
        if type(branch) in (list, tuple):
            return type(branch)(visit(f"{path}{i}/", value) for i, value in enumerate(branch))
        return branch

    return visit("", tree)
