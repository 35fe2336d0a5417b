"""One set of metrics to several places: metrics.jsonl, TensorBoard, Weights & Biases, trackio."""

import importlib
import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ppo_jax.errors import InputError
from ppo_jax.metrics.jsonl import JsonlWriter, atomic_write, read_jsonl, truncate_jsonl

KNOWN_TRACKERS = ("tensorboard", "wandb", "trackio")
STEP_KEY = "iteration"


class MetricWriter(Protocol):
    """Anything that takes the metrics of one step after the other."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a step; steps come in rising order."""
        ...

    def close(self) -> None:
        """Writes out what is pending and lets go of files and connections."""
        ...


class JsonlMetrics:
    """Metrics as one JSON object a step: `{"iteration": step, **metrics}`; NaN becomes null (see `JsonlWriter`)."""

    def __init__(self, path: str | Path):
        self._writer = JsonlWriter(path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the row of one step."""
        self._writer.write({STEP_KEY: step, **metrics})

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class TensorBoardMetrics:
    """Metrics as TensorBoard scalars, on the disk when `write` returns.

    tensorboardX's SummaryWriter queues its events for a thread and loses up to two minutes of them in a kill, after
    which a resumed run would show a hole. So the records are written here, one event a step, in tensorboardX's format.

    Args:
        folder: where the event file goes; each start adds a file, TensorBoard shows them as one run.
        start_step: first step that will be written. TensorBoard forgets what earlier files hold from this step on (what
            SummaryWriter calls `purge_step`), so a run that was killed after its last checkpoint shows no step twice.
    """

    def __init__(self, folder: str | Path, start_step: int = 0):
        from tensorboardX import RecordWriter

        events: Any = importlib.import_module("tensorboardX.proto.event_pb2")  # protobuf makes its classes at run time
        summaries: Any = importlib.import_module("tensorboardX.proto.summary_pb2")
        self._event, self._summary = events.Event, summaries.Summary
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)  # unique, and in the order in which TensorBoard sorts
        self._writer: Any = RecordWriter(str(folder / f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}"))
        self._add(file_version="brain.Event:2")
        start = events.SessionLog(status=events.SessionLog.START)
        self._add(step=start_step, session_log=start)
        self._writer.flush()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one event with all metrics of a step; None is left out."""
        known = {name: float(value) for name, value in metrics.items() if value is not None}
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in known.items()]
        self._add(step=step, summary=self._summary(value=values))
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file; a second call does nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())


