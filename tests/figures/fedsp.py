"""Runs FedSP with MiniLM on SST-2: are prompts that a one-layer model tuned any good for all six?

  python tests/figures/fedsp.py \\
    --config.data.train=tsv:sst2/train.tsv --config.data.test=tsv:sst2/test.tsv

Everything of ``configs/sst2_minilm.py`` may be changed with ``--config.FIELD``; of it, data, model,
``client.steps`` and ``batch_size``, ``cohort.size``, ``rounds``, ``evaluation`` and ``seed`` count.

The encoder stays as it was pre-trained. The server fits a linear head to its features of
``--labelled`` rows, draws prompts at random, and distils the auxiliary model on all of its private
rows, without their labels. Printed are the accuracies of the full model without prompts, with the
untrained ones and with those of each evaluated round (of the test rows the first ``--rows``; all
before the first and after the last round), and of the auxiliary model with the same prompts.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedqsn_jax import wire
from fedqsn_jax.aggregation import make_aggregator
from fedqsn_jax.client import make_client_update
from fedqsn_jax.client_optimizer import unscheduled
from fedqsn_jax.command_line import read_config
from fedqsn_jax.config import Config
from fedqsn_jax.data.federated import ClientData, single_client
from fedqsn_jax.fedsp import (
    FedSP,
    FedSPState,
    PromptedApply,
    alternating,
    auxiliary_model,
    distil,
    make_fedsp,
    prompted_encoder,
)
from fedqsn_jax.language_problem import load_language_problem
from fedqsn_jax.metrics import make_evaluator
from fedqsn_jax.models.encoder import EncoderConfig
from fedqsn_jax.models.pretrained import read_config as read_architecture
from fedqsn_jax.problem import Problem
from fedqsn_jax.proxy import whole_proxy
from fedqsn_jax.randomness import fold_in_name
from fedqsn_jax.trainable import Selection, select_trained
from fedqsn_jax.types import Array, Batch, Key, Params

OWN = [
    "--config.data.length=40",
    "--config.rounds=6",
    "--config.client.steps=12",
    "--config.evaluation.every=2",
]


class Setting(NamedTuple):
    """What a measurement needs, the same for every seed."""

    config: Config
    options: argparse.Namespace
    problem: Problem
    architecture: EncoderConfig
    full_apply: PromptedApply
    auxiliary_apply: PromptedApply


def fit_head(setting: Setting, key: Key) -> Params:
    """The full model with a linear head on its own features, of the first labelled rows."""
    problem, options = setting.problem, setting.options
    encoder = prompted_encoder(dataclasses.replace(setting.architecture, classes=0))
    body = {name: each for name, each in problem.params.items() if name != "classifier"}
    labelled = {name: rows[: options.labelled] for name, rows in problem.splits.private.items()}
    label = labelled["label"]
    size = min(setting.config.evaluation.batch_size, len(label))
    places = jnp.arange(-(-len(label) // size) * size).reshape(-1, size) % len(label)

    @jax.jit
    def features(body: Params, rows: Batch) -> Array:
        of = lambda at: encoder(body, None, {k: v[at] for k, v in rows.items()}, None)[0]  # noqa: E731
        return jax.lax.map(of, places).reshape(-1, setting.architecture.width)[: len(label)]

    rows = single_client({"features": features(body, labelled), "label": label})
    head = jax.tree.map(jnp.zeros_like, problem.params["classifier"]["out"])
    update = make_client_update(
        lambda head, batch, key: (
            batch["features"] @ head["kernel"] + jnp.expand_dims(head["bias"], 0)
        ),
        problem.task,
        unscheduled(optax.adam(0.003)),
        len(label),
        steps=100,
    )
    fitted = jax.jit(update.train)(key, whole_proxy(head, ()), rows, jnp.int32(0)).delta
    return {**body, "classifier": {"out": fitted}}


def align(setting: Setting, key: Key, full: Params, prompts: Array) -> tuple[Params, float]:
    """The auxiliary model, distilled with the prompts in place from which clients will start."""
    options = setting.options
    _, auxiliary = auxiliary_model(setting.architecture, full, options.layers)

    @jax.jit
    def run(full: Params, auxiliary: Params, prompts: Array) -> tuple[Params, Array]:
        def behind(apply: PromptedApply) -> PromptedApply:
            return lambda params, _, batch, key: apply(params, prompts, batch, key)

        return distil(
            key,
            behind(setting.full_apply),
            full,
            behind(setting.auxiliary_apply),
            auxiliary,
            setting.problem.splits.private,
            optax.adam(options.distillation_rate),
            steps=options.distillation_steps,
            batch_size=setting.config.client.batch_size,
        )

    distilled, loss = run(full, auxiliary, prompts)
    return distilled, float(loss)


def compose(setting: Setting, trained: Selection) -> FedSP:
    """The method of the setting."""
    config, options = setting.config, setting.options
    return make_fedsp(
        setting.full_apply,
        setting.auxiliary_apply,
        setting.problem.task,
        alternating(
            optax.adam(options.auxiliary_rate),
            optax.adam(options.prompt_rate),
            options.auxiliary_share,
        ),
        make_aggregator((), optax.sgd(config.server.learning_rate)),
        population=setting.problem.splits.clients.clients,
        cohort=config.cohort.size,
        batch_size=config.client.batch_size,
        steps=config.client.steps,
        trained=trained,
        evaluation_batch_size=config.evaluation.batch_size,
    )


def measure(setting: Setting, seed: int) -> dict[str, float]:
    """Runs one seed and prints its rounds; returns accuracies before the first and after the last.

    The rows are divided by ``config.seed``; all else is drawn from ``seed``.
    """
    config, options, problem = setting.config, setting.options, setting.problem
    began, key = time.perf_counter(), jax.random.key(seed)
    full = fit_head(setting, fold_in_name(key, "head"))
    shape = options.prompts, setting.architecture.width
    # As large as word embeddings; a layer norm follows, so the size matters to the rate only.
    size = jnp.std(full["token_embed"]["embedding"])
    prompts = size * jax.random.normal(fold_in_name(key, "prompts"), shape)
    auxiliary, loss = align(setting, fold_in_name(key, "distillation"), full, prompts)
    names = ["prompts", "auxiliary/layers/*", "auxiliary/classifier/*"]
    trained = select_trained(
        {"auxiliary": auxiliary, "prompts": prompts},
        names if options.auxiliary_share else names[:1],
    )
    method = compose(setting, trained)
    plain = make_evaluator(
        lambda params, batch, key: setting.full_apply(params, None, batch, key)[0],
        problem.task,
        config.evaluation.batch_size,
    )
    test = problem.splits.test
    some = {name: rows[: options.rows] for name, rows in test.items()}
    evaluate = jax.jit(method.evaluate)

    @functools.partial(jax.jit, static_argnums=2)
    def advance(state: FedSPState, data: ClientData, rounds: int) -> Any:
        return jax.lax.scan(lambda state, _: method.round(state, data), state, length=rounds)

    state = method.init(fold_in_name(key, "rounds"), full, auxiliary, prompts)

    def show(metrics: dict[str, Any], rows: Batch, facts: str = "") -> dict[str, float]:
        server, client = (float(metrics[f"{view}/accuracy"]) for view in ("global", "proxy"))
        print(
            f"  round {int(state.round):3d}  full {server:.3f}  auxiliary {client:.3f}"
            f"  ({len(rows['label'])} rows, {time.perf_counter() - began:.0f} s){facts}",
            flush=True,
        )
        return {"full": server, "auxiliary": client}

    none = float(jax.jit(plain)(full, test)["accuracy"])
    print(f"seed {seed}: full model without prompts {none:.3f}; distillation's loss {loss:.3f}")
    start = end = show(evaluate(state, test), test, "  untrained prompts")
    show(evaluate(state, some), some)
    while (left := config.rounds - int(state.round)) > 0:
        count = min(left, config.evaluation.every)
        state, facts = advance(state, problem.splits.clients, count)
        rows = test if count == left else some
        mean = float(facts["train/loss"].mean())
        end = show(evaluate(state, rows), rows, f"  training loss {mean:.3f}")
    return {
        "no prompts": none,
        "untrained": start["full"],
        "tuned": end["full"],
        "auxiliary, untrained": start["auxiliary"],
        "auxiliary, tuned": end["auxiliary"],
    }


def print_bytes(full: Params, auxiliary: Params, prompts: Array) -> None:
    """Prints what travels between server and a client, beside FedAvg's whole model."""

    def layout(params: Params) -> wire.Layout:
        return wire.Layout.of(whole_proxy(params, ()))

    down = wire.proxy_cost(layout({"auxiliary": auxiliary, "prompts": prompts})).fixed
    of_prompts = layout({"prompts": prompts})
    print(
        f"a client a round: down {down:,} bytes, of them prompts "
        f"{wire.proxy_cost(of_prompts).fixed:,}; up {wire.update_cost(of_prompts).fixed:,}; "
        f"FedAvg's model {wire.proxy_cost(layout(full)).fixed:,}"
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=8, help="prompt vectors")
    parser.add_argument("--layers", type=int, nargs="+", default=[0], help="of the auxiliary model")
    parser.add_argument(
        "--labelled", type=int, default=1000, help="rows that the head is fitted to"
    )
    parser.add_argument("--distillation-steps", type=int, default=100)
    parser.add_argument("--distillation-rate", type=float, default=5e-4)
    parser.add_argument("--prompt-rate", type=float, default=0.01)
    parser.add_argument("--auxiliary-rate", type=float, default=1e-4)
    parser.add_argument(
        "--auxiliary-share", type=float, default=0.5, help="of a client's steps; the rest: prompts"
    )
    parser.add_argument("--rows", type=int, default=256, help="test rows in between")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1)
    options, overrides = parser.parse_known_args()
    config = read_config("configs/sst2_minilm.py:fedavg", [*OWN, *overrides])
    problem = load_language_problem(config)
    architecture = read_architecture(
        config.model.pretrained, classes=problem.splits.num_classes, pooling=config.model.pooling
    ).with_dropout(config.client.dropout)
    small, auxiliary = auxiliary_model(architecture, problem.params, options.layers)
    setting = Setting(
        config,
        options,
        problem,
        architecture,
        prompted_encoder(architecture),
        prompted_encoder(small),
    )
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {vars(options)}")
    print_bytes(problem.params, auxiliary, jnp.zeros((options.prompts, architecture.width)))
    seeds = range(options.seed, options.seed + options.seeds)
    results = [measure(setting, seed) for seed in seeds]
    print(f"mean of {len(results)}, {len(problem.splits.test['label'])} rows:")
    for name in results[0]:
        print(f"  {name}: {statistics.fmean(result[name] for result in results):.3f}")


if __name__ == "__main__":
    main()
