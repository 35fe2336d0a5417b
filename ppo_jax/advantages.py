"""Advantage estimators: `gae` over one trajectory of any kind, the others over a batch of responses.

Those of responses take `Targets` and give (advantages, returns), each `[B, R]` float32, 0 where masked, not whitened;
their keyword-only parameters are named like the fields of `PPOConfig` that they read. All but `gae_advantages` need no
critic, and their returns are what the baseline was subtracted from: R_i, the sum of response i's rewards, or
G_t = sum_{s >= t} gamma^(s - t) r_s, the reward to go. Rows of one prompt are adjacent.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ppo_jax.errors import check


class Targets(NamedTuple):
    """What the advantages of B responses are made of."""

    rewards: jax.Array  # [B, R] float32, 0 where masked: see `kl_shaped_rewards`
    mask: jax.Array  # [B, R] bool: True up to and with the last response token
    values: jax.Array  # [B, R] float32, 0 where masked: the critic's, of the state before each token; zeros without one
    greedy: jax.Array  # [B] float32: the score of the likeliest response to the same prompt
    baseline: jax.Array  # [] float32: running mean of R_i, see `running_baseline`


def gae(
    rewards: jax.Array, discounts: jax.Array, values: jax.Array, gae_lambda: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation.

    delta_t = r_t + discount_t v_{t+1} - v_t;  A_t = delta_t + discount_t lambda A_{t+1};  return_t = A_t + v_t

    A `discount_t` of 0 ends the episode after step t: nothing after it reaches back. So one function serves a response
    that ended, padding after it (reward, discount and value 0 give advantage 0), and control tasks that restart.

    Args:
        rewards: `[T]`, received for the action at step t.
        discounts: `[T]`, gamma where the episode goes on after step t, 0 where it ends there.
        values: `[T + 1]`, of the state before each action; the last one bootstraps a trajectory that was cut.
        gae_lambda: in [0, 1]: 0 is one-step TD, 1 is Monte Carlo.

    Returns:
        (advantages, returns), each `[T]`.

    Source: Schulman et al. 2016, arXiv:1506.02438, equations 11-16.
    """
    chex.assert_rank([rewards, discounts, values], 1)
    chex.assert_equal_shape([rewards, discounts, values[1:]])
    deltas = rewards + discounts * values[1:] - values[:-1]

    def step(advantage: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta, discount = at
        advantage = delta + discount * gae_lambda * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros_like(deltas[0]), (deltas, discounts), reverse=True)
    return advantages, advantages + values[:-1]


