"""Multi-head attention, with fewer key heads, rotary positions, learned biases and a cache."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedqsn_jax.core.types import Array, Key
from fedqsn_jax.models.kernels import attention_gpu, gpu_blocks
from fedqsn_jax.models.kernels.dropout import drop, words_of
from fedqsn_jax.models.language import cache as caches
from fedqsn_jax.models.language.rotary_positions import rotate
from fedqsn_jax.models.language.transformer import Execution

_CUDNN_LARGEST_HEAD = 128
_PROJECTIONS = ("query", "key", "value")


class Slots(NamedTuple):
    """Where a layer's keys and values are cached.

    Attributes:
      key: All layers' keys ``[layers, rows, slots, heads, size]``.
      value: Their values.
      layer: This layer, int32 scalar.
      used: The first free slot, int32 scalar.
    """

    key: Array
    value: Array
    layer: Array
    used: Array


class Prefix(NamedTuple):
    """Keys and values of a layer that stand for no token: all tokens of all rows attend to them.

    Attributes:
      key: ``[count, heads, size]``.
      value: The same.
      seen: Whether they are attended to at all, bool scalar.
    """

    key: Array
    value: Array
    seen: Array


class Weighting(NamedTuple):
    """How products of queries and keys become the weights of values.

    Attributes:
      scale: What products are multiplied by.
      causal: Whether query i sees keys up to i only.
      dropout_key: With a key, probabilities are dropped. JAX's attention cannot do that, so it is
        then written out here.
      rate: The rate of that.
      cap: Products stay below it, ``cap * tanh(products / cap)``; None: they may be any.
    """

    scale: float
    causal: bool
    dropout_key: Key | None = None
    rate: float = 0.0
    cap: float | None = None


class Attention(nn.Module):
    """Attention with query, key, value and output projections.

    Attributes:
      heads: Query heads.
      kv_heads: Key and value heads, a divisor of ``heads``.
      size: Width of a head.
      execution: How it is computed.
      biases: Whether query, key and value have biases.
      out_bias: Whether the output has one, and it is added here.
      rate: Dropout rate of the attention's probabilities.
      train: Whether dropout acts.
      stddev: Of the initial kernels.
      query_stddev: Of the initial query kernel; None: ``stddev``.
      scale: What products of queries and keys are multiplied by; None: ``size ** -0.5``.
      head_norm: Makes the norms of each head's queries and keys, by ``name``; None: not normed.
      cap: See `Weighting`.
      causal: Whether tokens attend to none after them. (With a cache, the mask says so.)
    """

    heads: int
    kv_heads: int
    size: int
    execution: Execution
    biases: bool = True
    out_bias: bool = True
    rate: float = 0.0
    train: bool = False
    stddev: float = 0.02
    query_stddev: float | None = None
    scale: float | None = None
    head_norm: Callable[..., nn.Module] | None = None
    cap: float | None = None
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        mask: Array | None,
        *,
        bias: Array | None = None,
        rotation: tuple[Array, Array] | None = None,
        source: Array | tuple[Array, Array] | None = None,
        memory: Slots | Prefix | None = None,
        packed: gpu_blocks.Packed | None = None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Attends.

        Args:
          hidden: ``[rows, queries, width]``.
          mask: bool, broadcasts to ``[rows, heads, queries, keys]``; None: everything is seen.
          bias: Added to the scaled products, the same shape.
          rotation: `rotary_positions.rotation_of` the positions of ``hidden``.
          source: What keys and values are made of, ``[rows, keys, width]``; or both themselves,
            ``[rows, keys, heads, size]``; None: they are made of ``hidden``.
          memory: Further keys and values. Slots are a cache, to which the new ones are written
            too; a prefix is for attention that is not causal, and ``mask`` and ``bias`` are about
            the others.
          packed: The biases, with starts laid out as the parameters here, for `attention_gpu`.

        Returns:
          ``[rows, queries, width]``, and with slots all layers' cached keys and values.
        """
        dropout_key = self.make_rng("dropout") if self.train and self.rate > 0 else None
        to_itself = source is None and memory is None and rotation is None and bias is None
        if to_itself and self._has_kernel(hidden, mask):
            attended, cached = self._attend_in_kernel(hidden, mask, dropout_key, packed), None
        else:
            query, key, value = self._projected(hidden, source, rotation)
            cached = None
            if isinstance(memory, Slots):
                all_keys, key = caches.write(memory.key, memory.layer, memory.used, key)
                all_values, value = caches.write(memory.value, memory.layer, memory.used, value)
                cached = all_keys, all_values
            elif memory is not None:
                key, value, mask = with_prefix(memory, key, value, mask)
            causal = self.causal and cached is None
            weighting = Weighting(self._scale, causal, dropout_key, self.rate, self.cap)
            attention = self.execution.attention if cached is None else "xla"
            attended = attend(query, key, value, mask, bias, weighting, attention)
        out = nn.DenseGeneral(
            hidden.shape[-1],
            axis=(-2, -1),
            use_bias=self.out_bias,
            dtype=self.execution.dtype,
            kernel_init=nn.initializers.normal(self.stddev),
            name="out",
        )
        return out(attended), cached

    @property
    def _scale(self) -> float:
        return self.size**-0.5 if self.scale is None else self.scale

    def _has_kernel(self, hidden: Array, mask: Array | None) -> bool:
        """Whether `attention_gpu` attends, of one product that makes query, key and value."""
        return (
            gpu_blocks.applies()
            and not self.is_initializing()
            and self.execution.attention == "auto"
            and self.biases
            and self.heads == self.kv_heads
            and self.head_norm is None
            and self.cap is None
            and (mask is None or mask.shape[1:3] == (1, 1))
            and attention_gpu.fits(hidden.shape[1], self.size, self.execution.dtype)
        )

    def _attend_in_kernel(
        self,
        hidden: Array,
        mask: Array | None,
        dropout_key: Key | None,
        packed: gpu_blocks.Packed | None,
    ) -> Array:
        rows, length, width = hidden.shape
        params, dtype = self.variables["params"], self.execution.dtype
        kernels = [nn.unbox(params[name]["kernel"]).reshape(width, -1) for name in _PROJECTIONS]
        # Behind a barrier, or XLA packs them twice: once for each pass.
        kernel = jax.lax.optimization_barrier(jnp.concatenate(kernels, axis=1).astype(dtype))
        product = hidden.astype(dtype) @ kernel
        biases = attention_gpu.Biases(*[each.reshape(-1) for each in _biases(params)])
        packed = gpu_blocks.Packed.of(biases) if packed is None else packed.map(_biases)
        seen = jnp.ones((1, length), bool) if mask is None else mask[:, 0, 0]
        attended = attention_gpu.self_attention(
            attention_gpu.Heads(
                self.heads,
                self.size,
                self._scale,
                self.causal,
                0.0 if dropout_key is None else self.rate,
            ),
            gpu_blocks.interpreted(),
            product,
            biases,
            packed,
            jnp.broadcast_to(seen, (rows, length)).astype(jnp.int32),
            jnp.zeros(2, jnp.uint32) if dropout_key is None else words_of(dropout_key),
        )
        return attended.reshape(rows, length, self.heads, self.size)

    def _projected(
        self,
        hidden: Array,
        source: Array | tuple[Array, Array] | None,
        rotation: tuple[Array, Array] | None,
    ) -> tuple[Array, Array, Array]:
        """Query, key and value."""
        query = self._project("query", self.heads, self.query_stddev or self.stddev)(hidden)
        if isinstance(source, tuple):
            key, value = source
        else:
            source = hidden if source is None else source
            key = self._project("key", self.kv_heads, self.stddev)(source)
            value = self._project("value", self.kv_heads, self.stddev)(source)
        if self.head_norm is not None:
            query = self.head_norm(name="query_norm")(query)
            key = self.head_norm(name="key_norm")(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return query, key, value

    def _project(self, name: str, heads: int, stddev: float) -> nn.DenseGeneral:
        return nn.DenseGeneral(
            (heads, self.size),
            use_bias=self.biases,
            dtype=self.execution.dtype,
            kernel_init=nn.initializers.normal(stddev),
            name=name,
        )


def _biases(params: Any) -> attention_gpu.Biases:
    return attention_gpu.Biases(*[params[name]["bias"] for name in _PROJECTIONS])


def with_prefix(
    prefix: Prefix, key: Array, value: Array, mask: Array | None
) -> tuple[Array, Array, Array]:
    """Puts a prefix before the keys and values of every row.

    Args:
      prefix: The prefix, of ``count`` keys.
      key: ``[rows, keys, heads, size]``.
      value: The same.
      mask: bool, broadcasts to ``[rows, heads, queries, keys]``, or None.

    Returns:
      Keys, values and mask with ``count + keys`` in place of ``keys``.
    """
    rows, keys = key.shape[:2]
    if mask is None:
        mask = jnp.ones((1, 1, 1, keys), bool)
    seen = jnp.broadcast_to(prefix.seen, (*mask.shape[:-1], len(prefix.key)))
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], keys))

    def put(first: Array, then: Array) -> Array:
        repeated = jnp.broadcast_to(first.astype(then.dtype), (rows, *first.shape))
        return jnp.concatenate([repeated, then], axis=1)

    mask = jnp.concatenate([seen, mask], axis=-1)
    return put(prefix.key, key), put(prefix.value, value), mask


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
    weighting: Weighting,
    attention: str,
) -> Array:
    """Scaled dot-product attention; a row that may attend to nothing gives something finite.

    Args:
      query: ``[rows, queries, heads, size]``.
      key: ``[rows, keys, key heads, size]``.
      value: The same.
      mask: bool, broadcasts to ``[rows, heads, queries, keys]``, or None.
      bias: Added to the scaled products, the same shape, or None. Where there is one, XLA's
        attention is used: cuDNN's has no gradients for a bias that is masked too.
      weighting: How products become weights.
      attention: See `Execution`; ``cudnn`` on another device is a ValueError.

    Returns:
      ``[rows, queries, heads, size]``.
    """
    if weighting.dropout_key is not None or weighting.cap is not None:
        return _attend_written_out(query, key, value, mask, bias, weighting)
    if bias is not None:
        attention = "xla"
    elif attention == "auto":
        attention = "cudnn" if _cudnn_applies(query, key) else "xla"
    if attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(f"attention = 'cudnn' needs a GPU; this is a {jax.default_backend()}")
    if attention == "cudnn" and mask is not None:
        # cuDNN takes the mask as a bias and wants its last two axes whole.
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=weighting.scale,
        is_causal=weighting.causal,
        implementation="cudnn" if attention == "cudnn" else "xla",
    )


