"""Soft prompts for a model that clients do not have, on a tiny random encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from language_cases import CONFIGS, VOCAB, batch_of, jit, random_params

from fedqsn_jax.config.schema import Config, with_fields
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.data.population import from_clients
from fedqsn_jax.generation.language_tasks import sequence_classification
from fedqsn_jax.prompting.prompted_model import (
    Distillation,
    add_prompts,
    alternating,
    auxiliary_encoder,
    distil,
    distillation_loss,
    parts_of,
    prompted_apply,
    prompted_encoder,
    returning,
    take_layers,
)
from fedqsn_jax.protocol.algorithms import Promise, fedsp
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.protocol.wire import encode_proxy
from fedqsn_jax.rounds.aggregation import make_aggregator
from fedqsn_jax.rounds.client import make_client_update
from fedqsn_jax.rounds.client_optimizer import unscheduled
from fedqsn_jax.rounds.evaluation import make_evaluator
from fedqsn_jax.rounds.federation import Evaluation, make_federation
from fedqsn_jax.rounds.method import Method
from fedqsn_jax.simulation.compose import make_simulation
from fedqsn_jax.simulation.memory import client_bytes

CONFIG = CONFIGS["bert"].with_dropout(0.0)
KEY = jax.random.key(0)
SIZES = (6, 3, 0, 5)
FULL, AUXILIARY = prompted_encoder(CONFIG), auxiliary_encoder(CONFIG, 1)


@pytest.fixture(scope="module")
def full():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def whole(full, prompts):
    """The tree of all parameters, with the second layer as the auxiliary model."""
    return {**add_prompts(KEY, full, 2, [1]), "prompts": prompts}


@pytest.fixture(scope="module")
def prompts():
    """Two keys and values in the last layer."""
    return drawn((1, 2, 2, CONFIG.heads, CONFIG.width // CONFIG.heads), seed=5)


def drawn(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), jnp.float32)


def rows(count, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (count, 6)).astype(np.int32)
    return {"tokens": tokens, "label": (tokens[:, 1] % 3).astype(np.int32)}


def encoded_by_hand(params, batch, seen_too, positions_from):
    """An encoder's last hidden states in NumPy.

    ``seen_too`` has hidden states ``[count, width]`` for some layers: there tokens attend to them
    beside each other, as if they were tokens whose own output nobody wants.
    """
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    tokens, mask = np.asarray(batch["tokens"]), np.asarray(batch["mask"])

    def normed(x, norm):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * norm["scale"] + norm["bias"]

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    positions = np.maximum(mask.cumsum(axis=1) - 1, 0) + positions_from
    hidden = params["token_embed"]["embedding"][tokens] + params["type_embed"]["embedding"][0]
    hidden = normed(hidden + params["position_embed"]["embedding"][positions], params["embed_norm"])
    for index in range(CONFIG.layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        attention, extra = layer["attention"], seen_too.get(index, np.zeros((0, CONFIG.width)))
        keys_of = np.concatenate([np.broadcast_to(extra, (len(tokens), *extra.shape)), hidden], 1)
        query, key, value = (
            np.einsum("rtw,whs->rths", states, attention[name]["kernel"]) + attention[name]["bias"]
            for name, states in (("query", hidden), ("key", keys_of), ("value", keys_of))
        )
        scores = np.einsum("rqhs,rkhs->rhqk", query, key) / np.sqrt(CONFIG.width // CONFIG.heads)
        visible = np.concatenate([np.ones((len(tokens), len(extra)), bool), mask], axis=1)
        odds = np.exp(scores) * visible[:, None, None]
        odds /= odds.sum(axis=-1, keepdims=True)
        attended = np.einsum("rhqk,rkhs->rqhs", odds, value)
        out = np.einsum("rqhs,hsw->rqw", attended, attention["out"]["kernel"])
        hidden = normed(hidden + out + attention["out"]["bias"], layer["attention_norm"])
        inner = dense(hidden, layer["mlp"]["up"])
        inner = inner * (1 + scipy.special.erf(inner / np.sqrt(2))) / 2
        hidden = normed(hidden + dense(inner, layer["mlp"]["down"]), layer["mlp_norm"])
    return hidden


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("prompted", [1, 2], ids=["the last layer", "all layers"])
def test_prompts_are_keys_and_values_that_tokens_attend_to(family, prompted):
    """As the projections of hidden states are that stand beside the tokens in these layers."""
    config = dataclasses.replace(CONFIGS[family].with_dropout(0.0), classes=3)
    params, batch = random_params(config), batch_of()
    states = {layer: np.asarray(drawn((3, 8), layer)) for layer in range(2 - prompted, 2)}
    prompts = jnp.stack(
        [
            jnp.stack(
                [
                    jnp.einsum("cw,whs->chs", states[layer], each["kernel"][layer])
                    + jnp.expand_dims(each["bias"][layer], 0)
                    for each in (params["layers"]["attention"][name] for name in ("key", "value"))
                ]
            )
            for layer in sorted(states)
        ]
    )
    apply = jit(prompted_encoder(config), static_argnums=3)
    _, hidden = apply(params, prompts, batch, None)
    expected = encoded_by_hand(params, batch, states, config.first_position)
    real = np.asarray(batch["mask"])
    np.testing.assert_allclose(hidden[real], expected[real], rtol=1e-4, atol=1e-5)
    _, plain = apply(params, None, batch, None)
    expected = encoded_by_hand(params, batch, {}, config.first_position)
    np.testing.assert_allclose(plain[real], expected[real], rtol=1e-4, atol=1e-5)
    assert np.abs(plain - hidden).max() > 0.01, "they do make a difference"


def test_training_with_dropout_attends_to_prompts_too(full, prompts):
    """At a rate at which nothing is dropped it is what the other path gives."""
    dropping, batch = CONFIG.with_dropout(1e-9), batch_of()
    trained = jit(prompted_encoder(dropping))(full, prompts, batch, KEY)
    plain = jit(FULL, static_argnums=3)(full, prompts, batch, None)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), trained, plain
    )


def test_the_auxiliary_model_is_some_of_the_layers(full):
    """Applied twice, one layer is an encoder of two that are alike; each has prompts of its own."""
    small = take_layers(full, [1])
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_array_equal(ours[0], theirs[1]),
        small["layers"],
        full["layers"],
    )
    assert small["classifier"] is full["classifier"]
    batch, prompts = batch_of(), drawn((2, 2, 3, 2, 4), seed=6)
    twice = jit(auxiliary_encoder(CONFIG, 1, 2), static_argnums=3)(small, prompts, batch, None)
    alike = jit(FULL, static_argnums=3)(take_layers(full, [1, 1]), prompts, batch, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), twice, alike)
    last = take_layers(full, [-1])
    jax.tree.map(np.testing.assert_array_equal, last, small)
    for layers in ([], [2], [-3]):
        with pytest.raises(ValueError, match=r"^layers = .*: allowed are one or more of -2 to 1$"):
            take_layers(full, layers)


def test_untrained_prompts_have_the_small_models_depth_and_nothing_of_the_model(full):
    """One layer of prompts for each layer that clients apply, no more than the full model has."""
    prompts = add_prompts(KEY, full, 64, [1], passes=2)["prompts"]
    assert prompts.shape == (2, 2, 64, 2, 4)
    np.testing.assert_allclose(prompts.std(axis=(0, 2, 3, 4)), [2, 0.1], rtol=0.1)
    unknown = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), full)
    assert (add_prompts(KEY, unknown, 64, [1], passes=2)["prompts"] == prompts).all()
    with pytest.raises(ValueError, match=r"^passes = 2 of 2 layers: .* the model's 2$"):
        add_prompts(KEY, full, 64, [0, 1], passes=2)


def test_distillation_loss_by_hand():
    """One row counts, of two tokens one is real: errors 1 and 3; odds of a half each."""
    student = jnp.zeros((2, 2)), jnp.asarray([[[1.0, 3.0], [9, 9]], [[7, 7], [7, 7]]])
    teacher = jnp.zeros((2, 2)), jnp.zeros((2, 2, 2))
    real, valid = jnp.asarray([[True, False], [True, True]]), jnp.asarray([True, False])
    loss = distillation_loss(student, teacher, real, valid, temperature=2.0)
    np.testing.assert_allclose(loss, (1 + 9) / 2 + 4 * np.log(2), rtol=1e-6)


def test_distillation_brings_the_models_together(whole):
    """In the layers alone, and also where the prompts have moved."""
    server = {name: jnp.asarray(array) for name, array in rows(16, 1).items()}

    small, _ = jit(
        lambda params: distil(
            KEY,
            FULL,
            AUXILIARY,
            params=params,
            rows=server,
            settings=Distillation(
                unscheduled(optax.adam(0.01)), steps=60, batch_size=16, noise=0.5
            ),
        )
    )(whole)

    @jit
    def distance(params):
        model = {**params["auxiliary"], "classifier": params["classifier"]}
        goal, is_real = (
            FULL(full_of(params), params["prompts"], server, None),
            jnp.ones((16, 6), bool),
        )
        student = AUXILIARY(model, params["prompts"], server, None)
        return distillation_loss(student, goal, is_real, is_real[:, 0]) - distillation_loss(
            goal, goal, is_real, is_real[:, 0]
        )

    assert 0 < distance(small) < 0.3 * distance(whole)
    changed = {
        path
        for path, leaf in leaves_by_path(small).items()
        if (np.asarray(leaf) != np.asarray(leaves_by_path(whole)[path])).any()
    }
    assert changed == {path for path in leaves_by_path(whole) if path.startswith(LAYERS)}


LAYERS = "auxiliary/layers/"


def full_of(params):
    return {**params["model"], "classifier": params["classifier"]}


def federation(optimizer, *, share=0.5, tuned=("prompts", "classifier"), steps=4, clients=4):
    """The method on tiny encoders, as the main job composes it."""
    apply, task = prompted_apply(FULL, AUXILIARY), sequence_classification()
    parts = parts_of(SHAPES, tuned, auxiliary=share > 0)
    update = make_client_update(
        apply,
        task,
        alternating(*map(unscheduled, optimizer), share),
        8,
        steps=steps,
        trained=parts.trained,
    )
    method = Method(
        transform=fedsp().transform,
        update=returning(update, parts.returned),
        aggregator=make_aggregator(Sites(), optax.sgd(1.0), trained=parts.returned),
        sites=Sites(),
        roles=parts,
    )
    evaluation = Evaluation(
        make_evaluator(apply, task, 8), "accuracy", proxy_samples=2, attackers=(1,)
    )
    return make_federation(method, evaluation, population=clients, cohort=clients)


SHAPES = jax.eval_shape(lambda: add_prompts(KEY, random_params(CONFIG), 2, [1]))


def test_the_server_averages_what_clients_tuned(whole):
    """Against each client's steps one by one: half for the auxiliary model, half for the rest."""
    task, clients = sequence_classification(), [rows(n, 10 + i) for i, n in enumerate(SIZES)]
    method = federation((optax.sgd(0.1), optax.sgd(0.3)))
    state = method.init(KEY, whole)
    after, facts = jit(method.round)(state, from_clients(clients))

    @jit
    def gradients(small, tuned, batch):
        def loss(small, tuned):
            model = {**small, "classifier": tuned["classifier"]}
            logits = AUXILIARY(model, tuned["prompts"], batch, None)[0]
            return task.loss(logits, batch, jnp.ones(batch["label"].shape, bool))

        return jax.value_and_grad(loss, argnums=(0, 1))(small, tuned)

    def moved(tree, gradient, rate):
        return jax.tree.map(lambda p, g: p - rate * g, tree, gradient)

    start = {name: whole[name] for name in ("prompts", "classifier")}
    total, losses = jax.tree.map(lambda leaf: np.zeros(leaf.shape), start), 0.0
    for batch in clients:
        count = len(batch["label"])
        small, tuned = whole["auxiliary"], start
        for index in range(4 if count else 0):
            loss, (by_model, by_tuned) = gradients(small, tuned, batch)
            losses += count * float(loss) / 4
            if index < 2:
                small = {**small, "layers": moved(small["layers"], by_model["layers"], 0.1)}
            else:
                tuned = moved(tuned, by_tuned, 0.3)
        total = jax.tree.map(
            lambda sum, end, begin, n=count: sum + n * (np.asarray(end, np.float64) - begin),
            total,
            tuned,
            start,
        )
    for name, each in start.items():
        jax.tree.map(
            lambda end, begin, sum: np.testing.assert_allclose(
                end - begin, sum / np.sum(SIZES), rtol=1e-3, atol=1e-6
            ),
            after.params[name],
            each,
            total[name],
        )
    assert np.abs(total["prompts"]).max() > 1e-3
    np.testing.assert_allclose(facts["train/loss"], losses / sum(SIZES), rtol=1e-5)
    for name in ("model", "auxiliary"):
        jax.tree.map(np.testing.assert_array_equal, after.params[name], whole[name])


