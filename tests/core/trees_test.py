"""Patterns of paths."""

import pytest

from fedqsn_jax.core.trees import exact_pattern, matches_any, select_trained

NAMES = (
    "l2",
    "l[2]",
    "Dense",
    "dense",
    "a*",
    "ab",
    "b?",
    "bc",
    "*",
    "**",
    "a: x",
    "é",
    "[!a]",
    "=",
)


@pytest.mark.parametrize("name", NAMES)
def test_an_exact_pattern_fits_its_path_and_no_other(name):
    paths = [f"{each}/kernel" for each in NAMES] + [f"{name}/{name}/kernel", "kernel"]

    fitting = [path for path in paths if matches_any(path, (exact_pattern(f"{name}/kernel"),))]

    assert fitting == [f"{name}/kernel"]


def test_patterns_of_users_are_compared_name_by_name_without_case():
    paths = ("a/head/kernel", "HEAD/kernel", "a/overhead/kernel", "a/head/bias")
    assert [matches_any(path, ("*/head/kernel",)) for path in paths] == [True, True, False, False]


def test_trained_tensors_can_be_named_exactly():
    params = {name: {"kernel": 0} for name in ("Dense", "dense", "l2", "l[2]")}

    assert select_trained(params, ("=l[2]/kernel", "=dense/kernel")) == {
        "l[2]/kernel",
        "dense/kernel",
    }
    with pytest.raises(ValueError, match="'=DENSE/kernel' names no tensor"):
        select_trained(params, ("=DENSE/kernel",))
