"""Settings that do not do what they seem to are told before a run."""

import numpy as np
import pytest

from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.config.schema import Config, with_fields
from fedqsn_jax.protocol.quantization import NormalFloat, Uniform
from fedqsn_jax.simulation.warnings import warnings_before_run


def told(**values: object) -> list[str]:
    named = {name.replace("__", "."): value for name, value in values.items()}
    return warnings_before_run(with_fields(Config(), named), named)


def relative_error(levels: np.ndarray, block: int = 64) -> float:
    """Squared error of Gaussian values in blocks, by the nearest level, over their variance."""
    values = np.random.default_rng(0).standard_normal((20_000, block))
    scales = np.abs(values).max(axis=1, keepdims=True)
    levels = np.sort(np.asarray(levels, float))
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, values / scales)
    return float(np.mean((levels[nearest] * scales - values) ** 2))


def test_columns_of_public_adapters_that_stay_zero_are_told():
    (line,) = told(lora__rank=2, lora__public_base=True, p1=0.3)
    assert line.startswith("p1 = 0.3 with lora.public_base = True hides nothing: ")
    assert "zero" in line
    assert told(lora__rank=2, lora__public_base=True, p1=0.0) == []
    assert told(lora__rank=2, p1=0.3) == []
    assert told(algorithm="fedq", lora__rank=2, lora__public_base=True) == []


@pytest.mark.parametrize("codebook", ["normal_float", "uniform"])
@pytest.mark.parametrize("section", ["", "upload."])
def test_one_bit_is_told_to_be_worse_than_nothing(section, codebook):
    config = with_fields(Config(), {f"{section}bits": 1, f"{section}codebook": codebook})
    (line,) = warnings_before_run(config)
    assert line.startswith(f"{section}bits = 1: ")
    assert "worse than sending zeros" in line
    error = relative_error(
        {"normal_float": NormalFloat, "uniform": Uniform}[codebook](1, 64).levels
    )
    assert error == pytest.approx(3.74, abs=0.03)
    assert "3.74" in line


@pytest.mark.parametrize("section", ["", "upload."])
def test_two_bits_are_told_to_be_better_uniform(section):
    (line,) = warnings_before_run(with_fields(Config(), {f"{section}bits": 2}))
    assert relative_error(NormalFloat(2, 64).levels) == pytest.approx(0.316, abs=0.003)
    assert relative_error(Uniform(2, 64).levels) == pytest.approx(0.255, abs=0.003)
    assert line.startswith(f"{section}bits = 2 with {section}codebook = 'normal_float': ")
    assert ".316" in line
    assert line.endswith(f"with {section}codebook = 'uniform' it is .255")


def test_codes_that_do_well_or_are_not_used_are_not_told():
    assert told(bits=3) == []
    assert told(bits=2, codebook="uniform") == []
    assert told(bits=1, codebook="symmetric_normal_float") == []
    assert not any("worse" in line for line in told(bits=1, algorithm="fedsn"))


def test_the_warning_of_a_broken_promise_names_the_setting():
    (line,) = warnings_before_run(read_config("configs/digits.py:released", []))
    assert line.startswith("fedqsn with blocks = 'row' does not keep")
    assert line.endswith("what clients receive tells of hidden columns' values")


def test_private_rows_that_are_not_there_are_told():
    assert told(pretraining__rows=500) == [
        "pretraining.rows = 500: there are data.private_rows = 200, all of which are used"
    ]
    assert told(pretraining__rows=200) == []
    assert told(pretraining__rows=500, data__private_rows=600) == []
