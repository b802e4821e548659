"""A deployed run is the simulated one; and what goes wrong is rejected, named and survived."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deploy_cases import (
    CLASSES,
    CLIENTS,
    PRIVATE,
    TEST,
    MemoryNetwork,
    configured,
)
from session_cases import deployed, history, server_of, simulated

from fedqsn_jax.config.schema import Config, ConfigError, with_fields
from fedqsn_jax.core.keys import federation_key
from fedqsn_jax.deploy import asking
from fedqsn_jax.deploy.network import Reply
from fedqsn_jax.deploy.session import Patience, make_server, public_base, run_server
from fedqsn_jax.protocol import wire
from fedqsn_jax.reporting.display import Display, silent_display

pytestmark = pytest.mark.usefixtures("quick_compilation")


METHODS = {
    "fedavg": {"algorithm": "fedavg"},
    "fedqsn": {"algorithm": "fedqsn"},
    "coverage, adam, quantized uploads": {
        "server": {"normalize": "coverage", "optimizer": "adam", "learning_rate": 0.01},
        "upload": {"bits": 4, "block_size": 4},
    },
    "adapters": {"lora": {"rank": 2}},
    "FedLPP with adapters": {"algorithm": "fedlpp", "lora": {"rank": 2}},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_deployed_run_is_the_simulated_one(name, tmp_path):
    config = configured(**METHODS[name])
    base = public_base(server_of(config))
    assert bool(base) == (name == "FedLPP with adapters")
    state, network = deployed(config, tmp_path / "run", MemoryNetwork(base=base))

    other, told = simulated(config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (state.params, state.optimizer_state, state.attackers),
        (other.params, other.optimizer_state, other.attackers),
    )
    down = [entry["bytes/down_per_client"] for entry in told]
    entries = history(tmp_path / "run")
    assert [entry["round"] for entry in entries] == [0, 1, 2, 3]
    # The bytes that were sent are those that the simulation counts.
    deployed_down = [entry["bytes/down_per_client"] for entry in entries[1:]]
    assert deployed_down == pytest.approx(down, rel=1e-12)
    sent = [sum(len(each[round][0]) for each in network.received.values()) for round in range(3)]
    assert [count / CLIENTS for count in sent] == deployed_down
    assert all(entry["clients/returned"] == CLIENTS for entry in entries[1:])


def test_what_clients_get_does_not_depend_on_hidden_values(tmp_path, set_hidden):
    """Invariant 3, of everything that a client receives: payloads, plan, keys."""
    config = configured(rounds=1)
    server = server_of(config)
    params = server.start()
    state = jax.jit(server.simulation.federation.init)(federation_key(0), params)
    columns = jax.device_get(server.simulation.federation.prepare(state).visible)
    assert any(not mask.all() for mask in columns.values())
    received = []
    for value in (0.0, float("nan")):
        changed = set_hidden(params, server.simulation.sites, columns, value)
        network = MemoryNetwork()
        run_server(
            dataclasses.replace(server, start=lambda changed=changed: changed),
            network,
            tmp_path / str(value),
            silent_display(),
            Patience(1, 1),
            federation_key(0),
        )
        received.append(
            {
                node: [(payload, told["plan"], told["key"]) for payload, told in each]
                for node, each in network.received.items()
            }
        )
    assert received[0] == received[1]


def test_no_seed_no_key_and_no_setting_of_the_server_is_in_the_plan(tmp_path):
    config = configured(seed=123456789, rounds=1, p1=0.123456)
    _, network = deployed(config, tmp_path / "run")
    for each in network.received.values():
        for _, told in each:
            assert set(told) == {"plan", "token", "key"}
            plan = told["plan"]
            for secret in ("123456789", "0.123456", "seed", "p1", str(tmp_path)):
                assert secret not in plan


def test_without_given_keys_every_run_draws_other_masks(tmp_path):
    config = configured(rounds=1)
    payloads = []
    for name in ("one", "two"):
        network = MemoryNetwork()
        run_server(server_of(config), network, tmp_path / name, silent_display(), Patience(1, 1))
        payloads.append(network.received["client 0"][0][0])
    assert payloads[0] != payloads[1]


def test_a_server_that_ended_goes_on_with_its_keys(tmp_path):
    whole, _ = deployed(configured(), tmp_path / "whole")

    class KilledError(Exception):
        pass

    def killing(node, exchange, reply):
        if exchange == 3:
            raise KilledError
        return [reply]

    with pytest.raises(KilledError):
        deployed(configured(), tmp_path / "cut", MemoryNetwork(killing))
    resumed, network = deployed(configured(), tmp_path / "cut", key=jax.random.key(77))
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    assert all(len(each) == 1 for each in network.received.values())
    assert [entry["round"] for entry in history(tmp_path / "cut")] == [0, 1, 2, 3]


def garbage(reply: Reply) -> list[Reply]:
    return [reply._replace(payload=b"garbage")]


def not_finite(reply: Reply) -> list[Reply]:
    """An honest encoding of values that are none."""
    body = bytearray(reply.payload)
    body[-4:] = np.float32(np.nan).tobytes()
    # The digest is made anew, as a client that means harm would.
    prefix, rest = bytes(body[: wire._PREFIX.size]), bytes(body[wire._PREFIX.size + 16 :])
    digest = hashlib.blake2b(prefix + rest, digest_size=16).digest()
    return [reply._replace(payload=prefix + digest + rest)]


FAULTS = {
    "does not answer": (lambda reply: [], "did not answer in time"),
    "its program dies": (
        lambda reply: [Reply(reply.node, failure="its program failed (code 2)")],
        "its program failed (code 2)",
    ),
    "garbage": (garbage, "cannot be read"),
    "not finite": (not_finite, "not finite"),
    "twice": (lambda reply: [reply, reply], "a second answer"),
    "of another round": (
        lambda reply: [reply._replace(settings={**reply.settings, "token": b"x" * 16})],
        "another round",
    ),
    "rows that cannot be": (
        lambda reply: [reply._replace(settings={**reply.settings, "examples": -3})],
        "a number of rows",
    ),
    "nothing beside it": (lambda reply: [reply._replace(settings={})], "without token"),
    "of a stranger": (lambda reply: [reply._replace(node="stranger")], "someone who was not asked"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_the_others_are_counted(name, tmp_path, capsys):
    spoil, words = FAULTS[name]

    def change(node, exchange, reply):
        return spoil(reply) if (node, exchange) == ("client 1", 2) else [reply]

    config = configured(rounds=2)
    run_server(
        server_of(config),
        MemoryNetwork(change),
        tmp_path / "run",
        Display(),
        Patience(1, 1),
        federation_key(0),
    )
    told = " ".join(capsys.readouterr().out.split())
    assert words in told
    last = history(tmp_path / "run")[-1]
    counted = {"twice": 3}.get(name, 2)
    assert last["clients/returned"] == counted
    assert np.isfinite(last["global/accuracy"])


def test_a_round_without_an_answer_changes_nothing(tmp_path):
    config = configured(rounds=1)
    state, _ = deployed(config, tmp_path / "run", MemoryNetwork(lambda *_: []))
    jax.tree.map(np.testing.assert_array_equal, state.params, server_of(config).start())
    assert "train/loss" not in history(tmp_path / "run")[-1]


def test_too_few_clients_are_told(tmp_path):
    config = configured(data={"clients": 9}, cohort={"size": 9})
    with pytest.raises(ConfigError, match="3 clients are there after"):
        run_server(
            make_server(
                config,
                {name: jnp.asarray(array) for name, array in PRIVATE.items()},
                {name: jnp.asarray(array) for name, array in TEST.items()},
                clients=9,
                classes=CLASSES,
            ),
            MemoryNetwork(),
            tmp_path / "run",
            silent_display(),
            Patience(0.3, 1),
        )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"privacy.clip": 1.0, "privacy.noise": 1.0, "server.weighting": "uniform"},
            "privacy.clip = 1.0: a deployment takes the clients that are there",
        ),
        ({"evaluation.fine_tuned_attackers": 9}, "evaluation.fine_tuned_attackers = 9: a depl"),
        ({"cohort.sampling": "poisson"}, "cohort.sampling = 'poisson': a deployment asks"),
    ],
)
def test_what_rests_on_random_cohorts_is_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        server_of(with_fields(Config(), values))


def test_large_payloads_are_told_of_as_they_go(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(asking, "_TOLD_FROM", 300)
    config = configured(rounds=1, algorithm="fedavg")
    run_server(
        server_of(config), MemoryNetwork(), tmp_path, Display(), Patience(1, 1), jax.random.key(0)
    )
    told = " ".join(capsys.readouterr().out.split())
    for text in ("payload 1 of 3", "answer 1 of 3", "payload 3 of 3", "answer 3 of 3"):
        assert f"round 1: {text}, " in told


def test_more_nodes_than_may_come_are_left_out(tmp_path, capsys):
    class Crowd(MemoryNetwork):
        def nodes(self):
            return [*super().nodes(), "someone else"]

    config = configured(rounds=1, algorithm="fedavg")
    run_server(server_of(config), Crowd(), tmp_path, Display(), Patience(1, 1), jax.random.key(0))
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("someone else is left out") == 1
    assert history(tmp_path)[-1]["clients/returned"] == CLIENTS
