"""FedSP (arXiv 2311.06805): clients tune soft prompts on a small model, for a large one they lack.

Prompts are keys and values which all tokens attend to beside their own, in several layers (P-tuning
v2, arXiv 2110.07602). The layers that the small model applies stand for the full model's last ones,
in order: there the prompts are, in both.

The server keeps the full encoder. Clients hold an auxiliary model: some of its layers, applied once
or several times, which the server first distils on rows of its own. In a round a client trains, on
its data, first these layers and then the prompts, each with the other frozen; only the prompts
travel back, and the server averages them. The full model then uses them. A classifier that was not
pre-trained may travel and be tuned like the prompts: the paper's models write their answers with an
output layer that they have; an encoder's classifier has to be learned by someone.

To a round all of it is one tree of parameters, of which some are never sent:

- ``model``: the full encoder, but for its classifier. It never leaves the server.
- ``auxiliary``: the same with the few layers. It is sent, and what became of it stays with clients:
  they keep nothing, and every round starts from the distilled one.
- ``prompts``, float32 ``[prompted layers, 2, count, heads, size]``, keys and values, and
  ``classifier``: sent, and returned where they are tuned.

What computes with such a tree uses the full encoder where the tree has it, and otherwise the
auxiliary model; so the global view is the server's, and every other view is a client's.

What is protected is what the auxiliary model does not have. Its embeddings and norms, and the
layers that it starts from, are the full model's own, and distillation brings it near to the rest:
that is what it is for.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.trees import Selection, TensorRoles, add_delta, select, select_trained
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Key, Params
from fedqsn_jax.data.population import single_client
from fedqsn_jax.models.language.attention import Prefix
from fedqsn_jax.models.language.encoder import Encoder, EncoderConfig
from fedqsn_jax.models.language.transformer import Execution
from fedqsn_jax.protocol.proxy import Proxy, whole_proxy
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.rounds.client import ClientResult, ClientUpdate, Training, make_client_update
from fedqsn_jax.rounds.client_optimizer import ClientOptimizer

PromptedApply = Callable[[Params, Array | None, Batch, Key | None], tuple[Array, Array]]
"""``(params, prompts, batch, key) -> (logits, hidden)`` of an encoder; with a key it trains.
Hidden states are the last ones of the tokens, float32 ``[rows, length, width]``."""

_MODEL, _AUXILIARY, _PROMPTS, _CLASSIFIER = "model", "auxiliary", "prompts", "classifier"
_KEY_STDDEV, _VALUE_STDDEV = 2.0, 0.1


def prompted_encoder(config: EncoderConfig, execution: Execution | None = None) -> PromptedApply:
    """Makes the pure function of an encoder classifier that takes soft prompts."""
    module = Encoder(config, execution or Execution())

    def apply(
        params: Params, prompts: Array | None, batch: Batch, key: Key | None
    ) -> tuple[Array, Array]:
        logits, sown = module.apply(
            {"params": params},
            batch["tokens"],
            batch.get("mask"),
            batch.get("token_types"),
            train=key is not None,
            prefixes=None if prompts is None else prefixes_of(prompts, config.layers),
            rngs=None if key is None else {"dropout": key},
            mutable=["hidden"],
        )
        return logits, sown["hidden"]["last"][0]

    return apply


def prefixes_of(prompts: Array, layers: int) -> Prefix:
    """Returns every layer's keys and values, of which only the last layers' are attended to.

    Args:
      prompts: ``[prompted layers, 2, count, heads, size]``.
      layers: The number of the model's layers, no less than those.

    Returns:
      The prefixes, each tensor with a leading axis of ``layers``.
    """
    others = layers - len(prompts)
    padded = jnp.pad(prompts, ((others, 0), *[(0, 0)] * (prompts.ndim - 1)))
    return Prefix(padded[:, 0], padded[:, 1], jnp.arange(layers) >= others)


def auxiliary_encoder(
    config: EncoderConfig, layers: int, passes: int = 1, execution: Execution | None = None
) -> PromptedApply:
    """Makes the pure function of an encoder that applies its few layers several times in a row.

    Args:
      config: The full encoder's architecture.
      layers: How many layers the parameters have.
      passes: How often all of them are applied, one after the other; their gradients add up. With
        the full model's depth in all, that is what the released code of FedSP has.
      execution: How it is computed.
    """
    deep = prompted_encoder(dataclasses.replace(config, layers=layers * passes), execution)

    def apply(
        params: Params, prompts: Array | None, batch: Batch, key: Key | None
    ) -> tuple[Array, Array]:
        again = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * passes), params["layers"])
        return deep({**params, "layers": again}, prompts, batch, key)

    return apply


def take_layers(params: Params, layers: Sequence[int]) -> Params:
    """Takes some layers of an encoder, with everything that is no layer.

    Args:
      params: The full encoder's parameters.
      layers: The layers to take, in the order in which they are applied: from 0 on, or counted
        from the last, -1, backwards.

    Raises:
      ValueError: There is none, or the encoder has no such layer.
    """
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    if not layers or not all(-depth <= layer < depth for layer in layers):
        raise ValueError(
            f"layers = {tuple(layers)}: allowed are one or more of {-depth} to {depth - 1}"
        )
    taken = jnp.asarray(layers, jnp.int32) % depth
    stack = jax.tree.map(lambda leaf: jnp.take(leaf, taken, axis=0), params["layers"])
    return {**params, "layers": stack}


def add_prompts(
    key: Key, params: Params, count: int, layers: Sequence[int], passes: int = 1
) -> Params:
    """Makes the tree of parameters of an encoder classifier's; see the module's description.

    Args:
      key: The key of the prompts. Untrained ones have large keys, so that each is attended to by
        some tokens rather than by all alike, and small values, so that they change little.
      params: The encoder's parameters; the prompts have its shapes, and nothing else of it.
      count: The number of prompts, in each of the layers that have them.
      layers: The auxiliary model's layers; see `take_layers`.
      passes: How often these are applied.

    Raises:
      ValueError: There are no such layers, or the auxiliary model applies more than there are.
    """
    body = {name: each for name, each in params.items() if name != _CLASSIFIER}
    auxiliary = take_layers(body, layers)
    depth, _, heads, size = params["layers"]["attention"]["key"]["kernel"].shape
    prompted = passes * len(layers)
    if prompted > depth:
        raise ValueError(
            f"passes = {passes} of {len(layers)} layers: allowed are no more layers in all than "
            f"the model's {depth}"
        )
    noise = jax.random.normal(key, (prompted, 2, count, heads, size))
    stddev = jnp.asarray([_KEY_STDDEV, _VALUE_STDDEV]).reshape(1, 2, 1, 1, 1)
    return {
        _MODEL: body,
        _AUXILIARY: auxiliary,
        _PROMPTS: stddev * noise,
        _CLASSIFIER: params[_CLASSIFIER],
    }


def take_auxiliary(params: Params, layers: Sequence[int]) -> Params:
    """Returns such a tree whose auxiliary model is taken from the full one as it is now."""
    return {**params, _AUXILIARY: take_layers(params[_MODEL], layers)}


def full_encoder(params: Params) -> Params:
    """Returns the full encoder's own parameters, classifier included, of such a tree."""
    return {**params[_MODEL], _CLASSIFIER: params[_CLASSIFIER]}


