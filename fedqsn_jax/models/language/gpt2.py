"""GPT-2 (Radford et al., 2019)."""

import dataclasses
from typing import Any, ClassVar, Self

import numpy as np
from flax import linen as nn

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels.dropout import Dropout
from fedqsn_jax.models.language.attention import Attention
from fedqsn_jax.models.language.decoder import CausalLayer, CausalModel
from fedqsn_jax.models.language.hugging_face import (
    Settings,
    Tensor,
    Unread,
    embedding,
    layer_norm,
    linear,
    output_copy,
    token_ids,
)
from fedqsn_jax.models.language.transformer import Embed, Mlp


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """A GPT-2.

    Attributes:
      family: ``gpt2``.
      vocab_size: Number of tokens.
      width: Of the hidden states.
      layers: Number of layers.
      heads: Attention heads a layer.
      inner: Width between the MLP's matrices.
      activation: A name in `transformer.ACTIVATIONS`.
      positions: Rows of the position table.
      norm_epsilon: Of the layer norms.
      embedding_dropout: Rate after the embeddings.
      residual_dropout: Rate in the residual branches.
      attention_dropout: Rate of the attention's probabilities.
      stddev: Of initial kernels.
      tied: Whether the token embedding is the output layer too.
      pad_token_id: The padding's id, where the file names one.
      bos_token_id: The id of the first token.
      eos_token_ids: Ids that end a text.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    inner: int
    activation: str = "gelu_new"
    positions: int = 1024
    norm_epsilon: float = 1e-5
    embedding_dropout: float = 0.1
    residual_dropout: float = 0.1
    attention_dropout: float = 0.1
    stddev: float = 0.02
    tied: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    windowed: ClassVar[tuple[bool, ...]] = ()
    """No layer has a window."""

    FAMILIES: ClassVar[tuple[str, ...]] = ("gpt2",)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of {self.heads} heads")

    @property
    def kv_heads(self) -> int:
        """Key and value heads a layer."""
        return self.heads

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def max_length(self) -> int:
        """The longest sequence."""
        return self.positions

    @property
    def prefix(self) -> str:
        """What names of tensors begin with, where the file has a head."""
        return "transformer."

    @property
    def ignored(self) -> tuple[Unread, ...]:
        """Tensors that a file may hold and that are not read."""
        causal = Unread("h.*.attn.bias", "a causal mask", _is_causal_mask)
        masked = Unread("h.*.attn.masked_bias", "-1e4 or less", lambda it: bool((it <= -1e4).all()))
        return (causal, masked, *output_copy(self.tied))

    def with_dropout(self, rate: float) -> Self:
        """Returns the same with one dropout rate everywhere."""
        return dataclasses.replace(
            self, embedding_dropout=rate, residual_dropout=rate, attention_dropout=rate
        )

    @classmethod
    def from_settings(cls, family: str, settings: Settings) -> Self:
        """Reads a config.json."""
        settings = settings.in_current_names(_OTHER_NAMES)
        settings.require("scale_attn_weights", True)
        settings.require("scale_attn_by_inverse_layer_idx", False)
        settings.require("add_cross_attention", False)
        width = settings.integer("n_embd", 768)
        positions = settings.integer("n_positions", 1024)
        settings.agree("n_ctx", positions)
        return cls(
            family=family,
            vocab_size=settings.integer("vocab_size"),
            width=width,
            layers=settings.integer("n_layer", 12),
            heads=settings.integer("n_head", 12),
            inner=settings.integer("n_inner", 4 * width),
            activation=settings.activation("activation_function", "gelu_new"),
            positions=positions,
            norm_epsilon=settings.number("layer_norm_epsilon", 1e-5),
            embedding_dropout=settings.rate("embd_pdrop", 0.1),
            residual_dropout=settings.rate("resid_pdrop", 0.1),
            attention_dropout=settings.rate("attn_pdrop", 0.1),
            stddev=settings.number("initializer_range", 0.02),
            tied=settings.flag("tie_word_embeddings", True),
            pad_token_id=settings.token("pad_token_id"),
            bos_token_id=settings.token("bos_token_id", 50256),
            eos_token_ids=settings.tokens("eos_token_id", [50256]),
        )

    def to_settings(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "n_embd": self.width,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_inner": self.inner,
            "activation_function": self.activation,
            "n_positions": self.positions,
            "layer_norm_epsilon": self.norm_epsilon,
            "embd_pdrop": self.embedding_dropout,
            "resid_pdrop": self.residual_dropout,
            "attn_pdrop": self.attention_dropout,
            "initializer_range": self.stddev,
            "tie_word_embeddings": self.tied,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": token_ids(self.eos_token_ids),
        }

    def tensors(self) -> list[Tensor]:
        """Returns how every tensor is written down."""
        base, layer, ours = self.prefix, f"{self.prefix}h.{{}}.", "layers"
        found = [
            embedding("token_embed", f"{base}wte"),
            embedding("position_embed", f"{base}wpe"),
            *layer_norm("final_norm", f"{base}ln_f"),
            *layer_norm(f"{ours}/attention_norm", f"{layer}ln_1"),
            *layer_norm(f"{ours}/mlp_norm", f"{layer}ln_2"),
        ]
        # These kernels are written as we have them, [in, out], and query, key and value as one.
        for part, name in enumerate(("query", "key", "value")):
            place, fused = f"{ours}/attention/{name}", f"{layer}attn.c_attn"
            found += [
                Tensor(f"{place}/kernel", f"{fused}.weight", 1, part=part, parts=(1, 1, 1)),
                Tensor(f"{place}/bias", f"{fused}.bias", part=part, parts=(1, 1, 1)),
            ]
        for place, name, inputs in (
            ("attention/out", "attn.c_proj", 2),
            ("mlp/up", "mlp.c_fc", 1),
            ("mlp/down", "mlp.c_proj", 1),
        ):
            found += [
                Tensor(f"{ours}/{place}/kernel", f"{layer}{name}.weight", inputs),
                Tensor(f"{ours}/{place}/bias", f"{layer}{name}.bias"),
            ]
        return found if self.tied else [*found, *linear("lm_head", "lm_head", bias=False)]


def _is_causal_mask(array: np.ndarray) -> bool:
    length = array.shape[-1] if array.ndim else 0
    return bool(array.size == length**2 and (array.reshape(length, -1) == np.tri(length)).all())


_OTHER_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Names that the transformers library takes for these settings too."""


class _Layer(CausalLayer):
    norm_class = nn.LayerNorm

    def attention(self) -> Attention:
        config = self.config
        return Attention(
            config.heads,
            config.heads,
            config.head_size,
            self.execution,
            rate=config.attention_dropout,
            train=self.train,
            stddev=config.stddev,
            causal=True,
            name="attention",
        )

    def mlp(self) -> Mlp:
        config = self.config
        return Mlp(
            config.inner, config.activation, self.execution, stddev=config.stddev, name="mlp"
        )


class GPT2(CausalModel):
    """A GPT-2; see `CausalModel`."""

    layer = _Layer

    def placed(self, hidden: Array, positions: Array, train: bool) -> tuple[Array, None]:
        """Adds the positions' embeddings."""
        config = self.config
        table = Embed(
            config.positions,
            config.width,
            self.execution.dtype,
            config.stddev,
            name="position_embed",
        )
        return Dropout(config.embedding_dropout, train)(hidden + table(positions)), None
