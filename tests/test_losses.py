"""Clipped policy and value losses (Schulman et al. 2017; Stiennon et al. 2020), next tokens, rankings and ratings."""

import functools
import itertools
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
EPS = 0.2
# One token: difference, exponential (two), clip, product, maximum; then a sum over COUNT tokens and a division.
OPS = COUNT + 8
# |log ratio| <= 1 and |advantage| <= 4 are drawn.
SCALE = 4 * math.e


def draw_policy(rng, batch: tuple[int, ...] = ()):
    """Draw logprobs, old_logprobs, advantages, mask; no ratio within 0.01 of a clip boundary."""
    old = float32(-rng.uniform(0.1, 5.0, size=(*batch, B, R)))
    log_ratio = np.clip(0.4 * rng.normal(size=old.shape), -1.0, 1.0)
    # At the boundary itself rounding would pick the side.
    near = np.abs(np.abs(np.exp(log_ratio) - 1) - EPS) < 0.01
    logprobs = float32(old + np.where(near, 0.0, log_ratio))
    advantages = float32(np.clip(rng.normal(size=old.shape), -4, 4))
    return logprobs, old, advantages, np.broadcast_to(oracles.response_mask(LENGTHS, R), old.shape)


def draw_value(rng, batch: tuple[int, ...] = ()):
    """Draw values, old_values, returns, mask; none within 0.01 of a clip boundary or of a tie of the two losses."""
    old = rng.normal(size=(*batch, B, R))
    returns = np.clip(rng.normal(size=old.shape), -3, 3)
    move = np.clip(0.4 * rng.normal(size=old.shape), -1.0, 1.0)
    clipped = np.clip(move, -EPS, EPS)
    tie = np.abs(np.abs(old + move - returns) - np.abs(old + clipped - returns)) < 0.01
    move = np.where((np.abs(np.abs(move) - EPS) < 0.01) | tie, 0.1, move)
    mask = np.broadcast_to(oracles.response_mask(LENGTHS, R), old.shape)
    return float32(old + move), float32(old), float32(returns), mask


def with_gradient(loss, **settings):
    return jax.jit(jax.value_and_grad(functools.partial(loss, **settings), has_aux=True))


# ((loss, metrics), gradient by the first argument); compiled once for all tests.
policy_step = with_gradient(losses.clipped_policy_loss, clip_eps=EPS)
value_step = with_gradient(losses.clipped_value_loss, clip_eps=EPS)
next_token_step = with_gradient(losses.next_token_loss)


def assert_scalars(loss, metrics, names):
    assert set(metrics) == set(names)
    for value in (loss, *metrics.values()):
        assert value.shape == ()
        assert value.dtype == jnp.float32


# policy loss

POLICY_METRICS = ["clip_frac", "approx_kl", "ratio_max", "ratio_dev"]


def test_policy_golden():
    # ratio  2      2      4      0.5    1      8 (masked)
    # A      1     -1      0     -1      3      100
    # clip_eps 0.25: clipped ratio 1.25, 1.25, 1.25, 0.75, 1
    # -A r  -2      2      0      0.5   -3
    # -A c  -1.25   1.25   0      0.75  -3
    # max   -1.25*  2      0      0.75* -3    (* the clipped branch is the larger) sum -1.5, mean -0.3, clip_frac 2/5
    # k3     with l = log 2 = 0.693147: 2-1-l, 2-1-l, 4-1-2l, 0.5-1+l, 0: sum 4.5-3l = 2.420558, mean 0.484112
    ratio = jnp.array([[2.0, 2.0, 4.0, 0.5, 1.0, 8.0]])
    mask = oracles.response_mask([5], 6)
    old = jnp.full((1, 6), -3.0)
    loss, metrics = losses.clipped_policy_loss(
        old + jnp.log(ratio), old, jnp.array([[1.0, -1.0, 0.0, -1.0, 3.0, 100.0]]), mask, 0.25
    )
    assert_scalars(loss, metrics, POLICY_METRICS)
    # old + log(ratio) rounds at size 4, then exp(two) and the sum of five.
    assert_close(loss, -0.3, 12, scale=4)
    assert_close(metrics["clip_frac"], 0.4, 1)
    assert_close(metrics["approx_kl"], 0.9 - 0.6 * 0.6931471805599453, 12, scale=4)
    assert_close(metrics["ratio_max"], 4.0, 4, scale=16)
    assert_close(metrics["ratio_dev"], 3.0, 4, scale=16)


