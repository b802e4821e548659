"""T5 (arXiv 1910.10683), its version 1.1 and Flan-T5: encoder, decoder, relative positions."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from fedqsn_jax.core.types import Array, Params
from fedqsn_jax.models.kernels.dropout import Dropout
from fedqsn_jax.models.language.attention import Attention, Slots
from fedqsn_jax.models.language.cache import Cache, attendable
from fedqsn_jax.models.language.relative_positions import RelativeBias
from fedqsn_jax.models.language.t5_config import T5Config
from fedqsn_jax.models.language.transformer import Embed, Execution, Head, Mlp, real_tokens, stack


@struct.dataclass
class T5Cache:
    """What a decoder has seen, and what its layers make of the encoder's states.

    Attributes:
      own: The tokens that the decoder has seen.
      key: ``[layers, rows, length, heads, head size]``, of the encoder's states.
      value: The same.
      mask: bool ``[rows, length]``: which of the encoder's tokens are real.
    """

    own: Cache
    key: Array
    value: Array
    mask: Array

    def take_rows(self, rows: Array) -> "T5Cache":
        """Gathers rows, int32 ``[any]``, which may repeat."""
        return T5Cache(
            own=self.own.take_rows(rows),
            key=jnp.take(self.key, rows, axis=1),
            value=jnp.take(self.value, rows, axis=1),
            mask=jnp.take(self.mask, rows, axis=0),
        )


def remember(params: Params, encoded: Array, mask: Array, own: Cache) -> T5Cache:
    """Computes once what cross-attention needs at every step.

    Args:
      params: The model's parameters.
      encoded: The encoder's states ``[rows, length, width]``.
      mask: bool ``[rows, length]``: which of its tokens are real.
      own: The decoder's own cache.
    """
    kernels = params["decoder"]["layers"]["cross_attention"]
    key, value = (
        jnp.einsum("rsw,lwhd->lrshd", encoded, kernels[name]["kernel"].astype(encoded.dtype))
        for name in ("key", "value")
    )
    return T5Cache(own, key, value, mask)


class T5(nn.Module):
    """Tokens and target tokens to logits.

    Attributes:
      config: The architecture.
      execution: How it is computed.
    """

    config: T5Config
    execution: Execution = Execution()

    def setup(self) -> None:
        """Makes the parts that several methods share."""
        config, dtype = self.config, self.execution.dtype
        self.token_embed = Embed(config.vocab_size, config.width, dtype, 1.0)
        self.encoder = _Encoder(config, self.execution)
        self.decoder = _Decoder(config, self.execution)
        if not config.tied:
            self.lm_head = Head(config.vocab_size, dtype, config.width**-0.5)

    def __call__(
        self,
        tokens: Array,
        mask: Array | None,
        target_tokens: Array,
        train: bool = False,
    ) -> Array:
        """Returns float32 logits ``[rows, target length, vocab]`` of the target tokens.

        Args:
          tokens: int32 ``[rows, length]``, for the encoder.
          mask: bool or integer, the same shape: which tokens are real; None: all are.
          target_tokens: int32 ``[rows, target length]``, padded on the right, if at all. The
            decoder reads them behind its start token, the last one left out.
          train: Whether dropout acts.
        """
        mask = real_tokens(tokens, mask)
        start = jnp.full_like(target_tokens[:, :1], self.config.start_token_id)
        inputs = jnp.concatenate([start, target_tokens[:, :-1]], axis=1)
        encoded = self.encode(tokens, mask, train)
        hidden, _ = self.decoder(self.token_embed(inputs), encoded, mask, None, train)
        return self._logits(hidden)

    def encode(self, tokens: Array, mask: Array, train: bool = False) -> Array:
        """Returns the encoder's states ``[rows, length, width]``; ``mask`` is bool."""
        return self.encoder(self.token_embed(tokens), mask, train)

    def decode(self, tokens: Array, cache: T5Cache) -> tuple[Array, T5Cache]:
        """Returns logits ``[rows, length, vocab]`` after new decoder tokens ``[rows, length]``."""
        own: Any
        hidden, own = self.decoder(self.token_embed(tokens), None, cache.mask, cache, False)
        return self._logits(hidden), dataclasses.replace(cache, own=own)

    def _logits(self, hidden: Array) -> Array:
        if self.config.scaled_output:
            hidden *= self.config.width**-0.5
        return self.token_embed.attend(hidden) if self.config.tied else self.lm_head(hidden)


