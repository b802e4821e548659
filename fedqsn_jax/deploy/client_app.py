"""The client's program, as Flower starts it for each message: it hands it to a `worker`."""

import faulthandler

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedqsn_jax.deploy import messages, worker
from fedqsn_jax.deploy.outcome import SETTINGS

app = ClientApp()

_STANDARD_ERROR = 2
_GRACE = 5.0
"""Seconds after which this program ends though the worker should have been given up."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """Takes part in a round; it ends when the server does not wait any more."""
    seconds = message.metadata.ttl
    # A program that hangs would keep its node from all later rounds.
    faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=_STANDARD_ERROR)
    try:
        return Message(_take_part(message, context, seconds), reply_to=message)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _take_part(message: Message, context: Context, seconds: float) -> RecordDict:
    payload, told = messages.read_task(message)
    try:
        settings = str(context.node_config.get(SETTINGS, ""))
        outcome = worker.ask(settings, payload, told, seconds)
    except worker.WorkerError as error:
        return messages.refusal(str(error))
    if outcome.lost:
        return messages.lost()
    if outcome.refusal:
        return messages.refusal(outcome.refusal)
    answer = {"token": told["token"], "examples": outcome.examples, "loss": outcome.loss}
    return messages.answer(outcome.payload, answer)
