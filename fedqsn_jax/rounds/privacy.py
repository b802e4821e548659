"""User-level differential privacy in the central model: clipped updates, noise on their sum.

DP-FedAvg (arXiv 1710.06963). What protects a client is that the sum of a round's updates hardly
depends on it:

- What a client returns is clipped by the aggregator (``clip_norm``) as the server has it, after
  quantization on its way and after decoding, over all tensors together. An update that is not
  finite counts as zero. Weights are one. So with a client more or less *the sum changes by at most
  ``clip`` in L2 norm*: its sensitivity, however updates were quantized before, and up to the
  rounding of float32. Where one client's rows are replaced by another's it is twice that.
- The server adds Gaussian noise of the standard deviation ``noise * clip`` to that sum, once, in
  every round, at every trained entry that the server mask does not hide: also where nobody came,
  and in columns that nobody saw, as a noise that is left out tells who took part.
- Divisors are fixed: `Privacy.expected` clients, and of a column the expected share of those that
  see it. A mean over one-way rounds adds these up, one expected cohort a round.

All that follows, the server's optimizer and the proxies, is computed from the noisy sum alone. What
is *not* covered: who knows the secret key, in simulation the seed; a round's facts (losses,
counts), which are the server's own and carry no noise; and the finite precision of float32 noise
(arXiv 2107.10138), of which no draw is beyond some 5.4 standard deviations.
"""

import dataclasses

import jax
import jax.numpy as jnp

from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.trees import map_by_path
from fedqsn_jax.core.types import Array, Columns, Key
from fedqsn_jax.protocol.masks import Sampling, spread, visible_share
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.rounds.aggregation import Contribution


@dataclasses.dataclass(frozen=True)
class Privacy:
    """How the sum of a round's updates is made private; static.

    Attributes:
      clip: The sensitivity of the sum: the aggregator's ``clip_norm``, above 0.
      noise: The noise multiplier: standard deviation of the noise over ``clip``.
      expected: Expected number of clients a round, which sums are divided by.
      hidden: Probability that a client's mask hides a column, p2; may be traced.
      sampling: How clients' masks are drawn.
    """

    clip: float
    noise: float
    expected: float
    hidden: float | Array = 0.0
    sampling: Sampling = "bernoulli"

    def __post_init__(self) -> None:
        """Checks what is static.

        Raises:
          ValueError: The clip or the expected number is not above 0, or the noise is below 0.
        """
        if not (self.clip > 0 and self.noise >= 0 and self.expected > 0):
            raise ValueError(
                f"clip {self.clip}, noise {self.noise}, {self.expected} expected clients: allowed "
                f"are a clip and a number above 0, and noise of 0 or more"
            )


def privatize(
    privacy: Privacy, key: Key, total: Contribution, server_visible: Columns, sites: Sites
) -> Contribution:
    """Returns the sum of a round's contributions with noise, and with fixed weights.

    Args:
      privacy: How.
      key: The round's secret key of the noise; a tensor's path is folded in.
      total: The sum of the clients' contributions, clipped, of weight one each.
      server_visible: The columns that the server does not hide, bool ``[layers, columns]`` a site.
      sites: The mask sites.

    Returns:
      The noisy sum; as its weight `Privacy.expected`, and as its coverage of a column the expected
      number of clients that see it. Neither depends on who took part.
    """
    deviation = privacy.noise * privacy.clip

    def noisy(path: str, leaf: Array) -> Array:
        drawn = jax.random.normal(fold_in_name(key, path), leaf.shape, jnp.float32)
        return leaf + deviation * drawn

    seen = spread(server_visible, total.delta, sites, True)
    delta = map_by_path(noisy, total.delta)
    by_path = {site.path: site for site in sites.drawing}
    return dataclasses.replace(
        total,
        # Hidden columns have no delta, and must have no noise: an optimizer may use global norms.
        delta=jax.tree.map(lambda leaf, here: jnp.where(here, leaf, 0), delta, seen),
        weight=jnp.float32(privacy.expected),
        coverage={
            path: jnp.full(
                weights.shape,
                privacy.expected * visible_share(by_path[path], privacy.hidden, privacy.sampling),
                jnp.float32,
            )
            for path, weights in total.coverage.items()
        },
    )


def noise_key(secret_key: Key, round_index: Array | int) -> Key:
    """Returns the key of a round's noise."""
    return jax.random.fold_in(fold_in_name(secret_key, "noise on the sum of updates"), round_index)
