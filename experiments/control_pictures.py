"""What an agent has learned, in pictures: of the tasks that have some."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.settings import ControlExperiment
from ppo_jax.control import architecture, to_environment
from ppo_jax.envs import ENVIRONMENTS, Environment
from ppo_jax.models.control import Architecture, choose, policy_output, value
from ppo_jax.plots import animate_pole, plot_choices, plot_maps
from ppo_jax.types import Params

POINTS, SIDE = 1500, 81  # points of a scatter, and of a side of a map
POLE_STEPS = 500


def draw(settings: ControlExperiment, snapshots: Params, workdir: Path) -> None:
    """The pictures of one agent.

    Args:
        settings: of the run.
        snapshots: parameters at each evaluation, `[1 + E, ...]`.
        workdir: where they go.
    """
    if settings.on_host:
        return
    env, title = ENVIRONMENTS[settings.env], f"{settings.env}: {workdir.name}"
    net = architecture(env, settings.ppo)
    final = jax.tree.map(lambda x: x[-1], snapshots)
    x, y, labels, observations = map_of(settings.env)
    draw_maps(net, final, (x, y, labels, observations), workdir / "maps.png", title)
    if settings.env == "quadrants":
        draw_choices(settings, net, snapshots, workdir / "choices.png", title)
    if settings.env == "CartPole-v1":
        animate_pole(pole_states(env, net, final, settings.seed), workdir / "pole.gif")


def map_of(name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, str], np.ndarray]:
    """Two dimensions of a task: (x, y, their labels, observations `[y, x, D]`), everything else at rest."""
    if name == "Pendulum-v1":
        x, y = np.linspace(-np.pi, np.pi, SIDE), np.linspace(-8, 8, SIDE)
        angle, speed = np.meshgrid(x, y)
        return x, y, ("angle, rad", "angular velocity, rad/s"), np.stack([np.cos(angle), np.sin(angle), speed], -1)
    if name == "quadrants":
        x = y = np.linspace(-1, 1, SIDE)
        return x, y, ("x", "y"), np.stack(np.meshgrid(x, y), -1)
    x, y = np.linspace(-0.2, 0.2, SIDE), np.linspace(-2, 2, SIDE)
    angle, speed = np.meshgrid(x, y)
    rest = np.zeros_like(angle)
    return x, y, ("angle of the pole, rad", "angular velocity, rad/s"), np.stack([rest, rest, angle, speed], -1)


def draw_maps(net: Architecture, params: Params, where: tuple, out_png: Path, title: str) -> None:
    """What the critic expects, and what the policy does."""
    x, y, labels, observations = where
    values, output = both(net, params, observations)
    if net.discrete:
        policy = ("probability of action 1", probability_of_one(output), (0.0, 1.0))
    else:
        policy = ("mean action, of its range", np.clip(output[..., 0], -1, 1), (-1.0, 1.0))
    plot_maps(x, y, [("value, discounted return", values, None), policy], out_png, labels=labels, title=title)


def draw_choices(settings: ControlExperiment, net: Architecture, snapshots: Params, out_png: Path, title: str) -> None:
    """The probability of action 1 before, during and after training."""
    stages = settings.num_iterations // settings.eval_every
    points = np.random.default_rng(settings.seed).uniform(-1, 1, (POINTS, 2)).astype(np.float32)
    each, panels = settings.eval_every * settings.ppo.steps_per_iteration, []
    for at in sorted({0, max(1, stages // 4), stages}):
        output = both(net, jax.tree.map(lambda x, at=at: x[at], snapshots), points)[1]
        panels.append((f"after {at * each:,} steps", points, probability_of_one(output)))
    plot_choices(panels, out_png, title=title)


def both(net: Architecture, params: Params, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and the policy's output."""

    def look(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return value(params, net, x), policy_output(params, net, x)

    return jax.device_get(jax.jit(look)(params, jnp.asarray(observations, jnp.float32)))


def probability_of_one(logits: np.ndarray) -> np.ndarray:
    """Of the second of the actions."""
    return np.asarray(jax.nn.softmax(logits, axis=-1))[..., 1]


def pole_states(env: Environment, net: Architecture, params: Params, seed: int) -> np.ndarray:
    """The states `[T, 4]` of one episode under the likeliest actions."""

    def step(carry: tuple, _: None) -> tuple[tuple, tuple]:
        state, observation = carry
        actions = choose(params, net, observation[None], jnp.zeros((1, net.action_size)))[0]
        after = env.step(state, to_environment(actions, env.actions)[0])
        return (after.state, after.observation), (observation, after.terminated | after.truncated)

    def episode(key: jax.Array) -> tuple:
        return jax.lax.scan(step, env.reset(key), None, length=POLE_STEPS)[1]

    observations, done = jax.device_get(jax.jit(episode)(jax.random.key(seed)))
    last = int(np.argmax(done)) if done.any() else POLE_STEPS - 1
    return observations[: last + 1]
