"""Checkpoints after crashes, power losses, full disks and bit rot: whole or not there, and never silently wrong.

A tenth of the attempts; `make soak` makes them all.
"""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import crashes
import folders
import jax
import jax.numpy as jnp
import pytest
from small import running

from ppo_jax import manifest
from ppo_jax.checkpoint import Checkpointer, CheckpointError
from ppo_jax.errors import InputError
from ppo_jax.manifest import DamagedError, commit, retire, verify
from ppo_jax.types import TrainState

NO_COMPILER = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, to watch a process's writes")


def make_state(step: int) -> TrainState:
    """A state whose arrays all hold its step."""
    params = {f"p{i}": jnp.full((16, 16), step, jnp.float32) for i in range(3)}
    return TrainState(jnp.int32(step), params, {"mu": params}, jax.random.key(step), running(float(step)))


def check_state(state: TrainState, step: int) -> None:
    assert folders.bits(state) == folders.bits(make_state(step))


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with the steps 1 and 2."""
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(make_state(1))
        checkpoints.save(make_state(2))
    return tmp_path / "checkpoints"


def files_of(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) > 5
    return files


def check_falls_back(folder: Path, caplog) -> None:
    """The newer step is damaged: that is told, and the older one is restored."""
    with pytest.raises(DamagedError):
        verify(folder / "2")
    caplog.clear()
    with Checkpointer(folder) as checkpoints, caplog.at_level(logging.WARNING):
        check_state(checkpoints.restore(make_state(0)), 1)
    (told,) = caplog.messages
    assert told.startswith(f"damaged checkpoint: {folder / '2'}{os.sep}")
    assert told.endswith("; going back to step 1")


def test_every_flipped_bit_is_noticed(saved, rng, times, caplog):
    files = files_of(saved / "2")
    assert saved / "2" / manifest.NAME in files
    for attempt in range(100 * times):
        path = files[attempt % len(files)]
        data = path.read_bytes()
        if not data:
            continue
        spoiled = bytearray(data)
        spoiled[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoiled)
        with pytest.raises(DamagedError) as error:
            verify(saved / "2")
        assert str(path) in str(error.value)
        if attempt % 10 == 0:
            check_falls_back(saved, caplog)
        path.write_bytes(data)
    assert verify(saved / "2")["step"] == 2


@pytest.mark.parametrize("harm", ["cut", "gone", "zeros", "longer"])
def test_every_damaged_file_is_noticed(saved, harm, caplog):
    for path in files_of(saved / "2"):
        data = path.read_bytes()
        if harm == "gone":
            path.unlink()
        elif data or harm == "longer":
            path.write_bytes({"cut": data[:-1], "zeros": b"\0" * len(data), "longer": data + b"\0"}[harm])
        else:
            continue
        with pytest.raises(DamagedError, match="manifest.json" if path.name == manifest.NAME else path.name):
            verify(saved / "2")
        path.write_bytes(data)
    (saved / "2" / manifest.NAME).write_bytes(b"")
    check_falls_back(saved, caplog)


def test_a_manifest_is_taken_as_it_was_written_only(saved):
    """Also where it says the same in another form, or was made consistent by hand but for its own digest."""
    path = saved / "2" / manifest.NAME
    held = json.loads(path.read_bytes())
    name = next(iter(held["files"]))
    other = held | {"files": held["files"] | {name: {"bytes": 0, "sha256": "0" * 64}}}
    for spoiled in (json.dumps(held), json.dumps(other, sort_keys=True, indent=1), "[]", "{}", "[" * 5000, "null"):
        path.write_text(spoiled)
        with pytest.raises(DamagedError, match="it is not as it was written"):
            verify(saved / "2")


def test_nothing_whole_is_an_error_and_loses_nothing(saved):
    for step in (1, 2):
        (saved / str(step) / "_METADATA").unlink()
    with Checkpointer(saved) as checkpoints:
        with pytest.raises(CheckpointError, match=r"none in .* is whole: .*2/_METADATA.*1/_METADATA") as error:
            checkpoints.restore(make_state(0))
        with pytest.raises(CheckpointError, match=r"none in .* is whole: .*1/_METADATA"):
            checkpoints.restore(make_state(0), before=2)
    assert isinstance(error.value, InputError)
    assert sorted(os.listdir(saved)) == ["1", "2"]


def test_a_damaged_step_is_written_anew_when_its_turn_comes(saved):
    (saved / "2" / "_METADATA").unlink()
    with Checkpointer(saved) as checkpoints:
        check_state(checkpoints.restore(make_state(0)), 1)
        assert checkpoints.latest_step() == 1
        checkpoints.save(make_state(2))
        check_state(checkpoints.restore(make_state(0)), 2)
    assert sorted(os.listdir(saved)) == ["1", "2"]


def test_a_step_that_was_saved_early_goes_when_a_later_one_is_there(tmp_path):
    """It is gone on from, takes nobody's place, and is nothing to go back to."""
    folder = tmp_path / "checkpoints"

    def steps() -> list[int]:
        return sorted(int(name) for name in os.listdir(folder))

    with Checkpointer(folder, max_to_keep=2) as checkpoints:
        for step in (2, 4):
            checkpoints.save(make_state(step))
        for step in (5, 6):
            checkpoints.save(make_state(step), early=True)
        assert steps() == [2, 4, 6]
        check_state(checkpoints.restore(make_state(0)), 6)
        check_state(checkpoints.restore(make_state(0), before=7), 4)
    with Checkpointer(folder, max_to_keep=2) as checkpoints:  # in another process
        check_state(checkpoints.restore(make_state(0), before=7), 4)
        checkpoints.save(make_state(8))
        assert steps() == [4, 8]
    with Checkpointer(folder, max_to_keep=1) as checkpoints:
        checkpoints.save(make_state(9), early=True)
        assert steps() == [8, 9]
        checkpoints.save(make_state(10))
        assert steps() == [10]


