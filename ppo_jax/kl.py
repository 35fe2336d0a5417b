"""The KL penalty that keeps the policy near its reference: estimators, shaped rewards, the adaptive coefficient."""

import math

import chex
import jax
import jax.numpy as jnp

KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k3_k2", "exact")


def kl_estimate(
    logprobs: jax.Array, ref_logprobs: jax.Array, estimator: str = "k1", clamp: float = math.inf
) -> jax.Array:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    With l = clip(logprobs - ref_logprobs, -clamp, clamp):

        k1 = l    k2 = l^2 / 2    k3 = exp(-l) - 1 + l    abs = |l|    k3_k2 = the value of k3 with the gradient of k2

    Without a clamp k1 and k3 are unbiased; all but k1 are never negative. exp(-l) has no bound: a token that the
    reference likes and the policy has given up costs k3 e^20 = 5e8 nats at l = -20, and infinitely many below l = -89;
    a clamp bounds that. In a loss, the gradient of k2 over tokens that the policy sampled is in expectation that of
    KL(policy || reference); k1's is 0, and k3's that of KL(reference || policy). Where the clamp holds, there is none.

    Args:
        logprobs: any shape, nats, under the policy.
        ref_logprobs: the same shape, nats, under the reference.
        estimator: one of `KL_ESTIMATORS`, but not "exact": that one needs the whole vocabulary, see
            `numerics.chunked_kl`.
        clamp: nats, > 0.

    Returns:
        Estimates in nats, the same shape.

    Raises:
        ValueError: an unknown estimator, or "exact".

    Source: Schulman 2020, "Approximating KL Divergence", joschu.net/blog/kl-approx.html; abs and the straight-through
        form: volcengine/verl, verl/trainer/ppo/core_algos.py `kl_penalty` (which clamps k3 at 20 nats in, 10 out).
    """
    log_ratio = jnp.clip(logprobs - ref_logprobs, -clamp, clamp)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * jnp.square(log_ratio)
    if estimator == "k3":
        return jnp.expm1(-log_ratio) + log_ratio
    if estimator == "abs":
        return jnp.abs(log_ratio)
    if estimator == "k3_k2":
        k2, k3 = (kl_estimate(logprobs, ref_logprobs, name, clamp) for name in ("k2", "k3"))
        return jax.lax.stop_gradient(k3) + (k2 - jax.lax.stop_gradient(k2))  # the second term is exactly 0
    token_wise = ", ".join(name for name in KL_ESTIMATORS if name != "exact")
    raise ValueError(f"kl estimator: got {estimator!r}, expected one that a sampled token gives: {token_wise}")


def kl_shaped_rewards(
    scores: jax.Array,
    kl: jax.Array,
    mask: jax.Array,
    kl_coef: float | jax.Array,
    token_scores: jax.Array | None = None,
) -> jax.Array:
    """Per-token rewards: minus the KL penalty plus a dense score on each response token, the score on the last one.

    r_t = -kl_coef kl_t + token_score_t + [t is the last response token] score

    Args:
        scores: `[B]`, the judge's, one per sequence.
        kl: `[B, R]` nats, of each response token; estimated or exact.
        mask: `[B, R]` bool, True up to and with the last response token; a row without any gets no reward at all.
        kl_coef: reward per nat.
        token_scores: `[B, R]`, of judges who judge each token.

    Returns:
        Rewards `[B, R]` float32, 0 where masked.

    Source: Ziegler et al. 2019, arXiv:1909.08593, equation 2.
    """
    chex.assert_rank(scores, 1)
    chex.assert_equal_shape([kl, mask] if token_scores is None else [kl, mask, token_scores])
    chex.assert_equal_shape_prefix([scores, mask], 1)
    dense = -kl_coef * kl if token_scores is None else token_scores - kl_coef * kl
    return jnp.where(mask, dense, 0.0) + jnp.where(is_last(mask), scores[:, None], 0.0)


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
