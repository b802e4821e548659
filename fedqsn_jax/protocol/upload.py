"""What a client's update is on its way back: as it is, or quantized with error feedback.

With error feedback (arXiv 1809.07599, 1901.09847) a client adds to its delta what quantization took
away from its earlier ones, so that nothing is lost for good. It keeps a residual of each trained
kernel of a site, in float32. Only columns that it sees are sent, and only their residuals change: a
column that the server hides has no delta, sends nothing and has a residual of zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from fedqsn_jax.core.trees import Selection, leaves_by_path, map_by_path, select
from fedqsn_jax.core.types import Array, Columns, Params
from fedqsn_jax.protocol import quantization
from fedqsn_jax.protocol.proxy import quantize_sites
from fedqsn_jax.protocol.quantization import Quantizer
from fedqsn_jax.protocol.sites import Sites

Residuals = dict[str, Array]
"""What quantization has taken away from a client's deltas so far, float32
``[layers, inputs, columns]`` a kernel. Of a population each has a leading axis of clients."""


class Upload(NamedTuple):
    """The way back as pure functions.

    Attributes:
      init: ``(params, clients) -> residuals`` of a population, zeros; without feedback ``{}``.
      send: ``(delta, residuals, visible) -> (sent, residuals)`` of one client that saw the columns
        ``[layers, columns]``: the delta that the server gets, and what the client keeps.
    """

    init: Callable[[Params, int], Residuals]
    send: Callable[[Params, Residuals, Columns], tuple[Params, Residuals]]


def whole_upload() -> Upload:
    """Returns the way that changes nothing."""
    return Upload(
        lambda params, clients: {},
        lambda delta, residuals, visible: (delta, residuals),
    )


def quantized_upload(
    quantizer: Quantizer, sites: Sites, *, feedback: bool = False, trained: Selection = None
) -> Upload:
    """Makes uploads whose kernels of sites are quantized; all other tensors travel as they are.

    Sites that no quantizer is to change (`MaskSite.quantized`) travel as they are too.

    Args:
      quantizer: The codebook and block size.
      sites: The mask sites.
      feedback: Whether clients keep what is lost. It takes ``clients`` times the kernels' memory.
      trained: The tensors that are trained; the others have no delta.
    """
    by_path = sites.quantized.by_kernel

    def init(params: Params, clients: int) -> Residuals:
        if not feedback:
            return {}
        return {
            path: jnp.zeros((clients, site.layers, site.fan_in, site.columns), jnp.float32)
            for path, site in by_path.items()
            if path in leaves_by_path(select(params, trained))
        }

    def send(delta: Params, residuals: Residuals, visible: Columns) -> tuple[Params, Residuals]:
        kept = dict(residuals)

        def visit(path: str, leaf: Array) -> Array:
            if path not in by_path:
                return leaf
            site = by_path[path]
            values = site.to_matrices(leaf)
            if not feedback:
                sent = quantization.dequantize(quantization.quantize(quantizer, values))
                return site.from_matrices(sent)
            seen = visible[site.mask_path][:, None, :] if site.mask_path in visible else True
            wanted = jnp.where(seen, values + residuals[path], 0)
            sent = quantization.dequantize(quantization.quantize(quantizer, wanted))
            kept[path] = jnp.where(seen, wanted - sent, residuals[path])
            return site.from_matrices(sent)

        return map_by_path(visit, delta), kept

    return Upload(init, send)


def quantize_delta(delta: Params, quantizer: Quantizer, sites: Sites) -> Params:
    """Quantizes the kernels of sites of what `Upload.send` gave, as `wire.encode_update` wants it.

    Its values are the codebook's already, so that decoding gives them back.
    """
    return quantize_sites(delta, quantizer, sites)
