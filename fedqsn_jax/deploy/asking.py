"""One round over a network: payloads out, each as it is sent, and answers in, as they come."""

from collections import deque
from collections.abc import Mapping

from fedqsn_jax.deploy.network import Network, Outgoing, Reply
from fedqsn_jax.deploy.server import Round
from fedqsn_jax.reporting.display import Display, bytes_text

_TOLD_FROM = 10 * 2**20
"""Bytes of a payload from which each that goes out or comes in is told of."""


class Asking:
    """The messages of one round.

    Attributes:
      down: Bytes of the payloads that were sent.
      up: Bytes of those that came back.
    """

    def __init__(
        self, current: Round, cohort: Mapping[int, str], plan: str, display: Display
    ) -> None:
        """Takes a round that has begun.

        Args:
          current: The round.
          cohort: Names of nodes by clients' numbers.
          plan: What clients are told of the federation.
          display: Where is told what goes wrong, and how large payloads get on.
        """
        self._current = current
        self._cohort = cohort
        self._numbers = {node: number for number, node in cohort.items()}
        self._plan = plan
        self._display = display
        self._due = deque(cohort)
        self._answers = 0
        self.down, self.up = 0, 0

    def run(self, network: Network, timeout: float) -> None:
        """Sends everything and folds in what returns, no longer than a network waits."""
        for reply in network.exchange(self._next, timeout):
            self.up += len(reply.payload)
            reason = self._take(reply)
            self._answers += 1
            self._tell_size(f"answer {self._answers} of {len(self._cohort)}", reply.payload)
            if reason is not None:
                self._warn(reason)
        current = self._current
        for number in sorted(set(self._cohort) - set(current.answered) - set(current.rejected)):
            current.rejected[number] = "did not answer in time"
            self._warn(f"{self._named(number)} did not answer in time")

    def _next(self) -> Outgoing | None:
        if not self._due:
            return None
        number, current = self._due.popleft(), self._current
        payload, token = current.payload(number)
        self.down += len(payload)
        place = list(self._cohort).index(number) + 1
        self._tell_size(f"payload {place} of {len(self._cohort)}", payload)
        told = {"plan": self._plan, "token": token, "key": current.training_key(number)}
        if current.keeps:
            told["name"] = current.payload_name(number)
        return Outgoing(self._cohort[number], payload, told)

    def _take(self, reply: Reply) -> str | None:
        """Takes a reply; returns what to say of one that is not counted."""
        number = self._numbers.get(reply.node)
        if number is None:
            return "an answer of someone who was not asked"
        current = self._current
        if reply.lost:
            reason = current.lose(number)
            if reason is None:
                self._due.append(number)
                self._answers -= 1
                self._display.message(
                    f"round {current.number + 1}: {self._named(number)} says that it has not got "
                    f"its payload any more, and is sent it again"
                )
                return None
        elif reply.failure:
            reason = current.rejected[number] = reply.failure
        else:
            try:
                token, examples = bytes(reply.settings["token"]), int(reply.settings["examples"])
                loss = float(reply.settings["loss"])
            except (KeyError, TypeError, ValueError):
                reason = current.rejected[number] = "an answer without token, examples or loss"
            else:
                reason = current.accept(number, token, reply.payload, examples, loss)
        return None if reason is None else f"{self._named(number)} is not counted: {reason}"

    def _named(self, number: int) -> str:
        return f"client {number} ({self._cohort[number]})"

    def _warn(self, text: str) -> None:
        self._display.warning(f"round {self._current.number + 1}: {text}")

    def _tell_size(self, what: str, payload: bytes) -> None:
        if len(payload) >= _TOLD_FROM:
            self._display.message(
                f"round {self._current.number + 1}: {what}, {bytes_text(len(payload))}"
            )
