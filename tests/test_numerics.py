"""Masked statistics, token logprobs, entropy and divergence."""

import functools
import json
import math
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import EPS32, assert_close, float32

from ppo_jax import numerics

B, R = 5, 7
LENGTHS = [R, 1, 0, R - 1, 3]
COUNT = sum(LENGTHS)
# A mean is a sum of COUNT terms and a division; a variance does it twice, with a difference and a square in between.
MEAN_OPS, VAR_OPS = COUNT + 2, 2 * COUNT + 6
STATISTICS = [
    numerics.masked_mean,
    numerics.masked_var,
    numerics.masked_std,
    numerics.standard_error,
    numerics.masked_whiten,
]


def draw(rng, batch: tuple[int, ...] = ()):
    """Draw x within (-4, 4) and mask."""
    x = float32(np.clip(rng.normal(size=(*batch, B, R)), -4, 4))
    return x, np.broadcast_to(oracles.response_mask(LENGTHS, R), x.shape)


# masked statistics: mean


def test_mean_golden():
    # (1 + 2 + 6) / 3 = 3; rows: (1 + 2) / 2 = 1.5, 6, and 0 for the empty one; columns: (1 + 6) / 2 = 3.5, 2
    x = jnp.array([[1.0, 2.0], [6.0, 50.0], [70.0, 90.0]])
    mask = oracles.response_mask([2, 1, 0], 2)
    assert numerics.masked_mean(x, mask) == 3.0
    np.testing.assert_array_equal(numerics.masked_mean(x, mask, axis=1), [1.5, 6.0, 0.0])
    np.testing.assert_array_equal(numerics.masked_mean(x, mask, axis=-1), [1.5, 6.0, 0.0])
    np.testing.assert_array_equal(numerics.masked_mean(x, mask, axis=0), [3.5, 2.0])


def test_mean_oracle(rng):
    x, mask = draw(rng)
    actual = numerics.masked_mean(x, mask)
    assert actual.shape == ()
    assert actual.dtype == jnp.float32
    assert_close(actual, oracles.mean(oracles.kept(x, mask)), MEAN_OPS, 4)
    rows = [oracles.mean(oracles.kept(*row)) for row in zip(x, mask, strict=True)]
    columns = [oracles.mean(oracles.kept(*column)) for column in zip(x.T, mask.T, strict=True)]
    assert_close(numerics.masked_mean(x, mask, axis=1), rows, R + 2, 4)
    assert_close(numerics.masked_mean(x, mask, axis=0), columns, B + 2, 4)


def test_mean_of_booleans_and_integers_is_a_fraction():
    mask = oracles.response_mask([3], 4)
    assert_close(numerics.masked_mean(jnp.array([[True, False, False, True]]), mask), 1 / 3, 1)
    assert_close(numerics.masked_mean(jnp.array([[1, 0, 1, 9]]), mask), 2 / 3, 1)


def test_mean_of_many_bfloat16_numbers_is_taken_in_float32():
    # bfloat16 has 8 bits: a running sum of ones in it stops at 256, and the count 1000 rounds to 1000 only in float32.
    assert_close(numerics.masked_mean(jnp.ones((1, 1001), jnp.bfloat16), np.ones((1, 1001), bool)), 1.0, 1)


# variance, standard deviation


def test_variance_golden():
    # kept 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, population variance 14/3 (not 14/2)
    x = jnp.array([[1.0, 2.0], [6.0, 50.0]])
    mask = oracles.response_mask([2, 1], 2)
    assert_close(numerics.masked_var(x, mask), 14 / 3, 4)
    assert_close(numerics.masked_std(x, mask), 2.160246899469287, 4)


def test_variance_and_standard_deviation_oracle(rng):
    x, mask = draw(rng)
    expected = oracles.variance(oracles.kept(x, mask))
    assert_close(numerics.masked_var(x, mask), expected, VAR_OPS, 16)
    assert_close(numerics.masked_std(x, mask), math.sqrt(expected), VAR_OPS, 16)


def test_variance_survives_a_large_mean(rng):
    # Mean of squares minus square of mean would lose 1e6 * eps32 = 0.12. In two passes the differences from it are
    # exact (both are near 1000), and the mean's own error, at most MEAN_OPS * 1e3 * eps32 = 2e-3, enters squared.
    x, mask = draw(rng)
    x = float32(x + 1000)
    error = abs(float(numerics.masked_var(x, mask)) - oracles.variance(oracles.kept(x, mask)))
    assert error <= (MEAN_OPS * 1000 * EPS32) ** 2 + VAR_OPS * EPS32 * 16


def test_variance_of_one_number_and_of_a_constant_is_zero():
    x = jnp.array([[3.0, 3.0, 5.0]])
    for length in (1, 2):
        mask = oracles.response_mask([length], 3)
        assert numerics.masked_var(x, mask) == 0
        assert numerics.masked_std(x, mask) == 0


def test_variance_gradient(rng):
    # d var / d x_i = 2 (x_i - mean) / n on kept numbers
    x, mask = draw(rng)
    m = oracles.mean(oracles.kept(x, mask))
    expected = np.where(mask, 2 * (np.float64(x) - m) / COUNT, 0.0)
    assert_close(jax.jit(jax.grad(numerics.masked_var))(x, mask), expected, VAR_OPS, 16 / COUNT)


# standard error


def test_standard_error_golden():
    # kept 1, 2, 6: squares 14 (above); 14 / (3 x 2) = 7/3 is the variance of the mean, its root 1.5275252
    x = jnp.array([[1.0, 2.0], [6.0, 50.0]])
    assert_close(numerics.standard_error(x, oracles.response_mask([2, 1], 2)), 1.5275252316519467, 4)


