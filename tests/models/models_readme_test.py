"""The code of the models' README runs."""

import re
from pathlib import Path

import pytest

import fedqsn_jax.models

README = (Path(fedqsn_jax.models.__file__).parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_code():
    assert len(BLOCKS) == 3
