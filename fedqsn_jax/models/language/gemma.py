"""Gemma 2 (arXiv 2408.00118) and the text models of Gemma 3 (arXiv 2503.19786)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.language.hugging_face import Settings, Tensor, token_ids
from fedqsn_jax.models.language.llama import Llama, LlamaConfig, LlamaLayer
from fedqsn_jax.models.language.rotary_positions import Scaling, rope_frequencies, rotation_of
from fedqsn_jax.models.language.rotary_settings import read_rope, rope_settings

_KINDS = {False: "full_attention", True: "sliding_attention"}
_PERIODS = {"gemma2": 2, "gemma3_text": 6}
"""One layer in so many, the last, attends to all tokens, the others to those of the window."""


@dataclasses.dataclass(frozen=True)
class GemmaConfig(LlamaConfig):
    """A Gemma 2 or 3.

    Attributes:
      query_size: Products of queries and keys are divided by its root.
      product_cap: What they then stay below; None: they may be any.
      logit_cap: What logits stay below; None: they may be any.
      window_rope_base: Base of the rotary frequencies of layers with a window, which are not
        scaled; None: those of the others.
    """

    query_size: int = 256
    product_cap: float | None = None
    logit_cap: float | None = None
    window_rope_base: float | None = None

    FAMILIES: ClassVar[tuple[str, ...]] = ("gemma2", "gemma3_text")

    @classmethod
    def from_settings(cls, family: str, settings: Settings) -> Self:
        """Reads a config.json."""
        settings = settings.in_current_names({"hidden_act": "hidden_activation"})
        settings.require("use_bidirectional_attention", False, None)
        newer = family == "gemma3_text"
        positions = settings.integer("max_position_embeddings", 131072 if newer else 8192)
        layers = settings.integer("num_hidden_layers")
        base, scaling, local = _read_ropes(settings, positions, newer)
        window = settings.optional_integer("sliding_window", 4096)
        biases = settings.flag("attention_bias", False)
        cap = settings.optional_number
        return cls(
            family=family,
            vocab_size=settings.integer("vocab_size", 262208 if newer else 256000),
            width=settings.integer("hidden_size", 2304),
            layers=layers,
            heads=settings.integer("num_attention_heads", 8),
            kv_heads=settings.integer("num_key_value_heads", 4),
            head_size=settings.integer("head_dim", 256),
            inner=settings.integer("intermediate_size", 9216),
            activation=settings.activation("hidden_activation", "gelu_pytorch_tanh"),
            positions=positions,
            norm_epsilon=settings.number("rms_norm_eps", 1e-6),
            rope_base=base,
            rope_scaling=scaling,
            biases=biases,
            out_bias=biases,
            head_norms=newer,
            window=window,
            windowed=_read_windowed(settings, family, layers) if window else (),
            attention_dropout=settings.rate("attention_dropout", 0.0),
            stddev=settings.number("initializer_range", 0.02),
            tied=settings.flag("tie_word_embeddings", True),
            pad_token_id=settings.token("pad_token_id", 0),
            bos_token_id=settings.token("bos_token_id", 2),
            eos_token_ids=settings.tokens("eos_token_id", (1,)),
            query_size=settings.integer("query_pre_attn_scalar", 256),
            product_cap=cap("attn_logit_softcapping", None if newer else 50.0),
            logit_cap=cap("final_logit_softcapping", None if newer else 30.0),
            window_rope_base=local,
        )

    def to_settings(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        kinds = [_KINDS[is_windowed] for is_windowed in self.windowed]
        own: dict[str, Any] = {}
        if self.window_rope_base is not None:
            own["rope_local_base_freq"] = self.window_rope_base
        return own | {
            "architectures": [
                "Gemma2ForCausalLM" if self.family == "gemma2" else "Gemma3ForCausalLM"
            ],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.inner,
            "hidden_activation": self.activation,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.norm_epsilon,
            "rope_theta": self.rope_base,
            "rope_scaling": rope_settings(self.rope_scaling),
            "attention_bias": self.biases,
            "attention_dropout": self.attention_dropout,
            "attn_logit_softcapping": self.product_cap,
            "final_logit_softcapping": self.logit_cap,
            "query_pre_attn_scalar": self.query_size,
            "sliding_window": self.window,
            "layer_types": kinds or [_KINDS[False]] * self.layers,
            "initializer_range": self.stddev,
            "tie_word_embeddings": self.tied,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": token_ids(self.eos_token_ids),
        }

    def tensors(self) -> list[Tensor]:
        """Returns how every tensor is written down."""
        ours, layer = "layers", f"{self.prefix}layers.{{}}."
        # There the name is of the norm after the attention, which LLaMA has not.
        norms = {
            "mlp_norm": "pre_feedforward_layernorm",
            "attention_end_norm": "post_attention_layernorm",
            "mlp_end_norm": "post_feedforward_layernorm",
        }
        kept = [each for each in super().tensors() if each.path != f"{ours}/mlp_norm/scale"]
        return kept + [
            Tensor(f"{ours}/{norm}/scale", f"{layer}{name}.weight") for norm, name in norms.items()
        ]


def _read_ropes(
    settings: Settings, positions: int, newer: bool
) -> tuple[float, Scaling | None, float | None]:
    """Base and scaling of the rotary frequencies, and the base of layers with a window."""
    if not newer:
        return *read_rope(settings, positions), None
    by_kind = settings.section("rope_parameters")
    if not any(kind in by_kind for kind in _KINDS.values()):
        base, scaling = read_rope(settings, positions, 1e6)
        return base, scaling, settings.number("rope_local_base_freq", 10000.0)
    whole, near = (
        settings.within("rope_parameters", {"rope_parameters": by_kind.get(_KINDS[windowed], {})})
        for windowed in (False, True)
    )
    base, scaling = read_rope(whole, positions, 1e6)
    local, local_scaling = read_rope(near, positions)
    settings.agree("rope_theta", base)
    settings.agree("rope_local_base_freq", local)
    if local_scaling is not None:
        raise ValueError("rope_parameters: sliding_attention is scaled; allowed is default")
    return base, scaling, local


def _read_windowed(settings: Settings, family: str, layers: int) -> tuple[bool, ...]:
    if settings.has("layer_types"):
        kinds: Sequence[str] = settings.texts("layer_types")
        if len(kinds) != layers or not set(kinds) <= set(_KINDS.values()):
            raise ValueError(
                f"layer_types: {len(kinds)} for {layers} layers; allowed are "
                f"{' and '.join(_KINDS.values())}"
            )
        windowed = tuple(kind == _KINDS[True] for kind in kinds)
    else:
        period = settings.integer("sliding_window_pattern", _PERIODS[family])
        windowed = tuple((layer + 1) % period != 0 for layer in range(layers))
    return windowed if any(windowed) else ()


class GemmaNorm(nn.Module):
    """A root-mean-square norm whose scale is one more than its parameter; computed in float32.

    Attributes:
      epsilon: Is added to the mean square.
      dtype: Of what is returned.
    """

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        """Returns normed states ``[..., width]``."""
        scale = self.param("scale", nn.initializers.zeros, (hidden.shape[-1],))
        wide = hidden.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = (1 + scale.astype(jnp.float32)).reshape((1,) * (hidden.ndim - 1) + (-1,))
        return (wide * jax.lax.rsqrt(mean + self.epsilon) * scale).astype(self.dtype)


class _Layer(LlamaLayer):
    norm_class = GemmaNorm

    def attention_settings(self) -> dict[str, Any]:
        config = self.config
        own = {"scale": config.query_size**-0.5, "cap": config.product_cap}
        return super().attention_settings() | own

    def changed(self, branch: str, change: Array) -> Array:
        """Norms what a branch adds."""
        return self.norm(f"{branch}_end_norm")(change)

    def turned(self, layer: Array, rotation: Any) -> Any:
        """Takes the rotation of layers with a window, or the others'."""
        everywhere, near = rotation
        if near is None or not any(self.config.windowed):
            return everywhere
        has_window = jnp.asarray(self.config.windowed)[layer]
        return jax.tree.map(functools.partial(jnp.where, has_window), near, everywhere)


class Gemma(Llama):
    """A Gemma; see `CausalModel`."""

    layer = _Layer

    def placed(self, hidden: Array, positions: Array, train: bool) -> tuple[Array, Any]:
        """Multiplies the embeddings by the root of their width; both rotations of the layers."""
        config = self.config
        hidden = hidden * jnp.sqrt(jnp.float32(config.width)).astype(hidden.dtype)
        frequencies = rope_frequencies(config.head_size, config.rope_base, config.rope_scaling)
        near = None
        if config.window_rope_base is not None:
            near_frequencies = rope_frequencies(config.head_size, config.window_rope_base)
            near = rotation_of(positions, near_frequencies)
        return hidden, (rotation_of(positions, frequencies, config.rope_scaling), near)

    @property
    def logit_cap(self) -> float | None:
        """What logits are kept below, if there is a cap."""
        cap: float | None = self.config.logit_cap
        return cap
