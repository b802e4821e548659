"""What a run came to, as plain data: the history of its metrics condensed to one dictionary.

A *history* is a list of dictionaries, one for each evaluated round, in order. Keys: ``round``;
``VIEW/METRIC`` for the views (``global``, ``server``, ``proxy``, ``attacker_N``), with
``proxy/SCORE_std`` for the spread over client masks; ``train/loss``; ``bytes/down_per_client`` and
``bytes/up_per_client``, means over the sampled clients; in one-way rounds, which have
``clients/sent``, bytes down are means over all rounds so far; ``clients/returned`` and
``clients/rejected``, numbers of updates; where rows of clients are held out, ``GROUP/VIEW/METRIC``,
means over the clients of the groups ``own`` and ``new``, with ``SCORE_worst_decile`` and
``SCORE_spread``; ``seconds`` since the run began; where clients
are private, ``privacy/epsilon`` of all rounds so far, and with Poisson cohorts ``clients/drawn``,
how many took part. Only ``round`` must be
there: any other key may be missing or None (round 0, before any training, has no training loss and
no bytes).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Metrics = Mapping[str, Any]
"""One entry of a history: scalars by name."""

_FIRST_VIEWS = ("global", "server", "proxy")
EPSILON = "privacy/epsilon"
"""Epsilon of all rounds so far, in a history."""
ATTACKER = "attacker_"
"""What the names of attackers begin with; the number of colluders follows."""
_GROUPS = ("own", "new")
"""Groups of clients with held-out rows."""


@dataclasses.dataclass(frozen=True)
class TensorRow:
    """What a user is told about one parameter tensor.

    Attributes:
      path: Its path in the parameter tree.
      shape: Its shape.
      dtype: Its dtype's name.
      travels: How it is sent, in words: ``4-bit NormalFloat, block 64``, or ``float32, whole``.
      columns: Number of columns over all layers, where the tensor is a mask site's kernel.
      fan_in: Entries of one column, where the tensor is a mask site's kernel.
      hidden: Expected share of its entries that one client does not see, under both masks; None
        where the tensor is never hidden.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    travels: str
    columns: int | None = None
    fan_in: int | None = None
    hidden: float | None = None

    @property
    def parameters(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a round costs one client, and the same under FedAvg, which sends the whole model.

    Attributes:
      down: Bytes that a client receives in a round, in expectation over the masks.
      up: Bytes that it returns, likewise.
      fedavg_down: Bytes that it would receive from FedAvg.
      fedavg_up: Bytes that it would return.
      memory: Estimates of memory: what for, and bytes.
      hides: Whether there are columns that a client does not see.
    """

    down: float
    up: float
    fedavg_down: float
    fedavg_up: float
    memory: tuple[tuple[str, float], ...] = ()
    hides: bool = True


def privacy_line(told: Mapping[str, Any]) -> str:
    """Returns what clients' privacy costs as a line of text.

    Args:
      told: ``epsilon``, ``delta``, ``rounds``, ``noise`` and ``method``.
    """
    return (
        f"clients' privacy: epsilon {told['epsilon']:.3g} at delta {told['delta']:g} after "
        f"{told['rounds']} rounds, noise multiplier {told['noise']:.4g} ({told['method']})"
    )


def number(value: Any) -> float | None:
    """Returns a metric as a finite number; None where it is absent, NaN or infinite."""
    return None if value is None or not math.isfinite(value) else float(value)


def views_of(names: Iterable[str], score: str = "accuracy") -> list[str]:
    """Returns the views that have a score: global, server, proxy, attackers by their number.

    Args:
      names: Names of metrics, for example the keys of one entry of a history.
      score: The metric's name.
    """
    scored = {name.removesuffix(f"/{score}") for name in names if name.endswith(f"/{score}")}
    attackers = [view for view in scored if view.startswith(ATTACKER)]
    return [view for view in _FIRST_VIEWS if view in scored] + sorted(attackers, key=_colluders)


def main_views_of(names: Iterable[str], score: str = "accuracy") -> list[str]:
    """Returns the views of `views_of`, of the attackers only the largest."""
    views = views_of(names, score)
    attackers = [view for view in views if view.startswith(ATTACKER)]
    return [view for view in views if view not in attackers[:-1]]


def _colluders(view: str) -> tuple[int, str]:
    number = view.removeprefix(ATTACKER)
    return (int(number) if number.isdecimal() else 0, view)


def summarize(
    history: Sequence[Metrics], costs: Costs, seconds: float, score: str = "accuracy"
) -> dict[str, Any]:
    """Condenses a run to what its final table shows.

    Example::

      summary = summarize(history, costs, seconds=12.5)
      summary["views"]["global"]["best"]["round"]

    Args:
      history: The metrics of the evaluated rounds, in order, the first one before any training.
      costs: Expected bytes, and FedAvg's.
      seconds: Wall time of all rounds, with those before an interruption.
      score: The metric that tells good from bad; larger is better.

    Returns:
      A dictionary of plain values:

      * ``score``, ``rounds`` (number of the last evaluated round), ``hides`` (whether columns
        are hidden from clients at all);
      * ``views``: for each view ``start``, ``best`` and ``end``, each with its ``round`` and every
        metric of the view at that round. Best is by score, the earliest of equals; rounds whose
        score is not a finite number do not count, unless there is no other;
      * ``clients``: for each group of clients with held-out rows, and each view, the score's
        ``mean``, ``worst_decile`` and ``spread`` over clients at the end;
      * ``gaps`` in score at the end: ``attack``, by attacker, is global minus attacker, what the
        method buys; ``forgetting``, global minus proxy, is what a client that forgets loses;
      * ``bytes``: for ``down`` and ``up``, a client's in one round: ``per_client`` (mean over the
        entries that have them, or the expectation if none has), ``expected``, ``fedavg``, and
        ``ratio`` of the first to FedAvg's;
      * ``seconds``: ``total`` and ``per_round``.

      A value that does not exist (a ratio to zero, say) is None.

    Raises:
      ValueError: The history is empty.
    """
    if not history:
        raise ValueError("the history has no entry to summarize")
    names = {name for entry in history for name, value in entry.items() if value is not None}
    views = {view: _summarize_view(history, view, score) for view in views_of(names, score)}
    rounds = int(history[-1]["round"])
    end = {view: facts["end"].get(score) for view, facts in views.items()}
    return {
        "score": score,
        "rounds": rounds,
        "hides": costs.hides,
        "views": views,
        "clients": _summarize_clients(history[-1], list(views), score),
        "gaps": {
            "attack": {
                view: _difference(end.get("global"), end[view])
                for view in views
                if view.startswith(ATTACKER)
            },
            "forgetting": _difference(end.get("global"), end.get("proxy")),
        },
        "bytes": {
            "down": _summarize_bytes(history, "down", costs.down, costs.fedavg_down),
            "up": _summarize_bytes(history, "up", costs.up, costs.fedavg_up),
        },
        "seconds": {"total": float(seconds), "per_round": _ratio(float(seconds), rounds)},
    }


def add_reference(summary: dict[str, Any], fedavg: float) -> None:
    """Adds what a run kept of the benefit that federated averaging has.

    Args:
      summary: What `summarize` returned; ``kept_benefit`` is added: ``start`` and ``end``, the
        scores of the global model, ``fedavg``, and ``value``, ``(end - start) / (fedavg - start)``;
        None where a score is no number or FedAvg gained nothing.
      fedavg: FedAvg's score at its end, from the same start.
    """
    view, score = summary["views"].get("global", {}), summary["score"]
    start, end = (number(view.get(time, {}).get(score)) for time in ("start", "end"))
    known = start is not None and end is not None and fedavg > start
    summary["kept_benefit"] = {
        "value": (end - start) / (fedavg - start) if known else None,  # type: ignore[operator]
        "start": start,
        "end": end,
        "fedavg": fedavg,
    }


def add_trained_attackers(
    summary: dict[str, Any], trained: Mapping[str, Mapping[str, Any]], steps: int
) -> None:
    """Adds what attackers reach who train what they hold.

    Args:
      summary: What `summarize` returned; added are ``fine_tuned``, with ``most_steps`` and
        ``attackers``, and the gaps ``fine_tuned``, global minus attacker.
      trained: By the attacker's name what came of it: ``score``, ``rate``, ``steps``, ``rows`` and
        ``held_rows``; see `simulation.fine_tuned_attackers`.
      steps: The most steps that they were given.
    """
    owner = summary["views"].get("global", {}).get("end", {}).get(summary["score"])
    summary["fine_tuned"] = {
        "most_steps": steps,
        "attackers": {name: dict(facts) for name, facts in trained.items()},
    }
    summary["gaps"]["fine_tuned"] = {
        name: _difference(owner, facts["score"]) for name, facts in trained.items()
    }


def _summarize_view(history: Sequence[Metrics], view: str, score: str) -> dict[str, Any]:
    entries = [
        {"round": int(entry["round"])}
        | {
            name.removeprefix(f"{view}/"): float(value)
            for name, value in entry.items()
            if name.startswith(f"{view}/") and value is not None
        }
        for entry in history
        if entry.get(f"{view}/{score}") is not None
    ]
    finite = [entry for entry in entries if math.isfinite(entry[score])]
    best = max(finite or entries, key=lambda entry: entry[score])
    return {"start": entries[0], "best": best, "end": entries[-1]}


def _summarize_clients(end: Metrics, views: list[str], score: str) -> dict[str, Any]:
    names = {"mean": "", "worst_decile": "_worst_decile", "spread": "_spread"}
    return {
        group: {
            view: {
                name: number(end.get(f"{group}/{view}/{score}{suffix}"))
                for name, suffix in names.items()
            }
            for view in views
            if end.get(f"{group}/{view}/{score}") is not None
        }
        for group in _GROUPS
        if any(name.startswith(f"{group}/") for name in end)
    }


def _summarize_bytes(
    history: Sequence[Metrics], direction: str, expected: float, fedavg: float
) -> dict[str, float | None]:
    name = f"bytes/{direction}_per_client"
    values = (number(entry.get(name)) for entry in history)
    measured = [value for value in values if value is not None]
    if direction == "down" and "clients/sent" in history[-1]:
        # In one-way rounds each is a mean over the rounds before, too.
        measured = measured[-1:]
    per_client = math.fsum(measured) / len(measured) if measured else float(expected)
    return {
        "per_client": per_client,
        "expected": float(expected),
        "fedavg": float(fedavg),
        "ratio": _ratio(per_client, fedavg),
    }


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _ratio(value: float, whole: float) -> float | None:
    return value / whole if whole else None
