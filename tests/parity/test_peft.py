"""Adapters of PEFT and ours: the same logits, files in both directions, merged and not; random models and a real one.

Needs peft (and accelerate), which `make test-parity` installs.
"""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.torch_side import PROMISE, left_padded, max_relative_error, randomize, torch, torch_logits
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from ppo_jax import hub
from ppo_jax.models import Decoder, LoRAConfig, init_adapter, merge, overlay

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own, at import
    peft = pytest.importorskip("peft", reason="peft is not installed (make test-parity)")

GPT2_MODULES = ["c_attn", "c_proj", "c_fc"]
LLAMA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

pytestmark = [
    # transformers warns of what peft calls; peft warns of Conv1D where nobody told it, and of folders without a base.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]


def gpt2():
    sizes = {"vocab_size": 53, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 40}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def llama():
    sizes = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}
    return LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, tie_word_embeddings=True))


MODELS = {"gpt2": (gpt2, GPT2_MODULES), "llama": (llama, LLAMA_MODULES)}
KINDS = {
    "lora": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 9, "use_dora": True},
    "dora_rslora": {"r": 9, "lora_alpha": 2, "use_dora": True, "use_rslora": True},
}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def base(name, seed, tmp_path):
    """Folder of a random model."""
    randomize(MODELS[name][0](), seed).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def torch_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def randomized_adapter(model, seed):
    """As if it had been trained: A and B both count, and the magnitudes have moved."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if "lora_magnitude" in name:
            parameter.data = parameter.data * (1 + 0.3 * drawn)
        elif "lora_" in name:
            parameter.data = 0.3 * drawn
    return model.eval()


def our_base(folder, scale=1.0):
    config = hub.load_config(folder)
    return dataclasses.replace(config, lora_scale=scale), hub.load_params(folder, config)


def logits_of(config, params, tokens, mask):
    return np.asarray(jax.jit(Decoder(config).apply)({"params": params}, tokens, mask))


def random_adapter(rng, config, params, lora):
    """An adapter of ours, as if it had been trained."""

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape).astype(np.float32)
        return np.asarray(leaf) * (1 + 0.3 * drawn) if path[-1].key == "lora_magnitude" else 0.3 * drawn

    adapter = init_adapter(params, lora, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_gives_the_same_logits_here(kind, name, base, seed, tmp_path):
    model = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=MODELS[name][1], **KINDS[kind])
    model = randomized_adapter(peft.get_peft_model(torch_base(base), model), seed)
    model.save_pretrained(tmp_path / "adapter")
    tokens, mask = left_padded(seed, 53, (30, 11, 1), 3)
    theirs = torch_logits(model, tokens, mask)
    plain = torch_logits(torch_base(base), tokens, mask)
    assert max_relative_error(plain, theirs, mask) > 0.05  # the adapter counts

    config, params = our_base(base)
    lora, adapter = hub.load_adapter(tmp_path / "adapter", config)
    assert (lora.rank, lora.alpha) == (KINDS[kind]["r"], KINDS[kind]["lora_alpha"])
    assert lora.targets == "(down|gate|key|output|query|up|value)$".replace("gate|" * (name == "gpt2"), "")
    config = dataclasses.replace(config, lora_scale=lora.scale)
    both = overlay(params, adapter)
    assert max_relative_error(logits_of(config, both, tokens, mask), theirs, mask) < PROMISE
    assert max_relative_error(logits_of(config, params, tokens, mask), plain, mask) < PROMISE  # the reference

    # Merged, by us and by them, in a folder that transformers opens.
    hub.save(tmp_path / "merged", jax.device_get(merge(both, lora.scale)), config)
    assert max_relative_error(torch_logits(torch_base(tmp_path / "merged"), tokens, mask), theirs, mask) < PROMISE
    unloaded = model.merge_and_unload().state_dict()
    for tensor, ours in torch_base(tmp_path / "merged").state_dict().items():
        assert torch.allclose(ours, unloaded[tensor], rtol=0, atol=2e-5), tensor


@pytest.mark.parametrize("targets", ["query|key|value|output|gate|up|down", "query|value", "layer_1/.*(output|up)"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_ours_opens_in_peft(kind, targets, name, base, seed, rng, tmp_path):
    options = KINDS[kind]
    lora = LoRAConfig(
        options["r"],
        options["lora_alpha"],
        targets,
        rslora=options.get("use_rslora", False),
        dora=options.get("use_dora", False),
    )
    config, params = our_base(base, lora.scale)
    adapter = random_adapter(rng, config, params, lora)
    folder = tmp_path / "adapter"
    if name == "gpt2" and lora.dora and targets == "query|value":
        with pytest.raises(hub.HubError, match="c_attn is one for DoRA"):
            hub.save_adapter(folder, adapter, lora, config)
        return
    hub.save_adapter(folder, adapter, lora, config, str(base))
    tokens, mask = left_padded(seed, 53, (30, 11, 1), 3)
    ours = logits_of(config, overlay(params, adapter), tokens, mask)
    opened = peft.PeftModel.from_pretrained(torch_base(base), folder)
    assert max_relative_error(torch_logits(opened, tokens, mask), ours, mask) < PROMISE
    assert max_relative_error(logits_of(config, params, tokens, mask), ours, mask) > 0.01

    # Nothing in the file was left aside, and nothing there is that the file does not have.
    state = peft.get_peft_model_state_dict(opened)
    stored = peft.load_peft_weights(str(folder), device="cpu")
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[tensor], stored[tensor]) for tensor in state)

    # Their copy of it comes back to the bit, and so does ours.
    opened.save_pretrained(tmp_path / "again")
    for copy in (folder, tmp_path / "again"):
        again, tree = hub.load_adapter(copy, config)
        assert dataclasses.replace(again, targets=targets) == lora
        assert jax.tree.structure(tree) == jax.tree.structure(adapter)
        assert jax.tree.all(jax.tree.map(np.array_equal, tree, adapter))

    # Without a word about the base, peft finds it by the name in the file.
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert max_relative_error(torch_logits(auto, tokens, mask), ours, mask) < PROMISE


SIZES = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FUSED = {
    "phi3": (
        lambda: Phi3ForCausalLM(Phi3Config(**SIZES, num_key_value_heads=2)),
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    ),
    "gpt_neox": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FUSED)
def test_modules_that_are_several_of_ours(family, kind, seed, rng, tmp_path):
    """Side by side and of different widths, or head by head; theirs here, and ours there."""
    make, modules = FUSED[family]
    randomize(make(), seed).save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    model = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=modules, **KINDS[kind])
    model = randomized_adapter(peft.get_peft_model(torch_base(base), model), seed)
    model.save_pretrained(tmp_path / "adapter")
    tokens, mask = left_padded(seed, 53, (30, 11, 1), 3)
    config, params = our_base(base)
    lora, adapter = hub.load_adapter(tmp_path / "adapter", config)
    scaled = dataclasses.replace(config, lora_scale=lora.scale)
    ours = logits_of(scaled, overlay(params, adapter), tokens, mask)
    assert max_relative_error(ours, torch_logits(model, tokens, mask), mask) < PROMISE
    assert max_relative_error(logits_of(config, params, tokens, mask), ours, mask) > 0.01

    options = KINDS[kind]
    lora = LoRAConfig(
        options["r"], options["lora_alpha"], "query|key|value|output|gate|up|down",
        rslora=options.get("use_rslora", False), dora=options.get("use_dora", False),
    )  # fmt: skip
    adapter = random_adapter(rng, config, params, lora)
    hub.save_adapter(tmp_path / "ours", adapter, lora, config, str(base))
    opened = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "ours")
    ours = logits_of(dataclasses.replace(config, lora_scale=lora.scale), overlay(params, adapter), tokens, mask)
    assert max_relative_error(torch_logits(opened, tokens, mask), ours, mask) < PROMISE
    again = hub.load_adapter(tmp_path / "ours", config)[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, again, adapter))


def test_ranks_and_alphas_of_their_own(name, base, seed, tmp_path):
    """Patterns: by a word, by a whole name, by an expression; the first that matches counts."""
    words = {
        "gpt2": ("c_attn", "transformer.h.1.mlp.c_fc", r"h\.0\.mlp\..*"),
        "llama": ("q_proj", "model.layers.1.mlp.up_proj", r"layers\.0\.mlp\..*"),
    }[name]
    model = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=MODELS[name][1],
        rank_pattern=dict(zip(words, (6, 1, 2), strict=True)),
        alpha_pattern=dict(zip(words, (5, 7, 11), strict=True)) | {MODELS[name][1][1]: 3},
    )
    model = randomized_adapter(peft.get_peft_model(torch_base(base), model), seed)
    model.save_pretrained(tmp_path / "adapter")  # which sorts the patterns: the first that matches may be another
    model = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "adapter")
    config, params = our_base(base, 2.0)
    lora, adapter = hub.load_adapter(tmp_path / "adapter", config)
    assert (lora.rank, lora.alpha, lora.scale) == (4, 8, 2)
    tokens, mask = left_padded(seed, 53, (12, 5), 3)
    ours = logits_of(config, overlay(params, adapter), tokens, mask)
    assert max_relative_error(ours, torch_logits(model, tokens, mask), mask) < PROMISE

    # Out again: the ranks stay what they are.
    hub.save_adapter(tmp_path / "again", adapter, lora, config)
    opened = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "again")
    assert max_relative_error(torch_logits(opened, tokens, mask), ours, mask) < PROMISE


def test_a_fresh_adapter_of_peft_and_of_ours(name, base, seed, tmp_path):
    """B is zero: nothing changes, on either side; A follows the same law, of the same width."""
    model = peft.get_peft_model(
        torch_base(base), peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=MODELS[name][1])
    )
    model.save_pretrained(tmp_path / "adapter")
    config, params = our_base(base)
    _, theirs = hub.load_adapter(tmp_path / "adapter", config)
    ours = jax.device_get(init_adapter(params, LoRAConfig(rank=16), jax.random.key(seed)))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    tokens, mask = left_padded(seed, 53, (12, 5), 3)
    expected = logits_of(config, params, tokens, mask)
    for adapter in (ours, theirs):
        np.testing.assert_array_equal(logits_of(config, overlay(params, adapter), tokens, mask), expected)
        for width in (24, 40, 96):
            drawn = [a.ravel() for a in jax.tree.leaves(adapter) if a.ndim == 2 and a.any() and a.shape == (width, 16)]
            if drawn:
                values = np.concatenate(drawn) * np.sqrt(width)
                assert 0.95 < np.abs(values).max() <= 1 + 1e-6
                assert abs(np.var(values) - 1 / 3) < 0.08


def test_magnitudes_have_the_gradient_of_peft(name, base, seed, tmp_path):
    """DoRA's norm is a constant to the gradient: theirs and ours, for A, B and m."""
    model = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=MODELS[name][1], **KINDS["dora"])
    model = randomized_adapter(peft.get_peft_model(torch_base(base), model), seed)
    model.save_pretrained(tmp_path / "adapter")
    tokens, mask = left_padded(seed, 53, (9, 9), 3)
    model(torch.tensor(tokens)).logits.square().mean().backward()
    gradients = {
        parameter.replace(".default", ""): tensor.grad
        for parameter, tensor in model.named_parameters()
        if tensor.grad is not None
    }
    config, params = our_base(base)
    lora, adapter = hub.load_adapter(tmp_path / "adapter", config)
    config = dataclasses.replace(config, lora_scale=lora.scale)

    def loss(adapter):
        return jnp.mean(jnp.square(Decoder(config).apply({"params": overlay(params, adapter)}, tokens, mask)))

    # As tensors of torch: what our gradients are called there. GPT-2 shares one A among three, whose gradients add up.
    ours = jax.jit(jax.grad(loss))(adapter)
    compared = 0
    for i in range(2):
        prefix = f"base_model.model.{'transformer.h' if name == 'gpt2' else 'model.layers'}.{i}."
        table = {"mlp.c_proj": ("mlp", "down"), "mlp.c_fc": ("mlp", "up"), "attn.c_proj": ("attention", "output")}
        if name == "llama":
            table = {"mlp.gate_proj": ("mlp", "gate"), "self_attn.q_proj": ("attention", "query")}
            table |= {"self_attn.v_proj": ("attention", "value"), "self_attn.o_proj": ("attention", "output")}
        for theirs, (part, projection) in table.items():
            one = ours[f"layer_{i}"][part][projection]
            pairs = {"lora_A.weight": one["lora_a"].T, "lora_B.weight": one["lora_b"].T}
            pairs["lora_magnitude_vector.weight"] = one["lora_magnitude"]
            for kind, gradient in pairs.items():
                expected = gradients[f"{prefix}{theirs}.{kind}"].numpy()
                error = np.abs(np.asarray(gradient) - expected).max() / np.abs(expected).max()
                assert error < PROMISE, (theirs, kind)
                compared += 1
    assert compared == 2 * 3 * len(table)


