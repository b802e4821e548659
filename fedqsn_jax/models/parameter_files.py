"""Parameters of any model in a directory: ``model.safetensors``, and ``model.json`` about them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedqsn_jax.core.errors import UserError
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.core.types import Params
from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.models.language.pretrained import nested
from fedqsn_jax.models.language.weight_files import (
    WEIGHTS,
    open_weights,
    read_json,
    safetensors_numpy,
)

DESCRIPTION = "model.json"
_FORMAT = "fedqsn_jax parameters 1"


class SavedParams(NamedTuple):
    """What `load_params` reads.

    Attributes:
      params: NumPy arrays in nested dictionaries.
      description: What ``model.json`` says: that which `save_params` was given.
    """

    params: Params
    description: dict[str, Any]


def save_params(
    directory: str | Path, params: Params, description: Mapping[str, Any] | None = None
) -> None:
    """Writes parameters, each as a tensor named by its path, such as ``hidden_0/kernel``.

    Args:
      directory: Where; it is created so that only the user may read it.
      params: Arrays in nested dictionaries.
      description: Values of JSON that say what they are.

    Raises:
      UserError: The file system refuses, or safetensors is not installed.
    """
    save_file = safetensors_numpy().save_file
    arrays = {
        path: np.ascontiguousarray(jax.device_get(leaf))
        for path, leaf in leaves_by_path(params).items()
    }
    tensors = {path: [str(array.dtype), list(array.shape)] for path, array in arrays.items()}
    about = {"format": _FORMAT, "description": dict(description or {}), "tensors": tensors}
    directory = Path(directory)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS) as temporary:
            save_file(arrays, temporary)
        with replacing(directory / DESCRIPTION) as temporary:
            temporary.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}") from error


def load_params(directory: str | Path) -> SavedParams:
    """Reads what `save_params` has written.

    Args:
      directory: Where.

    Raises:
      UserError: A file is missing or damaged, or says something else.
    """
    directory = Path(directory)
    file = directory / DESCRIPTION
    about = read_json(file)
    tensors, description = about.get("tensors"), about.get("description")
    if (
        about.get("format") != _FORMAT
        or not isinstance(tensors, dict)
        or not isinstance(description, dict)
    ):
        raise UserError(f"{file}: format = {about.get('format')!r}: allowed is {_FORMAT!r}")
    with open_weights(directory) as files:
        arrays = {path: place.tensor() for path, place in files.items()}
    found = {path: [str(array.dtype), list(array.shape)] for path, array in arrays.items()}
    for path in sorted({*found, *tensors}):
        if found.get(path) != tensors.get(path):
            raise UserError(
                f"{directory / WEIGHTS}: {path} is {found.get(path)}, but {DESCRIPTION} says "
                f"{tensors.get(path)}"
            )
    return SavedParams(nested(arrays), description)