def test_what_a_crash_left_is_removed_and_nothing_else(saved):
    for name in (".3.new", ".3.new.orbax-checkpoint-tmp", ".1.old"):
        shutil.copytree(saved / "1", saved / name)
    (saved / ".notes").write_text("kept")
    (saved / "thoughts").mkdir()
    with Checkpointer(saved) as checkpoints:
        assert checkpoints.latest_step() == 2
    assert sorted(os.listdir(saved)) == [".notes", "1", "2", "thoughts"]


def test_a_folder_is_committed_whole(tmp_path):
    written, target = tmp_path / ".new", tmp_path / "done"
    (written / "deep" / "empty").mkdir(parents=True)
    (written / "deep" / "text").write_text("a")
    commit(written, target, {"step": 3})
    assert not written.exists()
    assert verify(target) == {"step": 3}
    retire(target)
    assert os.listdir(tmp_path) == []


SAVER = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
from test_durability import make_state
from ppo_jax.checkpoint import Checkpointer

folder = Path(sys.argv[1])
with Checkpointer(folder / "checkpoints", max_to_keep=2) as checkpoints:
    for step in range(1, 5):
        checkpoints.save(make_state(step))
        (folder / "durable").write_text(str(step))
"""


def run_watched(tmp_path: Path, script: str, **environment: str) -> None:
    """Runs Python code whose writes to tmp_path/run are watched."""
    (tmp_path / "run").mkdir()
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    environment |= {"WATCHED": str(tmp_path / "run"), "LD_PRELOAD": str(crashes.compile_watcher(tmp_path))}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    outcome = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True
    )
    (tmp_path / "stderr").write_text(outcome.stderr)
    told = outcome.stderr.rpartition('File "<string>"')[2]  # Orbax's own threads tell theirs before and after
    assert outcome.returncode == 0, told[:2000]


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    """Four saves, with what the folder was before each call that changed it."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "snapshots").mkdir()
    run_watched(folder, SAVER, WATCH_LOG=str(folder / "log"), WATCH_SNAPSHOTS=str(folder / "snapshots"))
    return folder


def check_goes_on(folder: Path, restores: bool) -> None:
    """What was reported durable is there, and all that has a name is whole."""
    report = folder / "durable"
    durable = int(report.read_text() or 0) if report.exists() else 0
    steps = sorted(int(name) for name in os.listdir(folder / "checkpoints") if name.isdecimal())
    assert max(steps, default=0) >= durable
    for step in steps:
        assert verify(folder / "checkpoints" / str(step))["step"] == step
    if restores and steps:
        with Checkpointer(folder / "checkpoints") as checkpoints:
            check_state(checkpoints.restore(make_state(0)), steps[-1])


