"""CartPole-v1: push a cart to the left or to the right, so that the pole on it does not fall."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.envs.environment import Discrete, Environment, Transition

GRAVITY = 9.8  # m / s^2
CART_MASS = 1.0  # kg
POLE_MASS = 0.1
HALF_LENGTH = 0.5  # m: from the hinge to the pole's centre of mass
FORCE = 10.0  # N
TIME_STEP = 0.02  # s
MAX_POSITION = 2.4  # m, on either side
MAX_ANGLE = 12 * 2 * math.pi / 360  # rad: 12 degrees, on either side
MAX_STEPS = 500
START = 0.05  # each number of a first observation is this large at most


class CartPoleState(NamedTuple):
    """All that there is to know, which is also all that is seen: position, speed, angle, angular speed."""

    observation: jax.Array  # [4] float32: m, m/s, rad (0 upright), rad/s
    steps: jax.Array  # [] int32: taken so far


def _rates(observation: jax.Array, force: jax.Array) -> jax.Array:
    """What changes in a second, `[4]`, without friction: Newton for both bodies, solved for their accelerations."""
    _, speed, angle, spin = observation
    total_mass, pole_moment = CART_MASS + POLE_MASS, POLE_MASS * HALF_LENGTH
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    # What the cart's acceleration would be if the pole's angular acceleration were 0.
    push = (force + pole_moment * jnp.square(spin) * sin) / total_mass
    inertia = HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * jnp.square(cos) / total_mass)
    spin_rate = (GRAVITY * sin - cos * push) / inertia
    return jnp.stack([speed, push - pole_moment * spin_rate * cos / total_mass, spin, spin_rate])


def reset(key: jax.Array) -> tuple[CartPoleState, jax.Array]:
    """A cart and a pole that are almost at rest: four numbers, uniform in [-0.05, 0.05).

    Args:
        key: for the four numbers.

    Returns:
        The state, and the observation `[4]` float32: position, speed, angle, angular speed.

    Source: Gymnasium 1.4, `gymnasium/envs/classic_control/cartpole.py`, CartPoleEnv.reset.
    """
    observation = jax.random.uniform(key, (4,), jnp.float32, -START, START)
    return CartPoleState(observation, jnp.int32(0)), observation


def step(state: CartPoleState, action: jax.Array) -> Transition:
    """A push of 10 N for 0.02 s; a reward of 1, also for the push after which the pole is down.

        observation <- observation + 0.02 d observation / dt,  all four rates taken before the push (explicit Euler)

    Args:
        state: of an episode that goes on.
        action: `[]` int32, 1 to the right; 0 to the left.

    Returns:
        The transition. It is terminated where the cart is beyond ±2.4 m or the pole beyond ±12 degrees, truncated at
        the 500th step, and both where the pole falls at the 500th.

    Source: Florian 2007, "Correct equations for the dynamics of the cart-pole system", equations 23 and 24, which
        correct Barto, Sutton and Anderson 1983; Gymnasium 1.4, CartPoleEnv.step with its default integrator, reward
        and TimeLimit, in float32 where Gymnasium computes in float64.
    """
    force = jnp.where(action == 1, FORCE, -FORCE).astype(jnp.float32)
    observation = state.observation + TIME_STEP * _rates(state.observation, force)
    steps = state.steps + 1
    terminated = (jnp.abs(observation[0]) > MAX_POSITION) | (jnp.abs(observation[2]) > MAX_ANGLE)
    return Transition(
        CartPoleState(observation, steps), observation, jnp.float32(1.0), terminated, truncated=steps >= MAX_STEPS
    )


# Gymnasium registers the task with this threshold.
CARTPOLE = Environment("CartPole-v1", 4, Discrete(2), reset, step, solved_at=475.0)
