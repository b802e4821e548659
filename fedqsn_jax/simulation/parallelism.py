"""Chooses how a cohort is run, from the device, the model's size and the memory that is free."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import Mesh

from fedqsn_jax.config.schema import CohortConfig, ConfigError
from fedqsn_jax.rounds.client_axis import CLIENTS_AXIS, ClientAxis
from fedqsn_jax.simulation.schedule import Schedule, choose_schedule

STEP_BYTES = 2**31
"""What a step of a chunk should move at least on a GPU or TPU, so that the launches of its kernels
do not count: more clients at once than that gain nothing."""

_ONE_BY_ONE = Schedule(1, 1, 0)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a choice depends on.

    Attributes:
      steps: Local steps of clients of the population (a sample of them is enough), int ``[n]``.
      equal_steps: The number of steps, if it is the same for all clients with rows; otherwise 0.
      client_bytes: What one more client of a chunk takes; see `memory.client_bytes`.
      arrival_bytes: What the parameters take that a client trains, or has in its own way.
      fixed_bytes: What a device holds whatever the chunk.
      device_bytes: What a device has.
    """

    steps: np.ndarray
    equal_steps: int
    client_bytes: int
    arrival_bytes: int
    fixed_bytes: int
    device_bytes: int

    @property
    def largest_chunk(self) -> int:
        """The most clients at once that fit, by the estimate; below 1 if none does."""
        return (self.device_bytes - self.fixed_bytes) // max(self.client_bytes, 1)


@dataclasses.dataclass(frozen=True)
class ClientAxisChoice:
    """How a cohort is run, and why.

    Attributes:
      axis: The strategy.
      reason: A line for people.
      step_bytes: What a step of all clients that a device trains at once moves, by the estimate.
    """

    axis: ClientAxis
    reason: str
    step_bytes: int = 0


def choose_client_axis(config: CohortConfig, workload: Workload, platform: str) -> ClientAxisChoice:
    """Turns the configured strategy into a `ClientAxis`.

    ``auto`` takes all devices. On a CPU it trains one client after the other, which was measured 5
    times faster with unequal clients; elsewhere so many side by side that a round costs least
    (`schedule`), that a step does more than fill the device (`STEP_BYTES`), and that they fit.

    Args:
      config: The settings.
      workload: What the choice depends on.
      platform: JAX's name of the device kind, for example ``cpu``.

    Raises:
      ConfigError: There are not so many devices, or the chunk does not fit.
    """
    available = jax.device_count()
    if config.devices > available:
        raise ConfigError(
            f"cohort.devices = {config.devices}: allowed is at most the number of devices, "
            f"{available}"
        )
    wants_mesh = config.parallelism == "mesh" or (
        config.parallelism == "auto" and (available > 1 or config.devices > 1)
    )
    devices = (config.devices or available) if wants_mesh else 1
    if jax.process_count() > 1 and devices != available:
        setting = (
            f"cohort.devices = {devices}"
            if wants_mesh
            else f"cohort.parallelism = {config.parallelism!r}"
        )
        raise ConfigError(
            f"{setting}: with several processes all {available} devices take part, allowed are "
            f"auto or mesh with cohort.devices = 0 or {available}"
        )
    share = -(-config.size // devices)
    schedule, why = _places(config, workload, platform, share)
    chunk = schedule.places
    if chunk > max(workload.largest_chunk, 1):
        raise ConfigError(
            f"cohort.chunk_size = {chunk}: needs about "
            f"{_gib(workload.fixed_bytes + chunk * workload.client_bytes)} a device, which has "
            f"{_gib(workload.device_bytes)}; the largest that fits is "
            f"{max(workload.largest_chunk, 1)}"
        )
    mesh = Mesh(np.asarray(jax.devices()[:devices]), (CLIENTS_AXIS,)) if wants_mesh else None
    at_once = "one client at a time" if chunk == 1 else f"{chunk} clients at once"
    where = f"{devices} devices, {at_once} on each" if wants_mesh else at_once
    axis = ClientAxis(chunk, schedule.refills, workload.equal_steps, mesh)
    return ClientAxisChoice(axis, f"{where} ({why})", chunk * workload.client_bytes)


def _places(
    config: CohortConfig, workload: Workload, platform: str, share: int
) -> tuple[Schedule, str]:
    if config.parallelism == "scan":
        return _ONE_BY_ONE, "as configured"
    if config.chunk_size:
        return _schedule(workload, share, [min(config.chunk_size, share)]), "as configured"
    if config.parallelism in ("auto", "mesh") and platform == "cpu":
        return _ONE_BY_ONE, f"auto on {platform}"
    limits = {
        "all that a device has": share,
        "they fill the device": math.ceil(STEP_BYTES / max(workload.client_bytes, 1)),
        "more would not fit": workload.largest_chunk,
    }
    why = min(limits, key=limits.__getitem__)
    limit, why = max(limits[why], 1), f"auto on {platform}: {why}"
    if workload.equal_steps:
        # In equal parts, so that none of them has empty places.
        limit = math.ceil(share / math.ceil(share / limit))
        return Schedule(limit, limit, 0), why
    fewer = {math.ceil(limit * 2 ** (-octaves / 4)) for octaves in range(13)}
    schedule = _schedule(workload, share, sorted(fewer))
    if schedule.places < limit:
        why = f"auto on {platform}: a round takes about {schedule.turns} steps of them"
    return schedule, why


def _schedule(workload: Workload, share: int, candidates: list[int]) -> Schedule:
    return choose_schedule(
        workload.steps,
        share,
        candidates,
        client_bytes=workload.client_bytes,
        arrival_bytes=workload.arrival_bytes,
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