def test_standard_error_oracle(rng):
    x, mask = draw(rng)
    kept = oracles.kept(x, mask)
    expected = np.std(kept, ddof=1) / math.sqrt(COUNT)
    assert_close(numerics.standard_error(x, mask), expected, VAR_OPS, 4)


def test_standard_error_of_fewer_than_two_numbers_is_zero():
    for length in (0, 1):
        assert numerics.standard_error(jnp.array([[3.0, 5.0]]), oracles.response_mask([length], 2)) == 0


# whitening


def test_whitening_golden():
    # kept 1, 3: mean 2, variance 1: -1, +1. Keeping the mean: 1, 3. Masked: 0 in both.
    x, mask = jnp.array([[1.0, 3.0, 9.0]]), oracles.response_mask([2], 3)
    # eps 1e-8 moves a result by 1e-8 at most: below eps32.
    assert_close(numerics.masked_whiten(x, mask), [[-1.0, 1.0, 0.0]], 4)
    assert_close(numerics.masked_whiten(x, mask, shift_mean=False), [[1.0, 3.0, 0.0]], 4)


def test_whitening_oracle(rng):
    x, mask = draw(rng)
    x = float32(3 * x + 2)
    kept = oracles.kept(x, mask)
    m, s = oracles.mean(kept), math.sqrt(oracles.variance(kept))
    # Numbers up to 14 before division; the draw's deviation is well above 1.
    assert_close(numerics.masked_whiten(x, mask), np.where(mask, (np.float64(x) - m) / s, 0.0), VAR_OPS, 14)
    shifted = np.where(mask, (np.float64(x) - m) / s + m, 0.0)
    assert_close(numerics.masked_whiten(x, mask, shift_mean=False), shifted, VAR_OPS, 14)


def test_whitened_numbers_have_mean_zero_and_variance_one(rng):
    x, mask = draw(rng)
    white = numerics.masked_whiten(float32(5 * x - 3), mask)
    kept = oracles.kept(white, mask)
    assert_close(oracles.mean(kept), 0.0, VAR_OPS, 8)
    assert_close(oracles.variance(kept), 1.0, VAR_OPS, 8)
    assert (np.asarray(white)[~mask] == 0).all()


def test_whitening_without_shift_keeps_the_mean(rng):
    x, mask = draw(rng)
    x = float32(5 * x - 3)
    kept = oracles.kept(numerics.masked_whiten(x, mask, shift_mean=False), mask)
    assert_close(oracles.mean(kept), oracles.mean(oracles.kept(x, mask)), VAR_OPS, 24)
    assert_close(oracles.variance(kept), 1.0, VAR_OPS, 24)


def test_whitening_does_not_see_scale_and_shift(rng):
    x, mask = draw(rng)
    assert_close(numerics.masked_whiten(float32(8 * x + 16), mask), numerics.masked_whiten(x, mask), VAR_OPS, 8)
    assert_close(numerics.masked_whiten(-x, mask), -np.asarray(numerics.masked_whiten(x, mask)), 0)


def test_whitening_a_constant_gives_zeros():
    # 0.5 COUNT is a short binary fraction: the mean is exactly 0.5.
    mask = oracles.response_mask(LENGTHS, R)
    np.testing.assert_array_equal(numerics.masked_whiten(jnp.full((B, R), 0.5), mask), np.zeros((B, R)))


def test_a_large_eps_shrinks_what_is_whitened(rng):
    x, mask = draw(rng)
    small, large = numerics.masked_whiten(x, mask), numerics.masked_whiten(x, mask, eps=1.0)
    kept = mask & (np.asarray(small) != 0)
    assert (np.abs(large)[kept] < np.abs(small)[kept]).all()


# explained variance


def test_explained_variance_golden():
    # returns 1, 3: variance 1. values 1, 2: errors 0, 1: variance 1/4. 1 - 1/4 = 0.75. The third token is masked.
    mask = oracles.response_mask([2], 3)
    returns = jnp.array([[1.0, 3.0, 100.0]])
    assert_close(numerics.explained_variance(jnp.array([[1.0, 2.0, -5.0]]), returns, mask), 0.75, 4)


def test_explained_variance_identities(rng):
    returns, mask = draw(rng)
    values, _ = draw(rng)
    kept = oracles.kept(np.float64(returns) - np.float64(values), mask)
    variance = oracles.variance(oracles.kept(returns, mask))
    expected = 1 - oracles.variance(kept) / variance
    # Errors reach 8, their squares 64, divided by the returns' variance.
    assert_close(numerics.explained_variance(values, returns, mask), expected, 2 * VAR_OPS, 64 / variance)
    # A perfect critic explains everything, also when it is off by a constant; a constant one explains nothing.
    assert numerics.explained_variance(returns, returns, mask) == 1
    assert_close(numerics.explained_variance(returns + np.float32(2.0), returns, mask), 1.0, VAR_OPS, 4)
    assert_close(numerics.explained_variance(np.zeros_like(returns), returns, mask), 0.0, VAR_OPS, 4)
    # Twice the return is as far off as zero is; minus the return leaves four times the variance.
    assert_close(numerics.explained_variance(2 * returns, returns, mask), 0.0, VAR_OPS, 4)
    assert_close(numerics.explained_variance(-returns, returns, mask), -3.0, VAR_OPS, 4)


def test_explained_variance_of_constant_returns_is_finite(rng):
    # A metric goes into a JSON file: no NaN and no infinity.
    values, mask = draw(rng)
    assert math.isfinite(numerics.explained_variance(values, jnp.ones((B, R)), mask))
    assert math.isfinite(numerics.explained_variance(values, values, np.zeros_like(mask)))


# all masked statistics


