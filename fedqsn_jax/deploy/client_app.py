"""The client's program, as Flower starts it for each message."""

import faulthandler
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.core.types import Params
from fedqsn_jax.deploy import messages
from fedqsn_jax.deploy.client import Client, check_rows, make_client
from fedqsn_jax.deploy.client_files import SETTINGS, read_settings
from fedqsn_jax.deploy.plan import Plan
from fedqsn_jax.deploy.rows import read_rows
from fedqsn_jax.host.devices import computing

app = ClientApp()

_STANDARD_ERROR = 2


@app.train()
def train(message: Message, context: Context) -> Message:
    """Takes part in a round. Whatever goes wrong is told by a reason without values.

    The text of an exception would travel to the server, and may hold rows of the client's. The
    process ends when the server does not wait any more.
    """
    # A program that hangs would keep its node from all later rounds.
    faulthandler.dump_traceback_later(message.metadata.ttl, exit=True, file=_STANDARD_ERROR)
    try:
        return Message(_take_part(message, context), reply_to=message)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _take_part(message: Message, context: Context) -> RecordDict:
    try:
        payload, told = messages.read_task(message)
        settings = read_settings(str(context.node_config.get(SETTINGS, "")))
        _use_cache(settings.get("cache"))
        plan = Plan.decode(str(told["plan"]))
        rows = check_rows(plan, read_rows(settings["rows"]), f"rows = {settings['rows']!r}")
        client = _client(str(told["plan"]), settings.get("base", ""))
        key = jax.random.wrap_key_data(jnp.asarray(told["key"], jnp.uint32))
        with computing():
            result = client.answer(payload, key, rows)
    except UserError as error:
        # The user's own mistake is told where it can be mended: here, not at the server.
        print(f"fedqsn_jax: {error}", flush=True)
        return messages.refusal("its own settings or rows do not fit")
    except ValueError as error:
        print(f"fedqsn_jax: {error}", flush=True)
        return messages.refusal("what it received cannot be read")
    except Exception as error:
        print(f"fedqsn_jax: {type(error).__name__}: {error}", flush=True)
        return messages.refusal(f"a {type(error).__name__}")
    return messages.answer(
        result.payload,
        {"token": told["token"], "examples": result.examples, "loss": result.loss},
    )


def _use_cache(directory: str | None) -> None:
    """Keeps compiled programs: each message has a process of its own."""
    if directory is not None:
        jax.config.update("jax_compilation_cache_dir", str(user_path(directory)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@functools.cache
def _client(plan: str, base: str) -> Client:
    return make_client(Plan.decode(plan), _read_base(base) if base else None)


def _read_base(file: str) -> Params:
    """The tensors of a file, in nested dictionaries by the names of their paths."""
    tree: dict[str, Any] = {}
    try:
        with np.load(user_path(file), allow_pickle=False) as arrays:
            for path in arrays:
                *parents, name = path.split("/")
                branch = tree
                for parent in parents:
                    branch = branch.setdefault(parent, {})
                branch[name] = jnp.asarray(arrays[path])
    except (OSError, ValueError) as error:
        raise UserError(f"base = {file!r}: cannot be read: {error}") from error
    return tree
