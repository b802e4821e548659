"""Texts between real processes on loopback, by the page's commands. Slow: see tests/README.md."""

import contextlib
import json

import pytest
from deploy_processes import wait_until
from language_run_cases import BERT, FLAGS, sentences, write_model

from fedqsn_jax.deploy import processes
from fedqsn_jax.deploy.__main__ import main

pytest.importorskip("flwr", reason="real parties need the extra: pip install '.[deploy]'")

pytestmark = pytest.mark.slow


def test_texts_adapters_and_masks_that_are_kept(tmp_path, monkeypatch):
    """Two clients; one-way rounds, of which only the first sends payloads."""
    monkeypatch.setattr(processes, "require_flower", lambda: None)
    write_model(tmp_path, BERT)
    home = tmp_path / "run.server"
    settings = home / "server.json"
    more = [
        f"--config.model.pretrained={tmp_path}",
        f"--config.data.train=tsv:{tmp_path}/train.tsv",
        f"--config.data.cache={tmp_path}/cache",
        *("--config.lora.rank=2", "--config.rounds=3", "--config.rounds_per_call=1"),
        *("--config.evaluation.every=1", "--config.evaluation.attackers=(1,)"),
        *("--config.broadcast.every=0", "--config.mask_per=client", "--clients=2"),
    ]
    rows = [f"--private=tsv:{tmp_path}/train.tsv", f"--test=tsv:{tmp_path}/test.tsv"]
    port = processes.free_port()
    place = [f"--workdir={tmp_path / 'run'}", f"--port={port}"]
    assert main(["server", *FLAGS, *more, *rows, *place]) == 0
    assert main(["bundle", f"--out={home}"]) == 0
    names = ("alice", "bob")
    for number, name in enumerate(names):
        own = tmp_path / name
        own.mkdir()
        lines = sentences(20).splitlines()
        (own / "rows.tsv").write_text("\n".join([lines[0], *lines[1 + number :: 2]]) + "\n")
        told = [f"--rows=tsv:{own / 'rows.tsv'}", f"--plan={home / 'plan.json'}"]
        assert main(["client", *told, f"--out={own / 'client.toml'}"]) == 0
    environment = processes.flower_environment(home / "flower", settings)
    processes.name_superlink(home / "flower", port)
    with contextlib.ExitStack() as running:

        def start(command, environment, log):
            return running.enter_context(processes.process(command, environment, log))

        link = start(processes.superlink(port), environment, tmp_path / "link.log")
        processes.wait_for_port(port, link, tmp_path / "link.log")
        for name in names:
            command = processes.supernode(port, tmp_path / name / "client.toml")
            own = processes.flower_environment(tmp_path / name / "flower")
            start(command, own, tmp_path / f"{name}.log")
        run = [processes.program("flwr"), "run", str(home / "fedqsn-app"), "fedqsn", "--stream"]
        start(run, environment, tmp_path / "flwr.log")
        outcome = home / "outcome.json"
        wait_until(outcome.exists, 400, "the run's end")
        print((home / "server.log").read_text())
        assert json.loads(outcome.read_text()) == {"finished": True}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines][1:]
    assert [entry["clients/returned"] for entry in entries] == [2, 2, 2]
    assert [entry["clients/sent"] for entry in entries] == [2, 0, 0]
    down = [entry["bytes/down_per_client"] for entry in entries]
    assert down == pytest.approx([down[0], down[0] / 2, down[0] / 3])
    for name in names:
        [kept] = (tmp_path / name / "received").iterdir()
        assert kept.stat().st_mode & 0o777 == 0o600
        assert kept.read_bytes().startswith(b"FQSN")
