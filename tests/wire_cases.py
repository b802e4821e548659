"""Models, payloads and checks that the tests of the wire format share.

The files in ``tests/goldens`` pin the bytes of version 1. After a deliberate change of the format
raise ``wire.VERSION`` and write them anew, from the root of the repository::

  python -m tests.wire_cases
"""

import hashlib
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from locations import GOLDENS

from fedqsn_jax.protocol import wire
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.proxy import Proxy
from fedqsn_jax.protocol.quantization import NormalFloat, Quantized, Uniform
from fedqsn_jax.protocol.sites import find_sites

# For what a test compiles but does not check: compiling takes most of the time of such a test.
COMPILE_FAST = {"xla_backend_optimization_level": 0}


def shapes(**tensors):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in tensors.items()}


# Name: (shapes of the parameters, site rules). The rules spell out what the names do not say.
MODELS = {
    "dense": ({"up": shapes(kernel=(9, 6), bias=(6,)), "norm": shapes(scale=(6,))}, ()),
    "no_bias": ({"up": shapes(kernel=(8, 5)), "down": shapes(kernel=(5, 8))}, ()),
    "convolution": ({"conv": shapes(kernel=(3, 2, 2, 5), bias=(5,))}, ()),
    "attention": (
        {
            "attention": {
                "query": shapes(kernel=(6, 4, 3), bias=(4, 3)),
                "key": shapes(kernel=(6, 2, 3)),
                "out": shapes(kernel=(4, 3, 6), bias=(6,)),
            },
            "norm": shapes(scale=(6,)),
        },
        (),
    ),
    "stack": (
        {
            "layers": {
                "query": shapes(kernel=(3, 4, 2, 3), bias=(3, 2, 3)),
                "out": shapes(kernel=(3, 2, 3, 4), bias=(3, 4)),
                "up": shapes(kernel=(3, 4, 5)),
            },
            "head": shapes(kernel=(4, 2), bias=(2,)),
        },
        (
            "*/query/kernel: layer input column column",
            "*/out/kernel: layer input input column",
            "*/up/kernel: layer input column",
        ),
    ),
    "whole": (
        {"embed": shapes(embedding=(7, 4)), "up": shapes(kernel=(4, 3), bias=(3,))},
        ("*/embedding: whole column input",),
    ),
}


def random_values(rng, shape, dtype):
    return rng.normal(size=shape).astype(jnp.dtype(dtype))


def random_proxy(rng, name, quantizer, dtype="float32", absent=0.2):
    """A proxy made by hand: no transform of the package had a part in it, only `find_sites`.

    A third of the masks hide everything, a third nothing; some sites have no mask at all.
    """
    template, rules = MODELS[name]
    sites = find_sites(template, rules)
    visible, scale = {}, {}
    for site in sites:
        if site.hideable and rng.random() >= absent:
            share = rng.choice([0.0, 0.5, 1.0])
            visible[site.path] = rng.random((site.layers, site.columns)) < share
            scale[site.path] = np.float32(rng.uniform(1, 9))
    kernels = {site.path: site for site in sites}
    biases = {site.bias_path: site for site in sites}

    def make(path, leaf):
        site = kernels.get(path) or biases.get(path)
        if site is None:
            return random_values(rng, leaf.shape, dtype)
        layers, inputs, columns = site.layers, site.fan_in, site.columns
        seen = visible.get(site.path, np.ones((layers, columns), bool))
        if path in biases:
            # In all models above, layers come first and columns follow in their own order.
            bias = random_values(rng, (layers, columns), dtype)
            return np.where(seen, bias, np.zeros_like(bias)).reshape(leaf.shape)
        if quantizer is not None:
            blocks = math.ceil(inputs / quantizer.block_size)
            codes = rng.integers(0, 2**quantizer.bits, (layers, inputs, columns), np.uint8)
            scales = np.abs(random_values(rng, (layers, blocks, columns), quantizer.scale_dtype))
            keep = seen[:, None, :]
            return Quantized(
                np.where(keep, codes, 0), np.where(keep, scales, np.zeros_like(scales)), quantizer
            )
        kernel = random_values(rng, (layers, inputs, columns), dtype)
        kernel = np.where(seen[:, None, :], kernel, np.zeros_like(kernel))
        if site.column_axes < site.input_axes:
            kernel = kernel.transpose(0, 2, 1)
        return kernel.reshape(leaf.shape)

    def walk(prefix, tree):
        if not isinstance(tree, dict):
            return make(prefix, tree)
        return {key: walk(f"{prefix}/{key}" if prefix else key, tree[key]) for key in tree}

    return Proxy(walk("", template), visible, scale, sites)


