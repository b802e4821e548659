"""A field is described once, and everything that is said of it comes from there."""

import json
import re

import numpy as np
import pytest
from locations import ROOT

from fedqsn_jax.cli.main import main
from fedqsn_jax.config.schema import Config, ConfigError, flatten, resolve, to_dict
from fedqsn_jax.tools import configuration_table

FIELDS = flatten(Config())
FLOATS = [name for name, value in FIELDS.items() if isinstance(value, float)]
INTEGERS = [name for name, value in FIELDS.items() if type(value) is int]


def resolved(name: str, value):
    section, _, field = name.rpartition(".")
    return resolve({section: {field: value}} if section else {field: value})


def refusal(name: str, value) -> str:
    with pytest.raises(ConfigError) as error:
        resolved(name, value)
    return str(error.value)


@pytest.mark.parametrize("name", FLOATS)
def test_no_float_is_infinite_or_too_large_for_the_device(name):
    for value in (float("inf"), float("-inf"), float("nan"), 1e39, -1e39, 10**400, -(10**400)):
        message = refusal(name, value)
        assert message.startswith(f"{name} = ")
        assert "allowed is " in message
        assert len(message) < 200


@pytest.mark.parametrize("name", FLOATS)
def test_no_float_becomes_zero_on_the_device(name):
    for value in (1e-39, -1e-50, 5e-324):
        message = refusal(name, value)
        assert message.startswith(f"{name} = {value!r}: that is 0 on the device; allowed is 0, or ")


@pytest.mark.parametrize("name", INTEGERS)
def test_no_integer_is_too_large_for_the_device(name):
    for value in (2**32, -(2**31) - 1, 10**5000, -(10**5000)):
        message = refusal(name, value)
        assert message.startswith(f"{name} = ")
        assert "allowed is " in message
        assert len(message) < 200


@pytest.mark.parametrize("name", ["rounds", "pretraining.steps", "client.steps"])
def test_counts_that_would_not_end_are_refused(name):
    assert refusal(name, 2_000_000_000) == f"{name} = 2000000000: allowed is 0 to 10000000"
    resolved(name, 10_000_000)


def test_sequences_have_ends():
    assert refusal("model.hidden", (8,) * 3000) == (
        "model.hidden: 3000 values: allowed are at most 100"
    )
    assert refusal("fedsp.layers", (2**31,)).startswith("fedsp.layers[0] = 2147483648: allowed is ")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("client.learning_rate=1e999", "client.learning_rate = inf: allowed is 0 to 3.40282e+38"),
        ("client.learning_rate=" + "9" * 401, "allowed is 0 to 3.40282e+38"),
        ("rounds=" + "9" * 5000, "rounds = "),
        ("seed=4294967296", "seed = 4294967296: allowed is 0 to below 2^32"),
        ("evaluation.attackers=(1,2147483648)", "attackers[1] = 2147483648: allowed is 1 to"),
    ],
)
def test_such_a_flag_is_answered_in_a_line(flag, message, capsys):
    assert main(["--config=configs/digits.py", f"--config.{flag}", "--dry_run"]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert len(shown) < 250


def test_a_seed_may_have_all_of_its_32_bits():
    assert resolve({"seed": 2**32 - 1}).seed == 2**32 - 1
    with pytest.raises(ConfigError, match="allowed is 0 to below 2\\^32"):
        resolve({"seed": 2**32})


def test_numbers_of_numpy_are_numbers():
    config = resolve({"p1": np.float32(0.25), "rounds": np.int64(3)})
    assert (config.p1, config.rounds) == (0.25, 3)
    assert (type(config.p1), type(config.rounds)) == (float, int)
    assert json.loads(json.dumps(to_dict(config)))["rounds"] == 3
    assert "allowed is a value of type int" in refusal("rounds", np.bool_(True))


def test_the_help_says_all_of_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for name, value in FIELDS.items():
        assert f"  {name} = {value!r}\n      " in shown
    lines = dict(re.findall(r"^  (\S+) = .*\n      (.*)$", shown, re.MULTILINE))
    assert lines["bits"] == (
        "width of a code; allowed: 1 to 8; used when algorithm is fedq, fedqsn or fedlpp"
    )
    assert lines["data.resident"].endswith("; allowed: auto, device, host")
    assert lines["fedsp.temperature"].endswith(
        "used when algorithm is fedsp and fedsp.distillation_steps is not 0"
    )
    assert all(lines.values())


def test_the_table_is_what_its_command_writes(tmp_path):
    committed = (ROOT / configuration_table.README).read_text()
    rows = re.findall(r"^\| `([^`]+)` \|", committed, re.MULTILINE)
    assert rows[: len(FIELDS)] == list(FIELDS)
    copy = tmp_path / "README.md"
    copy.write_text(re.sub(r"^\| `.*\n", "", committed, flags=re.MULTILINE))
    assert configuration_table.main([str(copy)]) == 0
    table = re.compile(r"<!-- The table.*<!-- End of", re.DOTALL)
    assert table.search(copy.read_text())[0] == table.search(committed)[0]


def test_a_file_without_a_place_for_the_table_is_refused(tmp_path, capsys):
    empty = tmp_path / "README.md"
    empty.write_text("nothing\n")
    assert configuration_table.main([str(empty)]) == 2
    assert configuration_table.main([str(tmp_path / "absent.md")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "no place for the table" in first
    assert "No such file" in second
    assert empty.read_text() == "nothing\n"
