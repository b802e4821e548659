"""Measures a deployment of real processes on loopback; needs the extra ``deploy``.

  python tests/figures/deployment.py nodes --count=20 --rounds=3 --width=2048
  python tests/figures/deployment.py bytes --raw=DIR --rounds=4 --runs=2
  python tests/figures/deployment.py bytes --raw=DIR --count=1 --width=11000 --runs=0

The first runs a model with two layers of so many units on so many nodes, and reads the peak
resident memory of the server's program and of the SuperLink from ``/proc``. The second sends 10 MB
to each of 3 nodes and back, by the Flower application in ``DIR``, which only turns bytes round, and
by ours with one training step, in turn, so that both meet what else the machine has to do. The
third sends 484 MB by ours alone.
"""

import argparse
import contextlib
import itertools
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from deploy_processes import Deployment, wait_until

from fedqsn_jax.config.schema import Config, resolve
from fedqsn_jax.deploy import processes

FEATURES, CLASSES = 64, 10


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("nodes", "bytes"))
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    print(time.strftime("%Y-%m-%d"), platform.platform(), flush=True)
    if options.what == "nodes" or not options.runs:
        with tempfile.TemporaryDirectory() as place:
            measure_ours(Path(place), options.count, options.rounds, options.width)
        return
    later: dict[str, list[float]] = {"raw": [], "ours": []}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as place:
            raw = measure_raw(Path(place), options.raw, options.rounds)
        print("raw bytes, seconds of each round:", raw, flush=True)
        with tempfile.TemporaryDirectory() as place:
            ours = measure_ours(Path(place), options.count, options.rounds, options.width)
        print("ours, seconds of each round:", ours, flush=True)
        later["raw"] += raw[1:]
        later["ours"] += ours[1:]
    means = {name: statistics.mean(seconds) for name, seconds in later.items()}
    ratio = means["ours"] / means["raw"]
    print(f"after the first: {means['ours']:.1f} against {means['raw']:.1f}, {ratio:.2f}")


def rows(count: int, seed: int) -> dict[str, np.ndarray]:
    """Returns random rows."""
    random = np.random.default_rng(seed)
    image = random.normal(size=(count, FEATURES)).astype(np.float32)
    return {"image": image, "label": random.integers(0, CLASSES, count).astype(np.int32)}


def configured(clients: int, rounds: int, **sections: object) -> Config:
    """Returns the settings of a small run."""
    return resolve(
        {
            "rounds": rounds,
            "rounds_per_call": 1,
            "data": {"clients": clients},
            "cohort": {"size": clients},
            "client": {"steps": 1, "batch_size": 8},
            "pretraining": {"steps": 1, "batch_size": 8},
            "evaluation": {"attackers": (1,), "proxy_samples": 2},
            **sections,
        }
    )


def deployed(place: Path, config: Config, clients: int) -> Deployment:
    """Starts a deployment: SuperLink, nodes and run."""
    names = {f"client_{number}": rows(32, number) for number in range(clients)}
    given = {"private": rows(64, 100), "test": rows(64, 101), **names}
    running = Deployment(place, config, given, 600)
    running.start_link()
    for name in names:
        running.start_node(name)
    running.start_run()
    return running


def measure_ours(place: Path, count: int, rounds: int, width: int) -> list[float]:
    """Prints bytes and peak memory; returns the seconds of each round."""
    # 64 * 1536 + 1536 * 1536 + 1536 * 10 weights and 3082 biases, 4 bytes each: 9.9 MB.
    config = configured(count, rounds, model={"hidden": (width, width)}, algorithm="fedavg")
    peaks: dict[str, int] = {}
    with deployed(place, config, count) as running:

        def ended() -> bool:
            for name, peak in running.peaks_of_server().items():
                peaks[name] = max(peak, peaks.get(name, 0))
            return bool(running.outcome())

        wait_until(ended, 1500, "the run")
        print(running.outcome())
        history = running.history()
    print("nodes:", count, "peak resident MB:", {k: v // 1024 for k, v in peaks.items()})
    print({name: history[-1][f"bytes/{name}_per_client"] for name in ("down", "up")})
    print("returned:", [entry["clients/returned"] for entry in history[1:]])
    seconds = [entry["seconds"] for entry in history]
    return [round(after - before, 1) for before, after in itertools.pairwise(seconds)]


def measure_raw(place: Path, source: Path, rounds: int) -> list[float]:
    """Returns the seconds of each round of an application that turns bytes round."""
    app, home = place / "app", place / "flower"
    shutil.copytree(source, app)
    port = processes.free_port()
    processes.name_superlink(home, port)
    environment = processes.flower_environment(home)
    log = place / "raw.log"
    with contextlib.ExitStack() as running:
        link = running.enter_context(
            processes.process(processes.superlink(port), environment, place / "link.log")
        )
        processes.wait_for_port(port, link, place / "link.log")
        for number in range(3):
            command = processes.supernode(port, Path("unused"))
            command[-1] = f"--node-config=partition-id={number} num-partitions=3"
            own = processes.flower_environment(place / f"flower_{number}")
            running.enter_context(processes.process(command, own, place / f"node_{number}.log"))
        # It begins when two nodes are there.
        time.sleep(20)
        run = [processes.program("flwr"), "run", str(app), "fedqsn", "--stream"]
        # Its ten are of 2^20 bytes.
        run += ["--run-config", f"megabytes=10 rounds={rounds} wait=300.0"]
        running.enter_context(processes.process(run, environment, log))
        over = re.compile(r"ROUND \d+ over after ([0-9.]+)s")
        wait_until(lambda: len(over.findall(log.read_text())) == rounds, 600, "the raw bytes")
        text = log.read_text()
        assert text.count("ok=True") == 3 * rounds, text
        return [float(seconds) for seconds in over.findall(text)]


if __name__ == "__main__":
    main()