def test_policy_oracle(rng):
    arguments = draw_policy(rng)
    loss, metrics = losses.clipped_policy_loss(*arguments, EPS)
    expected_loss, expected_metrics, _ = oracles.clipped_policy_loss(*arguments, EPS)
    assert_scalars(loss, metrics, POLICY_METRICS)
    assert_close(loss, expected_loss, OPS, SCALE)
    for name in POLICY_METRICS:
        assert_close(metrics[name], expected_metrics[name], OPS, SCALE)


def test_policy_at_ratio_one_is_minus_the_mean_advantage(rng):
    logprobs, _, advantages, mask = draw_policy(rng)
    loss, metrics = losses.clipped_policy_loss(logprobs, logprobs, advantages, mask, EPS)
    assert_close(loss, -oracles.mean(oracles.kept(advantages, mask)), OPS, 4)
    assert {name: float(value) for name, value in metrics.items()} == {
        "clip_frac": 0.0,
        "approx_kl": 0.0,
        "ratio_max": 1.0,
        "ratio_dev": 0.0,
    }


def test_policy_gradient_is_zero_exactly_where_the_clip_binds(rng):
    logprobs, old, advantages, mask = draw_policy(rng)
    _, grad = policy_step(logprobs, old, advantages, mask)
    expected = oracles.clipped_policy_loss(logprobs, old, advantages, mask, EPS)[2]
    np.testing.assert_array_equal(np.asarray(grad) == 0, expected == 0)
    assert_close(grad, expected, 8, SCALE / COUNT)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    # d(-A r)/d logprob = -A r; the clip stops only what would go further the way the advantage points.
    [
        (2.0, 1.0, 0.0),
        (2.0, -1.0, 2.0),
        (0.5, 1.0, -0.5),
        (0.5, -1.0, 0.0),
        (1.0, 3.0, -3.0),
        (1.1, 1.0, -1.1),
        (0.9, -1.0, 0.9),
    ],
)
def test_policy_gradient_golden(ratio, advantage, expected):
    one = np.ones((1, 1), np.float32)
    _, grad = policy_step(float32(math.log(ratio) * one), 0 * one, advantage * one, one > 0)
    assert_close(grad, [[expected]], 6)


def test_policy_gradient_agrees_with_finite_differences(rng):
    logprobs, old, advantages, mask = draw_policy(rng)
    _, grad = policy_step(logprobs, old, advantages, mask)
    expected = oracles.finite_difference(
        lambda x: oracles.clipped_policy_loss(x, old, advantages, mask, EPS)[0], logprobs
    )
    assert_close(grad, expected, 8, SCALE / COUNT)


def test_policy_gradient_does_not_flow_through_the_metrics_of_the_old_policy(rng):
    # The loss is a function of logprobs - old_logprobs: the two gradients are opposite, nothing else enters.
    logprobs, old, advantages, mask = draw_policy(rng)
    new_grad, old_grad = jax.grad(
        lambda x, y: losses.clipped_policy_loss(x, y, advantages, mask, EPS)[0], argnums=(0, 1)
    )(logprobs, old)
    assert_close(new_grad, -np.asarray(old_grad), 8, SCALE / COUNT)