@functools.cache
def gradient_of_the_squared(statistic):
    return jax.jit(jax.grad(lambda x, mask: jnp.sum((statistic(x, mask) + 1) ** 2)))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_statistics_ignore_what_lies_outside_the_mask(rng, statistic, garbage):
    x, mask = draw(rng)
    dirty = oracles.pad(np.where(mask, x, np.float32(garbage)), 4, garbage)
    dirty_mask = oracles.pad(mask, 4, False)
    clean, padded = (np.asarray(statistic(*arguments)) for arguments in ((x, mask), (dirty, dirty_mask)))
    if clean.ndim:
        clean = oracles.pad(clean, 4, 0.0)
    # Equal but for the order of the sum.
    assert_close(padded, clean, VAR_OPS, 16)
    grad = gradient_of_the_squared(statistic)(dirty, dirty_mask)
    assert np.isfinite(grad).all()
    assert (np.asarray(grad)[~dirty_mask] == 0).all()


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_of_nothing_are_zero_with_zero_gradient(rng, statistic):
    x, mask = draw(rng)
    nothing = np.zeros_like(mask)
    assert (np.asarray(statistic(x, nothing)) == 0).all()
    np.testing.assert_array_equal(gradient_of_the_squared(statistic)(x, nothing), np.zeros((B, R)))


@pytest.mark.parametrize("statistic", [numerics.masked_mean, numerics.masked_var, numerics.masked_whiten])
def test_statistics_of_one_number_have_finite_gradients(rng, statistic):
    # Not the standard deviation: at zero it has no derivative.
    x, mask = draw(rng)
    one = np.zeros_like(mask)
    one[0, 0] = True
    assert np.isfinite(gradient_of_the_squared(statistic)(x, one)).all()


def test_mean_gradient_is_one_over_the_count(rng):
    x, mask = draw(rng)
    assert_close(jax.jit(jax.grad(numerics.masked_mean))(x, mask), np.where(mask, 1 / COUNT, 0.0), 2, 1 / COUNT)


def test_standard_deviation_and_whitening_gradients_agree_with_finite_differences(rng):
    x, mask = draw(rng)
    weights = float32(rng.normal(size=x.shape))

    def std(y):
        return math.sqrt(oracles.variance(oracles.kept(y, mask)))

    def weighted_whitening(y):
        m, s = oracles.mean(oracles.kept(y, mask)), std(y)
        return math.fsum(
            w * (v - m) / s for w, v in zip(oracles.kept(weights, mask), oracles.kept(y, mask), strict=True)
        )

    # Backward doubles the count; the deviation of 17 normal draws is above 1/4: dividing by it up to thrice gives 64.
    assert_close(jax.jit(jax.grad(numerics.masked_std))(x, mask), oracles.finite_difference(std, x), 2 * VAR_OPS, 4)
    actual = jax.jit(jax.grad(lambda y: (weights * numerics.masked_whiten(y, mask)).sum()))(x)
    assert_close(actual, oracles.finite_difference(weighted_whitening, x), 2 * VAR_OPS, 64)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_under_jit_and_vmap(rng, statistic):
    x, mask = draw(rng, (3,))
    mapped = jax.jit(jax.vmap(statistic))(x, mask)
    for i in range(3):
        assert_close(mapped[i], statistic(x[i], mask[i]), VAR_OPS, 16)


def test_explained_variance_under_jit_and_vmap(rng):
    (values, mask), (returns, _) = draw(rng, (3,)), draw(rng, (3,))
    mapped = jax.jit(jax.vmap(numerics.explained_variance))(values, returns, mask)
    for i in range(3):
        assert_close(mapped[i], numerics.explained_variance(values[i], returns[i], mask[i]), 2 * VAR_OPS, 64)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_refuse_a_mask_of_another_shape(rng, statistic):
    x, mask = draw(rng)
    for wrong in (mask[:, :-1], mask[:, :1], mask[:-1]):
        with pytest.raises(AssertionError):
            statistic(x, wrong)


# logprobs and entropy

V = 11
# exp, a sum of V terms, log, two differences; the entropy adds a product and another sum of V.
LOGPROB_OPS, ENTROPY_OPS = V + 6, 2 * V + 10


# One compilation a shape is quicker than one for each operation; the golden below runs operation by operation.
compiled = jax.jit(numerics.logprobs_and_entropy)


def draw_logits(rng, shape=(3, 4)):
    """Draw logits within (-6, 6) and tokens."""
    return float32(np.clip(2 * rng.normal(size=(*shape, V)), -6, 6)), rng.integers(V, size=shape).astype(np.int32)


def test_logprobs_and_entropy_golden():
    # p = 1/2, 1/4, 1/8, 1/8 from logits log 4, log 2, log 1, log 1 (any common shift).
    # H = 1/2 * 1 + 1/4 * 2 + 1/8 * 3 + 1/8 * 3 = 1.75 bits = 1.75 * 0.6931471805599453 = 1.2130075659799042 nats
    logits = jnp.log(jnp.array([[4.0, 2.0, 1.0, 1.0]]))
    for token, bits in enumerate([1, 2, 3, 3]):
        logprob, entropy = numerics.logprobs_and_entropy(logits, jnp.array([token]))
        assert_close(logprob, [-bits * 0.6931471805599453], 10)
        assert_close(entropy, [1.2130075659799042], 18)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_logprobs_and_entropy_oracle(rng, shape):
    logits, tokens = draw_logits(rng, shape)
    expected = oracles.logprobs_and_entropy(logits, tokens)
    logprobs, entropy = compiled(logits, tokens)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    assert_close(logprobs, expected[0], LOGPROB_OPS, 16)
    assert_close(entropy, expected[1], ENTROPY_OPS, 16)


