"""Attack: hidden columns are filled with a guess, and then everything is fine-tuned.

Zeros, the mean of the known columns of the same layer, random weights as at initialization, or the
columns of a public base (Zhang et al., No Privacy Left Outside: On the (In-)Security of
TEE-Shielded DNN Partition for On-Device ML, IEEE S&P 2024: thieves initialize what is shielded from
a public model). Nothing of what is hidden is used.
"""

import jax
import jax.numpy as jnp

from fedqsn_jax.core.trees import leaves_by_path, path_of
from fedqsn_jax.core.types import Array, Columns, Params
from fedqsn_jax.protocol.masks import spread
from fedqsn_jax.protocol.sites import Sites


def filled(values: Params, known: Columns, sites: Sites, guess: Params) -> Params:
    """Takes known columns from what was received, and all others from a guess."""
    seen = spread(known, values, sites, True)
    return jax.tree.map(
        lambda on, own, other: jnp.where(on, own, other.astype(own.dtype)), seen, values, guess
    )


def mean_columns(values: Params, known: Columns, sites: Sites) -> Params:
    """A guess: each column is the mean of the known ones of its layer; zero if there is none."""
    kernels = {site.path: site for site in sites}
    biases = {site.bias_path: site for site in sites if site.bias_path}

    def visit(path: tuple, leaf: Array) -> Array:
        name = path_of(path)
        site = kernels.get(name) or biases.get(name)
        if site is None or site.mask_path not in known:
            return leaf
        seen = known[site.mask_path]
        count = jnp.maximum(seen.sum(axis=1), 1)
        if name in kernels:
            matrices = site.to_matrices(leaf)
            total = jnp.where(seen[:, None, :], matrices, 0).sum(axis=2) / count[:, None]
            return site.from_matrices(jnp.broadcast_to(total[:, :, None], matrices.shape))
        columns = site.from_bias(leaf)
        total = jnp.where(seen, columns, 0).sum(axis=1) / count
        return site.to_bias(jnp.broadcast_to(total[:, None], columns.shape))

    return jax.tree_util.tree_map_with_path(visit, values)


def sites_of(params: Params, sites: Sites) -> Sites:
    """The sites whose kernels a tree has; those of merged adapters it has not."""
    paths = leaves_by_path(params)
    return Sites(site for site in sites if site.path in paths)
