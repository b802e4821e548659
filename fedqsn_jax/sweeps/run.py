"""A sweep: its points, program by program, each kept as soon as it is finished."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fedqsn_jax.config.schema import Config, ConfigError
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.host.signals import cleaning_up
from fedqsn_jax.reporting.display import draw_safely
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.runs.preparation import Experiment
from fedqsn_jax.simulation.memory import answer_out_of_memory
from fedqsn_jax.simulation.running import Entry
from fedqsn_jax.sweeps.audits import PREFIX, PointAudit, references, with_shares
from fedqsn_jax.sweeps.display import SweepDisplay
from fedqsn_jax.sweeps.estimates import Setting
from fedqsn_jax.sweeps.grid import SEED, Plan, Point, described, label_of, program_of
from fedqsn_jax.sweeps.program import (
    Program,
    may_be_side_by_side,
    settings_at_once,
    state_of,
)
from fedqsn_jax.sweeps.results import (
    Record,
    SweepDirectory,
    audit_name,
    identity,
    over_seeds,
    record_of,
)
from fedqsn_jax.sweeps.sources import Sources, Start
from fedqsn_jax.sweeps.warnings import warnings_after_sweep


def check(
    plan: Plan,
    directory: Path | None,
    at_once: int = 0,
    sources: Sources | None = None,
    audit: PointAudit | None = None,
) -> list[tuple[list[Point], str]]:
    """Makes sure that every point that is left can be run; trains and writes nothing.

    The sweep itself may be at work meanwhile.

    Args:
      plan: The sweep.
      directory: Where, if that is known.
      at_once: Points side by side; 0: what fits and pays.
      sources: Where data and models come from.
      audit: Is asked whether it can audit the points.

    Returns:
      The points that are left, program by program, each with how its clients are run.

    Raises:
      ConfigError: A point is not possible, or the directory does not serve this sweep.
    """
    records: list[Record] = []
    sources = sources or Sources()
    if audit is not None:
        references(plan)
    if directory is not None:
        files = SweepDirectory(directory)
        files.check_fit(plan)
        records = files.read()
    groups = []
    for points in by_program(_missing(plan, records)):
        experiment = _prepare(points[0], sources)
        simulation = experiment.simulation
        if audit is not None:
            audit.check(experiment)
        if at_once > 1 and not may_be_side_by_side(simulation, experiment.problem.splits.clients):
            raise ConfigError(
                f"--at_once={at_once}: allowed is 0 or 1 where several devices share a cohort, or "
                f"clients' rows are on the host"
            )
        groups.append((points, simulation.choice.reason))
    return groups


def run(
    plan: Plan,
    directory: Path,
    display: SweepDisplay,
    at_once: int = 0,
    audit: PointAudit | None = None,
) -> None:
    """Runs what is left of a sweep, and writes and shows what it came to.

    Args:
      plan: The sweep.
      directory: Where everything is written; see `results.SweepDirectory`.
      display: Where progress is shown.
      at_once: Points side by side; 0: what fits and pays.
      audit: Audits every finished point; None: points are not audited.

    Raises:
      ConfigError: A point is not possible (nothing was run then), or the directory belongs to
        another sweep.
      OutOfMemoryError: The device ran out of memory; finished points are kept.
    """
    plan = plan._replace(audit=audit.described if audit else None)
    files = SweepDirectory(directory)
    files.check(plan)
    sources = Sources()
    with display.waiting("checking every program of the sweep"):
        groups = check(plan, directory, at_once, sources, audit)
    with files.claim(plan):
        records = files.read()
        missing = _missing(plan, records)
        display.start(len(plan.points), len(missing), len(groups), plan.repeated, str(directory))
        for line in plan.warnings:
            display.warning(line)
        total = sum(point.config.rounds for point in plan.points)
        done = total - sum(point.config.rounds for point in missing)
        with (
            # Also of what an interruption leaves, wherever it comes.
            cleaning_up(lambda: _write_tables(files, plan)),
            display.sweep_progress(
                (total, done), (len(plan.points), len(records)), len(groups)
            ) as progress,
        ):
            for points in by_program(missing):
                progress.begin_program()
                for batch, rounds, ends in _run_program(points, at_once, sources):
                    if ends is None:
                        progress.update(done + rounds)
                        continue
                    new = []
                    for point, end in zip(batch, ends, strict=True):
                        told = _audited(plan, point, end, files, sources, audit)
                        new.append(record_of(point, {**end.metrics, **told}))
                    files.append(new)
                    records += new
                    done += rounds
                    progress.update(done, new)
        _report(files, _settings(records, plan), plan, display)
        for line in _warnings_after(plan, records):
            display.warning(line)


def _write_tables(files: SweepDirectory, plan: Plan) -> None:
    records = files.read()
    settings = _settings(records, plan)
    if settings:
        files.write_tables(records, settings)


def _settings(records: Sequence[Record], plan: Plan) -> list[Setting]:
    settings = over_seeds(records, _order(plan))
    return with_shares(settings, records, plan) if settings and plan.audit else settings


class _End(NamedTuple):
    """How a point ended: its metrics, what it started from, and how to get its last state."""

    metrics: Entry
    start: Start
    state: Callable[[], ServerState]


def _audited(
    plan: Plan,
    point: Point,
    end: _End,
    files: SweepDirectory,
    sources: Sources,
    audit: PointAudit | None,
) -> dict[str, Any]:
    """What an audit says of a finished point, by names that tell where it comes from."""
    if audit is None:
        return {}
    files.audits.mkdir(mode=0o700, exist_ok=True)
    directory = files.audits / audit_name(plan, point)
    found = audit(_prepare(point, sources), end.start.params, end.state(), directory)
    return {f"{PREFIX}{name}": value for name, value in found.items()}


def by_program(points: Sequence[Point]) -> list[list[Point]]:
    """Groups points that share a compiled program, those of a seed one after the other."""
    groups: dict[Config, list[Point]] = {}
    for point in points:
        groups.setdefault(program_of(point.config), []).append(point)
    return [sorted(group, key=lambda point: point.config.seed) for group in groups.values()]


def _run_program(
    points: Sequence[Point], at_once: int, sources: Sources
) -> Iterator[tuple[Sequence[Point], int, list[_End] | None]]:
    """Runs the points of one program.

    Yields:
      The points that are running, their finished rounds taken together, and at their end how each
      ended.
    """
    experiment = _prepare(points[0], sources)
    program = Program(experiment)
    auto = settings_at_once(
        program.simulation, experiment.problem, len(points), jax.default_backend()
    )
    count = min(at_once or auto, len(points))
    starts: dict[int, Start] = {}
    for first in range(0, len(points), count):
        batch = points[first : first + count]
        seeds = {point.config.seed for point in batch}
        starts = {seed: start for seed, start in starts.items() if seed in seeds}
        chunk = program.simulation.choice.axis.chunk_size
        with answer_out_of_memory(batch[0].config, chunk, _what_stands, count):
            for point in batch:
                if point.config.seed not in starts:
                    own = experiment if point is points[0] else _prepare(point, sources)
                    starts[point.config.seed] = sources.start(own)
            yield from _run_batch(program, batch, starts, count)


def _what_stands() -> str:
    return "finished points are kept, the same command runs the others"


def _run_batch(
    program: Program, batch: Sequence[Point], starts: dict[int, Start], count: int
) -> Iterator[tuple[Sequence[Point], int, list[_End] | None]]:
    configs = [point.config for point in batch]
    own = [starts[config.seed] for config in configs]
    latest: list[Entry] = []
    last: Any = None
    if count == 1:
        for finished, state, entry in program.run_one(configs[0], own[0]):
            last, latest = state, [entry]
            yield batch, finished, None
    else:
        # The last batch is filled up, so that it runs in the same program.
        spare = count - len(batch)
        filled = configs + spare * configs[-1:], own + spare * own[-1:]
        for finished, state, entries in program.run_all(*filled):
            last, latest = state, entries[: len(batch)]
            yield batch, finished * len(batch), None

    def state_at(place: int) -> ServerState:
        return last if count == 1 else state_of(last, place)

    score = f"start/{program.simulation.task.score}"
    ends = [
        _End({**entry, score: start.score}, start, functools.partial(state_at, place))
        for place, (entry, start) in enumerate(zip(latest, own, strict=True))
    ]
    yield batch, configs[0].rounds * len(batch), ends


def _order(plan: Plan) -> list[Mapping[str, Any]]:
    """The settings, each once."""
    return list({identity(point.settings, 0): point.settings for point in plan.points}.values())


def _report(
    files: SweepDirectory, settings: Sequence[Setting], plan: Plan, display: SweepDisplay
) -> None:
    """Shows the tables, and draws the pictures."""
    display.table_of(settings)
    base = plan.base
    data = base.data.task if base.data.name == "text" else base.data.name
    rounds = sorted({point.config.rounds for point in plan.points})
    title = f"{data}, {' or '.join(map(str, rounds))} rounds"
    written = [files.table, files.points]
    for picture, rival in ((files.attacker_picture, "attacker"), (files.proxy_picture, "proxy")):

        def draw(picture: Path = picture, rival: str = rival) -> None:
            from fedqsn_jax.sweeps import trade_off  # Slow to import, only needed at the end.

            trade_off.draw(settings, picture, rival, title)
            written.append(picture)

        draw_safely(display, picture.name, draw)
    if plan.audit:
        display.shares_of(settings)

        def draw_frontier() -> None:
            from fedqsn_jax.sweeps import frontier

            frontier.draw(settings, files.frontier_picture, title)
            written.append(files.frontier_picture)

        draw_safely(display, files.frontier_picture.name, draw_frontier)
        written.append(files.audits)
    display.written(written)


def _warnings_after(plan: Plan, records: Sequence[Record]) -> list[str]:
    metrics = {identity(each["settings"], each[SEED]): each["metrics"] for each in records}
    ends = [
        (each.config, metrics[identity(each.settings, each.config.seed)]) for each in plan.points
    ]
    return warnings_after_sweep(ends, [label_of(point) for point in plan.points])


def _missing(plan: Plan, records: Sequence[Record]) -> list[Point]:
    finished = {identity(each["settings"], each[SEED]) for each in records}
    return [
        point
        for point in plan.points
        if identity(point.settings, point.config.seed) not in finished
    ]


def _prepare(point: Point, sources: Sources) -> Experiment:
    try:
        return sources.prepare(point.config)
    except UserError as error:
        where = described(label_of(point))
        raise ConfigError(f"{error} (at the sweep's point {where})") from error
