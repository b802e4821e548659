"""Language models from directories and hub names as the transformers library writes them, and back.

``config.json`` is obeyed, and every tensor is accounted for: one that is missing, unexpected or of
another shape is an error that names it.
"""

import dataclasses
import fnmatch
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.core.types import Key, Params
from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.models.language.encoder_config import EncoderConfig
from fedqsn_jax.models.language.families import FAMILIES, LanguageConfig, make_language_model
from fedqsn_jax.models.language.hugging_face import PretrainedError, Settings, Tensor
from fedqsn_jax.models.language.weight_files import (
    INDEX,
    WEIGHTS,
    Weights,
    open_weights,
    read_json,
    safetensors_numpy,
)

_CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "generation_config.json",
)
"""What an export has beside the model, where it exists; only the first is read here."""

_OUTPUT_LAYER = "lm_head.weight"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Pretrained(NamedTuple):
    """A model that was read.

    Attributes:
      config: Its architecture.
      params: Its parameters, float32 NumPy arrays in nested dictionaries.
      fresh: Paths of tensors that no file held and that were drawn at random: parts of a
        classification head.
    """

    config: LanguageConfig
    params: Params
    fresh: tuple[str, ...]


def directory_of(source: str | Path) -> Path:
    """Returns a model's directory, having downloaded it where the source is a hub name.

    Args:
      source: A directory, or a name on the Hugging Face hub.

    Raises:
      PretrainedError: There is no such directory, and the name cannot be downloaded.
    """
    if user_path(source).is_dir():
        return user_path(source)
    if not _HUB_NAME.fullmatch(str(source)):
        raise PretrainedError(f"model {source}: no such directory")
    absent = f"model {source}: no such directory in {Path.cwd()}"
    advice = (
        f"pass a directory with {_CONFIG}, {WEIGHTS} and {TOKENIZER_FILES[0]} by "
        f"--config.model.pretrained=DIR"
    )
    try:
        import huggingface_hub
    except ImportError as error:
        raise PretrainedError(
            f"{absent}, and to download the hub name {source!r} huggingface_hub must be "
            f"installed; or {advice}"
        ) from error
    try:
        # Other formats of the same weights lie beside these, and others' exports in folders.
        files = huggingface_hub.snapshot_download(
            str(source),
            allow_patterns=[_CONFIG, "*.safetensors", INDEX, *TOKENIZER_FILES],
            ignore_patterns=["*/*"],
        )
        return Path(files)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PretrainedError(
            f"{absent}, and the hub name {source!r} cannot be downloaded ({reason[0]}); {advice}"
        ) from error


def description_files(directory: Path) -> tuple[Path, ...]:
    """Returns those of a model's files that an export needs beside weights; the last is its config.

    Args:
      directory: The model's directory.
    """
    beside = (directory / name for name in TOKENIZER_FILES)
    return (*(file for file in beside if file.is_file()), directory / _CONFIG)


def read_config(source: str | Path, **overrides: Any) -> LanguageConfig:
    """Reads a model's config.json.

    Args:
      source: A directory, or a name on the Hugging Face hub.
      **overrides: Fields of the family's configuration that replace what the file says.

    Raises:
      PretrainedError: The file is missing or says what no family here knows.
    """
    file = directory_of(source) / _CONFIG
    values = read_json(file)
    family = values.get("model_type")
    if family not in FAMILIES:
        raise PretrainedError(
            f"{file}: model_type = {family!r}: allowed are {', '.join(sorted(FAMILIES))}"
        )
    if values.get("quantization_config") is not None:
        raise PretrainedError(
            f"{file}: quantization_config is set: quantized weights are not read; pass the model's "
            f"float16, bfloat16 or float32 files"
        )
    try:
        config = FAMILIES[family].from_settings(family, Settings(values, str(file)))
        return dataclasses.replace(config, **overrides)
    except PretrainedError:
        raise
    except (ValueError, TypeError) as error:
        raise PretrainedError(f"{file}: {error}") from error


