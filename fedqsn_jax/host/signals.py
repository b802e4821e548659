"""How a command ends: its exit codes, Ctrl-C, and SIGTERM, by which batch systems end a job.

Python's own answer to Ctrl-C, a KeyboardInterrupt wherever the main thread happens to be, does not
serve a command that uses JAX. Raised inside a callback, such as the one that JAX has the garbage
collector call, it is printed and forgotten, and the command runs to its end. And an interpreter
that shuts down while JAX's threads are at work may crash. So the process of a command ends in the
handler of the signal: it cleans up, says what remains, and shuts nothing down. SIGTERM ends it in
the same way; by the system's own answer nothing would be cleaned up or said.

Called from Python, a command knows nothing of all that: its KeyboardInterrupt comes as everywhere,
and becomes the exit code that its ``main`` returns.

Only the standard library is used, and little of it: the handler has to be there before anything
slow is imported.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

REFUSED = 2
"""The exit code after a mistake of the user's."""

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after a Ctrl-C that could not wait, by the shell's convention."""

_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""The signals that end a process of a command, with their handlers where nobody has others."""

_SHOW_CURSOR = "\x1b[?25h"


_cleanups: list[Callable[[], object]] = []
_remains: dict[int, list[Callable[[], str]]] = {}
"""What the commands of a thread say of an interruption, the innermost command's last."""

_PATIENCE = 1.0
"""Seconds in which the main thread answers a signal, unless it is deep in a compilation."""

_requests: dict[object, Callable[[], bool]] = {}
"""Handlers that ask to stop, and whether they would end this process instead."""

_answered: Counter[int] = Counter()
"""How often the main thread has answered a signal of each kind."""

_ending = threading.Lock()
"""Is held by the thread that ends this process."""


def refuse(error: Exception) -> int:
    """Tells a mistake of the user's in a line; returns `REFUSED`."""
    tell(f"fedqsn_jax: {error}")
    return REFUSED


def tell(line: str) -> None:
    """Prints a line to standard error, if anyone still reads it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def answered(command: Callable[[], int]) -> int:
    """Runs a command; a KeyboardInterrupt becomes a line and `INTERRUPTED`.

    Args:
      command: Returns its exit code.
    """
    here = threading.get_ident()
    outer = _remains.get(here, [])
    try:
        return command()
    except KeyboardInterrupt:
        tell(_interruption())
        return INTERRUPTED
    finally:
        _remains[here] = outer
        if not outer:
            del _remains[here]


def remaining_after_interruption(text: Callable[[], str]) -> None:
    """Sets what is said of an interruption from here on, until the command ends.

    Args:
      text: Gives it when it is needed, in the words that follow ``interrupted;``. Where it fails,
        nothing more is said than that.
    """
    here = threading.get_ident()
    _remains[here] = [*_remains.get(here, []), text]


@contextlib.contextmanager
def cleaning_up(action: Callable[[], object]) -> Iterator[None]:
    """Does something at the end of the ``with`` block, also where a signal ends the process in it.

    Args:
      action: What to do. Doing it twice does no harm; it waits for nothing, and works wherever the
        main thread is.
    """
    _cleanups.append(action)
    try:
        yield
    finally:
        try:
            action()
        finally:
            _cleanups.remove(action)


@contextlib.contextmanager
def stopping_at(
    kind: signal.Signals,
    stopped: threading.Event,
    waits_for: Callable[[], str] = lambda: "after what is running",
    at_once: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Turns the first signal of a kind into a request to stop at the next boundary.

    Not a signal that is ignored, as a shell lets its background jobs ignore Ctrl-C, nor one that
    is handled by something other than Python.

    Args:
      kind: The signal.
      stopped: Is set by it.
      waits_for: Gives what is then said of the boundary, in the words that follow ``stopping``. It
        waits for nothing, and works wherever the main thread is.
      at_once: Whether there is nothing to wait for: the signal then acts as it would have without
        us.
    """

    def request(number: int, frame: FrameType | None) -> None:
        if at_once() and callable(previous):
            previous(number, frame)
            return
        _answered[number] += 1
        stopped.set()
        # A second one acts as it would have without us.
        signal.signal(kind, previous)
        # This may be in the middle of a write to the same stream, which refuses another one; and
        # whatever is raised here would end the round.
        with contextlib.suppress(Exception):
            tell(f"stopping {waits_for()}; once more: at once")

    previous = signal.getsignal(kind)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or previous in (signal.SIG_IGN, None):
        yield
        return
    _requests[request] = at_once if previous is _end else lambda: False
    signal.signal(kind, request)
    try:
        yield
    finally:
        signal.signal(kind, previous)
        del _requests[request]


