"""Codebooks, blocks and packed codes, against published values and slow references."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedqsn_jax.protocol.quantization import (
    SCALE_DTYPES,
    NormalFloat,
    Quantized,
    Quantizer,
    SymmetricNormalFloat,
    Uniform,
    dequantize,
    pack,
    packed_size,
    quantize,
    unpack,
)

# QLoRA (arXiv 2305.14314), appendix E.
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def test_four_bits_are_the_nf4_of_qlora():
    np.testing.assert_allclose(NormalFloat(4).levels, NF4, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 8))
def test_symmetric_levels(bits):
    """NormalFloat's positive levels, zero, and the same again below it."""
    quantizer = SymmetricNormalFloat(bits)
    levels = np.array(quantizer.levels)
    assert len(levels) == 2**bits + 1 <= 2**quantizer.code_bits
    np.testing.assert_array_equal(levels, -levels[::-1])
    np.testing.assert_array_equal(
        levels[levels > 0], [x for x in NormalFloat(bits).levels if x > 0]
    )
    with pytest.raises(ValueError, match=r"^bits = 8: allowed are 1 to 7$"):
        SymmetricNormalFloat(8)


def test_blocks_along_rows_by_hand():
    """Two layers of 3 x 2, blocks of four entries row by row: the second of each has two."""
    matrices = np.array([[[1, -8], [2, 3], [4, 0.5]], [[0, 0], [0, 0], [-2, 1]]], np.float32)
    quantizer = Uniform(2, 4, "float32", "row")
    quantized = quantize(quantizer, jnp.asarray(matrices))
    np.testing.assert_array_equal(quantized.scales[..., 0], [[8, 4], [0, 2]])
    third = 1 / 3
    # Of eighths: 1 is nearest to a third, 2 and 3 too; of fourths 0.5 is.
    relative = [[[third, -1], [third, third], [1, third]], [[0, 0], [0, 0], [-1, third]]]
    scale = np.array([[[8], [8], [4]], [[0], [0], [2]]])
    np.testing.assert_allclose(dequantize(quantized), relative * scale, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^blocks_along = 'diagonal': allowed are column, row$"):
        Uniform(blocks_along="diagonal")


@pytest.mark.parametrize("bits", range(1, 9))
def test_normal_float_levels(bits):
    levels = np.array(NormalFloat(bits).levels)
    assert len(levels) == 2**bits
    assert (np.diff(levels) > 0).all()
    assert levels[0] == -1
    assert levels[-1] == 1
    if bits == 1:
        return
    half = 2 ** (bits - 1)
    assert (levels > 0).sum() == half
    assert (levels < 0).sum() == half - 1
    # The positive levels are normal quantiles at equal distances of probability: check through
    # the distribution function, of which the package uses the inverse.
    largest = 1.8481309598  # the quantile of the offset
    probabilities = np.array([0.5 * (1 + math.erf(x * largest / 2**0.5)) for x in levels])
    upper, lower = np.linspace(0.5, 0.9677083, half + 1), np.linspace(1 - 0.9677083, 0.5, half)
    np.testing.assert_allclose(probabilities[half - 1 :], upper, atol=1e-6)
    np.testing.assert_allclose(probabilities[:half], lower, atol=1e-6)


def test_uniform_levels():
    assert Uniform(1).levels == (-1.0, 1.0)
    np.testing.assert_allclose(Uniform(2).levels, [-1, -1 / 3, 1 / 3, 1])
    for bits in range(1, 9):
        steps = np.diff(Uniform(bits).levels)
        np.testing.assert_allclose(steps, 2 / (2**bits - 1), rtol=1e-9)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bits", 0), ("bits", 9), ("block_size", 0), ("scale_dtype", "int8"), ("scale_dtype", "")],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value!r}: allowed"):
        NormalFloat(**{field: value})


def test_a_quantizer_without_codebook_says_so():
    with pytest.raises(TypeError, match="NormalFloat or Uniform"):
        _ = Quantizer().levels


def test_quantizers_are_static():
    assert NormalFloat(4, 64) == NormalFloat(4, 64)
    assert hash(NormalFloat(4, 64)) == hash(NormalFloat(4, 64))
    assert NormalFloat(4, 64) != Uniform(4, 64)
    assert len(jax.tree.leaves(quantize(NormalFloat(2), jnp.ones((1, 3, 2))))) == 2


