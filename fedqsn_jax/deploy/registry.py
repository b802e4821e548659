"""Which client has which number, in a file: a client that comes back has the number that it had."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.core.keys import fold_in_name, keyed_permutation
from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.rounds.federation import ServerState

REGISTRY = "clients.json"
"""In the working directory: clients' names with their numbers, in the order in which they came."""


class Registry:
    """Numbers of clients by their names, which are those of registered keys where nodes have any.

    Masks that clients keep belong to the number, and so to the key: who is registered again with
    the same key has the same mask.
    """

    def __init__(self, file: Path, population: int, *, begun: bool) -> None:
        """Reads the file.

        Args:
          file: Where the numbers are kept.
          population: The most clients that may ever take part.
          begun: Whether there were rounds before: then the file has to be there.

        Raises:
          ConfigError: It is absent or damaged.
        """
        self._file = file
        self._population = population
        self._numbers: dict[str, int] = {}
        if not begun and not file.exists():
            return
        try:
            self._numbers = {str(name): int(n) for name, n in json.loads(file.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            # Other numbers would give clients the masks of others, beside their own.
            raise ConfigError(
                f"{file}: it cannot be read, and says which client has which mask ({error}); "
                f"bring it back from a copy, or begin in another --workdir"
            ) from error

    def numbers(self, nodes: Iterable[str]) -> tuple[dict[int, str], list[str]]:
        """Numbers clients; who is new gets the next number.

        Returns:
          The nodes by their numbers; and those for whom there is none, since as many as may ever
          take part have come before.
        """
        new = [node for node in sorted(nodes) if node not in self._numbers]
        new = new[: max(self._population - len(self._numbers), 0)]
        if new:
            for node in new:
                self._numbers[node] = len(self._numbers)
            with replacing(self._file) as temporary:
                temporary.write_text(json.dumps(self._numbers, indent=2) + "\n")
        numbered = {self._numbers[node]: node for node in nodes if node in self._numbers}
        return numbered, sorted(node for node in nodes if node not in self._numbers)


def choose_cohort(state: ServerState, clients: Mapping[int, str], size: int) -> dict[int, str]:
    """Returns who takes part in a round, by number: the first in its order that are there.

    Args:
      state: The state before the round.
      clients: The nodes that are there, by their numbers.
      size: How many are to take part.
    """
    population = max(clients) + 1
    key = fold_in_name(jax.random.fold_in(state.public_key, state.round), "cohort")
    order = keyed_permutation(key, jnp.arange(population, dtype=jnp.int32), population)
    present = [int(number) for number in np.asarray(order) if int(number) in clients]
    return {number: clients[number] for number in present[:size]}
