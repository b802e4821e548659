"""A head for a hidden model by what clients tell who never receive any of it."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.api.heads import find_heads
from fedqsn_jax.api.own_rows import check_classes, check_same, read_clients, read_rows
from fedqsn_jax.core.keys import fold_in_name, root_key
from fedqsn_jax.core.trees import leaves_by_path, map_by_path
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Params
from fedqsn_jax.data.streamed import HostData
from fedqsn_jax.host.devices import computing
from fedqsn_jax.rounds.feature_moments import (
    draw_features,
    feature_values,
    fit_translation,
    moments_bytes,
    moments_of,
    solve_head,
    total,
    translated,
    with_one,
)

_MADE_UP = 20_000
"""Rows that the server makes up, mixtures of its own."""
_AT_ONCE = 500


class NewHead(NamedTuple):
    """What `head_from_moments` gives.

    Attributes:
      params: The parameters, of which only the head is another.
      bytes_down: What a client is sent: the seed of the features, their number and their spread.
      bytes_up: What it returns, once.
    """

    params: Params
    bytes_down: int
    bytes_up: int


@computing()
def head_from_moments(
    apply_fn: ApplyFn,
    params: Params,
    clients: Sequence[Mapping[str, Any]],
    private: Mapping[str, Any],
    *,
    inputs: str = "image",
    label: str = "label",
    features: int = 512,
    spread: float = 3.0,
    seed: int = 0,
) -> NewHead:
    """Solves the head of a hidden classifier anew, by clients' rows; no client gets any of it.

    Clients are told a seed, and return sums of random features of their rows
    (`rounds.feature_moments`). Nothing that is sent depends on the model, on the server's rows or
    on another client. It is for rows of which a linear function of random features says much, such
    as small images, and it changes the head alone.

    Example::

      solved = head_from_moments(apply_fn, params, clients, private)
      solved.params

    Args:
      apply_fn: ``(params, batch, key) -> outputs [rows, classes]``; `linen_apply` and `nnx_split`
        make one of a module.
      params: The hidden parameters, trained on the server's rows.
      clients: Each client's dictionary of arrays ``[rows, ...]``.
      private: The server's own rows.
      inputs: The name of the inputs, floating-point numbers.
      label: The name of the classes, integers.
      features: Number of random features.
      spread: How far they spread: larger ones bend more.
      seed: Draws the features, which are public, and the server's mixtures.

    Raises:
      ValueError: Arrays do not agree, inputs are no floating-point numbers, a label is none of the
        model's classes, the server has no rows, or the model has not one head, with a bias.
    """
    if features < 1 or not spread > 0:
        raise ValueError(f"features = {features}, spread = {spread}: allowed is 1 or more, above 0")
    population, own_rows = read_clients(clients), read_rows(private, "private")
    check_same(own_rows, population, "private")
    own = {name: jnp.asarray(array) for name, array in own_rows.items()}
    _check_arrays(own, inputs, label)
    outputs = jax.eval_shape(lambda tree, batch: apply_fn(tree, batch, None), params, own)
    check_classes(label, outputs, population, {"private": own_rows})
    kernel, bias = _head(apply_fn, params, own)
    own_values = _own_features(apply_fn, params, kernel)
    _check_linear(apply_fn, params, own, own_values(own)[:, :-1], (kernel, bias))
    sums = jax.jit(functools.partial(moments_of, classes=outputs.shape[1]))
    root = root_key(seed)
    public = draw_features(
        fold_in_name(root, "features"), int(np.prod(own[inputs].shape[1:])), features, spread
    )
    values = jax.jit(functools.partial(feature_values, public))
    theirs = total(
        sums(values(rows[inputs]), rows[label], valid) for rows, valid in _each(population)
    )
    made_up = _mixtures(own, inputs, seed)
    translation = fit_translation(
        np.asarray(values(made_up[inputs])), np.asarray(own_values(made_up))
    )
    ours = sums(own_values(own), own[label], jnp.ones(len(own[label]), bool))
    solved = solve_head(total([translated(theirs, translation), ours]))
    new = dict(zip((kernel, bias), solved, strict=True))
    replaced = map_by_path(
        lambda path, leaf: jnp.asarray(new[path], leaf.dtype) if path in new else leaf, params
    )
    # A seed of 32 bits, a number and a float.
    return NewHead(replaced, 12, moments_bytes(features, outputs.shape[1]))


def _check_arrays(rows: Batch, inputs: str, label: str) -> None:
    for name in (inputs, label):
        if name not in rows:
            raise ValueError(f"{name!r} is no array of the rows; allowed are {', '.join(rows)}")
    if not jnp.issubdtype(rows[inputs].dtype, jnp.floating):
        raise ValueError(f"{inputs!r} is {rows[inputs].dtype}; allowed are floating-point numbers")


def _head(apply_fn: ApplyFn, params: Params, rows: Batch) -> tuple[str, str]:
    """The paths of the head's kernel and bias."""
    heads, leaves = find_heads(apply_fn, params, rows, root_key(0)), leaves_by_path(params)
    if len(heads) != 1 or heads[0].bias is None or leaves[heads[0].kernel].ndim != 2:
        found = ", ".join(head.kernel for head in heads) or "none"
        raise ValueError(
            f"model: allowed is one with a single dense head, with a bias; it has {found}"
        )
    return heads[0].kernel, heads[0].bias


