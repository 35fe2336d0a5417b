"""A real pretrained model against the numbers that lie beside it, which torch computed in float64.

stories15M: Llama architecture, 15 million parameters, pretrained on TinyStories. Tolerance: float32 torch itself is off
by up to 3.2e-5 in a logit (the file says so), of 20 in magnitude; 2e-4 is 1e-5 of that.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from ppo_jax import hub
from ppo_jax.models import ActorCritic, Decoder
from ppo_jax.sampling import SamplingConfig, generate
from ppo_jax.types import Prompts

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def folder(shared):
    return hub.resolve(str(shared / "models" / "stories15M"))


@pytest.fixture(scope="module")
def golden(folder):
    return json.loads((folder / "golden.json").read_text())


@pytest.fixture(scope="module")
def stories(folder):
    """(config, parameters)."""
    config = hub.load_config(folder)
    return config, jax.device_put(hub.load_params(folder, config))


@pytest.fixture(scope="module")
def prompts(golden):
    """The six prompts of the golden file, padded left into one batch."""
    rows = [case["input_ids"] for case in golden["cases"]]
    longest = max(map(len, rows))
    tokens = np.array([[0] * (longest - len(row)) + row for row in rows], np.int32)
    mask = np.array([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask))


@pytest.fixture(scope="module")
def logits(stories, prompts):
    config, params = stories
    return np.asarray(jax.jit(Decoder(config).apply)({"params": params}, prompts.tokens, prompts.mask))


def logprobs_of(logits, tokens):
    """Logprob of each token but the first, [T, V] and [T] to [T - 1]."""
    logprobs = np.asarray(jax.nn.log_softmax(np.float64(logits)))
    return logprobs[np.arange(len(tokens) - 1), tokens[1:]]


def test_parameter_count(stories, golden):
    assert sum(leaf.size for leaf in jax.tree.leaves(stories[1])) == golden["n_params"]


@pytest.mark.parametrize("i", range(6))
def test_prompts(i, logits, golden):
    case = golden["cases"][i]
    row = logits[i, -len(case["input_ids"]) :]
    np.testing.assert_allclose(
        logprobs_of(row, case["input_ids"]), case["prompt_token_logprobs"], rtol=0, atol=TOLERANCE
    )
    top5 = np.argsort(-row[-1])[:5]
    assert top5.tolist() == case["next_top5_ids"]
    np.testing.assert_allclose(row[-1][top5], case["next_top5_logits"], rtol=0, atol=TOLERANCE)
    logprobs = np.asarray(jax.nn.log_softmax(row[-1]), np.float64)
    np.testing.assert_allclose(-np.sum(np.exp(logprobs) * logprobs), case["next_entropy_nats"], atol=TOLERANCE)
    np.testing.assert_allclose(jax.nn.logsumexp(row[-1]), case["next_logsumexp"], rtol=0, atol=TOLERANCE)


def test_greedy_tokens(stories, prompts, golden, folder):
    config, params = stories
    head = {"kernel": jnp.zeros((config.width, 1)), "bias": jnp.zeros(1)}
    sampling = SamplingConfig(max_new_tokens=64, eos_ids=(2,), pad_id=0, temperature=0.0)
    act = jax.jit(partial(generate, ActorCritic(config), sampling=sampling))
    rollout = act({"decoder": params, "value_head": head}, prompts, jax.random.key(0))
    expected = [case["greedy_ids"] for case in golden["cases"]]
    np.testing.assert_array_equal(rollout.response_tokens, expected)
    assert rollout.response_mask.all()
    expected = [case["greedy_token_logprobs"] for case in golden["cases"]]
    np.testing.assert_allclose(rollout.logprobs, expected, rtol=0, atol=TOLERANCE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    case = golden["cases"][0]
    text = tokenizer.decode(case["input_ids"] + case["greedy_ids"], skip_special_tokens=True)
    assert text.startswith(case["prompt"] + case["greedy_text"][:40])


def test_left_padded_batch(stories, golden):
    config, params = stories
    batch = golden["left_padded_batch"]
    tokens, mask = np.array(batch["input_ids"]), np.array(batch["attention_mask"], bool)
    last = np.asarray(jax.jit(Decoder(config).apply)({"params": params}, tokens, mask))[:, -1]
    assert last.argmax(-1).tolist() == batch["next_argmax"]
    np.testing.assert_allclose(last.max(-1), batch["next_top1_logit"], rtol=0, atol=TOLERANCE)


def test_perplexity_of_a_fluent_and_a_scrambled_text(stories, golden, folder):
    config, params = stories
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(entry["text"])["input_ids"] for entry in golden["perplexity"]]
    longest = max(map(len, texts))
    tokens = np.array([[0] * (longest - len(ids)) + ids for ids in texts])
    mask = np.arange(longest) >= longest - np.array([len(ids) for ids in texts])[:, None]
    logits = np.asarray(jax.jit(Decoder(config).apply)({"params": params}, tokens, mask))
    for row, ids, entry in zip(logits, texts, golden["perplexity"], strict=True):
        assert len(ids) == entry["n_tokens"]
        loss = -logprobs_of(row[-len(ids) :], ids).mean()
        np.testing.assert_allclose(loss, entry["mean_nll"], atol=1e-5)
        np.testing.assert_allclose(np.exp(loss), entry["perplexity"], rtol=1e-4)


def test_saved_again_it_is_the_same(stories, folder, tmp_path):
    config, params = stories
    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = hub.save(tmp_path / "policy", params, config, tokenizer)
    assert hub.load_config(out) == config
    again = hub.load_params(out, config)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(params)))
    text = "Once upon a time, there was a cat."
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
