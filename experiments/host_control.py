"""Training in environments that step on the host: the pieces of the one program, with Gymnasium in between."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.methods import bind_control
from experiments.settings import ControlExperiment
from ppo_jax.control import HostSteps, Plan, Trajectory, make_host_steps, summarize
from ppo_jax.envs.host import HostEnvironments
from ppo_jax.types import Params


def train_on_host(settings: ControlExperiment, plan: Plan) -> tuple:
    """One agent; the fields of an `Outcome`."""
    name, config, seed = settings.env.partition(":")[2], settings.ppo, settings.seed
    envs = HostEnvironments(name, config.num_envs, seed)
    trials = HostEnvironments(name, min(plan.eval_episodes, 16), seed + 1)
    steps = make_host_steps(envs, config, bind_control, plan.num_iterations)
    init_key, key = jax.random.split(jax.random.key(seed))
    began = time.perf_counter()
    params, opt_state = steps.init(init_key)
    running = (np.zeros(config.num_envs, np.float32), np.zeros(config.num_envs, np.float32))
    snapshots, looks = [jax.device_get(params)], [evaluate(trials, steps, params, plan, seed)]
    for stage in range(plan.num_iterations // plan.eval_every):
        history, ended = [], []
        for i in range(stage * plan.eval_every, (stage + 1) * plan.eval_every):
            act_key, learn_key = jax.random.split(jax.random.fold_in(key, i))
            trajectory, told = act(envs, steps, params, act_key, config.num_steps, running)
            params, opt_state, metrics = steps.learn(params, opt_state, trajectory, learn_key)
            history.append(metrics)
            ended.append(told)
        stacked = (jax.tree.map(lambda *x: jnp.stack(x), *history), jax.tree.map(lambda *x: jnp.stack(x), *ended))
        looks.append(jax.device_get(summarize(*stacked)) | evaluate(trials, steps, params, plan, seed + stage + 1))
        snapshots.append(jax.device_get(params))
    run_s = time.perf_counter() - began
    envs.close()
    trials.close()
    history = {name: np.array([look.get(name, np.nan) for look in looks], np.float32)[None] for name in looks[-1]}
    return jax.tree.map(lambda *x: np.stack(x)[None], *snapshots), history, None, run_s, envs.solved_at


def act(
    envs: HostEnvironments, steps: HostSteps, params: Params, key: jax.Array, num_steps: int, running: tuple
) -> tuple[Trajectory, dict[str, np.ndarray]]:
    """T steps in each environment; `running` holds returns and lengths of the episodes so far, and is brought up to
    date.
    """
    returns, lengths = running
    seen, ended = [], {"count": 0.0, "return": 0.0, "length": 0.0}
    for t in range(num_steps):
        before = envs.observations
        actions, given, logprobs = steps.act(params, before, jax.random.fold_in(key, t))
        rewards, terminated, truncated, reached = envs.step(np.asarray(given))
        seen.append((before, actions, logprobs, rewards, terminated, truncated, reached))
        returns += rewards
        lengths += 1
        done = terminated | truncated
        for name, x in (("count", np.ones_like(returns)), ("return", returns), ("length", lengths)):
            ended[name] += float(x[done].sum())
        returns[done], lengths[done] = 0, 0
    return Trajectory(*(np.stack(x) for x in zip(*seen, strict=True))), {k: np.float32(x) for k, x in ended.items()}


def evaluate(envs: HostEnvironments, steps: HostSteps, params: Params, plan: Plan, seed: int) -> dict[str, float]:
    """Returns of whole episodes: the first `eval_episodes` that end, the same number in each environment."""
    envs.reset(seed)
    width = len(envs.observations)
    wanted = np.array([len(range(i, plan.eval_episodes, width)) for i in range(width)])
    returns, found, key = np.zeros(width), [], jax.random.key(seed)
    t = 0
    while (wanted > 0).any():
        if plan.eval_greedy:
            given = steps.best(params, envs.observations)
        else:
            given = steps.act(params, envs.observations, jax.random.fold_in(key, t))[1]
        rewards, terminated, truncated, _ = envs.step(np.asarray(given))
        returns, t = returns + rewards, t + 1
        done = terminated | truncated
        found += returns[done & (wanted > 0)].tolist()
        wanted -= done
        returns[done] = 0
    return {"eval/return_mean": float(np.mean(found)), "eval/return_std": float(np.std(found))}
