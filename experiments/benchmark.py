"""Our figures beside those of what people would use instead, as ratios: both sides of a row are measured in turn.

    python experiments/benchmark.py --config=experiments/configs/benchmark.py:control --workdir=runs/benchmark

Each side is a process of its own, which prepares (imports, compiles) once. With --config.only=rejax only the rows that
contain this regular expression are measured. The peers are an extra, to be installed after torch (pip install -e
'.[bench]'); a row whose peer is not there has our figure alone.

The workdir gets config.json and benchmark.jsonl, a row each; a row that is there is not measured again.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.benchmarks import control, decode, iteration, starting, update
from experiments.benchmarks.sides import Comparison, Limits, Side, SideError, compare, in_turn
from experiments.settings import BenchmarkExperiment
from ppo_jax.errors import InputError
from ppo_jax.metrics import read_jsonl, write_jsonl
from ppo_jax.runs import RunError, open_run

WORKS: dict[str, Callable[[], list[Comparison]]] = {
    "decode": decode.comparisons,
    "update": update.comparisons,
    "iteration": iteration.comparisons,
    "memory": iteration.memory_comparisons,
    "compile": starting.comparisons,
    "control": control.comparisons,
}
LIMITS = {dtype: Side("experiments.benchmarks.limits:matmul", {"dtype": dtype}) for dtype in ("float32", "bfloat16")}
LIMITS["bandwidth"] = Side("experiments.benchmarks.limits:bandwidth", {})


def chosen(settings: BenchmarkExperiment) -> list[Comparison]:
    """The rows to be measured.

    Raises:
        InputError: there is none.
    """
    rows = [row for row in WORKS[settings.work]() if re.search(settings.only, name_of(row._asdict()))]
    if not rows:
        raise InputError(f"config.only: got {settings.only!r}, which no row of {settings.work} contains")
    return rows


def name_of(row: dict[str, Any]) -> str:
    """What tells a row from the others."""
    return f"{row['work']}; {row['shape']}; {row['batch']}; {row['dtype']}"


def measure_limits() -> Limits:
    """What this machine reaches now."""
    found = {name: seen[0]["value"] for name, seen in in_turn(LIMITS, 1).items()}
    return Limits({dtype: found[dtype] for dtype in ("float32", "bfloat16")}, found["bandwidth"])


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows, to be read."""
    table = Table(
        "work",
        "shape",
        "batch",
        "dtype",
        "unit",
        "ours",
        "peer",
        "times better",
        "of the limit",
        "",
        box=None,
        pad_edge=False,
    )
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g} ({row['ratio_min']:.3g} to {row['ratio_max']:.3g})"
        limit = "" if row["fraction_of_limit"] is None else f"{row['fraction_of_limit']:.0%}"
        peer = "" if row["peer"] is None else f"{row['peer']:,.4g}"
        table.add_row(
            row["work"],
            row["shape"],
            str(row["batch"]),
            row["dtype"],
            row["unit"],
            f"{row['ours']:,.4g}",
            peer,
            ratio,
            limit,
            row["note"] or learned(row),
        )  # fmt: skip
    return table


def learned(row: dict[str, Any]) -> str:
    """What both sides have learned, where a row tells it."""
    told = []
    for name, details in row["details"].items():
        if "return" in details:
            after = details["solved_after_steps"]
            solved = "" if after is None else f", solved after {after:,}"
            told.append(f"{name}: return {details['return']:.0f}{solved}")
    return "; ".join(told)


def main(settings: BenchmarkExperiment, workdir: Path) -> None:
    """Runs the benchmark."""
    rows, out = chosen(settings), workdir / "benchmark.jsonl"
    open_run(workdir, dataclasses.asdict(settings), may_change=("only",))
    done = {name_of(row): row for row in (read_jsonl(out) if out.exists() else [])}
    console, failed = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True), []
    limits = measure_limits() if len(done) < len(rows) else None
    for number, comparison in enumerate(rows, start=1):
        name = name_of(comparison._asdict())
        if name in done:
            continue
        try:
            done[name] = compare(comparison, settings.rounds, limits)
        except SideError as error:
            failed.append(f"{name}; {error}")
            continue
        write_jsonl(out, done.values())
        console.print(f"{number}/{len(rows)} {json.dumps(done[name])}", markup=False, highlight=False)
    console.print(table_of(list(done.values())))
    if failed:
        raise RunError("could not be measured: " + " | ".join(failed))


def dry_run(settings: BenchmarkExperiment) -> None:
    """Refused."""
    raise RunError("--dry_run: a benchmark has none: it is what it measures")


if __name__ == "__main__":
    cli.launch(BenchmarkExperiment, main, dry_run)
