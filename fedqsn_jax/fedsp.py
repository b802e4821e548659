"""FedSP (arXiv 2311.06805): clients tune soft prompts on a small model, for a large one they lack.

The server keeps the full encoder, frozen. Clients hold an auxiliary model: some of its layers,
which the server first distils on rows of its own. In a round a client trains, on its data, first
the auxiliary model and then the prompts, each with the other frozen; only the prompts travel back,
and the server averages them. The full model then uses them.

Every round starts from the distilled auxiliary model: clients keep nothing from round to round.

What is protected is what the auxiliary model does not have: embeddings, head and the layers that it
starts from are the full model's own, and clients receive them but for what distillation changed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedqsn_jax.aggregation import Aggregator
from fedqsn_jax.client import Training, make_client_update
from fedqsn_jax.client_optimizer import ClientOptimizer, unscheduled
from fedqsn_jax.cohort import ClientAxis, ClientWork, sample_cohort, sum_over_clients
from fedqsn_jax.data.federated import ClientData, single_client
from fedqsn_jax.metrics import make_evaluator
from fedqsn_jax.models.encoder import Encoder, EncoderConfig
from fedqsn_jax.models.transformer import Execution
from fedqsn_jax.proxy import whole_proxy
from fedqsn_jax.randomness import fold_in_name
from fedqsn_jax.tasks import Task
from fedqsn_jax.trainable import Selection
from fedqsn_jax.types import Array, Batch, Key, Params

PromptedApply = Callable[[Params, Array | None, Batch, Key | None], tuple[Array, Array]]
"""``(params, prompts, batch, key) -> (logits, hidden)`` of an encoder; with a key it trains.
Hidden states are the last ones of the tokens, float32 ``[rows, length, width]``."""

_MODEL, _PROMPTS = "auxiliary", "prompts"


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
            prompts=prompts,
            rngs=None if key is None else {"dropout": key},
            mutable=["hidden"],
        )
        return logits, sown["hidden"]["last"][0]

    return apply


def auxiliary_model(
    config: EncoderConfig, params: Params, layers: Sequence[int]
) -> tuple[EncoderConfig, Params]:
    """Takes some layers of an encoder, with everything that is no layer.

    Args:
      config: The full encoder's architecture.
      params: Its parameters, or their shapes.
      layers: The layers to take, from 0 on, in the order in which they are applied.

    Returns:
      The auxiliary encoder's architecture and parameters.

    Raises:
      ValueError: There is none, or the encoder has no such layer.
    """
    if not layers or not all(0 <= layer < config.layers for layer in layers):
        raise ValueError(
            f"layers = {tuple(layers)}: allowed are one or more of 0 to {config.layers - 1}"
        )
    taken = jnp.asarray(layers, jnp.int32)
    stack = jax.tree.map(lambda leaf: jnp.take(leaf, taken, axis=0), params["layers"])
    return dataclasses.replace(config, layers=len(layers)), {**params, "layers": stack}


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


def distil(
    key: Key,
    full_apply: PromptedApply,
    full: Params,
    auxiliary_apply: PromptedApply,
    auxiliary: Params,
    rows: Batch,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    batch_size: int,
    temperature: float = 1.0,
) -> tuple[Params, Array]:
    """Aligns the auxiliary model with the full one, on rows of the server.

    Args:
      key: Of minibatches and the auxiliary model's dropout; the full model has none.
      full_apply: The full model.
      full: Its parameters.
      auxiliary_apply: The auxiliary model.
      auxiliary: Its parameters.
      rows: The server's rows; of them only the tokens matter.
      optimizer: Trains the auxiliary model.
      steps: Number of steps.
      batch_size: Rows a step.
      temperature: See `distillation_loss`.

    Returns:
      The auxiliary parameters, and the mean loss of the steps.
    """

    def both(params: Params, batch: Batch, key: Key | None) -> Any:
        return auxiliary_apply(params, None, batch, key), full_apply(full, None, batch, None)

    def loss(outputs: Any, batch: Batch, valid: Array) -> Array:
        real = batch.get("mask", jnp.ones(batch["tokens"].shape, bool)).astype(bool)
        student, teacher = outputs
        return distillation_loss(student, teacher, real, valid, temperature)

    task = Task(loss, lambda outputs, batch, valid: {}, lambda sums: sums, score="loss")
    update = make_client_update(both, task, unscheduled(optimizer), batch_size, steps=steps)
    result = update.train(key, whole_proxy(auxiliary, ()), single_client(rows), jnp.int32(0))
    moved = jax.tree.map(
        lambda old, delta: (old + delta).astype(old.dtype), auxiliary, result.delta
    )
    return moved, result.loss


def alternating(
    auxiliary: optax.GradientTransformation,
    prompts: optax.GradientTransformation,
    auxiliary_share: float = 0.5,
) -> ClientOptimizer:
    """A client's optimizer: first the auxiliary model, prompts frozen, then the other way round.

    Args:
      auxiliary: Trains the auxiliary model.
      prompts: Trains the prompts.
      auxiliary_share: Share of the client's steps for the auxiliary model, rounded.

    Raises:
      ValueError: The share is not in [0, 1].
    """
    if not 0 <= auxiliary_share <= 1:
        raise ValueError(f"auxiliary_share = {auxiliary_share}: allowed is 0 to 1")
    parts = {_MODEL: auxiliary, _PROMPTS: prompts}

    def optimizer(steps: Array) -> optax.GradientTransformation:
        first = jnp.round(auxiliary_share * steps).astype(jnp.int32)

        def init(params: Params) -> tuple[Array, dict[str, Any]]:
            return jnp.int32(0), {name: each.init(params[name]) for name, each in parts.items()}

        def update(gradient: Params, state: Any, params: Params | None = None) -> tuple[Any, Any]:
            (count, states), updates, after = state, {}, {}
            for name, each in parts.items():
                own = None if params is None else params[name]
                moves, new = each.update(gradient[name], states[name], own)
                trained = (count < first) == (name == _MODEL)
                updates[name] = _select(trained, moves, jax.tree.map(jnp.zeros_like, moves))
                after[name] = _select(trained, new, states[name])
            return updates, (count + 1, after)

        return optax.GradientTransformation(init, update)

    return optimizer


def _select(flag: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)


@struct.dataclass
class FedSPState:
    """What a run carries from round to round. The full model is secret.

    Attributes:
      full: The full model.
      auxiliary: The distilled model from which every client starts in every round.
      prompts: The soft prompts, float32 ``[count, width]``.
      optimizer_state: The server optimizer's.
      round: Number of finished rounds, int32 scalar.
      key: Key of cohorts and of the clients' batches.
    """

    full: Params
    auxiliary: Params
    prompts: Array
    optimizer_state: optax.OptState
    round: Array
    key: Key


class FedSP(NamedTuple):
    """The method as pure functions.

    Attributes:
      init: ``(key, full, auxiliary, prompts) -> FedSPState``.
      round: ``(state, data) -> (state, facts)``: one round; facts are ``train/loss``, and
        ``clients/rejected``.
      evaluate: ``(state, rows) -> metrics``: ``global/METRIC`` of the full model with the prompts,
        ``proxy/METRIC`` of the auxiliary model with them: what clients have.
    """

    init: Callable[[Key, Params, Params, Array], FedSPState]
    round: Callable[[FedSPState, ClientData], tuple[FedSPState, dict[str, Array]]]
    evaluate: Callable[[FedSPState, Batch], dict[str, Array]]


def make_fedsp(
    full_apply: PromptedApply,
    auxiliary_apply: PromptedApply,
    task: Task,
    optimizer: ClientOptimizer,
    aggregator: Aggregator,
    *,
    population: int,
    cohort: int,
    batch_size: int,
    steps: int = 0,
    epochs: int = 1,
    trained: Selection = None,
    client_axis: ClientAxis | None = None,
    evaluation_batch_size: int = 512,
) -> FedSP:
    """Composes the method; every argument is static.

    Args:
      full_apply: The server's model.
      auxiliary_apply: The clients' model.
      task: Its loss and metrics.
      optimizer: A client's, of ``{"auxiliary": ..., "prompts": ...}``; see `alternating`.
      aggregator: Folds deltas of ``{"prompts": ...}`` into the prompts; without mask sites.
      population: Number of clients.
      cohort: Clients a round.
      batch_size: Rows a step.
      steps: Local steps; 0 means ``epochs``.
      epochs: Passes over the client's rows, where ``steps`` is 0.
      trained: The tensors that clients train, ``prompts`` among them; None: all. The others have
        no gradients and no optimizer's state, which for embeddings are large.
      client_axis: How the cohort is run; by default one client after the other.
      evaluation_batch_size: Rows at a time in evaluation.
    """

    def local_apply(params: Params, batch: Batch, key: Key | None) -> Array:
        return auxiliary_apply(params[_MODEL], params[_PROMPTS], batch, key)[0]

    def global_apply(params: Params, batch: Batch, key: Key | None) -> Array:
        return full_apply(params[_MODEL], params[_PROMPTS], batch, key)[0]

    update = make_client_update(
        local_apply, task, optimizer, batch_size, steps=steps, epochs=epochs, trained=trained
    )
    views = {
        "global": make_evaluator(global_apply, task, evaluation_batch_size),
        "proxy": make_evaluator(local_apply, task, evaluation_batch_size),
    }

    def init(key: Key, full: Params, auxiliary: Params, prompts: Array) -> FedSPState:
        state = aggregator.init({_PROMPTS: prompts})
        return FedSPState(full, auxiliary, prompts, state, jnp.int32(0), key)

    def start(context: Any, client: Array) -> Training:
        proxy, data, ids, _ = context
        return update.start(proxy, data.rows(ids[client]))

    def step(context: Any, client: Array, index: Array, training: Training) -> Training:
        proxy, data, ids, key = context
        own_key = jax.random.fold_in(key, ids[client])
        return update.step(own_key, data, ids[client], index, training, update.shared(proxy))

    def finish(context: Any, client: Array, training: Training) -> tuple[Any, tuple[()]]:
        proxy, data, ids, _ = context
        rows = data.rows(ids[client])
        result = update.finish(proxy, rows, training)
        # Only these travel; what became of the auxiliary model stays with the client.
        prompts = {_PROMPTS: result.delta[_PROMPTS]}
        part = aggregator.contribute(prompts, aggregator.weigh(rows), {})
        loss = jnp.where(part.weight > 0, result.loss * part.weight, 0)
        return {"update": part, "loss": loss}, ()

    def run_round(state: FedSPState, data: ClientData) -> tuple[FedSPState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.round)
        ids = sample_cohort(fold_in_name(key, "cohort"), population, cohort)
        sent = {_MODEL: state.auxiliary, _PROMPTS: state.prompts}
        total, _ = sum_over_clients(
            ClientWork(start, step, finish),
            (whole_proxy(sent, ()), data, ids, key),
            update.step_count(data.rows(ids)),
            client_axis or ClientAxis(),
        )
        prompts, optimizer_state = aggregator.finish(
            {_PROMPTS: state.prompts}, state.optimizer_state, total["update"], {}
        )
        weight = total["update"].weight
        facts = {
            "train/loss": jnp.where(weight > 0, total["loss"] / jnp.maximum(weight, 1), 0),
            "clients/rejected": total["update"].rejected,
        }
        state = dataclasses.replace(
            state,
            prompts=prompts[_PROMPTS],
            optimizer_state=optimizer_state,
            round=state.round + 1,
        )
        return state, facts

    def evaluate(state: FedSPState, rows: Batch) -> dict[str, Array]:
        models = {"global": state.full, "proxy": state.auxiliary}
        return {
            f"{view}/{name}": value
            for view, model in models.items()
            for name, value in views[view]({_MODEL: model, _PROMPTS: state.prompts}, rows).items()
        }

    return FedSP(init, run_round, evaluate)
