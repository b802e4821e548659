"""How coalitions, figures and refusals are written."""

from collections.abc import Mapping
from typing import Any

NOT_TRACED = (
    "tracing_margin = 0, all clients were sent the same rounding, by which nobody is found; "
    "allowed are runs with tracing_margin above 0"
)
"""Why a run cannot be traced."""


def coalition(name: str, facts: Mapping[str, Any]) -> str:
    """A coalition in words."""
    count = len(facts["members"])
    if count == 1:
        return "one client"
    return f"{count} colluding clients" + (" (half of all)" if name == "half" else "")


def with_interval(found: Mapping[str, float | None] | None, digits: int = 3) -> str:
    """A figure with its interval, for example ``0.812 (0.790 to 0.835)``."""
    if found is None or found["value"] is None:
        return "-"
    value, low, high = (f"{found[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
