"""Language models' kernels for GPUs against plain JAX; without a GPU, Pallas interprets them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractDevice, AbstractMesh
from language_cases import jit

from fedqsn_jax.models.kernels import gelu_gpu, gpu_blocks
from fedqsn_jax.models.kernels.attention_gpu import Biases, Heads, self_attention
from fedqsn_jax.models.kernels.convolution import convolve
from fedqsn_jax.models.kernels.dropout import drop, words_of
from fedqsn_jax.models.kernels.gelu_gpu import biased_gelu
from fedqsn_jax.models.kernels.norm_gpu import Branch, Vectors, add_and_norm
from fedqsn_jax.models.language.attention import Prefix
from fedqsn_jax.models.language.encoder import Encoder, EncoderConfig
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.transformer import Execution
from fedqsn_jax.protocol.lora import find_adapters
from fedqsn_jax.protocol.low_rank import adapt

KEY = jax.random.key(7)
INTERPRETED = gpu_blocks.interpreted()


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def amid(vectors):
    """Packed, behind something else and with something else behind."""
    other = normal(7, seed=5)
    return gpu_blocks.Packed.of((other, vectors, other)).map(lambda starts: starts[1])


def assert_same(found, expected, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * float(scale))


def values_and_gradients(function, *arguments):
    """What it gives, and gradients of a sum in which every value has its own weight."""

    def weighted(*arguments):
        outputs = function(*arguments)
        leaves = jax.tree.leaves(outputs)
        weights = [normal(*leaf.shape, seed=9 + place) for place, leaf in enumerate(leaves)]
        return sum((leaf * each).sum() for leaf, each in zip(leaves, weights, strict=True)), outputs

    arguments_ = tuple(range(len(arguments)))
    return jit(jax.grad(weighted, arguments_, has_aux=True))(*arguments)


@pytest.mark.parametrize(
    ("length", "causal", "rate"), [(16, False, 0.0), (20, True, 0.3)], ids=["whole", "padded"]
)
def test_attention_is_softmax_of_products(length, causal, rate):
    """A row sees no token at all; a length that is no power of two; the same entries drop."""
    rows, count, size = 3, 2, 32
    width = count * size
    heads = Heads(count, size, size**-0.5, causal, rate)
    product, bias = normal(rows, length, 3 * width), normal(3 * width, seed=1)
    seen = np.ones((rows, length), np.int32)
    seen[0, -4:], seen[1, :3] = 0, 0
    seen[2] = 0

    def expected(product, bias):
        split = (product + bias[None, None]).reshape(rows, length, 3, count, size)
        query, key, value = (split[:, :, part] for part in range(3))
        products = jnp.einsum("rqhs,rkhs->rhqk", query, key) * heads.scale
        visible = jnp.asarray(seen, bool)[:, None, None] & jnp.ones((1, 1, length, 1), bool)
        if causal:
            visible &= jnp.tril(jnp.ones((length, length), bool))[None, None]
        shares = jax.nn.softmax(jnp.where(visible, products, -1e30), axis=-1)
        if rate:
            shares = drop(KEY, shares, rate)
        return jnp.einsum("rhqk,rkhs->rqhs", shares, value).reshape(rows, length, width)

    def found(product, bias):
        biases = Biases(*jnp.split(bias, 3))
        seen_, words = jnp.asarray(seen), words_of(KEY)
        return self_attention(heads, INTERPRETED, product, biases, amid(biases), seen_, words)

    ours, theirs = (values_and_gradients(each, product, bias) for each in (found, expected))
    assert_same(ours, theirs, 2e-5)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_end_of_a_branch_is_bias_dropout_sum_and_norm(rate):
    """With an odd number of tokens, and a width that is no power of two."""
    hidden, change = normal(3, 5, 24), normal(3, 5, 24, seed=1)
    vectors = [normal(24, seed=2 + place) for place in range(3)]

    def expected(hidden, change, bias, scale, offset):
        change = change + bias[None, None]
        total = hidden + (drop(KEY, change, rate) if rate else change)
        centred = total - total.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        normed = centred * inverse * scale[None, None] + offset[None, None]
        return normed, normed

    def found(hidden, change, *vectors):
        vectors, branch = Vectors(*vectors), Branch(1e-5, rate)
        return add_and_norm(
            branch, INTERPRETED, hidden, change, vectors, amid(vectors), words_of(KEY)
        )

    ours, theirs = (
        values_and_gradients(each, hidden, change, *vectors) for each in (found, expected)
    )
    assert_same(ours, theirs, 1e-5)


def test_gelu_is_the_exact_one():
    product, bias = 3 * normal(3, 5, 128), normal(128, seed=1)
    ours, theirs = (
        values_and_gradients(each, product, bias)
        for each in (
            lambda product, bias: biased_gelu(INTERPRETED, product, bias, amid(bias)),
            lambda product, bias: jax.nn.gelu(product + bias[None, None], approximate=False),
        )
    )
    assert_same(ours, theirs, 2e-6)


def exact_gelu(values):
    """Value and derivative of float32 values, by JAX's own."""
    return jax.jvp(lambda x: jax.nn.gelu(x, approximate=False), (values,), (jnp.ones_like(values),))