def gae_advantages(
    targets: Targets, *, gamma: float, gae_lambda: float, critic_lambda: float, lambda_length_scale: float
) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation of responses, with a lambda for the policy and one for the critic.

    policy:  A_t of `gae` with lambda = gae_lambda, or 1 - 1 / (lambda_length_scale length) in [0, 1]
    critic:  return_t = A'_t + v_t with A' of critic_lambda

    An episode ends at the last response token, also where a response was cut. With a lambda below 1 the score at the
    end of a response of length l reaches its first token with weight lambda^(l - 1); a lambda that grows with l keeps
    that from vanishing, and critic_lambda = 1 teaches the critic what was really earned.

    Args:
        targets: rewards, mask and values are read.
        gamma: discount per token, in [0, 1].
        gae_lambda: in [0, 1].
        critic_lambda: in [0, 1], or -1: gae_lambda.
        lambda_length_scale: the policy looks ahead over about this part of a response; 0: gae_lambda, for any length.

    Returns:
        (advantages, returns), each `[B, R]` float32, 0 where masked.

    Source: Schulman et al. 2016, arXiv:1506.02438; two lambdas: Yuan et al. 2025, VC-PPO, arXiv:2503.01491; the lambda
        of the length: Yue et al. 2025, VAPO, arXiv:2504.05118 (they: 0.05, and 1 for the critic).
    """
    lengths = jnp.sum(targets.mask, axis=1)
    policy = jnp.full(lengths.shape, gae_lambda, jnp.float32)
    if lambda_length_scale:
        policy = jnp.clip(1.0 - 1.0 / (lambda_length_scale * jnp.maximum(lengths, 1)), 0.0, 1.0)
    critic = jnp.full_like(policy, gae_lambda if critic_lambda == -1 else critic_lambda)
    values = jnp.pad(targets.values, ((0, 0), (0, 1)))  # nothing follows, so the last one is never read
    discounts = _discounts(targets.mask, gamma)
    both = jax.vmap(jax.vmap(gae), in_axes=(None, None, None, 0))
    advantages, returns = both(targets.rewards, discounts, values, jnp.stack([policy, critic]))
    return jnp.where(targets.mask, advantages[0], 0.0), jnp.where(targets.mask, returns[1], 0.0)


def rloo_advantages(targets: Targets, *, responses_per_prompt: int) -> tuple[jax.Array, jax.Array]:
    """REINFORCE with the mean of the prompt's other responses as baseline; the same for all tokens of a response.

    A_i = R_i - mean_{j != i} R_j = k / (k - 1) (R_i - mean_j R_j)

    Args:
        targets: rewards and mask are read.
        responses_per_prompt: k >= 2.

    Returns:
        (advantages, R_i), each `[B, R]` float32, 0 where masked.

    Raises:
        InputError: k below 2, or no divisor of B.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024,
        arXiv:2402.14740 (RLOO).
    """
    k = responses_per_prompt
    return _of_responses(targets, _centred(targets, k) * (k / (k - 1)))


def grpo_advantages(targets: Targets, *, responses_per_prompt: int) -> tuple[jax.Array, jax.Array]:
    """How many standard deviations a response is above the others to its prompt; the same for all tokens of it.

    A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4), std with k - 1

    A prompt whose responses all have the same reward has advantages of exactly 0. The paper puts the KL into the loss,
    not into the reward.

    Args:
        targets: rewards and mask are read.
        responses_per_prompt: k >= 2.

    Returns:
        (advantages, R_i), each `[B, R]` float32, 0 where masked.

    Raises:
        InputError: k below 2, or no divisor of B.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2. They write std, without saying k or k - 1, and no 1e-4;
        both are as in huggingface/trl, trl/trainer/grpo_trainer.py (volcengine/verl: k - 1 and 1e-6).
    """
    centred = _centred(targets, responses_per_prompt)
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / (responses_per_prompt - 1)
    return _of_responses(targets, centred / (jnp.sqrt(variance) + 1e-4))


def dr_grpo_advantages(targets: Targets, *, responses_per_prompt: int) -> tuple[jax.Array, jax.Array]:
    """GRPO done right: no division by the deviation, which makes much of prompts that are too easy or too hard.

    A_i = R_i - mean_j R_j

    Its other half is the loss: with a mean over the tokens of each response, long wrong answers cost less a token; the
    aggregation "constant" cures that.

    Args:
        targets: rewards and mask are read.
        responses_per_prompt: k >= 2.

    Returns:
        (advantages, R_i), each `[B, R]` float32, 0 where masked.

    Raises:
        InputError: k below 2, or no divisor of B.

    Source: Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    return _of_responses(targets, _centred(targets, responses_per_prompt))


def reinforce_pp_baseline_advantages(targets: Targets, *, responses_per_prompt: int) -> tuple[jax.Array, jax.Array]:
    """REINFORCE++ with a baseline: the mean of the prompt's responses; the caller whitens over the whole batch.

    A_i = R_i - mean_j R_j before whitening, which is what sets it apart from `dr_grpo_advantages`

    Args:
        targets: rewards and mask are read.
        responses_per_prompt: k >= 2.

    Returns:
        (advantages, R_i), each `[B, R]` float32, 0 where masked.

    Raises:
        InputError: k below 2, or no divisor of B.

    Source: Hu et al. 2025, arXiv:2501.03262, "REINFORCE++ w/ Baseline" (they put the KL, as k2, into the loss).
    """
    return _of_responses(targets, _centred(targets, responses_per_prompt))


def reinforce_pp_advantages(targets: Targets, *, gamma: float) -> tuple[jax.Array, jax.Array]:
    """REINFORCE++: the reward to go of each token; the caller whitens over the whole batch, which is its baseline.

    A_t = G_t

    Args:
        targets: rewards and mask are read.
        gamma: discount per token, in [0, 1] (they: 1).

    Returns:
        (advantages, G_t), each `[B, R]` float32, 0 where masked.

    Source: Hu et al. 2025, arXiv:2501.03262 (k1 in the reward, so that G_t holds the KL of this and later tokens).
    """
    to_go = _reward_to_go(targets, gamma)
    return to_go, to_go


