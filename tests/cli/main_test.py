"""The command line: every mistake is one line and exit code 2, and leaves nothing behind."""

import json
import os
import signal
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from run_cases import SMALL

from fedqsn_jax import linen_apply, load
from fedqsn_jax.cli.main import main
from fedqsn_jax.config import command_line
from fedqsn_jax.host.checkpoints import Checkpoints
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.reporting import plots
from fedqsn_jax.runs.experiment import prepare
from fedqsn_jax.runs.working_directory import WorkDirectory
from fedqsn_jax.simulation.running import initial_state

MISTAKES = {
    "unknown field": (
        ["--config.cohort.sise=3"],
        "unknown field cohort.sise; did you mean cohort.size",
    ),
    "unknown field of a section": (
        ["--config.client.lr=0.1"],
        "unknown field client.lr; client has steps, batch_size, optimizer, learning_rate",
    ),
    "a section": (["--config.model=mlp"], "model"),
    "p1 = 1": (["--config.p1=1.0"], "p1 = 1.0: allowed is 0 to below 1"),
    "p1 < 0": (["--config.p1=-0.1"], "p1 = -0.1: allowed is 0 to below 1"),
    "p2 is no number": (["--config.p2=nan"], "p2 = 'nan'"),
    "bits = 0": (["--config.bits=0"], "bits = 0: allowed is 1 to 8"),
    "bits = 9": (["--config.bits=9"], "bits = 9: allowed is 1 to 8"),
    "block_size = 0": (["--config.block_size=0"], "block_size = 0: allowed is 1 or more"),
    "large cohort": (["--config.cohort.size=21"], "cohort.size = 21: allowed is at most"),
    "many attackers": (["--config.evaluation.attackers=(1,21)"], "evaluation.attackers = (1, 21)"),
    "algorithm": (["--config.algorithm=fedfoo"], "algorithm = 'fedfoo': allowed are fedavg"),
    "data set": (["--config.data.name=imagenet"], "data.name = 'imagenet': allowed are digits"),
    "model": (["--config.model.name=gpt"], "model.name = 'gpt': allowed are mlp, cnn"),
    "misfit": (["--config.model.name=cnn"], "model.name = 'cnn' does not fit data.name = 'digits'"),
    "smoothing": (
        ["--config.client.label_smoothing=0.1"],
        "client.label_smoothing = 0.1: only completions of texts are smoothed",
    ),
    "type": (["--config.rounds=many"], "rounds = 'many': allowed is a value of type int"),
    "fraction": (["--config.rounds=1.5"], "rounds = 1.5: allowed is a value of type int"),
    "no value": (["--config.rounds"], "--config.rounds: a value is missing"),
    "stray": (["stray"], "unexpected argument stray"),
    "option": (["--worksdir=x"], "unexpected argument --worksdir=x"),
    "rule": (["--config.site_rules=('x',)"], "site rule 'x' is not"),
    "rule for nothing": (["--config.site_rules=('x: none',)"], "matches no tensor"),
    "no site": (["--config.site_rules=('*: none',)"], "no mask site found"),
    "private rows": (["--config.data.private_rows=5000"], "data.private_rows = 5000"),
    "absent data": (["--config.data.name=mnist", "--config.data.directory=nowhere"], "nowhere"),
    "fedsp on images": (
        ["--config.algorithm=fedsp"],
        "algorithm = 'fedsp' with model.name = 'mlp': allowed is language, with an encoder",
    ),
    "fedlpp without adapters": (
        ["--config.algorithm=fedlpp"],
        "algorithm = 'fedlpp' with lora.rank = 0: allowed is a rank of 1 or more",
    ),
    "adapters of nothing": (
        ["--config.lora.rank=2", "--config.lora.matrices=('*/query/kernel',)"],
        "lora.matrices: '*/query/kernel' fits no matrix; allowed are patterns of: hidden_0/kernel",
    ),
    "nothing to train": (
        ["--config.client.trained=('norms',)"],
        "client.trained: 'norms' names no tensor; allowed are all, lora, biases, norms, head",
    ),
    "natural digits": (["--config.data.partition=natural"], "data.partition = 'natural'"),
}


