"""The four views of a model: what the owner, the server, a client and colluding clients have.

``global - proxy`` is what a client that forgets loses; ``global - attacker`` is what the method
buys.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from fedqsn_jax.core.keys import keyed_permutation
from fedqsn_jax.core.trees import combine, exclude, leaves_by_path, map_by_path, select
from fedqsn_jax.core.types import Array, Columns, Key, Params
from fedqsn_jax.protocol.masks import hide, spread
from fedqsn_jax.protocol.proxy import Proxy, effective_params, scale_sites, whole_proxy
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.protocol.stored_kernels import (
    StoredKernel,
    column_factors,
    paths_of_stored,
    split_stored,
    stored_kernels,
)


@struct.dataclass
class Attacker:
    """Colluding clients that keep everything they receive.

    Attributes:
      members: int32 ``[colluders]``, their client ids.
      copy: The latest copy of every column and tensor that one of them has received, dequantized
        and not scaled; zero where they have received nothing. None for tensors that are public, and
        for frozen ones: these are the same in every round, so `known` is enough.
      known: bool ``[layers, columns]`` a site: the columns of which they have a copy.
    """

    members: Array
    copy: Params
    known: Columns


def make_attacker(
    key: Key, population: int, colluders: int, params: Params, sites: Sites
) -> Attacker:
    """Draws the colluding clients, who know nothing yet.

    Smaller groups that are drawn with the same key are parts of larger ones.

    Args:
      key: The key of the draw.
      population: Number of clients.
      colluders: How many of them collude.
      params: The tensors that are sent and that rounds change; the others with gaps.
      sites: The mask sites.
    """
    members = keyed_permutation(key, jnp.arange(colluders, dtype=jnp.int32), population)
    known = {site.path: jnp.zeros((site.layers, site.columns), bool) for site in sites.drawing}
    return Attacker(members, jax.tree.map(jnp.zeros_like, params), known)


def received_columns(attacker: Attacker, ids: Array, visible: Columns) -> Columns:
    """What the proxies of a round teach.

    Args:
      attacker: The attacker.
      ids: The cohort, int32 ``[cohort]``; a negative one is nobody's.
      visible: The columns that each client saw, bool ``[cohort, layers, columns]`` a site; a site
        that is absent was seen by all.

    Returns:
      bool ``[layers, columns]`` a site: True where a colluder received the column; and under the
      empty name a scalar: True if a colluder took part.
    """
    member = (ids[:, None] == attacker.members[None]).any(axis=1)
    takes_part = member.any()
    received = {
        path: (visible[path] & member[:, None, None]).any(axis=0)
        if path in visible
        else jnp.broadcast_to(takes_part, known.shape)
        for path, known in attacker.known.items()
    }
    return {"": takes_part, **received}


def update_attacker(
    attacker: Attacker, received: Columns, prepared: Proxy, sites: Sites
) -> Attacker:
    """Overwrites the attacker's copy by what was received in a round.

    Args:
      attacker: The attacker before the round.
      received: What `received_columns` gives for the round.
      prepared: The round's proxy before client masks, dequantized; its values are what every
        client of the round received wherever it received anything.
      sites: The mask sites.
    """
    columns = {path: received[path] for path in attacker.known}
    now = spread(columns, attacker.copy, sites, received[""])
    copy = jax.tree.map(
        lambda old, is_new, new: (
            None if old is None else jnp.where(is_new, new, old).astype(old.dtype)
        ),
        attacker.copy,
        now,
        prepared.params,
        is_leaf=lambda leaf: leaf is None,
    )
    known = {path: seen | columns[path] for path, seen in attacker.known.items()}
    return Attacker(attacker.members, copy, known)


def has_received(attacker: Attacker) -> bool:
    """Whether any of the colluding clients has taken part so far; on the host."""
    return bool(_has_received(attacker))


def _has_received(attacker: Attacker) -> Array:
    """The same on the device, bool scalar: nobody is sent columns or tensors of zeros alone."""
    held = [leaf.any() for leaf in jax.tree.leaves((attacker.copy, attacker.known))]
    return functools.reduce(jnp.logical_or, held, jnp.bool_(False))


def attacker_params(attacker: Attacker, sites: Sites, prepared: Params | None = None) -> Params:
    """The attacker's model: its copy, each site divided by the share of it that is known.

    Args:
      attacker: The attacker.
      sites: The mask sites.
      prepared: The tensors of any round's proxy before client masks, dequantized, of which the
        frozen ones are taken, that the attacker's copy leaves out; None: it leaves out none.
    """
    scale = {
        path: jnp.where(known.any(), known.size / jnp.maximum(known.sum(), 1), 1.0)
        for path, known in attacker.known.items()
    }
    held = attacker.copy
    if prepared is None:
        return scale_sites(held, sites, scale)
    plain, stored = split_stored(whole_proxy(prepared, sites))
    frozen = exclude(plain.params, frozenset(leaves_by_path(held)))
    now = spread(attacker.known, frozen, sites, _has_received(attacker))
    frozen = jax.tree.map(
        lambda on, leaf: jnp.where(on, leaf, jnp.zeros((), leaf.dtype)), now, frozen
    )
    scaled = scale_sites(combine(held, frozen), sites, scale)
    factors = column_factors(attacker.known, scale, sites)
    return combine(scaled, stored_kernels(stored, factors, sites))


def server_params(params: Params, prepared: Proxy) -> Params:
    """The server view: the model without its hidden columns, rescaled, in full precision.

    Args:
      params: The hidden model.
      prepared: What the transform prepared: its visible columns and scales are the server mask's.
    """
    stored, sites = paths_of_stored(prepared.params), prepared.sites
    visible = hide(exclude(params, stored), sites, prepared.visible)
    scaled = scale_sites(visible, sites, prepared.scale)
    factors = column_factors(prepared.visible, prepared.scale, sites)
    kernels = map_by_path(
        lambda path, leaf: StoredKernel(leaf, factors.get(path), sites.by_kernel[path]),
        select(params, stored),
    )
    return combine(scaled, kernels)


def proxy_params(prepared: Proxy, apply: Callable[[Proxy], Proxy]) -> Params:
    """A client's model: what the transform's ``apply`` makes of the prepared proxy, rescaled."""
    plain, stored = split_stored(prepared)
    proxy = apply(plain)
    factors = column_factors(proxy.visible, proxy.scale, proxy.sites)
    return combine(effective_params(proxy), stored_kernels(stored, factors, proxy.sites))


class Views(NamedTuple):
    """What the views of one state are made of.

    Attributes:
      params: The hidden model.
      sendable: The same without the tensors that are withheld as a whole.
      prepared: The round's proxy before client masks, dequantized; frozen kernels may stay codes.
      apply: ``(key, prepared) -> proxy``: makes a client's proxy from it.
      proxy_keys: Keys ``[samples]``: the client masks that the proxy view averages over.
      attackers: The attackers by name.
    """

    params: Params
    sendable: Params
    prepared: Proxy
    apply: Callable[[Key, Proxy], Proxy]
    proxy_keys: Key
    attackers: dict[str, Attacker]


def evaluate_views(
    evaluate: Callable[[Params, Any], dict[str, Array]], rows: Any, views: Views, score: str
) -> dict[str, Array]:
    """Evaluates all views.

    Args:
      evaluate: Evaluates parameters on rows: `evaluation.Evaluator` or
        `evaluation.ClientEvaluator`.
      rows: Held-out rows, as it wants them.
      views: What they are made of.
      score: The metric whose spread over client masks is reported.

    Returns:
      float32 scalars named ``view/metric``, with ``proxy/SCORE_std`` (population standard
      deviation over the sampled client masks).
    """
    prepared = views.prepared
    results = {
        "global": evaluate(views.params, rows),
        "server": evaluate(server_params(views.sendable, prepared), rows),
    }
    samples = jax.lax.map(
        lambda key: evaluate(proxy_params(prepared, functools.partial(views.apply, key)), rows),
        views.proxy_keys,
    )
    results["proxy"] = {name: values.mean() for name, values in samples.items()}
    results["proxy"][f"{score}_std"] = samples[score].std()
    for name, attacker in views.attackers.items():
        held = attacker_params(attacker, prepared.sites, prepared.params)
        results[name] = evaluate(held, rows)
    return {
        f"{view}/{name}": value
        for view, values in results.items()
        for name, value in values.items()
    }
