"""The folder of a run: one configuration a folder, and what a restart may change of it."""

import io
import json
import math
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.checkpoint import Checkpointer, free
from ppo_jax.errors import InputError
from ppo_jax.fingerprints import fingerprints
from ppo_jax.lock import NAME as LOCK
from ppo_jax.lock import lock_folder
from ppo_jax.metrics import atomic_write
from ppo_jax.types import Experience, Scores, TrainState


class RunError(InputError):
    """A run that cannot start or go on; the message says why."""


def open_run(workdir: str | Path, config: dict[str, Any], may_change: Collection[str] = ()) -> bool:
    """Makes the folder of a run, or enters it again; no other process can until this one ends.

    Args:
        workdir: the folder.
        config: nested dictionary of settings, written to `config.json` at the first start.
        may_change: top-level fields in which a restart may differ from the first start.

    Returns:
        Whether the folder held this run already.

    Raises:
        RunError: the folder holds a run of another configuration (names the fields), a damaged config.json, or files
            but no config.json.
        LockedError: another process has it open.
    """
    folder = Path(workdir)
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"workdir {folder}: it is a file, expected a folder")
    if not path.exists():
        if folder.exists() and set(os.listdir(folder)) - {".config.json.tmp", LOCK}:
            raise RunError(
                f"workdir {folder}: it holds files but no config.json; expected an empty folder or one of this run"
            )
        folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)
    if not path.exists():
        write_json(path, config)
        return False
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path}: damaged: {error}") from error
    if not isinstance(saved, dict):
        raise RunError(f"{path}: damaged: got a JSON {type(saved).__name__}, expected an object")
    ours, theirs = _flatten(json.loads(json.dumps(config))), _flatten(saved)
    differing = [
        f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and name not in may_change
    ]
    if differing:
        raise RunError(
            f"workdir {folder}: it holds another configuration ({'; '.join(differing)}); "
            "expected another workdir or these settings"
        )
    return True


def resume(
    workdir: Path,
    config: dict[str, Any],
    may_change: Collection[str],
    fresh: TrainState,
    total: int,
    max_to_keep: int,
    setting: str = "number of steps",
) -> tuple[Checkpointer, TrainState]:
    """Opens the folder of a training run: its configuration, its checkpoints, and the state to go on with.

    Args:
        workdir: the folder.
        config: nested dictionary of settings; `config.json` holds them afterwards.
        may_change: see `open_run`.
        fresh: the state before the first step; its memory is given back when a checkpoint replaces it.
        total: steps that the run is to have.
        max_to_keep: newest checkpoints that stay.
        setting: what `total` is called where the user sets it.

    Returns:
        (the checkpoints, the newest saved state or else `fresh`).

    Raises:
        RunError: see `open_run`; or the folder is further than `total`.
        CheckpointError: a checkpoint that does not fit the state, or was made with other files under the same names.
    """
    open_run(workdir, config, may_change)
    checkpoints = Checkpointer(workdir / "checkpoints", max_to_keep, fingerprints(config, may_change))
    done = checkpoints.latest_step() or 0
    if total < done:
        raise RunError(f"{setting}: got {total}, expected at least the {done} that {workdir} has")
    state = checkpoints.restore(fresh) if done else fresh
    write_json(workdir / "config.json", config)
    if done:
        free(fresh)
    return checkpoints, state


def refuse_non_finite(metrics: Mapping[str, float], where: str, expected: str) -> None:
    """Ends a run before a broken state is saved.

    Args:
        metrics: by name.
        where: which step.
        expected: what to change.

    Raises:
        RunError: a metric is not a finite number.
    """
    broken = [f"{name}: got {x}" for name, x in metrics.items() if not math.isfinite(x)]
    if broken:
        raise RunError(
            f"{where}: {', '.join(broken)}, expected a finite number: {expected}; the last checkpoint is kept"
        )


def save_broken(workdir: Path, state: TrainState, experience: Experience, scores: Scores, most: int = 3) -> Path:
    """Keeps an iteration that held something that is not finite.

    Args:
        workdir: of the run.
        state: after the iteration, which did not learn from it.
        experience: what it was to learn from.
        scores: what the judges said.
        most: newest of such iterations that stay.

    Returns:
        A folder with the experience and the scores (`batch.npz`, by field) and the state.
    """
    folder = workdir / "broken" / f"{int(state.step) - 1:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: x for name, x in vars(experience).items() if x is not None}
    arrays |= {f"scores_{name}": getattr(scores, name) for name in ("total", "tokens", "greedy")}
    arrays |= {f"parts_{name}": x for name, x in scores.parts.items()}
    held = io.BytesIO()
    np.savez(held, **{name: np.asarray(x) for name, x in arrays.items() if x is not None})
    atomic_write(folder / "batch.npz", held.getvalue())
    with Checkpointer(folder / "state", max_to_keep=1) as checkpoint:
        checkpoint.save(state)
    for old in sorted(path for path in folder.parent.iterdir() if path.is_dir())[:-most]:
        shutil.rmtree(old)
    return folder


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file so that at any moment it is absent, old or new, and never half there."""
    atomic_write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
