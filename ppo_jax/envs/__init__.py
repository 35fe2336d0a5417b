"""Control tasks in pure JAX, so that a whole run is one program; `ENVIRONMENTS` holds them by name."""

from ppo_jax.envs.cartpole import CARTPOLE, CartPoleState
from ppo_jax.envs.environment import Box, Discrete, Environment, Transition
from ppo_jax.envs.pendulum import PENDULUM, PendulumState
from ppo_jax.envs.quadrants import QUADRANTS, QuadrantsState

ENVIRONMENTS: dict[str, Environment] = {task.name: task for task in (CARTPOLE, PENDULUM, QUADRANTS)}

__all__ = [
    "CARTPOLE",
    "ENVIRONMENTS",
    "PENDULUM",
    "QUADRANTS",
    "Box",
    "CartPoleState",
    "Discrete",
    "Environment",
    "PendulumState",
    "QuadrantsState",
    "Transition",
]
