"""The README's example runs as it is printed, and its commands name what exists."""

import re
from pathlib import Path

import pytest
from locations import ROOT

from fedqsn_jax.cli.main import main

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("quick_compilation")
def test_the_example_runs(capsys):
    example = next(block for block in blocks("python") if "federate(" in block)
    assert len(example.strip().splitlines()) <= 20
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    shown = capsys.readouterr().out
    for view in ("global", "server", "proxy", "attacker_1"):
        accuracy = float(re.search(rf"{view} +([0-9.]+)", shown).group(1))
        # The example's classes are separable: every view is far above chance, a third.
        assert accuracy > 0.6


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_is_read_as_it_is_printed(tmp_path, monkeypatch):
    from sklearn.datasets import load_digits

    short = ["--config.rounds=1", "--config.client.steps=1", "--config.pretraining.steps=1"]
    config = Path("configs/digits.py").resolve()
    monkeypatch.chdir(tmp_path)
    assert main([f"--config={config}", *short, "--workdir=runs/digits"]) == 0
    reading = next(block for block in blocks("python") if ".load(" in block)
    names = {"images": load_digits().data[:5].astype("float32") / 16}
    exec(compile(reading, "README.md", "exec"), names)
    assert names["logits"].shape == (5, 10)
    assert names["trained"].config.p1 == 0.2


def test_the_contents_lead_to_headings():
    """By the names that are made of these: small letters, hyphens for spaces, nothing else."""
    headings = re.findall(r"^##+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^a-z -]", "", each.lower()).replace(" ", "-") for each in headings}
    contents = re.findall(r"\]\(#([^)]*)\)", README)
    assert set(contents) <= anchors
    # All of the upper ones are there, in order.
    upper = re.findall(r"^- \[([^]]*)\]\(#", README, re.MULTILINE)
    assert upper == re.findall(r"^## (.*)$", README, re.MULTILINE)[:-1]


def test_the_two_commands():
    first, second = blocks("bash")[:2]
    assert first.startswith("pip install . && python -m fedqsn_jax.main --config=configs/digits.py")
    assert second.startswith("pip install '.[test]' && pytest")
    assert first.count("\n") == second.count("\n") == 1


def test_every_field_is_in_the_readme():
    from fedqsn_jax.config.schema import Config, flatten

    missing = [name for name in flatten(Config()) if f"`{name}`" not in README]
    assert not missing
