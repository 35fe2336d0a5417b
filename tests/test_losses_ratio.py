"""How far two policies are apart: ratio metrics, importance weights; and how losses of tokens become one number."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import assert_close, float32

from ppo_jax import losses

B, R = 5, 7
LENGTHS = [R, 1, 0, R - 1, 3]
COUNT = sum(LENGTHS)
# A difference, an exponential (two), a difference, a product; a sum over COUNT tokens.
OPS = COUNT + 6
SCALE = math.e  # |log ratio| <= 1


def draw(rng):
    """Draw logprobs, old_logprobs, mask."""
    old = float32(-rng.uniform(0.1, 5.0, size=(B, R)))
    return float32(old + np.clip(0.4 * rng.normal(size=old.shape), -1, 1)), old, oracles.response_mask(LENGTHS, R)


# ratio metrics

METRICS = ["approx_kl", "approx_kl_k1", "ratio_mean", "ratio_max", "ratio_min", "ratio_dev"]


def token_metrics(logprobs, old, mask):
    return losses.ratio_metrics(logprobs, old, mask, losses.aggregation_weights(mask, "token"))


def test_ratio_metrics_golden():
    # ratio 2, 2, 4, 1/2, 1 and 8, which is masked; with l = log 2 = 0.693147:
    # k3: 2-1-l, 2-1-l, 4-1-2l, 1/2-1+l, 0: sum 4.5-3l, mean 0.9-0.6l; k1: -l-l-2l+l = -3l, mean -0.6l; mean ratio 9.5/5
    ratio = float32([[2.0, 2.0, 4.0, 0.5, 1.0, 8.0]])
    metrics = token_metrics(np.log(ratio), np.zeros_like(ratio), oracles.response_mask([5], 6))
    log2 = math.log(2)
    expected = [0.9 - 0.6 * log2, -0.6 * log2, 1.9, 4.0, 0.5, 3.0]
    assert list(metrics) == METRICS
    for name, value in zip(METRICS, expected, strict=True):
        assert metrics[name].shape == ()
        assert metrics[name].dtype == jnp.float32
        assert_close(metrics[name], value, 12, 4)


def test_ratio_metrics_oracle(rng):
    logprobs, old, mask = draw(rng)
    log_ratios = oracles.kept(np.float64(logprobs) - np.float64(old), mask)
    ratios = [math.exp(x) for x in log_ratios]
    expected = {
        "approx_kl": oracles.mean([oracles.kl_estimate(0.0, x, "k3") for x in log_ratios]),
        "approx_kl_k1": -oracles.mean(log_ratios),
        "ratio_mean": oracles.mean(ratios),
        "ratio_max": max(ratios),
        "ratio_min": min(ratios),
        "ratio_dev": max(abs(ratio - 1) for ratio in ratios),
    }
    for name, value in token_metrics(logprobs, old, mask).items():
        assert_close(value, expected[name], OPS, SCALE)


def test_ratio_metrics_of_parts_make_those_of_the_whole(rng):
    logprobs, old, mask = draw(rng)
    weights = losses.aggregation_weights(mask, "token")
    whole = losses.ratio_metrics(logprobs, old, mask, weights)
    parts = (np.array([0, 2]), np.array([1, 3, 4]))
    parts = [losses.ratio_metrics(*(x[rows] for x in (logprobs, old, mask, weights))) for rows in parts]
    for name in METRICS:
        join = {"_max": max, "_dev": max, "_min": min}.get(name[-4:], sum)
        assert_close(join([float(part[name]) for part in parts]), whole[name], OPS, SCALE)


def test_approximate_kl_keeps_its_digits_near_zero():
    # log ratio 1e-5 gives 5e-11; "at most 1e-8 on the first minibatch" means nothing if exp(x) - 1 is off by 1.2e-7.
    log_ratio = float32([[1e-5, -1e-5, 3e-6, 2e-5]])
    metrics = token_metrics(log_ratio, np.zeros_like(log_ratio), np.ones((1, 4), bool))
    expected = oracles.mean([math.expm1(float(x)) - float(x) for x in log_ratio[0]])
    assert_close(metrics["approx_kl"], expected, 6, scale=2e-5)


@pytest.mark.parametrize("garbage", [1e30, -math.inf, math.nan])
def test_ratio_metrics_ignore_what_is_masked_and_are_finite_without_a_token(rng, garbage):
    logprobs, old, mask = draw(rng)
    dirty = token_metrics(np.where(mask, logprobs, np.float32(garbage)), old, mask)
    assert {name: float(x) for name, x in dirty.items()} == {
        name: float(x) for name, x in token_metrics(logprobs, old, mask).items()
    }
    assert all(math.isfinite(x) for x in token_metrics(logprobs, old, np.zeros_like(mask)).values())


# importance weights


def test_importance_weights_golden():
    # ratios 4, 1/4, 3/2, 2/3, 1, and 9, which is masked; cap 2
    log_ratio = np.log(float32([[4.0, 0.25, 1.5, 2 / 3, 1.0, 9.0]]))
    mask = oracles.response_mask([5], 6)
    arguments = (log_ratio, np.zeros_like(log_ratio), mask)
    truncated = losses.importance_weights(*arguments, "truncate", 2.0)
    assert_close(truncated, [[2.0, 0.25, 1.5, 2 / 3, 1.0, 0.0]], 8)
    np.testing.assert_array_equal(losses.importance_weights(*arguments, "mask", 2.0), [[0, 0, 1, 1, 1, 0]])
    assert truncated.dtype == jnp.float32


def test_importance_weights_of_the_same_policy_are_one(rng):
    logprobs, _, mask = draw(rng)
    for how in ("truncate", "mask"):
        weights = losses.importance_weights(logprobs, logprobs, mask, how, 1.0)
        np.testing.assert_array_equal(weights, mask.astype(np.float32))


def test_truncated_weights_correct_the_mean_over_another_policys_tokens(rng):
    # E_b[w x] = E_old[x]: tokens drawn from b, exactly enumerated, with a cap that truncates none.
    behaviour, old = (x / x.sum() for x in rng.uniform(0.1, 1.0, size=(2, 6)))
    x = rng.normal(size=6)
    logs = (float32(np.log(old))[None], float32(np.log(behaviour))[None])
    weights = losses.importance_weights(*logs, np.ones((1, 6), bool), "truncate", 100.0)
    assert_close(np.sum(behaviour * x * np.float64(weights[0])), np.sum(old * x), 20, 10)


@pytest.mark.parametrize("garbage", [1e30, -math.inf, math.nan])
@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_importance_weights_are_zero_where_masked_and_never_infinite(rng, how, garbage):
    logprobs, old, mask = draw(rng)
    weights = losses.importance_weights(np.where(mask, logprobs, np.float32(garbage)), old, mask, how, 2.0)
    np.testing.assert_array_equal(np.asarray(weights)[~mask], 0)
    np.testing.assert_array_equal(weights, losses.importance_weights(logprobs, old, mask, how, 2.0))
    extreme = losses.importance_weights(float32([[500]]), float32([[0]]), np.ones((1, 1), bool), how, 2.0)
    assert_close(extreme, [[2.0 if how == "truncate" else 0.0]], 2)


def test_importance_weights_of_another_kind_are_refused(rng):
    logprobs, old, mask = draw(rng)
    with pytest.raises(ValueError, match="importance: got 'none', expected truncate or mask"):
        losses.importance_weights(logprobs, old, mask, "none", 2.0)


# aggregation


def test_aggregation_golden():
    # Lengths 3, 1, 0 of width 4: 4 tokens in 2 responses that have any; B R = 12.
    mask = oracles.response_mask([3, 1, 0], 4)
    for how, first, second in (("token", 1 / 4, 1 / 4), ("sequence", 1 / 6, 1 / 2), ("constant", 1 / 12, 1 / 12)):
        weights = losses.aggregation_weights(mask, how)
        assert weights.dtype == jnp.float32
        assert_close(weights, [[first] * 3 + [0.0], [second, 0.0, 0.0, 0.0], [0.0] * 4], 1)


@pytest.mark.parametrize("how", losses.AGGREGATIONS)
def test_aggregation_oracle(rng, how):
    x, _, mask = draw(rng)
    rows = [oracles.kept(x[i], mask[i]) for i in range(B)]
    expected = {
        "token": oracles.mean([v for row in rows for v in row]),
        "sequence": oracles.mean([oracles.mean(row) for row in rows if row]),
        "constant": math.fsum(v for row in rows for v in row) / (B * R),
    }
    assert_close(jnp.sum(losses.aggregation_weights(mask, how) * x), expected[how], OPS, 6)


@pytest.mark.parametrize("how", ["token", "sequence"])
def test_a_mean_of_a_constant_is_that_constant(rng, how):
    mask = rng.random((B, R)) < 0.5
    mask[0, 0] = True
    assert_close(jnp.sum(losses.aggregation_weights(mask, how)), 1.0, B * R)


@pytest.mark.parametrize("how", losses.AGGREGATIONS)
def test_gradients_of_the_parts_of_a_batch_add_up_to_that_of_the_whole(rng, how):
    logprobs, old, mask = draw(rng)
    advantages = float32(rng.normal(size=(B, R)))
    order = rng.permutation(B)
    weights = losses.aggregation_weights(mask, how)

    @jax.jit
    def step(scale, logprobs, old, advantages, mask, weights):
        def total(scale):  # one parameter that all tokens share
            return jnp.sum(weights * losses.clip_surrogate(scale * logprobs, old, advantages, mask, clip_eps=0.2)[0])

        return jnp.stack(jax.value_and_grad(total)(scale))

    arrays = (logprobs, old, advantages, mask, weights)
    whole = step(jnp.float32(1.01), *arrays)
    parts = [step(jnp.float32(1.01), *(x[rows] for x in arrays)) for rows in (order[:1], order[1:3], order[3:])]
    # Log-probabilities of 5 times an advantage of about 4 times a ratio of 3.
    assert_close(sum(np.float64(part) for part in parts), whole, OPS, 60)


@pytest.mark.parametrize("how", losses.AGGREGATIONS)
def test_aggregation_of_nothing_is_zero(how):
    np.testing.assert_array_equal(losses.aggregation_weights(np.zeros((B, R), bool), how), np.zeros((B, R)))


def test_another_aggregation_is_refused():
    with pytest.raises(ValueError, match="loss_aggregation: got 'mean', expected one of token, sequence, constant"):
        losses.aggregation_weights(np.ones((B, R), bool), "mean")
