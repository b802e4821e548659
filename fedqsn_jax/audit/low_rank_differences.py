"""Attack: several versions of a model that differ by matrices of low rank give what they share.

Spectral DeTuning (Horwitz, Kahana, Hoshen, Recovering the Pre-Fine-Tuning Weights of Generative
Models, ICML 2024): versions ``W_i = W + M_i`` with M_i of low rank. Alternating: each M_i is the
best approximation of its rank to ``W_i - W``, then W is the mean of ``W_i - M_i``. The
approximation is by random projection and power iterations (Halko, Martinsson, Tropp, SIAM Review
2011), a fraction of the time of all singular values. What training by rounds has changed is not of
low rank by design; the attack finds what it can. Columns that a version lacks are filled from the
union of all.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedqsn_jax.core.trees import path_of
from fedqsn_jax.core.types import Array, Params
from fedqsn_jax.protocol.masks import spread
from fedqsn_jax.protocol.proxy import Proxy
from fedqsn_jax.protocol.sites import Sites

_POWERS = 2
"""Power iterations of each approximation."""


def shared_part(versions: Array, rank: int, iterations: int = 20) -> Array:
    """What versions of a matrix share, if they differ by matrices of a rank.

    Args:
      versions: ``[versions, ..., rows, columns]``, two or more.
      rank: The rank of the differences.
      iterations: How often both steps are taken.

    Returns:
      ``[..., rows, columns]``.
    """

    def step(_: int, shared: Array) -> Array:
        differences = versions - shared[None]
        turned = differences.swapaxes(-1, -2)
        basis = jnp.broadcast_to(directions, (*differences.shape[:-1], rank))
        for _ in range(_POWERS):
            basis = jnp.linalg.qr(differences @ (turned @ basis))[0]
        low = basis @ (basis.swapaxes(-1, -2) @ differences)
        return (versions - low).mean(axis=0)

    rows = versions.shape[-2]
    directions = jax.random.normal(jax.random.key(0), (rows, rank), versions.dtype)

    return jax.lax.fori_loop(0, iterations, step, versions.mean(axis=0))


def shared_model(union: Params, versions: Sequence[Proxy], sites: Sites, rank: int) -> Params:
    """Replaces the kernels of sites by what their versions share.

    Args:
      union: The latest copy of everything; it fills what a version lacks.
      versions: Proxies of different rounds, dequantized; with fewer than two nothing changes.
      sites: The mask sites.
      rank: The rank that differences are taken to have.
    """
    if len(versions) < 2:
        return union
    by_path = {site.path: site for site in sites}
    filled = [
        jax.tree.map(
            lambda seen, new, old: jnp.where(seen, new, old),
            spread(version.visible, union, sites, True),
            version.params,
            union,
        )
        for version in versions
    ]
    recover = jax.jit(shared_part, static_argnums=(1, 2))

    def visit(path: tuple, leaf: Array, *others: Array) -> Array:
        site = by_path.get(path_of(path))
        if site is None or min(site.fan_in, site.columns) <= rank:
            return leaf
        matrices = jnp.stack([site.to_matrices(other).astype(jnp.float32) for other in others])
        return site.from_matrices(recover(matrices, rank, 20)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(visit, union, *filled)
