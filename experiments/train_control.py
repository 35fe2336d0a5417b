"""PPO on a control task: the whole run, of one agent or of many, is one compiled program.

    python experiments/train_control.py --config=experiments/configs/cartpole.py --workdir=runs/cartpole

With --config.num_seeds=64 that many agents learn side by side; --config.sweep="lr=1e-3,3e-4 gamma=0.98,0.99" has each
combination learn. --config.env=gym:NAME takes an environment of Gymnasium, which steps on the host.

The workdir gets config.json, metrics.jsonl (a row for each evaluation and setting), curves.png, results.json and
agents.safetensors, and of the tasks that have them maps.png, choices.png and pole.gif. A run of seconds has no
checkpoints: one that was interrupted starts again, one that is finished is only shown.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled
from safetensors.numpy import save as safetensors_bytes

from experiments import cli
from experiments.control_pictures import draw
from experiments.host_control import train_on_host
from experiments.methods import bind_control
from experiments.settings import ControlExperiment
from ppo_jax.control import Plan, make_training
from ppo_jax.envs import ENVIRONMENTS
from ppo_jax.metrics import atomic_write, write_jsonl
from ppo_jax.plots import Learning, plot_learning
from ppo_jax.runs import RunError, open_run, write_json
from ppo_jax.types import Params


class Outcome(NamedTuple):
    """What training leaves, with a leading axis of agents: seeds within settings."""

    snapshots: Params  # [agents, 1 + E, ...]: at each evaluation
    history: dict[str, np.ndarray]  # [agents, 1 + E]
    compile_s: float | None
    run_s: float
    solved_at: float | None


def plan_of(settings: ControlExperiment) -> Plan:
    """Iterations and evaluations."""
    return Plan(settings.num_iterations, settings.eval_every, settings.eval_episodes, settings.eval_greedy)


def compiled(train: Callable, *given: Any) -> Compiled:
    """A training as a program for arguments of these shapes."""
    # On a CPU these are thousands of operations of a microsecond. What LLVM's higher levels make of them is no faster,
    # and takes two thirds longer to compile.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(train, compiler_options=options).lower(*given).compile()


def train_in_one_program(settings: ControlExperiment) -> Outcome:
    """All agents, in one program."""
    env = ENVIRONMENTS[settings.env]
    train = make_training(env, settings.ppo, bind_control, plan_of(settings))
    seeds = [settings.seed + i for _ in settings.settings() for i in range(settings.num_seeds)]
    rows = [values for values in settings.settings().values() for _ in range(settings.num_seeds)]
    values = {name: jnp.array([row[name] for row in rows], jnp.float32) for name in rows[0]}
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    began = time.perf_counter()
    if len(seeds) == 1:  # one alone is faster without an axis of agents
        given = (keys[0], jax.tree.map(lambda x: x[0], values))
        program = compiled(train, *given)
    else:
        given = (keys, values)
        program = compiled(jax.vmap(train), *given)
    ready = time.perf_counter()
    snapshots, history = jax.device_get(program(*given))
    ended = time.perf_counter()
    if len(seeds) == 1:
        snapshots, history = jax.tree.map(lambda x: x[None], (snapshots, history))
    return Outcome(snapshots, history, ready - began, ended - ready, env.solved_at)


def rows_of(settings: ControlExperiment, history: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: means over the seeds of a setting, and of several seeds each one's return."""
    rows, each = [], settings.num_seeds
    for number, name in enumerate(settings.settings()):
        own = {key: x[number * each : (number + 1) * each] for key, x in history.items()}
        for at in range(own["eval/return_mean"].shape[1]):
            iteration = at * settings.eval_every
            row: dict[str, Any] = {"iteration": iteration, "env_steps": iteration * settings.ppo.steps_per_iteration}
            row |= {"setting": name} if name else {}
            row |= {key: mean_of_known(x[:, at]) for key, x in own.items()}
            returns = own["eval/return_mean"][:, at]
            if each > 1:
                row |= {"eval/return_se": float(np.std(returns, ddof=1) / math.sqrt(each)), "eval/returns": returns}
            rows.append(row)
    return rows


def mean_of_known(x: np.ndarray) -> float:
    """Mean of the numbers that are not NaN; NaN if none is."""
    known = x[~np.isnan(x)]
    return float(known.mean()) if len(known) else math.nan


