"""What a client sees: a chain of transforms of what the server has.

The pattern is optax's: a `ProxyTransform` is a NamedTuple of pure functions, made by a factory that
closes over static settings; keys are always arguments. Every stage maps a `Proxy` to a `Proxy`, so
transforms compose by `chain`. FedQSN (arXiv 2508.18911) is::

  chain(quantize(NormalFloat(4, 64)), server_mask(0.2), client_mask(0.2))

and FedAvg is ``identity()``. Probability zero is elided when the chain is built, so FedQSN without
masks and quantizer is FedAvg bit for bit.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.trees import leaves_by_path, map_by_path
from fedqsn_jax.core.types import Array, Columns, Key, Params
from fedqsn_jax.protocol import quantization
from fedqsn_jax.protocol.masks import Sampling, draw_masks, hide, spread, visible_share
from fedqsn_jax.protocol.quantization import Quantized, Quantizer
from fedqsn_jax.protocol.sites import MaskSite, Sites

_SERVER_MASK, _CLIENT_MASK = "server_mask", "client_mask"


@struct.dataclass
class Proxy:
    """What one client receives, or what it is made of on the way there.

    Invariant: zero wherever hidden (values, codes and scales), so that it can be encoded without
    knowing anything else. The value that a model sees is the tensor's times its site's scale.

    Attributes:
      params: The parameters; the kernels of quantized sites are `Quantized`, the rest plain. None
        where a tensor does not travel, because clients have it already.
      visible: bool ``[layers, columns]`` a site; a site that is absent is visible as a whole, and
        one that follows another is under that one's name.
      scale: float32 scalar a site, ``1/kappa``; a site that is absent has scale 1.
      other_rounding: Until a client's rounding is chosen (`round_by_key`), by kernel what entries
        near a cell's border are on its other side: codes, or values where it is dequantized.
      sites: The mask sites (static).
      traced: The kernels whose rounding differs from client to client (static).
    """

    params: Params
    visible: Columns
    scale: dict[str, Array]
    sites: Sites = struct.field(pytree_node=False)
    other_rounding: dict[str, Array] = struct.field(default_factory=dict)
    traced: frozenset[str] = struct.field(pytree_node=False, default=frozenset())


class ProxyTransform(NamedTuple):
    """One step from the server's parameters to a client's proxy.

    Attributes:
      init: ``(key, proxy) -> state``, once, before the first round: draws what stays secret.
      prepare: ``(state, proxy) -> proxy``, once a round, the same for every client.
      apply: ``(key, state, proxy) -> proxy``, for one client in one round. It only hides columns
        and changes scales: `select_columns` with both gives the same proxy.
      steps: The names of what it does; a chain does each at most once. Empty: it does nothing.
    """

    init: Callable[[Key, Proxy], Any]
    prepare: Callable[[Any, Proxy], Proxy]
    apply: Callable[[Key, Any, Proxy], Proxy]
    steps: tuple[str, ...] = ()


def whole_proxy(params: Params, sites: Sites) -> Proxy:
    """Returns the proxy that hides nothing: the parameters as they are."""
    return Proxy(params=params, visible={}, scale={}, sites=sites)


def identity() -> ProxyTransform:
    """Returns the transform that changes nothing: clients receive the whole model (FedAvg)."""
    return ProxyTransform(
        init=lambda key, proxy: (),
        prepare=lambda state, proxy: proxy,
        apply=lambda key, state, proxy: proxy,
    )


def chain(*transforms: ProxyTransform) -> ProxyTransform:
    """Composes transforms; each sees what the ones before it made.

    A transform derives its keys from its own name, so its draws do not depend on its neighbours.

    Raises:
      ValueError: Two transforms do the same: two masks of a kind would hide the same columns, and
        scale the others twice; a second quantizer would find nothing to do.
    """
    steps = [name for transform in transforms for name in transform.steps]
    for name in steps:
        if steps.count(name) > 1:
            raise ValueError(f"chain: {name} stands in it {steps.count(name)} times; allowed is 1")

    def init(key: Key, proxy: Proxy) -> tuple[Any, ...]:
        return tuple(transform.init(key, proxy) for transform in transforms)

    def prepare(states: tuple[Any, ...], proxy: Proxy) -> Proxy:
        for transform, state in zip(transforms, states, strict=True):
            proxy = transform.prepare(state, proxy)
        return proxy

    def apply(key: Key, states: tuple[Any, ...], proxy: Proxy) -> Proxy:
        for transform, state in zip(transforms, states, strict=True):
            proxy = transform.apply(key, state, proxy)
        return proxy

    return ProxyTransform(init=init, prepare=prepare, apply=apply, steps=tuple(steps))


def quantize(quantizer: Quantizer, tracing_margin: float = 0.0) -> ProxyTransform:
    """Quantizes the kernels of all sites that are to be, once a round for all clients.

    Biases of sites and all other tensors stay as they are.

    Args:
      quantizer: The codebook and block size.
      tracing_margin: How near to a cell's border an entry is rounded to either side, by a secret of
        each client's; see `quantization.quantize_other_way` and `round_by_key`. 0: not at all.
    """

    def prepare(state: tuple[()], proxy: Proxy) -> Proxy:
        other = {}
        if tracing_margin:
            other = _other_codes(proxy.params, quantizer, proxy.sites, tracing_margin)
        params = quantize_sites(proxy.params, quantizer, proxy.sites)
        quantized = dataclasses.replace(
            proxy, params=params, other_rounding=other, traced=frozenset(other)
        )
        # A zero has a code of its own: hide again, so that hidden columns have code zero.
        return _hide(quantized, proxy.visible)

    return identity()._replace(prepare=prepare, steps=("quantize",))


def server_mask(probability: float | Array, sampling: Sampling = "bernoulli") -> ProxyTransform:
    """Hides columns from every client for good: the mask is drawn once, in ``init``.

    Args:
      probability: The probability (or share, ``fixed_count``) of a hidden column, ``p1``.
      sampling: How the columns are chosen; see `masks.draw_masks`.
    """
    if isinstance(probability, float | int) and probability == 0:
        return identity()

    def init(key: Key, proxy: Proxy) -> Columns:
        return draw_masks(fold_in_name(key, _SERVER_MASK), proxy.sites, probability, sampling)

    def prepare(mask: Columns, proxy: Proxy) -> Proxy:
        return _hide_and_scale(proxy, mask, probability, sampling)

    return identity()._replace(init=init, prepare=prepare, steps=(_SERVER_MASK,))


def client_mask(probability: float | Array, sampling: Sampling = "bernoulli") -> ProxyTransform:
    """Hides further columns from each client, anew in each round.

    Args:
      probability: The probability (or share, ``fixed_count``) of a hidden column, ``p2``.
      sampling: How the columns are chosen; see `masks.draw_masks`.
    """
    if isinstance(probability, float | int) and probability == 0:
        return identity()

    def apply(key: Key, state: tuple[()], proxy: Proxy) -> Proxy:
        mask = draw_masks(fold_in_name(key, _CLIENT_MASK), proxy.sites, probability, sampling)
        return _hide_and_scale(proxy, mask, probability, sampling)

    return identity()._replace(apply=apply, steps=(_CLIENT_MASK,))


def quantize_sites(params: Params, quantizer: Quantizer, sites: Sites) -> Params:
    """Quantizes the kernels of all sites that are to be; `dequantize_params` inverts it."""
    kernels = sites.quantized.by_kernel

    def visit(path: str, leaf: Array) -> Array | Quantized:
        if path not in kernels:
            return leaf
        matrices = kernels[path].to_matrices(leaf)
        if leaf.dtype.itemsize == 4 or len(matrices) == 1:
            return quantization.quantize(quantizer, matrices)
        # Layer by layer, and each one converted where it is: no float32 copy is made of all.
        return jax.lax.map(functools.partial(_quantize_layer, quantizer), matrices)

    return map_by_path(visit, params)


def _quantize_layer(quantizer: Quantizer, layer: Array) -> Quantized:
    one = quantization.quantize(quantizer, jax.lax.optimization_barrier(layer)[None])
    return dataclasses.replace(one, codes=one.codes[0], scales=one.scales[0])


def _other_codes(
    params: Params, quantizer: Quantizer, sites: Sites, margin: float
) -> dict[str, Array]:
    kernels = sites.quantized.by_kernel
    return {
        path: quantization.quantize_other_way(quantizer, kernels[path].to_matrices(leaf), margin)
        for path, leaf in leaves_by_path(params).items()
        if path in kernels
    }


def round_by_key(proxy: Proxy, key: Key | None) -> Proxy:
    """Chooses one client's rounding: of entries near a border the side that a secret bit says.

    The bits depend on key and place alone, not on any value, and are the same in every round: who
    averages the copies of many rounds finds the bits of one client in all of them.

    Args:
      proxy: What the client sees, dequantized or not.
      key: The client's, of the server's secret; may be None where nothing is traced.
    """
    if not proxy.traced:
        return proxy
    assert key is not None  # Whoever composes a traced method has a key for each client.

    def visit(path: str, leaf: Array | Quantized) -> Array | Quantized:
        if path not in proxy.traced:
            return leaf
        other, bits = proxy.other_rounding[path], rounding_bits(key, proxy.sites.by_kernel[path])
        if isinstance(leaf, Quantized):
            return dataclasses.replace(leaf, codes=jnp.where(bits, other, leaf.codes))
        return jnp.where(proxy.sites.by_kernel[path].from_matrices(bits), other, leaf)

    params = map_by_path(visit, proxy.params, is_leaf=is_quantized)
    return dataclasses.replace(proxy, params=params, other_rounding={})


def rounding_bits(key: Key, site: MaskSite) -> Array:
    """A client's bits for one kernel, bool ``[layers, inputs, columns]``; True is the other side.

    Args:
      key: The client's; see `round_by_key`.
      site: The kernel's site.
    """
    count = site.layers * site.fan_in * site.columns
    words = jax.random.bits(fold_in_name(key, site.path), (-(-count // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return bits.reshape(-1)[:count].astype(bool).reshape(site.layers, site.fan_in, site.columns)


def dequantize_proxy(proxy: Proxy, but: Collection[str] = ()) -> Proxy:
    """Replaces the quantized kernels by the values that they stand for (float32, not scaled).

    Masking a dequantized proxy gives exactly the values of masking first and dequantizing then, so
    a simulation dequantizes once a round and not once a client.

    Args:
      proxy: The proxy.
      but: The paths of kernels that stay as they are; see `stored_kernels`.
    """
    params = dequantize_params(proxy.params, proxy.sites, but)
    leaves = jax.tree.leaves(proxy.params, is_leaf=is_quantized)
    kernels = leaves_by_path(proxy.params, is_leaf=is_quantized) if proxy.other_rounding else {}
    other = {
        path: _other_values(kernels[path], codes, proxy.sites.by_kernel[path])
        for path, codes in proxy.other_rounding.items()
    }
    values = dataclasses.replace(proxy, params=params, other_rounding=other)
    if any(is_quantized(leaf) and leaf.quantizer.mixes_columns for leaf in leaves):
        # There a code of zero has a value, also in a hidden column.
        return _hide(values, proxy.visible)
    return values


def _other_values(kernel: Array | Quantized, other: Array, site: MaskSite) -> Array:
    if not isinstance(kernel, Quantized):
        return other
    return site.from_matrices(quantization.dequantize(dataclasses.replace(kernel, codes=other)))


def dequantize_params(params: Params, sites: Sites, but: Collection[str] = ()) -> Params:
    """Replaces the quantized kernels of a tree, some left out, by what they stand for, float32."""

    def visit(path: str, leaf: Array | Quantized) -> Array | Quantized:
        if not isinstance(leaf, Quantized) or path in but:
            return leaf
        return sites.by_kernel[path].from_matrices(quantization.dequantize(leaf))

    return map_by_path(visit, params, is_leaf=is_quantized)


def select_columns(prepared: Proxy, visible: Columns, scale: dict[str, Array]) -> Proxy:
    """Returns what a client receives of a round's prepared proxy.

    Args:
      prepared: The proxy that is the same for every client.
      visible: What this client sees of it: `Proxy.visible`.
      scale: The factors: `Proxy.scale`.
    """
    return _hide(dataclasses.replace(prepared, visible=visible, scale=scale), visible)


def effective_params(proxy: Proxy) -> Params:
    """The parameters that the model computes with: dequantized values times the sites' scales."""
    return scale_sites(dequantize_proxy(proxy).params, proxy.sites, proxy.scale)


