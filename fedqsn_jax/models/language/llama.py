"""LLaMA (arXiv 2302.13971, 2407.21783) and Qwen2 (arXiv 2407.10671), which adds biases."""

import dataclasses
from typing import Any, ClassVar, Self

import numpy as np
from flax import linen as nn

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.language.attention import Attention
from fedqsn_jax.models.language.decoder import CausalLayer, CausalModel
from fedqsn_jax.models.language.hugging_face import (
    Settings,
    Tensor,
    Unread,
    embedding,
    linear,
    output_copy,
    token_ids,
)
from fedqsn_jax.models.language.rotary_positions import RopeScaling, rope_frequencies, rotation_of
from fedqsn_jax.models.language.transformer import Mlp


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A LLaMA or Qwen2.

    Attributes:
      family: ``llama`` or ``qwen2``.
      vocab_size: Number of tokens.
      width: Of the hidden states.
      layers: Number of layers.
      heads: Query heads a layer.
      kv_heads: Key and value heads a layer; a divisor of ``heads``.
      head_size: Width of a head.
      inner: Width between the MLP's matrices.
      activation: A name in `transformer.ACTIVATIONS`.
      positions: The longest sequence.
      norm_epsilon: Of the root-mean-square norms.
      rope_base: Base of the rotary frequencies.
      rope_scaling: LLaMA 3's stretching of them, or None.
      biases: Whether query, key and value have biases.
      out_bias: Whether the attention's output has one.
      mlp_biases: Whether the MLP's matrices have.
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
    kv_heads: int
    head_size: int
    inner: int
    activation: str = "silu"
    positions: int = 2048
    norm_epsilon: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    biases: bool = False
    out_bias: bool = False
    mlp_biases: bool = False
    attention_dropout: float = 0.0
    stddev: float = 0.02
    tied: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    residual_dropout: ClassVar[float] = 0.0
    """LLaMA drops nothing in the residual branches."""

    FAMILIES: ClassVar[tuple[str, ...]] = ("llama", "qwen2")

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are no multiple of {self.kv_heads} key heads")
        if self.head_size % 2:
            raise ValueError(f"head_size = {self.head_size}: rotary positions need an even one")

    @property
    def max_length(self) -> int:
        """The longest sequence."""
        return self.positions

    @property
    def prefix(self) -> str:
        """What names of tensors begin with, where the file has a head."""
        return "model."

    @property
    def ignored(self) -> tuple[Unread, ...]:
        """Tensors that a file may hold and that are not read."""
        ours = rope_frequencies(self.head_size, self.rope_base, self.rope_scaling)
        # Files of narrow dtypes hold them rounded.
        frequencies = Unread(
            "layers.*.self_attn.rotary_emb.inv_freq",
            "the frequencies that config.json's rotary settings give",
            lambda it: it.size == len(ours) and np.allclose(it.ravel(), ours, rtol=0.01, atol=0),
        )
        return (frequencies, *output_copy(self.tied))

    def with_dropout(self, rate: float) -> Self:
        """Returns the same with one dropout rate everywhere: LLaMA has one place for it."""
        return dataclasses.replace(self, attention_dropout=rate)

    @classmethod
    def from_settings(cls, family: str, settings: Settings) -> Self:
        """Reads a config.json."""
        settings.require("use_sliding_window", False)
        qwen = family == "qwen2"
        width, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
        rope_base, rope_scaling = _read_rope(settings)
        biases = qwen or settings.flag("attention_bias", False)
        return cls(
            family=family,
            vocab_size=settings.integer("vocab_size"),
            width=width,
            layers=settings.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=settings.integer("num_key_value_heads", heads),
            head_size=settings.integer("head_dim", width // heads),
            inner=settings.integer("intermediate_size"),
            activation=settings.activation("hidden_act", "silu"),
            positions=settings.integer("max_position_embeddings", 32768 if qwen else 2048),
            norm_epsilon=settings.number("rms_norm_eps", 1e-6),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            biases=biases,
            out_bias=biases and not qwen,
            mlp_biases=settings.flag("mlp_bias", False),
            attention_dropout=settings.rate("attention_dropout", 0.0),
            stddev=settings.number("initializer_range", 0.02),
            tied=settings.flag("tie_word_embeddings", False),
            pad_token_id=settings.token("pad_token_id"),
            bos_token_id=settings.token("bos_token_id", None if qwen else 1),
            eos_token_ids=settings.tokens("eos_token_id", [] if qwen else [2]),
        )

    def to_settings(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        scaling = self.rope_scaling and {
            "rope_type": "llama3",
            "factor": self.rope_scaling.factor,
            "low_freq_factor": self.rope_scaling.low_frequency_factor,
            "high_freq_factor": self.rope_scaling.high_frequency_factor,
            "original_max_position_embeddings": self.rope_scaling.original_length,
        }
        biases = {} if self.family == "qwen2" else {"attention_bias": self.biases}
        return biases | {
            "architectures": [{"llama": "Llama", "qwen2": "Qwen2"}[self.family] + "ForCausalLM"],
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
            "rms_norm_eps": self.norm_epsilon,
            "rope_theta": self.rope_base,
            "rope_scaling": scaling,
            "mlp_bias": self.mlp_biases,
            "attention_dropout": self.attention_dropout,
            "initializer_range": self.stddev,
            "tie_word_embeddings": self.tied,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": token_ids(self.eos_token_ids),
        }

    def tensors(self) -> list[Tensor]:
        """Returns how every tensor is written down."""
        base, layer, ours = self.prefix, f"{self.prefix}layers.{{}}.", "layers"

        def norm(path: str, name: str) -> Tensor:
            return Tensor(f"{path}/scale", f"{name}.weight")

        attention, theirs = f"{ours}/attention", f"{layer}self_attn"
        found = [
            embedding("token_embed", f"{base}embed_tokens"),
            norm("final_norm", f"{base}norm"),
            norm(f"{ours}/attention_norm", f"{layer}input_layernorm"),
            norm(f"{ours}/mlp_norm", f"{layer}post_attention_layernorm"),
            *linear(f"{attention}/query", f"{theirs}.q_proj", self.biases),
            *linear(f"{attention}/key", f"{theirs}.k_proj", self.biases),
            *linear(f"{attention}/value", f"{theirs}.v_proj", self.biases),
            *linear(f"{attention}/out", f"{theirs}.o_proj", self.out_bias, inputs=2),
            *linear(f"{ours}/mlp/gate", f"{layer}mlp.gate_proj", self.mlp_biases),
            *linear(f"{ours}/mlp/up", f"{layer}mlp.up_proj", self.mlp_biases),
            *linear(f"{ours}/mlp/down", f"{layer}mlp.down_proj", self.mlp_biases),
        ]
        return found if self.tied else [*found, *linear("lm_head", "lm_head", bias=False)]


def _read_rope(settings: Settings) -> tuple[float, RopeScaling | None]:
    """Base and scaling, which stand in one section or, in older files, apart."""
    sections = {name: settings.section(name) for name in ("rope_scaling", "rope_parameters")}
    # The transformers library lets the older name win, too.
    name = "rope_scaling" if sections["rope_scaling"] else "rope_parameters"
    rope = settings.within(name, sections[name]).in_current_names({"type": "rope_type"})
    base = rope.number("rope_theta", settings.number("rope_theta", 10000.0))
    settings.agree("rope_theta", base)
    settings.within("rope_parameters", sections["rope_parameters"]).agree("rope_theta", base)
    for either in (settings, rope):
        either.require("partial_rotary_factor", 1, None)
    if rope.choice("rope_type", "default", "default", "llama3") == "default":
        return base, None
    return base, RopeScaling(
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        rope.integer("original_max_position_embeddings"),
    )


class _Layer(CausalLayer):
    norm_class = nn.RMSNorm

    def attention(self) -> Attention:
        config = self.config
        return Attention(
            config.heads,
            config.kv_heads,
            config.head_size,
            self.execution,
            biases=config.biases,
            out_bias=config.out_bias,
            rate=config.attention_dropout,
            train=self.train,
            stddev=config.stddev,
            causal=True,
            name="attention",
        )

    def mlp(self) -> Mlp:
        config = self.config
        return Mlp(
            config.inner,
            config.activation,
            self.execution,
            gated=True,
            biases=config.mlp_biases,
            stddev=config.stddev,
            name="mlp",
        )


class Llama(CausalModel):
    """A LLaMA; see `CausalModel`."""

    layer = _Layer

    def placed(self, hidden: Array, positions: Array, train: bool) -> tuple[Array, Any]:
        """Leaves the embeddings as they are, and turns queries and keys in the layers."""
        config = self.config
        frequencies = rope_frequencies(config.head_size, config.rope_base, config.rope_scaling)
        return hidden, rotation_of(positions, frequencies)
