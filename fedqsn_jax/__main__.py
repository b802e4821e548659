"""``python -m fedqsn_jax``: names the commands, which are modules of their own."""

import sys

from fedqsn_jax.host.signals import REFUSED, tell

COMMANDS = ("main", "sweep", "benchmark", "export", "audit", "deploy")
"""Each is ``python -m fedqsn_jax.COMMAND``."""

if __name__ == "__main__":
    commands = ", ".join(f"python -m fedqsn_jax.{name}" for name in COMMANDS)
    tell(f"fedqsn_jax: name a command: {commands}")
    sys.exit(REFUSED)
