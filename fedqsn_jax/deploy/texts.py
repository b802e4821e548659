"""Texts of a party's own, as the plan of a language model has them tokenized."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.data.text.formats import TextFormat
from fedqsn_jax.data.text.loading import TextSettings, load_rows, text_format
from fedqsn_jax.deploy.plan import Plan
from fedqsn_jax.models.language.families import FAMILIES, LanguageConfig
from fedqsn_jax.models.language.hugging_face import Settings
from fedqsn_jax.models.language.t5_config import T5Config
from fedqsn_jax.problems.language import Described, tokenizer_of

_OWN = ("train", "test", "cache")
"""Settings of text that are each party's own."""


def described_in_plan(described: Described, text: TextSettings) -> dict[str, Any]:
    """Returns what a plan says of a language model: public, and without any place on a disk."""
    kept = dataclasses.asdict(text)
    return {
        "family": described.config.family,
        "model": described.config.to_settings(),
        "overrides": described.overrides,
        "text": {name: value for name, value in kept.items() if name not in _OWN},
        "tokenizer": described.tokenizer.digest,
    }


def language_config(plan: Plan) -> LanguageConfig:
    """Returns the architecture that a plan describes.

    Raises:
      ValueError: It is of a family that is not known here.
    """
    told = _language(plan)
    family = told["family"]
    if family not in FAMILIES:
        raise ValueError(f"a language model of family {family!r} is not known here")
    config = FAMILIES[family].from_settings(family, Settings(told["model"], "the plan"))
    return dataclasses.replace(config, **told["overrides"])


def kind_of(plan: Plan) -> TextFormat:
    """Returns how rows become texts and labels."""
    return text_format(_text(plan, ""))


def read_texts(plan: Plan, source: str, tokenizer: str, cache: str = "") -> Mapping[str, Any]:
    """Reads a party's texts and tokenizes them.

    Args:
      plan: The plan of a language model.
      source: As `data.text.sources` takes it.
      tokenizer: The file of the tokenizer, or its directory.
      cache: Where tokenized rows are kept; empty: in the user's cache directory.

    Raises:
      ConfigError: The source or the tokenizer cannot be read, or does not fit the plan.
    """
    if plan.language is None:
        raise ConfigError(f"rows = {source!r}: the plan's model reads no texts")
    if not tokenizer:
        raise ConfigError("tokenizer: texts need one; name the file tokenizer.json of the server's")
    config = language_config(plan)
    found = tokenizer_of(config, user_path(tokenizer))
    if found.digest != plan.language["tokenizer"]:
        raise ConfigError(
            f"{found.file}: it is another tokenizer than the server's; take its tokenizer.json"
        )
    rows, notes = load_rows(
        _text(plan, cache), source, found, encoder_decoder=isinstance(config, T5Config)
    )
    for note in notes:
        print(f"fedqsn_jax: {note}", flush=True)
    return {name: np.asarray(array) for name, array in rows.items()}


def _text(plan: Plan, cache: str) -> TextSettings:
    told: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in _language(plan)["text"].items()
    }
    return TextSettings(**{"train": "", "cache": cache, **told})


def _language(plan: Plan) -> dict[str, Any]:
    if plan.language is None:
        raise ValueError("the plan's model is none of language")
    return plan.language
