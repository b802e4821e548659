"""One-way rounds with masks that clients keep: each client's payload is sent once."""

import json

import jax
import numpy as np
import pytest
from deploy_cases import CLIENT_ROWS, CLIENTS, MemoryNetwork, configured
from session_cases import deployed, history, server_of, simulated

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.deploy.kept import NAME_SIZE, Kept, answer_with
from fedqsn_jax.deploy.network import Reply
from fedqsn_jax.deploy.registry import Registry
from fedqsn_jax.protocol.layout import HEADER_SIZE

pytestmark = pytest.mark.usefixtures("quick_compilation")

STICKY = {"broadcast": {"every": 0}, "mask_per": "client"}


def lengths(network):
    """The lengths of the payloads that each client was sent, message by message."""
    return {node: [len(payload) for payload, _ in each] for node, each in network.received.items()}


def test_a_deployed_run_is_the_simulated_one_and_its_bytes_are_those(tmp_path):
    config = configured(**STICKY)
    state, network = deployed(config, tmp_path / "run")
    other, entries = simulated(config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (state.params, state.optimizer_state, state.attackers, state.broadcast),
        (other.params, other.optimizer_state, other.attackers, other.broadcast),
    )
    told = history(tmp_path / "run")[1:]
    names = ("clients/sent", "clients/returned", "bytes/down_per_client", "bytes/up_per_client")
    assert [[entry[name] for name in names] for entry in told] == [
        [entry[name] for name in names] for entry in entries
    ]
    assert [entry["clients/sent"] for entry in told] == [3, 0, 0]
    # What was sent is what is counted: in the first round all, then nothing.
    sent = lengths(network)
    assert all(first > HEADER_SIZE and rest == [0, 0] for first, *rest in sent.values())
    total = sum(map(sum, sent.values()))
    assert told[-1]["bytes/down_per_client"] == pytest.approx(total / (3 * CLIENTS), rel=1e-12)


def test_masks_that_change_are_sent_in_every_round(tmp_path):
    _, network = deployed(configured(broadcast={"every": 0}), tmp_path / "run")
    assert all(min(each) > HEADER_SIZE for each in lengths(network).values())
    assert all("name" not in told for each in network.received.values() for _, told in each)


def test_a_client_that_lost_its_copy_says_so_and_gets_it_again(tmp_path):
    """In the second of three rounds; the run is as if nothing had happened."""
    config = configured(**STICKY)
    whole, usual = deployed(config, tmp_path / "whole")

    def change(node, exchange, reply):
        if exchange == 1 and node == "client 1":
            # After it has answered.
            [kept] = [kept for (name, _), kept in network.kept.items() if name == node]
            kept._payload = None
        return [reply]

    network = MemoryNetwork(change)
    state, _ = deployed(config, tmp_path / "run", network)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)
    sent = lengths(network)
    first = sent["client 1"][0]
    assert sent["client 1"] == [first, 0, first, 0]
    assert sent["client 0"][1:] == [0, 0]
    told = history(tmp_path / "run")[1:]
    assert [entry["clients/sent"] for entry in told] == [3, 1, 0]
    assert [entry["clients/returned"] for entry in told] == [3, 3, 3]
    total = sum(map(sum, sent.values()))
    assert total == sum(map(sum, lengths(usual).values())) + first
    assert told[-1]["bytes/down_per_client"] == pytest.approx(total / (3 * CLIENTS), rel=1e-12)


def test_who_has_received_what_is_saved(tmp_path):
    """A server that ended sends nothing again; but to a client that has not answered it does."""

    class KilledError(Exception):
        pass

    def change(node, exchange, reply):
        if exchange == 3:
            raise KilledError
        return [] if node == "client 2" else [reply]

    network = MemoryNetwork(change)
    config = configured(rounds=4, **STICKY)
    with pytest.raises(KilledError):
        deployed(config, tmp_path / "run", network)
    before = lengths(network)
    # The third round begins with one of them.
    assert [sum(length > 0 for length in each) for each in before.values()].count(1) == 2
    assert all(length > 0 for length in before["client 2"])
    again = MemoryNetwork()
    again.kept = network.kept
    deployed(config, tmp_path / "run", again, key=jax.random.key(5))
    assert {node: [length > 0 for length in each] for node, each in lengths(again).items()} == {
        "client 0": [False, False],
        "client 1": [False, False],
        "client 2": [True, False],
    }


def test_a_client_that_loses_in_the_same_round_is_not_served_for_ever(tmp_path, capsys):
    def change(node, exchange, reply):
        return [Reply(node, lost=True)] if node == "client 1" else [reply]

    network = MemoryNetwork(change)
    deployed(configured(rounds=2, **STICKY), tmp_path / "run", network)
    assert lengths(network)["client 1"][0] > 0
    assert len(network.received["client 1"]) == 2
    last = history(tmp_path / "run")[-1]
    assert (last["clients/returned"], last["clients/rejected"]) == (2, 1)


@pytest.fixture
def message(tmp_path):
    """What a client gets in the first round: payload, settings, and a client of its plan."""
    network = MemoryNetwork()
    server = server_of(configured(rounds=1, **STICKY))
    deployed(server.config, tmp_path / "run", network)
    payload, told = network.received["client 0"][0]
    return payload, told, network._clients[told["plan"]]


def test_a_payload_is_kept_in_a_private_file(message, tmp_path):
    payload, told, client = message
    key, rows = jax.random.key(0), {name: np.asarray(a) for name, a in CLIENT_ROWS[0].items()}
    kept, lines = Kept(tmp_path / "own", told["name"]), []

    def answered(sent):
        return answer_with(kept, client, sent, key, rows, lines.append)

    assert answered(b"") is None
    first = answered(payload)
    assert answered(b"") == first
    [file] = (tmp_path / "own").iterdir()
    assert file.read_bytes() == payload
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    # Whatever became of it, it is not used.
    file.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    assert answered(b"") is None
    assert "sent again" in lines[-1]
    with pytest.raises(ValueError, match="payload"):
        answered(payload[:-1])
    # A directory that cannot be is no reason to stay away.
    (tmp_path / "file").write_text("")
    kept = Kept(tmp_path / "file" / "own", told["name"])
    assert answered(payload) == first
    assert "not kept" in lines[-1]


@pytest.mark.parametrize("name", [b"../../key", "a" * NAME_SIZE, None])
def test_a_name_that_is_none_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="name"):
        Kept(tmp_path, name)


def test_a_registry_that_is_gone_gives_no_client_the_mask_of_another(tmp_path):
    deployed(configured(rounds=1, **STICKY), tmp_path / "run")
    file = tmp_path / "run" / "clients.json"
    assert sorted(json.loads(file.read_text())) == [f"client {number}" for number in range(3)]
    file.unlink()
    with pytest.raises(ConfigError, match=r"clients\.json"):
        deployed(configured(rounds=2, **STICKY), tmp_path / "run")
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"clients\.json"):
        deployed(configured(rounds=2, **STICKY), tmp_path / "run")


def test_numbers_are_kept_and_no_more_than_may_come(tmp_path):
    file = tmp_path / "clients.json"
    registry = Registry(file, 3, begun=False)
    assert registry.numbers(["key:b", "key:a"]) == ({0: "key:a", 1: "key:b"}, [])
    assert registry.numbers(["key:d", "key:b", "key:c"]) == ({1: "key:b", 2: "key:c"}, ["key:d"])
    again = Registry(file, 3, begun=True)
    assert again.numbers(["key:a", "key:d"]) == ({0: "key:a"}, ["key:d"])
