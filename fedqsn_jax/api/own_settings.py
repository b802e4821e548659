"""The settings that a user gives with a model of their own, and what is given beside them."""

import dataclasses
import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedqsn_jax.api.heads import Head
from fedqsn_jax.config.schema import Config, ConfigError, check_sections, resolve
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.trees import exact_pattern, leaves_by_path, matches_any
from fedqsn_jax.core.types import Array, Params
from fedqsn_jax.protocol.sites import NEVER_HIDDEN, find_sites, parse_rule

_DATA_FIELDS = {"resident", "held_out_share", "held_out_clients"}


def resolve_own(settings: Mapping[str, Any], population: int, keeps: bool) -> Config:
    """Returns the settings, with defaults that fit so many clients.

    Args:
      settings: What the user gave, sections as dictionaries.
      population: Number of clients.
      keeps: Whether there is a working directory.

    Raises:
      ConfigError: A setting is unknown, out of range or of no use here.
    """
    check_sections(settings)
    data = dict(settings.get("data", {}))
    held_out = data.get("held_out_clients", 0)
    if isinstance(held_out, int) and held_out < population:
        population -= held_out
    for section in ("data", "model", "checkpoint"):
        if section in settings and (section != "data" or set(data) - _DATA_FIELDS):
            if section == "checkpoint" and keeps:
                continue
            why = (
                "without workdir=DIRECTORY"
                if section == "checkpoint"
                else ("here, the model and the arrays are your own")
            )
            raise ConfigError(f"{section}: of no use {why}")
    if settings.get("evaluation", {}).get("fine_tuned_attackers") and not keeps:
        raise ConfigError(
            "evaluation.fine_tuned_attackers: of no use without workdir=DIRECTORY, whose "
            "summary.json tells what came of it"
        )
    cohort = {"size": min(Config().cohort.size, population), **settings.get("cohort", {})}
    attackers = tuple(sorted({min(n, population) for n in Config().evaluation.attackers}))
    evaluation = {"attackers": attackers, **settings.get("evaluation", {})}
    return resolve(
        {
            **settings,
            "cohort": cohort,
            "evaluation": evaluation,
            "data": {"clients": population, **data},
        }
    )


def chosen_names(settings: Mapping[str, Any]) -> set[str]:
    """The dotted names of settings."""
    chosen = set()
    for name, value in settings.items():
        fields = value if isinstance(value, Mapping) else {"": None}
        chosen |= {f"{name}.{field}".rstrip(".") for field in fields}
    return chosen


def check_kinds(task: Any, on_progress: Any, workdir: Any) -> None:
    """Makes sure that what is used late is of a kind that can be used.

    Raises:
      ValueError: It is not.
    """
    if not isinstance(task, Task):
        raise ValueError(
            f"task: of type {type(task).__name__}; allowed is a Task, such as classification(NAME)"
        )
    if on_progress is not None and not callable(on_progress):
        raise ValueError(
            f"on_progress: of type {type(on_progress).__name__}; allowed is a function of the "
            f"number of finished rounds and what was evaluated"
        )
    # An empty path is the current directory, which would be made private.
    if workdir is not None and (not isinstance(workdir, str | Path) or not str(workdir).strip()):
        raise ValueError(f"workdir = {workdir!r}: allowed is the path of a directory, or None")


def with_heads(config: Config, heads: Sequence[Head], params: Params) -> Config:
    """Settings in which the model's heads are named: they are never hidden, whatever rules say.

    Raises:
      ConfigError: No head is known, though columns are hidden or quantized.
    """
    kernels = [head.kernel for head in heads]
    leaves = leaves_by_path(params)
    matrices = {path for path, leaf in leaves.items() if leaf.ndim > 1}
    if kernels and config.algorithm != "fedavg" and matrices <= set(kernels):
        raise ConfigError(
            f"algorithm = {config.algorithm!r}: the model has no layer but the task head "
            f"({', '.join(kernels)}), which is never hidden; allowed is algorithm = 'fedavg', or a "
            f"model with other layers"
        )
    if not heads and not config.site_rules and config.algorithm != "fedavg":
        raise ConfigError(
            "site_rules: no task head was found; name it by a rule such as '=PATH: none', with a "
            f"path of: {', '.join(leaves)}"
        )
    try:
        rules = [(rule, *parse_rule(rule)) for rule in config.site_rules]
    except ValueError as error:
        raise ConfigError(f"site_rules: {error}") from error
    own = []
    for kernel in kernels:
        fitting = [roles for _, pattern, roles in rules if matches_any(kernel, (pattern,))]
        # A head that a rule quantizes and never hides travels so.
        if not fitting or fitting[0][0] not in ("none", "whole"):
            own.append(f"{exact_pattern(kernel)}: none")
    for rule, pattern, roles in rules:
        fits = [path for path in leaves if matches_any(path, (pattern,))]
        if fits and set(fits) <= set(kernels) and roles[0] not in ("none", "whole"):
            warnings.warn(
                f"site_rules: {rule!r} has no effect: {', '.join(fits)} is the task head, which "
                f"is never hidden",
                stacklevel=4,
            )
    if heads and config.algorithm != "fedavg" and config.sites == "all":
        own += _named_like_others(leaves, kernels, [pattern for _, pattern, _ in rules])
        _warn_of_whole(params, kernels, [*own, *config.site_rules])
    tensors = [path for head in heads for path in head if path is not None]
    patterns = [exact_pattern(path) for path in tensors] or ["head"]
    named = [patterns if name == "head" else [name] for name in config.client.trained]
    trained = tuple(itertools.chain(*named))
    client = dataclasses.replace(config.client, trained=trained)
    return dataclasses.replace(config, site_rules=(*own, *config.site_rules), client=client)


def _named_like_others(
    leaves: Mapping[str, Array], heads: Sequence[str], patterns: Sequence[str]
) -> list[str]:
    """Rules for layers that are called as heads and norms often are, and are none."""
    return [
        f"{exact_pattern(path)}: input column"
        for path, leaf in leaves.items()
        if path.rpartition("/")[2] in ("kernel", "w") and leaf.ndim == 2
        if path not in heads and not matches_any(path, patterns)
        if matches_any(path, NEVER_HIDDEN)
    ]


def _warn_of_whole(params: Params, heads: Sequence[str], rules: Sequence[str]) -> None:
    """Tells what is neither hidden nor quantized though nobody said so, embeddings apart."""
    try:
        sites = find_sites(params, rules, needed=False).by_kernel
    except ValueError:
        return  # It is told where the sites are needed.
    decided = [pattern for pattern, _ in map(parse_rule, rules)]
    whole = [
        path
        for path, leaf in leaves_by_path(params).items()
        if leaf.ndim > 1 and path not in sites and path not in heads
        if not path.endswith("embedding") and not matches_any(path, decided)
    ]
    if sites and whole:
        warnings.warn(
            f"site_rules: nothing of {', '.join(whole)} is hidden or quantized, since no rule "
            f"takes it for a layer; such a rule is '{exact_pattern(whole[0])}: "
            f"{'input ' * (leaves_by_path(params)[whole[0]].ndim - 1)}column'",
            stacklevel=5,
        )
