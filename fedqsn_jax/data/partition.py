"""How rows are dealt to clients: NumPy, with the generator as an argument.

Every row is dealt exactly once, and no client is left without one.
"""

import numpy as np

Parts = list[np.ndarray]
"""For each client the indices of its rows, int64."""


def iid(rows: int, clients: int, generator: np.random.Generator) -> Parts:
    """Deals rows in random order, as evenly as possible.

    Raises:
      ValueError: There are no clients, or fewer rows than clients.
    """
    _check_counts(rows, clients)
    return np.array_split(generator.permutation(rows), clients)


def dirichlet(
    labels: np.ndarray, clients: int, alpha: float, generator: np.random.Generator
) -> Parts:
    """Deals the rows of each label by proportions drawn from a Dirichlet distribution.

    The smaller ``alpha``, the fewer labels a client has. A client that would end up without rows
    gets one of the largest client's.

    Raises:
      ValueError: There are no clients, or fewer rows than clients, or ``alpha`` is not positive.
    """
    _check_counts(len(labels), clients)
    if not (np.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha = {alpha}: allowed is a finite number above 0")
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    dealt = [np.concatenate(part) for part in parts]
    sizes = np.array([len(part) for part in dealt])
    for client in np.flatnonzero(sizes == 0):
        largest = sizes.argmax()
        dealt[client], dealt[largest] = dealt[largest][-1:], dealt[largest][:-1]
        sizes[client], sizes[largest] = 1, sizes[largest] - 1
    return [generator.permutation(part) for part in dealt]


def shards(
    labels: np.ndarray, clients: int, shards_per_client: int, generator: np.random.Generator
) -> Parts:
    """Sorts rows by label, cuts them into shards and deals each client several (McMahan et al.).

    Raises:
      ValueError: There are no shards, or fewer rows than shards.
    """
    count = clients * shards_per_client
    if clients < 1 or not 1 <= count <= len(labels):
        raise ValueError(
            f"cannot cut {len(labels)} rows into {clients} x {shards_per_client} shards: "
            f"allowed are 1 to {len(labels)} shards"
        )
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    pieces = np.array_split(order, count)
    dealt = generator.permutation(count).reshape(clients, shards_per_client)
    return [np.concatenate([pieces[shard] for shard in own]) for own in dealt]


def natural(client_ids: np.ndarray) -> Parts:
    """Gives each client the rows that carry its id; clients in the order of their ids.

    Raises:
      ValueError: There are no rows.
    """
    if len(client_ids) == 0:
        raise ValueError("cannot deal 0 rows: at least one is needed")
    _, inverse = np.unique(client_ids, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    return np.split(order, np.cumsum(np.bincount(inverse))[:-1])


def _check_counts(rows: int, clients: int) -> None:
    if not 1 <= clients <= rows:
        raise ValueError(f"cannot deal {rows} rows to {clients} clients: allowed are 1 to {rows}")