def prompted_apply(full: PromptedApply, auxiliary: PromptedApply) -> ApplyFn:
    """Makes the function of such a tree: of the full model, if the tree has it."""

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        name, function = (
            (_MODEL, full) if jax.tree.leaves(params[_MODEL]) else (_AUXILIARY, auxiliary)
        )
        model = {**params[name], _CLASSIFIER: params[_CLASSIFIER]}
        return function(model, params[_PROMPTS], batch, key)[0]

    return apply


def parts_of(params: Params, tuned: Sequence[str], *, auxiliary: bool) -> TensorRoles:
    """Returns where the tensors of such a tree go: what is not withheld is sent.

    Args:
      params: The tree, or its shapes.
      tuned: What clients tune and return: ``prompts``, ``classifier`` or both.
      auxiliary: Whether clients train the auxiliary model's layers.
    """

    def of(*patterns: str) -> frozenset[str]:
        return select_trained(params, patterns) or frozenset()

    patterns = {_PROMPTS: _PROMPTS, _CLASSIFIER: f"{_CLASSIFIER}/*"}
    returned = of(*(patterns[name] for name in tuned))
    return TensorRoles(
        sent=of(f"{_AUXILIARY}/*", *patterns.values()),
        trained=returned | (of(f"{_AUXILIARY}/layers/*") if auxiliary else frozenset()),
        returned=returned,
        withheld=of(f"{_MODEL}/*"),
    )


def full_tensors(params: Params) -> Selection:
    """Returns the tensors of such a tree that are the full encoder's, classifier included."""
    return select_trained(params, [f"{_MODEL}/*", f"{_CLASSIFIER}/*"])


def returning(update: ClientUpdate, returned: Selection) -> ClientUpdate:
    """The same local training, of which the client gives away less than it has trained."""

    def finish(proxy: Proxy, rows: Array, training: Training) -> ClientResult:
        result = update.finish(proxy, rows, training)
        return dataclasses.replace(result, delta=select(result.delta, returned))

    return update._replace(finish=finish)


def distillation_loss(
    student: tuple[Array, Array],
    teacher: tuple[Array, Array],
    real: Array,
    valid: Array,
    temperature: float = 1.0,
) -> Array:
    """Mean squared error of last hidden states plus soft cross-entropy, float32 scalar.

    Args:
      student: Logits ``[rows, classes]`` and hidden states ``[rows, length, width]``.
      teacher: The same of the model to be like.
      real: Which tokens count, bool ``[rows, length]``; the error is a mean over their entries.
      valid: Which rows count, bool ``[rows]``.
      temperature: Logits are divided by it; the cross-entropy is multiplied by its square, so that
        its gradient keeps its size.
    """
    (logits, hidden), (goal, goal_hidden) = student, teacher
    counted = (real & valid[:, None])[..., None]
    squares = jnp.where(counted, jnp.square(hidden - goal_hidden), 0).sum()
    error = squares / (jnp.maximum(counted.sum(), 1) * hidden.shape[-1])
    odds = jax.nn.softmax(goal / temperature)
    entropies = -(odds * jax.nn.log_softmax(logits / temperature)).sum(axis=-1)
    soft = jnp.where(valid, entropies, 0).sum() / jnp.maximum(valid.sum(), 1)
    return error + temperature**2 * soft


