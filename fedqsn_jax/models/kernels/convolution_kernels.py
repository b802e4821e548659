"""Kernels of `convolution_gpu`, in Pallas for the Triton compiler.

A program works on 2x2 tiles of outputs, so that ReLU and 2x2 max-pooling happen in registers, and
gathers the patches of one tap after the other. Images are ``[rows * height * width, channels]`` and
kernels ``[taps, out, in]``, taps in the order of the window: with the input channels last both
operands of a product lie as tensor cores take them. Clients are a ``vmap`` axis, of which
``pallas_call`` makes an axis of the grid.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels.convolution_blocks import div, load_rows, rem, store_rows
from fedqsn_jax.models.kernels.gpu_blocks import grid_of, span
from fedqsn_jax.models.kernels.triton_backend import pallas as pl
from fedqsn_jax.models.kernels.triton_backend import triton

STOPPED = 4
"""Index of windows whose maximum is not positive, in which no gradient flows."""
LEAST_CHANNELS = 16
"""What a tensor core takes at once."""
_Fetch = Callable[[Any, Any], Array]
_Four = tuple[Array, Array, Array, Array]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The shapes of one convolution with step 1.

    Attributes:
      rows: Number of images.
      in_size: Height and width of the images.
      out_size: Height and width of the outputs.
      window: Height and width of the kernel.
      before: Rows of padding above and columns left of the images.
      inputs: Input channels.
      outputs: Output channels.
    """

    rows: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    window: tuple[int, int]
    before: tuple[int, int]
    inputs: int
    outputs: int

    def transposed(self) -> "Geometry":
        """The convolution that maps cotangents of the outputs to cotangents of the inputs."""
        height, width = self.window
        before = height - 1 - self.before[0], width - 1 - self.before[1]
        return Geometry(
            self.rows, self.out_size, self.in_size, self.window, before, self.outputs, self.inputs
        )

    @property
    def tiles(self) -> int:
        """Number of 2x2 tiles of outputs; those at odd edges stick out."""
        return self.rows * math.prod(-(-size // 2) for size in self.out_size)


@dataclasses.dataclass(frozen=True)
class _Launch:
    """How a kernel is cut: tiles and channels a program, and the compiler's settings."""

    tiles: int
    inputs: int
    outputs: int
    warps: int
    stages: int = 1


# Measured on an H200 with 34 clients, 20 rows, 26x26x32 to 24x24x64.
_FORWARD = _Launch(tiles=64, inputs=32, outputs=64, warps=4, stages=3)
_UNPOOLING = _Launch(tiles=64, inputs=32, outputs=64, warps=4)
_KERNEL_GRADIENT = _Launch(tiles=32, inputs=32, outputs=64, warps=4, stages=2)
_TILES_A_SPLIT = 192
_MOST_SPLITS = 16


def correlate(
    geometry: Geometry,
    precision: jax.lax.Precision,
    interpret: bool,
    images: Array,
    kernel: Array,
    *,
    bias: Array | None = None,
    which: Array | None = None,
) -> Any:
    """Convolves flat images; with a bias also pools, with ``which`` un-pools the images first.

    Returns:
      Flat outputs; with a bias those and the uint8 index of each window's maximum.
    """
    launch = _fitted(_FORWARD if which is None else _UNPOOLING, geometry)
    size = geometry.out_size if bias is None else halved(geometry.out_size)
    flat = geometry.rows * math.prod(size), geometry.outputs
    shapes = [jax.ShapeDtypeStruct(flat, images.dtype)]
    if bias is not None:
        shapes.append(jax.ShapeDtypeStruct(flat, jnp.uint8))
    optional = {"which": which, "kernel": kernel, "bias": bias}
    operands = {name: array for name, array in optional.items() if array is not None}
    names = ("images", *operands, "outputs", *(("maxima",) if bias is not None else ()))

    def body(*refs: Any) -> None:
        _correlate_kernel(geometry, launch, precision, **dict(zip(names, refs, strict=True)))

    outputs = pl.pallas_call(
        body,
        shapes,
        grid=(-(-geometry.tiles // launch.tiles) * (geometry.outputs // launch.outputs),),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        name="convolution",
    )(images, *operands.values())
    return outputs[0] if bias is None else outputs


def _correlate_kernel(
    geometry: Geometry,
    launch: _Launch,
    precision: jax.lax.Precision,
    *,
    images: Any,
    kernel: Any,
    outputs: Any,
    which: Any = None,
    bias: Any = None,
    maxima: Any = None,
) -> None:
    height, width = geometry.window
    program, parts = pl.program_id(0), geometry.outputs // launch.outputs
    tiles = _Tiles(div(program, parts) * launch.tiles, launch.tiles, geometry)
    columns = span(rem(program, parts) * launch.outputs, launch.outputs)
    taps, blocks = height * width, geometry.inputs // launch.inputs

    def fetching(block: Any) -> tuple[_Fetch, Array]:
        channels = span(block * launch.inputs, launch.inputs)
        return _fetching(tiles, geometry.in_size, images, which, channels), channels

    def add_tap(
        fetch: _Fetch, channels: Array, tap: Any, row: Any, column: Any, sums: _Four
    ) -> _Four:
        weights = _load_tap(kernel, tap, channels, columns)

        def add(place: int, values: Array) -> Array:
            down = place // 2 + row - geometry.before[0]
            right = place % 2 + column - geometry.before[1]
            return values + _product(fetch(down, right), weights, precision)

        first, second, third, fourth = sums
        return add(0, first), add(1, second), add(2, third), add(3, fourth)

    def add_step(step: Array, sums: _Four) -> _Four:
        tap = div(step, blocks)
        fetch, channels = fetching(rem(step, blocks))
        return add_tap(fetch, channels, tap, div(tap, width), rem(tap, width), sums)

    def add_block(block: Array, sums: _Four) -> _Four:
        fetch, channels = fetching(block)
        for tap in range(taps):
            sums = add_tap(fetch, channels, tap, *divmod(tap, width), sums)
        return sums

    zeros = jnp.zeros((launch.tiles, launch.outputs), jnp.float32)
    sums = zeros, zeros, zeros, zeros
    if which is None:
        # In a loop over taps the compiler overlaps loads with products.
        sums = jax.lax.fori_loop(0, taps * blocks, add_step, sums)
    else:
        # Written out, taps share what they load of the pooled values.
        sums = jax.lax.fori_loop(0, blocks, add_block, sums)
    if bias is None:
        for place, values in enumerate(sums):
            index, inside = tiles.places(place // 2, place % 2, geometry.out_size)
            store_rows(outputs, index, columns, inside, values)
        return
    best, index = sums[0], jnp.zeros(sums[0].shape, jnp.int32)
    for place in (1, 2, 3):
        # Strictly more: the gradient goes to the first of equal maxima, as in a native pooling.
        more = sums[place] > best
        best, index = jnp.where(more, sums[place], best), jnp.where(more, place, index)
    best += jnp.broadcast_to(bias[columns].astype(jnp.float32)[None], best.shape)
    at, inside = tiles.windows(0, 0, halved(geometry.out_size))
    store_rows(outputs, at, columns, inside, jnp.maximum(best, 0))
    store_rows(maxima, at, columns, inside, jnp.where(best > 0, index, STOPPED))


def kernel_gradient(
    geometry: Geometry,
    precision: jax.lax.Precision,
    interpret: bool,
    images: Array,
    cotangent: Array,
    which: Array | None,
) -> tuple[Array, Array]:
    """The gradients of the kernel ``[taps, in, out]`` and of a bias ``[out]``, float32."""
    launch = _fitted(_KERNEL_GRADIENT, geometry)
    splits = min(max(geometry.tiles // _TILES_A_SPLIT, 1), _MOST_SPLITS)
    blocks = geometry.inputs // launch.inputs, geometry.outputs // launch.outputs
    taps = math.prod(geometry.window)

    def body(images: Any, cotangent: Any, *rest: Any) -> None:
        *optional, gradient, bias = rest
        operands = images, cotangent, optional[0] if optional else None, gradient, bias
        _gradient_kernel(geometry, launch, precision, splits, *operands)

    gradient, bias = pl.pallas_call(
        body,
        (
            jax.ShapeDtypeStruct((splits * taps, geometry.inputs, geometry.outputs), jnp.float32),
            jax.ShapeDtypeStruct((splits * blocks[0], geometry.outputs), jnp.float32),
        ),
        grid=(splits * math.prod(blocks),),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        name="convolution_kernel_gradient",
    )(images, cotangent, *(() if which is None else (which,)))
    gradient = gradient.reshape(splits, taps, geometry.inputs, geometry.outputs)
    # Programs for other blocks of inputs have the same sums of cotangents.
    bias = bias.reshape(splits, blocks[0], geometry.outputs)[:, 0]
    return gradient.sum(axis=0), bias.sum(axis=0)


def _gradient_kernel(
    geometry: Geometry,
    launch: _Launch,
    precision: jax.lax.Precision,
    splits: int,
    images: Any,
    cotangent: Any,
    which: Any,
    gradient: Any,
    bias: Any,
) -> None:
    height, width = geometry.window
    blocks = geometry.inputs // launch.inputs, geometry.outputs // launch.outputs
    program = pl.program_id(0)
    split, block = div(program, math.prod(blocks)), rem(program, math.prod(blocks))
    channels = span(div(block, blocks[1]) * launch.inputs, launch.inputs)
    columns = span(rem(block, blocks[1]) * launch.outputs, launch.outputs)
    steps = -(-geometry.tiles // (launch.tiles * splits))

    def add_tiles(step: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        tiles = _Tiles((split * steps + step) * launch.tiles, launch.tiles, geometry)
        fetch = _fetching(tiles, geometry.in_size, images, None, channels)
        fetch_cotangent = _fetching(tiles, geometry.out_size, cotangent, which, columns)
        cotangents = [fetch_cotangent(place // 2, place % 2) for place in range(4)]
        *all_taps, flowing = sums
        first, second, third, fourth = (each.astype(jnp.float32) for each in cotangents)
        flowing += (first + second + third + fourth).sum(axis=0)
        for row in range(height + 1):
            for column in range(width + 1):
                values = fetch(row - geometry.before[0], column - geometry.before[1])
                for place, tap in _served(row, column, geometry.window):
                    all_taps[tap] += jax.lax.dot_general(
                        cotangents[place],
                        values,
                        (((0,), (0,)), ((), ())),
                        precision=precision,
                        preferred_element_type=jnp.float32,
                    )
        return *all_taps, flowing

    # Outputs are the rows: there are more of them, and tensor cores work on many rows.
    zeros = (jnp.zeros((launch.outputs, launch.inputs), jnp.float32),) * (height * width)
    sums = *zeros, jnp.zeros(launch.outputs, jnp.float32)
    *all_taps, flowing = jax.lax.fori_loop(0, steps, add_tiles, sums)
    row = split * blocks[0] + div(block, blocks[1])
    bias[jnp.full(columns.shape, row, jnp.int32), columns] = flowing
    for tap, values in enumerate(all_taps):
        at = jnp.full(values.shape, split * (height * width) + tap, jnp.int32)
        down, across = grid_of(columns, channels)
        gradient[at, across, down] = values


def _fitted(launch: _Launch, geometry: Geometry) -> _Launch:
    """The launch with blocks of channels that divide the channels; powers of two stay such."""
    return dataclasses.replace(
        launch,
        inputs=math.gcd(geometry.inputs, launch.inputs),
        outputs=math.gcd(geometry.outputs, launch.outputs),
    )


def _served(row: int, column: int, window: tuple[int, int]) -> list[tuple[int, int]]:
    """For a tile's input at ``(row, column)``: which of its outputs it serves, with which tap."""
    return [
        (2 * down + right, (row - down) * window[1] + column - right)
        for down in (0, 1)
        for right in (0, 1)
        if 0 <= row - down < window[0] and 0 <= column - right < window[1]
    ]


class _Tiles:
    """Some 2x2 tiles, one an element of int32 vectors: their image, row and column of tiles."""

    def __init__(self, first: Any, count: int, geometry: Geometry) -> None:
        self._down, self._across = (-(-size // 2) for size in geometry.out_size)
        number = span(first, count)
        self._exists = number < geometry.tiles
        self._image = div(number, self._down * self._across)
        within = rem(number, self._down * self._across)
        self._row, self._column = div(within, self._across), rem(within, self._across)

    def places(self, down: Any, right: Any, size: tuple[int, int]) -> tuple[Array, Array]:
        """Flat indices of ``(2 row + down, 2 column + right)``, and whether they exist."""
        return self._flat(2 * self._row + down, 2 * self._column + right, size)

    def windows(self, down: Any, right: Any, size: tuple[int, int]) -> tuple[Array, Array]:
        """Flat indices of ``(row + down, column + right)``, and whether they exist."""
        return self._flat(self._row + down, self._column + right, size)

    def _flat(self, row: Array, column: Array, size: tuple[int, int]) -> tuple[Array, Array]:
        exists = self._exists & (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
        return (self._image * size[0] + row) * size[1] + column, exists


def _fetching(
    tiles: _Tiles, size: tuple[int, int], values: Any, which: Any, channels: Array
) -> _Fetch:
    """Returns ``(down, right) -> [tiles, channels]``: values of images relative to tiles.

    Args:
      tiles: The tiles.
      size: Height and width of the images.
      values: A reference to flat images, or to their pooled values.
      which: None, or a reference to the index of each pooled value's place.
      channels: The channels to load.
    """
    if which is None:
        return lambda down, right: load_rows(values, *tiles.places(down, right, size), channels)

    @functools.cache
    def pooled(down: int, right: int) -> tuple[Array, Array]:
        at, exists = tiles.windows(down, right, halved(size))
        places = load_rows(which, at, exists, channels).astype(jnp.int32)
        return load_rows(values, at, exists, channels), places

    def fetch(down: int, right: int) -> Array:
        window, places = pooled(down // 2, right // 2)
        here = places == down % 2 * 2 + right % 2
        return jnp.where(here, window, jnp.zeros_like(window))

    return fetch


def _load_tap(kernel: Any, tap: Any, channels: Array, columns: Array) -> Array:
    at = grid_of(columns, channels)
    return kernel[jnp.full(at[0].shape, tap, jnp.int32), *at]


def _product(values: Array, weights: Array, precision: jax.lax.Precision) -> Array:
    return jax.lax.dot_general(
        values,
        weights,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def halved(size: tuple[int, int]) -> tuple[int, int]:
    """Returns the height and width that 2x2 windows leave of others."""
    return size[0] // 2, size[1] // 2