def test_policy_clip_fraction_counts_only_what_binds():
    # Outside the interval but on the side where the unclipped branch is the larger, or with no advantage: not clipped.
    logprobs = jnp.log(jnp.array([[2.0, 0.5, 2.0, 0.5, 2.0]]))
    advantages = jnp.array([[-1.0, 1.0, 0.0, 0.0, 1.0]])
    _, metrics = losses.clipped_policy_loss(logprobs, jnp.zeros((1, 5)), advantages, np.ones((1, 5), bool), EPS)
    assert_close(metrics["clip_frac"], 0.2, 1)


def test_policy_largest_ratio_may_be_below_one_and_the_deviation_counts_both_sides():
    logprobs = jnp.log(jnp.array([[0.5, 0.75, 4.0]]))
    mask = np.array([[True, True, False]])
    _, metrics = losses.clipped_policy_loss(logprobs, jnp.zeros((1, 3)), jnp.ones((1, 3)), mask, EPS)
    assert_close(metrics["ratio_max"], 0.75, 4)
    assert_close(metrics["ratio_dev"], 0.5, 4)


def test_policy_approximate_kl_keeps_its_digits_near_zero():
    # log ratio 1e-5 gives 5e-11; "at most 1e-8 on the first minibatch" means nothing if exp(x) - 1 is off by 1.2e-7.
    log_ratio = float32([[1e-5, -1e-5, 3e-6, 2e-5]])
    ones = np.ones((1, 4), np.float32)
    _, metrics = losses.clipped_policy_loss(log_ratio, 0 * ones, ones, ones > 0, EPS)
    expected = oracles.mean([math.expm1(float(x)) - float(x) for x in log_ratio[0]])
    assert_close(metrics["approx_kl"], expected, 6, scale=2e-5)


@pytest.mark.parametrize("garbage", [50.0, 1e30, -math.inf, math.nan])
def test_policy_padding_changes_neither_value_nor_gradient(rng, garbage):
    logprobs, old, advantages, mask = draw_policy(rng)
    padded = (
        oracles.pad(np.where(mask, logprobs, np.float32(garbage)), 3, garbage),
        oracles.pad(np.where(mask, old, np.float32(0)), 3, 0.0),
        oracles.pad(np.where(mask, advantages, np.float32(garbage)), 3, -9.0),
        oracles.pad(mask, 3, False),
    )
    (loss, metrics), grad = policy_step(logprobs, old, advantages, mask)
    (padded_loss, padded_metrics), padded_grad = policy_step(*padded)
    assert_close(padded_loss, loss, OPS, SCALE)
    for name in POLICY_METRICS:
        assert_close(padded_metrics[name], metrics[name], OPS, SCALE)
    np.testing.assert_array_equal(padded_grad, oracles.pad(np.where(mask, grad, 0), 3, 0.0))


def test_policy_of_an_empty_batch_is_zero_with_zero_gradient(rng):
    logprobs, old, advantages, mask = draw_policy(rng)
    (loss, metrics), grad = policy_step(logprobs, old, advantages, np.zeros_like(mask))
    assert loss == 0
    assert all(math.isfinite(value) for value in metrics.values())
    np.testing.assert_array_equal(grad, np.zeros((B, R)))


# value loss

VALUE_METRICS = ["clip_frac"]


def test_value_golden():
    # old 0, clip_eps 0.5
    # v        2      2      0.25   -2      0.5    9 (masked)
    # clipped  0.5    0.5    0.25   -0.5    0.5
    # R        3      0      1.25   -3     -1
    # (v-R)^2  1      4      1       1      2.25
    # (c-R)^2  6.25   0.25   1       6.25   2.25
    # max      6.25*  4      1       6.25*  2.25   sum 19.75, half of the mean 1.975, clip_frac 2/5
    values = jnp.array([[2.0, 2.0, 0.25, -2.0, 0.5, 9.0]])
    returns = jnp.array([[3.0, 0.0, 1.25, -3.0, -1.0, 0.0]])
    loss, metrics = losses.clipped_value_loss(values, jnp.zeros((1, 6)), returns, oracles.response_mask([5], 6), 0.5)
    assert_scalars(loss, metrics, VALUE_METRICS)
    # Squares and their sum are exact: one division and one product.
    assert_close(loss, 1.975, 2)
    assert_close(metrics["clip_frac"], 0.4, 1)


