"""Files of settings of every kind are read, and sections are given as such."""

import re
import shlex

import pytest
from locations import ROOT

from fedqsn_jax import federate
from fedqsn_jax.config.command_line import literal, read_config
from fedqsn_jax.config.schema import ConfigError

DATACLASS = """
from __future__ import annotations

import dataclasses
import typing

from fedqsn_jax.config import default_config


@dataclasses.dataclass
class Sizes:
    rounds: int = 7


def get_config(algorithm="fedqsn"):
    config = default_config()
    assert typing.get_type_hints(Sizes) == {"rounds": int}
    config.rounds, config.algorithm = Sizes().rounds, algorithm
    return config
"""


@pytest.mark.parametrize("folder", ["plain", "12:30", "a:b:c"])
def test_a_file_with_a_dataclass_in_a_folder_with_a_colon(tmp_path, folder):
    file = tmp_path / folder / "mine.py"
    file.parent.mkdir()
    file.write_text(DATACLASS)
    config = read_config(str(file), [])
    assert (config.rounds, config.algorithm) == (7, "fedqsn")
    assert read_config(f"{file}:fedavg", []).algorithm == "fedavg"


def test_an_argument_may_have_colons():
    assert read_config("configs/nlg.py:dart,/models/a:b", []).model.pretrained == "/models/a:b"


def test_a_file_that_does_not_exist_is_told_up_to_its_first_colon():
    with pytest.raises(ConfigError, match=r"^--config=nowhere\.py: no such file"):
        read_config("nowhere.py:a:b", [])


@pytest.mark.parametrize(
    "settings", [{"data": None}, {"evaluation": [1]}, {"cohort": 3}, {"pretraining": "none"}]
)
def test_a_section_that_is_none_is_refused_in_a_line(settings):
    import jax.numpy as jnp

    ((name, value),) = settings.items()
    rows = {"image": jnp.zeros((4, 3)), "label": jnp.zeros(4, int)}
    with pytest.raises(ConfigError) as error:
        federate((lambda params, batch, key: batch["image"], {}), [rows], rows, **settings)
    assert str(error.value) == (
        f"{name} = {value!r}: it is a section; allowed is a dictionary of its fields"
    )


def test_the_readme_of_configurations_shows_what_works(tmp_path):
    text = (ROOT / "configs" / "README.md").read_text()
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert set(blocks) == {"python", "bash"}
    file = tmp_path / "mine.py"
    file.write_text(blocks["python"])
    config = read_config(f"{file}:fedq", [])
    assert (config.algorithm, config.rounds, config.client.steps) == ("fedq", 20, 5)
    program, option, *overrides = shlex.split(blocks["bash"])[2:]
    assert (program, overrides.pop()) == ("fedqsn_jax.main", "--dry_run")
    config = read_config(option.removeprefix("--config="), overrides)
    assert (config.algorithm, config.client.steps) == ("fedavg", 5)


def test_a_number_that_is_too_small_is_not_taken_for_zero():
    assert [literal(text) for text in ("0.0", "0e5", "-0.", "1e-300")] == [0, 0, 0, 1e-300]
    assert [literal(text) for text in ("1e-400", "0.5E-999")] == ["1e-400", "0.5E-999"]
