"""A command that is ended by a signal leaves no program behind."""

import os
import signal
import subprocess
import sys
import time

_COMMAND = """
import sys, time
from pathlib import Path
from fedqsn_jax.deploy.processes import process
from fedqsn_jax.host import signals

def main():
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); "
    sleeps = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
    command = [sys.executable, "-c", child + sleeps, sleeps]
    with process(command, {}, Path(sys.argv[1])):
        time.sleep(1000)
    return 0

signals.run_as_process(main)
"""


def _is_there(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_was_started_is_ended_when_the_command_is(tmp_path):
    log = tmp_path / "log"
    started = subprocess.Popen([sys.executable, "-c", _COMMAND, log], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    numbers = [int(line) for line in log.read_text().split()]
    assert all(map(_is_there, numbers))
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=30) != 0
    while any(map(_is_there, numbers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
