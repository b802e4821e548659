"""Linen's dense layers: found in a model by their kernels, and made to compute otherwise."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import linen as nn

from fedqsn_jax.core.types import ApplyFn, Array, Batch, Params

Change = Callable[[Any, Array, Callable[[], Array]], Array]
"""``(layer, inputs, plain outputs' function) -> outputs``."""


def intercept_dense(change: Change) -> Any:
    """Returns a context in which plain dense layers give what a function says."""

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        layer = context.module
        plain = type(layer) is nn.Dense or (
            type(layer) is nn.DenseGeneral and not _tuple(layer.batch_dims)
        )
        if not plain or context.method_name != "__call__":
            return call(*args, **kwargs)
        inputs = args[0] if args else kwargs["inputs"]
        return change(layer, inputs, lambda: call(*args, **kwargs))

    return nn.intercept_methods(intercept)


def contracted_axes(
    apply_fn: ApplyFn, params: Params, batch: Batch, having: str = "kernel"
) -> dict[str, int]:
    """Returns over how many axes each dense layer of a model sums, by its kernel's path.

    Args:
      apply_fn: The model; it is run on shapes.
      params: Its parameters, or their shapes.
      batch: A few examples, or their shapes.
      having: Only layers that are given a tensor of this name are told of: a model may keep from
        its layers what is not its own.
    """
    found: dict[str, int] = {}

    def record(layer: Any, inputs: Array, outputs: Callable[[], Array]) -> Array:
        result = outputs()
        if layer.has_variable("params", having):
            found[kernel_path(layer)] = len(summed_axes(layer, inputs))
        return result

    def run(params: Params, batch: Batch) -> Array:
        with intercept_dense(record):
            return apply_fn(params, batch, None)

    jax.eval_shape(run, params, batch)
    return found


def kernel_path(layer: nn.Module) -> str:
    """Returns the path of a layer's kernel."""
    return "/".join((*layer.path, "kernel"))


def summed_axes(layer: Any, inputs: Array) -> tuple[int, ...]:
    """Returns the axes of its inputs that a layer sums over, ascending as its kernel has them."""
    axes = _tuple(layer.axis) if type(layer) is nn.DenseGeneral else (-1,)
    return tuple(sorted(axis % inputs.ndim for axis in axes))


def _tuple(value: int | Iterable[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
