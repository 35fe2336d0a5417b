"""The folder of a run: made once, entered again by the same configuration only, never half written."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import running

from ppo_jax.checkpoint import Checkpointer, CheckpointError
from ppo_jax.errors import InputError
from ppo_jax.metrics import JsonlWriter, read_jsonl, write_jsonl
from ppo_jax.runs import RunError, open_run, refuse_non_finite, resume, save_broken, write_json
from ppo_jax.types import Experience, Scores, TrainState

CONFIG = {
    "model": "x",
    "seed": 0,
    "num_iterations": 4,
    "ppo": {"lr": 1e-3, "value_clip_eps": float("inf")},
    "names": ("a",),
}


def changed(**changes) -> dict:
    return json.loads(json.dumps(CONFIG)) | changes


def refused(folder, config=CONFIG, may_change=()) -> str:
    before = contents(folder)
    with pytest.raises(RunError) as error:
        open_run(folder, config, may_change)
    assert isinstance(error.value, InputError)
    assert "\n" not in str(error.value)
    assert contents(folder) == before, "a refused start changed the folder"
    return str(error.value)


def contents(folder) -> dict[str, bytes]:
    names = set(os.listdir(folder)) - {".lock"} if folder.is_dir() else ()
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_run_writes_its_configuration(tmp_path, exists):
    folder = tmp_path / "deep" / "run"
    if exists:
        folder.mkdir(parents=True)
    assert not open_run(folder, CONFIG)
    assert json.loads((folder / "config.json").read_text()) == changed()
    assert set(os.listdir(folder)) == {"config.json", ".lock"}


def test_a_path_as_text_is_as_good(tmp_path):
    assert not open_run(str(tmp_path / "run"), CONFIG)
    assert open_run(str(tmp_path / "run"), CONFIG)


def test_the_same_configuration_enters_again(tmp_path):
    open_run(tmp_path / "run", CONFIG)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    before = contents(tmp_path / "run")
    assert open_run(tmp_path / "run", CONFIG)
    assert contents(tmp_path / "run") == before


def test_another_configuration_is_refused_by_its_fields(tmp_path):
    open_run(tmp_path / "run", CONFIG)
    text = refused(tmp_path / "run", changed(seed=1, ppo={"lr": 2e-3, "value_clip_eps": float("inf")}))
    assert str(tmp_path / "run") in text
    assert "seed was 0 and is 1" in text
    assert "ppo.lr was 0.001 and is 0.002" in text
    assert "model" not in text.removeprefix(str(tmp_path))
    assert "value_clip_eps" not in text


def test_a_field_that_came_or_went_is_a_difference(tmp_path):
    open_run(tmp_path / "run", CONFIG)
    assert "extra" in refused(tmp_path / "run", changed(extra=1))
    less = changed()
    del less["seed"]
    assert "seed" in refused(tmp_path / "run", less)


def test_fields_that_may_change_may_change(tmp_path):
    """The file stays: a start that enters may still be refused. The caller writes it once it goes on."""
    open_run(tmp_path / "run", CONFIG)
    longer = changed(num_iterations=8)
    assert "num_iterations was 4 and is 8" in refused(tmp_path / "run", longer)
    assert open_run(tmp_path / "run", longer, may_change=["num_iterations"])
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == changed()
    write_json(tmp_path / "run" / "config.json", longer)
    assert open_run(tmp_path / "run", longer)
    assert "seed" in refused(tmp_path / "run", changed(num_iterations=8, seed=1), may_change=["num_iterations"])


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"seed": 0', b"\xff\xfe", b"[]", b"null", b"3", b'"text"'],
    ids=["empty", "brace", "cut", "binary", "list", "null", "number", "text"],
)  # fmt: skip
def test_a_damaged_configuration_is_refused(tmp_path, content):
    folder = tmp_path / "run"
    open_run(folder, CONFIG)
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refused(folder)


def test_a_folder_with_foreign_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds files but no config.json; expected an empty folder or one of this run" in refused(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="it is a file, expected a folder"):
        open_run(tmp_path / "run", CONFIG)
    # A file in the middle of the path: Python's own error, which the scripts tell in one line as well.
    with pytest.raises((InputError, OSError)):
        open_run(tmp_path / "run" / "deeper", CONFIG)


def test_what_a_kill_in_the_first_write_leaves_is_taken_over(tmp_path):
    (tmp_path / ".config.json.tmp").write_text('{"seed"')
    assert not open_run(tmp_path, CONFIG)
    assert json.loads((tmp_path / "config.json").read_text()) == changed()


WRITER = """
import itertools, sys
from pathlib import Path
from ppo_jax.runs import write_json

