"""Proxies and updates as bytes that hold visible columns only, and back.

Both ends know the model's structure (`Layout`), which is public; a payload holds values. All
numbers are little-endian::

  header   magic "FQSN", version u16, kind u8, zero u8, fingerprint of the structure (16 bytes),
           length of the body u64, BLAKE2b digest of all the rest (16 bytes): 48 bytes
  bitmaps  for each masked site one bit a column, layer by layer, lowest bit first, padded to bytes
  factors  for each scaled site 1/kappa, float32 (proxies only)
  tensors  in the order of their paths: the visible columns of kernels and biases, other tensors
           whole. A quantized column is its packed codes, padded to bytes; then come the scales,
           those of visible columns, or all of them where blocks mix columns. Tensors that clients
           have already, and updates of frozen ones, are left out.

So a payload's length is linear in the number of visible columns of each site, and is known once
the bitmaps are read, before anything is allocated. A proxy or update has one encoding: what no
encoder writes (codes that are no level, unused bits that are set, a negative zero for a scale) is
wrong, as damage is. Anything wrong with a payload is a ValueError.
"""

import dataclasses
import hashlib
import math
import struct
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.core.types import Columns, Params
from fedqsn_jax.protocol.layout import (
    HEADER_SIZE,
    Layout,
    TensorLayout,
    bitmap_size,
    proxy_cost,
    update_cost,
)
from fedqsn_jax.protocol.proxy import Proxy, is_quantized
from fedqsn_jax.protocol.quantization import Quantized, Quantizer, pack, packed_size, unpack
from fedqsn_jax.protocol.sites import Sites

MAGIC = b"FQSN"
VERSION = 1
_PROXY, _UPDATE = 1, 2
_PREFIX = struct.Struct("<4sHBB16sQ")
_DIGEST_SIZE = 16


def encode_proxy(proxy: Proxy) -> bytes:
    """Encodes what one client receives in one round; arrays must be concrete.

    Raises:
      ValueError: A scale or factor is negative or not finite: no client would accept the payload.
    """
    layout = Layout.of(proxy)
    factors = np.asarray([proxy.scale[path] for path in layout.scaled], "<f4")
    _require_scales("a site's factor", factors)
    leaves = leaves_by_path(proxy.params, is_leaf=is_quantized)
    visible = {path: np.asarray(proxy.visible[path]) for path in layout.masked}
    body = [*_encode_bitmaps(layout.masked_sites(layout.tensors), visible), factors.tobytes()]
    body += [_encode_tensor(t, leaves[t.path], visible) for t in layout.tensors]
    return _seal(_PROXY, layout, b"".join(body))


def decode_proxy(payload: bytes, layout: Layout) -> Proxy:
    """Inverts `encode_proxy`: exactly the proxy that was encoded.

    Raises:
      ValueError: The payload is damaged, of another version, kind or structure, or has scales
        that are negative or not finite.
    """
    reader = _open(payload, _PROXY, layout)
    factors = np.frombuffer(reader.take(4 * len(layout.scaled)), "<f4")
    _require_scales("payload: a site's factor", factors)
    values = {t.path: _decode_tensor(t, reader) for t in layout.tensors}
    scale = {path: jnp.float32(x) for path, x in zip(layout.scaled, factors, strict=True)}
    visible = {path: jax.device_put(mask) for path, mask in reader.visible.items()}
    return Proxy(params=_as_tree(layout, values), visible=visible, scale=scale, sites=layout.sites)


def encode_update(delta: Params, visible: Columns, layout: Layout) -> bytes:
    """Encodes a client's update: visible columns of sites, other tensors whole.

    Args:
      delta: Arrays in the structure of the parameters, with gaps for frozen ones; they travel as
        float32. Where the layout has a quantizer of uploads, kernels of sites are `Quantized` by it
        (see `upload.quantize_delta`).
      visible: The visible columns of the proxy that the client received.
      layout: The structure of that proxy.

    Raises:
      ValueError: Names or shapes do not fit the layout.
    """
    leaves = leaves_by_path(delta, is_leaf=is_quantized)
    masks = {path: np.asarray(mask) for path, mask in visible.items()}
    if tuple(sorted(masks)) != layout.masked:
        raise ValueError(f"update: masks of {sorted(masks)}, expected {list(layout.masked)}")
    found = {
        path: (leaf.quantizer, leaf.codes.shape) if is_quantized(leaf) else tuple(leaf.shape)
        for path, leaf in leaves.items()
    }
    expected = {
        tensor.path: (tensor.quantizer, tensor.matrix_shape) if tensor.quantizer else tensor.shape
        for tensor in layout.update_tensors
    }
    for path in sorted(name for name, _ in found.items() ^ expected.items()):
        shapes = [shape.get(path, "absent") for shape in (found, expected)]
        raise ValueError(f"update: shape of {path!r} is {shapes[0]}, expected {shapes[1]}")
    body = _encode_bitmaps(layout.masked_sites(layout.update_tensors), masks)
    body += [_encode_tensor(t, leaves[t.path], masks) for t in layout.update_tensors]
    return _seal(_UPDATE, layout, b"".join(body))


