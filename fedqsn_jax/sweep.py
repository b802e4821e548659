"""A sweep: ``python -m fedqsn_jax.sweep --config=FILE --sweep=FILE --workdir=DIR``."""

from fedqsn_jax.cli.sweep import main
from fedqsn_jax.host.signals import run_as_process

__all__ = ["main"]

if __name__ == "__main__":
    run_as_process(main)
