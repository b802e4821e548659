"""Language models: each client tokenizes its own texts, and the run is the simulated one."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from deploy_cases import MemoryNetwork
from language_run_cases import BERT, FLAGS, sentences, write_model
from text_cases import write_tokenizer

from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.config.schema import ConfigError, with_fields
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.core.keys import federation_key
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.data.population import from_clients
from fedqsn_jax.deploy import client_files, work
from fedqsn_jax.deploy.network import Reply
from fedqsn_jax.deploy.plan import Plan
from fedqsn_jax.deploy.server_files import RowSources, write_server
from fedqsn_jax.deploy.server_model import server_rows
from fedqsn_jax.deploy.session import Patience, make_server, run_server
from fedqsn_jax.reporting.display import silent_display
from fedqsn_jax.simulation.running import initial_state, run_rounds

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLIENTS = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, the server's texts and each client's, and the server's files."""
    place = tmp_path_factory.mktemp("language")
    write_model(place, BERT)
    lines = sentences(30).splitlines()
    for number, rows in enumerate((lines[1:9], lines[9:16])):
        own = place / f"client_{number}"
        own.mkdir()
        (own / "rows.tsv").write_text("\n".join([lines[0], *rows]) + "\n")
    write_server(
        config_of(place),
        RowSources(f"tsv:{place}/train.tsv", f"tsv:{place}/test.tsv"),
        clients=CLIENTS,
        directory=place / "run",
        settings=place / "server" / "server.json",
    )
    return place


def config_of(place):
    config = read_config(
        FLAGS[0].partition("=")[2],
        [
            *FLAGS[1:],
            f"--config.model.pretrained={place}",
            f"--config.data.train=tsv:{place}/train.tsv",
            f"--config.data.cache={place}/cache",
        ],
    )
    changed = {
        "lora.rank": 2,
        "data.clients": CLIENTS,
        "evaluation.attackers": (1,),
        "evaluation.every": 1,
        "rounds_per_call": 1,
        "pretraining.steps": 4,
    }
    return with_fields(config, changed)


def write_clients(place):
    files = []
    for number in range(CLIENTS):
        file = place / f"client_{number}" / "client.toml"
        rows = f"tsv:{file.with_name('rows.tsv')}"
        client_files.write_client(rows, file, place / "server" / "plan.json")
        # Compiled programs are not kept: the tests' process would keep those of later tests too.
        kept = [line for line in file.read_text().splitlines() if not line.startswith("cache")]
        file.write_text("\n".join(kept) + "\n")
        files.append(file)
    return files


class FileNetwork(MemoryNetwork):
    """Clients that do what their training processes do, each by its own file."""

    def __init__(self, files):
        super().__init__()
        self._files = files

    def nodes(self):
        return [f"client {number}" for number in range(len(self._files))]

    def answer(self, node, payload, settings):
        file = self._files[int(node.rsplit(" ", 1)[1])]
        outcome = work.take_part(str(file), payload, settings, print)
        told = {"token": settings["token"], "examples": outcome.examples, "loss": outcome.loss}
        return Reply(node, outcome.payload, told, failure=outcome.refusal)


def server_of(config, place):
    private, test = (
        server_rows(config, f"tsv:{place}/{name}.tsv", name) for name in ("train", "test")
    )
    private_rows, test_rows = (
        {name: jnp.asarray(array) for name, array in each.rows.items()} for each in (private, test)
    )
    return make_server(
        config, private_rows, test_rows, clients=CLIENTS, classes=private.classes
    ), test_rows


def test_a_deployed_run_with_adapters_is_the_simulated_one(place, tmp_path):
    config = config_of(place)
    network = FileNetwork(write_clients(place))
    server, test = server_of(config, place)
    key = federation_key(config.seed)
    state = run_server(server, network, tmp_path, silent_display(), Patience(1, 1), key)

    rows = [
        server_rows(config, f"tsv:{place}/client_{number}/rows.tsv", "rows").rows
        for number in range(CLIENTS)
    ]
    assert [len(each["label"]) for each in rows] == [8, 7]
    simulated = initial_state(server.simulation, server.start())
    entries = []
    for _, latest, more in run_rounds(server.simulation, simulated, from_clients(rows), test):
        simulated, entries = latest, entries + more
    assert all(entry["clients/returned"] == CLIENTS for entry in entries)
    begun = server.start()
    changed = 0
    ours, theirs, before = map(leaves_by_path, (state.params, simulated.params, begun))
    for path, value in theirs.items():
        assert np.linalg.norm(ours[path] - value) <= 1e-5 * np.linalg.norm(value), path
        changed += path not in before or bool(np.any(value != before[path]))
    assert changed > 0
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("bytes/down_per_client", "clients/returned"):
        assert [entry[name] for entry in told[1:]] == pytest.approx([e[name] for e in entries])
    sent = [[len(payload) for payload, _ in each] for each in network.received.values()]
    assert np.mean(sent, axis=0).tolist() == [e["bytes/down_per_client"] for e in told[1:]]


def test_the_plan_says_how_texts_are_read_and_not_where_the_model_lies(place):
    text = (place / "server" / "plan.json").read_text()
    assert str(place) not in text
    plan = Plan.decode(text)
    assert plan.language["text"]["task"] == "sst2"
    assert plan.rows["tokens"] == ((8,), "int32")
    assert plan.classes == 2
    tokenizer = (place / "server" / "tokenizer.json").read_text()
    assert json.loads(tokenizer) == json.loads((place / "tokenizer.json").read_text())


def test_a_client_with_another_tokenizer_or_other_columns_is_told_so(place, tmp_path):
    rows, plan = tmp_path / "rows.tsv", place / "server" / "plan.json"
    rows.write_text(sentences(4))

    def refused(source=f"tsv:{rows}", told=plan, tokenizer=None):
        with pytest.raises(UserError) as error:
            client_files.write_client(source, tmp_path / "client.toml", told, tokenizer=tokenizer)
        assert not (tmp_path / "client.toml").exists()
        [line] = str(error.value).splitlines()
        return line

    other = tmp_path / "other"
    other.mkdir()
    write_tokenizer(other, "none")
    assert "another tokenizer than the server's" in refused(tokenizer=other / "tokenizer.json")
    assert "a tokenizer.json is needed" in refused(tokenizer=tmp_path / "none" / "tokenizer.json")
    assert "--plan" in refused(told=None)
    assert "does not exist" in refused(source="tsv:none.tsv")
    rows.write_text("text\tlabel\nthe film\t1\n")
    assert "no column 'sentence'" in refused()
    rows.write_text("sentence\tlabel\nthe film\t7\n")
    assert "allowed are" in refused()


def test_rows_of_another_kind_than_the_servers_model_reads(place):
    with pytest.raises(ConfigError, match="a language model reads texts"):
        server_rows(config_of(place), "npz:rows.npz", "--private")
    images = read_config("configs/digits.py", [])
    with pytest.raises(ConfigError, match="reads no texts"):
        server_rows(images, "tsv:rows.tsv", "--private")