def decode_update(payload: bytes, layout: Layout) -> tuple[Params, Columns]:
    """Inverts `encode_update`; returns ``(delta, visible)``, the delta zero on hidden columns.

    Of the masks there are those that a trained tensor has. Kernels that travel quantized are
    `Quantized`; `proxy.dequantize_params` gives their values.

    Raises:
      ValueError: The payload is damaged, or of another version, kind or structure. Values that
        are not finite are the aggregation's concern, not the format's.
    """
    reader = _open(payload, _UPDATE, layout)
    values = {t.path: _decode_tensor(t, reader) for t in layout.update_tensors}
    visible = {path: jax.device_put(mask) for path, mask in reader.visible.items()}
    return _as_tree(layout, values), visible


def _encode_bitmaps(sites: Sites, visible: Mapping[str, np.ndarray]) -> list[bytes]:
    bitmaps = []
    for site in sites:
        mask = visible[site.path]
        if mask.shape != (site.layers, site.columns) or mask.dtype != bool:
            raise ValueError(
                f"mask of {site.path!r} is {mask.dtype}{list(mask.shape)}, "
                f"expected bool[{site.layers}, {site.columns}]"
            )
        bitmaps.append(np.packbits(mask.reshape(-1), bitorder="little").tobytes())
    return bitmaps


def _encode_tensor(tensor: TensorLayout, leaf: Any, visible: Mapping[str, np.ndarray]) -> bytes:
    site = tensor.site
    if site is None:
        return np.asarray(leaf).astype(jnp.dtype(tensor.dtype)).tobytes()
    seen = visible.get(site.mask_path, np.ones((site.layers, site.columns), bool))
    if tensor.quantizer is not None:
        codes, scales = _columns(np.asarray(leaf.codes), seen), np.asarray(leaf.scales)
        scales = scales if tensor.shared_scales else _columns(scales, seen)
        _require_scales(f"a scale of {tensor.path!r}", scales)
        _require_codes(f"a code of {tensor.path!r}", codes, tensor.quantizer)
        packed = [pack(codes[rows], tensor.quantizer.code_bits) for rows in _slices(codes.shape)]
        return b"".join(part.tobytes() for part in [*packed, scales])
    values: Any = np.asarray(leaf).astype(jnp.dtype(tensor.dtype))
    if tensor.is_bias:
        return np.asarray(site.from_bias(values))[seen].tobytes()
    return _columns(np.asarray(site.to_matrices(values)), seen).tobytes()


