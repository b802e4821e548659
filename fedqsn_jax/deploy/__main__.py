"""The deployment's commands: ``python -m fedqsn_jax.deploy demo --config=FILE --workdir=DIR``."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedqsn_jax.core.errors import UserError
from fedqsn_jax.host import signals

if TYPE_CHECKING:
    from fedqsn_jax.config.command_line import Parser

SUPERLINK_PORT = 8000
"""Where a SuperLink listens, by Flower's own default."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return signals.answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    try:
        options, rest = _parser().parse_known_args(arguments)
        if options.command in ("bundle", "client") and rest:
            raise UserError(f"unrecognized arguments: {' '.join(rest)}")
        run = {"demo": _demo, "server": _server, "client": _client, "bundle": _bundle}
        run[options.command](options, rest)
    except UserError as error:
        return signals.refuse(error)
    return 0


def _parser() -> "Parser":
    from fedqsn_jax.config.command_line import Parser

    parser = Parser("A server and clients that are programs of their own.")
    names = "demo, server, client or bundle"
    commands = parser.add_subparsers(dest="command", metavar=names, required=True)
    demo = commands.add_parser("demo", help="a server and clients on this machine")
    demo.add_argument("--clients", type=int, default=3, help="how many")
    server = commands.add_parser("server", help="writes a server's settings and the plan")
    server.add_argument(
        "--private", required=True, help="the server's own rows, npz:FILE or tsv:FILE"
    )
    server.add_argument("--test", required=True, help="rows to evaluate on")
    server.add_argument(
        "--clients", type=int, required=True, help="the most that may ever take part"
    )
    server.add_argument("--settings", help="the file to write; WORKDIR.server/server.json")
    server.add_argument(
        "--port", type=int, default=SUPERLINK_PORT, help="where the SuperLink will listen"
    )
    server.add_argument("--certificate", help="the SuperLink's, to be checked; with --key")
    server.add_argument("--key", help="its private key")
    for command in (demo, server):
        command.add_argument("--config", help="a file under configs/; --config.FIELD=VALUE")
        command.add_argument("--workdir", required=True, help="the server's working directory")
    client = commands.add_parser("client", help="writes a client's settings")
    client.add_argument("--rows", required=True, help="npz:FILE, python:FILE.py:FUNCTION, tsv:FILE")
    client.add_argument("--plan", help="the server's plan.json, to which the rows are to fit")
    client.add_argument(
        "--tokenizer", help="for texts the server's tokenizer.json; by default beside the plan"
    )
    client.add_argument("--base", help="of a public model what does not travel: base.npz")
    client.add_argument("--out", required=True, help="the file to write, such as client.toml")
    client.add_argument("--superlink", help="ADDRESS:PORT, to be checked; with --authority")
    for command in (server, client):
        command.add_argument("--authority", help="whose certificates clients trust: ca.pem")
    bundle = commands.add_parser("bundle", help="writes the application for flwr run")
    bundle.add_argument("--out", required=True, help="a directory")
    return parser


def _demo(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from fedqsn_jax.config.command_line import read_config
    from fedqsn_jax.config.paths import user_path
    from fedqsn_jax.deploy.demo import demo
    from fedqsn_jax.host.devices import computing
    from fedqsn_jax.reporting.display import Display

    config = read_config(options.config, rest)
    with computing():
        demo(config, options.clients, user_path(options.workdir), Display())


def _server(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from fedqsn_jax.config.command_line import read_config
    from fedqsn_jax.config.paths import user_path
    from fedqsn_jax.deploy import certificates, server_files
    from fedqsn_jax.deploy.processes import require_flower

    config = read_config(options.config, rest)
    require_flower()
    server_files.check_port(options.port)
    given = [options.certificate, options.key, options.authority]
    if any(given):
        if not all(given):
            raise UserError("--certificate, --key and --authority: all three are needed")
        certificate, key, authority = map(user_path, given)
        certificates.check_server(certificate, key, authority, certificates.LOCAL)
    directory = user_path(options.workdir)
    settings = user_path(options.settings or f"{directory}.server/server.json")
    server_files.write_server(
        config,
        server_files.RowSources(options.private, options.test),
        clients=options.clients,
        directory=directory,
        settings=settings,
    )
    print(server_files.next_commands(settings, options.port))


def _client(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from fedqsn_jax.config.paths import user_path
    from fedqsn_jax.deploy.certificates import check_client
    from fedqsn_jax.deploy.client_files import write_client
    from fedqsn_jax.deploy.processes import require_flower

    del rest
    require_flower()
    if options.superlink or options.authority:
        if not (options.superlink and options.authority):
            raise UserError("--superlink and --authority: both are needed")
        check_client(options.superlink, user_path(options.authority))
    plan = None if options.plan is None else user_path(options.plan)
    more = {
        name: None if given is None else user_path(given)
        for name, given in (("tokenizer", options.tokenizer), ("base", options.base))
    }
    write_client(options.rows, user_path(options.out), plan, **more)
    print(f"Written: {options.out}")


def _bundle(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from fedqsn_jax.config.paths import user_path
    from fedqsn_jax.deploy.bundle import write_bundle

    del rest
    print(write_bundle(user_path(options.out)))


if __name__ == "__main__":
    signals.run_as_process(main)