def load_pretrained(source: str | Path, key: Key, **overrides: Any) -> Pretrained:
    """Reads a model.

    Args:
      source: A directory, or a name on the Hugging Face hub.
      key: For a classification head that the files lack.
      **overrides: Fields of the family's configuration, for example ``classes=3``.

    Raises:
      PretrainedError: The model cannot be had, or a tensor is missing, unexpected or misshapen.
    """
    directory = directory_of(source)
    config = read_config(directory, **overrides)
    with open_weights(directory) as files:
        # Files of a model without a head leave the first part of the names out.
        whole = any(name.startswith(config.prefix) for name in files)
        prefix = "" if whole else config.prefix
        config = _untied_where_they_differ(config, files, prefix)
        shapes = _shapes(config)
        flat, fresh, used = {}, [], set()
        absent = _drawn_paths(config, files, prefix)
        for tensor in config.tensors():
            names = _names(tensor, shapes[tensor.path], prefix)
            if tensor.path in absent:
                flat[tensor.path] = _draw(key, tensor.path, shapes[tensor.path], config)
                fresh.append(tensor.path)
            else:
                used.update(names)
                _check_classes(config, files, tensor, names)
                flat[tensor.path] = _read(files, tensor, names, shapes[tensor.path])
        _check_unread(config, files, used, prefix)
    if isinstance(config, EncoderConfig):
        config = dataclasses.replace(config, own_head=True)
    return Pretrained(config, nested(flat), tuple(fresh))


def _drawn_paths(config: LanguageConfig, files: Weights, prefix: str) -> set[str]:
    """Paths of a new classification head's tensors: those that the files do not hold."""

    def held(tensor: Tensor) -> bool:
        return all(name in files for name in _names(tensor, (), prefix))

    drawn = {tensor.path: held(tensor) for tensor in config.tensors() if tensor.drawn}
    if isinstance(config, EncoderConfig) and not (config.own_head and all(drawn.values())):
        # An output layer means nothing behind another dense layer than its own.
        drawn |= {path: False for path in drawn if path.startswith("classifier/out")}
    return {path for path, is_held in drawn.items() if not is_held}


def _check_classes(
    config: LanguageConfig, files: Weights, tensor: Tensor, names: list[str]
) -> None:
    """Says of which classes a head is, where it is not of the wanted ones."""
    if not isinstance(config, EncoderConfig) or tensor.path != "classifier/out/kernel":
        return
    place = files[names[0]]
    shape = place.shape()
    if len(shape) == 2 and shape[1] == config.width and shape[0] != config.classes:
        raise PretrainedError(
            f"{place.path}: {place.name} is a head of {shape[0]} classes, but the task has "
            f"{config.classes}: take data with {shape[0]} labels, or the model that this one was "
            f"fine-tuned from, whose head is drawn anew"
        )


def _check_unread(config: LanguageConfig, files: Weights, used: set[str], prefix: str) -> None:
    """Makes sure that what is not read is known, and holds what is assumed of it."""
    for name in sorted(files):
        if name in used:
            continue
        place, bare = files[name], name.removeprefix(config.prefix)
        known = [one for one in config.ignored if fnmatch.fnmatchcase(bare, one.pattern)]
        if not known:
            raise PretrainedError(
                f"{place.path}: tensor {place.name} is unexpected in a {config.family} of "
                f"{_CONFIG}'s sizes"
            )
        unread = known[0]
        if unread.copy_of:
            original = unread.copy_of if prefix else config.prefix + unread.copy_of
            holds = np.array_equal(place.tensor(), files[original].tensor())
        else:
            holds = unread.holds is None or unread.holds(place.tensor())
        if not holds:
            raise PretrainedError(
                f"{place.path}: tensor {place.name} is not {unread.expected}, which a "
                f"{config.family} here computes with"
            )