class TrackerMetrics:
    """Metrics to Weights & Biases or trackio, whose `log` and `finish` are the same.

    Args:
        module: the module, with its run begun by `init`.
        first_step: steps before this one were logged by an earlier start and are left out: neither tracker can take
            them back, wandb warns about each, and trackio shows them twice.
    """

    def __init__(self, module: ModuleType, first_step: int = 0):
        self._module = module
        self._first_step = first_step
        self._open = True

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of a step."""
        if step >= self._first_step:
            self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        """Ends the run; a second call does nothing."""
        if self._open:
            self._open = False
            self._module.finish()


class MetricWriters:
    """Several metric writers as one; a context manager. Each is closed, also when closing another one failed."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives the metrics of a step to each writer in turn."""
        for writer in self._writers:
            writer.write(step, metrics)

    def close(self) -> None:
        """Closes all writers, the last one first."""
        with ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)

    def __enter__(self) -> "MetricWriters":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def make_writers(
    workdir: str | Path,
    trackers: Sequence[str],
    config: Mapping[str, Any],
    run_name: str,
    *,
    start_step: int = 0,
    project: str = "ppo_jax",
) -> MetricWriters:
    """Opens `workdir/metrics.jsonl`, always, and the trackers asked for. Nothing is written before all are checked.

    On a resume, what was logged from `start_step` on is dropped from metrics.jsonl and hidden in TensorBoard; wandb and
    trackio go on with the run whose name stands in `workdir/trackers.json`, from the first step that they do not have.

    Args:
        workdir: folder of the run, made when missing.
        trackers: any of `KNOWN_TRACKERS`; TensorBoard's events go to `workdir/tensorboard`.
        config: settings of the run, shown by wandb and trackio.
        run_name: how wandb and trackio show the run.
        start_step: first step that will be written, 0 for a new run.
        project: project of the run in wandb and trackio.

    Returns:
        One writer for all.

    Raises:
        InputError: a tracker is unknown, or its package is not installed.
    """
    trackers = tuple(dict.fromkeys(trackers))
    modules = check_trackers(trackers)

    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    metrics_path = workdir / "metrics.jsonl"
    runs = _tracker_runs(workdir, tuple(modules), run_name, start_step)  # reads what the next line drops
    truncate_jsonl(metrics_path, STEP_KEY, start_step)
    with ExitStack() as opened:
        writers: list[MetricWriter] = [JsonlMetrics(metrics_path)]
        opened.callback(writers[0].close)
        for name in trackers:
            if name == "tensorboard":
                writer: MetricWriter = TensorBoardMetrics(workdir / "tensorboard", start_step)
            else:
                names = _names_of_run(name, runs[name]["run_id"], run_name, workdir)
                modules[name].init(project=project, config=dict(config), resume="allow", **names)
                writer = TrackerMetrics(modules[name], runs[name]["next_step"])
            writers.append(writer)
            opened.callback(writer.close)
        opened.pop_all()  # all went well: they stay open
    return MetricWriters(writers)


def check_trackers(trackers: Sequence[str]) -> dict[str, ModuleType]:
    """The modules of these trackers, without TensorBoard, which needs none of its own.

    Raises:
        InputError: one is unknown, or its package is not installed.
    """
    for name in trackers:
        if name not in KNOWN_TRACKERS:
            raise InputError(f"unknown tracker {name!r}; the known ones are {', '.join(KNOWN_TRACKERS)}")
    return {name: _import_tracker(name) for name in trackers if name != "tensorboard"}


def _import_tracker(name: str) -> ModuleType:
    missing = f"tracker {name!r} needs the package {name}, which is not installed: pip install {name}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # installed, but one of its own dependencies is not
        raise InputError(missing) from None
    if not hasattr(module, "init"):  # a folder ./wandb, which wandb itself makes, imports as an empty package
        raise InputError(missing)
    return module


def _names_of_run(tracker: str, run_id: str, run_name: str, workdir: Path) -> dict[str, Any]:
    """Arguments of `init` in which the trackers differ."""
    if tracker == "trackio":
        return {"name": run_id}  # it knows a run by its name
    # A resumed run may have a setting changed, its number of iterations say; wandb refuses that unless told.
    return {"id": run_id, "name": run_name, "dir": str(workdir), "allow_val_change": True}


def _tracker_runs(workdir: Path, names: Sequence[str], run_name: str, start_step: int) -> dict[str, dict[str, Any]]:
    """Run id and first step to log of each tracker, kept in `workdir/trackers.json`.

    The id is made once: a new folder of an old name is a new run. `next_step` is kept since metrics.jsonl, which tells
    how far the last start came, is cut back at each resume.
    """
    if not names:
        return {}
    path, metrics_path = workdir / "trackers.json", workdir / "metrics.jsonl"
    runs = json.loads(path.read_text()) if path.exists() else {}
    rows = read_jsonl(metrics_path) if metrics_path.exists() else []
    logged = 1 + max((row.get(STEP_KEY, -1) for row in rows), default=-1)
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_name)[:64].strip("-")
    for name in names:
        if name in runs:
            runs[name]["next_step"] = max(runs[name]["next_step"], logged, start_step)
        else:
            runs[name] = {"run_id": f"{slug or 'run'}-{secrets.token_hex(4)}", "next_step": start_step}
    atomic_write(path, json.dumps(runs, indent=2).encode() + b"\n")
    return runs
