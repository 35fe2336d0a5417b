"""Files that have changed under a run are noticed when it goes on."""

import logging
import os
import shutil

import folders
import pytest

from experiments import train_ppo
from experiments.settings import PPOExperiment
from ppo_jax.fingerprints import fingerprints

MIB = 1 << 20


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "weights").write_bytes(bytes(3 * MIB))
    (tmp_path / "model" / "deep" / "config.json").write_text("{}")
    (tmp_path / "judge.py").write_text("def f(): pass")
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    return tmp_path


CONFIG = {
    "model": "model",
    "prompts": "prompts.jsonl",
    "reward": "model:model*0.5, judge.py:f, jax:judge.py:f*-1, vader, http://127.0.0.1/x",
    "seed": 0,
    "gold": "judge.py:f",
    "heldout": "",
    "data": None,
    "critic": "policy",
    "prompts_split": "train",
    "truncate_token": ".",
}


def test_everything_that_is_named_has_a_digest(world):
    found = fingerprints(CONFIG, may_change=["gold"])
    assert set(found) == {"model model", "prompts prompts.jsonl", "reward model", "reward judge.py"}
    assert found["model model"] == found["reward model"]
    assert found["prompts prompts.jsonl"] != found["reward judge.py"]


def test_a_word_is_no_folder_though_one_has_its_name(world):
    for name in ("vader", "code", "policy", "train"):
        (world / name).mkdir()
    words = {"reward": "code, vader*0.5", "critic": "policy", "prompts_split": "train", "truncate_token": "."}
    assert fingerprints(words) == {}
    assert set(fingerprints({"model": "code", "data": "~~~"})) == {"model code"}


def test_a_copy_is_the_same(world, tmp_path_factory, monkeypatch):
    before = fingerprints(CONFIG)
    other = tmp_path_factory.mktemp("other") / "world"
    shutil.copytree(world, other, copy_function=shutil.copyfile)
    monkeypatch.chdir(other)
    assert fingerprints(CONFIG) == before


@pytest.mark.parametrize("change", ["first", "last", "longer", "renamed", "more", "deep", "swapped"])
def test_a_change_changes_it(world, change):
    before = fingerprints({"model": "model"})
    weights = world / "model" / "weights"
    data = bytearray(weights.read_bytes())
    match change:
        case "first" | "last":
            data[0 if change == "first" else -1] = 1
            weights.write_bytes(data)
        case "longer":
            weights.write_bytes(data + b"\0")
        case "renamed":
            weights.rename(world / "model" / "weights2")
        case "more":
            (world / "model" / "tokenizer.json").write_text("")
        case "deep":
            (world / "model" / "deep" / "config.json").write_text("[]")
        case "swapped":
            (world / "model" / "deep" / "config.json").rename(world / "model" / "config.json")
    assert fingerprints({"model": "model"}) != before


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 2 * MIB, 2 * MIB + 1])
def test_every_byte_of_a_small_file_counts(tmp_path, rng, size):
    path = tmp_path / "x"
    data = bytearray(rng.bytes(size))
    path.write_bytes(data)
    before = fingerprints({"data": str(path)})
    seen = {*before.values()}
    for at in {0, size // 2, size - 1} if 0 < size <= 2 * MIB else set():
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        seen |= {*fingerprints({"data": str(path)}).values()}
    assert len(seen) == 1 + len({0, size // 2, size - 1} if 0 < size <= 2 * MIB else set())


def test_a_run_whose_files_have_changed(tmp_path, capsys, caplog):
    """Prompts and models are to be the same; a judge may have been mended, which is told."""
    world, run = folders.make_world(tmp_path), tmp_path / "run"

    def start(iterations):
        flags = world.flags(f"--config.num_iterations={iterations}", "--config.checkpoint_every=1", f"--workdir={run}")
        return folders.call_script(train_ppo, PPOExperiment, flags, capsys)

    assert start(1).status == 0
    prompts = world.prompts.read_text()
    world.prompts.write_text(prompts.replace("old", "new"))
    before = folders.contents(run)
    told = start(2).error()
    assert f"changed since it was saved: prompts {world.prompts}; expected the same contents, or another" in told
    assert f"{run / 'checkpoints' / '1'}: " in told
    assert folders.contents(run) == before
    world.prompts.write_text(prompts)
    os.utime(world.prompts, (0, 0))  # when it was written does not count
    world.rewards.write_text(world.rewards.read_text() + "\n# mended\n")
    with caplog.at_level(logging.WARNING):
        assert start(2).status == 0
    assert caplog.messages == [f"changed since checkpoint {run / 'checkpoints' / '1'}: reward {world.rewards}"]
