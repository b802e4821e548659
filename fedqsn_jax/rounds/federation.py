"""One federated round, and several in one compiled call."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from fedqsn_jax.core.keys import client_round_key, fold_in_name
from fedqsn_jax.core.tasks import mean
from fedqsn_jax.core.trees import Selection, combine, exclude, select
from fedqsn_jax.core.types import Array, Batch, Columns, Key, Params
from fedqsn_jax.data.population import ClientData, HeldOut
from fedqsn_jax.protocol.proxy import (
    Proxy,
    ProxyTransform,
    dequantize_proxy,
    select_columns,
    whole_proxy,
)
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.protocol.upload import Residuals, Upload, whole_upload
from fedqsn_jax.rounds.aggregation import Aggregator
from fedqsn_jax.rounds.client import ClientUpdate, Training
from fedqsn_jax.rounds.client_axis import ClientAxis, ClientWork, sample_cohort, sum_over_clients
from fedqsn_jax.rounds.client_evaluation import ClientEvaluator
from fedqsn_jax.rounds.evaluation import Evaluator
from fedqsn_jax.rounds.participation import EVERYONE, Participation, draw_attendance
from fedqsn_jax.rounds.views import (
    Attacker,
    evaluate_views,
    make_attacker,
    received_columns,
    update_attacker,
)


@struct.dataclass
class ServerState:
    """Everything that a run carries from round to round. It is secret as a whole.

    Attributes:
      params: The hidden model.
      optimizer_state: The server optimizer's.
      transform_state: What the proxy transform drew once: the server mask.
      attackers: The copies that colluding clients hold, by name.
      residuals: What each client keeps of its deltas; in truth the clients have it.
      round: Number of finished rounds, int32 scalar.
      secret_key: Key of the masks.
      public_key: Key of cohorts and of the clients' batches.
    """

    params: Params
    optimizer_state: optax.OptState
    transform_state: Any
    attackers: dict[str, Attacker]
    residuals: Residuals
    round: Array
    secret_key: Key
    public_key: Key


@struct.dataclass
class _Context:
    """What a round's clients have in common, and what is known of each before it trains.

    Attributes:
      prepared: The round's proxy before client masks, dequantized.
      shared: The frozen tensors that all clients compute with alike.
      data: The population's rows.
      ids: The cohort, int32 ``[cohort]``.
      visible: The columns that each client sees, bool ``[cohort, layers, columns]`` a site.
      scale: Each client's factors, float32 ``[cohort]`` a site.
      weights: The clients' weights in the mean, float32 ``[cohort]``.
      broken: Whose update is NaN, bool ``[cohort]``.
      residuals: What each client of the population keeps.
      training_key: The round's key of batches and dropout; a client's id is folded in.
    """

    prepared: Proxy
    shared: Params
    data: ClientData
    ids: Array
    visible: Columns
    scale: dict[str, Array]
    weights: Array
    broken: Array
    residuals: Residuals
    training_key: Key


class Federation(NamedTuple):
    """A federated method as pure functions.

    Attributes:
      init: ``(key, params) -> ServerState``.
      round: ``(state, data) -> (state, facts)``: one round. Facts are float32 ``train/loss``, and
        uint32 counts: ``clients/returned`` and ``clients/rejected``; for each site that has masks
        ``visible/PATH``, visible columns summed over the cohort, and ``returned/PATH``, summed over
        the clients that returned an update.
      prepare: ``state -> Proxy``: the proxy before client masks, dequantized.
      cohort: ``state -> ids``, int32 ``[cohort]``: who takes part in the state's next round.
      proxy_keys: ``state -> keys`` of the client masks that the proxy view averages over.
      evaluate: ``(state, rows) -> metrics`` of all views, named ``view/metric``. Rows are held-out
        ones, or `HeldOut` with clients' too; metrics of those are named ``group/view/metric``.
    """

    init: Callable[[Key, Params], ServerState]
    round: Callable[[ServerState, ClientData], tuple[ServerState, dict[str, Array]]]
    prepare: Callable[[ServerState], Proxy]
    cohort: Callable[[ServerState], Array]
    proxy_keys: Callable[[ServerState], Key]
    evaluate: Callable[[ServerState, Batch | HeldOut], dict[str, Array]]


def make_federation(
    transform: ProxyTransform,
    update: ClientUpdate,
    aggregator: Aggregator,
    evaluator: Evaluator,
    sites: Sites,
    *,
    population: int,
    cohort: int,
    client_axis: ClientAxis,
    proxy_samples: int,
    attackers: tuple[int, ...],
    score: str,
    sent: Selection = None,
    withheld: Selection = frozenset(),
    participation: Participation = EVERYONE,
    upload: Upload | None = None,
    client_evaluator: ClientEvaluator | None = None,
) -> Federation:
    """Composes a federated method; every argument is static.

    Args:
      transform: Makes proxies.
      update: Trains them.
      aggregator: Folds deltas into the hidden model.
      evaluator: Evaluates one set of parameters.
      sites: The mask sites.
      population: Number of clients.
      cohort: Clients a round.
      client_axis: How the cohort is run.
      proxy_samples: Client masks that the proxy view averages over.
      attackers: Numbers of colluding clients; ``attacker_N`` names each in the metrics.
      score: The metric whose spread over client masks is reported.
      sent: The tensors that proxies are made of; the others are frozen, and public unless they are
        withheld.
      withheld: Tensors that nobody but the server has, so that no view but the global one has them.
      participation: How clients fail.
      upload: The way back; None: updates travel as they are.
      client_evaluator: Evaluates one set of parameters on clients' held-out rows, if there are any.
    """
    upload = upload or whole_upload()

    def public(params: Params) -> Params:
        return exclude(exclude(params, sent), withheld)

    def init(key: Key, params: Params) -> ServerState:
        secret_key, public_key = fold_in_name(key, "secret"), fold_in_name(key, "public")
        attacker_key = fold_in_name(public_key, "attackers")
        return ServerState(
            params=params,
            optimizer_state=aggregator.init(params),
            transform_state=transform.init(secret_key, whole_proxy(select(params, sent), sites)),
            attackers={
                f"attacker_{count}": make_attacker(
                    attacker_key, population, count, select(params, sent), sites
                )
                for count in attackers
            },
            residuals=upload.init(params, population),
            round=jnp.int32(0),
            secret_key=secret_key,
            public_key=public_key,
        )

    def prepare(state: ServerState) -> Proxy:
        whole = whole_proxy(select(state.params, sent), sites)
        return dequantize_proxy(transform.prepare(state.transform_state, whole))

    def cohort_of(state: ServerState) -> Array:
        round_key = jax.random.fold_in(state.public_key, state.round)
        return sample_cohort(fold_in_name(round_key, "cohort"), population, cohort)

    def proxy_of(context: _Context, client: Array) -> Proxy:
        visible, scale = jax.tree.map(lambda leaf: leaf[client], (context.visible, context.scale))
        return select_columns(context.prepared, visible, scale)

    def start(context: _Context, client: Array) -> Training:
        rows = context.data.rows(context.ids[client])
        return update.start(proxy_of(context, client), rows)

    def step(context: _Context, client: Array, index: Array, training: Training) -> Training:
        client_id = context.ids[client]
        key = jax.random.fold_in(context.training_key, client_id)
        return update.step(key, context.data, client_id, index, training, context.shared)

    def finish(
        context: _Context, client: Array, training: Training
    ) -> tuple[dict[str, Any], Residuals]:
        rows = context.data.rows(context.ids[client])
        proxy = proxy_of(context, client)
        result = update.finish(proxy, rows, training)
        residuals = {path: each[context.ids[client]] for path, each in context.residuals.items()}
        delta, kept = upload.send(result.delta, residuals, proxy.visible)
        if participation.nan:
            broken = context.broken[client]
            delta = jax.tree.map(lambda leaf: jnp.where(broken, jnp.nan, leaf), delta)
        part = aggregator.contribute(delta, context.weights[client], proxy.visible)
        accepted = part.weight > 0
        trained = accepted & (training.steps > 0)
        contribution = {
            "update": part,
            "loss": jnp.where(trained, result.loss * result.examples, 0),
            "examples": jnp.where(trained, result.examples, 0).astype(jnp.float32),
        }
        # What was rejected never arrived: the client keeps what it had.
        return contribution, jax.tree.map(
            lambda new, old: jnp.where(accepted, new, old), kept, residuals
        )

    def run_round(state: ServerState, data: ClientData) -> tuple[ServerState, dict[str, Array]]:
        prepared, ids = prepare(state), cohort_of(state)

        def masks(client_id: Array) -> tuple[Columns, dict[str, Array]]:
            key = client_round_key(state.secret_key, state.round, client_id)
            proxy = transform.apply(key, state.transform_state, prepared)
            return proxy.visible, proxy.scale

        visible, scale = jax.vmap(masks)(ids)
        rows = data.rows(ids)
        weights = aggregator.weigh(rows)
        training_key = jax.random.fold_in(state.public_key, state.round)
        computed_with = combine(prepared.params, public(state.params))
        shared = update.shared(dataclasses.replace(prepared, params=computed_with, visible=visible))
        attendance = draw_attendance(training_key, ids, update.step_count(rows), participation)
        context = _Context(
            prepared,
            shared,
            data,
            ids,
            visible,
            scale,
            weights,
            attendance.broken,
            state.residuals,
            training_key,
        )
        total, kept = sum_over_clients(
            ClientWork(start, step, finish), context, attendance.steps, client_axis
        )
        params, optimizer_state = aggregator.finish(
            state.params,
            state.optimizer_state,
            total["update"],
            prepared.visible,
            prepared.params,
        )
        attackers = {
            name: update_attacker(
                attacker, received_columns(attacker, ids, visible), prepared, sites
            )
            for name, attacker in state.attackers.items()
        }
        facts = {
            "train/loss": mean(total["loss"], total["examples"]),
            "clients/returned": attendance.returns.sum(dtype=jnp.uint32),
            "clients/rejected": total["update"].rejected,
        }
        for path, seen in visible.items():
            facts[f"visible/{path}"] = seen.sum(dtype=jnp.uint32)
            returned = seen & attendance.returns[:, None, None]
            facts[f"returned/{path}"] = returned.sum(dtype=jnp.uint32)
        state = dataclasses.replace(
            state,
            params=params,
            optimizer_state=optimizer_state,
            attackers=attackers,
            residuals=_replaced(state.residuals, kept, ids, attendance.returns),
            round=state.round + 1,
        )
        return state, facts

    def proxy_keys(state: ServerState) -> Key:
        key = fold_in_name(jax.random.fold_in(state.secret_key, state.round), "proxy_view")
        return jax.random.split(key, proxy_samples)

    def evaluate(state: ServerState, rows: Batch | HeldOut) -> dict[str, Array]:
        def views_on(evaluator: Callable[[Params, Any], dict[str, Array]], rows: Any) -> Any:
            def evaluate_whole(params: Params, rows: Any) -> dict[str, Array]:
                return evaluator(combine(params, public(state.params)), rows)

            return evaluate_views(
                evaluate_whole,
                rows,
                state.params,
                exclude(state.params, withheld),
                prepare(state),
                lambda key, prepared: transform.apply(key, state.transform_state, prepared),
                proxy_keys(state),
                state.attackers,
                score,
            )

        if not isinstance(rows, HeldOut):
            return views_on(evaluator, rows)
        metrics = views_on(evaluator, rows.test)
        if client_evaluator is not None:
            for group, data in rows.clients.items():
                of_group = views_on(client_evaluator, data)
                metrics |= {f"{group}/{name}": value for name, value in of_group.items()}
        return metrics

    return Federation(init, run_round, prepare, cohort_of, proxy_keys, evaluate)


def _replaced(residuals: Residuals, kept: Residuals, ids: Array, returns: Array) -> Residuals:
    """The population's residuals, with those of the clients that returned."""

    def replace(all: Array, new: Array) -> Array:
        # Beyond the population: dropped.
        places = jnp.where(returns, ids, len(all) + jnp.arange(len(ids)))
        return all.at[places].set(new, mode="drop", unique_indices=True)

    return jax.tree.map(replace, residuals, kept)


