"""What several versions of a column tell, and what is put where nothing is known."""

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.audit.distillation import TEACHER, distillation_loss, queries
from fedqsn_jax.audit.hidden_columns import filled, mean_columns
from fedqsn_jax.audit.low_rank_differences import shared_part
from fedqsn_jax.audit.quantization_cells import Cell, borders, cell_of, intersect
from fedqsn_jax.audit.union import small_tensors
from fedqsn_jax.protocol.quantization import NormalFloat, Uniform, quantize
from fedqsn_jax.rounds.fine_tuning import known_entries


def test_a_cell_is_as_wide_as_the_closed_form_says_and_holds_the_value():
    # A uniform codebook of b bits has cells of 2 / (2**b - 1) scales, half of that at the ends.
    quantizer = Uniform(3, 8, scale_dtype="float32")
    values = jax.random.uniform(jax.random.key(0), (1, 16, 5), minval=-1.0, maxval=1.0)
    quantized = quantize(quantizer, values)
    cell = cell_of(quantized, None)
    assert ((cell.low <= values + 1e-6) & (values <= cell.high + 1e-6)).all()
    scales = np.repeat(np.asarray(quantized.scales), 8, axis=1)
    ends = np.isin(np.asarray(quantized.codes), (0, 7))
    np.testing.assert_allclose(
        np.asarray(cell.high - cell.low), np.where(ends, 1, 2) / 7 * scales, rtol=1e-5
    )


def test_two_cells_of_one_value_leave_their_intersection():
    # The same column beside two others: the scale differs, and so do the cells.
    column = np.linspace(-0.5, 0.5, 8, dtype=np.float32)[None, :, None]
    quantizer = NormalFloat(3, 16, scale_dtype="float32")
    cells = []
    for top in (1.0, 1.37):
        whole = np.concatenate([column, np.full((1, 1, 1), top, np.float32)], axis=1)
        cells.append(cell_of(quantize(quantizer, jnp.asarray(whole)), None))
    both = intersect(*cells)
    low = np.maximum(np.asarray(cells[0].low), np.asarray(cells[1].low))
    high = np.minimum(np.asarray(cells[0].high), np.asarray(cells[1].high))
    np.testing.assert_array_equal(both.low[:, :8], low[:, :8])
    np.testing.assert_array_equal(both.high[:, :8], high[:, :8])
    assert ((low[:, :8] <= column) & (column <= high[:, :8])).all()
    narrower = (both.high - both.low) < (cells[1].high - cells[1].low)
    assert narrower[:, :8].any()


def test_a_cell_that_does_not_meet_what_is_known_replaces_it():
    known, new = Cell(jnp.array([0.0]), jnp.array([1.0])), Cell(jnp.array([2.0]), jnp.array([3.0]))
    assert intersect(known, new) == new


def test_hidden_entries_have_no_cell():
    quantized = quantize(NormalFloat(2, 4), jnp.ones((1, 4, 2)))
    cell = cell_of(quantized, jnp.array([[True, False]]))
    assert np.isfinite(cell.low[..., 0]).all()
    assert np.isinf(cell.low[..., 1]).all()


def test_borders_are_the_middles_of_levels():
    low, high = borders(Uniform(2).levels)
    np.testing.assert_allclose(low, [-1, -2 / 3, 0, 2 / 3], atol=1e-7)
    np.testing.assert_allclose(high, [-2 / 3, 0, 2 / 3, 1], atol=1e-7)


def test_what_versions_of_low_rank_share_is_found():
    generator = np.random.default_rng(0)
    shared = generator.normal(size=(20, 16))
    versions = np.stack(
        [shared + generator.normal(size=(20, 2)) @ generator.normal(size=(2, 16)) for _ in range(6)]
    ).astype(np.float32)
    found = np.asarray(shared_part(jnp.asarray(versions), 2, 200))
    by_mean = np.linalg.norm(versions.mean(axis=0) - shared)
    assert np.linalg.norm(found - shared) < 0.02 * by_mean


def test_hidden_columns_get_the_guess_and_known_ones_stay(model):
    site = model.sites[0]
    known = {
        each.path: jnp.arange(each.columns)[None] % 2 == 0 for each in model.sites if each.draws
    }
    guess = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7), model.params)
    made = filled(model.params, known, model.sites, guess)
    kernel = np.asarray(made["hidden_0"]["kernel"])
    np.testing.assert_array_equal(kernel[:, 1::2], 7)
    np.testing.assert_array_equal(kernel[:, ::2], model.params["hidden_0"]["kernel"][:, ::2])
    np.testing.assert_array_equal(made["head"]["kernel"], model.params["head"]["kernel"])
    mean = mean_columns(model.params, known, model.sites)
    expected = np.asarray(model.params["hidden_0"]["kernel"])[:, ::2].mean(axis=1)
    for column in range(site.columns):
        np.testing.assert_allclose(mean["hidden_0"]["kernel"][:, column], expected, rtol=1e-5)
    bias = np.asarray(model.params["hidden_0"]["bias"])[::2].mean()
    np.testing.assert_allclose(mean["hidden_0"]["bias"], bias, rtol=1e-5)


def test_what_may_be_trained(model):
    known = {each.path: jnp.arange(each.columns)[None] < 3 for each in model.sites}
    entries = known_entries(model.params, known, model.sites)
    assert entries["hidden_0"]["kernel"].sum() == 6 * 3
    assert entries["hidden_0"]["bias"].sum() == 3
    assert entries["head"]["kernel"].all()
    small = small_tensors(model.params)
    assert small["hidden_0"]["bias"].all()
    assert not small["hidden_0"]["kernel"].any()


def test_queries_are_own_rows_first_then_mixtures_of_two():
    rows = {
        "x": np.arange(12, dtype=np.float32).reshape(4, 3),
        "tokens": np.repeat(np.arange(4)[:, None], 5, axis=1),
        "mask": np.repeat(np.arange(4)[:, None], 5, axis=1) + 10,
        "label": np.arange(4),
    }
    few, plain = queries(rows, 2, seed=0)
    assert plain == 2
    assert len(few["x"]) == 2
    asked, plain = queries(rows, 50, seed=0)
    assert plain == 4
    assert {tuple(row) for row in asked["x"][:4]} == {tuple(row) for row in rows["x"]}
    mixed = asked["x"][4:]
    # A mixture lies on the line between two rows; these all lie on one line.
    np.testing.assert_allclose(mixed[:, 1] - mixed[:, 0], 1, rtol=1e-5)
    assert mixed.min() >= 0
    assert mixed.max() <= 11
    np.testing.assert_array_equal(asked["mask"], asked["tokens"] + 10)


def test_the_distillation_loss_is_least_at_the_owners_answers():
    owner = jax.nn.softmax(jnp.array([[1.0, 2.0, 0.5], [0.0, 0.1, 3.0]]))
    valid = jnp.array([True, True])

    def loss(logits):
        return distillation_loss(logits, {TEACHER: owner}, valid)

    np.testing.assert_allclose(jax.grad(loss)(jnp.log(owner)), 0, atol=1e-6)
    entropy = -(np.asarray(owner) * np.log(np.asarray(owner))).sum(axis=1).mean()
    np.testing.assert_allclose(loss(jnp.log(owner)), entropy, rtol=1e-5)
