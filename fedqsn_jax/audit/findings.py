"""What attacks find that is no model: membership of rows, and the others' updates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fedqsn_jax.audit.attacks import NotPlayedError
from fedqsn_jax.audit.case import random_weights
from fedqsn_jax.audit.membership import confidence, likelihood_ratio, ranked
from fedqsn_jax.audit.received import Payloads
from fedqsn_jax.audit.replay import members_by_round, payload_layout
from fedqsn_jax.audit.scene import Scene
from fedqsn_jax.audit.subtraction import (
    compare,
    largest_change,
    others_update,
    own_updates,
    pairs,
    plays,
)
from fedqsn_jax.audit.union import union_model
from fedqsn_jax.protocol.proxy import dequantize_proxy
from fedqsn_jax.rounds.calls import draw_cohorts
from fedqsn_jax.rounds.fine_tuning import everything
from fedqsn_jax.rounds.pooled_rows import client_rows, pad

Finding = dict[str, Any]

_MOST_ROWS = 1000
"""Rows of clients, and test rows, that membership is measured on."""


def membership(scene: Scene) -> Finding:
    """Whether rows of other clients can be told from test rows, by the union of what was received.

    Raises:
      NotPlayedError: There is nothing to attack with, or no class probabilities.
    """
    case = scene.case
    if scene.holdings.latest is None:
        raise NotPlayedError("no member took part in a round")
    if case.task.label is None:
        raise NotPlayedError("the task has no class probabilities to ask for")
    members, others = _targets(scene)
    attacked = union_model(case, scene.holdings)
    rows: Any = {name: np.concatenate([members[name], others[name]]) for name in members}
    count = len(next(iter(members.values())))

    def confidences(params: Any) -> np.ndarray:
        return confidence(scene.tools.answer(params, rows).sums["loss"])

    own = confidences(attacked)
    by_loss = ranked(own[:count], own[count:])
    found: Finding = {
        "members": count,
        "others": len(own) - count,
        "loss_threshold": by_loss._asdict(),
    }
    if scene.row_count >= 2 * scene.settings.shadows and scene.settings.shadows > 1:
        shadows = np.stack(
            [confidences(_shadow(scene, index)) for index in range(scene.settings.shadows)]
        )
        ratio = likelihood_ratio(own, shadows)
        by_ratio = ranked(ratio[:count], ratio[count:])
        found["lira"] = {**by_ratio._asdict(), "shadows": scene.settings.shadows}
    return found


def _targets(scene: Scene) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Rows of clients outside the coalition, and as many test rows."""
    generator = np.random.default_rng(scene.settings.seed)
    outside = [k for k in range(scene.case.data.clients) if k not in scene.adversary.members]
    if not outside:
        raise NotPlayedError("all clients collude")
    each, total = [], 0
    for client in generator.permutation(outside):
        rows = client_rows(scene.case.data, int(client))
        each.append(rows)
        total += len(next(iter(rows.values())))
        if total >= _MOST_ROWS:
            break
    members = {name: np.concatenate([rows[name] for rows in each]) for name in each[0]}
    if not total:
        raise NotPlayedError("no other client has a row")
    test = {name: np.asarray(array) for name, array in scene.case.test.items()}
    size = len(next(iter(test.values())))
    chosen = generator.permutation(total)[:_MOST_ROWS]
    others = generator.permutation(size)[:_MOST_ROWS]
    return (
        {name: array[chosen] for name, array in members.items()},
        {name: test[name][others] for name in members},
    )


def _shadow(scene: Scene, index: int) -> Any:
    """A model of the same architecture, from random weights, on a random half of the own rows."""
    generator = np.random.default_rng([scene.settings.seed, index])
    half = generator.permutation(scene.row_count)[: max(1, scene.row_count // 2)]
    train = {name: array[half] for name, array in scene.divided.train.items()}
    rows = dataclasses.replace(
        scene.rows, train=pad(train, scene.places[0]), trained=jax.numpy.int32(len(half))
    )
    key = scene.key(f"shadow_{index}")
    start = random_weights(key, scene.owner, scene.case.sites)
    return scene.tools.fine_tune(start, everything(start), rows, scene.steps, key).params


def subtraction(scene: Scene, payloads: Payloads) -> Finding:
    """What successive proxies tell of the others' updates.

    Raises:
      NotPlayedError: No two successive rounds have a member, or the server's step is another one;
        with one-way rounds: no proxy was received.
    """
    case = scene.case
    if case.simulation.method.broadcast.is_one_way:
        return _nothing_to_subtract(scene, payloads)
    if not plays(case):
        raise NotPlayedError("only of runs in which the server adds the mean of plain updates")
    layout, by_round = payload_layout(case), members_by_round(case, scene.adversary.members)
    chosen = pairs(by_round)
    if not chosen:
        raise NotPlayedError("no member took part in two successive rounds")
    wanted = {index for first in chosen for index in (first, first + 1)}
    proxies: dict[int, dict[int, Any]] = {}
    for index, client, proxy in payloads.read(layout, scene.adversary.members):
        if index in wanted:
            proxies.setdefault(index, {})[client] = dequantize_proxy(proxy)
    cohorts = draw_cohorts(case.simulation.federation, case.final, case.config.rounds)
    estimates = []
    for first in chosen:
        change = payloads.read_change(first, jax.eval_shape(case.sent, case.final.params))
        own = own_updates(case, first, proxies[first], [int(k) for k in cohorts[first]])
        estimate, seen = others_update(
            list(proxies[first].values()), list(proxies[first + 1].values()), own
        )
        truth = jax.tree.map(lambda mine, all_: all_ - mine, own, change)
        estimates.append(compare(estimate, truth, seen))
    return {
        "rounds": [index + 1 for index in chosen],
        "cosine": float(np.mean([each.cosine for each in estimates])),
        "compared": float(np.mean([each.compared for each in estimates])),
    }


def _nothing_to_subtract(scene: Scene, payloads: Payloads) -> Finding:
    """Of one-way rounds: whether any two proxies differ where both show an entry.

    If they never do, no byte that was received depends on another client's update.
    """
    versions = [
        (index, dequantize_proxy(proxy))
        for index, _, proxy in payloads.read(payload_layout(scene.case), scene.adversary.members)
    ]
    if not versions:
        raise NotPlayedError("no member took part in a round")
    change = largest_change([proxy for _, proxy in versions])
    return {
        "rounds": sorted({index + 1 for index, _ in versions}),
        "largest_change": change,
        "learned": change > 0,
    }


FINDINGS: dict[str, tuple[str, Callable[..., Finding]]] = {
    "membership": ("membership of others' rows", lambda scene, _: membership(scene)),
    "subtraction": ("subtraction of the own update", subtraction),
}
"""Attacks that end in a finding, by name: what they do in words, and how."""
