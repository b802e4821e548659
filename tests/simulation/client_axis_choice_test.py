"""How the client axis is chosen: by device, size and memory; and what does not fit is refused."""

import dataclasses

import numpy as np
import pytest

from fedqsn_jax.config.schema import CohortConfig, ConfigError
from fedqsn_jax.simulation.scheduling import STEP_BYTES, Workload, choose_client_axis

GIB = 2**30


def workload(steps=(4, 4, 4, 20), client=2**20, fixed=GIB, device=64 * GIB, equal=0):
    return Workload(np.array(steps), equal, client, client // 3, fixed, device)


def choose(platform="gpu", load=None, **settings):
    return choose_client_axis(CohortConfig(**settings), load or workload(), platform)


def test_one_after_the_other_on_a_cpu():
    for parallelism in ("auto", "scan"):
        assert choose("cpu", size=100, parallelism=parallelism).axis.chunk_size == 1
    assert choose("gpu", size=100, parallelism="scan").axis.chunk_size == 1
    assert choose("cpu", size=100, parallelism="vmap", chunk_size=7).axis.chunk_size == 7


@pytest.mark.parametrize(
    ("load", "expected", "why"),
    [
        # 100 clients of 8 steps on average, the longest 20: with 40 places a perfect round has 20.
        (workload(), 43, "about 21 steps"),
        (workload(steps=(5, 5, 5), equal=5), 100, "all that a device has"),
        # Three parts of 34, rather than two of 40 and one of 20.
        (workload(steps=(5,), equal=5, client=STEP_BYTES // 40), 34, "fill the device"),
        (workload(client=STEP_BYTES // 8), 8, "fill the device"),
        (workload(client=4 * GIB), 1, "fill the device"),
        (workload(steps=(1,), client=100 * 2**20, device=2 * GIB), 10, "would not fit"),
    ],
)
def test_as_many_at_once_as_pay_and_fit(load, expected, why):
    choice = choose(load=load, size=100)
    assert choice.axis.chunk_size == expected
    assert why in choice.reason
    assert "auto on gpu" in choice.reason


def test_room_to_come_and_go_is_counted_for_a_chunk_that_is_given():
    axis = choose(load=workload(steps=(6, 6, 0, 6)), size=100, chunk_size=40).axis
    # 40 places by 6 steps are 7 a step; but all of the first 40 end together.
    assert (axis.chunk_size, axis.refills) == (40, 20)
    assert choose(load=workload(steps=(1, 1)), size=100, chunk_size=40).axis.refills == 40
    assert choose(load=workload(equal=20), size=100).axis.steps == 20


def test_a_chunk_that_does_not_fit_names_the_largest_that_does():
    load = workload(client=GIB, fixed=2 * GIB, device=10 * GIB)
    with pytest.raises(ConfigError) as error:
        choose(load=load, size=100, chunk_size=50)
    message = str(error.value)
    assert message == (
        "cohort.chunk_size = 50: needs about 52.0 GiB a device, which has 10.0 GiB; the largest "
        "that fits is 8"
    )
    assert choose(load=load, size=100, chunk_size=8).axis.chunk_size == 8
    # One client at a time is always tried: the estimate is one.
    assert choose(load=dataclasses.replace(load, device_bytes=0), size=100).axis.chunk_size == 1


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"cohort.devices = 9: allowed is at most .* 1$"):
        choose(size=100, devices=9)
    assert choose(size=100).axis.mesh is None
    mesh = choose(size=100, parallelism="mesh").axis.mesh
    assert dict(mesh.shape) == {"clients": 1}
