"""Texts, a pre-trained language model and its task, as a configuration names them."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.schema import ConfigError, DataConfig, ModelConfig
from fedqsn_jax.core.keys import fold_in_name, root_key
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.types import Params
from fedqsn_jax.data import registry
from fedqsn_jax.data.text import loading
from fedqsn_jax.data.text.formats import TextFormat
from fedqsn_jax.data.text.loading import TextSettings, text_format
from fedqsn_jax.data.text.prompts import Prompts
from fedqsn_jax.data.text.tokenization import TextTokenizer, load_tokenizer
from fedqsn_jax.generation.beam_search import GenerationSettings, make_generator
from fedqsn_jax.generation.language_tasks import conditional_generation, sequence_classification
from fedqsn_jax.generation.text_evaluation import make_text_evaluator
from fedqsn_jax.models.kernels import gpu_blocks
from fedqsn_jax.models.language.encoder_config import EncoderConfig
from fedqsn_jax.models.language.families import (
    FAMILIES,
    LanguageConfig,
    LanguageModel,
    make_language_model,
)
from fedqsn_jax.models.language.pretrained import (
    Pretrained,
    description_files,
    directory_of,
    load_pretrained,
    read_config,
)
from fedqsn_jax.models.language.t5_config import T5Config
from fedqsn_jax.models.language.transformer import Execution
from fedqsn_jax.problems.problem import Problem, ProblemSettings, Texts
from fedqsn_jax.problems.prompted import prompted_problem


class Described(NamedTuple):
    """A model whose description and tokenizer were read, but not its weights.

    Attributes:
      directory: Where it lies.
      config: Its architecture, with what the run chooses otherwise.
      overrides: What the run chooses otherwise.
      kind: How rows become texts and labels.
      tokenizer: Its tokenizer.
    """

    directory: Path
    config: LanguageConfig
    overrides: dict[str, Any]
    kind: TextFormat
    tokenizer: TextTokenizer


class Loaded(NamedTuple):
    """A model that was read.

    Attributes:
      pretrained: Its architecture and parameters.
      clients: As clients train it, and as it is evaluated.
      server: As the server trains it.
      task: What it is for.
      notes: What the user should know, a line each.
    """

    pretrained: Pretrained
    clients: LanguageModel
    server: LanguageModel
    task: Task
    notes: list[str]


def describe_language(settings: ProblemSettings) -> Described:
    """Reads a model's description and its tokenizer.

    Raises:
      ConfigError: One of them is absent or damaged, or they do not fit the task.
    """
    kind = text_format(text_settings(settings.data))
    directory = directory_of(settings.model.pretrained)
    _check_fit(settings, read_config(directory), kind)
    overrides = _overrides(settings, kind)
    config = read_config(directory, **overrides)
    return Described(directory, config, overrides, kind, tokenizer_of(config, directory))


def tokenizer_of(config: LanguageConfig, place: Path) -> TextTokenizer:
    """Reads the tokenizer of a model of a configuration.

    Args:
      config: The model's.
      place: Where ``tokenizer.json`` lies, or that file.
    """
    return load_tokenizer(
        place,
        config.vocab_size,
        config.max_length,
        config.pad_token_id,
        () if isinstance(config, EncoderConfig) else config.eos_token_ids,
    )


def execution_of(model: ModelConfig, compute_dtype: str) -> Execution:
    """Returns how a run computes language models."""
    return Execution(compute_dtype, model.attention, model.unroll, model.remat)


def read_language(settings: ProblemSettings, described: Described) -> Loaded:
    """Reads a model's weights; what they lack is drawn."""
    directory = described.directory
    key = fold_in_name(root_key(settings.seed), "model")
    pretrained = load_pretrained(directory, key, **described.overrides)
    execution = execution_of(settings.model, settings.compute_dtype)
    notes = [*gpu_blocks.missing_note()]
    if pretrained.fresh:
        notes.append(f"drawn at random, {directory} has none: {', '.join(pretrained.fresh)}")
    notes += _label_notes(pretrained.config, pretrained.fresh, described.kind)
    return Loaded(
        pretrained,
        make_language_model(pretrained.config, execution, settings.client_dropout),
        make_language_model(pretrained.config, execution, settings.server_dropout),
        language_task(described.kind, pretrained.config, settings.label_smoothing),
        notes,
    )


def load_language_problem(settings: ProblemSettings) -> Problem:
    """Reads texts, tokenizer and model.

    Clients, the server and the evaluation compute in the compute dtype; norms, softmax and
    logits stay float32.

    Raises:
      ConfigError: One of them is absent or damaged, or they do not fit each other.
    """
    described = describe_language(settings)
    tokenizer = described.tokenizer
    data = loading.load(
        text_settings(settings.data),
        settings.data,
        tokenizer,
        registry.generator(settings.seed),
        encoder_decoder=isinstance(described.config, T5Config),
        new_tokens=settings.generation.new_tokens,
    )
    pretrained, clients, server, task, more = read_language(settings, described)
    notes = [*([tokenizer.note] if tokenizer.note else []), *data.notes, *more]
    params = _stored(pretrained.params, settings.model.dtype)
    files = description_files(described.directory)
    if not _is_exact(pretrained.params, settings.model.dtype):
        notes.append(
            f"model.dtype = {settings.model.dtype!r} rounds the model: its files hold more digits"
        )
    if isinstance(pretrained.config, EncoderConfig) and settings.prompted is not None:
        problem = prompted_problem(
            settings,
            settings.prompted,
            data.splits,
            pretrained.config,
            params,
            execution_of(settings.model, settings.compute_dtype),
            task,
            tuple(notes),
        )
        return problem._replace(files=files)
    return Problem(
        splits=data.splits,
        params=params,
        apply_fn=clients.apply_fn,
        pretraining_apply=server.trained_fn,
        client_apply=clients.trained_fn,
        task=task,
        texts=_texts(settings, clients, tokenizer, data.prompts),
        notes=tuple(notes),
        files=files,
    )


