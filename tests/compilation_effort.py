"""Compilation is most of the tests' time, so XLA does it with less effort; imported before JAX.

The programs' meaning is the same, their speed and last bits may differ. What the tests start as
processes inherits it. ``JAX_DISABLE_MOST_OPTIMIZATIONS=false pytest`` tests programs as they are
compiled for users, in twice the time.
"""

import importlib.util
import mmap
import os
from pathlib import Path

FLAG = "xla_cpu_use_fusion_emitters"
"""XLA's newer way to compile fused loops, which takes twice as long for programs like ours."""


def compile_quickly() -> None:
    """Sets what JAX and XLA read of the environment, unless somebody has."""
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ:
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG not in flags and _xla_knows(FLAG):
        os.environ["XLA_FLAGS"] = f"{flags} --{FLAG}=false".strip()


def _xla_knows(flag: str) -> bool:
    """Whether jaxlib's libraries name the flag; XLA ends a process that gives an unknown one."""
    found = importlib.util.find_spec("jaxlib")
    for library in Path(found.origin).parent.glob("*.so"):
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
            if text.find(flag.encode()) >= 0:
                return True
    return False


compile_quickly()
