"""Adapters computed beside linen's dense layers: ``x W + (alpha / rank) (x A) B``.

Merging an adapter into its matrix (see `lora`) suits any model, but makes a copy of the matrix and,
going backward, a gradient as large. A dense layer can do without both. So the layers of a linen
model that multiply by an adapted matrix are found by running the model on shapes, and intercepted:
their tensors stay apart, and what all clients have in common is multiplied once for all.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax.linen.dtypes import promote_dtype

from fedqsn_jax.core.types import ApplyFn, Array, Batch, Key, Params
from fedqsn_jax.protocol.dense_layers import (
    contracted_axes,
    intercept_dense,
    kernel_path,
    summed_axes,
)
from fedqsn_jax.protocol.lora import Adapter, Lora
from fedqsn_jax.protocol.sites import MaskSite


def adapt(lora: Lora, apply_fn: ApplyFn, params: Params, batch: Batch) -> tuple[ApplyFn, Lora]:
    """Returns a model as a function of parameters with adapters, merging as few as it can.

    A matrix that a dense layer multiplies by must not be read in another way too.

    Args:
      lora: The adapters.
      apply_fn: The plain model.
      params: The parameters with adapters, or their shapes.
      batch: A few examples, or their shapes.

    Returns:
      The function, and the adapters that it merges.
    """
    kept = _dense_adapters(lora, apply_fn, params, batch)
    rest = Lora(tuple(one for one in lora.adapters if one not in kept), lora.scale)
    if not kept:
        return lora.adapt(apply_fn), rest
    paths = {adapter.matrix.path for adapter in kept}

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        def add_product(layer: Any, inputs: Array, outputs: Callable[[], Array]) -> Array:
            if kernel_path(layer) not in paths:
                return outputs()
            a: Array = layer.get_variable("params", "kernel_lora_a")
            b: Array = layer.get_variable("params", "kernel_lora_b")
            return outputs() + lora.scale * _product(layer, inputs, a, b)

        with intercept_dense(add_product):
            return apply_fn(rest.merge(params), batch, key)

    return apply, rest


def _dense_adapters(
    lora: Lora, apply_fn: ApplyFn, params: Params, batch: Batch
) -> tuple[Adapter, ...]:
    """The adapters of matrices that dense layers multiply by along their inputs."""
    contracted = contracted_axes(apply_fn, params, batch, "kernel_lora_a")
    return tuple(
        one for one in lora.adapters if multiplies(one.matrix, contracted.get(one.matrix.path))
    )


def multiplies(site: MaskSite, contracted: int | None) -> bool:
    """Returns whether a kernel's inputs, by its rule, are the axes that its layer sums over.

    Args:
      site: The kernel.
      contracted: Over how many axes the layer sums; None: no dense layer has the kernel.
    """
    in_order = site.layer_axes + site.input_axes + site.column_axes
    return contracted == len(site.input_axes) and in_order == tuple(range(len(site.shape)))


def _product(layer: Any, inputs: Array, a: Array, b: Array) -> Array:
    """Returns ``(x A) B`` in the dtype that the layer computes in."""
    inputs, a, b = promote_dtype(inputs, a, b, dtype=layer.dtype)
    axes, own = summed_axes(layer, inputs), tuple(range(a.ndim - 1))
    narrow = jax.lax.dot_general(inputs, a, ((axes, own), ((), ())), precision=layer.precision)
    last = narrow.ndim - 1
    return jax.lax.dot_general(narrow, b, (((last,), (0,)), ((), ())), precision=layer.precision)
