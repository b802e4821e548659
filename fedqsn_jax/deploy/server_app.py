"""The server's program, as Flower starts it beside the SuperLink."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedqsn_jax.config.schema import resolve
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.deploy.flower_network import FlowerNetwork
from fedqsn_jax.deploy.processes import SETTINGS_VARIABLE
from fedqsn_jax.deploy.server_model import server_rows
from fedqsn_jax.deploy.session import Patience, make_server, run_server
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


def _run(network: FlowerNetwork, settings: dict[str, Any]) -> None:
    if "cache" in settings:
        jax.config.update("jax_compilation_cache_dir", settings["cache"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config = resolve(settings["config"])
    private, test = (
        {
            name: jnp.asarray(array)
            for name, array in server_rows(config, settings[which], which).rows.items()
        }
        for which in ("private", "test")
    )
    server = make_server(
        config,
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