def test_no_round_tells_of_the_full_model_and_only_the_owner_has_it(whole):
    """Whatever the withheld tensors are, NaN too: rounds, payloads and clients' views are the same.

    What does tell of it is distillation, before the first round, and so the method declares it.
    """
    assert fedsp().broken_promises == {Promise.NOTHING_SENT_DEPENDS_ON_HIDDEN_VALUES}
    method = federation((optax.adam(0.1), optax.adam(0.1)), tuned=("prompts",), clients=2)
    data = from_clients([rows(6, 10), rows(4, 11)])
    test = {name: jnp.asarray(array) for name, array in rows(9, 3).items()}
    init, run, evaluate = jit(method.init), jit(method.round), jit(method.evaluate)

    def told(model):
        state = init(KEY, {**whole, "model": model})
        state, facts = run(state, data)
        jax.tree.map(np.testing.assert_array_equal, state.params["model"], model)
        views = evaluate(state, test)
        rest = {name: each for name, each in state.params.items() if name != "model"}
        payload = encode_proxy(method.prepare(state))
        return views, (payload, jax.tree.map(np.asarray, (rest, facts)))

    views, first = told(whole["model"])
    others, second = told(jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), whole["model"]))
    assert first[0] == second[0]
    jax.tree.map(np.testing.assert_array_equal, first[1], second[1])
    np.testing.assert_array_equal(
        first[1][0]["classifier"]["out"]["kernel"], whole["classifier"]["out"]["kernel"]
    )
    assert np.isnan(others["global/loss"])
    clients = [name for name in views if not name.startswith("global")]
    assert {name: views[name] for name in clients} == {name: others[name] for name in clients}
    assert {name.partition("/")[0] for name in clients} == {"server", "proxy", "attacker_1"}
    assert views["proxy/loss"] == views["server/loss"] != views["global/loss"]


