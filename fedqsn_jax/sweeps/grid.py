"""The points of a sweep: from a grid over fields of a configuration to checked configurations.

A sweep's file defines ``get_sweep()``, which returns a grid or a list of grids. A grid is a
dictionary from dotted fields to lists of values, and means all their combinations; several grids
are put one after the other.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedqsn_jax.config.command_line import find_file, literal, load_function, one_line
from fedqsn_jax.config.schema import (
    Config,
    ConfigError,
    flatten,
    resolve,
    to_dict,
    unknown_field,
    with_fields,
)
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.simulation.compose import TRACEABLE
from fedqsn_jax.simulation.unused_settings import as_used, unused_fields, without_effect
from fedqsn_jax.sweeps.warnings import warnings_before_sweep

Grid = dict[str, list[Any]]
"""Dotted fields, and the values that each takes."""

SEED = "seed"
ARGUMENTS = (*TRACEABLE, SEED)
"""Fields that a compiled program takes as arguments; others are built into it."""

_WITHOUT_MASKS = {"fedavg": "fedsn", "fedq": "fedqsn"}
"""Algorithms that are another one with both probabilities zero, and so share its program."""


class Point(NamedTuple):
    """One configuration of a sweep.

    Attributes:
      settings: The values of the fields that the sweep varies, in its order, without the seed; None
        where the point does not use the field.
      config: The configuration that is run: the one that the sweep means, or one that does the
        same in a program that more points share.
    """

    settings: dict[str, Any]
    config: Config


class Plan(NamedTuple):
    """What a sweep is to run.

    Attributes:
      base: The configuration that the grids change.
      grids: The grids.
      points: Their points, without those that would repeat others.
      repeated: How many were left out: they differ from others in nothing that is used.
      idle: Fields whose values in ``base`` make no difference to any point.
      warnings: What the user should be told before anything runs, a line each.
      audit: The settings of the audit of every point; None: points are not audited.
    """

    base: Config
    grids: list[Grid]
    points: list[Point]
    repeated: int
    idle: frozenset[str]
    warnings: list[str]
    audit: dict[str, Any] | None = None

    @property
    def varied(self) -> list[str]:
        """The fields of which there are several values, without the seed."""
        return list(self.points[0].settings)


def read_grids(name: str | None, overrides: Sequence[str]) -> list[Grid]:
    """Reads a sweep's file and applies overrides.

    Args:
      name: Its path. A path under ``configs/`` that does not exist means the package's own copy.
      overrides: Arguments of the form ``--sweep.FIELD=VALUES``: a list of values, or one value,
        which the field takes in all grids instead of its own.

    Raises:
      ConfigError: Anything that is wrong with either.
    """
    if not name:
        raise ConfigError(
            "no --sweep: name a file, for example --sweep=configs/sweeps/privacy_utility.py"
        )
    option = f"--sweep={name}"
    get_sweep = load_function(find_file(name, option), "get_sweep", option)
    try:
        grids = get_sweep()
    except Exception as error:
        raise ConfigError(f"{option}: {one_line(error)}") from error
    grids = [grids] if isinstance(grids, Mapping) else grids
    if not isinstance(grids, list | tuple) or not grids:
        raise ConfigError(f"{option}: get_sweep returned no grid, a dictionary of fields and lists")
    changes = dict(map(_read_override, overrides))
    return [_check_grid(grid, changes, option) for grid in grids]


def _read_override(text: str) -> tuple[str, list[Any]]:
    option, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"{text}: a value is missing; write {text}=VALUE or {text}=[VALUE, ...]")
    name = option.removeprefix("--sweep.")
    if name not in flatten(Config()):
        raise unknown_field(name)
    values = literal(value)
    return name, list(values) if isinstance(values, list) else [values]


def _check_grid(grid: Any, changes: Grid, option: str) -> Grid:
    if not isinstance(grid, Mapping):
        raise ConfigError(f"{option}: {grid!r} is no grid, a dictionary of fields and lists")
    defaults = flatten(Config())
    checked: Grid = {}
    for name, values in {**grid, **changes}.items():
        if name not in defaults:
            error = unknown_field(str(name))
            raise ConfigError(f"{option}: {error}")
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(
                f"{option}: {name} = {values!r}: allowed is a list of at least one value"
            )
        checked[name] = list(values)
    return checked


def make_plan(base: Config, grids: list[Grid], overridden: Sequence[str] = ()) -> Plan:
    """Makes a sweep's points and checks them.

    Args:
      base: The configuration that the grids change.
      grids: What `read_grids` returned.
      overridden: Fields that the user set by ``--config.FIELD``; no grid may set them again.

    Raises:
      ConfigError: A point is not possible; nothing was run.
    """
    for name in overridden:
        if any(name in grid for grid in grids):
            raise ConfigError(
                f"--config.{name}: the sweep sets it; use --sweep.{name}=VALUE instead"
            )
    values = to_dict(base)
    configs = [
        (grid, _resolve_point(values, dict(zip(grid, combination, strict=True))))
        for grid in grids
        for combination in itertools.product(*grid.values())
    ]
    used = [as_used(config) for _, config in configs]
    different = list(dict.fromkeys(used))
    flat = [flatten(config) for config in different]
    mentioned = {name for grid in grids for name in grid} - {SEED}
    varied = [
        name for name in flat[0] if name in mentioned and len({one[name] for one in flat}) > 1
    ]
    points = []
    for config, fields in zip(different, flat, strict=True):
        unused = unused_fields(config)
        settings = {name: None if name in unused else fields[name] for name in varied}
        points.append(Point(settings, _as_run(config)))
    idle = set.intersection(*(without_effect(config) | set(grid) for grid, config in configs))
    # Points are not saved while they run.
    idle |= {name for name in flatten(base) if name.startswith("checkpoint.")}
    # What a grid sets for some of its methods is meant for these; what serves none is a mistake.
    useless = set.intersection(*(without_effect(config) for _, config in configs))
    places = {config: place for place, config in enumerate(different)}
    told = warnings_before_sweep(
        ((config, places[key]) for (_, config), key in zip(configs, used, strict=True)),
        [label_of(point) for point in points],
        {*overridden, *(mentioned & useless)},
    )
    return Plan(base, grids, points, len(configs) - len(points), frozenset(idle), told)


def label_of(point: Point) -> dict[str, Any]:
    """Returns what tells a point from the others of its sweep: its settings and its seed."""
    return {**point.settings, SEED: point.config.seed}


def _resolve_point(values: dict[str, Any], changes: dict[str, Any]) -> Config:
    nested = {name: dict(each) if isinstance(each, dict) else each for name, each in values.items()}
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        (nested[section] if section else nested)[field] = value
    try:
        config = resolve(nested)
        if config.rounds < 1:
            raise ConfigError(f"rounds = {config.rounds}: in a sweep allowed is 1 or more")
        if config.evaluation.fine_tuned_attackers:
            raise ConfigError(
                f"evaluation.fine_tuned_attackers = {config.evaluation.fine_tuned_attackers}: in a "
                f"sweep allowed is 0; with --audit thieves train at every point"
            )
    except UserError as error:
        raise ConfigError(f"{error} (at the sweep's point {described(changes)})") from error
    return config


def _as_run(config: Config) -> Config:
    algorithm = _WITHOUT_MASKS.get(config.algorithm, config.algorithm)
    return with_fields(config, {"algorithm": algorithm})


def described(settings: Mapping[str, Any]) -> str:
    """Returns settings as a line, for example ``algorithm=fedqsn p1=0.2``."""
    return " ".join(f"{name}={value}" for name, value in settings.items() if value is not None)


def program_of(config: Config) -> Config:
    """Returns what a point's compiled program depends on: equal for points that can share it."""
    return with_fields(config, dict.fromkeys(ARGUMENTS, 0))


def arguments_of(config: Config) -> dict[str, float]:
    """Returns the values of the fields that a compiled program takes as arguments, but the seed."""
    fields = flatten(config)
    return {name: fields[name] for name in TRACEABLE}
