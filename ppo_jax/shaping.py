"""A score on its way to the reward: running moments, the scale that they give, and the price of length."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Moments(NamedTuple):
    """Count, mean and summed squared deviation of the numbers seen so far; all 0 before the first.

    In float32 the count is exact up to 2^24 and within rounding beyond.
    """

    count: jax.Array  # [] float32
    mean: jax.Array  # [] float32
    m2: jax.Array  # [] float32: sum of (x - mean)^2

    @property
    def std(self) -> jax.Array:
        """Population standard deviation, sqrt(m2 / count), `[]`; 0 before the first number."""
        return jnp.sqrt(self.m2 / jnp.maximum(self.count, 1.0))


def batch_moments(x: jax.Array) -> Moments:
    """The moments of one batch of at least one number, `[B]`."""
    chex.assert_rank(x, 1)
    # Distances from one of the numbers: numbers that are all the same vary by exactly 0, however their sum is rounded.
    distances = (x - x[0]).astype(jnp.float32)
    offset = jnp.mean(distances)
    return Moments(jnp.float32(len(x)), x[0] + offset, jnp.sum(jnp.square(distances - offset)))


def add_batch(moments: Moments, x: jax.Array) -> Moments:
    """The moments of everything seen so far and one more batch.

    With d = mean_x - mean and n = count + B:  mean <- mean + d B / n;  m2 <- m2 + m2_x + d^2 count B / n

    No number is kept, and no large sums of squares are subtracted from each other.

    Args:
        moments: of everything so far.
        x: `[B]`, B >= 1.

    Returns:
        The moments of all count + B numbers, whatever batches they came in.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance".
    """
    batch = batch_moments(x)
    count = moments.count + batch.count
    share = batch.count / count
    apart = batch.mean - moments.mean
    m2 = moments.m2 + batch.m2 + jnp.square(apart) * moments.count * share
    return Moments(count, moments.mean + apart * share, m2)


def scale_scores(scores: jax.Array, moments: Moments, shift: bool) -> jax.Array:
    """Scores in units of a standard deviation, with the mean subtracted if asked.

    scores / std, or (scores - mean) / std

    Where the numbers behind the moments did not vary, up to rounding (a deviation within 1e-6 of the mean), there is no
    unit and the scores are not divided. A small constant in the denominator, which is what others have there, would
    make 1e8 of every score of a judge that has said "1" each time so far.

    Args:
        scores: any shape.
        moments: of the scores that give the scale.
        shift: subtract the mean as well.

    Returns:
        Scaled scores, the same shape, float32.

    Source: Engstrom et al. 2020, arXiv:2005.12729, section 3 (scaling without a shift, there by the deviation of the
        discounted returns); Zheng et al. 2023, arXiv:2307.04964, section 5.3 (with one).
    """
    centre = moments.mean if shift else 0.0
    varies = moments.std > 1e-6 * jnp.abs(moments.mean)
    return (scores - centre) / jnp.where(varies, moments.std, 1.0)


def length_penalties(
    lengths: jax.Array, *, length_penalty: float, overlong_buffer: int, overlong_penalty: float, response_length: int
) -> jax.Array:
    """What is subtracted from the score of a response for its length.

    length_penalty length + overlong_penalty clip((length - (response_length - buffer)) / buffer, 0, 1)

    Args:
        lengths: `[B]` int, response tokens.
        length_penalty: score per token; negative pays for length.
        overlong_buffer: tokens before the limit in which the second term rises; 0: there is none.
        overlong_penalty: score, of a response that fills all of `response_length`.
        response_length: the limit, in tokens, at least `overlong_buffer`.

    Returns:
        Penalties `[B]` float32.

    Source: Yu et al. 2025, DAPO, arXiv:2503.14476, equation 13 (response_length is their L_max, the buffer L_cache, the
        penalty 1; beyond L_max no response of ours goes).
    """
    lengths = lengths.astype(jnp.float32)
    penalties = length_penalty * lengths
    if overlong_buffer:
        excess = lengths - (response_length - overlong_buffer)
        penalties += overlong_penalty * jnp.clip(excess / overlong_buffer, 0.0, 1.0)
    return penalties
