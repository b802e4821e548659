"""Who attacks: some of the clients, who pool what they received and what they own."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fedqsn_jax.audit.case import Case
from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.core.keys import fold_in_name, keyed_permutation

HALF = "half"


class Adversary(NamedTuple):
    """Colluding clients.

    Attributes:
      name: The number of them, or ``half``.
      members: Their client ids.
    """

    name: str
    members: tuple[int, ...]


def check_colluders(colluders: Sequence[int | str], population: int) -> list[tuple[str, int]]:
    """Returns names and sizes of coalitions, ascending, each size once.

    Raises:
      ConfigError: One is no number of clients, or larger than the population.
    """
    sizes: dict[int, str] = {}
    for given in colluders:
        half = given == HALF
        size = max(1, population // 2) if half else given
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"colluders = {given!r}: allowed is 1 or more, or {HALF!r}")
        if size > population:
            raise ConfigError(
                f"colluders = {given}: allowed is at most the number of clients, {population}"
            )
        sizes.setdefault(size, HALF if half else str(size))
    if not sizes:
        raise ConfigError(f"colluders = (): allowed are one or more numbers, or {HALF!r}")
    return [(sizes[size], size) for size in sorted(sizes)]


def adversaries(case: Case, colluders: Sequence[int | str]) -> list[Adversary]:
    """The coalitions: of the run's own attackers' size those, others drawn by the same key.

    So smaller ones are parts of larger ones, as in the run.

    Raises:
      ConfigError: See `check_colluders`.
    """
    population = case.data.clients
    own = {len(each.members): each.members for each in case.final.attackers.values()}
    key = fold_in_name(case.final.public_key, "attackers")

    def members(size: int) -> tuple[int, ...]:
        drawn = own.get(size)
        if drawn is None:
            drawn = keyed_permutation(key, jnp.arange(size, dtype=jnp.int32), population)
        return tuple(int(member) for member in np.asarray(drawn))

    return [Adversary(name, members(size)) for name, size in check_colluders(colluders, population)]
