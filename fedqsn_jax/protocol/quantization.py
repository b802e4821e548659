"""Block quantization to codebooks of a few bits, and the packing of codes into bytes.

Matrices are ``[layers, inputs, columns]``. Blocks run along the inputs of one column of one layer
(the last one of a column may be shorter) and share one absolute-maximum scale. So nothing about a
column shows in another column's codes or scales, and quantization commutes with hiding columns.

The released code of FedQSN lets blocks run along the rows of a whole matrix, so that each mixes
columns (``blocks_along="row"``). Then scales, and through them visible columns' codes, tell of
hidden columns.
"""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fedqsn_jax.core.types import Array

NORMAL_FLOAT_OFFSET = 0.9677083
"""Probability of the outermost NormalFloat level, as in QLoRA (arXiv 2305.14314)."""

BLOCK_DIRECTIONS = ("column", "row")
SCALE_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A codebook with the size of its blocks; static and hashable. Use a subclass.

    Attributes:
      bits: Width of a code, 1 to 8 (`SymmetricNormalFloat`: one bit less).
      block_size: Number of entries that share a scale.
      scale_dtype: The scales' dtype in memory and on the wire. Scales are rounded to it before
        codes are chosen, so that rounding them costs no accuracy twice.
      blocks_along: ``column``: a block lies in one column; ``row``: blocks run through a layer's
        matrix row by row, and mix columns.
    """

    bits: int = 4
    block_size: int = 64
    scale_dtype: str = "bfloat16"
    # Not in the text that payloads' fingerprints are made of; those of version 1 had none.
    blocks_along: str = dataclasses.field(default="column", repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.code_bits > 8:
            most = 8 - (self.code_bits - self.bits)
            raise ValueError(f"bits = {self.bits!r}: allowed are 1 to {most}")
        if self.blocks_along not in BLOCK_DIRECTIONS:
            raise ValueError(
                f"blocks_along = {self.blocks_along!r}: allowed are {', '.join(BLOCK_DIRECTIONS)}"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size = {self.block_size!r}: allowed is 1 or more")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"scale_dtype = {self.scale_dtype!r}: allowed are {', '.join(SCALE_DTYPES)}"
            )

    @property
    def levels(self) -> tuple[float, ...]:
        """The codebook, ascending, in [-1, 1]; code i stands for ``levels[i]`` times the scale."""
        raise TypeError("a Quantizer has no codebook of its own; use NormalFloat or Uniform")

    @property
    def code_bits(self) -> int:
        """Bits that a code takes when packed."""
        return self.bits

    @property
    def mixes_columns(self) -> bool:
        """Whether columns share scales, so that hidden ones show in them."""
        return self.blocks_along == "row"

    def blocks(self, inputs: int) -> int:
        """Number of blocks (so of scales) in ``inputs`` entries one after the other."""
        return -(-inputs // self.block_size)


@dataclasses.dataclass(frozen=True)
class NormalFloat(Quantizer):
    """Quantiles of the normal distribution, as QLoRA (arXiv 2305.14314) places them for 4 bits.

    ``2**(b-1)`` positive levels, zero, and ``2**(b-1) - 1`` negative ones, divided by the largest;
    one bit is {-1, +1}.
    """

    @property
    def levels(self) -> tuple[float, ...]:
        """The codebook, ascending, in [-1, 1]."""
        return _normal_float_levels(self.bits)


@dataclasses.dataclass(frozen=True)
class SymmetricNormalFloat(Quantizer):
    """`NormalFloat` with as many negative levels as positive ones, as in FedQSN's released code.

    These are ``2**bits + 1`` levels, so a code takes ``bits + 1`` bits.
    """

    @property
    def levels(self) -> tuple[float, ...]:
        """The codebook, ascending, in [-1, 1]."""
        positive = _normal_float_levels(self.bits)[-(2 ** (self.bits - 1)) :]
        return (*(-level for level in reversed(positive)), 0.0, *positive)

    @property
    def code_bits(self) -> int:
        """Bits that a code takes when packed."""
        return self.bits + 1


@dataclasses.dataclass(frozen=True)
class Uniform(Quantizer):
    """``2**bits`` levels with equal distances from -1 to 1."""

    @property
    def levels(self) -> tuple[float, ...]:
        """The codebook, ascending, in [-1, 1]."""
        last = 2**self.bits - 1
        # Exactly symmetric, which the rounding of a linspace is not.
        return tuple((2 * code - last) / last for code in range(last + 1))


@functools.cache
def _normal_float_levels(bits: int) -> tuple[float, ...]:
    if bits == 1:
        return (-1.0, 1.0)
    half = 2 ** (bits - 1)
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(NORMAL_FLOAT_OFFSET, 0.5, half + 1)[:-1]]
    negative = [-quantile(p) for p in np.linspace(NORMAL_FLOAT_OFFSET, 0.5, half)[:-1]]
    return tuple(level / positive[0] for level in [*negative, 0.0, *reversed(positive)])


@struct.dataclass
class Quantized:
    """A quantized kernel in matrix form.

    Invariants: ``codes`` below ``2**quantizer.code_bits``; ``scales`` non-negative; both zero in
    hidden columns. The value of an entry is ``levels[code] * scale`` of its block. Where blocks mix
    columns, scales belong to no column: they are never zeroed, and code zero of a hidden column may
    stand for any value.

    Attributes:
      codes: uint8 ``[layers, inputs, columns]``.
      scales: ``quantizer.scale_dtype`` ``[layers, blocks, columns]``; where blocks mix columns
        ``[layers, blocks, 1]``.
      quantizer: The codebook and block size (static).
    """

    codes: Array
    scales: Array
    quantizer: Quantizer = struct.field(pytree_node=False)


def quantize(quantizer: Quantizer, matrices: Array) -> Quantized:
    """Quantizes ``[layers, inputs, columns]`` to the nearest level a block; ties go down.

    A block of zeros has scale 0.
    """
    if quantizer.mixes_columns and matrices.shape[2] != 1:
        flat = quantize(quantizer, _as_one_column(matrices))
        return dataclasses.replace(flat, codes=flat.codes.reshape(matrices.shape))
    blocked = _to_blocks(quantizer, matrices.astype(jnp.float32))
    scales = _round_to(jnp.max(jnp.abs(blocked), axis=2), quantizer.scale_dtype)
    divisor = scales.astype(jnp.float32)[:, :, None, :]
    relative = blocked / jnp.where(divisor == 0, 1.0, divisor)
    # Comparing against every threshold fuses into one pass over the weights; a binary search
    # (searchsorted) was measured 4 times slower.
    levels = np.asarray(quantizer.levels, np.float64)
    codes = jnp.zeros(relative.shape, jnp.uint8)
    for threshold in ((levels[1:] + levels[:-1]) / 2).astype(np.float32):
        codes += (relative > threshold).astype(jnp.uint8)
    return Quantized(_from_blocks(codes, matrices.shape[1]), scales, quantizer)


def dequantize(quantized: Quantized) -> Array:
    """Returns the float32 values ``[layers, inputs, columns]`` that codes and scales stand for."""
    quantizer, codes = quantized.quantizer, quantized.codes
    if quantizer.mixes_columns and codes.shape[2] != 1:
        flat = dataclasses.replace(quantized, codes=_as_one_column(codes))
        return dequantize(flat).reshape(codes.shape)
    levels = jnp.asarray(quantizer.levels, jnp.float32)
    inputs = quantized.codes.shape[1]
    block_size = min(quantizer.block_size, inputs)
    scales = jnp.repeat(quantized.scales.astype(jnp.float32), block_size, axis=1)
    # A scale of zero gives plain zeros, whatever the level's sign.
    return jnp.where(scales[:, :inputs] == 0, 0, levels[quantized.codes] * scales[:, :inputs])


def _as_one_column(matrices: Array) -> Array:
    return matrices.reshape(matrices.shape[0], -1, 1)


def _round_to(values: Array, dtype: str) -> Array:
    """Rounds to a narrower dtype, at most to its largest number, and stays rounded.

    A plain conversion there and back is one that XLA may leave out (it allows itself excess
    precision): then a simulation would compute with other scales than it sends.
    """
    facts = jnp.finfo(dtype)
    bounded = jnp.minimum(values, float(facts.max))
    return jax.lax.reduce_precision(bounded, facts.nexp, facts.nmant).astype(dtype)


def _to_blocks(quantizer: Quantizer, matrices: Array) -> Array:
    layers, inputs, columns = matrices.shape
    blocks, block_size = quantizer.blocks(inputs), min(quantizer.block_size, inputs)
    padding = blocks * block_size - inputs
    padded = jnp.pad(matrices, ((0, 0), (0, padding), (0, 0)))
    return padded.reshape(layers, blocks, block_size, columns)


def _from_blocks(blocked: Array, inputs: int) -> Array:
    layers, blocks, block_size, columns = blocked.shape
    return blocked.reshape(layers, blocks * block_size, columns)[:, :inputs]


def packed_size(count: int, bits: int) -> int:
    """Number of bytes that ``count`` codes of ``bits`` bits take when packed."""
    return -(-count * bits // 8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes along the last axis, lowest bits first.

    Args:
      codes: uint8 ``[..., n]``, each below ``2**bits``.
      bits: 1 to 8.

    Returns:
      uint8 ``[..., packed_size(n, bits)]``; code i fills bits ``i*bits`` to ``(i+1)*bits - 1``
      of the little-endian bit string, unused bits are zero.
    """
    count = codes.shape[-1]
    groups = -(-count // 8)
    padded = np.zeros((*codes.shape[:-1], groups * 8), np.uint64)
    padded[..., :count] = codes
    # Eight codes of `bits` bits are exactly `bits` bytes of one 64-bit word.
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    words = np.bitwise_or.reduce(padded.reshape(*codes.shape[:-1], groups, 8) << shifts, axis=-1)
    octets = words.astype("<u8")[..., None].view(np.uint8)[..., :bits]
    return octets.reshape(*codes.shape[:-1], groups * bits)[..., : packed_size(count, bits)]


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Inverts `pack`: uint8 ``[..., packed_size(count, bits)]`` to uint8 ``[..., count]``."""
    groups = -(-count // 8)
    octets = np.zeros((*packed.shape[:-1], groups * bits), np.uint8)
    octets[..., : packed.shape[-1]] = packed
    words = np.zeros((*packed.shape[:-1], groups, 8), np.uint8)
    words[..., :bits] = octets.reshape(*packed.shape[:-1], groups, bits)
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    codes = (words.view("<u8") >> shifts) & np.uint64(2**bits - 1)
    return codes.astype(np.uint8).reshape(*packed.shape[:-1], groups * 8)[..., :count]
