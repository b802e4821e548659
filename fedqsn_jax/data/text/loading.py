"""Text data sets: from sources and a tokenizer to the arrays of server, clients and test.

Rows are tokenized once; the arrays are kept on disk under a digest of the files, the columns, the
tokenizer and the lengths, so that the next run starts at once.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.config.schema import ConfigError, DataConfig
from fedqsn_jax.data.population import Splits
from fedqsn_jax.data.splits import CLIENT_COLUMN, Rows, make_splits, take
from fedqsn_jax.data.text.array_cache import cached, default_directory
from fedqsn_jax.data.text.formats import FORMATS, TextFormat, generation_example, own_format
from fedqsn_jax.data.text.packing import PackingOptions, pack
from fedqsn_jax.data.text.prompts import Prompts, make_prompts
from fedqsn_jax.data.text.sources import Row, TextSource, open_source
from fedqsn_jax.data.text.tokenization import TextTokenizer
from fedqsn_jax.host.console import EnduringConsole

OWN = "own"
"""The task whose columns are named by the user."""

# Part of every cache key: to be raised when the same files would give other arrays.
_CACHE_VERSION = 3
_CUT = "rows that were cut"
"""What is kept of the rows on their way: whether each has lost tokens."""


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """Which text, and how it becomes tokens.

    Attributes:
      task: A name in `formats.FORMATS`, or `OWN`.
      train: The source of training rows; see `sources`.
      test: The source of test rows. Empty: the test split of a TFDS source; of a file,
        ``data.test_rows`` of its rows, and for generation as many more as have the last one's
        prompt, so that no prompt is trained on and tested.
      columns: Input columns, where they are not the task's own.
      target: Column of the label or completion, where it is not the task's own.
      labels: Names of the labels; for `OWN` they make it classification.
      template: For `OWN`, the prompt; see `formats.own_format`.
      length: Tokens a row; 0: the task's own.
      target_length: Tokens of an encoder-decoder's completion; 0: as ``length``.
      truncate: Whether longer rows are cut; otherwise they are refused.
      separator: Whether a decoder's prompt ends with the end-of-text token.
      client_column: The column that says whose a row is, if rows have it.
      cache: Directory of the cache; empty: the user's cache directory.
    """

    task: str
    train: str
    test: str = ""
    columns: tuple[str, ...] = ()
    target: str = ""
    labels: tuple[str, ...] = ()
    template: str = ""
    length: int = 0
    target_length: int = 0
    truncate: bool = True
    separator: bool = True
    client_column: str = CLIENT_COLUMN
    cache: str = ""


class TextData(NamedTuple):
    """A text data set, ready.

    Attributes:
      splits: Arrays named as in `packing.pack`; ``num_classes`` is 0 for generation.
      prompts: The distinct prompts of the test rows with all their references; None for
        classification.
      kind: The format.
      notes: What the user should know about how these came to be, a line each.
    """

    splits: Splits
    prompts: Prompts | None
    kind: TextFormat
    notes: tuple[str, ...]


def load(
    settings: TextSettings,
    config: DataConfig,
    tokenizer: TextTokenizer,
    generator: np.random.Generator,
    *,
    encoder_decoder: bool = False,
    new_tokens: int = 64,
    console: Console | None = None,
) -> TextData:
    """Loads text and divides it.

    Args:
      settings: Which text.
      config: How it is divided; ``directory`` is where TFDS data sets lie.
      tokenizer: Fits the model.
      generator: Decides what is random.
      encoder_decoder: Whether prompt and completion go to different halves of the model.
      new_tokens: Tokens that are generated after a test prompt, for which a decoder must have
        positions left.
      console: Where progress is shown if it is a terminal; None: standard error.

    Raises:
      ConfigError: A source is absent, empty or damaged, a row lacks a column or has a value that is
        not allowed (the message names file, line and column), or the lengths do not fit the model.
    """
    kind = text_format(settings)
    options = _options(settings, kind, encoder_decoder)
    _check_lengths(kind, options, tokenizer)
    train_source = open_source(settings.train, config.directory)
    test_source = _test_source(settings, config, kind)
    console = console or EnduringConsole(file=sys.stderr)

    def arrays(source: TextSource) -> Rows:
        return _arrays(source, settings, kind, options, tokenizer, console)

    train = arrays(train_source)
    test_rows: Iterable[Row] | None = None
    if test_source is not None:
        test = arrays(test_source)
        if kind.generates:
            test_rows = test_source.rows()
    else:
        groups = np.arange(len(train["tokens"]))
        if kind.generates:
            every = list(train_source.rows())
            prompts_of_rows = [generation_example(row, kind)[0] for row in every]
            # Not an array of text: each row of one takes the memory of the longest.
            number = {prompt: index for index, prompt in enumerate(sorted(set(prompts_of_rows)))}
            groups = np.asarray([number[prompt] for prompt in prompts_of_rows])
        held_out, rest = _hold_out(groups, config.test_rows, train_source.name, generator)
        if kind.generates:
            test_rows = [every[index] for index in held_out]
        test, train = take(train, held_out), take(train, rest)
    notes: list[str] = []
    if kind.generates:
        train, test, notes = _drop_without_targets(train, test, kind.length)
    notes += _note_on_cuts([train.pop(_CUT), test.pop(_CUT)], options)
    prompts = None
    if test_rows is not None:
        prompts = make_prompts(test_rows, kind, tokenizer, options, new_tokens)
    splits = make_splits(train, test, len(kind.labels), config, generator)
    if CLIENT_COLUMN in train and config.partition != "natural":
        notes.append(
            f"the column {settings.client_column} of {train_source.name} is not used: "
            f"data.partition = {config.partition!r}, and only 'natural' deals rows by it"
        )
    return TextData(splits, prompts, kind, tuple(notes))


def load_rows(
    settings: TextSettings,
    source: str,
    tokenizer: TextTokenizer,
    *,
    directory: str = "",
    encoder_decoder: bool = False,
    console: Console | None = None,
) -> tuple[Rows, list[str]]:
    """Loads the rows of one source as they are.

    Args:
      settings: How text becomes tokens; its sources play no part.
      source: The source.
      tokenizer: Fits the model.
      directory: Where TFDS data sets lie.
      encoder_decoder: As for `load`.
      console: As for `load`.

    Returns:
      Arrays named as in `packing.pack`; and what the user should know, a line each.

    Raises:
      ConfigError: As `load`.
    """
    kind = text_format(settings)
    options = _options(settings, kind, encoder_decoder)
    _check_lengths(kind, options, tokenizer)
    console = console or EnduringConsole(file=sys.stderr)
    opened = open_source(source, directory)
    rows = _arrays(opened, settings, kind, options, tokenizer, console)
    rows.pop(CLIENT_COLUMN, None)
    notes = []
    if kind.generates:
        whole = len(rows["tokens"])
        rows = _with_targets(rows, kind.length)
        dropped = whole - len(rows["tokens"])
        notes = [f"{dropped} of {whole} rows of {source} are left out"] if dropped else []
    return rows, notes + _note_on_cuts([rows.pop(_CUT)], options)


def _options(settings: TextSettings, kind: TextFormat, encoder_decoder: bool) -> PackingOptions:
    return PackingOptions(
        kind.length,
        settings.target_length,
        settings.truncate,
        settings.separator,
        encoder_decoder,
        settings.client_column,
    )


def text_format(settings: TextSettings) -> TextFormat:
    """Returns the task's format with what the settings change of it.

    Raises:
      ConfigError: The task is unknown, or a setting does not suit it.
    """
    if settings.task == OWN:
        return own_format(
            settings.columns, settings.target, settings.length, settings.labels, settings.template
        )
    if settings.task not in FORMATS:
        raise ConfigError(f"data.task = {settings.task!r}: allowed are {', '.join(FORMATS)}, {OWN}")
    kind = FORMATS[settings.task]
    if settings.template:
        raise ConfigError(
            f"data.template = {settings.template!r}: {settings.task} has its own; "
            f"allowed with data.task = {OWN!r}"
        )
    if settings.columns and len(settings.columns) != len(kind.inputs):
        raise ConfigError(
            f"data.columns = {settings.columns!r}: {settings.task} has {len(kind.inputs)} inputs"
        )
    if settings.labels and len(settings.labels) != len(kind.labels):
        raise ConfigError(
            f"data.labels = {settings.labels!r}: {settings.task} has {len(kind.labels)} labels"
        )
    return dataclasses.replace(
        kind,
        inputs=tuple((column,) for column in settings.columns) or kind.inputs,
        target=(settings.target,) if settings.target else kind.target,
        labels=settings.labels or kind.labels,
        length=settings.length or kind.length,
    )


def _note_on_cuts(cut: Sequence[np.ndarray], options: PackingOptions) -> list[str]:
    """How many of the rows that are used have lost tokens, and by which setting."""
    lost, count = sum(int(each.sum()) for each in cut), sum(map(len, cut))
    if not lost:
        return []
    length = f"data.length = {options.length}"
    if options.encoder_decoder:
        target = options.target_length or options.length
        length = f"{length} (prompts) or data.target_length = {target} (completions)"
    return [f"{lost} of the {count} rows that are used lost tokens beyond {length}"]


def _drop_without_targets(train: Rows, test: Rows, length: int) -> tuple[Rows, Rows, list[str]]:
    """Leaves out rows of which nothing is to be predicted, and tells how many."""
    rows = len(train["tokens"]) + len(test["tokens"])
    train, test = _with_targets(train, length), _with_targets(test, length)
    dropped = rows - len(train["tokens"]) - len(test["tokens"])
    if not dropped:
        return train, test, []
    note = (
        f"{dropped} of {rows} rows are left out: their prompts fill data.length = {length} tokens, "
        f"so that nothing is left to be predicted"
    )
    return train, test, [note]


def _with_targets(rows: Rows, length: int) -> Rows:
    """The rows of which at least one token is to be predicted."""
    # Nothing predicts the first token of a decoder's row.
    mask = rows["loss_mask"][:, 1:] if "loss_mask" in rows else rows["target_mask"]
    kept = np.flatnonzero(mask.any(axis=1))
    if not kept.size:
        raise ConfigError(
            f"data.length = {length}: the prompts fill it in every row, so that nothing is left to "
            f"be predicted; allowed is a larger number"
        )
    return rows if len(kept) == len(mask) else take(rows, kept)


def _hold_out(
    groups: np.ndarray, test_rows: int, name: str, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows for testing and the rest, at random, but no group (rows of one prompt) on both sides."""
    rank = generator.permutation(groups.max() + 1)[groups]
    order = np.lexsort((generator.permutation(len(groups)), rank))
    sorted_rank = rank[order]
    # The last group that begins among the test rows belongs to them as a whole.
    count = int(np.searchsorted(sorted_rank, sorted_rank[min(test_rows, len(order)) - 1], "right"))
    if count >= len(order):
        raise ConfigError(
            f"data.test_rows = {test_rows}: allowed is less than the {len(order)} rows of {name}, "
            f"with some left for training"
        )
    return order[:count], order[count:]


