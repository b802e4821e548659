"""The deployment's commands: every mistake is one line and exit code 2."""

import pytest

from fedqsn_jax.deploy.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: demo, server, client or bundle"),
        (["demo"], "the following arguments are required: --workdir"),
        (["demo", "--workdir=DIR"], "no --config: name a file"),
        (
            ["demo", "--workdir=DIR", "--clients=few"],
            "argument --clients: invalid int value",
        ),
        (
            ["demo", "--workdir=DIR", "--config=configs/digits.py", "--config.p1=2"],
            "p1 = 2.0: allowed is 0 to below 1",
        ),
        (["bundle", "--out=DIR", "--clients=3"], "unrecognized arguments: --clients=3"),
    ],
)
def test_a_mistake_is_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").write_text(
        "from fedqsn_jax.config import default_config as get_config\n"
    )
    assert main(arguments) == 2
    output, error = capsys.readouterr()
    assert (output, error.count("\n")) == ("", 1)
    assert error.startswith(f"fedqsn_jax: {says}")
    assert not (tmp_path / "DIR").exists()