def test_probabilities_sum_to_one_and_give_the_entropy(rng):
    logits, _ = draw_logits(rng, ())
    logprobs, entropy = compiled(np.tile(logits, (V, 1)), np.arange(V))
    logprobs = np.float64(logprobs)
    assert_close(math.fsum(np.exp(logprobs)), 1.0, LOGPROB_OPS, 16)
    assert_close(entropy[0], -math.fsum(np.exp(logprobs) * logprobs), ENTROPY_OPS, 16)


def test_uniform_logits_have_the_largest_entropy(rng):
    logprobs, entropy = compiled(jnp.full((2, V), 3.0), jnp.array([0, V - 1]))
    assert_close(entropy, [math.log(V)] * 2, ENTROPY_OPS, 4)
    assert_close(logprobs, [-math.log(V)] * 2, LOGPROB_OPS, 4)
    _, other = compiled(*draw_logits(rng))
    assert (np.asarray(other) < math.log(V)).all()
    assert (np.asarray(other) > 0).all()


@pytest.mark.parametrize("shift", [-128.0, 1e4])
def test_a_common_shift_changes_nothing_and_overflows_nothing(rng, shift):
    logits, tokens = draw_logits(rng)
    # Multiples of 2^-8 below 6 stay exact after adding 1e4: 1e4 needs 14 bits before the point, 8 behind make 22 of 24.
    logits = np.round(logits * 256) / np.float32(256)
    plain = compiled(logits, tokens)
    shifted = compiled(logits + np.float32(shift), tokens)
    # A log-sum-exp that carries the shift rounds at 1e4 and loses 1e-3. GPT-2's logits do lie around -100.
    assert_close(shifted[0], plain[0], LOGPROB_OPS, 16)
    assert_close(shifted[1], plain[1], ENTROPY_OPS, 16)


def test_forbidden_tokens_are_as_good_as_absent(rng):
    logits, _ = draw_logits(rng)
    allowed = np.array([0, 2, 3, 7, 10])
    forbidden = np.full_like(logits, -np.inf)
    forbidden[..., allowed] = logits[..., allowed]
    index = rng.integers(len(allowed), size=logits.shape[:-1])
    actual = compiled(forbidden, allowed[index].astype(np.int32))
    expected = oracles.logprobs_and_entropy(logits[..., allowed], index)
    assert_close(actual[0], expected[0], LOGPROB_OPS, 16)
    assert_close(actual[1], expected[1], ENTROPY_OPS, 16)


def test_a_forbidden_token_has_logprob_minus_infinity():
    logprob, entropy = compiled(jnp.array([[0.0, -jnp.inf, 0.0]]), jnp.array([1]))
    assert logprob[0] == -jnp.inf
    assert_close(entropy, [math.log(2)], ENTROPY_OPS)


def test_one_allowed_token_is_certain():
    logprob, entropy = compiled(jnp.array([[-jnp.inf, 5.0, -jnp.inf]]), jnp.array([1]))
    assert logprob[0] == 0
    assert entropy[0] == 0


def gradient_oracle(logits, tokens, logprob_weights, entropy_weights):
    """Analytic: d logprob_t / d logit_v = [v = t] - p_v; d H / d logit_v = -p_v (log p_v + H)."""
    grad = np.zeros(logits.shape)
    for index in np.ndindex(*tokens.shape):
        row = oracles.log_softmax(logits[index])
        entropy = -math.fsum(math.exp(lp) * lp for lp in row if lp > -math.inf)
        for v, lp in enumerate(row):
            p = math.exp(lp)
            entropy_slope = -p * (lp + entropy) if p > 0 else 0.0
            logprob_slope = float(v == tokens[index]) - p
            grad[(*index, v)] = (
                float(logprob_weights[index]) * logprob_slope + float(entropy_weights[index]) * entropy_slope
            )
    return grad


@pytest.mark.parametrize("with_forbidden", [False, True])
def test_logprob_and_entropy_gradient(rng, with_forbidden):
    logits, tokens = draw_logits(rng)
    if with_forbidden:
        forbidden = rng.random(logits.shape) < 0.4
        np.put_along_axis(forbidden, tokens[..., None], False, axis=-1)
        logits = np.where(forbidden, np.float32(-np.inf), logits)
    weights = float32(np.clip(rng.normal(size=(2, *tokens.shape)), -4, 4))

    def weighted(x):
        logprobs, entropy = compiled(x, tokens)
        return (weights[0] * logprobs + weights[1] * entropy).sum()

    # Weights up to 4, log-probabilities up to 16.
    assert_close(jax.jit(jax.grad(weighted))(logits), gradient_oracle(logits, tokens, *weights), ENTROPY_OPS, 64)


def test_a_forbidden_token_outside_the_mask_leaves_the_gradient_finite():
    # A pad token that the sampler forbids: its logprob is -inf, and the mask must be enough to keep it out of the loss.
    logits = jnp.array([[[0.0, 1.0, -jnp.inf], [0.5, 0.25, -jnp.inf]]])
    mask = np.array([[True, False]])

    def loss(x):
        logprobs, entropy = compiled(x, jnp.array([[1, 2]]))
        return numerics.masked_mean(logprobs, mask) + numerics.masked_mean(entropy, mask)

    value, grad = jax.jit(jax.value_and_grad(loss))(logits)
    assert np.isfinite(value)
    expected = gradient_oracle(np.asarray(logits), np.array([[1, 2]]), mask, mask)
    assert_close(grad, expected * mask[..., None], ENTROPY_OPS, 4)


def test_bfloat16_logits_are_promoted_before_the_softmax(rng):
    logits, tokens = draw_logits(rng)
    logits = jnp.asarray(logits, jnp.bfloat16)
    logprobs, entropy = compiled(logits, tokens)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    expected = oracles.logprobs_and_entropy(np.asarray(logits, np.float64), tokens)
    # The tolerance of float32: 2^16 times tighter than bfloat16 arithmetic could meet.
    assert_close(logprobs, expected[0], LOGPROB_OPS, 16)
    assert_close(entropy, expected[1], ENTROPY_OPS, 16)