def remax_advantages(targets: Targets, *, gamma: float) -> tuple[jax.Array, jax.Array]:
    """ReMax: the reward to go against the score of the likeliest response to the same prompt.

    A_t = G_t - greedy

    The baseline is not discounted: gamma^(tokens to come) depends on the actions that it is to be independent of.

    Args:
        targets: rewards, mask and greedy are read.
        gamma: discount per token, in [0, 1] (they: 1).

    Returns:
        (advantages, G_t), each `[B, R]` float32, 0 where masked.

    Source: Li et al. 2023, arXiv:2310.10505, algorithm 1.
    """
    chex.assert_shape(targets.greedy, targets.mask.shape[:1])
    to_go = _reward_to_go(targets, gamma)
    return jnp.where(targets.mask, to_go - targets.greedy[:, None], 0.0), to_go


def reinforce_advantages(targets: Targets, *, gamma: float) -> tuple[jax.Array, jax.Array]:
    """REINFORCE: the reward to go against a running mean of the rewards of earlier responses.

    A_t = G_t - baseline

    Args:
        targets: rewards, mask and baseline are read.
        gamma: discount per token, in [0, 1].

    Returns:
        (advantages, G_t), each `[B, R]` float32, 0 where masked.

    Source: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning";
        Ahmadian et al. 2024, arXiv:2402.14740 (the moving average as its baseline).
    """
    chex.assert_shape(targets.baseline, ())
    to_go = _reward_to_go(targets, gamma)
    return jnp.where(targets.mask, to_go - targets.baseline, 0.0), to_go


def running_baseline(baseline: jax.Array, returns: jax.Array, decay: float) -> jax.Array:
    """The running mean of the rewards of responses, after one more batch.

    baseline <- decay baseline + (1 - decay) mean(returns)

    It starts at 0, which costs variance in the first 1 / (1 - decay) batches and no bias: a batch is compared with a
    baseline made before it, and whatever number that is, its expected gradient is zero.

    Args:
        baseline: `[]`, before this batch.
        returns: `[B]`, R_i.
        decay: in [0, 1); 0 is the mean of this batch.

    Returns:
        The next baseline, `[]`.
    """
    return decay * baseline + (1.0 - decay) * jnp.mean(returns)


def _discounts(mask: jax.Array, gamma: float) -> jax.Array:
    """Gamma on each response token that another one follows, 0 elsewhere; `[B, R]`."""
    return jnp.where(jnp.pad(mask[:, 1:], ((0, 0), (0, 1))), gamma, 0.0)


def _reward_to_go(targets: Targets, gamma: float) -> jax.Array:
    """G_t, `[B, R]`: GAE without a critic, at lambda 1."""
    zeros = jnp.zeros_like(jnp.pad(targets.rewards, ((0, 0), (0, 1))))
    in_axes = (0, 0, 0, None)
    to_go, _ = jax.vmap(gae, in_axes=in_axes)(targets.rewards, _discounts(targets.mask, gamma), zeros, 1.0)
    return jnp.where(targets.mask, to_go, 0.0)


def _centred(targets: Targets, responses_per_prompt: int) -> jax.Array:
    """R_i - mean_j R_j over the responses to one prompt, `[B / k, k]`."""
    rows, k = len(targets.mask), responses_per_prompt
    check("responses_per_prompt", k, k >= 2, "2 or more, for responses to be compared with each other")
    check("responses_per_prompt", k, rows % k == 0, f"a divisor of the batch ({rows} responses)")
    groups = jnp.sum(targets.rewards, axis=1).reshape(-1, k)
    # Distances from one of them: rewards that are all the same differ by exactly 0, however their mean is rounded, and
    # a division by their deviation finds no noise to blow up.
    distances = groups - groups[:, :1]
    return distances - jnp.mean(distances, axis=1, keepdims=True)


def _of_responses(targets: Targets, advantages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An advantage for each response, in any shape of B numbers, and R_i: both for all of its tokens, `[B, R]`."""
    returns = jnp.sum(targets.rewards, axis=1, keepdims=True)
    return jnp.where(targets.mask, advantages.reshape(-1, 1), 0.0), jnp.where(targets.mask, returns, 0.0)
