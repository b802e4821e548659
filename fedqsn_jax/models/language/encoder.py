"""BERT (arXiv 1810.04805; MiniLM is one), RoBERTa (arXiv 1907.11692), DistilBERT: classifiers."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels import gpu_blocks, norm_gpu
from fedqsn_jax.models.kernels.dropout import Dropout, drop, words_of
from fedqsn_jax.models.language.attention import Attention, Prefix
from fedqsn_jax.models.language.cache import positions_of
from fedqsn_jax.models.language.encoder_config import EncoderConfig
from fedqsn_jax.models.language.transformer import (
    ACTIVATIONS,
    Embed,
    Execution,
    Mlp,
    check_length,
    real_tokens,
    stack,
)


class Encoder(nn.Module):
    """Tokens to logits.

    Attributes:
      config: The architecture.
      execution: How it is computed.
    """

    config: EncoderConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        mask: Array | None = None,
        token_types: Array | None = None,
        train: bool = False,
        prefixes: Prefix | None = None,
    ) -> Array:
        """Returns float32 logits ``[rows, classes]``, or ``[rows, width]`` without classes.

        The tokens' last hidden states, float32 ``[rows, length, width]``, are sown as ``last`` in
        the collection ``hidden``.

        Args:
          tokens: int32 ``[rows, length]``.
          mask: bool or integer, the same shape: which tokens are real; None: all are.
          token_types: int32, the same shape; None: all are of type 0. Models without are told
            nothing of them.
          train: Whether dropout acts.
          prefixes: Keys and values of every layer, each tensor with a leading layer axis.

        Raises:
          ValueError: The sequences are longer than the model's positions.
        """
        config, dtype = self.config, self.execution.dtype
        check_length(tokens.shape[1], config.max_length)
        seen = None if mask is None else jnp.expand_dims(mask.astype(bool), (1, 2))
        mask = real_tokens(tokens, mask)

        def embed(entries: int, name: str) -> Embed:
            return Embed(entries, config.width, dtype, config.stddev, name=name)

        hidden = embed(config.vocab_size, "token_embed")(tokens)
        positions = positions_of(mask) + config.first_position
        hidden += embed(config.positions, "position_embed")(positions)
        if config.token_types:
            type_embed = embed(config.token_types, "type_embed")
            if token_types is None:
                hidden += type_embed.repeated(0, tokens.shape)
            else:
                hidden += type_embed(token_types)
        hidden = nn.LayerNorm(config.norm_epsilon, dtype, name="embed_norm")(hidden)
        hidden = Dropout(config.hidden_dropout, train)(hidden)
        layers = stack(_Layer, config.layers, self.execution)
        layers = layers(config, self.execution, train, name="layers")
        (hidden, _), _ = layers((hidden, hidden), prefixes, seen)
        hidden = hidden.astype(jnp.float32)
        self.sow("hidden", "last", hidden)
        return self._classify(hidden, mask, train)

    def _classify(self, hidden: Array, mask: Array, train: bool) -> Array:
        config = self.config
        if config.pooling == "mean":
            counted = jnp.where(mask[..., None], hidden, 0).sum(axis=1)
            pooled = counted / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
        else:
            first = jnp.argmax(mask, axis=1).reshape(-1, 1, 1)
            pooled = jnp.take_along_axis(hidden, first, axis=1)[:, 0]
        if not config.classes:
            return pooled
        return _Classifier(config, train, name="classifier")(pooled)


class _Layer(nn.Module):
    """A layer; hidden states come and go twice: for the residual stream, and for the branch."""

    config: EncoderConfig
    execution: Execution
    train: bool

    @nn.compact
    def __call__(
        self, hidden: tuple[Array, Array], each: Prefix | None, mask: Array | None
    ) -> tuple[tuple[Array, Array], None]:
        config, packed = self.config, self._packed()
        # With it the end of a residual branch is one kernel, from the last bias to the norm.
        for_norms = packed if norm_gpu.fits(config.width, self.execution.dtype) else None

        def part(name: str) -> gpu_blocks.Packed | None:
            return None if packed is None else packed.map(lambda starts: starts[name])

        attention = Attention(
            config.heads,
            config.heads,
            config.width // config.heads,
            self.execution,
            out_bias=for_norms is None,
            rate=config.attention_dropout,
            train=self.train,
            stddev=config.stddev,
            name="attention",
        )
        stream, read = hidden
        attended, _ = attention(read, mask, memory=each, packed=part("attention"))
        last = "attention", "out"
        stream, read = self._added(stream, attended, last, "attention_norm", for_norms)
        mlp = Mlp(
            config.inner,
            config.activation,
            self.execution,
            stddev=config.stddev,
            down_bias=for_norms is None,
            name="mlp",
        )
        changed = mlp(read, part("mlp"))
        return self._added(stream, changed, ("mlp", "down"), "mlp_norm", for_norms), None

    def _packed(self) -> gpu_blocks.Packed | None:
        """Biases and scales, for those kernels that are used; XLA drops what none reads."""
        if self.is_initializing() or not gpu_blocks.applies():
            return None
        params = traverse_util.flatten_dict(self.variables["params"])
        vectors = {path: leaf for path, leaf in params.items() if path[-1] in ("bias", "scale")}
        return gpu_blocks.Packed.of(traverse_util.unflatten_dict(vectors))

    def _added(
        self,
        hidden: Array,
        change: Array,
        last: tuple[str, str],
        norm: str,
        packed: gpu_blocks.Packed | None,
    ) -> tuple[Array, Array]:
        """The norm of the hidden states with a branch's change, which has no bias yet if packed."""
        config = self.config
        rate = config.hidden_dropout if self.train else 0.0
        key = self.make_rng("dropout") if rate else None
        if packed is None:
            change = change if key is None else drop(key, change, rate)
            normed = nn.LayerNorm(config.norm_epsilon, self.execution.dtype, name=norm)
            hidden = normed(hidden + change)
            return hidden, hidden

        def vectors_of(params: Any) -> norm_gpu.Vectors:
            branch, ending = params[last[0]][last[1]], params[norm]
            return norm_gpu.Vectors(branch["bias"], ending["scale"], ending["bias"])

        return norm_gpu.add_and_norm(
            norm_gpu.Branch(config.norm_epsilon, rate),
            gpu_blocks.interpreted(),
            hidden,
            change,
            vectors_of(self.variables["params"]),
            packed.map(vectors_of),
            jnp.zeros(2, jnp.uint32) if key is None else words_of(key),
        )


class _Classifier(nn.Module):
    """The head, in float32: it costs little, and is often new."""

    config: EncoderConfig
    train: bool

    @nn.compact
    def __call__(self, pooled: Array) -> Array:
        config = self.config
        init = nn.initializers.normal(config.stddev)
        if config.pooling == "cls":
            if config.is_roberta:
                pooled = Dropout(config.classifier_dropout, self.train)(pooled)
            pooled = nn.Dense(config.width, kernel_init=init, name="dense")(pooled)
            pooled = ACTIVATIONS[config.head_activation](pooled)
        pooled = Dropout(config.classifier_dropout, self.train)(pooled)
        return nn.Dense(config.classes, kernel_init=init, name="out")(pooled)