def test_logprobs_and_entropy_under_jit_and_vmap(rng):
    logits, tokens = draw_logits(rng)
    mapped = jax.jit(jax.vmap(numerics.logprobs_and_entropy))(logits, tokens)
    for a, e in zip(mapped, oracles.logprobs_and_entropy(logits, tokens), strict=True):
        assert_close(a, e, ENTROPY_OPS, 16)


def test_logprobs_refuse_tokens_of_another_shape(rng):
    logits, tokens = draw_logits(rng)
    for wrong in (tokens[:, :-1], tokens[:, :1], tokens[0]):
        with pytest.raises(AssertionError):
            compiled(logits, wrong)


# divergence

DISTRIBUTIONS = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())["distribution"]
kl_with_gradient = jax.jit(
    jax.value_and_grad(lambda x, y: (lambda kl: (kl.sum(), kl))(numerics.kl_divergence(x, y)), has_aux=True)
)


def kl_oracle(logits, ref_logits) -> np.ndarray:
    """The definition, a sum of p log(p / q) over the tokens with p > 0."""
    kl = np.zeros(np.shape(logits)[:-1])
    for index in np.ndindex(*kl.shape):
        rows = zip(oracles.log_softmax(logits[index]), oracles.log_softmax(ref_logits[index]), strict=True)
        kl[index] = math.fsum(math.exp(p) * (p - q) for p, q in rows if p > -math.inf)
    return kl


def test_divergence_golden():
    # p = 1/2, 1/4, 1/4, 0 against q = 1/4, 1/2, 1/8, 1/8: 1/2 log 2 - 1/4 log 2 + 1/4 log 2 = 1/2 log 2
    p, q = jnp.array([[0.5, 0.25, 0.25, 0.0]]), jnp.array([[0.25, 0.5, 0.125, 0.125]])
    (_, kl), grad = kl_with_gradient(jnp.log(p), jnp.log(q))
    assert kl.dtype == jnp.float32
    assert_close(kl, [0.34657359027997264], 12)
    # p (log(p / q) - KL) = 1/4 l, -3/8 l, 1/8 l, 0 with l = log 2
    assert_close(grad, [[0.25 * math.log(2), -0.375 * math.log(2), 0.125 * math.log(2), 0.0]], 12)


@pytest.mark.parametrize("name", ["kl", "entropy"])
def test_divergence_and_entropy_golden_of_torch(name):
    logits, ref_logits = float32(DISTRIBUTIONS["logits"]), float32(DISTRIBUTIONS["ref_logits"])

    def function(x):
        if name == "kl":
            return numerics.kl_divergence(x, ref_logits)
        return numerics.logprobs_and_entropy(x, jnp.zeros(3, int))[1]

    assert_close(function(logits), DISTRIBUTIONS[name], ENTROPY_OPS, 20)
    assert_close(jax.grad(lambda x: function(x).sum())(logits), DISTRIBUTIONS[f"{name}_grad"], ENTROPY_OPS, 20)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_divergence_oracle_and_gradient(rng, shape):
    (logits, _), (ref_logits, _) = draw_logits(rng, shape), draw_logits(rng, shape)
    (_, kl), grad = kl_with_gradient(logits, ref_logits)
    assert kl.shape == shape
    assert_close(kl, kl_oracle(logits, ref_logits), ENTROPY_OPS, 16)
    expected = oracles.finite_difference(lambda x: math.fsum(np.ravel(kl_oracle(x, ref_logits))), logits)
    assert_close(grad, expected, ENTROPY_OPS, 16)


def test_divergence_from_itself_is_zero_with_zero_gradient(rng):
    logits, _ = draw_logits(rng)
    logits[..., ::3] = -np.inf
    (_, kl), grad = kl_with_gradient(logits, logits)
    np.testing.assert_array_equal(kl, np.zeros(kl.shape))
    np.testing.assert_array_equal(grad, np.zeros(logits.shape))


def test_a_small_divergence_keeps_its_digits(rng):
    # At 1e-3 from the reference the KL is about 5e-7, where p log p - p log q would be rounded off to 1e-6.
    logits, _ = draw_logits(rng, (6,))
    ref_logits = float32(logits + 1e-3 * rng.normal(size=logits.shape))
    (_, kl), _ = kl_with_gradient(logits, ref_logits)
    assert (np.asarray(kl) > 0).all()
    # Each log ratio, of about 1e-3, is off by a few times eps32 x 16.
    assert_close(kl, kl_oracle(logits, ref_logits), ENTROPY_OPS, 16 * 4e-3)


def test_divergence_is_never_negative(rng):
    logits, _ = draw_logits(rng, (200,))
    for size in (1e-6, 1e-4, 1e-2, 1.0, 100.0):
        (_, kl), grad = kl_with_gradient(logits, float32(logits + size * rng.normal(size=logits.shape)))
        assert (np.asarray(kl) >= 0).all()
        assert np.isfinite(grad).all()


def test_divergence_with_forbidden_tokens(rng):
    (logits, _), (ref_logits, _) = draw_logits(rng), draw_logits(rng)
    both = np.broadcast_to(np.arange(V) % 3 == 0, logits.shape)
    expected = kl_oracle(logits[..., ~both[0, 0]], ref_logits[..., ~both[0, 0]])
    logits, ref_logits = (np.where(both, np.float32(-np.inf), x) for x in (logits, ref_logits))
    (_, kl), grad = kl_with_gradient(logits, ref_logits)
    assert_close(kl, expected, ENTROPY_OPS, 16)
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(np.asarray(grad)[both], 0)
    # What only the policy forbids has no p and costs nothing by itself; what only the reference does is infinitely far.
    one = np.broadcast_to(np.arange(V) == 1, logits.shape)
    narrow = np.where(one, np.float32(-np.inf), logits)
    (_, kl), grad = kl_with_gradient(narrow, ref_logits)
    assert_close(kl, kl_oracle(narrow, ref_logits), ENTROPY_OPS, 16)
    assert np.isfinite(grad).all()
    assert np.isposinf(kl_with_gradient(logits, np.where(one, np.float32(-np.inf), ref_logits))[0][1]).all()


