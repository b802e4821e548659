"""The output layer and its cross-entropy, which need not hold the logits of a whole vocabulary.

Float32 logits of 1,024 tokens and a vocabulary of 128,256 take half a gigabyte, and their gradient
as much again. `token_losses` goes through the vocabulary in blocks: forward it keeps the running
logarithm of the sum of exponentials and the target's logit, backward it computes each block's
logits again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from fedqsn_jax.core.types import Array

LARGE_VOCABULARY = 32768
"""From this number of tokens on, training goes through the vocabulary in blocks."""
_BLOCK = 16384
"""The most tokens of a block."""


@struct.dataclass
class Unprojected:
    """Hidden states with the output layer that makes logits of them.

    Attributes:
      hidden: ``[rows, length, width]``, in the dtype of the product.
      kernel: ``[width, vocab]``, or an embedding ``[vocab, width]``, in the dtype of the parameter.
      axis: Which axis of the kernel has the width (static).
      cap: What logits are kept below; None: nothing (static).
    """

    hidden: Array
    kernel: Array
    axis: int = struct.field(pytree_node=False)
    cap: float | None = struct.field(pytree_node=False, default=None)

    def logits(self) -> Array:
        """Returns float32 logits ``[rows, length, vocab]``."""
        return capped(project(self.hidden, self.kernel, self.axis), self.cap)


def project(hidden: Array, kernel: Array, axis: int) -> Array:
    """Returns float32 ``[..., vocab]`` of hidden states, multiplied in their dtype.

    Args:
      hidden: ``[..., width]``.
      kernel: The output layer's.
      axis: Which of its two axes has the width.
    """
    contraction = (((hidden.ndim - 1,), (axis,)), ((), ()))
    kernel = kernel.astype(hidden.dtype)
    return jax.lax.dot_general(hidden, kernel, contraction, preferred_element_type=jnp.float32)


def capped(logits: Array, cap: float | None) -> Array:
    """Keeps logits below a cap, smoothly, if there is one."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def token_losses(outputs: Unprojected, tokens: Array, smoothing: float = 0.0) -> Array:
    """Returns the cross-entropy of each position, float32 nats ``[rows, length]``.

    Args:
      outputs: What makes the logits.
      tokens: The right tokens, int32 ``[rows, length]``; what is lost at an id outside the
        vocabulary means nothing, and is to be ignored.
      smoothing: Share of the target that is spread evenly over the vocabulary.
    """
    vocabulary = outputs.kernel.shape[1 - outputs.axis]
    blocks = -(-vocabulary // _BLOCK)
    how = _How(outputs.axis, outputs.cap, smoothing, vocabulary, -(-vocabulary // blocks), blocks)
    hidden = outputs.hidden.reshape(-1, outputs.hidden.shape[-1])
    return _losses(how, hidden, outputs.kernel, tokens.reshape(-1)).reshape(tokens.shape)


class _How(NamedTuple):
    """What is static: `Unprojected`'s, and the vocabulary in so many blocks of one size."""

    axis: int
    cap: float | None
    smoothing: float
    vocabulary: int
    size: int
    blocks: int

    def place(self, index: Array) -> tuple[Array, Array]:
        """Where a block begins, and which of its tokens no block before it has had."""
        start = jnp.minimum(index * self.size, self.vocabulary - self.size)
        return start, start + jnp.arange(self.size) >= index * self.size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(how: _How, hidden: Array, kernel: Array, targets: Array) -> Array:
    return _forward(how, hidden, kernel, targets)[0]


def _forward(
    how: _How, hidden: Array, kernel: Array, targets: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    def one(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        largest, total, at_target, sums = carry
        start, fresh = how.place(index)
        block = jax.lax.dynamic_slice_in_dim(kernel, start, how.size, 1 - how.axis)
        logits = capped(project(hidden, block, how.axis), how.cap)
        known = jnp.where(fresh[None], logits, -jnp.inf)
        peak = jnp.maximum(largest, known.max(axis=1))
        total = total * jnp.exp(largest - peak) + jnp.exp(known - peak[:, None]).sum(axis=1)
        is_target = _is_target(targets, start, fresh)
        at_target += jnp.where(is_target, logits, 0).sum(axis=1)
        if how.smoothing:
            sums += jnp.where(fresh[None], logits, 0).sum(axis=1)
        return peak, total, at_target, sums

    zeros = jnp.zeros(hidden.shape[0], jnp.float32)
    first = (jnp.full_like(zeros, -jnp.inf), zeros, zeros, zeros)
    peak, total, at_target, sums = jax.lax.fori_loop(0, how.blocks, one, first)
    whole = peak + jnp.log(total)
    if how.smoothing:
        share = how.smoothing
        at_target = (1 - share) * at_target + share * sums / how.vocabulary
    return whole - at_target, (hidden, kernel, targets, whole)


def _backward(
    how: _How, kept: tuple[Array, Array, Array, Array], slope: Array
) -> tuple[Array, Array, None]:
    hidden, kernel, targets, whole = kept
    axis = how.axis

    def one(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        by_hidden, by_kernel = carry
        start, fresh = how.place(index)
        block = jax.lax.dynamic_slice_in_dim(kernel, start, how.size, 1 - axis)
        logits, uncap = jax.vjp(lambda raw: capped(raw, how.cap), project(hidden, block, axis))
        wanted = (1 - how.smoothing) * _is_target(targets, start, fresh)
        wanted += how.smoothing / how.vocabulary
        by_logits = slope[:, None] * (jnp.exp(logits - whole[:, None]) - wanted)
        (raw,) = uncap(jnp.where(fresh[None], by_logits, 0))
        raw = raw.astype(hidden.dtype)
        by_hidden += project(raw, block, 1 - axis)
        left, right = (raw, hidden) if axis else (hidden, raw)
        by_block = jax.lax.dot_general(
            left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        old = jax.lax.dynamic_slice_in_dim(by_kernel, start, how.size, 1 - axis)
        new = (old + by_block).astype(by_kernel.dtype)
        by_kernel = jax.lax.dynamic_update_slice_in_dim(by_kernel, new, start, 1 - axis)
        return by_hidden, by_kernel

    first = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(kernel)
    by_hidden, by_kernel = jax.lax.fori_loop(0, how.blocks, one, first)
    return by_hidden.astype(hidden.dtype), by_kernel, None


def _is_target(targets: Array, start: Array, fresh: Array) -> Array:
    columns = start + jnp.arange(fresh.shape[0])
    return (targets[:, None] == columns[None]) & fresh[None]


_losses.defvjp(_forward, _backward)
