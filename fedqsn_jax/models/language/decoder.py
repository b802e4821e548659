"""Decoders without an encoder: what GPT-2 and LLaMA share, which is all but norms and positions."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels.dropout import Dropout
from fedqsn_jax.models.language.attention import Attention, Slots
from fedqsn_jax.models.language.cache import (
    Cache,
    attendable,
    last_real,
    positions_of,
    within_window,
)
from fedqsn_jax.models.language.output_layer import Unprojected
from fedqsn_jax.models.language.transformer import (
    Embed,
    Execution,
    Head,
    Mlp,
    check_length,
    real_tokens,
    stack,
)


class CausalModel(nn.Module):
    """Tokens to logits of the next token.

    Attributes:
      config: The architecture.
      execution: How it is computed.
    """

    config: Any
    execution: Execution = Execution()

    layer: ClassVar[type["CausalLayer"]]
    """The family's layer."""

    def placed(self, hidden: Array, positions: Array, train: bool) -> tuple[Array, Any]:
        """Returns embedded tokens with what says where they stand, and the layers' rotation.

        Args:
          hidden: ``[rows, length, width]``.
          positions: int32 ``[rows, length]``.
          train: Whether dropout acts.
        """
        raise NotImplementedError

    @property
    def logit_cap(self) -> float | None:
        """What the family's logits are kept below; None: nothing."""
        return None

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        mask: Array | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
        train: bool = False,
        projected: bool = True,
    ) -> tuple[Array | Unprojected, Cache | None]:
        """Returns float32 logits ``[rows, length, vocab]`` and the cache with these tokens.

        Args:
          tokens: int32 ``[rows, length]``.
          mask: bool or integer, the same shape: which tokens are real; None: all are.
          cache: What was seen before, or None.
          last_only: Whether to give the logits after each row's last real token only,
            ``[rows, 1, vocab]``.
          train: Whether dropout acts.
          projected: Whether there are to be logits; otherwise what makes them is returned.

        Raises:
          ValueError: The sequences are longer than the model's positions.
        """
        config, dtype = self.config, self.execution.dtype
        check_length(tokens.shape[1], config.max_length)
        padded, mask = mask is not None, real_tokens(tokens, mask)
        embed = Embed(config.vocab_size, config.width, dtype, config.stddev, name="token_embed")
        positions = positions_of(mask, cache)
        hidden, rotation = self.placed(embed(tokens), positions, train)
        layers = stack(self.layer, config.layers, self.execution)
        layers = layers(config, self.execution, train, name="layers")
        seen, cache = attendable(mask, cache, padded)
        near = seen
        if any(config.windowed):
            near = within_window(seen, mask, cache, config.window)
        arrays, used = (None, None) if cache is None else (cache.arrays, cache.used)
        numbers = jnp.arange(config.layers, dtype=jnp.int32)
        (hidden, arrays), _ = layers((hidden, arrays), numbers, (seen, near, used, rotation))
        if cache is not None:
            cache = cache.written(arrays, mask.shape[1])
        hidden = self.layer.norm_class(config.norm_epsilon, dtype, name="final_norm")(hidden)
        if last_only:
            hidden = last_real(hidden, mask)
        if config.tied:
            outputs = embed.unprojected(hidden)
        else:
            head = Head(config.vocab_size, dtype, config.stddev, name="lm_head")
            outputs = head.unprojected(hidden)
        outputs = dataclasses.replace(outputs, cap=self.logit_cap)
        return (outputs.logits() if projected else outputs), cache


class CausalLayer(nn.Module):
    """A layer: attention and an MLP, each normed before it.

    The carry is the hidden states with the cache's arrays, or None; each layer gets its number; all
    share what tokens may attend to, the same within the window, the slots that are used, and the
    rotation.
    """

    config: Any
    execution: Execution
    train: bool

    norm_class: ClassVar[Any]
    """The family's norm."""

    def attention(self) -> Attention:
        """Makes the family's attention."""
        raise NotImplementedError

    def mlp(self) -> Mlp:
        """Makes the family's MLP."""
        raise NotImplementedError

    def norm(self, name: str) -> Any:
        """Makes one of the family's norms."""
        return self.norm_class(self.config.norm_epsilon, self.execution.dtype, name=name)

    def changed(self, branch: str, change: Array) -> Array:
        """Returns what a branch, ``attention`` or ``mlp``, adds; by default what it computed."""
        del branch
        return change

    def turned(self, layer: Array, rotation: Any) -> Any:
        """Returns the rotation of this layer; by default that of all."""
        del layer
        return rotation

    @nn.compact
    def __call__(self, carry: Any, layer: Array, shared: Any) -> tuple[Any, None]:
        """Returns the carry after this layer."""
        (hidden, arrays), (seen, near, used, rotation) = carry, shared
        seen = self._within_window(layer, seen, near)
        slots = None if arrays is None else Slots(arrays[0], arrays[1], layer, used)
        attended, arrays = self.attention()(
            self.norm("attention_norm")(hidden),
            seen,
            rotation=self.turned(layer, rotation),
            memory=slots,
        )
        hidden += self._dropped(self.changed("attention", attended))
        computed = self.mlp()(self.norm("mlp_norm")(hidden))
        hidden += self._dropped(self.changed("mlp", computed))
        return (hidden, arrays), None

    def _within_window(self, layer: Array, seen: Array | None, near: Array | None) -> Array | None:
        """What this layer's tokens may attend to."""
        windowed = self.config.windowed
        if near is seen or near is None or not any(windowed):
            return seen
        if all(windowed):
            return near
        return jnp.where(jnp.asarray(windowed)[layer], near, True if seen is None else seen)

    def _dropped(self, change: Array) -> Array:
        return Dropout(self.config.residual_dropout, self.train)(change)
