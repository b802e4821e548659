"""The benchmark: ``python -m fedqsn_jax.benchmark``."""

from fedqsn_jax.cli.benchmark import main
from fedqsn_jax.host.signals import run_as_process

__all__ = ["main"]

if __name__ == "__main__":
    run_as_process(main)
