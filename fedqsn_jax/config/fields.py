"""How a field of the configuration is described, and how a value is checked against that.

A field stands in one place, a line of `settings` or
`problem_settings`: its default, what is allowed, what it is, and
when it is used. Refusals, warnings about settings without effect, ``--help`` and the table in
``configs/README.md`` are made of these descriptions.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedqsn_jax.core.errors import UserError

LARGEST_INTEGER = 2**31 - 1
"""Counts are signed 32-bit integers on the device."""
LARGEST_FLOAT = float(np.finfo(np.float32).max)
"""Rates and probabilities are 32-bit floats there."""
SMALLEST_FLOAT = float(np.finfo(np.float32).tiny)
"""Processors take what is smaller for zero."""
_SHOWN = 60
"""Characters of a value that a refusal shows."""


class ConfigError(UserError):
    """A mistake in a configuration; the message is one line: field, value, what is allowed."""


class Allowed(NamedTuple):
    """What a field's value, or each entry of a tuple, may be.

    Attributes:
      words: The allowed words; none: a number, or any text.
      low: The smallest number; None: any that fits.
      high: The largest number; None: any that fits.
      below: What a number is below; None: anything.
      entries: The most entries of a tuple; None: any number.
    """

    words: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    below: float | None = None
    entries: int | None = None

    def described(self) -> str:
        """Says what is allowed; empty where everything of the field's type is."""
        if self.words:
            return ", ".join(self.words)
        if self.low is None:
            return ""
        upper = f" to {_plain(self.high)}" if self.high is not None else " or more"
        upper = f" to below {_plain(self.below)}" if self.below is not None else upper
        many = f", at most {self.entries} of them" if self.entries else ""
        return f"{_plain(self.low)}{upper}{many}"


class Condition(NamedTuple):
    """When a field is used.

    Attributes:
      words: The condition in words, after "used when".
      unmet: Takes a `settings.Config` and the prefix of the field's own section, such as
        ``"client."``. Returns the setting that leaves the field without effect, as
        ``"upload.bits = 0"``; None: the field is used.
    """

    words: str
    unmet: Callable[[Any, str], str | None]


class Description(NamedTuple):
    """A field of the configuration.

    Attributes:
      name: Its dotted name.
      type: The type of its value: int, float, bool, str or a tuple of one of these.
      default: The default.
      allowed: What values are allowed.
      help: What the field is.
      used: When it is used; None: always.
    """

    name: str
    type: Any
    default: Any
    allowed: Allowed
    help: str
    used: Condition | None

    def allowed_words(self) -> str:
        """Says what is allowed; empty for any text."""
        if self.type is bool:
            return "True, False"
        return self.allowed.described()

    def told(self) -> str:
        """Says in a line what the field is, what is allowed, and when it is used."""
        allowed, used = self.allowed_words(), self.used
        parts = [self.help, f"allowed: {allowed}" if allowed else ""]
        parts.append(f"used when {used.words.replace('`', '')}" if used else "")
        return "; ".join(part for part in parts if part)

    def unmet(self, config: Any) -> str | None:
        """Returns the setting of a configuration that leaves the field without effect, if any."""
        if self.used is None:
            return None
        section, dot, _ = self.name.rpartition(".")
        return self.used.unmet(config, section + dot)


def one_of(*words: str) -> Allowed:
    """Allows some words."""
    return Allowed(words)


def between(
    low: float,
    high: float | None = None,
    *,
    below: float | None = None,
    entries: int | None = None,
) -> Allowed:
    """Allows numbers from ``low`` to ``high``, or to below ``below``; see `Allowed`."""
    return Allowed((), low, high, below, entries)


def field(
    default: Any, allowed: Allowed | None = None, help: str = "", used: Condition | None = None
) -> Any:
    """Declares a field of a section; see `Description`."""
    metadata = {"allowed": allowed or Allowed(), "help": help, "used": used}
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: Any, used: Condition | None = None, but: tuple[str, ...] = ()) -> Any:
    """Declares a section.

    Args:
      kind: Its dataclass.
      used: When its fields are used; None: as they say themselves.
      but: Fields of which that is not so.
    """
    return dataclasses.field(default_factory=kind, metadata={"used": used, "but": but})


def when(name: str, *values: Any) -> Condition:
    """Used when another field has one of some values.

    Args:
      name: Its dotted name; with a leading dot a field of the same section.
      values: The values.
    """
    return Condition(
        f"`{name.removeprefix('.')}` is {_any_of(values)}",
        lambda config, section: _unless(config, section, name, lambda value: value in values),
    )


def unless(name: str, *values: Any) -> Condition:
    """Used when another field has none of some values; see `when`."""
    return Condition(
        f"`{name.removeprefix('.')}` is not {_any_of(values)}",
        lambda config, section: _unless(config, section, name, lambda value: value not in values),
    )


def both(*conditions: Condition) -> Condition:
    """Used when all of some conditions hold."""

    def unmet(config: Any, section: str) -> str | None:
        reasons = (condition.unmet(config, section) for condition in conditions)
        return next((reason for reason in reasons if reason), None)

    return Condition(" and ".join(condition.words for condition in conditions), unmet)


def _joined(*conditions: Condition | None) -> Condition | None:
    given = [condition for condition in conditions if condition is not None]
    return both(*given) if given else None


