"""Processes that end early, as planned or by SIGKILL at any moment: the run ends with the bits of one that did not.

Real processes, started as a user starts them, and one test of each kind, since all of its processes are compared with
the same run.
"""

import os
import signal
import subprocess
import time

import folders
import pytest

from ppo_jax.metrics import read_jsonl

# An adaptive KL coefficient and weight decay: more of the state to lose. Checkpoints and samples all the time.
CHANGES = (
    "--config.ppo.kl_target=0.5",
    "--config.ppo.kl_horizon=100",
    "--config.ppo.weight_decay=0.1",
    "--config.samples_every=1",
    "--config.checkpoint_every=1",
)
# All else that a state can hold: an adapter with its average, rollouts that wait, moments of the scores.
CARRIED = (
    "--config.lora.rank=2",
    "--config.ppo.ema_decay=0.8",
    "--config.ppo.stale_iterations=1",
    "--config.ppo.importance=truncate",
    "--config.ppo.score_scale=running",
)
ITERATIONS = 6


def flags(world, workdir, iterations: int = ITERATIONS, changes=()) -> list[str]:
    return world.flags(*CHANGES, *changes, f"--config.num_iterations={iterations}", f"--workdir={workdir}")


def check_same_run(ours, theirs, iterations: int = ITERATIONS) -> None:
    """Every leaf of the last state, every metric but the clock's, and every text."""
    rows = folders.without_time(ours / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(iterations))
    assert rows == folders.without_time(theirs / "metrics.jsonl")
    ours_state, theirs_state = folders.bits(folders.saved_state(ours)), folders.bits(folders.saved_state(theirs))
    assert ours_state == theirs_state
    assert len(ours_state) > 30
    assert sorted(os.listdir(ours / "checkpoints")) == sorted(os.listdir(theirs / "checkpoints"))
    for name in ("config.json", "samples.jsonl", "responses.jsonl", "results.json"):
        assert (ours / name).read_text() == (theirs / name).read_text(), name
    for name in ("policy", "adapter"):  # the second is empty where it is missing
        assert folders.contents(ours / name) == folders.contents(theirs / name)
    assert set(os.listdir(ours)) == set(os.listdir(theirs)), "a kill left something behind"


def names(folder) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def num_rows(workdir) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def changed(path) -> int:
    """When a file was written, in nanoseconds; 0 if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def writes_checkpoint(workdir) -> bool:
    return num_rows(workdir) >= 4 and any("tmp" in name for name in names(workdir / "checkpoints"))


# Whether it has come, in a process that was started at this time: the first two iterations have left their results.
MOMENTS = {
    "an iteration": lambda workdir, started: num_rows(workdir) >= 3,
    "a checkpoint": lambda workdir, started: writes_checkpoint(workdir),
    "the export": lambda workdir, started: ".policy.new" in names(workdir),
    "the results": lambda workdir, started: changed(workdir / "responses.jsonl") > started,
}


def kill_at(moment: str, process: subprocess.Popen, workdir, wait: float) -> bool:
    """Kills a process when the moment has come, or `wait` seconds later; whether it was still running."""
    started, deadline = time.time_ns(), time.monotonic() + 240
    while process.poll() is None and not MOMENTS[moment](workdir, started):
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    time.sleep(wait)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


@pytest.fixture
def kept(tmp_path) -> dict[str, str]:
    """Keeps the compiled programs of a process on the disk for those after it."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def run_and_kill(world, workdir, moments, kept, rng, changes=()) -> list[str]:
    """Starts a run and kills it at each of these moments; which of them came before its end."""
    hit = []
    for moment in moments:
        process = folders.start_script(
            "train_ppo.py",
            flags(world, workdir, changes=changes),
            env=kept,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait = rng.random() * (0.1 if moment == "an iteration" else 0.01)
        hit += [moment] * kill_at(moment, process, workdir, wait)
    return hit


def test_what_ends_early_ends_with_the_same_bits(tmp_path, rng, kept):
    world = folders.make_world(tmp_path)
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    outcome = folders.run_script("train_ppo.py", flags(world, reference), env=kept)
    assert (outcome.status, outcome.err) == (0, "")
    coefficients = {row["objective/kl_coef"] for row in read_jsonl(reference / "metrics.jsonl")}
    assert len(coefficients) == ITERATIONS, "the KL coefficient was to move"

    # Two iterations as planned, and then more, killed in four starts.
    assert folders.run_script("train_ppo.py", flags(world, workdir, 2), env=kept).status == 0
    assert [row["iteration"] for row in read_jsonl(workdir / "metrics.jsonl")] == [0, 1]
    hit = run_and_kill(world, workdir, MOMENTS, kept, rng)
    assert len(hit) >= 2, hit

    # Compiled anew, to its end.
    outcome = folders.run_script("train_ppo.py", flags(world, workdir))
    assert (outcome.status, outcome.err) == (0, "")
    check_same_run(workdir, reference)

    # There is nothing left to do.
    before = folders.contents(workdir)
    again = folders.run_script("train_ppo.py", flags(world, workdir), env=kept)
    assert (again.status, again.err) == (0, "")
    assert "iteration " not in again.out
    assert again.out[again.out.index("# Results") :] == outcome.out[outcome.out.index("# Results") :]
    assert folders.contents(workdir) == before


def test_all_that_is_carried_comes_back(tmp_path, rng, kept):
    """Killed in an iteration: an adapter, averages, moments, and a rollout that waits."""
    world = folders.make_world(tmp_path)
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    outcome = folders.run_script("train_ppo.py", flags(world, reference, changes=CARRIED), env=kept)
    assert (outcome.status, outcome.err) == (0, "")
    assert run_and_kill(world, workdir, ["an iteration"], kept, rng, CARRIED) == ["an iteration"]
    outcome = folders.run_script("train_ppo.py", flags(world, workdir, changes=CARRIED), env=kept)
    assert (outcome.status, outcome.err) == (0, "")
    check_same_run(workdir, reference)
    state = folders.saved_state(workdir)
    assert state.running.score_count == 8 * ITERATIONS
    assert {name.rpartition("'lora_")[2][:1] for name in folders.bits(state) if name.startswith(".ema")} == {"a", "b"}
    assert len(state.pending) == 1


def test_kills_at_random_moments(tmp_path, rng, kept, times):
    """Again and again, each time after an iteration more; nobody has to help, and nothing that was saved is lost."""
    wanted = 200 if times > 1 else 12  # with those of the other tests, a tenth
    world, iterations = folders.make_world(tmp_path), 6 * wanted
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    assert folders.run_script("train_ppo.py", flags(world, reference, iterations), env=kept).status == 0
    kills, saved = 0, 0
    while kills < wanted:
        process = folders.start_script(
            "train_ppo.py",
            flags(world, workdir, iterations),
            env=kept,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before, deadline = num_rows(workdir), time.monotonic() + 240
        while process.poll() is None and num_rows(workdir) <= before:
            assert time.monotonic() < deadline
            time.sleep(1e-3)
        time.sleep(rng.random() * 0.3)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        steps = [int(name) for name in names(workdir / "checkpoints") if name.isdecimal()]
        assert max(steps, default=0) >= saved
        saved = max(steps, default=0)
    assert kills >= wanted // 2
    assert folders.run_script("train_ppo.py", flags(world, workdir, iterations), env=kept).status == 0
    check_same_run(workdir, reference, iterations)
