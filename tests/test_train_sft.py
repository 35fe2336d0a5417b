"""`train_sft.py` from its command line to its last file, with a tiny model: kinds of data, packing, parts of a batch,
stopping at the best held-out loss, and runs that end at any moment.
"""

import json
import math
import os
import re
import shutil

import folders
import pytest

from experiments import train_ppo, train_sft
from experiments.settings import PPOExperiment, SFTExperiment
from ppo_jax import hub
from ppo_jax.checkpoint import Checkpointer
from ppo_jax.metrics import read_jsonl
from ppo_jax.tokenizers import load_tokenizer

PREPARE = folders.remember_programs(train_sft.prepare)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return folders.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def flags(world, tmp_path_factory):
    """Flags of `train_sft.py` for a run of seconds; text to learn in `rows.jsonl`."""
    root = tmp_path_factory.mktemp("sft")
    rows = [{"prompt": row["prompt"], "completion": " the cat was good ."} for row in folders.prompt_rows()]
    data = folders.write_jsonl(root / "rows.jsonl", rows)
    fields = {
        "model": "", "tokenizer": world.model, "data": data, "length": 16, "batch_size": 4, "num_steps": 6, "lr": 0.05,
        "lr_schedule": "constant", "warmup_steps": 0, "log_every": 1, "eval_every": 3, "checkpoint_every": 2,
        "pack": False, "patience": 0, "accumulation": 1, "mesh.data": 1,
        "architecture.num_layers": 1, "architecture.num_heads": 2, "architecture.num_kv_heads": 1,
        "architecture.width": 16, "architecture.mlp_width": 32, "architecture.max_positions": 16,
    }  # fmt: skip
    config = folders.ROOT / "experiments" / "configs" / "sft_reviews.py"
    return [f"--config={config}", *(f"--config.{name}={value}" for name, value in fields.items())]


@pytest.fixture
def start(monkeypatch, capsys):
    """Runs the command line, with programs that are compiled once."""
    monkeypatch.setattr(train_sft, "prepare", PREPARE)
    return lambda *arguments: folders.call_script(train_sft, SFTExperiment, arguments, capsys)


# A whole run


def test_a_run_leaves_what_it_promises(flags, world, tmp_path, start, capsys):
    workdir = tmp_path / "run"
    outcome = start(*flags, f"--workdir={workdir}")
    assert (outcome.status, outcome.err) == (0, "")
    assert set(os.listdir(workdir)) == {
        "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "model", "curves.png", "results.json", ".lock"
    }  # fmt: skip
    rows = read_jsonl(workdir / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(6))
    assert all(type(x) in (int, float) and math.isfinite(x) for row in rows for x in row.values())
    assert ["heldout/perplexity" in row for row in rows] == [False, False, True, False, False, True]
    assert rows[-1]["sft/loss"] < rows[0]["sft/loss"]
    results = json.loads((workdir / "results.json").read_text())
    assert results["heldout/perplexity"] == pytest.approx(rows[-1]["heldout/perplexity"])
    assert results["heldout/perplexity"] == pytest.approx(math.exp(results["heldout/loss"]))
    config = hub.load_config(workdir / "model")
    assert (config.num_layers, config.num_kv_heads, config.vocab_size) == (1, 1, len(load_tokenizer(world.model)))
    hub.load_params(workdir / "model", config)
    # A second start does nothing; another configuration is refused.
    before = folders.contents(workdir)
    assert start(*flags, f"--workdir={workdir}").status == 0
    assert "lr was 0.05 and is 0.1" in start(*flags, f"--workdir={workdir}", "--config.lr=0.1").error()
    assert folders.contents(workdir) == before
    # The result is a model that PPO starts from.
    model = f"--config.model={workdir / 'model'}"
    refused = world.flags(
        model, "--config.ppo.response_length=4", "--config.ppo.prompt_length=12", "--config.mesh.data=3", "--workdir=x"
    )  # for its mesh, which is looked at after model and prompts
    assert "expected a multiple of mesh" in folders.call_script(train_ppo, PPOExperiment, refused, capsys).error()


