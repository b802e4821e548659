"""Rotary positions in a config.json: two sections, of which files of different age have one."""

import math
from typing import Any

from fedqsn_jax.models.language.hugging_face import Settings
from fedqsn_jax.models.language.rotary_positions import (
    DynamicScaling,
    LinearScaling,
    LongScaling,
    RopeScaling,
    Scaling,
    YarnScaling,
)

_FAST, _SLOW = 32, 1
_ORIGINAL = "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"


def read_rope(
    settings: Settings, positions: int, base: float = 10000.0
) -> tuple[float, Scaling | None]:
    """Returns the base of the frequencies, and how they are scaled.

    Args:
      settings: The whole file.
      positions: The model's longest sequence.
      base: The base where the file does not say it.

    Raises:
      PretrainedError: The scaling is none of those here, or settings contradict each other.
    """
    rope, base = _read_base(settings, base)
    for either in (settings, rope):
        either.require(_PARTIAL, 1, None)
    return base, _read_scaling(settings, rope, positions)


def read_long_rope(settings: Settings, positions: int) -> tuple[float, LongScaling | None, float]:
    """Returns base and scaling of Phi-3's rotary positions, and which share of a head is turned.

    Args:
      settings: The whole file.
      positions: The model's longest sequence.

    Raises:
      PretrainedError: The scaling is another one, or settings contradict each other.
    """
    rope, base = _read_base(settings, 10000.0)
    share = rope.number(_PARTIAL, settings.number(_PARTIAL, 1.0))
    settings.agree(_PARTIAL, share)
    # The older names mean the same in files of this family.
    if rope.choice("rope_type", "default", "default", "longrope", "su", "yarn") == "default":
        return base, None, share
    original = rope.integer(_ORIGINAL, settings.integer(_ORIGINAL, 4096))
    settings.agree(_ORIGINAL, original)
    factor = rope.number("factor", positions / original)
    gain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return (
        base,
        LongScaling(
            rope.numbers("short_factor"),
            rope.numbers("long_factor"),
            rope.number("attention_factor", gain),
            original,
        ),
        share,
    )


def _read_base(settings: Settings, base: float) -> tuple[Settings, float]:
    """The section that counts, and the base of the frequencies."""
    sections = {name: settings.section(name) for name in ("rope_scaling", "rope_parameters")}
    # The transformers library lets the older name win, too.
    name = "rope_scaling" if sections["rope_scaling"] else "rope_parameters"
    rope = settings.within(name, sections[name]).in_current_names({"type": "rope_type"})
    base = rope.number("rope_theta", settings.number("rope_theta", base))
    settings.agree("rope_theta", base)
    settings.within("rope_parameters", sections["rope_parameters"]).agree("rope_theta", base)
    return rope, base


def _read_scaling(settings: Settings, rope: Settings, positions: int) -> Scaling | None:
    kind = rope.choice("rope_type", "default", "default", "linear", "dynamic", "yarn", "llama3")
    if kind == "default":
        return None
    factor = rope.number("factor")
    if kind in ("linear", "dynamic"):
        return LinearScaling(factor) if kind == "linear" else DynamicScaling(factor)
    original = rope.integer(_ORIGINAL, positions)
    settings.agree(_ORIGINAL, original)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return RopeScaling(factor, low, high, original)
    return YarnScaling(
        factor=factor,
        attention_factor=rope.number("attention_factor", _attention_factor(rope, factor)),
        fast=rope.number("beta_fast", _FAST),
        slow=rope.number("beta_slow", _SLOW),
        original_length=original,
        whole=rope.flag("truncate", True),
    )


def _attention_factor(rope: Settings, factor: float) -> float:
    """YaRN's, where the file does not say it."""

    def of(multiple: float) -> float:
        return 0.1 * multiple * math.log(factor) + 1 if factor > 1 else 1.0

    one, other = rope.number("mscale", 0), rope.number("mscale_all_dim", 0)
    return of(one) / of(other) if one and other else of(1)


def rope_settings(scaling: Scaling | None) -> dict[str, Any] | None:
    """Returns the section of a scaling, as `read_rope` reads it."""
    if isinstance(scaling, RopeScaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            _ORIGINAL: scaling.original_length,
        }
    if isinstance(scaling, YarnScaling):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
            _ORIGINAL: scaling.original_length,
            "truncate": scaling.whole,
        }
    if isinstance(scaling, LongScaling):
        return {
            "rope_type": "longrope",
            "short_factor": list(scaling.short),
            "long_factor": list(scaling.long),
            "attention_factor": scaling.attention_factor,
            _ORIGINAL: scaling.original_length,
        }
    if scaling is None:
        return None
    kind = "linear" if isinstance(scaling, LinearScaling) else "dynamic"
    return {"rope_type": kind, "factor": scaling.factor}
