"""The scripts from their command line to their last file, with a tiny model; and every kind of input that they refuse.

In this process, one device. What a real process adds (a kill, a second start) is in test_resume.py.
"""

import importlib
import json
import math
import os
import struct

import folders
import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments import train_ppo
from experiments.settings import PPOExperiment
from ppo_jax import hub
from ppo_jax.metrics import read_jsonl
from ppo_jax.tokenizers import load_tokenizer

PREPARE = folders.remember_programs(train_ppo.prepare)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return folders.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def start(monkeypatch, capsys):
    """Runs the command line of `train_ppo.py`, with programs that are compiled once."""
    monkeypatch.setattr(train_ppo, "prepare", PREPARE)
    return lambda *arguments: folders.call_script(train_ppo, PPOExperiment, arguments, capsys)


# A whole run

FILES = {
    "config.json", "metrics.jsonl", "samples.jsonl", "responses.jsonl", "results.json", "results.md", "curves.png",
    "checkpoints", "tensorboard", "policy", "scores.jsonl", ".lock",
}  # fmt: skip
METRICS = (
    "objective: score score_se score_std kl kl_se entropy length eos_frac kl_coef reward ref_nll score_length_corr",
    "advantage: mean std",
    "policy: loss approx_kl clip_frac ratio_max ratio_min first_ratio_dev first_approx_kl entropy updates",
    "guard: first_broken skipped",
    "value: loss clip_frac explained_var mean",
    "optim: lr grad_norm",
    "time: iteration_s tokens_per_s",
)


def metric_names(reward: str) -> set[str]:
    time = "time: program_s" if reward.startswith("score_") else "time: generate_s score_s learn_s"
    groups = [line.split(": ") for line in (*METRICS, time)]
    return {f"{group}/{name}" for group, names in groups for name in names.split()}


@pytest.mark.parametrize("reward", ["count_good", "score_good"])
def test_a_run_leaves_what_it_promises(world, tmp_path, start, reward):
    """The same judge as a Python function and as JAX."""
    workdir = tmp_path / "deep" / "run"
    outcome = start(*world.flags(f"--workdir={workdir}", reward=reward))
    assert (outcome.status, outcome.err) == (0, "")
    assert set(os.listdir(workdir)) == (FILES if reward == "count_good" else FILES - {"scores.jsonl"})
    check_terminal(outcome.out, workdir)
    config = json.loads((workdir / "config.json").read_text())
    assert (config["model"], config["ppo"]["batch_size"], config["seed"]) == (str(world.model), 8, 0)
    check_metrics(read_jsonl(workdir / "metrics.jsonl"), metric_names(reward))
    check_tensorboard(workdir)
    prompts = [row["prompt"] for row in read_jsonl(world.prompts)][:-1]  # the last one is too long
    check_samples(read_jsonl(workdir / "samples.jsonl"), prompts)
    check_results(workdir, prompts)
    check_policy(world, workdir)
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "4"]

    before = folders.contents(workdir)
    check_second_start(start, world, workdir, reward)
    check_refused_changes(start, world, workdir, reward)
    assert folders.contents(workdir) == before
    check_parts(start, world, workdir, tmp_path / "parts", reward)


def count_good(text: str) -> float:
    return sum(word in folders.GOOD for word in text.split()) / 4


def check_terminal(out: str, workdir) -> None:
    assert "prompts: 20 of at most 8 tokens (1 dropped, 0 cut)" in out
    for i in range(1, 5):
        assert f"iteration {i}/4  score " in out
    assert "tokens/s" in out
    assert "left " in out
    assert "| mean score |" in out
    assert str(workdir / "policy") in " ".join(out.split())
    assert (workdir / "results.md").read_text().strip() in out