def _test_source(settings: TextSettings, config: DataConfig, kind: TextFormat) -> TextSource | None:
    spec = settings.test
    kind_of_source, _, rest = settings.train.partition(":")
    if not spec and kind_of_source in ("tfds", "hf"):
        spec = f"{kind_of_source}:{rest.partition(':')[0]}"
    elif not spec and kind_of_source == "shakespeare":
        spec = "shakespeare:test"
    return open_source(spec, config.directory, kind.test_split) if spec else None


def _check_lengths(kind: TextFormat, options: PackingOptions, tokenizer: TextTokenizer) -> None:
    marks = tokenizer.tokenizer.num_special_tokens_to_add(len(kind.inputs) == 2)
    shortest, longest = marks + 1, tokenizer.max_length
    lengths = {"length": options.length}
    if options.encoder_decoder:
        lengths["target_length"] = options.target_length or options.length
    for name, length in lengths.items():
        if length < shortest or (longest is not None and length > longest):
            upper = f"{longest}, the positions of the model" if longest is not None else "any more"
            raise ConfigError(f"data.{name} = {length}: allowed are {shortest} to {upper}")
    if kind.generates and not tokenizer.ends:
        raise ConfigError(
            f"{tokenizer.file.parent}: the model's config.json names no eos_token_id, without "
            f"which a completion has no end"
        )


