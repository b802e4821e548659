"""The export: ``python -m fedqsn_jax.export --workdir=DIR --out=DIR``."""

from fedqsn_jax.cli.export import main
from fedqsn_jax.host.signals import run_as_process

__all__ = ["main"]

if __name__ == "__main__":
    run_as_process(main)
