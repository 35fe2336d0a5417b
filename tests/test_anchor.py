"""The learning anchor: its model begins as GPT-2 does, its prompts are random words, its score counts."""

import json

import jax
import numpy as np
import pytest

from experiments.anchor import set_fraction, write_set_fraction
from ppo_jax import hub
from ppo_jax.data import load_prompts
from ppo_jax.metrics import read_jsonl
from ppo_jax.rewards import load_reward
from ppo_jax.tokenizers import load_tokenizer, special_tokens
from ppo_jax.types import Rollout


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, the fields of a run)."""
    folder = tmp_path_factory.mktemp("anchor") / "task"
    return folder, write_set_fraction(folder, seed=3)


@pytest.fixture(scope="module")
def params(written):
    folder, _ = written
    return hub.load_params(folder / "model", hub.load_config(folder / "model"))


def test_the_folder_holds_a_micro_gpt2(written, params):
    folder, fields = written
    config = json.loads((folder / "model" / "config.json").read_text())
    expected = {"model_type": "gpt2", "n_layer": 2, "n_embd": 128, "n_head": 4, "vocab_size": 512, "n_positions": 128}
    assert {name: config[name] for name in expected} == expected
    assert hub.load_config(folder / "model").tie_embeddings
    # Embeddings 512 x 128 + 128 x 128; a layer 12 x 128^2 + 13 x 128 (4 + 9 vectors of 128: biases and norms); a norm.
    assert sum(x.size for x in jax.tree.leaves(params)) == 81_920 + 2 * (196_608 + 1_664) + 256
    assert fields["model"] == str(folder / "model")
    assert fields["prompts"] == str(folder / "prompts.jsonl")


def test_parameters_begin_as_transformers_begins_gpt2s(params):
    # GPT2PreTrainedModel._init_weights: matrices and embeddings N(0, 0.02), both c_proj N(0, 0.02 / sqrt(2 x 2
    # layers)), biases 0, norms 1. A deviation of n numbers is off by 1 / sqrt(2 n) of itself: 6 sigmas of the smallest
    # matrix (16,384 numbers) are 3.3 %.
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if path[-1].key == "scale":
            np.testing.assert_array_equal(x, 1.0, err_msg=name)
        elif path[-1].key == "bias":
            np.testing.assert_array_equal(x, 0.0, err_msg=name)
        else:
            std = 0.01 if "'output'" in name or "'down'" in name else 0.02
            np.testing.assert_allclose(np.std(x), std, rtol=0.033, err_msg=name)
            assert abs(np.mean(x)) < 6 * std / x.size**0.5, name


def test_the_critic_is_the_model_with_a_head_that_is_not_zero(written, params):
    folder, _ = written
    config, critic = hub.load_reward_model(folder / "critic")
    head = critic["score_head"]["kernel"]
    assert config == hub.load_config(folder / "model")
    jax.tree.map(np.testing.assert_array_equal, critic["decoder"], params)
    assert head.shape == (128, 1)
    np.testing.assert_allclose(np.std(head), 0.02, rtol=6 / 16)  # sqrt(2 x 128) = 16


def test_another_seed_is_another_model_and_other_prompts(written, tmp_path):
    folder, _ = written
    again, other = tmp_path / "again", tmp_path / "other"
    write_set_fraction(again, seed=3)
    write_set_fraction(other, seed=4)
    for name in ("model/model.safetensors", "prompts.jsonl"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
        assert (folder / name).read_bytes() != (other / name).read_bytes()


def test_a_prompt_is_32_random_words_without_special_tokens(written):
    folder, fields = written
    tokenizer = load_tokenizer(folder / "model")
    special = special_tokens(tokenizer, hub.load_eos_ids(folder / "model"))
    assert (special.pad_id, special.eos_ids, tokenizer.bos_token_id) == (0, (1,), 2)
    prompts = load_prompts(fields["prompts"], tokenizer, special.pad_id, 32, "drop", "train")
    assert prompts.tokens.shape == (4096, 32)
    assert prompts.mask.all()
    assert (prompts.tokens.min(), prompts.tokens.max()) == (3, 511)
    # 131,072 draws of 509 words: 257.5 each, with a deviation of 16; 6 of them hold for all words but 1 time in 10^6.
    counts = np.bincount(prompts.tokens.ravel(), minlength=512)[3:]
    assert abs(counts - 257.5).max() < 6 * 16.1
    words = read_jsonl(fields["prompts"])[0]["prompt"].split()
    assert [f"w{i}" for i in prompts.tokens[0]] == words
    assert tokenizer.decode(prompts.tokens[0]) == " ".join(words)


def rollout_of(tokens, mask):
    """B responses after two prompt tokens that are in the set."""
    prompt = np.full((len(tokens), 2), 8)
    return Rollout(
        tokens=np.concatenate([prompt, tokens], axis=1).astype(np.int32),
        mask=np.concatenate([prompt > 0, mask], axis=1),
        logprobs=np.zeros(tokens.shape, np.float32),
        values=np.zeros(tokens.shape, np.float32),
    )


def test_score_golden():
    # In the set: 4, 8, 508. Special tokens are not (0 divides by 4), nor is what is masked. Of 4 slots: 2, 0, 1, 4.
    tokens = np.array([[4, 508, 7, 6], [0, 1, 2, 3], [8, 1, 0, 4], [4, 4, 4, 4]])
    mask = np.array([[True] * 4, [True] * 4, [True, True, False, False], [True] * 4])
    np.testing.assert_allclose(set_fraction(None)(rollout_of(tokens, mask)), [5.0, 0.0, 2.5, 10.0])


def test_score_against_a_loop_and_by_its_name(rng, written):
    folder, fields = written
    tokens, mask = rng.integers(0, 512, (6, 48)), np.arange(48) < rng.integers(1, 49, (6, 1))
    rollout = rollout_of(tokens, mask)
    expected = []
    for row, real in zip(tokens, mask, strict=True):
        good = 0
        for token, counts in zip(row, real, strict=True):
            good += bool(counts) and token in range(4, 512, 4)
        expected.append(10 * good / 48)
    judges = load_reward(fields["reward"], load_tokenizer(folder / "model"))
    np.testing.assert_allclose(judges.score(judges.params, rollout).total, expected, rtol=1e-6)