def assert_same(found, expected):
    """Same structure, static fields included, and at each leaf same dtype, shape and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def seal(payload):
    """Gives a tampered payload a correct length and digest, as an attacker can."""
    prefix, body = bytearray(payload[:32]), payload[48:]
    prefix[24:32] = struct.pack("<Q", len(body))
    return bytes(prefix) + hashlib.blake2b(bytes(prefix) + body, digest_size=16).digest() + body


def assert_refused(decode, payload, layout, says=""):
    with pytest.raises(ValueError, match=says) as caught:
        decode(payload, layout)
    assert "\n" not in str(caught.value)


# Goldens: small enough to write their bytes down by hand.


def dense_proxy():
    """Three columns of three inputs in 3 bits, blocks of two; the middle column is hidden."""
    template = {"dense": shapes(kernel=(3, 3), bias=(3,)), "norm": shapes(scale=(2,))}
    codes = np.array([[[1, 0, 5], [2, 0, 0], [7, 0, 3]]], np.uint8)
    scales = np.array([[[1.0, 0, 2.0], [0.5, 0, 0]]]).astype(jnp.bfloat16)
    params = {
        "dense": {
            "kernel": Quantized(codes, scales, NormalFloat(3, 2, "bfloat16")),
            "bias": np.array([0.25, 0, -4], np.float32),
        },
        "norm": {"scale": np.array([1, 3], np.float32)},
    }
    visible = {"dense/kernel": np.array([[True, False, True]])}
    return Proxy(params, visible, {"dense/kernel": np.float32(1.5625)}, find_sites(template))


def dense_update():
    delta = {
        "dense": {
            "kernel": np.array([[1, 0, 2], [3, 0, 4], [5, 0, 6]], np.float32),
            "bias": np.array([7, 0, 8], np.float32),
        },
        "norm": {"scale": np.array([9, 10], np.float32)},
    }
    return delta, dense_proxy().visible


def stacked_proxy():
    """A stack of attention queries in bfloat16, hidden a layer; an embedding in 8 bits, whole."""
    template = {
        "embed": shapes(embedding=(3, 2)),
        "query": shapes(kernel=(2, 2, 2, 2), bias=(2, 2, 2)),
    }
    rules = ("embed/embedding: whole column input", "query/kernel: layer input column column")
    seen = np.array([[1, 1, 0, 0], [0, 1, 1, 1]], bool)
    kernel = np.arange(16).reshape(2, 2, 2, 2) * seen.reshape(2, 1, 2, 2)
    bias = (np.arange(8).reshape(2, 4) * seen).reshape(2, 2, 2)
    codes = np.array([[[10, 20, 30], [40, 50, 255]]], np.uint8)
    scales = np.array([[[1, 2, 4]]], np.float32)
    params = {
        "embed": {"embedding": Quantized(codes, scales, Uniform(8, 64, "float32"))},
        "query": {"kernel": kernel.astype(jnp.bfloat16), "bias": bias.astype(np.float16)},
    }
    scale = {"query/kernel": np.float32(2)}
    return Proxy(params, {"query/kernel": seen}, scale, find_sites(template, rules))


def goldens():
    return {
        "proxy_dense.bin": wire.encode_proxy(dense_proxy()),
        "update_dense.bin": wire.encode_update(*dense_update(), Layout.of(dense_proxy())),
        "proxy_stacked.bin": wire.encode_proxy(stacked_proxy()),
    }


BODIES = {
    "proxy_dense.bin": struct.pack(
        "<B f 2f 2B 2B 4H 2f",
        *(0b101, 1.5625),
        *(0.25, -4),
        # 1, 2, 7 and 5, 0, 3, three bits each, the first lowest.
        *(0b11_010_001, 0b1, 0b11_000_101, 0b0),
        # 1, 1/2, 2 and 0 in bfloat16.
        *(0x3F80, 0x3F00, 0x4000, 0x0000),
        *(1, 3),
    ),
    "update_dense.bin": struct.pack("<B 2f 6f 2f", 0b101, 7, 8, 1, 3, 5, 2, 4, 6, 9, 10),
    "proxy_stacked.bin": struct.pack(
        "<B f 6B 3f 5e",
        *(0b1110_0011, 2),
        *(10, 40, 20, 50, 30, 255),
        *(1, 2, 4),
        *(0, 1, 5, 6, 7),
    )
    # In bfloat16, the upper half of float32. Entry (layer, input, head, feature) of the kernel
    # is 8 layer + 4 input + 2 head + feature; a column's two inputs are neighbours here.
    + b"".join(struct.pack("<f", x)[2:] for x in (0, 4, 1, 5, 9, 13, 10, 14, 11, 15)),
}


if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    for file_name, contents in goldens().items():
        (GOLDENS / file_name).write_bytes(contents)
