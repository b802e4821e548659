"""Playing all attacks of all coalitions: what was received, attack after attack, what came of it.

Everything that is found is written at once, so that an audit that was interrupted goes on where it
was. What is kept of an attack is what it says of each test row, not its model.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedqsn_jax.audit.adversaries import Adversary, adversaries
from fedqsn_jax.audit.attacks import Attack, NotPlayedError, catalogue
from fedqsn_jax.audit.case import Case
from fedqsn_jax.audit.evaluation import Answers, fidelity, score_of
from fedqsn_jax.audit.findings import FINDINGS
from fedqsn_jax.audit.received import Holdings, Payloads, expected_bytes, hold, not_recorded
from fedqsn_jax.audit.replay import members_by_round, payload_layout, payloads_by_round, replay
from fedqsn_jax.audit.scene import AuditSettings, Scene, Tools, make_tools
from fedqsn_jax.audit.subtraction import pairs, plays
from fedqsn_jax.core.types import Params
from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.reporting.display import Display, bytes_text
from fedqsn_jax.rounds.pooled_rows import Divided, divide, pooled_rows

_SETTINGS = "settings.json"
RECEIVED, RESULTS = "received", "results"
"""Folders in an audit's directory: what clients were sent, and what came of each attack."""

_PLACES = 64
"""Rows are padded to a multiple of so many."""


class Played(NamedTuple):
    """What came of one attack.

    Attributes:
      name: The attack's.
      title: In words.
      adversary: The coalition's name.
      alone: Whether it used nothing of the server's.
      sums: What its model says of each test row; None: it was not played.
      facts: ``score``, ``fidelity``, ``held_score``, ``held_loss``, ``needed``, ``rate``,
        ``steps``, ``seconds``; or ``not_played`` with the reason.
    """

    name: str
    title: str
    adversary: str
    alone: bool
    sums: dict[str, np.ndarray] | None
    facts: dict[str, Any]

    @property
    def held(self) -> tuple[float, float] | None:
        """Score and loss on the rows that were held back."""
        if self.sums is None:
            return None
        return self.facts["held_score"], self.facts["held_loss"]


class Results(NamedTuple):
    """Everything that an audit has measured.

    Attributes:
      adversaries: The coalitions.
      played: All attacks that make a model.
      findings: What the others found: by coalition, then by attack.
      holdings: What each coalition holds, in figures.
      references: What models of the run say of each test row: ``global``, ``start``, ``fedavg``.
      replay_difference: See `replay.Replayed`.
    """

    adversaries: list[Adversary]
    played: list[Played]
    findings: dict[str, dict[str, Any]]
    holdings: dict[str, dict[str, Any]]
    references: dict[str, dict[str, np.ndarray]]
    replay_difference: float