class Distillation(NamedTuple):
    """How the auxiliary model is made to be like the full one.

    Attributes:
      optimizer: Trains the auxiliary model's layers.
      steps: Number of steps.
      batch_size: Rows a step.
      temperature: See `distillation_loss`.
      noise: Both models see the prompts with normal noise of up to this standard deviation, drawn
        for each step: clients will move them, and there too the models should agree.
    """

    optimizer: ClientOptimizer
    steps: int
    batch_size: int
    temperature: float = 1.0
    noise: float = 0.0


def distil(
    key: Key,
    full_apply: PromptedApply,
    auxiliary_apply: PromptedApply,
    *,
    params: Params,
    rows: Batch,
    settings: Distillation,
) -> tuple[Params, Array]:
    """Aligns the auxiliary model's layers with the full model, on rows of the server.

    Args:
      key: Of minibatches and noise. There is no dropout.
      full_apply: The full model.
      auxiliary_apply: The auxiliary model.
      params: The tree of `add_prompts`.
      rows: The server's rows; of them only the tokens matter.
      settings: How.

    Returns:
      The tree with new layers of the auxiliary model, and the mean loss of the steps.
    """
    own, prompts = params[_AUXILIARY], params[_PROMPTS]
    classifier = {_CLASSIFIER: params[_CLASSIFIER]}

    def both(auxiliary: Params, batch: Batch, key: Key | None) -> Any:
        moved = prompts
        if settings.noise and key is not None:
            size_key, noise_key = jax.random.split(fold_in_name(key, "noise"))
            size = settings.noise * jax.random.uniform(size_key)
            moved = prompts + size * jax.random.normal(noise_key, prompts.shape)
        goal = full_apply({**params[_MODEL], **classifier}, moved, batch, None)
        return auxiliary_apply({**auxiliary, **classifier}, moved, batch, None), goal

    def loss(outputs: Any, batch: Batch, valid: Array) -> Array:
        real = batch.get("mask", jnp.ones(batch["tokens"].shape, bool)).astype(bool)
        student, teacher = outputs
        return distillation_loss(
            student, teacher, real=real, valid=valid, temperature=settings.temperature
        )

    task = Task(loss, lambda outputs, batch, valid: {}, lambda sums: sums, score="loss")
    update = make_client_update(
        both,
        task,
        settings.optimizer,
        batch_size=settings.batch_size,
        steps=settings.steps,
        trained=select_trained(own, ["layers/*"]),
    )
    result = update.train(key, whole_proxy(own, Sites()), single_client(rows), jnp.int32(0))
    return {**params, _AUXILIARY: add_delta(own, result.delta)}, result.loss


def alternating(
    auxiliary: ClientOptimizer, prompts: ClientOptimizer, auxiliary_share: float = 0.5
) -> ClientOptimizer:
    """A client's optimizer: first the auxiliary model, all else frozen, then the other way round.

    Args:
      auxiliary: Trains the auxiliary model.
      prompts: Trains the prompts, and the classifier where it is tuned.
      auxiliary_share: Share of the client's steps for the auxiliary model, rounded.

    Raises:
      ValueError: The share is not in [0, 1].
    """
    if not 0 <= auxiliary_share <= 1:
        raise ValueError(f"auxiliary_share = {auxiliary_share}: allowed is 0 to 1")

    def divide(tree: Params) -> dict[str, Params]:
        rest = {name: each for name, each in tree.items() if name != _AUXILIARY}
        return {"auxiliary": tree[_AUXILIARY], "prompts": rest}

    def optimizer(steps: Array) -> optax.GradientTransformation:
        first = jnp.round(auxiliary_share * steps).astype(jnp.int32)
        parts = {"auxiliary": auxiliary(first), "prompts": prompts(steps - first)}

        def init(params: Params) -> tuple[Array, dict[str, Any]]:
            trees = divide(params)
            return jnp.int32(0), {name: each.init(trees[name]) for name, each in parts.items()}

        def update(gradient: Params, state: Any, params: Params | None = None) -> tuple[Any, Any]:
            (count, states), gradients, updates, after = state, divide(gradient), {}, {}
            values = dict.fromkeys(parts) if params is None else divide(params)
            for name, each in parts.items():
                moves, new = each.update(gradients[name], states[name], values[name])
                trained = (count < first) == (name == "auxiliary")
                updates[name] = _select(trained, moves, jax.tree.map(jnp.zeros_like, moves))
                after[name] = _select(trained, new, states[name])
            together = {**updates["prompts"], _AUXILIARY: updates["auxiliary"]}
            return together, (count + 1, after)

        return optax.GradientTransformation(init, update)

    return optimizer


def _select(flag: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)
