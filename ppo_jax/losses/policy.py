"""Surrogates: what the policy minimises on tokens that an older policy sampled.

Each is `x_surrogate(logprobs, old_logprobs, advantages, mask, *, <settings>) -> (loss [B, R], clipped [B, R] bool)`, by
token: `aggregation_weights` makes one number of it. Where masked, the loss is 0 and has no gradient, whatever stands
there.
"""

import math

import chex
import jax
import jax.numpy as jnp

from ppo_jax.errors import check
from ppo_jax.types import Metrics

Loss = tuple[jax.Array, jax.Array]
"""(loss `[B, R]`, `[B, R]` bool: a clip binds)."""


def clip_surrogate(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_eps: float | jax.Array,
    clip_eps_high: float | jax.Array = 0.0,
    dual_clip: float | jax.Array = 0.0,
) -> Loss:
    """PPO's clipped surrogate: no reward for moving the ratio beyond its interval the way the advantage points.

    r = exp(logprobs - old_logprobs);  loss = max(-A r, -A clip(r, 1 - clip_eps, 1 + clip_eps_high))

    and with the dual clip, where A < 0, at most -A dual_clip.

    Args:
        logprobs: `[B, R]` nats, of the taken tokens under the parameters that learn.
        old_logprobs: `[B, R]` nats, under the parameters that acted.
        advantages: `[B, R]`.
        mask: `[B, R]` bool.
        clip_eps: how far below 1 the ratio is rewarded, > 0; 1 or more: as far as it goes.
        clip_eps_high: how far above; 0: `clip_eps`.
        dual_clip: largest ratio that counts where the advantage is negative, > 1; 0: any.

    Returns:
        (loss `[B, R]`, `[B, R]` bool: a clip binds, so that the token has no gradient).

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7; clip_eps_high: Yu et al. 2025 (DAPO), arXiv:2503.14476,
    equation 10; dual_clip: Ye et al. 2020, arXiv:1912.09729.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask, advantages)
    return _clipped(log_ratio, advantages, mask, clip_eps, clip_eps_high, dual_clip)


def gspo_surrogate(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_eps: float | jax.Array,
    clip_eps_high: float | jax.Array = 0.0,
) -> Loss:
    """The clipped surrogate with one ratio for all tokens of a response: the geometric mean of theirs.

    s = exp(mean over the response of (logprobs - old_logprobs));  loss = max(-A s, -A clip(s, ...)) as in
    `clip_surrogate`

    The gradient of token t is that of -A_t s log p_t, the paper's GSPO-token. Where all tokens of a response have the
    same advantage, the aggregated loss has the value and the gradient of GSPO itself; where they have not (GAE), each
    token keeps its own credit.

    Args:
        logprobs: `[B, R]` nats, under the parameters that learn.
        old_logprobs: `[B, R]` nats, under the parameters that acted.
        advantages: `[B, R]`.
        mask: `[B, R]` bool.
        clip_eps: how far below 1 the response's ratio is rewarded, > 0 (the paper: 3e-4).
        clip_eps_high: how far above (the paper: 4e-4); 0: `clip_eps`.

    Returns:
        (loss `[B, R]`, `[B, R]` bool: the clip binds, so that the token has no gradient).

    Source: Zheng et al. 2025, arXiv:2507.18071, equations 5 and 7 (ratio), 13 and 14 (GSPO-token).
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask, advantages)
    length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    log_sequence_ratio = jnp.sum(log_ratio, axis=1, keepdims=True) / length
    # The response's value with the token's own slope; in this order the value is exact.
    log_ratio = jax.lax.stop_gradient(log_sequence_ratio) + (log_ratio - jax.lax.stop_gradient(log_ratio))
    return _clipped(log_ratio, advantages, mask, clip_eps, clip_eps_high, 0.0)


def cispo_surrogate(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, *, clip_eps_high: float
) -> Loss:
    """REINFORCE with importance weights that are truncated: no token ever loses its gradient.

    r = exp(logprobs - old_logprobs);  loss = -stop_gradient(min(r, 1 + clip_eps_high)) A logprobs

    The paper's equation 5 clips the weight from below as well, and its experiments turn that off ("we did not impose a
    lower bound"): here there is none, as in TRL.

    Args:
        logprobs: `[B, R]` nats, under the parameters that learn.
        old_logprobs: `[B, R]` nats, under the parameters that acted.
        advantages: `[B, R]`.
        mask: `[B, R]` bool.
        clip_eps_high: the largest weight less 1, > 0. The paper does not tell its own; TRL recommends weights of at
            most 5, after Khatri et al. 2025 (arXiv:2510.13786).

    Returns:
        (loss `[B, R]`, `[B, R]` bool: the weight is truncated).

    Raises:
        InputError: `clip_eps_high` is 0, the default of the clipped surrogates.

    Source: MiniMax 2025 (MiniMax-M1), arXiv:2506.13585, equations 4 and 5.
    """
    check("clip_eps_high", clip_eps_high, clip_eps_high > 0, "a number above 0: the largest weight of cispo, less 1")
    log_ratio = _log_ratio(logprobs, old_logprobs, mask, advantages)
    highest = math.log1p(clip_eps_high)
    weight = jax.lax.stop_gradient(jnp.exp(jnp.minimum(log_ratio, highest)))
    return jnp.where(mask, -weight * advantages * jnp.where(mask, logprobs, 0.0), 0.0), log_ratio > highest


