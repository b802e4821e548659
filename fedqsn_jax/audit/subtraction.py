"""Attack: the own update is subtracted from two successive proxies; what is left is the others'.

The change of the model from one round to the next is the mean of all updates. Who took part knows
his own and subtracts it (Melis et al., Exploiting Unintended Feature Leakage in Collaborative
Learning, IEEE S&P 2019). The proxies are quantized and masked, so what is left is compared with the
truth on the entries that both proxies show, by the cosine of the angle between them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.audit.case import Case
from fedqsn_jax.core.keys import client_round_key
from fedqsn_jax.core.types import Array, Params
from fedqsn_jax.data.population import single_client
from fedqsn_jax.problems.training import local_optimizer
from fedqsn_jax.protocol.masks import spread
from fedqsn_jax.protocol.proxy import Proxy
from fedqsn_jax.rounds.client import make_client_update
from fedqsn_jax.rounds.pooled_rows import client_rows


class Estimate(NamedTuple):
    """How well the others' mean update is known.

    Attributes:
      cosine: Of the angle between estimate and truth; 1 is perfect, 0 is nothing.
      compared: Share of the entries that both proxies show.
    """

    cosine: float
    compared: float


def pairs(rounds: Mapping[int, Sequence[int]], most: int = 3) -> list[int]:
    """The first rounds in which a member takes part, and one in the next round too.

    Args:
      rounds: Which members take part, by round.
      most: At most so many.
    """
    return [index for index in sorted(rounds) if index + 1 in rounds][:most]


def plays(case: Case) -> bool:
    """Whether the mean of updates is what the model changes by: the plain server step."""
    config = case.config
    server = config.server
    return (
        case.simulation.lora is None
        and config.broadcast.every == 1
        and config.broadcast.share == 1
        and server.optimizer == "sgd"
        and server.learning_rate == 1
        and server.momentum == 0
        and server.decay == "none"
        and server.rule == "delta"
        and server.normalize == "mean"
        and not server.clip_norm
        and not config.privacy.clip
        and config.cohort.sampling == "without_replacement"
        and not config.upload.bits
        and not (config.participation.dropout or config.participation.stragglers)
        and not config.participation.nan
    )


def own_updates(
    case: Case, index: int, proxies: Mapping[int, Proxy], cohort: Sequence[int]
) -> Params:
    """The members' part of a round's mean update: their deltas times their weights.

    Args:
      case: The run.
      index: The round, from 0 on.
      proxies: What each member was sent, dequantized.
      cohort: All clients of the round.
    """
    settings = case.config.client
    update = make_client_update(
        case.train_apply,
        case.task,
        local_optimizer(settings),
        settings.batch_size,
        steps=settings.steps,
        epochs=settings.epochs,
        trained=case.simulation.roles.trained,
        proximal=settings.proximal,
    )
    counts = np.asarray([_rows(case, client) for client in cohort], np.float64)
    each = counts if case.config.server.weighting == "data" else (counts > 0).astype(float)
    weights = dict(zip(cohort, each / max(each.sum(), 1), strict=True))
    total = None
    train = jax.jit(update.train)
    for client, proxy in proxies.items():
        rows = {name: jnp.asarray(a) for name, a in client_rows(case.data, client).items()}
        key = client_round_key(case.final.public_key, index, client)
        delta = train(key, proxy, single_client(rows), jnp.int32(0)).delta
        part = jax.tree.map(lambda leaf, w=weights[client]: w * leaf, delta)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total


def _rows(case: Case, client: int) -> int:
    return len(next(iter(client_rows(case.data, client).values())))


def others_update(
    before: Sequence[Proxy], after: Sequence[Proxy], own: Params
) -> tuple[Params, Params]:
    """What is left of the change between two rounds, and where both are seen.

    Args:
      before: The members' proxies of a round, dequantized, one or more.
      after: Those of the next.
      own: The members' part of the round's mean update, with gaps for frozen tensors.

    Returns:
      The estimate, and a tree of bool arrays that broadcast against it; both with gaps.
    """
    first, seen_first = _pooled(before)
    second, seen_second = _pooled(after)

    def estimate(mine: Array, old: Array, new: Array) -> Array:
        return new - old - mine

    seen = jax.tree.map(lambda _, a, b: a & b, own, seen_first, seen_second)
    return jax.tree.map(estimate, own, first, second), seen


def largest_change(proxies: Sequence[Proxy]) -> float:
    """The largest difference between two proxies of an entry that both show; 0: there is none.

    Args:
      proxies: Dequantized, of any rounds and clients.
    """
    low, high = None, None
    for proxy in proxies:
        seen = spread(proxy.visible, proxy.params, proxy.sites, True)
        ends = [
            jax.tree.map(lambda on, leaf, e=end: jnp.where(on, leaf, e), seen, proxy.params)
            for end in (jnp.inf, -jnp.inf)
        ]
        low = ends[0] if low is None else jax.tree.map(jnp.minimum, low, ends[0])
        high = ends[1] if high is None else jax.tree.map(jnp.maximum, high, ends[1])
    # Where no proxy shows an entry this is minus infinity.
    gaps = jax.tree.leaves(jax.tree.map(lambda a, b: (b - a).max(), low, high))
    return max(0.0, *map(float, gaps))


def _pooled(proxies: Sequence[Proxy]) -> tuple[Params, Params]:
    values, seen = None, None
    for proxy in proxies:
        on = jax.tree.map(
            lambda leaf, flag: jnp.broadcast_to(flag, leaf.shape),
            proxy.params,
            spread(proxy.visible, proxy.params, proxy.sites, True),
        )
        if values is None:
            values, seen = proxy.params, on
            continue
        values = jax.tree.map(jnp.where, on, proxy.params, values)
        seen = jax.tree.map(jnp.logical_or, seen, on)
    return values, seen


def compare(estimate: Params, truth: Params, seen: Params) -> Estimate:
    """Compares an estimate with the truth where both proxies show the entries."""
    flags = [np.asarray(leaf, bool) for leaf in jax.tree.leaves(seen)]
    ours, theirs = (
        np.concatenate(
            [np.asarray(leaf, np.float64)[on] for leaf, on in zip(leaves, flags, strict=True)]
        )
        for leaves in (jax.tree.leaves(estimate), jax.tree.leaves(truth))
    )
    norm = np.linalg.norm(ours) * np.linalg.norm(theirs)
    cosine = float(ours @ theirs / norm) if norm > 0 else 0.0
    return Estimate(cosine, float(len(ours) / sum(flag.size for flag in flags)))
