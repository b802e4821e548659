"""What arrays may be that a user brings."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fedqsn_jax import HostData
from fedqsn_jax.core.arrays import (
    check_values,
    count_not_finite,
    ids_array,
    plain_id,
    read_array,
    read_labels,
)
from fedqsn_jax.data.population import from_clients

REFUSED = {
    "masked": (np.ma.array([1.0, 2.0], mask=[False, True]), "masked"),
    "masked in a list": ([np.ma.array([1, 2], mask=[True, False])], "masked"),
    "complex": (np.ones(2, np.complex64), "complex64"),
    "extended": (np.ones(2, np.longdouble), "float128"),
    "objects": (np.array([1, None]), "object"),
    "records": (np.zeros(2, [("a", "i4")]), "'a'"),
    "dates": (np.array(["2020-01-01"], "M8[D]"), "datetime64"),
    "text": (np.array(["a", "b"]), "<U1"),
    "mixed": ([1, "1"], "<U21"),
    "float8": (np.ones(2, ml_dtypes.float8_e4m3fn), "float8_e4m3fn"),
    "ragged": ([[1], [1, 2]], "cannot be made an array"),
    "keys": (jax.random.key(0), "cannot be made an array"),
    "rounded by NumPy": ([2**63, -1], "has the value 9223372036854775808"),
    "beyond 64 bits": ([2**64], "object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_array_of_numbers_is_refused_in_one_line(name):
    value, told = REFUSED[name]
    for read in (
        lambda: read_array(value, "client 3: 'x'"),
        lambda: read_labels(value, "client 3: 'x'"),
        lambda: HostData({"x": value}, np.array([0, 1])),
        lambda: from_clients([{"x": value}]),
    ):
        with pytest.raises(ValueError, match="'x'") as caught:
            read()
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [">f8", ">f4", ">f2", ">i8", ">i2", ">u4", "<f4", "?", "i1"])
def test_values_are_kept_whatever_their_byte_order(dtype):
    values = np.array([[0, 1], [1, 0]], dtype)
    data = HostData({"x": values}, np.array([0, 2]))
    on_device = data.gather(np.int32(0), np.arange(2))["x"]

    np.testing.assert_array_equal(on_device, [[0, 1], [1, 0]])
    assert read_array(values, "x").dtype.isnative


def test_an_array_that_is_as_it_should_be_is_not_copied(tmp_path):
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (4, 2))
    for array in (np.arange(3), mapped, np.ma.array([1.0, 2.0])):
        assert np.shares_memory(read_array(array, "x"), array)
    bfloat16 = jnp.ones(2, jnp.bfloat16)
    assert read_array(bfloat16, "x").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "values", [[1, 2**40], [-(2**31) - 1], np.array([2**32], np.uint64), [1.0, -1e39]]
)
def test_values_that_the_device_would_change_are_refused(values):
    wrong = max(values, key=abs)
    with pytest.raises(ValueError, match=rf"^x has the value {re.escape(str(wrong))}, which"):
        check_values(read_array(values, "x"), "x")


def test_other_values_are_let_through_and_those_that_are_not_finite_are_counted():
    for values in ([2**31 - 1, -(2**31)], [np.inf, np.nan, 3e38], np.array([2**32 - 1], np.uint64)):
        check_values(read_array(values, "x"), "x")
    many = np.zeros((3, 2**20), np.float16)
    many[1, 7], many[2, -1] = np.nan, -np.inf
    assert count_not_finite(many) == 2
    assert count_not_finite(np.arange(3)) == 0


@pytest.mark.parametrize(
    "values", [[0.0, 1.0, 2.0], [False, True, 2], np.array([0, 1, 2], ">u8"), jnp.arange(3)]
)
def test_labels_are_whole_numbers_however_they_are_written(values):
    labels = read_labels(values, "x")
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, [0, 1, 2])


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, 1e30])
def test_labels_that_are_no_whole_numbers_are_refused(value):
    with pytest.raises(ValueError, match="allowed are whole numbers"):
        read_labels([0.0, value], "x")


def test_labels_that_are_too_large_stay_what_they_are():
    assert read_labels([2**32 + 1], "x").tolist() == [2**32 + 1]


def test_ids_are_integers_where_all_fit_and_text_otherwise():
    def array_of(*values):
        return ids_array([plain_id(value) for value in values]).tolist()

    assert array_of(3, np.int64(-(2**63)), 2.0) == [3, -(2**63), 2]
    large = [2**63 + 1, 2**63 + 2, 2**127, 5]
    assert array_of(*large) == list(map(str, large))
    assert array_of(1, "1", 1.0, True, b"b", 1.5) == ["1", "1", "1", "True", "b", "1.5"]


def test_what_is_no_id():
    for value in (None, float("nan"), "", np.float32("nan"), "  ", "\u3000"):
        assert plain_id(value) is None
    # The last ones stand for 2**53 and 2**53 + 1, and for many more.
    for value in (float("inf"), [1], {}, "a\0", "\ud800", 2.0**53, 1e300):
        with pytest.raises(ValueError, match="no id"):
            plain_id(value)