class _Encoder(nn.Module):
    config: T5Config
    execution: Execution

    @nn.compact
    def __call__(self, hidden: Array, mask: Array, train: bool) -> Array:
        config = self.config
        positions = jnp.arange(hidden.shape[1], dtype=jnp.int32)
        bias = _relative_bias(config, bidirectional=True)(positions, positions)
        hidden = Dropout(config.dropout, train)(hidden)
        layers = stack(_EncoderLayer, config.layers, self.execution)
        layers = layers(config, self.execution, train, name="layers")
        hidden, _ = layers(hidden, None, (jnp.expand_dims(mask, (1, 2)), bias))
        hidden = nn.RMSNorm(config.norm_epsilon, self.execution.dtype, name="final_norm")(hidden)
        return Dropout(config.dropout, train)(hidden)


class _Decoder(nn.Module):
    config: T5Config
    execution: Execution

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        encoded: Array | None,
        encoded_mask: Array,
        cache: T5Cache | None,
        train: bool,
    ) -> tuple[Array, Cache | None]:
        config, length = self.config, hidden.shape[1]
        own, arrays, used = None if cache is None else cache.own, None, jnp.int32(0)
        positions = slots = jnp.arange(length, dtype=jnp.int32)
        if own is not None:
            arrays, used = own.arrays, own.used
            positions += used
            slots = jnp.arange(own.mask.shape[1], dtype=jnp.int32)
        seen, own = attendable(jnp.ones(hidden.shape[:2], bool), own, padded=False)
        bias = _relative_bias(config, bidirectional=False)(positions, slots)
        hidden = Dropout(config.dropout, train)(hidden)
        layers = stack(_DecoderLayer, config.decoder_layers, self.execution)
        layers = layers(config, self.execution, train, name="layers")
        numbers = jnp.arange(config.decoder_layers, dtype=jnp.int32)
        each = (numbers, None if cache is None else (cache.key, cache.value))
        shared = (seen, bias, used, encoded, jnp.expand_dims(encoded_mask, (1, 2)))
        (hidden, arrays), _ = layers((hidden, arrays), each, shared)
        if own is not None:
            own = own.written(arrays, length)
        hidden = nn.RMSNorm(config.norm_epsilon, self.execution.dtype, name="final_norm")(hidden)
        return Dropout(config.dropout, train)(hidden), own


class _Layer(nn.Module):
    """What layers of encoder and decoder share; every branch is normed before it."""

    config: T5Config
    execution: Execution
    train: bool

    def attention(self, name: str, causal: bool = False) -> Attention:
        config = self.config
        return Attention(
            config.heads,
            config.heads,
            config.head_size,
            self.execution,
            biases=False,
            out_bias=False,
            rate=config.dropout,
            train=self.train,
            stddev=config.width**-0.5,
            query_stddev=(config.width * config.head_size) ** -0.5,
            scale=1.0,
            causal=causal,
            name=name,
        )

    def mlp(self) -> Mlp:
        config = self.config
        return Mlp(
            config.inner,
            config.activation,
            self.execution,
            gated=config.gated,
            biases=False,
            rate=config.dropout,
            train=self.train,
            stddev=config.width**-0.5,
            down_stddev=config.inner**-0.5,
            name="mlp",
        )

    def norm(self, name: str) -> nn.RMSNorm:
        return nn.RMSNorm(self.config.norm_epsilon, self.execution.dtype, name=name)

    def dropped(self, values: Array) -> Array:
        return Dropout(self.config.dropout, self.train)(values)


class _EncoderLayer(_Layer):
    @nn.compact
    def __call__(self, hidden: Array, each: None, shared: Any) -> tuple[Array, None]:
        mask, bias = shared
        attended, _ = self.attention("attention")(
            self.norm("attention_norm")(hidden), mask, bias=bias
        )
        hidden += self.dropped(attended)
        hidden += self.dropped(self.mlp()(self.norm("mlp_norm")(hidden)))
        return hidden, None


class _DecoderLayer(_Layer):
    @nn.compact
    def __call__(self, carry: Any, each: Any, shared: Any) -> tuple[Any, None]:
        (hidden, arrays), (layer, key_value) = carry, each
        seen, bias, used, encoded, encoded_mask = shared
        slots = None if arrays is None else Slots(arrays[0], arrays[1], layer, used)
        attended, arrays = self.attention("self_attention", causal=True)(
            self.norm("self_attention_norm")(hidden), seen, bias=bias, memory=slots
        )
        hidden += self.dropped(attended)
        attended, _ = self.attention("cross_attention")(
            self.norm("cross_attention_norm")(hidden),
            encoded_mask,
            source=encoded if key_value is None else key_value,
        )
        hidden += self.dropped(attended)
        hidden += self.dropped(self.mlp()(self.norm("mlp_norm")(hidden)))
        return (hidden, arrays), None


def _relative_bias(config: T5Config, bidirectional: bool) -> RelativeBias:
    return RelativeBias(
        config.heads,
        bidirectional,
        config.buckets,
        config.max_distance,
        stddev=config.width**-0.5,
        name="relative_embed",
    )
