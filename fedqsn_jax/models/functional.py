"""From framework modules to pure functions ``(params, batch, key) -> outputs``."""

import functools
import inspect
from collections.abc import Callable, Iterator
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

_NO_VARIABLES = (
    "only parameters can be federated here, and nothing else is kept between calls; constants may "
    "be arrays that are no variables"
)

TRAINING_NAMES = ("train", "training", "is_training", "is_train", "train_mode")
"""Names by which modules are told that they train: of arguments of ``__call__``, or of fields."""

EVALUATION_NAMES = (
    *("deterministic", "is_deterministic", "use_running_average"),
    *("eval_mode", "is_eval", "inference"),
)
"""Names by which they are told that they do not."""


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
        why = _NO_STATISTICS if others[0] == "batch_stats" else _NO_VARIABLES
        raise ValueError(f"{type(module).__name__} has collection {others[0]!r}: {why}")
    if "params" not in variables:
        raise ValueError(f"{type(module).__name__} has no parameters: there is nothing to train")
    return linen.unbox(variables["params"])


def _variables(module: linen.Module, key: Key, inputs: Array) -> Any:
    told, mode = _told(module, training=False)
    return told.init(key, inputs, **mode)


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

    The module is called as ``module(batch[inputs])``. If its ``__call__`` takes an argument of
    `TRAINING_NAMES`, that is True where a key is given, and one of `EVALUATION_NAMES` is False
    there; so is a field of the module that has such a name and is True or False. The key is the
    ``dropout`` one; other random streams, whatever their names, have keys that are made from it.

    Args:
      module: The module.
      inputs: The name of the model's input in a batch.
    """

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        # A stream that has no key of its own takes that of ``params``, by Flax's rule.
        rngs = None if key is None else {"dropout": key, "params": fold_in_name(key, "streams")}
        told, mode = _told(module, training=key is not None)
        outputs: Any = told.apply({"params": params}, batch[inputs], rngs=rngs, **mode)
        return outputs

    return apply


def _modes(training: bool) -> dict[str, Any]:
    return {
        **dict.fromkeys(TRAINING_NAMES, training),
        **dict.fromkeys(EVALUATION_NAMES, not training),
    }


def _told(module: linen.Module, training: bool) -> tuple[linen.Module, dict[str, Any]]:
    """A module that knows whether it trains, by its fields, and the arguments that tell the rest.

    What a field says is not said again by an argument: Flax refuses to be told twice.
    """
    modes = _modes(training)
    fields = {name: modes[name] for name in modes if isinstance(getattr(module, name, None), bool)}
    arguments = {name: modes[name] for name in _mode_arguments(module) if name not in fields}
    return (module.clone(**fields) if fields else module), arguments


def _mode_arguments(module: linen.Module | nnx.Module) -> list[str]:
    parameters = inspect.signature(type(module).__call__).parameters
    return [name for name in (*TRAINING_NAMES, *EVALUATION_NAMES) if name in parameters]


def idle_dropouts(
    module: linen.Module | nnx.Module, params: Params, batch: Batch, inputs: str = "image"
) -> list[str]:
    """Returns the paths of dropouts that drop nothing in training; nothing is computed.

    A module that is told in a way of its own that it trains would otherwise train without them,
    and nobody would notice.

    Args:
      module: The module.
      params: Its parameters, or their shapes.
      batch: A few examples, or their shapes.
      inputs: The name of the module's input in a batch.
    """
    idle: dict[str, bool] = {}

    def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        rate = getattr(layer, "rate", None) or getattr(layer, "dropout_rate", None)
        kinds = linen.Dropout | linen.MultiHeadDotProductAttention
        if isinstance(layer, kinds) and rate and context.method_name == "__call__":
            given = kwargs.get("deterministic")
            if isinstance(layer, linen.Dropout) and len(args) > 1:
                given = args[1]
            path = "/".join(layer.path) or type(layer).__name__
            is_idle = (layer.deterministic if given is None else given) is True
            idle[path] = idle.get(path, True) and is_idle
        return call(*args, **kwargs)

    if isinstance(module, linen.Module):
        apply = linen_apply(module, inputs)
        with linen.intercept_methods(watch):
            jax.eval_shape(apply, params, batch, jax.random.key(0))
    else:
        jax.eval_shape(_NnxFunction(module, inputs).watched(idle), params, batch)
    return [path for path, is_idle in idle.items() if is_idle]


def nnx_split(module: nnx.Module, inputs: str = "image") -> tuple[Params, ApplyFn]:
    """Splits an nnx module into parameters and a pure function, once.

    The module is called as ``module(batch[inputs])``, in training mode where a key is given, which
    then seeds its dropout, every layer's differently; otherwise in evaluation mode. Arguments of
    ``__call__`` and attributes of modules that are called as `TRAINING_NAMES` and
    `EVALUATION_NAMES` are told too. Arrays that are no parameters are constants.

    Args:
      module: The module; it is not changed, now or later.
      inputs: The name of the model's input in a batch.

    Returns:
      The parameters as nested dictionaries of arrays (lists of layers have numbers as text), and
      the function, which raises ValueError where a call changes a variable of the module.

    Raises:
      ValueError: The module has running statistics.
    """
    function = _NnxFunction(module, inputs)

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        return function.call(params, batch, key)[0]

    return function.params, apply


def nnx_update(module: nnx.Module, params: Params) -> None:
    """Puts parameters back into an nnx module, in place.

    Example::

      result = federate(model, clients, test)
      nnx_update(model, result.params)
      model(images)

    Args:
      module: The module.
      params: Parameters as `nnx_split` gave them: of `federate`'s result, or of `load`.

    Raises:
      ValueError: A parameter of the module is not among them, or has another shape.
    """
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        try:
            value = _at(params, path)
        except (KeyError, TypeError) as error:
            raise ValueError(f"params: there is no {_text(path)}, which the module has") from error
        if jnp.shape(value) != variable.shape:
            raise ValueError(
                f"params: {_text(path)} has shape {list(jnp.shape(value))}; allowed is the "
                f"module's, {list(variable.shape)}"
            )
        # The state's variables are the module's own.
        variable[...] = jnp.asarray(value, variable.dtype)


class _NnxFunction:
    """An nnx module as a function of its parameters; it keeps the module's values, not itself."""

    def __init__(self, module: nnx.Module, inputs: str) -> None:
        split: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
        self._graph, parameters, streams, rest = split
        self._rest = _fresh(nnx.to_flat_state(rest))
        for path, variable in self._rest:
            if isinstance(variable, nnx.BatchStat):
                raise ValueError(f"{_text(path)} is a {type(variable).__name__}: {_NO_STATISTICS}")
        self._parameters = nnx.to_flat_state(parameters)
        self._streams = _fresh(nnx.to_flat_state(streams))
        self._inputs = inputs
        self.params: Params = _plain(nnx.to_pure_dict(parameters))

    def call(self, params: Params, batch: Batch, key: Key | None) -> tuple[Array, nnx.Module]:
        """Returns the outputs, and the module that gave them."""
        merged = self._merged(params, key)
        return self._outputs(merged, batch, training=key is not None), merged

    def watched(self, idle: dict[str, bool]) -> Callable[[Params, Batch], Array]:
        """The function in training; it fills ``idle`` with whether a dropout has drawn nothing."""

        def apply(params: Params, batch: Batch) -> Array:
            merged = self._merged(params, jax.random.key(0))
            before = {path: _drawn(layer) for path, layer in _dropouts(merged)}
            outputs = self._outputs(merged, batch, training=True)
            idle.update({path: _drawn(layer) is before[path] for path, layer in _dropouts(merged)})
            return outputs

        return apply

    def _merged(self, params: Params, key: Key | None) -> Any:
        # By path and not by order: as text, layer 10 sorts before layer 2.
        values = [(path, v.replace(_at(params, path))) for path, v in self._parameters]
        seeded = [(path, _reseeded(path, v, key)) for path, v in self._streams]
        # A module is merged of the very variables that it is given, and what is drawn counts in
        # them: each call has its own, so that nothing leaks from a trace into the next.
        states = (values, seeded, _fresh(self._rest))
        return nnx.merge(self._graph, *(nnx.from_flat_state(state) for state in states))

    def _outputs(self, merged: Any, batch: Batch, training: bool) -> Array:
        merged.train() if training else merged.eval()
        modes = _modes(training)
        for _, layer in nnx.iter_modules(merged):
            for name in modes:
                if isinstance(vars(layer).get(name), bool):
                    setattr(layer, name, modes[name])
        arguments = {name: modes[name] for name in _mode_arguments(merged)}
        before = [(path, _raw(value)) for path, value in self._variables(merged)]
        outputs: Array = merged(batch[self._inputs], **arguments)
        after = {path: _raw(value) for path, value in self._variables(merged)}
        for path, value in before:
            if after.get(path) is not value:
                raise ValueError(f"{_text(path)} is changed by a call: {_NO_VARIABLES}")
        return outputs

    def _variables(self, merged: nnx.Module) -> list[tuple[Any, Any]]:
        """Everything but parameters and random streams, by path."""
        split: Any = nnx.split(merged, nnx.Param, nnx.RngState, ...)
        return list(nnx.to_flat_state(split[3]))


def _fresh(state: Any) -> list[tuple[Any, Any]]:
    return [(path, v.copy() if isinstance(v, nnx.Variable) else v) for path, v in state]


def _raw(value: Any) -> Any:
    return value.get_raw_value() if isinstance(value, nnx.Variable) else value


def _dropouts(module: nnx.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a module that drop by a random stream of their own."""
    for path, layer in nnx.iter_modules(module):
        rate = getattr(layer, "rate", None) or getattr(layer, "dropout_rate", None)
        kinds = nnx.Dropout | nnx.MultiHeadAttention
        if isinstance(layer, kinds) and rate and isinstance(layer.rngs, nnx.RngStream):
            yield _text(path) or type(layer).__name__, layer


def _drawn(layer: Any) -> Any:
    """What counts the draws of a layer's stream: another object after each of them."""
    return _raw(layer.rngs.count)


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
        return variable.copy()
    if not jnp.issubdtype(variable.dtype, jax.dtypes.prng_key):
        return variable.replace(jnp.zeros_like(variable[...]))
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    # Layers that were made from one ``nnx.Rngs`` must not drop the same units.
    return variable.replace(fold_in_name(key, _text(path)))
