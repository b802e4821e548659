"""Experimental version."""
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclasses.dataclass(frozen=True)
class Geometry:
    rows: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    window: tuple[int, int]
    pad: tuple[int, int]  # before
    inputs: int
    outputs: int


@dataclasses.dataclass(frozen=True)
class Tuning:
    tiles: int = 64
    warps: int = 4
    stages: int = 2
    block_in: int = 32
    block_out: int = 64
    splits: int = 8
    order: str = "unroll"
    swap: bool = False


def _block(n, most):
    return math.gcd(n, most)


def _div(a, b):
    return jax.lax.div(a, jnp.full_like(a, b))


def _rem(a, b):
    return jax.lax.rem(a, jnp.full_like(a, b))


class _Tiles:
    """A block of 2x2 tiles of positions over [rows, height, width]."""

    def __init__(self, first, count, rows, size):
        self.across = (size[0] + 1) // 2, (size[1] + 1) // 2
        total = rows * self.across[0] * self.across[1]
        flat = first + jnp.arange(count, dtype=jnp.int32)
        per_row = self.across[0] * self.across[1]
        self.valid = flat < total
        self.row = _div(flat, per_row)
        rest = flat - self.row * per_row
        self.y = _div(rest, self.across[1])
        self.x = rest - self.y * self.across[1]
        self.total = total


def _load2(ref, index, columns, mask):
    shape = (index.shape[0], columns.shape[0])
    return plgpu.load(
        ref.at[
            jnp.broadcast_to(index[:, None], shape), jnp.broadcast_to(columns[None, :], shape)
        ],
        mask=jnp.broadcast_to(mask[:, None], shape),
        other=jnp.zeros((), ref.dtype),
    )


def _fetcher(ref, tiles, size, columns):
    """fetch(dy, dx): values at (2y+dy, 2x+dx), zero outside."""

    def fetch(dy, dx):
        y, x = 2 * tiles.y + dy, 2 * tiles.x + dx
        mask = tiles.valid
        if dy < 0:
            mask &= y >= 0
        if 2 * (tiles.across[0] - 1) + dy >= size[0]:
            mask &= y < size[0]
        if dx < 0:
            mask &= x >= 0
        if 2 * (tiles.across[1] - 1) + dx >= size[1]:
            mask &= x < size[1]
        index = (tiles.row * size[0] + y) * size[1] + x
        return _load2(ref, jnp.where(mask, index, 0), columns, mask)

    return fetch