path = Path(sys.argv[1])
print("ready", flush=True)
for i in itertools.count():
    write_json(path, {"number": i, "filling": ["x" * 50] * 2000})
"""


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path, rng):
    """SIGKILL while a file of 100 kB is written over and over; a mixture of two versions would not match."""
    path = tmp_path / "config.json"
    root = Path(__file__).parents[1]
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=root, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        seen = set()
        deadline = time.monotonic() + 0.2 + rng.random() * 0.1
        while time.monotonic() < deadline:
            if path.exists():
                seen.add(check_whole(path))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        check_whole(path)
        assert len(seen) > 1, "it was not written while it was read"
        assert set(os.listdir(tmp_path)) <= {"config.json", ".config.json.tmp", ".lock"}


def check_whole(path: Path) -> int:
    value = json.loads(path.read_text())
    assert value["filling"] == ["x" * 50] * 2000
    return value["number"]


def test_json_stays_readable(tmp_path):
    write_json(tmp_path / "a.json", {"text": "naïve 猫", "n": [1, 2.5, None, True]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "naïve 猫" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"text": "naïve 猫", "n": [1, 2.5, None, True]}


# A training run, begun or gone on with


def train_state(step: int, size: int = 3) -> TrainState:
    params = {"dense": jnp.full(size, float(step))}
    opt_state = {"mu": 2 * params["dense"]}
    return TrainState(jnp.int32(step), params, opt_state, jax.random.key(step), running(0.5))


def entered(folder, total: int = 9, config=CONFIG, may_change=(), keep: int = 2, size: int = 3):
    """(the checkpoints, the state, the fresh state that was given)."""
    fresh = train_state(0, size)
    checkpoints, state = resume(folder, config, may_change, fresh, total, keep)
    return checkpoints, state, fresh


def run_to(folder, *steps: int, **options) -> None:
    checkpoints, _, _ = entered(folder, **options)
    for step in steps:
        checkpoints.save(train_state(step))
    checkpoints.close()


def test_a_run_begins_with_the_fresh_state(tmp_path):
    checkpoints, state, fresh = entered(tmp_path / "deep" / "run")
    assert state is fresh
    assert checkpoints.latest_step() is None
    assert json.loads((tmp_path / "deep" / "run" / "config.json").read_text()) == changed()
    # And a second time, since nothing is saved.
    checkpoints.close()
    _, state, fresh = entered(tmp_path / "deep" / "run")
    assert state is fresh
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_run_goes_on_with_its_newest_state_and_gives_the_fresh_one_back(tmp_path):
    run_to(tmp_path / "run", 1, 4, 7)
    checkpoints, state, fresh = entered(tmp_path / "run")
    chex.assert_trees_all_equal(jax.random.key_data(state.key), jax.random.key_data(jax.random.key(7)))
    chex.assert_trees_all_equal(state.replace(key=0), train_state(7).replace(key=0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((fresh.params, fresh.opt_state)))
    assert checkpoints.latest_step() == 7
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["4", "7"]  # two are kept


def test_a_state_that_was_saved_before_the_first_step_is_the_fresh_one(tmp_path):
    """PPO saves it, to go back to when the first iteration is too far already."""
    run_to(tmp_path / "run", 0)
    _, state, fresh = entered(tmp_path / "run")
    assert state is fresh
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_the_end_may_be_reached_and_not_taken_back(tmp_path):
    run_to(tmp_path / "run", 3, 5)
    _, state, _ = entered(tmp_path / "run", total=5)
    assert state.step == 5
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match=rf"got 4, expected at least the 5 that {tmp_path / 'run'} has"):
        entered(tmp_path / "run", total=4, config=changed(seed=1), may_change=("seed",))
    assert contents(tmp_path / "run") == before


def test_what_may_change_is_written_down_when_the_run_goes_on(tmp_path):
    run_to(tmp_path / "run", 2)
    more = changed(num_iterations=8)
    with pytest.raises(RunError, match="num_iterations was 4 and is 8"):
        entered(tmp_path / "run", config=more)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == changed()
    _, state, _ = entered(tmp_path / "run", config=more, may_change=("num_iterations",))
    assert state.step == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == more


def test_a_state_of_another_shape_is_refused_and_the_fresh_one_kept(tmp_path):
    run_to(tmp_path / "run", 2)
    fresh = train_state(0, size=4)
    with pytest.raises(
        CheckpointError, match=r"params/dense: got float32\[3\], expected float32\[4\]|opt_state/mu: got"
    ):
        resume(tmp_path / "run", CONFIG, (), fresh, 9, 2)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(fresh))
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["2"]


# Rows that are written at once


def test_rows_are_written_as_one_by_one(tmp_path):
    rows = [{"a": 1, "text": "naïve 猫"}, {"a": float("nan"), "b": [np.float32(0.5)]}, {}]
    write_jsonl(tmp_path / "rows.jsonl", iter(rows))
    with JsonlWriter(tmp_path / "one_by_one.jsonl") as writer:
        for row in rows:
            writer.write(row)
    assert (tmp_path / "rows.jsonl").read_bytes() == (tmp_path / "one_by_one.jsonl").read_bytes()
    assert read_jsonl(tmp_path / "rows.jsonl") == [
        {"a": 1, "text": "naïve 猫"}, {"a": None, "b": [0.5]}, {}
    ]  # fmt: skip
    write_jsonl(tmp_path / "rows.jsonl", [])
    assert (tmp_path / "rows.jsonl").read_bytes() == b""


def test_rows_that_cannot_all_be_written_leave_the_old_ones(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])

    def broken():
        yield {"a": 2}
        raise RuntimeError("no more")

    for rows, error in ((broken(), RuntimeError), ([{"a": 2}, {"a": object()}], TypeError)):
        with pytest.raises(error):
            write_jsonl(tmp_path / "rows.jsonl", rows)
        assert read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_ends_a_run(loss):
    refuse_non_finite({"loss": 0.0}, "step 3", "lower config.lr")
    with pytest.raises(RunError, match=r"step 3: loss: got .*, expected a finite number: lower config.lr"):
        refuse_non_finite({"accuracy": 0.5, "loss": loss}, "step 3", "lower config.lr")


# Iterations that held something that is not finite


def broken_iteration(rng, step: int, scores: Scores):
    """(the state after an iteration, its experience, what the judges said)."""
    numbers = [jnp.asarray(rng.normal(size=(2, 3)), jnp.float32) for _ in range(4)]
    tokens, mask = jnp.asarray(rng.integers(0, 9, (2, 5)), jnp.int32), jnp.ones((2, 5), bool)
    return train_state(step), Experience(tokens, mask, *numbers, importance=jnp.full((2, 3), jnp.inf)), scores


def test_a_broken_iteration_is_kept_whole(tmp_path, rng):
    scores = Scores(jnp.array([jnp.nan, 1.0]), tokens=jnp.zeros((2, 3)), parts={"taste": jnp.array([jnp.nan, 2.0])})
    state, experience, _ = broken_iteration(rng, 8, scores)
    folder = save_broken(tmp_path, state, experience, scores)
    assert folder == tmp_path / "broken" / "000007"  # the iteration, counted from 0
    with np.load(folder / "batch.npz") as saved:
        kept = dict(saved)
    there = "tokens mask logprobs values advantages returns importance".split()
    assert set(kept) >= {*there, "scores_total", "scores_tokens"}
    assert not {"ref_logprobs", "ref_hidden", "scores_greedy"} & set(kept)  # there were none
    for name in there:
        np.testing.assert_array_equal(kept[name], getattr(experience, name))
    np.testing.assert_array_equal(kept["scores_total"], scores.total)
    checkpoints = Checkpointer(folder / "state")
    restored = checkpoints.restore(train_state(0))
    checkpoints.close()
    chex.assert_trees_all_equal(restored.replace(key=0), state.replace(key=0))


def test_the_newest_broken_iterations_stay(tmp_path, rng):
    for step in (1, 5, 12, 30):
        save_broken(tmp_path, *broken_iteration(rng, step, Scores(jnp.ones(2))), most=2)
    assert sorted(os.listdir(tmp_path / "broken")) == ["000011", "000029"]
    # The same one again, after a restart, say: it stays, and so does the other.
    save_broken(tmp_path, *broken_iteration(rng, 30, Scores(jnp.zeros(2))), most=2)
    assert sorted(os.listdir(tmp_path / "broken")) == ["000011", "000029"]
    with np.load(tmp_path / "broken" / "000029" / "batch.npz") as saved:
        np.testing.assert_array_equal(saved["scores_total"], [0, 0])
