"""What the language models share: embeddings, feed-forward layers, scanned stacks.

Names are chosen so that the package's mask-site rules know every family: kernels are
``attention/{query,key,value,out}`` and ``mlp/{up,gate,down}`` of a stack named ``layers``, whose
tensors carry a leading layer axis. Parameters are float32; computation is in `Execution`'s dtype,
norms, softmax and logits in float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels import gelu_gpu, gpu_blocks
from fedqsn_jax.models.kernels.dropout import Dropout
from fedqsn_jax.models.language.output_layer import Unprojected

DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "xla", "cudnn")
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Activations by the names that configurations of the transformers library use."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is computed; it changes neither its parameters nor, but for rounding, its values.

    Attributes:
      dtype: Of activations, and of kernels in matrix products: ``float32`` or ``bfloat16``.
      attention: ``xla``; ``cudnn``, cuDNN's flash attention (NVIDIA GPUs, bfloat16); or ``auto``:
        of `attention_gpu` and cuDNN the first that applies. Learned biases and caches mean XLA's,
        and so does dropout of probabilities where `attention_gpu` does not apply.
      unroll: Layers in one step of the scan over layers. Unrolling takes longer to compile and is
        faster on GPUs.
      remat: Whether a layer's activations are computed again in the backward pass.
    """

    dtype: str = "float32"
    attention: str = "auto"
    unroll: int = 1
    remat: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r}: allowed are {', '.join(DTYPES)}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention = {self.attention!r}: allowed are {', '.join(ATTENTIONS)}")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(
                f"attention = 'cudnn' with dtype = {self.dtype!r}: allowed is bfloat16"
            )
        if self.unroll < 1:
            raise ValueError(f"unroll = {self.unroll}: allowed is 1 or more")


def stack(layer: type[nn.Module], layers: int, execution: Execution) -> Callable[..., nn.Module]:
    """Returns a module class that applies ``layers`` copies of a layer, one after the other.

    Args:
      layer: A module whose ``__call__(carry, each, shared)`` returns ``(carry, None)``. ``each`` is
        a pytree with a leading layer axis, of which a layer gets its own part; ``shared`` is the
        same for all. Either may be None.
      layers: Number of copies; their parameters are stacked along a leading axis.
      execution: Unrolling and rematerialisation.
    """
    body: Any = nn.remat(layer, prevent_cse=False) if execution.remat else layer
    return nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=layers,
        unroll=min(execution.unroll, layers),
    )


def real_tokens(tokens: Array, mask: Array | None) -> Array:
    """Returns bool ``[rows, length]``: which tokens are real; all of them without a mask."""
    return jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)


def check_length(length: int, limit: int | None) -> None:
    """Raises ValueError where a sequence is longer than the positions that the model has."""
    if limit is not None and length > limit:
        raise ValueError(f"sequences of {length} tokens: the model has {limit} positions")


class Embed(nn.Module):
    """A table of embeddings ``[entries, width]``, which may also serve as the output layer.

    Attributes:
      entries: Number of rows.
      width: Their width.
      dtype: Of what is returned; rows are gathered before they are converted.
      stddev: Of the initial values.
    """

    entries: int
    width: int
    dtype: str
    stddev: float

    def setup(self) -> None:
        """Makes the table."""
        shape = (self.entries, self.width)
        self.embedding = self.param("embedding", nn.initializers.normal(self.stddev), shape)

    def __call__(self, ids: Array) -> Array:
        """Returns rows ``[..., width]`` of ids ``[...]``; NaN for ids outside the table."""
        return jnp.take(self.embedding, ids, axis=0).astype(self.dtype)

    def repeated(self, index: int, shape: tuple[int, ...]) -> Array:
        """Returns one row ``[..., width]`` for all of a shape ``[...]``.

        Its gradient is a sum: scattered, all tokens' would queue for the same few numbers.
        """
        row = self.embedding[index].reshape((1,) * len(shape) + (self.width,))
        return jnp.broadcast_to(row, (*shape, self.width)).astype(self.dtype)

    def attend(self, hidden: Array) -> Array:
        """Returns float32 logits ``[..., entries]`` of hidden states ``[..., width]``."""
        return self.unprojected(hidden).logits()

    def unprojected(self, hidden: Array) -> Unprojected:
        """Returns what makes them."""
        return Unprojected(hidden.astype(self.dtype), self.embedding, 1)


