"""Losses of what people said, by a score: rankings and ratings."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import assert_close, float32

from ppo_jax import losses


def with_gradient(loss):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_scalars(loss, metrics, names):
    assert set(metrics) == set(names)
    for value in (loss, *metrics.values()):
        assert value.shape == ()
        assert value.dtype == jnp.float32


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
