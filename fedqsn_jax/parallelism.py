"""Chooses how a cohort is run, from the device, the model's size and the memory that is free."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import Mesh

from fedqsn_jax.cohort import CLIENTS_AXIS, ClientAxis
from fedqsn_jax.config import CohortConfig, ConfigError

STEP_BYTES = 2**31
"""What a step of a chunk should move at least on a GPU or TPU, so that the launches of its kernels
do not count: more clients at once than that gain nothing."""

_WAITING_ROOM = 1.25
"""Room for free places, by their mean number, where the longest client leaves so much slack."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a choice depends on.

    Attributes:
      steps: Local steps of clients of the population (a sample of them is enough), int ``[n]``.
      equal_steps: The number of steps, if it is the same for all clients with rows; otherwise 0.
      client_bytes: What one more client of a chunk takes; see `memory.client_bytes`.
      fixed_bytes: What a device holds whatever the chunk.
      device_bytes: What a device has.
    """

    steps: np.ndarray
    equal_steps: int
    client_bytes: int
    fixed_bytes: int
    device_bytes: int

    @property
    def largest_chunk(self) -> int:
        """The most clients at once that fit, by the estimate; below 1 if none does."""
        return (self.device_bytes - self.fixed_bytes) // max(self.client_bytes, 1)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a cohort is run, and why.

    Attributes:
      axis: The strategy.
      reason: A line for people.
      step_bytes: What a step of all clients that a device trains at once moves, by the estimate.
    """

    axis: ClientAxis
    reason: str
    step_bytes: int = 0


def choose_client_axis(config: CohortConfig, workload: Workload, platform: str) -> Choice:
    """Turns the configured strategy into a `ClientAxis`.

    ``auto`` takes all devices. On a CPU it trains one client after the other, which was measured 5
    times faster with unequal clients; elsewhere so many side by side that a step fills the device
    (`STEP_BYTES`), that the chunk fits, and that the longest client is not waited for.

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
    chunk, why = _chunk_size(config, workload, platform, share)
    if chunk > max(workload.largest_chunk, 1):
        raise ConfigError(
            f"cohort.chunk_size = {chunk}: needs about "
            f"{_gib(workload.fixed_bytes + chunk * workload.client_bytes)} a device, which has "
            f"{_gib(workload.device_bytes)}; the largest that fits is "
            f"{max(workload.largest_chunk, 1)}"
        )
    refills = _refills(workload, chunk, share)
    mesh = Mesh(np.asarray(jax.devices()[:devices]), (CLIENTS_AXIS,)) if wants_mesh else None
    at_once = "one client at a time" if chunk == 1 else f"{chunk} clients at once"
    where = f"{devices} devices, {at_once} on each" if wants_mesh else at_once
    axis = ClientAxis(chunk, refills, workload.equal_steps, mesh)
    return Choice(axis, f"{where} ({why})", chunk * workload.client_bytes)


def _chunk_size(
    config: CohortConfig, workload: Workload, platform: str, share: int
) -> tuple[int, str]:
    if config.parallelism == "scan":
        return 1, "as configured"
    if config.chunk_size:
        return min(config.chunk_size, share), "as configured"
    if config.parallelism in ("auto", "mesh") and platform == "cpu":
        return 1, f"auto on {platform}"
    longest = max(int(workload.steps.max(initial=0)), 1)
    limits = {
        "all that a device has": share,
        # A third more than would do if every place were refilled at once.
        "the rest waits for the longest client": math.ceil(
            4 / 3 * share * float(workload.steps.mean()) / longest
        ),
        "they fill the device": math.ceil(STEP_BYTES / max(workload.client_bytes, 1)),
        "more would not fit": workload.largest_chunk,
    }
    why = min(limits, key=limits.__getitem__)
    return max(limits[why], 1), f"auto on {platform}: {why}"


def _refills(workload: Workload, chunk: int, share: int) -> int:
    """How many places may be refilled after a step.

    On average as many become free as there are places by the mean number of steps. But clients of
    one length that began together end together; a place that must then wait costs steps, and so
    there is room for twice as many. Unless the longest client is waited for anyhow: then a quarter
    more than the mean does, since what is not served costs time too.
    """
    busy = workload.steps[workload.steps > 0]
    if not busy.size:
        return chunk
    mean = float(busy.mean())
    # What the places can do while the longest client trains, by what there is to do.
    slack = chunk * int(busy.max()) / (share * float(workload.steps.mean()))
    return min(math.ceil((_WAITING_ROOM if slack >= _WAITING_ROOM else 2) * chunk / mean), chunk)


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