def test_value_oracle(rng):
    arguments = draw_value(rng)
    loss, metrics = losses.clipped_value_loss(*arguments, EPS)
    expected_loss, expected_clip_frac, _ = oracles.clipped_value_loss(*arguments, EPS)
    assert_scalars(loss, metrics, VALUE_METRICS)
    # Errors reach 8 (returns 3, values about 5), squares 64.
    assert_close(loss, expected_loss, OPS, 64)
    assert_close(metrics["clip_frac"], expected_clip_frac, 1)


def test_value_without_a_move_is_half_the_mean_squared_error(rng):
    _, old, returns, mask = draw_value(rng)
    loss, metrics = losses.clipped_value_loss(old, old, returns, mask, EPS)
    expected = 0.5 * oracles.mean([x * x for x in oracles.kept(np.float64(old) - np.float64(returns), mask)])
    assert_close(loss, expected, OPS, 64)
    assert metrics["clip_frac"] == 0


def test_value_gradient_is_zero_exactly_where_the_clip_binds(rng):
    values, old, returns, mask = draw_value(rng)
    _, grad = value_step(values, old, returns, mask)
    expected = oracles.clipped_value_loss(values, old, returns, mask, EPS)[2]
    np.testing.assert_array_equal(np.asarray(grad) == 0, expected == 0)
    assert_close(grad, expected, 8, 8 / COUNT)


@pytest.mark.parametrize(
    ("value", "target", "expected"),
    # old 0, clip_eps 0.5. Toward the return beyond the interval: stopped. Away from it: pulled back. Inside: v - R.
    [(2.0, 3.0, 0.0), (-2.0, -3.0, 0.0), (2.0, 0.0, 2.0), (-2.0, 0.0, -2.0), (0.25, 1.0, -0.75), (0.0, 1.0, -1.0)],
)
def test_value_gradient_golden(value, target, expected):
    # The interval scaled to EPS: every number by EPS / 0.5 = 0.4, and so the gradient.
    one = np.ones((1, 1), np.float32)
    _, grad = value_step(float32(0.4 * value * one), 0 * one, float32(0.4 * target * one), one > 0)
    assert_close(grad, [[0.4 * expected]], 3, scale=2)


def test_value_gradient_agrees_with_finite_differences(rng):
    values, old, returns, mask = draw_value(rng)
    _, grad = value_step(values, old, returns, mask)
    expected = oracles.finite_difference(lambda x: oracles.clipped_value_loss(x, old, returns, mask, EPS)[0], values)
    assert_close(grad, expected, 8, 8 / COUNT)


@pytest.mark.parametrize("garbage", [50.0, 1e30, -math.inf, math.nan])
def test_value_padding_changes_neither_value_nor_gradient(rng, garbage):
    values, old, returns, mask = draw_value(rng)
    padded = (
        oracles.pad(np.where(mask, values, np.float32(garbage)), 3, garbage),
        oracles.pad(old, 3, 0.0),
        oracles.pad(np.where(mask, returns, np.float32(garbage)), 3, 7.0),
        oracles.pad(mask, 3, False),
    )
    (loss, metrics), grad = value_step(values, old, returns, mask)
    (padded_loss, padded_metrics), padded_grad = value_step(*padded)
    assert_close(padded_loss, loss, OPS, 64)
    assert_close(padded_metrics["clip_frac"], metrics["clip_frac"], 1)
    np.testing.assert_array_equal(padded_grad, oracles.pad(np.where(mask, grad, 0), 3, 0.0))


def test_value_of_an_empty_batch_is_zero_with_zero_gradient(rng):
    values, old, returns, mask = draw_value(rng)
    (loss, metrics), grad = value_step(values, old, returns, np.zeros_like(mask))
    assert loss == 0
    assert metrics["clip_frac"] == 0
    np.testing.assert_array_equal(grad, np.zeros((B, R)))


