"""Measures training of language models of the paper's sizes, with random weights.

  python tests/figures/language.py step     one client's step of RoBERTa-base, batch 64, length 128
  python tests/figures/language.py gpt2-xl  a round of 2 clients: peak memory, tokens a second
  python tests/figures/language.py llama-1b

FedQSN with masks at all sites (p1 = p2 = 0.1, 4 bits), AdamW with warm-up and decay.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedqsn_jax.config.schema import resolve
from fedqsn_jax.data.population import FederatedData
from fedqsn_jax.generation.language_tasks import conditional_generation, sequence_classification
from fedqsn_jax.models.language.encoder import EncoderConfig
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.gpt2 import GPT2Config
from fedqsn_jax.models.language.llama import LlamaConfig
from fedqsn_jax.models.language.transformer import Execution
from fedqsn_jax.protocol.algorithms import make_algorithm
from fedqsn_jax.protocol.proxy import dequantize_proxy, whole_proxy
from fedqsn_jax.protocol.quantization import NormalFloat
from fedqsn_jax.protocol.sites import find_sites
from fedqsn_jax.rounds.client import make_client_update
from fedqsn_jax.rounds.client_optimizer import ADAMW_EPSILON, scheduled
from fedqsn_jax.simulation.compose import make_simulation
from fedqsn_jax.simulation.running import initial_state, run_rounds

ROBERTA = EncoderConfig(
    "roberta", 50265, 768, 12, 12, 3072, positions=514, token_types=1, pad_token_id=1
)
GENERATORS = {
    "gpt2-xl": GPT2Config("gpt2", 50257, 1600, 48, 25, 6400, positions=1024),
    "llama-1b": LlamaConfig("llama", 128256, 2048, 16, 32, 8, 64, 8192, positions=4096, tied=True),
}

DTYPES = ["bfloat16", "float32", "float32-highest"]
"""What ``step`` computes in: products of float32 values are TF32 ones unless highest is asked."""
STEPS = 5, 35


def rows(count: int, length: int, vocabulary: int, generates: bool) -> dict[str, jax.Array]:
    """Random tokens."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(5, vocabulary, (count, length)), jnp.int32)
    mask = jnp.ones((count, length), bool)
    if generates:
        return {"tokens": tokens, "mask": mask, "loss_mask": mask}
    return {"tokens": tokens, "mask": mask, "label": jnp.asarray(rng.integers(0, 2, count))}


def training(
    dropout: float, dtype: str, unroll: int, batch: int, length: int, steps: tuple[int, ...]
) -> Callable[[int], None]:
    """Compiles the local training of clients with so many steps; returns it as ``client -> ()``."""
    model = make_language_model(ROBERTA, Execution(dtype, unroll=unroll), dropout)
    params = model.init(jax.random.key(0))
    sites = find_sites(params)
    transform = make_algorithm("fedqsn", NormalFloat(4, 64), 0.1, 0.1, "bernoulli").transform
    state = transform.init(jax.random.key(1), whole_proxy(params, sites))
    offsets = batch * jnp.cumsum(jnp.asarray([0, *steps]), dtype=jnp.int32)
    data = FederatedData(rows(batch * sum(steps), length, 50265, False), offsets)

    @jax.jit
    def proxy_of(params):
        prepared = dequantize_proxy(transform.prepare(state, whole_proxy(params, sites)))
        return transform.apply(jax.random.key(2), state, prepared)

    proxy = proxy_of(params)
    optimizer = scheduled(
        lambda rate: optax.adamw(rate, eps=ADAMW_EPSILON, weight_decay=0.01), 2e-5
    )
    update = make_client_update(
        model.apply_fn, sequence_classification(), optimizer, batch, epochs=1
    )
    key, train = jax.random.key(3), jax.jit(update.train)
    compiled = train.lower(key, proxy, data, jnp.int32(0)).compile()
    return lambda client: jax.block_until_ready(compiled(key, proxy, data, jnp.int32(client)).loss)


