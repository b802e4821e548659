"""The deployment's commands: ``python -m fedqsn_jax.deploy demo --config=FILE --workdir=DIR``."""

import argparse
from collections.abc import Sequence

from fedqsn_jax.host import signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return signals.answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    from fedqsn_jax.config.command_line import read_config
    from fedqsn_jax.config.paths import user_path
    from fedqsn_jax.core.errors import UserError

    parser = argparse.ArgumentParser(prog="python -m fedqsn_jax.deploy", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo_parser = commands.add_parser("demo", help="a server and clients on this machine")
    demo_parser.add_argument("--config", help="a file under configs/")
    demo_parser.add_argument("--clients", type=int, default=3, help="how many")
    demo_parser.add_argument("--workdir", required=True, help="the server's working directory")
    bundle_parser = commands.add_parser("bundle", help="writes the application for flwr run")
    bundle_parser.add_argument("--out", required=True, help="a directory")
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.command == "bundle":
            from fedqsn_jax.deploy.bundle import write_bundle

            print(write_bundle(user_path(options.out)))
            return 0
        config = read_config(options.config, rest)
        from fedqsn_jax.deploy.demo import demo
        from fedqsn_jax.host.devices import computing
        from fedqsn_jax.reporting.display import Display

        with computing():
            demo(config, options.clients, user_path(options.workdir), Display())
    except UserError as error:
        return signals.refuse(error)
    return 0


if __name__ == "__main__":
    signals.run_as_process(main)