def check_metrics(rows: list[dict], names: set[str]) -> None:
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert names <= row.keys(), names - row.keys()
        assert all(type(x) in (int, float) and math.isfinite(x) for x in row.values())
        # Before the first gradient step the policy that learns is the policy that acted, by another program.
        assert row["policy/first_ratio_dev"] <= 1e-4
        assert row["policy/first_approx_kl"] <= 1e-8
        assert (row["guard/first_broken"], row["guard/skipped"], row["policy/updates"]) == (-1, 0, 4)
        assert row["objective/kl_coef"] == pytest.approx(0.01)
        assert row["optim/lr"] == pytest.approx(0.01)
        assert 1 <= row["objective/length"] <= 6
        assert row["time/tokens_per_s"] == pytest.approx(row["objective/length"] * 8 / row["time/iteration_s"])
        parts = {x for x in row if x.startswith("time/")} - {"time/iteration_s", "time/tokens_per_s"}
        assert "time/host_s" in parts
        assert sum(row[part] for part in parts) == pytest.approx(row["time/iteration_s"])
    assert abs(rows[0]["objective/kl"]) < 1e-4  # the policy starts as the reference
    assert all(abs(row["objective/kl"]) > 1e-3 for row in rows[1:])
    assert rows[0]["objective/reward"] == pytest.approx(rows[0]["objective/score"], abs=1e-4)


def check_tensorboard(workdir) -> None:
    """One event a row, with the same numbers (in float32)."""
    event = importlib.import_module("tensorboardX.proto.event_pb2").Event
    (path,) = (workdir / "tensorboard").iterdir()
    data, offset, steps = path.read_bytes(), 0, {}
    while offset < len(data):  # a record: length, its checksum, data, checksum of the data
        (length,) = struct.unpack_from("<Q", data, offset)
        record = event.FromString(data[offset + 12 : offset + 12 + length])
        if record.HasField("summary"):
            steps[record.step] = {value.tag: value.simple_value for value in record.summary.value}
        offset += length + 16
    rows = {row.pop("iteration"): row for row in read_jsonl(workdir / "metrics.jsonl")}
    assert steps.keys() == rows.keys()
    for step, row in rows.items():
        assert steps[step] == {name: np.float32(x) for name, x in row.items()}


def check_samples(rows: list[dict], prompts: list[str]) -> None:
    # Every second iteration and the last one, two of each.
    assert [row["iteration"] for row in rows] == [0, 0, 2, 2, 3, 3]
    for row in rows:
        assert row.keys() == {"iteration", "prompt", "response", "score"}
        assert row["prompt"] in prompts
        assert row["score"] == count_good(row["response"])


def check_results(workdir, prompts: list[str]) -> None:
    results = json.loads((workdir / "results.json").read_text())
    rows = read_jsonl(workdir / "responses.jsonl")
    assert [row["prompt"] for row in rows] == prompts[:8]
    for when in ("before", "after"):
        scores = [count_good(row[when]) for row in rows]
        assert results[when]["num_responses"] == 8
        assert results[when]["score"] == pytest.approx(np.mean(scores), abs=1e-6)
        assert results[when]["score_std"] == pytest.approx(np.std(scores), abs=1e-6)
        assert all(math.isfinite(x) for x in results[when].values())
    assert abs(results["before"]["kl"]) < 1e-4
    assert abs(results["before"]["kl_exact"]) < 1e-4
    assert results["after"]["kl"] > 1e-2
    assert results["after"]["kl_exact"] > 1e-2
    assert results["samples"] == rows[:4]
    assert f"{results['after']['score']:.3f}" in (workdir / "results.md").read_text()


