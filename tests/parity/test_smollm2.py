"""SmolLM2-135M-Instruct: a real chat model with 9 query and 3 key heads, whose padding token is its EOS."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.torch_side import max_relative_error, torch, torch_greedy, torch_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_jax import hub
from ppo_jax.models import ActorCritic, Decoder
from ppo_jax.sampling import SamplingConfig, generate
from ppo_jax.types import Prompts

NEW = 32
TEXTS = ("The capital of France is", "def add(a, b):\n    return", "Once upon a time, in a land far away, there lived")
QUESTION = "What is the largest planet? Answer in one short sentence."


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Three texts and a chat, padded left with the EOS id, which the chat also has inside."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    tokenizer.padding_side = "left"
    encoded = tokenizer([*TEXTS, chat], padding=True, add_special_tokens=False, return_tensors="np")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert 2 in encoded["input_ids"][3][encoded["attention_mask"][3] == 1]
    return encoded["input_ids"], encoded["attention_mask"].astype(bool)


@pytest.fixture(scope="module")
def theirs(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(smollm2):
    config = hub.load_config(smollm2)
    assert (config.num_heads, config.num_kv_heads, config.num_layers) == (9, 3, 30)
    params = jax.device_put(hub.load_params(smollm2, config))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    return config, params


def test_logits(batch, theirs, ours):
    config, params = ours
    logits = np.asarray(jax.jit(Decoder(config).apply)({"params": params}, *batch))
    assert max_relative_error(logits, torch_logits(theirs, *batch), batch[1]) < 1e-4


def test_greedy_text(batch, theirs, ours, tokenizer):
    config, params = ours
    tokens, mask = batch
    head = {"kernel": jnp.zeros((config.width, 1)), "bias": jnp.zeros(1)}
    sampling = SamplingConfig(max_new_tokens=NEW, eos_ids=(2,), pad_id=2, temperature=0.0)
    act = jax.jit(partial(generate, ActorCritic(config), sampling=sampling))
    prompts = Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
    rollout = act({"decoder": params, "value_head": head}, prompts, jax.random.key(0))
    expected = torch_greedy(theirs, tokens, mask, NEW, [2], 2)
    np.testing.assert_array_equal(rollout.response_tokens, expected)
    lengths = rollout.response_mask.sum(1).tolist()
    assert lengths == [row.tolist().index(2) + 1 if 2 in row else NEW for row in expected]
    assert lengths[3] < NEW, "the chat ends by itself"
    assert tokenizer.decode(expected[3]).startswith("The largest planet is")