def _cudnn_applies(query: Array, key: Array) -> bool:
    """Whether cuDNN's flash attention takes these arrays, forwards and backwards."""
    size, lengths = query.shape[-1], (query.shape[1], key.shape[1])
    return (
        gpu_blocks.knows_bfloat16()
        and query.dtype == jnp.bfloat16
        and size <= _CUDNN_LARGEST_HEAD
        and size % 8 == 0
        and all(length % 2 == 0 for length in lengths)
    )


def _attend_written_out(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
    weighting: Weighting,
) -> Array:
    rows, queries, heads, size = query.shape
    keys, kv_heads = key.shape[1:3]
    grouped = query.reshape(rows, queries, kv_heads, heads // kv_heads, size)
    products = jnp.einsum(
        "bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32
    ).reshape(rows, heads, queries, keys)
    products *= weighting.scale
    if weighting.cap is not None:
        products = weighting.cap * jnp.tanh(products / weighting.cap)
    if bias is not None:
        products += jnp.broadcast_to(bias, products.shape)
    if weighting.causal:
        seen = jnp.tril(jnp.ones((1, 1, queries, keys), bool))
        mask = seen if mask is None else mask & seen
    if mask is not None:
        products = jnp.where(mask, products, -0.7 * jnp.finfo(products.dtype).max)
    probabilities = jax.nn.softmax(products).astype(value.dtype)
    if weighting.dropout_key is not None:
        probabilities = drop(weighting.dropout_key, probabilities, weighting.rate)
    probabilities = probabilities.reshape(rows, kv_heads, heads // kv_heads, queries, keys)
    attended = jnp.einsum("bkgqs,bskd->bqkgd", probabilities, value)
    return attended.reshape(rows, queries, heads, size)
