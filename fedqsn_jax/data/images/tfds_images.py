"""MNIST, EMNIST and CIFAR-10 as TFDS prepared them, read without TensorFlow."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedqsn_jax.config.schema import ConfigError, DataConfig
from fedqsn_jax.core.arrays import ids_array, plain_id
from fedqsn_jax.data.labels import check_labels
from fedqsn_jax.data.population import Splits
from fedqsn_jax.data.splits import CLIENT_COLUMN, Rows, make_splits, no_client_ids
from fedqsn_jax.data.tfds_folders import FORMAT, PreparedSet

_FOLDERS = {"mnist": "mnist", "emnist": "emnist/byclass", "cifar10": "cifar10"}
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
    prepared = PreparedSet(f"data.name = {config.name!r}", _FOLDERS[config.name], config.directory)
    folder = prepared.find()
    # These imports take a second, and only these data sets need them.
    import tensorflow_datasets as tfds

    with prepared.explained(folder):
        builder = tfds.builder_from_directory(folder)
        # Decoded below: TFDS's own way costs four times as much, and a warning for lack of OpenCV.
        decoders = {"image": tfds.decode.SkipDecoding()}
        train, test = (
            builder.as_data_source(split=split, decoders=decoders, file_format=FORMAT)
            for split in ("train", "test")
        )
        shape, classes, client = _check_features(builder.info.features, config, folder)
        prepared.check_files(builder.info.splits, ("train", "test"), folder)
        rows = _read(train, shape, client), _read(test, shape, None)
        for split, each in zip(("train", "test"), rows, strict=True):
            check_labels(each["label"], classes, f"split {split}")
    return make_splits(*rows, classes, config, generator)


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
                client_id = plain_id(record[client_feature])
                if client_id is None:
                    raise ValueError(f"row {index + 1} has no value in {client_feature!r}")
                client_ids.append(client_id)
    rows: Rows = {"image": images, "label": labels}
    if client_feature is not None:
        rows[CLIENT_COLUMN] = ids_array(client_ids)
    return rows
