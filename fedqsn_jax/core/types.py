"""The names of types that signatures share."""

from collections.abc import Callable
from typing import Any

import jax

Array = jax.Array
Key = jax.Array
"""A typed or raw JAX pseudo-random key."""

Params = Any
"""A pytree of arrays: the parameters of a model, without collections around them."""

Batch = dict[str, Array]
"""Named arrays that share their leading axis: the examples of one minibatch."""

Columns = dict[str, Array]
"""Per mask site (by the kernel's path), an array ``[layers, columns]``."""

ApplyFn = Callable[[Params, Batch, Key | None], Array]
"""``(params, batch, key) -> outputs``; with a key the model trains (dropout), with None not."""