def test_divergence_of_certain_distributions_is_finite():
    # p and q underflow where the other is certain: 1000 nats apart.
    (_, kl), grad = kl_with_gradient(float32([[1000, 0, 0]]), float32([[0, 1000, 0]]))
    assert_close(kl, [1000.0], 2)
    assert np.isfinite(grad).all()


def test_nothing_is_learned_through_the_reference(rng):
    (logits, _), (ref_logits, _) = draw_logits(rng), draw_logits(rng)
    grad = jax.grad(lambda x: numerics.kl_divergence(logits, x).sum())(ref_logits)
    np.testing.assert_array_equal(grad, np.zeros(ref_logits.shape))


def test_divergence_of_bfloat16_logits_is_taken_in_float32(rng):
    logits, ref_logits = (jnp.asarray(draw_logits(rng)[0], jnp.bfloat16) for _ in range(2))
    kl = numerics.kl_divergence(logits, ref_logits)
    assert kl.dtype == jnp.float32
    assert_close(kl, kl_oracle(*(np.asarray(x, np.float64) for x in (logits, ref_logits))), ENTROPY_OPS, 16)


def test_divergence_refuses_logits_of_another_shape(rng):
    logits, _ = draw_logits(rng)
    with pytest.raises(AssertionError):
        numerics.kl_divergence(logits, logits[:, :1])


# chunked logprobs and entropy

CB, CR, CD, CV = 3, 7, 2, 23


def make_logits_fn(kernel, table):
    """A linear head and a term for each position: chunks that lose their place, or their order, give other numbers."""

    def logits_fn(hidden, positions):
        assert positions.shape == hidden.shape[1:2]
        return hidden @ kernel + jnp.asarray(table)[positions][None]

    return logits_fn


def draw_head(rng, b=CB, r=CR, d=CD, v=CV):
    """Draw hidden, tokens, kernel, table; logits within (-16, 16)."""
    hidden, kernel, table = (np.clip(rng.normal(size=shape), -2, 2) for shape in ((b, r, d), (d, v), (r, v)))
    return float32(hidden), rng.integers(v, size=(b, r)).astype(np.int32), float32(kernel), float32(table)


@jax.jit
def unchunked(hidden, tokens, kernel, table):
    return numerics.logprobs_and_entropy(make_logits_fn(kernel, table)(hidden, jnp.arange(hidden.shape[1])), tokens)


@functools.partial(jax.jit, static_argnames="chunk_size")
def chunked(hidden, tokens, kernel, table, chunk_size):
    return numerics.chunked_logprobs_and_entropy(make_logits_fn(kernel, table), hidden, tokens, chunk_size)


# Logits of size 16 with CD products, then the softmax over CV.
CHUNK_OPS = CD + 2 * CV + 10


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 7, 11])
def test_chunks_of_any_size_give_the_unchunked_result(rng, chunk_size):
    head = draw_head(rng)
    actual = chunked(*head, chunk_size)
    hidden, tokens, kernel, table = head
    logits = np.float64(hidden) @ np.float64(kernel) + np.float64(table)[None]
    for a, e, u in zip(actual, oracles.logprobs_and_entropy(logits, tokens), unchunked(*head), strict=True):
        assert a.shape == (CB, CR)
        assert a.dtype == jnp.float32
        assert_close(a, e, CHUNK_OPS, 16)
        assert_close(a, u, CHUNK_OPS, 16)


@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_chunks_of_any_size_give_the_unchunked_gradient(rng, chunk_size):
    hidden, tokens, kernel, table = draw_head(rng)
    weights = float32(np.clip(rng.normal(size=(2, CB, CR)), -3, 3))

    def weighted(function, hidden, kernel, table):
        logprobs, entropy = function(hidden, tokens, kernel, table)
        return (weights[0] * logprobs + weights[1] * entropy).sum()

    functions = (functools.partial(chunked, chunk_size=chunk_size), unchunked)
    gradients = (jax.jit(jax.grad(functools.partial(weighted, f), argnums=(0, 1, 2))) for f in functions)
    actual, expected = (gradient(hidden, kernel, table) for gradient in gradients)
    # The kernel's gradient sums CB * CR tokens, each up to weight 3 * hidden 2 * log-probability 32.
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, CHUNK_OPS + CB * CR, 3 * 2 * 32)


def test_chunks_with_forbidden_tokens_at_some_positions(rng):
    # "No EOS before the third token": -inf logits that depend on the position.
    hidden, tokens, kernel, table = draw_head(rng)
    table[:3, 0] = -np.inf
    tokens[:, :3] = np.maximum(tokens[:, :3], 1)

    def loss(function, hidden, kernel):
        logprobs, entropy = function(hidden, tokens, kernel, table)
        return (logprobs + entropy).sum()

    functions = (functools.partial(chunked, chunk_size=2), unchunked)
    gradients = (jax.jit(jax.value_and_grad(functools.partial(loss, f), argnums=(0, 1))) for f in functions)
    actual, expected = (gradient(hidden, kernel) for gradient in gradients)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, e, CHUNK_OPS + CB * CR, 64)


