"""A tiny sweep that tests share."""

from pathlib import Path

CONFIG = [
    "--config=configs/digits.py",
    "--config.rounds_per_call=2",
    "--config.evaluation.attackers=(2,)",
    "--config.evaluation.proxy_samples=2",
    "--config.evaluation.every=2",
    "--config.pretraining.steps=2",
    "--config.client.steps=1",
    "--config.cohort.size=3",
    "--config.model.hidden=(16,)",
    "--config.rounds=3",
]


def sweep_file(directory: Path, grids: object) -> str:
    """Writes a sweep's file and returns the option that names it."""
    file = directory / "grid.py"
    file.write_text(f"def get_sweep():\n    return {grids!r}\n")
    return f"--sweep={file}"
