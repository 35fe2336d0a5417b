"""Iterations that hold something that is not finite: they are named, counted and kept, nothing is learned from them,
and `experiments/replay.py` shows what they held.
"""

import contextlib
import io
import os
import re

import folders
import jax
import numpy as np
import pytest

from experiments import replay, train_ppo
from experiments.settings import PPOExperiment
from ppo_jax.checkpoint import Checkpointer
from ppo_jax.data import batch_indices
from ppo_jax.errors import InputError
from ppo_jax.metrics import read_jsonl

ITERATIONS = 6
UNJUDGED = 19  # number of "the very old dog here", the only prompt with both of the words below
REWARD = """
import jax.numpy as jnp


def all_but_one(tokenizer):
    ids = [tokenizer.encode(" " + word, add_special_tokens=False)[0] for word in ("very", "here", "good")]

    def score(rollout):
        prompt = rollout.tokens[:, :8]
        unjudged = jnp.any(prompt == ids[0], axis=1) & jnp.any(prompt == ids[1], axis=1)
        good = jnp.sum((rollout.response_tokens == ids[2]) & rollout.response_mask, axis=1)
        return jnp.where(unjudged, jnp.nan, good + rollout.response_mask.sum(axis=1) / 6.0)

    return score
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return folders.make_world(tmp_path_factory.mktemp("world"))


class Broken:
    """A run in some of whose iterations the judge said NaN."""

    def __init__(self, world, workdir):
        judge = world.root / "all_but_one.py"
        judge.write_text(REWARD)
        flags = world.flags(
            f"--config.reward=jax:{judge}:all_but_one", f"--config.num_iterations={ITERATIONS}",
            "--config.samples_every=1", "--config.num_samples=8", "--config.checkpoint_every=1",
            "--config.checkpoints_to_keep=9", f"--workdir={workdir}",
        )  # fmt: skip
        self.workdir = workdir
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.status = folders.call_script(train_ppo, PPOExperiment, flags, Uncaptured()).status
        self.out = " ".join(out.getvalue().split())
        rows = [batch_indices(20, 8, i, seed=0).tolist() for i in range(ITERATIONS)]
        self.places = {i: [j for j, row in enumerate(rows[i]) if row == UNJUDGED] for i in range(ITERATIONS)}
        self.iterations = [i for i, places in self.places.items() if places]


@pytest.fixture(scope="module")
def broken(world, tmp_path_factory):
    """Read by tests, changed by none."""
    return Broken(world, tmp_path_factory.mktemp("broken") / "run")


class Uncaptured:
    """In the place of pytest's capsys, which a module's fixture cannot have."""

    def readouterr(self):
        return "", ""


def test_what_is_broken_is_counted_and_kept_and_the_run_goes_on(broken):
    assert broken.status == 0
    assert 1 < len(broken.iterations) <= 3, "the prompt comes by once in 20"
    rows = read_jsonl(broken.workdir / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(ITERATIONS))
    for i, row in enumerate(rows):
        is_broken = i in broken.iterations
        assert (row["objective/score"] is None) == is_broken  # NaN has no JSON
        # The scores are the first quantity of all; 2 epochs of 2 minibatches.
        assert row["guard/first_broken"] == (0 if is_broken else -1)
        assert (row["guard/skipped"], row["policy/updates"]) == ((4, 0) if is_broken else (0, 4))
    told = re.findall(r"iteration (\d+): (.*?) is not finite; (\d+) updates were skipped; kept in", broken.out)
    assert told == [(str(i), "score", "4") for i in broken.iterations]
    assert sorted(os.listdir(broken.workdir / "broken")) == [f"{i:06d}" for i in broken.iterations]
    assert {"policy", "results.json", "curves.png"} <= set(os.listdir(broken.workdir))


def test_nothing_is_learned_from_what_is_broken(broken):
    """The states before and after each iteration; only what counts may differ where it was broken."""
    checkpoints = Checkpointer(broken.workdir / "checkpoints")
    like = train_ppo.prepare(folders.settings_of(broken.workdir)).state
    saved = {i: folders.bits(checkpoints.restore(like, before=i + 1)) for i in range(1, ITERATIONS + 1)}
    checkpoints.close()
    saved[0] = folders.bits(like)
    for i in range(ITERATIONS):
        differing = {name for name in saved[0] if saved[i][name] != saved[i + 1][name]}
        if i in broken.iterations:
            assert differing == {".step", ".running.skipped"}
        else:
            # A projection, a moment of it, and what follows a broken iteration: the count is back at 0.
            assert sum(name.startswith(".params") for name in differing) == len(jax.tree.leaves(like.params))
            assert any(name.startswith(".opt_state") for name in differing)
            assert (".running.skipped" in differing) == (i - 1 in broken.iterations)


def test_replay_shows_the_quantity_and_the_responses(broken, capsys):
    for i in broken.iterations:
        _, state, experience, scores = replay.load(broken.workdir, i)
        assert int(state.step) == i + 1
        looked = {row["quantity"]: row for row in replay.look(experience, scores)}
        assert list(looked) == ["score", "logprobs", "values", "advantages", "returns"]
        assert looked["score"]["responses"] == broken.places[i]
        assert looked["score"]["broken"] == len(broken.places[i])
        fine = np.delete(np.asarray(scores.total), broken.places[i])
        assert (looked["score"]["least"], looked["score"]["most"]) == (fine.min(), fine.max())
        assert looked["logprobs"]["broken"] == looked["values"]["broken"] == 0
        assert looked["logprobs"]["most"] <= 0
        mask = np.asarray(experience.response_mask)
        assert looked["advantages"]["broken"] == mask.sum()  # whitened over the batch
        assert looked["advantages"]["responses"] == np.flatnonzero(mask.any(axis=1)).tolist()
        assert looked["advantages"]["least"] is None


def test_replay_prints_what_it_found(broken, capsys):
    iteration = broken.iterations[0]
    replay.main([str(broken.workdir), str(iteration)])
    out, err = capsys.readouterr()
    assert err == ""
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith(f"score {len(broken.places[iteration])} {broken.places[iteration]}") for line in lines)
    assert any(line.startswith("logprobs 0 [] ") for line in lines)
    said = [row["response"] for row in read_jsonl(broken.workdir / "samples.jsonl") if row["iteration"] == iteration]
    shown = dict(re.findall(r"^response (\d+): (.*)$", out, re.MULTILINE))
    assert shown
    assert all(text == repr(said[int(i)]) for i, text in shown.items())
    told = re.findall(r"^minibatch (\d): loss and gradient: (\d+) not finite, the first is: (.*)$", out, re.MULTILINE)
    assert [(i, name) for i, _, name in told] == [("0", "loss"), ("1", "loss")]
    assert all(int(number) > 5 for _, number, _ in told)  # the loss, and the gradients


def test_an_iteration_that_was_not_kept_is_one_line(broken, tmp_path):
    kept = ", ".join(f"{i:06d}" for i in broken.iterations)
    error = folders.run_script("replay.py", [broken.workdir, 99]).error()
    assert f"000099: no such iteration was kept, expected one of {kept}" in error
    for arguments, told in (
        ([str(tmp_path / "nowhere"), "1"], r"nowhere.*no such iteration was kept, expected one of \(there is none\)"),
        ([str(broken.workdir)], "expected WORKDIR ITERATION"),
        ([str(broken.workdir), "-1"], "expected WORKDIR ITERATION"),
        ([str(broken.workdir), "1", "2"], "expected WORKDIR ITERATION"),
    ):
        with pytest.raises(InputError, match=told):
            replay.main(arguments)


def test_too_many_in_a_row_end_the_run(world, tmp_path, capsys, monkeypatch):
    """At the second one, and again at the second start: nothing that was saved stands in its way."""
    monkeypatch.setattr(train_ppo, "prepare", folders.remember_programs(train_ppo.prepare))
    run = tmp_path / "run"
    changes = ("--config.ppo.max_skipped=1", "--config.checkpoint_every=1", f"--workdir={run}")
    for _ in range(2):
        error = folders.call_script(train_ppo, PPOExperiment, world.flags(*changes, reward="score_nan"), capsys).error()
        assert "iteration 1: score is not finite; 4 updates were skipped, as in the 1 iterations before it" in error
        assert "config.ppo.lr" in error
        assert f"{run / 'broken' / '000001'} for experiments/replay.py" in error
        assert [row["iteration"] for row in read_jsonl(run / "metrics.jsonl")] == [0]
        assert os.listdir(run / "checkpoints") == ["1"]
        assert sorted(os.listdir(run / "broken")) == ["000000", "000001"]
        assert not (run / "policy").exists()


def test_scores_of_the_reference_that_are_not_finite_end_the_run_before_it_begins(world, tmp_path, capsys):
    """They would be the unit of every later score."""
    given = world.flags("--config.ppo.score_scale=reference", f"--workdir={tmp_path / 'run'}", reward="score_nan")
    error = folders.call_script(train_ppo, PPOExperiment, given, capsys).error()
    assert "config.reward: squared deviations: got nan, expected finite scores of the reference's own" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
