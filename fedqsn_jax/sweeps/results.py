"""What a sweep leaves in its directory, point by point, and the statistics over seeds."""

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.config.schema import ConfigError, flatten
from fedqsn_jax.core.json_text import parse_json
from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.host.signals import cleaning_up
from fedqsn_jax.reporting.writers import to_plain, write_json
from fedqsn_jax.runs.claims import check_free, claim_directory
from fedqsn_jax.runs.disk_space import check_writable
from fedqsn_jax.sweeps.estimates import Setting, estimate
from fedqsn_jax.sweeps.grid import SEED, Plan, Point

_LONGEST_NAME = 160

Record = dict[str, Any]
"""A finished point: ``settings``, ``seed`` and ``metrics``."""


class SweepDirectory:
    """The directory of a sweep: ``sweep.json``, ``results.jsonl``, and what is made of them."""

    def __init__(self, path: Path) -> None:
        self.path = path = user_path(path)
        self.records = path / "results.jsonl"
        self.points = path / "points.csv"
        self.table = path / "results.csv"
        self.attacker_picture = path / "global_and_attacker.png"
        self.proxy_picture = path / "global_and_proxy.png"
        self.frontier_picture = path / "benefit_and_protection.png"
        self.audits = path / "audits"
        self._definition = path / "sweep.json"

    def check(self, plan: Plan) -> None:
        """Makes sure, without writing anything, that the directory can serve this sweep.

        Raises:
          ConfigError: Another one is at work in it, or as `check_fit` does.
        """
        check_free(self.path)
        self.check_fit(plan)

    def check_fit(self, plan: Plan) -> None:
        """Makes sure that the directory is, or could become, one of this sweep's.

        Nothing is written, and the sweep may be at work in it meanwhile.

        Raises:
          ConfigError: It belongs to another sweep, holds other things, or cannot be written.
        """
        check_writable(self.path)
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self._definition.exists():
            raise ConfigError(
                f"--workdir={self.path}: it holds other files and no {self._definition.name}; "
                f"name a new or empty directory"
            )
        try:
            stored = parse_json(self._definition.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--workdir={self.path}: {self._definition.name} cannot be read"
            ) from error
        different = _differences(plan, stored)
        if different:
            raise ConfigError(
                f"--workdir={self.path}: it was made by another sweep: {', '.join(different)}"
            )

    @contextmanager
    def claim(self, plan: Plan) -> Iterator[None]:
        """Creates the directory, keeps other sweeps out of it, and writes what it is for.

        If no point is finished in the ``with`` block, or was before, nothing of that remains.

        Raises:
          ConfigError: Another one is at work in it, or it does not serve this sweep (any more).
        """
        with claim_directory(self.path):
            # Before anything that could remove what another sweep has written.
            self.check_fit(plan)
            with cleaning_up(self._forget_nothing_done):
                if not self._definition.exists():
                    write_json(self._definition, _definition(plan))
                yield

    def _forget_nothing_done(self) -> None:
        if not self.records.exists():
            self._definition.unlink(missing_ok=True)

    def read(self) -> list[Record]:
        """Returns the finished points, in the order in which they were finished."""
        if not self.records.exists():
            return []
        records = []
        for line in self.records.read_text().splitlines(keepends=True):
            # The process may have been killed within a line.
            if line.endswith("\n"):
                records.append(json.loads(line))
        return records

    def what_remains(self) -> str:
        """Returns what an interrupted sweep leaves to the same command, in words."""
        if not self.records.exists() or b"\n" not in self.records.read_bytes():
            return "no point was finished, the same command starts again"
        return "finished points are kept, the same command runs the others"

    def append(self, records: Sequence[Record]) -> None:
        """Adds finished points; they are on the disk when this returns.

        A line that a killed process left in part is replaced.
        """
        kept = self.records.read_bytes() if self.records.exists() else b""
        whole = kept.rfind(b"\n") + 1
        lines = "".join(json.dumps(to_plain(each), allow_nan=False) + "\n" for each in records)
        with self.records.open("r+b" if kept else "wb") as file:
            file.truncate(whole)
            file.seek(whole)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def write_tables(self, records: Sequence[Record], settings: Sequence[Setting]) -> None:
        """Writes a row a point, and a row a setting with means and intervals over seeds."""
        rows = [{**each["settings"], SEED: each[SEED], **each["metrics"]} for each in records]
        _write_csv(self.points, rows)
        _write_csv(self.table, [_row_of(setting) for setting in settings])


def audit_name(plan: Plan, point: Point) -> str:
    """What the folder of a point's audit is called: its place in the sweep, and its settings."""
    label = {**point.settings, SEED: point.config.seed}
    text = "_".join(f"{name}={value}" for name, value in label.items() if value is not None)
    readable = re.sub(r"[^\w.=-]+", "-", text)[:_LONGEST_NAME]
    return f"{plan.points.index(point):04}_{readable}"


def record_of(point: Point, metrics: Mapping[str, Any]) -> Record:
    """Returns what is kept of a finished point."""
    kept = {name: value for name, value in metrics.items() if name not in ("round", "seconds")}
    return {"settings": point.settings, SEED: point.config.seed, "metrics": kept}


def identity(settings: Mapping[str, Any], seed: int) -> str:
    """Returns text that tells a sweep's points apart, the same before and after JSON."""
    return json.dumps([to_plain(settings), seed], sort_keys=True)


def over_seeds(records: Sequence[Record], order: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """Gathers finished points by setting.

    Args:
      records: The points.
      order: The settings, in the order wanted; those without any point are left out.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(identity(record["settings"], 0), []).append(record)
    settings = []
    for each in order:
        group = groups.pop(identity(each, 0), [])
        if group:
            # A point may lack what others have.
            names = dict.fromkeys(name for one in group for name in one["metrics"])
            metrics = {
                name: estimate([one["metrics"].get(name) for one in group]) for name in names
            }
            settings.append(Setting(dict(each), len(group), metrics))
    return settings


def _row_of(setting: Setting) -> dict[str, Any]:
    row = {**setting.settings, "seeds": setting.seeds}
    for name, (mean, half) in setting.metrics.items():
        row |= {name: mean, f"{name} ±": half}
    return row


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows([{name: _cell(value) for name, value in row.items()} for row in rows])


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _definition(plan: Plan) -> dict[str, Any]:
    definition = {"config": flatten(plan.base), "grids": plan.grids, "audit": plan.audit}
    return json.loads(json.dumps(to_plain(definition)))


def _differences(plan: Plan, stored: Any) -> list[str]:
    """What a sweep's definition says otherwise than a stored one, where it makes a difference."""
    ours, theirs = _definition(plan), stored if isinstance(stored, dict) else {}
    config, other = ours["config"], theirs.get("config", {})
    differing = [
        f"{name} = {config.get(name)!r} (there: {other.get(name)!r})"
        for name in sorted(config.keys() | other.keys())
        if config.get(name) != other.get(name) and name not in plan.idle
    ]
    differing += ["its grids differ"] * (theirs.get("grids") != ours["grids"])
    # Sweeps of earlier versions say nothing of audits.
    return differing + ["its audit differs"] * (theirs.get("audit") != ours["audit"])
