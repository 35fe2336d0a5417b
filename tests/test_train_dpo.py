"""`train_dpo.py` with a tiny model, from its command line to its last file: DPO, IPO and KTO on every kind of
judgement; its results against what the exported policy says; kills; input that is refused.
"""

import json
import math
import os
import signal
import time

import folders
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from experiments import train_dpo
from experiments.settings import DPOExperiment
from ppo_jax import hub
from ppo_jax.metrics import read_jsonl
from ppo_jax.models import Decoder
from ppo_jax.tokenizers import load_tokenizer

CONFIG = folders.ROOT / "experiments" / "configs" / "dpo.py"
FILES = set("config.json metrics.jsonl results.json curves.png checkpoints tensorboard policy .lock".split())
PARTS = {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward"}
NEUTRAL = ("the", "a", "cat", "dog", "old", "film", "and", "very")
BETA = 0.1


def response(rng, kind) -> str:
    """Some neutral words and one that praises or blames."""
    words = [*rng.choice(NEUTRAL, rng.integers(1, 4)), *rng.choice(kind, 1)]
    return "".join(" " + word for word in rng.permutation(words))


def pairs(rng, num: int = 80):
    prompts = folders.prompt_rows()
    sides = [{"chosen": response(rng, folders.GOOD), "rejected": response(rng, folders.BAD)} for _ in range(num)]
    return [{"prompt": prompts[i % 20]["prompt"], **row} for i, row in enumerate(sides)]


def rankings(rng, num: int = 40):
    """Of three and four responses, the best of which praises and the worst of which blames."""
    rows = []
    for i in range(num):
        kinds = [folders.GOOD, NEUTRAL, NEUTRAL, folders.BAD][: 3 + i % 2]
        texts = list(dict.fromkeys(response(rng, kind) for kind in kinds))
        ranks = list(range(1, len(texts) + 1))
        rows.append({"prompt": folders.prompt_rows()[i % 20]["prompt"], "completions": texts, "ranks": ranks})
    return rows


def scores(rng):
    return [
        {"prompt": row["prompt"], "completion": row[side], "score": score}
        for row in pairs(rng)
        for side, score in (("chosen", 4.0), ("rejected", 2.0))
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
        "checkpoint_every": 8, "mesh.data": 1,
    }  # fmt: skip
    flags = [f"--config={CONFIG}", f"--workdir={workdir}"]
    return [*flags, *(f"--config.{name}={value}" for name, value in fields.items()), *changes]


KNOWN: dict = {}


def prepare(settings, original=train_dpo.prepare):
    """The programs of the same model, loss and optimizer are compiled once for all runs."""
    setup = original(settings)
    key = (setup.model, settings.mesh, settings.lr, settings.warmup_steps, settings.max_grad_norm, settings.loss)
    key += (settings.weight_decay, settings.accumulation, settings.lr_schedule == "constant" or setup.num_steps)
    return setup._replace(step=KNOWN.setdefault(key, setup.step))


@pytest.fixture
def start(monkeypatch, capsys):
    monkeypatch.setattr(train_dpo, "prepare", prepare)
    return lambda arguments: folders.call_script(train_dpo, DPOExperiment, arguments, capsys)


def done(outcome):
    assert (outcome.status, outcome.err) == (0, "")
    return outcome


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


# Whole runs


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A finished run of DPO on pairs, and what it printed; tests leave it as it is."""
    workdir = tmp_path_factory.mktemp("trained") / "deep" / "run"
    return workdir, done(folders.run_script("train_dpo.py", flags(world, workdir)))


def test_a_run_leaves_what_it_promises(world, trained):
    workdir, outcome = trained
    assert set(os.listdir(workdir)) == FILES
    assert "60 pairs of 60 judgements (0 too long and 0 tied left out), 20 held out" in outcome.out
    assert "held-out accuracy: " in outcome.out
    assert str(workdir / "policy") in outcome.out
    config = json.loads((workdir / "config.json").read_text())
    assert (config["model"], config["loss"], config["mesh"]["data"]) == (str(world / "model"), "dpo", 1)
    rows = read_jsonl(workdir / "metrics.jsonl")  # 4 x 60 / 8 = 30 steps; rows each 5, 8 (checkpoints), 10 and the last
    assert [row["iteration"] + 1 for row in rows] == [5, 8, 10, 15, 16, 20, 24, 25, 30]
    assert all(type(x) in (int, float) and math.isfinite(x) for row in rows for x in row.values())
    names = {f"preference/{part}" for part in PARTS} | {"iteration", "optim/grad_norm", "optim/lr", "time/step_s"}
    heldout = {f"heldout/{part}" for part in PARTS}
    for row in rows:
        assert row.keys() == names | (heldout if (row["iteration"] + 1) % 10 == 0 else set())
    assert sorted(os.listdir(workdir / "checkpoints"), key=int) == ["24", "30"]
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def margins(world, policy, rows) -> np.ndarray:
    """Of pairs, chosen less rejected: beta times the log ratio to the model before, of the tokens behind the prompt and
    the EOS, one text at a time.
    """
    tokenizer = load_tokenizer(world / "model")
    config = hub.load_config(world / "model")
    apply = jax.jit(Decoder(config).apply)

    def logprob(params, prompt: str, text: str) -> float:
        begin, ids = len(tokenizer(prompt)["input_ids"]), [*tokenizer(prompt + text)["input_ids"], 2]
        row = np.zeros((1, 16), np.int32)
        row[0, : len(ids)] = ids
        logits = np.asarray(apply({"params": params}, jnp.asarray(row), jnp.asarray(np.arange(16)[None] < len(ids))))[0]
        return math.fsum(oracles.log_softmax(logits[t - 1])[ids[t]] for t in range(begin, len(ids)))

    after, before = (hub.load_params(folder, config) for folder in (policy, world / "model"))
    rewards = [
        [BETA * (logprob(after, row["prompt"], row[side]) - logprob(before, row["prompt"], row[side]))
         for side in ("chosen", "rejected")]
        for row in rows
    ]  # fmt: skip
    return np.array(rewards) @ [1, -1]


def test_results_are_what_the_exported_policy_says(world, trained):
    workdir, _ = trained
    kept = [row["prompt"] for row in folders.prompt_rows()][15:]  # the prompts of the last quarter of the 20
    found = margins(
        world, workdir / "policy", [row for row in read_jsonl(world / "pairs.jsonl") if row["prompt"] in kept]
    )
    results, last = results_of(workdir), read_jsonl(workdir / "metrics.jsonl")[-1]
    assert results.keys() == {"steps", "accuracy_low", "accuracy_high"} | {f"heldout/{part}" for part in PARTS}
    assert results["steps"] == 30
    assert results["heldout/accuracy"] == pytest.approx(np.mean(found > 0))
    assert results["heldout/margin"] == pytest.approx(np.mean(found), rel=1e-3, abs=1e-4)
    assert results["heldout/loss"] == pytest.approx(np.mean(np.logaddexp(0, -found)), rel=1e-3)
    assert results["accuracy_low"] < results["heldout/accuracy"] <= results["accuracy_high"] <= 1
    assert {name: last[name] for name in results if name in last} == {
        name: x for name, x in results.items() if name.startswith("heldout/")
    }
    assert results["heldout/accuracy"] > 0.8, "it is to learn what was planted"
    assert results["heldout/margin"] > 0.3


def test_the_policy_is_a_folder_like_the_models(world, trained):
    workdir, _ = trained
    tokenizer = load_tokenizer(workdir / "policy")
    assert tokenizer("the cat")["input_ids"] == load_tokenizer(world / "model")("the cat")["input_ids"]
    assert (hub.load_eos_ids(workdir / "policy"), hub.load_pad_id(workdir / "policy")) == ((2,), 0)


def test_a_finished_run_does_nothing_and_says_it_again(world, trained, start, monkeypatch):
    workdir, outcome = trained
    before = folders.contents(workdir)
    monkeypatch.setattr(train_dpo, "finish", lambda *_: pytest.fail("it works again"))
    assert outcome.out.splitlines()[-1] in done(start(flags(world, workdir))).out
    for change, told in {
        "--config.beta=0.2": "beta was 0.1 and is 0.2",
        "--config.loss=ipo": "loss was 'dpo' and is 'ipo'",
        "--config.num_epochs=5": "num_epochs was 4 and is 5",
    }.items():
        assert told in start(flags(world, workdir, change)).error()
    assert folders.contents(workdir) == before


def check_same_run(ours, theirs) -> None:
    assert folders.without_time(ours / "metrics.jsonl") == folders.without_time(theirs / "metrics.jsonl")
    assert folders.contents(ours / "policy") == folders.contents(theirs / "policy")
    for name in ("config.json", "results.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert set(os.listdir(ours)) == set(os.listdir(theirs))
    assert sorted(os.listdir(ours / "checkpoints")) == sorted(os.listdir(theirs / "checkpoints"))


def test_in_parts_it_is_the_same_run_bit_for_bit(world, trained, tmp_path, start, monkeypatch):
    """Ended in the middle of a step, twice, and before its results."""
    whole, parts = trained[0], tmp_path / "parts"
    update, updates = train_dpo.Reporter.update, []

    def interrupted(self, number, row):
        update(self, number, row)
        updates.append(number)
        if number + 1 in (10, 25) and updates.count(number) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_dpo.Reporter, "update", interrupted)
    for _ in range(2):
        assert start(flags(world, parts)).status == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert start(flags(world, parts)).status == 130
    assert not (parts / "results.json").exists()
    done(start(flags(world, parts)))
    check_same_run(parts, whole)


def num_rows(workdir) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_kills_change_no_bit(world, tmp_path, rng):
    """SIGKILL soon after the start and in the middle, of KTO, whose mismatched completions are made batch by batch."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes = ("--config.loss=kto", "--config.checkpoint_every=3", "--config.log_every=1", "--config.num_epochs=2")
    done(folders.run_script("train_dpo.py", flags(world, whole, *changes), env=kept))
    killed = 0
    for rows, wait in ((0, 0.2), (12, 0.05)):
        process = folders.start_script("train_dpo.py", flags(world, run, *changes), env=kept)
        deadline = time.monotonic() + 240
        while process.poll() is None and not ((run / "config.json").exists() and num_rows(run) >= rows):
            assert time.monotonic() < deadline
            time.sleep(1e-3)
        time.sleep(wait * rng.random())
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed == 2
    done(folders.run_script("train_dpo.py", flags(world, run, *changes), env=kept))
    check_same_run(run, whole)


@pytest.mark.parametrize("loss", ["ipo", "kto"])
def test_every_loss_learns_from_pairs(world, tmp_path, start, loss):
    beta = "--config.beta=0.5"
    outcome = done(start(flags(world, tmp_path / "run", f"--config.loss={loss}", beta)))
    assert set(os.listdir(tmp_path / "run")) == FILES
    results, rows = results_of(tmp_path / "run"), read_jsonl(tmp_path / "run" / "metrics.jsonl")
    parts = PARTS | set(["reference_kl"] * (loss == "kto"))
    assert {name for name in rows[0] if name.startswith("preference/")} == {f"preference/{part}" for part in parts}
    assert {name for name in results if name.startswith("heldout/")} == {f"heldout/{part}" for part in parts}
    if loss == "kto":
        assert "60 desirable and 60 undesirable responses of 60 judgements" in outcome.out
        assert "40 held out" in outcome.out
        assert results["heldout/reference_kl"] >= 0
    assert results["heldout/accuracy"] > 0.65  # KTO's is of single texts, against the reference point
    assert results["heldout/margin"] > 0.1
    assert results["accuracy_low"] < results["heldout/accuracy"] <= results["accuracy_high"]


def test_rankings_give_all_their_pairs(world, tmp_path, start, rng):
    rows = rankings(rng)
    data = folders.write_jsonl(tmp_path / "data.jsonl", rows)
    outcome = done(start(flags(world, tmp_path / "run", data=data)))
    kept = [row["prompt"] for row in folders.prompt_rows()][:15]
    num = sum(math.comb(len(row["ranks"]), 2) for row in rows if row["prompt"] in kept)
    assert f"{num} pairs of 30 judgements" in outcome.out
    assert results_of(tmp_path / "run")["steps"] == 4 * num // 8


def test_kto_leaves_out_what_is_between_and_reads_scores(world, tmp_path, start, rng):
    rows = rankings(rng)
    data = folders.write_jsonl(tmp_path / "data.jsonl", rows)
    kto = ("--config.loss=kto", "--config.num_epochs=1")
    outcome = done(start(flags(world, tmp_path / "run", *kto, data=data)))
    kept = [row["prompt"] for row in folders.prompt_rows()][:15]
    between = sum(len(row["ranks"]) - 2 for row in rows if row["prompt"] in kept)
    told = f"30 desirable and 30 undesirable responses ({between} between the best and the last left out) of 30"
    assert told in outcome.out
    data = folders.write_jsonl(tmp_path / "scores.jsonl", scores(rng))
    outcome = done(start(flags(world, tmp_path / "scores", *kto, "--config.threshold=3", data=data)))
    assert "60 desirable and 60 undesirable responses of 120 judgements" in outcome.out


def test_parts_of_a_batch_are_the_same_run(world, trained, tmp_path, start):
    """But for rounding."""
    done(start(flags(world, tmp_path / "run", "--config.accumulation=4", "--config.num_epochs=1")))
    ours, theirs = (read_jsonl(run / "metrics.jsonl") for run in (tmp_path / "run", trained[0]))
    assert ours[0]["preference/loss"] == pytest.approx(theirs[0]["preference/loss"], rel=1e-2)


# Input that is refused: one line, and no workdir


def rows_file(root, *rows, name="bad.jsonl"):
    return folders.write_jsonl(root / name, rows)


PAIR = {"prompt": "the cat", "chosen": " was good", "rejected": " was bad"}
RATING = {"prompt": "the cat", "completion": " was good", "score": 1.0}
RATINGS = [RATING | {"prompt": word, "score": float(i)} for i, word in enumerate(folders.WORDS)]
LONG = " very" * 20
REFUSED = {
    "no model": (lambda root: ["--config.model=./nowhere"], "no such folder"),
    "model not given": (lambda root: ["--config.model="], "model ''"),
    "no data": (lambda root: ["--config.data=nothing.jsonl"], "nothing.jsonl: no such file"),
    "empty data": (lambda root: [f"--config.data={rows_file(root)}"], "bad.jsonl: it is empty"),
    "missing columns": (
        lambda root: [f"--config.data={rows_file(root, PAIR, {'prompt': 'a', 'chosen': 'b'})}"],
        "row 2: got columns prompt, chosen, expected those of one of: pair (chosen, rejected)",
    ),
    "nothing short": (
        lambda root: [f"--config.data={rows_file(root, *[PAIR | {'chosen': LONG}] * 3)}"], "of more than 16 tokens",
    ),
    "scores for dpo": (
        lambda root: [f"--config.data={rows_file(root, *RATINGS)}"],
        "config.loss: got 'dpo', expected kto, with scores",
    ),
    "all desirable": (
        lambda root: [f"--config.data={rows_file(root, *RATINGS)}", "--config.loss=kto", "--config.threshold=-1"],
        "config.threshold: got -1.0, expected one that parts the scores, 0 to",
    ),
    "a threshold of pairs": (
        lambda root: ["--config.loss=kto", "--config.threshold=1"],
        "config.threshold: got 1.0, expected 0, with comparisons",
    ),
    "a threshold for dpo": (lambda root: ["--config.threshold=1"], "threshold: got 1.0, expected 0 with loss=dpo"),
    "one text of kto": (
        lambda root: ["--config.loss=kto", "--config.batch_size=1"], "batch_size: got 1, expected at least 2",
    ),
    "larger than the data": (
        lambda root: ["--config.batch_size=64"], "config.batch_size: got 64, expected at most the 60 pairs",
    ),
    "parts": (lambda root: ["--config.accumulation=3"], "config.batch_size: got 8, expected a multiple of mesh"),
    "held out of another kind": (
        lambda root: [f"--config.heldout={rows_file(root, RATING)}"],
        "expected judgements of the same kind as config.data",
    ),
    "positions": (lambda root: ["--config.length=33"], "config.length: got 33, expected at most the model's 32"),
    "tracker": (lambda root: ["--config.trackers=nothing"], "trackers: got 'nothing'"),
    "unknown end": (lambda root: ["--config.eos_token=<end>"], "config.eos_token: got '<end>'"),
    "share": (lambda root: ["--config.heldout_frac=1.0"], "heldout_frac: got 1.0, expected a number in (0, 1)"),
    "schedule": (lambda root: ["--config.lr_schedule=steps"], "lr_schedule: got 'steps'"),
    "loss": (lambda root: ["--config.loss=ppo"], "loss: got 'ppo', expected one of dpo, ipo, kto"),
    "smoothing": (lambda root: ["--config.loss=ipo", "--config.label_smoothing=0.1"], "expected 0 with loss=ipo"),
    "no field": (lambda root: ["--config.tau=1"], "tau"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(world, tmp_path, start, name):
    make, told = REFUSED[name]
    error = start(flags(world, tmp_path / "run", *make(tmp_path))).error()
    assert told in error
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(world, tmp_path, start):
    error = start(flags(world, tmp_path / "run", "--config.lr=1e30", "--config.max_grad_norm=1e30")).error()
    assert "preference/loss: got nan" in error
    assert "expected a finite number: lower config.lr" in error
    assert os.listdir(tmp_path / "run" / "checkpoints") == []
    assert not (tmp_path / "run" / "policy").exists()


def test_a_dry_run_prints_costs_and_writes_nothing(world, tmp_path, start, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = done(start([*flags(world, tmp_path / "run"), "--dry_run"]))
    assert not os.listdir(tmp_path)
    assert "peak_mb" in outcome.out
