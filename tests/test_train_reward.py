"""`train_reward.py` with a tiny model, from its command line to its last file: pairs, rankings, choices and scores; its
results against what the saved model says; kills; input that is refused.
"""

import json
import math
import os
import signal
import time

import folders
import jax
import numpy as np
import pytest
import scipy.stats

from experiments import train_reward
from experiments.settings import RewardExperiment
from ppo_jax import hub
from ppo_jax.comparisons import JudgedSet
from ppo_jax.metrics import read_jsonl
from ppo_jax.preferences import read_judged
from ppo_jax.rewards import load_host_reward
from ppo_jax.tokenizers import load_tokenizer, special_tokens

CONFIG = folders.ROOT / "experiments" / "configs" / "reward.py"
FILES = {
    "config.json", "metrics.jsonl", "normalization.json", "results.json", "curves.png", "reliability.png",
    "checkpoints", "tensorboard", "model", ".lock",
}  # fmt: skip
KEYS = {
    "steps", "heldout/loss", "accuracy", "accuracy_low", "accuracy_high", "ece", "reliability", "accuracy_by_margin",
    "length_correlation", "normalization",
}  # fmt: skip
NEUTRAL = ("the", "a", "cat", "dog", "old", "film", "and", "very")


def response(rng, kind) -> str:
    """Some neutral words and one that praises or blames."""
    words = [*rng.choice(NEUTRAL, rng.integers(1, 4)), *rng.choice(kind, 1)]
    return "".join(" " + word for word in rng.permutation(words))


def pairs(rng, num: int = 80):
    prompts = folders.prompt_rows()
    sides = [{"chosen": response(rng, folders.GOOD), "rejected": response(rng, folders.BAD)} for _ in range(num)]
    return [{"prompt": prompts[i % 20]["prompt"], **row} for i, row in enumerate(sides)]


def lists(rng, num: int = 40):
    """Of three and four responses, the best of which praises and the worst of which blames."""
    rows = []
    for i in range(num):
        kinds = [folders.GOOD, NEUTRAL, NEUTRAL, folders.BAD][: 3 + i % 2]
        rows.append({"prompt": folders.prompt_rows()[i % 20]["prompt"], "kinds": kinds})
        rows[-1]["completions"] = list(dict.fromkeys(response(rng, kind) for kind in rows[-1].pop("kinds")))
    return rows