# next-token loss


def test_next_token_golden():
    # kept: log 1/2, log 1/4, log 1/2, log 1/8: -(1 + 2 + 1 + 3) log 2 = -7 log 2; mean -1.75 log 2; perplexity 2^1.75
    logprobs = jnp.log(jnp.array([[0.5, 0.25, 1e-6], [0.5, 0.125, 0.9]]))
    loss, metrics = losses.next_token_loss(logprobs, oracles.response_mask([2, 2], 3))
    assert_scalars(loss, metrics, ["perplexity"])
    assert_close(loss, 1.2130075659799042, 8)
    assert_close(metrics["perplexity"], 3.363585661014858, 10)


def test_next_token_oracle(rng):
    logprobs, _, _, mask = draw_policy(rng)
    loss, metrics = losses.next_token_loss(logprobs, mask)
    expected = -oracles.mean(oracles.kept(logprobs, mask))
    assert_close(loss, expected, COUNT + 2)
    # exp turns an absolute error of the loss (of size <= 8) into a relative one.
    assert_close(metrics["perplexity"], math.exp(expected), 8 * (COUNT + 2))


def test_next_token_of_a_uniform_model_has_the_vocabulary_as_perplexity():
    _, metrics = losses.next_token_loss(jnp.full((2, 3), -math.log(50.0)), oracles.response_mask([3, 1], 3))
    assert_close(metrics["perplexity"], 50.0, 10, scale=200)


@pytest.mark.parametrize("garbage", [1e30, -math.inf, math.nan])
def test_next_token_gradient_is_one_over_the_count_and_ignores_padding(rng, garbage):
    logprobs, _, _, mask = draw_policy(rng)
    padded, padded_mask = (
        oracles.pad(np.where(mask, logprobs, np.float32(garbage)), 2, garbage),
        oracles.pad(mask, 2, False),
    )
    (loss, _), grad = next_token_step(padded, padded_mask)
    assert_close(loss, losses.next_token_loss(logprobs, mask)[0], COUNT + 2, scale=6)
    assert_close(grad, np.where(padded_mask, -1 / COUNT, 0.0), 2, 1 / COUNT)


def test_next_token_of_an_empty_batch_is_zero(rng):
    logprobs, _, _, mask = draw_policy(rng)
    (loss, metrics), grad = next_token_step(logprobs, np.zeros_like(mask))
    assert loss == 0
    assert metrics["perplexity"] == 1
    np.testing.assert_array_equal(grad, np.zeros((B, R)))


# all three


@pytest.mark.parametrize(
    ("loss", "draw", "scale"),
    [
        (losses.clipped_policy_loss, draw_policy, SCALE),
        (losses.clipped_value_loss, draw_value, 64),
    ],
)
def test_under_jit_and_vmapped_over_batches_and_clips(rng, loss, draw, scale):
    arguments = draw(rng, (3,))
    clips = float32([EPS, EPS, 100.0])
    values, metrics = jax.jit(jax.vmap(loss))(*arguments, clips)
    for i in range(3):
        single, single_metrics = loss(*(x[i] for x in arguments), float(clips[i]))
        assert_close(values[i], single, OPS, scale)
        for name, value in single_metrics.items():
            assert_close(metrics[name][i], value, OPS, scale)


def test_a_wide_clip_is_no_clip(rng):
    logprobs, old, advantages, mask = draw_policy(rng)
    loss, metrics = losses.clipped_policy_loss(logprobs, old, advantages, mask, 100.0)
    ratio = np.exp(np.float64(logprobs) - np.float64(old))
    assert_close(loss, -oracles.mean(oracles.kept(ratio * advantages, mask)), OPS, SCALE)
    assert metrics["clip_frac"] == 0


