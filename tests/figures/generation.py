"""Measures how long beam search takes with a model of SmolLM2-135M's shape and random weights.

  python tests/figures/generation.py

The defaults are the E2E test set's: 630 prompts of at most 74 tokens, 10 beams of 64 new tokens, no
4-gram twice. Random weights hardly ever end a text, so that all 64 steps are taken. The first call
compiles and is timed apart.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from fedqsn_jax.generation.beam_search import GenerationSettings, make_generator
from fedqsn_jax.models.language import families, llama, transformer

SHAPES = {
    "smollm2-135m": llama.LlamaConfig(
        family="llama", vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_size=64,
        inner=1536, positions=8192, rope_base=100000.0, tied=True, eos_token_ids=(2,),
    ),
    "tiny": llama.LlamaConfig(
        family="llama", vocab_size=256, width=32, layers=2, heads=4, kv_heads=2, head_size=8,
        inner=64, positions=256, tied=True, eos_token_ids=(2,),
    ),
}  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=630)
    parser.add_argument("--length", type=int, default=74)
    parser.add_argument("--batch", type=int, default=126)
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--calls", type=int, default=3)
    options = parser.parse_args()
    config = SHAPES[options.model]
    model = families.make_language_model(config, transformer.Execution(dtype=options.dtype))
    settings = GenerationSettings(options.new_tokens, options.beams)
    generate = jax.jit(make_generator(model.decoder, settings, config.eos_token_ids, 0))
    params = jax.jit(model.init)(jax.random.key(0))
    shape = (options.batch, options.length)
    batches = -(-options.prompts // options.batch)
    tokens = jax.random.randint(jax.random.key(1), (batches, *shape), 3, config.vocab_size)
    mask = jnp.ones(shape, bool)

    def everything() -> float:
        began = time.perf_counter()
        for batch in tokens:
            found = generate(params, {"tokens": batch, "mask": mask})
            jax.block_until_ready(found)
        return time.perf_counter() - began

    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options}")
    print(f"first call, compiling: {everything():.2f} s")
    for _ in range(options.calls):
        print(f"{batches * options.batch} prompts: {everything():.2f} s")


if __name__ == "__main__":
    main()
