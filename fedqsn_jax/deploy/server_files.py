"""What a server needs beside its rows: a settings file that is its own, and the public plan.

Everything that can be found wrong before the programs start is found here, and told in a line.
"""

import io
import json
import os
import socket
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.schema import Config, ConfigError, to_dict, with_fields
from fedqsn_jax.deploy.client import check_rows
from fedqsn_jax.deploy.processes import SETTINGS_VARIABLE
from fedqsn_jax.deploy.rows import absolute
from fedqsn_jax.deploy.server_model import server_rows, tokenizer_file
from fedqsn_jax.deploy.session import make_server, public_base
from fedqsn_jax.host.atomic_files import replacing, told_as_file_error
from fedqsn_jax.runs.working_directory import WorkDirectory

PLAN, TOKENIZER, BASE = "plan.json", "tokenizer.json", "base.npz"
_PATIENCE = 600.0


class RowSources(NamedTuple):
    """Where the server's own rows are, as `server_model.server_rows` takes it.

    Attributes:
      private: To train on before the first round.
      test: To evaluate on.
    """

    private: str
    test: str


def write_server(
    config: Config, rows: RowSources, *, clients: int, directory: Path, settings: Path
) -> None:
    """Writes a server's settings file, mode 0600, and beside it what is public.

    That is the plan, for texts the tokenizer, and where a model is public and only a part of it
    travels the rest of it.

    Args:
      config: What to run.
      rows: The server's own rows.
      clients: The most clients that may ever take part.
      directory: The server's working directory.
      settings: The file to write. Its directory is made if need be, mode 0700.

    Raises:
      UserError: The rows do not fit, the settings are not possible, the working directory belongs
        to another run, or others may enter the directory of the settings.
    """
    if clients < 1:
        raise ConfigError(f"--clients={clients}: allowed is 1 or more")
    # As many as may come; of the rest of ``data`` nothing plays a part.
    config = with_fields(config, {"data.clients": clients})
    WorkDirectory(directory).check(config)
    private, test = (
        server_rows(config, source, option)
        for source, option in ((rows.private, "--private"), (rows.test, "--test"))
    )
    classes = max(private.classes, test.classes)
    server = make_server(
        config,
        {name: jnp.asarray(array) for name, array in private.rows.items()},
        {name: jnp.asarray(array) for name, array in test.rows.items()},
        clients=clients,
        classes=classes,
    )
    check_rows(server.plan, private.rows, f"--private={rows.private}")
    values = {
        "config": to_dict(config),
        "workdir": str(directory.absolute()),
        "private": absolute(rows.private),
        "test": absolute(rows.test),
        "clients": clients,
        "classes": classes,
        "wait_clients": _PATIENCE,
        "wait_answers": _PATIENCE,
        "cache": str(settings.absolute().with_name("programs")),
        "log": str(settings.absolute().with_name("server.log")),
    }
    tokenizer, base = tokenizer_file(config), public_base(server)
    _make_private(settings.parent)
    _write(settings, f"{json.dumps(values, indent=2)}\n".encode(), 0o600)
    _write(settings.with_name(PLAN), f"{server.plan.encode()}\n".encode(), 0o644)
    if base:
        content = io.BytesIO()
        np.savez(content, **base)  # type: ignore[arg-type]
        _write(settings.with_name(BASE), content.getvalue(), 0o644)
    if tokenizer is not None:
        _write(settings.with_name(TOKENIZER), tokenizer.read_bytes(), 0o644)


def check_port(port: int) -> None:
    """Makes sure that a SuperLink can listen on a port.

    Raises:
      ConfigError: It cannot; the line says why.
    """
    with socket.socket() as probe:
        # A port whose last connections are still being closed is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else "allowed is 1 to 65535"
            raise ConfigError(f"--port={port}: {why}; name another port") from error


def next_commands(settings: Path, port: int) -> str:
    """Returns what to type next, in lines, on the server's machine and on the clients'."""
    place = settings.absolute().parent
    home = place / "flower"
    return f"""\
Written: {settings.absolute()} (only you may read it) and {place / PLAN} (for the clients).

On this machine, with certificates made as the page of fedqsn_jax.deploy tells:
  export {SETTINGS_VARIABLE}={settings.absolute()} FLWR_HOME={home}
  flower-superlink --host=0.0.0.0 --port={port} --ssl-certfile=server.pem \
--ssl-keyfile=server.key --ssl-ca-certfile=ca.pem --enable-supernode-auth \
--database={place / "flower.db"} --disable-runtime-dependency-installation
  python -m fedqsn_jax.deploy bundle --out={place}
  flwr supernode register CLIENT.pub fedqsn
  flwr run {place / "fedqsn-app"} fedqsn --stream
where {home / "config.toml"} holds:
  [superlink.fedqsn]
  address = "127.0.0.1:{port}"
  root-certificates = "ca.pem"

On a client's machine:
  python -m fedqsn_jax.deploy client --rows=npz:ROWS.npz --plan={PLAN} --out=client.toml
  flower-supernode --superlink=SERVER:{port} --root-certificates=ca.pem \
--auth-supernode-private-key=CLIENT --node-config='fedqsn-client="client.toml"'"""


def _make_private(directory: Path) -> None:
    with told_as_file_error(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_mode & 0o077:
            raise ConfigError(
                f"--settings: others may enter {directory}; allowed is a directory of mode 0700"
            )


def _write(file: Path, content: bytes, mode: int) -> None:
    with told_as_file_error(file), replacing(file) as temporary:
        # The mode is there before the first byte is.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(descriptor, "wb") as output:
            output.write(content)
