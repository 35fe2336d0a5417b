"""Variants of one PPO experiment against each other, over several seeds: a table and a picture of their curves.

    python experiments/compare.py --config=experiments/configs/anchor.py --workdir=runs/anchor

The workdir gets VARIANT/seed_N/ (each a run of train_ppo.py), results.json, results.md and curves.png. The runs go one
after the other; the same command again goes on where it stopped, and passes over what is done. A variant whose
settings have changed is run anew, and the old folder stays beside it.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import cli, train_ppo
from experiments.anchor import write_set_fraction
from experiments.settings import CompareExperiment, PPOExperiment
from experiments.settings.compare import TASK_FOLDER
from experiments.stages import Stages, identity
from ppo_jax.errors import InputError, check
from ppo_jax.metrics import atomic_write, read_jsonl
from ppo_jax.planning import count_parameters
from ppo_jax.plots import Course, plot_comparison
from ppo_jax.ppo import TrainStep
from ppo_jax.runs import write_json

TASKS: dict[str, Callable[[Path, int], dict[str, str]]] = {"set_fraction": write_set_fraction}
LAST = 3  # iterations whose mean is a run's final value


def compare(settings: CompareExperiment, workdir: Path) -> dict[str, Any]:
    """Runs what is not done yet, and writes the results.

    Returns:
        What stands in results.json: `variants`, each with the fields of `summary`, and `references`, as they were read.

    Raises:
        InputError: the workdir holds something else, a run failed, or its metrics do not have what is compared.
    """
    references = read_references(settings.references)
    workdir = workdir.resolve()
    stages, variants = Stages(workdir), {}
    for name, given in settings.plan().items():
        runs, programs = [], []
        for seed in range(given.seed, given.seed + settings.num_seeds):
            run = Run(settings.task, settings.metric, name, dataclasses.replace(given, seed=seed))
            runs.append(run.go(stages, programs))
        variants[name] = {"batch_size": given.ppo.batch_size} | summary(runs, settings.levels())
    results = {"metric": settings.metric, "variants": variants, "references": references}
    write_json(workdir / "results.json", results)
    draw(results, workdir / "curves.png")
    return results


class Run(NamedTuple):
    """One seed of one variant."""

    task: str
    metric: str
    variant: str
    given: PPOExperiment  # without what the task decides

    def go(self, stages: Stages, programs: list[TrainStep]) -> dict[str, Any]:
        """The seed, its curve (see `curve`), trained parameters, memory: worked out now, or remembered.

        Args:
            stages: of the workdir.
            programs: compiled, of this variant; empty: the first seed that needs them compiles them for the others.
        """
        given, after, seed = self.given, [], self.given.seed
        if self.task:
            after = [f"{TASK_FOLDER}/seed_{seed}"]
            made = stages.run(after[0], [self.task, seed], [], lambda folder: TASKS[self.task](folder, seed))
            given = with_task(given, made, stages.workdir / after[0])

        def work(folder: Path) -> dict[str, Any]:
            setup = train_ppo.prepare(given)
            if not programs:
                programs.append(train_ppo.with_compiled_step(setup).step)
            setup = setup._replace(step=programs[0])
            peak = max(cost["peak_mb"] for cost in train_ppo.costs(setup).values())
            parameters = count_parameters(setup.state.params)
            train_ppo.train(setup, folder)
            curve(folder, self.metric)
            return {"parameters": parameters, "peak_mb": peak if math.isfinite(peak) else None}

        name = f"{self.variant}/seed_{seed}"
        cost = stages.run(name, identity(self.given, train_ppo.MAY_CHANGE), after, work)
        return {"seed": seed, **curve(stages.workdir / name, self.metric), **cost}


def with_task(given: PPOExperiment, made: dict[str, Any], folder: Path) -> PPOExperiment:
    """The settings with the fields that a task has made, and with its folder where the critic names it."""
    return dataclasses.replace(given, critic=given.critic.replace("{task}", str(folder)), **made)


def curve(folder: Path, metric: str) -> dict[str, Any]:
    """What a run's metrics say: `iterations`, counted from 1, and `values` of the metric where it is finite, `kl` at
    the end, and the `seconds` of all iterations.

    Raises:
        InputError: no row has the metric.
    """
    rows = read_jsonl(folder / "metrics.jsonl")
    known = [row for row in rows if row.get(metric) is not None]
    told = ", ".join(sorted(rows[-1])) if rows else "none"
    check("config.metric", metric, bool(known), f"one of those in {folder / 'metrics.jsonl'}: {told}")
    kls = [row["objective/kl"] for row in rows if row["objective/kl"] is not None]
    return {
        "iterations": [row["iteration"] + 1 for row in known],
        "values": [row[metric] for row in known],
        "kl": float(np.mean(kls[-LAST:])),
        "seconds": sum(row["time/iteration_s"] for row in rows),
    }


def summary(runs: Sequence[Mapping[str, Any]], levels: Sequence[float]) -> dict[str, Any]:
    """What the runs of a variant came to.

    Args:
        runs: as `Run.go` gives them, one a seed.
        levels: values of the metric.

    Returns:
        Of each seed (lists): `final` (the mean of the last three values), `best` (the highest value), `reached` (by
        level: the first iteration, counted from 1, whose value is no lower; None: never), `kl`, `seconds`; `parameters`
        that are trained, `peak_mb` of the largest; and the `curve` over the iterations that every seed has:
        `iterations`, `mean` and `se` over the seeds (the standard error; None with one seed).
    """

    def first(run: Mapping[str, Any], level: float) -> int | None:
        return next((i for i, x in zip(run["iterations"], run["values"], strict=True) if x >= level), None)

    by_iteration = [dict(zip(run["iterations"], run["values"], strict=True)) for run in runs]
    common = sorted(set.intersection(*map(set, by_iteration)))
    spread = [mean_and_error([values[i] for values in by_iteration]) for i in common]
    peaks = [run["peak_mb"] for run in runs if run["peak_mb"] is not None]
    return {
        "seeds": [run["seed"] for run in runs],
        "final": [float(np.mean(run["values"][-LAST:])) for run in runs],
        "best": [max(run["values"]) for run in runs],
        "reached": {f"{level:g}": [first(run, level) for run in runs] for level in levels},
        "kl": [run["kl"] for run in runs],
        "seconds": [run["seconds"] for run in runs],
        "parameters": runs[0]["parameters"],
        "peak_mb": max(peaks, default=None),
        "curve": {"iterations": common, "mean": [mean for mean, _ in spread], "se": [error for _, error in spread]},
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error (n - 1); None for one value."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(np.mean(values)), error


def read_references(path: str) -> dict[str, Any]:
    """What others reached, by their names: `final` (end values, one a seed), and if they are known `best`, `kl`,
    `seconds` (lists), `reached` (lists by level), `parameters`, `peak_mb`, `episodes` and `values` (a curve), `source`.

    Raises:
        InputError: the file is none of this.
    """
    if not path:
        return {}
    try:
        references = json.loads(Path(path).expanduser().read_text())
        for reference in references.values():
            values = [*reference["final"], *reference.get("values", ()), *reference.get("episodes", ())]
            whole = all(isinstance(x, int | float) and math.isfinite(x) for x in values) and reference["final"]
            if not whole or len(reference.get("values", ())) != len(reference.get("episodes", ())):
                raise ValueError("numbers in final, and as many values as episodes")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        expected = "a JSON object of others, each with a list of numbers in final"
        raise InputError(
            f"config.references: got {path}, expected {expected}: {type(error).__name__}: {error}"
        ) from error
    return references


def draw(results: Mapping[str, Any], path: Path) -> None:
    """The mean curves of all variants with their standard errors, and the references."""
    courses, references, levels = [], [], {}
    for name, variant in results["variants"].items():
        line = variant["curve"]
        episodes = [i * variant["batch_size"] for i in line["iterations"]]
        courses.append(Course(name, episodes, line["mean"], line["se"]))
    for name, reference in results["references"].items():
        if "values" in reference:
            references.append(Course(name, reference["episodes"], reference["values"]))
        else:
            levels[name] = float(np.mean(reference["final"]))
    plot_comparison(courses, path, unit=results["metric"], references=references, levels=levels)


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    rows = results["variants"] | results["references"]
    levels = list(next(iter(results["variants"].values()))["reached"])
    names = [f"iterations to {level}" for level in levels]
    header = ["", "final score", "best", *names, "KL, nats", "seconds", "trained parameters", "memory, MiB"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, row in rows.items():
        reached = [_each(row.get("reached", {}).get(level)) for level in levels]
        cells = [_mean(row.get(key), form) for key, form in (("final", ".2f"), ("best", ".2f"))]
        cells += [*reached, _mean(row.get("kl"), ".1f"), _mean(row.get("seconds"), ".0f")]
        cells += [f"{row[key]:,.0f}" if row.get(key) is not None else "" for key in ("parameters", "peak_mb")]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    sizes = {len(variant["seeds"]) for variant in results["variants"].values()}
    notes = f"""{results["metric"]}, mean ± standard error over {sizes.pop()} seed(s). Final: the mean of the last
{LAST} iterations. Best: the highest of a single one. Iterations to a value: the first whose mean over its responses is
no lower, for each seed. KL to the reference, of a response, at the end. Seconds of all iterations. Memory: of the
largest program of an iteration, with its arguments."""
    return "\n".join(["", "# Comparison", "", *lines, "", notes, ""])


def _mean(values: Sequence[float] | None, form: str) -> str:
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _each(iterations: Sequence[int | None] | None) -> str:
    return ", ".join("never" if i is None else str(i) for i in iterations or ())


def dry_run(settings: CompareExperiment) -> None:
    """Compiles the programs of each variant and prints what they cost on each device."""
    with tempfile.TemporaryDirectory() as folder:
        made = TASKS[settings.task](Path(folder), settings.base.seed) if settings.task else {}
        for name, given in settings.plan().items():
            print(f"{name}:", flush=True)
            train_ppo.dry_run(with_task(given, made, Path(folder)))


def main(settings: CompareExperiment, workdir: Path) -> None:
    """Runs the comparison."""
    told = page(compare(settings, workdir))
    atomic_write(workdir / "results.md", told.encode())
    print(told)


if __name__ == "__main__":
    cli.launch(CompareExperiment, main, dry_run)