def _stored(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def _is_exact(params: Params, dtype: str) -> bool:
    """Whether a dtype holds all values of float32 NumPy arrays; looked at piece by piece."""
    if dtype == "float32":
        return True
    pieces = (piece for leaf in jax.tree.leaves(params) for piece in np.atleast_1d(leaf))
    return all(np.array_equal(piece.astype(dtype).astype(np.float32), piece) for piece in pieces)


def text_settings(data: DataConfig) -> TextSettings:
    """Returns those of the data's settings that are about text."""
    names = [field.name for field in dataclasses.fields(TextSettings)]
    return TextSettings(**{name: getattr(data, name) for name in names})


def _overrides(settings: ProblemSettings, kind: TextFormat) -> dict[str, Any]:
    """What a run chooses otherwise than a classifier's config.json says."""
    if kind.generates:
        return {}
    pooling = settings.model.pooling
    return {"classes": len(kind.labels)} | ({} if pooling == "auto" else {"pooling": pooling})


def _families(classify: bool) -> str:
    """The families of models that classify, or of those that write."""
    return ", ".join(
        sorted(
            name for name, kind in FAMILIES.items() if issubclass(kind, EncoderConfig) == classify
        )
    )


def _check_fit(settings: ProblemSettings, model: LanguageConfig, kind: TextFormat) -> None:
    source, task = settings.model.pretrained, settings.data.task
    if kind.generates and isinstance(model, EncoderConfig):
        raise ConfigError(
            f"data.task = {task!r} is to write texts; model.pretrained = {source!r} is a "
            f"{model.family}, which cannot; allowed are {_families(False)}"
        )
    if not kind.generates and not isinstance(model, EncoderConfig):
        raise ConfigError(
            f"data.task = {task!r} is classification; model.pretrained = {source!r} is a "
            f"{model.family}, which has no classifier; allowed are {_families(True)}"
        )
    if settings.prompted is not None and not isinstance(model, EncoderConfig):
        raise ConfigError(
            f"algorithm = 'fedsp' with model.pretrained = {source!r}: it is a {model.family}; "
            f"allowed are {_families(True)}"
        )
    if settings.label_smoothing and not kind.generates:
        raise ConfigError(
            f"client.label_smoothing = {settings.label_smoothing}: data.task = {task!r} is "
            f"classification, only completions are smoothed; allowed is 0"
        )
    if settings.generation.prompts and not kind.generates:
        raise ConfigError(
            f"generation.prompts = {settings.generation.prompts}: data.task = {task!r} is "
            f"classification, no text is written; allowed is 0"
        )


def _label_notes(model: LanguageConfig, fresh: tuple[str, ...], kind: TextFormat) -> list[str]:
    """A line where a head that is read names its classes otherwise than the task does."""
    named = model.labels if isinstance(model, EncoderConfig) and not fresh else ()
    if not named or named == kind.labels:
        return []
    return [
        f"the model's head is of {', '.join(named)}, and the task's labels are "
        f"{', '.join(kind.labels)}: they are matched by their order"
    ]


def language_task(kind: TextFormat, model: LanguageConfig, label_smoothing: float) -> Task:
    """Returns what a model of texts of a format is for."""
    if not kind.generates:
        return sequence_classification(kind.f1)
    return conditional_generation(label_smoothing, isinstance(model, T5Config))


def _texts(
    settings: ProblemSettings,
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompts: Prompts | None,
) -> Texts | None:
    generation = settings.generation
    if prompts is None or model.decoder is None or not generation.prompts:
        return None
    some = first_prompts(prompts, generation.prompts)
    generate = make_generator(
        model.decoder,
        GenerationSettings(
            generation.new_tokens,
            generation.beams,
            generation.no_repeat_ngram,
            generation.length_penalty,
        ),
        tokenizer.ends,
        tokenizer.pad,
        prompt_ngrams=not isinstance(model.config, T5Config),
    )
    return Texts(
        some,
        lambda on_prompts: make_text_evaluator(
            generate, tokenizer, some, generation.batch_size, on_prompts
        ),
    )


def first_prompts(prompts: Prompts, count: int) -> Prompts:
    """Returns the first prompts, as long as the longest of them."""
    length = int(np.max(prompts.mask[:count].sum(axis=1)))
    return Prompts(
        prompts.tokens[:count, :length],
        prompts.mask[:count, :length],
        prompts.texts[:count],
        prompts.references[:count],
    )