def gelu_and_gradients(product, bias, cotangent):
    def gelu(product, bias):
        return biased_gelu(INTERPRETED, product, bias, amid(bias))

    outputs, pull = jax.vjp(gelu, product, bias)
    return outputs, *pull(cotangent)


def test_the_derivative_of_gelu_in_bfloat16_is_one_of_its_codes():
    """From end to end: where it is least and greatest, and far out, where it is 0 and 1."""
    ends = jnp.array([-(2**0.5), 2**0.5])
    product = jnp.concatenate([ends, jnp.linspace(-12, 12, 16 * 256 - 2)])
    product = product.reshape(16, 256).astype(jnp.bfloat16)
    outputs, slope, _ = jit(gelu_and_gradients)(product, jnp.zeros(256), jnp.ones_like(product))
    assert outputs.dtype == slope.dtype == jnp.bfloat16
    value, derivative = exact_gelu(product.astype(jnp.float32))
    np.testing.assert_allclose(outputs.astype(jnp.float32), value, rtol=2**-8, atol=1e-8)
    place = 202 * np.asarray(derivative)
    expected = jnp.asarray(np.round(place) / 202, jnp.bfloat16).astype(jnp.float32)
    decided = np.abs(place - np.floor(place) - 0.5) > 1e-3
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(slope.astype(jnp.float32)[decided], expected[decided])


@pytest.mark.parametrize("tokens", [5, 64], ids=["part of a block", "whole blocks"])
def test_gelu_in_bfloat16_over_several_blocks(monkeypatch, tokens):
    """With a bias for each client, side by side; of few programs, each takes several blocks."""
    monkeypatch.setattr(gelu_gpu, "_SPLITS", 2)
    clients, columns = 2, 384
    product = normal(clients, tokens, columns).astype(jnp.bfloat16)
    cotangent = normal(clients, tokens, columns, seed=1).astype(jnp.bfloat16)
    bias = normal(clients, columns, seed=2)
    found = jit(jax.vmap(gelu_and_gradients))(product, bias, cotangent)
    value, derivative = exact_gelu(product.astype(jnp.float32) + bias[:, None])
    flowing = cotangent.astype(jnp.float32) * (np.round(202 * np.asarray(derivative)) / 202)
    outputs, to_product, to_bias = (each.astype(jnp.float32) for each in found)
    np.testing.assert_allclose(outputs, value, rtol=2**-8, atol=1e-6)
    # Where a derivative lies between two codes, rounding of the last place decides.
    far = np.abs(to_product - flowing) > 2**-8 * np.abs(flowing) + 1e-6
    assert far.mean() < 1e-3
    np.testing.assert_allclose(to_product, flowing, rtol=2**-8, atol=4.1 / 202)
    np.testing.assert_allclose(to_bias, flowing.sum(axis=1), rtol=1e-5, atol=8 / 202)


