"""Colluders who train what they hold: a toy in which training finds what they do not see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax.config.schema import resolve
from fedqsn_jax.core.keys import federation_key
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.data.population import FederatedData
from fedqsn_jax.rounds.views import attacker_params
from fedqsn_jax.simulation.compose import make_simulation
from fedqsn_jax.simulation.fine_tuned_attackers import train_attackers, trains_attackers

SITE = "hidden/kernel"
OWNER = {
    "hidden": {"kernel": jnp.eye(4)},
    # Only the first hidden unit decides.
    "head": {"kernel": 5.0 * jnp.array([[-1.0, 1.0]] + 3 * [[0.0, 0.0]])},
}


def apply_fn(params, batch, key):
    return batch["image"] @ params["hidden"]["kernel"] @ params["head"]["kernel"]


def rows(count, twins, seed):
    """The label is the sign of the first feature; where there are twins the second has it too."""
    image = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    label = (image[:, 0] > 0).astype(np.int32)
    if twins:
        image[:, 1] = image[:, 0]
    return {"image": image, "label": label}


def settings(algorithm="fedqsn", steps=200):
    return resolve(
        {
            "algorithm": algorithm,
            "rounds": 1,
            "bits": 4,
            "site_rules": ("head/kernel: none", "hidden/kernel: input column"),
            "data": {"clients": 3},
            "cohort": {"size": 1},
            "client": {"batch_size": 8},
            "evaluation": {"attackers": (1, 2), "fine_tuned_attackers": steps},
        }
    )


@pytest.fixture(scope="module")
def toy():
    """Simulation, data and the state in which every member has all columns but the first."""
    clients = [rows(40, True, 0), rows(30, True, 1), rows(1, True, 2)]
    offsets = jnp.cumsum(jnp.array([0] + [len(each["label"]) for each in clients]))
    examples = {
        name: jnp.concatenate([each[name] for each in clients]) for name in ("image", "label")
    }
    data = FederatedData(examples, offsets.astype(jnp.int32))
    simulation = make_simulation(settings(), apply_fn, classification(), OWNER, data)
    state = jax.jit(simulation.federation.init)(federation_key(0), OWNER)
    known = {SITE: jnp.array([[False, True, True, True]])}
    copy = {**OWNER, "hidden": {"kernel": OWNER["hidden"]["kernel"].at[:, 0].set(0)}}
    members = {"attacker_1": jnp.array([0]), "attacker_2": jnp.array([0, 1])}
    attackers = {
        name: dataclasses.replace(each, members=members[name], known=known, copy=copy)
        for name, each in state.attackers.items()
    }
    return simulation, data, dataclasses.replace(state, attackers=attackers)


def score(params, test):
    outputs = apply_fn(params, test, None)
    return float((outputs.argmax(-1) == test["label"]).mean())


def test_training_closes_a_gap_that_the_union_leaves(toy):
    simulation, data, state = toy
    test = {name: jnp.asarray(array) for name, array in rows(200, True, 9).items()}
    assert score(OWNER, test) == 1
    for attacker in state.attackers.values():
        assert score(attacker_params(attacker, simulation.sites), test) < 0.6
    found = train_attackers(simulation, state, apply_fn, None, data, test)
    assert {name: (each.rows, each.held_rows) for name, each in found.items()} == {
        "attacker_1": (32, 8),
        "attacker_2": (56, 14),
    }
    for each in found.values():
        assert each.score > 0.95
        assert 0 < each.steps <= 200


def test_only_what_is_known_is_trained_and_nobody_trains_without_rows(toy):
    """Where nothing else has the label's feature the known columns must learn to read it."""
    simulation, data, state = toy
    test = {name: jnp.asarray(array) for name, array in rows(200, False, 9).items()}
    nothing = {SITE: jnp.zeros((1, 4), bool)}
    empty = jax.tree.map(jnp.zeros_like, OWNER)
    one, two = state.attackers.values()
    attackers = {
        # It has a copy of the head alone, so that whatever it trains gives no answer.
        "attacker_1": dataclasses.replace(
            one, known=nothing, copy={**empty, "head": OWNER["head"]}
        ),
        "attacker_2": dataclasses.replace(two, members=jnp.array([2])),
    }
    state = dataclasses.replace(state, attackers=attackers)
    found = train_attackers(simulation, state, apply_fn, None, data, test)
    # The other's only row was held back.
    assert list(found) == ["attacker_1"]
    assert found["attacker_1"].score == pytest.approx(float((test["label"] == 0).mean()))


def test_who_has_received_nothing_does_not_train(toy):
    simulation, data, state = toy
    nobody = {
        name: dataclasses.replace(
            each, **jax.tree.map(jnp.zeros_like, {"copy": each.copy, "known": each.known})
        )
        for name, each in state.attackers.items()
    }
    state = dataclasses.replace(state, attackers=nobody)
    test = {name: jnp.asarray(array) for name, array in rows(20, True, 9).items()}
    assert train_attackers(simulation, state, apply_fn, None, data, test) == {}


def test_who_trains():
    assert trains_attackers(settings())
    assert not trains_attackers(settings(steps=0))