def _arrays(
    source: TextSource,
    settings: TextSettings,
    kind: TextFormat,
    options: PackingOptions,
    tokenizer: TextTokenizer,
    console: Console,
) -> Rows:
    """A source's rows as arrays, from the cache if they are there, with whether each was cut."""

    def build() -> Rows:
        rows = list(source.rows())
        columns = (
            TextColumn("tokenizing {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        hidden = not console.is_terminal
        with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
            bar = progress.add_task(source.name, total=len(rows))
            packed = pack(
                rows, kind, tokenizer, options, lambda count: progress.advance(bar, count)
            )
        return packed.arrays | {_CUT: packed.cut}

    directory = user_path(settings.cache) if settings.cache else default_directory()
    key = _key(source, settings, kind, options, tokenizer)
    return dict(cached(directory, key, build))


def _key(
    source: TextSource,
    settings: TextSettings,
    kind: TextFormat,
    options: PackingOptions,
    tokenizer: TextTokenizer,
) -> str:
    """Digest of everything that the arrays depend on."""
    from tokenizers import __version__ as library

    parts = (
        _CACHE_VERSION,
        source.digest(),
        (settings.task, kind.inputs, kind.target, kind.labels, settings.template),
        tuple(options),
        (tokenizer.digest, tokenizer.pad, tokenizer.ends, library),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
