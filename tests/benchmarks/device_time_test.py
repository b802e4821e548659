"""The time that a device is busy, of traces made by hand."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from fedqsn_jax.benchmarks.device_time import Interval, busy_seconds, covered, traced


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([], 0),
        ([(1, 3)], 2),
        ([(5, 6), (1, 3)], 3),
        ([(1, 3), (2, 5)], 4),
        ([(1, 3), (3, 5)], 4),
        # One inside another, and one that starts within both.
        ([(1, 10), (2, 3), (9, 12)], 11),
        ([(1, 4), (1, 2), (1, 4)], 3),
    ],
)
def test_what_several_cover_counts_once(intervals, expected):
    assert covered(Interval(*each) for each in intervals) == expected


def line(name, *spans):
    events = [SimpleNamespace(start_ns=start, duration_ns=length) for start, length in spans]
    return SimpleNamespace(name=name, events=events)


def test_the_streams_of_each_gpu_count():
    planes = [
        SimpleNamespace(name="/host:CPU", lines=[line("Stream of a host", (0, 1e9))]),
        SimpleNamespace(
            name="/device:GPU:0",
            lines=[
                line("Stream #14(Compute)", (0, 3e8), (5e8, 1e8)),
                line("Stream #15(MemcpyH2D)", (2e8, 2e8)),
                line("XLA Modules", (0, 9e9)),
            ],
        ),
        SimpleNamespace(name="/device:GPU:1", lines=[line("Stream #1(Compute)", (7e8, 1e8))]),
    ]
    assert busy_seconds(planes) == pytest.approx([0.5, 0.1])
    assert busy_seconds(planes[:1]) == []


def test_each_trace_is_read_by_itself(tmp_path, monkeypatch):
    read = []

    def busy(planes):
        read.append([plane.name for plane in planes])
        return [float(len(read))]

    monkeypatch.setattr("fedqsn_jax.benchmarks.device_time.busy_seconds", busy)
    for number in (1.0, 2.0):
        with traced(tmp_path / "traces") as seconds:
            jnp.arange(3).block_until_ready()
        assert seconds == [number]
    assert all("/host:CPU" in names for names in read)
