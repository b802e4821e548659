"""The time that is left to a sweep, of which compiling its programs is a large part."""

from typing import NamedTuple

from fedqsn_jax.reporting.progress import Clock


class _Measured(NamedTuple):
    """What was measured so far, and when.

    Attributes:
      time: When the latest call ended, or the latest program began.
      done: Finished rounds.
      begun: Programs that have begun.
      first: Whether the call that is running is the first of its program.
      firsts: First calls that have ended.
      first_rounds: Their rounds.
      first_seconds: What they took, each from its program's beginning on.
      rounds: Rounds of all other calls.
      seconds: What these took.
    """

    time: float
    done: int
    begun: int = 0
    first: bool = False
    firsts: int = 0
    first_rounds: int = 0
    first_seconds: float = 0.0
    rounds: int = 0
    seconds: float = 0.0


class SweepPace:
    """Estimates the time that is left, from calls of compiled programs.

    A program's first call includes its compilation, and whatever else comes before it. So first
    calls are counted apart from the others: those to come with the mean of those done, all other
    rounds at the pace of the calls that were no first ones. That pace is unknown until there was
    one; until then so is the time, unless first calls are all that there is.
    """

    def __init__(self, total: int, start: int, programs: int, clock: Clock) -> None:
        """Starts the clock.

        Args:
          total: Rounds of all points.
          start: How many are done already.
          programs: Compiled programs that the others take.
          clock: Gives the time.
        """
        self.total = total
        self._programs = programs
        self._clock = clock
        self._began = clock()
        # Replaced as a whole and never changed: the live display reads it from its own thread.
        self._measured = _Measured(self._began, start)

    @property
    def done(self) -> int:
        """Finished rounds."""
        return self._measured.done

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    def begin(self) -> None:
        """Tells that the next program begins; it is going to be compiled."""
        now, was = self._clock(), self._measured
        self._measured = was._replace(time=now, begun=was.begun + 1, first=True)

    def add(self, done: int) -> None:
        """Tells that so many rounds are done."""
        now, was = self._clock(), self._measured
        rounds, seconds = done - was.done, now - was.time
        if rounds <= 0:
            # The end of a point, after that of its last call.
            return
        if was.first:
            after = was._replace(
                firsts=was.firsts + 1,
                first_rounds=was.first_rounds + rounds,
                first_seconds=was.first_seconds + seconds,
            )
        else:
            after = was._replace(rounds=was.rounds + rounds, seconds=was.seconds + seconds)
        self._measured = after._replace(time=now, done=done, first=False)

    @property
    def left(self) -> float | None:
        """Seconds until the last round, or None."""
        now = self._measured
        if now.done >= self.total:
            return 0.0
        if not now.firsts:
            return None
        compilations = self._programs - now.begun + now.first
        of_first = now.first_rounds / now.firsts
        others = max(0.0, self.total - now.done - compilations * of_first)
        if others and not now.rounds:
            return None
        left = compilations * now.first_seconds / now.firsts
        left += others * now.seconds / now.rounds if others else 0.0
        return max(0.0, left - (self._clock() - now.time))
