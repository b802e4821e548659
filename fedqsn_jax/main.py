"""The main job: ``python -m fedqsn_jax.main --config=configs/digits.py --workdir=DIR``."""

from fedqsn_jax.cli.main import main
from fedqsn_jax.host.signals import run_as_process

__all__ = ["main"]

if __name__ == "__main__":
    run_as_process(main)
