"""Real processes on loopback: secrets, faults, keys and certificates. Slow: see tests/README.md.

Of the commands `ssh-keygen` and `openssl` are needed.
"""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deploy_cases import configured
from deploy_processes import Deployment, Relay, make_authority, wait_until

from fedqsn_jax.config.schema import resolve
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.deploy import processes
from fedqsn_jax.deploy.session import Server, make_server
from fedqsn_jax.host.checkpoints import Checkpoints
from fedqsn_jax.protocol.quantization import NormalFloat, pack, quantize
from fedqsn_jax.rounds.federation import ServerState

pytest.importorskip("flwr", reason="real parties need the extra: pip install '.[deploy]'")

pytestmark = pytest.mark.slow

FEATURES, CLASSES = 64, 3
SEED = 1414213562


def rows(count, seed):
    random = np.random.default_rng(seed)
    image = random.normal(size=(count, FEATURES)).astype(np.float32)
    return {"image": image, "label": random.integers(0, CLASSES, count).astype(np.int32)}


def deployment(place, clients, wait_answers, **sections):
    """A server and clients of so many rows, by their names."""
    own = {name: rows(count, count) for name, count in clients.items()}
    given = {"private": rows(60, 0), "test": rows(50, 1), **own}
    values = {
        "model": {"hidden": (48, 40)},
        "cohort": {"size": len(clients)},
        "data": {"clients": len(clients)},
        "block_size": 64,
        "seed": SEED,
    }
    return Deployment(place, configured(**{**values, **sections}), given, wait_answers)


def server_of(running: Deployment) -> Server:
    private, test = (
        {name: jnp.asarray(array) for name, array in each.items()}
        for each in (rows(60, 0), rows(50, 1))
    )
    values = json.loads(running.settings.read_text())
    config = resolve(values["config"])
    return make_server(config, private, test, clients=values["clients"], classes=CLASSES)


def state_of(running: Deployment, server: Server, round: int) -> ServerState:
    like = jax.eval_shape(
        lambda: server.simulation.federation.init(
            jax.random.key(0), jax.tree.map(jnp.asarray, server.start())
        )
    )
    with Checkpoints(running.place / "run" / "checkpoints", 3, 1) as checkpoints:
        return checkpoints.restore(like, round)[0]


def spellings(word: int) -> dict[str, bytes]:
    """How a number of 32 bits may stand in a file or a message."""
    varint, rest = bytearray(), word
    while rest >= 128:
        varint.append(rest % 128 + 128)
        rest //= 128
    varint.append(rest)
    return {
        "little-endian": word.to_bytes(4, "little"),
        "big-endian": word.to_bytes(4, "big"),
        "decimal": str(word).encode(),
        "hexadecimal": f"{word:08x}".encode(),
        "of a protocol buffer": bytes(varint),
    }


def test_what_a_client_process_received_holds_no_secret(tmp_path):
    """All bytes that came over the client's connections, and all files that its programs wrote."""
    with (
        deployment(tmp_path, {"alice": 30, "bob": 20}, 200, rounds=1) as running,
        Relay(running.port) as relay,
    ):
        running.start_link()
        running.start_node("alice", port=relay.port)
        running.start_node("bob")
        running.start_run()
        wait_until(running.outcome, 300, "the run's end")
        assert running.outcome() == {"finished": True}, running.told()
        everything = relay.received() + running.node_log("alice").read_bytes()
        for file in sorted((tmp_path / "alice" / "flower").rglob("*")):
            if file.is_file():
                everything += file.read_bytes()
    server = server_of(running)
    state = state_of(running, server, 0)
    visible = jax.device_get(server.simulation.federation.prepare(state).visible)
    kernels = leaves_by_path(state.params)
    quantizer = NormalFloat(server.config.bits, server.config.block_size)
    seen, hidden = 0, 0
    for site in server.simulation.sites:
        matrices = site.to_matrices(kernels[site.path])
        codes = np.asarray(quantize(quantizer, matrices).codes)[0]
        for column, shown in enumerate(np.asarray(visible[site.path])[0]):
            packed = pack(codes[:, column][None], quantizer.code_bits).tobytes()
            plain = np.asarray(matrices)[0, :, column].tobytes()
            assert plain not in everything
            if shown:
                seen += packed in everything
            else:
                hidden += 1
                assert packed not in everything, f"{site.path}, column {column}"
    # The search finds what was sent: of the columns that the server shows, 70 in 100 or so.
    assert hidden > 5
    assert seen > 20
    for name, key in (("secret", state.secret_key), ("public", state.public_key)):
        words = [int(word) for word in np.asarray(jax.random.key_data(key)).reshape(-1)]
        for word in words:
            for kind, spelling in spellings(word).items():
                assert spelling not in everything, f"the {name} key, {kind}"
    for kind, spelling in spellings(SEED).items():
        assert spelling not in everything, f"the seed, {kind}"
    # Of the server's own files not even the names.
    assert str(running.settings).encode() not in everything
    assert str(tmp_path / "run").encode() not in everything


FAULTS = {
    "dies": "its training process died",
    "hangs": "did not answer in time",
    "garbage": "its update cannot be read",
    "not finite": "an update that is not finite",
    "another model": "made for another model structure",
}