def draw_cohorts(federation: Federation, state: ServerState, rounds: int) -> np.ndarray:
    """Returns who takes part in each of a run's rounds, int32 ``[rounds, cohort]``, on the host.

    Args:
      federation: The method.
      state: A state of the run; which one does not matter. Of its leaves only the public key need
        be an array.
      rounds: The run's number of rounds, from the first on.
    """
    cohort = jax.eval_shape(federation.cohort, state).shape[0]
    # So many rounds at once that a draw stays small.
    block = max(1, min(rounds, _DRAWN_AT_ONCE // cohort))

    @jax.jit
    @jax.vmap
    def draw(index: Array) -> Array:
        return federation.cohort(dataclasses.replace(state, round=index))

    blocks = [
        np.asarray(draw(jnp.arange(start, start + block, dtype=jnp.int32)))
        for start in range(0, rounds, block)
    ]
    return np.concatenate([np.zeros((0, cohort), np.int32), *blocks])[:rounds]


_DRAWN_AT_ONCE = 2**22
"""Client ids that `draw_cohorts` draws in one call."""


class CallResult(NamedTuple):
    """What a call of several rounds brings to the host, in one transfer.

    Attributes:
      facts: Of each round, ``[rounds_per_call]``; rounds beyond the call's stop hold zeros.
      metrics: Of each round, ``[rounds_per_call]``; zeros where it was not evaluated.
      evaluated: bool ``[rounds_per_call]``.
    """

    facts: dict[str, Array]
    metrics: dict[str, Array]
    evaluated: Array


def make_rounds(
    federation: Federation, *, rounds_per_call: int, evaluate_every: int
) -> Callable[
    [ServerState, ClientData, Batch | HeldOut, Array, Array], tuple[ServerState, CallResult]
]:
    """Makes the compiled call that runs several rounds without the host.

    Args:
      federation: The method.
      rounds_per_call: The most rounds a call may run.
      evaluate_every: A round is evaluated if its number is a multiple of this, or the last.

    Returns:
      ``(state, data, test_rows, stop, last) -> (state, CallResult)``, jitted, with the state
      donated. It runs rounds until ``state.round == stop`` (int32 scalar, at most
      ``rounds_per_call`` ahead); ``last`` is the number of the run's last round.
    """

    # Inlined, so that they are traced once for their shapes and for the program.
    run_round = jax.jit(federation.round, inline=True)
    evaluate = jax.jit(federation.evaluate, inline=True)

    def run(
        state: ServerState, data: ClientData, rows: Batch | HeldOut, stop: Array, last: Array
    ) -> tuple[ServerState, CallResult]:
        _, fact_shapes = jax.eval_shape(run_round, state, data)
        metric_shapes = jax.eval_shape(evaluate, state, rows)
        no_metrics = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), metric_shapes)

        def buffer(shape: jax.ShapeDtypeStruct) -> Array:
            return jnp.zeros((rounds_per_call, *shape.shape), shape.dtype)

        result = CallResult(
            jax.tree.map(buffer, fact_shapes),
            jax.tree.map(buffer, metric_shapes),
            jnp.zeros(rounds_per_call, bool),
        )

        def body(index: Array, carry: tuple) -> tuple:
            state, result = carry
            state, facts = run_round(state, data)
            due = (state.round % evaluate_every == 0) | (state.round == last)
            metrics = jax.lax.cond(
                due,
                lambda: evaluate(state, rows),
                lambda: no_metrics,
            )
            values = CallResult(facts, metrics, due)
            return state, jax.tree.map(lambda all, one: all.at[index].set(one), result, values)

        return jax.lax.fori_loop(0, stop - state.round, body, (state, result))

    return jax.jit(run, donate_argnums=0)