def data_of(rng, kind: str):
    if kind == "pairs":
        return pairs(rng)
    if kind == "rankings":
        return [row | {"ranks": list(range(1, len(row["completions"]) + 1))} for row in lists(rng)]
    if kind == "choices":
        return [row | {"choice": 0} for row in lists(rng)]
    return [
        {"prompt": row["prompt"], "completion": row[side], "score": score}
        for row in pairs(rng)
        for side, score in (("chosen", 1.5), ("rejected", -0.5))
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A language model and pairs."""
    root = tmp_path_factory.mktemp("world")
    folders.make_folder(root / "model")
    folders.write_jsonl(root / "pairs.jsonl", pairs(np.random.default_rng(0)))
    return root


def flags(world, workdir, *changes: str, data="pairs.jsonl") -> list[str]:
    fields = {
        "model": world / "model", "data": world / data, "length": 16, "heldout_frac": 0.25, "batch_size": 8,
        "num_epochs": 4, "lr": 0.01, "lr_schedule": "constant", "warmup_steps": 2, "log_every": 5, "eval_every": 10,
        "checkpoint_every": 8, "mesh.data": 1, "reference": "", "reference_samples": 24, "response_length": 6,
    }  # fmt: skip
    flags = [f"--config={CONFIG}", f"--workdir={workdir}"]
    return [*flags, *(f"--config.{name}={value}" for name, value in fields.items()), *changes]


KNOWN: dict = {}


def prepare(settings, original=train_reward.prepare):
    """The programs of the same model and optimizer are compiled once for all runs."""
    setup = original(settings)
    key = (setup.model, settings.mesh, settings.lr, settings.warmup_steps, settings.max_grad_norm)
    key += (settings.weight_decay, settings.center_coef, settings.lr_schedule == "constant" or setup.num_steps)
    return setup._replace(step=KNOWN.setdefault(key, setup.step))


@pytest.fixture
def start(monkeypatch, capsys):
    monkeypatch.setattr(train_reward, "prepare", prepare)
    return lambda arguments: folders.call_script(train_reward, RewardExperiment, arguments, capsys)


def done(outcome):
    assert (outcome.status, outcome.err) == (0, "")
    return outcome


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


# Whole runs


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A finished run on pairs, and what it printed; tests leave it as it is."""
    workdir = tmp_path_factory.mktemp("trained") / "deep" / "run"
    outcome = folders.run_script("train_reward.py", flags(world, workdir))
    return workdir, done(outcome)


def test_a_run_leaves_what_it_promises(world, trained):
    workdir, outcome = trained
    assert set(os.listdir(workdir)) == FILES
    assert "60 comparisons of at most 2 texts (0 too long and 0 tied left out), 20 held out" in outcome.out
    assert "held-out accuracy: " in outcome.out
    assert str(workdir / "model") in outcome.out
    config = json.loads((workdir / "config.json").read_text())
    assert (config["model"], config["batch_size"], config["mesh"]["data"]) == (str(world / "model"), 8, 1)
    rows = read_jsonl(workdir / "metrics.jsonl")  # 4 x 60 / 8 = 30 steps; rows each 5, 8 (checkpoints), 10 and the last
    assert [row["iteration"] + 1 for row in rows] == [5, 8, 10, 15, 16, 20, 24, 25, 30]
    assert all(type(x) in (int, float) and math.isfinite(x) for row in rows for x in row.values())
    names = {"iteration", "reward/loss", "reward/accuracy", "optim/grad_norm", "optim/lr", "time/step_s"}
    heldout = {"heldout/loss", "heldout/accuracy"}
    for row in rows:
        assert row.keys() == names | (heldout if (row["iteration"] + 1) % 10 == 0 else set())
        assert row["optim/lr"] == pytest.approx(0.01)
    assert rows[-1]["heldout/loss"] < math.log(2)
    assert sorted(os.listdir(workdir / "checkpoints"), key=int) == ["24", "30"]
    for name in ("curves.png", "reliability.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def heldout_pairs(world):
    """The prompts of the last quarter of the 20: 15 to 19."""
    rows = read_jsonl(world / "pairs.jsonl")
    kept = [row["prompt"] for row in folders.prompt_rows()][15:]
    return [row for row in rows if row["prompt"] in kept]


def test_results_are_what_the_saved_model_says(world, trained):
    workdir, _ = trained
    results, rows = results_of(workdir), heldout_pairs(world)
    assert results.keys() == KEYS | {"heldout/accuracy"}
    assert results["steps"] == 30
    judge = load_host_reward(f"model:{workdir / 'model'}")
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (np.array(judge(prompts, [row[side] for row in rows])) for side in ("chosen", "rejected"))
    right = float(np.mean(chosen > rejected))
    assert results["accuracy"] == pytest.approx(right)
    assert right > 0.8, "it is to learn what was planted"
    assert results["accuracy_low"] < right <= results["accuracy_high"] <= 1
    assert results["heldout/accuracy"] == pytest.approx(read_jsonl(workdir / "metrics.jsonl")[-1]["heldout/accuracy"])
    # Calibration is of the scores as they were trained; their spread was another (`normalization`).
    reliability, margins = results["reliability"], results["accuracy_by_margin"]
    assert sum(row["count"] for row in reliability) == sum(row["count"] for row in margins) == 20
    assert all(row.keys() == {"confidence", "accuracy", "count"} for row in reliability)
    assert all(row.keys() == {"low", "high", "accuracy", "count"} for row in margins)
    overall = sum(row["accuracy"] * row["count"] for row in margins) / 20
    assert overall == pytest.approx(right)
    gap = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in reliability) / 20
    assert results["ece"] == pytest.approx(gap)
    # Lengths of the responses, in tokens.
    scores = np.concatenate([chosen, rejected])
    lengths = [len(row[side].split()) for side in ("chosen", "rejected") for row in rows]
    assert results["length_correlation"]["pearson"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1], abs=1e-4)
    assert results["length_correlation"]["spearman"] == pytest.approx(
        scipy.stats.spearmanr(scores, lengths).statistic, abs=1e-2
    )