def scale_sites(params: Params, sites: Sites, scale: dict[str, Array]) -> Params:
    """Multiplies kernels and biases of the sites in ``scale`` by their factor."""
    columns = {
        site.path: jnp.broadcast_to(scale[site.path], (site.layers, site.columns))
        for site in sites
        if site.path in scale
    }
    return jax.tree.map(jnp.multiply, params, spread(columns, params, sites, 1))


def is_quantized(leaf: Any) -> bool:
    """True for a `Quantized` kernel; the ``is_leaf`` of walks over a proxy's parameters."""
    return isinstance(leaf, Quantized)


def _hide_and_scale(
    proxy: Proxy, mask: Columns, probability: float | Array, sampling: Sampling
) -> Proxy:
    visible, scale = dict(proxy.visible), dict(proxy.scale)
    for site in proxy.sites:
        path = site.path
        if path in mask:
            visible[path] = visible[path] & mask[path] if path in visible else mask[path]
            share = visible_share(site, probability, sampling)
            scale[path] = scale.get(path, jnp.float32(1)) / share
    return _hide(dataclasses.replace(proxy, visible=visible, scale=scale), mask)


def _hide(proxy: Proxy, visible: Columns) -> Proxy:
    other = {
        path: _hide_kernel(codes, proxy.sites.by_kernel[path], visible)
        for path, codes in proxy.other_rounding.items()
    }
    params = hide(proxy.params, proxy.sites, visible)
    return dataclasses.replace(proxy, params=params, other_rounding=other)


def _hide_kernel(kernel: Array, site: MaskSite, visible: Columns) -> Array:
    if site.mask_path not in visible:
        return kernel
    seen = visible[site.mask_path]
    is_codes = kernel.dtype == jnp.uint8
    seen = seen[:, None, :] if is_codes else site.to_tensor(site.path, seen)
    return jnp.where(seen, kernel, jnp.zeros((), kernel.dtype))