def test_by_hand():
    """One column in blocks of 2 with levels -1, -1/3, 1/3, 1; the last block has one entry."""
    matrices = jnp.asarray([4.0, -1.0, 0.0, 0.0, -0.5]).reshape(1, 5, 1)
    result = quantize(Uniform(2, 2), matrices)
    assert isinstance(result, Quantized)
    np.testing.assert_array_equal(result.scales.ravel(), [4.0, 0.0, 0.5])
    # -1/4 is nearest to -1/3.
    np.testing.assert_array_equal(result.codes.ravel()[jnp.array([0, 1, 4])], [3, 1, 0])
    np.testing.assert_allclose(dequantize(result).ravel(), [4, -4 / 3, 0, 0, -0.5], rtol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_ties_go_down(bits):
    """Zero lies between the two middle levels of an even number of equidistant ones."""
    result = quantize(Uniform(bits, 2), jnp.asarray([1.0, 0.0]).reshape(1, 2, 1))
    assert int(result.codes[0, 1, 0]) == 2 ** (bits - 1) - 1


@functools.cache
def both_ways(quantizer):
    return jax.jit(lambda matrices: quantize(quantizer, matrices)), jax.jit(dequantize)


def reference_scales(quantizer, matrices):
    """The scale of every entry's block, by slicing out one block at a time."""
    scales = np.empty(matrices.shape, np.float32)
    for layer, column in np.ndindex(matrices.shape[0], matrices.shape[2]):
        for begin in range(0, matrices.shape[1], quantizer.block_size):
            block = matrices[layer, begin : begin + quantizer.block_size, column]
            scale = np.abs(block).max().astype(jnp.dtype(quantizer.scale_dtype))
            scales[layer, begin : begin + quantizer.block_size, column] = scale
    return scales


QUANTIZERS = [
    NormalFloat(4, 8),
    NormalFloat(1, 3),
    NormalFloat(2, 16, "float16"),
    NormalFloat(3, 5, "float32"),
    NormalFloat(8, 7),
    Uniform(1, 4),
    Uniform(3, 1),
    Uniform(5, 64, "float32"),
]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_codes_are_the_nearest_levels(quantizer):
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(2, 19, 3)).astype(np.float32) * 10 ** rng.uniform(-3, 3, (2, 1, 3))
    matrices = matrices.astype(np.float32)
    forward, backward = both_ways(quantizer)
    result = forward(matrices)
    blocks = -(-19 // quantizer.block_size)
    assert (result.codes.dtype, result.codes.shape) == (jnp.uint8, (2, 19, 3))
    assert result.scales.dtype == jnp.dtype(quantizer.scale_dtype)
    assert result.scales.shape == (2, blocks, 3)
    assert quantizer.blocks(19) == blocks
    codes = np.asarray(result.codes)
    assert codes.max() < 2**quantizer.bits
    scales = reference_scales(quantizer, matrices)
    starts = np.arange(0, 19, quantizer.block_size)
    np.testing.assert_array_equal(np.asarray(result.scales, np.float32), scales[:, starts])
    levels = np.array(quantizer.levels)
    distances = np.abs(matrices[..., None].astype(np.float64) / scales[..., None] - levels)
    chosen = np.take_along_axis(distances, codes[..., None].astype(int), axis=-1)[..., 0]
    assert (chosen <= distances.min(axis=-1) + 1e-6).all()
    np.testing.assert_allclose(backward(result), levels[codes] * scales, rtol=1e-6)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    npst.arrays(
        np.float32,
        (1, 10, 2),
        elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
    )
)
def test_error_is_at_most_half_the_largest_gap(matrices):
    quantizer = NormalFloat(3, 4, "float32")
    forward, backward = both_ways(quantizer)
    error = np.abs(np.asarray(backward(forward(matrices))) - matrices)
    # Below the smallest normal number the arithmetic of the device may round to zero.
    allowed = np.diff(quantizer.levels).max() / 2 * reference_scales(quantizer, matrices)
    assert (error <= allowed * (1 + 1e-5) + np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize(
    "quantizer", [NormalFloat(4, 4), Uniform(3, 4), NormalFloat(1, 4)], ids=repr
)
def test_blocks_of_zeros_have_scale_zero(quantizer):
    matrices = np.random.default_rng(0).normal(size=(1, 8, 3)).astype(np.float32)
    matrices[0, 4:, 1] = 0
    matrices[0, :, 2] = 0
    forward, backward = both_ways(quantizer)
    result = forward(matrices)
    np.testing.assert_array_equal(
        result.scales[0] == 0, [[False, False, True], [False, True, True]]
    )
    values = np.asarray(backward(result))
    np.testing.assert_array_equal(values[matrices == 0], 0)
    assert np.isfinite(values).all()


def test_the_last_block_may_be_shorter():
    """A column of 5 entries in blocks of 4 is two columns, of 4 and of 1."""
    matrices = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)
    quantizer = NormalFloat(4, 4)
    forward, backward = both_ways(quantizer)
    whole, head, tail = forward(matrices), forward(matrices[:, :4]), forward(matrices[:, 4:])
    np.testing.assert_array_equal(whole.codes, np.concatenate([head.codes, tail.codes], axis=1))
    np.testing.assert_array_equal(whole.scales, np.concatenate([head.scales, tail.scales], axis=1))
    # Alone in its block, an entry is its own scale.
    expected = matrices[:, 4:].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(backward(whole)[:, 4:], expected)
    assert forward(matrices[:, :3]).scales.shape == (2, 1, 3), "a block longer than the column"


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 0.0])
def test_a_column_shows_in_no_other_column(value):
    """So hiding columns before quantization or after it gives the same visible codes and scales."""
    matrices = np.random.default_rng(2).normal(size=(2, 11, 6)).astype(np.float32)
    forward, backward = both_ways(NormalFloat(4, 4))
    visible = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]], bool)
    changed = np.where(visible[:, None], matrices, np.float32(value))
    for whole, other in zip(
        jax.tree.leaves(forward(matrices)), jax.tree.leaves(forward(changed)), strict=True
    ):
        seen = np.broadcast_to(visible[:, None], whole.shape)
        np.testing.assert_array_equal(np.asarray(whole)[seen], np.asarray(other)[seen])
    seen = np.broadcast_to(visible[:, None], matrices.shape)
    values = np.asarray(backward(forward(changed)))
    np.testing.assert_array_equal(values[seen], np.asarray(backward(forward(matrices)))[seen])


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_scales_are_rounded_inside_one_compiled_call_too(scale_dtype):
    """A compiler may drop a rounding to a narrow dtype and back; then simulated values would
    differ from those that are sent. At this size XLA on a CPU does, if nothing prevents it."""
    quantizer = NormalFloat(4, 16, scale_dtype)
    matrices = np.random.default_rng(3).normal(size=(1, 304, 300)).astype(np.float32)
    forward, backward = both_ways(quantizer)
    fused = jax.jit(lambda matrices: dequantize(quantize(quantizer, matrices)))(matrices)
    np.testing.assert_array_equal(fused, backward(forward(matrices)))
    scales = reference_scales(quantizer, matrices)
    relative = np.asarray(fused, np.float64) / scales
    distance = np.abs(relative[..., None] - np.array(quantizer.levels)).min(axis=-1)
    assert distance.max() < 1e-6


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("compiled", [True, False])
def test_scales_of_every_size_are_rounded_as_numpy_rounds_them(scale_dtype, compiled):
    """Devices take subnormal float32 for zero, and the reciprocals of the largest as well."""
    generator = np.random.default_rng(5)
    exponents = generator.uniform(-149, 128, 4000)
    largest = [np.float32(x) for x in np.exp2(exponents)] + [np.finfo(np.float32).max]
    largest += [*np.exp2(np.arange(-149.0, 128)), 2.0**-25 * 1.5, 65519.0, 65520.0]
    columns = np.asarray(largest, np.float32)
    shares = np.asarray([-1.0, 0.73, -0.31, 0.08, 0.0, 0.52], np.float64)
    matrices = (shares[:, None] * columns).astype(np.float32)[None]
    quantizer = NormalFloat(4, 6, scale_dtype)
    forward, backward = both_ways(quantizer)
    if not compiled:
        forward, backward = (lambda each: quantize(quantizer, each)), dequantize

    quantized = forward(jnp.asarray(matrices))

    with np.errstate(over="ignore"):
        rounded = columns.astype(jnp.dtype(scale_dtype))
    bound = jnp.finfo(scale_dtype).max
    rounded = np.where(np.isfinite(rounded.astype(np.float32)), rounded, bound)
    scales = np.asarray(quantized.scales)[0, 0]
    np.testing.assert_array_equal(scales.view(np.uint8), rounded.view(np.uint8))
    exact = rounded.astype(np.float64)
    levels = np.asarray(quantizer.levels)
    relative = matrices[0].astype(np.float64) / np.where(exact == 0, np.inf, exact)
    relative = relative.clip(-1, 1)
    nearest = levels[np.abs(relative[..., None] - levels).argmin(axis=-1)]
    values = np.asarray(backward(quantized), np.float64)[0]
    # The last bit of a subnormal number is 2**-149.
    np.testing.assert_allclose(values, nearest * exact, rtol=1e-6, atol=2.0**-149)


