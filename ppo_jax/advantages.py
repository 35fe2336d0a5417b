"""Advantage estimators over one trajectory; callers `jax.vmap` them over a batch."""

import chex
import jax
import jax.numpy as jnp


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
