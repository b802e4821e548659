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
from collections.abc import Callable

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
    relative, scales = _relative_to_scales(quantizer, matrices)
    codes = _codes_above(relative, _borders(quantizer))
    return Quantized(_from_blocks(codes, matrices.shape[1]), scales, quantizer)


def quantize_other_way(quantizer: Quantizer, matrices: Array, margin: float) -> Array:
    """Codes that round what lies near a cell's border to the border's other side.

    Whether an entry has the one code or the other can then carry a sign of who received it, at an
    error that is at most ``(1 + 2 margin) / (1 - 2 margin)`` times that of rounding to the nearest.

    Args:
      quantizer: The codebook and block size.
      matrices: ``[layers, inputs, columns]``.
      margin: How near is near, as a share of the distance of the border's two levels; 0 to below
        one half, so that no entry is near two borders.

    Returns:
      uint8 ``[layers, inputs, columns]``; elsewhere, and where all of a block is zero, the codes of
      `quantize`.
    """
    if quantizer.mixes_columns and matrices.shape[2] != 1:
        flat = quantize_other_way(quantizer, _as_one_column(matrices), margin)
        return flat.reshape(matrices.shape)
    relative, scales = _relative_to_scales(quantizer, matrices)
    levels = np.asarray(quantizer.levels, np.float64)
    reach = margin * (levels[1:] - levels[:-1])
    nearest = _codes_above(relative, _borders(quantizer))
    # Below a border's reach one border fewer is passed, above it one more.
    least = _codes_above(relative, _borders(quantizer) + reach)
    most = _codes_above(relative, _borders(quantizer) - reach)
    other = jnp.where(least < nearest, least, most)
    other = jnp.where(scales[:, :, None, :] == 0, nearest, other)
    return _from_blocks(other, matrices.shape[1])


def _relative_to_scales(quantizer: Quantizer, matrices: Array) -> tuple[Array, Array]:
    """The entries, ``[layers, blocks, block size, columns]``, divided by their blocks' scales."""
    blocked = _to_blocks(quantizer, matrices.astype(jnp.float32))
    scales = _round_to(jnp.max(_magnitude(blocked), axis=2), quantizer.scale_dtype)
    # The same for every block, whatever others hold: no branch may tell of a hidden column.
    blocked = _in_range(blocked, scales)
    divisor = _in_range(scales, scales)[:, :, None, :]
    return blocked / jnp.where(divisor == 0, 1.0, divisor), scales


def _borders(quantizer: Quantizer) -> np.ndarray:
    """The borders between the cells of neighbouring levels, float64."""
    levels = np.asarray(quantizer.levels, np.float64)
    return (levels[1:] + levels[:-1]) / 2


def _codes_above(relative: Array, thresholds: np.ndarray) -> Array:
    """How many thresholds each entry is above, uint8."""
    # Comparing against every threshold fuses into one pass over the weights; a binary search
    # (searchsorted) was measured 4 times slower.
    codes = jnp.zeros(relative.shape, jnp.uint8)
    for threshold in thresholds.astype(np.float32):
        codes += (relative > threshold).astype(jnp.uint8)
    return codes


def dequantize(quantized: Quantized, then: Callable[[Array], Array] = lambda it: it) -> Array:
    """Returns the float32 values ``[layers, inputs, columns]``, or what ``then`` makes of them."""
    quantizer, codes = quantized.quantizer, quantized.codes
    if quantizer.mixes_columns and codes.shape[2] != 1:
        one = dataclasses.replace(quantized, codes=_as_one_column(codes))
        return then(dequantize(one).reshape(codes.shape))
    levels, inputs = jnp.asarray(quantizer.levels, jnp.float32), codes.shape[1]
    block_size = min(quantizer.block_size, inputs)

    def values(scales: Array) -> Array:
        scales = jnp.repeat(scales, block_size, axis=1)[:, :inputs]
        # A scale of zero gives plain zeros, whatever the level's sign.
        return jnp.where(scales == 0, 0, levels[codes] * scales)

    def exact() -> Array:
        shift = jnp.repeat(_shift_of(scales), block_size, axis=1)[:, :inputs]
        return _out_of_range(values(_in_range(scales, scales)), shift)

    plain = (scales := quantized.scales).astype(jnp.float32)
    return jax.lax.cond(_any_extreme(scales), lambda: then(exact()), lambda: then(values(plain)))


def _as_one_column(matrices: Array) -> Array:
    return matrices.reshape(matrices.shape[0], -1, 1)