def test_next_token_under_jit_and_vmap(rng):
    logprobs, _, _, mask = draw_policy(rng, (3,))
    values, metrics = jax.jit(jax.vmap(losses.next_token_loss))(logprobs, mask)
    for i in range(3):
        single, single_metrics = losses.next_token_loss(logprobs[i], mask[i])
        assert_close(values[i], single, COUNT + 2, 8)
        assert_close(metrics["perplexity"][i], single_metrics["perplexity"], 8 * (COUNT + 2))


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("loss", [losses.clipped_policy_loss, losses.clipped_value_loss])
def test_mismatched_shapes_are_refused(rng, loss, wrong):
    arguments = list(draw_policy(rng))
    arguments[wrong] = arguments[wrong][:, :-1]
    with pytest.raises(AssertionError):
        loss(*arguments, EPS)


def test_next_token_mismatched_mask_is_refused(rng):
    logprobs, _, _, mask = draw_policy(rng)
    with pytest.raises(AssertionError):
        losses.next_token_loss(logprobs, mask[:, :-1])


# ranking loss

C = 4
RANKS = np.array([[1, 2, 0, 0], [2, 1, 2, 2], [3, 1, 4, 2], [1, 2, 1, 3], [2, 2, 1, 0], [1, 1, 1, 0]])  # all kinds
ranking_step = with_gradient(losses.ranking_loss)


def draw_ranking(rng):
    """Scores, ranks in a random order, margins."""
    ranks = rng.permuted(RANKS, axis=1)
    return float32(2 * rng.normal(size=ranks.shape)), ranks, float32(rng.uniform(0, 2, len(ranks)))


def likelihood(scores, ranks, margin) -> float:
    """Of one comparison: a product over its stages. In each a text of that rank is chosen among those not yet chosen,
    each of several tied ones among all of them; whatever is worse has the margin as a lead to be overcome.
    """
    product = 1.0
    for i, rank in enumerate(ranks):
        if rank == 0 or not any(other > rank for other in ranks):
            continue
        total = 0.0
        for j, other in enumerate(ranks):
            if other == rank:
                total += math.exp(float(scores[j]) - float(scores[i]))
            elif other > rank:
                total += math.exp(float(scores[j]) - float(scores[i]) + float(margin))
        product /= total
    return product


def ranking_oracle(scores, ranks, margin) -> float:
    return oracles.mean([-math.log(likelihood(*row)) for row in zip(scores, ranks, margin, strict=True)])


# A few exponentials and logarithms of terms up to about 12 (scores of +-8, a margin of 2), summed over a comparison.
RANKING_OPS, RANKING_SCALE = 40, 12


def test_ranking_golden():
    # scores log 1, log 2, log 3, log 4, margin 0.
    # order 4 > 3 > 2 > 1: 4/10 x 3/6 x 2/3 = 24/180 = 2/15
    # choice of the third: 3/10
    # third and fourth tied first, then first and second tied: (3/10) (4/10) = 12/100
    # first over second: 1/3, and with a margin of log 4: 1/(1 + 2 x 4) = 1/9
    # accuracy: 6 of 6 pairs; 2 of 3; 4 of 4; 0 of 1; 0 of 1: together 12 of 15
    scores = jnp.broadcast_to(jnp.log(jnp.arange(1.0, 5.0)), (5, 4))
    ranks = jnp.array([[4, 3, 2, 1], [2, 2, 1, 2], [2, 2, 1, 1], [1, 2, 0, 0], [1, 2, 0, 0]])
    margin = jnp.log(jnp.array([1.0, 1.0, 1.0, 1.0, 4.0]))
    loss, metrics = losses.ranking_loss(scores, ranks, margin)
    assert_scalars(loss, metrics, ["accuracy"])
    # -log(2/15 x 3/10 x 12/100 x 1/3 x 1/9) / 5 = -log(72 / 405000) / 5 = log(5625) / 5
    assert_close(loss, math.log(5625) / 5, RANKING_OPS, 9)
    assert_close(metrics["accuracy"], 12 / 15, 2)


