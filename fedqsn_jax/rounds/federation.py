"""A federated method as pure functions: one round, and the evaluation of its views."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedqsn_jax.core.keys import fold_in_name, leak_tracing_key
from fedqsn_jax.core.tasks import mean
from fedqsn_jax.core.trees import combine, exclude, select
from fedqsn_jax.core.types import Array, Batch, Columns, Key, Params
from fedqsn_jax.data.population import ClientData, HeldOut
from fedqsn_jax.protocol.broadcast import BroadcastState
from fedqsn_jax.protocol.proxy import Proxy, dequantize_proxy, round_by_key, whole_proxy
from fedqsn_jax.protocol.stored_kernels import split_stored
from fedqsn_jax.protocol.upload import Residuals
from fedqsn_jax.rounds.client_axis import ONE_BY_ONE, ClientAxis, sample_cohort
from fedqsn_jax.rounds.cohort import Cohort, train_cohort
from fedqsn_jax.rounds.evaluation import ClientEvaluator, Evaluator
from fedqsn_jax.rounds.method import Method
from fedqsn_jax.rounds.participation import Attendance, draw_attendance
from fedqsn_jax.rounds.poisson import NOBODY, sample_poisson_cohort
from fedqsn_jax.rounds.privacy import noise_key, privatize
from fedqsn_jax.rounds.views import (
    Attacker,
    Views,
    evaluate_views,
    make_attacker,
    received_columns,
    update_attacker,
)

CohortSampling = Literal["without_replacement", "poisson"]


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
      secret_key: Key of the masks, of noise, and of Poisson cohorts.
      public_key: Key of other cohorts and of the clients' batches.
      broadcast: What is kept to know what clients are sent.
    """

    params: Params
    optimizer_state: optax.OptState
    transform_state: Any
    attackers: dict[str, Attacker]
    residuals: Residuals
    round: Array
    secret_key: Key
    public_key: Key
    broadcast: BroadcastState = BroadcastState()


class Federation(NamedTuple):
    """A federated method as pure functions.

    Attributes:
      init: ``(key, params) -> ServerState``.
      round: ``(state, data) -> (state, facts)``: one round, one client after the other; see
        `with_client_axis` for others. Facts are float32 ``train/loss``, and uint32 counts:
        ``clients/returned`` and ``clients/rejected``; for each site that has masks
        ``visible/PATH``, visible columns summed over the cohort, and ``returned/PATH``, summed over
        the clients that returned an update; with Poisson cohorts ``clients/drawn``, who took part.
        In one-way rounds ``visible/PATH`` is over all payloads
        that were sent so far; see `Broadcast.send`.
      prepare: ``state -> Proxy``: the proxy before client masks, dequantized.
      cohort: ``state -> ids``, int32 ``[cohort]``: who takes part in the state's next round;
        `poisson.NOBODY` in empty places of a Poisson cohort.
      proxy_keys: ``state -> keys`` of the client masks that the proxy view averages over; where
        clients keep their masks, those of as many clients of the population.
      evaluate: ``(state, rows) -> metrics`` of all views, named ``view/metric``. Rows are held-out
        ones, or `HeldOut` with clients' too; metrics of those are named ``group/view/metric``.
      choose_scale: ``(state, HeldOut) -> state`` with the best scale of a running mean, by the
        score on the validation rows; None where it is not to be chosen.
    """

    init: Callable[[Key, Params], ServerState]
    round: Callable[..., tuple[ServerState, dict[str, Array]]]
    prepare: Callable[[ServerState], Proxy]
    cohort: Callable[[ServerState], Array]
    proxy_keys: Callable[[ServerState], Key]
    evaluate: Callable[[ServerState, Batch | HeldOut], dict[str, Array]]
    choose_scale: Callable[[ServerState, HeldOut], ServerState] | None = None

    def with_client_axis(self, axis: ClientAxis) -> "Federation":
        """Returns the same, whose clients are run in another way."""
        return self._replace(round=functools.partial(self.round, client_axis=axis))


