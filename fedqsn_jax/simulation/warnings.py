"""What a user is warned of: before a run by its settings alone, and at its end by what came of it.

A run and the call for a user's own model say the same; a sweep does, but for attackers that have
received nothing.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedqsn_jax.config.schema import Config
from fedqsn_jax.protocol.algorithms import Promise
from fedqsn_jax.rounds.views import Attacker, has_received
from fedqsn_jax.simulation.from_config import algorithm_of
from fedqsn_jax.simulation.unused import ignored_settings

Entry = Mapping[str, Any]
"""What an evaluated round told; see `running.Entry`."""

DIVERGED = "the training diverged; its loss is no number. Lower the learning rates"


def warnings_before_run(config: Config, chosen: Collection[str] = ()) -> list[str]:
    """Returns what to tell before a run, a line each: promises that it breaks, idle settings.

    Args:
      config: The settings.
      chosen: Fields that the user set one by one; see `unused.ignored_settings`.
    """
    return [*_broken_promises(config), *ignored_settings(config, chosen)]


def _broken_promises(config: Config) -> list[str]:
    """One line for the invariants that the algorithm does not meet, or none."""
    algorithm = algorithm_of(config)
    if not algorithm.broken_promises:
        return []
    tells = "what clients receive tells of hidden columns' values"
    if algorithm.prompts_only:
        tells = "clients receive a small model that is made to be like the hidden one"
    why = {
        Promise.HIDDEN_VALUES_NEVER_CHANGE: "hidden columns change",
        Promise.NOTHING_SENT_DEPENDS_ON_HIDDEN_VALUES: tells,
    }
    told = " and ".join(why[promise] for promise in Promise if promise in algorithm.broken_promises)
    return [
        f"{config.algorithm} with these settings does not keep what this package promises "
        f"elsewhere: {told}"
    ]


def warnings_after_run(
    config: Config, history: Sequence[Entry], attackers: Mapping[str, Attacker]
) -> list[str]:
    """Returns what to tell at the end of a run, a line each.

    Told are rejected updates, divergence, and attackers without a copy of anything.

    Args:
      config: The settings.
      history: The entries of the run.
      attackers: The attackers at its end, by name.
    """
    counts = [rejected(config, entry) for entry in history]
    lines = []
    if any(counts):
        rounds = sum("clients/rejected" in entry for entry in history)
        lines.append(
            rejection(
                f"{sum(counts)} clients' updates",
                f"in {sum(map(bool, counts))} of the {rounds} rounds that were evaluated",
            )
        )
    lines += [DIVERGED] * has_diverged(history[-1])
    lines += [
        f"{name} has received nothing, as none of its clients took part: its figures tell nothing "
        f"of the method"
        for name, attacker in attackers.items()
        if not has_received(attacker)
    ]
    return lines


def rejected(config: Config, entry: Entry) -> int:
    """Returns how many updates a round rejected; of faults that were asked for, none."""
    return 0 if config.participation.nan else int(entry.get("clients/rejected", 0))


def rejection(which: str, where: str) -> str:
    """Says that some updates were rejected.

    Args:
      which: Which.
      where: In which rounds.
    """
    return (
        f"{which} were rejected because they were not finite, {where}: their rows hold NaN, or "
        f"their training diverges"
    )


def has_diverged(entry: Entry) -> bool:
    """Whether the global model's loss is no number; None stands for such."""
    loss = entry.get("global/loss", 0.0)
    return loss is None or not math.isfinite(loss)
