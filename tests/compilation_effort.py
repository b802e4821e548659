"""Compilation is most of the tests' time, so XLA does it with less effort; imported before JAX.

The programs' meaning is the same, their speed and last bits may differ. What the tests start as
processes inherits it. ``JAX_DISABLE_MOST_OPTIMIZATIONS=false pytest`` tests programs as they are
compiled for users, in twice the time.
"""

import os

FLAG = "--xla_backend_extra_options"
OPTION = "xla_cpu_disable_new_fusion_emitters=true"
"""Against XLA's newer way to compile fused loops, which takes twice as long for programs like ours.

An option of a backend, since XLA passes over those that it does not know, while an unknown flag
ends the process (JAX 0.10's ``--xla_cpu_use_fusion_emitters`` is none any more in JAX 0.11).
"""

ONE_THREAD = "--xla_cpu_parallel_codegen_split_count=1"
"""Against dividing a program among threads: the tests keep every core busy as it is."""


def compile_quickly() -> None:
    """Sets what JAX and XLA read of the environment, unless somebody has."""
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ:
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}={OPTION} {ONE_THREAD}".strip()


compile_quickly()