def test_a_run_goes_on_bit_for_bit(flags, tmp_path, start):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(*flags, f"--workdir={whole}").status == 0
    assert start(*flags, f"--workdir={parts}", "--config.num_steps=3").status == 0

    def crash(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:  # 6 steps, without the results of 6 steps
        patch.setattr(train_sft, "finish", crash)
        assert start(*flags, f"--workdir={parts}").status == 130
    assert start(*flags, f"--workdir={parts}").status == 0
    assert folders.contents(parts / "model") == folders.contents(whole / "model")
    assert (parts / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    # The end of a run has one more held-out perplexity: after step 3, which is also where the whole run measures one.
    assert folders.without_time(parts / "metrics.jsonl") == folders.without_time(whole / "metrics.jsonl")


CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
REFUSED = {
    "neither model nor tokenizer": (["--config.tokenizer="], "model"),
    "no data": (["--config.data=nothing.jsonl"], "no such file"),
    "no data given": (["--config.data="], "no such file"),
    "length": (["--config.length=17"], "config.length: got 17, expected at most the model's 16 positions"),
    "heads": (["--config.architecture.num_kv_heads=3"], "num_kv_heads: got 3, expected a divisor of num_heads (2)"),
    "batch": (["--config.mesh.data=8"], "config.batch_size: got 4, expected a multiple of mesh data x fsdp (8)"),
    "parts": (
        ["--config.accumulation=3"],
        "config.batch_size: got 4, expected a multiple of mesh data x fsdp (1) x acc",
    ),
    "no template": (["--config.data=CHAT"], "CHAT: row 1: tokenizer: it has no chat template"),
    "tracker": (["--config.trackers=nothing"], "nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(flags, tmp_path, start, name):
    changes, told = REFUSED[name]
    chat = folders.write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}] * 2)
    changes, told = [change.replace("CHAT", str(chat)) for change in changes], told.replace("CHAT", str(chat))
    error = start(*flags, f"--workdir={tmp_path / 'run'}", *changes).error()
    assert told in error
    assert "None" not in error
    assert not (tmp_path / "run").exists()


def test_held_out_rows_without_a_target_are_refused_or_left_out(flags, world, tmp_path, start):
    """All of them have prompts that fill the whole length."""
    rows = [{"prompt": "the cat sat", "completion": " here"}] * 8
    long = [{"prompt": " ".join(["the"] * 20), "completion": " here"}]
    data, heldout = folders.write_jsonl(tmp_path / "d.jsonl", rows), folders.write_jsonl(tmp_path / "h.jsonl", long)
    error = start(
        *flags, f"--workdir={tmp_path / 'run'}", f"--config.data={data}", f"--config.heldout={heldout}"
    ).error()
    assert "heldout" in error or "held out" in error or "h.jsonl" in error
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_costs_and_writes_nothing(flags, tmp_path, start, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = start(*flags, "--dry_run")
    assert outcome.status == 0
    assert "peak_mb" in outcome.out
    assert not os.listdir(tmp_path)


# Kinds of data


def test_conversations_are_learned_from_parquet_in_packed_rows(flags, world, tmp_path, start):
    """Parquet, chat, packing, parts of a batch: all at once, to a model that answers as it was taught."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    tokenizer = folders.word_tokenizer([*folders.WORDS, "user", "assistant", ":"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    turns = [
        [{"role": "user", "content": f"the {name}"}, {"role": "assistant", "content": word}]
        for name, word in zip(("cat", "dog", "film", "old"), folders.GOOD, strict=True)
    ]
    rows = [{"messages": turn if i % 2 else turn + turns[i % 4]} for i, turn in enumerate(turns * 8)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    arguments = (
        *flags, f"--config.data={tmp_path / 'rows.parquet'}", f"--config.tokenizer={tmp_path / 'tokenizer'}",
        "--config.length=30", "--config.architecture.max_positions=30", "--config.num_steps=80", "--config.lr=0.03",
        "--config.eval_every=80", "--config.checkpoint_every=80",
    )  # fmt: skip
    packed = start(*arguments, f"--workdir={tmp_path / 'run'}", "--config.pack=True", "--config.accumulation=2")
    assert (packed.status, packed.err) == (0, "")
    # 30 texts are trained on, 15 of 9 tokens (a question has 5, an answer 4) and 15 of 18; the other 2 are held out.
    # One of each kind fills 27 of the 30 slots of a row.
    texts, in_rows = re.search(r"(\d+) texts in (\d+) rows of 30 tokens", packed.out).groups()
    assert texts == "30"
    assert in_rows == "15"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["heldout/perplexity"] < 1.5
    alone = start(*arguments, f"--workdir={tmp_path / 'alone'}")
    assert "30 texts in 30 rows of 30 tokens" in alone.out
    first, second = (read_jsonl(tmp_path / name / "metrics.jsonl")[0] for name in ("run", "alone"))
    assert first["sft/loss"] != second["sft/loss"]  # other rows


# Stopping at the best


@pytest.fixture(scope="module")
def overfits(flags, tmp_path_factory):
    """Flags of a run whose held-out loss falls up to step 8, and rises after it."""
    heldout = tmp_path_factory.mktemp("heldout") / "rows.jsonl"
    folders.write_jsonl(heldout, [{"text": "the film was dull ."}, {"text": "a dog sat here , and the cat is kind"}])
    fields = {"heldout": heldout, "num_steps": 40, "lr": 0.004, "eval_every": 2, "checkpoint_every": 5, "patience": 2}
    return [*flags, *(f"--config.{name}={value}" for name, value in fields.items())]


def losses_of(workdir) -> dict[int, float]:
    rows = read_jsonl(workdir / "metrics.jsonl")
    return {row["iteration"] + 1: row["heldout/loss"] for row in rows if "heldout/loss" in row}


@pytest.fixture(scope="module")
def stopped_at(tmp_path_factory):
    return tmp_path_factory.mktemp("stopped") / "run"


@pytest.fixture
def stopped(overfits, stopped_at, start):
    """The folder of a run that stopped by itself; made once."""
    if not stopped_at.exists():
        assert start(*overfits, f"--workdir={stopped_at}").status == 0
    return stopped_at


def test_training_stops_when_the_held_out_loss_rises_and_the_best_model_is_exported(overfits, stopped, tmp_path, start):
    losses = losses_of(stopped)
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    assert min(losses, key=losses.get) == 8
    results = json.loads((stopped / "results.json").read_text())
    assert (results["steps"], results["best_step"], results["stopped"]) == (12, 8, True)
    assert results["heldout/loss"] == losses[8]
    assert results["heldout/perplexity"] == math.exp(losses[8])
    # The exported model is that of a run that ends after 8 steps.
    short = [*overfits, f"--workdir={tmp_path / 'short'}", "--config.num_steps=8", "--config.patience=0"]
    assert start(*short).status == 0
    assert folders.contents(tmp_path / "short" / "model") == folders.contents(stopped / "model")
    # A second start does nothing.
    before = folders.contents(stopped)
    assert start(*overfits, f"--workdir={stopped}").status == 0
    assert folders.contents(stopped) == before


def test_without_patience_the_last_model_is_exported(overfits, stopped, tmp_path, start):
    workdir = tmp_path / "run"
    assert start(*overfits, f"--workdir={workdir}", "--config.patience=0", "--config.num_steps=12").status == 0
    results = json.loads((workdir / "results.json").read_text())
    assert (results["steps"], results["best_step"], results["stopped"]) == (12, 8, False)
    assert results["heldout/loss"] == losses_of(workdir)[12]
    assert losses_of(workdir) == losses_of(stopped)
    assert not (workdir / "best").exists()


def test_patience_that_does_not_run_out_exports_the_best_of_all(overfits, tmp_path, start):
    workdir = tmp_path / "run"
    assert start(*overfits, f"--workdir={workdir}", "--config.patience=3", "--config.num_steps=12").status == 0
    results = json.loads((workdir / "results.json").read_text())
    assert (results["steps"], results["best_step"], results["stopped"]) == (12, 8, False)
    assert results["heldout/loss"] == losses_of(workdir)[8]


def test_a_run_that_crashes_after_any_save_ends_with_the_same_bits(
    overfits, stopped, tmp_path, start, monkeypatch, rng
):
    """Also between the two saves of one step, and in the middle of the export."""
    save, calls = Checkpointer.save, []
    stop_after = 0
    # Steps 2, 4, 6 and 8 are saved as a checkpoint and as the best so far, steps 5, 10 and 12 as a checkpoint.
    between_the_two_of_8 = 8
    moments = {between_the_two_of_8, *rng.integers(1, 12, 3).tolist()}

    def save_and_crash(self, state):
        save(self, state)
        calls.append(int(state.step))
        if len(calls) == stop_after:
            raise KeyboardInterrupt

    def crash(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointer, "save", save_and_crash)
    for moment in [*moments, "export"]:
        workdir, stop_after = tmp_path / str(moment), moment
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            if moment == "export":
                patch.setattr(hub, "save", crash)
            assert start(*overfits, f"--workdir={workdir}").status == 130
        stop_after = 0
        assert start(*overfits, f"--workdir={workdir}").status == 0
        assert folders.without_time(workdir / "metrics.jsonl") == folders.without_time(stopped / "metrics.jsonl")
        assert (workdir / "results.json").read_bytes() == (stopped / "results.json").read_bytes()
        assert folders.contents(workdir / "model") == folders.contents(stopped / "model")
        assert sorted(os.listdir(workdir)) == sorted(os.listdir(stopped))
        for name in ("best", "checkpoints"):
            assert sorted(os.listdir(workdir / name)) == sorted(os.listdir(stopped / name))


def test_a_best_state_that_is_lost_is_told(overfits, tmp_path, start):
    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert start(*overfits, f"--workdir={workdir}").status == 130
    shutil.rmtree(workdir / "best")
    assert "best" in start(*overfits, f"--workdir={workdir}").error()


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ({}, 1, False),
        ({2: 1.0}, 1, False),
        ({2: 1.0, 4: 1.0}, 1, True),  # the same again is no improvement
        ({2: 1.0, 4: 0.5, 6: 0.7}, 2, False),
        ({2: 1.0, 4: 0.5, 6: 0.7, 8: 0.6}, 2, True),
        ({2: 1.0, 4: 2.0, 6: 3.0, 8: 0.9}, 2, False),  # the newest is the lowest
        ({2: 1.0, 4: 2.0, 6: 3.0}, 0, False),
    ],
)
def test_patience_counts_from_the_lowest_loss(losses, patience, expected):
    assert train_sft.is_over(losses, patience) is expected


def test_a_loss_beyond_all_numbers_ends_the_run_in_one_line(flags, tmp_path, start):
    error = start(*flags, f"--workdir={tmp_path / 'run'}", "--config.lr=1e30").error()
    assert "expected a finite number: lower config.lr" in error
    assert train_sft.heldout_metrics(5000.0)["heldout/perplexity"] == pytest.approx(math.exp(700))


# Several devices


def test_eight_devices_make_the_same_run(flags, tmp_path, start):
    """Packed rows in parts over a mesh; the devices sum in another order."""
    common = ["--config.pack=True", "--config.batch_size=8", "--config.num_steps=3", "--config.lr=0.01"]
    for name, mesh in {"one": (1, 1, 1), "eight": (2, 2, 2)}.items():
        axes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
        given = [*common, *(f"--config.mesh.{axis}={size}" for axis, size in axes)]
        parts = "--config.accumulation=2" if name == "eight" else "--config.accumulation=1"
        assert start(*flags, *given, parts, f"--workdir={tmp_path / name}").status == 0
    one, eight = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "eight"))
    for ours, theirs in zip(one, eight, strict=True):
        for metric in ("sft/loss", "optim/grad_norm"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-3)
