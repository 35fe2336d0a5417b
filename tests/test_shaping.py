"""Running moments (Chan et al. 1983), the scale of scores, and the price of length (DAPO's overlong punishment)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close, float32

from ppo_jax import shaping
from ppo_jax.shaping import Moments

NOTHING = Moments(jnp.float32(0), jnp.float32(0), jnp.float32(0))


def running(batches) -> Moments:
    return functools.reduce(shaping.add_batch, map(jnp.asarray, batches), NOTHING)


# moments


def test_moments_golden():
    # 1, 3: mean 2, m2 1 + 1 = 2.   Then 6, 8, 7: mean 7, m2 1 + 1 + 0 = 2, five units above.
    # All five: mean 25 / 5 = 5; m2 = 16 + 4 + 1 + 9 + 4 = 34 (= 2 + 2 + 5^2 * 2 * 3 / 5); std sqrt(34 / 5) = 2.60768
    first = shaping.batch_moments(jnp.array([1.0, 3.0]))
    np.testing.assert_array_equal(first, [2.0, 2.0, 2.0])
    assert float(first.std) == 1.0
    both = shaping.add_batch(first, jnp.array([6.0, 8.0, 7.0]))
    assert_close(jnp.stack(both), [5.0, 5.0, 34.0], 4, 34)
    assert_close(both.std, 2.6076809620810595, 4)


def test_moments_start_from_nothing():
    np.testing.assert_array_equal(running([[1.0, 3.0]]), [2.0, 2.0, 2.0])
    assert float(NOTHING.std) == 0.0


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_running_moments_are_numpys_over_all_batches(rng, shift):
    # A mean a thousand deviations away: a difference of sums of squares would have no digit left in float32.
    sizes = rng.integers(1, 40, size=12)
    batches = [float32(shift + rng.normal(scale=rng.uniform(0.5, 2.0), size=size)) for size in sizes]
    moments, everything = running(batches), np.concatenate(batches).astype(np.float64)
    assert float(moments.count) == len(everything)
    # A rounding for each batch, of numbers as large as the mean; distances from it are what m2 is the sum of.
    ops = 40 + 6 * len(sizes)
    assert_close(moments.mean, everything.mean(), ops, shift + 4)
    assert_close(moments.std, everything.std(), ops, 4 + shift * 0.05)


def test_the_order_and_the_size_of_batches_do_not_matter(rng):
    x = float32(rng.normal(size=24))
    parts = [np.split(x, [24]), np.split(x, 4), np.split(x[::-1], [1, 2, 20]), [x[i : i + 1] for i in range(24)]]
    (expected, *others) = (jnp.stack(running([part for part in split if len(part)])) for split in parts)
    for other in others:
        assert_close(other, expected, 24 * 6, 24)


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e4])
def test_numbers_that_are_all_the_same_vary_by_exactly_nothing(value):
    # The float32 sum of 4096 times 0.1 is not 409.6, but nothing here is a sum of them.
    moments = running([np.full(size, value, np.float32) for size in (4096, 1, 63, 4096)])
    np.testing.assert_array_equal(moments, [8256.0, np.float32(value), 0.0])


def test_moments_carried_through_a_compiled_loop(rng):
    x = float32(rng.normal(size=(9, 8)))

    def add(moments, batch):
        moments = shaping.add_batch(moments, batch)
        return moments, moments.std

    last, deviations = jax.jit(lambda y: jax.lax.scan(add, NOTHING, y))(x)
    assert_close(jnp.stack(last), jnp.stack(running(x)), 9 * 6, 72)
    for i in range(9):
        assert_close(deviations[i], np.float64(x[: i + 1]).std(), 9 * 6 + 16)


def test_a_batch_has_one_dimension():
    with pytest.raises(AssertionError):
        shaping.batch_moments(jnp.zeros((2, 2)))


# scale


@pytest.mark.parametrize(("shift", "expected"), [(False, [1.0, 2.0, -0.5]), (True, [-0.5, 0.5, -2.0])])
def test_scale_golden(shift, expected):
    # Eight numbers of mean 3 and m2 32: deviation sqrt(32 / 8) = 2.   2/2, 4/2, -1/2;   -1/2, 1/2, -4/2
    moments = Moments(jnp.float32(8), jnp.float32(3), jnp.float32(32))
    np.testing.assert_array_equal(shaping.scale_scores(jnp.array([2.0, 4.0, -1.0]), moments, shift), expected)


def test_scaled_by_their_own_moments_scores_have_deviation_one(rng):
    x = float32(rng.normal(3.0, 5.0, size=40))
    moments = shaping.batch_moments(jnp.asarray(x))
    scaled, shifted = (np.float64(shaping.scale_scores(x, moments, shift)) for shift in (False, True))
    assert_close(shifted.mean(), 0.0, 60, 4)
    assert_close(shifted.std(), 1.0, 60, 4)
    assert_close(scaled - shifted, np.full(40, np.float64(x).mean() / np.float64(x).std()), 60, 8)


def test_scores_of_tokens_are_scaled_as_well(rng):
    x = float32(rng.normal(size=(3, 4)))
    moments = Moments(jnp.float32(4), jnp.float32(-1), jnp.float32(1))  # deviation 1/2
    np.testing.assert_array_equal(shaping.scale_scores(x, moments, shift=False), 2 * x)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -7.3])
@pytest.mark.parametrize("batches", [1, 3])
def test_a_judge_that_always_says_the_same_is_not_blown_up(value, batches):
    x = np.full(64, value, np.float32)
    moments = running([x] * batches)
    np.testing.assert_array_equal(shaping.scale_scores(x, moments, shift=False), x)
    np.testing.assert_array_equal(shaping.scale_scores(x, moments, shift=True), np.zeros(64))


def test_differences_of_one_rounding_are_no_scale():
    x = np.float32(0.7) + np.float32([0, 6e-8, 0, -6e-8])
    assert len(set(x.tolist())) > 1
    scaled = shaping.scale_scores(x, shaping.batch_moments(jnp.asarray(x)), shift=False)
    np.testing.assert_array_equal(scaled, x)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_unit_of_the_scores_does_not_matter(rng, factor):
    x = float32(rng.normal(size=32))
    scaled = shaping.scale_scores(x, shaping.batch_moments(jnp.asarray(x)), shift=True)
    other = float32(x * np.float32(factor))
    assert_close(shaping.scale_scores(other, shaping.batch_moments(jnp.asarray(other)), shift=True), scaled, 80, 4)


# length

PRICE = functools.partial(
    shaping.length_penalties, length_penalty=0.0, overlong_buffer=0, overlong_penalty=1.0, response_length=20
)


def test_overlong_penalty_golden():
    # DAPO, equation 13, with L_max 20 and L_cache 8: none up to 12; (l - 12) / 8 between; 1 at the limit.
    # 12: 0    13: 1/8    14: 2/8    16: 4/8    18: 6/8    19: 7/8    20: 1
    lengths = jnp.array([0, 1, 12, 13, 14, 16, 18, 19, 20])
    expected = np.array([0, 0, 0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0])
    np.testing.assert_array_equal(PRICE(lengths, overlong_buffer=8), expected)
    np.testing.assert_array_equal(PRICE(lengths, overlong_buffer=8, overlong_penalty=4.0), 4 * expected)


def test_the_papers_own_numbers():
    # Section 4: expected length 16384, cache 4096, limit 20480. Half the cache beyond the expected length costs 1/2.
    actual = PRICE(jnp.array([16384, 18432, 20480]), overlong_buffer=4096, response_length=20480)
    np.testing.assert_array_equal(actual, [0.0, 0.5, 1.0])


def test_price_of_each_token_golden():
    # 0.25 a token: 0, 0.25, 5; with the penalty of 20 - 8 = 12 on top: 18 tokens 4.5 + 0.75
    np.testing.assert_array_equal(PRICE(jnp.array([0, 1, 20]), length_penalty=0.25), [0.0, 0.25, 5.0])
    np.testing.assert_array_equal(PRICE(jnp.array([18]), length_penalty=0.25, overlong_buffer=8), [5.25])
    np.testing.assert_array_equal(PRICE(jnp.array([4]), length_penalty=-0.5), [-2.0])


def test_without_a_price_and_a_buffer_length_costs_nothing():
    actual = PRICE(jnp.arange(21), overlong_penalty=100.0)
    assert actual.dtype == jnp.float32
    np.testing.assert_array_equal(actual, np.zeros(21))


@pytest.mark.parametrize("buffer", [1, 7, 20])
def test_length_oracle(rng, buffer):
    per_token, most = rng.uniform(-1, 1), rng.uniform(0, 3)
    lengths = rng.integers(0, 21, size=30)
    actual = jax.jit(functools.partial(PRICE, length_penalty=per_token, overlong_buffer=buffer, overlong_penalty=most))(
        jnp.asarray(lengths)
    )
    expected = []
    for length in lengths.tolist():
        past = length - (20 - buffer)
        share = 0.0 if past <= 0 else past / buffer if past < buffer else 1.0
        expected.append(per_token * length + most * share)
    assert_close(actual, expected, 5, 24)


def test_the_only_overlong_token_costs_everything():
    # A buffer of one token: nothing up to 19, everything at 20.
    np.testing.assert_array_equal(PRICE(jnp.array([18, 19, 20]), overlong_buffer=1), [0.0, 0.0, 1.0])
    assert math.isclose(float(PRICE(jnp.array([20]), overlong_buffer=20)[0]), 1.0)
