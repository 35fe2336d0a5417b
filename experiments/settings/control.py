"""Settings of control experiments."""

import dataclasses
import itertools
import math
from typing import Any

from experiments.methods import resolve_control
from experiments.settings.machinery import check_at_least
from ppo_jax.config import ControlConfig, option
from ppo_jax.control import SWEEPABLE
from ppo_jax.envs import ENVIRONMENTS
from ppo_jax.errors import InputError, check

HOST = "gym:"


@dataclasses.dataclass(frozen=True)
class ControlExperiment:
    """Settings of `experiments/train_control.py`."""

    env: str = option(
        "CartPole-v1",
        "the task: " + ", ".join(ENVIRONMENTS) + "; or gym:NAME, any environment of Gymnasium with numbers in a row as "
        "observations, on the host",
    )
    seed: int = option(0, "of the first agent; the others have seed + 1, seed + 2, ...")
    num_seeds: int = option(1, "agents of each setting, all in one program")
    sweep: str = option(
        "",
        "settings of which every combination is trained, all in one program: FIELD=VALUE,VALUE FIELD=VALUE,VALUE with "
        "fields of ppo: " + ", ".join(SWEEPABLE),
    )
    num_iterations: int = option(195, "iterations of ppo.num_envs x ppo.num_steps steps; a multiple of eval_every")
    eval_every: int = option(13, "iterations between evaluations; there is one before the first as well")
    eval_episodes: int = option(100, "episodes of an evaluation")
    eval_greedy: bool = option(True, "evaluations take the likeliest action, else they sample")
    ppo: ControlConfig = dataclasses.field(default_factory=ControlConfig)

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        known = self.env in ENVIRONMENTS or (self.env.startswith(HOST) and self.env != HOST)
        check("env", self.env, known, "one of " + ", ".join(ENVIRONMENTS) + ", or gym:NAME")
        check_at_least(self, 0, "seed")
        check_at_least(self, 1, "num_seeds num_iterations eval_every eval_episodes")
        total, every = self.num_iterations, self.eval_every
        check("num_iterations", total, total % every == 0, f"a multiple of eval_every ({every})")
        for values in self.settings().values():
            resolve_control(dataclasses.replace(self.ppo, **values))
        if self.on_host:
            check("num_seeds", self.num_seeds, self.num_seeds == 1, "1 with an environment on the host")
            check("sweep", self.sweep, not self.sweep, "nothing with an environment on the host")

    @property
    def on_host(self) -> bool:
        """Whether the environment steps on the host."""
        return self.env.startswith(HOST)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Every combination of `sweep`, by its name; "" without one.

        Raises:
            InputError: `sweep` cannot be read.
        """
        lists: dict[str, list[float]] = {}
        for part in self.sweep.split():
            field, _, values = part.partition("=")
            check("sweep", field, field in SWEEPABLE, "some of " + ", ".join(SWEEPABLE))
            check("sweep", field, field not in lists, "each field once")
            lists[field] = [_number(field, text) for text in values.split(",")]
            check(f"sweep: {field}", values, len(set(lists[field])) == len(lists[field]), "values that differ")
        combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
        return {" ".join(f"{field}={x:g}" for field, x in one.items()): one for one in combinations}


def _number(field: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise InputError(f"sweep: {field}: got {text!r}, expected numbers separated by commas") from error
    check(f"sweep: {field}", text, math.isfinite(value), "finite numbers")
    return value
