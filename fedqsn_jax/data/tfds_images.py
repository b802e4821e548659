"""MNIST, EMNIST and CIFAR-10 as TFDS prepared them, read without TensorFlow.

A data set that was prepared in the array_record format can be read without TensorFlow; preparing
it needs an environment with TensorFlow, once. Nothing here reaches for the network: files are
opened by their folder. ``tfds.data_source`` would look up the data set's code first, which may
download, and which answers for absent data with an error about something else.
"""

import io
import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedqsn_jax.config import ConfigError, DataConfig
from fedqsn_jax.data.federated import Splits
from fedqsn_jax.data.splits import CLIENT_COLUMN, Rows, make_splits, no_client_ids

_DEFAULT_DIRECTORY = "~/tensorflow_datasets"
_FOLDERS = {"mnist": "mnist", "emnist": "emnist/byclass", "cifar10": "cifar10"}
_FORMAT = "array_record"
# Features that say whose a row is. TFDS's own versions of these sets have none of them.
_CLIENT_FEATURES = (CLIENT_COLUMN, "writer_id")
_RECORDS_AT_A_TIME = 4096


def load(config: DataConfig, generator: np.random.Generator) -> Splits:
    """Loads a data set: ``image`` uint8 ``[height, width, channels]``, ``label`` int32.

    Its own test split is used whole. For the natural partition the prepared data must have a
    feature ``client_id`` or ``writer_id``.

    Raises:
      ConfigError: It is not there, damaged, or not in a format that can be read without
        TensorFlow (the message says where it was looked for and how to prepare it), or it cannot
        be divided as configured.
    """
    folder = _find(config)
    # These imports take a second, and only these data sets need them.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        # Decoded below: TFDS's own way costs four times as much, and a warning for lack of OpenCV.
        decoders = {"image": tfds.decode.SkipDecoding()}
        train, test = (
            builder.as_data_source(split=split, decoders=decoders, file_format=_FORMAT)
            for split in ("train", "test")
        )
        shape, classes, client = _check_features(builder.info.features, config, folder)
        _check_files(builder.info.splits, config, folder)
        rows = _read(train, shape, client), _read(test, shape, None)
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"data.name = {config.name!r}: {folder} cannot be read ({type(error).__name__}: "
            f"{reason}); remove it and {_how_to_prepare(config)}"
        ) from error
    return make_splits(*rows, classes, config, generator)


def _directory(config: DataConfig) -> Path:
    given = config.directory or os.environ.get("TFDS_DATA_DIR") or _DEFAULT_DIRECTORY
    if "://" in given:
        raise ConfigError(f"data.directory = {given!r}: allowed is a local directory")
    return Path(given).expanduser()


def _how_to_prepare(config: DataConfig) -> str:
    return (
        f"prepare it once, in an environment with TensorFlow (pip install 'fedqsn_jax[prepare]'): "
        f"tfds build {_FOLDERS[config.name]} --data_dir={shlex.quote(str(_directory(config)))} "
        f"--file_format={_FORMAT}"
    )


def _find(config: DataConfig) -> Path:
    """The folder of the newest prepared version."""
    searched = _directory(config) / _FOLDERS[config.name]
    versions = sorted((i.parent for i in searched.glob("*/dataset_info.json")), key=_version)
    versions = [folder for folder in versions if _version(folder)]
    if not versions:
        raise ConfigError(
            f"data.name = {config.name!r}: not found in {searched}; {_how_to_prepare(config)}"
        )
    for folder in reversed(versions):
        if _FORMAT in _formats(folder):
            return folder
    raise ConfigError(
        f"data.name = {config.name!r}: {versions[-1]} is in the format "
        f"{', '.join(_formats(versions[-1]))}, which needs TensorFlow; remove it and "
        f"{_how_to_prepare(config)}"
    )


def _version(folder: Path) -> tuple[int, ...]:
    """``(3, 0, 1)``; empty for a folder that is none, such as one that is still being written."""
    parts = folder.name.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def _formats(folder: Path) -> list[str]:
    file = folder / "dataset_info.json"
    try:
        info = json.loads(file.read_text())
        # The first is left out where it is TFDS's default.
        return [info.get("fileFormat") or "tfrecord", *info.get("alternativeFileFormats", [])]
    except (OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"data.directory: {file} cannot be read ({reason})") from error


def _check_features(
    features: Any, config: DataConfig, folder: Path
) -> tuple[tuple[int, ...], int, str | None]:
    """Returns an image's shape, the number of labels, and the feature of the client, if needed."""
    known = dict(features.items())
    shape = getattr(known.get("image"), "shape", None) or (None,)
    classes = getattr(known.get("label"), "num_classes", None)
    if None in shape or known["image"].np_dtype != np.uint8 or classes is None:
        raise ConfigError(
            f"data.name = {config.name!r}: {folder} has the features {', '.join(sorted(known))}; "
            f"needed are an 8-bit image of fixed size and a label"
        )
    if config.partition != "natural":
        return tuple(shape), classes, None
    for name in _CLIENT_FEATURES:
        if name in known:
            return tuple(shape), classes, name
    raise ConfigError(
        f"{no_client_ids(config.name)} ({folder} has no feature {' or '.join(_CLIENT_FEATURES)})"
    )


def _check_files(splits: Any, config: DataConfig, folder: Path) -> None:
    for split in ("train", "test"):
        for file in splits[split].filepaths:
            if not file.exists():
                raise ConfigError(
                    f"data.name = {config.name!r}: {file} is missing; remove {folder} and "
                    f"{_how_to_prepare(config)}"
                )


def _read(source: Any, shape: tuple[int, ...], client_feature: str | None) -> Rows:
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    client_ids = []
    for start in range(0, len(source), _RECORDS_AT_A_TIME):
        indices = list(range(start, min(start + _RECORDS_AT_A_TIME, len(source))))
        for index, record in zip(indices, source.__getitems__(indices), strict=True):
            with Image.open(io.BytesIO(record["image"])) as image:
                images[index] = np.asarray(image, np.uint8).reshape(shape)
            labels[index] = record["label"]
            if client_feature is not None:
                client_ids.append(record[client_feature])
    rows: Rows = {"image": images, "label": labels}
    if client_feature is not None:
        rows[CLIENT_COLUMN] = np.asarray(client_ids)
    return rows