def end_at_signals() -> None:
    """Lets Ctrl-C and SIGTERM end this process in a line from here on.

    Not where Ctrl-C is ignored, as in a shell's background jobs, or a debugger has its own.
    """
    for kind, usual in _USUAL.items():
        if signal.getsignal(kind) == usual:
            signal.signal(kind, _end)
    _end_in_compilations_too()


def _end_in_compilations_too() -> None:
    """Starts a thread that ends this process where the main thread does not get to it.

    Python runs handlers between two steps of the main thread. A compilation is one step, and may
    take half a minute; what supervises a process may not give it that.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    others = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    if others != -1:
        # Somebody else's, or ours of an earlier call.
        signal.set_wakeup_fd(others)
        os.close(read)
        os.close(write)
        return
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def watch() -> None:
        came: Counter[int] = Counter()
        while number := os.read(read, 1):
            kind = number[0]
            came[kind] += 1
            time.sleep(_PATIENCE)
            handler = signal.getsignal(kind)
            ends = handler is _end or _requests.get(handler, lambda: False)()
            if ends and _answered[kind] < came[kind]:
                _end(kind, None)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def run_as_process(main: Callable[[], int]) -> NoReturn:
    """Runs a command as what this process is for, and ends the process.

    Args:
      main: The command; it takes its arguments from the process and returns the exit code.
    """
    end_at_signals()
    output = EnduringStream(sys.stdout)
    with contextlib.redirect_stdout(output):
        code = main()
        with contextlib.suppress(BrokenPipeError):
            output.flush()
    if output.lost:
        code = code or REFUSED
    # All is said and done; what is left is Python's shutdown.
    for kind in _USUAL:
        if signal.getsignal(kind) is _end:
            signal.signal(kind, signal.SIG_DFL)
    if code:
        # After a failed save Orbax's threads may keep Python's shutdown waiting for minutes.
        leave(code)
    sys.exit(code)


class EnduringStream(io.TextIOBase):
    """Standard output that falls silent where the file system takes no more, as on a full disk.

    A run should not cost more than its output. The first failure is told to standard error. That
    nobody reads any more, as after ``| head``, is for others to answer.
    """

    def __init__(self, stream: Any) -> None:
        """Wraps a text stream."""
        self._stream = stream
        self.lost = False

    def write(self, text: str) -> int:
        """Writes, or does nothing once something was lost."""
        if not self.lost:
            self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes."""
        if not self.lost:
            self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BrokenPipeError:
            raise
        except OSError as error:
            self.lost = True
            tell(f"fedqsn_jax: standard output: {error.strerror}; nothing more is written there")
            # What the stream still holds must not fail again when Python ends.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def fileno(self) -> int:
        """The stream's own."""
        return int(self._stream.fileno())

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return bool(self._stream.isatty())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's own."""
        return str(self._stream.encoding)


def _end(number: int, frame: FrameType | None) -> None:
    """Handles a signal: ends the process at once, but for what has to be cleaned up."""
    if threading.current_thread() is threading.main_thread():
        _answered[number] += 1
        for kind in _USUAL:
            signal.signal(kind, signal.SIG_IGN)
    # Where another thread is at it, this one waits for the end.
    with _ending:
        try:
            # A copy: actions, and other threads, may clean up after something of their own.
            for action in _cleanups[::-1]:
                with contextlib.suppress(Exception):
                    action()
            line = f"{_interruption()}\n"
            # A progress bar hides the cursor, and leaves it behind its last line.
            line = f"{_SHOW_CURSOR}\n{line}" if os.isatty(2) else line
            # Not through sys.stderr, in the middle of whose work this may be.
            os.write(2, line.encode())
        finally:
            # Whatever goes wrong: an exception from here might be forgotten like any other.
            leave(128 + number)


def leave(code: int) -> NoReturn:
    """Ends the process without shutting down Python, during which JAX's threads may crash it."""
    try:
        sys.stderr.flush()
        sys.stdout.flush()
    finally:
        os._exit(code)


def _interruption() -> str:
    text = ""
    # Signals are handled for the main thread, where the command of the process runs.
    texts = _remains.get(threading.get_ident()) or _remains.get(threading.main_thread().ident or 0)
    if texts:
        # It looks at files, which may be damaged in any way.
        with contextlib.suppress(Exception):
            text = f"; {texts[-1]()}"
    return f"fedqsn_jax: interrupted{text}"