def test_chunks_of_bfloat16_logits_are_promoted(rng):
    hidden, tokens, kernel, table = draw_head(rng)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, kernel, table)]
    logits_fn = make_logits_fn(*low[1:])
    actual = chunked(low[0], tokens, *low[1:], 3)
    logits = np.asarray(logits_fn(low[0], jnp.arange(CR)), np.float64)
    # A bfloat16 product may round another way when compiled with its neighbours: CD + 1 roundings of 2^-8 at size 8.
    for a, e in zip(actual, oracles.logprobs_and_entropy(logits, tokens), strict=True):
        assert a.dtype == jnp.float32
        assert np.abs(np.asarray(a) - e).max() <= 2 * (CD + 1) * 2**-8 * 8


def test_chunks_of_exact_bfloat16_logits_are_float32_accurate(rng):
    # Logits that are looked up are the same numbers however they are compiled: the tolerance is that of float32.
    hidden, tokens, _, table = draw_head(rng)
    table = jnp.asarray(table, jnp.bfloat16)

    def look_up(hidden, positions):
        return jnp.tile(table[positions][None], (hidden.shape[0], 1, 1))

    actual = jax.jit(lambda h: numerics.chunked_logprobs_and_entropy(look_up, h, tokens, 3))(hidden)
    logits = np.tile(np.asarray(table, np.float64)[None], (CB, 1, 1))
    for a, e in zip(actual, oracles.logprobs_and_entropy(logits, tokens), strict=True):
        assert_close(a, e, CHUNK_OPS, 16)


def test_chunks_under_jit_and_vmap(rng):
    heads = [draw_head(rng) for _ in range(2)]
    stacked = [np.stack(parts) for parts in zip(*heads, strict=True)]
    mapped = jax.jit(jax.vmap(functools.partial(chunked, chunk_size=3)))(*stacked)
    for i, head in enumerate(heads):
        for a, e in zip(mapped, unchunked(*head), strict=True):
            assert_close(a[i], e, CHUNK_OPS, 16)


def test_chunks_refuse_tokens_of_another_shape(rng):
    hidden, tokens, kernel, table = draw_head(rng)
    for wrong in (tokens[:, :-1], tokens[:-1], tokens[:, :1]):
        with pytest.raises(AssertionError):
            chunked(hidden, wrong, kernel, table, 3)


def sizes_in_jaxpr(jaxpr) -> set[int]:
    """Number of elements of every intermediate array, sub-programs included."""
    sizes = set()
    for equation in jaxpr.eqns:
        sizes |= {math.prod(v.aval.shape) for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape")}
        for parameter in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                sizes |= sizes_in_jaxpr(inner)
    return sizes


def sizes_in_hlo(text: str) -> set[int]:
    """Number of elements of every array in compiled HLO, such as f32[3,16,101]{2,1,0}."""
    shapes = re.findall(r"\b(?:pred|bf16|[suf]\d+)\[([\d,]+)\]", text)
    return {math.prod(int(n) for n in shape.split(",")) for shape in shapes}


# The largest legitimate arrays: 7 columns of logits 3*7*101 = 2121, the table 14*101 = 1414. All logits: 4242.
MEMORY_SHAPE = {"b": 3, "r": 14, "d": 2, "v": 101}
ALL_LOGITS = 3 * 14 * 101


def program(function, gradient: bool, hidden, tokens, kernel, table):
    def total(hidden, kernel):
        logprobs, entropy = function(hidden, tokens, kernel, table)
        return logprobs.sum() + entropy.sum()

    return (jax.value_and_grad(total, argnums=(0, 1)) if gradient else total), (hidden, kernel)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("chunk_size", [1, 4, 7])
def test_chunks_never_hold_all_logits(rng, gradient, chunk_size):
    # By size and not by shape: scan would keep its residuals as [chunks, B, C, V], which is as large.
    in_chunks = functools.partial(chunked, chunk_size=chunk_size)
    function, arguments = program(in_chunks, gradient, *draw_head(rng, **MEMORY_SHAPE))
    assert max(sizes_in_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)) < ALL_LOGITS
    assert max(sizes_in_hlo(jax.jit(function).lower(*arguments).compile().as_text())) < ALL_LOGITS


def test_a_chunk_larger_than_the_response_holds_no_more_than_the_response(rng):
    function, arguments = program(functools.partial(chunked, chunk_size=64), False, *draw_head(rng, **MEMORY_SHAPE))
    assert max(sizes_in_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)) == ALL_LOGITS


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_the_search_for_all_logits_finds_them_where_they_are(rng, gradient):
    function, arguments = program(unchunked, gradient, *draw_head(rng, **MEMORY_SHAPE))
    assert max(sizes_in_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)) >= ALL_LOGITS
    assert max(sizes_in_hlo(jax.jit(function).lower(*arguments).compile().as_text())) >= ALL_LOGITS


def test_chunked_entropy_gradient_agrees_with_finite_differences(rng):
    hidden, tokens, kernel, table = draw_head(rng, b=2, r=5)

    def entropy(hidden):
        logits = np.float64(hidden) @ np.float64(kernel) + np.float64(table)[None]
        return math.fsum(np.ravel(oracles.logprobs_and_entropy(logits, tokens)[1]))

    actual = jax.jit(jax.grad(lambda h: chunked(h, tokens, kernel, table, 2)[1].sum()))(hidden)
    # Kernels of 2 times slopes of at most |log p| = 16.
    assert_close(actual, oracles.finite_difference(entropy, hidden), CHUNK_OPS, 32)


# chunked divergence


def draw_two_heads(rng, b=CB, r=CR, d=CD, v=CV):
    """Draw (hidden, kernel, table) of a policy and of a reference that is one wider; logits within (-16, 16)."""
    heads = (draw_head(rng, b, r, width, v) for width in (d, d + 1))
    return tuple((hidden, kernel, table) for hidden, _, kernel, table in heads)