def test_a_client_takes_the_memory_of_what_it_trains_with():
    """However deep the model is that it has not got; against the estimate for what it has."""
    values = {"algorithm": "fedsp", "cohort.size": 2, "evaluation.attackers": (1,)}
    config = with_fields(Config(), {**values, "client.batch_size": 4})
    data, task = from_clients([rows(6, 10), rows(4, 11)]), sequence_classification()

    def estimate(layers):
        deep = dataclasses.replace(CONFIG, layers=layers)
        shapes = jax.eval_shape(lambda: add_prompts(KEY, random_params(deep), 2, [-1]))
        apply = prompted_apply(prompted_encoder(deep), AUXILIARY)
        return make_simulation(config, apply, task, shapes, data, apply).memory

    took = estimate(2)["training of 1 client at once"]
    assert took == estimate(6)["training of 1 client at once"]
    has = {name: each for name, each in SHAPES.items() if name != "model"}
    trained = parts_of(SHAPES, ("prompts",), auxiliary=True).trained

    def apply(params, batch, key):
        model = {**params["auxiliary"], "classifier": params["classifier"]}
        return AUXILIARY(model, params["prompts"], batch, key)[0]

    optimizer = alternating(*map(unscheduled, [optax.adam(0.1), optax.sgd(0.1)]))
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, rows(4, 0)))
    assert took == client_bytes(apply, task, optimizer, has, batch, trained=trained)


def test_where_tensors_go():
    """What is tuned returns; what else is trained is the auxiliary model's layers."""
    paths = set(leaves_by_path(SHAPES))
    classifier = {path for path in paths if path.startswith("classifier/")}
    layers = {path for path in paths if path.startswith(LAYERS)}
    parts = parts_of(SHAPES, ("prompts", "classifier"), auxiliary=True)
    assert parts.returned == {"prompts"} | classifier
    assert parts.trained == parts.returned | layers
    assert parts.sent.isdisjoint(parts.withheld)
    assert parts.sent | parts.withheld == paths
    assert parts_of(SHAPES, ("classifier",), auxiliary=False).trained == classifier
    with pytest.raises(ValueError, match=r"^auxiliary_share = 2: allowed is 0 to 1$"):
        alternating(*map(unscheduled, [optax.sgd(0.1)] * 2), 2)
