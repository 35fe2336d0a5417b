"""Settings of a comparison: variants of one PPO experiment, over several seeds."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from experiments.settings.machinery import check_at_least
from experiments.settings.ppo import PPOExperiment
from ppo_jax.config import option
from ppo_jax.errors import InputError, check

TASKS = ("", "set_fraction")
TASK_FOLDER = "task"
GIVEN_BY_TASK = ("model", "prompts", "reward")
_TRUTH = {"true": True, "false": False}
_READERS: dict[type, Callable[[str], Any]] = {
    bool: lambda text: _TRUTH[text.lower()],
    int: int,
    float: float,
    str: str,
}


@dataclasses.dataclass(frozen=True)
class CompareExperiment:
    """Settings of `experiments/compare.py`."""

    variants: str = option(
        "",
        'what is compared, separated by ";", each as NAME: field=value field=value, over the fields of base '
        "(ppo.lr=1e-3); without fields it is base itself; empty: base alone",
    )
    num_seeds: int = option(3, "runs of each variant, with the seeds base.seed, base.seed + 1, ...")
    task: str = option(
        "",
        "set_fraction: the learning anchor, a new model and prompts for each seed, and as {task}/critic a critic whose "
        "head does not begin at zero; empty: model and prompts of base",
    )
    metric: str = option("objective/score", "what is compared, of metrics.jsonl; higher is better")
    thresholds: str = option("", "values of metric, separated by commas: after how many iterations they are reached")
    references: str = option("", "a JSON file of what others reached: in the table and, dashed, in the picture")
    base: PPOExperiment = dataclasses.field(default_factory=PPOExperiment)

    def __post_init__(self) -> None:
        """Refuses what cannot be, in any of the variants."""
        check("task", self.task, self.task in TASKS, "one of " + ", ".join(filter(None, TASKS)) + ", or nothing")
        check_at_least(self, 1, "num_seeds")
        check("metric", self.metric, bool(self.metric), "a name in metrics.jsonl")
        for name in GIVEN_BY_TASK if self.task else ():
            check(
                f"base.{name}",
                getattr(self.base, name),
                not getattr(self.base, name),
                f"nothing: {self.task} has its own",
            )
        self.levels()
        self.plan()

    def levels(self) -> tuple[float, ...]:
        """The thresholds, as numbers.

        Raises:
            InputError: one of them is no number.
        """
        levels = []
        for text in filter(None, (part.strip() for part in self.thresholds.split(","))):
            value = _read("thresholds", float, text)
            check("thresholds", text, math.isfinite(value), "finite numbers, separated by commas")
            levels.append(value)
        return tuple(levels)

    def plan(self) -> dict[str, PPOExperiment]:
        """The settings of each variant, by its name, with the seed of base.

        Raises:
            InputError: a variant cannot be read, or its settings cannot be.
        """
        parts = [part for part in self.variants.split(";") if part.strip()] or ["base"]
        plan: dict[str, PPOExperiment] = {}
        for part in parts:
            name, _, changes = (text.strip() for text in part.partition(":"))
            fits = re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) and name != TASK_FOLDER
            check(
                "variants",
                name,
                bool(fits),
                f'a name of letters, digits, "_", "." and "-" before ":", not {TASK_FOLDER}',
            )
            check("variants", name, name not in plan, "a name that no other variant has")
            plan[name] = self._variant(name, changes.split())
        return plan

    def _variant(self, name: str, changes: list[str]) -> PPOExperiment:
        where, kinds, values = f"variants: {name}", _kinds(self.base), {}
        decided = {"seed": "num_seeds", **(dict.fromkeys(GIVEN_BY_TASK, "task") if self.task else {})}
        for change in changes:
            field, equals, text = change.partition("=")
            check(where, change, bool(equals), "field=value")
            if field not in kinds:
                near = difflib.get_close_matches(field, kinds, n=1, cutoff=0.0)[0]
                raise InputError(f"{where}: no such field in base: {field!r}; did you mean {near}?")
            check(f"{where}: {field}", text, field not in decided, f"no value: {decided.get(field)} decides it")
            check(f"{where}: {field}", text, field not in values, "one value, not two")
            values[field] = _read(f"{where}: {field}", kinds[field], text)
        try:
            return _replaced(self.base, values)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _kinds(settings: Any, prefix: str = "") -> dict[str, type]:
    """The type of every field, nested ones by their dotted name."""
    kinds: dict[str, type] = {}
    for field in dataclasses.fields(settings):
        if field.default is dataclasses.MISSING:
            kinds |= _kinds(getattr(settings, field.name), f"{prefix}{field.name}.")
        else:
            kinds[prefix + field.name] = type(field.default)
    return kinds


def _read(what: str, kind: type, text: str) -> Any:
    try:
        return _READERS[kind](text)
    except (ValueError, KeyError) as error:
        raise InputError(f"{what}: got {text!r}, expected a value of type {kind.__name__}") from error


def _replaced(settings: Any, values: Mapping[str, Any]) -> Any:
    """Settings with other values, by dotted name; each group is checked once, with all of its changes."""
    own = {name: value for name, value in values.items() if "." not in name}
    for group in {name.partition(".")[0] for name in values if "." in name}:
        inner = {name.removeprefix(f"{group}."): x for name, x in values.items() if name.startswith(f"{group}.")}
        own[group] = _replaced(getattr(settings, group), inner)
    return dataclasses.replace(settings, **own)
