"""Refuses what a device's memory cannot hold, by shapes alone, before anything of it is made.

A backend that tells its limit says itself that it ran out (see `memory.answer_out_of_memory`), but
a CPU's program is killed by the system without a word. So what is estimated to take more than there
is is refused, and the setting is named that takes most of it. Estimates may be too large by a
third, so a backend that tells may try so much more.
"""

from collections.abc import Mapping
from typing import Any

import jax

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.core.trees import tree_bytes
from fedqsn_jax.core.types import Params
from fedqsn_jax.host.devices import device_bytes

MODEL = "model"
"""The share of the parameters of a model whose size no setting decides on."""

_TOLD = 1.3
"""How much more a backend may try that tells when it runs out."""


def check_memory(settings: Any, what: str, shares: Mapping[str, int]) -> None:
    """Makes sure that a device can hold something.

    Args:
      settings: The configuration, or what of it has the sections that are named.
      what: What is held; for the message.
      shares: Bytes by the dotted name of the setting that decides on them, or `MODEL`.

    Raises:
      ConfigError: It cannot; the setting with the largest share is named.
    """
    needed, available = sum(shares.values()), device_bytes()
    if needed <= available * (1.0 if jax.default_backend() == "cpu" else _TOLD):
        return
    largest = max(shares, key=shares.__getitem__)
    told = "model: it is too large" if largest == MODEL else f"{largest} = {_of(settings, largest)}"
    raise ConfigError(
        f"{told}: {what} take about {_gib(needed)}, {_gib(shares[largest])} of it by this, and a "
        f"device has {_gib(available)}; allowed is less"
    )


def check_initial(settings: Any, setting: str, shapes: Params) -> None:
    """Makes sure that a model's parameters can be made, and the server's state of them.

    Args:
      settings: The configuration, or what of it has the sections that are named.
      setting: What decides on the model's size.
      shapes: The parameters' shapes.

    Raises:
      ConfigError: They take more memory than there is.
    """
    # The parameters themselves, the state's copy of them, and the round's proxy.
    check_memory(settings, "the model's parameters", {setting: 3 * tree_bytes(shapes)})


def _of(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
