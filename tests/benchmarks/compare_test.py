"""The comparison with other simulators reads reports and pairs runs as it says."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from locations import TESTS

_SPEC = importlib.util.spec_from_file_location("compare", TESTS / "peers" / "compare.py")
compare = importlib.util.module_from_spec(_SPEC)
sys.modules["compare"] = compare
_SPEC.loader.exec_module(compare)

FEDJAX = "jit round seconds [9.5, 1.2, 1.0, 1.1] wall_min 1.0 cpu_s_min 2.0\nparams 206262\n"
PFL = "pfl cnn torch 2 threads 2 round seconds [5.0, 5.25] wall_min 5.0 cpu_s_min 9.0\n"


@pytest.mark.parametrize(
    ("output", "warm_up", "rounds"), [(FEDJAX, 1, [1.2, 1.0, 1.1]), (PFL, 0, [5.0, 5.25])]
)
def test_rounds_are_read_without_the_warm_up(output, warm_up, rounds):
    assert compare.parse_rounds("WARNING: [x]\n" + output, warm_up) == rounds


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "printed no 'round seconds"),
        ("round seconds [1.0] wall_min 1.0", "no round beyond"),
        ("round seconds [1.0, soon] wall_min 1.0", "no list of seconds"),
    ],
)
def test_a_report_that_cannot_be_read_is_one_line(output, message):
    with pytest.raises(compare.RunError, match=message) as error:
        compare.parse_rounds(output, 1)
    assert "\n" not in str(error.value)


def test_ratios_are_of_pairs():
    runs = [
        compare.Run([2.0, 3.0, 4.0], {"fedavg": 1.0, "fedqsn": 1.5}),
        # A machine that became twice as slow between the pairs.
        compare.Run([4.0, 6.0, 8.0], {"fedavg": 2.0, "fedqsn": 3.0}),
        compare.Run([5.0], {"fedavg": 1.0, "fedqsn": 2.0}),
    ]
    summary = compare.summarize(runs)
    assert (summary["median"], summary["low"], summary["high"]) == (4.0, 2.0, 8.0)
    assert summary["over_fedavg"] == [3.0, 3.0, 5.0]
    assert summary["over_fedqsn"] == [2.0, 2.0, 2.5]


def test_other_data_are_refused():
    ours = [100, 10258, 313000, 6.5e6]
    compare.check_data(ours, [100, 10258, 313000, 6.5e6 + 1e-3])
    for theirs in ([100, 10257, 313000, 6.5e6], [100, 10258, 313000, 6.6e6]):
        with pytest.raises(compare.RunError, match="its data differ"):
            compare.check_data(ours, theirs)


@pytest.fixture
def peers(tmp_path):
    """A directory with a peer that answers, one that fails, and one that is missing."""
    Path(tmp_path, "data.py").write_text("")
    Path(tmp_path, "fedjax_bench.py").write_text(f"print({FEDJAX!r})")
    Path(tmp_path, "pfl_bench.py").write_text("raise ImportError('no torch here')")
    return tmp_path


def test_the_command_line(peers, tmp_path, monkeypatch, capsys):
    def run_ours(workload, calls, timeout):
        del calls, timeout
        return {"fedavg": 0.5, "fedqsn": 0.55}, {"jax": "0", "device": "cpu", "name": workload}

    facts = json.dumps([100, 10258, 313000, 6.5e6])
    monkeypatch.setattr(compare, "_OUR_DATA", f"print({facts!r})")
    monkeypatch.setattr(compare, "_PEER_DATA", f"print({facts!r})")
    monkeypatch.setattr(compare, "run_ours", run_ours)
    monkeypatch.setattr(compare, "versions", lambda *_: {"peer": "1"})
    out = tmp_path / "out.json"
    interpreters = [f"--python={name}={sys.executable}" for name in ("fedjax", "pfl")]
    arguments = [f"--peers={peers}", *interpreters, "--repeats=2", f"--out={out}"]
    assert compare.main(arguments) == 0
    report = json.loads(out.read_text())
    assert set(report["systems"]) == {"ours, fedavg", "ours, fedqsn", "fedjax"}
    assert report["systems"]["fedjax"]["over_fedqsn"] == pytest.approx([2, 2, 2])
    assert report["systems"]["fedjax"]["rounds"] == [1.2, 1.0, 1.1] * 2
    assert report["failed"] == {"pfl": "exit code 1: ImportError: no torch here"}
    errors = capsys.readouterr().err
    assert "flower: left out" in errors
    assert "Traceback" not in errors

    assert compare.main([f"--peers={peers}", f"--python=fedjax={peers}/none"]) == 1
    assert "fedjax: cannot start" in capsys.readouterr().err.replace("\n", " ")


def test_a_run_that_takes_too_long_is_ended_with_its_children(tmp_path):
    child = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    with pytest.raises(compare.RunError, match=r"longer than 0\.5 s"):
        compare.run([sys.executable, "-c", child], tmp_path, 0.5)


def test_a_peer_that_is_not_known(capsys):
    with pytest.raises(SystemExit) as error:
        compare.main(["--peers=.", "--python=other=/bin/python"])
    assert error.value.code == 2
    assert "NAME one of fedjax, pfl, flower" in capsys.readouterr().err