def unclipped_surrogate(logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array) -> Loss:
    """The surrogate that is not clipped: loss = -A exp(logprobs - old_logprobs).

    At ratio one its gradient is REINFORCE's.

    Args:
        logprobs: `[B, R]` nats, under the parameters that learn.
        old_logprobs: `[B, R]` nats, under the parameters that acted.
        advantages: `[B, R]`.
        mask: `[B, R]` bool.

    Returns:
        (loss `[B, R]`, False `[B, R]`).

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 6.
    """
    ratio = jnp.exp(_log_ratio(logprobs, old_logprobs, mask, advantages))
    return jnp.where(mask, -advantages * ratio, 0.0), jnp.zeros_like(mask)


def ratio_metrics(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array, weights: jax.Array) -> Metrics:
    """How far the policy that learns has moved from the one that acted.

    With r = exp(logprobs - old_logprobs), approx_kl = mean(r - 1 - log r) and approx_kl_k1 = mean(-log r), both
    estimates of KL(old || new).

    Args:
        logprobs: `[B, R]` nats, under the parameters that learn.
        old_logprobs: `[B, R]` nats, under the parameters that acted.
        mask: `[B, R]` bool.
        weights: `[B, R]`, of each token in the means: `aggregation_weights(mask, "token")`, or the rows of those of a
            larger batch, whose parts then sum to its mean.

    Returns:
        `approx_kl` and `approx_kl_k1` in nats a token, `ratio_mean`, `ratio_max`, `ratio_min`, and `ratio_dev`, the
        largest |r - 1|; each `[]`. Without any token they are 0, and `ratio_min` is the largest float32.

    Source: Schulman 2020, "Approximating KL Divergence", joschu.net/blog/kl-approx.html.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask, weights)
    ratio, drift = jnp.exp(log_ratio), jnp.expm1(log_ratio)
    largest = jnp.finfo(jnp.float32).max
    return {
        # expm1 keeps the digits that `ratio - 1 - log_ratio` would cancel near ratio 1.
        "approx_kl": jnp.sum(weights * (drift - log_ratio), where=mask),
        "approx_kl_k1": -jnp.sum(weights * log_ratio, where=mask),
        "ratio_mean": jnp.sum(weights * ratio, where=mask),
        "ratio_max": jnp.max(ratio, where=mask, initial=0.0),
        "ratio_min": jnp.min(ratio, where=mask, initial=largest),
        "ratio_dev": jnp.max(jnp.abs(drift), where=mask, initial=0.0),
    }


def importance_weights(
    old_logprobs: jax.Array, behaviour_logprobs: jax.Array, mask: jax.Array, how: str, cap: float | jax.Array
) -> jax.Array:
    """Weights of tokens that another policy sampled than the one that the surrogate calls old: an older one, or the
    same in other arithmetic.

    w = exp(old_logprobs - behaviour_logprobs);  truncate: min(w, cap);  mask: [1 / cap <= w <= cap]

    Args:
        old_logprobs: `[B, R]` nats, under the parameters with which the surrogate's ratio is one.
        behaviour_logprobs: `[B, R]` nats, under what sampled the tokens.
        mask: `[B, R]` bool.
        how: "truncate" or "mask".
        cap: at least 1.

    Returns:
        Weights of the per-token losses, `[B, R]`, 0 where masked.

    Raises:
        ValueError: an unknown `how`.

    Source: truncate: Ionides 2008, "Truncated Importance Sampling"; Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training" (TIS). mask: the tokens that Ling Team 2025 (IcePop, arXiv:2510.18855)
    drops; the others have weight 1 here, and w there and in TRL.
    """
    log_weight = _log_ratio(old_logprobs, behaviour_logprobs, mask)
    highest = jnp.log(cap)
    if how == "truncate":
        weights = jnp.exp(jnp.minimum(log_weight, highest))
    elif how == "mask":
        weights = (jnp.abs(log_weight) <= highest).astype(jnp.float32)
    else:
        raise ValueError(f"importance: got {how!r}, expected truncate or mask")
    return jnp.where(mask, weights, 0.0)


def _log_ratio(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array, *others: jax.Array) -> jax.Array:
    """Log of the ratio; 0 where masked, before exp, so that neither it nor its gradient overflows there.

    `others` only have to have the same shape.
    """
    chex.assert_equal_shape([logprobs, old_logprobs, mask, *others])
    return jnp.where(mask, logprobs - old_logprobs, 0.0)


def _clipped(
    log_ratio: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip_eps: float | jax.Array,
    clip_eps_high: float | jax.Array,
    dual_clip: float | jax.Array,
) -> Loss:
    """The maximum and minimum of `clip_surrogate`, as one clip whose side the advantage chooses.

    Before exp and not after: a ratio that overflows is clipped with a gradient of 0, and not of 0 x inf.
    """
    high = jnp.log1p(jnp.where(clip_eps_high > 0, clip_eps_high, clip_eps))
    low = jnp.log(jnp.maximum(1.0 - clip_eps, 0.0))
    highest = jnp.where(dual_clip > 0, jnp.log(jnp.where(dual_clip > 0, dual_clip, 1.0)), jnp.inf)
    negative = advantages < 0
    near = jnp.clip(log_ratio, jnp.where(negative, low, -jnp.inf), jnp.where(negative, highest, high))
    loss = jnp.where(mask, -advantages * jnp.exp(near), 0.0)
    return loss, mask & (near != log_ratio) & (advantages != 0)