class Store(NamedTuple):
    """Results in a directory, one file for each attack of each coalition."""

    directory: Path

    def begin(self, facts: dict[str, Any]) -> bool:
        """Makes the directory fit for an audit with such settings.

        Returns:
          Whether results of other settings were there and have been removed.
        """
        file = self.directory / _SETTINGS
        text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        others = file.exists() and file.read_text() != text
        if others:
            shutil.rmtree(self.directory)
            self.directory.mkdir(mode=0o700)
        with replacing(file) as temporary:
            temporary.write_text(text)
        return others

    def write(self, name: str, facts: dict[str, Any], sums: dict[str, np.ndarray]) -> None:
        """Writes one result, whole or not at all."""
        text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        with replacing(self.directory / f"{name}.npz") as temporary, temporary.open("wb") as file:
            arrays = {f"sums/{key}": each for key, each in sums.items()}
            np.savez(file, facts=text, **arrays)  # type: ignore[arg-type]

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Reads one result; None: it is not there, or damaged."""
        try:
            with np.load(self.directory / f"{name}.npz") as arrays:
                facts = json.loads(arrays["facts"].tobytes())
                sums = {key.removeprefix("sums/"): arrays[key] for key in arrays if key != "facts"}
        except (OSError, ValueError, KeyError, EOFError):
            return None
        return facts, sums


def record(
    case: Case,
    chosen: Sequence[Adversary],
    directory: Path,
    display: Display,
    changes: bool,
) -> tuple[Payloads, float]:
    """Makes sure that what the coalitions were sent is there, by a replay where it is not.

    Args:
      case: The run.
      chosen: The coalitions.
      directory: Where it is, or will be.
      display: Where progress is shown.
      changes: Whether what rounds did is wanted too, for the scoring of `subtraction`.

    Returns:
      The payloads, and the largest difference of the replayed model from the run's.
    """
    payloads = Payloads(directory)
    members = sorted({member for each in chosen for member in each.members})
    facts = payloads.facts()
    complete = facts and facts.get("rounds") == case.config.rounds
    complete = complete and (facts or {}).get("changes", True) >= changes
    if facts and complete and not not_recorded(payloads, members):
        display.message(f"what clients were sent is in {directory} already")
        return payloads, float(facts["difference"])
    by_round = payloads_by_round(case, members)
    count = sum(map(len, by_round.values()))
    size = bytes_text(expected_bytes(case, count))
    display.message(f"the run is replayed: {count} payloads to colluders, about {size} on the disk")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700, parents=True)
    rounds: set[int] = set()
    if changes and plays(case):
        for each in chosen:
            rounds |= set(pairs(members_by_round(case, each.members)))
    with display.steps("replaying rounds", case.config.rounds) as steps:
        replayed = replay(case, members, payloads.keep, lambda _: steps.add(1), sorted(rounds))
    for change in replayed.changes:
        payloads.keep_change(change.round, change.params)
    payloads.complete(
        {
            "clients": members,
            "rounds": case.config.rounds,
            "difference": replayed.difference,
            "changes": changes,
        }
    )
    return payloads, replayed.difference


def play(
    case: Case,
    settings: AuditSettings,
    directory: Path,
    display: Display,
    base: Params | None = None,
    reference: Params | None = None,
    named: Sequence[str] = (),
    tools: Tools | None = None,
) -> Results:
    """Plays all attacks, or reads those that were played before with the same settings.

    Args:
      case: The run.
      settings: How thorough the audit is.
      directory: Where everything is written.
      display: Where progress is shown.
      base: A public base, or None.
      reference: The model of a FedAvg run, or None.
      named: What base and reference are called, so that results of others are not taken up.
      tools: The shared programs, if those of an audit of the same model, task and settings are
        there.

    Raises:
      ConfigError: A coalition is larger than the population.
    """
    chosen = adversaries(case, settings.colluders)
    directory.mkdir(mode=0o700, exist_ok=True)
    payloads, difference = record(
        case, chosen, directory / RECEIVED, display, changes=settings.findings
    )
    store = Store(directory / RESULTS)
    made_with = {**dataclasses.asdict(settings), "rounds": case.config.rounds, "named": list(named)}
    if store.begin(json.loads(json.dumps(made_with))):
        display.message("results of an audit with other settings were removed")
    tools, owner = tools or make_tools(case, settings), jax.jit(case.owner)(case.final)
    models = {"global": owner, "start": jax.jit(case.owner)(case.start), "fedavg": reference}
    answers = {
        name: tools.answer(params, case.test)
        for name, params in models.items()
        if params is not None
    }
    divided = [divide(case.data, each.members, settings.seed) for each in chosen]
    places = _places(divided)
    attacks, played, findings, holdings = catalogue(settings), [], {}, {}
    wanted = FINDINGS if settings.findings else {}
    pace = _Pace(display, len(chosen) * (len(attacks) + len(wanted)))
    for adversary, own in zip(chosen, divided, strict=True):
        held = hold(
            payloads.read(payload_layout(case), adversary.members),
            adversary.members,
            case.sent(case.final.params),
            case.sites,
        )
        scene = Scene(
            case,
            settings,
            adversary,
            held,
            own,
            pooled_rows(own.train, own.held, places),
            tools,
            owner,
            base,
            answers["global"],
            max(len(each.members) for each in chosen),
            places,
        )
        holdings[adversary.name] = _in_figures(scene)
        for attack in attacks:
            played.append(_play_one(scene, attack, store, pace))
        findings[adversary.name] = {
            name: _find_one(scene, name, payloads, store, pace) for name in wanted
        }
    sums = {name: each.sums for name, each in answers.items()}
    return Results(chosen, played, findings, holdings, sums, difference)


def _places(divided: Sequence[Divided]) -> tuple[int, int]:
    """Places for the rows of the largest coalition, so many that programs serve other draws too."""

    def most(kind: str) -> int:
        rows = max(1, *(len(next(iter(getattr(each, kind).values()))) for each in divided))
        return -(-rows // _PLACES) * _PLACES

    return most("train"), most("held")


def _in_figures(scene: Scene) -> dict[str, Any]:
    holdings: Holdings = scene.holdings
    known = {path: float(columns.mean()) for path, columns in holdings.union.known.items()}
    return {
        "members": list(scene.adversary.members),
        "rounds": len(holdings.rounds),
        "proxies": holdings.payloads,
        "known_share": float(np.mean(list(known.values()))) if known else 1.0,
        "train_rows": scene.row_count,
        "held_rows": int(scene.rows.kept),
    }


def _play_one(scene: Scene, attack: Attack, store: Store, pace: "_Pace") -> Played:
    name = f"{scene.adversary.name}_{attack.name}"
    stored = store.read(name)
    if stored is None:
        began = time.perf_counter()
        facts, sums = _made(scene, attack)
        facts["seconds"] = round(time.perf_counter() - began, 3)
        store.write(name, facts, sums)
        pace.done(scene.adversary.name, attack.title, facts)
    else:
        facts, sums = stored
        pace.skip()
    return Played(
        attack.name, attack.title, scene.adversary.name, attack.alone, sums or None, facts
    )


def _made(scene: Scene, attack: Attack) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        outcome = attack.play(scene)
    except NotPlayedError as reason:
        return {"not_played": str(reason)}, {}
    held_score, held_loss = scene.held_score(outcome.params)
    answers: Answers = scene.tools.answer(outcome.params, scene.case.test)
    facts = {
        "score": score_of(answers, scene.case.task),
        "fidelity": fidelity(answers, scene.owner_test),
        # JSON has no NaN: a model that fails is the worst of all.
        "held_score": _finite(held_score, -1e30),
        "held_loss": _finite(held_loss, 1e30),
        "needed": outcome.needed,
        "rate": outcome.rate,
        "steps": outcome.steps,
    }
    return facts, answers.sums


def _finite(value: float, otherwise: float) -> float:
    return value if np.isfinite(value) else otherwise


def _find_one(
    scene: Scene, attack: str, payloads: Payloads, store: Store, pace: "_Pace"
) -> dict[str, Any]:
    name = f"{scene.adversary.name}_{attack}"
    stored = store.read(name)
    if stored is not None:
        pace.skip()
        return stored[0]
    title, find = FINDINGS[attack]
    try:
        facts = find(scene, payloads)
    except NotPlayedError as reason:
        facts = {"not_played": str(reason)}
    store.write(name, facts, {})
    pace.done(scene.adversary.name, title, facts)
    return facts


class _Pace:
    """Tells of every attack, and how long the rest will take."""

    def __init__(self, display: Display, total: int) -> None:
        self._display, self._total = display, total
        self._count = self._worked = 0
        self._began = time.perf_counter()

    def skip(self) -> None:
        self._count += 1

    def done(self, adversary: str, title: str, facts: dict[str, Any]) -> None:
        self._count += 1
        self._worked += 1
        if "not_played" in facts:
            return
        each = (time.perf_counter() - self._began) / self._worked
        left = max(0, round(each * (self._total - self._count)))
        score = f": {facts['score']:.3f}" if "score" in facts else ""
        self._display.message(
            f"{self._count:3} of {self._total}  {adversary:>4}  {title}{score}; {left} s left"
        )
