"""What is left of a round's change, FedAvg among colluders, and training that chooses its rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedqsn_jax.audit.alone import make_colluders_federation, members_places
from fedqsn_jax.audit.case import case_of_run
from fedqsn_jax.audit.evaluation import make_answering
from fedqsn_jax.audit.replay import make_client_proxy, replay
from fedqsn_jax.audit.subtraction import compare, others_update, own_updates, pairs
from fedqsn_jax.config.schema import resolve
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.protocol.proxy import dequantize_proxy, whole_proxy
from fedqsn_jax.reporting.display import silent_display
from fedqsn_jax.rounds.evaluation import make_held_measure
from fedqsn_jax.rounds.fine_tuning import everything, make_fine_tuning
from fedqsn_jax.rounds.pooled_rows import divide, pooled_rows
from fedqsn_jax.runs import experiment

TASK = classification()


def test_who_is_alone_in_a_round_of_fedavg_has_made_all_of_its_change(tmp_path):
    settings = {
        "algorithm": "fedavg",
        "rounds": 2,
        "data": {"name": "digits", "clients": 3, "private_rows": 20, "test_rows": 30,
                 "train_rows": 90},
        "model": {"name": "mlp", "hidden": (6,)},
        "cohort": {"size": 1},
        "client": {"steps": 3, "batch_size": 8, "learning_rate": 0.1},
        "evaluation": {"attackers": (1,), "proxy_samples": 2},
    }  # fmt: skip
    experiment.run(resolve(settings), tmp_path / "run", silent_display())
    case = case_of_run(tmp_path / "run")
    (change,) = replay(case, [], lambda *_: None, lambda _: None, changes=[0]).changes
    client = int(case.simulation.federation.cohort(case.start)[0])
    proxy = dequantize_proxy(make_client_proxy(case)(case.start, jnp.int32(client)))
    own = own_updates(case, 0, {client: proxy}, [client])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), own, change.params)


def test_what_is_left_is_the_others_update_where_both_rounds_are_seen(model):
    generator = np.random.default_rng(0)

    def noise():
        return jax.tree.map(
            lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32), model.params
        )

    own, others = noise(), noise()
    after = jax.tree.map(lambda w, a, b: w + a + b, model.params, own, others)
    site = model.sites[0]
    visible = {site.path: jnp.arange(site.columns)[None] < 4}
    first = whole_proxy(model.params, model.sites)
    second = dataclasses.replace(whole_proxy(after, model.sites), visible=visible)
    estimate, seen = others_update([first], [second], own)
    found = compare(estimate, others, seen)
    assert found.cosine == pytest.approx(1, abs=1e-5)
    hidden = (site.columns - 4) * (site.fan_in + 1)
    total = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert found.compared == pytest.approx(1 - hidden / total)
    assert abs(compare(noise(), others, seen).cosine) < 0.3


def test_pairs_are_rounds_that_follow_each_other():
    assert pairs({0: [1], 2: [1], 3: [4], 4: [1], 9: [1]}) == [2, 3]


def test_a_fifth_is_held_back_and_every_row_keeps_its_owner(data):
    divided = divide(data, [0, 2, 3], seed=0)
    assert len(divided.held["x"]) == 4
    assert len(divided.train["x"]) == 16
    for row, owner in zip(divided.train["x"], divided.owners, strict=True):
        client = (0, 2, 3)[owner]
        own = np.asarray(data.examples["x"][data.offsets[client] : data.offsets[client + 1]])
        assert (own == row).all(axis=1).any()
    everyone = np.concatenate([divided.train["x"], divided.held["x"]])
    assert len(np.unique(everyone, axis=0)) == 20


def separable(rows):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(rows, 6)).astype(np.float32)
    return {"x": x, "label": (x[:, 0] > 0).astype(np.int32)}


@pytest.fixture(scope="module")
def rows():
    both = separable(160)
    train, held = ({n: a[part] for n, a in both.items()} for part in (slice(128), slice(128, 160)))
    return pooled_rows(train, held, (140, 40))


def test_training_chooses_a_rate_that_learns(model, rows):
    measure = make_held_measure(model.apply_fn, TASK, 16)
    fine_tune = make_fine_tuning(
        model.apply_fn, TASK.loss, measure, batch_size=16, rates=(1e-6, 0.03, 1e6), at_once=2
    )
    key = jax.random.key(0)
    tuned = fine_tune(model.params, everything(model.params), rows, 120, key)
    assert tuned.rate == 0.03
    assert tuned.held_score > 0.85
    score, _ = measure(tuned.params, rows.held, rows.kept)
    assert float(score) == pytest.approx(tuned.held_score)
    nothing = jax.tree.map(jnp.logical_not, everything(model.params))
    frozen = fine_tune(model.params, nothing, rows, 120, key)
    jax.tree.map(np.testing.assert_array_equal, frozen.params, model.params)
    assert frozen.steps == 0


def test_padding_counts_for_nothing(model, rows):
    measure = make_held_measure(model.apply_fn, TASK, 16)
    answers = make_answering(model.apply_fn, TASK, 7)(model.params, rows.held)
    count = int(rows.kept)
    score, loss = measure(model.params, rows.held, rows.kept)
    assert float(score) == pytest.approx(answers.sums["correct"][:count].mean())
    assert float(loss) == pytest.approx(answers.sums["loss"][:count].mean(), rel=1e-5)


def test_a_federation_of_colluders_is_fedavg(model, rows):
    # One round of one step with all rows of a member in a batch of one row each: by hand.
    measure = make_held_measure(model.apply_fn, TASK, 16)
    one_row = {name: jnp.repeat(array[:1], 140, axis=0) for name, array in rows.train.items()}
    other = {name: array[5:6] for name, array in rows.train.items()}
    train = {name: array.at[3:].set(other[name][0]) for name, array in one_row.items()}
    places, counts = members_places(np.array([0, 0, 0, 1]), 3)
    assert counts.tolist() == [3, 1, 0]
    federate = make_colluders_federation(
        model.apply_fn, TASK.loss, measure, batch_size=2, rates=(0.1,), rounds=4, local_steps=1
    )
    made = federate(
        model.params,
        dataclasses.replace(rows, train=train),
        jnp.asarray(places),
        jnp.asarray(counts),
        jax.random.key(0),
    )
    rounds = made.steps
    optimizer, common = optax.adam(0.1), model.params
    for _ in range(rounds):
        ends = []
        for batch in ({n: a[:1] for n, a in one_row.items()}, other):
            gradient = jax.grad(
                lambda p, b=batch: TASK.loss(model.apply_fn(p, b, None), b, jnp.ones(1, bool))
            )(common)
            updates, _ = optimizer.update(gradient, optimizer.init(common), common)
            ends.append(optax.apply_updates(common, updates))
        common = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *ends)
    assert rounds in (1, 2, 3, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), made.params, common)
