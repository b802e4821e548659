"""The final word of a run: what colluders have, whether that is protection, what to change."""

from collections.abc import Collection, Mapping
from typing import Any

from fedqsn_jax.config.schema import FEDSP, Config
from fedqsn_jax.reporting.summary import ATTACKER, number

_LEVEL = 0.01
"""Colluders are level with the owner where they miss no more than this part of the owner's score:
differences below it are those between two seeds."""

_SHARES = ("accuracy", "token_accuracy")
"""Scores that are shares of something, which people read as percentages."""

_WORDS = {
    "none": "no protection",
    "little": "little protection, no less than the owner had before the first round",
    "some": "protection, less than the owner had before the first round",
}
_UNTESTED = (
    "They might do better after training it on rows of their own, which was not tried "
    "(evaluation.fine_tuned_attackers)."
)


def verdict(summary: Mapping[str, Any], config: Config, idle: Collection[str] = ()) -> dict:
    """Judges a run by its last evaluated round.

    Protection is ``none`` where colluders are level with the owner or better, ``little`` where
    they are below but have at least what the owner had before the first round, and ``some`` where
    they have less than that. Where they have trained on their own rows too, the better of both
    scores counts: a gap that training closes protects nothing.

    Args:
      summary: What `summary.summarize` returned.
      config: The settings of the run.
      idle: Attackers of whom no client took part; their figures tell nothing.

    Returns:
      A dictionary of plain values:

      * ``protection``: that of the colluders who have least of it against them: ``none``,
        ``little``, ``some``; or None where nothing is known;
      * ``attackers``: for each attacker ``colluders`` (their number), ``score`` and ``owner``, the
        same score of the global model, both at the end, ``trained``, theirs after training on own
        rows, or None, and ``protection``;
      * ``text``: all of it in words, a line.
    """
    views, score = summary["views"], summary["score"]
    owner = _end(views, "global", score)
    loss = views.get("global", {}).get("end", {}).get("loss", 0.0)
    if owner is None or number(loss) is None:
        text = "The training diverged, so nothing can be said of protection. Lower learning rates."
        began = views.get("global", {}).get("start", {})
        if number(began.get(score)) is None or number(began.get("loss", 0.0)) is None:
            text = (
                "The loss was no number before the first round, so nothing can be said of "
                "protection. Look at the test rows and the model's parameters."
            )
        return {"protection": None, "attackers": {}, "text": f"verdict: {text}"}
    start = number(views["global"]["start"].get(score))
    trained = summary.get("fine_tuned", {}).get("attackers", {})
    attackers = {}
    for view in views:
        reached = _end(views, view, score)
        if view.startswith(ATTACKER) and view not in idle and reached is not None:
            attackers[view] = {
                "colluders": int(view.removeprefix(ATTACKER)),
                "score": reached,
                "owner": owner,
                "trained": (tuned := number(trained.get(view, {}).get("score"))),
                "protection": _protection(
                    owner, start, reached if tuned is None else max(reached, tuned)
                ),
            }
    kinds = [facts["protection"] for facts in attackers.values()]
    worst = next((kind for kind in _WORDS if kind in kinds), None)
    # In one-way rounds what was learned is kept back, whatever columns are sent.
    open_wide = not summary["hides"] and config.broadcast.every != 0
    if open_wide:
        worst = "none"
    said = [_sentence(facts, start, score) for facts in attackers.values()]
    if open_wide:
        said.insert(0, "No column is hidden from clients: no protection.")
    elif not said:
        said.append("No colluders were evaluated, so nothing is known of protection.")
    if worst == "some" and any(facts["trained"] is None for facts in attackers.values()):
        said.append(_UNTESTED)
    said += _advice(summary, config, worst)
    return {"protection": worst, "attackers": attackers, "text": f"verdict: {' '.join(said)}"}


def _end(views: Mapping[str, Any], view: str, score: str) -> float | None:
    return number(views.get(view, {}).get("end", {}).get(score))


def _protection(owner: float, start: float | None, reached: float) -> str:
    if reached >= owner - _LEVEL * abs(owner):
        return "none"
    return "little" if start is None or reached >= start else "some"


def _sentence(facts: Mapping[str, Any], start: float | None, score: str) -> str:
    count, kind = facts["colluders"], facts["protection"]
    who = "1 colluder has" if count == 1 else f"{count} colluders have"
    theirs, owners = (_figure(facts[name], score) for name in ("score", "owner"))
    trained = ""
    if facts["trained"] is not None:
        trained = f", {_figure(facts['trained'], score)} after training on rows of their own,"
    began = "" if start is None or kind == "none" else f" ({_figure(start, score)})"
    return (
        f"{who} {theirs} of {score}{trained} where the owner has {owners}: {_WORDS[kind]}{began}."
    )


def _figure(value: float, score: str) -> str:
    return f"{100 * value:z.1f}%" if score in _SHARES else f"{value:z.4g}"


def _advice(summary: Mapping[str, Any], config: Config, worst: str | None) -> list[str]:
    """What to change, of what a run has settings for."""
    if worst is None:
        return ["Name numbers of colluders in evaluation.attackers, and let them take part."]
    if worst == "some":
        return []
    if config.algorithm == FEDSP:
        return ["Distil a smaller model for the clients: fewer of fedsp.layers."]
    if not summary["hides"]:
        hide = "To hide columns choose algorithm = 'fedqsn' with p1 and p2 above 0."
        return [hide] if config.broadcast.every == 0 else [hide, *_keep_back(config)]
    if config.p1 == 0:
        advice = [_collected(config, max(_counts(summary), default=1))]
    else:
        advice = [f"A p1 above {config.p1:g} hides more columns for good, at the owner's cost too"]
    if not config.lora.rank and config.p1 > 0:
        advice.append(
            "what is learned in all weights also serves those who see only some columns, so train "
            "adapters only (lora.rank) where the model has such layers"
        )
    if config.mask_per == "round" and config.p2 > 0:
        advice.append(
            "with mask_per = 'client' a client sees the same columns in every round, which helps "
            "against one that works alone"
        )
    return ["; ".join(advice) + ".", *_keep_back(config)]


def _counts(summary: Mapping[str, Any]) -> list[int]:
    views = (view for view in summary["views"] if view.startswith(ATTACKER))
    return [int(view.removeprefix(ATTACKER)) for view in views]


def _collected(config: Config, colluders: int) -> str:
    """What colluders have of the columns, where the server hides none for good."""
    if config.mask_per == "round":
        return "With p1 = 0 colluders collect every column in time: set p1 above 0"
    share = 100 * (1 - config.p2**colluders)
    return (
        f"With p1 = 0 and a mask of each client's own {colluders} of them see {share:.3g}% of the "
        f"columns together: set p1 above 0"
    )


def _keep_back(config: Config) -> list[str]:
    """What to change of what clients are sent back of what was learned."""
    broadcast = config.broadcast
    if broadcast.every == 0:
        return [
            "What was learned is not sent already (broadcast.every = 0): what colluders have is of "
            "the first model, of which hidden columns keep more back."
        ]
    now = []
    if broadcast.every > 1:
        now.append(f"after every {broadcast.every} rounds")
    if broadcast.share != 1:
        now.append(f"a share of {broadcast.share:g}")
    sent = (
        f"What was learned is sent to clients ({', '.join(now)})"
        if now
        else ("What was learned is sent to clients after each round")
    )
    return [f"{sent}, which arms them: with broadcast.every = 0 it is not."]
