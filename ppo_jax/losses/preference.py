"""Losses of what people prefer: of a judge's scores, and of the policy itself."""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.numerics import masked_mean
from ppo_jax.types import Metrics


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


def dpo_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    *,
    beta: float | jax.Array,
    label_smoothing: float | jax.Array = 0.0,
) -> tuple[jax.Array, Metrics]:
    """Direct preference optimisation: Bradley-Terry on the reward that the policy itself implies.

    With r = beta (log p - log p_ref) and d = r_chosen - r_rejected:
    loss = -mean((1 - smoothing) log sigmoid(d) + smoothing log sigmoid(-d))

    Args:
        chosen: `[B]` nats, of the whole preferred response (a sum over its tokens) under the policy.
        rejected: the same of the other response.
        ref_chosen: `[B]` nats, the same under the reference.
        ref_rejected: the same of the other response.
        beta: price of a nat of divergence from the reference, > 0.
        label_smoothing: probability that a label is wrong, in [0, 1/2): conservative DPO.

    Returns:
        (loss `[]` in nats a pair, metrics): `accuracy`, the fraction of pairs in which the chosen response has the
        larger implied reward (equal ones count half); `margin`, the mean of d; `chosen_reward` and `rejected_reward`.

    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; label_smoothing: Mitchell 2023, "A Note on DPO with
    Noisy Preferences", equation 3.
    """
    rewards = _implied_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    difference = rewards[0] - rewards[1]
    right, wrong = jax.nn.log_sigmoid(difference), jax.nn.log_sigmoid(-difference)
    return -jnp.mean((1.0 - label_smoothing) * right + label_smoothing * wrong), _pair_metrics(*rewards)


def ipo_loss(
    chosen: jax.Array, rejected: jax.Array, ref_chosen: jax.Array, ref_rejected: jax.Array, *, beta: float | jax.Array
) -> tuple[jax.Array, Metrics]:
    """Identity preference optimisation: drives the log ratios of a pair 1 / (2 beta) apart, and no further.

    With h = (log p - log p_ref)(chosen) - (log p - log p_ref)(rejected):  loss = mean((h - 1 / (2 beta))^2)

    The paper's h is of whole responses: sums over tokens. TRL takes means over tokens, which the authors told it they
    had done; the gap, and so beta, is then by token. Give this function the one or the other.

    Args:
        chosen: `[B]` nats, of the preferred response under the policy.
        rejected: the same of the other response.
        ref_chosen: `[B]` nats, the same under the reference.
        ref_rejected: the same of the other response.
        beta: the paper's tau, > 0.

    Returns:
        (loss `[]` in squared nats, metrics): as `dpo_loss`, with the rewards beta (log p - log p_ref).

    Source: Azar et al. 2023, arXiv:2310.12036, equation 17.
    """
    rewards = _implied_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    gap = (chosen - ref_chosen) - (rejected - ref_rejected)
    return jnp.mean(jnp.square(gap - 0.5 / beta)), _pair_metrics(*rewards)


def kto_loss(
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    desirable: jax.Array,
    kl: jax.Array,
    *,
    beta: float | jax.Array,
    desirable_weight: float | jax.Array = 1.0,
    undesirable_weight: float | jax.Array = 1.0,
) -> tuple[jax.Array, Metrics]:
    """Kahneman-Tversky optimisation: responses that are good or bad by themselves, without a partner.

    With r = beta (log p - log p_ref) and z = beta kl:
    loss = mean(w), where w = desirable_weight (1 - sigmoid(r - z)) of a desirable response and
    undesirable_weight (1 - sigmoid(z - r)) of another

    Args:
        logprobs: `[B]` nats, of the whole response (a sum over its tokens) under the policy.
        ref_logprobs: `[B]` nats, the same under the reference.
        desirable: `[B]` bool.
        kl: `[]` nats, >= 0, the point from which gains and losses count: an estimate of KL(policy || reference), from
            responses to other prompts. Nothing is learned through it.
        beta: how quickly a gain satisfies, > 0.
        desirable_weight: of a gain.
        undesirable_weight: of a loss.

    Returns:
        (loss `[]`, metrics): `accuracy`, the fraction of responses on their side of z (at z: half); `margin`,
        chosen_reward - rejected_reward; `chosen_reward` and `rejected_reward`, the mean r of the desirable and of the
        other responses, 0 if there are none.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs, desirable])
    chex.assert_rank(kl, 0)
    reward = beta * (logprobs - ref_logprobs)
    gain = jnp.where(desirable, 1.0, -1.0) * (reward - beta * jax.lax.stop_gradient(kl))
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    chosen, rejected = masked_mean(reward, desirable), masked_mean(reward, ~desirable)
    return jnp.mean(weight * jax.nn.sigmoid(-gain)), {
        "accuracy": _fraction_positive(gain),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }


def _implied_rewards(
    chosen: jax.Array, rejected: jax.Array, ref_chosen: jax.Array, ref_rejected: jax.Array, beta: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rewards beta (log p - log p_ref) of both responses; `[B]` each."""
    chex.assert_rank(chosen, 1)
    chex.assert_equal_shape([chosen, rejected, ref_chosen, ref_rejected])
    return beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)


def _pair_metrics(chosen: jax.Array, rejected: jax.Array) -> Metrics:
    """Of the implied rewards, `[B]` each."""
    return {
        "accuracy": _fraction_positive(chosen - rejected),
        "margin": jnp.mean(chosen - rejected),
        "chosen_reward": jnp.mean(chosen),
        "rejected_reward": jnp.mean(rejected),
    }


def _fraction_positive(x: jax.Array) -> jax.Array:
    """How many are above 0; zeros count half."""
    return jnp.mean((x > 0) + 0.5 * (x == 0))
