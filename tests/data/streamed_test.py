"""Rows that stay on the host: the same runs as with rows on the device, in one program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax.api import own_model
from fedqsn_jax.config.schema import ConfigError, resolve
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.data import streamed
from fedqsn_jax.data.population import FederatedData
from fedqsn_jax.data.streamed import Capacity, HostData, capacity_for, place, stream
from fedqsn_jax.rounds.calls import draw_cohorts
from fedqsn_jax.simulation.compose import make_simulation
from fedqsn_jax.simulation.running import initial_state, run_rounds

SETTINGS = {
    "rounds": 7,
    "rounds_per_call": 2,
    "p1": 0.3,
    "p2": 0.3,
    "client": {"batch_size": 4, "learning_rate": 0.2},
    "cohort": {"size": 3, "parallelism": "scan"},
    "data": {"clients": 8},
    "evaluation": {"every": 2, "proxy_samples": 2, "attackers": ()},
}


def on_host(data: FederatedData) -> HostData:
    arrays = {name: np.asarray(array) for name, array in data.examples.items()}
    return HostData(arrays, np.asarray(data.offsets, np.int64))


def octets(tree):
    return [
        np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ).tobytes()
        for leaf in jax.tree.leaves(tree)
    ]


def timeless(entries):
    return [{name: v for name, v in entry.items() if name != "seconds"} for entry in entries]


@pytest.fixture(scope="module")
def simulate(model, data):
    def make(rows, **changes):
        config = resolve({**SETTINGS, **changes})
        return make_simulation(config, model.apply_fn, classification(), model.params, rows)

    return make


@pytest.fixture(scope="module")
def simulations(data, simulate):
    """Compiled once for several tests, by the first: with rows on the device and on the host."""
    return {"device": simulate(data), "host": simulate(on_host(data))}


def test_a_call_has_its_clients_rows(data):
    host = on_host(data)
    ids = np.array([[6, 1], [3, 6]])
    sent = stream(host, ids, Capacity(clients=5, rows=20))
    # Clients 1, 3 and 6 have 0, 3 and 9 rows.
    assert sent.ids.tolist()[:3] == [1, 3, 6]
    assert sent.offsets.tolist() == [0, 0, 3, 12, 12, 12]
    assert sent.clients == 8
    everyone = jnp.arange(8)
    assert sent.rows(everyone).tolist() == [0, 0, 0, 3, 0, 0, 9, 0]
    for client, count in ((3, 3), (6, 9)):
        got = jax.jit(sent.gather)(jnp.int32(client), jnp.arange(count))
        expected = data.gather(jnp.int32(client), jnp.arange(count))
        assert octets(got) == octets(expected)
        assert octets(host.gather(jnp.int32(client), jnp.arange(count))) == octets(expected)
    assert sent.device_bytes == Capacity(5, 20).device_bytes(host)
    assert host.device_bytes == data.device_bytes
    assert host.rows(everyone).tolist() == data.rows(everyone).tolist()


def test_the_capacity_is_the_largest_calls(data):
    host = on_host(data)
    # Sizes are 5, 0, 12, 3, 7, 1, 9, 4.
    assert capacity_for(host, [np.array([2, 6]), np.array([1, 3, 5])]) == Capacity(3, 21)
    assert capacity_for(host, [np.array([2, 2, 2])]) == Capacity(1, 12)
    assert capacity_for(host, []) == Capacity(1, 1)


def test_streamed_runs_are_resident_runs_bit_for_bit(data, model, simulations, monkeypatch):
    host, runs = on_host(data), {}
    sent = []

    def recorded(*arguments):
        sent.append(stream(*arguments))
        return sent[-1]

    monkeypatch.setattr("fedqsn_jax.simulation.running.stream", recorded)
    for name, rows in {"device": data, "host": host}.items():
        simulation = simulations[name]
        calls = run_rounds(simulation, initial_state(simulation, model.params), rows, data.examples)
        runs[name] = [(after, octets(state), timeless(new)) for after, state, new in calls]
        # Of the first call's state and of the later ones' the placement may differ once.
        assert simulation.run._cache_size() == 1
    assert runs["host"] == runs["device"]
    assert [after for after, _, _ in runs["host"]] == [2, 4, 6, 7]
    # One transfer a call, all of one shape, and no larger than they must be.
    assert len(sent) == 4
    assert len({jax.tree.structure(one) for one in sent}) == 1
    assert len({one.examples["x"].shape for one in sent}) == 1
    assert max(int(one.offsets[-1]) for one in sent) == sent[0].examples["x"].shape[0]
    estimate = simulation.memory["clients' rows of two calls"]
    assert estimate == 2 * sent[0].device_bytes


def test_the_next_rows_are_sent_while_the_device_works(data, model, simulations, monkeypatch):
    host, simulation = on_host(data), simulations["host"]
    events = []
    original = simulation.run

    def run(*arguments):
        events.append("run")
        return original(*arguments)

    def recorded(*arguments):
        events.append("send")
        return stream(*arguments)

    monkeypatch.setattr("fedqsn_jax.simulation.running.stream", recorded)
    watched = simulation._replace(run=run)
    for after, _, _ in run_rounds(
        watched, initial_state(simulation, model.params), host, data.examples
    ):
        events.append(after)
    # The first round alone, and the second, whose time says how many the host lets run at once.
    first = ["send", "run", "send", "run", 2]
    assert events == [*first, "run", "send", 4, "run", "send", 6, "run", 7]


class _StopsAfter:
    """Asks rounds to stop once so many are finished."""

    def __init__(self, rounds):
        self._rounds, self.told = rounds, []

    def begins(self, finished, end):
        self.told.append((finished, end))

    def is_asked(self):
        return self.told[-1][1] >= self._rounds


def test_rounds_that_stop_within_a_call_and_go_on_are_the_same(
    data, model, simulations, monkeypatch
):
    """Wherever: what a compiled program of several rounds computes does not depend on it."""
    monkeypatch.setattr("fedqsn_jax.simulation.running._PIECE_SECONDS", 1e-9)
    for name, rows in {"device": data, "host": on_host(data)}.items():
        simulation = simulations[name]

        def start(simulation=simulation):
            return initial_state(simulation, model.params)

        *_, (after, final, _) = run_rounds(simulation, start(), rows, data.examples)
        assert after == 7
        for rounds in (1, 3):
            stops = _StopsAfter(rounds)
            calls = run_rounds(simulation, start(), rows, data.examples, stopping=stops)
            *_, (after, state, entries) = calls
            assert after == rounds
            assert entries == []
            *_, (after, state, _) = run_rounds(simulation, state, rows, data.examples)
            assert after == 7
            assert octets(state) == octets(final)
        assert simulation.run._cache_size() == 1


def test_a_resumed_run_streams_the_same(data, model, simulations):
    host, simulation = on_host(data), simulations["host"]
    states = []
    for after, state, _ in run_rounds(
        simulation, initial_state(simulation, model.params), host, data.examples
    ):
        states.append((after, jax.tree.map(jnp.copy, state)))
    (_, early), (_, final) = states[0], states[-1]
    resumed = None
    for _, state, _ in run_rounds(simulation, early, host, data.examples):
        resumed = octets(state)
    assert resumed == octets(final)
    assert simulation.run._cache_size() == 1


def test_the_drawn_cohorts_are_the_rounds_own(model, simulations, monkeypatch):
    federation = simulations["device"].federation
    state = federation.init(jax.random.key(1), model.params)
    expected = [
        federation.cohort(dataclasses.replace(state, round=jnp.int32(index))).tolist()
        for index in range(5)
    ]
    assert draw_cohorts(federation, state, 5).tolist() == expected
    monkeypatch.setattr("fedqsn_jax.rounds.calls._DRAWN_AT_ONCE", 6)
    assert draw_cohorts(federation, state, 5).tolist() == expected
    assert draw_cohorts(federation, state, 0).shape == (0, 3)


def test_where_rows_live(data, monkeypatch):
    host = on_host(data)
    for resident in ("auto", "device"):
        placed = place(host, resident)
        assert isinstance(placed, FederatedData)
        assert octets(placed) == octets(data)
    assert place(host, "host") is host
    monkeypatch.setattr(streamed, "device_bytes", lambda: 2 * host.device_bytes - 1)
    assert place(host, "auto") is host
    assert isinstance(place(host, "device"), FederatedData)
    monkeypatch.setattr(streamed, "device_bytes", lambda: host.device_bytes - 1)
    with pytest.raises(ConfigError, match=r"data\.resident = 'device': .* allowed are auto, host"):
        place(host, "device")


def test_calls_that_do_not_fit_are_refused(data, simulate, monkeypatch):
    monkeypatch.setattr("fedqsn_jax.simulation.round_memory.device_bytes", lambda: 100)
    with pytest.raises(ConfigError, match=r"rounds_per_call = 2: .*smaller cohort\.size"):
        simulate(on_host(data))


def test_ones_own_memory_mapped_arrays(data, model, tmp_path):
    """In files, in a dtype that the device does not have."""
    host = on_host(data)
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float64, host.examples["x"].shape)
    file[:] = host.examples["x"]
    file.flush()
    mapped = {**host.examples, "x": np.load(tmp_path / "x.npy", mmap_mode="r")}
    test = {name: np.asarray(array) for name, array in data.examples.items()}
    settings = {name: SETTINGS[name] for name in ("client", "cohort", "rounds_per_call")}
    settings |= {
        "rounds": 2,
        "evaluation": {"proxy_samples": 2, "attackers": (8,)},
        "site_rules": ("head/*: none",),
    }

    def federate(rows, resident):
        return own_model.federate(
            (model.apply_fn, model.params), rows, test, data={"resident": resident}, **settings
        )

    streamed_run = federate(HostData(mapped, host.offsets), "host")
    assert "clients' rows of two calls" in streamed_run.simulation.memory
    separate = [
        {name: array[begin:end] for name, array in test.items()}
        for begin, end in zip(host.offsets, host.offsets[1:], strict=False)
    ]
    # Two programs; which bits their rows have is what the tests above compare.
    resident_run = federate(separate, "device")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        streamed_run.state.params,
        resident_run.state.params,
    )
    with pytest.raises(ConfigError, match="data: of no use here"):
        own_model.federate((model.apply_fn, model.params), separate, test, data={"name": "digits"})


@pytest.mark.usefixtures("quick_compilation")
def test_poisson_cohorts_are_streamed_without_those_who_are_not_there(data, model, simulate):
    """Private ones too: bit for bit what they are with all rows on the device."""
    changes = {
        "cohort": {"size": 3, "sampling": "poisson"},
        "server": {"weighting": "uniform"},
        "privacy": {"clip": 0.1, "noise": 1.0},
    }
    runs = []
    for rows in (data, on_host(data)):
        simulation = simulate(rows, **changes)
        state = initial_state(simulation, model.params)
        calls = run_rounds(simulation, state, rows, data.examples)
        runs.append([(after, octets(state), timeless(new)) for after, state, new in calls])
    assert runs[0] == runs[1]
    entries = [entry for _, _, new in runs[0] for entry in new]
    spent = [entry["privacy/epsilon"] for entry in entries]
    assert spent == [simulation.account.epsilon(entry["round"]) for entry in entries]
    assert len({entry["clients/drawn"] for entry in entries}) > 1
