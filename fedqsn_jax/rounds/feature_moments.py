"""What clients can tell without any of the server's model: moments of public random features.

A proxy that its holder cannot mend has to be independent of the hidden model. Clients are given
random features (Rahimi and Recht, Random Features for Large-Scale Kernel Machines, 2007), which
anybody may know, and return once the sums of their products and of their products with the labels.
Sums over clients are those of all rows together, so ridge regression on them is exactly that of the
pooled rows (Fani et al., Fed3R, arXiv 2402.06460; He et al., AFL, arXiv 2405.16240).

The server translates them into its own model's features: a linear map from public to own features
is fitted on rows that the server makes up, for which it can compute both. With the translated sums
it solves its head anew. (Calibrating a head by statistics of features: Luo et al., arXiv
2106.05001, where clients have the model.)
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.types import Array, Key


class RandomFeatures(NamedTuple):
    """A layer of random features; public.

    Attributes:
      kernel: float32 ``[inputs, features]``.
      bias: float32 ``[features]``.
    """

    kernel: Array
    bias: Array


class Moments(NamedTuple):
    """Sums over rows; those of several parties are added.

    Attributes:
      rows: Number of rows.
      products: Of features with features, ``[features + 1, features + 1]``.
      labels: Of features with one-hot labels, ``[features + 1, classes]``.
    """

    rows: Array | np.ndarray | float
    products: Array | np.ndarray
    labels: Array | np.ndarray


def draw_features(key: Key, inputs: int, count: int, spread: float) -> RandomFeatures:
    """Draws a layer.

    Args:
      key: The public key.
      inputs: Number of numbers of a row.
      count: Number of features.
      spread: Standard deviation of a feature's input for rows of which each number has size 1.
    """
    kernel_key, bias_key = jax.random.split(key)
    kernel = jax.random.normal(kernel_key, (inputs, count)) * spread / jnp.sqrt(inputs)
    return RandomFeatures(kernel, jax.random.normal(bias_key, (count,)) / 2)


def feature_values(features: RandomFeatures, rows: Array) -> Array:
    """Rectified features of rows ``[rows, ...]``, and a one: ``[rows, features + 1]``."""
    flat = rows.reshape(len(rows), -1).astype(jnp.float32)
    return with_one(jax.nn.relu(flat @ features.kernel + features.bias[None]))


def with_one(values: Array) -> Array:
    """Appends a feature that is one."""
    return jnp.concatenate([values, jnp.ones((len(values), 1), values.dtype)], axis=1)


def moments_of(values: Array, labels: Array, valid: Array, classes: int) -> Moments:
    """The sums of a party's rows, float32.

    Args:
      values: Their features with the one, ``[rows, features + 1]``.
      labels: Their classes, integers ``[rows]``.
      valid: bool ``[rows]``; the others are padding.
      classes: Number of classes.
    """
    values = jnp.where(valid[:, None], values, 0)
    hot = jax.nn.one_hot(labels, classes)
    return Moments(valid.sum(dtype=jnp.float32), values.T @ values, values.T @ hot)


def total(parts: Iterable[Moments]) -> Moments:
    """The sums over several parties, float64."""
    rows, products, labels = zip(*parts, strict=True)
    return Moments(float(sum(map(float, rows))), _sum(products), _sum(labels))


def _sum(arrays: Iterable[Array | np.ndarray]) -> np.ndarray:
    return np.sum([np.asarray(array, np.float64) for array in arrays], axis=0)


def moments_bytes(features: int, classes: int) -> int:
    """Bytes that a client returns: float32, of the symmetric sums one half, the number of rows."""
    width = features + 1
    return 4 * (width * (width + 1) // 2 + width * classes + 1)


def fit_translation(public: np.ndarray, own: np.ndarray, ridge: float = 1e-4) -> np.ndarray:
    """The linear map from public to own features that is best for some rows, float64.

    Args:
      public: Their public features with the one, ``[rows, features + 1]``.
      own: Their own features with the one, ``[rows, own features + 1]``.
      ridge: The penalty, over the mean square of a public feature.
    """
    public, own = np.asarray(public, np.float64), np.asarray(own, np.float64)
    return _solve(public.T @ public, public.T @ own, ridge)


def translated(moments: Moments, translation: np.ndarray) -> Moments:
    """The sums that rows would have of features that are such a linear map of theirs."""
    products = np.asarray(moments.products, np.float64)
    labels = np.asarray(moments.labels, np.float64)
    return Moments(moments.rows, translation.T @ products @ translation, translation.T @ labels)


def solve_head(moments: Moments, ridge: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    """Kernel ``[features, classes]`` and bias ``[classes]`` of ridge regression on one-hot labels.

    Args:
      moments: The sums of all rows.
      ridge: The penalty, over the mean square of a feature.
    """
    products = np.asarray(moments.products, np.float64)
    solved = _solve(products, np.asarray(moments.labels, np.float64), ridge)
    return solved[:-1], solved[-1]


def _solve(products: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
    penalty = max(ridge * np.trace(products) / len(products), np.finfo(np.float64).tiny)
    return np.linalg.solve(products + penalty * np.eye(len(products)), targets)
