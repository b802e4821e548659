"""Masks over the columns of mask sites: drawn, counted, and laid over trees of parameters."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.trees import map_by_path
from fedqsn_jax.core.types import Array, Columns, Key, Params
from fedqsn_jax.protocol.quantization import Quantized
from fedqsn_jax.protocol.sites import MaskSite, Sites

Sampling = Literal["bernoulli", "fixed_count"]


def spread(columns: Columns, tree: Params, sites: Sites, absent: Any) -> Params:
    """Lays facts about columns over a tree, so that they combine with it by ``jax.tree.map``.

    Args:
      columns: ``[layers, columns]`` a site.
      tree: Leaves in the structure of the parameters; only the structure matters.
      sites: The mask sites.
      absent: The fact for tensors of no site, and for sites that ``columns`` lacks.

    Returns:
      The tree with, at each leaf, an array that broadcasts against the parameter there: a kernel
      or bias of a site in ``columns`` has its column's fact, everything else has ``absent``.
    """

    def visit(path: str, leaf: Any) -> Any:
        site = sites.of(path)
        if site is None or site.mask_path not in columns:
            return absent
        return site.to_tensor(path, columns[site.mask_path])

    return map_by_path(visit, tree)


def hide(tree: Params, sites: Sites, visible: Columns) -> Params:
    """Zeroes the hidden columns of a tree, whatever they hold (NaN included).

    Args:
      tree: The parameters, whose kernels may be `Quantized`: then codes and scales become zero
        (the scales of blocks that mix columns, which belong to no column, stay).
      sites: The mask sites.
      visible: bool ``[layers, columns]`` a site; a site that is absent is not changed.
    """

    def visit(path: str, leaf: Array | Quantized) -> Array | Quantized:
        site = sites.of(path)
        if site is None or site.mask_path not in visible:
            return leaf
        seen = visible[site.mask_path]
        if not isinstance(leaf, Quantized):
            return _select_or_zero(site.to_tensor(path, seen), leaf)
        seen = seen[:, None, :]
        codes = _select_or_zero(seen, leaf.codes)
        if leaf.quantizer.mixes_columns:
            return dataclasses.replace(leaf, codes=codes)
        return dataclasses.replace(leaf, codes=codes, scales=_select_or_zero(seen, leaf.scales))

    return map_by_path(visit, tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))


def _select_or_zero(seen: Array, leaf: Array) -> Array:
    # A selection, not a product: NaN in a hidden column must not get through.
    return jnp.where(seen, leaf, jnp.zeros((), leaf.dtype))


def draw_masks(
    key: Key, sites: Sites, probability: float | Array, sampling: Sampling = "bernoulli"
) -> Columns:
    """Draws an independent mask for every site that can be hidden.

    Args:
      key: The key of this draw; a site's mask depends on it and on the site's path only.
      sites: The mask sites.
      probability: The probability (``bernoulli``) or share (``fixed_count``, rounded to whole
        columns in each layer) of hidden columns.
      sampling: How columns are chosen.

    Returns:
      bool ``[layers, columns]`` a site that draws; True where the column is visible.
    """
    return {
        site.path: _draw_mask(fold_in_name(key, site.path), site, probability, sampling)
        for site in sites.drawing
    }


def _draw_mask(key: Key, site: MaskSite, probability: float | Array, sampling: Sampling) -> Array:
    shape = (site.layers, site.columns)
    noise = jax.random.uniform(key, shape, jnp.float32)
    if sampling == "bernoulli":
        return noise >= probability
    ranks = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
    return ranks >= hidden_count(site, probability)


def visible_share(site: MaskSite, probability: float | Array, sampling: Sampling) -> Array:
    """The share of columns that a mask leaves visible, float32 scalar: expected, or realised.

    ``fixed_count`` hides whole columns, so its share is the realised one (kappa's factor).
    """
    if sampling == "bernoulli":
        return jnp.float32(1) - jnp.float32(probability)
    return 1 - hidden_count(site, probability).astype(jnp.float32) / site.columns


def hidden_count(site: MaskSite, probability: float | Array) -> Array:
    """The number of columns that ``fixed_count`` hides in each layer, int32; one always stays."""
    count = jnp.round(jnp.float32(probability) * site.columns).astype(jnp.int32)
    return jnp.minimum(count, site.columns - 1)
