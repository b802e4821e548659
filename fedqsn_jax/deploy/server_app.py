"""The server's program, as Flower starts it beside the SuperLink."""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedqsn_jax.config.schema import resolve
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.deploy import messages
from fedqsn_jax.deploy.processes import SETTINGS_VARIABLE
from fedqsn_jax.deploy.rows import read_rows
from fedqsn_jax.deploy.session import Patience, Reply, make_server, run_server
from fedqsn_jax.host.devices import computing
from fedqsn_jax.host.signals import tell
from fedqsn_jax.reporting.display import Display

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the server's rounds over Flower's grid."""
    del context
    file = Path(os.environ[SETTINGS_VARIABLE])
    outcome = file.with_name("outcome.json")
    try:
        with computing():
            _run(FlowerNetwork(grid), json.loads(file.read_text()))
    except UserError as error:
        tell(f"fedqsn_jax: {error}")
        outcome.write_text(json.dumps({"refused": str(error)}) + "\n")
        return
    outcome.write_text(json.dumps({"finished": True}) + "\n")


def _run(network: "FlowerNetwork", settings: dict[str, Any]) -> None:
    if "cache" in settings:
        jax.config.update("jax_compilation_cache_dir", settings["cache"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    private, test = (
        {name: jnp.asarray(array) for name, array in read_rows(settings[which]).items()}
        for which in ("private", "test")
    )
    server = make_server(
        resolve(settings["config"]),
        private,
        test,
        clients=int(settings["clients"]),
        classes=int(settings["classes"]),
    )
    patience = Patience(float(settings["wait_clients"]), float(settings["wait_answers"]))
    with contextlib.ExitStack() as files:
        console = None
        if "log" in settings:
            log = files.enter_context(Path(settings["log"]).open("a", buffering=1))
            console = Console(file=log, width=100)
        run_server(server, network, Path(settings["workdir"]), Display(console), patience)


class FlowerNetwork:
    """A `session.Network` over Flower's grid."""

    def __init__(self, grid: Grid) -> None:
        """Takes the grid; node ids become names by the key that a node is registered with."""
        self._grid = grid
        self._ids: dict[str, int] = {}

    def nodes(self) -> list[str]:
        """Names of the nodes that are there: of public keys, or of ids where nodes have none."""
        self._ids = {
            (f"key:{node.public_key.hex()}" if node.public_key else f"node:{node.node_id}"): (
                node.node_id
            )
            for node in self._grid.get_nodes()
        }
        return sorted(self._ids)

    def exchange(
        self, messages_out: Iterable[tuple[str, bytes, dict[str, Any]]], timeout: float
    ) -> Iterator[Reply]:
        """Sends one message after the other, then takes replies as they come."""
        waiting: dict[str, str] = {}
        for node, payload, settings in messages_out:
            message = Message(
                messages.task(payload, settings),
                dst_node_id=self._ids[node],
                message_type="train",
                ttl=timeout,
            )
            for message_id in self._grid.push_messages([message]):
                waiting[message_id] = node
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            found = list(self._grid.pull_messages(list(waiting)))
            for message in found:
                node_of = waiting.pop(message.metadata.reply_to_message_id, None)
                if node_of is not None:
                    yield _reply(node_of, message)
            if not found:
                time.sleep(0.1)


_FAILURES = {
    3: "did not answer in time",
    4: "did not answer in time",
    5: "its node is gone",
    8: "its program died",
}
"""What Flower's error codes mean; all others: the program failed."""


def _reply(node: str, message: Message) -> Reply:
    if message.has_error():
        # Its reason may be the text of an exception of the client's: only the code is told.
        code = message.error.code
        return Reply(node, failure=f"{_FAILURES.get(code, 'its program failed')} (code {code})")
    try:
        read = messages.read_answer(message)
    except ValueError as error:
        return Reply(node, failure=str(error))
    if isinstance(read, str):
        return Reply(node, failure=f"it says that it cannot take part: {read}")
    payload, settings = read
    return Reply(node, payload, settings)
