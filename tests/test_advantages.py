"""Generalised advantage estimation (Schulman et al. 2016, equations 11 to 16)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import assert_close, float32

from ppo_jax import advantages

# A_t is a sum of at most T terms, each a product of at most 2T factors of size <= 1 with a delta of three roundings.
STEPS = 9
OPS = 3 * STEPS + 3


def draw(rng, steps: int = STEPS, batch: tuple[int, ...] = ()):
    rewards = float32(rng.normal(size=(*batch, steps)))
    discounts = float32(rng.uniform(0.5, 1.0, size=(*batch, steps)))
    values = float32(rng.normal(size=(*batch, steps + 1)))
    return rewards, discounts, values


def test_golden_three_steps():
    # rewards 1, 2, 3; discount 0.5 everywhere; values 2, 4, 6, 8; lambda 0.5
    # delta_0 = 1 + 0.5*4 - 2 = 1      delta_1 = 2 + 0.5*6 - 4 = 1      delta_2 = 3 + 0.5*8 - 6 = 1
    # A_2 = 1      A_1 = 1 + 0.25*1 = 1.25      A_0 = 1 + 0.25*1.25 = 1.3125       returns = A + (2, 4, 6)
    advantage, returns = advantages.gae(
        jnp.array([1.0, 2.0, 3.0]), jnp.full(3, 0.5), jnp.array([2.0, 4.0, 6.0, 8.0]), 0.5
    )
    # Every number above is a short binary fraction: float32 holds it exactly.
    np.testing.assert_array_equal(advantage, [1.3125, 1.25, 1.0])
    np.testing.assert_array_equal(returns, [3.3125, 5.25, 7.0])


def test_golden_with_the_episode_ending_in_the_middle():
    # rewards 1, 1, 1; discounts 1, 0, 1 (the episode ends after step 1); values 1, 2, 4, 8; lambda 0.5
    # delta_0 = 1 + 2 - 1 = 2      delta_1 = 1 + 0 - 2 = -1      delta_2 = 1 + 8 - 4 = 5
    # A_2 = 5      A_1 = -1 + 0 = -1      A_0 = 2 + 0.5*(-1) = 1.5
    advantage, returns = advantages.gae(jnp.ones(3), jnp.array([1.0, 0.0, 1.0]), jnp.array([1.0, 2.0, 4.0, 8.0]), 0.5)
    np.testing.assert_array_equal(advantage, [1.5, -1.0, 5.0])
    np.testing.assert_array_equal(returns, [2.5, 1.0, 9.0])


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_oracle(rng, steps, gae_lambda):
    rewards, discounts, values = draw(rng, steps)
    actual = advantages.gae(rewards, discounts, values, gae_lambda)
    expected = oracles.gae(rewards, discounts, values, gae_lambda)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == jnp.float32
        assert_close(a, e, OPS, scale=steps * 4)


def test_lambda_one_is_discounted_returns_minus_values(rng):
    rewards, discounts, values = draw(rng)
    total, expected = float(values[-1]), np.zeros(STEPS)
    for t in reversed(range(STEPS)):
        total = float(rewards[t]) + float(discounts[t]) * total
        expected[t] = total
    advantage, returns = advantages.gae(rewards, discounts, values, 1.0)
    assert_close(returns, expected, OPS, scale=STEPS * 4)
    assert_close(advantage, expected - values[:-1], OPS, scale=STEPS * 4)


def test_lambda_zero_is_the_temporal_difference(rng):
    rewards, discounts, values = draw(rng)
    r, d, v = (np.float64(x) for x in (rewards, discounts, values))
    advantage, returns = advantages.gae(rewards, discounts, values, 0.0)
    assert_close(advantage, r + d * v[1:] - v[:-1], 3, scale=8)
    assert_close(returns, r + d * v[1:], 4, scale=8)


def test_exact_values_have_no_advantage(rng):
    # v_t = r_t + discount_t v_{t+1} makes every delta zero, whatever lambda.
    rewards, discounts, values = draw(rng)
    for t in reversed(range(STEPS)):
        values[t] = rewards[t] + discounts[t] * values[t + 1]
    advantage, returns = advantages.gae(rewards, discounts, values, 0.9)
    assert_close(advantage, np.zeros(STEPS), OPS, scale=STEPS * 4)
    assert_close(returns, values[:-1], OPS, scale=STEPS * 4)


def test_zero_discount_separates_two_episodes(rng):
    rewards, discounts, values = draw(rng)
    discounts[3] = 0.0
    whole = advantages.gae(rewards, discounts, values, 0.9)
    first = advantages.gae(rewards[:4], discounts[:4], values[:5], 0.9)
    second = advantages.gae(rewards[4:], discounts[4:], values[4:], 0.9)
    for w, a, b in zip(whole, first, second, strict=True):
        assert_close(w, np.concatenate([a, b]), OPS, scale=STEPS * 4)


def test_the_value_after_the_end_is_ignored(rng):
    rewards, discounts, values = draw(rng)
    discounts[-1] = 0.0
    before = advantages.gae(rewards, discounts, values, 0.9)
    values[-1] = 1e6
    after = advantages.gae(rewards, discounts, values, 0.9)
    np.testing.assert_array_equal(before, after)


def test_padding_after_the_end_changes_nothing(rng):
    rewards, discounts, values = draw(rng)
    discounts[-1] = 0.0
    short = advantages.gae(rewards, discounts, values, 0.9)
    long = advantages.gae(
        oracles.pad(rewards, 4, 7.0), oracles.pad(discounts, 4, 1.0), oracles.pad(values, 4, -5.0), 0.9
    )
    for s, p in zip(short, long, strict=True):
        assert_close(p[:STEPS], s, OPS, scale=STEPS * 4)


def test_vmapped_equals_a_loop(rng):
    rewards, discounts, values = draw(rng, batch=(5,))
    batched = jax.vmap(advantages.gae, in_axes=(0, 0, 0, None))(rewards, discounts, values, 0.95)
    for b in range(5):
        single = oracles.gae(rewards[b], discounts[b], values[b], 0.95)
        for a, e in zip(batched, single, strict=True):
            assert_close(a[b], e, OPS, scale=STEPS * 4)


def test_jitted_with_a_traced_lambda_and_vmapped_over_it(rng):
    trajectory = draw(rng)
    lambdas = float32([0.0, 0.3, 1.0])
    swept = jax.jit(jax.vmap(functools.partial(advantages.gae, *trajectory)))(lambdas)
    for i, gae_lambda in enumerate(lambdas):
        for a, e in zip(swept, oracles.gae(*trajectory, float(gae_lambda)), strict=True):
            assert_close(a[i], e, OPS, scale=STEPS * 4)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_gradient(rng, argument):
    trajectory = draw(rng, 4)
    weights = float32(rng.normal(size=(2, 4)))

    def weighted(gae, x):
        arguments = list(trajectory)
        arguments[argument] = x
        advantage, returns = gae(*arguments, 0.8)
        return (weights[0] * advantage + weights[1] * returns).sum()

    actual = jax.jit(jax.grad(functools.partial(weighted, advantages.gae)))(trajectory[argument])
    expected = oracles.finite_difference(functools.partial(weighted, oracles.gae), trajectory[argument])
    # Backward repeats the forward's products: twice the operations, then the weights.
    assert_close(actual, expected, 2 * OPS, scale=4 * 4 * 4)


@pytest.mark.parametrize(("steps", "discounts", "values"), [(3, 3, 3), (3, 2, 4), (3, 3, 5)])
def test_wrong_lengths_are_refused(steps, discounts, values):
    with pytest.raises(AssertionError):
        advantages.gae(jnp.zeros(steps), jnp.ones(discounts), jnp.zeros(values), 0.9)


@pytest.mark.parametrize(("steps", "values"), [((2, 3), (2, 4)), ((3, 2), (4, 2))])
def test_a_batch_is_refused_whichever_axis_is_time(steps, values):
    with pytest.raises(AssertionError):
        advantages.gae(jnp.zeros(steps), jnp.ones(steps), jnp.zeros(values), 0.9)