@NO_COMPILER
def test_a_kill_before_any_write_leaves_a_state_to_go_on_from(watched, rng, times):
    calls = crashes.read_calls(watched / "log")
    assert len(calls) > 300
    names = {call.name for call in calls}
    assert {"open", "mkdir", "rename", "unlinkat", "rmdir", "fsync"} <= names
    restored = set(rng.permutation(len(calls))[: 20 * times])
    for i, call in enumerate(calls):
        folder = watched / "snapshots" / str(call.number)
        if (folder / "checkpoints").is_dir():
            check_goes_on(folder, i in restored)


@NO_COMPILER
def test_a_power_loss_at_any_moment_leaves_a_state_to_go_on_from(watched, tmp_path, rng, times):
    """Any of the writes and names that no fsync had forced to the disk may be missing."""
    calls = crashes.read_calls(watched / "log")
    root, lost = watched / "run", 0
    for attempt in range(100 * times):
        at = int(rng.integers(20, len(calls)))
        folder = tmp_path / str(attempt)
        shutil.copytree(watched / "snapshots" / str(calls[at].number), folder)
        unsynced = crashes.Unsynced().follow(calls[:at])
        before = folders.contents(folder)
        # The report goes to whoever asked for the save: it is not lost.
        unsynced.contents.discard(root / "durable")
        unsynced.made.discard(root / "durable")
        unsynced.lose_some(rng, lambda path, folder=folder: folder / path.relative_to(root))
        lost += folders.contents(folder) != before
        if (folder / "checkpoints").is_dir():
            check_goes_on(folder, attempt % 10 == 0)
        shutil.rmtree(folder)
    assert lost > 20 * times, "the sampled crashes were to lose something"


FULL_DISK = """
import ctypes, json, os, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
from test_durability import check_state, make_state
from ppo_jax.checkpoint import Checkpointer, CheckpointError
from ppo_jax.manifest import verify

watch_fail, backend, failures = ctypes.CDLL(None).watch_fail, sys.argv[2], json.loads(sys.argv[3])
jax.default_backend = lambda: backend
folder = Path(sys.argv[1]) / "checkpoints"
with Checkpointer(folder, max_to_keep=2) as checkpoints:
    checkpoints.save(make_state(1))
    checkpoints.save(make_state(2))
    step, told = 3, 0
    for calls, error in failures:
        checkpoints.wait()
        watch_fail(calls, error)
        try:
            checkpoints.save(make_state(step))
            checkpoints.wait()
            error = None
        except CheckpointError as failure:
            error = failure
        watch_fail(0, 0)
        assert checkpoints.latest_step() == (step if error is None else step - 1), (calls, error)
        check_state(checkpoints.restore(make_state(0)), checkpoints.latest_step())
        steps = sorted(int(name) for name in os.listdir(folder) if name.isdecimal())
        assert steps[-2:] == ([step - 1, step] if error is None else [step - 2, step - 1]), steps
        for each in steps:
            verify(folder / str(each))
        if error is None:
            step += 1
        else:
            assert f"step {step} could not be saved in {folder}" in str(error), error
            assert " MB, free are " in str(error), error
            told += 1
    checkpoints.save(make_state(step))
    check_state(checkpoints.restore(make_state(0)), step)
assert sorted(os.listdir(folder)) == sorted([str(step - 1), str(step)]), "leftovers keep the disk full"
print(told)
"""


@NO_COMPILER
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_full_or_failing_disk_leaves_older_steps_alone(tmp_path, rng, times, backend):
    """At any write of a save; when there is room again, the next save succeeds."""
    every = range(1, 141)
    calls = sorted(rng.choice(every, 14 * times, replace=False).tolist())
    failures = [[n, int(rng.choice([errno.ENOSPC, errno.EIO]))] for n in calls]
    script = FULL_DISK.replace("sys.argv[2]", repr(backend)).replace("sys.argv[3]", repr(json.dumps(failures)))
    run_watched(tmp_path, script)
