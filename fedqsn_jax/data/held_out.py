"""Rows of clients that are kept for testing: some of each client, and all of some clients."""

import numpy as np

from fedqsn_jax.config.schema import ConfigError, DataConfig
from fedqsn_jax.data.population import FederatedData, from_host
from fedqsn_jax.data.streamed import HostData

OWN, NEW = "own", "new"
"""Groups of held-out rows: of clients that train on others of their rows, and of clients that never
take part."""


def hold_out(
    data: HostData, config: DataConfig, generator: np.random.Generator
) -> tuple[HostData, dict[str, FederatedData]]:
    """Takes rows away from training.

    Args:
      data: The rows of every client.
      config: ``held_out_clients`` clients, drawn at random, take no part in training at all; the
        others keep ``held_out_share`` of their rows, rounded, for testing, but train on at least
        one. Clients that are left are numbered anew, in the same order.
      generator: Draws them. Where nothing is held out nothing is drawn.

    Returns:
      The population that trains; and the rows that are held out, by group, on the device.

    Raises:
      ConfigError: No client would be left, or no row is held out.
    """
    if not config.held_out_share and not config.held_out_clients:
        return data, {}
    clients = data.clients
    if config.held_out_clients >= clients:
        raise ConfigError(
            f"data.held_out_clients = {config.held_out_clients}: allowed is less than the number "
            f"of clients, {clients}"
        )
    is_new = np.zeros(clients, bool)
    is_new[generator.permutation(clients)[: config.held_out_clients]] = True
    train, own, new = [], [], []
    for client, rows in enumerate(np.split(np.arange(data.offsets[-1]), data.offsets[1:-1])):
        if is_new[client]:
            new.append(rows)
            continue
        kept = min(round(config.held_out_share * len(rows)), max(len(rows) - 1, 0))
        shuffled = generator.permutation(rows)
        own.append(np.sort(shuffled[:kept]))
        train.append(np.sort(shuffled[kept:]))

    def select(parts: list[np.ndarray]) -> HostData:
        indices = np.concatenate(parts)
        examples = {name: array[indices] for name, array in data.examples.items()}
        return HostData(examples, np.cumsum([0, *map(len, parts)], dtype=np.int64))

    groups = {OWN: own if config.held_out_share else [], NEW: new}
    held = {name: select(parts) for name, parts in groups.items() if parts}
    for name, setting in ((OWN, "held_out_share"), (NEW, "held_out_clients")):
        if name in held and held[name].offsets[-1] == 0:
            raise ConfigError(
                f"data.{setting} = {getattr(config, setting)}: not a single row is held out, as "
                f"the clients have so few; allowed are 0 and larger values"
            )
    return select(train), {
        name: from_host(each.examples, each.offsets) for name, each in held.items()
    }