def _columns(matrices: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The visible columns of ``[layers, entries, columns]``, one a row."""
    return np.ascontiguousarray(matrices.transpose(0, 2, 1)[seen])


def _slices(shape: tuple[int, ...]) -> list[slice]:
    """Cuts the columns ``shape[0]``: while packed, a code takes up to 18 bytes of memory."""
    step = max(1, 2**20 // shape[1])
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def _matrices(columns: np.ndarray, seen: np.ndarray) -> Any:
    """Inverts `_columns`; hidden columns are zero."""
    full = np.zeros((*seen.shape, columns.shape[1]), columns.dtype)
    full[seen] = columns
    return full.transpose(0, 2, 1)


@dataclasses.dataclass
class _Reader:
    """A body whose length, bitmaps and digest were found right."""

    body: memoryview
    visible: dict[str, np.ndarray]
    offset: int

    def take(self, count: int) -> memoryview:
        self.offset += count
        return self.body[self.offset - count : self.offset]


def _decode_tensor(tensor: TensorLayout, reader: _Reader) -> Any:
    site, dtype = tensor.site, jnp.dtype(tensor.dtype)
    if site is None:
        return np.frombuffer(reader.take(tensor.column_bytes), dtype).reshape(tensor.shape)
    seen = reader.visible.get(site.mask_path, np.ones((site.layers, site.columns), bool))
    count = int(seen.sum())

    def read(entries: int, kind: Any) -> np.ndarray:
        data = reader.take(count * entries * kind.itemsize)
        return np.frombuffer(data, kind).reshape(count, entries)

    if tensor.quantizer is not None:
        quantizer = tensor.quantizer
        packed = read(packed_size(site.fan_in, quantizer.code_bits), np.dtype(np.uint8))
        if tensor.shared_scales:
            shape = (site.layers, tensor.shared_scales, 1)
            data = reader.take(math.prod(shape) * dtype.itemsize)
            scales: Any = np.frombuffer(data, dtype).reshape(shape)
        else:
            scales = read(quantizer.blocks(site.fan_in), dtype)
        _require_scales(f"payload: a scale of {tensor.path!r}", scales)
        codes = np.zeros((count, site.fan_in), np.uint8)
        for rows in _slices(codes.shape):
            codes[rows] = unpack(packed[rows], quantizer.code_bits, site.fan_in)
        _require_codes(f"payload: a code of {tensor.path!r}", codes, quantizer)
        unused = -site.fan_in * quantizer.code_bits % 8
        if unused and (packed[:, -1:] >> (8 - unused)).any():
            raise ValueError(
                f"payload: codes of {tensor.path!r} damaged, expected unused bits to be zero"
            )
        if not tensor.shared_scales:
            scales = _matrices(scales, seen)
        return Quantized(_matrices(codes, seen), scales, quantizer)
    if tensor.is_bias:
        return site.to_bias(_matrices(read(1, dtype), seen)[:, 0])
    return site.from_matrices(_matrices(read(site.fan_in, dtype), seen))


def _require_codes(what: str, codes: np.ndarray, quantizer: Quantizer) -> None:
    levels = len(quantizer.levels)
    if codes.size and codes.max() >= levels:
        raise ValueError(f"{what} is {codes.max()}, expected one of the {levels} levels, from 0")


# A forged scale may be a signalling NaN, of which NumPy warns: an exception under -W error.
@np.errstate(invalid="ignore")
def _require_scales(what: str, values: np.ndarray) -> None:
    # Zero has one encoding: the other, of a negative zero, nobody writes.
    if not np.isfinite(values).all() or np.signbit(values).any():
        raise ValueError(f"{what} is negative or not finite, expected a finite number of 0 or more")


def _as_tree(layout: Layout, values: Mapping[str, Any]) -> Params:
    paths = leaves_by_path(layout.structure.unflatten(range(layout.structure.num_leaves)))
    # Updates of frozen tensors are gaps.
    tree = layout.structure.unflatten([values.get(path) for path in paths])
    return jax.tree.map(jnp.asarray, tree)


def _seal(kind: int, layout: Layout, body: bytes) -> bytes:
    prefix = _PREFIX.pack(MAGIC, VERSION, kind, 0, _fingerprint(kind, layout), len(body))
    return prefix + _digest(prefix, body) + body


def _fingerprint(kind: int, layout: Layout) -> bytes:
    return layout.fingerprint if kind == _PROXY else layout.update_fingerprint


def _digest(prefix: bytes, body: bytes | memoryview) -> bytes:
    state = hashlib.blake2b(prefix, digest_size=_DIGEST_SIZE)
    state.update(body)
    return state.digest()


def _open(payload: bytes, kind: int, layout: Layout) -> _Reader:
    if not isinstance(payload, bytes):
        raise ValueError(f"payload: expected bytes, got {type(payload).__name__}")
    if len(payload) < HEADER_SIZE:
        raise ValueError(f"payload: {len(payload)} bytes, expected a header of {HEADER_SIZE}")
    view = memoryview(payload)
    prefix = bytes(view[: _PREFIX.size])
    magic, version, found_kind, reserved, fingerprint, length = _PREFIX.unpack(prefix)
    if magic != MAGIC or reserved != 0:
        raise ValueError(f"payload: not a FedQSN payload, expected one that starts with {MAGIC!r}")
    if version != VERSION:
        raise ValueError(f"payload: version {version}, expected {VERSION}")
    if found_kind != kind:
        names = {_PROXY: "a proxy", _UPDATE: "an update"}
        raise ValueError(f"payload: {names.get(found_kind, 'unknown')}, expected {names[kind]}")
    if fingerprint != _fingerprint(kind, layout):
        raise ValueError("payload: made for another model structure than the expected one")
    body = view[HEADER_SIZE:]
    if length != len(body):
        raise ValueError(f"payload: a body of {len(body)} bytes, expected {length} by its header")
    tensors = layout.tensors if kind == _PROXY else layout.update_tensors
    visible, offset = _read_bitmaps(body, layout.masked_sites(tensors))
    counts = {path: int(mask.sum()) for path, mask in visible.items()}
    cost = proxy_cost(layout) if kind == _PROXY else update_cost(layout)
    expected = cost.of(counts) - HEADER_SIZE
    if length != expected:
        raise ValueError(f"payload: a body of {length} bytes, expected {expected} by its bitmaps")
    if bytes(view[_PREFIX.size : HEADER_SIZE]) != _digest(prefix, body):
        raise ValueError("payload: damaged, expected contents that match its digest")
    return _Reader(body, visible, offset)


def _read_bitmaps(body: memoryview, sites: Sites) -> tuple[dict[str, np.ndarray], int]:
    visible, offset = {}, 0
    for site in sites:
        octets = body[offset : offset + bitmap_size(site)]
        offset += bitmap_size(site)
        bits = np.unpackbits(np.frombuffer(octets, np.uint8), bitorder="little")
        count = site.layers * site.columns
        if len(octets) != bitmap_size(site) or bits[count:].any():
            raise ValueError(f"payload: bitmap of {site.path!r} damaged, expected {count} bits")
        visible[site.path] = bits[:count].astype(bool).reshape(site.layers, site.columns)
    return visible, offset
