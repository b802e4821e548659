"""Files of weights as the transformers library writes them: safetensors, one or several."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedqsn_jax.core.json_text import parse_json
from fedqsn_jax.models.language.hugging_face import PretrainedError, current_name

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = (
    "F16",
    "BF16",
    "F32",
    "F64",
    "BOOL",
    "I8",
    "I16",
    "I32",
    "I64",
    "U8",
    "U16",
    "U32",
    "U64",
)
"""Those of safetensors that NumPy knows; others hold fewer bits a number."""


class WeightFile(NamedTuple):
    """Where a tensor is: a file, opened, and its name there."""

    path: Path
    handle: Any
    name: str

    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.handle.get_slice(self.name).get_shape())

    def tensor(self) -> np.ndarray:
        """Reads it; one whose numbers are narrower than 16 bits is a PretrainedError."""
        dtype = self.handle.get_slice(self.name).get_dtype()
        if dtype not in _DTYPES:
            raise PretrainedError(
                f"{self.path}: tensor {self.name} is {dtype}: quantized weights are not read; pass "
                f"the model's float16, bfloat16 or float32 files"
            )
        return np.asarray(self.handle.get_tensor(self.name))


Weights = dict[str, WeightFile]
"""Where each tensor is, by the name that it has today."""


@contextlib.contextmanager
def open_weights(directory: Path) -> Iterator[Weights]:
    """Opens a model's one safetensors file, or all that an index names.

    Args:
      directory: The model's directory.

    Yields:
      Where each tensor is.

    Raises:
      PretrainedError: A file or a tensor that the index names is missing, or is no such file.
    """
    open_file, error_type = _safetensors_open()
    with contextlib.ExitStack() as stack:
        where: dict[str, WeightFile] = {}

        def open_one(path: Path) -> None:
            try:
                handle = stack.enter_context(open_file(path, "np"))
            except FileNotFoundError as error:
                raise PretrainedError(f"{path}: no such file") from error
            except (error_type, OSError) as error:
                raise PretrainedError(f"{path}: not a safetensors file ({error})") from error
            for name in handle.keys():  # noqa: SIM118
                current = current_name(name)
                if current in where:
                    raise PretrainedError(
                        f"{path}: tensor {name} is also in {where[current].path.name}, as "
                        f"{where[current].name}"
                    )
                where[current] = WeightFile(path, handle, name)

        index = directory / INDEX
        if not (directory / WEIGHTS).exists() and index.exists():
            expected = read_json(index).get("weight_map")
            if not isinstance(expected, dict):
                raise PretrainedError(f"{index}: weight_map is missing")
            for file in sorted(set(expected.values())):
                open_one(directory / file)
            for name in sorted(expected):
                if current_name(name) not in where:
                    raise PretrainedError(f"{directory / expected[name]}: tensor {name} is missing")
        else:
            open_one(directory / WEIGHTS)
        yield where


def read_json(file: Path) -> dict[str, Any]:
    """Reads an object of a JSON file; anything else is a PretrainedError."""
    try:
        values = parse_json(file.read_text())
    except FileNotFoundError as error:
        raise PretrainedError(f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{file}: not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise PretrainedError(f"{file}: not a JSON object")
    return values


def _safetensors_open() -> tuple[Any, type[Exception]]:
    safetensors_numpy()
    import safetensors

    return safetensors.safe_open, safetensors.SafetensorError


def safetensors_numpy() -> Any:
    """Returns the library; a PretrainedError where it is not installed."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise PretrainedError(
            "reading and writing models needs the package safetensors; "
            "pip install 'fedqsn_jax[language]'"
        ) from error
    return safetensors.numpy