def _unless(config: Any, section: str, name: str, holds: Callable[[Any], bool]) -> str | None:
    full = section + name[1:] if name.startswith(".") else name
    value = functools.reduce(getattr, full.split("."), config)
    return None if holds(value) else f"{full} = {shown(value)}"


def _any_of(values: Sequence[Any]) -> str:
    *first, last = map(_plain, values)
    return f"{', '.join(first)} or {last}" if first else last


def _plain(value: Any) -> str:
    if isinstance(value, str | tuple):
        return str(value or "empty")
    return "2^32" if value == 2**32 else f"{value:g}" if isinstance(value, float) else f"{value}"


@functools.cache
def describe(section: Any, prefix: str = "") -> Mapping[str, Description]:
    """Returns the fields of a section and of those in it, by dotted name, in their order.

    Args:
      section: A dataclass whose fields are sections or were made by `field`.
      prefix: What the names start with.
    """
    hints = typing.get_type_hints(section)
    found: dict[str, Description] = {}
    for each in dataclasses.fields(section):
        name, kind = prefix + each.name, hints[each.name]
        is_section = dataclasses.is_dataclass(kind)
        if is_section:
            for inner in describe(kind, f"{name}.").values():
                last = inner.name.rpartition(".")[2]
                used = None if last in each.metadata["but"] else each.metadata["used"]
                found[inner.name] = inner._replace(used=_joined(used, inner.used))
        else:
            found[name] = Description(name, kind, each.default, **each.metadata)
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration as nested dictionaries, tuples kept."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def flatten(config: Any) -> dict[str, Any]:
    """Returns every field by its dotted name."""
    kind: Any = type(config)
    return {name: functools.reduce(getattr, name.split("."), config) for name in describe(kind)}


def with_fields(config: Any, values: Mapping[str, Any]) -> Any:
    """Returns a configuration with other values of some fields, which are not checked.

    Args:
      config: A `settings.Config`, or a section of one.
      values: By the fields' dotted names. They may be traced scalars, where what reads them allows.
    """
    changed: dict[str, Any] = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        if rest:
            value = with_fields(changed.get(first, getattr(config, first)), {rest: value})
        changed[first] = value
    return dataclasses.replace(config, **changed)


def check_value(description: Description, value: Any) -> Any:
    """Checks a value of a field, and returns it in the field's type.

    Raises:
      ConfigError: It is of another type, or not allowed.
    """
    name, kind, allowed = description.name, description.type, description.allowed
    if not isinstance(kind, types.GenericAlias):
        return _checked(name, kind, allowed, value)
    element = typing.get_args(kind)[0]
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} = {shown(value)}: allowed is a sequence of {element.__name__}")
    if allowed.entries is not None and len(value) > allowed.entries:
        raise ConfigError(f"{name}: {len(value)} values: allowed are at most {allowed.entries}")
    return tuple(_checked(f"{name}[{i}]", element, allowed, v) for i, v in enumerate(value))


def _checked(name: str, kind: type, allowed: Allowed, value: Any) -> Any:
    is_bool = isinstance(value, bool | np.bool_)
    if kind is int and isinstance(value, np.integer):
        value = int(value)
    if kind is float and isinstance(value, int | np.integer | np.floating) and not is_bool:
        value = _as_float(value)
    if not isinstance(value, kind) or is_bool != (kind is bool):
        raise ConfigError(f"{name} = {shown(value)}: allowed is a value of type {kind.__name__}")
    if allowed.words:
        if value not in allowed.words:
            raise ConfigError(f"{name} = {shown(value)}: allowed are {', '.join(allowed.words)}")
    elif kind in (int, float):
        _check_number(name, value, allowed)
    return value


def _as_float(value: Any) -> Any:
    try:
        return float(value)
    except OverflowError:
        # Too large an integer; it is refused as such.
        return math.inf if value > 0 else -math.inf


def _check_number(name: str, value: Any, allowed: Allowed) -> None:
    largest = LARGEST_INTEGER if isinstance(value, int) else LARGEST_FLOAT
    low = -largest if allowed.low is None else allowed.low
    # Where a field says what it has to be below, that is its bound.
    high = allowed.high if allowed.high is not None else allowed.below or largest
    if 0 < abs(value) < SMALLEST_FLOAT:
        raise ConfigError(
            f"{name} = {shown(value)}: that is 0 on the device; allowed is 0, or "
            f"{SMALLEST_FLOAT:g} and more"
        )
    # Written so that NaN is refused.
    if low <= value <= high and (allowed.below is None or value < allowed.below):
        return
    words = allowed.described()
    if allowed.low is None or (allowed.high is None and allowed.below is None and value > high):
        words = f"{_plain(low)} to {_plain(high)}"
    raise ConfigError(f"{name} = {shown(value)}: allowed is {words}")


def shown(value: Any) -> str:
    """Returns a value as a refusal shows it: its literal, cut where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_SHOWN:
        # Python writes no integer of more than some thousand digits.
        digits = int(value.bit_length() * math.log10(2)) + 1
        return f"an integer of about {digits} digits"
    text = repr(value)
    return text if len(text) <= _SHOWN * 4 else f"{text[:_SHOWN]}... ({len(text)} characters)"