def step_seconds(run: Callable[[int], None], steps: tuple[int, int]) -> float:
    """Time of one step: how much longer a long local training takes, by the steps it has more."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(12):
        for client in range(2):
            began = time.perf_counter()
            run(client)
            times[client].append(time.perf_counter() - began)
    # The first ones find the card cold.
    short, long = (statistics.median(each[2:]) for each in times)
    return (long - short) / (steps[1] - steps[0])


def round_facts(name: str, batch: int, length: int, steps: int, remat: bool, unroll: int) -> None:
    """Runs rounds of 2 clients and prints their memory and speed."""
    config = GENERATORS[name]
    model = make_language_model(config, Execution("bfloat16", remat=remat, unroll=unroll), 0.0)
    params = jax.jit(model.init)(jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    clients, per_client = 4, batch * steps
    data = FederatedData(
        rows(clients * per_client, length, config.vocab_size, True),
        jnp.arange(clients + 1, dtype=jnp.int32) * per_client,
    )
    settings = resolve(
        {
            "rounds": 3,
            "rounds_per_call": 1,
            "p1": 0.1,
            "p2": 0.1,
            "data": {"clients": clients},
            "client": {
                "steps": steps,
                "batch_size": batch,
                "optimizer": "adamw",
                "learning_rate": 1e-5,
                "compute_dtype": "bfloat16",
            },
            "cohort": {"size": 2},
            "evaluation": {"every": 3, "attackers": [1], "proxy_samples": 2, "batch_size": batch},
        }
    )
    task = conditional_generation()
    simulation = make_simulation(settings, model.apply_fn, task, params, data, model.apply_fn)
    print(f"{name}: {count / 1e9:.2f} G parameters, {simulation.choice.reason}", flush=True)
    estimate = sum(simulation.memory.values()) / 2**30
    state = initial_state(simulation, params)
    del params
    test = rows(batch, length, config.vocab_size, True)
    times, began = [], time.perf_counter()
    for _, _, _ in run_rounds(simulation, state, data, test):
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    peak = jax.devices()[0].memory_stats() or {}
    tokens = 2 * steps * batch * length
    print(
        f"  {tokens} tokens a round; rounds took {', '.join(f'{t:.2f}' for t in times)} s (the "
        f"first compiles, the last evaluates): {tokens / times[1]:.0f} tokens/s; peak "
        f"{peak.get('peak_bytes_in_use', 0) / 2**30:.1f} GiB, estimated {estimate:.1f} GiB"
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["step", *GENERATORS])
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--unroll", type=int, default=0)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    options = parser.parse_args()
    if options.tiny:
        _make_tiny()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    if options.what != "step":
        round_facts(
            options.what,
            options.batch or 8,
            options.length,
            options.steps,
            options.remat,
            options.unroll or 1,
        )
        return
    sizes = options.unroll or 12, options.batch or 64, options.length
    for dtype in options.dtypes:
        for dropout in options.dropout:
            exact = "highest" if dtype == "float32-highest" else None
            with jax.default_matmul_precision(exact):
                run = training(dropout, dtype.removesuffix("-highest"), *sizes, STEPS)
            took = step_seconds(run, STEPS)
            print(f"  RoBERTa-base, {dtype}, dropout {dropout}: {1e3 * took:.2f} ms", flush=True)


def _make_tiny() -> None:
    global ROBERTA
    ROBERTA = dataclasses.replace(ROBERTA, width=16, layers=2, heads=2, inner=16)
    for name, config in GENERATORS.items():
        fewer = {"kv_heads": 2, "head_size": 16} if isinstance(config, LlamaConfig) else {}
        small = dataclasses.replace(
            config, width=64, layers=2, inner=32, vocab_size=300, heads=4, **fewer
        )
        GENERATORS[name] = small


if __name__ == "__main__":
    main()
