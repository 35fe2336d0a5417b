"""Random models of transformers and ours: the same logits, the same greedy tokens, folders in both directions.

The weights are new in each run, other than where an argmax decides: two logits that are equal to the last bit would be
no mistake of ours.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.torch_side import left_padded, max_relative_error, randomize, torch, torch_greedy, torch_logits
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ppo_jax import hub
from ppo_jax.models import ActorCritic, Decoder
from ppo_jax.sampling import SamplingConfig, generate
from ppo_jax.types import Prompts

PROMISE = 1e-4  # against float32 torch, which rounds as much as we do
TOLERANCE = 3e-5  # against float64 torch: float32 torch and we are both at 1e-6 to 6e-6 over some dozens of seeds
PAD = 3


def gpt2(**changes):
    sizes = {"vocab_size": 53, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 40}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **changes}))


SIZES = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 40, "tie_word_embeddings": True}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def qwen2(**changes):
    return Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "num_key_value_heads": 2, **changes}))


def qwen3(**changes):
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "num_key_value_heads": 2, "head_dim": 6, **changes}))


MODELS = {
    "gpt2": gpt2,
    "gpt2_inner_epsilon": partial(gpt2, n_inner=17, layer_norm_epsilon=0.1),
    "gpt2_one_head_one_layer": partial(gpt2, n_head=1, n_layer=1),
    "gpt2_untied_gelu": partial(gpt2, tie_word_embeddings=False, activation_function="gelu"),
    "gpt2_relu": partial(gpt2, activation_function="relu", n_head=12),
    "gpt2_silu_upcast": partial(gpt2, activation_function="silu", reorder_and_upcast_attn=True),
    "gpt2_pytorch_tanh": partial(gpt2, activation_function="gelu_pytorch_tanh", n_layer=3),
    "llama": llama,
    "llama_grouped": partial(llama, num_key_value_heads=2, rms_norm_eps=0.1),
    "llama_one_key_head_wide": partial(llama, num_key_value_heads=1, head_dim=10),
    "llama_narrow_heads_untied": partial(llama, head_dim=2, tie_word_embeddings=False),
    "llama_biases": partial(llama, attention_bias=True, mlp_bias=True, num_key_value_heads=2, head_dim=8),
    "llama_theta": partial(llama, rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    "llama_theta_gelu": partial(
        llama, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, hidden_act="gelu_new", num_hidden_layers=3
    ),
    "qwen2": qwen2,
    "qwen2_untied_theta": partial(
        qwen2, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "qwen2_window_off": partial(qwen2, sliding_window=4, max_window_layers=1, num_key_value_heads=4),
    "qwen3": qwen3,
    "qwen3_wide_untied": partial(qwen3, head_dim=10, tie_word_embeddings=False, rms_norm_eps=0.1),
    "qwen3_biases": partial(qwen3, attention_bias=True, num_key_value_heads=1, num_hidden_layers=3),
    "llama_nine_heads": partial(llama, hidden_size=36, num_attention_heads=9, num_key_value_heads=3),
}


@pytest.fixture(params=MODELS)
def model(request, seed):
    return randomize(MODELS[request.param](), seed)


def ours(folder):
    config = hub.load_config(folder)
    return config, hub.load_params(folder, config)


def our_logits(folder, tokens, mask):
    config, params = ours(folder)
    return np.asarray(jax.jit(Decoder(config).apply)({"params": params}, tokens, mask))


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_logits_and_folders(model, seed, tmp_path):
    model.save_pretrained(tmp_path / "theirs")
    tokens, mask = left_padded(seed, 53, (30, 11, 1, 30), PAD)
    theirs = torch_logits(model, tokens, mask)
    logits = our_logits(tmp_path / "theirs", tokens, mask)
    assert max_relative_error(logits, theirs, mask) < PROMISE

    # In several files, the same parameters.
    config, params = ours(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    assert same(ours(tmp_path / "sharded")[1], params)

    # Back again: the same weights, to the bit. (Torch may round the logits otherwise: it has five names, and several
    # programs, for the activation that we write as gelu_new.)
    hub.save(tmp_path / "ours", params, config, eos_ids=[2, 5], pad_id=PAD)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert max_relative_error(torch_logits(again, tokens, mask), theirs, mask) < 1e-6
    assert (again.generation_config.eos_token_id, again.generation_config.pad_token_id) == ([2, 5], PAD)
    assert ours(tmp_path / "ours")[0] == config

    # The yardstick, last: it changes the model.
    assert max_relative_error(logits, torch_logits(model.double(), tokens, mask), mask) < TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_a_full_context(scale, seed, tmp_path):
    """Every position of a model, also at the size of a usual initialisation."""
    changes = {"max_position_embeddings": 256, "num_key_value_heads": 2}
    model = randomize(llama(**changes, rope_parameters={"rope_type": "default", "rope_theta": 1e4}), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale / 0.3 if parameter.dim() > 1 and scale < 1 else 1.0)
    model.save_pretrained(tmp_path)
    tokens, mask = left_padded(seed, 53, (256, 200), PAD)
    logits = our_logits(tmp_path, tokens, mask)
    assert max_relative_error(logits, torch_logits(model, tokens, mask), mask) < PROMISE
    assert max_relative_error(logits, torch_logits(model.double(), tokens, mask), mask) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("make", [gpt2, llama, qwen2, qwen3])
def test_half_precision_files_mean_what_torch_reads(make, dtype, seed, tmp_path):
    randomize(make(), seed).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens, mask = left_padded(seed, 53, (12, 5), PAD)
    assert max_relative_error(our_logits(tmp_path, tokens, mask), torch_logits(model, tokens, mask), mask) < PROMISE


@pytest.mark.parametrize("make", [gpt2, llama, qwen2, qwen3])
def test_bfloat16_is_as_near_to_float32_as_torchs(make, seed, tmp_path):
    """Parameters and products in bfloat16. Over 50 draws the median was 1.0 times torch's distance, the most 1.8."""
    model = randomize(make(), seed)
    model.save_pretrained(tmp_path)
    tokens, mask = left_padded(seed, 53, (12, 5), PAD)
    exact = torch_logits(model, tokens, mask)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        ones = torch.tensor(mask, dtype=torch.long)
        positions = (ones.cumsum(1) - 1).clamp(min=0)
        theirs = half(torch.tensor(tokens), attention_mask=ones, position_ids=positions).logits.float().numpy()
    config = hub.load_config(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
    params = hub.load_params(tmp_path, config)
    logits = np.asarray(jax.jit(Decoder(config).apply)({"params": params}, tokens, mask))
    assert max_relative_error(logits, exact, mask) < 5 * max_relative_error(theirs, exact, mask)

    hub.save(tmp_path / "ours", params, config)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), half.parameters(), strict=True))


