"""Which settings make a run of a language model smaller, with what it would then take."""

import jax

from fedqsn_jax.config.schema import LANGUAGE, Config
from fedqsn_jax.core.trees import exclude, tree_bytes
from fedqsn_jax.simulation.fitting import Fitted
from fedqsn_jax.simulation.memory import saved_leaves

_SHOWN = 3
"""Settings that are named."""
_RANK = 16
"""The rank of adapters that are proposed in place of training everything."""


def smaller_settings(
    config: Config, fitted: Fitted, total: int, *, attackers: int, training: int
) -> str:
    """Returns what a refusal ends with: three settings, each with what is taken with it too.

    Args:
      config: The settings.
      fitted: The model as the run has it.
      total: Bytes that the run takes.
      attackers: Bytes of attackers' copies.
      training: Bytes that grow with what is trained: weights, gradient, moments, deltas.
    """
    if config.model.name != LANGUAGE:
        return ""
    saved = sum(leaf.size * leaf.dtype.itemsize for leaf in _saved(fitted))
    kept = _kept_with_remat(fitted) if not config.model.remat else saved
    frozen = tree_bytes(exclude(fitted.plain, fitted.roles.trained))
    is_narrow = config.model.dtype != "float32" or config.pretraining.steps > 0
    trains_all = fitted.roles.trained is None and not config.lora.rank
    half = config.client.batch_size // 2
    less = {
        "model.remat = True": 2 * (saved - kept),
        "model.dtype = 'bfloat16'": 0 if is_narrow else frozen // 2,
        "evaluation.attackers = ()": attackers,
        f"lora.rank = {_RANK}": training if trains_all else 0,
        f"client.batch_size = {half}": (kept if kept < saved else saved) if half else 0,
    }
    best = sorted((name for name in less if less[name] > 0), key=lambda name: -less[name])
    told = []
    for name in best[:_SHOWN]:
        total -= less[name]
        told.append(f"{name} ({total / 2**30:.1f} GiB)")
    return f"; smaller, each with those before it: {', '.join(told)}" if told else ""


def _saved(fitted: Fitted) -> list[jax.ShapeDtypeStruct]:
    model, trained = fitted.model, fitted.roles.trained
    return saved_leaves(model.client_apply, model.task, model.params, fitted.batch, trained)


def _kept_with_remat(fitted: Fitted) -> int:
    """Of what is saved, what is kept where layers' activations are computed again.

    That is what is of no layer, one layer's share of the rest, and each layer's input: of the saved
    arrays the largest that are as wide as the residual stream.
    """
    leaves = _saved(fitted)
    stacks = [site for site in fitted.sites if site.layer_axes == (0,)]
    if not stacks:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    layers, width = stacks[0].layers, max(1, min(site.fan_in for site in stacks))
    total, inputs = 0, 0
    for leaf in leaves:
        size = leaf.size * leaf.dtype.itemsize
        stacked = leaf.ndim > 1 and leaf.shape[0] == layers
        total += size // layers if stacked else size
        if stacked and leaf.ndim == 4 and leaf.shape[-1] == width:
            inputs = max(inputs, size)
    return total + inputs
