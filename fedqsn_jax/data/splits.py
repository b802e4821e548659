"""From named arrays to a run's splits: private rows, clients' rows, test rows."""

import hashlib

import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.schema import ConfigError, DataConfig
from fedqsn_jax.core.types import Batch
from fedqsn_jax.data import partition
from fedqsn_jax.data.held_out import hold_out
from fedqsn_jax.data.population import FederatedData, Splits
from fedqsn_jax.data.streamed import HostData, place

Rows = dict[str, np.ndarray]
"""Named arrays ``[rows, ...]`` on the host."""

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
      train: Rows for the server and the clients, in any order; with ``label`` if the data set has
        labels, and possibly `CLIENT_COLUMN`, which is not passed on.
      test: Held-out rows.
      classes: Number of labels.
      config: How many private rows, and how the rest is dealt.
      generator: Decides what is random.

    Raises:
      ConfigError: The data cannot be dealt so, or does not fit where it should be.
    """
    count = len(next(iter(train.values())))
    used = config.train_rows or count
    if used > count:
        raise ConfigError(
            f"data.train_rows = {config.train_rows}: allowed is at most the {count} rows that are "
            f"left for training"
        )
    if config.private_rows >= used:
        raise ConfigError(
            f"data.private_rows = {config.private_rows}: allowed is less than the {used} rows "
            f"that are left for training"
        )
    order = generator.permutation(count)[:used]
    private, rest = order[: config.private_rows], order[config.private_rows :]
    ids = train[CLIENT_COLUMN][rest] if CLIENT_COLUMN in train else None
    labels = train["label"][rest] if "label" in train else None
    parts = _deal(len(rest), labels, ids, config, generator)
    offsets = np.cumsum([0, *map(len, parts)])
    # One gather for all clients: copies a client would hold a large data set twice.
    examples = take(train, rest[np.concatenate(parts)])
    examples.pop(CLIENT_COLUMN, None)
    population, client_tests = hold_out(HostData(examples, offsets), config, generator)
    clients = place(population, config.resident)
    private_rows = _on_device(take(train, private))
    return Splits(clients, private_rows, _on_device(test), classes, client_tests)


def _on_device(rows: Rows) -> Batch:
    return {name: jnp.asarray(array) for name, array in rows.items() if name != CLIENT_COLUMN}


def _deal(
    rows: int,
    labels: np.ndarray | None,
    client_ids: np.ndarray | None,
    config: DataConfig,
    generator: np.random.Generator,
) -> partition.Parts:
    if config.partition == "natural":
        if client_ids is None:
            raise ConfigError(no_client_ids(config.name))
        return partition.natural(client_ids)
    if labels is None:
        if config.partition != "iid":
            raise ConfigError(
                f"data.partition = {config.partition!r}: {config.name} has no labels to skew; "
                f"allowed are iid, natural"
            )
        labels = np.zeros(rows, np.int32)
    setting = f"data.clients = {config.clients}"
    try:
        if config.partition == "iid":
            return partition.iid(len(labels), config.clients, generator)
        if config.partition == "dirichlet":
            return partition.dirichlet(labels, config.clients, config.alpha, generator)
        setting += f", data.shards_per_client = {config.shards_per_client}"
        return partition.shards(labels, config.clients, config.shards_per_client, generator)
    except ValueError as error:
        raise ConfigError(f"{setting}: {error}") from error


def fingerprint(splits: Splits) -> str:
    """Digest of the division into clients, and of the private and the test rows, in hex.

    The clients' own rows may be many and stay unread. As rows are drawn and dealt at random, other
    rows are found by it if their number is another; one that is changed, where the server has it.
    """
    digest = hashlib.sha256()
    if isinstance(splits.clients, FederatedData | HostData):
        digest.update(np.asarray(splits.clients.offsets, np.int64).tobytes())
    for rows in (splits.private, splits.test):
        for name in sorted(rows):
            array = np.asarray(rows[name])
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def no_client_ids(name: str) -> str:
    """The message for a natural partition of data that does not say whose its rows are."""
    return (
        f"data.partition = 'natural': {name} does not say whose its rows are, in a column "
        f"{CLIENT_COLUMN}; allowed are dirichlet, shards, iid"
    )
