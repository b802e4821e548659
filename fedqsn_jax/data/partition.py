"""How rows are dealt to clients: NumPy, with the generator as an argument."""

import numpy as np

Parts = list[np.ndarray]
"""For each client the indices of its rows, int64."""


def iid(rows: int, clients: int, generator: np.random.Generator) -> Parts:
    """Deals rows in random order, as evenly as possible."""
    return np.array_split(generator.permutation(rows), clients)


def dirichlet(
    labels: np.ndarray, clients: int, alpha: float, generator: np.random.Generator
) -> Parts:
    """Deals the rows of each label by proportions drawn from a Dirichlet distribution.

    The smaller ``alpha``, the fewer labels a client has. A client that would end up without rows
    gets one of the largest client's, as long as there are as many rows as clients.
    """
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    dealt = [np.concatenate(part) for part in parts]
    for client in range(clients):
        largest = max(range(clients), key=lambda other: len(dealt[other]))
        if len(dealt[client]) == 0 and len(dealt[largest]) > 1:
            dealt[client], dealt[largest] = dealt[largest][-1:], dealt[largest][:-1]
    return [generator.permutation(part) for part in dealt]


def shards(
    labels: np.ndarray, clients: int, shards_per_client: int, generator: np.random.Generator
) -> Parts:
    """Sorts rows by label, cuts them into shards and deals each client several (McMahan et al.).

    Raises:
      ValueError: There are fewer rows than shards.
    """
    count = clients * shards_per_client
    if len(labels) < count:
        raise ValueError(f"{count} shards of {len(labels)} rows: allowed are at most {len(labels)}")
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    pieces = np.array_split(order, count)
    dealt = generator.permutation(count).reshape(clients, shards_per_client)
    return [np.concatenate([pieces[shard] for shard in own]) for own in dealt]


def natural(client_ids: np.ndarray) -> Parts:
    """Gives each client the rows that carry its id; clients in the order of their ids."""
    _, inverse = np.unique(client_ids, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    return np.split(order, np.cumsum(np.bincount(inverse))[:-1])
