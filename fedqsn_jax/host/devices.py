"""Where arrays lie: with a mesh, a copy of everything on each of its devices.

A round shares out the cohort over the mesh and computes everything else on every device alike. So
its state and its data are replicated before the first call; a call then moves nothing, and gives
the state back in the sharding that it came in, so that the next call does not compile again.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.core.types import Array

Tree = TypeVar("Tree")
"""A pytree of arrays and typed keys."""


def replicate(tree: Tree, mesh: Mesh | None) -> Tree:
    """Copies arrays to every device of a mesh.

    Args:
      tree: A pytree of arrays and typed keys. With a mesh of several processes each process gives
        its own; the values have to be the same in all.
      mesh: The devices; None: the arrays stay where they are.

    Returns:
      The tree with every leaf replicated over the mesh. Leaves that are already are not copied.
    """
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec())
    if not sharding.is_fully_addressable:
        return jax.tree.map(lambda leaf: _share(leaf, sharding), tree)
    return jax.device_put(tree, sharding)


def own_copy(tree: Tree) -> Tree:
    """Returns a replicated tree's copy on one device of this process, to work on alone."""

    def copy(leaf: Array) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = copy(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return leaf.addressable_data(0)

    return jax.tree.map(copy, tree)


def _share(leaf: Array, sharding: NamedSharding) -> Array:
    """Replicates over devices of which this process reaches only its own."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _share(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    copies = [jax.device_put(leaf, device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)


_USABLE = 0.9
"""Of a device's memory; the rest is for the program and for what the compiler adds."""


def device_bytes() -> int:
    """Bytes of memory of one device that a program may use: what its allocator says.

    A backend that does not tell, such as the CPU's, is taken to have the machine's memory, shared
    among its devices.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(_USABLE * stats["bytes_limit"])
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(_USABLE * machine / jax.local_device_count())


def keep_compiled_programs(directory: str) -> None:
    """Makes JAX keep compiled programs in a directory, and look for them there first.

    Programs that compile in less than a second are not kept, by JAX's default.
    """
    jax.config.update("jax_compilation_cache_dir", str(user_path(directory)))
    # JAX looks at the setting once, which may have been before.
    compilation_cache.reset_cache()


def require_devices() -> None:
    """Lets JAX look for its devices; it does so once, when they are first needed.

    Raises:
      UserError: A platform that was asked for is not there, or does not start.
    """
    try:
        jax.devices()
    # JAX has several kinds of errors for it, an AssertionError among them.
    except Exception as error:
        asked = jax.config.values["jax_platforms"] or ""
        reason = " ".join(str(error).split()) or "it does not start"
        raise UserError(
            f"JAX_PLATFORMS={asked}: JAX has no such device here ({reason[:200]}); allowed are "
            f"platforms of this machine, for example cpu, or to leave it unset"
        ) from error


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Looks for the devices, and lets JAX compute as the programs here are written.

    They mix dtypes: ``JAX_NUMPY_DTYPE_PROMOTION=strict`` is for a user's own programs. Whatever
    computes, of the commands and of what is called from Python, does it in this.

    Raises:
      UserError: As `require_devices` does.
    """
    require_devices()
    with jax.numpy_dtype_promotion("standard"):
        yield
