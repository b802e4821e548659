"""The catalogue of attacks: each makes a model of what a coalition has."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedqsn_jax.audit.alone import members_places
from fedqsn_jax.audit.case import random_weights
from fedqsn_jax.audit.distillation import TEACHER, answers_of, queries
from fedqsn_jax.audit.hidden_columns import filled, mean_columns, sites_of
from fedqsn_jax.audit.low_rank_differences import shared_model
from fedqsn_jax.audit.quantization_cells import with_middles
from fedqsn_jax.audit.scene import AuditSettings, Scene
from fedqsn_jax.audit.union import (
    latest_model,
    small_tensors,
    union_model,
)
from fedqsn_jax.core.types import Params
from fedqsn_jax.rounds.fine_tuning import Tuned, everything, known_entries
from fedqsn_jax.rounds.pooled_rows import pad

_RANK = 8
"""The rank that differences between versions are taken to have."""


class NotPlayedError(Exception):
    """An attack that a coalition cannot make; the message says why."""


class Outcome(NamedTuple):
    """What an attack gave.

    Attributes:
      params: The thief's plain model.
      needed: What it took, in words.
      rate: The rate that was chosen; None: nothing was trained.
      steps: The steps that were chosen; 0: training made nothing better.
    """

    params: Params
    needed: str
    rate: float | None = None
    steps: int | None = None


class Attack(NamedTuple):
    """One attack.

    Attributes:
      name: In files and tables.
      title: In words.
      play: Makes it.
      alone: Whether it uses nothing of the server's.
    """

    name: str
    title: str
    play: Callable[[Scene], Outcome]
    alone: bool = False


def catalogue(settings: AuditSettings) -> list[Attack]:
    """All attacks that end in a model, in the order in which they are played."""
    distilled = [
        Attack(
            f"distilled_{count}",
            f"distillation, {count:,} queries",
            functools.partial(_distilled, count=count),
        )
        for count in settings.queries
    ]
    return [
        Attack("alone_random", "alone, from random weights", _alone_random, alone=True),
        Attack("alone_federation", "alone, own federation", _alone_federation, alone=True),
        Attack("alone_base", "alone, from the public base", _alone_base, alone=True),
        Attack("union", "union of everything received", _union),
        Attack("latest_proxy", "latest proxy as it is", _latest),
        Attack("union_tuned", "union, all weights tuned", _union_tuned),
        Attack("union_small", "union, norms and biases tuned", _union_small),
        *(
            Attack(
                f"filled_{kind}",
                f"hidden columns {kind if kind != 'base' else 'public'}, then tuned",
                functools.partial(_filled, kind=kind),
            )
            for kind in ("zero", "mean", "random", "base")
        ),
        Attack("averaged_versions", "mean of all versions, then tuned", _averaged),
        Attack("quantization_cells", "quantization cells, then tuned", _cells),
        Attack("low_rank", "low-rank differences, then tuned", _low_rank),
        *distilled,
    ]


def _rows_text(scene: Scene) -> str:
    return f"{scene.row_count} own rows"


def _trained(scene: Scene, tuned: Tuned, needed: str) -> Outcome:
    return Outcome(tuned.params, needed, tuned.rate, tuned.steps)


def _tune(scene: Scene, name: str, start: Params, trainable: Params, needed: str = "") -> Outcome:
    _require_rows(scene)
    tuned = scene.tools.fine_tune(start, trainable, scene.rows, scene.steps, scene.key(name))
    return _trained(scene, tuned, ", ".join(filter(None, (_rows_text(scene), needed))))


def _require_rows(scene: Scene) -> None:
    if not scene.row_count:
        raise NotPlayedError("the coalition has fewer than two rows")


def _require_received(scene: Scene) -> None:
    if scene.holdings.latest is None:
        raise NotPlayedError("no member took part in a round")


def _require_base(scene: Scene) -> Params:
    if scene.base is None:
        raise NotPlayedError("no public base is known (--public_base)")
    return scene.base


def _alone_random(scene: Scene) -> Outcome:
    start = random_weights(scene.key("random"), scene.owner, scene.case.sites)
    return _tune(scene, "alone_random", start, everything(start))


def _alone_base(scene: Scene) -> Outcome:
    base = _require_base(scene)
    return _tune(scene, "alone_base", base, everything(base), "a public base")


def _alone_federation(scene: Scene) -> Outcome:
    _require_rows(scene)
    if len(scene.adversary.members) < 2:
        raise NotPlayedError("a federation of one is training alone")
    start = scene.base
    if start is None:
        start = random_weights(scene.key("random"), scene.owner, scene.case.sites)
    places, counts = members_places(scene.divided.owners, scene.most_members)
    width = scene.places[0]
    padded = jnp.zeros((len(places), width), jnp.int32).at[:, : places.shape[1]].set(places)
    key = scene.key("alone_federation")
    tuned = scene.tools.federate(start, scene.rows, padded, jnp.asarray(counts), key)
    return _trained(scene, tuned, f"{_rows_text(scene)} of {len(scene.adversary.members)} clients")


def _latest(scene: Scene) -> Outcome:
    _require_received(scene)
    return Outcome(latest_model(scene.case, scene.holdings), "one proxy")


def _proxies(scene: Scene) -> str:
    count = scene.holdings.payloads
    return f"{count} prox{'y' if count == 1 else 'ies'}"


def _union(scene: Scene) -> Outcome:
    _require_received(scene)
    return Outcome(union_model(scene.case, scene.holdings), _proxies(scene))


def _known(scene: Scene, params: Params) -> Params:
    if scene.case.simulation.lora is not None:
        return everything(params)
    return known_entries(params, scene.holdings.union.known, scene.case.sites)


def _tuned_union(scene: Scene, name: str, values: Params | None = None) -> Outcome:
    _require_received(scene)
    start = union_model(scene.case, scene.holdings, values)
    return _tune(scene, name, start, _known(scene, start), _proxies(scene))


def _union_tuned(scene: Scene) -> Outcome:
    return _tuned_union(scene, "union_tuned")


def _union_small(scene: Scene) -> Outcome:
    _require_received(scene)
    start = union_model(scene.case, scene.holdings)
    small = small_tensors(start)
    if not any(bool(leaf.any()) for leaf in jax.tree.leaves(small)):
        raise NotPlayedError("the model has neither norms nor biases")
    both = jax.tree.map(jnp.logical_and, small, _known(scene, start))
    return _tune(scene, "union_small", start, both, _proxies(scene))


def _filled(scene: Scene, kind: str) -> Outcome:
    _require_received(scene)
    case, known = scene.case, scene.holdings.union.known
    if case.simulation.lora is not None:
        raise NotPlayedError("the run hides columns of adapters, which are merged here")
    if all(bool(columns.all()) for columns in known.values()):
        raise NotPlayedError("no column is hidden from the coalition")
    needed = _proxies(scene)
    if kind == "zero":
        start = union_model(case, scene.holdings)
    else:
        values = case.model(scene.holdings.union.copy)
        sites = sites_of(values, case.sites)
        if kind == "mean":
            guess = mean_columns(values, known, sites)
        elif kind == "random":
            guess = random_weights(scene.key("filled"), scene.owner, case.sites)
        else:
            guess, needed = _require_base(scene), f"{needed}, a public base"
        start = filled(values, known, sites, guess)
    return _tune(scene, f"filled_{kind}", start, everything(start), needed)


def _averaged(scene: Scene) -> Outcome:
    _require_received(scene)
    if len(scene.holdings.rounds) < 2:
        raise NotPlayedError("proxies of a single round")
    return _tuned_union(scene, "averaged_versions", scene.holdings.mean)


def _cells(scene: Scene) -> Outcome:
    _require_received(scene)
    if not scene.holdings.cells:
        raise NotPlayedError("no kernel is quantized by columns")
    values = with_middles(scene.holdings.union.copy, scene.holdings.cells, scene.case.sites)
    return _tuned_union(scene, "quantization_cells", values)


def _low_rank(scene: Scene) -> Outcome:
    _require_received(scene)
    versions = scene.holdings.versions
    if len(versions) < 2:
        raise NotPlayedError("proxies of a single round")
    values = shared_model(scene.holdings.union.copy, versions, scene.case.sites, _RANK)
    return _tuned_union(scene, "low_rank", values)


def _distilled(scene: Scene, count: int) -> Outcome:
    _require_rows(scene)
    if scene.case.task.label is None:
        raise NotPlayedError("the task has no class probabilities to ask for")
    asked, plain = queries(scene.divided.train, count, scene.settings.seed)
    places = max(scene.settings.queries)
    batch: dict[str, Any] = pad(asked, places)
    batch[TEACHER] = answers_of(scene.case.apply_fn, scene.owner, batch, scene.tools.batch_size)
    rows = dataclasses.replace(scene.rows, train=batch, trained=jnp.int32(count))
    if scene.holdings.latest is None:
        start = random_weights(scene.key("random"), scene.owner, scene.case.sites)
    else:
        start = union_model(scene.case, scene.holdings)
    steps = scene.steps if scene.settings.steps else min(max(10 * count // 32, 200), 1000)
    tuned = scene.tools.distil(start, everything(start), rows, steps, scene.key(f"asked_{count}"))
    kind = f"{plain} own rows" + (f", {count - plain} mixtures of them" if count > plain else "")
    return _trained(scene, tuned, f"{count:,} queries: {kind}")


def best(held: Sequence[tuple[float, float] | None], rows: int) -> int | None:
    """The place of the attack that a thief would choose by his held-back rows; None: there is none.

    The rule of one standard error (Breiman et al., Classification and Regression Trees, 1984): the
    first, so the plainest, whose score is less than one standard error below the largest. With few
    rows the largest is often luck. Scores that are no shares have no such error here: the largest
    is chosen, of equal ones that with the smaller loss.

    Args:
      held: Score and loss of each attack, plainer ones first; None where it was not played.
      rows: Number of rows that were held back.
    """
    found = {index: each for index, each in enumerate(held) if each is not None}
    if not found:
        return None
    top = min(found, key=lambda index: (-found[index][0], found[index][1]))
    score = found[top][0]
    if not 0 <= score <= 1:
        return top
    # With two successes and two failures added (Agresti and Coull, 1998): it is not zero at 1.
    share = (score * rows + 2) / (rows + 4)
    error = (share * (1 - share) / (rows + 4)) ** 0.5
    return next((i for i, each in found.items() if each[0] > score - error), top)
