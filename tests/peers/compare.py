"""Times rounds of this package beside other simulators, in turn, on one workload.

  python tests/peers/compare.py --peers=DIR --python fedjax=/env/bin/python --workload dense

``DIR`` holds the peers' own scripts (`PEERS` says which) and ``data.py``, which makes their data.
Each peer runs in an environment of its own, whose interpreter ``--python NAME=PATH`` names. The
order is ours, peer, ours, next peer, and so on, repeated; each run of a peer is paired with the run
of ours just before it, so that a drifting machine meets both. A round is the one of
`fedqsn_jax.benchmark`: 100 clients, 10,258 rows, batch 20, one epoch; that the peers' data are
these very rows is checked first. Rounds in which a system compiles or starts workers do not count.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
OURS = ("fedavg", "fedqsn")
WORKLOADS = ("cnn", "dense")
# Sums of the numbers of rows, of the labels, and of the absolute pixels.
_FACTS = "print(json.dumps([len(y), sum(map(len, y)), sum(int(a.sum()) for a in y), pixels]))"
_PEER_DATA = (
    "import json, numpy as np; from data import make; d = make()[0].values();"
    "y = [c['y'] for c in d]; pixels = sum(float(np.abs(c['x']).sum(dtype=float)) for c in d);"
) + _FACTS
_OUR_DATA = (
    "import json, numpy as np; from fedqsn_jax.workloads import make_population as make;"
    "d = make(); x, y = (np.asarray(d.examples[n]) for n in ('image', 'label'));"
    "y = np.split(y, np.asarray(d.offsets)[1:-1]); pixels = float(np.abs(x).sum(dtype=float));"
) + _FACTS


class Peer(NamedTuple):
    """How a peer is run and its report read.

    Attributes:
      script: Its file in the directory of the peers.
      warm_up: How many of the rounds that it prints compile or start workers.
      packages: The distributions whose versions are recorded.
    """

    script: str
    warm_up: int
    packages: tuple[str, ...]


PEERS = {
    "fedjax": Peer("fedjax_bench.py", 1, ("fedjax", "jax")),
    # Its first round is not among those printed.
    "pfl": Peer("pfl_bench.py", 0, ("pfl", "torch")),
    "flower": Peer("flower_bench.py", 1, ("flwr", "torch", "ray")),
}


class RunError(Exception):
    """A run that gave no figures; the message is one line for the user."""


class Run(NamedTuple):
    """One run of a peer and the run of ours just before it.

    Attributes:
      peer: Seconds of the peer's rounds.
      ours: Our median seconds a round, by algorithm.
    """

    peer: list[float]
    ours: Mapping[str, float]


def parse_rounds(output: str, warm_up: int) -> list[float]:
    """Reads a peer's report.

    Args:
      output: What it printed; the last ``round seconds [...]`` counts.
      warm_up: How many of the first rounds to leave out.

    Returns:
      The seconds of the other rounds.

    Raises:
      RunError: There is no such list, or no round is left.
    """
    # The ``wall_min`` behind the list is not read: peers differ in the rounds that it is taken of.
    found = re.findall(r"round seconds \[([^\]]*)\]", output)
    if not found:
        raise RunError("printed no 'round seconds [...]'")
    try:
        rounds = [float(text) for text in found[-1].split(",") if text.strip()][warm_up:]
    except ValueError:
        raise RunError(f"printed what is no list of seconds: [{found[-1]}]") from None
    if not rounds:
        raise RunError(f"printed no round beyond the first {warm_up}")
    return rounds


def parse_ours(report: Mapping[str, Any], workload: str) -> dict[str, float]:
    """Returns the median seconds a round by algorithm, from a report of our benchmark.

    Raises:
      RunError: The report lacks the workload or one of the algorithms.
    """
    try:
        algorithms = report["workloads"][workload]["algorithms"]
        return {name: float(algorithms[name]["median"]) for name in OURS}
    except KeyError as error:
        raise RunError(f"our benchmark's report lacks {error}") from None


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Compares a peer with ours, by pairs.

    Args:
      runs: At least one pair.

    Returns:
      JSON-able: ``median``, ``low`` and ``high`` of all the peer's rounds in seconds, and for each
      of our algorithms ``over_<name>``: median, lowest and highest over the pairs of the peer's
      median round divided by ours. Above 1, ours is the faster.
    """
    rounds = [seconds for pair in runs for seconds in pair.peer]
    summary: dict[str, Any] = {
        "median": statistics.median(rounds),
        "low": min(rounds),
        "high": max(rounds),
        "rounds": rounds,
    }
    for name in runs[0].ours:
        ratios = [statistics.median(pair.peer) / pair.ours[name] for pair in runs]
        summary[f"over_{name}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return summary


def run(command: Sequence[str], directory: Path, timeout: float) -> str:
    """Runs a command and returns its standard output.

    Raises:
      RunError: It cannot be started, fails, or takes longer than ``timeout`` seconds.
    """
    # What this process imports from must not leak into a peer's environment.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if directory == ROOT:
        environment["PYTHONPATH"] = str(ROOT)
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        raise RunError(f"cannot start {command[0]}: {error.strerror}") from None
    # Leaving closes the pipes and waits.
    with process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RunError(f"took longer than {timeout:g} s") from None
        finally:
            # Workers that outlive their parent would disturb the next run.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = (errors or output).strip().splitlines() or ["no message"]
        raise RunError(f"exit code {process.returncode}: {lines[-1]}")
    return output


def run_ours(workload: str, calls: int, timeout: float) -> tuple[dict[str, float], dict[str, Any]]:
    """Runs our benchmark; returns the medians by algorithm, and the whole report."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "report.json")
        settings = [f"--workload={workload}", f"--calls={calls}", "--rounds_per_call=1"]
        command = [sys.executable, "-m", "fedqsn_jax.benchmark", *settings, f"--out={out}"]
        run(command, ROOT, timeout)
        report = json.loads(out.read_text())
    return parse_ours(report, workload), report


def run_peer(name: str, python: str, directory: Path, workload: str, timeout: float) -> list[float]:
    """Runs a peer's script; returns the seconds of its rounds."""
    dense = ["--dense"] if workload == "dense" else []
    output = run([python, PEERS[name].script, *dense], directory, timeout)
    return parse_rounds(output, PEERS[name].warm_up)


def check_data(ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Compares clients, rows, sum of labels and sum of absolute pixels.

    Raises:
      RunError: They differ; the pixels by more than rounding.
    """
    same = list(ours[:3]) == list(theirs[:3]) and abs(ours[3] / theirs[3] - 1) < 1e-6
    if not same:
        raise RunError(f"its data differ from ours: {list(theirs)} instead of {list(ours)}")


def versions(python: str, packages: Sequence[str], timeout: float) -> dict[str, str]:
    """Returns the versions of distributions in an interpreter's environment."""
    code = (
        "import importlib.metadata as m, json, sys;"
        "print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    )
    found: dict[str, str] = json.loads(run([python, "-c", code, *packages], ROOT.parent, timeout))
    return found


def _interpreter(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if name not in PEERS or not path:
        allowed = ", ".join(PEERS)
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=PATH is wanted, NAME one of {allowed}")
    # Commands run in other directories. A link is kept: it is what makes an environment.
    return name, os.path.abspath(path)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 is wanted")
    return int(text)


def _print_table(facts: Mapping[str, Any]) -> None:
    title = f"{facts['workload']}, {facts['device']}, {facts['date']}"
    table = Table("system", "versions", title=title)
    for heading in ("s a round", "lowest-highest", *(f"over our {name}" for name in OURS)):
        table.add_column(heading, justify="right")
    for system, row in facts["systems"].items():
        numbers = " ".join(f"{name} {version}" for name, version in row["versions"].items())
        spread = f"{row['low']:.4g}-{row['high']:.4g}"
        ratios = [row.get(f"over_{name}") for name in OURS]
        cells = [f"{r[0]:.2f} ({r[1]:.2f}-{r[2]:.2f})" if r else "" for r in ratios]
        table.add_row(system, numbers, f"{row['median']:.4g}", spread, *cells)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if ours failed or no peer gave figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, required=True, help="directory of the peers' scripts")
    parser.add_argument("--python", type=_interpreter, action="append", default=[])
    parser.add_argument("--workload", choices=WORKLOADS, default="cnn")
    parser.add_argument("--repeats", type=_positive, default=3, help="pairs for each peer")
    parser.add_argument("--calls", type=_positive, default=3, help="rounds of ours in each run")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    console = Console(stderr=True, highlight=False)
    given = dict(options.python)
    peers = options.peers.resolve()
    used: dict[str, dict[str, str]] = {}
    failed: dict[str, str] = {}
    try:
        own = json.loads(run([sys.executable, "-c", _OUR_DATA], ROOT, options.timeout))
    except RunError as error:
        console.print(f"ours: {error}")
        return 1
    for name, peer in PEERS.items():
        if name not in given:
            console.print(f"{name}: left out, no --python {name}=PATH")
            continue
        try:
            if not (peers / peer.script).is_file():
                raise RunError(f"no {peer.script} in {peers}")
            data = run([given[name], "-c", _PEER_DATA], peers, options.timeout)
            check_data(own, json.loads(data))
            used[name] = versions(given[name], peer.packages, options.timeout)
        except RunError as error:
            failed[name] = str(error)
            console.print(f"{name}: {error}")

    pairs: dict[str, list[Run]] = {name: [] for name in used}
    medians: list[dict[str, float]] = []
    report: dict[str, Any] = {}
    for repeat in range(options.repeats):
        for name in used:
            if name in failed:
                continue
            try:
                ours, report = run_ours(options.workload, options.calls, options.timeout)
            except RunError as error:
                console.print(f"ours: {error}")
                return 1
            medians.append(ours)
            try:
                rounds = run_peer(name, given[name], peers, options.workload, options.timeout)
            except RunError as error:
                failed[name] = str(error)
                console.print(f"{name}: {error}")
                continue
            pairs[name].append(Run(rounds, ours))
            console.print(
                f"repeat {repeat + 1}: {name} {statistics.median(rounds):.4g} s, ours "
                + ", ".join(f"{key} {value:.4g} s" for key, value in ours.items())
            )
    if not any(pairs.values()):
        console.print("no peer gave figures")
        return 1
    systems: dict[str, Any] = {}
    for name in OURS:
        values = [each[name] for each in medians]
        systems[f"ours, {name}"] = {
            "versions": {"jax": report["jax"]},
            "median": statistics.median(values),
            "low": min(values),
            "high": max(values),
            "rounds": values,
        }
    for name, runs in pairs.items():
        if runs:
            systems[name] = {"versions": used[name], **summarize(runs)}
    facts = {
        "workload": options.workload,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": report["device"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "repeats": options.repeats,
        "systems": systems,
        "failed": failed,
    }
    _print_table(facts)
    if options.out:
        options.out.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    # So that a run which is under way is ended with its workers when this script is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