def test_weights_beyond_the_scales_range_stay_finite():
    """float16 ends at 65504: larger weights are cut there."""
    matrices = jnp.asarray([1e5, -1e5, 1.0, -3e4]).reshape(1, 4, 1)
    values = dequantize(quantize(NormalFloat(4, 4, "float16"), matrices)).ravel()
    np.testing.assert_array_equal(values[:2], [65504, -65504])
    assert np.isfinite(values).all()


# Invariant 7.
FIGURES = [
    (4, 64, 0.00847),
    (4, 128, 0.00913),
    (4, 256, 0.00973),
    (3, 64, 0.0406),
    (3, 128, 0.0444),
    (3, 256, 0.0475),
]


@pytest.mark.parametrize(("bits", "block_size", "expected"), FIGURES)
def test_relative_error_on_gaussian_data(bits, block_size, expected):
    matrices = np.random.default_rng(4).normal(size=(1, 1024, 512)).astype(np.float32)
    forward, backward = both_ways(NormalFloat(bits, block_size))
    error = np.asarray(backward(forward(matrices)), np.float64) - matrices
    relative = (error**2).mean() / (matrices.astype(np.float64) ** 2).mean()
    assert relative == pytest.approx(expected, rel=0.01)


# Packing.


def reference_pack(codes: list[int], bits: int) -> bytes:
    """The bit string as text, last code first, read as one number."""
    text = "".join(format(code, f"0{bits}b") for code in reversed(codes))
    return int(text or "0", 2).to_bytes(-(-len(codes) * bits // 8), "little")


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(1, 8), st.data())
def test_packing_is_the_bit_string(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack(np.array(codes, np.uint8), bits)
    assert packed.dtype == np.uint8
    assert packed.tobytes() == reference_pack(codes, bits)
    assert packed_size(len(codes), bits) == len(packed)
    np.testing.assert_array_equal(unpack(packed, bits, len(codes)), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_packed_each_on_their_own(bits):
    codes = np.random.default_rng(5).integers(0, 2**bits, (3, 2, 13)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 2, packed_size(13, bits))
    for index in np.ndindex(3, 2):
        assert packed[index].tobytes() == reference_pack(codes[index].tolist(), bits)
    unpacked = unpack(packed, bits, 13)
    assert unpacked.dtype == np.uint8
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("shape", [(0, 5), (0, 8), (3, 0), (0, 0)])
def test_no_rows_or_no_codes_pack_to_no_bytes(shape):
    packed = pack(np.zeros(shape, np.uint8), 3)
    assert packed.shape == (shape[0], packed_size(shape[1], 3))
    assert unpack(packed, 3, shape[1]).shape == shape


def test_packing_by_hand():
    np.testing.assert_array_equal(pack(np.array([1, 2, 3], np.uint8), 4), [0x21, 0x03])
    np.testing.assert_array_equal(pack(np.array([7, 0, 5], np.uint8), 3), [0b01000111, 0b1])
    np.testing.assert_array_equal(pack(np.array([1, 0, 0, 1, 1], np.uint8), 1), [0b11001])
    np.testing.assert_array_equal(pack(np.array([200, 13], np.uint8), 8), [200, 13])
