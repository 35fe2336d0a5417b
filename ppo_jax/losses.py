"""Losses over per-token arrays: `x_loss(...) -> (scalar, metrics)`. Every mean is over the mask."""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.numerics import masked_mean
from ppo_jax.types import Metrics


def clipped_policy_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, clip_eps: float
) -> tuple[jax.Array, Metrics]:
    """PPO's clipped surrogate, to be minimised.

    ratio = exp(logprobs - old_logprobs);  loss = mean max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps))

    Args:
        logprobs: `[B, R]` nats, of the taken tokens under the parameters that learn.
        old_logprobs: `[B, R]` nats, under the parameters that acted.
        advantages: `[B, R]`.
        mask: `[B, R]` bool.
        clip_eps: half width of the trust interval, > 0.

    Returns:
        (loss `[]`, metrics): `clip_frac`, the fraction of tokens on which the clip binds; `approx_kl`, the k3 estimate
        of KL(old || new) in nats; `ratio_max`; `ratio_dev`, the largest |ratio - 1|.

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7.
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    # Masked tokens have arbitrary logprobs: their ratio is set to one before exp, so that neither it nor its gradient
    # overflows.
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
    loss = masked_mean(jnp.maximum(unclipped, clipped), mask)
    metrics = {
        "clip_frac": masked_mean((clipped > unclipped).astype(jnp.float32), mask),
        # expm1 keeps the digits that `ratio - 1 - log_ratio` would cancel near ratio 1.
        "approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "ratio_max": jnp.max(ratio, where=mask, initial=0.0),
        "ratio_dev": jnp.max(jnp.abs(jnp.expm1(log_ratio)), where=mask, initial=0.0),
    }
    return loss, metrics


def clipped_value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, clip_eps: float
) -> tuple[jax.Array, Metrics]:
    """Squared error of the critic, pessimistic about moves of more than `clip_eps` from the old value.

    loss = 1/2 mean max((v - R)^2, (clip(v, v_old - eps, v_old + eps) - R)^2)

    Args:
        values: `[B, R]`, of the parameters that learn.
        old_values: `[B, R]`, of the parameters that acted.
        returns: `[B, R]`, the targets.
        mask: `[B, R]` bool.
        clip_eps: largest rewarded move, in units of the value; `float("inf")` turns the clip off.

    Returns:
        (loss `[]`, metrics): `clip_frac`, the fraction of tokens on which the clip binds.

    Source: openai/baselines, ppo2/model.py; openai/lm-human-preferences, train_policy.py.
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    clipped_values = jnp.clip(values, old_values - clip_eps, old_values + clip_eps)
    unclipped = jnp.square(jnp.where(mask, values - returns, 0.0))
    clipped = jnp.square(jnp.where(mask, clipped_values - returns, 0.0))
    loss = 0.5 * masked_mean(jnp.maximum(unclipped, clipped), mask)
    return loss, {"clip_frac": masked_mean((clipped > unclipped).astype(jnp.float32), mask)}


def next_token_loss(logprobs: jax.Array, mask: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean negative log-likelihood of the masked tokens.

    Args:
        logprobs: `[B, T]` nats.
        mask: `[B, T]` bool.

    Returns:
        (loss `[]` in nats per token, metrics): `perplexity`, its exponential.
    """
    chex.assert_equal_shape([logprobs, mask])
    loss = -masked_mean(logprobs, mask)
    return loss, {"perplexity": jnp.exp(loss)}


def ranking_loss(scores: jax.Array, ranks: jax.Array, margin: jax.Array) -> tuple[jax.Array, Metrics]:
    """Negative log-likelihood of rankings: the best is chosen from all, the next from what is left, and so on.

    loss = -mean sum_i log softmax_{j: rank_j >= rank_i} (s_j + margin [rank_j > rank_i])_i

    over the texts i that are not among the last. One formula for three kinds of judgement: with two texts it is
    Bradley-Terry's -log sigmoid(s_1 - s_2 - margin); with ranks 1, 2, 2, ..., 2 the softmax of one choice out of C;
    with a full ranking Plackett-Luce's. Of tied texts each is chosen from all of them (Breslow's treatment of ties); a
    comparison in which all tie says nothing and costs nothing.

    Args:
        scores: `[B, C]` float32.
        ranks: `[B, C]` int: 1 is best, 0 is no text.
        margin: `[B]` float32, >= 0, in units of the score.

    Returns:
        (loss `[]` in nats per comparison, metrics): `accuracy`, the fraction of strictly ordered pairs that the scores
        order alike (equal scores count half).

    Source: Bradley and Terry 1952; Plackett 1975; Ziegler et al. 2019, arXiv:1909.08593, equation 1 (one choice of
    four); Touvron et al. 2023, arXiv:2307.09288, equation 2 (margin).
    """
    chex.assert_equal_shape([scores, ranks])
    chex.assert_shape(margin, scores.shape[:1])
    present = ranks > 0
    last = jnp.max(ranks, axis=1, keepdims=True)
    worse = (ranks[:, None, :] > ranks[:, :, None]) & present[:, :, None]  # [B, C, C]: j is worse than i
    rivals = (ranks[:, None, :] >= ranks[:, :, None]) & present[:, :, None] & present[:, None, :]
    against = scores[:, None, :] + jnp.where(worse, margin[:, None, None], 0.0)
    normalizer = jax.nn.logsumexp(against, axis=2, where=rivals | ~present[:, :, None])
    losses = jnp.sum(jnp.where(present & (ranks < last), normalizer - scores, 0.0), axis=1)
    difference = scores[:, :, None] - scores[:, None, :]
    right = (difference > 0) + 0.5 * (difference == 0)
    return jnp.mean(losses), {"accuracy": masked_mean(right, worse)}


def rating_loss(scores: jax.Array, targets: jax.Array) -> tuple[jax.Array, Metrics]:
    """Half the mean squared error of scores `[B]` against what people said, `[B]`; metrics: `rmse`, its root."""
    chex.assert_equal_shape([scores, targets])
    error = jnp.mean(jnp.square(scores - targets))
    return 0.5 * error, {"rmse": jnp.sqrt(error)}
