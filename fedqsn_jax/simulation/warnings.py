"""What a user is warned of: before a run by its settings alone, and at its end by what came of it.

A run and the call for a user's own model say the same; a sweep does, but for attackers that have
received nothing.
"""

import math
from collections.abc import Collection, Mapping, Sequence

from fedqsn_jax.config.schema import Config
from fedqsn_jax.protocol.algorithms import Promise
from fedqsn_jax.rounds.views import Attacker, has_received
from fedqsn_jax.simulation.from_config import algorithm_of
from fedqsn_jax.simulation.running import Entry
from fedqsn_jax.simulation.unused_settings import ignored_settings

DIVERGED = "the training diverged; its loss is no number. Lower the learning rates"

NO_NUMBER = (
    "the loss was no number before the first round, whatever was trained: the test rows, or the "
    "model's parameters, hold values that are not finite or too large"
)


def warnings_before_run(config: Config, chosen: Collection[str] = ()) -> list[str]:
    """Returns what to tell before a run, a line each.

    Told are promises that it breaks, settings that do not do what they seem to, and idle ones.

    Args:
      config: The settings.
      chosen: Fields that the user set one by one; see `unused_settings.ignored_settings`.
    """
    return [
        *_broken_promises(config),
        *_public_columns(config),
        *_coarse_codes(config),
        *_missing_rows(config),
        *ignored_settings(config, chosen),
    ]


def weak_claims(config: Config, population: int) -> list[str]:
    """Returns a line where delta is so large that the claim of privacy says little.

    Args:
      config: The settings.
      population: Number of clients.
    """
    if not config.privacy.clip or config.privacy.delta < 1 / population:
        return []
    return [
        f"privacy.delta = {config.privacy.delta}: it should be well below 1 / {population}, one "
        f"over the number of clients; otherwise a mechanism that gives one of them away whole "
        f"would pass"
    ]


def _broken_promises(config: Config) -> list[str]:
    """One line for the invariants that the algorithm does not meet, or none."""
    algorithm = algorithm_of(config)
    if not algorithm.broken_promises:
        return []
    settings, tells = (
        f"blocks = {config.blocks!r}",
        "what clients receive tells of hidden columns' values",
    )
    if algorithm.prompts_only:
        settings = "these settings"
        tells = "clients receive a small model that is made to be like the hidden one"
    why = {
        Promise.HIDDEN_VALUES_NEVER_CHANGE: "hidden columns change",
        Promise.NOTHING_SENT_DEPENDS_ON_HIDDEN_VALUES: tells,
    }
    told = " and ".join(why[promise] for promise in Promise if promise in algorithm.broken_promises)
    return [
        f"{config.algorithm} with {settings} does not keep what this package promises "
        f"elsewhere: {told}"
    ]


def _public_columns(config: Config) -> list[str]:
    """Columns of adapters that are hidden for good, and are zero ever after."""
    hidden = algorithm_of(config).p1
    if not (config.lora.public_base and hidden):
        return []
    return [
        f"p1 = {hidden} with lora.public_base = True hides nothing: a hidden column of an "
        f"adapter's B keeps its start value, zero, so that the hidden model is the public one plus "
        f"what all clients see; allowed too are p1 = 0 and p2"
    ]


def _coarse_codes(config: Config) -> list[str]:
    """Widths of codes at which values are worse than none, or another codebook is better."""
    down = algorithm_of(config).quantizer is not None
    lines = []
    for prefix, used, settings in (("", down, config), ("upload.", True, config.upload)):
        if not used or settings.codebook == "symmetric_normal_float":
            continue
        if settings.bits == 1:
            lines.append(
                f"{prefix}bits = 1: every value becomes plus or minus its block's largest, which "
                f"is worse than sending zeros (on Gaussian values, in blocks of 64, a squared "
                f"error of 3.74 times their variance); 2 bits or more are better"
            )
        elif settings.bits == 2 and settings.codebook == "normal_float":
            lines.append(
                f"{prefix}bits = 2 with {prefix}codebook = 'normal_float': on Gaussian values, in "
                f"blocks of 64, the squared error is .316 of their variance; with "
                f"{prefix}codebook = 'uniform' it is .255"
            )
    return lines


def _missing_rows(config: Config) -> list[str]:
    rows, private = config.pretraining.rows, config.data.private_rows
    if rows <= private or not config.pretraining.steps:
        return []
    return [
        f"pretraining.rows = {rows}: there are data.private_rows = {private}, all of which are used"
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
    if has_diverged(history[-1]):
        lines.append(NO_NUMBER if has_diverged(history[0]) else DIVERGED)
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