def _check_linear(
    apply_fn: ApplyFn, params: Params, rows: Batch, values: Array, head: tuple[str, str]
) -> None:
    """Makes sure that outputs are features times any kernel, and any bias."""
    leaves = leaves_by_path(params)
    kernel, bias = (
        jax.random.normal(jax.random.fold_in(root_key(0), index), leaves[path].shape)
        for index, path in enumerate(head)
    )
    new = dict(zip(head, (kernel, bias), strict=True))
    tree = map_by_path(lambda path, leaf: new.get(path, leaf), params)
    outputs = apply_fn(tree, rows, None)
    expected = values @ kernel + bias[None]
    if not jnp.abs(outputs - expected).max() <= 1e-2 * (1 + jnp.abs(expected).max()):
        raise ValueError(
            f"model: {head[0]} is no dense head, its outputs are no features times it; allowed is "
            f"one whose outputs are logits"
        )


def _each(population: HostData) -> Iterator[tuple[Batch, Array]]:
    """Every client's rows, padded to as many, and which of them are no padding."""
    counts = np.diff(population.offsets)
    places = np.arange(counts.max())
    for begin, count in zip(population.offsets[:-1], counts, strict=True):
        chosen = np.minimum(begin + places, population.offsets[-1] - 1)
        rows = {name: jnp.asarray(a[chosen]) for name, a in population.examples.items()}
        yield rows, jnp.asarray(places < count)


def _mixtures(rows: Batch, inputs: str, seed: int) -> Batch:
    """Rows that are made up: mixtures of two of the server's (mixup, arXiv 1710.09412)."""
    generator = np.random.default_rng([seed, 1])
    first, second = generator.integers(0, len(rows[inputs]), (2, _MADE_UP))
    shape = (_MADE_UP, *(1,) * (rows[inputs].ndim - 1))
    share = jnp.asarray(generator.uniform(size=shape), jnp.float32)
    plain = {name: array[first] for name, array in rows.items()}
    return {**plain, inputs: share * plain[inputs] + (1 - share) * rows[inputs][second]}


def _own_features(apply_fn: ApplyFn, params: Params, kernel: str) -> Any:
    """Makes ``rows -> [rows, features + 1]``: what the head is applied to, and a one.

    An output is the features times a column of the head, so they are its gradient there.
    """

    def of_row(row: Batch) -> Array:
        one = jax.tree.map(lambda array: array[None], row)

        def first_output(column: Array) -> Array:
            def put(path: str, leaf: Array) -> Array:
                return leaf.at[:, 0].set(column) if path == kernel else leaf

            return apply_fn(map_by_path(put, params), one, None)[0, 0]

        return jax.grad(first_output)(leaves_by_path(params)[kernel][:, 0])

    @jax.jit
    def of_rows(rows: Batch) -> Array:
        return with_one(jax.lax.map(of_row, rows, batch_size=_AT_ONCE))

    return of_rows
