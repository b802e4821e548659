"""Whole audits of tiny runs: the replay is the run, interruptions cost nothing, mistakes a line."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import fedqsn_jax
from fedqsn_jax.audit import running
from fedqsn_jax.audit.case import case_of_model, case_of_run, random_weights
from fedqsn_jax.audit.command import main
from fedqsn_jax.audit.received import Payloads, hold
from fedqsn_jax.audit.replay import payload_layout, replay
from fedqsn_jax.config.schema import ConfigError, resolve
from fedqsn_jax.rounds.views import attacker_params
from fedqsn_jax.runs import experiment

SETTINGS = {
    "rounds": 3,
    "data": {"name": "digits", "clients": 5, "private_rows": 40, "test_rows": 60,
             "train_rows": 260},
    "model": {"name": "mlp", "hidden": (12,)},
    "pretraining": {"steps": 20, "batch_size": 16, "learning_rate": 0.1},
    "cohort": {"size": 3},
    "client": {"steps": 3, "batch_size": 8, "learning_rate": 0.1},
    "evaluation": {"attackers": (1, 2), "proxy_samples": 2},
    "checkpoint": {"every": 3},
}  # fmt: skip
QUICK = fedqsn_jax.AuditSettings(colluders=(2,), queries=(10,), steps=8, shadows=2)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("audited") / "run"
    experiment.run(resolve(SETTINGS), path, running.silent_display())
    return path


@pytest.fixture(scope="module")
def case(workdir):
    return case_of_run(workdir)


@pytest.fixture(scope="module")
def report(workdir):
    return running.audit_directory(workdir, QUICK, running.silent_display())


def test_the_replay_is_the_run_and_its_union_the_runs_own_attacker(case, tmp_path):
    payloads = Payloads(tmp_path)
    members = [int(k) for k in case.final.attackers["attacker_2"].members]
    rounds = []
    replayed = replay(case, members, payloads.keep, rounds.append)
    assert rounds == [1, 2, 3]
    assert replayed.difference < 1e-6
    held = hold(
        payloads.read(payload_layout(case), members),
        members,
        case.sent(case.final.params),
        case.sites,
    )
    theirs = case.final.attackers["attacker_2"]
    jax.tree.map(np.testing.assert_array_equal, held.union.known, theirs.known)
    jax.tree.map(
        lambda ours, own: np.testing.assert_allclose(ours, own, atol=1e-6),
        attacker_params(held.union, case.sites),
        attacker_params(theirs, case.sites),
    )


def test_the_report_says_what_was_measured(report, workdir):
    written = json.loads((workdir / "audit" / "audit.json").read_text())
    assert written == report
    each = report["adversaries"]["2"]
    assert len(each["members"]) == 2
    scores = {one["name"]: one.get("score") for one in each["attacks"]}
    for name in ("alone_random", "union", "union_tuned", "filled_mean", "distilled_10"):
        assert 0 <= scores[name] <= 1
    owner, alone, best = (
        report["models"]["global"]["value"],
        each["alone"]["score"]["value"],
        each["best"]["score"]["value"],
    )
    if owner > alone:
        expected = (owner - max(best, alone)) / (owner - alone)
        assert each["protected_share"]["value"] == pytest.approx(expected)
        strongest = max(
            score
            for name, score in scores.items()
            if score is not None and not name.startswith(("alone", "distilled"))
        )
        least = (owner - max(strongest, alone)) / (owner - alone)
        assert each["protected_share_at_least"]["value"] == pytest.approx(least)
    # The run's own evaluation of the owner's model, by other code.
    summary = json.loads((workdir / "summary.json").read_text())
    end = summary["views"]["global"]["end"]["accuracy"]
    assert owner == pytest.approx(end, abs=1e-6)
    page = (workdir / "audit" / "audit.html").read_text()
    assert "http" not in page
    assert "data:image/png;base64," in page
    assert (workdir / "audit" / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_an_audit_goes_on_where_it_was(report, workdir, monkeypatch):
    def never(*arguments):
        raise AssertionError("played again")

    monkeypatch.setattr("fedqsn_jax.audit.playing.replay", never)
    results = workdir / "audit" / "results"
    (results / "2_union.npz").unlink()
    (results / "2_latest_proxy.npz").write_bytes(b"damaged")
    before = (results / "2_alone_random.npz").stat().st_mtime_ns
    again = running.audit_directory(workdir, QUICK, running.silent_display())
    assert (results / "2_alone_random.npz").stat().st_mtime_ns == before
    old, new = (
        {one["name"]: one.get("score") for one in each["adversaries"]["2"]["attacks"]}
        for each in (report, again)
    )
    assert old == new


def test_own_models(case, model, tmp_path):
    generator = np.random.default_rng(0)

    def rows(count):
        x = generator.normal(size=(count, 6)).astype(np.float32)
        return {"x": x, "label": (x[:, 0] > 0).astype(np.int32)}

    clients, test = [rows(9) for _ in range(4)], rows(30)
    result = fedqsn_jax.federate(
        (model.apply_fn, model.params), clients, test, rounds=2, cohort={"size": 2},
        client={"steps": 2, "batch_size": 4}, site_rules=("head/kernel: none",),
    )  # fmt: skip
    own = fedqsn_jax.OwnModel(model.apply_fn, model.params, clients, test)
    made = case_of_model(result.simulation, result.state, own)
    replayed = replay(made, [0, 1], lambda *payload: None, lambda done: None)
    assert replayed.difference < 1e-6
    with pytest.raises(ConfigError, match="at most the number of clients, 4"):
        fedqsn_jax.audit_run(result, own, tmp_path / "a", fedqsn_jax.AuditSettings(colluders=(5,)))
    other = {"head": model.params["head"]}
    with pytest.raises(ConfigError, match="another architecture"):
        fedqsn_jax.audit_run(result, own, tmp_path / "a", public_base=other)
    assert not (tmp_path / "a").exists()
    unfinished = SimpleNamespace(simulation=result.simulation, state=case.start)
    with pytest.raises(ConfigError, match="round 0 of 2"):
        fedqsn_jax.audit_run(unfinished, own, tmp_path / "a")


def test_random_weights_use_nothing_of_the_model(case):
    owner = case.owner(case.final)
    key = jax.random.key(0)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, owner)
    ours, theirs = (random_weights(key, params, case.sites) for params in (owner, broken))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    kernel = ours["hidden_0"]["kernel"]
    assert np.std(kernel) == pytest.approx(kernel.shape[0] ** -0.5, rel=0.1)
    assert not np.asarray(ours["hidden_0"]["bias"]).any()


def answer(capsys, *arguments):
    code = main([*map(str, arguments)])
    error = capsys.readouterr().err
    assert code == 2
    assert len(error.splitlines()) == 1, error
    return error


def test_mistakes_cost_a_line_and_leave_nothing(workdir, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    stored = json.loads((workdir / "config.json").read_text())
    assert "no --workdir" in answer(capsys)
    assert "there is no run in it" in answer(capsys, f"--workdir={tmp_path / 'none'}")
    (copy / "config.json").write_text(json.dumps(stored))
    assert "not finished" in answer(capsys, f"--workdir={copy}")
    (copy / "config.json").write_text(json.dumps({**stored, "future": 1}))
    assert "unknown field future" in answer(capsys, f"--workdir={copy}")
    (copy / "config.json").write_text(json.dumps({**stored, "algorithm": "fedsp"}))
    assert "fedsp" in answer(capsys, f"--workdir={copy}")
    assert [path.name for path in copy.iterdir()] == ["config.json"]
    before = sorted(workdir.rglob("*"))
    for options, message in (
        (["--colluders=6"], "at most the number of clients, 5"),
        (["--colluders=one"], "integers of 1 or more, or half"),
        (["--queries=0"], "integers of 1 or more"),
        ([f"--public_base={copy}"], "no run, no exported model"),
        ([f"--reference={workdir}"], "allowed is fedavg"),
    ):
        assert message in answer(capsys, f"--workdir={workdir}", *options)
    rows = workdir / "rows.sha256"
    digest = rows.read_text()
    rows.write_text("0" * 64)
    assert "the rows are not those" in answer(capsys, f"--workdir={workdir}")
    rows.write_text(digest)
    assert sorted(workdir.rglob("*")) == before
