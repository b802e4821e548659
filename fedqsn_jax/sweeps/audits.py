"""What an audit says of the points of a sweep: the kept benefit U and the protected share P.

A sweep knows nothing of audits: it is given one as a function, and asks it at every finished point.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedqsn_jax.config.schema import Config, ConfigError
from fedqsn_jax.core.types import Params
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.runs.preparation import Experiment
from fedqsn_jax.sweeps.estimates import Estimate, Setting, estimate, ratio, score_of
from fedqsn_jax.sweeps.grid import SEED, Plan, Point
from fedqsn_jax.sweeps.results import Record, identity

BENEFIT = "U"
SHARE = "P/"
LEAST = "P_at_least/"
PREFIX = "audit/"
WORTH_PROTECTING = 0.03
"""Where the owner is less than so much above what colluders reach alone, there is no P."""


class PointAudit(Protocol):
    """An audit of points; see `audit.points.PointAuditor`, which is one."""

    described: dict[str, Any]

    def check(self, experiment: Experiment) -> None:
        """Raises ConfigError for a point that cannot be audited."""

    def __call__(
        self, experiment: Experiment, params: Params, final: ServerState, directory: Path
    ) -> Mapping[str, float | None]:
        """Audits a finished point: what is known of it by name, ``attack/WHO`` among others."""


def is_reference(config: Config) -> bool:
    """Whether a point is FedAvg as it is: nothing hidden or quantized, all sent in every round."""
    broadcast = config.broadcast
    # Points of FedAvg run as FedSN without masks.
    plain = config.algorithm in ("fedavg", "fedsn") and config.p1 == 0 and config.p2 == 0
    return plain and not config.lora.rank and broadcast.every == 1 and broadcast.share == 1


def references(plan: Plan) -> dict[int, Point]:
    """The point of each seed against which the kept benefit is measured.

    Raises:
      ConfigError: A seed has none.
    """
    found: dict[int, Point] = {}
    for point in plan.points:
        if is_reference(point.config):
            found.setdefault(point.config.seed, point)
    missing = sorted({point.config.seed for point in plan.points} - set(found))
    if missing:
        raise ConfigError(
            f"--audit: the sweep has no point of FedAvg with seed {', '.join(map(str, missing))}, "
            f"against which the kept benefit is measured; add {{'algorithm': ['fedavg']}}"
        )
    return found


def with_shares(
    settings: Sequence[Setting], records: Sequence[Record], plan: Plan
) -> list[Setting]:
    """Adds U, and P of every coalition, to what was measured of settings.

    ``U = (global - start) / (FedAvg - start)``, with FedAvg of the same seed; ``P/WHO = (global -
    attack) / (global - alone)``, where an attack below ``alone`` counts as ``alone``;
    ``P_at_least/WHO`` has the attack that is best on the test rows. They are ratios of means over
    seeds. P is NaN where there is nothing to protect, U as long as a FedAvg is missing.

    Args:
      settings: What `results.over_seeds` gave.
      records: The finished points.
      plan: The sweep.
    """
    score = score_of(settings)
    metrics = {identity(each["settings"], each[SEED]): each["metrics"] for each in records}
    fedavg = {
        seed: metrics.get(identity(point.settings, seed), {}).get(f"global/{score}")
        for seed, point in references(plan).items()
    }
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(identity(record["settings"], 0), []).append(record)
    return [
        setting._replace(
            metrics={
                **setting.metrics,
                **_shares(groups[identity(setting.settings, 0)], fedavg, score),
            }
        )
        for setting in settings
    ]


def _shares(
    group: Sequence[Record], fedavg: Mapping[int, float | None], score: str
) -> dict[str, Estimate]:
    def of(name: str) -> list[float | None]:
        return [record["metrics"].get(name) for record in group]

    own, start = of(f"global/{score}"), of(f"start/{score}")
    best = [fedavg[record[SEED]] for record in group]
    found = {BENEFIT: ratio(_less(own, start), _less(best, start))}
    prefix = f"{PREFIX}alone/"
    names = {name for record in group for name in record["metrics"] if name.startswith(prefix)}
    for who in sorted(name.removeprefix(prefix) for name in names):
        alone = of(f"{PREFIX}alone/{who}")
        worth = _less(own, alone)
        for name, kind in ((SHARE, "attack"), (LEAST, "strongest")):
            attack = [
                value if other is None else max(other, value or 0.0)
                for other, value in zip(alone, of(f"{PREFIX}{kind}/{who}"), strict=True)
            ]
            worthy = estimate(worth).mean >= WORTH_PROTECTING
            found[f"{name}{who}"] = ratio(_less(own, attack) if worthy else [None], worth)
    return found


def _less(values: Sequence[float | None], others: Sequence[float | None]) -> list[float | None]:
    """Differences; None where one of both is unknown."""
    return [None if a is None or b is None else a - b for a, b in zip(values, others, strict=True)]


def coalitions(settings: Sequence[Setting]) -> list[str]:
    """The names of the coalitions that were audited, the smallest first."""
    names = dict.fromkeys(name for each in settings for name in each.metrics)
    found = [name.removeprefix(SHARE) for name in names if name.startswith(SHARE)]
    return sorted(found, key=lambda who: (not who.isdecimal(), int(who) if who.isdecimal() else 0))


def mechanism(settings: Mapping[str, Any]) -> str:
    """What a setting protects by, in words: its method, whose masks, and what is sent back."""
    words = [str(value) for name, value in settings.items() if _names_method(name, value)]
    if settings.get("mask_per") == "client":
        words.append("sticky")
    every, share = settings.get("broadcast.every"), settings.get("broadcast.share")
    if every == 0:
        words.append("one-way")
    elif every is not None and every > 1:
        words.append(f"sent every {every} rounds")
    if share is not None and share != 1:
        words.append(f"{share:g} of it sent")
    return ", ".join(words) or "all"


def _names_method(name: str, value: Any) -> bool:
    return isinstance(value, str) and name != "mask_per"