def test_ranking_oracle(rng):
    scores, ranks, margin = draw_ranking(rng)
    loss, metrics = losses.ranking_loss(scores, ranks, margin)
    assert_close(loss, ranking_oracle(scores, ranks, margin), RANKING_OPS, RANKING_SCALE)
    right = [
        row[i] > row[j]
        for row, places in zip(scores, ranks, strict=True)
        for i, better in enumerate(places)
        for j, worse in enumerate(places)
        if 0 < better < worse
    ]
    assert_close(metrics["accuracy"], oracles.mean(right), 2)


def test_equal_scores_count_half(rng):
    scores = float32([[1, 1, 0, 9], [0, 1, 2, 2]])
    # 1 = 1, 1 > 0, 1 > 0 (ranks 1, 2, 3: pairs 12, 13, 23): 2.5 of 3. Choice of the last: 2 > 0, 2 > 1, 2 = 2: 2.5 of 3
    _, metrics = losses.ranking_loss(scores, np.array([[1, 2, 3, 0], [2, 2, 2, 1]]), np.zeros(2, np.float32))
    assert_close(metrics["accuracy"], 5 / 6, 2)


def test_a_pair_costs_minus_log_sigmoid_of_its_difference_less_the_margin(rng):
    scores, margin = float32(3 * rng.normal(size=(50, 2))), float32(rng.uniform(0, 3, 50))
    for order, sign in (([1, 2], 1), ([2, 1], -1)):
        loss, _ = losses.ranking_loss(scores, np.tile(order, (50, 1)), margin)
        lead = sign * (np.float64(scores[:, 0]) - scores[:, 1]) - margin
        assert_close(loss, np.mean(np.logaddexp(0, -lead)), 60, 20)


def test_a_choice_costs_the_cross_entropy_of_a_softmax(rng):
    scores, chosen = float32(2 * rng.normal(size=(9, C))), rng.integers(0, C, 9)
    ranks = np.where(np.arange(C) == chosen[:, None], 1, 2)
    loss, _ = losses.ranking_loss(scores, ranks, np.zeros(9, np.float32))
    expected = oracles.mean([-oracles.log_softmax(row)[i] for row, i in zip(scores, chosen, strict=True)])
    assert_close(loss, expected, RANKING_OPS, RANKING_SCALE)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_likelihoods_of_all_rankings_of_some_texts_sum_to_one(rng, count):
    orders = np.array(list(itertools.permutations(range(1, count + 1))))
    scores = float32(2 * rng.normal(size=count))
    single = jax.jit(lambda ranks: losses.ranking_loss(scores[None], ranks[None], jnp.zeros(1))[0])
    probabilities = [math.exp(-single(ranks)) for ranks in orders]
    assert abs(sum(probabilities) - 1) < 1e-5
    # The likeliest ranking is that of the scores.
    assert np.argsort(orders[np.argmax(probabilities)]).tolist() == np.argsort(-scores).tolist()


def test_what_is_no_choice_costs_nothing():
    ranks = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    (loss, metrics), grad = ranking_step(float32(np.eye(4)), ranks, float32([1, 2, 0, 3]))
    assert (loss, metrics["accuracy"]) == (0, 0)
    np.testing.assert_array_equal(grad, np.zeros((4, 4)))


def test_only_the_order_of_ranks_and_differences_of_scores_count(rng):
    scores, ranks, margin = draw_ranking(rng)
    loss, metrics = losses.ranking_loss(scores, ranks, margin)
    other, same = losses.ranking_loss(scores + 1, np.where(ranks > 0, 5 * ranks - 3, 0), margin)
    assert_close(other, loss, 2 * RANKING_OPS, RANKING_SCALE)
    assert same == metrics


def test_a_margin_is_harder_and_of_no_meaning_between_ties(rng):
    scores, ranks, _ = draw_ranking(rng)
    by_margin = [float(losses.ranking_loss(scores, ranks, np.full(len(ranks), m, np.float32))[0]) for m in (0, 1, 2)]
    assert by_margin == sorted(set(by_margin))
    tied = np.minimum(ranks, 1)
    assert losses.ranking_loss(scores, tied, np.ones(len(ranks), np.float32))[0] == 0


