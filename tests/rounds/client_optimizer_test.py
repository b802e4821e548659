"""Optimizers of a client's round against formulas written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedqsn_jax.config.schema import TrainingConfig
from fedqsn_jax.problems.training import local_optimizer
from fedqsn_jax.rounds.client_optimizer import (
    ADAMW_EPSILON,
    scheduled,
    unscheduled,
    warmup_and_decay,
)

RATE, DECAY, EPS = 0.1, 0.01, 1e-6


def adamw(rate):
    """That of the paper's language models."""
    return optax.adamw(rate, eps=ADAMW_EPSILON, weight_decay=DECAY)


@pytest.mark.parametrize(
    ("updates", "warmup", "expected"),
    [
        (1, 0.06, [1]),
        (2, 0.06, [1, 1 / 2]),
        (4, 0.5, [1 / 3, 2 / 3, 1, 1 / 2]),
        (4, 0.0, [1, 3 / 4, 2 / 4, 1 / 4]),
        (4, 1.0, [1 / 4, 2 / 4, 3 / 4, 1]),
    ],
)
def test_rates_by_hand(updates, warmup, expected):
    schedule = warmup_and_decay(RATE, updates, warmup)
    rates = [float(schedule(step)) for step in range(updates)]
    np.testing.assert_allclose(rates, RATE * np.array(expected), rtol=1e-6)


@pytest.mark.parametrize("updates", [1, 7, 50, 333])
def test_the_rate_is_transformers_after_its_idle_step(updates):
    warm = min(int(updates * 0.06) + 1, updates)

    def linear(step, count):
        """As `transformers.get_linear_schedule_with_warmup` has it."""
        return step / warm if step < warm else max(0, (count - step) / max(1, count - warm))

    schedule = jax.jit(lambda n, step: warmup_and_decay(1.0, n)(step))
    rates = [float(schedule(updates, step)) for step in range(updates)]
    expected = [linear(step + 1, updates + 1) for step in range(updates)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert min(rates) > 0


def numpy_adamw(parameter, gradients, rates, clip=0.0):
    """The parameter after each update of AdamW."""
    mean = square = np.zeros_like(parameter)
    for count, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = np.sqrt((gradient**2).sum())
        gradient = gradient * min(1, clip / norm) if clip else gradient
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        step = (mean / (1 - 0.9**count)) / (np.sqrt(square / (1 - 0.999**count)) + EPS)
        parameter = parameter - rate * (step + DECAY * parameter)
    return parameter


def train(optimizer, parameter, gradients, steps, bound):
    """A client's loop: ``bound`` steps, of which those from ``steps`` on change nothing."""
    transformation = optimizer(steps)

    def body(index, carry):
        parameters, state = carry
        updates, new_state = transformation.update(gradients[index], state, parameters)
        new = optax.apply_updates(parameters, updates), new_state
        return jax.tree.map(lambda a, b: jnp.where(index < steps, a, b), new, carry)

    state = transformation.init(parameter)
    return jax.lax.fori_loop(0, bound, body, (parameter, state))[0]


def case(steps):
    rng = np.random.default_rng(steps)
    return rng.normal(size=4), rng.normal(size=(steps, 4))


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_by_hand(clip):
    parameter, gradients = case(6)
    schedule = warmup_and_decay(RATE, 6)
    rates = [float(schedule(step)) for step in range(6)]
    expected = numpy_adamw(parameter, gradients, rates, clip)
    optimizer = scheduled(adamw, RATE, clip_norm=clip)
    ours = train(optimizer, jnp.float32(parameter), jnp.float32(gradients), jnp.int32(6), 6)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_a_configuration_says_all_of_it():
    """AdamW of batches of two gradients, cut, at rates that rise and fall."""
    parameter, gradients = case(8)
    settings = TrainingConfig(
        optimizer="adamw",
        learning_rate=RATE,
        weight_decay=DECAY,
        schedule="linear",
        warmup=0.5,
        accumulate=2,
        clip_norm=0.5,
    )
    ours = train(
        local_optimizer(settings), jnp.float32(parameter), jnp.float32(gradients), jnp.int32(8), 8
    )
    means = gradients.reshape(4, 2, 4).mean(axis=1)
    rates = RATE * np.array([1 / 3, 2 / 3, 1, 1 / 2])
    np.testing.assert_allclose(ours, numpy_adamw(parameter, means, rates, 0.5), rtol=1e-5)


def test_a_configuration_of_sgd_is_sgd_with_momentum():
    parameter, gradients = case(4)
    settings = TrainingConfig(optimizer="sgd", learning_rate=RATE, momentum=0.5)
    ours = train(
        local_optimizer(settings), jnp.float32(parameter), jnp.float32(gradients), jnp.int32(4), 4
    )
    expected, velocity = parameter, np.zeros(4)
    for gradient in gradients:
        velocity = 0.5 * velocity + gradient
        expected = expected - RATE * velocity
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 6, 7, 8])
def test_accumulation_averages_and_loses_nothing(steps):
    parameter, gradients = case(steps)
    groups = [gradients[start : start + 3].mean(axis=0) for start in range(0, steps, 3)]
    schedule = warmup_and_decay(RATE, len(groups))
    rates = [float(schedule(step)) for step in range(len(groups))]
    expected = numpy_adamw(parameter, groups, rates)
    optimizer = scheduled(adamw, RATE, accumulate=3)
    padded = np.concatenate([gradients, np.full((10 - steps, 4), 1e9)])
    ours = jax.jit(train, static_argnums=(0, 4))(
        optimizer, jnp.float32(parameter), jnp.float32(padded), jnp.int32(steps), 10
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_clients_of_one_chunk_have_schedules_of_their_own(accumulate):
    optimizer = scheduled(adamw, RATE, accumulate=accumulate)
    parameter, gradients = case(9)
    arguments = (jnp.float32(parameter), jnp.float32(gradients))
    counts = jnp.asarray([0, 2, 9], jnp.int32)
    together = jax.vmap(lambda steps: train(optimizer, *arguments, steps, 9))(counts)
    assert np.array_equal(together[0], arguments[0])
    for index in (1, 2):
        alone = train(optimizer, *arguments, counts[index], int(counts[index]))
        np.testing.assert_allclose(together[index], alone, rtol=1e-6)


def test_hidden_entries_stay_at_zero():
    optimizer = scheduled(lambda rate: optax.adamw(rate, weight_decay=0.5), RATE, accumulate=2)
    parameter, gradients = case(5)
    hidden = np.array([False, True, False, True])
    parameter[hidden], gradients[:, hidden] = 0, 0
    ours = train(optimizer, jnp.float32(parameter), jnp.float32(gradients), jnp.int32(5), 5)
    assert not ours[hidden].any()


def test_any_optimizer_can_be_a_clients():
    sgd = optax.sgd(0.1)
    assert unscheduled(sgd)(jnp.int32(3)) is sgd


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"accumulate": 0}, "accumulate = 0: allowed is 1 or more"),
        ({"clip_norm": -1.0}, "clip_norm = -1.0: allowed is 0 or more"),
        ({"clip_norm": float("nan")}, "clip_norm = nan"),
        ({"warmup": 1.5}, "warmup = 1.5: allowed is 0 to 1"),
    ],
)
def test_settings_have_ranges(settings, says):
    with pytest.raises(ValueError, match=says):
        scheduled(adamw, RATE, **settings)
