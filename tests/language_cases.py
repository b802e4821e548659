"""Tiny language models of every family, with random parameters, for several tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.models.language.encoder import EncoderConfig
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.gpt2 import GPT2Config
from fedqsn_jax.models.language.llama import LlamaConfig
from fedqsn_jax.models.language.rotary_positions import RopeScaling
from fedqsn_jax.models.language.t5 import T5Config

VOCAB = 20
# Compiling is most of what these tests take.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CONFIGS = {
    "bert": EncoderConfig("bert", VOCAB, 8, 2, 2, 12, positions=16, classes=3),
    "roberta": EncoderConfig(
        "roberta", VOCAB, 8, 2, 2, 12, positions=16, pad_token_id=1, pooling="mean"
    ),
    "gpt2": GPT2Config("gpt2", VOCAB, 8, 2, 2, 12, positions=16),
    "llama": LlamaConfig(
        "llama", VOCAB, 8, 2, 4, 2, 6, 12, positions=16, rope_scaling=RopeScaling(8, 1, 4, 16)
    ),
    "qwen2": LlamaConfig("qwen2", VOCAB, 8, 2, 4, 2, 2, 12, positions=16, biases=True, tied=True),
    "t5": T5Config("t5", VOCAB, 8, 2, 3, 2, 6, 12, gated=True, tied=False, scaled_output=False),
}


def random_params(config, *stack, seed=0):
    """Random parameters; ``stack`` is put before every shape."""
    shapes = jax.eval_shape(make_language_model(config).init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.4, (*stack, *leaf.shape)), leaf.dtype), shapes
    )


def batch_of(rows=3, length=6, seed=1):
    """Tokens with padding on the right, on the left, and none; targets for those that need them."""
    rng = np.random.default_rng(seed)
    mask = np.ones((rows, length), bool)
    mask[1, -2:] = False
    mask[2, :3] = False
    return {
        "tokens": jnp.asarray(rng.integers(0, VOCAB, (rows, length)), jnp.int32),
        "mask": jnp.asarray(mask),
        "target_tokens": jnp.asarray(rng.integers(0, VOCAB, (rows, 4)), jnp.int32),
    }
