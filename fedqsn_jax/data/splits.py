"""From named arrays to a run's splits: private rows, clients' rows, test rows."""

import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config import ConfigError, DataConfig
from fedqsn_jax.data import partition
from fedqsn_jax.data.federated import Splits, from_clients

Rows = dict[str, np.ndarray]

CLIENT_COLUMN = "client_id"
"""The array that says which client a row belongs to, for the natural partition."""


def take(rows: Rows, indices: np.ndarray) -> Rows:
    """Selects rows of all arrays."""
    return {name: array[indices] for name, array in rows.items()}


def make_splits(
    train: Rows, test: Rows, classes: int, config: DataConfig, generator: np.random.Generator
) -> Splits:
    """Keeps private rows for the server and deals the rest to clients.

    Args:
      train: Rows for the server and the clients, in any order; with ``label``, and possibly
        `CLIENT_COLUMN`, which is not passed on.
      test: Held-out rows.
      classes: Number of labels.
      config: How many private rows, and how the rest is dealt.
      generator: Decides what is random.

    Raises:
      ConfigError: The data cannot be dealt so.
    """
    count = len(train["label"])
    if config.private_rows >= count:
        raise ConfigError(
            f"data.private_rows = {config.private_rows}: allowed is less than the {count} rows "
            f"that are left for training"
        )
    order = generator.permutation(count)
    private = take(train, order[: config.private_rows])
    rest = take(train, order[config.private_rows :])
    parts = _deal(rest, config, generator)
    if config.partition != "natural" and len(rest["label"]) < config.clients:
        raise ConfigError(
            f"data.clients = {config.clients}: allowed is at most the {len(rest['label'])} rows "
            f"that are left for clients"
        )

    def passed_on(rows: Rows) -> Rows:
        return {name: array for name, array in rows.items() if name != CLIENT_COLUMN}

    def on_device(rows: Rows) -> dict:
        return {name: jnp.asarray(array) for name, array in passed_on(rows).items()}

    clients = from_clients([passed_on(take(rest, part)) for part in parts])
    return Splits(clients, on_device(private), on_device(test), classes)


def _deal(rest: Rows, config: DataConfig, generator: np.random.Generator) -> partition.Parts:
    labels = rest["label"]
    if config.partition == "iid":
        return partition.iid(len(labels), config.clients, generator)
    if config.partition == "dirichlet":
        return partition.dirichlet(labels, config.clients, config.alpha, generator)
    if config.partition == "shards":
        try:
            return partition.shards(labels, config.clients, config.shards_per_client, generator)
        except ValueError as error:
            raise ConfigError(
                f"data.shards_per_client = {config.shards_per_client}: {error}"
            ) from error
    if CLIENT_COLUMN not in rest:
        raise ConfigError(
            f"data.partition = 'natural': {config.name} does not say whose its rows are; "
            f"allowed are dirichlet, shards, iid"
        )
    return partition.natural(rest[CLIENT_COLUMN])
