"""Pendulum-v1: swing a pendulum up, with a motor too weak to lift it at once, and hold it there."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.envs.environment import Box, Environment, Transition

GRAVITY = 10.0  # m / s^2
MASS = 1.0  # kg
LENGTH = 1.0  # m
MAX_TORQUE = 2.0  # N m
MAX_SPEED = 8.0  # rad / s
TIME_STEP = 0.05  # s
MAX_STEPS = 200
START_SPEED = 1.0  # rad / s at most, in either direction


class PendulumState(NamedTuple):
    """The angle is not wrapped: it counts turns, as Gymnasium's does."""

    angle: jax.Array  # [] float32, rad; 0 upright
    speed: jax.Array  # [] float32, rad / s
    steps: jax.Array  # [] int32: taken so far


def _observe(angle: jax.Array, speed: jax.Array) -> jax.Array:
    """`[3]` float32: cosine and sine of the angle, and the speed."""
    return jnp.stack([jnp.cos(angle), jnp.sin(angle), speed])


def reset(key: jax.Array) -> tuple[PendulumState, jax.Array]:
    """Any angle, uniform in [-pi, pi), and a speed uniform in [-1, 1).

    Args:
        key: for the two numbers.

    Returns:
        The state, and the observation `[3]` float32: cosine and sine of the angle, and the speed.

    Source: Gymnasium 1.4, `gymnasium/envs/classic_control/pendulum.py`, PendulumEnv.reset.
    """
    angle, speed = jax.random.uniform(key, (2,), jnp.float32, -1.0, 1.0)
    angle, speed = math.pi * angle, START_SPEED * speed
    return PendulumState(angle, speed, jnp.int32(0)), _observe(angle, speed)


def step(state: PendulumState, action: jax.Array) -> Transition:
    """A torque u for 0.05 s, which costs as the state that it was applied in:

        reward = -(angle^2 + 0.1 speed^2 + 0.001 u^2),  angle in [-pi, pi)
        speed <- clip(speed + 0.05 (3 g sin(angle) / 2 l + 3 u / m l^2), ±8);  angle <- angle + 0.05 speed (the new one)

    Args:
        state: of an episode that goes on.
        action: `[1]` float32, the torque in N m; clipped to ±2.

    Returns:
        The transition; never terminated, truncated at the 200th step.

    Source: Gymnasium 1.4, PendulumEnv.step and TimeLimit, in float32 where Gymnasium computes in float64.
    """
    torque = jnp.clip(action[0], -MAX_TORQUE, MAX_TORQUE)
    off_upright = jnp.mod(state.angle + math.pi, 2 * math.pi) - math.pi
    cost = jnp.square(off_upright) + 0.1 * jnp.square(state.speed) + 0.001 * jnp.square(torque)

    # A rod that turns about its end: its moment of inertia is m l^2 / 3, and gravity pulls at its middle.
    fall = 1.5 * GRAVITY / LENGTH * jnp.sin(state.angle)
    drive = 3.0 / (MASS * LENGTH**2) * torque
    speed = jnp.clip(state.speed + TIME_STEP * (fall + drive), -MAX_SPEED, MAX_SPEED)
    angle = state.angle + TIME_STEP * speed
    steps = state.steps + 1
    return Transition(
        PendulumState(angle, speed, steps),
        _observe(angle, speed),
        reward=-cost,
        terminated=jnp.bool_(False),
        truncated=steps >= MAX_STEPS,
    )


# Gymnasium names no threshold. A return of 0 is out of reach: the way up costs more, the lower the pendulum starts.
PENDULUM = Environment("Pendulum-v1", 3, Box((-MAX_TORQUE,), (MAX_TORQUE,)), reset, step, solved_at=-200.0)
