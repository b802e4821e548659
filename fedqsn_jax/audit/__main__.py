"""The audit of a finished run: ``python -m fedqsn_jax.audit --workdir=DIR``."""

from fedqsn_jax.audit.command import main
from fedqsn_jax.host.signals import run_as_process

if __name__ == "__main__":
    run_as_process(main)
