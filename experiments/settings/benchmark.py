"""Settings of benchmarks."""

import dataclasses
import re

from experiments.settings.machinery import check_at_least
from ppo_jax.config import option
from ppo_jax.errors import InputError, check

WORKS = ("decode", "update", "iteration", "memory", "compile", "control")


@dataclasses.dataclass(frozen=True)
class BenchmarkExperiment:
    """Settings of `experiments/benchmark.py`."""

    work: str = option("control", "what is measured: " + ", ".join(WORKS))
    rounds: int = option(5, "measurements of each side of a row, in turn")
    only: str = option("", "regular expression that the rows to be measured contain; empty: all rows")

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check("work", self.work, self.work in WORKS, "one of " + ", ".join(WORKS))
        check_at_least(self, 1, "rounds")
        try:
            re.compile(self.only)
        except re.error as error:
            raise InputError(f"only: got {self.only!r}, expected a regular expression: {error}") from error