def refusal(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    # On a busy machine there may be signs of life.
    assert [line for line in captured.out.splitlines() if not line.endswith("so far")] == []
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, tmp_path, capsys):
    arguments, expected = MISTAKES[mistake]
    directory = tmp_path / "run"
    message = refusal(capsys, [*SMALL, f"--workdir={directory}", *arguments])
    assert expected in message
    assert not directory.exists()


def test_a_missing_config(tmp_path, capsys):
    directory = tmp_path / "run"
    assert "no --config" in refusal(capsys, [f"--workdir={directory}"])
    missing = tmp_path / "missing.py"
    assert f"--config={missing}: no such file" in refusal(
        capsys, [f"--config={missing}", f"--workdir={directory}"]
    )
    assert "no --workdir" in refusal(capsys, ["--config=configs/digits.py"])
    assert not directory.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 +", "SyntaxError"),
        ("x = 1", "it defines no function get_config"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("def get_config():\n    raise SystemExit(3)", "SystemExit: 3"),
        ("def get_config():\n    return {}", "returned no ConfigDict"),
    ],
)
def test_a_broken_config_file(text, expected, tmp_path, capsys):
    file = tmp_path / "broken.py"
    file.write_text(text)
    assert expected in refusal(capsys, [f"--config={file}", f"--workdir={tmp_path / 'run'}"])


def test_an_argument_for_a_config_that_takes_none(tmp_path, capsys):
    file = tmp_path / "plain.py"
    file.write_text("def get_config():\n    return None")
    message = refusal(capsys, [f"--config={file}:fedavg", f"--workdir={tmp_path / 'run'}"])
    assert "takes no argument" in message


