"""A run's trained model, read back from its working directory."""

from pathlib import Path
from typing import NamedTuple

import jax

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.config.schema import Config
from fedqsn_jax.core.types import Params
from fedqsn_jax.host.checkpoints import Checkpoints, History
from fedqsn_jax.host.devices import computing
from fedqsn_jax.models.language.pretrained import nested
from fedqsn_jax.runs.working_directory import WorkDirectory
from fedqsn_jax.simulation.from_config import merge_configured


class Trained(NamedTuple):
    """What `load` gives.

    Attributes:
      config: The configuration of the run. A relative ``config.model.pretrained`` counts from where
        the run was started; the ``config.json`` and the tokenizer from there are also in the
        directory's ``model``, which `pretrained.read_config` reads.
      params: The hidden parameters, on the default device; adapters are merged into their
        matrices. Of FedSP the tree that `prompted_model` describes: ``prompts`` and
        ``classifier`` are what was tuned, for the encoder ``model``.
      history: One entry an evaluated round, as in metrics.jsonl.
      round: The number of finished rounds.
    """

    config: Config
    params: Params
    history: History
    round: int


@computing()
def load(workdir: Path | str, round: int | None = None) -> Trained:
    """Reads the hidden model that a run has trained so far; its data are not needed.

    Example::

      trained = fedqsn_jax.load("runs/digits")
      model = fedqsn_jax.models.registry.make_model(trained.config.model, classes=10)
      fedqsn_jax.linen_apply(model)(trained.params, {"image": images}, None)

    Args:
      workdir: The directory of the run, which may still be going on.
      round: Which checkpoint; None is the latest.

    Raises:
      ConfigError: There is no run in the directory.
      CheckpointError: There is no such checkpoint, or it cannot be read.
    """
    work = WorkDirectory(user_path(workdir))
    config = work.config()
    with Checkpoints(work.checkpoints, keep_latest=1, keep_best=0) as checkpoints:
        tensors, history, finished = checkpoints.read("params", round)
    params = merge_configured(config, jax.device_put(nested(tensors)))
    return Trained(config, params, history, finished)
