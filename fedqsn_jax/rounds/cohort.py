"""What the clients of one round do, each with its own proxy: they train and return a delta."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from fedqsn_jax.core.types import Array, Columns, Key
from fedqsn_jax.data.population import ClientData
from fedqsn_jax.protocol.proxy import Proxy, round_by_key, select_columns
from fedqsn_jax.protocol.upload import Residuals
from fedqsn_jax.rounds.client import Training
from fedqsn_jax.rounds.client_axis import ClientAxis, ClientWork, sum_over_clients
from fedqsn_jax.rounds.method import Method


@struct.dataclass
class Cohort:
    """What a round's clients have in common, and what is known of each before it trains.

    Attributes:
      prepared: The round's proxy before client masks, dequantized.
      shared: The frozen tensors that all clients compute with alike.
      data: The population's rows.
      ids: Who takes part, int32 ``[cohort]``.
      visible: The columns that each client sees, bool ``[cohort, layers, columns]`` a site.
      scale: Each client's factors, float32 ``[cohort]`` a site.
      weights: The clients' weights in the mean, float32 ``[cohort]``.
      broken: Whose update is NaN, bool ``[cohort]``.
      residuals: What each client of the population keeps.
      training_key: The round's key of batches and dropout; a client's id is folded in.
      rounding_keys: The clients' keys of `proxy.round_by_key`, ``[cohort]``; None: nothing is
        traced.
    """

    prepared: Proxy
    shared: Any
    data: ClientData
    ids: Array
    visible: Columns
    scale: dict[str, Array]
    weights: Array
    broken: Array
    residuals: Residuals
    training_key: Key
    rounding_keys: Key | None = None

    def proxy_of(self, client: Array) -> Proxy:
        """The proxy of the client at a position."""
        visible, scale, rounding_key = jax.tree.map(
            lambda leaf: leaf[client], (self.visible, self.scale, self.rounding_keys)
        )
        return round_by_key(select_columns(self.prepared, visible, scale), rounding_key)


def train_cohort(
    method: Method, cohort: Cohort, steps: Array, axis: ClientAxis
) -> tuple[dict[str, Any], Residuals]:
    """Trains the clients of a round.

    Args:
      method: What they do; static.
      cohort: What they have.
      steps: How many steps each takes, int32 ``[cohort]``; who takes none is left out.
      axis: How they are run.

    Returns:
      Sums over the clients: ``update``, a `Contribution`, and ``loss`` and ``examples``, float32,
      the training loss weighted by the number of rows; and what each keeps, ``[cohort, ...]``.
    """
    clients = _Clients(method)
    work = ClientWork(clients.start, clients.step, clients.finish)
    return sum_over_clients(work, cohort, steps, axis)


@dataclasses.dataclass(frozen=True, eq=False)
class _Clients:
    """One client's work, named by its position in the cohort."""

    method: Method

    def start(self, cohort: Cohort, client: Array) -> Training:
        rows = cohort.data.rows(cohort.ids[client])
        return self.method.update.start(cohort.proxy_of(client), rows)

    def step(self, cohort: Cohort, client: Array, index: Array, training: Training) -> Training:
        client_id = cohort.ids[client]
        key = jax.random.fold_in(cohort.training_key, client_id)
        return self.method.update.step(key, cohort.data, client_id, index, training, cohort.shared)

    def finish(
        self, cohort: Cohort, client: Array, training: Training
    ) -> tuple[dict[str, Any], Residuals]:
        method, client_id, proxy = self.method, cohort.ids[client], cohort.proxy_of(client)
        result = method.update.finish(proxy, cohort.data.rows(client_id), training)
        residuals = {path: each[client_id] for path, each in cohort.residuals.items()}
        delta, kept = method.upload.send(result.delta, residuals, proxy.visible)
        if method.participation.nan:
            broken = cohort.broken[client]
            delta = jax.tree.map(lambda leaf: jnp.where(broken, jnp.nan, leaf), delta)
        part = method.aggregator.contribute(delta, cohort.weights[client], proxy.visible)
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
