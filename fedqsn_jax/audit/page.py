"""The audit as one page that needs nothing else: no other file, no script, no network."""

import base64
import html
from typing import Any

from fedqsn_jax.audit.words import coalition, with_interval

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.chosen td { font-weight: 600; background: #fdf1e3; }
img { max-width: 100%; } .small { color: #555; font-size: .85rem; }
.figure { font-size: 1.5rem; font-weight: 600; }
"""


def make_page(report: dict[str, Any], image: bytes) -> str:
    """Writes the page.

    Args:
      report: What `report.make_report` gives.
      image: The picture, a PNG; it is put into the page.
    """
    run = report["run"]
    picture = base64.b64encode(image).decode("ascii")
    parts = [
        f"<h1>What a thief gets: {_text(run['algorithm'])} on {_text(run['data'])}</h1>",
        "<h2>In short</h2>",
        "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in report["conclusions"]) + "</ul>",
        "<h2>What was protected, and at which cost</h2>",
        _protected(report),
        "<h2>From whom</h2>",
        _coalitions(report),
        f'<img alt="Scores of all attacks by coalition" src="data:image/png;base64,{picture}">',
        "<h2>All attacks</h2>",
        *(_attacks(name, each, report) for name, each in report["adversaries"].items()),
        "<h2>What clients give away</h2>",
        _findings(report),
        "<h2>How to read this</h2>",
        _explanations(report),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Audit</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _protected(report: dict[str, Any]) -> str:
    run, models, sent = report["run"], report["models"], report["bytes"]
    settings = f"p1 = {run['p1']}, p2 = {run['p2']}, {run['bits']} bits"
    benefit = report["kept_benefit"]
    kept = (
        f"Kept benefit U: <span class='figure'>{with_interval(benefit, 2)}</span> of what FedAvg, "
        f"which hides nothing, gains on the same data."
        if benefit
        else "Kept benefit U: not known; give a FedAvg run on the same data by --reference."
    )
    rows = "".join(
        f"<tr><td>{label}</td><td class='number'>{with_interval(models[name])}</td></tr>"
        for name, label in (
            ("start", "the owner's model before the rounds"),
            ("global", "the owner's model after the rounds"),
            ("fedavg", "FedAvg, which hides nothing"),
        )
        if name in models
    )
    return (
        f"<p>The owner's model was trained for {run['rounds']} rounds with {run['clients']} "
        f"clients, {run['cohort']} a round ({_text(settings)}, as far as the algorithm uses "
        f"them).</p><table><tr><th>model</th><th class='number'>{_text(report['score'])}</th></tr>"
        f"{rows}</table><p>{kept}</p><p>A client receives {sent['down']:,.0f} bytes a round, from "
        f"FedAvg {sent['fedavg_down']:,.0f}.</p>"
    )


def _coalitions(report: dict[str, Any]) -> str:
    rows = []
    for name, each in report["adversaries"].items():
        share = with_interval(each["protected_share"], 2)
        least = with_interval(each["protected_share_at_least"], 2)
        if each["nothing_to_protect"]:
            share, least = "nothing to protect", ""
        alone, attack = each["alone"], each["best"]
        rows.append(
            f"<tr><td>{coalition(name, each)}</td>"
            f"<td class='number'>{100 * each['known_share']:.0f}%</td>"
            f"<td class='number'>{with_interval(alone['score']) if alone else '-'}</td>"
            f"<td class='number'>{with_interval(attack['score']) if attack else '-'}</td>"
            f"<td>{_text(attack['title']) if attack else 'received nothing'}</td>"
            f"<td class='number'>{share}</td><td class='number'>{least}</td></tr>"
        )
    return (
        "<table><tr><th>thief</th><th class='number'>columns known</th>"
        "<th class='number'>alone</th><th class='number'>best attack</th><th>which</th>"
        "<th class='number'>protected share P</th><th class='number'>at least</th></tr>"
        + "".join(rows)
        + "</table>"
    )


def _attacks(name: str, each: dict[str, Any], report: dict[str, Any]) -> str:
    picked = {(each[kind] or {}).get("attack") for kind in ("alone", "best")}
    rows = []
    for one in each["attacks"]:
        if "not_played" in one:
            rows.append(
                f"<tr class='small'><td>{_text(one['title'])}</td>"
                f"<td colspan='3'>not played: {_text(one['not_played'])}</td></tr>"
            )
            continue
        style = " class='chosen'" if one["name"] in picked else ""
        rows.append(
            f"<tr{style}><td>{_text(one['title'])}</td>"
            f"<td class='number'>{with_interval(one['interval'])}</td>"
            f"<td class='number'>{one['fidelity']:.3f}</td><td>{_text(one['needed'])}</td></tr>"
        )
    return (
        f"<h3>{_text(coalition(name, each))}: {each['proxies']} proxies of {each['rounds']} "
        f"rounds, {each['train_rows']} rows to train on, {each['held_rows']} held back</h3>"
        f"<table><tr><th>attack</th><th class='number'>{_text(report['score'])}</th>"
        f"<th class='number'>fidelity</th><th>what it needed</th></tr>{''.join(rows)}</table>"
    )


def _findings(report: dict[str, Any]) -> str:
    rows = []
    for name, each in report["adversaries"].items():
        who = coalition(name, each)
        for kind, text in finding_texts(each["findings"]).items():
            rows.append(f"<tr><td>{who}</td><td>{_text(kind)}</td><td>{_text(text)}</td></tr>")
    return (
        "<table><tr><th>thief</th><th>attack</th><th>found</th></tr>" + "".join(rows) + "</table>"
    )


def finding_texts(findings: dict[str, Any]) -> dict[str, str]:
    """What the attacks that make no model have found, in words."""
    texts = {}
    for name, facts in findings.items():
        if "not_played" in facts:
            texts[name] = f"not played: {facts['not_played']}"
        elif name == "membership":
            kinds = [(k, facts[k]) for k in ("loss_threshold", "lira") if k in facts]
            texts[name] = "; ".join(
                f"{'loss threshold' if kind == 'loss_threshold' else 'LiRA'}: area under the curve "
                f"{found['auc']:.3f} (chance .5), {100 * found['found']:.1f}% of members found at "
                f"1% false alarms"
                for kind, found in kinds
            )
        elif "learned" in facts:
            change = facts["largest_change"]
            texts[name] = (
                f"one-way rounds: the proxies that were received differ by up to {change:.3g} "
                "where they show the same entries, which should be 0"
                if facts["learned"]
                else "one-way rounds: all proxies that were received are the same where they show "
                "the same entries, so nothing is learned of the others' updates"
            )
        else:
            texts[name] = (
                f"others' mean update known to a cosine of {facts['cosine']:.3f} on "
                f"{100 * facts['compared']:.0f}% of the entries (rounds "
                f"{', '.join(map(str, facts['rounds']))})"
            )
    return texts


def _explanations(report: dict[str, Any]) -> str:
    return (
        "<p>P = (owner - best attack) / (owner - alone): 1 is full protection, 0 none. The best "
        "attack and all its settings are chosen on rows that the thief holds back, never on the "
        "test rows; 'at least' is P by the attack that turned out best on the test rows, a bound "
        "for a thief with a lucky hand. Intervals hold "
        f"{100 * report['level']:.0f}% of 1000 resamples of the {report['test_rows']:,} test rows; "
        "they do not show the spread between seeds. Fidelity is the share of test rows on which "
        "the thief's model answers as the owner's. An audit shows what these attacks reach; a "
        "better attack may reach more.</p>"
        f"<p class='small'>Measured on {_text(report['device'])}. The run was replayed; its end "
        f"differs from the recorded one by at most {report['replay_difference']:.1e}.</p>"
    )
