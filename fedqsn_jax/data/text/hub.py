"""Data sets of the Hugging Face hub, by the library datasets: from the hub, or saved on disk."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.config.schema import ConfigError

_SAVED = ("dataset_dict.json", "state.json")
"""Files that the library writes when it saves a data set."""


class HubData(NamedTuple):
    """One split of a data set.

    Attributes:
      fingerprint: Another one for other rows.
      rows: Gives the rows, in order: values by column, class labels as integers.
    """

    fingerprint: str
    rows: Callable[[], Iterator[dict[str, Any]]]


def load_hub_data(spec: str, name: str, split: str) -> HubData:
    """Loads a data set, from the network if it is not on this machine yet.

    Args:
      spec: The source as the user wrote it, for messages.
      name: ``NAME`` or ``NAME,CONFIGURATION``; NAME is on the hub, or a directory.
      split: Its split.

    Raises:
      ConfigError: The library is not installed, or the data set or the split cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data source {spec!r}: it needs the library datasets: pip install 'fedqsn_jax[hub]'"
        ) from error
    base, _, configuration = name.partition(",")
    path = user_path(base)
    try:
        if any((path / file).is_file() for file in _SAVED):
            found = datasets.load_from_disk(str(path))
        else:
            source = str(path) if path.is_dir() else base
            found = datasets.load_dataset(source, configuration or None)
    except Exception as error:  # The library raises its own, and those of the libraries it uses.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"data source {spec!r}: it cannot be loaded ({reason}); without a network name a "
            f"directory that datasets has saved with save_to_disk: hf:DIRECTORY"
        ) from error
    if isinstance(found, dict):
        if split not in found:
            raise ConfigError(
                f"data source {spec!r}: there is no split {split!r}; allowed are {', '.join(found)}"
            )
        found = found[split]
    if not len(found):
        raise ConfigError(f"data source {spec!r}: it has no rows")
    return HubData(str(found._fingerprint), lambda: iter(found))
