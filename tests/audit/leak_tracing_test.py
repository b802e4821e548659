"""Who leaked a model: the guilty are named, the innocent are not, mistakes are told in a line."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax.audit.case import case_of_run
from fedqsn_jax.audit.command import main
from fedqsn_jax.audit.leak_tracing import false_alarm, trace
from fedqsn_jax.audit.naming import conclusion
from fedqsn_jax.audit.replay import make_client_proxy
from fedqsn_jax.config.schema import ConfigError, resolve
from fedqsn_jax.models.parameter_files import save_params
from fedqsn_jax.protocol.proxy import dequantize_proxy
from fedqsn_jax.reporting.display import silent_display
from fedqsn_jax.runs import experiment

SETTINGS = {
    "rounds": 3,
    "tracing_margin": 0.3,
    "data": {"name": "digits", "clients": 6, "private_rows": 40, "test_rows": 60,
             "train_rows": 260},
    "model": {"name": "mlp", "hidden": (32,)},
    "pretraining": {"steps": 20, "batch_size": 16, "learning_rate": 0.1},
    "cohort": {"size": 4},
    "client": {"steps": 3, "batch_size": 8, "learning_rate": 0.1},
    "evaluation": {"attackers": (1,), "proxy_samples": 2, "every": 3},
    "checkpoint": {"every": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("traced") / "run"
    experiment.run(resolve(SETTINGS), path, silent_display())
    return path


@pytest.fixture(scope="module")
def case(workdir):
    return case_of_run(workdir)


def copy_of(case, client, scaled=True):
    """The model that a client makes of what it is sent before the first round."""
    proxy = dequantize_proxy(make_client_proxy(case)(case.start, jnp.int32(client)))
    return case.model(proxy.params, proxy.scale if scaled else None)


@pytest.fixture(scope="module")
def in_first_round(case):
    return [int(client) for client in case.simulation.federation.cohort(case.start)]


def test_the_guilty_are_named_and_nobody_else(case, in_first_round):
    alone, first, second, absent = (
        *in_first_round[:3],
        next(client for client in range(6) if client not in in_first_round),
    )
    mean = jax.tree.map(lambda a, b: (a + b) / 2, copy_of(case, first), copy_of(case, second))
    noise = np.random.default_rng(0)
    disturbed = jax.tree.map(
        lambda leaf: leaf + 0.3 * float(leaf.std()) * noise.normal(size=leaf.shape),
        copy_of(case, alone, scaled=False),
    )
    rounds = []
    found = trace(
        case,
        [copy_of(case, alone), mean, disturbed, case.owner(case.final), copy_of(case, absent)],
        lambda: rounds.append(1),
    )
    assert len(rounds) == case.config.rounds
    named = [[each.client for each in one if each.false_alarm < 1e-3] for one in found]
    assert named[0] == [alone]
    assert sorted(named[1]) == sorted([first, second])
    assert named[2] == [alone]
    assert named[3] == [], "the owner's own model accuses nobody"
    # Of what its rounds would have been: its bits are the same in all rounds.
    assert set(named[4]) <= {absent}
    for one in found:
        assert [each.score for each in one] == sorted((each.score for each in one), reverse=True)
    assert found[0][0].score > 10
    assert found[0][0].round == 0


def test_the_bound_on_false_alarms_holds_for_coins(case):
    """20,000 innocent clients, whose terms are as unequal as can be."""
    rng = np.random.default_rng(3)
    terms = rng.uniform(0, 1, 200) ** 4
    coins = rng.choice([-1.0, 1.0], size=(20_000, 200))
    scores = coins @ terms / np.sqrt((terms**2).sum())
    for score in (0.5, 1, 2, 3):
        assert (scores >= score).mean() <= false_alarm(score, 1)
    assert false_alarm(3, 1) == pytest.approx(math.exp(-4.5))
    assert false_alarm(5, 40) == pytest.approx(40 * math.exp(-12.5))
    assert false_alarm(0, 1) == false_alarm(-7, 1) == false_alarm(1, 1000) == 1


def test_the_command_names_a_client(case, workdir, in_first_round, tmp_path, capsys):
    leaked, guilty = tmp_path / "leaked", in_first_round[0]
    save_params(leaked, copy_of(case, guilty))
    assert main(["trace", f"--workdir={workdir}", f"--model={leaked}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"was made of what client {guilty} received" in shown
    written = json.loads((workdir / "audit" / "trace.json").read_text())
    assert written["named"] == [guilty]
    assert written["suspects"][0]["client"] == guilty
    assert (workdir / "audit").stat().st_mode & 0o077 == 0
    assert "nobody is named" in conclusion({**written, "named": []})
    assert "what clients 2, 5 received" in conclusion({**written, "named": [2, 5]})


def test_mistakes_are_told_in_a_line(case, workdir, tmp_path, capsys):
    other = tmp_path / "other"
    save_params(other, {"hidden_0": {"kernel": np.zeros((3, 4), np.float32)}})
    for arguments, told in (
        ([], "no --workdir"),
        ([f"--workdir={workdir}"], "no --model"),
        ([f"--workdir={tmp_path}", f"--model={other}"], str(tmp_path)),
        ([f"--workdir={workdir}", f"--model={tmp_path / 'gone'}"], "no exported model"),
        ([f"--workdir={workdir}", f"--model={other}"], "another architecture"),
        ([f"--workdir={workdir}", f"--model={other}", "--false_alarm=2"], "above 0 and below 1"),
        ([f"--workdir={workdir}", f"--model={other}", "--false_alarm=x"], "above 0 and below 1"),
    ):
        assert main(["trace", *arguments]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.strip().count("\n") == 0, error
    config = resolve({**SETTINGS, "tracing_margin": 0.0})
    with pytest.raises(ConfigError, match="all clients were sent the same rounding"):
        trace(case._replace(config=config), [])
