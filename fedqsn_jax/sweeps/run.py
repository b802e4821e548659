"""A sweep: its points, program by program, each kept as soon as it is finished."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fedqsn_jax.config.schema import Config, ConfigError
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.host.signals import cleaning_up
from fedqsn_jax.reporting.display import draw_safely
from fedqsn_jax.runs.experiment import Experiment
from fedqsn_jax.simulation.memory import answer_out_of_memory
from fedqsn_jax.simulation.running import Entry
from fedqsn_jax.sweeps.display import SweepDisplay
from fedqsn_jax.sweeps.estimates import Setting
from fedqsn_jax.sweeps.grid import SEED, Plan, Point, described, label_of, program_of
from fedqsn_jax.sweeps.program import Program, may_be_side_by_side, settings_at_once
from fedqsn_jax.sweeps.results import Record, SweepDirectory, identity, over_seeds, record_of
from fedqsn_jax.sweeps.sources import Sources, Start
from fedqsn_jax.sweeps.warnings import warnings_after_sweep


def check(
    plan: Plan, directory: Path | None, at_once: int = 0, sources: Sources | None = None
) -> list[tuple[list[Point], str]]:
    """Makes sure that every point that is left can be run; trains and writes nothing.

    The sweep itself may be at work meanwhile.

    Args:
      plan: The sweep.
      directory: Where, if that is known.
      at_once: Points side by side; 0: what fits and pays.
      sources: Where data and models come from.

    Returns:
      The points that are left, program by program, each with how its clients are run.

    Raises:
      ConfigError: A point is not possible, or the directory does not serve this sweep.
    """
    records: list[Record] = []
    sources = sources or Sources()
    if directory is not None:
        files = SweepDirectory(directory)
        files.check_fit(plan)
        records = files.read()
    groups = []
    for points in by_program(_missing(plan, records)):
        experiment = _prepare(points[0], sources)
        simulation = experiment.simulation
        if at_once > 1 and not may_be_side_by_side(simulation, experiment.problem.splits.clients):
            raise ConfigError(
                f"--at_once={at_once}: allowed is 0 or 1 where several devices share a cohort, or "
                f"clients' rows are on the host"
            )
        groups.append((points, simulation.choice.reason))
    return groups


def run(plan: Plan, directory: Path, display: SweepDisplay, at_once: int = 0) -> None:
    """Runs what is left of a sweep, and writes and shows what it came to.

    Args:
      plan: The sweep.
      directory: Where everything is written; see `results.SweepDirectory`.
      display: Where progress is shown.
      at_once: Points side by side; 0: what fits and pays.

    Raises:
      ConfigError: A point is not possible (nothing was run then), or the directory belongs to
        another sweep.
      OutOfMemoryError: The device ran out of memory; finished points are kept.
    """
    files = SweepDirectory(directory)
    files.check(plan)
    sources = Sources()
    with display.waiting("checking every program of the sweep"):
        groups = check(plan, directory, at_once, sources)
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
                for batch, rounds, entries in _run_program(points, at_once, sources):
                    if entries is None:
                        progress.update(done + rounds)
                        continue
                    new = [record_of(*pair) for pair in zip(batch, entries, strict=True)]
                    files.append(new)
                    records += new
                    done += rounds
                    progress.update(done, new)
        _report(files, over_seeds(records, _order(plan)), plan.base, display)
        for line in _warnings_after(plan, records):
            display.warning(line)


def _write_tables(files: SweepDirectory, plan: Plan) -> None:
    records = files.read()
    settings = over_seeds(records, _order(plan))
    if settings:
        files.write_tables(records, settings)


def by_program(points: Sequence[Point]) -> list[list[Point]]:
    """Groups points that share a compiled program, those of a seed one after the other."""
    groups: dict[Config, list[Point]] = {}
    for point in points:
        groups.setdefault(program_of(point.config), []).append(point)
    return [sorted(group, key=lambda point: point.config.seed) for group in groups.values()]


def _run_program(
    points: Sequence[Point], at_once: int, sources: Sources
) -> Iterator[tuple[Sequence[Point], int, list[Entry] | None]]:
    """Runs the points of one program.

    Yields:
      The points that are running, their finished rounds taken together, and at their end their
      metrics.
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
) -> Iterator[tuple[Sequence[Point], int, list[Entry] | None]]:
    configs = [point.config for point in batch]
    own = [starts[config.seed] for config in configs]
    latest: list[Entry] = []
    if count == 1:
        for finished, _, entry in program.run_one(configs[0], own[0]):
            latest = [entry]
            yield batch, finished, None
    else:
        # The last batch is filled up, so that it runs in the same program.
        spare = count - len(batch)
        filled = configs + spare * configs[-1:], own + spare * own[-1:]
        for finished, _, entries in program.run_all(*filled):
            latest = entries[: len(batch)]
            yield batch, finished * len(batch), None
    score = f"start/{program.simulation.task.score}"
    metrics = [{**entry, score: start.score} for entry, start in zip(latest, own, strict=True)]
    yield batch, configs[0].rounds * len(batch), metrics


def _order(plan: Plan) -> list[Mapping[str, Any]]:
    """The settings, each once."""
    return list({identity(point.settings, 0): point.settings for point in plan.points}.values())


def _report(
    files: SweepDirectory, settings: Sequence[Setting], base: Config, display: SweepDisplay
) -> None:
    """Shows the table, and draws the pictures."""
    display.table_of(settings)
    data = base.data.task if base.data.name == "text" else base.data.name
    title = f"{data}, {base.rounds} rounds"
    written = [files.table, files.points]
    for picture, rival in ((files.attacker_picture, "attacker"), (files.proxy_picture, "proxy")):

        def draw(picture: Path = picture, rival: str = rival) -> None:
            from fedqsn_jax.sweeps import trade_off  # Slow to import, only needed at the end.

            trade_off.draw(settings, picture, rival, title)
            written.append(picture)

        draw_safely(display, picture.name, draw)
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