class Evaluation(NamedTuple):
    """How the views are evaluated; static.

    Attributes:
      evaluator: Evaluates one set of parameters.
      score: The metric whose spread over client masks is reported.
      proxy_samples: Client masks that the proxy view averages over.
      attackers: Numbers of colluding clients; ``attacker_N`` names each in the metrics.
      client_evaluator: Evaluates one set of parameters on clients' held-out rows, if there are any.
      scales: Scales of the running mean that are tried at each evaluation; none: it is fixed.
    """

    evaluator: Evaluator
    score: str
    proxy_samples: int = 8
    attackers: tuple[int, ...] = ()
    client_evaluator: ClientEvaluator | None = None
    scales: tuple[float, ...] = ()


def make_federation(
    method: Method,
    evaluation: Evaluation,
    *,
    population: int,
    cohort: int,
    sampling: CohortSampling = "without_replacement",
) -> Federation:
    """Composes a federated method; every argument is static.

    Args:
      method: Its parts.
      evaluation: How its views are evaluated.
      population: Number of clients.
      cohort: Clients a round; in Poisson cohorts on average.
      sampling: How they are drawn.
    """
    composed = _Composed(
        method=method,
        evaluation=evaluation,
        population=population,
        cohort_size=cohort,
        sampling=sampling,
    )
    return Federation(
        init=composed.init,
        round=composed.round,
        prepare=composed.prepare,
        cohort=composed.cohort,
        proxy_keys=composed.proxy_keys,
        evaluate=composed.evaluate,
        choose_scale=composed.choose_scale if evaluation.scales else None,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Composed:
    """What the functions of a `Federation` close over."""

    method: Method
    evaluation: Evaluation
    population: int
    cohort_size: int
    sampling: CohortSampling

    def _sent(self, params: Params) -> Params:
        return select(params, self.method.roles.sent)

    def _public(self, params: Params) -> Params:
        roles = self.method.roles
        return exclude(exclude(params, roles.sent), roles.withheld)

    def init(self, key: Key, params: Params) -> ServerState:
        method = self.method
        secret_key, public_key = fold_in_name(key, "secret"), fold_in_name(key, "public")
        attacker_key = fold_in_name(public_key, "attackers")
        sent = self._sent(params)
        transform_state = method.transform.init(secret_key, whole_proxy(sent, method.sites))

        def any_proxy() -> Proxy:
            prepared = method.transform.prepare(transform_state, whole_proxy(sent, method.sites))
            return method.transform.apply(secret_key, transform_state, prepared)

        masked = jax.eval_shape(any_proxy).visible
        return ServerState(
            params=params,
            optimizer_state=method.aggregator.init(params),
            transform_state=transform_state,
            attackers={
                f"attacker_{count}": make_attacker(
                    attacker_key,
                    self.population,
                    count,
                    params=select(sent, method.roles.returned),
                    sites=method.sites,
                )
                for count in self.evaluation.attackers
            },
            residuals=method.upload.init(params, self.population),
            round=jnp.int32(0),
            secret_key=secret_key,
            public_key=public_key,
            broadcast=method.broadcast.init(params, method.roles.returned, self.population, masked),
        )

    def prepare(self, state: ServerState) -> Proxy:
        return dequantize_proxy(self._prepare(state))

    def _prepare(self, state: ServerState) -> Proxy:
        """The same, but that frozen kernels stay codes."""
        sent = self.method.broadcast.sent(state.broadcast, state.params)
        whole = whole_proxy(self._sent(sent), self.method.sites)
        prepared = self.method.transform.prepare(state.transform_state, whole)
        return dequantize_proxy(prepared, but=self.method.stored)

    def cohort(self, state: ServerState) -> Array:
        if self.sampling == "poisson":
            # Who takes part is a secret here: what is claimed of privacy rests on it.
            key = jax.random.fold_in(fold_in_name(state.secret_key, "cohort"), state.round)
            return sample_poisson_cohort(key, self.population, self.cohort_size)
        round_key = jax.random.fold_in(state.public_key, state.round)
        return sample_cohort(fold_in_name(round_key, "cohort"), self.population, self.cohort_size)

    def round(
        self, state: ServerState, data: ClientData, client_axis: ClientAxis = ONE_BY_ONE
    ) -> tuple[ServerState, dict[str, Array]]:
        method, drawn = self.method, self.cohort(state)
        prepared, stored = split_stored(self._prepare(state))
        is_there, ids = None, drawn
        if self.sampling == "poisson":
            # An empty place has no rows and sees nothing; for its id any will do.
            is_there, ids = drawn != NOBODY, jnp.maximum(drawn, 0)
        visible, scale = self._client_masks(state, prepared, ids)
        rows = data.rows(ids)
        if is_there is not None:
            rows = jnp.where(is_there, rows, 0)
            visible = {path: seen & is_there[:, None, None] for path, seen in visible.items()}
        training_key = jax.random.fold_in(state.public_key, state.round)
        computed_with = combine(prepared.params, self._public(state.params))
        attendance = draw_attendance(
            training_key, ids, method.update.step_count(rows), method.participation
        )
        shared = method.update.shared(
            dataclasses.replace(prepared, params=computed_with, visible=visible)
        )
        cohort = Cohort(
            prepared=prepared,
            shared=combine(shared, stored),
            data=data,
            ids=ids,
            visible=visible,
            scale=scale,
            weights=method.aggregator.weigh(rows),
            broken=attendance.broken,
            residuals=state.residuals,
            training_key=training_key,
            rounding_keys=_rounding_keys(prepared, state.secret_key, ids),
        )
        total, kept = train_cohort(method, cohort, attendance.steps, client_axis)
        broadcast, facts = method.broadcast.send(
            state.broadcast, ids, visible, lost=attendance.lost, is_there=is_there
        )
        update = total["update"]
        if method.privacy is not None:
            key = noise_key(state.secret_key, state.round)
            update = privatize(method.privacy, key, update, prepared.visible, method.sites)
        params, optimizer_state = method.aggregator.finish(
            method.broadcast.start_of_step(state.broadcast, state.params),
            state.optimizer_state,
            update,
            server_visible=prepared.visible,
            sent=prepared.params,
        )
        attackers = {
            name: update_attacker(
                attacker, received_columns(attacker, drawn, visible), prepared, method.sites
            )
            for name, attacker in state.attackers.items()
        }
        state = dataclasses.replace(
            state,
            params=params,
            optimizer_state=optimizer_state,
            attackers=attackers,
            residuals=_replaced(state.residuals, kept, ids, attendance.returns),
            round=state.round + 1,
            broadcast=method.broadcast.after_round(broadcast, params, state.round + 1),
        )
        if is_there is not None:
            facts["clients/drawn"] = is_there.sum(dtype=jnp.uint32)
        return state, {**_facts(total, attendance, visible), **facts}

    def choose_scale(self, state: ServerState, rows: HeldOut) -> ServerState:
        if rows.validation is None:
            raise ValueError("there are no validation rows to choose the scale on")
        validation = rows.validation
        evaluation, aggregator = self.evaluation, self.method.aggregator
        start = self.method.broadcast.start_of_step(state.broadcast, state.params)
        server_visible = self._prepare(state).visible
        scales = jnp.asarray(evaluation.scales, jnp.float32)

        def rescaled(scale: Array) -> tuple[Params, optax.OptState]:
            assert aggregator.rescale is not None  # It is a running mean.
            return aggregator.rescale(start, state.optimizer_state, server_visible, scale)

        def score(scale: Array) -> Array:
            value = evaluation.evaluator(rescaled(scale)[0], validation)[evaluation.score]
            return jnp.where(jnp.isnan(value), -jnp.inf, value)

        best = scales[jnp.argmax(jax.lax.map(score, scales))]
        params, optimizer_state = rescaled(best)
        return dataclasses.replace(state, params=params, optimizer_state=optimizer_state)

    def _client_masks(
        self, state: ServerState, prepared: Proxy, ids: Array
    ) -> tuple[Columns, dict[str, Array]]:
        """What each client sees of the prepared proxy, and its factors."""

        def of_one(client_id: Array) -> tuple[Columns, dict[str, Array]]:
            key = self.method.mask_key(state.secret_key, state.round, client_id)
            proxy = self.method.transform.apply(key, state.transform_state, prepared)
            return proxy.visible, proxy.scale

        return jax.vmap(of_one)(ids)

    def proxy_keys(self, state: ServerState) -> Key:
        key = fold_in_name(jax.random.fold_in(state.secret_key, state.round), "proxy_view")
        samples = self.evaluation.proxy_samples
        if self.method.mask_per == "round":
            return jax.random.split(key, samples)
        # Of masks that clients keep there are only so many: those of clients of the population.
        clients = sample_cohort(key, self.population, min(samples, self.population))
        return jax.vmap(lambda one: self.method.mask_key(state.secret_key, state.round, one))(
            clients
        )

    def evaluate(self, state: ServerState, rows: Batch | HeldOut) -> dict[str, Array]:
        method, evaluation = self.method, self.evaluation
        views = Views(
            params=state.params,
            sendable=exclude(state.params, method.roles.withheld),
            prepared=self._prepare(state),
            apply=lambda key, prepared: round_by_key(
                method.transform.apply(key, state.transform_state, prepared),
                fold_in_name(key, "rounding of the proxy view"),
            ),
            proxy_keys=self.proxy_keys(state),
            attackers=state.attackers,
        )

        def views_on(evaluator: Callable[[Params, Any], dict[str, Array]], rows: Any) -> Any:
            def evaluate_whole(params: Params, rows: Any) -> dict[str, Array]:
                return evaluator(combine(self._public(state.params), params), rows)

            return evaluate_views(evaluate_whole, rows, views, evaluation.score)

        if not isinstance(rows, HeldOut):
            return views_on(evaluation.evaluator, rows)
        metrics = views_on(evaluation.evaluator, rows.test)
        if evaluation.scales:
            metrics["global/scale"] = state.optimizer_state.scale
        if evaluation.client_evaluator is not None:
            for group, data in rows.clients.items():
                of_group = views_on(evaluation.client_evaluator, data)
                metrics |= {f"{group}/{name}": value for name, value in of_group.items()}
        return metrics


def _rounding_keys(prepared: Proxy, secret_key: Key, ids: Array) -> Key | None:
    if not prepared.traced:
        return None
    return jax.vmap(lambda client: leak_tracing_key(secret_key, client))(ids)


def _facts(total: dict[str, Any], attendance: Attendance, visible: Columns) -> dict[str, Array]:
    """What a round tells; see `Federation.round`."""
    facts = {
        "train/loss": mean(total["loss"], total["examples"]),
        "clients/returned": attendance.returns.sum(dtype=jnp.uint32),
        "clients/rejected": total["update"].rejected,
    }
    for path, seen in visible.items():
        facts[f"visible/{path}"] = seen.sum(dtype=jnp.uint32)
        returned = seen & attendance.returns[:, None, None]
        facts[f"returned/{path}"] = returned.sum(dtype=jnp.uint32)
    return facts


def _replaced(residuals: Residuals, kept: Residuals, ids: Array, returns: Array) -> Residuals:
    """The population's residuals, with those of the clients that returned."""

    def replace(all: Array, new: Array) -> Array:
        # Beyond the population: dropped.
        places = jnp.where(returns, ids, len(all) + jnp.arange(len(ids)))
        return all.at[places].set(new, mode="drop", unique_indices=True)

    return jax.tree.map(replace, residuals, kept)
