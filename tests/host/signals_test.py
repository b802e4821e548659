"""How commands end: exit codes, Ctrl-C, and output that nobody reads any more."""

import functools
import hashlib
import io
import os
import runpy
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from run_cases import make_run

from fedqsn_jax.cli import export
from fedqsn_jax.config.schema import Config
from fedqsn_jax.data.text.array_cache import cached
from fedqsn_jax.host import signals
from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.host.console import EnduringConsole
from fedqsn_jax.host.signals import INTERRUPTED, answered, cleaning_up, remaining_after_interruption
from fedqsn_jax.models.language import pretrained
from fedqsn_jax.reporting.display import Display
from fedqsn_jax.runs.working_directory import WorkDirectory


def interrupted_command(text=None):
    def command():
        if text is not None:
            remaining_after_interruption(lambda: text)
        raise KeyboardInterrupt

    return command


def test_an_interrupted_command_says_what_remains(capsys):
    """What an inner command has said does not hold for the outer one."""

    def outer():
        remaining_after_interruption(lambda: "outer")
        assert answered(interrupted_command("inner")) == INTERRUPTED == 130
        raise KeyboardInterrupt

    assert answered(outer) == INTERRUPTED
    assert answered(interrupted_command()) == INTERRUPTED
    assert answered(lambda: 7) == 7
    lines = ["interrupted; inner", "interrupted; outer", "interrupted"]
    assert capsys.readouterr().err == "".join(f"fedqsn_jax: {line}\n" for line in lines)


def test_what_remains_may_be_damaged(capsys):
    def command():
        remaining_after_interruption(lambda: str([][0]))
        raise KeyboardInterrupt

    assert answered(command) == INTERRUPTED
    assert capsys.readouterr().err == "fedqsn_jax: interrupted\n"


def test_commands_of_two_threads_do_not_speak_for_each_other(capsys):
    other_began, other_may_end = threading.Event(), threading.Event()

    def other():
        remaining_after_interruption(lambda: "other")
        other_began.set()
        other_may_end.wait(60)
        return 0

    thread = threading.Thread(target=answered, args=(other,))

    def command():
        thread.start()
        other_began.wait(60)
        remaining_after_interruption(lambda: "ours")
        # What was there when the other one began is not what is there at its end.
        other_may_end.set()
        thread.join()
        raise KeyboardInterrupt

    assert answered(command) == INTERRUPTED
    assert answered(interrupted_command()) == INTERRUPTED
    lines = ["interrupted; ours", "interrupted"]
    assert capsys.readouterr().err == "".join(f"fedqsn_jax: {line}\n" for line in lines)


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def end_of_process(monkeypatch):
    def end(code):
        raise Ended(code)

    kinds = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(kind) for kind in kinds]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(signals.os, "_exit", end)
    yield
    for kind, handler in zip(kinds, before, strict=True):
        signal.signal(kind, handler)


@pytest.mark.usefixtures("end_of_process")
@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, "130"), (signal.SIGTERM, "143")])
def test_a_signal_ends_a_process_where_it_is_but_for_what_has_to_be_cleaned_up(kind, code, capfd):
    """No exception passes the command, which libraries could catch."""
    events, failures = [], iter([OSError("a disk that is full")])

    def fail_once():
        for failure in failures:
            raise failure

    def main():
        def command():
            remaining_after_interruption(lambda: "something remains")
            with cleaning_up(lambda: events.append("first in")):
                pass
            with cleaning_up(lambda: events.append("outer")), cleaning_up(fail_once):
                try:
                    os.kill(os.getpid(), kind)
                except Exception:
                    events.append("caught")
            return 0

        return answered(command)

    with pytest.raises(Ended, match=code):
        signals.run_as_process(main)
    # Once by the handler; and again because the stand-in for the end of the process is raised.
    assert events == ["first in", "outer", "outer"]
    assert capfd.readouterr() == ("", "fedqsn_jax: interrupted; something remains\n")


