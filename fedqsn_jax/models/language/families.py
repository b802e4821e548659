"""Language models of every family as pure functions: of batches, and of caches to generate with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedqsn_jax.core.types import ApplyFn, Array, Batch, Key, Params
from fedqsn_jax.models.language.cache import empty_cache
from fedqsn_jax.models.language.decoder import CausalModel
from fedqsn_jax.models.language.distilbert import DistilBertConfig
from fedqsn_jax.models.language.encoder import Encoder
from fedqsn_jax.models.language.encoder_config import EncoderConfig
from fedqsn_jax.models.language.gemma import Gemma, GemmaConfig
from fedqsn_jax.models.language.gpt2 import GPT2, GPT2Config
from fedqsn_jax.models.language.llama import Llama, LlamaConfig
from fedqsn_jax.models.language.output_layer import LARGE_VOCABULARY
from fedqsn_jax.models.language.phi3 import Phi3, Phi3Config
from fedqsn_jax.models.language.t5 import T5, remember
from fedqsn_jax.models.language.t5_config import T5Config
from fedqsn_jax.models.language.transformer import Execution, check_length, real_tokens

LanguageConfig = EncoderConfig | GPT2Config | LlamaConfig | T5Config

FAMILIES: dict[str, type[LanguageConfig]] = {
    family: config
    for config in (
        EncoderConfig,
        DistilBertConfig,
        GPT2Config,
        LlamaConfig,
        Phi3Config,
        GemmaConfig,
        T5Config,
    )
    for family in config.FAMILIES
}
"""The configuration of each family, by the ``model_type`` of the transformers library."""


_CAUSAL: dict[type, type[CausalModel]] = {
    GPT2Config: GPT2,
    LlamaConfig: Llama,
    Phi3Config: Phi3,
    GemmaConfig: Gemma,
}


class Decoder(NamedTuple):
    """How text is generated, one token a step; pure functions, the same for every family.

    Attributes:
      prefill: ``(params, batch, new_tokens) -> (logits, cache)``: reads the prompts ``tokens`` and
        ``mask`` of a batch, padded on either side, and gives the float32 logits ``[rows, vocab]``
        of the first new token. ``new_tokens`` is static: how many steps the cache has room for.
      step: ``(params, tokens, cache) -> (logits, cache)``: takes the token that was chosen last in
        each row, int32 ``[rows]``, and gives the logits of the next.
      take_rows: ``(cache, rows) -> cache``: gathers rows, int32 ``[any]``, which may repeat.
    """

    prefill: Callable[[Params, Batch, int], tuple[Array, Any]]
    step: Callable[[Params, Array, Any], tuple[Array, Any]]
    take_rows: Callable[[Any, Array], Any]


class LanguageModel(NamedTuple):
    """A language model.

    Attributes:
      config: Its architecture.
      init: ``key -> params``: random parameters, float32, layers stacked along a leading axis.
      apply_fn: ``(params, batch, key) -> logits``, float32; without a key there is no dropout. A
        batch has ``tokens``, int32 ``[rows, length]``, and may have ``mask``, the same shape, not
        zero where a token is real. Encoders give ``[rows, classes]`` and may be given
        ``token_types``. GPT-2 and LLaMA give ``[rows, length, vocab]``, of the token after each.
        T5 takes ``target_tokens``, int32 ``[rows, target length]``, and gives
        ``[rows, target length, vocab]``, of each of these.
      decoder: How it generates text; None for encoders.
      trained: ``(params, batch, key) -> outputs`` for a task's loss alone: of causal models with
        a large vocabulary `Unprojected`; None: ``apply_fn``.
    """

    config: LanguageConfig
    init: Callable[[Key], Params]
    apply_fn: ApplyFn
    decoder: Decoder | None
    trained: ApplyFn | None = None

    @property
    def trained_fn(self) -> ApplyFn:
        """The model whose outputs a loss takes."""
        return self.trained or self.apply_fn


def make_language_model(
    config: LanguageConfig, execution: Execution | None = None, dropout: float | None = None
) -> LanguageModel:
    """Makes a language model.

    Example:
      >>> config = GPT2Config("gpt2", vocab_size=16, width=8, layers=1, heads=2, inner=16)
      >>> model = make_language_model(config)
      >>> params = model.init(jax.random.key(0))
      >>> model.apply_fn(params, {"tokens": jnp.zeros((3, 5), jnp.int32)}, None).shape
      (3, 5, 16)

    Args:
      config: The architecture.
      execution: How it is computed; by default in float32.
      dropout: One rate in place of all of the configuration's; None: those.
    """
    execution = execution or Execution()
    if dropout is not None:
        config = config.with_dropout(dropout)
    if isinstance(config, EncoderConfig):
        return _encoder(config, execution)
    if isinstance(config, T5Config):
        return _encoder_decoder(config, execution)
    return _causal(config, execution)


def _encoder(config: EncoderConfig, execution: Execution) -> LanguageModel:
    module = Encoder(config, execution)

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        inputs = batch["tokens"], batch.get("mask"), batch.get("token_types")
        return _apply(module, params, key, *inputs)

    return LanguageModel(config, _initializer(module, _DUMMY), apply, None)


def _causal(config: GPT2Config | LlamaConfig, execution: Execution) -> LanguageModel:
    module = _CAUSAL[type(config)](config, execution)
    heads, size = config.kv_heads, config.head_size

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        return _apply(module, params, key, batch["tokens"], batch.get("mask"))[0]

    def train(params: Params, batch: Batch, key: Key | None) -> Any:
        tokens, mask = batch["tokens"], batch.get("mask")
        return _apply(module, params, key, tokens, mask, projected=False)[0]

    def prefill(params: Params, batch: Batch, new_tokens: int) -> tuple[Array, Any]:
        tokens = batch["tokens"]
        rows, slots = tokens.shape[0], tokens.shape[1] + new_tokens
        check_length(slots, config.max_length)
        cache = empty_cache(config.layers, rows, slots, heads, size, execution.dtype)
        inputs = tokens, batch.get("mask"), cache
        logits, filled = module.apply({"params": params}, *inputs, last_only=True)
        return logits[:, 0], filled

    def step(params: Params, tokens: Array, cache: Any) -> tuple[Array, Any]:
        logits, cache = module.apply({"params": params}, tokens[:, None], None, cache)
        return logits[:, 0], cache

    decoder = Decoder(prefill, step, _take_rows)
    trained = train if config.vocab_size >= LARGE_VOCABULARY else apply
    return LanguageModel(config, _initializer(module, _DUMMY), apply, decoder, trained)


def _encoder_decoder(config: T5Config, execution: Execution) -> LanguageModel:
    module = T5(config, execution)

    def apply(params: Params, batch: Batch, key: Key | None) -> Array:
        inputs = batch["tokens"], batch.get("mask"), batch["target_tokens"]
        return _apply(module, params, key, *inputs)

    def prefill(params: Params, batch: Batch, new_tokens: int) -> tuple[Array, Any]:
        tokens = batch["tokens"]
        rows, mask = tokens.shape[0], real_tokens(tokens, batch.get("mask"))
        encoded: Any = module.apply({"params": params}, tokens, mask, method="encode")
        own = empty_cache(
            config.decoder_layers,
            rows,
            1 + new_tokens,
            config.heads,
            config.head_size,
            execution.dtype,
        )
        cache = remember(params, encoded, mask, own)
        return step(params, jnp.full(rows, config.start_token_id, jnp.int32), cache)

    def step(params: Params, tokens: Array, cache: Any) -> tuple[Array, Any]:
        logits, cache = module.apply({"params": params}, tokens[:, None], cache, method="decode")
        return logits[:, 0], cache

    init = _initializer(module, _DUMMY, None, _DUMMY)
    return LanguageModel(config, init, apply, Decoder(prefill, step, _take_rows))


_DUMMY = jax.ShapeDtypeStruct((1, 2), jnp.int32)
"""Tokens to initialize with; parameters do not depend on them."""


def _initializer(module: nn.Module, *inputs: Any) -> Callable[[Key], Params]:
    def init(key: Key) -> Params:
        tokens = [None if each is None else jnp.zeros(each.shape, each.dtype) for each in inputs]
        return jax.jit(module.init)(key, *tokens)["params"]

    return init


def _apply(
    module: nn.Module, params: Params, key: Key | None, *inputs: Array | None, **options: Any
) -> Any:
    rngs = None if key is None else {"dropout": key}
    return module.apply({"params": params}, *inputs, train=key is not None, rngs=rngs, **options)


def _take_rows(cache: Any, rows: Array) -> Any:
    return cache.take_rows(rows)
