"""The static structure of payloads, which both ends know, and how long it makes them."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedqsn_jax.core.trees import Selection, leaves_by_path
from fedqsn_jax.protocol.proxy import Proxy, is_quantized
from fedqsn_jax.protocol.quantization import Quantized, Quantizer, packed_size
from fedqsn_jax.protocol.sites import MaskSite, Sites

HEADER_SIZE = 48
"""Bytes before a payload's body."""


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """How one tensor travels.

    Attributes:
      path: Its path in the parameter tree.
      shape: Its shape in the parameter tree.
      dtype: The dtype of its values on the wire; for a quantized kernel that of its scales.
      site: The mask site of a kernel or bias, None for other tensors.
      is_bias: True for the bias of ``site``.
      quantizer: The quantizer of a quantized kernel.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    site: MaskSite | None = None
    is_bias: bool = False
    quantizer: Quantizer | None = None

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of a kernel's codes: ``[layers, inputs, columns]``."""
        return () if self.site is None else (self.site.layers, self.site.fan_in, self.site.columns)

    @property
    def column_bytes(self) -> int:
        """Bytes of one column on the wire (of the whole tensor, where it belongs to no site)."""
        item = jnp.dtype(self.dtype).itemsize
        if self.site is None:
            return math.prod(self.shape) * item
        if self.is_bias:
            return item
        if self.quantizer is None:
            return self.site.fan_in * item
        packed = packed_size(self.site.fan_in, self.quantizer.code_bits)
        if self.quantizer.mixes_columns:
            return packed
        return packed + self.quantizer.blocks(self.site.fan_in) * item

    @property
    def shared_scales(self) -> int:
        """Number of scales that belong to no column, of one layer."""
        if self.site is None or self.quantizer is None or not self.quantizer.mixes_columns:
            return 0
        return self.quantizer.blocks(self.site.fan_in * self.site.columns)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static structure of a run's proxies: public, and known to both ends.

    Attributes:
      tensors: The tensors in the order of their paths.
      masked: Paths of the sites that have hidden columns, ascending.
      scaled: Paths of the sites that have a factor, ascending.
      sites: All mask sites.
      structure: The parameters' tree structure, with gaps where nothing travels.
      trained: The tensors whose updates travel back; None is all of them.
      upload: How kernels of sites travel in updates; None: as float32.
    """

    tensors: tuple[TensorLayout, ...]
    masked: tuple[str, ...]
    scaled: tuple[str, ...]
    sites: Sites
    structure: Any
    trained: Selection = None
    upload: Quantizer | None = None

    @classmethod
    def of(
        cls, proxy: Proxy, *, trained: Selection = None, upload: Quantizer | None = None
    ) -> "Layout":
        """Reads the layout off a proxy, or off the shapes of one (``jax.eval_shape``).

        Args:
          proxy: The proxy.
          trained: The tensors that clients train; None is all of them.
          upload: How kernels of sites travel in updates.
        """
        sites, tensors = proxy.sites, []
        for path, leaf in leaves_by_path(proxy.params, is_leaf=is_quantized).items():
            site = sites.of(path)
            is_bias = site is not None and path != site.path
            if isinstance(leaf, Quantized):
                # Its codes and scales are in matrix form; only the site knows the kernel's shape.
                shape = sites.by_kernel[path].shape
                dtype, quantizer = leaf.scales.dtype, leaf.quantizer
            else:
                shape, dtype, quantizer = tuple(leaf.shape), leaf.dtype, None
            tensors.append(
                TensorLayout(
                    path, shape, dtype=str(dtype), site=site, is_bias=is_bias, quantizer=quantizer
                )
            )
        return cls(
            tensors=tuple(sorted(tensors, key=lambda tensor: tensor.path)),
            masked=tuple(sorted(proxy.visible)),
            scaled=tuple(sorted(proxy.scale)),
            sites=proxy.sites,
            structure=jax.tree.structure(proxy.params, is_leaf=is_quantized),
            trained=trained,
            upload=upload,
        )

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that differ between models, sites, quantizers and sets of masked sites."""
        return hashlib.blake2b(self._text.encode(), digest_size=16).digest()

    @property
    def update_fingerprint(self) -> bytes:
        """Of updates: it differs between sets of trained tensors and quantizers of updates too."""
        # Added only where there is any, as below.
        text = self._text + ("" if self.trained is None else repr(sorted(self.trained)))
        text += f"upload {self.upload}" if self.upload is not None else ""
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    @property
    def _text(self) -> str:
        text = repr((self.tensors, self.masked, self.scaled, tuple(self.sites)))
        # Added only where there is any, so that other payloads are those of version 1.
        followers = [(site.path, site.follows) for site in self.sites if site.follows]
        text += repr(followers) if followers else ""
        mixing = [tensor.path for tensor in self.tensors if tensor.shared_scales]
        return text + (f"mixing {mixing}" if mixing else "")

    @property
    def update_tensors(self) -> tuple[TensorLayout, ...]:
        """How the tensors of an update travel: float32, or as ``upload`` says; no frozen ones."""

        def of_update(tensor: TensorLayout) -> TensorLayout:
            site = tensor.site
            if self.upload is None or site is None or not site.quantized or tensor.is_bias:
                return dataclasses.replace(tensor, dtype="float32", quantizer=None)
            dtype = self.upload.scale_dtype
            return dataclasses.replace(tensor, dtype=dtype, quantizer=self.upload)

        return tuple(
            of_update(tensor)
            for tensor in self.tensors
            if self.trained is None or tensor.path in self.trained
        )

    def masked_sites(self, tensors: tuple[TensorLayout, ...]) -> Sites:
        """The masked sites that any of the tensors belongs to, in the order of their bitmaps."""
        needed = {tensor.site.mask_path for tensor in tensors if tensor.site is not None}
        return Sites(self.sites.by_kernel[path] for path in self.masked if path in needed)