def learnings(settings: ControlExperiment, history: dict[str, np.ndarray]) -> list[Learning]:
    """The learning curve of each setting."""
    returns, each = history["eval/return_mean"], settings.num_seeds
    steps = np.arange(returns.shape[1]) * settings.eval_every * settings.ppo.steps_per_iteration
    names = settings.settings()
    return [Learning(name, steps, returns[i * each : (i + 1) * each]) for i, name in enumerate(names)]


def results_of(settings: ControlExperiment, outcome: Outcome) -> dict[str, Any]:
    """The contents of results.json."""
    agents, total = len(outcome.history["eval/return_mean"]), settings.num_iterations
    steps = total * settings.ppo.steps_per_iteration
    results: dict[str, Any] = {"env": settings.env, "env_steps": steps, "agents": agents}
    results |= {"compile_s": outcome.compile_s, "run_s": outcome.run_s, "steps_per_s": agents * steps / outcome.run_s}
    results["settings"] = []
    for curve in learnings(settings, outcome.history):
        final = np.asarray(curve.returns)[:, -1]
        own: dict[str, Any] = {"setting": curve.name, "return_mean": float(final.mean()), "returns": final.tolist()}
        if outcome.solved_at is not None:
            own["solved_after_steps"] = [solved_after(curve.env_steps, x, outcome.solved_at) for x in curve.returns]
        results["settings"].append(own)
    return results


def solved_after(env_steps: Any, returns: Any, level: float) -> int | None:
    """Steps until the first evaluation at this mean return; None: never."""
    reached = np.flatnonzero(np.asarray(returns) >= level)
    return int(env_steps[reached[0]]) if len(reached) else None


def final_agents(snapshots: Params) -> dict[str, np.ndarray]:
    """The parameters after the last iteration, `[agents, ...]`, by names such as actor_0.kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(snapshots)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {name: np.ascontiguousarray(x[:, -1]) for name, (_, x) in zip(names, leaves, strict=True)}


def refuse_broken(history: dict[str, np.ndarray]) -> None:
    """Ends a run whose gradients were not finite; its metrics are written.

    Raises:
        RunError: gradient steps were left out.
    """
    skipped = np.nansum(history["guard/skipped"], axis=1)
    if skipped.any():
        agent = int(np.argmax(skipped > 0))
        raise RunError(
            f"agent {agent}: got {int(skipped[agent])} gradient steps that were not finite, expected none: lower "
            "config.ppo.lr; metrics.jsonl shows where"
        )


def show(results: dict[str, Any], workdir: Path) -> None:
    """Prints the results."""
    for own in results["settings"]:
        name = f"{own['setting']}: " if own["setting"] else ""
        returns = np.array(own["returns"])
        spread = f" (of {len(returns)} agents: {returns.min():.1f} to {returns.max():.1f})" if len(returns) > 1 else ""
        print(f"{name}mean return after {results['env_steps']:,} steps: {own['return_mean']:.1f}{spread}")
        if "solved_after_steps" in own:
            times = [f"{x:,}" if x is not None else "-" for x in own["solved_after_steps"]]
            print(f"  steps until it was solved: {', '.join(times)}")
    compiled = f"; compiled in {results['compile_s']:.1f} s" if results["compile_s"] is not None else ""
    print(f"{results['steps_per_s']:,.0f} steps a second, {results['run_s']:.2f} s{compiled}; {workdir / 'curves.png'}")


def main(settings: ControlExperiment, workdir: Path) -> None:
    """Runs the experiment."""
    open_run(workdir, dataclasses.asdict(settings))
    if (workdir / "results.json").exists():
        return show(json.loads((workdir / "results.json").read_text()), workdir)
    if settings.on_host:
        outcome = Outcome(*train_on_host(settings, plan_of(settings)))
    else:
        outcome = train_in_one_program(settings)
    write_jsonl(workdir / "metrics.jsonl", rows_of(settings, outcome.history))
    refuse_broken(outcome.history)
    curves = learnings(settings, outcome.history)
    plot_learning(curves, workdir / "curves.png", title=f"{settings.env}: {workdir.name}", solved_at=outcome.solved_at)
    atomic_write(workdir / "agents.safetensors", safetensors_bytes(final_agents(outcome.snapshots)))
    draw(settings, jax.tree.map(lambda x: x[0], outcome.snapshots), workdir)
    results = results_of(settings, outcome)
    write_json(workdir / "results.json", results)
    show(results, workdir)


def dry_run(settings: ControlExperiment) -> None:
    """Compiles a run and prints what it costs."""
    raise RunError("--dry_run: a control task has none: it compiles in seconds and needs a few MB")


if __name__ == "__main__":
    cli.launch(ControlExperiment, main, dry_run)
