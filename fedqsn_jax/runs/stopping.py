"""Stopping a run at a signal: where the call that is running ends, which is said meanwhile."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable

from fedqsn_jax.config.schema import Config
from fedqsn_jax.host import signals
from fedqsn_jax.simulation.scheduling import calls_of

_SHORT = 1.0
"""Seconds of a call that are not worth telling."""


class RunningCall:
    """The call that a request to stop waits for: nothing can interrupt a compiled program.

    Attributes:
      stopped: Whether a stop was requested.
    """

    def __init__(self, config: Config, remains: Callable[[], str]) -> None:
        """Sets that no call is running yet.

        Args:
          config: The settings of the run.
          remains: Says what a run that ends at once leaves behind.
        """
        self.stopped = threading.Event()
        self._config, self._remains = config, remains
        self._finished: int | None = None
        self._began, self._seconds = 0.0, 0.0

    def begins_after(self, finished: int) -> None:
        """Notes that so many rounds are finished, and that the next call begins.

        Args:
          finished: Number of rounds.
        """
        now = time.monotonic()
        if self._finished is not None:
            self._seconds = now - self._began
        self._finished, self._began = finished, now

    def stopping_at(self, kind: signal.Signals) -> contextlib.AbstractContextManager[None]:
        """Turns the first signal of a kind into a request; see `signals.stopping_at`."""
        return signals.stopping_at(kind, self.stopped, self.waits_for)

    def waits_for(self) -> str:
        """Says when the run stops, how long that may take, and what stands before."""
        calls = calls_of(self._finished or 0, self._config)
        if self._finished is None or not calls:
            return f"after what is running ({self._remains()})"
        end = calls[0][1]
        rounds = f"after round {end}"
        left = self._began + self._seconds - time.monotonic()
        if not self._seconds:
            rounds += ", the end of the first call, which also compiles"
        elif left > _SHORT:
            rounds += f", in about {left:.0f} s"
        if end - self._finished > 1:
            per_call = self._config.rounds_per_call
            rounds += f" (with a smaller rounds_per_call than {per_call} sooner)"
        return f"{rounds}; if this process is ended before, {self._remains()}"
