"""A run of several processes: JAX's distributed runtime, one leader, and agreement.

Every process makes the same calls in the same order. Process 0, the leader, is the only one that
touches the working directory and the terminal. What it may refuse or fail at goes through
`by_leader`, what each may through `together`: then all raise the same error at the same place, and
none waits for another that has given up. With one process all this does nothing.
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from fedqsn_jax.config.schema import Config, ConfigError, flatten
from fedqsn_jax.host.lifeline import GATHERING_SECONDS, Facts, Lifeline, gather, split_address

_HEARTBEAT_SECONDS = 45
_SHUTDOWN_SECONDS = 15
_MESSAGE_BYTES = 1024

Value = TypeVar("Value")


class Settings(NamedTuple):
    """Which process of how many this is.

    Attributes:
      address: ``HOST:PORT`` of process 0.
      processes: How many there are.
      process: This one, from 0 on.
    """

    address: str
    processes: int
    process: int


_OPTIONS = {
    "coordinator_address": "FEDQSN_COORDINATOR_ADDRESS",
    "num_processes": "FEDQSN_NUM_PROCESSES",
    "process_id": "FEDQSN_PROCESS_ID",
}
"""The command line's options, and the variables of the environment that stand in for them."""


def read_settings(
    options: Mapping[str, str | None], environment: Mapping[str, str] = os.environ
) -> Settings | None:
    """Reads what the command line, and behind it the environment, says about processes.

    Args:
      options: Values by the names of the options; None where one is not given.
      environment: Variables.

    Returns:
      The settings; None for a run of one process.

    Raises:
      ConfigError: One is missing or out of range.
    """
    given = {name: options.get(name) or environment.get(v, "") for name, v in _OPTIONS.items()}
    if not any(given.values()):
        return None
    for name, value in given.items():
        if not value:
            raise ConfigError(f"no --{name}: several processes need --{', --'.join(_OPTIONS)}")
    split_address(given["coordinator_address"])
    count = _integer("num_processes", given["num_processes"], 1, 2**15)
    index = _integer("process_id", given["process_id"], 0, count - 1)
    return Settings(given["coordinator_address"], count, index) if count > 1 else None


def _integer(name: str, value: str, low: int, high: int) -> int:
    if not value.isdecimal() or not low <= int(value) <= high:
        raise ConfigError(f"--{name}={value}: allowed is {low} to {high}")
    return int(value)


def connect(settings: Settings, config: Config) -> Lifeline:
    """Brings the processes together and starts JAX's runtime; before anything else touches JAX.

    Args:
      settings: Which process this is.
      config: What it is about to run; the same in all.

    Raises:
      ConfigError: The processes do not come together, do not agree, or differ in their devices.
    """
    facts: Facts = {name: _plain(value) for name, value in flatten(config).items()}
    facts["the version of JAX"] = importlib.metadata.version("jax")
    lifeline = gather(settings.address, settings.processes, settings.process, facts)
    lifeline.watch()
    _keep_output_to_python()
    import jax

    # Its handler of SIGTERM would take the place of the run's own.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        settings.address,
        settings.processes,
        settings.process,
        cluster_detection_method="deactivate",
        initialization_timeout=int(GATHERING_SECONDS),
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    devices = [device.process_index for device in jax.devices()]
    numbers = [devices.count(process) for process in range(settings.processes)]
    if len(set(numbers)) > 1:
        leave(lifeline)
        raise ConfigError(
            f"the processes have {', '.join(map(str, numbers))} devices: allowed is the same "
            f"number in all"
        )
    return lifeline


def _keep_output_to_python() -> None:
    """Lets only Python write to standard output: Gloo announces every connection there."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def leave(lifeline: Lifeline) -> None:
    """Ends the connections, once all processes have come to this point."""
    import jax

    lifeline.farewell()
    jax.distributed.shutdown()


def is_leader() -> bool:
    """Whether this process writes the files and speaks to the user."""
    import jax

    return jax.process_index() == 0


def together(action: Callable[[], Value]) -> Value:
    """Does something in every process, or in none: an error of one is raised in all.

    Args:
      action: What to do; it waits for no other process.

    Raises:
      ConfigError: With several processes, for a `ValueError`: its own, or the first other's.
    """
    import jax

    if jax.process_count() == 1:
        return action()
    try:
        value = action()
    except Exception as error:
        _exchange(" ".join(str(error).split()) or type(error).__name__)
        if isinstance(error, ValueError):
            # Of this kind whatever it was, so that all leave in the same way.
            raise ConfigError(str(error)) from error
        raise
    for index, message in enumerate(_exchange("")):
        if message:
            raise ConfigError(f"process {index}: {message}")
    return value


def by_leader(action: Callable[[], Value]) -> Value | None:
    """Does something in the leader; its error is raised in all. Others get None."""
    return together(lambda: action() if is_leader() else None)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    import jax

    if jax.process_count() == 1:
        return flag
    return any(_exchange("set" if flag else ""))


def require_same(what: str, value: str) -> None:
    """Raises ConfigError in every process where they differ in something.

    Args:
      what: What it is, for people.
      value: This process's.
    """
    import jax

    if jax.process_count() == 1:
        return
    values = _exchange(value)
    if len(set(values)) > 1:
        raise ConfigError(f"{what}: the processes have {', '.join(values)}; allowed is one for all")


def from_leader(tree: Value) -> Value:
    """Returns the leader's values of a pytree of arrays and keys; elsewhere only shapes matter."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return tree

    def send(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = send(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        # As bytes: the sum that a broadcast is would turn -0 into 0.
        host = np.asarray(leaf)
        raw = np.frombuffer(host.tobytes(), np.uint8)
        if raw.size:
            raw = np.asarray(multihost_utils.broadcast_one_to_all(raw), np.uint8)
        return jnp.asarray(np.frombuffer(raw.tobytes(), host.dtype).reshape(host.shape))

    return jax.tree.map(send, tree)


def _exchange(message: str) -> list[str]:
    """Every process's message, shortened, in order."""
    import numpy as np
    from jax.experimental import multihost_utils

    raw = message.encode()[:_MESSAGE_BYTES]
    padded = np.frombuffer(raw.ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in gathered]


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
