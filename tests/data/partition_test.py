"""How rows are dealt: every row once, nobody empty, the same answer for the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqsn_jax.data import partition

FEW = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def requests(draw):
    """A kind of partition with labels, a number of clients that is possible, and a seed."""
    rows = draw(st.integers(1, 120))
    labels = np.array(draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows)), np.int32)
    clients = draw(st.integers(1, rows))
    kind = draw(st.sampled_from(["iid", "dirichlet", "shards", "natural"]))
    alpha = draw(st.sampled_from([1e-6, 0.01, 0.5, 1.0, 1e4]))
    return kind, labels, clients, alpha, draw(st.integers(0, 2**32 - 1))


def deal(kind, labels, clients, alpha, seed):
    generator = np.random.default_rng(seed)
    if kind == "iid":
        return partition.iid(len(labels), clients, generator)
    if kind == "dirichlet":
        return partition.dirichlet(labels, clients, alpha, generator)
    if kind == "shards":
        return partition.shards(labels, clients, len(labels) // clients, generator)
    return partition.natural(labels)


@FEW
@given(requests())
def test_every_row_is_dealt_once_and_nobody_is_empty(request_):
    parts = deal(*request_)
    kind, labels, clients, *_ = request_
    assert len(parts) == (len(set(labels.tolist())) if kind == "natural" else clients)
    assert all(len(part) > 0 and part.dtype == np.int64 for part in parts)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(len(labels)))


@FEW
@given(requests())
def test_the_same_seed_deals_the_same(request_):
    first, second = deal(*request_), deal(*request_)
    assert [part.tolist() for part in first] == [part.tolist() for part in second]


def test_another_seed_deals_otherwise():
    labels = np.arange(100) % 10
    for kind in ("iid", "dirichlet", "shards"):
        first, second = (deal(kind, labels, 5, 0.5, seed) for seed in (0, 1))
        assert [part.tolist() for part in first] != [part.tolist() for part in second]


def test_iid_shares_are_even():
    sizes = [len(part) for part in partition.iid(103, 10, np.random.default_rng(0))]
    assert max(sizes) - min(sizes) == 1


def test_alpha_sets_the_skew():
    labels = np.repeat(np.arange(10), 600)

    def mean_largest_share(alpha):
        parts = partition.dirichlet(labels, 20, alpha, np.random.default_rng(0))
        return np.mean([np.bincount(labels[part]).max() / len(part) for part in parts])

    skews = [mean_largest_share(alpha) for alpha in (0.05, 0.5, 5.0, 1e5)]
    assert skews == sorted(skews, reverse=True)
    # In the limit every client has each of the 10 labels equally often.
    assert skews[-1] == pytest.approx(0.1, abs=0.005)
    assert skews[0] > 0.6


def test_dirichlet_shares_have_the_distribution_variance():
    """With alpha = 1 and n clients, the variance of a share is (n - 1) / (n^2 (n + 1))."""
    clients, rows, labels = 4, 500, 400
    data = np.repeat(np.arange(labels), rows)
    parts = partition.dirichlet(data, clients, 1.0, np.random.default_rng(0))
    shares = np.stack([np.bincount(data[part], minlength=labels) / rows for part in parts])
    expected = (clients - 1) / (clients**2 * (clients + 1))
    assert shares.mean() == pytest.approx(1 / clients)
    assert shares.var() == pytest.approx(expected, rel=0.1)


def test_shards_have_few_labels():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    parts = partition.shards(labels, 20, 2, np.random.default_rng(0))
    # 40 shards of 25 rows divide each label's 100 evenly, so a shard has one label.
    assert all(len(part) == 50 and len(set(labels[part].tolist())) <= 2 for part in parts)


@pytest.mark.parametrize("ids", [[7, 3, 7, 9, 3], [b"b", b"a", b"b", b"c", b"a"]])
def test_natural_keeps_owners_together(ids):
    parts = partition.natural(np.array(ids))
    assert [part.tolist() for part in parts] == [[1, 4], [0, 2], [3]]


@pytest.mark.parametrize(
    "impossible",
    [
        lambda labels, rng: partition.iid(5, 6, rng),
        lambda labels, rng: partition.iid(5, 0, rng),
        lambda labels, rng: partition.dirichlet(labels, 6, 0.5, rng),
        lambda labels, rng: partition.dirichlet(labels, 2, 0.0, rng),
        lambda labels, rng: partition.dirichlet(labels, 2, float("nan"), rng),
        lambda labels, rng: partition.shards(labels, 3, 2, rng),
        lambda labels, rng: partition.shards(labels, 3, 0, rng),
        lambda labels, rng: partition.natural(labels[:0]),
    ],
)
def test_impossible_requests_are_refused_in_one_line(impossible):
    with pytest.raises(ValueError, match=r"allowed|needed") as error:
        impossible(np.zeros(5, np.int32), np.random.default_rng(0))
    assert "\n" not in str(error.value)
