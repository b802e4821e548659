"""How masks are drawn: rates, independence, and no bias of what clients receive."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax.core.keys import client_round_key
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.protocol.masks import draw_masks, visible_share
from fedqsn_jax.protocol.proxy import chain, client_mask, effective_params, server_mask, whole_proxy
from fedqsn_jax.protocol.sites import MaskSite, Sites

BIG = MaskSite("big/kernel", (1, 40_000), (), (0,), (1,))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.7])
def test_bernoulli_rate(probability):
    mask = np.asarray(draw_masks(jax.random.key(1), Sites((BIG,)), probability)["big/kernel"])
    sigma = (probability * (1 - probability) / mask.size) ** 0.5
    assert mask.shape == (1, 40_000)
    assert mask.dtype == bool
    assert abs((~mask).mean() - probability) < 4 * sigma


@pytest.mark.parametrize("sampling", ["bernoulli", "fixed_count"])
def test_sites_layers_and_keys_have_independent_masks(sampling):
    other = dataclasses.replace(BIG, path="other/kernel")
    stack = MaskSite("stack/kernel", (2, 1, 40_000), (0,), (1,), (2,))
    first = draw_masks(jax.random.key(2), Sites((BIG, other, stack)), 0.3, sampling)
    second = draw_masks(jax.random.key(3), Sites((BIG,)), 0.3, sampling)
    masks = [
        first["big/kernel"][0],
        first["other/kernel"][0],
        *first["stack/kernel"],
        second["big/kernel"][0],
    ]
    agreement = 0.3**2 + 0.7**2
    sigma = (agreement * (1 - agreement) / 40_000) ** 0.5
    for i, one in enumerate(masks):
        for another in masks[:i]:
            assert abs(float((one == another).mean()) - agreement) < 4 * sigma


def test_a_sites_mask_depends_on_its_path_and_the_key_only():
    other = dataclasses.replace(BIG, path="a/kernel")
    key = jax.random.key(4)
    alone = draw_masks(key, Sites((BIG,)), 0.3)["big/kernel"]
    np.testing.assert_array_equal(draw_masks(key, Sites((other, BIG)), 0.3)["big/kernel"], alone)


@pytest.mark.parametrize(
    ("columns", "probability", "hidden"),
    [
        (10, 0.3, 3),
        (10, 0.26, 3),
        (10, 0.04, 0),
        (7, 0.5, 4),
        (5, 0.5, 2),
        (3, 0.99, 2),
        (1, 0.9, 0),
    ],
)
def test_fixed_count_hides_whole_columns(columns, probability, hidden):
    """Rounded to whole columns (halves to even); one column always stays."""
    site = MaskSite("s/kernel", (3, 2, columns), (0,), (1,), (2,))
    for seed in range(4):
        mask = draw_masks(jax.random.key(seed), Sites((site,)), probability, "fixed_count")[
            "s/kernel"
        ]
        np.testing.assert_array_equal((~mask).sum(axis=1), [hidden] * 3)
    share = visible_share(site, probability, "fixed_count")
    np.testing.assert_allclose(share, (columns - hidden) / columns, rtol=1e-6)
    share = visible_share(site, probability, "bernoulli")
    np.testing.assert_allclose(share, 1 - probability, atol=1e-7)


def test_fixed_count_hides_every_column_equally_often():
    site = MaskSite("s/kernel", (2, 10), (), (0,), (1,))
    keys = jax.random.split(jax.random.key(5), 4000)
    draw = jax.jit(
        jax.vmap(lambda key: draw_masks(key, Sites((site,)), 0.3, "fixed_count")["s/kernel"])
    )
    rates = (~np.asarray(draw(keys)))[:, 0].mean(axis=0)
    assert np.abs(rates - 0.3).max() < 4 * (0.3 * 0.7 / 4000) ** 0.5


def test_probability_may_be_traced():
    for sampling in ("bernoulli", "fixed_count"):
        traced = jax.jit(lambda p, s=sampling: draw_masks(jax.random.key(6), Sites((BIG,)), p, s))(
            0.25
        )
        eager = draw_masks(jax.random.key(6), Sites((BIG,)), 0.25, sampling)
        np.testing.assert_array_equal(traced["big/kernel"], eager["big/kernel"])


# Invariant 6.


@pytest.mark.parametrize("sampling", ["bernoulli", "fixed_count"])
def test_masked_and_scaled_columns_are_unbiased(model, sampling):
    """E[W * M_s * M_k / kappa] = W, kernel and bias, within 5 standard errors of every entry."""
    p1, p2, draws = 0.3, 0.25, 6000
    transform = chain(server_mask(p1, sampling), client_mask(p2, sampling))
    whole = whole_proxy(model.params, model.sites)

    def draw(key):
        state = transform.init(jax.random.fold_in(key, 0), whole)
        proxy = transform.apply(jax.random.fold_in(key, 1), state, transform.prepare(state, whole))
        return effective_params(proxy)

    samples = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(7), draws))
    for path, values in leaves_by_path(samples).items():
        weight = leaves_by_path(model.params)[path]
        if path.startswith("head"):
            np.testing.assert_array_equal(values, np.broadcast_to(weight, values.shape))
            continue
        values, weight = np.asarray(values, np.float64), np.asarray(weight, np.float64)
        kappa = (1 - p1) * (1 - p2)
        if sampling == "fixed_count":
            columns = weight.shape[-1]
            kappa = (1 - round(p1 * columns) / columns) * (1 - round(p2 * columns) / columns)
        error = np.abs(values.mean(axis=0) - weight)
        assert (error < 5 * np.abs(weight) * ((1 - kappa) / kappa / draws) ** 0.5).all()
        assert values.std(axis=0).min() > 0, "every column is hidden in some draws"


def test_share_of_columns_known_after_some_proxies():
    """(1 - p1_hat)(1 - p2**m), and never a server-hidden column."""
    p1, p2 = 0.3, 0.5
    whole = whole_proxy({"big": {"kernel": jnp.ones(BIG.shape)}}, Sites((BIG,)))
    transform = chain(server_mask(p1), client_mask(p2))
    state = transform.init(jax.random.key(8), whole)
    prepared = transform.prepare(state, whole)
    available = np.asarray(prepared.visible["big/kernel"])
    receive = jax.jit(lambda key: transform.apply(key, state, prepared).visible["big/kernel"])
    known = np.zeros_like(available)
    for m in range(1, 6):
        known |= np.asarray(receive(client_round_key(jax.random.key(9), m, 3)))
        expected = 1 - p2**m
        sigma = (expected * (1 - expected) / available.sum()) ** 0.5
        assert abs(known.sum() / available.sum() - expected) < 4 * sigma
        assert not (known & ~available).any()
