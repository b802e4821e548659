"""A user's own model as a pure function, and whether it fits the rows and the task.

A mistake is a `ValueError` of one line: what is wrong, what is allowed.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from fedqsn_jax.config.command_line import one_line
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Key, Params
from fedqsn_jax.models.functional import (
    EVALUATION_NAMES,
    TRAINING_NAMES,
    idle_dropouts,
    linen_apply,
    linen_init,
    nnx_split,
)

OwnModel = linen.Module | nnx.Module | tuple[ApplyFn, Params]
"""A module, or a function ``(params, batch, key) -> outputs`` with its parameters."""


def check_names(model: Any, inputs: str, task: Task, arrays: Mapping[str, Any]) -> None:
    """Makes sure that the rows have the arrays that are read by name."""
    names = ", ".join(sorted(arrays))
    if inputs not in arrays and not isinstance(model, tuple):
        raise ValueError(
            f"inputs = {inputs!r}: the model's input; allowed is one of the rows' {names}"
        )
    if task.label is not None and task.label not in arrays:
        raise ValueError(
            f"task: its labels are called {task.label!r}; allowed is one of the rows' {names}, by "
            f"task=classification(NAME)"
        )


def outputs_of(
    apply_fn: ApplyFn, start: Callable[[], Params], example: Batch
) -> jax.ShapeDtypeStruct:
    """What the model makes of a batch; nothing is computed or compiled."""
    try:
        outputs: Any = jax.eval_shape(lambda batch: apply_fn(start(), batch, None), example)
    except KeyError as error:
        raise ValueError(
            f"model: there is no {error} in its parameters, or in a batch, which has "
            f"{', '.join(sorted(example))}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"model: it fails on a batch, which is a dictionary with "
            f"{', '.join(sorted(example))}, without a key, "
            f"as in evaluation: {one_line(error)}"
        ) from error
    if not isinstance(outputs, jax.ShapeDtypeStruct):
        raise ValueError(
            f"model: it returns a value of type {type(outputs).__name__}; allowed is one array"
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(
            f"model: its outputs are {outputs.dtype}, through which nothing can be trained; "
            f"allowed are floating-point numbers"
        )
    return outputs


def check_task(task: Task, outputs: jax.ShapeDtypeStruct, example: Batch) -> None:
    """Makes sure that the task finds in a batch what it reads."""

    def read(outputs: Array, batch: Batch, valid: Array) -> Any:
        return task.loss(outputs, batch, valid), task.statistics(outputs, batch, valid)

    try:
        jax.eval_shape(read, outputs, example, jnp.ones(1, bool))
    except KeyError as error:
        raise ValueError(
            f"task: there is no {error} in a batch, which has {', '.join(sorted(example))}"
        ) from error


def as_function(
    model: OwnModel, key: Key, example: Batch, inputs: str
) -> tuple[ApplyFn, Callable[[], Params]]:
    """Returns the model as a function, and what makes its parameters.

    Args:
      model: The model.
      key: The key of a linen module's initial parameters.
      example: A few rows.
      inputs: The name of a module's input among them.

    Raises:
      ValueError: It is none of the kinds of model, or its function has other arguments.
    """
    if isinstance(model, linen.Module):
        module = model
        return linen_apply(module, inputs), lambda: linen_init(module, key, example, inputs)
    if isinstance(model, nnx.Module):
        own, apply_fn = nnx_split(model, inputs)
        return apply_fn, lambda: own
    if not isinstance(model, tuple) or len(model) != 2 or not callable(model[0]):
        kind = "the class" if isinstance(model, type) else "of type"
        name = (model if isinstance(model, type) else type(model)).__name__
        raise ValueError(
            f"model: {kind} {name}; allowed are an instance of a flax.linen or flax.nnx module, "
            f"and (apply_fn, params)"
        )
    apply_fn, own = model
    _check_signature(apply_fn)
    return apply_fn, lambda: own


def warn_of_idle_dropouts(model: OwnModel, params: Params, example: Batch, inputs: str) -> None:
    """Tells of dropouts that drop nothing in training; see `functional.idle_dropouts`."""
    if isinstance(model, tuple):
        return
    idle = idle_dropouts(model, params, example, inputs)
    if idle:
        warnings.warn(
            f"model: {', '.join(idle)} drops nothing in training. A model is told that it trains "
            f"by an argument of __call__, or a field, called {', '.join(TRAINING_NAMES)}, or that "
            f"it does not by one called {', '.join(EVALUATION_NAMES)}",
            stacklevel=3,
        )


def _check_signature(apply_fn: Callable[..., Any]) -> None:
    """Makes sure that a function can be called as the rounds will."""
    try:
        signature = inspect.signature(apply_fn)
    except (TypeError, ValueError):
        return  # Some callables do not tell; they are taken as they are.
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise ValueError(
            f"model: apply_fn takes {signature}; allowed is (params, batch, key), where the batch "
            f"is a dictionary of arrays and the key None in evaluation"
        ) from error
