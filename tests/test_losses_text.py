"""The loss of a language model on the next tokens."""

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
next_token_step = jax.jit(jax.value_and_grad(losses.next_token_loss, has_aux=True))


def draw(rng, batch: tuple[int, ...] = ()):
    """Log-probabilities and mask."""
    logprobs = float32(-rng.uniform(0.1, 5.0, size=(*batch, B, R)))
    return logprobs, np.broadcast_to(oracles.response_mask(LENGTHS, R), logprobs.shape)


def assert_scalars(loss, metrics, names):
    assert set(metrics) == set(names)
    for value in (loss, *metrics.values()):
        assert value.shape == ()
        assert value.dtype == jnp.float32


def test_next_token_golden():
    # kept: log 1/2, log 1/4, log 1/2, log 1/8: -(1 + 2 + 1 + 3) log 2 = -7 log 2; mean -1.75 log 2; perplexity 2^1.75
    logprobs = jnp.log(jnp.array([[0.5, 0.25, 1e-6], [0.5, 0.125, 0.9]]))
    loss, metrics = losses.next_token_loss(logprobs, oracles.response_mask([2, 2], 3))
    assert_scalars(loss, metrics, ["perplexity"])
    assert_close(loss, 1.2130075659799042, 8)
    assert_close(metrics["perplexity"], 3.363585661014858, 10)


def test_next_token_oracle(rng):
    logprobs, mask = draw(rng)
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
    logprobs, mask = draw(rng)
    padded, padded_mask = (
        oracles.pad(np.where(mask, logprobs, np.float32(garbage)), 2, garbage),
        oracles.pad(mask, 2, False),
    )
    (loss, _), grad = next_token_step(padded, padded_mask)
    assert_close(loss, losses.next_token_loss(logprobs, mask)[0], COUNT + 2, scale=6)
    assert_close(grad, np.where(padded_mask, -1 / COUNT, 0.0), 2, 1 / COUNT)


def test_next_token_of_an_empty_batch_is_zero(rng):
    logprobs, mask = draw(rng)
    (loss, metrics), grad = next_token_step(logprobs, np.zeros_like(mask))
    assert loss == 0
    assert metrics["perplexity"] == 1
    np.testing.assert_array_equal(grad, np.zeros((B, R)))


def test_next_token_under_jit_and_vmap(rng):
    logprobs, mask = draw(rng, (3,))
    values, metrics = jax.jit(jax.vmap(losses.next_token_loss))(logprobs, mask)
    for i in range(3):
        single, single_metrics = losses.next_token_loss(logprobs[i], mask[i])
        assert_close(values[i], single, COUNT + 2, 8)
        assert_close(metrics["perplexity"][i], single_metrics["perplexity"], 8 * (COUNT + 2))


def test_next_token_mismatched_mask_is_refused(rng):
    logprobs, mask = draw(rng)
    with pytest.raises(AssertionError):
        losses.next_token_loss(logprobs, mask[:, :-1])
