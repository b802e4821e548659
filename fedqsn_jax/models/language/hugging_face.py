"""How the transformers library writes models down: settings in config.json, and tensors by name."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedqsn_jax.core.errors import UserError
from fedqsn_jax.models.language.transformer import ACTIVATIONS


class PretrainedError(UserError):
    """A model that cannot be read or written; the message is one line."""


class Settings:
    """The values of a config.json, read by name and type; every mistake names file and field."""

    def __init__(self, values: Mapping[str, Any], file: str):
        """Names the values, and the file that they come from."""
        self._values = values
        self._file = file

    def integer(self, name: str, default: int | None = None) -> int:
        """Returns a positive integer; required where there is no default."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(name, value, "a positive integer")
        return value

    def optional_integer(self, name: str, default: int | None) -> int | None:
        """Returns a positive integer; None where it is null, and the default where it is absent."""
        if name in self._values and self._values[name] is None:
            return None
        return None if default is None and name not in self._values else self.integer(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a number that is not negative; required where there is no default."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise self._error(name, value, "a number of 0 or more")
        return float(value)

    def optional_number(self, name: str, default: float | None) -> float | None:
        """Returns a number; None where it is null, and the default where it is absent."""
        if name in self._values and self._values[name] is None:
            return None
        return None if default is None and name not in self._values else self.number(name, default)

    def rate(self, name: str, default: float) -> float:
        """Returns a dropout rate."""
        value = self.number(name, default)
        if value >= 1:
            raise self._error(name, value, "a number of 0 to below 1")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Returns a truth value."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._error(name, value, "true or false")
        return value

    def choice(self, name: str, default: str, *allowed: str) -> str:
        """Returns one of several texts."""
        value = self._get(name, default)
        if value not in allowed:
            raise self._error(name, value, ", ".join(allowed))
        return value

    def activation(self, name: str, default: str) -> str:
        """Returns the name of an activation in `ACTIVATIONS`."""
        return self.choice(name, default, *ACTIVATIONS)

    def token(self, name: str, default: int | None = None) -> int | None:
        """Returns a token's id, or None."""
        value = self._values.get(name, default)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self._error(name, value, "an integer or null")
        return value

    def required_token(self, name: str) -> int:
        """Returns a token's id that has to be there."""
        value = self.token(name)
        if value is None:
            raise PretrainedError(f"{self._file}: {name} is missing")
        return value

    def tokens(self, name: str, default: Sequence[int] = ()) -> tuple[int, ...]:
        """Returns ids of tokens, of which the file may name none, one or several."""
        value = self._values.get(name, list(default))
        value = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
            raise self._error(name, value, "an integer, a list of integers or null")
        return tuple(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Returns a list of texts; empty where it is absent or null."""
        value = self._values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self._error(name, value, "a list of texts")
        return tuple(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """Returns a list of numbers above 0."""
        value = self._get(name, None)
        if not isinstance(value, list) or not all(
            isinstance(one, int | float) and not isinstance(one, bool) and one > 0 for one in value
        ):
            raise self._error(name, value, "a list of numbers above 0")
        return tuple(map(float, value))

    def section(self, name: str) -> dict[str, Any]:
        """Returns nested values; empty where they are absent or null."""
        value = self._values.get(name) or {}
        if not isinstance(value, dict):
            raise self._error(name, value, "an object")
        return value

    def require(self, name: str, *allowed: Any) -> None:
        """Makes sure that a setting is absent or has one of the values that are implemented."""
        if name in self._values and self._values[name] not in allowed:
            raise self._error(name, self._values[name], ", ".join(map(str, allowed)))

    def has(self, name: str) -> bool:
        """Returns whether a setting is there and not null."""
        return self._values.get(name) is not None

    def agree(self, name: str, derived: Any) -> None:
        """Makes sure that a setting which repeats others is absent, null or says what they say."""
        if self.has(name) and self._values[name] != derived:
            raise self._error(name, self._values[name], f"{derived!r}, as other settings say")

    def in_current_names(self, older: Mapping[str, str]) -> "Settings":
        """Returns the settings with each value under the one name that is read here.

        Args:
          older: Names by which the transformers library knows a setting too, and the name here.

        Raises:
          PretrainedError: Two names of one setting disagree.
        """
        values = dict(self._values)
        for other, name in older.items():
            value = values.pop(other, None)
            if value is None:
                continue
            if values.get(name) not in (None, value):
                raise PretrainedError(
                    f"{self._file}: {other} = {value!r} and {name} = {values[name]!r} are two "
                    f"names of one setting: give one of them, or the same value"
                )
            values[name] = value
        return Settings(values, self._file)

    def within(self, name: str, values: Mapping[str, Any]) -> "Settings":
        """Returns settings that stand in a section."""
        return Settings(values, f"{self._file}: {name}")

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None and default is None:
            raise PretrainedError(f"{self._file}: {name} is missing")
        return default if value is None else value

    def _error(self, name: str, value: Any, allowed: str) -> PretrainedError:
        return PretrainedError(f"{self._file}: {name} = {value!r}: allowed: {allowed}")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """How one of our tensors is written down there.

    Attributes:
      path: Our tensor's path. Where ``name`` has a place for a layer's number, it is a stack over
        layers, of which each layer is a tensor there.
      name: Its name there, with ``{}`` for the layer's number.
      input_axes: Our tensor's first so many axes are flattened to one, and the others to another;
        0: all of them are flattened to one.
      transposed: Whether the matrix that this gives is transposed there, as torch's linear layers
        are.
      part: Which part of a tensor there this is, along its outputs.
      parts: The parts' sizes, in any unit.
      drawn: Whether it may be missing, and is then drawn at random: a new classification head.
    """

    path: str
    name: str
    input_axes: int = 0
    transposed: bool = False
    part: int = 0
    parts: tuple[int, ...] = (1,)
    drawn: bool = False

    @property
    def stacked(self) -> bool:
        """Whether our tensor has a leading layer axis."""
        return "{}" in self.name

    @property
    def output_axis(self) -> int:
        """The axis of the outputs in the tensor there."""
        return 0 if self.transposed else -1

    def there(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the tensor there, all parts, given a layer's shape of ours."""
        inputs = math.prod(shape[: self.input_axes])
        own = math.prod(shape[self.input_axes :])
        outputs = own * sum(self.parts) // self.parts[self.part]
        if not self.input_axes:
            return (outputs,)
        return (outputs, inputs) if self.transposed else (inputs, outputs)

    def read(self, there: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Returns a layer of our tensor, of a shape, from the tensor there."""
        size = there.shape[self.output_axis] // sum(self.parts)
        borders = np.cumsum(self.parts)[:-1] * size
        part = np.split(there, borders, axis=self.output_axis)[self.part]
        return (part.T if self.transposed else part).reshape(shape)

    def written(self, ours: np.ndarray) -> np.ndarray:
        """Returns this part of the tensor there from a layer of our tensor."""
        if not self.input_axes:
            return ours.reshape(-1)
        matrix = ours.reshape(math.prod(ours.shape[: self.input_axes]), -1)
        return matrix.T if self.transposed else matrix


@dataclasses.dataclass(frozen=True)
class Unread:
    """Tensors that a file may hold and that are not read, since what they hold is known.

    Attributes:
      pattern: Their names, without the model's prefix, as `fnmatch` has it.
      expected: What they hold, for messages; empty: nothing is assumed of them.
      holds: Whether an array is that; None: ``copy_of`` says it, or nothing.
      copy_of: The name, without the prefix, of a tensor that is read and that they repeat.
    """

    pattern: str
    expected: str = ""
    holds: Callable[[np.ndarray], bool] | None = None
    copy_of: str = ""


def counts_up(array: np.ndarray) -> bool:
    """Returns whether an array holds 0, 1, 2 and so on, as buffers of position ids do."""
    return bool(np.array_equal(array.ravel(), np.arange(array.size)))


def output_copy(tied: bool) -> tuple[Unread, ...]:
    """Returns the output layer's weight, where it is the embedding: one that differs is read."""
    return (Unread("lm_head.weight"),) if tied else ()


_OLDER_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def current_name(name: str) -> str:
    """Returns the name that a tensor has today.

    Files from BERT's first years (``bert-base-uncased`` is one) call a layer norm's tensors as
    TensorFlow did; the transformers library renames them when it reads them, too.
    """
    for older, newer in _OLDER_NORMS.items():
        if name.endswith(older):
            return name.removesuffix(older) + newer
    return name


def linear(path: str, name: str, bias: bool = True, inputs: int = 1, **more: Any) -> list[Tensor]:
    """Returns the kernel, and the bias, of a torch linear layer ``[out, in]``."""
    kernel = Tensor(f"{path}/kernel", f"{name}.weight", inputs, transposed=True, **more)
    return [kernel, Tensor(f"{path}/bias", f"{name}.bias", **more)] if bias else [kernel]


def layer_norm(path: str, name: str) -> list[Tensor]:
    """Returns scale and bias of a layer norm."""
    return [Tensor(f"{path}/scale", f"{name}.weight"), Tensor(f"{path}/bias", f"{name}.bias")]


def embedding(path: str, name: str) -> Tensor:
    """Returns a table of embeddings."""
    return Tensor(f"{path}/embedding", f"{name}.weight", input_axes=1)


def token_ids(ids: Sequence[int]) -> int | list[int] | None:
    """Returns ids as config.json has them: one, several or none."""
    return list(ids) if len(ids) > 1 else next(iter(ids), None)
