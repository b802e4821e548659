"""Stopping a run at a signal: where the rounds that run end, which is said meanwhile."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable

import jax

from fedqsn_jax.host import distributed, signals

_SHORT = 1.0
"""Seconds that are not worth telling."""


class RunningRounds:
    """The rounds that a request to stop waits for: nothing can interrupt a compiled program.

    Attributes:
      stopped: Whether a stop was requested.
    """

    def __init__(self, remains: Callable[[], str]) -> None:
        """Sets that nothing is running yet.

        Args:
          remains: Says what a run that ends at once leaves behind.
        """
        self.stopped = threading.Event()
        self._remains = remains
        self._finished: int | None = None
        self._first, self._running = True, False
        self._end, self._began, self._each = 0, 0.0, 0.0

    def begins(self, finished: int, end: int) -> None:
        """Notes that so many rounds are finished, and that those up to ``end`` begin."""
        now = time.monotonic()
        if self._finished is not None and finished > self._finished:
            self._each = (now - self._began) / (finished - self._finished)
        self._finished, self._end, self._began, self._running = finished, end, now, True

    def is_asked(self) -> bool:
        """Whether a stop was requested, of any process; is called after rounds."""
        self._first, self._running = False, False
        return distributed.any_of(self.stopped.is_set())

    def stopping_at(self, kind: signal.Signals) -> contextlib.AbstractContextManager[None]:
        """Turns the first signal of a kind into a request; see `signals.stopping_at`."""
        return signals.stopping_at(kind, self.stopped, self.waits_for, self._at_once)

    def _at_once(self) -> bool:
        # While the first rounds are compiled nothing is finished that is not saved; but where one
        # of several processes leaves, the others have to.
        return self._first and jax.process_count() == 1

    def waits_for(self) -> str:
        """Says when the run stops, how long that may take, and what stands before."""
        if self._finished is None:
            return f"after what is running ({self._remains()})"
        if not self._running:
            return f"after the next rounds; if this process is ended before, {self._remains()}"
        rounds = f"after round {self._end}"
        left = self._began + self._each * (self._end - self._finished) - time.monotonic()
        if not self._each:
            rounds += ", the first one, which also compiles"
        elif left > _SHORT:
            rounds += f", in about {left:.0f} s"
        return f"{rounds}; if this process is ended before, {self._remains()}"
