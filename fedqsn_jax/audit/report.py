"""What an audit says: audit.json, the table in the terminal, the picture and the page."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedqsn_jax.audit.attacks import best
from fedqsn_jax.audit.case import Case
from fedqsn_jax.audit.intervals import (
    LEVEL,
    Interval,
    interval,
    kept_benefit,
    protected_share,
    resampled_scores,
    resampled_weights,
)
from fedqsn_jax.audit.playing import Played, Results
from fedqsn_jax.audit.scene import AuditSettings
from fedqsn_jax.audit.words import coalition, with_interval
from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.reporting.display import Display
from fedqsn_jax.reporting.writers import write_json
from fedqsn_jax.simulation.costs import expected_costs

WORTH_PROTECTING = 0.03
"""Where the owner is less than so much above what colluders reach alone, nothing is to protect."""

_WITH_QUERIES = "distilled_"

Report = dict[str, Any]


def make_report(case: Case, settings: AuditSettings, results: Results) -> Report:
    """Puts together what audit.json holds; intervals are of 95%, over resampled test rows.

    Args:
      case: The run.
      settings: The audit's.
      results: What was measured.
    """
    rows = len(next(iter(results.references["global"].values())))
    weights = resampled_weights(rows, settings.seed)

    def scores(sums: Mapping[str, np.ndarray]) -> np.ndarray:
        return resampled_scores(sums, weights, case.task.summarize, case.task.score)

    models = {name: scores(sums) for name, sums in results.references.items()}
    costs, config = expected_costs(case.simulation), case.config
    report: Report = {
        "run": {
            "algorithm": config.algorithm,
            "data": config.data.task or config.data.name,
            "seed": config.seed,
            "rounds": config.rounds,
            "clients": case.data.clients,
            "cohort": config.cohort.size,
            "p1": config.p1,
            "p2": config.p2,
            "bits": config.bits,
            "mask_per": config.mask_per,
            "broadcast_every": config.broadcast.every,
            "hides": costs.hides,
        },
        "device": jax.devices()[0].device_kind,
        "score": case.task.score,
        "test_rows": rows,
        "level": LEVEL,
        "models": {name: _as_dict(interval(values)) for name, values in models.items()},
        "kept_benefit": None,
        "bytes": {"down": costs.down, "fedavg_down": costs.fedavg_down},
        "replay_difference": results.replay_difference,
        "adversaries": {},
    }
    if "fedavg" in models:
        benefit = kept_benefit(models["global"], models["start"], models["fedavg"])
        report["kept_benefit"] = _as_dict(interval(benefit))
    for adversary in results.adversaries:
        own = [each for each in results.played if each.adversary == adversary.name]
        report["adversaries"][adversary.name] = {
            **results.holdings[adversary.name],
            **_judged(own, models["global"], scores, results.holdings[adversary.name]),
            "findings": results.findings[adversary.name],
        }
    report["conclusions"] = conclusions(report)
    return report


def _judged(
    played: list[Played],
    owner: np.ndarray,
    scores: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    holdings: Mapping[str, Any],
) -> Report:
    """One coalition: its attacks, the best of them, and what is protected from it."""
    values = {each.name: scores(each.sums) for each in played if each.sums is not None}
    groups = {
        "alone": [each for each in played if each.alone],
        "best": [e for e in played if not e.alone and not e.name.startswith(_WITH_QUERIES)],
        "best_with_queries": [each for each in played if not each.alone],
    }
    found: Report = {}
    chosen: dict[str, np.ndarray] = {}
    for name, group in groups.items():
        place = best([each.held for each in group], holdings["held_rows"])
        if place is None:
            found[name] = None
            continue
        one = group[place]
        chosen[name] = values[one.name]
        found[name] = {
            "attack": one.name,
            "title": one.title,
            "score": _as_dict(interval(values[one.name])),
        }
    # Without rows nothing can be trained, and without proxies there is no attack.
    alone = chosen.get("alone", np.zeros_like(owner))
    attack = chosen.get("best", alone)
    found["worth"] = _as_dict(interval(owner - alone))
    found["protected_share"] = _as_dict(interval(protected_share(owner, attack, alone)))
    asked = chosen.get("best_with_queries", attack)
    found["protected_share_with_queries"] = _as_dict(interval(protected_share(owner, asked, alone)))
    # What no choice on held-back rows can miss: a bound, as it looks at the test rows.
    without = [values[e.name] for e in groups["best"] if e.name in values]
    strongest = max(without, key=lambda each: each[0], default=alone)
    found["protected_share_at_least"] = _as_dict(interval(protected_share(owner, strongest, alone)))
    found["nothing_to_protect"] = bool(owner[0] - alone[0] < WORTH_PROTECTING)
    found["attacks"] = [
        {
            "name": each.name,
            "title": each.title,
            **each.facts,
            **({"interval": _as_dict(interval(values[each.name]))} if each.name in values else {}),
        }
        for each in played
    ]
    return found


def _as_dict(found: Interval) -> dict[str, float | None]:
    return {
        name: value if math.isfinite(value) else None for name, value in found._asdict().items()
    }


def conclusions(report: Report) -> list[str]:
    """What a reader should take home, a sentence or two each."""
    lines = []
    owner = report["models"]["global"]["value"]
    for name, each in report["adversaries"].items():
        who = coalition(name, each)
        alone, attack = each["alone"], each["best"]
        reach = alone["score"]["value"] if alone else 0.0
        if each["nothing_to_protect"]:
            lines.append(
                f"Against {who} there is nothing to protect: with {each['train_rows']} rows of "
                f"their own they reach {reach:.3f} without the server, the owner {owner:.3f}. "
                f"Hiding the model buys nothing here; it would where clients have fewer rows, or "
                f"where the server's own training is worth more."
            )
            continue
        if attack is None:
            lines.append(f"{_first_upper(who)} received nothing, so there was no attack.")
            continue
        share = each["protected_share"]["value"]
        lines.append(
            f"Against {who}, {_percent(share)} of the owner's advantage is protected: the owner "
            f"has {owner:.3f}, the best attack ({attack['title']}) {attack['score']['value']:.3f}, "
            f"own rows alone {reach:.3f}. Had the thief guessed the best attack, it would be "
            f"{_percent(each['protected_share_at_least']['value'])}."
        )
    return [*lines, *_advice(report)]


def _advice(report: Report) -> list[str]:
    """What to change."""
    run, lines = report["run"], []
    open_to = {
        name: each
        for name, each in report["adversaries"].items()
        if not each["nothing_to_protect"] and each["best"] and (_share(each) or 0) < 0.5
    }
    if open_to:
        complete = [name for name, each in open_to.items() if each["known_share"] > 0.9]
        if not run["hides"]:
            lines.append("No column is hidden from clients: choose p1 or p2 above 0.")
        elif complete:
            sticky = run["mask_per"] == "client"
            lines.append(
                "Colluders have collected nearly every column that the server does not hide. "
                + ("R" if sticky else "Let each client see the same columns in every round, or r")
                + "aise p1."
            )
        if run["broadcast_every"]:
            lines.append(
                "What was learned in the rounds is sent back to clients, and serves a thief as "
                "well as them. Send it less often, or not at all, where its loss can be borne."
            )
    asked = {
        name
        for name, each in report["adversaries"].items()
        if each["best"]
        and each["best_with_queries"]
        and each["best_with_queries"]["attack"].startswith(_WITH_QUERIES)
    }
    if asked:
        lines.append(
            "Questions to the finished model give a thief more than the proxies: limit how many "
            "anyone may ask, and answer with classes instead of probabilities."
        )
    lines += _privacy(report)
    return lines


def _privacy(report: Report) -> list[str]:
    found = [
        each["findings"].get("membership", {}).get("loss_threshold", {}).get("auc", 0.5)
        for each in report["adversaries"].values()
    ]
    if found and max(found) > 0.6:
        return [
            f"What is sent tells which rows clients trained on (area under the curve "
            f"{max(found):.2f}, chance is 0.50): clip updates and add noise if that matters."
        ]
    return []


def _share(each: Mapping[str, Any]) -> float | None:
    return each["protected_share"]["value"]


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(share: float | None) -> str:
    if share is None:
        return "an unknown part"
    # Below zero: a thief that is better than the owner.
    return f"{100 * share:.0f}%" if share >= 0.005 else "nothing"


def show(report: Report, display: Display) -> None:
    """Prints the table, U and P, and the conclusions."""
    score = report["score"]
    display.message("")
    for name in ("start", "global", "fedavg"):
        if name in report["models"]:
            display.message(f"{name:>8} {score}: {with_interval(report['models'][name])}")
    display.message("")
    for line in table(report):
        display.message(line)
    display.message("")
    for line in figures(report):
        display.message(line)
    display.message("")
    for line in report["conclusions"]:
        display.message(line)
    display.message("")


def figures(report: Report) -> list[str]:
    """U and P with their intervals, a line each."""
    benefit = report["kept_benefit"]
    lines = [
        "U, the kept benefit: "
        + (with_interval(benefit, 2) if benefit else "unknown without --reference")
    ]
    for name, each in report["adversaries"].items():
        without, asked = each["protected_share"], each["protected_share_with_queries"]
        lines.append(
            f"P, the protected share, {coalition(name, each)}: {with_interval(without, 2)}; "
            f"with queries {with_interval(asked, 2)}; "
            f"at least {with_interval(each['protected_share_at_least'], 2)}"
            + ("; nothing to protect" if each["nothing_to_protect"] else "")
        )
    return lines


def table(report: Report) -> list[str]:
    """Attack by coalition, score and fidelity; what was not played is left out."""
    names = list(report["adversaries"])
    everything = [each["attacks"] for each in report["adversaries"].values()]
    played = {one["name"] for attacks in everything for one in attacks if "not_played" not in one}
    titles = {one["name"]: one["title"] for one in everything[0] if one["name"] in played}
    width = max([len("attack"), *(len(title) for title in titles.values())])
    head = [f"{name} colluding" for name in names]
    lines = [f"{'attack':<{width}}  " + "  ".join(f"{text:>14}" for text in head)]
    for attack, title in titles.items():
        cells = [_cell(report["adversaries"][name], attack) for name in names]
        lines.append(f"{title:<{width}}  " + "  ".join(f"{cell:>14}" for cell in cells))
    lines.append("score, then agreement with the owner's model; * chosen on held-back rows")
    return lines


def _cell(each: Mapping[str, Any], attack: str) -> str:
    facts = next(one for one in each["attacks"] if one["name"] == attack)
    if "not_played" in facts:
        return "-"
    picked = {(each[kind] or {}).get("attack") for kind in ("alone", "best")}
    mark = "*" if attack in picked else " "
    return f"{facts['score']:.3f} {facts['fidelity']:.3f}{mark}"


def write(report: Report, directory: Path) -> None:
    """Writes audit.json, audit.png and audit.html, each as a whole."""
    # Slow to import, and only needed at the end.
    from fedqsn_jax.audit.page import make_page
    from fedqsn_jax.audit.picture import draw

    write_json(directory / "audit.json", json.loads(json.dumps(report)))
    image = draw(report)
    with replacing(directory / "audit.png") as temporary:
        temporary.write_bytes(image)
    with replacing(directory / "audit.html") as temporary:
        temporary.write_text(make_page(report, image), encoding="utf-8")
