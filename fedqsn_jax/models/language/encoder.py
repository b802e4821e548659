"""BERT (arXiv 1810.04805; MiniLM is one) and RoBERTa (arXiv 1907.11692), as classifiers."""

import dataclasses
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels import gpu_blocks, norm_gpu
from fedqsn_jax.models.kernels.dropout import Dropout, drop, words_of
from fedqsn_jax.models.language.attention import Attention, Prefix
from fedqsn_jax.models.language.cache import positions_of
from fedqsn_jax.models.language.hugging_face import (
    Settings,
    Tensor,
    embedding,
    layer_norm,
    linear,
    token_ids,
)
from fedqsn_jax.models.language.transformer import (
    Embed,
    Execution,
    Mlp,
    check_length,
    real_tokens,
    stack,
)

POOLINGS = ("cls", "mean")


def _weights_and_biases(*layers: str) -> tuple[str, ...]:
    return tuple(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))


_HEADS = {
    "bert": (
        *_weights_and_biases("pooler.dense", "classifier", "cls.seq_relationship"),
        *_weights_and_biases("cls.predictions.decoder", "cls.predictions.transform.dense"),
        *_weights_and_biases("cls.predictions.transform.LayerNorm"),
        "cls.predictions.bias",
    ),
    "roberta": (
        *_weights_and_biases("pooler.dense", "classifier.dense", "classifier.out_proj"),
        *_weights_and_biases("lm_head.decoder", "lm_head.dense", "lm_head.layer_norm"),
        "lm_head.bias",
    ),
}
"""Tensors of the heads of each family, as the transformers library knows them."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder with a classification head.

    Attributes:
      family: ``bert`` or ``roberta``.
      vocab_size: Number of tokens.
      width: Of the hidden states.
      layers: Number of layers.
      heads: Attention heads a layer.
      inner: Width between the MLP's matrices.
      activation: A name in `transformer.ACTIVATIONS`.
      positions: Rows of the position table.
      token_types: Rows of the token-type table.
      norm_epsilon: Of the layer norms.
      hidden_dropout: Rate after embeddings and in the residual branches.
      attention_dropout: Rate of the attention's probabilities.
      classifier_dropout: Rate in the head.
      stddev: Of initial kernels.
      pad_token_id: The padding's id.
      bos_token_id: The id of the first token, where the file names one.
      eos_token_ids: Ids that end a text, where the file names them.
      classes: Number of logits; 0: no head, the outputs are the pooled hidden states.
      pooling: ``cls``: the first token, through a dense layer with tanh, as the family's own
        classifiers do; ``mean``: the mean over real tokens.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    inner: int
    activation: str = "gelu"
    positions: int = 512
    token_types: int = 2
    norm_epsilon: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    stddev: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    classes: int = 2
    pooling: str = "cls"

    FAMILIES: ClassVar[tuple[str, ...]] = ("bert", "roberta")

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling = {self.pooling!r}: allowed are {', '.join(POOLINGS)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of {self.heads} heads")

    @property
    def first_position(self) -> int:
        """Where real tokens' positions begin: RoBERTa's follow the padding's id."""
        return (self.pad_token_id or 0) + 1 if self.family == "roberta" else 0

    @property
    def max_length(self) -> int:
        """The longest sequence."""
        return self.positions - self.first_position

    @property
    def prefix(self) -> str:
        """What names of tensors begin with, where the file has a head."""
        return f"{self.family}."

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of tensors that a file may hold and that are not read.

        These are parts of a classification head that another pooling does without, and the heads
        of pre-training.
        """
        return ("embeddings.position_ids", *_HEADS[self.family])

    @property
    def architecture(self) -> str:
        """The transformers library's class that reads what is written."""
        name = {"bert": "Bert", "roberta": "Roberta"}[self.family]
        whole = self.classes and self.pooling == "cls"
        return name + ("ForSequenceClassification" if whole else "Model")

    @property
    def unread(self) -> tuple[str, ...]:
        """Names of written tensors that this class has no place for: a classifier of means."""
        if self.architecture.endswith("ForSequenceClassification"):
            return ()
        return tuple(each.name for each in self.tensors() if each.path.startswith("classifier/"))

    def with_dropout(self, rate: float) -> Self:
        """Returns the same with one dropout rate everywhere."""
        return dataclasses.replace(
            self, hidden_dropout=rate, attention_dropout=rate, classifier_dropout=rate
        )

    @classmethod
    def from_settings(cls, family: str, settings: Settings) -> Self:
        """Reads a config.json."""
        settings.require("position_embedding_type", "absolute")
        settings.require("is_decoder", False)
        settings.require("add_cross_attention", False)
        hidden_dropout = settings.rate("hidden_dropout_prob", 0.1)
        labels = len(settings.section("id2label"))
        return cls(
            family=family,
            vocab_size=settings.integer("vocab_size"),
            width=settings.integer("hidden_size"),
            layers=settings.integer("num_hidden_layers"),
            heads=settings.integer("num_attention_heads"),
            inner=settings.integer("intermediate_size"),
            activation=settings.activation("hidden_act", "gelu"),
            positions=settings.integer("max_position_embeddings"),
            token_types=settings.integer("type_vocab_size", 2),
            norm_epsilon=settings.number("layer_norm_eps", 1e-12),
            hidden_dropout=hidden_dropout,
            attention_dropout=settings.rate("attention_probs_dropout_prob", 0.1),
            classifier_dropout=settings.rate("classifier_dropout", hidden_dropout),
            stddev=settings.number("initializer_range", 0.02),
            pad_token_id=settings.token("pad_token_id", 1 if family == "roberta" else 0),
            bos_token_id=settings.token("bos_token_id"),
            eos_token_ids=settings.tokens("eos_token_id"),
            classes=labels or settings.integer("num_labels", 2),
            pooling=settings.choice("pooling", "cls", *POOLINGS),
        )

    def to_settings(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        names = {str(index): f"LABEL_{index}" for index in range(self.classes)}
        return {
            "architectures": [self.architecture],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.inner,
            "hidden_act": self.activation,
            "max_position_embeddings": self.positions,
            "type_vocab_size": self.token_types,
            "layer_norm_eps": self.norm_epsilon,
            "hidden_dropout_prob": self.hidden_dropout,
            "attention_probs_dropout_prob": self.attention_dropout,
            "classifier_dropout": self.classifier_dropout,
            "initializer_range": self.stddev,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": token_ids(self.eos_token_ids),
            "pooling": self.pooling,
        } | (
            {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}} if names else {}
        )

    def tensors(self) -> list[Tensor]:
        """Returns how every tensor is written down."""
        base, layer, ours = self.prefix, f"{self.prefix}encoder.layer.{{}}.", "layers"
        found = [
            embedding("token_embed", f"{base}embeddings.word_embeddings"),
            embedding("position_embed", f"{base}embeddings.position_embeddings"),
            embedding("type_embed", f"{base}embeddings.token_type_embeddings"),
            *layer_norm("embed_norm", f"{base}embeddings.LayerNorm"),
            *linear(f"{ours}/attention/query", f"{layer}attention.self.query"),
            *linear(f"{ours}/attention/key", f"{layer}attention.self.key"),
            *linear(f"{ours}/attention/value", f"{layer}attention.self.value"),
            *linear(f"{ours}/attention/out", f"{layer}attention.output.dense", inputs=2),
            *layer_norm(f"{ours}/attention_norm", f"{layer}attention.output.LayerNorm"),
            *linear(f"{ours}/mlp/up", f"{layer}intermediate.dense"),
            *linear(f"{ours}/mlp/down", f"{layer}output.dense"),
            *layer_norm(f"{ours}/mlp_norm", f"{layer}output.LayerNorm"),
        ]
        if not self.classes:
            return found
        roberta = self.family == "roberta"
        if self.pooling == "cls":
            dense = "classifier.dense" if roberta else f"{base}pooler.dense"
            found += linear("classifier/dense", dense, drawn=True)
        out = "classifier.out_proj" if roberta else "classifier"
        return found + linear("classifier/out", out, drawn=True)


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
          token_types: int32, the same shape; None: all are of type 0.
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
        attended, _ = attention(read, mask, prefix=each, packed=part("attention"))
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
            if config.family == "roberta":
                pooled = Dropout(config.classifier_dropout, self.train)(pooled)
            pooled = jnp.tanh(nn.Dense(config.width, kernel_init=init, name="dense")(pooled))
        pooled = Dropout(config.classifier_dropout, self.train)(pooled)
        return nn.Dense(config.classes, kernel_init=init, name="out")(pooled)
