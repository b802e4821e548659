"""Adapters computed beside linen's dense layers: ``x W + (alpha / rank) (x A) B``.

Merging an adapter into its matrix (see `lora`) suits any model, but makes a copy of the matrix and,
going backward, a gradient as large. A dense layer can do without both. So the layers of a linen
model that multiply by an adapted matrix are found by running the model on shapes, and intercepted:
their tensors stay apart, and what all clients have in common is multiplied once for all.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from fedqsn_jax.core.types import ApplyFn, Array, Batch, Key, Params
from fedqsn_jax.protocol.lora import Adapter, Lora


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
        def add_product(layer: nn.Module, inputs: Array, outputs: Array) -> Array:
            if _path(layer) not in paths:
                return outputs
            a: Array = layer.get_variable("params", "kernel_lora_a")
            b: Array = layer.get_variable("params", "kernel_lora_b")
            return outputs + lora.scale * _product(layer, inputs, a, b)

        with nn.intercept_methods(_interceptor(add_product)):
            return apply_fn(rest.merge(params), batch, key)

    return apply, rest


def _dense_adapters(
    lora: Lora, apply_fn: ApplyFn, params: Params, batch: Batch
) -> tuple[Adapter, ...]:
    """The adapters of matrices that dense layers multiply by along their inputs."""
    contracted: dict[str, int] = {}

    def record(layer: nn.Module, inputs: Array, outputs: Array) -> Array:
        if layer.has_variable("params", "kernel_lora_a"):
            contracted[_path(layer)] = len(_axes(layer, inputs))
        return outputs

    def run(params: Params, batch: Batch) -> Array:
        with nn.intercept_methods(_interceptor(record)):
            return apply_fn(params, batch, None)

    jax.eval_shape(run, params, batch)
    return tuple(one for one in lora.adapters if _fits(one, contracted.get(one.matrix.path)))


def _fits(adapter: Adapter, contracted: int | None) -> bool:
    """Whether the matrix's inputs, by its rule, are the axes that the layer sums over."""
    site = adapter.matrix
    in_order = site.layer_axes + site.input_axes + site.column_axes
    return contracted == len(site.input_axes) and in_order == tuple(range(len(site.shape)))


def _interceptor(change: Callable[[nn.Module, Array, Array], Array]) -> Callable[..., Any]:
    """Changes the outputs of dense layers, knowing layer and inputs."""

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        outputs = call(*args, **kwargs)
        layer = context.module
        plain = type(layer) is nn.Dense or (
            type(layer) is nn.DenseGeneral and not _tuple(layer.batch_dims)
        )
        if not plain or context.method_name != "__call__":
            return outputs
        return change(layer, args[0] if args else kwargs["inputs"], outputs)

    return intercept


def _path(layer: nn.Module) -> str:
    return "/".join((*layer.path, "kernel"))


def _tuple(value: int | Iterable[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _axes(layer: Any, inputs: Array) -> tuple[int, ...]:
    """The axes of its inputs that a layer sums over, ascending as its kernel has them."""
    axes = _tuple(layer.axis) if type(layer) is nn.DenseGeneral else (-1,)
    return tuple(sorted(axis % inputs.ndim for axis in axes))


def _product(layer: Any, inputs: Array, a: Array, b: Array) -> Array:
    """Returns ``(x A) B`` in the dtype that the layer computes in."""
    inputs, a, b = promote_dtype(inputs, a, b, dtype=layer.dtype)
    axes, own = _axes(layer, inputs), tuple(range(a.ndim - 1))
    narrow = jax.lax.dot_general(inputs, a, ((axes, own), ((), ())), precision=layer.precision)
    last = narrow.ndim - 1
    return jax.lax.dot_general(narrow, b, (((last,), (0,)), ((), ())), precision=layer.precision)
