"""Which of a round's clients return an update, and after how many steps.

Every client of a cohort receives its proxy, and may keep it. What comes back is another matter: a
client drops out and returns nothing, a straggler is cut off early, a broken one returns NaN. Each
of these is drawn for a client and a round alone, so it does not depend on how clients are run. A
client that returns nothing takes no step.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.types import Array, Key


@dataclasses.dataclass(frozen=True)
class Participation:
    """How clients fail; static. What has probability zero is no part of the program.

    Attributes:
      dropout: Probability that a client of the cohort returns nothing.
      stragglers: Probability that a client is cut off before its last step.
      straggler_share: Share of its steps that a straggler takes, rounded, at least one of them.
      nan: Probability that all of a client's update is NaN: a fault that is put in on purpose.
      lost_copies: Probability that a client of the cohort has lost what it was sent before, where
        it would not be sent it in every round anyway.
    """

    dropout: float = 0.0
    stragglers: float = 0.0
    straggler_share: float = 0.5
    nan: float = 0.0
    lost_copies: float = 0.0


EVERYONE = Participation()
"""No client fails."""


@struct.dataclass
class Attendance:
    """What becomes of the clients of one round.

    Attributes:
      returns: Who returns an update, bool ``[cohort]``; a client without steps does not.
      steps: The steps that each takes, int32 ``[cohort]``; zero for those that return nothing.
      broken: Whose update is NaN, bool ``[cohort]``.
      lost: Who has lost what it was sent before, bool ``[cohort]``.
    """

    returns: Array
    steps: Array
    broken: Array
    lost: Array


def draw_attendance(key: Key, ids: Array, steps: Array, settings: Participation) -> Attendance:
    """Draws what becomes of each client.

    Args:
      key: The round's public key; ids are folded in.
      ids: The cohort, int32 ``[cohort]``.
      steps: The steps that each client would take, int32 ``[cohort]``.
      settings: How clients fail.
    """

    def draw(name: str, probability: float) -> Array:
        if isinstance(probability, float | int) and probability == 0:
            return jnp.zeros(ids.shape, bool)

        def one(client_id: Array) -> Array:
            own_key = fold_in_name(jax.random.fold_in(key, client_id), name)
            return jax.random.bernoulli(own_key, probability)

        return jax.vmap(one)(ids)

    returns = (steps > 0) & ~draw("dropout of clients", settings.dropout)
    fewer = jnp.round(settings.straggler_share * steps).astype(jnp.int32)
    taken = jnp.where(draw("stragglers", settings.stragglers), jnp.maximum(fewer, 1), steps)
    return Attendance(
        returns=returns,
        steps=jnp.where(returns, taken, 0),
        broken=draw("nan", settings.nan),
        lost=draw("lost copies", settings.lost_copies),
    )