def test_a_fused_module_in_one_picture(seed, tmp_path, rng):
    """GPT-2's c_attn: three A's above each other, three B's in the blocks of a diagonal, thrice the rank and alpha."""
    randomize(gpt2(), seed).save_pretrained(tmp_path / "base")
    lora = LoRAConfig(rank=2, alpha=5, targets="query|key|value")
    config, params = our_base(tmp_path / "base", lora.scale)
    hub.save_adapter(tmp_path / "adapter", random_adapter(rng, config, params, lora), lora, config)
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (raw["rank_pattern"], raw["alpha_pattern"]) == ({"c_attn": 6}, {"c_attn": 15})
    opened = peft.PeftModel.from_pretrained(torch_base(tmp_path / "base"), tmp_path / "adapter")
    layer = opened.base_model.model.transformer.h[1].attn.c_attn
    assert (layer.r["default"], layer.scaling["default"]) == (6, 2.5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_stories(kind, shared, rng, tmp_path):
    """A model that was really trained: both directions, and merged."""
    folder = shared / "models" / "stories15M"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    lora = LoRAConfig(rank=8, alpha=16, dora=kind == "dora")
    config, params = our_base(folder, lora.scale)
    adapter = random_adapter(rng, config, params, lora)
    small = jax.tree_util.tree_map_with_path(lambda p, x: x if "magnitude" in p[-1].key else 0.1 * x, adapter)
    hub.save_adapter(tmp_path / "ours", small, lora, config, str(folder))
    tokens, mask = left_padded(int(rng.integers(2**31)), config.vocab_size, (40, 17), 0)
    ours = logits_of(config, overlay(params, small), tokens, mask)
    model = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "ours", is_trainable=True).eval()
    assert max_relative_error(torch_logits(model, tokens, mask), ours, mask) < PROMISE
    assert max_relative_error(logits_of(config, params, tokens, mask), ours, mask) > 0.01

    model = randomized_adapter(model, int(rng.integers(2**31)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as far from the base as training goes: further off, rounding grows with the logits
            parameter.data *= 0.1
    model.save_pretrained(tmp_path / "theirs")
    again, adapter = hub.load_adapter(tmp_path / "theirs", config)
    assert again.scale == lora.scale
    ours = logits_of(config, overlay(params, adapter), tokens, mask)
    assert max_relative_error(torch_logits(model, tokens, mask), ours, mask) < PROMISE
    merged = logits_of(config, jax.device_get(merge(overlay(params, adapter), lora.scale)), tokens, mask)
    assert max_relative_error(merged, ours, mask) < PROMISE
