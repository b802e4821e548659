"""Fields of a configuration that what it chooses elsewhere leaves without effect.

When a field is used stands beside it, in `config.schema`.
"""

from collections.abc import Collection

from fedqsn_jax.config.fields import describe
from fedqsn_jax.config.schema import Config, flatten, with_fields

_PROBABILITIES = ("p1", "p2")
_STEPS, _EPOCHS = "client.steps", "client.epochs"
_PROBLEM = ("data.", "model.")
"""Sections that a file sets for its own problem; others it sets for all algorithms."""


def unused_fields(config: Config) -> tuple[str, ...]:
    """Returns the dotted names of fields whose values make no difference to a run.

    Without ``p1`` and ``p2``, which an algorithm without masks has as zero.
    """
    return tuple(name for name in _reasons(config) if name not in _PROBABILITIES)


def without_effect(config: Config) -> set[str]:
    """Returns `unused_fields`, with ``p1`` and ``p2`` of an algorithm without masks.

    Each is so whatever the values of the others in the set.
    """
    return set(_reasons(config))


def as_used(config: Config) -> Config:
    """Returns a configuration with what it does not use at defaults, ``p1`` and ``p2`` at zero.

    Of two that differ in nothing else these are equal.
    """
    defaults = flatten(Config()) | dict.fromkeys(_PROBABILITIES, 0.0)
    return with_fields(config, {name: defaults[name] for name in _reasons(config)})


def ignored_settings(config: Config, chosen: Collection[str] = ()) -> list[str]:
    """Returns a line for each setting that was made and has no effect.

    Args:
      config: The settings.
      chosen: Dotted names of the fields that the user set one by one. Of settings of the method
        only those are told: files under ``configs/`` make them for all algorithms, of which one is
        then chosen. A file's epochs are told beside its own steps, not beside chosen ones.
    """
    fields, defaults = flatten(config), flatten(Config())
    method_first = sorted(_reasons(config).items(), key=lambda each: each[0].startswith(_PROBLEM))
    return [
        f"{name} = {fields[name]!r} has no effect with {why}"
        for name, why in method_first
        if fields[name] != defaults[name]
        and (
            name in chosen
            or name.startswith(_PROBLEM)
            or (name == _EPOCHS and _STEPS not in chosen)
        )
    ]


def _reasons(config: Config) -> dict[str, str]:
    """Unused fields, each with the setting that leaves it unused."""
    reasons = {name: each.unmet(config) for name, each in describe(Config).items()}
    return {name: why for name, why in reasons.items() if why}