def test_instructions_of_gpus_are_in_the_program_for_one():
    """Without a GPU the other tests interpret the kernels, and see none of them."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    product = jax.ShapeDtypeStruct((16, 256), jnp.bfloat16)
    packed = gpu_blocks.Packed(jax.ShapeDtypeStruct((256,), jnp.float32), 0)

    def gelu(product, packed):
        return biased_gelu(False, product, packed.values, packed)

    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("all",), abstract_device=device)):
        lowered = jax.jit(gelu).trace(product, packed).lower(lowering_platforms=("cuda",))
    program = lowered.as_text()
    for name in ("fma.rn.f32 $0, $1, $2, $3;", "rcp.approx.ftz.f32 $0, $1;", "ex2.approx.ftz.f32"):
        assert name in program


@pytest.mark.parametrize(
    ("version", "capability", "attends", "convolves"),
    [
        ("PJRT C API\ncuda 13000", "9.0", True, True),
        ("PJRT C API\ncuda 12090", "8.0", True, True),
        ("PJRT C API\ncuda 12090", "7.5", False, False),
        # What its programs consist of is decided when they are lowered.
        ("PJRT C API\nrocm 70000", "gfx942", False, True),
    ],
)
def test_kernels_are_for_nvidias_gpus_from_ampere_on(
    monkeypatch, version, capability, attends, convolves
):
    client = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(client=client, compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert gpu_blocks.applies() == attends
    images, kernel = jnp.ones((1, 8, 8, 32)), jnp.ones((3, 3, 32, 64))
    # A new function, as JAX keeps what it has traced.
    program = str(jax.make_jaxpr(lambda *arrays: convolve(*arrays))(images, kernel))
    assert ("pallas_call" in program) == convolves
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not gpu_blocks.applies()


ENCODER = EncoderConfig("roberta", 20, 64, 2, 2, 128, positions=32, pad_token_id=1, classes=3)


def test_an_encoder_is_the_same_with_and_without_them(monkeypatch):
    """In bfloat16, in which they are used; logits and gradients of every tensor."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 20, (2, 16)), jnp.int32)
    mask = jnp.arange(16)[None] < jnp.array([[16], [11]])

    def results(execution):
        module = Encoder(ENCODER, execution)
        params = make_language_model(ENCODER).init(jax.random.key(0))
        # Initial biases are all zero, and scales one.
        leaves, structure = jax.tree.flatten(params)
        leaves = [leaf + 0.1 * normal(*leaf.shape, seed=n) for n, leaf in enumerate(leaves)]
        params = jax.tree.unflatten(structure, leaves)

        def loss(params):
            logits = module.apply({"params": params}, tokens, mask)
            return (logits * normal(2, 3)).sum(), logits

        return jit(jax.grad(loss, has_aux=True))(params)

    monkeypatch.setattr(gpu_blocks, "applies", lambda: False)
    exact = results(Execution())
    plain = results(Execution("bfloat16"))
    used = []
    monkeypatch.setattr(gpu_blocks, "applies", lambda: used.append(1) or True)
    fused = results(Execution("bfloat16"))
    assert used
    largest = max(map(np.linalg.norm, jax.tree.leaves(exact)))
    for ours, rounded, right in zip(*map(jax.tree.leaves, (fused, plain, exact)), strict=True):
        # About as far from float32 as plain bfloat16, whose last place is 2**-8. Keys' biases have
        # no gradient but for rounding.
        error, usual = (np.linalg.norm(each - right) for each in (ours, rounded))
        assert error <= 1.5 * usual + 2**-8 * max(np.linalg.norm(right), 5e-3 * largest)


def test_adapters_are_the_same_with_and_without_them(monkeypatch):
    """The kernel that makes query, key and value of one product has theirs merged."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 20, (2, 16)), jnp.int32)
    batch = {"tokens": tokens, "mask": jnp.ones((2, 16), bool)}
    shapes = make_language_model(ENCODER).init(jax.random.key(0))
    lora = find_adapters(shapes, (), (), 2, 2.0)
    leaves, structure = jax.tree.flatten(jax.eval_shape(lora.add, KEY, shapes))
    leaves = [0.1 * normal(*leaf.shape, seed=place) for place, leaf in enumerate(leaves)]
    params = jax.tree.unflatten(structure, leaves)

    def results(dtype, kernels):
        monkeypatch.setattr(gpu_blocks, "applies", lambda: kernels)
        model = make_language_model(ENCODER, Execution(dtype), 0.0)
        apply_fn, merged = adapt(lora, model.apply_fn, params, batch)

        def loss(params):
            logits = apply_fn(params, batch, None)
            return (logits * normal(2, 3)).sum(), logits

        gradient, logits = jit(jax.grad(loss, has_aux=True))(params)
        gradients = flatten_dict(gradient, sep="/")
        adapters = {path: leaf for path, leaf in gradients.items() if "_lora_" in path}
        return adapters | {"logits": logits}, {one.matrix.path for one in merged.adapters}

    exact, _ = results("float32", False)
    plain, merged = results("bfloat16", False)
    assert not merged
    fused, merged = results("bfloat16", True)
    assert merged == {f"layers/attention/{name}/kernel" for name in ("query", "key", "value")}
    assert len(exact) == 1 + 2 * len(lora.adapters)
    for name, right in exact.items():
        error, usual = (np.linalg.norm(each[name] - right) for each in (fused, plain))
        assert error <= 1.5 * usual + 2**-7 * np.linalg.norm(right), name


@pytest.mark.parametrize("prefixed", [False, True])
def test_attention_to_further_keys_is_computed_without_its_kernel(monkeypatch, prefixed):
    """The other two are used all the same."""
    monkeypatch.setattr(gpu_blocks, "applies", lambda: True)
    prefixes = Prefix(*[jnp.ones((2, 3, 2, 32))] * 2, jnp.array([False, True]))
    params = make_language_model(ENCODER).init(jax.random.key(0))
    module = Encoder(ENCODER, Execution("bfloat16"))

    def apply(params):
        further = {"prefixes": prefixes} if prefixed else {}
        return module.apply({"params": params}, jnp.full((2, 16), 5), **further)

    program = str(jax.make_jaxpr(apply)(params))
    kernels = {name: f"name={name}\n" in program for name in ("add_and_norm", "biased_gelu")}
    assert all(kernels.values())
    assert ("name=attention\n" in program) == (not prefixed)