def save_pretrained(directory: str | Path, config: LanguageConfig, params: Params) -> None:
    """Writes a model so that the transformers library and `load_pretrained` read it.

    Args:
      directory: Where ``config.json`` and ``model.safetensors`` are written; it is created so that
        only the user may read it.
      config: The architecture.
      params: The parameters.

    Raises:
      PretrainedError: The parameters are not of this architecture, or the file system refuses.
    """
    save_file = safetensors_numpy().save_file
    directory = user_path(directory)
    leaves, shapes = leaves_by_path(params), _shapes(config)
    for path in sorted({*leaves, *shapes}):
        have = tuple(leaves[path].shape) if path in leaves else None
        if have != shapes.get(path):
            raise PretrainedError(
                f"{directory}: {path} has shape {have}, but a {config.family} of this "
                f"configuration has {shapes.get(path)} there"
            )
    written: dict[str, list[np.ndarray]] = {}
    axes: dict[str, int] = {}
    for tensor in config.tensors():
        ours = np.asarray(leaves[tensor.path])
        names = _names(tensor, ours.shape, "")
        for name, layer in zip(names, ours if tensor.stacked else [ours], strict=True):
            parts = written.setdefault(name, [np.empty(0)] * len(tensor.parts))
            parts[tensor.part] = tensor.written(layer)
            axes[name] = tensor.output_axis
    arrays = {
        # The library writes memory as it lies: transposed views would come out wrong.
        name: np.ascontiguousarray(np.concatenate(parts, axis=axes[name]))
        for name, parts in written.items()
    }
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS) as temporary:
            save_file(arrays, temporary, metadata={"format": "pt"})
        with replacing(directory / _CONFIG) as temporary:
            temporary.write_text(json.dumps(config.to_settings(), indent=2) + "\n")
    except OSError as error:
        raise PretrainedError(f"{directory}: {error.strerror}") from error


def nested(flat: Mapping[str, np.ndarray]) -> Params:
    """Returns nested dictionaries of tensors that are named by their paths."""
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree


def _names(tensor: Tensor, shape: tuple[int, ...], prefix: str) -> list[str]:
    """The names there, one a layer."""
    name = tensor.name.removeprefix(prefix) if prefix else tensor.name
    if not tensor.stacked:
        return [name]
    return [name.replace("{}", str(layer)) for layer in range(shape[0])]


def _read(files: Weights, tensor: Tensor, names: list[str], shape: tuple[int, ...]) -> np.ndarray:
    """One tensor of ours, float32."""
    layer_shape = shape[1:] if tensor.stacked else shape
    expected = tensor.there(layer_shape)
    result = np.empty((len(names), *layer_shape), np.float32)
    for layer, name in enumerate(names):
        if name not in files:
            first = next(iter(files.values()), None)
            folder = first.path.parent if first else "the model"
            raise PretrainedError(f"{folder}: tensor {name} is missing")
        place = files[name]
        array = place.tensor()
        if array.shape != expected or not jnp.issubdtype(array.dtype, jnp.floating):
            raise PretrainedError(
                f"{place.path}: tensor {place.name} is {array.dtype}{list(array.shape)}, but "
                f"{_CONFIG} says {list(expected)} of floating-point numbers"
            )
        with np.errstate(over="ignore"):  # It is found below.
            result[layer] = tensor.read(array.astype(np.float32), layer_shape)
        if not np.isfinite(result[layer]).all():
            raise PretrainedError(
                f"{place.path}: tensor {place.name} has values that are NaN or infinite in float32"
            )
    return result if tensor.stacked else result[0]


def _untied_where_they_differ(
    config: LanguageConfig, files: Weights, prefix: str
) -> LanguageConfig:
    """Keeps an output layer that is not the embedding which the configuration says it is.

    The transformers library decides so too, and writes T5 1.1 down in this way.
    """
    if isinstance(config, EncoderConfig) or not config.tied or _OUTPUT_LAYER not in files:
        return config
    table = next(tensor for tensor in config.tensors() if tensor.path.startswith("token_embed"))
    name = _names(table, (), prefix)[0]
    if name not in files:
        return config
    head, embedding = (files[n].tensor() for n in (_OUTPUT_LAYER, name))
    if np.array_equal(head, embedding):
        return config
    return dataclasses.replace(config, tied=False)


@functools.cache
def _shapes(config: LanguageConfig) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(make_language_model(config).init, jax.random.key(0))
    return {path: tuple(leaf.shape) for path, leaf in leaves_by_path(shapes).items()}


def _draw(key: Key, path: str, shape: tuple[int, ...], config: LanguageConfig) -> np.ndarray:
    if path.endswith("bias"):
        return np.zeros(shape, np.float32)
    stddev = getattr(config, "stddev", 0.02)
    return np.asarray(stddev * jax.random.normal(fold_in_name(key, path), shape), np.float32)