def test_faults_are_named_and_who_was_at_fault_comes_back(tmp_path):
    """With certificates and registered keys; others are refused."""
    clients = {"honest": 30, **{name.replace(" ", "_"): 20 for name in FAULTS}}
    with deployment(tmp_path, clients, 120, rounds=3) as running:
        running.use_certificates()
        running.keep_answers()
        running.start_link()
        for name in clients:
            running.register(name)
        stranger, other = tmp_path / "stranger", make_authority(tmp_path, "other")
        stranger.mkdir()
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", stranger / "key"],
            check=True,
        )
        (stranger / "client.toml").write_text((tmp_path / "honest" / "client.toml").read_text())
        refused = running.start_node("stranger")
        assert refused.wait(timeout=90) != 0
        assert "Exit Code: 305" in running.node_log("stranger").read_text()
        deceived = running.start_node("honest", authority=other)
        wait_until(
            lambda: "CERTIFICATE_VERIFY_FAILED" in running.node_log("honest").read_text(),
            90,
            "a wrong certificate",
        )
        processes.end(deceived)
        for name in FAULTS:
            running.ask_for(name.replace(" ", "_"), name)
        for name in clients:
            running.start_node(name)
        running.start_run()
        wait_until(lambda: running.saved() >= 1, 400, "the first round")
        # In whichever round it is asked next: an answer of a round before.
        running.replay("honest")
        wait_until(running.outcome, 600, "the run's end")
        assert running.outcome() == {"finished": True}, running.told()
        told = running.told()
        print(told)
        for words in FAULTS.values():
            assert words in told
        numbers = json.loads((tmp_path / "run" / "clients.json").read_text())
        assert len(numbers) == len(clients)
        # Every rejection is counted, and named by client and by node.
        first, *others = running.history()[1:]
        assert first["clients/returned"] == 1
        assert first["clients/rejected"] == len(FAULTS)
        for key, number in numbers.items():
            of_first = f"round 1: client {number} ({key})"
            assert told.count(of_first) == (key != fingerprint(running, "honest"))
        # A process that hangs or has died does not keep a node from the next round.
        returned = [entry["clients/returned"] for entry in others]
        assert sorted(returned) == [len(clients) - 1, len(clients)]
        assert "an answer to another round, or to another client's payload" in told
        assert others[0]["seconds"] - first["seconds"] < 120


def fingerprint(running, name):
    """A client's public key as the server names it, by OpenSSH."""
    command = ["ssh-keygen", "-lf", running.key(name).with_suffix(".pub")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()[1]


def test_a_server_that_is_killed_goes_on_and_clients_come_and_go(tmp_path):
    clients = {"early": 30, "steady": 20, "late": 25}
    with deployment(tmp_path, clients, 110, rounds=4) as running:
        running.use_certificates()
        running.start_link()
        for name in clients:
            running.register(name)
        running.start_node("early")
        running.start_node("steady")
        running.start_run()
        wait_until(lambda: "2 of 3 are there" in running.told(), 120, "two clients")
        running.start_node("late")
        wait_until(lambda: running.saved() >= 1, 200, "the first round")
        wait_until(lambda: running.clients_at_work("steady"), 100, "the second round")
        running.kill("link")
        numbers = json.loads((tmp_path / "run" / "clients.json").read_text())
        assert len(numbers) == 3
        server = server_of(running)
        before = state_of(running, server, running.saved())
        killed_after = running.saved()
        running.start_link()
        running.start_run()
        wait_until(lambda: f"resumed after round {killed_after}" in running.told(), 120, "the rest")
        wait_until(lambda: running.saved() > killed_after, 250, "the round that was cut")
        running.kill("early")

        # As a supervisor does: a node that comes back at once is refused for a while.
        def stays() -> bool:
            started = running.start_node("early")
            try:
                started.wait(timeout=15)
            except subprocess.TimeoutExpired:
                return True
            return False

        wait_until(stays, 180, "the client that comes back")
        wait_until(running.outcome, 500, "the run's end")
        assert running.outcome() == {"finished": True}, running.told()
        print(running.told())
        after = state_of(running, server, 4)
        for name in ("secret_key", "public_key"):
            np.testing.assert_array_equal(
                *(jax.random.key_data(getattr(state, name)) for state in (before, after))
            )
        jax.tree.map(np.testing.assert_array_equal, before.transform_state, after.transform_state)
        assert json.loads((tmp_path / "run" / "clients.json").read_text()) == numbers
        assert [entry["round"] for entry in running.history()] == [0, 1, 2, 3, 4]
        assert running.history()[1]["clients/returned"] == 3
        assert running.history()[-1]["clients/returned"] == 3


def test_a_server_killed_between_rounds_and_a_client_that_joins_then(tmp_path):
    """It waits for clients when it is killed; the one that joins is of use at once."""
    clients = {"early": 30, "steady": 20, "late": 25}
    with deployment(tmp_path, clients, 110, rounds=3, cohort={"size": 2}) as running:
        running.use_certificates()
        running.start_link()
        for name in clients:
            running.register(name)
        running.start_node("early")
        running.start_node("steady")
        running.start_run()
        wait_until(lambda: running.saved() >= 1, 200, "the first round")
        running.kill("early")
        wait_until(lambda: "1 of 2 are there" in running.told(), 300, "a server that waits")
        saved = running.saved()
        assert 1 <= saved < 3
        before = running.history()
        running.kill("link")
        running.start_link()
        running.start_run()
        wait_until(lambda: f"resumed after round {saved}" in running.told(), 120, "the rest")
        running.start_node("late")
        wait_until(running.outcome, 400, "the run's end")
        assert running.outcome() == {"finished": True}, running.told()
        print(running.told())
        assert running.history()[: saved + 1] == before
        assert running.history()[-1]["clients/returned"] == 2
        assert len(json.loads((tmp_path / "run" / "clients.json").read_text())) == 3
