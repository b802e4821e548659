"""The argument of a configuration file, ``FILE:ARGUMENT``, that names task, model and algorithm."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from fedqsn_jax.config.choices import ALGORITHMS
from fedqsn_jax.config.fields import ConfigError

_RELEASED = "released"
_CHOICES = (*ALGORITHMS, _RELEASED)


class FileArgument(NamedTuple):
    """What the argument names, or what holds where it names nothing.

    Attributes:
      task: One of the tasks.
      model: A directory, or a name on the Hugging Face hub.
      algorithm: One of `choices.ALGORITHMS`.
      released: Whether FedQSN is to have the choices of the authors' code, `schema.as_released`.
    """

    task: str
    model: str
    algorithm: str = "fedqsn"
    released: bool = False


def read_file_argument(
    text: str, default: FileArgument, tasks: Collection[str], models: Mapping[str, str]
) -> FileArgument:
    """Reads words with commas between them, in any order: a task, a model, an algorithm.

    Example:
      >>> default = FileArgument("sst2", "someone/small")
      >>> read_file_argument("fedavg,rte", default, ("rte", "sst2"), {"large": "someone/large"})
      FileArgument(task='rte', model='someone/small', algorithm='fedavg', released=False)

    Args:
      text: The words. One that is no task, no algorithm (or ``released``) and no short name of a
        model is a model itself.
      default: What holds for a kind that no word is of.
      tasks: Names of tasks.
      models: What short names of models stand for.

    Raises:
      ConfigError: A word is empty, or two are of the same kind: one of them is misspelled, or
        would go unnoticed.
    """
    found: dict[str, list[str]] = {"task": [], "algorithm": [], "model": []}
    for word in text.split(","):
        kind = "task" if word in tasks else "algorithm" if word in _CHOICES else "model"
        found[kind].append(word)
    for kind, words in found.items():
        if len(words) > 1 or "" in words:
            raise ConfigError(
                f"{', '.join(map(repr, words))}: taken for the {kind}; allowed are one task "
                f"({', '.join(tasks)}), one algorithm ({', '.join(_CHOICES)}) and one model "
                f"({', '.join(models)}, another name on the hub, or a directory)"
            )
    task, algorithm, model = (next(iter(words), None) for words in found.values())
    released = algorithm == _RELEASED
    return FileArgument(
        task or default.task,
        models.get(model, model) if model else default.model,
        "fedqsn" if released else algorithm or default.algorithm,
        released,
    )
