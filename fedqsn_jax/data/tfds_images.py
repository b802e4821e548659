"""MNIST, EMNIST and CIFAR-10 as TFDS prepared them, read without TensorFlow.

A data set that was prepared in the array_record format can be read by ``as_data_source``; preparing
it needs an environment with TensorFlow, once.
"""

import json
import os
from pathlib import Path

import numpy as np

from fedqsn_jax.config import ConfigError, DataConfig
from fedqsn_jax.data.federated import Splits
from fedqsn_jax.data.splits import CLIENT_COLUMN, Rows, make_splits

_DEFAULT_DIRECTORY = "~/tensorflow_datasets"
_FOLDERS = {"mnist": "mnist", "emnist": "emnist/byclass", "cifar10": "cifar10"}


def load(config: DataConfig, generator: np.random.Generator) -> Splits:
    """Loads a data set: ``image`` uint8 ``[height, width, channels]``, ``label`` int32.

    Its own test split is used whole. A feature `CLIENT_COLUMN` says whose a row is, where the
    prepared data has one (TFDS's own versions of these sets have none).

    Raises:
      ConfigError: It is not there, or not in a format that can be read without TensorFlow; the
        message says where it was looked for and how to prepare it.
    """
    folder = _find(config)
    # These imports take a second, and only these data sets need them.
    import tensorflow_datasets as tfds

    builder = tfds.core.builder_from_directory(folder)
    classes = builder.info.features["label"].num_classes
    splits = {name: _read(builder, name) for name in ("train", "test")}
    return make_splits(splits["train"], splits["test"], classes, config, generator)


def _find(config: DataConfig) -> Path:
    """The folder of the newest prepared version."""
    given = config.directory or os.environ.get("TFDS_DATA_DIR") or _DEFAULT_DIRECTORY
    directory = Path(given).expanduser()
    name = _FOLDERS[config.name]
    prepare = (
        f"prepare it once, in an environment with TensorFlow (pip install 'fedqsn_jax[prepare]'): "
        f"tfds build {name} --data_dir={directory} --file_format=array_record"
    )
    versions = sorted((directory / name).glob("*/dataset_info.json"), key=_version)
    if not versions:
        raise ConfigError(
            f"data.name = {config.name!r}: not found in {directory / name}; {prepare}"
        )
    for info in reversed(versions):
        if json.loads(info.read_text()).get("fileFormat") == "array_record":
            return info.parent
    raise ConfigError(
        f"data.name = {config.name!r}: {versions[-1].parent} is not in the array_record format; "
        f"{prepare}"
    )


def _version(info: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in info.parent.name.split(".") if part.isdigit())


def _read(builder: object, split: str) -> Rows:
    source = builder.as_data_source(split)  # type: ignore[attr-defined]
    names = {"image": np.uint8, "label": np.int32}
    if CLIENT_COLUMN in builder.info.features:  # type: ignore[attr-defined]
        names[CLIENT_COLUMN] = None  # type: ignore[assignment]
    columns: dict[str, list] = {name: [] for name in names}
    for example in source:
        for name in names:
            columns[name].append(example[name])
    return {name: np.asarray(columns[name], dtype) for name, dtype in names.items()}
