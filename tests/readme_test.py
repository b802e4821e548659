"""The README's example runs as it is printed, and its commands name what exists."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("quick_compilation")
def test_the_example_runs(capsys):
    (example,) = blocks("python")
    assert len(example.strip().splitlines()) <= 20
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    shown = capsys.readouterr().out
    for view in ("global", "server", "proxy", "attacker_1"):
        accuracy = float(re.search(rf"{view} +([0-9.]+)", shown).group(1))
        # The example's classes are separable: every view is far above chance, a third.
        assert accuracy > 0.6


def test_the_two_commands():
    first, second = blocks("bash")[:2]
    assert first.startswith("pip install . && python -m fedqsn_jax.main --config=configs/digits.py")
    assert second.startswith("pip install '.[test]' && pytest")
    assert first.count("\n") == second.count("\n") == 1


def test_every_field_is_in_the_readme():
    from fedqsn_jax.config import Config, flatten

    missing = [name for name in flatten(Config()) if f"`{name}`" not in README]
    assert not missing
