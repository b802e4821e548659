"""Who leaked a model: the rounding of entries near a border is a secret of each client's.

With ``tracing_margin`` the server rounds such entries to the one side or the other by bits that
only it knows, the same in every round (`protocol.proxy.round_by_key`). A model that was made of a
client's copy lies nearer to that client's sides, also after training and after averaging with other
copies: each moves an entry by less than the distance of two levels, or by chance in either
direction, while there are many entries.

Fingerprints of copies by keyed changes are old in watermarking (Cox et al., Secure Spread Spectrum
Watermarking for Multimedia, 1997); the bound on false alarms is Hoeffding's (1963).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.audit.case import Case
from fedqsn_jax.audit.replay import payloads_by_round, states
from fedqsn_jax.audit.words import NOT_TRACED
from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.core.keys import leak_tracing_key
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.core.types import Array, Key, Params
from fedqsn_jax.protocol import quantization
from fedqsn_jax.protocol.proxy import Proxy, is_quantized, rounding_bits, whole_proxy
from fedqsn_jax.rounds.federation import ServerState


class Suspect(NamedTuple):
    """What a leaked model tells of one client.

    Attributes:
      client: The client.
      round: The round, from 0 on, of the copy that agrees best.
      score: How much better it agrees than a copy with other bits would, in standard deviations or
        more.
      false_alarm: Bound of the probability that any client who had no part in the leak reaches
        this score with any of its copies.
    """

    client: int
    round: int
    score: float
    false_alarm: float


def trace(
    case: Case, leaked: Sequence[Params], done: Callable[[], None] = lambda: None
) -> list[list[Suspect]]:
    """Compares leaked models with every copy that was sent.

    Args:
      case: The run, which is replayed once for all of them.
      leaked: The plain parameters of each leaked model.
      done: Is called after every round.

    Returns:
      For each model a suspect for each client that was sent a copy, the best agreement first.

    Raises:
      ConfigError: The run gave every client the same rounding.
    """
    if not case.config.tracing_margin:
        raise ConfigError(NOT_TRACED)
    models = [
        {path: jnp.asarray(leaf) for path, leaf in leaves_by_path(params).items()}
        for params in leaked
    ]
    sent = payloads_by_round(case, range(case.data.clients))
    agreements = _make_agreements(case)
    best: list[dict[int, tuple[float, int]]] = [{} for _ in models]
    for finished, state in states(case):
        clients = sent.get(finished, [])
        if clients and finished < case.config.rounds:
            ids = jnp.asarray(clients, jnp.int32)
            for tensors, kept in zip(models, best, strict=True):
                sums, squares = map(np.asarray, agreements(state, tensors, ids))
                scores = sums / np.sqrt(np.maximum(squares, 1e-30))
                for client, score in zip(clients, scores, strict=True):
                    kept[client] = max(kept.get(client, (-math.inf, 0)), (float(score), finished))
        if finished:
            done()
    copies = sum(map(len, sent.values()))

    def suspects(kept: dict[int, tuple[float, int]]) -> list[Suspect]:
        found = [
            Suspect(client, round_index, score, false_alarm(score, copies))
            for client, (score, round_index) in kept.items()
        ]
        return sorted(found, key=lambda suspect: -suspect.score)

    return list(map(suspects, best))


def false_alarm(score: float, copies: int) -> float:
    """Bound of the probability that one of so many innocent copies has this score or a higher one.

    The bits of an innocent client are fair coins that the leaked model does not depend on, so the
    score is a sum of independent terms ``+a`` or ``-a`` over the root of the sum of all ``a * a``:
    Hoeffding's inequality gives ``exp(-score**2 / 2)`` for each copy.
    """
    if score <= 0:
        return 1.0
    return min(1.0, copies * math.exp(-score * score / 2))


def _make_agreements(case: Case) -> Callable[..., tuple[Array, Array]]:
    """Makes ``(state, leaked tensors, clients) -> (sums, sums of squares)``, float32 ``[n]``."""
    method = case.simulation.method

    @jax.jit
    def agreements(
        state: ServerState, leaked: dict[str, Array], clients: Array
    ) -> tuple[Array, Array]:
        sent = case.sent(method.broadcast.sent(state.broadcast, state.params))
        prepared = method.transform.prepare(state.transform_state, whole_proxy(sent, method.sites))

        def of_one(client: Array) -> tuple[Array, Array]:
            mask_key = method.mask_key(state.secret_key, state.round, client)
            visible = method.transform.apply(mask_key, state.transform_state, prepared).visible
            return agreement(prepared, visible, leak_tracing_key(state.secret_key, client), leaked)

        return jax.lax.map(of_one, clients)

    return agreements


def agreement(
    prepared: Proxy, visible: dict[str, Array], key: Key, leaked: dict[str, Array]
) -> tuple[Array, Array]:
    """How far the leaked entries near a border lie to the sides that a client was sent.

    A leaked entry counts by where it lies between its two sides: 1 on the client's, -1 on the other
    one or beyond it. The leaked model may be scaled: each site's factor is the one that fits best.

    Args:
      prepared: The round's proxy before client masks, not dequantized.
      visible: What the client saw of it, bool ``[layers, columns]`` a site.
      key: The client's of `round_by_key`.
      leaked: The leaked model's tensors by path; sites that are absent are left out.

    Returns:
      The sum, and the sum of squares, float32 scalars.
    """
    kernels = leaves_by_path(prepared.params, is_leaf=is_quantized)
    total, squares = jnp.float32(0), jnp.float32(0)
    for path in sorted(prepared.traced & leaked.keys()):
        site, kernel = prepared.sites.by_kernel[path], kernels[path]
        nearest = quantization.dequantize(kernel)
        other = quantization.dequantize(kernel.replace(codes=prepared.other_rounding[path]))
        found = site.to_matrices(leaked[path].astype(jnp.float32))
        seen = visible.get(site.mask_path, jnp.ones((site.layers, site.columns), bool))
        seen = seen[:, None, :] & jnp.isfinite(found)
        found = jnp.where(seen, found, 0)
        factor = (found * nearest).sum() / jnp.maximum((nearest * nearest * seen).sum(), 1e-30)
        gap = jnp.where(seen & (factor > 0), other - nearest, 0)
        position = found / jnp.where(factor > 0, factor, 1) - (nearest + other) / 2
        position = jnp.clip(2 * position / jnp.where(gap == 0, 1, gap), -1, 1)
        position = jnp.where(gap == 0, 0, position)
        total += jnp.where(rounding_bits(key, site), position, -position).sum()
        squares += (position * position).sum()
    return total, squares


def as_json(suspects: list[Suspect], accused: float) -> dict[str, Any]:
    """What ``trace.json`` holds.

    Args:
      suspects: What `trace` found.
      accused: The largest probability of a false alarm at which a client is named.
    """
    return {
        "false_alarm_allowed": accused,
        "named": [each.client for each in suspects if each.false_alarm <= accused],
        "suspects": [each._asdict() for each in suspects],
    }
