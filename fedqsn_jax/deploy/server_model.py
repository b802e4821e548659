"""The server's model and rows, as its configuration names them: of images, or of language."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.choices import LANGUAGE
from fedqsn_jax.config.schema import Config, ConfigError
from fedqsn_jax.core.keys import fold_in_name, root_key
from fedqsn_jax.core.tasks import Task, classification
from fedqsn_jax.core.types import ApplyFn, Batch, Params
from fedqsn_jax.deploy.rows import TEXT_KINDS, is_text, read_rows
from fedqsn_jax.models.functional import linen_apply, linen_init
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.problems.problem import problem_settings


class ServerModel(NamedTuple):
    """What a server's model is made of.

    Attributes:
      apply_fn: The model as it is evaluated.
      pretraining_apply: As the server trains it.
      client_apply: As clients train it; None: ``apply_fn`` in their compute dtype.
      task: What it is for.
      params: Its parameters before the server has trained it.
      language: What a plan says of a language model, or None.
      notes: What the user should know, a line each.
    """

    apply_fn: ApplyFn
    pretraining_apply: ApplyFn
    client_apply: ApplyFn | None
    task: Task
    params: Params
    language: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


class ServerRows(NamedTuple):
    """A server's own rows.

    Attributes:
      rows: Named arrays ``[rows, ...]``.
      classes: Number of the labels that there may be; 0: rows have none.
    """

    rows: Mapping[str, np.ndarray]
    classes: int


def server_model(config: Config, classes: int, test: Batch) -> ServerModel:
    """Makes the server's model.

    Args:
      config: The settings.
      classes: Number of labels.
      test: Rows, of which the shapes matter.

    Raises:
      ConfigError: A language model cannot be read, or does not fit.
    """
    if config.model.name == LANGUAGE:
        return _language(config)
    example = {name: rows[:1] for name, rows in test.items()}
    module = make_model(config.model, classes, config.client.dropout)
    params = linen_init(module, fold_in_name(root_key(config.seed), "model"), example)
    pretraining = make_model(config.model, classes, config.pretraining.dropout)
    return ServerModel(
        linen_apply(module), linen_apply(pretraining), None, classification(), params
    )


def _language(config: Config) -> ServerModel:
    # Only here: images do without what texts need, which takes a second to import.
    from fedqsn_jax.deploy.texts import described_in_plan
    from fedqsn_jax.problems.language import describe_language, read_language, text_settings

    settings = problem_settings(config)
    described = describe_language(settings)
    loaded = read_language(settings, described)
    return ServerModel(
        apply_fn=loaded.clients.apply_fn,
        pretraining_apply=loaded.server.apply_fn,
        client_apply=loaded.clients.apply_fn,
        task=loaded.task,
        params=jax.tree.map(jnp.asarray, loaded.pretrained.params),
        language=described_in_plan(described, text_settings(config.data)),
        notes=tuple(loaded.notes),
    )


def tokenizer_file(config: Config) -> Path | None:
    """Returns the file that clients with texts need too, or None where there are no texts."""
    if config.model.name != LANGUAGE:
        return None
    from fedqsn_jax.problems.language import describe_language

    return describe_language(problem_settings(config)).tokenizer.file


def server_rows(config: Config, source: str, option: str) -> ServerRows:
    """Reads rows of the server's own.

    Args:
      config: The settings, which say how texts are tokenized.
      source: As `rows.read_rows` or `data.text.sources` take it.
      option: Where the user has named it, for messages.

    Raises:
      UserError: They cannot be read, or do not fit the model.
    """
    if config.model.name == LANGUAGE:
        return _texts(config, source, option)
    if is_text(source):
        raise ConfigError(
            f"{option}={source}: model.name = {config.model.name!r} reads no texts; allowed are "
            f"npz:FILE and python:FILE.py:FUNCTION"
        )
    rows = read_rows(source, option)
    label = rows.get("label")
    if label is None or label.ndim != 1 or label.dtype.kind not in "iu" or not label.size:
        raise ConfigError(
            f"{option}={source}: 'label' has to be there, one whole number a row; it has "
            f"{', '.join(sorted(rows)) or 'no arrays'}"
        )
    lengths = {array.shape[:1] for array in rows.values()}
    if len(lengths) > 1:
        raise ConfigError(f"{option}={source}: its arrays have different numbers of rows")
    return ServerRows(rows, 1 + int(label.max()))


def _texts(config: Config, source: str, option: str) -> ServerRows:
    from fedqsn_jax.data.text.loading import load_rows
    from fedqsn_jax.models.language.t5_config import T5Config
    from fedqsn_jax.problems.language import describe_language, text_settings

    if not is_text(source):
        allowed = ", ".join(f"{name}:..." for name in TEXT_KINDS)
        raise ConfigError(f"{option}={source}: a language model reads texts; allowed are {allowed}")
    described = describe_language(problem_settings(config))
    rows, _ = load_rows(
        text_settings(config.data),
        source,
        described.tokenizer,
        directory=config.data.directory,
        encoder_decoder=isinstance(described.config, T5Config),
    )
    return ServerRows(rows, len(described.kind.labels))