def check_policy(world, workdir) -> None:
    """What is exported is the decoder of the last checkpoint, with its tokenizer, and opens as the model itself did."""
    config = hub.load_config(workdir / "policy")
    assert config == hub.load_config(world.model)
    policy, start = hub.load_params(workdir / "policy", config), hub.load_params(world.model, config)
    state = folders.saved_state(workdir)
    assert int(state.step) == 4
    jax.tree.map(np.testing.assert_array_equal, policy, jax.device_get(state.params["decoder"]))
    assert all(np.abs(a - b).max() > 0 for a, b in zip(*map(jax.tree.leaves, (policy, start)), strict=True))
    head = hub.load_value_head(workdir / "policy")
    jax.tree.map(np.testing.assert_array_equal, head, jax.device_get(state.params["value_head"]))
    assert np.any(head["kernel"])
    old, new = load_tokenizer(world.model), load_tokenizer(workdir / "policy")
    assert new.get_vocab() == old.get_vocab()
    assert new("the cat")["input_ids"] == old("the cat")["input_ids"]
    assert hub.load_eos_ids(workdir / "policy") == (2,)


def check_second_start(start, world, workdir, reward: str) -> None:
    """A finished run says again what it has, and does nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("begin", "iterate", "finish"):
            patch.setattr(train_ppo, name, lambda *_: pytest.fail("it works again"))
        outcome = start(*world.flags(f"--workdir={workdir}", reward=reward))
    assert (outcome.status, outcome.err) == (0, "")
    assert (workdir / "results.md").read_text().strip() in outcome.out


def check_parts(start, world, whole, parts, reward: str) -> None:
    """Iteration 1, then 2 and 3, then 4: every bit of the state, every number and every text as in one run."""
    for iterations in (1, 3, 4):
        flags = world.flags(f"--workdir={parts}", f"--config.num_iterations={iterations}", reward=reward)
        assert start(*flags).status == 0
    assert folders.bits(folders.saved_state(parts)) == folders.bits(folders.saved_state(whole))
    assert folders.without_time(parts / "metrics.jsonl") == folders.without_time(whole / "metrics.jsonl")
    assert folders.contents(parts / "policy") == folders.contents(whole / "policy")
    for name in ("config.json", "samples.jsonl", "responses.jsonl", "results.json"):
        assert (parts / name).read_text() == (whole / name).read_text(), name


def check_refused_changes(start, world, workdir, reward: str) -> None:
    for change, told in {
        "--config.ppo.lr=0.1": "ppo.lr was 0.01 and is 0.1",
        "--config.seed=1": "seed was 0 and is 1",
        "--config.num_iterations=2": "num_iterations",  # fewer than are done
    }.items():
        outcome = start(*world.flags(f"--workdir={workdir}", change, reward=reward))
        assert told in outcome.error()
        assert str(workdir) in outcome.error()


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_ends_at_the_limit_of_its_kl_and_stays_ended(world, tmp_path, start, every):
    limit, run = 0.05, tmp_path / "run"
    changes = (f"--config.kl_limit={limit}", "--config.num_iterations=9", f"--config.checkpoint_every={every}")
    outcome = start(*world.flags(f"--workdir={run}", *changes))
    assert (outcome.status, outcome.err) == (0, "")
    assert "stopped: " in outcome.out
    rows = read_jsonl(run / "metrics.jsonl")
    assert len(rows) < 9
    assert [row["objective/kl"] > limit for row in rows] == [False] * (len(rows) - 1) + [True]
    # Iteration i acts with the policy of i updates: that of the last row is above the limit, and is not the result.
    results = json.loads((run / "results.json").read_text())
    assert results["iterations"] < rows[-1]["iteration"]
    assert results["after"]["kl"] <= limit
    before = folders.contents(run)
    assert start(*world.flags(f"--workdir={run}", *changes)).status == 0
    assert folders.contents(run) == before


# Input that is refused before the start: one line, status 1, and no workdir


def no_special(*names: str):
    return folders.word_tokenizer(special={f"{name}_token": folders.SPECIAL[f"{name}_token"] for name in names})


def write(path, content: str):
    path.write_text(content)
    return path


def pickles_only(root):
    folder = folders.make_folder(root / "pickles")
    (folder / "model.safetensors").unlink()
    # Opening it would write a file.
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + bytes(root / "it_ran") + b"'\ntR.")
    return folder


def cut_weights(root):
    folder = folders.make_folder(root / "cut")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    return folder


def without_tokenizer(root):
    folder = folders.make_folder(root / "bare")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return folder


def with_larger_tokenizer(root):
    """The prompts hold words that the model has no embeddings of."""
    small = folders.word_tokenizer(folders.WORDS[:10])
    return folders.make_folder(root / "larger", folders.word_tokenizer(), folders.llama_config(len(small)))


def with_pad_outside(root):
    """A pad token was added to the tokenizer, and the embeddings were not enlarged."""
    tokenizer = folders.word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return folders.make_folder(root / "outside", tokenizer, folders.llama_config(len(tokenizer) - 1))


def nan_weights(root):
    folder = folders.make_folder(root / "nan")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


LONG = '{"prompt": "the very old dog and the very old cat sat here"}\n'
REFUSED = {
    "no model": (lambda root: ["--config.model=./no_model"], ["no_model", "no such folder"]),
    "empty model": (lambda root: ["--config.model="], ["model ''"]),
    "no model on the hub": (lambda root: ["--config.model=nobody/nothing"], ["nobody/nothing", "hub"]),
    "model is a file": (lambda root: [f"--config.model={write(root / 'f', '')}"], ["is a file, expected a folder"]),
    "empty folder": (lambda root: [f"--config.model={root}"], ["config.json"]),
    "pickles only": (lambda root: [f"--config.model={pickles_only(root)}"], ["pickle", "refused"]),
    "cut weights": (lambda root: [f"--config.model={cut_weights(root)}"], ["model.safetensors"]),
    "NaN weights": (lambda root: [f"--config.model={nan_weights(root)}"], ["finite"]),
    "no prompts file": (lambda root: ["--config.prompts=nothing.jsonl"], ["nothing.jsonl", "no such file"]),
    "broken prompts": (
        lambda root: [f"--config.prompts={write(root / 'b.jsonl', LONG + '{')}"], ["b.jsonl:2: broken line"],
    ),
    "empty prompts": (lambda root: [f"--config.prompts={write(root / 'e.jsonl', '')}"], ["e.jsonl", "empty"]),
    "no prompt column": (
        lambda root: [f"--config.prompts={folders.write_jsonl(root / 'c.jsonl', [{'a': 1}])}"],
        ["c.jsonl", "row 1: got columns a, expected one of prompt"],
    ),
    "long prompts": (
        lambda root: [f"--config.prompts={write(root / 'l.jsonl', LONG * 3)}"],
        ["all 3 prompts are longer than prompt_length (8 tokens)"],
    ),
    "minibatches": (lambda root: ["--config.ppo.num_minibatches=3"], ["got 8, expected a multiple of num_minib"]),
    "mesh of minibatch": (lambda root: ["--config.mesh.data=8"], ["got 4, expected a multiple of", "(8)"]),
    "mesh": (lambda root: ["--config.mesh.tensor=64"], ["1 x 1 x 64", "expected at most 8 devices"]),
    "no mesh": (lambda root: ["--config.mesh.data=-1", "--config.mesh.fsdp=0"], ["fsdp"]),
    "positions": (lambda root: ["--config.ppo.response_length=25"], ["got 33, expected at most", "32 positions"]),
    "no end": (
        lambda root: [f"--config.model={folders.make_folder(root / 'no_end', no_special('pad', 'unk'), eos_ids=())}"],
        ["no EOS token", "config.eos_token"],
    ),
    "no pad": (
        lambda root: [f"--config.model={folders.make_folder(root / 'no_pad', no_special('eos'))}"],
        ["neither a pad nor an unknown token", "config.pad_token"],
    ),
    "unknown end": (lambda root: ["--config.eos_token=<end>"], ["config.eos_token: got '<end>'"]),
    "no tokenizer": (lambda root: [f"--config.model={without_tokenizer(root)}"], ["tokenizer: cannot load one from"]),
    "more tokens": (lambda root: [f"--config.model={with_larger_tokenizer(root)}"], ["token id", "vocabulary of 14"]),
    "pad outside": (lambda root: [f"--config.model={with_pad_outside(root)}"], ["token id 26", "vocabulary of 26"]),
    "no reward": (lambda root: ["--config.reward=vadre"], ["config.reward: got 'vadre', expected one of vader"]),
    "no reward file": (lambda root: ["--config.reward=no.py:judge"], ["there is no file no.py"]),
    "no reward function": (
        lambda root: [f"--config.reward={write(root / 'r.py', 'x = 1')}:judge"], ["has no function 'judge'"],
    ),
    "broken reward file": (
        lambda root: [f"--config.reward={write(root / 'r.py', 'def judge(:')}:judge"], ["r.py", "SyntaxError"],
    ),
    "unknown tracker": (lambda root: ["--config.trackers=wandbb"], ["wandbb", "wandb", "trackio"]),
    "missing tracker": (lambda root: ["--config.trackers=trackio"], ["trackio", "pip install trackio"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(world, tmp_path, start, name):
    if name == "missing tracker" and importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    make, told = REFUSED[name]
    (tmp_path / "given").mkdir()
    workdir = tmp_path / "run"
    outcome = start(*world.flags(f"--workdir={workdir}", *make(tmp_path / "given")))
    error = outcome.error()
    for words in told:
        assert words in error
    assert not workdir.exists()
    assert not (tmp_path / "given" / "it_ran").exists()


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"thesis.tex": ""}, "holds files but no config.json"),
        ({"config.json": "{"}, "damaged"),
        ({"config.json": "{}"}, "another"),
    ],
    ids=["foreign", "damaged", "another"],
)
def test_a_folder_of_something_else_is_left_as_it_is(world, tmp_path, start, files, told):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    before = folders.contents(tmp_path)
    assert told in start(*world.flags(f"--workdir={tmp_path}")).error()
    assert folders.contents(tmp_path) == before


def test_a_workdir_that_is_a_file_is_refused(world, tmp_path, start):
    (tmp_path / "run").write_text("")
    assert "it is a file, expected a folder" in start(*world.flags(f"--workdir={tmp_path / 'run'}")).error()
    assert "run" in start(*world.flags(f"--workdir={tmp_path / 'run' / 'deeper'}")).error()


# Rewards that fail once the run goes


@pytest.mark.parametrize(
    ("reward", "told", "named"),
    [
        ("nan_at_dog", "got nan for ", "dog"),
        ("too_few", "got 7 scores, expected 8, one a prompt", ""),
        ("raises", "RuntimeError: the judge", ""),
    ],
)
def test_a_reward_that_fails_ends_the_run_with_its_prompts(world, tmp_path, start, reward, told, named):
    outcome = start(*world.flags(f"--workdir={tmp_path / 'run'}", reward=reward))
    error = outcome.error()
    assert f"reward {reward}: {told}" in error
    prompts = error.partition("prompts: ")[2]
    assert "'" in prompts
    assert named in prompts
    assert named != "dog" or "cat" not in prompts
    # Nothing of an iteration that did not end.
    assert not (tmp_path / "run" / "policy").exists()
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == []
    assert os.listdir(tmp_path / "run" / "checkpoints") == []


BROKEN_SCORES = {
    "raises": "raise RuntimeError('no score')",
    "wrong shape": "return lambda rollout: jnp.zeros(3)",
    "one number": "return lambda rollout: 0.0",
    "per token, of the prompt too": "return lambda rollout: rollout.tokens * 1.0",
    "on the host": "return lambda rollout: float(rollout.tokens[0, 0])",
    "no score": "return None",
}


@pytest.mark.parametrize("name", BROKEN_SCORES)
def test_a_score_in_jax_that_cannot_be_compiled_is_refused(world, tmp_path, start, name):
    path = write(
        tmp_path / "broken.py", f"import jax.numpy as jnp\n\ndef make(tokenizer):\n    {BROKEN_SCORES[name]}\n"
    )
    error = start(*world.flags(f"--workdir={tmp_path / 'run'}", f"--config.reward=jax:{path}:make")).error()
    assert "config.reward" in error
    assert "broken.py:make" in error
    assert not (tmp_path / "run").exists()


SOMETIMES = """
from pathlib import Path

