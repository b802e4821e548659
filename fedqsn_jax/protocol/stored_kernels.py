"""Frozen kernels that a model computes with as they are stored, one layer at a time.

The kernels of a scanned stack of layers need not be dequantized as a whole: the scan hands each
layer its own codes and scales, and there they become values, which nobody keeps. So of a frozen
kernel there are the server's own tensor and one copy in codes, whatever the number of clients:
what a client sees of it is a factor a column. Flax takes a kernel out of its box
(`StoredKernel.unbox`) where a module asks for it. Dense layers do it inside a rematerialised
product, so that going backward the values are made again of the codes and are never kept for all
layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.linen.dtypes import promote_dtype

from fedqsn_jax.core.trees import Selection, leaves_by_path, map_by_path
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Columns, Key, Params
from fedqsn_jax.protocol.dense_layers import contracted_axes, intercept_dense, summed_axes
from fedqsn_jax.protocol.low_rank import multiplies
from fedqsn_jax.protocol.proxy import Proxy, is_quantized
from fedqsn_jax.protocol.quantization import Quantized, dequantize
from fedqsn_jax.protocol.sites import MaskSite, Sites


@struct.dataclass
class StoredKernel(nn.meta.AxisMetadata[Array]):
    """A frozen kernel, and what its columns are multiplied by.

    Attributes:
      values: Codes with scales, or the kernel itself in any dtype; in a layer of a scanned stack
        without the axis of layers.
      factors: float32 ``[layers, columns]``, zero where hidden, in a layer ``[columns]``; None: one
        everywhere.
      site: The kernel's site, of all layers (static).
    """

    values: Array | Quantized
    factors: Array | None
    site: MaskSite = struct.field(pytree_node=False)

    def unbox(self) -> Array:
        """Returns the values that the model computes with, float32, in the kernel's shape.

        They are those of `proxy.effective_params`, bit for bit.
        """
        first = self.values.codes if isinstance(self.values, Quantized) else self.values
        whole = first.ndim == (3 if isinstance(self.values, Quantized) else len(self.site.shape))
        if whole:
            return _values(self.values, self.factors, self.site)
        one = self.site.of_one_layer()
        values, factors = jax.tree.map(lambda leaf: leaf[None], (self.values, self.factors))
        return _values(values, factors, one)[0]

    def replace_boxed(self, val: Any) -> Any:
        """Takes values in place of the stored ones."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "StoredKernel":
        """Stays as it is: the shape tells whether there is an axis of layers."""
        del index, params
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "StoredKernel":
        """Stays as it is."""
        del index, params
        return self


def _values(values: Array | Quantized, factors: Array | None, site: MaskSite) -> Array:
    def scaled(kernel: Array) -> Array:
        if factors is None:
            return kernel
        factor = site.to_kernel(factors)
        return jnp.where(factor == 0, 0, kernel * factor)

    if isinstance(values, Quantized):
        return dequantize(values, lambda matrices: scaled(site.from_matrices(matrices)))
    return scaled(values.astype(jnp.float32))


def storable_kernels(
    apply_fn: ApplyFn, params: Params, batch: Batch, sites: Sites, trained: Selection
) -> frozenset[str]:
    """Returns the paths of the kernels that can stay codes: frozen ones of scanned dense layers.

    Args:
      apply_fn: The model, without adapters; it is run on shapes.
      params: Its parameters, or their shapes.
      batch: A few examples, or their shapes.
      sites: The mask sites.
      trained: The tensors that are trained; None: all of them.
    """
    frozen = [
        site
        for site in sites.quantized
        if trained is not None and site.path not in trained and site.layer_axes == (0,)
    ]
    if not frozen:
        return frozenset()
    contracted = contracted_axes(apply_fn, params, batch)
    return frozenset(one.path for one in frozen if multiplies(one, contracted.get(one.path)))


def with_stored_kernels(apply_fn: ApplyFn) -> ApplyFn:
    """Returns a model whose dense layers may be given `StoredKernel`."""

    def multiply(layer: Any, inputs: Array, outputs: Callable[[], Array]) -> Array:
        kernel = layer.get_variable("params", "kernel")
        if not isinstance(kernel, StoredKernel):
            return outputs()
        axes = summed_axes(layer, inputs)

        def product(inputs: Array, kernel: StoredKernel) -> Array:
            inputs, values = promote_dtype(inputs, kernel.unbox(), dtype=layer.dtype)
            own = tuple(range(len(axes)))
            return jax.lax.dot_general(
                inputs, values, ((axes, own), ((), ())), precision=layer.precision
            )

        result = jax.checkpoint(product, prevent_cse=False)(inputs, kernel)
        if not layer.use_bias:
            return result
        (bias,) = promote_dtype(layer.get_variable("params", "bias"), dtype=layer.dtype)
        return result + jnp.expand_dims(bias, tuple(range(result.ndim - bias.ndim)))

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        with intercept_dense(multiply):
            return apply_fn(params, batch, key)

    return apply


def split_stored(proxy: Proxy) -> tuple[Proxy, Params]:
    """Returns a proxy without its quantized kernels, and these alone, both with gaps."""

    plain = jax.tree.map(
        lambda leaf: None if is_quantized(leaf) else leaf, proxy.params, is_leaf=is_quantized
    )
    return dataclasses.replace(proxy, params=plain), select_stored(proxy.params)


def select_stored(params: Params) -> Params:
    """Returns the quantized kernels of a tree, and gaps for all other tensors."""
    return jax.tree.map(
        lambda leaf: leaf if is_quantized(leaf) else None, params, is_leaf=is_quantized
    )


def stored_kernels(params: Params, factors: Columns, sites: Sites) -> Params:
    """Returns a tree in which each quantized kernel stands with its factors.

    Args:
      params: The parameters.
      factors: float32 ``[layers, columns]`` a site; one where a site is absent.
      sites: The mask sites.
    """

    def visit(path: str, leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        site = sites.by_kernel[path]
        return StoredKernel(leaf, factors.get(site.mask_path), site)

    return map_by_path(visit, params, is_leaf=is_quantized)


def column_factors(visible: Columns, scale: dict[str, Array], sites: Sites) -> Columns:
    """Returns what values are multiplied by, float32 ``[layers, columns]``: zero where hidden.

    Args:
      visible: bool ``[layers, columns]`` a site; a site that is absent is seen as a whole.
      scale: float32 scalar a site; a site that is absent has 1.
      sites: The mask sites.
    """
    factors = {}
    for site in sites:
        if site.path in visible or site.path in scale:
            seen = visible.get(site.path, jnp.ones((site.layers, site.columns), bool))
            factors[site.path] = jnp.where(seen, scale.get(site.path, 1.0), 0.0)
    return factors


def paths_of_stored(params: Params) -> frozenset[str]:
    """Returns the paths of the quantized kernels of a tree."""
    leaves = leaves_by_path(params, is_leaf=is_quantized)
    return frozenset(path for path, leaf in leaves.items() if is_quantized(leaf))