class Cost(NamedTuple):
    """The length of a payload, in bytes.

    Attributes:
      fixed: What does not depend on masks, the header and bitmaps included.
      per_column: What each visible column of each masked site adds.
    """

    fixed: int
    per_column: dict[str, int]

    def of(self, visible: Mapping[str, float], payloads: float = 1) -> float:
        """The length with so many visible columns a site; an integer if the counts are.

        Args:
          visible: Visible columns of each masked site, of all payloads together.
          payloads: Number of payloads.
        """
        columns = sum(size * visible[path] for path, size in self.per_column.items())
        return self.fixed * payloads + columns


def proxy_cost(layout: Layout) -> Cost:
    """The length of a proxy's payload."""
    cost = _cost(layout, layout.tensors)
    return cost._replace(fixed=cost.fixed + 4 * len(layout.scaled))


def update_cost(layout: Layout) -> Cost:
    """The length of an update's payload."""
    return _cost(layout, layout.update_tensors)


def _cost(layout: Layout, tensors: tuple[TensorLayout, ...]) -> Cost:
    masked = layout.masked_sites(tensors)
    fixed = HEADER_SIZE + sum(bitmap_size(site) for site in masked)
    per_column = dict.fromkeys((site.path for site in masked), 0)
    for tensor in tensors:
        if tensor.site is None:
            fixed += tensor.column_bytes
            continue
        fixed += tensor.shared_scales * tensor.site.layers * jnp.dtype(tensor.dtype).itemsize
        if tensor.site.mask_path in per_column:
            per_column[tensor.site.mask_path] += tensor.column_bytes
        else:
            fixed += tensor.column_bytes * tensor.site.layers * tensor.site.columns
    return Cost(fixed, per_column)


def bitmap_size(site: MaskSite) -> int:
    """Bytes of a masked site's bitmap: one bit a column."""
    return packed_size(site.layers * site.columns, 1)