@pytest.mark.usefixtures("end_of_process")
def test_a_main_thread_deep_in_a_compilation_does_not_keep_the_process(monkeypatch, capfd):
    """Handlers of Python's wait for it: another thread ends the process."""
    codes = []
    monkeypatch.setattr(signals, "leave", lambda code: codes.append((time.monotonic(), code)))
    monkeypatch.setattr(signals, "_PATIENCE", 0.1)

    # One call of C, which holds up the main thread as a compilation does.
    stuck = functools.partial(hashlib.pbkdf2_hmac, "sha256", b"", b"", 8_000_000)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def compiling():
        remaining_after_interruption(lambda: "something remains")
        stuck()
        return 0

    signals.end_at_signals()
    answered(compiling)
    over = time.monotonic()
    (first, code), *_ = codes
    assert code == 143
    assert first < over - 0.1
    assert "fedqsn_jax: interrupted; something remains\n" in capfd.readouterr().err


@pytest.mark.usefixtures("end_of_process")
def test_a_process_ends_with_its_commands_code():
    with pytest.raises(SystemExit) as end:
        signals.run_as_process(lambda: 0)
    assert end.value.code == 0
    # A signal during Python's shutdown finds nothing to tell.
    for kind in (signal.SIGINT, signal.SIGTERM):
        assert signal.getsignal(kind) is signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # After a failed save Orbax's threads would keep the shutdown waiting for minutes.
    with pytest.raises(Ended, match="2"):
        signals.run_as_process(lambda: 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A KeyboardInterrupt that came otherwise: JAX's threads may be at work.
    with pytest.raises(Ended, match="130"):
        signals.run_as_process(lambda: answered(interrupted_command()))


@pytest.mark.usefixtures("end_of_process")
@pytest.mark.parametrize("command", ["main", "sweep", "benchmark", "export"])
def test_ctrl_c_during_the_first_imports_is_a_line(monkeypatch, capfd, command):
    class Importing:
        def __getattr__(self, name):
            if name == "main":
                os.kill(os.getpid(), signal.SIGINT)
            raise AttributeError(name)

    monkeypatch.setitem(sys.modules, f"fedqsn_jax.cli.{command}", Importing())
    monkeypatch.delitem(sys.modules, f"fedqsn_jax.{command}", raising=False)
    with pytest.raises(Ended, match="130"):
        runpy.run_module(f"fedqsn_jax.{command}", run_name="__main__")
    assert capfd.readouterr() == ("", "fedqsn_jax: interrupted\n")


def test_output_to_a_full_disk_costs_no_more_than_the_output(capfd):
    with open("/dev/full", "w") as full:
        output = signals.EnduringStream(full)
        for _ in range(3):
            print("a line", file=output, flush=True)
        assert output.lost
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fedqsn_jax: standard output: No space left on device")


def debug(number, frame):
    """Stands for a debugger's handler."""


@pytest.mark.usefixtures("end_of_process")
@pytest.mark.parametrize("handler", [signal.SIG_IGN, debug])
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_process_to_which_a_signal_means_something_else_keeps_it_so(kind, handler):
    """Also while Python shuts down."""
    signal.signal(kind, handler)
    kept = []
    with pytest.raises(SystemExit):
        signals.run_as_process(lambda: kept.append(signal.getsignal(kind)) or 0)
    assert [*kept, signal.getsignal(kind)] == [handler, handler]


def interrupt(*arguments, **options):
    os.kill(os.getpid(), signal.SIGINT)


def interrupted_replacement(directory, monkeypatch):
    with replacing(directory / "file") as temporary:
        temporary.write_text("half")
        interrupt()


def interrupted_cache(directory, monkeypatch):
    monkeypatch.setattr(np, "savez", interrupt)
    cached(directory, "key", lambda: {"a": np.zeros(3)})


def interrupted_configuration(directory, monkeypatch):
    # In the place of the replacement, after the new file was written.
    monkeypatch.setattr("os.replace", interrupt)
    WorkDirectory(directory).write_config(Config())


def interrupted_export(directory, monkeypatch):
    def save_half(arrays, path, **options):
        path.write_text("half")
        interrupt()

    monkeypatch.setattr(
        pretrained, "safetensors_numpy", lambda: SimpleNamespace(save_file=save_half)
    )
    export.export(directory.parent / "run", directory / "new" / "model")


def interrupted_export_of_the_tokenizer(directory, monkeypatch):
    monkeypatch.setattr(pretrained, "TOKENIZER_FILES", ("config.json",))
    monkeypatch.setattr(export.shutil, "copyfile", interrupt)
    export.export(directory.parent / "run", directory)


@pytest.mark.parametrize(
    "write",
    [
        interrupted_replacement,
        interrupted_cache,
        interrupted_configuration,
        interrupted_export,
        interrupted_export_of_the_tokenizer,
    ],
)
@pytest.mark.usefixtures("end_of_process")
def test_ctrl_c_leaves_no_file_in_part(write, tmp_path, monkeypatch):
    directory = tmp_path / "directory"
    directory.mkdir()
    if "export" in write.__name__:
        make_run(tmp_path / "run", "gpt2")
    left = []

    def end(code):
        # Here the process ends: what an exception would clean up later does not count.
        left.append(list(directory.rglob("*")))
        raise Ended(code)

    monkeypatch.setattr(signals.os, "_exit", end)
    signal.signal(signal.SIGINT, signals._end)
    with pytest.raises(Ended, match="130"):
        write(directory, monkeypatch)
    assert left == [[]]


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def kind(request):
    """A signal whose handler is restored."""
    before = signal.getsignal(request.param)
    yield request.param
    signal.signal(request.param, before)


def test_the_first_signal_is_a_request_and_the_second_is_not(kind, capsys):
    seen, stopped = [], threading.Event()

    def before(number, frame):
        seen.append(number)

    signal.signal(kind, before)
    with signals.stopping_at(kind, stopped):
        assert not stopped.is_set()
        signal.raise_signal(kind)
        assert stopped.is_set()
        assert (seen, capsys.readouterr().err.count("\n")) == ([], 1)
        signal.raise_signal(kind)
        assert seen == [kind]
    assert signal.getsignal(kind) is before
    with signals.stopping_at(kind, stopped):
        assert signal.getsignal(kind) is not before
    assert signal.getsignal(kind) is before


def test_an_ignored_signal_is_no_request(kind, monkeypatch):
    stopped = threading.Event()
    signal.signal(kind, signal.SIG_IGN)
    with signals.stopping_at(kind, stopped):
        signal.raise_signal(kind)
    assert not stopped.is_set()
    # What Python has not installed it could not restore.
    monkeypatch.setattr("fedqsn_jax.runs.experiment.signal.getsignal", lambda kind: None)
    with signals.stopping_at(kind, stopped):
        signal.raise_signal(kind)
    assert not stopped.is_set()


def test_a_request_during_a_write_to_the_same_stream_ends_nothing(kind, monkeypatch):
    class Interrupting(io.RawIOBase):
        written = b""

        def writable(self):
            return True

        def write(self, data):
            if not stopped.is_set():
                signal.raise_signal(kind)
            self.written += bytes(data)
            return len(data)

    stopped, raw = threading.Event(), Interrupting()
    signal.signal(kind, signal.default_int_handler)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(raw)))
    with signals.stopping_at(kind, stopped):
        print("a line", file=sys.stderr, flush=True)
    assert stopped.is_set()
    assert raw.written.startswith(b"a line\n")


def unread_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def test_output_that_nobody_reads_costs_nothing_else(monkeypatch):
    file = unread_pipe()
    display = Display(EnduringConsole(file=file))
    display.message("lost")
    display.message("lost too")
    # What else goes there is lost too, also what Python writes when it closes the file.
    print("and this", file=file, flush=True)
    file.close()

    file = unread_pipe()
    monkeypatch.setattr(sys, "stderr", file)
    assert signals.refuse(ValueError("lost")) == 2
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    file.close()


def test_the_package_names_its_commands(capsys):
    with pytest.raises(SystemExit) as end:
        runpy.run_module("fedqsn_jax", run_name="__main__")
    assert end.value.code == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.count("\n") == 1
    for name in ("main", "sweep", "benchmark", "export", "audit", "deploy"):
        assert f"python -m fedqsn_jax.{name}" in error
