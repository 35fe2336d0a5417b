"""What a script exports is stored as the model that it started from was, or as `save_dtype` says."""

import json
import math

import folders
import jax
import ml_dtypes
import numpy as np
import pytest

from experiments import train_dpo, train_ppo, train_reward, train_sft
from experiments.settings import DPOExperiment, PPOExperiment, RewardExperiment, SFTExperiment
from ppo_jax import hub
from ppo_jax.hub.layout import flatten
from ppo_jax.rewards import load_host_reward
from ppo_jax.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model stored in bfloat16, and something to learn for every script."""
    root = tmp_path_factory.mktemp("world")
    whole = folders.make_world(root)
    config = hub.load_config(whole.model)
    params = hub.load_params(whole.model, config)
    hub.save(root / "half", params, config, load_tokenizer(whole.model), dtype="bfloat16")
    prompts = [row["prompt"] for row in folders.prompt_rows()]
    sides = {"chosen": " good film .", "rejected": " bad film ."}
    folders.write_jsonl(root / "pairs.jsonl", [{"prompt": prompt, **sides} for prompt in prompts])
    folders.write_jsonl(root / "texts.jsonl", [{"text": prompt} for prompt in prompts])
    return whole._replace(model=root / "half"), root


SCRIPTS = {
    "ppo": (train_ppo, PPOExperiment, "policy"),
    "sft": (train_sft, SFTExperiment, "model"),
    "reward": (train_reward, RewardExperiment, "model"),
    "dpo": (train_dpo, DPOExperiment, "policy"),
}


def run(world, name: str, workdir, capsys, *changes: str):
    """Trains for a step or two, and returns the exported folder."""
    script, kind, folder = SCRIPTS[name]
    known, root = world
    if name == "ppo":
        flags = known.flags("--config.num_iterations=1", reward="score_good")
    else:
        config = {"sft": "sft_reviews", "reward": "reward", "dpo": "dpo"}[name]
        data = root / ("texts.jsonl" if name == "sft" else "pairs.jsonl")
        length = {"num_steps": 1} if name == "sft" else {"num_epochs": 1}
        fields = {"model": known.model, "data": data, "length": 16, "batch_size": 8, "mesh.data": 1, **length}
        flags = [f"--config={folders.ROOT / 'experiments' / 'configs' / config}.py"]
        flags += [f"--config.{name}={value}" for name, value in fields.items()]
        flags += ["--config.reference=", "--config.reference_samples=16"] if name == "reward" else []
    outcome = folders.call_script(script, kind, [*flags, f"--workdir={workdir}", *changes], capsys)
    assert (outcome.status, outcome.err) == (0, "")
    return workdir / folder


def dtypes_of(folder) -> tuple[str, set[str]]:
    """What config.json says, and what the tensors of model.safetensors have."""
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__")
    return json.loads((folder / "config.json").read_text())["torch_dtype"], {
        entry["dtype"] for entry in header.values()
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_dtype_of_the_exported_weights(name, world, tmp_path, capsys):
    known, _ = world
    assert hub.load_dtype(known.model) == "bfloat16"
    same, other = (
        run(world, name, tmp_path / "same", capsys),
        run(world, name, tmp_path / "float32", capsys, "--config.save_dtype=float32"),
    )
    head = {"F32"} if name == "reward" else set()
    assert dtypes_of(same) == ("bfloat16", {"BF16"} | head)
    assert dtypes_of(other) == ("float32", {"F32"})
    assert [hub.load_dtype(folder) for folder in (same, other)] == ["bfloat16", "float32"]

    def read(folder):
        if name == "reward":
            return hub.load_reward_model(folder)[1]["decoder"]
        return hub.load_params(folder, hub.load_config(folder))

    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), read(other))
    jax.tree.map(np.testing.assert_array_equal, read(same), rounded)
    moved = jax.tree.map(lambda x, y: np.any(x != y), read(other), rounded)
    assert any(jax.tree.leaves(moved)), "training is in float32"


def test_a_rounded_reward_model_is_normalised_as_it_is_saved(world, tmp_path, capsys):
    """The mean and deviation of the reference samples (here the texts of the data) are those of the rounded weights."""
    folder = run(world, "reward", tmp_path / "run", capsys)
    prompts = [row["prompt"] for row in folders.prompt_rows()]
    texts = [(prompt, text) for prompt in prompts[:8] for text in (" good film .", " bad film .")]
    scores = np.array(load_host_reward(f"model:{folder}")(*zip(*texts, strict=True)))
    assert len(scores) == 16
    assert (abs(scores.mean()) < 1e-4, abs(scores.std() - 1) < 1e-4) == (True, True), (scores.mean(), scores.std())


def test_a_new_model_is_stored_in_float32(world, tmp_path, capsys):
    new = ("--config.model=", f"--config.tokenizer={world[0].model}", "--config.architecture.num_layers=1")
    assert dtypes_of(run(world, "sft", tmp_path / "new", capsys, *new)) == ("float32", {"F32"})


def test_another_dtype_is_refused(world, tmp_path, capsys):
    script, kind, _ = SCRIPTS["ppo"]
    flags = world[0].flags("--config.save_dtype=int8", f"--workdir={tmp_path / 'x'}")
    told = folders.call_script(script, kind, flags, capsys).error()
    assert "save_dtype: got 'int8', expected one of model, float32, float16, bfloat16" in told


def test_float16_ends_where_it_ends(world, tmp_path, rng):
    """A weight above 65,504 is told, and what stood there stays."""
    model = world[0].model
    config = hub.load_config(model)
    params = hub.load_params(model, config)
    hub.save(tmp_path / "model", params, config)
    before = folders.contents(tmp_path / "model")
    flat = flatten(params)
    path = sorted(flat)[rng.integers(len(flat))]
    flat[path].flat[rng.integers(math.prod(flat[path].shape))] = -7e4
    with pytest.raises(hub.HubError, match=f"{path}: values that are not finite numbers in float16"):
        hub.save(tmp_path / "model", params, config, dtype="float16")
    assert folders.contents(tmp_path / "model") == before
    with pytest.raises(hub.HubError, match="has dtype float64, expected one of float32, float16, bfloat16"):
        hub.save(tmp_path / "model", params, config, dtype="float64")
    assert folders.contents(tmp_path / "model") == before


def test_a_folder_of_no_floats_is_told(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.arange(9), "y": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(hub.HubError, match="got mostly dtype I64, expected one of F64, F32, F16, BF16"):
        hub.load_dtype(tmp_path)
    save_file({"x": np.arange(2), "y": np.ones(3)}, tmp_path / "model.safetensors")
    assert hub.load_dtype(tmp_path) == "float32", "what is read as float32 is written as float32"
