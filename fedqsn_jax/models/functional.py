"""From framework modules to pure functions ``(params, batch, key) -> outputs``."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Key, Params

_NO_STATISTICS = (
    "only parameters can be federated here. Running statistics (BatchNorm) are averages over "
    "clients' data, which no mask covers; use GroupNorm or LayerNorm"
)


def linen_init(module: linen.Module, key: Key, batch: Batch, inputs: str = "image") -> Params:
    """Initializes a linen module on a batch.

    Args:
      module: The module; it is called with ``batch[inputs]``.
      key: The key of the initial parameters.
      batch: A few examples.
      inputs: The name of the model's input in a batch.

    Returns:
      The parameters as nested dictionaries.

    Raises:
      ValueError: The module has collections other than parameters, or no parameters.
    """
    try:
        hash(module)
    except TypeError:  # It has an attribute such as an array.
        variables = jax.jit(functools.partial(_variables, module))(key, batch[inputs])
    else:
        variables = _compiled_variables(module, key, batch[inputs])
    others = sorted(set(variables) - {"params"})
    if others:
        raise ValueError(f"{type(module).__name__} has collection {others[0]!r}: {_NO_STATISTICS}")
    if "params" not in variables:
        raise ValueError(f"{type(module).__name__} has no parameters: there is nothing to train")
    return linen.unbox(variables["params"])


def _variables(module: linen.Module, key: Key, inputs: Array) -> Any:
    return module.init(key, inputs, **_mode(module, training=False))


_compiled_variables = jax.jit(_variables, static_argnums=0)
"""Compiled once for all equal modules, so that many runs of a process share it."""


def in_compute_dtype(apply_fn: ApplyFn, dtype: str) -> ApplyFn:
    """Returns a model that computes in a narrower dtype than its parameters have.

    Floating-point parameters and inputs are converted on their way in, outputs to float32 on their
    way out, so that loss, gradients and optimizer keep the parameters' dtypes. What the model
    itself converts to float32 (a layer with ``dtype=float32``) stays as it says.

    Args:
      apply_fn: The model, of any framework.
      dtype: ``bfloat16``, or ``float32`` for the model as it is.
    """
    if dtype == "float32":
        return apply_fn

    def convert(tree: Any, target: Any) -> Any:
        return jax.tree.map(
            lambda leaf: leaf.astype(target) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
            tree,
        )

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        return convert(apply_fn(convert(params, dtype), convert(batch, dtype), key), jnp.float32)

    return apply


def linen_apply(module: linen.Module, inputs: str = "image") -> ApplyFn:
    """Returns a linen module as a pure function.

    The module is called as ``module(batch[inputs])``; if its ``__call__`` takes ``train`` or
    ``training``, that is True where a key is given, and ``deterministic`` is False there. The key
    is the ``dropout`` one.

    Args:
      module: The module.
      inputs: The name of the model's input in a batch.
    """

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        rngs = None if key is None else {"dropout": key}
        mode = _mode(module, training=key is not None)
        outputs: Any = module.apply({"params": params}, batch[inputs], rngs=rngs, **mode)
        return outputs

    return apply


def _mode(module: linen.Module, training: bool) -> dict[str, Any]:
    """The arguments by which a module is told whether it trains, as far as it takes any."""
    parameters = inspect.signature(type(module).__call__).parameters
    mode = {"train": training, "training": training, "deterministic": not training}
    return {name: value for name, value in mode.items() if name in parameters}


def nnx_split(module: nnx.Module, inputs: str = "image") -> tuple[Params, ApplyFn]:
    """Splits an nnx module into parameters and a pure function, once.

    The module is called as ``module(batch[inputs])``, in training mode where a key is given, which
    then seeds its dropout, every layer's differently; otherwise in evaluation mode.

    Args:
      module: The module; it is not changed, now or later.
      inputs: The name of the model's input in a batch.

    Returns:
      The parameters as nested dictionaries of arrays (lists of layers have numbers as text), and
      the function.

    Raises:
      ValueError: The module has variables other than parameters and random streams.
    """
    split: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
    graph, parameters, streams, rest = split
    for path, variable in nnx.to_flat_state(rest):
        raise ValueError(f"{_text(path)} is a {type(variable).__name__}: {_NO_STATISTICS}")
    flat_parameters = nnx.to_flat_state(parameters)
    flat_streams = nnx.to_flat_state(streams)

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        # By path and not by order: as text, layer 10 sorts before layer 2.
        values = [(path, v.replace(_at(params, path))) for path, v in flat_parameters]
        seeded = [(path, _reseeded(path, v, key)) for path, v in flat_streams]
        # Merging makes new variables, so that nothing leaks from a trace into the module.
        merged = nnx.merge(graph, nnx.from_flat_state(values), nnx.from_flat_state(seeded))
        if key is None:
            merged.eval()
        else:
            merged.train()
        return merged(batch[inputs])

    return _plain(nnx.to_pure_dict(parameters)), apply


def _text(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _at(params: Params, path: tuple[Any, ...]) -> Array:
    for name in path:
        params = params[str(name)]
    return params


def _plain(tree: Any) -> Any:
    """Nested dictionaries with text keys."""
    if isinstance(tree, dict):
        return {str(name): _plain(branch) for name, branch in tree.items()}
    return tree


def _reseeded(path: tuple[Any, ...], variable: Any, key: Key | None) -> Any:
    """A random stream's variable as a training step finds it: its own key, nothing drawn yet."""
    if key is None:
        return variable
    if not jnp.issubdtype(variable.dtype, jax.dtypes.prng_key):
        return variable.replace(jnp.zeros_like(variable[...]))
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    # Layers that were made from one ``nnx.Rngs`` must not drop the same units.
    return variable.replace(fold_in_name(key, _text(path)))
