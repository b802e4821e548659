"""Epsilon against a closed form and earlier figures of dp-accounting, and the noise for it."""

import dataclasses
import sys

import pytest
from scipy import optimize, stats

from fedqsn_jax.config.schema import Config, ConfigError, resolve, to_dict, with_fields
from fedqsn_jax.simulation.accounting import Account, account_of
from fedqsn_jax.simulation.warnings import weak_claims

THOUSAND = Account(noise=1.0, delta=1e-5, population=1000, expected=50, places=1000, poisson=True)
"""1,000 clients, 50 a round."""
CHOSEN = {
    "privacy.clip": 1.0,
    "privacy.noise": 1.0,
    "server.weighting": "uniform",
    "cohort.sampling": "poisson",
}


def config_of(**values):
    changes = {name.replace("__", "."): value for name, value in values.items()}
    return resolve(to_dict(with_fields(Config(), CHOSEN | changes)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4.77),
        ({"places": 64}, 8.66),
        ({"places": 80}, 4.81),
        ({"places": 100}, 4.77),
        # Half of it is left where a client may stand in another's place.
        ({"poisson": False, "places": 50, "noise": 2.0}, 9.28),
    ],
)
def test_epsilon_is_what_the_accountant_gave_before(changes, expected):
    account = dataclasses.replace(THOUSAND, **changes)
    assert account.epsilon(200) == pytest.approx(expected, abs=0.0075)


@pytest.mark.parametrize("poisson", [True, False])
def test_all_clients_in_each_round_are_the_gaussian_mechanism(poisson):
    """Its delta in closed form (arXiv 1805.06530, theorem 8)."""
    account = Account(4.0, 1e-3, population=20, expected=20, places=20, poisson=poisson)
    shift = 9**0.5 / 4.0

    def excess(epsilon):
        below = stats.norm.cdf(shift / 2 - epsilon / shift)
        return (
            below - 2.718281828459045**epsilon * stats.norm.cdf(-shift / 2 - epsilon / shift) - 1e-3
        )

    exact = optimize.brentq(excess, 0, 20)
    assert exact <= account.epsilon(9) <= exact + 0.01


def test_an_account_begins_at_nothing_and_grows():
    spent = [THOUSAND.epsilon(rounds) for rounds in (0, 1, 10, 200, 400)]
    assert spent[0] == 0
    assert spent == sorted(spent)


def test_the_noise_is_the_least_that_is_enough():
    config = config_of(privacy__noise=0.0, privacy__epsilon=2.0, rounds=20)
    account = account_of(config, population=20, places=20)
    less = dataclasses.replace(account, noise=account.noise * (1 - 2e-3))
    assert account.epsilon(20) <= 2 < less.epsilon(20)
    longer = account_of(with_fields(config, {"rounds": 40}), 20, 20, account.noise)
    assert longer == account, "a run that is extended keeps its noise"
    assert longer.epsilon(40) > 2


def test_nothing_is_accounted_where_nothing_is_private():
    assert account_of(Config(), 20, 10) is None


def test_without_dp_accounting_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedqsn_jax\[privacy\]'"):
        account_of(config_of(), 20, 20)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"privacy__clip": 0.0}, "privacy.noise = 1.0 with privacy.clip = 0"),
        ({"privacy__noise": 0.0}, "privacy.noise = 0 and privacy.epsilon = 0 with privacy.clip"),
        ({"privacy__epsilon": 2.0}, "privacy.noise = 1.0 and privacy.epsilon = 2.0 with"),
        ({"privacy__delta": 0.0}, "privacy.delta = 0.0: allowed is"),
        ({"privacy__delta": 1.0}, "privacy.delta = 1.0: allowed is"),
        ({"privacy__epsilon": -1.0}, "privacy.epsilon = -1.0: allowed is 0 or more"),
        ({"server__weighting": "data"}, "server.weighting = 'data' with privacy.clip = 1.0: "),
        ({"server__clip_norm": 1.0}, "server.clip_norm = 1.0 with privacy.clip = 1.0: "),
        (
            {"upload__bits": 4, "upload__error_feedback": True},
            "upload.error_feedback = True with privacy.clip = 1.0: ",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(values, told):
    with pytest.raises(ConfigError) as refusal:
        config_of(**values)
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_large_delta_is_warned_of():
    assert weak_claims(config_of(), population=1000) == []
    (line,) = weak_claims(config_of(privacy__delta=1e-2), population=1000)
    assert "privacy.delta = 0.01: it should be well below 1 / 1000" in line
