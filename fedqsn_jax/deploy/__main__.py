"""The deployment's commands: ``python -m fedqsn_jax.deploy demo --config=FILE --workdir=DIR``."""

from collections.abc import Sequence

from fedqsn_jax.host import signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return signals.answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    from fedqsn_jax.config.command_line import Parser, read_config
    from fedqsn_jax.config.paths import user_path
    from fedqsn_jax.config.schema import ConfigError
    from fedqsn_jax.core.errors import UserError

    parser = Parser("A server and clients that are programs of their own.")
    commands = parser.add_subparsers(dest="command", metavar="demo or bundle", required=True)
    demo_parser = commands.add_parser("demo", help="a server and clients on this machine")
    demo_parser.add_argument(
        "--config",
        help="a file under configs/; --config.FIELD=VALUE sets a field, as in fedqsn_jax.main",
    )
    demo_parser.add_argument("--clients", type=int, default=3, help="their number, by default 3")
    demo_parser.add_argument("--workdir", required=True, help="the server's working directory")
    bundle_parser = commands.add_parser("bundle", help="writes the application for flwr run")
    bundle_parser.add_argument("--out", required=True, help="a directory")
    try:
        options, rest = parser.parse_known_args(arguments)
        if options.command == "bundle":
            if rest:
                raise ConfigError(f"unrecognized arguments: {' '.join(rest)}")
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
