"""What a run gives away of each of its clients: epsilon, by dp-accounting.

Who is protected is a client with all its rows; who is curious sees every proxy and the model after
every round, and not who took part. Neighbours are, by how cohorts are drawn:

- Poisson cohorts: a client more or less. By privacy loss distributions (PLD); where there are fewer
  places than clients, of the truncated event (arXiv 2508.15089), which counts with the overflow.
- Everyone in every round: the same, without any gain by sampling, by PLD.
- Cohorts of a fixed size: a client in another's place. The sum then changes by twice the clip, so
  that the noise is half as large beside it, and there is only a bound by Renyi divergences (RDP,
  arXiv 1808.00087): much the weaker claim.
"""

import dataclasses
import functools
from typing import Any

from fedqsn_jax.config.schema import Config, ConfigError
from fedqsn_jax.reporting.summary import privacy_line

_INTERVAL = 5e-3
"""Of privacy losses; they are rounded so that epsilon is never too small."""
_ORDERS = (*range(2, 33), 48, 64, 128, 256)
"""Of Renyi divergences."""
_LEAST_NOISE, _MOST_NOISE = 2.0**-4, 2.0**16
_PRECISION = 1e-3
"""Relative, of the noise that is found."""


@dataclasses.dataclass(frozen=True)
class Account:
    """What a run's epsilon depends on, but for the number of rounds.

    Attributes:
      noise: The noise multiplier, above 0.
      delta: The delta of the claim.
      population: Number of clients.
      expected: Clients a round, or their mean number.
      places: The most clients of a round.
      poisson: Whether cohorts are Poisson cohorts.
    """

    noise: float
    delta: float
    population: int
    expected: int
    places: int
    poisson: bool

    def epsilon(self, rounds: int) -> float:
        """Returns the epsilon of so many rounds together."""
        return _epsilon(self, rounds) if rounds else 0.0

    def told(self, rounds: int) -> dict[str, Any]:
        """Returns the claim after so many rounds as plain data."""
        return {
            "epsilon": self.epsilon(rounds),
            "delta": self.delta,
            "rounds": rounds,
            "noise": self.noise,
            "method": self.method,
        }

    def line(self, rounds: int) -> str:
        """Returns the claim after so many rounds as a line of text."""
        return privacy_line(self.told(rounds))

    @property
    def method(self) -> str:
        """How it is computed, in words."""
        if self.expected == self.population:
            return "all clients in each round, PLD"
        return "Poisson cohorts, PLD" if self.poisson else "cohorts of a fixed size, RDP"


def account_of(
    config: Config, population: int, places: int, noise: float | None = None
) -> Account | None:
    """Returns the account of a configuration, or None where nothing is private.

    Where epsilon is given, the noise is found first, which takes some ten seconds; it is found once
    in a process.

    Args:
      config: The settings.
      population: Number of clients.
      places: The most clients of a round.
      noise: The noise that was found for this run before, if it was.

    Raises:
      ConfigError: dp-accounting is absent, or no noise is enough.
    """
    settings = config.privacy
    if not settings.clip:
        return None
    _require_accountant(settings.clip)
    account = Account(
        noise=settings.noise or noise or 1.0,
        delta=settings.delta,
        population=population,
        expected=config.cohort.size,
        places=places,
        poisson=config.cohort.sampling == "poisson",
    )
    if settings.noise or noise or not config.rounds:
        return account
    return dataclasses.replace(account, noise=_found(account, settings.epsilon, config.rounds))


def _require_accountant(clip: float) -> None:
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"privacy.clip = {clip}: epsilon is computed by dp-accounting, which is not installed: "
            f"pip install 'fedqsn_jax[privacy]'"
        ) from None


@functools.lru_cache(maxsize=256)
def _found(account: Account, epsilon: float, rounds: int) -> float:
    """The least noise with which so many rounds have at most an epsilon, to `_PRECISION`."""

    def suffices(noise: float) -> bool:
        return dataclasses.replace(account, noise=noise).epsilon(rounds) <= epsilon

    enough = 1.0
    while not suffices(enough):
        enough *= 2
        if enough > _MOST_NOISE:
            raise ConfigError(
                f"privacy.epsilon = {epsilon}: a noise of {_MOST_NOISE:g} is not enough for "
                f"{rounds} rounds; allowed is more"
            )
    while enough > _LEAST_NOISE and suffices(enough / 2):
        enough /= 2
    too_little = enough / 2
    while enough - too_little > _PRECISION * enough:
        middle = (enough + too_little) / 2
        if suffices(middle):
            enough = middle
        else:
            too_little = middle
    return enough


@functools.lru_cache(maxsize=4096)
def _epsilon(account: Account, rounds: int) -> float:
    if account.poisson or account.expected == account.population:
        composed = _loss_distribution(account).self_compose(rounds)
        return float(composed.get_epsilon_for_delta(account.delta))
    return _bound_by_divergences(account, rounds)


@functools.lru_cache(maxsize=64)
def _loss_distribution(account: Account) -> Any:
    """The privacy loss distribution of one round."""
    from dp_accounting.pld import privacy_loss_distribution

    probability = account.expected / account.population
    if account.places < account.population:
        return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=account.population,
            sampling_probability=probability,
            truncated_batch_size=account.places,
            noise_multiplier=account.noise,
            value_discretization_interval=_INTERVAL,
        )
    return privacy_loss_distribution.from_gaussian_mechanism(
        account.noise, sampling_prob=probability, value_discretization_interval=_INTERVAL
    )


def _bound_by_divergences(account: Account, rounds: int) -> float:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(
        _ORDERS, neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    # The event wants the noise beside the sensitivity: of a client in another's place, two clips.
    one_round = dp_accounting.SampledWithoutReplacementDpEvent(
        account.population, account.expected, dp_accounting.GaussianDpEvent(account.noise / 2)
    )
    accountant.compose(one_round, rounds)
    return float(accountant.get_epsilon(account.delta))
