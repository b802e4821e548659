"""What decoders without an encoder share: layers through a cache, and the output layer."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.language.cache import Cache, attendable, last_real
from fedqsn_jax.models.language.transformer import Embed, Execution, Head


def through_layers(
    layers: Callable[..., Any],
    count: int,
    hidden: Array,
    mask: Array,
    cache: Cache | None,
    padded: bool,
    *more: Any,
) -> tuple[Array, Cache | None]:
    """Applies stacked causal layers to new tokens.

    Args:
      layers: See `transformer.stack`; the carry is the hidden states with the cache's arrays or
        None, each layer gets its number, and all share what tokens may attend to, the slots that
        are used (None without a cache), and ``more``.
      count: Number of layers.
      hidden: ``[rows, length, width]``.
      mask: bool ``[rows, length]``: which tokens are real.
      cache: What was seen before, or None.
      padded: Whether any token may be padding.
      more: What else the layers share.

    Returns:
      The hidden states, and the cache with these tokens.
    """
    seen, cache = attendable(mask, cache, padded)
    arrays, used = (None, None) if cache is None else (cache.arrays, cache.used)
    each = jnp.arange(count, dtype=jnp.int32)
    (hidden, arrays), _ = layers((hidden, arrays), each, (seen, used, *more))
    return hidden, cache if cache is None else cache.written(arrays, mask.shape[1])


def next_logits(
    config: Any, execution: Execution, embed: Embed, hidden: Array, mask: Array, last_only: bool
) -> Array:
    """Returns float32 logits of the next tokens, within a module's compact method.

    Args:
      config: The model's, with ``tied``, ``vocab_size`` and ``stddev``.
      execution: How it is computed.
      embed: The token embedding, which is the output layer too where it is tied.
      hidden: The last hidden states, normed, ``[rows, length, width]``.
      mask: bool ``[rows, length]``: which tokens are real.
      last_only: Whether to give those after each row's last real token only.
    """
    if last_only:
        hidden = last_real(hidden, mask)
    if config.tied:
        return embed.attend(hidden)
    return Head(config.vocab_size, execution.dtype, config.stddev, name="lm_head")(hidden)