class Head(nn.Module):
    """An output layer without bias.

    Attributes:
      outputs: Number of logits.
      dtype: In which kernel and inputs are multiplied.
      stddev: Of the initial kernel.
    """

    outputs: int
    dtype: str
    stddev: float

    def __call__(self, hidden: Array) -> Array:
        """Returns float32 logits ``[..., outputs]`` of hidden states ``[..., width]``."""
        return self.unprojected(hidden).logits()

    @nn.compact
    def unprojected(self, hidden: Array) -> Unprojected:
        """Returns what makes logits ``[..., outputs]`` of hidden states ``[..., width]``."""
        shape = (hidden.shape[-1], self.outputs)
        kernel = self.param("kernel", nn.initializers.normal(self.stddev), shape)
        return Unprojected(hidden.astype(self.dtype), kernel, 0)


class Mlp(nn.Module):
    """``down(activation(up(x)))``, or gated, ``down(activation(gate(x)) * up(x))``.

    Attributes:
      inner: Width between the matrices.
      activation: A name in `ACTIVATIONS`.
      execution: How it is computed.
      gated: Whether there is a gate.
      biases: Whether the matrices have biases.
      rate: Dropout rate between the matrices.
      train: Whether dropout acts.
      stddev: Of the initial kernels.
      down_stddev: Of the initial ``down``; None: ``stddev``.
      down_bias: Whether ``down`` adds its bias; without, the caller may.
    """

    inner: int
    activation: str
    execution: Execution
    gated: bool = False
    biases: bool = True
    rate: float = 0.0
    train: bool = False
    stddev: float = 0.02
    down_stddev: float | None = None
    down_bias: bool = True

    @nn.compact
    def __call__(self, hidden: Array, packed: gpu_blocks.Packed | None = None) -> Array:
        """Returns ``[..., width]`` of hidden states ``[..., width]``.

        Args:
          hidden: The hidden states.
          packed: The biases, with starts laid out as the parameters here, for `gelu_gpu`.
        """

        def dense(
            features: int, name: str, stddev: float | None = None, biases: bool = self.biases
        ) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=biases,
                dtype=self.execution.dtype,
                kernel_init=nn.initializers.normal(stddev or self.stddev),
                name=name,
            )

        activation = ACTIVATIONS[self.activation]
        if self._fuses():
            inner = dense(self.inner, "up", biases=False)(hidden)
            bias = self.variables["params"]["up"]["bias"]
            if packed is None:
                packed = gpu_blocks.Packed.of(bias)
            else:
                packed = packed.map(lambda starts: starts["up"]["bias"])
            inner = gelu_gpu.biased_gelu(gpu_blocks.interpreted(), inner, bias, packed)
        elif self.gated:
            inner = activation(dense(self.inner, "gate")(hidden)) * dense(self.inner, "up")(hidden)
        else:
            inner = activation(dense(self.inner, "up")(hidden))
        inner = Dropout(self.rate, self.train)(inner)
        biases = self.biases and self.down_bias
        return dense(hidden.shape[-1], "down", self.down_stddev, biases)(inner)

    def _fuses(self) -> bool:
        """Whether the first bias and the activation are one kernel."""
        return (
            gpu_blocks.applies()
            and not self.is_initializing()
            and self.activation == "gelu"
            and self.biases
            and not self.gated
            and gelu_gpu.fits(self.inner, self.execution.dtype)
        )
