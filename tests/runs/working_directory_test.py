"""The directory of a run: one run at a time, and the configuration that made it."""

import contextlib
import errno
import json
import os
import pathlib
import stat
import subprocess
import sys

import pytest

from fedqsn_jax.config.schema import Config, ConfigError, resolve, with_fields
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.runs import claims
from fedqsn_jax.runs.working_directory import WorkDirectory

HOLD = """
import sys
from fedqsn_jax.config.schema import Config
from fedqsn_jax.runs.working_directory import WorkDirectory
with WorkDirectory(__import__("pathlib").Path(sys.argv[1])).claim(Config()):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def claim(directory, config=None):
    with WorkDirectory(directory).claim(config or Config()):
        pass


def look(directory):
    WorkDirectory(directory).check(Config())


def test_a_second_run_is_refused_while_the_first_is_at_work(tmp_path):
    """Whichever process it is in; and a process that is killed leaves no lock behind."""
    directory = tmp_path / "new" / "run"
    with WorkDirectory(directory).claim(Config()):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        for use in (claim, look):
            with pytest.raises(
                ConfigError, match=r"new/run: another run is at work in it; [^\n]*$"
            ):
                use(directory)
        WorkDirectory(directory).check_fit(Config())
    claim(directory)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "claimed\n"
        for use in (claim, look):
            with pytest.raises(ConfigError, match="another run is at work"):
                use(directory)
        process.kill()
    for use in (claim, look):
        use(directory)
    assert list(directory.iterdir()) == []


def test_a_directory_in_which_nothing_happened_is_removed(tmp_path):
    """With those above it that were made for it; not one that was there before."""
    before = tmp_path / "before"
    before.mkdir()
    directory = before / "new" / "run"
    look(directory)
    assert not directory.parent.exists()
    for error in (None, KeyboardInterrupt):
        with contextlib.suppress(KeyboardInterrupt), WorkDirectory(directory).claim(Config()):
            assert directory.exists()
            if error:
                raise error
        assert list(before.iterdir()) == []
    with WorkDirectory(before).claim(Config()):
        pass
    assert before.exists()
    with WorkDirectory(directory).claim(Config()):
        WorkDirectory(directory).write_config(Config())
    assert [path.name for path in directory.iterdir()] == ["config.json"]


def test_who_comes_second_removes_nothing_of_the_first(tmp_path, monkeypatch):
    """Also where both have found no directory, and one has made it and the other locked it."""
    directory, lock = tmp_path / "new" / "run", claims._lock
    with contextlib.ExitStack() as first:

        def be_overtaken(path, shared=False):
            monkeypatch.setattr(claims, "_lock", lock)
            first.enter_context(WorkDirectory(directory).claim(Config()))
            return lock(path, shared)

        monkeypatch.setattr(claims, "_lock", be_overtaken)
        with pytest.raises(ConfigError, match="another run is at work"):
            claim(directory)
        WorkDirectory(directory).write_config(Config())
    assert WorkDirectory(directory).config() == Config()


@pytest.mark.parametrize("locked", [False, True])
def test_a_directory_that_its_last_run_removes_meanwhile_is_made_again(
    tmp_path, monkeypatch, locked
):
    directory, lock, removals = tmp_path / "new" / "run", claims._lock, []

    def remove(path):
        if len(removals) < 2:
            path.rmdir()
            path.parent.rmdir()
            removals.append(path)

    def lock_what_is_removed(path):
        if not locked:
            remove(path)
        descriptor = lock(path)
        remove(path)
        return descriptor

    monkeypatch.setattr(claims, "_lock", lock_what_is_removed)
    with WorkDirectory(directory).claim(Config()):
        assert len(removals) == 2
        monkeypatch.setattr(claims, "_lock", lock)
        with pytest.raises(ConfigError, match="another run is at work"):
            claim(directory)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_removed_every_time_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_is_at", lambda descriptor, path: False)
    with pytest.raises(ConfigError, match="others make and remove it all the time"):
        claim(tmp_path)


def test_a_directory_that_cannot_be_made_leaves_none_above_it(tmp_path, monkeypatch):
    def fail_in_the_end(path, **options):
        os.makedirs(path.parent)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "mkdir", fail_in_the_end)
    with pytest.raises(ConfigError, match="No space left on device"):
        claim(tmp_path / "new" / "above" / "run")
    assert list(tmp_path.iterdir()) == []


def test_who_only_looks_keeps_nobody_out(tmp_path, monkeypatch):
    looking = claims._lock(tmp_path, shared=True)
    waits = []

    def look_to_the_end(seconds):
        waits.append(seconds)
        os.close(looking)

    monkeypatch.setattr(claims.time, "sleep", look_to_the_end)
    claim(tmp_path)
    assert len(waits) == 1


def test_what_remains_after_an_interruption(tmp_path):
    work = WorkDirectory(tmp_path / "run")
    nothing = "nothing was saved, the same command starts again"
    assert work.what_remains() == nothing
    # As Orbax names what it is still writing.
    (work.checkpoints / "60.orbax-checkpoint-tmp").mkdir(parents=True)
    assert work.what_remains() == nothing
    for name in ("5", "50"):
        (work.checkpoints / name).mkdir()
    assert work.what_remains() == "the same command resumes after round 50, the last that was saved"


def test_what_happened_since_the_first_look_counts(tmp_path):
    """Another run may have made and left the directory while this one was loading its data."""
    with WorkDirectory(tmp_path).claim(Config()):
        WorkDirectory(tmp_path).write_config(Config())
    with pytest.raises(ConfigError, match="made with another configuration: seed = 1"):
        claim(tmp_path, Config(seed=1))
    claim(tmp_path)


def test_what_has_no_effect_does_not_make_it_another_run(tmp_path):
    """As where a later version has other defaults, or fields that it had not."""
    with WorkDirectory(tmp_path).claim(Config()):
        WorkDirectory(tmp_path).write_config(Config())
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    stored["fedsp"]["distillation_noise"] = 0.25
    del stored["model"]["remat"]
    file.write_text(json.dumps(stored))
    claim(tmp_path)
    prompted = with_fields(Config(), {"algorithm": "fedsp", "rounds": 70})
    with pytest.raises(ConfigError, match=r"algorithm = 'fedsp' .*distillation_noise = 1\.0 \("):
        claim(tmp_path, prompted)
    with pytest.raises(ConfigError, match=r"configuration: p1 = 0\.3 \(there: 0\.2\)$"):
        claim(tmp_path, with_fields(Config(), {"p1": 0.3, "model.dense": 7}))
    # An algorithm that hides nothing: with what probability is nothing to it.
    averaged = with_fields(Config(), {"algorithm": "fedavg"})
    WorkDirectory(tmp_path).write_config(averaged)
    claim(tmp_path, with_fields(averaged, {"p1": 0.3, "bits": 2}))
    # What this version does not know may have had an effect.
    stored["algorithm"], stored["unknown"] = "fedavg", 1
    file.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"configuration: unknown = None \(there: 1\)$"):
        claim(tmp_path, averaged)


@pytest.mark.parametrize("known", [True, False])
def test_without_locks_runs_go_on(tmp_path, monkeypatch, known):
    """Where neither the system nor the file system has such locks."""

    def no_locks(descriptor, operation):
        raise OSError(95, os.strerror(95))

    if known:
        monkeypatch.setattr(claims.fcntl, "flock", no_locks)
    else:
        monkeypatch.setattr(claims, "fcntl", None)
    with WorkDirectory(tmp_path).claim(Config()):
        claim(tmp_path)


def test_the_configuration_comes_back(tmp_path):
    work = WorkDirectory(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no run in it, no config\.json$"):
        work.config()
    config = resolve({"seed": 3, "site_rules": ("a: none",), "model": {"hidden": (8, 4)}})
    work.write_config(config)
    assert work.config() == config
    for text, message in (
        ("{", "config.json cannot be read"),
        ("[1]", "config.json cannot be read"),
        ('{"sed": 1}', "config.json: unknown field sed; did you mean seed?"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError) as error:
            work.config()
        assert str(error.value) == f"--workdir={tmp_path}: {message}"


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert WorkDirectory(pathlib.Path("~/run")).path == tmp_path / "home" / "run"
    with WorkDirectory(pathlib.Path("~/run")).claim(Config()):
        assert (tmp_path / "home" / "run").is_dir()
    assert not (tmp_path / "~").exists()
    with pytest.raises(UserError, match=r"^~nobody-of-this-name/run: there is no such home"):
        WorkDirectory(pathlib.Path("~nobody-of-this-name/run"))


def test_a_damaged_file_of_rows_is_not_told_as_other_rows(tmp_path):
    work = WorkDirectory(tmp_path)
    ours, others = "0123456789abcdef" * 4, "f" * 64
    work.write_rows(ours)
    work.check_rows(ours)
    with pytest.raises(ConfigError, match="the rows are not those"):
        work.check_rows(others)
    file = tmp_path / "rows.sha256"
    for damaged in (b"", ours[:-1].encode(), b"\xff" + ours[1:].encode()):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"rows\.sha256 is damaged; [^\n]*remove that file$"):
            work.check_rows(ours)
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match=r"rows\.sha256: Is a directory$"):
        work.check_rows(ours)