def _unpool_fetcher(ref, which_ref, tiles, pooled_size, columns):
    """fetch(dy, dx) of the un-pooled values."""
    cache = {}

    def pooled(py, px):
        if (py, px) not in cache:
            y, x = tiles.y + py, tiles.x + px
            mask = tiles.valid
            if py < 0:
                mask &= y >= 0
            if tiles.across[0] - 1 + py >= pooled_size[0]:
                mask &= y < pooled_size[0]
            if px < 0:
                mask &= x >= 0
            if tiles.across[1] - 1 + px >= pooled_size[1]:
                mask &= x < pooled_size[1]
            index = (tiles.row * pooled_size[0] + y) * pooled_size[1] + x
            index = jnp.where(mask, index, 0)
            values = _load2(ref, index, columns, mask)
            which = _load2(which_ref, index, columns, mask)
            cache[py, px] = values, which.astype(jnp.int32)
        return cache[py, px]

    def fetch(dy, dx):
        values, which = pooled(dy // 2, dx // 2)
        return jnp.where(which == (dy % 2) * 2 + dx % 2, values, jnp.zeros_like(values))

    return fetch


def _kernel_columns(start, size):
    return start + jnp.arange(size, dtype=jnp.int32)


def _load3(ref, tap, rows, columns):
    shape = (rows.shape[0], columns.shape[0])
    return ref[
        jnp.full(shape, tap, jnp.int32),
        jnp.broadcast_to(rows[:, None], shape),
        jnp.broadcast_to(columns[None, :], shape),
    ]


def _forward(*refs, g: Geometry, t: Tuning, pool, unpool, precision):
    refs = list(refs)
    x_ref = refs.pop(0)
    which_ref = refs.pop(0) if unpool else None
    w_ref = refs.pop(0)
    bias_ref = refs.pop(0) if pool else None
    out_ref = refs.pop(0)
    which_out = refs.pop(0) if pool else None
    bk, bn = _block(g.inputs, t.block_in), _block(g.outputs, t.block_out)
    blocks_n = g.outputs // bn
    pid = pl.program_id(0)
    tiles = _Tiles(_div(pid, blocks_n) * t.tiles, t.tiles, g.rows, g.out_size)
    out_columns = _kernel_columns(_rem(pid, blocks_n) * bn, bn)
    kh, kw = g.window

    def dot(a, b):
        return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)

    def step(start, acc):
        acc = [list(acc[:2]), list(acc[2:])]
        columns = _kernel_columns(start, bk)
        if unpool:
            fetch = _unpool_fetcher(x_ref, which_ref, tiles, pooled_size(g.in_size), columns)
        else:
            fetch = _fetcher(x_ref, tiles, g.in_size, columns)
        if t.order == "unroll":
            for i in range(kh + 1):
                for j in range(kw + 1):
                    v = fetch(i - g.pad[0], j - g.pad[1])
                    for py in (0, 1):
                        for px in (0, 1):
                            dy, dx = i - py, j - px
                            if 0 <= dy < kh and 0 <= dx < kw:
                                w = _load3(w_ref, dy * kw + dx, columns, out_columns)
                                acc[py][px] += dot(v, w)
        elif t.order == "taps":
            for dy in range(kh):
                for dx in range(kw):
                    w = _load3(w_ref, dy * kw + dx, columns, out_columns)
                    for py in (0, 1):
                        for px in (0, 1):
                            v = fetch(dy + py - g.pad[0], dx + px - g.pad[1])
                            acc[py][px] += dot(v, w)
        return (*acc[0], *acc[1])

    zero = jnp.zeros((t.tiles, bn), jnp.float32)
    acc = (zero,) * 4
    if t.order == "loop":
        # one dynamic loop over taps and channel blocks, pipelined by the compiler
        nk = g.inputs // bk

        def body(s, acc):
            tap, start = _div(s, nk), _rem(s, nk) * bk
            dy, dx = _div(tap, kw), _rem(tap, kw)
            columns = _kernel_columns(start, bk)
            w = _load3(w_ref, tap, columns, out_columns)
            out = []
            for py in (0, 1):
                for px in (0, 1):
                    y = 2 * tiles.y + (dy + py - g.pad[0])
                    x = 2 * tiles.x + (dx + px - g.pad[1])
                    mask = tiles.valid
                    if g.pad[0] or g.out_size[0] % 2:
                        mask = mask & (y >= 0) & (y < g.in_size[0])
                    if g.pad[1] or g.out_size[1] % 2:
                        mask = mask & (x >= 0) & (x < g.in_size[1])
                    index = jnp.where(mask, (tiles.row * g.in_size[0] + y) * g.in_size[1] + x, 0)
                    out.append(acc[2 * py + px] + dot(_load2(x_ref, index, columns, mask), w))
            return tuple(out)

        acc = jax.lax.fori_loop(0, kh * kw * nk, body, acc)
    elif g.inputs == bk:
        acc = step(0, acc)
    else:
        acc = jax.lax.fori_loop(0, g.inputs // bk, lambda s, a: step(s * bk, a), acc)

    shape = (t.tiles, bn)
    columns = jnp.broadcast_to(out_columns[None, :], shape)

    def store(ref, index, mask, values):
        index = jnp.where(mask, index, ref.shape[0])
        plgpu.store(
            ref.at[jnp.broadcast_to(index[:, None], shape), columns],
            values.astype(ref.dtype),
            mask=jnp.broadcast_to(mask[:, None], shape),
        )

    if pool:
        best, which = acc[0], jnp.zeros(shape, jnp.int32)
        for number in (1, 2, 3):
            more = acc[number] > best
            best = jnp.where(more, acc[number], best)
            which = jnp.where(more, number, which)
        best = best + jnp.broadcast_to(bias_ref[out_columns].astype(jnp.float32)[None, :], shape)
        which = jnp.where(best > 0, which, 4)
        size = pooled_size(g.out_size)
        mask = tiles.valid & (tiles.y < size[0]) & (tiles.x < size[1])
        index = (tiles.row * size[0] + tiles.y) * size[1] + tiles.x
        store(out_ref, index, mask, jnp.maximum(best, 0))
        store(which_out, index, mask, which)
        return
    for py in (0, 1):
        for px in (0, 1):
            y, x = 2 * tiles.y + py, 2 * tiles.x + px
            mask = tiles.valid
            if g.out_size[0] % 2:
                mask = mask & (y < g.out_size[0])
            if g.out_size[1] % 2:
                mask = mask & (x < g.out_size[1])
            store(out_ref, (tiles.row * g.out_size[0] + y) * g.out_size[1] + x, mask, acc[2 * py + px])


def pooled_size(size):
    return size[0] // 2, size[1] // 2


def correlate(images, kernel, g: Geometry, t: Tuning, precision, *, bias=None, which=None, interpret=False):
    """images [rows*h*w, in] (pooled if which), kernel [kh*kw, in, out]."""
    pool, unpool = bias is not None, which is not None
    tiles = g.rows * ((g.out_size[0] + 1) // 2) * ((g.out_size[1] + 1) // 2)
    bn = _block(g.outputs, t.block_out)
    size = pooled_size(g.out_size) if pool else g.out_size
    flat = (g.rows * size[0] * size[1], g.outputs)
    out_shape = [jax.ShapeDtypeStruct(flat, images.dtype)]
    if pool:
        out_shape.append(jax.ShapeDtypeStruct(flat, jnp.uint8))
    operands = [images] + ([which] if unpool else []) + [kernel] + ([bias] if pool else [])
    kernel_fn = functools.partial(_forward, g=g, t=t, pool=pool, unpool=unpool, precision=precision)
    out = pl.pallas_call(
        kernel_fn,
        out_shape,
        grid=(-(-tiles // t.tiles) * (g.outputs // bn),),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=t.warps, num_stages=t.stages),
        name="correlate" + ("_pool" if pool else "") + ("_unpool" if unpool else ""),
    )(*operands)
    return out if pool else out[0]


def _gradient(*refs, g: Geometry, t: Tuning, unpool, precision):
    refs = list(refs)
    x_ref = refs.pop(0)
    c_ref = refs.pop(0)
    which_ref = refs.pop(0) if unpool else None
    out_ref = refs.pop(0)
    bk, bn = _block(g.inputs, t.block_in), _block(g.outputs, t.block_out)
    kh, kw = g.window
    pid = pl.program_id(0)
    blocks_n, blocks_k = g.outputs // bn, g.inputs // bk
    split = _div(pid, blocks_n * blocks_k)
    rest = _rem(pid, blocks_n * blocks_k)
    in_columns = _kernel_columns(_div(rest, blocks_n) * bk, bk)
    out_columns = _kernel_columns(_rem(rest, blocks_n) * bn, bn)
    total = g.rows * ((g.out_size[0] + 1) // 2) * ((g.out_size[1] + 1) // 2)
    steps = -(-total // (t.tiles * t.splits))

    def dot(a, b):
        if t.swap:
            a, b = b, a
        return jax.lax.dot_general(
            a, b, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    def body(s, acc):
        acc = list(acc)
        tiles = _Tiles((split * steps + s) * t.tiles, t.tiles, g.rows, g.out_size)
        fetch = _fetcher(x_ref, tiles, g.in_size, in_columns)
        if unpool:
            fetch_c = _unpool_fetcher(c_ref, which_ref, tiles, pooled_size(g.out_size), out_columns)
        else:
            fetch_c = _fetcher(c_ref, tiles, g.out_size, out_columns)
        c = [[fetch_c(py, px) for px in (0, 1)] for py in (0, 1)]
        for i in range(kh + 1):
            for j in range(kw + 1):
                v = fetch(i - g.pad[0], j - g.pad[1])
                for py in (0, 1):
                    for px in (0, 1):
                        dy, dx = i - py, j - px
                        if 0 <= dy < kh and 0 <= dx < kw:
                            acc[dy * kw + dx] += dot(v, c[py][px])
        return tuple(acc)

    shape = (bn, bk) if t.swap else (bk, bn)
    acc = (jnp.zeros(shape, jnp.float32),) * (kh * kw)
    acc = jax.lax.fori_loop(0, steps, body, acc)
    a = jnp.broadcast_to(in_columns[None, :] if t.swap else in_columns[:, None], shape)
    b = jnp.broadcast_to(out_columns[:, None] if t.swap else out_columns[None, :], shape)
    for tap in range(kh * kw):
        out_ref[jnp.full(shape, split * (kh * kw) + tap, jnp.int32), a, b] = acc[tap]


def kernel_gradient(images, cotangent, g: Geometry, t: Tuning, precision, *, which=None, interpret=False):
    """[kh*kw, in, out] float32."""
    bk, bn = _block(g.inputs, t.block_in), _block(g.outputs, t.block_out)
    taps = g.window[0] * g.window[1]
    unpool = which is not None
    out = pl.pallas_call(
        functools.partial(_gradient, g=g, t=t, unpool=unpool, precision=precision),
        jax.ShapeDtypeStruct((t.splits * taps, g.inputs, g.outputs), jnp.float32),
        grid=(t.splits * (g.inputs // bk) * (g.outputs // bn),),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=t.warps, num_stages=t.stages),
        name="kernel_gradient" + ("_unpool" if unpool else ""),
    )(images, cotangent, *([which] if unpool else []))
    return out.reshape(t.splits, taps, g.inputs, g.outputs).sum(0)