def test_the_saved_model_scores_the_reference_samples_with_mean_zero_and_deviation_one(world, trained):
    """Without a reference those are the first responses of the data, in order."""
    workdir, _ = trained
    kept = [row["prompt"] for row in folders.prompt_rows()][:15]
    rows = [row for row in read_jsonl(world / "pairs.jsonl") if row["prompt"] in kept][:12]
    texts = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    scores = np.array(load_host_reward(f"model:{workdir / 'model'}")(*zip(*texts, strict=True)))
    assert len(scores) == 24
    assert abs(scores.mean()) < 1e-4
    assert abs(scores.std() - 1) < 1e-4
    normalization = results_of(workdir)["normalization"]
    assert normalization.keys() == {"before", "after"}
    assert normalization["before"] == json.loads((workdir / "normalization.json").read_text())
    for numbers in normalization.values():
        assert numbers.keys() == {"mean", "std"}
        assert numbers["std"] > 0
    assert normalization["after"]["std"] > 1, "training went apart from where it was normalised"


def test_the_folder_is_a_reward_model_with_the_tokenizer_of_the_language_model(world, trained):
    workdir, _ = trained
    _, params = hub.load_reward_model(workdir / "model")
    start = hub.load_params(world / "model", hub.load_config(world / "model"))
    assert params.keys() == {"decoder", "score_head"}
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params["decoder"], {k: start[k] for k in params["decoder"]})
    assert min(jax.tree.leaves(moved)) > 0
    tokenizer = load_tokenizer(workdir / "model")
    assert tokenizer("the cat")["input_ids"] == load_tokenizer(world / "model")("the cat")["input_ids"]
    assert (hub.load_eos_ids(workdir / "model"), hub.load_pad_id(workdir / "model")) == ((2,), 0)


def test_a_finished_run_does_nothing_and_says_it_again(world, trained, start, monkeypatch):
    workdir, outcome = trained
    before = folders.contents(workdir)
    for name in ("finish", "normalize", "reference_samples"):
        monkeypatch.setattr(train_reward, name, lambda *_: pytest.fail("it works again"))
    again = done(start(flags(world, workdir)))
    assert "held-out accuracy" in again.out
    assert outcome.out.splitlines()[-1] in again.out
    for change, told in {
        "--config.lr=0.1": "lr was 0.01 and is 0.1",
        "--config.seed=1": "seed was 0 and is 1",
        "--config.num_epochs=5": "num_epochs was 4 and is 5",
    }.items():
        assert told in start(flags(world, workdir, change)).error()
    assert folders.contents(workdir) == before


