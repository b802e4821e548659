"""Divides a data set's training rows among the server and the clients."""

import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config import ConfigError, DataConfig
from fedqsn_jax.data import partition
from fedqsn_jax.data.federated import FederatedData, Splits

Rows = dict[str, np.ndarray]
"""Named arrays ``[rows, ...]`` on the host."""


def make_splits(
    config: DataConfig,
    train: Rows,
    order: np.ndarray,
    test: Rows,
    num_classes: int,
    rng: np.random.Generator,
    ids: np.ndarray | None = None,
) -> Splits:
    """Makes the splits of a run from rows on the host.

    Args:
      config: How rows are divided.
      train: Rows for the server and the clients, with integer labels under ``label``.
      order: Indices into ``train``, shuffled: the first ``private_rows`` of them are the server's,
        the others are dealt to the clients.
      test: Held-out rows.
      num_classes: Number of labels.
      rng: Source of randomness for the deal.
      ids: Whose row each of ``train`` is, where the data says.

    Raises:
      ConfigError: There are too few rows, or the partition is impossible for this data.
    """
    private, rest = order[: config.private_rows], order[config.private_rows :]
    if len(rest) == 0:
        raise ConfigError(
            f"data.private_rows = {config.private_rows}: allowed is 0 to {len(order) - 1}, of the "
            f"{len(order)} training rows of {config.name}"
        )
    dealt = deal(config, train["label"][rest], rng, None if ids is None else ids[rest])
    offsets = np.cumsum([0, *map(len, dealt)])
    return Splits(
        # One gather from the host's arrays: a copy a client would double a large set's memory.
        FederatedData(_take(train, rest[np.concatenate(dealt)]), jnp.asarray(offsets, jnp.int32)),
        _take(train, private),
        {name: jnp.asarray(array) for name, array in test.items()},
        num_classes,
    )


def deal(
    config: DataConfig, labels: np.ndarray, rng: np.random.Generator, ids: np.ndarray | None = None
) -> partition.Deal:
    """Deals rows to clients as the configuration says.

    Args:
      config: Names the partition and its parameters.
      labels: Integers ``[rows]``.
      rng: Source of randomness.
      ids: Whose row each one is, where the data says; the natural partition needs it.

    Raises:
      ConfigError: The partition cannot be made of these rows.
    """
    name = config.partition
    if name == "natural" and ids is None:
        raise ConfigError(
            f"data.partition = 'natural': {config.name} does not say whose rows they are; "
            "allowed are dirichlet, shards, iid"
        )
    try:
        if name == "natural":
            return partition.natural(np.asarray(ids))
        if name == "dirichlet":
            return partition.dirichlet(labels, config.clients, config.alpha, rng)
        if name == "shards":
            return partition.shards(labels, config.clients, config.shards_per_client, rng)
        if name == "iid":
            return partition.iid(len(labels), config.clients, rng)
    except ValueError as error:
        raise ConfigError(f"data.partition = {name!r}: {error}") from error
    raise ConfigError(f"data.partition = {name!r}: allowed are dirichlet, shards, natural, iid")


def _take(rows: Rows, indices: np.ndarray) -> dict[str, jnp.ndarray]:
    return {name: jnp.asarray(array[indices]) for name, array in rows.items()}