def test_a_directory_that_cannot_serve(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    arguments = [*SMALL, f"--workdir={tmp_path / 'file'}"]
    assert "is not a directory" in refusal(capsys, arguments)
    arguments = [*SMALL, f"--workdir={tmp_path / 'file' / 'below'}"]
    assert "cannot be written" in refusal(capsys, arguments)
    assert "holds other files" in refusal(capsys, [*SMALL, f"--workdir={tmp_path}"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_packaged_config_stands_in_for_a_missing_one(tmp_path, monkeypatch):
    packaged = tmp_path / "package"
    packaged.mkdir()
    (packaged / "digits.py").write_text(
        "from fedqsn_jax.config import default_config\n\n\n"
        "def get_config():\n    config = default_config()\n    config.rounds = 123\n"
        "    return config\n"
    )
    monkeypatch.setattr(command_line, "PACKAGED_CONFIGS", packaged)
    monkeypatch.chdir(tmp_path)
    assert command_line.read_config("configs/digits.py", []).rounds == 123


def test_a_dry_run_shows_sites_bytes_and_memory_and_writes_nothing(tmp_path, capsys):
    assert main([*SMALL, f"--workdir={tmp_path / 'run'}", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    # 64 -> 16 -> 10: the hidden layer has 16 columns, each with probability .8 * .8 in a proxy.
    assert "hidden_0/kernel" in shown
    assert "36.0%" in shown
    assert "4-bit NormalFloat, block 64" in shown
    fedavg = 4 * (64 * 16 + 16 + 16 * 10 + 10) + 48
    assert f"{fedavg:,}" in shown
    column_down = 64 // 2 + 2 + 4
    down = 48 + 2 + 4 + 0.64 * 16 * column_down + 4 * (16 * 10 + 10)
    assert f"{down:,.0f}" in shown
    assert "memory" in shown
    assert not (tmp_path / "run").exists()


def test_settings_of_the_command_line_without_effect_are_told(capsys):
    """The file sets p2 and bits too, for whichever algorithm is named after it."""
    fedavg = f"{SMALL[0]}:fedavg"
    chosen = ["--config.p1=0.5", "--config.client.epochs=3", "--config.model.channels=(8,)"]
    assert main([fedavg, *SMALL[1:], *chosen, "--dry_run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("warning:")] == [
        "warning: p1 = 0.5 has no effect with algorithm = 'fedavg'",
        "warning: client.epochs = 3 has no effect with client.steps = 1",
        "warning: model.channels = (8,) has no effect with model.name = 'mlp'",
    ]


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_writes_resumes_finishes_and_is_extended(tmp_path, capsys, monkeypatch):
    directory = tmp_path / "run"
    arguments = [*SMALL, f"--workdir={directory}"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    written = {path.name for path in directory.iterdir()}
    assert written == {
        "accuracy.png",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "rows.sha256",
        "summary.json",
        "tensorboard",
    }
    history = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [entry["round"] for entry in history] == [0, 2, 4]
    views = ("global", "server", "proxy", "attacker_1", "attacker_10")
    wanted = {f"{view}/{metric}" for view in views for metric in ("accuracy", "loss")}
    wanted |= {"round", "proxy/accuracy_std", "train/loss", "seconds"}
    wanted |= {"bytes/down_per_client", "bytes/up_per_client"}
    wanted |= {"clients/returned", "clients/rejected"}
    assert set(history[-1]) == wanted

    assert shown.count("0/4 ") == 1  # what the first evaluation told stands above the rounds
    summary = json.loads((directory / "summary.json").read_text())
    word = summary["verdict"]
    assert set(word["attackers"]) <= {"attacker_1", "attacker_10"}
    assert " ".join(shown.split()).count(word["text"]) == 1

    # The results stand before any picture is begun, and do not need it.
    (directory / "summary.json").unlink()
    with monkeypatch.context() as patch:

        def fail(*arguments):
            assert json.loads((directory / "summary.json").read_text()) == summary
            raise ValueError("no backend")

        patch.setattr(plots, "accuracy_curves", fail)
        assert main(arguments) == 0
    again = capsys.readouterr().out
    assert "warning: accuracy.png was not drawn: ValueError: no backend\n" in again

    assert main(arguments) == 0
    assert "finished at round 4" in capsys.readouterr().out

    trained = load(directory)
    assert (trained.round, trained.history) == (4, history)
    assert load(directory, round=2).round == 2
    splits = prepare(trained.config).problem.splits
    module = make_model(trained.config.model, splits.num_classes, dropout=0.0)
    logits = linen_apply(module)(trained.params, splits.test, None)
    accuracy = (np.argmax(logits, axis=-1) == splits.test["label"]).mean()
    assert accuracy == pytest.approx(history[-1]["global/accuracy"], abs=1e-6)

    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    for mode in ([], ["--dry_run"]):
        message = refusal(capsys, [*arguments, *mode, "--config.p1=0.5", "--config.seed=9"])
        assert "p1 = 0.5 (there: 0.2)" in message
        assert "seed = 9 (there: 0)" in message
        message = refusal(capsys, [*arguments, *mode, "--config.rounds=2"])
        assert "rounds = 2" in message
    (directory / "rows.sha256").write_text("f" * 64 + "\n")
    assert "the rows are not those with which the run was begun" in refusal(capsys, arguments)
    (directory / "rows.sha256").write_bytes(before[directory / "rows.sha256"])
    with WorkDirectory(directory).claim(trained.config), monkeypatch.context() as patch:
        # Before JAX, data and model are waited for.
        patch.setattr("fedqsn_jax.cli.main._run", None)
        message = refusal(capsys, [*arguments, "--config.rounds=6"])
        assert "another run is at work in it" in message
    with WorkDirectory(directory).claim(trained.config):
        # What writes nothing disturbs nobody.
        assert main([*arguments, "--config.rounds=6", "--dry_run"]) == 0
    capsys.readouterr()
    after = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert after == before

    def exhausted(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        yield  # A generator, which fails where the first call would.

    with monkeypatch.context() as patch:
        patch.setattr("fedqsn_jax.runs.experiment.run_rounds", exhausted)
        assert main([*arguments, "--config.rounds=6"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "cohort.chunk_size = 1: the device ran out of memory" in message
    assert "lower client.batch_size = " in message
    assert message.endswith("; the checkpoint of round 4 stands\n")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr("fedqsn_jax.runs.experiment.run_rounds", interrupted)
        assert main([*arguments, "--config.rounds=6"]) == 130
    assert capsys.readouterr().err == (
        "fedqsn_jax: interrupted; the same command resumes after round 4, the last that was saved\n"
    )

    # It does.
    assert main([*arguments, "--config.rounds=6"]) == 0
    assert "resumed after round 4" in capsys.readouterr().out
    longer = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert longer[:3] == history
    assert [entry["round"] for entry in longer] == [0, 2, 4, 6]


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_that_was_interrupted_before_its_rounds_leaves_nothing(
    tmp_path, capsys, monkeypatch, request
):
    def interrupted(*arguments):
        # Up to here there is nothing that a stop at the next boundary would save.
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("fedqsn_jax.runs.experiment.first_entry", interrupted)
    # A shell's background job ignores the signal, and so would this process as its child.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    directory = tmp_path / "new" / "run"
    assert main([*SMALL, f"--workdir={directory}"]) == 130
    output, error = capsys.readouterr()
    assert error == ("fedqsn_jax: interrupted; nothing was saved, the same command starts again\n")
    assert "warning" not in output
    assert list(tmp_path.iterdir()) == []

    # Checkpoints that someone has removed are no silent new beginning.
    directory.mkdir(parents=True)
    work = WorkDirectory(directory)
    work.write_config(command_line.read_config("configs/digits.py", SMALL[1:]))
    work.metrics.write_text('{"round": 0}\n{"round": 2}\n')
    assert main([*SMALL, f"--workdir={directory}"]) == 130
    expected = f"warning: there is no checkpoint in {work.checkpoints}: the run starts again at"
    assert capsys.readouterr().out.count(expected) == 1
    assert work.metrics.read_text().count("\n") == 2


def test_compiled_programs_are_kept_and_found_again(tmp_path, monkeypatch):
    directory, events = tmp_path / "programs", []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))

    def compile_something(*arguments):
        # Another function each time, which JAX's own cache does not know.
        jax.jit(lambda x: jnp.sin(x) + 3)(jnp.arange(5.0))

    monkeypatch.setattr("fedqsn_jax.runs.experiment.dry_run", compile_something)
    settings = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_compilation_cache_dir": None}
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        for hits in (0, 1):
            events.clear()
            assert main([SMALL[0], "--dry_run", f"--compilation_cache={directory}"]) == 0
            assert events.count("/jax/compilation_cache/cache_hits") >= hits
            assert ("/jax/compilation_cache/cache_misses" in events) is not bool(hits)
            assert any(directory.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.monitoring.clear_event_listeners()


def test_a_checkpoint_of_another_structure_is_refused(tmp_path, capsys):
    """As where the stored configuration was edited, which gets past the comparison of fields."""
    directory = tmp_path / "run"
    before = prepare(command_line.read_config(SMALL[0].removeprefix("--config="), SMALL[1:]))
    with Checkpoints(directory / "checkpoints", keep_latest=1, keep_best=0) as checkpoints:
        state = initial_state(before.simulation, before.problem.params)
        checkpoints.save(4, state, [{"round": 4}], score=0.0)
    wider = [*SMALL, "--config.model.hidden=(24,)"]
    after = command_line.read_config(wider[0].removeprefix("--config="), wider[1:])
    WorkDirectory(directory).write_config(after)
    files = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    message = refusal(capsys, [*wider, "--config.rounds=6", f"--workdir={directory}"])
    assert "head/kernel is stored as float32[16,10], but float32[24,10] is expected" in message
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == files


def test_a_directory_without_permission(tmp_path, capsys, monkeypatch):
    # The administrator may write anywhere, so that permission bits alone prove nothing here.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in refusal(capsys, [*SMALL, f"--workdir={tmp_path / 'run'}"])