# Numbers below 2**-126, the smallest normal float32, are zero to the arithmetic of some devices,
# CPUs among them, and so are the reciprocals by which they divide by numbers above 2**126. So
# scales are found and rounded as the integers that their bits are, which sort alike; and the values
# of a block whose scale is extreme are multiplied by a power of two first.
_NORMAL = 0x00800000  # 2**-126
_SMALL, _LARGE = 0x20000000, 0x7E000000  # 2**-63, 2**125
_SHIFT = 64


def _magnitude(values: Array) -> Array:
    """The bits of absolute values: int32 that sort like them, NaN last."""
    return jax.lax.bitcast_convert_type(values, jnp.int32) & jnp.int32(0x7FFFFFFF)


def _as_float(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _as_float32(scales: Array) -> Array:
    """Converts exactly; a plain conversion of bfloat16 may lose what is not normal."""
    if scales.dtype == jnp.bfloat16:
        narrow = jax.lax.bitcast_convert_type(scales, jnp.uint16)
        return _as_float(narrow.astype(jnp.uint32) << 16)
    return scales.astype(jnp.float32)


def _shift_of(scales: Array) -> Array:
    """The power of two, int32, by which a block's values are multiplied to be computed with."""
    bits = _magnitude(_as_float32(scales))
    return jnp.where(bits < _SMALL, _SHIFT, 0) - jnp.where(bits > _LARGE, _SHIFT, 0)


def _any_extreme(scales: Array) -> Array:
    """Whether any block has to be moved; blocks of zeros have not."""
    return ((_shift_of(scales) != 0) & (_magnitude(_as_float32(scales)) != 0)).any()


def _in_range(values: Array, scales: Array) -> Array:
    """Multiplies blocks, or the scales themselves, by their powers of two: exact where it counts.

    What is not normal is read as a multiple of the smallest number.
    """
    shift = _shift_of(scales)
    shift = shift if values.ndim == shift.ndim else shift[:, :, None]
    values = _as_float32(values)
    count = _magnitude(values)
    factor = jnp.where(shift > 0, 2.0**_SHIFT, jnp.where(shift < 0, 2.0**-_SHIFT, 1.0))
    smallest = jnp.where(shift > 0, 2.0 ** (_SHIFT - 149), 0.0)
    read = jnp.copysign(count.astype(jnp.float32) * smallest, values)
    return jnp.where(count < _NORMAL, read, values * factor)


def _out_of_range(values: Array, shift: Array) -> Array:
    """Inverts `_in_range`, rounding what is not normal to a multiple of the smallest number."""
    small = jnp.abs(values) < 2.0 ** (_SHIFT - 126)
    count = jnp.round(jnp.abs(values) * 2.0 ** (149 - _SHIFT)).astype(jnp.int32)
    written = jnp.copysign(_as_float(count), values)
    up = jnp.where(small, written, values * 2.0**-_SHIFT)
    return jnp.where(shift > 0, up, jnp.where(shift < 0, values * 2.0**_SHIFT, values))


def _round_to(bits: Array, dtype: str) -> Array:
    """Rounds to a dtype: to the nearest, ties to even, and at most to its largest number.

    A plain conversion there and back is one that XLA may leave out (it allows itself excess
    precision): then a simulation would compute with other scales than it sends.

    Args:
      bits: Of float32 that are not negative, int32.
      dtype: One of `SCALE_DTYPES`.
    """
    facts = jnp.finfo(dtype)
    dropped = 23 - facts.nmant
    rounded = bits
    if dropped:
        odd = (bits >> dropped) & jnp.int32(1)
        rounded = ((bits + odd + jnp.int32(2 ** (dropped - 1) - 1)) >> dropped) << dropped
    largest = int(np.float32(facts.max).view(np.uint32))
    rounded = jnp.minimum(rounded, jnp.int32(largest))
    is_number = bits <= int(np.float32(np.inf).view(np.uint32))
    rounded = jnp.where(is_number, rounded, int(np.float32(np.nan).view(np.uint32)))
    if dtype == "bfloat16":
        narrow = (rounded >> 16).astype(jnp.uint16)
        return jax.lax.bitcast_convert_type(narrow, jnp.bfloat16)
    values = _as_float(rounded)
    if dtype == "float16":
        # Below its smallest normal number its numbers are multiples of the smallest of all.
        unit = float(facts.smallest_subnormal)
        multiples = jnp.round(_as_float(bits) * (1 / unit)) * unit
        values = jnp.where(values < float(facts.tiny), multiples, values)
    return values.astype(dtype)


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
