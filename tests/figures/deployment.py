"""Measures a deployment of real processes on loopback; needs the extra ``deploy``.

  python tests/figures/deployment.py nodes --count=20 --rounds=3
  python tests/figures/deployment.py bytes --raw=DIR --rounds=3

The first runs a tiny model on so many nodes, and reads the peak resident memory of the server's
program and of the SuperLink from ``/proc``. The second sends 10 MB to each of 3 nodes and back,
first by the Flower application in ``DIR``, which only turns bytes round, then by ours with one
training step.
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
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--raw", type=Path)
    options = parser.parse_args()
    print(time.strftime("%Y-%m-%d"), platform.platform(), flush=True)
    with tempfile.TemporaryDirectory() as place:
        if options.what == "nodes":
            measure_nodes(Path(place), options.count, options.rounds)
        else:
            raw = measure_raw(Path(place), options.raw, options.rounds)
            print("raw bytes, seconds of each round:", raw, flush=True)
            ours = measure_bytes(Path(place), options.rounds)
            print("ours, seconds of each round:", ours)
            later = [statistics.mean(seconds[1:]) for seconds in (ours, raw)]
            print(
                f"after the first: {later[0]:.1f} against {later[1]:.1f}, {later[0] / later[1]:.2f}"
            )


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


def measure_nodes(place: Path, count: int, rounds: int) -> None:
    """Prints the rounds' seconds and the peak memory of the server's side."""
    config = configured(count, rounds, model={"hidden": (32,)})
    peaks: dict[str, int] = {}
    with deployed(place, config, count) as running:

        def ended() -> bool:
            for name, peak in running.peaks_of_server().items():
                peaks[name] = max(peak, peaks.get(name, 0))
            return bool(running.outcome())

        wait_until(ended, 1500, "the run")
        print(running.outcome())
        print("nodes:", count, "peak resident MB:", {k: v // 1024 for k, v in peaks.items()})
        for entry in running.history()[1:]:
            print({name: entry[name] for name in ("round", "clients/returned", "seconds")})


def measure_bytes(place: Path, rounds: int) -> list[float]:
    """Returns the seconds of each round with payloads of 10 MB both ways."""
    own = place / "own"
    own.mkdir()
    # 64 * 1536 + 1536 * 1536 + 1536 * 10 weights and 3082 biases, 4 bytes each: 9.9 MB.
    config = configured(3, rounds, model={"hidden": (1536, 1536)}, algorithm="fedavg")
    with deployed(own, config, 3) as running:
        wait_until(running.outcome, 900, "the run")
        history = running.history()
        print({name: history[-1][f"bytes/{name}_per_client"] for name in ("down", "up")})
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
