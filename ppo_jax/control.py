"""PPO for control tasks, with the core of `ppo.py`: gae, losses, whitening and the passes over minibatches are those.

One iteration, read from top to bottom:

    N environments --act, T steps--> trajectory                                       (acting)
    trajectory, critic --gae, truncation bootstrapped--> advantages, returns          (targets)
    T x N steps --epochs x minibatches of control_loss and Adam--> new parameters     (update.descend)

`make_training` makes one function of a whole run, evaluations included: under `jax.jit` one program, under `jax.vmap`
many agents in one program, which may differ in their seeds and in the settings of `SWEEPABLE`. `make_host_steps` has
the same pieces for an environment on the host.

Source: Schulman et al. 2017 (arXiv:1707.06347); Huang et al. 2022, "The 37 Implementation Details of PPO"; Pardo et al.
2018 (arXiv:1712.00378) on time limits; Lu et al. 2022 (PureJaxRL) for a run as one vmapped program.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.stages import Wrapped

from ppo_jax.advantages import gae
from ppo_jax.config import ControlConfig
from ppo_jax.envs import Box, Discrete, Environment
from ppo_jax.guard import first_broken
from ppo_jax.losses import aggregation_weights
from ppo_jax.models.control import (
    Architecture,
    action_logprobs,
    choose,
    draw_noise,
    init_networks,
    pack,
    policy_output,
    value,
)
from ppo_jax.numerics import explained_variance, masked_mean, masked_std, masked_whiten
from ppo_jax.optim import make_optimizer, make_schedule
from ppo_jax.types import Metrics, Params
from ppo_jax.update import Minibatch, broken_flags, descend, gathered, policy_terms, value_terms

SWEEPABLE = ("lr", "gamma", "gae_lambda", "clip_eps", "ent_coef", "vf_coef", "max_grad_norm")
"""Settings in which the agents of one program may differ."""


class ControlMethod(NamedTuple):
    """The settings with their names resolved to functions, whose own settings are bound."""

    config: ControlConfig
    surrogate: Callable[..., tuple[jax.Array, jax.Array]]  # see ppo_jax/losses/policy.py
    value_error: Callable[..., tuple[jax.Array, jax.Array]]  # see ppo_jax/losses/value.py


Bind = Callable[[ControlConfig], ControlMethod]


class Trajectory(NamedTuple):
    """What T steps of N environments leave behind."""

    observations: jax.Array  # [T, N, D]
    actions: jax.Array  # [T, N] int32 or [T, N, A] float32
    logprobs: jax.Array  # [T, N], of acting
    rewards: jax.Array  # [T, N]
    terminated: jax.Array  # [T, N] bool
    truncated: jax.Array  # [T, N] bool
    reached: jax.Array  # [T, N, D]: observed after the action, before any reset


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps with their learning targets, `[n, ...]`: to a gradient step what an `Experience` is of language."""

    observations: jax.Array
    actions: jax.Array
    logprobs: jax.Array
    values: jax.Array
    advantages: jax.Array
    returns: jax.Array
    importance: jax.Array | None = None  # what acts is what learns


class Worlds(NamedTuple):
    """N environments between two iterations."""

    states: Any  # of the environments
    observations: jax.Array  # [N, D]
    returns: jax.Array  # [N]: of the episodes so far
    lengths: jax.Array  # [N]


def architecture(env: Any, config: ControlConfig) -> Architecture:
    """The networks for an environment: anything with its `observation_size` and `actions`."""
    discrete = isinstance(env.actions, Discrete)
    size = env.actions.num_actions if discrete else env.actions.size
    return Architecture(env.observation_size, size, discrete, config.trunk, config.width, config.depth)


def to_environment(actions: jax.Array, space: Discrete | Box) -> jax.Array:
    """What an environment is given: continuous actions of +-1 are the ends of its range, and none is beyond them."""
    if isinstance(space, Discrete):
        return actions
    low, high = (
        jnp.asarray(x, jnp.float32).reshape((1,) * (actions.ndim - 1) + (-1,)) for x in (space.low, space.high)
    )
    return jnp.clip((low + high) / 2 + actions * (high - low) / 2, low, high)


