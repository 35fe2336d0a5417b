"""CartPole beside Stable-Baselines3 and rejax: steps a second, seconds until it is solved, and a first run."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.sides import Comparison, Side
from experiments.configs import cartpole
from experiments.settings import ControlExperiment, from_config_dict
from experiments.train_control import compiled, solved_after
from ppo_jax.config import ControlConfig
from ppo_jax.envs import ENVIRONMENTS

ENV = "CartPole-v1"
TARGET = ENVIRONMENTS[ENV].solved_at
SETTINGS: dict[str, dict[str, Any]] = {
    # Stable-Baselines3's own defaults.
    "sb3": {
        "num_envs": 1, "num_steps": 2048, "num_epochs": 10, "num_minibatches": 32, "gamma": 0.99, "gae_lambda": 0.95,
        "lr": 3e-4, "lr_schedule": "constant",
    },
    # rl-zoo3's for this task.
    "zoo": {},
    # Those of experiments/configs/cartpole.py.
    "cartpole": dataclasses.asdict(from_config_dict(ControlExperiment, cartpole.get_config()).ppo),
    # rejax's own for this task.
    "rejax": {
        "num_envs": 64, "num_steps": 64, "num_epochs": 8, "num_minibatches": 16, "gamma": 0.99, "gae_lambda": 0.95,
        "ent_coef": 0.01, "lr_schedule": "constant",
    },
}  # fmt: skip
STEPS = 65_536  # of a measurement of ours and of rejax's
SB3_STEPS = 4_096  # of one of Stable-Baselines3's
MANY = 64
FIRST_RUN = 10_240  # steps: the example of many a first article
PEERS_STEPS = 33_280  # of rejax, to solve it
EVALUATIONS, EPISODES = 10, 100
SB3 = ("stable-baselines3", "gymnasium", "torch")
REJAX = ("rejax", "gymnax")


def comparisons() -> list[Comparison]:
    """The rows."""
    rate = {"work": "control: training", "unit": "steps/s", "lower_is_better": False}
    solved = {"work": f"control: {TARGET:.0f}, compiling included", "unit": "s", "lower_is_better": True}
    rows = []
    for settings, peer, agents in (
        ("sb3", "sb3", 1), ("sb3", "sb3", MANY), ("zoo", "sb3", 1), ("zoo", "sb3", MANY), ("zoo", "rejax", 1),
        ("rejax", "rejax", 1),
    ):  # fmt: skip
        config = ControlConfig(**SETTINGS[settings])
        ours = ours_side(settings, STEPS // (16 if agents > 1 else 1), agents)
        other = sb3_side(settings, SB3_STEPS) if peer == "sb3" else rejax_side(settings, STEPS)
        who = f"{ENV}, settings of {settings}" + (f", {agents} agents beside one" if agents > 1 else "")
        shape = f"{who}; {other.packages[0]}"
        rows.append(Comparison(**rate, shape=shape, batch=config.num_envs, ours=ours, peer=other, flops=flops(config)))
    first = "control: first run, after compiling"
    rows.append(
        Comparison(
            first, f"{ENV}, {FIRST_RUN:,} steps, settings of cartpole beside sb3; {SB3[0]}", 4, "s", True,
            ours_side("cartpole", FIRST_RUN, 1, seconds=True), sb3_side("sb3", FIRST_RUN, seconds=True),
        )
    )  # fmt: skip
    for seed in range(3):
        ours = ours_side("cartpole", FIRST_RUN, 1, seconds=True, seed=seed, warm=False)
        for other in (
            sb3_side("zoo", 100_000, seconds=True, seed=seed, stop=True),
            rejax_side("zoo", PEERS_STEPS, seconds=True, seed=seed, warm=False),
        ):
            shape = f"{ENV}, settings of cartpole beside zoo, seed {seed}; {other.packages[0]}"
            rows.append(Comparison(**solved, shape=shape, batch=4, ours=ours, peer=other))
    return rows


def flops(config: ControlConfig) -> float:
    """Floating-point operations of a step: 2 a weight to act, 6 a weight in every pass; policy and critic."""
    observed, width, actions = 4, config.width, 2
    weights = 2 * (observed * width + (config.depth - 1) * width**2) + width * (actions + 1)
    return weights * (2 + 6 * config.num_epochs)


def ours_side(settings: str, steps: int, agents: int, seconds: bool = False, seed: int = 0, warm: bool = True) -> Side:
    """Our side; `warm`: what is compiled is compiled before."""
    given = {"settings": settings, "steps": steps, "agents": agents, "seconds": seconds, "seed": seed, "warm": warm}
    return Side("experiments.benchmarks.control:ours", given, warm_up=warm)


def sb3_side(settings: str, steps: int, seconds: bool = False, seed: int = 0, stop: bool = False) -> Side:
    """Stable-Baselines3's; `stop`: at the first evaluation that is solved."""
    given = {"settings": settings, "steps": steps, "seconds": seconds, "seed": seed, "stop": stop}
    return Side("experiments.benchmarks.control:sb3", given, SB3, warm_up=False)


def rejax_side(settings: str, steps: int, seconds: bool = False, seed: int = 0, warm: bool = True) -> Side:
    """rejax's; `warm` as of ours."""
    given = {"settings": settings, "steps": steps, "seconds": seconds, "seed": seed, "warm": warm}
    return Side("experiments.benchmarks.control:rejax", given, REJAX, warm_up=warm)


