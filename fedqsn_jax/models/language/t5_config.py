"""How a T5 is described: its settings, and how its tensors are written down."""

import dataclasses
from typing import Any, ClassVar, Self

from fedqsn_jax.models.language.hugging_face import (
    Settings,
    Tensor,
    Unread,
    embedding,
    linear,
    output_copy,
    token_ids,
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """A T5.

    Attributes:
      family: ``t5``.
      vocab_size: Number of tokens.
      width: Of the hidden states.
      layers: Layers of the encoder.
      decoder_layers: Layers of the decoder.
      heads: Attention heads a layer.
      head_size: Width of a head; ``heads * head_size`` need not be ``width``.
      inner: Width between the MLP's matrices.
      activation: A name in `transformer.ACTIVATIONS`.
      gated: Whether the MLP has a gate (version 1.1).
      buckets: Number of distances that relative positions tell apart.
      max_distance: The distance from which on they are all the same.
      norm_epsilon: Of the root-mean-square norms.
      dropout: Rate everywhere.
      tied: Whether the token embedding is the output layer too.
      scaled_output: Whether hidden states are scaled by ``width ** -0.5`` before the output layer.
      pad_token_id: The padding's id.
      bos_token_id: None: T5 has no such token.
      eos_token_ids: Ids that end a text.
      start_token_id: The decoder's first token.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    decoder_layers: int
    heads: int
    head_size: int
    inner: int
    activation: str = "relu"
    gated: bool = False
    buckets: int = 32
    max_distance: int = 128
    norm_epsilon: float = 1e-6
    dropout: float = 0.1
    tied: bool = True
    scaled_output: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = (1,)
    start_token_id: int = 0

    FAMILIES: ClassVar[tuple[str, ...]] = ("t5",)
    max_length: ClassVar[None] = None
    """T5 has no longest sequence."""

    prefix: ClassVar[str] = ""

    @property
    def ignored(self) -> tuple[Unread, ...]:
        """Tensors that a file may hold and that are not read."""
        copies = [
            Unread(f"{side}.embed_tokens.weight", "shared.weight", copy_of="shared.weight")
            for side in ("encoder", "decoder")
        ]
        # No version of the model has ever read this one.
        unused = Unread("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")
        return (*copies, unused, *output_copy(self.tied))

    def with_dropout(self, rate: float) -> Self:
        """Returns the same with another dropout rate."""
        return dataclasses.replace(self, dropout=rate)

    @classmethod
    def from_settings(cls, family: str, settings: Settings) -> Self:
        """Reads a config.json."""
        settings = settings.in_current_names(_OTHER_NAMES)
        layers = settings.integer("num_layers", 6)
        gated, activation = _read_feed_forward(settings)
        tied = settings.flag("tie_word_embeddings", True)
        return cls(
            family=family,
            vocab_size=settings.integer("vocab_size"),
            width=settings.integer("d_model", 512),
            layers=layers,
            decoder_layers=settings.integer("num_decoder_layers", layers),
            heads=settings.integer("num_heads", 8),
            head_size=settings.integer("d_kv", 64),
            inner=settings.integer("d_ff", 2048),
            activation=activation,
            gated=gated,
            buckets=settings.integer("relative_attention_num_buckets", 32),
            max_distance=settings.integer("relative_attention_max_distance", 128),
            norm_epsilon=settings.number("layer_norm_epsilon", 1e-6),
            dropout=settings.rate("dropout_rate", 0.1),
            tied=tied,
            # Files of older versions say only whether the output layer is tied.
            scaled_output=settings.flag("scale_decoder_outputs", tied),
            pad_token_id=settings.token("pad_token_id", 0),
            eos_token_ids=settings.tokens("eos_token_id", [1]),
            start_token_id=settings.required_token("decoder_start_token_id"),
        )

    def to_settings(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        activation = "gelu" if self.activation == "gelu_new" and self.gated else self.activation
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": self.family,
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size,
            "d_model": self.width,
            "num_layers": self.layers,
            "num_decoder_layers": self.decoder_layers,
            "num_heads": self.heads,
            "d_kv": self.head_size,
            "d_ff": self.inner,
            "feed_forward_proj": f"gated-{activation}" if self.gated else activation,
            "relative_attention_num_buckets": self.buckets,
            "relative_attention_max_distance": self.max_distance,
            "layer_norm_epsilon": self.norm_epsilon,
            "dropout_rate": self.dropout,
            "tie_word_embeddings": self.tied,
            "scale_decoder_outputs": self.scaled_output,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": token_ids(self.eos_token_ids),
            "decoder_start_token_id": self.start_token_id,
        }

    def tensors(self) -> list[Tensor]:
        """Returns how every tensor is written down."""
        found = [embedding("token_embed", "shared")]
        for side, mlp in (("encoder", 1), ("decoder", 2)):
            theirs, ours = f"{side}.block.{{}}.layer", f"{side}/layers"
            own = "attention" if side == "encoder" else "self_attention"
            # The first layer's serves all layers.
            bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
            found += [
                embedding(f"{side}/relative_embed", bias),
                Tensor(f"{side}/final_norm/scale", f"{side}.final_layer_norm.weight"),
                *_attention(f"{ours}/{own}", f"{theirs}.0.SelfAttention"),
                Tensor(f"{ours}/{own}_norm/scale", f"{theirs}.0.layer_norm.weight"),
            ]
            if side == "decoder":
                found += _attention(f"{ours}/cross_attention", f"{theirs}.1.EncDecAttention")
                scale = f"{ours}/cross_attention_norm/scale"
                found.append(Tensor(scale, f"{theirs}.1.layer_norm.weight"))
            dense = f"{theirs}.{mlp}.DenseReluDense"
            matrices = {"up": "wi", "down": "wo"}
            if self.gated:
                matrices = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
            for name, name_there in matrices.items():
                found += linear(f"{ours}/mlp/{name}", f"{dense}.{name_there}", bias=False)
            found.append(Tensor(f"{ours}/mlp_norm/scale", f"{theirs}.{mlp}.layer_norm.weight"))
        return found if self.tied else [*found, *linear("lm_head", "lm_head", bias=False)]


def _attention(ours: str, theirs: str) -> list[Tensor]:
    found = []
    for name, short in {"query": "q", "key": "k", "value": "v", "out": "o"}.items():
        inputs = 2 if name == "out" else 1
        found += linear(f"{ours}/{name}", f"{theirs}.{short}", bias=False, inputs=inputs)
    return found


def _read_feed_forward(settings: Settings) -> tuple[bool, str]:
    """Whether the MLP is gated, and its activation; ``gated-gelu`` means the tanh form."""
    kinds = {"relu": (False, "relu"), "gelu": (False, "gelu"), "gelu_new": (False, "gelu_new")}
    kinds |= {f"gated-{name}": (True, name) for name in ("relu", "silu", "gelu_new")}
    kinds["gated-gelu"] = (True, "gelu_new")
    gated, activation = kinds[settings.choice("feed_forward_proj", "relu", *kinds)]
    settings.agree("is_gated_act", gated)
    settings.agree("dense_act_fn", activation)
    return gated, activation


_OTHER_NAMES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
"""Names that the transformers library takes for these settings too."""
