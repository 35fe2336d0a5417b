"""The KL penalty that keeps the policy near its reference: estimators, shaped rewards, the adaptive coefficient."""

import chex
import jax
import jax.numpy as jnp

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logprobs: jax.Array, ref_logprobs: jax.Array, estimator: str = "k1") -> jax.Array:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    With l = logprobs - ref_logprobs:  k1 = l;  k2 = l^2 / 2;  k3 = exp(-l) - 1 + l

    k1 and k3 are unbiased; k2 and k3 are never negative.

    Args:
        logprobs: any shape, nats, under the policy.
        ref_logprobs: the same shape, nats, under the reference.
        estimator: one of `KL_ESTIMATORS`.

    Returns:
        Estimates in nats, the same shape.

    Raises:
        ValueError: an unknown estimator.

    Source: Schulman 2020, "Approximating KL Divergence", joschu.net/blog/kl-approx.html.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * jnp.square(log_ratio)
    if estimator == "k3":
        return jnp.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl estimator: got {estimator!r}, expected one of {', '.join(KL_ESTIMATORS)}")


def kl_shaped_rewards(
    scores: jax.Array,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    kl_coef: float | jax.Array,
    estimator: str = "k1",
) -> jax.Array:
    """Per-token rewards: minus the KL penalty on each response token, plus the score on the last one.

    r_t = -kl_coef kl_t + [t is the last response token] score

    Args:
        scores: `[B]`, the judge's, one per sequence.
        logprobs: `[B, R]` nats, under the policy that sampled.
        ref_logprobs: `[B, R]` nats, under the reference.
        mask: `[B, R]` bool, True up to and with the last response token; a row without any gets no reward at all.
        kl_coef: reward per nat.
        estimator: one of `KL_ESTIMATORS`.

    Returns:
        Rewards `[B, R]` float32, 0 where masked.

    Source: Ziegler et al. 2019, arXiv:1909.08593, equation 2.
    """
    chex.assert_rank(scores, 1)
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    chex.assert_equal_shape_prefix([scores, mask], 1)
    penalty = jnp.where(mask, kl_coef * kl_estimate(logprobs, ref_logprobs, estimator), 0.0)
    return jnp.where(is_last(mask), scores[:, None], 0.0) - penalty


def is_last(mask: jax.Array) -> jax.Array:
    """True at the last True position of each row, nowhere in an empty row; `[B, R]` bool to `[B, R]` bool."""
    later = jnp.flip(jnp.cumsum(jnp.flip(mask, axis=1), axis=1), axis=1)  # True positions from here on
    return mask & (later == 1)


def adaptive_kl_coef(kl_coef: jax.Array, kl: jax.Array, target: float, horizon: float, batch_size: int) -> jax.Array:
    """The coefficient after one batch: raised when the KL is above its target, lowered when below.

    coef <- coef (1 + clip(kl / target - 1, -0.2, 0.2) batch_size / horizon)

    Args:
        kl_coef: `[]`, the present coefficient.
        kl: `[]` nats, mean over sequences of the KL summed over the response.
        target: nats, > 0.
        horizon: sequences after which a full error has changed the coefficient by a factor of about e^0.2.
        batch_size: sequences in this batch.

    Returns:
        The next coefficient, `[]`.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2 (they: target 6, horizon 10000).
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * batch_size / horizon)
