"""Processes that end early: in parts as planned, or by SIGKILL at any moment; the run ends with the same bits.

Real processes, started as a user starts them. `reference` is the run that nothing happens to; its compiled programs are
kept on the disk for the starts after it, but for one, which compiles all of them again.
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
    "--config.ppo.kl_target=0.5", "--config.ppo.kl_horizon=100", "--config.ppo.weight_decay=0.1", "--config.samples_every=1",
    "--config.checkpoint_every=1",
)  # fmt: skip
ITERATIONS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return folders.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def kept(world):
    """The environment of a process that keeps, or finds, compiled programs."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(world.root / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def flags(world, workdir, iterations: int = ITERATIONS) -> list[str]:
    return world.flags(*CHANGES, f"--config.num_iterations={iterations}", f"--workdir={workdir}")


@pytest.fixture(scope="module")
def reference(world, kept):
    outcome = folders.run_script("train_ppo.py", flags(world, world.root / "reference"), env=kept)
    assert (outcome.status, outcome.err) == (0, "")
    return world.root / "reference"


def check_same_run(ours, theirs) -> None:
    """Every leaf of the last state, every metric but the clock's, and every text."""
    rows = folders.without_time(ours / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(ITERATIONS))
    assert rows == folders.without_time(theirs / "metrics.jsonl")
    ours_state, theirs_state = folders.bits(folders.saved_state(ours)), folders.bits(folders.saved_state(theirs))
    assert ours_state == theirs_state
    assert len(ours_state) > 30
    assert sorted(os.listdir(ours / "checkpoints")) == sorted(os.listdir(theirs / "checkpoints"))
    for name in ("config.json", "samples.jsonl", "responses.jsonl", "results.json"):
        assert (ours / name).read_text() == (theirs / name).read_text(), name
    assert folders.contents(ours / "policy") == folders.contents(theirs / "policy")
    assert set(os.listdir(ours)) == set(os.listdir(theirs)), "a kill left something behind"


def test_a_run_in_two_parts_is_the_run_in_one(world, kept, reference, tmp_path):
    """3 iterations and 3 more in a new process, which compiles anew; and a third start, which has nothing to do."""
    workdir = tmp_path / "run"
    assert folders.run_script("train_ppo.py", flags(world, workdir, ITERATIONS // 2), env=kept).status == 0
    assert [row["iteration"] for row in read_jsonl(workdir / "metrics.jsonl")] == list(range(ITERATIONS // 2))
    outcome = folders.run_script("train_ppo.py", flags(world, workdir))
    assert (outcome.status, outcome.err) == (0, "")
    assert f"going on after iteration {ITERATIONS // 2}" in outcome.out
    check_same_run(workdir, reference)
    coefficients = {row["objective/kl_coef"] for row in read_jsonl(workdir / "metrics.jsonl")}
    assert len(coefficients) == ITERATIONS, "the KL coefficient was to move"

    before = folders.contents(workdir)
    again = folders.run_script("train_ppo.py", flags(world, workdir), env=kept)
    assert (again.status, again.err) == (0, "")
    assert "iteration 1/" not in again.out
    assert again.out[again.out.index("# Results") :] == outcome.out[outcome.out.index("# Results") :]
    assert folders.contents(workdir) == before


def names(folder) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def num_rows(workdir) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


MOMENTS = {
    "an iteration": lambda workdir: num_rows(workdir) >= 1,
    "a checkpoint": lambda workdir: num_rows(workdir) >= 3 and any("tmp" in x for x in names(workdir / "checkpoints")),
    "the export": lambda workdir: ".policy.new" in names(workdir),
    "the results": lambda workdir: "responses.jsonl" in names(workdir),
}


def test_a_killed_run_ends_as_one_that_was_never_killed(world, kept, reference, tmp_path, rng):
    """SIGKILL in four starts, each at another moment or a little after it; the fifth start runs to its end."""
    workdir, hit = tmp_path / "run", []
    for moment, reached in MOMENTS.items():
        process = folders.start_script(
            "train_ppo.py", flags(world, workdir), env=kept, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 240
        while process.poll() is None and not reached(workdir):
            assert time.monotonic() < deadline
            time.sleep(1e-3)
        time.sleep(rng.random() * (0.1 if moment == "an iteration" else 0.01))
        if process.poll() is None:
            hit.append(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(hit) >= 2, hit
    outcome = folders.run_script("train_ppo.py", flags(world, workdir), env=kept)
    assert (outcome.status, outcome.err) == (0, "")
    check_same_run(workdir, reference)