CALLS = Path(__file__).with_name("calls")


def judge(prompts, completions, **columns):
    number = len(CALLS.read_text()) if CALLS.exists() else 0
    CALLS.write_text("x" * (number + 1))
    if number == 3:
        raise ConnectionError("the judge is offline")
    return [sum(word in ("good", "fine", "great", "kind") for word in text.split()) / 4 for text in completions]
"""


def test_a_run_goes_on_once_its_reward_works_again(world, tmp_path, start):
    """It failed in iteration 3, after the checkpoint of iteration 2: nothing is doubled, nothing lost."""
    reward = f"--config.reward={write(tmp_path / 'sometimes.py', SOMETIMES)}:judge"
    flags = world.flags(f"--workdir={tmp_path / 'run'}", "--config.checkpoint_every=2", reward)
    assert "ConnectionError: the judge is offline" in start(*flags).error()
    assert [row["iteration"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    assert start(*flags).status == 0
    assert start(*world.flags(f"--workdir={tmp_path / 'whole'}")).status == 0
    whole, resumed = (folders.without_time(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    assert resumed == whole
    assert folders.contents(tmp_path / "run" / "policy") == folders.contents(tmp_path / "whole" / "policy")


# Going further than planned


def test_more_iterations_than_planned_renew_the_results_even_after_a_crash(world, tmp_path, start, monkeypatch):
    """2 iterations, then 4, ended before their results are written: the results of the first 2 must not stay."""
    flags = world.flags(f"--workdir={tmp_path / 'run'}", "--config.samples_every=1")
    assert start(*flags, "--config.num_iterations=2").status == 0
    finish = train_ppo.finish

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_ppo, "finish", crash)
    assert start(*flags).status == 130
    monkeypatch.setattr(train_ppo, "finish", finish)
    assert start(*flags).status == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["iterations"] == 4
    check_policy(world, tmp_path / "run")
    assert start(*world.flags(f"--workdir={tmp_path / 'whole'}", "--config.samples_every=1")).status == 0
    for name in ("samples.jsonl", "responses.jsonl", "results.json"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_schedule_that_ends_cannot_be_lengthened(world, tmp_path, start):
    """The rate of every step would have been another."""
    flags = world.flags(f"--workdir={tmp_path / 'run'}", "--config.ppo.lr_schedule=linear")
    with pytest.MonkeyPatch.context() as patch:  # ended in its first iteration
        patch.setattr(train_ppo, "iterate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert start(*flags, "--config.num_iterations=3").status == 130
    assert "num_iterations was 3 and is 4" in start(*flags).error()


# Plans


def test_a_dry_run_prints_costs_and_writes_nothing(world, tmp_path, start, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = start(*world.flags("--dry_run", f"--workdir={tmp_path / 'run'}"))
    assert (outcome.status, outcome.err) == (0, "")
    assert not os.listdir(tmp_path)
    for name in ("act", "learn", "arguments_mb", "outputs_mb", "temporaries_mb", "donated_mb", "peak_mb", "gflops"):
        assert name in outcome.out.split()
    numbers = [float(word.replace(",", "")) for word in outcome.out.split() if word[0].isdigit()]
    assert len(numbers) >= 6
    assert all(map(math.isfinite, numbers))


def test_a_dry_run_refuses_bad_input_too(world, start):
    assert "no such folder" in start(*world.flags("--dry_run", "--config.model=./no_model")).error()
