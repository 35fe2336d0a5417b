"""The two sides of a comparison: each in a process of its own, measured in turn, so that a busy machine slows both."""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Side(NamedTuple):
    """One side: a function of `experiments/benchmarks/` that prepares, and returns the function that is measured."""

    function: str  # MODULE:NAME; NAME(**arguments) -> measure; measure() -> {"value": number, ...}
    arguments: dict[str, Any]
    packages: tuple[str, ...] = ()  # of a peer: their versions are told; where one is not installed, it is left out
    warm_up: bool = True  # measure once before what counts; False: compiling is a part of the work


class Comparison(NamedTuple):
    """A row of a benchmark."""

    work: str
    shape: str
    batch: int  # environments, or sequences, side by side
    unit: str
    lower_is_better: bool
    ours: Side
    peer: Side | None
    # What one unit of our work needs (in rows of seconds: one measurement); None: not counted.
    flops: float | None = None  # floating-point operations
    traffic: float | None = None  # bytes from memory
    dtype: str = "float32"


class Limits(NamedTuple):
    """What the machine reaches, in the same run."""

    flops: dict[str, float]  # by dtype: floating-point operations a second
    bandwidth: float  # bytes a second

    def least_seconds(self, work: Comparison) -> float | None:
        """The time that one unit of work takes at least; None: it is not counted."""
        if work.flops is None:
            return None
        return max(work.flops / self.flops[work.dtype], (work.traffic or 0.0) / self.bandwidth)


class SideError(Exception):
    """A side that ended with an error: its last words."""


class Worker:
    """The process of a side."""

    def __init__(self, side: Side) -> None:
        """Starts it and waits until it has prepared.

        Raises:
            SideError: it ended.
        """
        # A file: a pipe that nobody reads would stop it.
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmarks.worker", json.dumps(side._asdict())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip
        try:
            self._hear()
        except SideError:
            self.close()
            raise

    def measure(self) -> dict[str, Any]:
        """One measurement.

        Raises:
            SideError: the process ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("measure\n")
        self._process.stdin.flush()
        return self._hear()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._words.close()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._words.seek(0)
        words = [word for word in self._words.read().splitlines() if word.strip()]
        raise SideError(words[-1] if words else f"it ended with exit status {status}")


def in_turn(sides: dict[str, Side], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Measurements of each side by its name, one of each after the other.

    Raises:
        SideError: a side ended; it is named.
    """
    workers: dict[str, Worker] = {}
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    name = ""
    try:
        for name, side in sides.items():
            workers[name] = Worker(side)
        for _ in range(rounds):
            for name, worker in workers.items():
                seen[name].append(worker.measure())
    except SideError as error:
        raise SideError(f"{name}: {error}") from error
    finally:
        for worker in workers.values():
            worker.close()
    return seen


def compare(comparison: Comparison, rounds: int, limits: Limits | None = None) -> dict[str, Any]:
    """Measures both sides in turn.

    Args:
        comparison: the row.
        rounds: measurements of each.
        limits: of the machine, for `fraction_of_limit`.

    Returns:
        The row: `ours` and `peer` are medians of `unit`; `ratio` is how many times better ours is (median of the
        rounds; `ratio_min`, `ratio_max`), None without a peer, and then `note` says why.

    Raises:
        SideError: a side ended.
    """
    sides, note = {"ours": comparison.ours}, None
    packages = comparison.peer.packages if comparison.peer else ()
    missing = [name for name in packages if version(name) is None]
    if missing:
        note = f'{", ".join(missing)} not installed: pip install -e ".[bench]"'
    elif comparison.peer:
        sides["peer"] = comparison.peer
    seen = in_turn(sides, rounds)
    row = {name: getattr(comparison, name) for name in ("work", "shape", "batch", "dtype", "unit")}
    values = {name: [one["value"] for one in measured] for name, measured in seen.items()}
    row |= {"ours": statistics.median(values["ours"]), "peer": None}
    row |= dict.fromkeys(("ratio", "ratio_min", "ratio_max", "fraction_of_limit"))
    if "peer" in values:
        row["peer"] = statistics.median(values["peer"])
        pairs = zip(values["ours"], values["peer"], strict=True)
        ratios = [peer / ours if comparison.lower_is_better else ours / peer for ours, peer in pairs]
        row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    least = limits and limits.least_seconds(comparison)
    if least is not None:
        row["fraction_of_limit"] = least / row["ours"] if comparison.lower_is_better else least * row["ours"]
    details = {name: {k: x for k, x in measured[-1].items() if k != "value"} for name, measured in seen.items()}
    names = ("jax", "jaxlib", "flax", *packages)
    row |= {"rounds": rounds, "details": details, "note": note}
    return row | {"versions": {"python": sys.version.split()[0]} | {name: version(name) for name in names}}


def version(package: str) -> str | None:
    """The installed version of a package; None: there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
