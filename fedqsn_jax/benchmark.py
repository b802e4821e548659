"""The benchmark: ``python -m fedqsn_jax.benchmark``."""

from fedqsn_jax.host.signals import end_at_signals, run_as_process

if __name__ == "__main__":
    # Before the imports, which take a while: a Ctrl-C during them is no traceback.
    end_at_signals()

from fedqsn_jax.cli.benchmark import main

__all__ = ["main"]

if __name__ == "__main__":
    run_as_process(main)