def test_in_parts_it_is_the_same_run_bit_for_bit(world, trained, tmp_path, start, monkeypatch):
    """Ended in the middle of a step, twice, and before its results."""
    whole, parts = trained[0], tmp_path / "parts"
    save, saves = train_reward.Reporter.update, []

    def interrupted(self, number, row):
        save(self, number, row)
        saves.append(number)
        if number + 1 in (10, 25) and saves.count(number) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_reward.Reporter, "update", interrupted)
    for _ in range(2):
        assert start(flags(world, parts)).status == 130
    finish = train_reward.finish
    monkeypatch.setattr(train_reward, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert start(flags(world, parts)).status == 130
    assert not (parts / "results.json").exists()
    monkeypatch.setattr(train_reward, "finish", finish)
    done(start(flags(world, parts)))
    check_same_run(parts, whole)


def check_same_run(ours, theirs) -> None:
    assert folders.without_time(ours / "metrics.jsonl") == folders.without_time(theirs / "metrics.jsonl")
    assert folders.contents(ours / "model") == folders.contents(theirs / "model")
    for name in ("config.json", "normalization.json", "results.json", "reliability.png"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert set(os.listdir(ours)) == set(os.listdir(theirs))
    assert sorted(os.listdir(ours / "checkpoints")) == sorted(os.listdir(theirs / "checkpoints"))


@pytest.mark.parametrize("kind", ["rankings", "choices", "scores"])
def test_every_kind_of_judgement_trains(world, tmp_path, start, rng, kind):
    data = folders.write_jsonl(tmp_path / "data.jsonl", data_of(rng, kind))
    outcome = done(start(flags(world, tmp_path / "run", "--config.num_epochs=6", data=data)))
    results, rows = results_of(tmp_path / "run"), read_jsonl(tmp_path / "run" / "metrics.jsonl")
    if kind == "scores":
        assert set(os.listdir(tmp_path / "run")) == FILES - {"reliability.png"}
        assert results.keys() == KEYS | {"heldout/rmse"}
        assert [results[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "ece")] == [None] * 4
        assert results["reliability"] == results["accuracy_by_margin"] == []
        assert results["heldout/rmse"] < 1, "1 is the root mean square error of the mean"
        assert f"held-out rmse: {results['heldout/rmse']:.3f}" in outcome.out
        assert "120 ratings" in outcome.out
        assert results["heldout/loss"] == pytest.approx(results["heldout/rmse"] ** 2 / 2, rel=1e-5)
    else:
        assert set(os.listdir(tmp_path / "run")) == FILES
        assert results.keys() == KEYS | {"heldout/accuracy"}
        assert "30 comparisons of at most 4 texts" in outcome.out
        # All strictly ordered pairs of those held out: of a choice the best and each other.
        heldout = [
            one for one in read_judged(str(data)) if one.prompt in [p["prompt"] for p in folders.prompt_rows()][15:]
        ]
        num = sum(a < b for one in heldout for a in one.ranks for b in one.ranks)
        assert sum(row["count"] for row in results["reliability"]) == num
        assert results["accuracy"] == pytest.approx(results["heldout/accuracy"], abs=0.1)
        assert results["accuracy"] > 0.55
    assert rows[-1]["heldout/loss"] == pytest.approx(results["heldout/loss"])
    assert results["steps"] == rows[-1]["iteration"] + 1


def test_samples_of_a_reference_normalise(world, tmp_path, start):
    """They are drawn once, from the reference's answers to the data's prompts, and read again after an interruption."""
    run = tmp_path / "run"
    arguments = flags(world, run, f"--config.reference={world / 'model'}", "--config.num_epochs=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_reward, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert start(arguments).status == 130
    samples = read_jsonl(run / "reference_samples.jsonl")
    assert len(samples) == 24
    prompts = [row["prompt"] for row in folders.prompt_rows()][:15]
    assert [row["prompt"] for row in samples] == [prompts[i % 15] for i in range(24)]
    assert len({row["completion"] for row in samples}) > 12
    assert all(len(row["completion"].split()) <= 6 for row in samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_reward, "sample_reference", lambda *_: pytest.fail("it samples again"))
        done(start(arguments))
    assert set(os.listdir(run)) == FILES | {"reference_samples.jsonl"}
    judge = load_host_reward(f"model:{run / 'model'}")
    scores = np.array(judge([row["prompt"] for row in samples], [row["completion"] for row in samples]))
    assert abs(scores.mean()) < 1e-4
    assert abs(scores.std() - 1) < 1e-4


def test_a_reference_pads_and_ends_as_the_settings_say(tmp_path, start, rng):
    """A tokenizer without a pad token, which a setting names."""
    tokenizer = folders.word_tokenizer(special={"bos_token": "<s>", "eos_token": "</s>"})
    config = folders.llama_config(26)
    hub.save(tmp_path / "model", folders.random_params(config), config, tokenizer)
    folders.write_jsonl(tmp_path / "pairs.jsonl", pairs(rng, 24))
    changes = (f"--config.reference={tmp_path / 'model'}", "--config.pad_token=<pad>", "--config.num_epochs=1")
    done(start(flags(tmp_path, tmp_path / "run", *changes)))
    assert len(read_jsonl(tmp_path / "run" / "reference_samples.jsonl")) == 24


def test_without_normalisation_the_scores_stay_as_they_were_trained(world, tmp_path, start):
    arguments = flags(world, tmp_path / "run", "--config.normalize=false", "--config.num_epochs=1")
    done(start(arguments))
    assert set(os.listdir(tmp_path / "run")) == FILES - {"normalization.json"}
    results = results_of(tmp_path / "run")
    assert results["normalization"] is None
    judge, rows = load_host_reward(f"model:{tmp_path / 'run' / 'model'}"), heldout_pairs(world)
    chosen, rejected = (
        np.array(judge([row["prompt"] for row in rows], [row[side] for row in rows])) for side in ("chosen", "rejected")
    )
    loss = np.mean(np.logaddexp(0, rejected - chosen))
    assert results["heldout/loss"] == pytest.approx(loss, rel=1e-4)
    # Then the calibration is that of the saved scores.
    confidence = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    count = sum(row["count"] * row["confidence"] for row in results["reliability"])
    assert count == pytest.approx(confidence.sum(), rel=1e-4)


def test_statistics_are_over_all_ordered_pairs(rng):
    """Those of the saved scores; calibration is of those that were trained, whose differences are log odds."""
    ranks = np.array([[1, 2, 0, 0], [2, 1, 2, 0], [3, 1, 2, 4], [1, 1, 2, 2]] * 5)
    lengths = np.where(ranks > 0, rng.integers(1, 9, ranks.shape), 0)
    tokens = np.zeros((*ranks.shape, 8), np.int32)
    heldout = JudgedSet(
        tokens=tokens, mask=np.broadcast_to((ranks > 0)[..., None], tokens.shape), ranks=ranks, margin=np.zeros(20),
        scores=np.zeros(20), response_lengths=lengths, judged=(), num_long=0, num_tied=0,
    )  # fmt: skip
    raw, scores = rng.normal(size=(2, *ranks.shape))
    results = train_reward.statistics(heldout, raw, scores)

    def differences(of):
        return np.array(
            [of[row, i] - of[row, j] for row, of_row in enumerate(ranks) for i in range(4) for j in range(4)
             if 0 < of_row[i] < of_row[j]]
        )  # fmt: skip

    right, odds = differences(scores) > 0, differences(raw)
    assert len(right) == 5 * (1 + 2 + 6 + 4)
    assert results["accuracy"] == pytest.approx(np.mean(right))
    assert results["accuracy_low"] < np.mean(right) < results["accuracy_high"]
    reliability, margins = results["reliability"], results["accuracy_by_margin"]
    assert sum(row["count"] for row in reliability) == sum(row["count"] for row in margins) == len(right)
    assert sum(row["count"] * row["accuracy"] for row in margins) == pytest.approx(np.sum(right))
    assert sum(row["count"] * row["accuracy"] for row in reliability) == pytest.approx(np.sum(odds > 0))
    confidence = sum(row["count"] * row["confidence"] for row in reliability)
    assert confidence == pytest.approx(np.sum(1 / (1 + np.exp(-np.abs(odds)))))
    sizes = np.abs(differences(scores))
    assert (margins[0]["low"], margins[-1]["high"]) == pytest.approx((sizes.min(), sizes.max()))
    present = ranks > 0
    correlation = np.corrcoef(scores[present], lengths[present])[0, 1]
    assert results["length_correlation"]["pearson"] == pytest.approx(correlation)


# Kills


def num_rows(workdir) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_kills_change_no_bit(world, tmp_path, rng):
    """SIGKILL soon after the start, in the middle, and at the end."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes = (f"--config.reference={world / 'model'}", "--config.checkpoint_every=3", "--config.log_every=1")
    done(folders.run_script("train_reward.py", flags(world, whole, *changes), env=kept))
    killed = 0
    for rows, wait in ((0, 0.2), (12, 0.02), (30, 0.1)):
        devnull = open(os.devnull, "w")  # noqa: SIM115
        process = folders.start_script(
            "train_reward.py", flags(world, run, *changes), env=kept, stdout=devnull, stderr=devnull
        )
        deadline = time.monotonic() + 240
        while process.poll() is None and not ((run / "config.json").exists() and num_rows(run) >= rows):
            assert time.monotonic() < deadline
            time.sleep(1e-3)
        time.sleep(wait * rng.random())
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        devnull.close()
    assert killed >= 2
    done(folders.run_script("train_reward.py", flags(world, run, *changes), env=kept))
    check_same_run(run, whole)
    assert (run / "reference_samples.jsonl").read_bytes() == (whole / "reference_samples.jsonl").read_bytes()


# The data


def loaded(world, **settings):
    tokenizer = load_tokenizer(world / "model")
    tokenizer.chat_template = folders.CHAT_TEMPLATE
    fields = {"data": str(world / "pairs.jsonl"), "length": 16} | settings
    return train_reward.load_judged(RewardExperiment(**fields), tokenizer, special_tokens(tokenizer))


def test_margins_count_unless_they_are_not_to(world, tmp_path, rng):
    rows = [row | {"margin": i / 4} for i, row in enumerate(pairs(rng, 20))]
    data = str(folders.write_jsonl(tmp_path / "margins.jsonl", rows))
    train, heldout = loaded(world, data=data)
    assert [*train.margin, *heldout.margin] == [i / 4 for i in range(20)]
    train, heldout = loaded(world, data=data, use_margin=False)
    assert not train.margin.any()
    assert not heldout.margin.any()


def test_given_held_out_judgements_are_those(world, tmp_path, rng):
    data = str(folders.write_jsonl(tmp_path / "heldout.jsonl", data_of(rng, "rankings")))
    train, heldout = loaded(world, heldout=data)
    assert len(train.tokens) == 80
    assert heldout.ranks.shape == (40, 4)
    assert len(heldout.prompts) == 40


def test_chats_go_through_the_template(world, tmp_path):
    chat = [{"role": "user", "content": "the cat was"}]
    rows = [
        {"prompt": chat, "chosen": [{"role": "assistant", "content": f" {word}"}],
         "rejected": [{"role": "assistant", "content": " bad"}]} for word in folders.GOOD
    ]  # fmt: skip
    train, heldout = loaded(world, data=str(folders.write_jsonl(tmp_path / "chats.jsonl", rows)))
    tokenizer = load_tokenizer(world / "model")
    expected = tokenizer("user : the cat was . bot : good")["input_ids"]
    assert train.tokens[0, 0][train.mask[0, 0]].tolist() == [*expected, 2]
    assert len(heldout.tokens) == 1


# Input that is refused: one line, and no workdir


def rows_file(root, *rows, name="bad.jsonl"):
    return folders.write_jsonl(root / name, rows)


PAIR = {"prompt": "the cat", "chosen": " was good", "rejected": " was bad"}
RATING = {"prompt": "the cat", "completion": " was good", "score": 1.0}
LONG = " very" * 20
REFUSED = {
    "no model": (lambda root: ["--config.model=./nowhere"], "no such folder"),
    "model not given": (lambda root: ["--config.model="], "model ''"),
    "no data": (lambda root: ["--config.data=nothing.jsonl"], "nothing.jsonl: no such file"),
    "data not given": (lambda root: ["--config.data="], "no such file"),
    "empty data": (lambda root: [f"--config.data={rows_file(root)}"], "bad.jsonl: it is empty"),
    "missing columns": (
        lambda root: [f"--config.data={rows_file(root, PAIR, {'prompt': 'a', 'chosen': 'b'})}"],
        "row 2: got columns prompt, chosen, expected those of one of: pair (chosen, rejected)",
    ),
    "equal sides": (
        lambda root: [f"--config.data={rows_file(root, PAIR | {'rejected': ' was good'})}"], "row 1: chosen and",
    ),
    "two kinds": (lambda root: [f"--config.data={rows_file(root, PAIR, RATING)}"], "comparisons and scores in one"),
    "one judgement": (lambda root: [f"--config.data={rows_file(root, PAIR)}"], "got one judgement, expected at least"),
    "nothing but ties": (
        lambda root: [
            f"--config.data={rows_file(root, {'prompt': 'a', 'completions': [' cat', ' dog'], 'ranks': [1, 1]})}"
        ],
        "1 are ties",
    ),
    "nothing short": (
        lambda root: [f"--config.data={rows_file(root, *[PAIR | {'chosen': LONG}] * 3)}"], "of more than 16 tokens",
    ),
    "larger than the data": (
        lambda root: ["--config.batch_size=64"], "config.batch_size: got 64, expected at most the 60 judgements",
    ),
    "held out nearly all": (
        lambda root: [f"--config.data={rows_file(root, PAIR, PAIR | {'prompt': 'a'})}", "--config.heldout_frac=0.9"],
        "at most the 1 judgements",
    ),
    "held out of another kind": (
        lambda root: [f"--config.heldout={rows_file(root, RATING)}"],
        "expected judgements of the same kind as config.data",
    ),
    "a center of scores": (
        lambda root: [
            f"--config.data={rows_file(root, *[RATING | {'prompt': word} for word in folders.WORDS])}",
            "--config.center_coef=0.1",
        ],
        "config.center_coef: got 0.1, expected 0 with scores",
    ),
    "no held-out file": (lambda root: ["--config.heldout=nothing.jsonl"], "nothing.jsonl: no such file"),
    "positions": (lambda root: ["--config.length=33"], "config.length: got 33, expected at most the model's 32"),
    "mesh": (lambda root: ["--config.mesh.data=8", "--config.batch_size=12"], "got 12, expected a multiple of mesh"),
    "tracker": (lambda root: ["--config.trackers=nothing"], "trackers: got 'nothing'"),
    "unknown end": (lambda root: ["--config.eos_token=<end>"], "config.eos_token: got '<end>'"),
    "a reward model": (lambda root: [f"--config.model={reward_folder(root)}"], "reward"),
    "no reference": (lambda root: ["--config.reference=./nowhere"], "'./nowhere': no such folder"),
    "share": (lambda root: ["--config.heldout_frac=1.0"], "heldout_frac: got 1.0, expected a number in (0, 1)"),
    "schedule": (lambda root: ["--config.lr_schedule=steps"], "lr_schedule: got 'steps'"),
    "no field": (lambda root: ["--config.learning_rate=1"], "learning_rate"),
}  # fmt: skip


def reward_folder(root):
    tokenizer = folders.word_tokenizer()
    config = folders.llama_config(len(tokenizer), tie_embeddings=True)
    params = {
        "decoder": folders.random_params(config),
        "score_head": {"kernel": np.ones((config.width, 1), np.float32)},
    }
    return hub.save_reward_model(root / "reward", params, config, tokenizer, eos_ids=(2,), pad_id=0)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(world, tmp_path, start, name):
    make, told = REFUSED[name]
    error = start(flags(world, tmp_path / "run", *make(tmp_path))).error()
    assert told in error
    assert "None" not in error
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(world, tmp_path, start):
    error = start(flags(world, tmp_path / "run", "--config.lr=1e30", "--config.max_grad_norm=1e30")).error()
    assert "reward/loss: got nan, expected a finite number: lower config.lr" in error
    assert os.listdir(tmp_path / "run" / "checkpoints") == []
    assert not (tmp_path / "run" / "model").exists()


def test_equal_samples_cannot_normalise(world, tmp_path, start):
    rows = [PAIR | {"prompt": prompt} for prompt in ("a", "the")]
    same = [row | {"chosen": f"{row['chosen']} ."} for row in rows for _ in range(4)]
    data = folders.write_jsonl(tmp_path / "same.jsonl", same)
    changes = (f"--config.data={data}", "--config.batch_size=2", "--config.heldout_frac=0.5")
    with pytest.MonkeyPatch.context() as patch:
        one = np.zeros((2, 16), np.int32), np.ones((2, 16), bool)
        patch.setattr(train_reward, "reference_samples", lambda *_: one)
        error = start(flags(world, tmp_path / "run", *changes)).error()
    assert "normalisation: the scores of 2 samples have no spread" in error


def test_a_dry_run_prints_costs_and_writes_nothing(world, tmp_path, start, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = done(start([*flags(world, tmp_path / "run"), "--dry_run"]))
    assert not os.listdir(tmp_path)
    assert "peak_mb" in outcome.out
    assert "learn" in outcome.out


def test_the_verdict_in_one_line():
    results = {"accuracy": 0.75, "accuracy_low": 0.7, "accuracy_high": 0.8, "ece": 0.01}
    expected = "held-out accuracy: 0.750 (95 %: 0.700 to 0.800), calibration error 0.010"
    assert train_reward.verdict(results) == expected
    assert train_reward.verdict({"accuracy": None, "heldout/rmse": 0.5}) == "held-out rmse: 0.500"