@pytest.mark.parametrize("style", [4, 5])
def test_config_files_of_transformers_4_and_5(style, seed, tmp_path):
    model = randomize(llama(rope_parameters={"rope_type": "default", "rope_theta": 77.0}), seed)
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["rope_parameters"]["rope_theta"] == 77.0
    if style == 4:
        del raw["rope_parameters"]
        raw |= {"rope_theta": 77.0, "rope_scaling": None, "torch_dtype": raw.pop("dtype")}
        (tmp_path / "config.json").write_text(json.dumps(raw))
    tokens, mask = left_padded(seed, 53, (20, 9), PAD)
    for opened in (model, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        error = max_relative_error(our_logits(tmp_path, tokens, mask), torch_logits(opened, tokens, mask), mask)
        assert error < PROMISE


@pytest.mark.parametrize("name", ["gpt2", "gpt2_untied_gelu", "llama_grouped", "llama_biases", "llama_theta"])
def test_greedy_tokens(name, tmp_path):
    new, number = 16, 1 + list(MODELS).index(name)
    model = randomize(MODELS[name](), number)
    model.save_pretrained(tmp_path)
    tokens, mask = left_padded(number, 53, (9, 4, 1, 6), PAD)
    config, params = ours(tmp_path)
    head = {"kernel": jnp.zeros((config.width, 1)), "bias": jnp.zeros(1)}

    def our_greedy(eos_ids):
        sampling = SamplingConfig(max_new_tokens=new, eos_ids=eos_ids, pad_id=PAD, temperature=0.0)
        act = jax.jit(partial(generate, ActorCritic(config), sampling=sampling))
        prompts = Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
        return act({"decoder": params, "value_head": head}, prompts, jax.random.key(0))

    free = torch_greedy(model, tokens, mask, new, None, PAD)
    np.testing.assert_array_equal(our_greedy(()).response_tokens, free)

    # Two ids that end a text: one row ends with its first token, one in the middle.
    eos = [int(free[2, 0]), int(free[0, 5])]
    rollout = our_greedy(tuple(eos))
    np.testing.assert_array_equal(rollout.response_tokens, torch_greedy(model, tokens, mask, new, eos, PAD))
    ends = [next((t + 1 for t, token in enumerate(row) if token in eos), new) for row in free]
    assert ends[2] == 1
    np.testing.assert_array_equal(rollout.response_mask, np.arange(new) < np.array(ends)[:, None])
