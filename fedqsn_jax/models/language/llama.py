"""LLaMA (arXiv 2302.13971, 2407.21783) and those that differ from it in few settings.

Qwen2 (arXiv 2407.10671) adds biases, Qwen3 (arXiv 2505.09388) norms of queries and keys, Mistral
(arXiv 2310.06825) a window of attention.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

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
from fedqsn_jax.models.language.rotary_positions import Scaling, rope_frequencies, rotation_of
from fedqsn_jax.models.language.rotary_settings import read_rope, rope_settings
from fedqsn_jax.models.language.transformer import Mlp


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A LLaMA, Qwen2, Qwen3 or Mistral.

    Attributes:
      family: ``llama``, ``qwen2``, ``qwen3`` or ``mistral``.
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
      rope_scaling: How they are changed for longer sequences, or None.
      biases: Whether query, key and value have biases.
      out_bias: Whether the attention's output has one.
      mlp_biases: Whether the MLP's matrices have.
      head_norms: Whether queries and keys are normed, each head's by itself.
      window: Tokens that a token of a windowed layer attends to, its own included; None: all.
      windowed: For each layer, whether it has the window; empty: none has.
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
    rope_scaling: Scaling | None = None
    biases: bool = False
    out_bias: bool = False
    mlp_biases: bool = False
    head_norms: bool = False
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    attention_dropout: float = 0.0
    stddev: float = 0.02
    tied: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    residual_dropout: ClassVar[float] = 0.0
    """LLaMA drops nothing in the residual branches."""

    FAMILIES: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are no multiple of {self.kv_heads} key heads")
        if self.head_size % 2:
            raise ValueError(f"head_size = {self.head_size}: rotary positions need an even one")
        if any(self.windowed) and (self.window is None or len(self.windowed) != self.layers):
            raise ValueError("a window needs a number of tokens, and for each layer if it has one")

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
        defaults = _DEFAULTS[family]
        width, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
        positions = settings.integer("max_position_embeddings", defaults.positions)
        rope_base, rope_scaling = read_rope(settings, positions)
        layers = settings.integer("num_hidden_layers")
        window, windowed = _read_window(family, settings, layers)
        # Of Qwen2 and Mistral the library reads none of these settings.
        chosen = family in ("llama", "qwen3") and settings.flag("attention_bias", False)
        head_size = settings.optional_integer("head_dim", defaults.head_size)
        return cls(
            family=family,
            vocab_size=settings.integer("vocab_size"),
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=settings.optional_integer("num_key_value_heads", defaults.kv_heads) or heads,
            head_size=head_size or width // heads,
            inner=settings.integer("intermediate_size"),
            activation=settings.activation("hidden_act", "silu"),
            positions=positions,
            norm_epsilon=settings.number("rms_norm_eps", 1e-6),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            biases=chosen or family == "qwen2",
            out_bias=chosen,
            mlp_biases=family == "llama" and settings.flag("mlp_bias", False),
            head_norms=family == "qwen3",
            window=window,
            windowed=windowed,
            attention_dropout=settings.rate("attention_dropout", 0.0),
            stddev=settings.number("initializer_range", 0.02),
            tied=settings.flag("tie_word_embeddings", False),
            pad_token_id=settings.token("pad_token_id"),
            bos_token_id=settings.token("bos_token_id", defaults.bos),
            eos_token_ids=settings.tokens("eos_token_id", defaults.eos),
        )

    def to_settings(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        own: dict[str, Any] = {}
        if self.family in ("llama", "qwen3"):
            own["attention_bias"] = self.biases
        if self.family == "llama":
            own["mlp_bias"] = self.mlp_biases
        else:
            own["sliding_window"] = self.window
        if self.family.startswith("qwen"):
            kinds = [_KINDS[is_windowed] for is_windowed in self.windowed]
            own["use_sliding_window"] = self.window is not None
            own["layer_types"] = kinds or [_KINDS[False]] * self.layers
        return own | {
            "architectures": [f"{self.family.capitalize()}ForCausalLM"],
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
            "rope_scaling": rope_settings(self.rope_scaling),
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
        if self.head_norms:
            found.append(norm(f"{attention}/query_norm", f"{theirs}.q_norm"))
            found.append(norm(f"{attention}/key_norm", f"{theirs}.k_norm"))
        return found if self.tied else [*found, *linear("lm_head", "lm_head", bias=False)]


class _Defaults(NamedTuple):
    """What a family's settings are where its config.json does not say them."""

    positions: int
    kv_heads: int | None = None
    head_size: int | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()


_DEFAULTS = {
    "llama": _Defaults(2048, bos=1, eos=(2,)),
    "mistral": _Defaults(4096 * 32, kv_heads=8, bos=1, eos=(2,)),
    "qwen2": _Defaults(32768, kv_heads=32),
    "qwen3": _Defaults(32768, kv_heads=32, head_size=128),
}
_KINDS = {False: "full_attention", True: "sliding_attention"}
_WINDOW, _FIRST_WINDOWED = 4096, 28


def _read_window(
    family: str, settings: Settings, layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers have it."""
    if family == "llama":
        return None, ()
    if family.startswith("qwen") and not settings.flag("use_sliding_window", False):
        window = None
    else:
        window = settings.optional_integer("sliding_window", _WINDOW)
    windowed = (window is not None,) * layers
    if family.startswith("qwen") and window is not None:
        if settings.has("layer_types"):
            windowed = tuple(kind == _KINDS[True] for kind in settings.texts("layer_types"))
        else:
            first = settings.number("max_window_layers", _FIRST_WINDOWED)
            windowed = tuple(layer >= first for layer in range(layers))
    settings.agree("layer_types", [_KINDS[is_windowed] for is_windowed in windowed])
    return (window, windowed) if any(windowed) else (None, ())


class LlamaLayer(CausalLayer):
    """A LLaMA's layer; see `CausalLayer`."""

    norm_class: ClassVar[Any] = nn.RMSNorm

    def attention_settings(self) -> dict[str, Any]:
        """What the family's attention is made with."""
        config = self.config
        return {
            "heads": config.heads,
            "kv_heads": config.kv_heads,
            "size": config.head_size,
            "execution": self.execution,
            "biases": config.biases,
            "out_bias": config.out_bias,
            "rate": config.attention_dropout,
            "train": self.train,
            "stddev": config.stddev,
            "head_norm": self._head_norm() if config.head_norms else None,
            "causal": True,
        }

    def _head_norm(self) -> Callable[..., nn.Module]:
        # Not `norm`, a method of this module: what it made would be this module's.
        return functools.partial(self.norm_class, self.config.norm_epsilon, self.execution.dtype)

    def attention(self) -> Attention:
        """Makes the family's attention."""
        return Attention(**self.attention_settings(), name="attention")

    def mlp(self) -> Mlp:
        """Makes the family's MLP."""
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

    layer = LlamaLayer

    def placed(self, hidden: Array, positions: Array, train: bool) -> tuple[Array, Any]:
        """Leaves the embeddings as they are, and turns queries and keys in the layers."""
        config = self.config
        frequencies = rope_frequencies(config.head_size, config.rope_base, config.rope_scaling)
        return hidden, rotation_of(positions, frequencies, config.rope_scaling)