def test_ranking_gradient_agrees_with_finite_differences(rng):
    scores, ranks, margin = draw_ranking(rng)
    _, grad = ranking_step(scores, ranks, margin)
    expected = oracles.finite_difference(lambda x: ranking_oracle(x, ranks, margin), scores)
    assert_close(grad, expected, RANKING_OPS, 1)
    # A shift of all scores of a comparison changes nothing.
    assert_close(np.sum(grad, axis=1), np.zeros(len(ranks)), RANKING_OPS, 1)
    np.testing.assert_array_equal(np.asarray(grad)[ranks == 0], 0)


@pytest.mark.parametrize("garbage", [50.0, -1e30, 1e30])
def test_absent_texts_matter_to_nothing(rng, garbage):
    scores, ranks, margin = draw_ranking(rng)
    wide = oracles.pad(np.where(ranks > 0, scores, np.float32(garbage)), 2, garbage)
    (loss, metrics), grad = ranking_step(scores, ranks, margin)
    (same_loss, same_metrics), same_grad = ranking_step(wide, oracles.pad(ranks, 2, 0), margin)
    assert_close(same_loss, loss, RANKING_OPS, RANKING_SCALE)
    assert_close(same_metrics["accuracy"], metrics["accuracy"], 1)
    assert_close(same_grad, oracles.pad(grad, 2, 0.0), RANKING_OPS, 1)
    np.testing.assert_array_equal(np.asarray(same_grad)[:, C:], 0)


def test_scores_far_apart_stay_finite():
    # first over second, as the scores say: nothing. Against the scores: 2000 nats, and a slope of one.
    for ranks, expected, slope in (([1, 2, 3], 0, 0), ([2, 1, 3], 2000, 1)):
        scores = float32([[1000, -1000, -3000]])
        (loss, _), grad = ranking_step(scores, np.array([ranks]), np.zeros(1, np.float32))
        assert loss == expected
        np.testing.assert_array_equal(grad, [[slope, -slope, 0]])


@pytest.mark.parametrize("wrong", range(3))
def test_ranking_mismatched_shapes_are_refused(rng, wrong):
    arguments = list(draw_ranking(rng))
    arguments[wrong] = arguments[wrong][1:]
    with pytest.raises(AssertionError):
        losses.ranking_loss(*arguments)


# rating loss


def test_rating_golden_and_gradient():
    # errors 1, -2, 0, 3: squares 1, 4, 0, 9, mean 3.5, half of it 1.75; gradient error / 4
    (loss, metrics), grad = with_gradient(losses.rating_loss)(float32([2, 1, 5, 0]), float32([1, 3, 5, -3]))
    assert_scalars(loss, metrics, ["rmse"])
    assert loss == 1.75
    assert_close(metrics["rmse"], math.sqrt(3.5), 2)
    assert_close(grad, [0.25, -0.5, 0, 0.75], 2)


def test_rating_oracle(rng):
    scores, targets = float32(rng.normal(size=(2, 31)))
    loss, metrics = losses.rating_loss(scores, targets)
    expected = oracles.mean([(float(s) - float(t)) ** 2 for s, t in zip(scores, targets, strict=True)])
    assert_close(loss, expected / 2, 40, 30)
    assert_close(metrics["rmse"], math.sqrt(expected), 40, 30)


def test_perfect_ratings_cost_nothing_and_have_a_gradient(rng):
    scores = float32(rng.normal(size=5))
    (loss, metrics), grad = with_gradient(losses.rating_loss)(scores, scores)
    assert (loss, metrics["rmse"]) == (0, 0)
    np.testing.assert_array_equal(grad, np.zeros(5))


def test_rating_mismatched_shapes_are_refused():
    with pytest.raises(AssertionError):
        losses.rating_loss(jnp.zeros(3), jnp.zeros((3, 1)))
