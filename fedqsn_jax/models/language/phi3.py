"""Phi-3 and Phi-4 (arXiv 2404.14219, 2412.08905): LLaMAs whose matrices are written down fused."""

import dataclasses
from typing import Any, ClassVar, Self

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels.dropout import Dropout
from fedqsn_jax.models.language.hugging_face import (
    Settings,
    Tensor,
    embedding,
    linear,
    token_ids,
)
from fedqsn_jax.models.language.llama import Llama, LlamaConfig
from fedqsn_jax.models.language.rotary_positions import LongScaling, rope_frequencies, rotation_of
from fedqsn_jax.models.language.rotary_settings import read_long_rope, rope_settings


@dataclasses.dataclass(frozen=True)
class Phi3Config(LlamaConfig):
    """A Phi-3, or a Phi-4, which is written down as one.

    Attributes:
      turned_share: Which share of a head's entries rotary positions turn.
      embedding_dropout: Rate after the embeddings.
      residual_dropout: Rate in the residual branches.
    """

    turned_share: float = 1.0
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0  # type: ignore[misc]  # A constant of LLaMA's.

    FAMILIES: ClassVar[tuple[str, ...]] = ("phi3",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turned % 2 or not 0 < self.turned <= self.head_size:
            raise ValueError(f"partial_rotary_factor = {self.turned_share}: turns {self.turned}")
        scaling = self.rope_scaling
        if isinstance(scaling, LongScaling) and len(scaling.short) != self.turned // 2:
            raise ValueError(
                f"short_factor has {len(scaling.short)} numbers, a head turns {self.turned // 2}"
            )

    @property
    def turned(self) -> int:
        """How many entries of a head are turned."""
        return int(self.head_size * self.turned_share)

    @property
    def max_length(self) -> int:
        """The longest sequence: for longer ones other factors hold, which are not computed here."""
        scaling = self.rope_scaling
        if isinstance(scaling, LongScaling):
            return min(self.positions, scaling.original_length)
        return self.positions

    def with_dropout(self, rate: float) -> Self:
        """Returns the same with one dropout rate everywhere."""
        return dataclasses.replace(
            self, attention_dropout=rate, embedding_dropout=rate, residual_dropout=rate
        )

    @classmethod
    def from_settings(cls, family: str, settings: Settings) -> Self:
        """Reads a config.json."""
        width, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
        positions = settings.integer("max_position_embeddings", 4096)
        base, scaling, share = read_long_rope(settings, positions)
        layers = settings.integer("num_hidden_layers")
        window = settings.optional_integer("sliding_window", None)
        head_size = settings.optional_integer("head_dim", None) or width // heads
        return cls(
            family=family,
            vocab_size=settings.integer("vocab_size"),
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=settings.optional_integer("num_key_value_heads", None) or heads,
            head_size=head_size,
            inner=settings.integer("intermediate_size"),
            activation=settings.activation("hidden_act", "silu"),
            positions=positions,
            norm_epsilon=settings.number("rms_norm_eps", 1e-5),
            rope_base=base,
            rope_scaling=scaling,
            turned_share=share,
            window=window,
            windowed=(True,) * layers if window else (),
            attention_dropout=settings.rate("attention_dropout", 0.0),
            embedding_dropout=settings.rate("embd_pdrop", 0.0),
            residual_dropout=settings.rate("resid_pdrop", 0.0),
            stddev=settings.number("initializer_range", 0.02),
            tied=settings.flag("tie_word_embeddings", False),
            pad_token_id=settings.token("pad_token_id", 32000),
            bos_token_id=settings.token("bos_token_id", 1),
            eos_token_ids=settings.tokens("eos_token_id", (32000,)),
        )

    def to_settings(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        scaling = self.rope_scaling
        original = scaling.original_length if isinstance(scaling, LongScaling) else self.positions
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.inner,
            "hidden_act": self.activation,
            "max_position_embeddings": self.positions,
            "original_max_position_embeddings": original,
            "partial_rotary_factor": self.turned_share,
            "rms_norm_eps": self.norm_epsilon,
            "rope_theta": self.rope_base,
            "rope_scaling": rope_settings(scaling),
            "sliding_window": self.window,
            "attention_dropout": self.attention_dropout,
            "embd_pdrop": self.embedding_dropout,
            "resid_pdrop": self.residual_dropout,
            "initializer_range": self.stddev,
            "tie_word_embeddings": self.tied,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": token_ids(self.eos_token_ids),
        }

    def tensors(self) -> list[Tensor]:
        """Returns how every tensor is written down."""
        base, layer, ours = self.prefix, f"{self.prefix}layers.{{}}.", "layers"
        fused, gated = f"{layer}self_attn.qkv_proj", f"{layer}mlp.gate_up_proj"
        projections = self.heads, self.kv_heads, self.kv_heads
        found = [
            embedding("token_embed", f"{base}embed_tokens"),
            Tensor("final_norm/scale", f"{base}norm.weight"),
            Tensor(f"{ours}/attention_norm/scale", f"{layer}input_layernorm.weight"),
            Tensor(f"{ours}/mlp_norm/scale", f"{layer}post_attention_layernorm.weight"),
            *linear(f"{ours}/attention/out", f"{layer}self_attn.o_proj", False, inputs=2),
            *linear(f"{ours}/mlp/down", f"{layer}mlp.down_proj", False),
        ]
        for part, name in enumerate(("query", "key", "value")):
            path = f"{ours}/attention/{name}"
            found += linear(path, fused, False, part=part, parts=projections)
        for part, name in enumerate(("gate", "up")):
            found += linear(f"{ours}/mlp/{name}", gated, False, part=part, parts=(1, 1))
        return found if self.tied else [*found, *linear("lm_head", "lm_head", bias=False)]


class Phi3(Llama):
    """A Phi-3; see `CausalModel`."""

    def placed(self, hidden: Array, positions: Array, train: bool) -> tuple[Array, Any]:
        """Drops of the embeddings, and turns a part of queries and keys in the layers."""
        config = self.config
        frequencies = rope_frequencies(config.turned, config.rope_base, config.rope_scaling)
        hidden = Dropout(config.embedding_dropout, train)(hidden)
        return hidden, rotation_of(positions, frequencies, config.rope_scaling)
