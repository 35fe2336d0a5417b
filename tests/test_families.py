"""PPO on a small model of every family: the first ratio is one, a run goes on to the bit, and what comes out is of the
family.
"""

import dataclasses
import json

import folders
import numpy as np
import pytest
from families import CONFIGS, FAMILY_OF
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from experiments import train_ppo
from experiments.settings import PPOExperiment
from ppo_jax import hub
from ppo_jax.hub.families import FAMILIES
from ppo_jax.metrics import read_jsonl

# Of each family the member with the most of what the others have not.
MEMBERS = {FAMILY_OF.get(name, name): name for name in CONFIGS} | {"llama": "llama3", "gpt_neox": "gpt_neox"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return folders.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def tokenizer():
    """Of bytes: for Qwen 2 transformers takes its own class, whatever a folder says, and that one is of bytes."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([" ".join(folders.WORDS)] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_every_family_has_a_member():
    assert MEMBERS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_two_iterations_and_a_resume(family, world, tokenizer, tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(
        CONFIGS[MEMBERS[family]], vocab_size=len(tokenizer), max_positions=32, family=family, init_std=0.02
    )
    model = folders.make_folder(tmp_path / "model", tokenizer, config)
    monkeypatch.setattr(train_ppo, "prepare", folders.remember_programs(train_ppo.prepare))

    def run(workdir: str, iterations: int) -> None:
        flags = world.flags(
            f"--config.model={model}", f"--config.num_iterations={iterations}", "--config.checkpoint_every=1",
            "--config.ppo.prompt_length=16", f"--workdir={tmp_path / workdir}", reward="score_good",
        )  # fmt: skip
        outcome = folders.call_script(train_ppo, PPOExperiment, flags, capsys)
        assert (outcome.status, outcome.err) == (0, "")

    run("whole", 2)
    run("resumed", 1)
    run("resumed", 2)
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1]
    assert all(row["policy/first_ratio_dev"] <= 1e-4 for row in rows)
    assert rows[1]["objective/kl"] != 0  # the first update has moved it
    for row in rows:
        assert ("router/load_balance" in row) == bool(config.num_experts)
        # Between that of all experts alike and that of one choice for all, but for how far a router is from even.
        assert 0.9 * config.experts_per_token <= row.get("router/load_balance", 0.0) <= config.num_experts

    bits = [folders.bits(folders.saved_state(tmp_path / workdir)) for workdir in ("whole", "resumed")]
    assert bits[0] == bits[1]
    assert folders.without_time(tmp_path / "resumed" / "metrics.jsonl") == folders.without_time(
        tmp_path / "whole" / "metrics.jsonl"
    )
    policy = tmp_path / "whole" / "policy"
    assert json.loads((policy / "config.json").read_text())["model_type"] == family
    assert hub.load_config(policy) == hub.load_config(model) == config
    trained, start = (hub.load_params(folder, config) for folder in (policy, model))
    assert not np.array_equal(trained["embed"]["embedding"], start["embed"]["embedding"])
