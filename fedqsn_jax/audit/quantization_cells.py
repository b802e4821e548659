"""Attack: intersecting the quantization cells of several versions of a column.

A code says between which two borders the value lies: the midpoints to the neighbouring levels,
times the block's scale. Another version of the same value, with another scale or another rounding,
gives another cell, and the value lies in both. If a cell does not meet what is known so far, the
value has changed meanwhile, and only the new cell counts. The value is taken to be the middle of
what is left. With one version this is what dequantization gives, but for the outermost levels.

Source: the intersection of uncertainty intervals of dithered quantizers (Jayant and Noll, Digital
Coding of Waveforms, 1984, chapter 4); it is also how several quantized copies of a release undo
its quantization (Dinur and Nissim, Revealing Information while Preserving Privacy, 2003).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.trees import leaves_by_path, path_of
from fedqsn_jax.core.types import Array, Params
from fedqsn_jax.protocol.proxy import Proxy, is_quantized
from fedqsn_jax.protocol.quantization import Quantized, Quantizer
from fedqsn_jax.protocol.sites import Sites


class Cell(NamedTuple):
    """Where the entries of one kernel lie, float32 ``[layers, inputs, columns]`` each."""

    low: Array
    high: Array


Cells = dict[str, Cell]
"""By the kernel's path; where nothing is known a cell reaches from minus to plus infinity."""


def borders(levels: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The lower and upper border of each code's cell, in units of the scale.

    The outermost cells end at the codebook's ends, as no entry exceeds its block's scale.
    """
    middle = (np.asarray(levels[1:]) + np.asarray(levels[:-1])) / 2
    low = np.concatenate([[min(-1.0, levels[0])], middle])
    high = np.concatenate([middle, [max(1.0, levels[-1])]])
    return low.astype(np.float32), high.astype(np.float32)


def cell_of(quantized: Quantized, visible: Array | None) -> Cell:
    """The cells of a quantized kernel's entries; unbounded where it is hidden."""
    quantizer: Quantizer = quantized.quantizer
    low, high = borders(quantizer.levels)
    codes = jnp.asarray(quantized.codes).astype(jnp.int32)
    scales = jnp.asarray(quantized.scales).astype(jnp.float32)
    inputs = codes.shape[1]
    spread = jnp.repeat(scales, quantizer.block_size, axis=1)[:, :inputs]
    lower, upper = jnp.asarray(low)[codes] * spread, jnp.asarray(high)[codes] * spread
    if visible is not None:
        seen = jnp.asarray(visible)[:, None, :]
        lower, upper = jnp.where(seen, lower, -jnp.inf), jnp.where(seen, upper, jnp.inf)
    return Cell(lower, upper)


def first_cells(proxy: Proxy) -> Cells:
    """What is known before anything was received: nothing."""
    leaves = leaves_by_path(proxy.params, is_leaf=is_quantized)
    return {
        path: Cell(jnp.full(leaf.codes.shape, -jnp.inf), jnp.full(leaf.codes.shape, jnp.inf))
        for path, leaf in leaves.items()
        if is_quantized(leaf) and not leaf.quantizer.mixes_columns
    }


def narrow(cells: Cells, proxy: Proxy) -> Cells:
    """Intersects what is known with the cells of another proxy."""
    leaves = leaves_by_path(proxy.params, is_leaf=is_quantized)
    masks = {site.path: proxy.visible.get(site.mask_path) for site in proxy.sites}
    return {
        path: intersect(cell, cell_of(leaves[path], masks[path])) for path, cell in cells.items()
    }


def intersect(known: Cell, new: Cell) -> Cell:
    """The entries' cells after a new one: both, or the new one where they do not meet."""
    low, high = jnp.maximum(known.low, new.low), jnp.minimum(known.high, new.high)
    meet = low <= high
    return Cell(jnp.where(meet, low, new.low), jnp.where(meet, high, new.high))


def with_middles(values: Params, cells: Cells, sites: Sites) -> Params:
    """Replaces the entries of kernels by the middles of their cells, where these are bounded."""
    by_path = {site.path: site for site in sites}

    def visit(path: tuple, leaf: Array) -> Array:
        cell = cells.get(path_of(path))
        if cell is None:
            return leaf
        site = by_path[path_of(path)]
        bounded = jnp.isfinite(cell.low) & jnp.isfinite(cell.high)
        middle = jnp.where(bounded, (cell.low + cell.high) / 2, site.to_matrices(leaf))
        return site.from_matrices(middle.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(visit, values)
