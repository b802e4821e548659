"""What is sent of a model: when, how much of it, and to whom."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounds_cases import fast

from fedqsn_jax.config.schema import Config, ConfigError, resolve, to_dict, with_fields
from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.problems.training import hold_back
from fedqsn_jax.protocol.broadcast import EVERY_ROUND, Broadcast
from fedqsn_jax.protocol.masks import draw_masks
from fedqsn_jax.protocol.sites import MaskSite, Sites
from fedqsn_jax.rounds.client_axis import sample_cohort
from fedqsn_jax.rounds.method import Method
from fedqsn_jax.simulation.costs import payloads_per_client

FROZEN = "frozen"
RETURNED = frozenset({"w"})


def model(value):
    """A model of which ``frozen`` never changes."""
    return {"w": jnp.full(3, value, jnp.float32), FROZEN: jnp.zeros(2)}


def sent(broadcast, values):
    """What is sent in each round, where rounds make these values, and then after the last."""
    state = broadcast.init(model(values[0]), RETURNED, 4)
    found = []
    for finished, value in enumerate(values):
        if finished:
            state = fast(broadcast.after_round)(state, model(value), jnp.int32(finished))
        params = broadcast.sent(state, model(value))
        assert np.asarray(params[FROZEN]).tolist() == [0, 0]
        found.append(float(params["w"][0]))
    return found


@pytest.mark.parametrize(
    ("broadcast", "expected"),
    [
        (EVERY_ROUND, [1, 2, 4, 8, 16, 32]),
        (Broadcast(every=0), [1, 1, 1, 1, 1, 1]),
        (Broadcast(every=2), [1, 1, 4, 4, 16, 16]),
        (Broadcast(every=3), [1, 1, 1, 8, 8, 8]),
        (Broadcast(share=0.5), [1, 1.5, 2.5, 4.5, 8.5, 16.5]),
        (Broadcast(every=2, share=0.5), [1, 1, 2.5, 2.5, 8.5, 8.5]),
    ],
    ids=str,
)
def test_what_is_sent_and_when(broadcast, expected):
    assert sent(broadcast, [1, 2, 4, 8, 16, 32]) == expected


def test_a_plain_broadcast_keeps_nothing():
    """So states of runs from before there were others are what they were."""
    assert jax.tree.leaves(EVERY_ROUND.init(model(1.0), RETURNED, 4)) == []


@pytest.mark.parametrize("renewed", [False, True, jnp.asarray(False), jnp.asarray(True)])
def test_a_payload_that_stays_the_same_is_sent_once(renewed):
    broadcast = Broadcast(every=0, renewed=renewed)
    state, received = broadcast.init(model(1.0), RETURNED, 6, ["w"]), set()
    send, payloads, columns = fast(broadcast.send), 0, 0
    # As if many had been sent before: counts go on beyond 32 bits.
    before = 2**32 - 3
    state = state.replace(columns={"w": jnp.asarray([0, before], jnp.uint32)})
    for cohort, lost in (([0, 3], None), ([3, 5], None), ([0, 5], 0), ([1, 3], 3)):
        visible = np.arange(14).reshape(2, 1, 7) % 3 > 0
        due = [bool(renewed) or one not in received or one == lost for one in cohort]
        has_lost = jnp.asarray(cohort) == (-1 if lost is None else lost)
        state, facts = send(state, jnp.asarray(cohort), {"w": visible}, has_lost)
        payloads, columns = payloads + sum(due), columns + int(visible[due].sum())
        received |= set(cohort)
        assert int(facts["clients/sent"]) == sum(due)
        assert facts["payloads"].tolist() == [0, payloads]
        high, low = map(int, facts["visible/w"])
        assert 2**32 * high + low == before + columns
        assert set(np.flatnonzero(state.received)) == received


@pytest.mark.parametrize("colluders", [1, 2, 4])
def test_coalitions_know_no_more_than_their_own_masks(colluders):
    """Invariant 6 with masks that stay: 1 - p2**m, after however many rounds."""
    site = MaskSite("big/kernel", (1, 40_000), (), (0,), (1,))
    sticky = Method(None, None, None, Sites([site]), mask_per="client")  # type: ignore[arg-type]
    renewed, secret = sticky._replace(mask_per="round"), jax.random.key(8)

    def known(method, rounds):
        keys = [method.mask_key(secret, t, c) for t in range(rounds) for c in range(colluders)]
        masks = [draw_masks(key, method.sites, 0.3)[site.path] for key in keys]
        return np.logical_or.reduce([np.asarray(mask) for mask in masks])

    once, again = known(sticky, 1), known(sticky, 3)
    np.testing.assert_array_equal(once, again)
    expected = 1 - 0.3**colluders
    sigma = (expected * (1 - expected) / once.size) ** 0.5
    assert abs(once.mean() - expected) < 4 * sigma
    assert known(renewed, 3).mean() > 1 - 0.3 ** (2 * colluders)


ONE_WAY = {"broadcast.every": 0}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (ONE_WAY | {"server.optimizer": "adam"}, "server.optimizer = 'adam' with broadcast.every"),
        (ONE_WAY | {"server.momentum": 0.9}, "server.momentum = 0.9 with broadcast.every = 0"),
        (ONE_WAY | {"server.learning_rate": 0.5}, "server.learning_rate = 0.5 with broadcast"),
        (ONE_WAY | {"server.decay": "linear"}, "server.decay = 'linear' with broadcast.every = 0"),
        (ONE_WAY | {"server.rule": "from_sent"}, "server.rule = 'from_sent' with broadcast.every"),
        ({"broadcast.every": 3, "server.rule": "interpolate"}, "allowed is server.rule = 'delta'"),
        (ONE_WAY | {"broadcast.share": 0.5}, "nothing that was learned is sent"),
        ({"broadcast.share": 0.0}, "broadcast.share = 0.0: allowed is 1e-06 to 1"),
        (ONE_WAY | {"server.scale": 0.0, "server.validation_rows": 0}, "nothing to choose"),
        (
            ONE_WAY | {"algorithm": "fedsp", "model.name": "language", "data.name": "text"},
            "with algorithm = 'fedsp', whose prompts have to travel",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused_with_the_ways_out(values, told):
    text = {"data.task": "sst2", "data.train": "tsv:rows", "model.pretrained": "directory"}
    extra = text if values.get("algorithm") == "fedsp" else {}
    config = to_dict(with_fields(Config(), {**extra, **values}))
    with pytest.raises(ConfigError) as refused:
        resolve(config)
    assert told in str(refused.value)
    assert "allowed" in str(refused.value)


@pytest.mark.parametrize("every", [1, 3])
def test_other_server_steps_go_with_rarer_broadcasts(every):
    values = {"broadcast.every": every, "server.optimizer": "adam", "server.learning_rate": 0.1}
    resolve(to_dict(with_fields(Config(), values)))


def test_validation_rows_are_kept_from_training():
    private = {"x": np.arange(10), "label": np.arange(10)}
    chosen = with_fields(Config(), ONE_WAY | {"server.scale": 0.0, "server.validation_rows": 4})
    train, validation = hold_back(chosen, private)
    assert (train["x"].tolist(), validation["x"].tolist()) == ([*range(6)], [*range(6, 10)])
    fixed = with_fields(chosen, {"server.scale": 2.0})
    assert hold_back(fixed, private) == (private, None)
    too_many = with_fields(chosen, {"server.validation_rows": 11})
    with pytest.raises(ConfigError, match="has 10 private rows; allowed is at most that"):
        hold_back(too_many, private)


def test_expected_payloads_are_those_of_drawn_cohorts():
    """A client that ever takes part is sent one payload; against cohorts as they are drawn."""

    @dataclasses.dataclass
    class Run:
        config: Config
        method: Method
        population: int

    config = with_fields(Config(), {"rounds": 12, "cohort.size": 5})
    once = Method(None, None, None, Sites(), broadcast=Broadcast(every=0, renewed=False))  # type: ignore[arg-type]
    expected = payloads_per_client(Run(config, once, 20))  # type: ignore[arg-type]

    @fast
    def share(key):
        keys = [fold_in_name(key, str(t)) for t in range(12)]
        seen = jnp.concatenate([sample_cohort(one, 20, 5) for one in keys])
        return (jnp.zeros(20).at[seen].set(1)).sum() / (5 * 12)

    shares = np.asarray(jax.vmap(share)(jax.random.split(jax.random.key(0), 500)))
    assert abs(shares.mean() - expected) < 4 * shares.std() / 500**0.5
    forgetful = with_fields(config, {"participation.lost_copies": 0.25})
    again = payloads_per_client(Run(forgetful, once, 20))  # type: ignore[arg-type]
    assert again == pytest.approx(expected + 0.25 * (1 - expected))
    renewed = once._replace(broadcast=Broadcast(every=0))
    assert payloads_per_client(Run(config, renewed, 20)) == 1  # type: ignore[arg-type]
