"""The configuration of a run: made, checked, taken apart.

At the edge a configuration is an ml_collections ``ConfigDict`` (see `default_config`), which files
under ``configs/`` fill and flags override. `resolve` turns it at once into the frozen dataclasses
of `settings`; everything inside the package sees only those, by way of this module.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from fedqsn_jax.config.checks import check_together
from fedqsn_jax.config.choices import (
    ALGORITHMS,
    FEDSP,
    LANGUAGE,
    MODELS,
    OPTIMIZERS,
    SERVER_OPTIMIZERS,
    STEMS,
    TEXT,
)
from fedqsn_jax.config.evaluation_settings import (
    CheckpointConfig,
    EvaluationConfig,
    GenerationConfig,
)
from fedqsn_jax.config.fields import (
    ConfigError,
    check_value,
    describe,
    flatten,
    shown,
    to_dict,
    with_fields,
)
from fedqsn_jax.config.problem_settings import (
    DataConfig,
    ModelConfig,
    PretrainingConfig,
    TrainingConfig,
)
from fedqsn_jax.config.settings import (
    BroadcastConfig,
    ClientConfig,
    CohortConfig,
    Config,
    FedSPConfig,
    LoraConfig,
    ParticipationConfig,
    PrivacyConfig,
    ServerConfig,
    UploadConfig,
    chooses_scale,
)

__all__ = [
    "ALGORITHMS",
    "FEDSP",
    "LANGUAGE",
    "MODELS",
    "OPTIMIZERS",
    "SERVER_OPTIMIZERS",
    "STEMS",
    "TEXT",
    "BroadcastConfig",
    "CheckpointConfig",
    "ClientConfig",
    "CohortConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "FedSPConfig",
    "GenerationConfig",
    "LoraConfig",
    "ModelConfig",
    "ParticipationConfig",
    "PretrainingConfig",
    "PrivacyConfig",
    "ServerConfig",
    "TrainingConfig",
    "UploadConfig",
    "as_released",
    "check_sections",
    "chooses_scale",
    "default_config",
    "flatten",
    "resolve",
    "to_dict",
    "unknown_field",
    "with_fields",
]


def default_config() -> ml_collections.ConfigDict:
    """Returns every field with its default, for a file under ``configs/`` to change."""
    return ml_collections.ConfigDict(to_dict(Config()))


def as_released(config: ml_collections.ConfigDict) -> None:
    """Sets the choices in which the code that the paper's authors released differs from ours.

    Masks of a fixed count, a codebook of ``2 ** bits + 1`` levels, blocks that mix columns (they
    let hidden values show), sites on the residual stream where the model has one, 4-bit updates,
    and aggregation onto what was sent.
    """
    config.sampling = "fixed_count"
    config.codebook = config.upload.codebook = "symmetric_normal_float"
    config.blocks = "row"
    config.upload.bits = 4
    config.server.rule = "from_sent"
    if config.model.name == LANGUAGE:
        config.sites = "residual"


def check_sections(values: Mapping[str, Any]) -> None:
    """Checks that sections are given as such, before anything is looked up in them.

    Raises:
      ConfigError: A section is no dictionary.
    """
    for each in dataclasses.fields(Config):
        if each.default is dataclasses.MISSING and each.name in values:
            _check_section(each.name, values[each.name])


def _check_section(name: str, value: Any) -> None:
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise ConfigError(
            f"{name} = {shown(value)}: it is a section; allowed is a dictionary of its fields"
        )


def resolve(values: Mapping[str, Any]) -> Config:
    """Checks nested values and returns them as a `Config`.

    Args:
      values: A ``ConfigDict`` or nested dictionaries. Fields that are missing take their defaults.

    Raises:
      ConfigError: A field is unknown, or its value has the wrong type or is not allowed.
    """
    config = _resolve_section(Config, values, "")
    check_together(config)
    return config


def unknown_field(name: str) -> ConfigError:
    """Returns the error for a dotted field name that does not exist.

    It names the nearest that does; where a section has none that is near, all of the section.
    """
    section, _, own = name.rpartition(".")
    prefix = f"{section}."
    names = [each.removeprefix(prefix) for each in flatten(Config()) if each.startswith(prefix)]
    if section and names and not difflib.get_close_matches(own, names, n=1, cutoff=0.5):
        return ConfigError(f"unknown field {name}; {section} has {', '.join(names)}")
    known = [*flatten(Config()), *(field.name for field in dataclasses.fields(Config))]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    near = near or difflib.get_close_matches(own, [k.rpartition(".")[2] for k in known], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ConfigError(f"unknown field {name}{hint}")


def _resolve_section(section: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(section)
    described = describe(Config)
    resolved = {}
    for name, value in values.items():
        full = f"{prefix}{name}"
        if not isinstance(name, str) or name not in hints:
            raise unknown_field(full)
        if full in described:
            resolved[name] = check_value(described[full], value)
        else:
            _check_section(full, value)
            resolved[name] = _resolve_section(hints[name], value, f"{full}.")
    return section(**resolved)
