"""Soft prompts for a model that clients do not have, on a tiny random encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from language_cases import CONFIGS, VOCAB, batch_of, jit, random_params

from fedqsn_jax.aggregation import make_aggregator
from fedqsn_jax.data.federated import from_clients
from fedqsn_jax.fedsp import (
    alternating,
    auxiliary_model,
    distil,
    distillation_loss,
    make_fedsp,
    prompted_encoder,
)
from fedqsn_jax.language_tasks import sequence_classification

CONFIG = CONFIGS["bert"].with_dropout(0.0)
KEY = jax.random.key(0)
SIZES = (6, 3, 0, 5)


@pytest.fixture(scope="module")
def full():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def prompts():
    return jnp.asarray(np.random.default_rng(5).normal(0, 0.5, (2, CONFIG.width)), jnp.float32)


@pytest.fixture(scope="module")
def auxiliary(full):
    return auxiliary_model(CONFIG, full, [1])


def rows(count, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (count, 6)).astype(np.int32)
    return {"tokens": tokens, "label": (tokens[:, 1] % 3).astype(np.int32)}


def test_prompts_are_embeddings_that_tokens_attend_to(full, prompts):
    """As two more tokens would be whose embeddings they are, up to position and type."""
    apply, batch = jit(prompted_encoder(CONFIG), static_argnums=3), batch_of()
    logits, hidden = apply(full, prompts, batch, None)
    assert hidden.shape == (3, 6, CONFIG.width)
    table = full["token_embed"]["embedding"]
    extended = {
        **full,
        "token_embed": {"embedding": jnp.concatenate([table, prompts])},
        "position_embed": {
            "embedding": jnp.pad(full["position_embed"]["embedding"][:14], ((2, 0), (0, 0)))
        },
        "type_embed": {
            "embedding": jnp.stack(
                [full["type_embed"]["embedding"][0], jnp.zeros(CONFIG.width, jnp.float32)]
            )
        },
    }
    # Rows whose padding is on the right only: otherwise prompts would not come first.
    put = jnp.broadcast_to(jnp.arange(VOCAB, VOCAB + 2), (2, 2))
    longer = {
        "tokens": jnp.concatenate([put, batch["tokens"][:2]], axis=1),
        "mask": jnp.pad(batch["mask"][:2], ((0, 0), (2, 0)), constant_values=True),
        "token_types": jnp.pad(jnp.zeros((2, 6), jnp.int32), ((0, 0), (2, 0)), constant_values=1),
    }
    wider = prompted_encoder(dataclasses.replace(CONFIG, vocab_size=VOCAB + 2))
    _, expected = jit(wider, static_argnums=3)(extended, None, longer, None)
    real = np.asarray(batch["mask"][:2])
    np.testing.assert_allclose(hidden[:2][real], expected[:, 2:][real], rtol=1e-4, atol=1e-5)
    plain, plain_hidden = apply(full, None, batch, None)
    assert np.abs(plain_hidden - hidden).max() > 100 * 1e-5, "they do make a difference"
    assert (plain != logits).all()


def test_the_auxiliary_model_is_some_of_the_layers(full, auxiliary):
    config, params = auxiliary
    assert config.layers == 1
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_array_equal(ours[0], theirs[1]),
        params["layers"],
        full["layers"],
    )
    assert params["classifier"] is full["classifier"]
    for layers in ([], [2], [-1]):
        with pytest.raises(ValueError, match=r"^layers = .*: allowed are one or more of 0 to 1$"):
            auxiliary_model(CONFIG, full, layers)


def test_distillation_loss_by_hand():
    """One row counts, of two tokens one is real: errors 1 and 3; odds of a half each."""
    student = jnp.zeros((2, 2)), jnp.asarray([[[1.0, 3.0], [9, 9]], [[7, 7], [7, 7]]])
    teacher = jnp.zeros((2, 2)), jnp.zeros((2, 2, 2))
    real, valid = jnp.asarray([[True, False], [True, True]]), jnp.asarray([True, False])
    loss = distillation_loss(student, teacher, real, valid, temperature=2.0)
    np.testing.assert_allclose(loss, (1 + 9) / 2 + 4 * np.log(2), rtol=1e-6)


def test_distillation_brings_the_models_together(full, auxiliary):
    config, params = auxiliary
    server = {name: jnp.asarray(array) for name, array in rows(16, 1).items()}

    def train(params, optimizer, steps):
        return distil(
            *(KEY, prompted_encoder(CONFIG), full, prompted_encoder(config), params, server),
            optimizer,
            steps=steps,
            batch_size=16,
        )

    @jit
    def losses(params):
        small, _ = train(params, optax.adam(0.01), 60)
        before, after = (train(each, optax.sgd(0.0), 1)[1] for each in (params, small))
        goal = prompted_encoder(CONFIG)(full, None, server, None)
        everything = jnp.ones((16, 6), bool)
        least = distillation_loss(goal, goal, everything, everything[:, 0])
        return before - least, after - least

    before, after = losses(params)
    assert 0 < after < 0.3 * before


def test_the_server_averages_prompts_that_clients_trained(full, auxiliary, prompts):
    """Against each client's steps one by one: half for the auxiliary model, half for prompts."""
    config, small = auxiliary
    apply, task = prompted_encoder(config), sequence_classification()
    clients = [rows(count, 10 + index) for index, count in enumerate(SIZES)]
    data = from_clients(clients)
    method = make_fedsp(
        prompted_encoder(CONFIG),
        apply,
        task,
        alternating(optax.sgd(0.1), optax.sgd(0.3)),
        make_aggregator((), optax.sgd(1.0)),
        population=4,
        cohort=4,
        batch_size=8,
        steps=4,
    )
    state = method.init(KEY, full, small, prompts)
    after, facts = jit(method.round)(state, data)

    @jit
    def gradients(small, prompts, batch):
        def loss(small, prompts):
            valid = jnp.ones(batch["label"].shape, bool)
            return task.loss(apply(small, prompts, batch, None)[0], batch, valid)

        return jax.value_and_grad(loss, argnums=(0, 1))(small, prompts)

    total, losses = np.zeros(prompts.shape), 0.0
    for batch in clients:
        count = len(batch["label"])
        own, mine = small, prompts
        for index in range(4 if count else 0):
            loss, (by_model, by_prompts) = gradients(own, mine, batch)
            losses += count * float(loss) / 4
            if index < 2:
                own = jax.tree.map(lambda p, g: p - 0.1 * g, own, by_model)
            else:
                mine = mine - 0.3 * by_prompts
        total += count * (np.asarray(mine, np.float64) - np.asarray(prompts))
    np.testing.assert_allclose(after.prompts - prompts, total / sum(SIZES), rtol=1e-3, atol=1e-6)
    assert np.abs(total).max() > 1e-3
    np.testing.assert_allclose(facts["train/loss"], losses / sum(SIZES), rtol=1e-5)
    assert int(after.round) == 1
    for name in ("full", "auxiliary"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))

    metrics = jit(method.evaluate)(after, {k: jnp.asarray(v) for k, v in rows(9, 3).items()})
    assert set(metrics) == {f"{v}/{m}" for v in ("global", "proxy") for m in ("accuracy", "loss")}
    with pytest.raises(ValueError, match=r"^auxiliary_share = 2: allowed is 0 to 1$"):
        alternating(optax.sgd(0.1), optax.sgd(0.1), 2)


def test_frozen_tensors_change_the_cost_and_not_the_prompts(full, auxiliary, prompts):
    """With no step for the auxiliary model it is the same whether it could be trained."""
    config, small = auxiliary
    data = from_clients([rows(6, 10), rows(4, 11)])

    def after(trained):
        method = make_fedsp(
            prompted_encoder(CONFIG),
            prompted_encoder(config),
            sequence_classification(),
            alternating(optax.adam(0.1), optax.adam(0.1), auxiliary_share=0),
            make_aggregator((), optax.sgd(1.0)),
            population=2,
            cohort=2,
            batch_size=4,
            steps=3,
            trained=trained,
        )
        return jit(method.round)(method.init(KEY, full, small, prompts), data)[0].prompts

    free, frozen = after(None), after(frozenset({"prompts"}))
    np.testing.assert_allclose(frozen, free, rtol=1e-4, atol=1e-6)
    assert np.abs(frozen - prompts).max() > 0.01
