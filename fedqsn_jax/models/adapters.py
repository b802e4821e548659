"""From framework modules to pure functions ``(params, batch, key) -> outputs``."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from fedqsn_jax.types import ApplyFn, Array, Batch, Key, Params

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
      ValueError: The module has collections other than parameters.
    """
    variables = jax.jit(module.init)(key, batch[inputs])
    others = sorted(set(variables) - {"params"})
    if others:
        raise ValueError(f"{type(module).__name__} has collection {others[0]!r}: {_NO_STATISTICS}")
    return linen.unbox(variables["params"])


def linen_apply(module: linen.Module, inputs: str = "image") -> ApplyFn:
    """Returns a linen module as a pure function.

    The module is called as ``module(batch[inputs])``; if its ``__call__`` takes ``train`` or
    ``training``, that is True where a key is given, and ``deterministic`` is False there. The key
    is the ``dropout`` one.
    """
    parameters = inspect.signature(type(module).__call__).parameters

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        mode: dict[str, Any] = {
            name: key is not None for name in ("train", "training") if name in parameters
        }
        if "deterministic" in parameters:
            mode["deterministic"] = key is None
        rngs = None if key is None else {"dropout": key}
        return jnp.asarray(module.apply({"params": params}, batch[inputs], rngs=rngs, **mode))

    return apply


def nnx_split(module: nnx.Module, inputs: str = "image") -> tuple[Params, ApplyFn]:
    """Splits an nnx module into parameters and a pure function, once.

    The module is called as ``module(batch[inputs])``, in training mode where a key is given, which
    then seeds its dropout; otherwise in evaluation mode.

    Returns:
      The parameters as nested dictionaries of arrays, and the function.

    Raises:
      ValueError: The module has variables other than parameters and random streams.
    """
    graph, parameters, streams, rest = nnx.split(  # type: ignore[misc]
        module, nnx.Param, nnx.RngState, ...
    )
    for path, variable in nnx.to_flat_state(rest):
        name = "/".join(map(str, path))
        raise ValueError(f"{name} is a {type(variable).__name__}: {_NO_STATISTICS}")

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        state = jax.tree.unflatten(structure, jax.tree.leaves(params))
        # A view shares no variables with the module outside, so that nothing leaks from a trace.
        merged = nnx.merge(graph, state, _reseeded(streams, key), rest)
        merged.train() if key is not None else merged.eval()
        return merged(batch[inputs])

    structure = jax.tree.structure(parameters)
    return _plain(nnx.to_pure_dict(parameters)), apply


def _plain(tree: Any) -> Any:
    """Nested dictionaries with text keys (lists of layers have numbers), in the same order."""
    if isinstance(tree, dict):
        return {str(name): _plain(branch) for name, branch in tree.items()}
    return tree


def _reseeded(streams: Any, key: Key | None) -> Any:
    if key is None:
        return streams

    def reseed(variable: Any) -> Any:
        is_key = jax.dtypes.issubdtype(variable.dtype, jax.dtypes.prng_key)
        return key if is_key else jnp.zeros_like(variable)

    return jax.tree.map(reseed, streams)
