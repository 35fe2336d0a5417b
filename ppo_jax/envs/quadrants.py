"""Quadrants: say of each point of a square whether its coordinates have the same sign.

The smallest task that is worth a network. No line separates the two answers, a guess is right half of the time, an
action changes nothing but its reward, and an episode is short.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.envs.environment import Discrete, Environment, Transition

NUM_POINTS = 32


class QuadrantsState(NamedTuple):
    """The point to judge, and what all points of the episode follow from.

    A key as bits, not as a typed key: those a caller cannot choose between (`jnp.where`, at the end of an episode)
    without that `jax_debug_key_reuse` takes it for a second use.
    """

    key_data: jax.Array  # [2] uint32
    point: jax.Array  # [2] float32
    steps: jax.Array  # [] int32: taken so far


def _draw(key_data: jax.Array, steps: jax.Array) -> QuadrantsState:
    """The state after so many steps, its point `[2]` uniform in [-1, 1)^2."""
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data, impl="threefry2x32"), steps)
    return QuadrantsState(key_data, jax.random.uniform(key, (2,), jnp.float32, -1.0, 1.0), steps)


def reset(key: jax.Array) -> tuple[QuadrantsState, jax.Array]:
    """The first point.

    Args:
        key: for all points of the episode.

    Returns:
        The state, and the observation `[2]` float32: the point, uniform in [-1, 1)^2.

    Source: none; a toy of this project, the exclusive or of two signs.
    """
    state = _draw(jax.random.bits(key, (2,), jnp.uint32), jnp.int32(0))
    return state, state.point


def step(state: QuadrantsState, action: jax.Array) -> Transition:
    """A judgement of the point, and the next point.

        reward = 1 if action = [x y > 0], else 0

    Args:
        state: of an episode that goes on.
        action: `[]` int32; 1 is right in the first and the third quadrant, 0 elsewhere, axes included.

    Returns:
        The transition; terminated at the 32nd step, after which there is nothing to come, and never truncated.

    Source: none; a toy of this project, the exclusive or of two signs.
    """
    x, y = state.point
    right = (action == 1) == (x * y > 0)
    after = _draw(state.key_data, state.steps + 1)
    return Transition(
        after,
        after.point,
        reward=right.astype(jnp.float32),
        terminated=after.steps >= NUM_POINTS,
        truncated=jnp.bool_(False),
    )


QUADRANTS = Environment("quadrants", 2, Discrete(2), reset, step, solved_at=30.0)
