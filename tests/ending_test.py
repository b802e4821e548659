"""How commands end: exit codes, Ctrl-C, and output that nobody reads any more."""

import io
import os
import runpy
import signal
import sys

import pytest

from fedqsn_jax import ending
from fedqsn_jax.ending import INTERRUPTED, answered, cleaning_up, remaining_after_interruption
from fedqsn_jax.reporting.console import EnduringConsole
from fedqsn_jax.reporting.display import Display


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


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def end_of_process(monkeypatch):
    def end(code):
        raise Ended(code)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(ending.os, "_exit", end)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("end_of_process")
def test_ctrl_c_ends_a_process_where_it_is_but_for_what_has_to_be_cleaned_up(capfd):
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
                    os.kill(os.getpid(), signal.SIGINT)
                except Exception:
                    events.append("caught")
            return 0

        return answered(command)

    with pytest.raises(Ended, match="130"):
        ending.run_as_process(main)
    # Once by the handler; and again because the stand-in for the end of the process is raised.
    assert events == ["first in", "outer", "outer"]
    assert capfd.readouterr() == ("", "fedqsn_jax: interrupted; something remains\n")


@pytest.mark.usefixtures("end_of_process")
def test_a_process_ends_with_its_commands_code():
    for code in (0, 2):
        with pytest.raises(SystemExit) as end:
            ending.run_as_process(lambda code=code: code)
        assert end.value.code == code
        # Ctrl-C during Python's shutdown finds nothing to tell.
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A KeyboardInterrupt that came otherwise: JAX's threads may be at work.
    with pytest.raises(Ended, match="130"):
        ending.run_as_process(lambda: answered(interrupted_command()))


@pytest.mark.usefixtures("end_of_process")
def test_a_process_to_which_ctrl_c_means_nothing_keeps_it_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept = []
    with pytest.raises(SystemExit):
        ending.run_as_process(lambda: kept.append(signal.getsignal(signal.SIGINT)) or 0)
    assert kept == [signal.SIG_IGN]


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
    assert ending.refuse(ValueError("lost")) == 2
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    file.close()


def test_the_package_names_its_commands(capsys):
    with pytest.raises(SystemExit) as end:
        runpy.run_module("fedqsn_jax", run_name="__main__")
    assert end.value.code == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.count("\n") == 1
    for name in ("main", "sweep", "benchmark", "export"):
        assert f"python -m fedqsn_jax.{name}" in error