@functools.partial(jax.jit, static_argnames="chunk_size")
def chunked_kl(policy, reference, chunk_size):
    (hidden, *head), (ref_hidden, *ref_head) = policy, reference
    return numerics.chunked_kl(make_logits_fn(*head), make_logits_fn(*ref_head), hidden, ref_hidden, chunk_size)


def all_logits(hidden, kernel, table) -> np.ndarray:
    return np.float64(hidden) @ np.float64(kernel) + np.float64(table)[None]


@jax.jit
def unchunked_kl(policy, reference):
    positions = jnp.arange(policy[0].shape[1])
    return numerics.kl_divergence(
        *(make_logits_fn(kernel, table)(hidden, positions) for hidden, kernel, table in (policy, reference))
    )


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 11])
def test_chunked_divergence_of_any_size_with_its_gradient(rng, chunk_size):
    policy, reference = draw_two_heads(rng)
    actual = chunked_kl(policy, reference, chunk_size)
    assert actual.shape == (CB, CR)
    assert_close(actual, kl_oracle(all_logits(*policy), all_logits(*reference)), CHUNK_OPS, 32)
    weights = float32(np.clip(rng.normal(size=(CB, CR)), -3, 3))
    functions = (functools.partial(chunked_kl, chunk_size=chunk_size), unchunked_kl)
    gradients = (jax.jit(jax.grad(lambda p, f=f: (weights * f(p, reference)).sum()))(policy) for f in functions)
    for a, e in zip(*gradients, strict=True):
        assert_close(a, e, CHUNK_OPS + CB * CR, 3 * 2 * 32)


def test_chunked_divergence_gradient_agrees_with_finite_differences(rng):
    policy, reference = draw_two_heads(rng, b=2, r=5)
    _, *head = policy

    def total(hidden):
        return math.fsum(np.ravel(kl_oracle(all_logits(hidden, *head), all_logits(*reference))))

    actual = jax.jit(jax.grad(lambda h: chunked_kl((h, *head), reference, 2).sum()))(policy[0])
    assert_close(actual, oracles.finite_difference(total, policy[0]), CHUNK_OPS, 64)


def test_chunked_divergence_with_forbidden_tokens_at_some_positions(rng):
    policy, reference = draw_two_heads(rng)
    for _, _, table in (policy, reference):
        table[:3, 0] = -np.inf
    value, grad = jax.jit(jax.value_and_grad(lambda p: chunked_kl(p, reference, 2).sum()))(policy)
    expected = kl_oracle(all_logits(*policy), all_logits(*reference))
    assert_close(value, expected.sum(), CHUNK_OPS + CB * CR, 32 * CB)
    assert all(np.isfinite(x).all() for x in grad)


def test_the_backward_pass_sums_nothing_over_the_vocabulary_again(rng):
    """The largest logit, the first sum of the forward pass, is taken once."""
    hidden, projection, tokens = rng.normal(size=(2, 6, 5)), rng.normal(size=(5, 37)), rng.integers(0, 37, (2, 6))

    def loss(projection):
        logprobs, entropy = numerics.chunked_logprobs_and_entropy(
            lambda hidden, _: hidden @ projection, jnp.asarray(hidden), jnp.asarray(tokens), chunk_size=3
        )
        return jnp.sum(logprobs) + jnp.sum(jnp.square(entropy))

    assert str(jax.make_jaxpr(jax.grad(loss))(jnp.asarray(projection))).count("reduce_max") == 1


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_chunked_divergence_never_holds_all_logits(rng, gradient):
    policy, reference = draw_two_heads(rng, **MEMORY_SHAPE)

    def program(function):
        return (jax.value_and_grad if gradient else lambda f: f)(lambda p: function(p, reference).sum())

    in_chunks = program(functools.partial(chunked_kl, chunk_size=4))
    assert max(sizes_in_jaxpr(jax.make_jaxpr(in_chunks)(policy).jaxpr)) < ALL_LOGITS
    assert max(sizes_in_hlo(jax.jit(in_chunks).lower(policy).compile().as_text())) < ALL_LOGITS
    assert max(sizes_in_jaxpr(jax.make_jaxpr(program(unchunked_kl))(policy).jaxpr)) >= ALL_LOGITS


def test_chunked_divergence_refuses_states_of_other_positions(rng):
    policy, (ref_hidden, *ref_head) = draw_two_heads(rng)
    for wrong in (ref_hidden[:, :-1], ref_hidden[:-1]):
        with pytest.raises(AssertionError):
            chunked_kl(policy, (wrong, *ref_head), 3)


def test_a_loss_with_its_gradient_keeps_nothing_else(rng):
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (("a", (3, 5)), ("b", (5,)))}
    x, scale = rng.normal(size=(7, 3)).astype(np.float32), np.float32(rng.normal())

    def loss(params, x):
        hidden = jnp.tanh(x @ params["a"])
        return jnp.mean((hidden @ params["b"]) ** 2), {"hidden": hidden}

    def whole(loss, params):
        value, told = loss(params, x)
        return scale * value + jnp.sum(params["b"]), told

    plain, early = (
        jax.value_and_grad(functools.partial(whole, f), has_aux=True) for f in (loss, numerics.with_its_gradient(loss))
    )
    chex.assert_trees_all_close(jax.jit(early)(params), jax.jit(plain)(params), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(numerics.with_its_gradient(loss)(params, x), loss(params, x), rtol=1e-6)

    def kept(loss):
        backward = jax.vjp(lambda params: loss(params, x)[0], params)[1]
        return sorted(leaf.shape for leaf in jax.tree.leaves(backward))

    assert kept(numerics.with_its_gradient(loss)) == [(3, 5), (5,)]
    assert (7, 5) in kept(loss)
