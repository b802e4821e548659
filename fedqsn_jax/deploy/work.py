"""What a client's training process does with a message: reads its rows, trains, answers."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.deploy.client import Client, check_rows, make_client
from fedqsn_jax.deploy.client_files import own_rows, read_settings
from fedqsn_jax.deploy.client_model import read_base
from fedqsn_jax.deploy.kept import Kept, answer_with
from fedqsn_jax.deploy.outcome import Outcome
from fedqsn_jax.deploy.plan import Plan
from fedqsn_jax.host.devices import computing


def take_part(
    settings_file: str,
    payload: bytes,
    told: Mapping[str, Any],
    tell: Callable[[str], object],
) -> Outcome:
    """Takes part in a round. Whatever goes wrong is told to the server by a reason without values.

    The text of an exception would travel to the server, and may hold rows of the client's.

    Args:
      settings_file: The client's own settings.
      payload: What the server sent.
      told: What came with it; see `network.Outgoing`.
      tell: Is told, on the client's own side, what went wrong.
    """
    try:
        return _take_part(settings_file, payload, told, tell)
    except UserError as error:
        # The user's own mistake is told where it can be mended: here, not at the server.
        tell(str(error))
        return Outcome(refusal="its own settings or rows do not fit")
    except ValueError as error:
        tell(str(error))
        return Outcome(refusal="what it received cannot be read")
    except Exception as error:
        tell(f"{type(error).__name__}: {error}")
        return Outcome(refusal=f"a {type(error).__name__}")


def _take_part(
    settings_file: str,
    payload: bytes,
    told: Mapping[str, Any],
    tell: Callable[[str], object],
) -> Outcome:
    settings = read_settings(settings_file)
    _use_cache(settings.get("cache"))
    plan = Plan.decode(str(told["plan"]))
    rows = check_rows(plan, own_rows(plan, settings), f"rows = {settings['rows']!r}")
    client = _client(str(told["plan"]), settings.get("base", ""))
    key = jax.random.wrap_key_data(jnp.asarray(told["key"], jnp.uint32))
    with computing():
        if "name" in told:
            kept = Kept(user_path(settings["received"]), told["name"])
            answer = answer_with(kept, client, payload, key, rows, tell)
        else:
            answer = client.answer(payload, key, rows)
    if answer is None:
        return Outcome(lost=True)
    return Outcome(answer.payload, answer.examples, answer.loss)


def _use_cache(directory: str | None) -> None:
    """Keeps compiled programs for the next process."""
    if directory is not None:
        jax.config.update("jax_compilation_cache_dir", str(user_path(directory)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@functools.lru_cache(maxsize=1)
def _client(text: str, base: str) -> Client:
    plan = Plan.decode(text)
    return make_client(plan, read_base(plan, base) if base else None)