def ours(settings: str, steps: int, agents: int, seconds: bool, seed: int, warm: bool) -> Callable[[], dict]:
    """A whole run as one program. Measured in seconds it evaluates as it goes, as `train_control.py` does."""
    import jax

    from experiments.methods import bind_control
    from ppo_jax.control import Plan, make_training

    config = ControlConfig(**SETTINGS[settings])
    number = steps // config.steps_per_iteration
    plan = Plan(number, number // EVALUATIONS, EPISODES, True) if seconds else Plan(number, number, 1, True)
    keys = jax.random.split(jax.random.key(seed), agents) if agents > 1 else jax.random.key(seed)

    def make() -> Callable:
        train = make_training(ENVIRONMENTS[ENV], config, bind_control, plan)

        def of_seed(key: jax.Array) -> dict:
            return train(key, {})[1]

        return compiled(jax.vmap(of_seed) if agents > 1 else of_seed, keys)

    program = make() if warm else None

    def measure() -> dict:
        began = time.perf_counter()
        run = program or make()
        compile_s = time.perf_counter() - began
        history = jax.device_get(run(keys))
        took = time.perf_counter() - began
        returns = history["eval/return_mean"]
        value = took if seconds else agents * number * config.steps_per_iteration / took
        return {"value": value} | ({"compile_s": compile_s} | _learned(returns, steps) if seconds else {})

    return measure


def rejax(settings: str, steps: int, seconds: bool, seed: int, warm: bool) -> Callable[[], dict]:
    """The same of rejax, without evaluations where steps are counted."""
    import jax
    from rejax import PPO

    config = ControlConfig(**SETTINGS[settings])
    every = steps // EVALUATIONS // config.steps_per_iteration * config.steps_per_iteration if seconds else steps
    algorithm = PPO.create(
        env=ENV, num_envs=config.num_envs, num_steps=config.num_steps, num_minibatches=config.num_minibatches,
        num_epochs=config.num_epochs, learning_rate=config.lr, gamma=config.gamma, gae_lambda=config.gae_lambda,
        ent_coef=config.ent_coef, max_grad_norm=config.max_grad_norm, total_timesteps=steps, eval_freq=every,
        skip_initial_evaluation=True,
        agent_kwargs={"hidden_layer_sizes": (config.width,) * config.depth, "activation": "tanh"},
    )  # fmt: skip
    if not seconds:
        algorithm = algorithm.replace(eval_callback=lambda algorithm, state, key: ())
    key = jax.random.key(seed)

    def compiled() -> Callable:
        return jax.jit(lambda key: algorithm.train(key)).lower(key).compile()

    program = compiled() if warm else None

    def measure() -> dict:
        began = time.perf_counter()
        run = program or compiled()
        compile_s = time.perf_counter() - began
        _, evaluation = jax.block_until_ready(run(key))
        took = time.perf_counter() - began
        if not seconds:
            return {"value": steps / took}
        return {"value": took, "compile_s": compile_s} | _learned(evaluation[1].mean(axis=1), steps)

    return measure


def sb3(settings: str, steps: int, seconds: bool, seed: int, stop: bool) -> Callable[[], dict]:
    """Stable-Baselines3 on one thread, which is its fastest. The time of its evaluations is left out."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)
    config = ControlConfig(**SETTINGS[settings])
    linear = config.lr_schedule == "linear"
    falling = {"learning_rate": lambda left: config.lr * left, "clip_range": lambda left: config.clip_eps * left}
    size = config.steps_per_iteration // config.num_minibatches

    class Stop(BaseCallback):
        """Ends the run at the first rollout after which it is solved."""

        paused, solved = 0.0, None

        def _on_step(self) -> bool:
            return self.solved is None

        def _on_rollout_end(self) -> None:
            began = time.perf_counter()
            mean, _ = evaluate_policy(self.model, evaluated, n_eval_episodes=20, warn=False)
            self.solved = self.num_timesteps if mean >= TARGET else None
            self.paused += time.perf_counter() - began

    evaluated = make_vec_env(ENV, n_envs=8, seed=seed + 1000)

    def measure() -> dict:
        model = PPO(
            "MlpPolicy", make_vec_env(ENV, n_envs=config.num_envs, seed=seed), seed=seed, device="cpu",
            n_steps=config.num_steps, batch_size=size, n_epochs=config.num_epochs, gamma=config.gamma,
            gae_lambda=config.gae_lambda, ent_coef=config.ent_coef,
            **(falling if linear else {"learning_rate": config.lr, "clip_range": config.clip_eps}),
        )  # fmt: skip
        callback = Stop() if stop else None
        began = time.perf_counter()
        model.learn(steps, callback=callback)
        took = time.perf_counter() - began - (callback.paused if callback else 0.0)
        if not seconds:
            return {"value": model.num_timesteps / took}
        mean, _ = evaluate_policy(model, evaluated, n_eval_episodes=EPISODES, warn=False)
        return {"value": took, "return": float(mean), "solved_after_steps": callback.solved if callback else None}

    return measure


def _learned(returns: Any, steps: int) -> dict:
    """What evaluations at equal distances show: the last one, and the steps until the first that is solved."""
    first = EVALUATIONS + 1 - len(returns)  # 0: there is one before the first step
    at = [number * steps // EVALUATIONS for number in range(first, EVALUATIONS + 1)]
    return {"return": float(returns[-1]), "solved_after_steps": solved_after(at, returns, TARGET)}
