"""How a round's clients are run, and what the round takes of a device's memory, by shapes."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.schema import Config, ConfigError
from fedqsn_jax.core.trees import exclude, select, tree_bytes
from fedqsn_jax.core.types import Array
from fedqsn_jax.data.population import ClientData
from fedqsn_jax.host.devices import device_bytes
from fedqsn_jax.problems.limits import check_memory
from fedqsn_jax.protocol.algorithms import Algorithm
from fedqsn_jax.protocol.sizes import Traffic
from fedqsn_jax.rounds.client_optimizer import ClientOptimizer
from fedqsn_jax.rounds.federation import Federation
from fedqsn_jax.rounds.method import Method
from fedqsn_jax.simulation.fitting import Fitted
from fedqsn_jax.simulation.from_config import cohort_places
from fedqsn_jax.simulation.limits import report_bytes, sample_bytes
from fedqsn_jax.simulation.memory import client_bytes, saved_activations
from fedqsn_jax.simulation.round_memory import (
    StoredBytes,
    fixed_memory,
    own_frozen_bytes,
    proxy_and_deltas,
)
from fedqsn_jax.simulation.scheduling import ClientAxisChoice, Workload, choose_client_axis
from fedqsn_jax.simulation.smaller import smaller_settings

SAMPLES, REPORTS = "samples of the proxy view", "reports of a call"
"""Purposes of memory that grow with settings which may be very large."""


class Composed(Protocol):
    """What was made of one configuration, as far as it is needed here."""

    @property
    def algorithm(self) -> Algorithm:
        """What clients receive."""

    @property
    def method(self) -> Method:
        """All that happens in a round."""

    @property
    def federation(self) -> Federation:
        """The same composed."""

    @property
    def traffic(self) -> Traffic:
        """The lengths of payloads."""


def choose_client_run(
    config: Config,
    fitted: Fitted,
    parts: Composed,
    data: ClientData,
    optimizer: ClientOptimizer,
) -> tuple[dict[str, int], ClientAxisChoice]:
    """Chooses how clients are run; returns also the memory of a round, bytes by purpose.

    Args:
      config: The settings.
      fitted: The model as the run has it.
      parts: The method that was made for it.
      data: The population.
      optimizer: The clients'.

    Raises:
      ConfigError: A round does not fit with one client at a time.
    """
    model, roles = fitted.model, fitted.roles
    stored = StoredBytes.of(model.params, fitted.stored, fitted.sites, parts.algorithm.quantizer)
    # What a client has not got, it does not compute with either.
    a_client = client_bytes(
        model.client_apply,
        model.task,
        optimizer,
        params=exclude(stored.computed_with, roles.withheld),
        batch=fitted.batch,
        trained=roles.trained,
        proximal=config.client.proximal,
    )
    frozen = own_frozen_bytes(
        exclude(model.params, fitted.stored),
        fitted.sites,
        roles.trained,
        traffic=parts.traffic,
        algorithm=parts.algorithm,
    )
    # Twice, as was measured: the compiler does not overwrite them in place. And a merged matrix
    # with its gradient.
    a_client += 2 * frozen + fitted.merged_bytes + stored.one_layer
    an_arrival = tree_bytes(select(model.params, roles.trained)) + frozen
    returned = select(model.params, roles.returned)
    sent = select(exclude(model.params, fitted.stored), roles.sent)
    fixed = {
        **({"codes of frozen kernels": stored.codes} if fitted.stored else {}),
        **proxy_and_deltas(sent, returned, fitted.sites, parts.algorithm),
        **fixed_memory(parts.federation, fitted.plain, fitted.sites, config=config, data=data),
        SAMPLES: sample_bytes(config),
        REPORTS: report_bytes(config, len(fitted.sites.drawing)),
    }
    steps = parts.method.update.step_count(data.rows(_some_clients(data.clients)))
    workload = Workload(
        steps=np.asarray(steps),
        equal_steps=0 if config.participation.stragglers else config.client.steps,
        client_bytes=a_client,
        arrival_bytes=an_arrival,
        fixed_bytes=sum(fixed.values()),
        device_bytes=device_bytes(),
    )
    if workload.largest_chunk < 1:
        attackers = jax.eval_shape(parts.federation.init, jax.random.key(0), fitted.plain).attackers
        computed = fitted._replace(model=model._replace(params=stored.computed_with))
        _refuse(config, computed, fixed, a_client, attackers=tree_bytes(attackers))
    cohort = dataclasses.replace(config.cohort, size=cohort_places(config, data.clients))
    choice = choose_client_axis(cohort, workload, jax.default_backend())
    at_once, refills = choice.axis.chunk_size, choice.axis.refills
    clients = f"{at_once} client{'s' if at_once > 1 else ''}"
    memory = {**fixed, f"training of {clients} at once": at_once * a_client}
    if at_once > 1:
        memory["clients that take others' places"] = refills * an_arrival
    return memory, choice


def _refuse(
    config: Config, fitted: Fitted, fixed: dict[str, int], a_client: int, *, attackers: int
) -> None:
    """Refuses a round that does not fit with one client at a time, if it is so by far."""
    model = fitted.model
    rows = tree_bytes(fitted.batch) + 2 * saved_activations(
        model.client_apply, model.task, model.params, fitted.batch, fitted.roles.trained
    )
    shares = {
        "client.batch_size": rows,
        "cohort.size": fixed["client masks"] + fixed.get("residuals of the cohort", 0),
        "evaluation.proxy_samples": fixed[SAMPLES],
        "rounds_per_call": fixed[REPORTS],
    }
    rest = sum(fixed.values()) + a_client - sum(shares.values())
    plain = tree_bytes(fitted.plain)
    adapted = max(plain, tree_bytes(model.params))
    shares[model.size] = rest * plain // adapted
    shares["lora.rank"] = rest - shares[model.size]
    try:
        check_memory(config, "the rounds, with one client at a time,", shares)
    except ConfigError as error:
        total, training = sum(shares.values()), a_client - rows + fixed["sum of deltas"]
        smaller = smaller_settings(config, fitted, total, attackers=attackers, training=training)
        raise ConfigError(f"{error}{smaller}") from error


def _some_clients(population: int) -> Array:
    """Ids of all clients, or of some thousand evenly spread ones."""
    count = min(population, 4096)
    return jnp.asarray(np.arange(count, dtype=np.int64) * population // count, jnp.int32)