def make_tx(config: ControlConfig, num_iterations: int) -> optax.GradientTransformation:
    """The optimizer of a run."""
    each = config.updates_per_iteration
    warmup, total = config.warmup_iterations * each, num_iterations * each
    schedule = make_schedule(config.lr, config.lr_schedule, warmup, total)
    betas = (config.adam_b1, config.adam_b2, config.adam_eps)
    return make_optimizer(schedule, *betas, config.weight_decay, config.max_grad_norm, eps_form=config.adam_eps_form)


def init_optimizer(tx: optax.GradientTransformation, params: Params) -> optax.OptState:
    """The optimizer's state before the first step. It sees the parameters as `pack` has them."""
    return tx.init(pack(params)[0])


def new_worlds(env: Environment, key: jax.Array, num_envs: int) -> Worlds:
    """N episodes at their beginning."""
    states, observations = jax.vmap(env.reset)(jax.random.split(key, num_envs))
    return Worlds(states, observations, jnp.zeros(num_envs), jnp.zeros(num_envs))


def act(
    env: Environment, net: Architecture, params: Params, worlds: Worlds, key: jax.Array, num_steps: int
) -> tuple[Worlds, Trajectory, Metrics]:
    """T steps of the policy in each environment; one that ends begins anew.

    Returns:
        (the environments afterwards, trajectory, of the episodes that ended: their number and the sums of their returns
        and lengths).
    """
    num_envs = len(worlds.returns)
    noise_key, reset_key = jax.random.split(key)
    # Random numbers for all steps at once: generating them one step at a time takes longer than the steps.
    noise = draw_noise(noise_key, net, (num_steps, num_envs))
    fresh = jax.vmap(jax.vmap(env.reset))(jax.random.split(reset_key, (num_steps, num_envs)))

    def step(worlds: Worlds, given: tuple) -> tuple[Worlds, tuple]:
        noise, (fresh_states, fresh_observations) = given
        actions, logprobs = choose(params, net, worlds.observations, noise)
        after = jax.vmap(env.step)(worlds.states, to_environment(actions, env.actions))
        done = after.terminated | after.truncated
        returns, lengths = worlds.returns + after.reward, worlds.lengths + 1

        def begun(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(done.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        states, observations = jax.tree.map(begun, (fresh_states, fresh_observations), (after.state, after.observation))
        seen = (worlds.observations, actions, logprobs, after.reward, after.terminated, after.truncated)
        ended = {"count": done, "return": jnp.where(done, returns, 0.0), "length": jnp.where(done, lengths, 0.0)}
        worlds = Worlds(states, observations, jnp.where(done, 0.0, returns), jnp.where(done, 0.0, lengths))
        return worlds, (Trajectory(*seen, after.observation), ended)

    worlds, (trajectory, ended) = jax.lax.scan(step, worlds, (noise, fresh))
    return worlds, trajectory, {name: jnp.sum(x.astype(jnp.float32)) for name, x in ended.items()}


def make_targets(net: Architecture, params: Params, trajectory: Trajectory, config: ControlConfig) -> Steps:
    """Advantages and returns of a trajectory, its steps in one row.

    An episode ends with a discount of 0. What a time limit cut off is worth what the critic says of the state that was
    reached, and is added to the last reward; after a termination there is nothing.
    """
    values, after = (value(params, net, x) for x in (trajectory.observations, trajectory.reached))
    cut = trajectory.truncated & ~trajectory.terminated
    rewards = trajectory.rewards + jnp.where(cut, config.gamma * after, 0.0)
    discounts = jnp.where(trajectory.terminated | trajectory.truncated, 0.0, config.gamma)
    bootstrapped = jnp.concatenate([values, after[-1:]])
    advantages, returns = jax.vmap(gae, in_axes=(1, 1, 1, None), out_axes=1)(
        rewards, discounts, bootstrapped, config.gae_lambda
    )
    if config.whiten_advantages == "batch":
        advantages = masked_whiten(advantages, jnp.ones_like(cut), shift_mean=config.whiten_shift)
    rows = (trajectory.observations, trajectory.actions, trajectory.logprobs, values, advantages, returns)
    return Steps(*(x.reshape(-1, *x.shape[2:]) for x in rows))


def control_loss(params: Params, net: Architecture, steps: Steps, method: ControlMethod) -> tuple[jax.Array, Metrics]:
    """The loss of PPO on steps of control; (loss `[]`, `policy/*`, `value/*` and `broken/*` metrics)."""
    mask = jnp.ones_like(steps.logprobs, bool)
    if method.config.whiten_advantages == "minibatch":
        whitened = masked_whiten(steps.advantages, mask, shift_mean=method.config.whiten_shift)
        steps = dataclasses.replace(steps, advantages=whitened)
    weights = aggregation_weights(mask, "token")
    batch = Minibatch(steps, weights, weights, None, None)
    output = policy_output(params, net, steps.observations)
    logprobs, entropy = action_logprobs(params, net, output, steps.actions)
    policy_loss, metrics = policy_terms(logprobs, entropy, batch, mask, method)
    values = value(params, net, steps.observations)
    value_loss, value_metrics = value_terms(values, batch, mask, method)
    loss = policy_loss + value_loss
    return loss, metrics | value_metrics | broken_flags(logprobs, values, loss, mask)


def learn(
    net: Architecture,
    tx: optax.GradientTransformation,
    method: ControlMethod,
    params: Params,
    opt_state: optax.OptState,
    trajectory: Trajectory,
    key: jax.Array,
) -> tuple[Params, optax.OptState, Metrics]:
    """From a trajectory to new parameters; (parameters, the optimizer's state, metrics)."""
    steps = make_targets(net, params, trajectory, method.config)
    every = jnp.ones_like(steps.values, bool)
    packed, unpack = pack(params)

    def loss(packed: Params, steps: Steps) -> tuple[jax.Array, Metrics]:
        return control_loss(unpack(packed), net, steps, method)

    def gradient(packed: Params, steps: Steps, texts: None) -> tuple[Params, Metrics]:
        return jax.grad(loss, has_aux=True)(packed, steps)

    packed, opt_state, broken, metrics = descend(gradient, tx, packed, opt_state, steps, None, key, method.config)
    return (
        unpack(packed),
        opt_state,
        metrics
        | {
            "value/mean": masked_mean(steps.values, every),
            "value/explained_var": explained_variance(steps.values, steps.returns, every),
            "advantage/std": masked_std(steps.advantages, every),
            "guard/first_broken": first_broken(broken),
        },
    )


def evaluate(
    env: Environment, net: Architecture, params: Params, key: jax.Array, episodes: int, greedy: bool
) -> jax.Array:
    """Undiscounted returns `[episodes]` of whole episodes; `greedy`: of the likeliest actions."""
    reset_key, noise_key = jax.random.split(key)
    states, observations = jax.vmap(env.reset)(jax.random.split(reset_key, episodes))

    def going(carry: tuple) -> jax.Array:
        return jnp.any(carry[2])

    def step(carry: tuple) -> tuple:
        states, observations, alive, returns, t = carry
        noise = jnp.zeros((episodes, net.action_size))
        if not greedy:
            noise = draw_noise(jax.random.fold_in(noise_key, t), net, (episodes,))
        actions, _ = choose(params, net, observations, noise)
        after = jax.vmap(env.step)(states, to_environment(actions, env.actions))
        returns += jnp.where(alive, after.reward, 0.0)
        return after.state, after.observation, alive & ~(after.terminated | after.truncated), returns, t + 1

    start = (states, observations, jnp.ones(episodes, bool), jnp.zeros(episodes), jnp.int32(0))
    return jax.lax.while_loop(going, step, start)[3]


class Plan(NamedTuple):
    """How long a run is and how often it looks up; `num_iterations` is a multiple of `eval_every`."""

    num_iterations: int
    eval_every: int  # iterations between evaluations; one more before the first
    eval_episodes: int
    eval_greedy: bool


def make_training(env: Environment, config: ControlConfig, bind: Bind, plan: Plan) -> Callable:
    """A whole run as one function, to be compiled, and vmapped over its arguments for many agents.

    Args:
        env: the task.
        config: the settings.
        bind: resolves the names in the settings.
        plan: iterations and evaluations.

    Returns:
        `train(key, values) -> (parameters at each evaluation, metrics)`, with E = num_iterations / eval_every and a
        leading axis of 1 + E in both: before the first iteration and after each `eval_every` of them. `values` are
        settings of `SWEEPABLE` by name, `[]` each, in the place of those in `config`. Metrics of training are means
        over the iterations since the last evaluation, NaN in the first row; `episode/*` of the episodes that ended in
        them, NaN where none did.
    """
    net = architecture(env, config)

    def train(key: jax.Array, values: Mapping[str, jax.Array]) -> tuple[Params, Metrics]:
        method = bind(_with(config, values))
        tx = make_tx(method.config, plan.num_iterations)
        init_key, world_key, eval_key, key = jax.random.split(key, 4)
        params = init_networks(init_key, net)

        def iterate(carry: tuple, i: jax.Array) -> tuple[tuple, tuple[Metrics, Metrics]]:
            params, opt_state, worlds = carry
            act_key, learn_key = jax.random.split(jax.random.fold_in(key, i))
            worlds, trajectory, ended = act(env, net, params, worlds, act_key, config.num_steps)
            params, opt_state, metrics = learn(net, tx, method, params, opt_state, trajectory, learn_key)
            return (params, opt_state, worlds), (metrics, ended)

        def look(params: Params, number: jax.Array | int) -> Metrics:
            at = jax.random.fold_in(eval_key, number)
            returns = evaluate(env, net, params, at, plan.eval_episodes, plan.eval_greedy)
            return {"eval/return_mean": jnp.mean(returns), "eval/return_std": jnp.std(returns)}

        def stage(carry: tuple, number: jax.Array) -> tuple[tuple, tuple[Params, Metrics]]:
            carry, (history, ended) = jax.lax.scan(
                iterate, carry, number * plan.eval_every + jnp.arange(plan.eval_every)
            )
            return carry, (carry[0], summarize(history, ended) | look(carry[0], number + 1))

        start = (params, init_optimizer(tx, params), new_worlds(env, world_key, config.num_envs))
        first = look(params, 0)
        _, (snapshots, history) = jax.lax.scan(stage, start, jnp.arange(plan.num_iterations // plan.eval_every))
        snapshots = jax.tree.map(lambda x, later: jnp.concatenate([x[None], later]), params, snapshots)
        return snapshots, {
            name: jnp.concatenate([first.get(name, jnp.array(jnp.nan))[None], x]) for name, x in history.items()
        }

    return train


def summarize(history: Metrics, ended: Metrics) -> Metrics:
    """Metrics `[i]` of iterations as one number each, and the means over the episodes that ended in them."""
    every = jnp.ones(len(ended["count"]), bool)
    metrics = {name: gathered(name, x, every) for name, x in history.items()}
    metrics["guard/skipped"] = jnp.sum(history["guard/skipped"])
    metrics["guard/first_broken"] = jnp.max(history["guard/first_broken"])
    count = jnp.sum(ended["count"])
    means = {name: jnp.where(count > 0, jnp.sum(ended[name]) / count, jnp.nan) for name in ("return", "length")}
    return metrics | {"episode/count": count} | {f"episode/{name}_mean": x for name, x in means.items()}


class HostSteps(NamedTuple):
    """The compiled pieces for environments that step on the host."""

    init: Wrapped  # key -> (parameters, the optimizer's state)
    act: Wrapped  # (parameters, observations [N, D], key) -> (actions, what the environment is given, logprobs)
    best: Wrapped  # (parameters, observations [N, D]) -> what the environment is given
    learn: Wrapped  # (parameters, the optimizer's state, trajectory, key) -> (parameters, state, metrics)


def make_host_steps(env: Any, config: ControlConfig, bind: Bind, num_iterations: int) -> HostSteps:
    """The pieces of `make_training` as programs of their own, with the environment in between.

    Args:
        env: anything with `observation_size` and `actions`.
        config: the settings.
        bind: resolves the names in the settings.
        num_iterations: of the run, for the schedule of the learning rate.
    """
    net, method, tx = architecture(env, config), bind(config), make_tx(config, num_iterations)

    def init(key: jax.Array) -> tuple[Params, optax.OptState]:
        params = init_networks(key, net)
        return params, init_optimizer(tx, params)

    def sample(params: Params, observations: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        actions, logprobs = choose(params, net, observations, draw_noise(key, net, observations.shape[:1]))
        return actions, to_environment(actions, env.actions), logprobs

    def best(params: Params, observations: jax.Array) -> jax.Array:
        nothing = jnp.zeros((len(observations), net.action_size))
        return to_environment(choose(params, net, observations, nothing)[0], env.actions)

    return HostSteps(jax.jit(init), jax.jit(sample), jax.jit(best), jax.jit(partial(learn, net, tx, method)))


def _with(config: ControlConfig, values: Mapping[str, jax.Array]) -> ControlConfig:
    """Settings with others in their place that the program learns only when it runs: nothing can be checked of them."""
    changed = copy.copy(config)
    for name, x in values.items():
        assert name in SWEEPABLE, name
        object.__setattr__(changed, name, x)
    return changed
