"""Hugging Face folders: what is read, what is written, and everything that is refused; no torch, no network."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from ppo_jax import hub
from ppo_jax.hub.families import FAMILIES
from ppo_jax.models import Decoder, ModelConfig

SIZES = {"vocab_size": 13, "num_layers": 2, "num_heads": 4, "width": 8, "mlp_width": 6, "max_positions": 10}
CONFIGS = {
    "gpt2": ModelConfig(
        **SIZES,
        positions="learned",
        norm="layernorm",
        norm_eps=3e-5,
        activation="gelu_tanh",
        gated_mlp=False,
        attention_bias=True,
        mlp_bias=True,
    ),
    "gpt2_untied": ModelConfig(
        **SIZES,
        positions="learned",
        norm="layernorm",
        activation="relu",
        gated_mlp=False,
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=False,
        init_std=0.1,
    ),
    "llama": ModelConfig(**SIZES, num_kv_heads=2, head_dim=6, rope_theta=500.0, norm_eps=1e-6),
    "llama_untied": ModelConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_embeddings=False, activation="gelu", init_std=0.3
    ),
    "qwen2": ModelConfig(**SIZES, num_kv_heads=2, attention_bias=True, attention_output_bias=False),
    "qwen3": ModelConfig(**SIZES, num_kv_heads=2, head_dim=6, qk_norm=True),
    "qwen3_untied": ModelConfig(**SIZES, attention_bias=True, qk_norm=True, tie_embeddings=False),
}


def random_params(rng, config):
    tree = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), tree["params"])


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def edit_config(folder: Path, **changes) -> Path:
    """Changes keys of config.json; `...` removes one."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {name: value for name, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def edit_weights(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(params=["gpt2", "llama"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Small good folders of both families, to be copied."""
    place = tmp_path_factory.mktemp("good")
    for name in ("gpt2", "llama"):
        hub.save(place / name, random_params(np.random.default_rng(0), CONFIGS[name]), CONFIGS[name], eos_ids=[2])
    return place


@pytest.fixture
def folder(family, good, tmp_path):
    """A good folder of either family, to be spoilt."""
    return Path(shutil.copytree(good / family, tmp_path / "model"))


@pytest.fixture
def gpt2(good, tmp_path):
    return Path(shutil.copytree(good / "gpt2", tmp_path / "gpt2_model"))


@pytest.fixture
def llama(good, tmp_path):
    return Path(shutil.copytree(good / "llama", tmp_path / "llama_model"))


def load(folder):
    return hub.load_params(folder, hub.load_config(folder))


def refused(pattern, function, *arguments):
    """Holds that a call ends in the typed error, and that it is one line."""
    with pytest.raises(hub.HubError, match=pattern) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


# There and back.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_is_exact(name, dtype, rng, tmp_path):
    config = dataclasses.replace(CONFIGS[name], param_dtype=dtype)
    params = random_params(rng, config)
    folder = hub.save(tmp_path / "deep" / "model", params, config)
    assert hub.load_config(folder, param_dtype=dtype) == config
    assert_same(hub.load_params(folder, config), params)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_the_same_parameters_give_the_same_bytes(folder, family, tmp_path):
    again = hub.save(tmp_path / "again", load(folder), CONFIGS[family], eos_ids=[2])
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_jax_arrays_are_saved_as_numpy_ones(folder, family, tmp_path):
    params = jax.tree.map(jnp.asarray, load(folder))
    assert_same(load(hub.save(tmp_path / "again", params, CONFIGS[family])), load(folder))


def test_gpt2_tensors_are_fused_and_not_transposed(gpt2):
    """By hand: the names of openai-community/gpt2, whose c_attn is query, key and value side by side, [in, out]."""
    tensors, params = load_file(gpt2 / "model.safetensors"), load(gpt2)
    attention = params["layer_1"]["attention"]
    fused = np.hstack([attention[name]["kernel"] for name in ("query", "key", "value")])
    np.testing.assert_array_equal(tensors["transformer.h.1.attn.c_attn.weight"], fused)
    fused = np.hstack([attention[name]["bias"] for name in ("query", "key", "value")])
    np.testing.assert_array_equal(tensors["transformer.h.1.attn.c_attn.bias"], fused)
    np.testing.assert_array_equal(tensors["transformer.h.0.mlp.c_fc.weight"], params["layer_0"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(tensors["transformer.wpe.weight"], params["positions"]["embedding"])
    assert len(tensors) == 2 + 2 * 12 + 2


def test_llama_tensors_are_transposed(llama):
    """By hand: torch's Linear stores [out, in]."""
    tensors, params = load_file(llama / "model.safetensors"), load(llama)
    layer = params["layer_1"]
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.k_proj.weight"].T, layer["attention"]["key"]["kernel"]
    )
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.down_proj.weight"].T, layer["mlp"]["down"]["kernel"])
    np.testing.assert_array_equal(tensors["model.layers.1.post_attention_layernorm.weight"], layer["mlp_norm"]["scale"])
    np.testing.assert_array_equal(tensors["model.norm.weight"], params["final_norm"]["scale"])
    assert len(tensors) == 1 + 2 * 9 + 1


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float64", "float32")],
)
def test_stored_precision_becomes_the_wanted_one(folder, family, stored, wanted):
    dtype = np.dtype(getattr(ml_dtypes, stored, stored))
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(wanted), load(folder))
    edit_weights(folder, lambda tensors: {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    assert_same(hub.load_params(folder, hub.load_config(folder, param_dtype=wanted)), expected)


def test_loaded_parameters_are_those_of_the_model(folder, family):
    config = hub.load_config(folder)
    tokens, mask = np.ones((1, 3), int), np.ones((1, 3), bool)
    logits = jax.eval_shape(Decoder(config).apply, {"params": load(folder)}, tokens, mask)
    assert (logits.shape, logits.dtype) == ((1, 3, 13), jnp.float32)


# What transformers reads, as far as it does without torch; tests/parity has the rest.


def test_transformers_reads_the_configuration(folder, family):
    theirs = AutoConfig.from_pretrained(folder)
    assert theirs.model_type == family
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads) == (8, 2, 4)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, 2, None)
    assert theirs.tie_word_embeddings
    if family == "llama":
        assert (theirs.head_dim, theirs.num_key_value_heads) == (6, 2)
        assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    else:
        assert (theirs.n_inner, theirs.activation_function, theirs.layer_norm_epsilon) == (6, "gelu_new", 3e-5)


def test_the_tokenizer_is_saved_with_the_model(folder, family, tmp_path):
    tokenizer = small_tokenizer()
    out = hub.save(tmp_path / "out", load(folder), CONFIGS[family], tokenizer)
    assert AutoTokenizer.from_pretrained(out)("a b c")["input_ids"] == tokenizer("a b c")["input_ids"] == [3, 4, 5]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert json.loads((out / "generation_config.json").read_text()) == ids
    assert json.loads((out / "config.json").read_text()).items() >= ids.items()


def small_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "a", "b", "c"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("eos_ids", "written"), [([2], 2), ([2, 5], [2, 5]), ([], None), (None, None)])
def test_end_ids(folder, family, tmp_path, eos_ids, written):
    out = hub.save(tmp_path / "out", load(folder), CONFIGS[family], eos_ids=eos_ids, pad_id=0, bos_id=1)
    ids = {"bos_token_id": 1, "eos_token_id": written, "pad_token_id": 0}
    assert json.loads((out / "generation_config.json").read_text()) == ids


@pytest.mark.parametrize(
    ("text", "ids"),
    [('{"eos_token_id": 2}', (2,)), ('{"eos_token_id": [2, 5]}', (2, 5)), ('{"eos_token_id": null}', ()), ("{}", ())],
)
def test_end_ids_are_read(llama, text, ids):
    (llama / "generation_config.json").write_text(text)
    assert hub.load_eos_ids(llama) == ids


@pytest.mark.parametrize("value", ['"2"', "true", "[2, null]", "-1", "2.0", "{}"])
def test_end_ids_that_are_none(llama, value):
    (llama / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    refused("generation_config.json: eos_token_id .* expected an id or a list of ids", hub.load_eos_ids, llama)


def test_a_folder_without_generation_config_says_it_in_its_config(llama):
    (llama / "generation_config.json").unlink()
    for in_config, expected in ((2, (2,)), ([2, 5], (2, 5)), (None, ())):
        config = json.loads((llama / "config.json").read_text()) | {"eos_token_id": in_config}
        (llama / "config.json").write_text(json.dumps(config))
        assert hub.load_eos_ids(llama) == expected


# config.json: what is read.


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 700}, 700.0),
        ({"rope_theta": ...}, 10_000.0),
        ({"rope_theta": 700.0, "rope_scaling": None}, 700.0),
        ({"rope_theta": 700.0, "rope_scaling": {"type": "default"}}, 700.0),
        ({"rope_theta": 700.0, "rope_scaling": {"rope_type": "default", "factor": None}}, 700.0),
        ({"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}, 700.0),
        ({"rope_theta": 700.0, "rope_parameters": {"rope_theta": 700.0, "partial_rotary_factor": 1.0}}, 700.0),
        ({"rope_theta": 700.0, "rope_parameters": None}, 700.0),
    ],
)
def test_rope_theta_of_transformers_4_and_5(llama, changes, theta):
    assert hub.load_config(edit_config(llama, **changes)).rope_theta == theta


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": None, "head_dim": ...}, {"num_kv_heads": 4, "head_dim": 2}),
        ({"rms_norm_eps": ...}, {"norm_eps": 1e-6}),
        ({"tie_word_embeddings": ...}, {"tie_embeddings": False}),
        ({"hidden_act": "swish"}, {"activation": "silu"}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"attention_bias": True, "mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}),
        ({"attention_bias": ..., "mlp_bias": None}, {"attention_bias": False, "mlp_bias": False}),
        ({"torch_dtype": ..., "dtype": "float16"}, {"dtype": "float32", "param_dtype": "float32"}),
        # Options that are off, known or not.
        ({"pretraining_tp": 1, "rope_interleaved": False, "sliding_window": None, "use_magic": False}, {}),
        ({"attention_dropout": 0.1, "is_llama_config": True, "transformers.js_config": {"kv_cache_dtype": {}}}, {}),
    ],
)
def test_llama_keys(llama, changes, expected):
    assert hub.load_config(edit_config(llama, **changes)) == dataclasses.replace(CONFIGS["llama"], **expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_inner": None}, {"mlp_width": 32}),
        ({"n_inner": ..., "layer_norm_epsilon": ...}, {"mlp_width": 32, "norm_eps": 1e-5}),
        ({"activation_function": ..., "tie_word_embeddings": ...}, {}),
        ({"activation_function": "gelu"}, {"activation": "gelu"}),
        ({"n_ctx": 10, "resid_pdrop": 0.1, "summary_type": "cls_index", "task_specific_params": {"a": {}}}, {}),
        ({"reorder_and_upcast_attn": True, "scale_attn_weights": True, "add_cross_attention": False}, {}),
    ],
)
def test_gpt2_keys(gpt2, changes, expected):
    assert hub.load_config(edit_config(gpt2, **changes)) == dataclasses.replace(CONFIGS["gpt2"], **expected)


def test_published_configurations_are_understood(tmp_path):
    """Copies of config.json of openai-community/gpt2 and HuggingFaceTB/SmolLM2-135M-Instruct."""
    (tmp_path / "config.json").write_text(
        """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}"""
    )
    config = hub.load_config(tmp_path, dtype="bfloat16")
    assert (config.mlp_width, config.tie_embeddings, config.dtype) == (3072, True, "bfloat16")
    (tmp_path / "config.json").write_text(
        """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
        "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152}"""
    )
    config = hub.load_config(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (3, 64, 100_000.0)


# config.json: what is refused.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json: not readable as JSON"),
        ("{", "config.json: not readable as JSON"),
        ("[1]", r"config.json: got \[1\], expected a JSON object"),
        ('{"model_type": NaN}', "not readable as JSON .NaN is not a number"),
        ("[" * 100_000, "config.json: not readable as JSON"),
        ("{}", "model_type None is not supported, only gpt2, llama"),
        ('{"model_type": "mamba"}', "model_type 'mamba' is not supported, only gpt2, llama"),
        ('{"model_type": ["gpt2"]}', r"model_type \['gpt2'\] is not supported"),
        ('{"model_type": "a\\nb"}', "not supported"),
    ],
)
def test_broken_configurations(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    refused(message, hub.load_config, tmp_path)
    refused(message, hub.load_params, tmp_path, CONFIGS["gpt2"])


def test_configuration_that_is_not_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    refused("not readable as JSON", hub.load_config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "many"}, "vocab_size: got 'many', expected a positive whole number"),
        ({"vocab_size": True}, "vocab_size: got True"),
        ({"hidden_size": 8.0}, "hidden_size: got 8.0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: got -1"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: got 1000000000000"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: got '1e-6', expected a number"),
        ({"rms_norm_eps": {"__float__": "Infinity"}}, "rms_norm_eps: got {'__float__'"),
        ({"rms_norm_eps": 0}, "norm_eps: got 0.0, expected a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: got 1, expected true or false"),
        ({"num_key_value_heads": 3}, r"num_kv_heads: got 3, expected a divisor of num_heads \(4\)"),
        ({"head_dim": 5}, "head_dim: got 5, expected an even number"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported, only gelu_new, .* relu"),
        ({"hidden_act": ["silu"]}, r"hidden_act \['silu'\] is not supported"),
        ({"pretraining_tp": 2}, "pretraining_tp: got 2, only 1 is supported"),
        ({"pretraining_tp": [1]}, r"pretraining_tp: got \[1\], only 1 is supported"),
        ({"rope_interleaved": True}, "rope_interleaved: got True, only False is supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, only 1 is supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling of type 'llama3' is not supported, only default"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters of type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 500.0 and, in rope_parameters, 1000000.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: got 0.5"),
        ({"rope_parameters": {"mrope_section": [1]}}, "rope_parameters: 'mrope_section' is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "'full_attention' is not supported"),
        ({"rope_scaling": ["linear"]}, r"rope_scaling: got \['linear'\], expected an object"),
        ({"sliding_window": 4096}, "not understood: 'sliding_window'; it may change what the model computes"),
        ({"attn_logit_softcapping": 30.0, "qk_norm": True}, "not understood: 'attn_logit_softcapping', 'qk_norm'"),
        ({"quantization_config": {"bits": 4}}, "not understood: 'quantization_config'"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "not understood: 'auto_map'"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: got True, only False is supported"),
        ({"is_causal": False}, "is_causal: got False, only True is supported"),
    ],
)
def test_llama_configurations_that_are_refused(llama, changes, message):
    refused(message, hub.load_config, edit_config(llama, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": ...}, "n_embd is missing"),
        ({"n_embd": 10}, r"width: got 10, expected a multiple of num_heads \(4\)"),
        ({"scale_attn_weights": False}, "scale_attn_weights: got False, only True is supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: got True, only False"),
        ({"add_cross_attention": True}, "add_cross_attention: got True, only False"),
        ({"activation_function": "quick_gelu"}, "activation_function 'quick_gelu' is not supported"),
        ({"rope_theta": 1e4}, "not understood: 'rope_theta'"),
        ({"num_key_value_heads": 1}, "not understood: 'num_key_value_heads'"),
    ],
)
def test_gpt2_configurations_that_are_refused(gpt2, changes, message):
    refused(message, hub.load_config, edit_config(gpt2, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window: got True, only False is supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: got .* only full_attention"),
        ({"layer_types": ["full_attention", None]}, "layer_types: got .* only full_attention"),
        ({"mlp_bias": True}, "not understood: 'mlp_bias'"),
    ],
)
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_qwen_configurations_that_are_refused(name, changes, message, rng, tmp_path):
    folder = hub.save(tmp_path / "model", random_params(rng, CONFIGS[name]), CONFIGS[name])
    assert hub.load_config(edit_config(folder, layer_types=["full_attention"] * 2)) == CONFIGS[name]
    refused(message, hub.load_config, edit_config(folder, **changes))


# Weights: what is read.


def test_names_without_the_prefix_and_with_buffers(folder, family):
    """As openai-community/gpt2 and old Llama folders have them."""
    expected = load(folder)
    prefix = FAMILIES[family].prefix
    buffers = {
        "gpt2": {"h.1.attn.bias": np.tri(10, dtype=bool)[None, None], "h.0.attn.masked_bias": np.float32([-1e4])},
        "llama": {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)},
    }[family]
    edit_weights(folder, lambda t: {name.removeprefix(prefix): tensor for name, tensor in t.items()} | buffers)
    assert_same(load(folder), expected)


def test_a_stored_head_that_is_tied_must_be_the_embedding(folder, family):
    expected = load(folder)
    name = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}[family]
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors[name]})
    assert_same(load(folder), expected)
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors[name] + 1})
    refused("lm_head.weight is not the embedding, although tie_word_embeddings is true", load, folder)


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Splits model.safetensors into several files with an index; returns the index's table."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        part = dict(sorted(tensors.items())[i::count])
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_weights(folder, family):
    expected = load(folder)
    shard(folder)
    assert_same(load(folder), expected)


# Weights: what is refused.


def test_pickles_are_refused_and_never_opened(folder, family):
    (folder / "model.safetensors").unlink()
    refused("no weights, expected model.safetensors or model.safetensors.index.json", load, folder)
    # Whoever unpickles this raises, loudly.
    (folder / "pytorch_model.bin").write_bytes(b"cos\n_exit\n(I3\ntR.")
    refused(r"only pickle weights \('pytorch_model.bin'\), which run code .* refused; expected", load, folder)


def test_damaged_files(folder, family):
    path = folder / "model.safetensors"
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")

    def with_header(**changes) -> bytes:
        text = json.dumps(header | {name: header[name] | changes}).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + size :]

    begin, end = header[name]["data_offsets"]
    cases = {
        "empty": b"",
        "no header": b"junk" * 10,
        "a pickle": b"cos\n_exit\n(I3\ntR.",
        "cut off": good[:-1],
        "too long": good + b"\0",
        "an absurd header size": (2**62).to_bytes(8, "little") + good[8:],
        "a header that is not JSON": good[:8] + b"}" * size + good[8 + size :],
        "offsets beyond the end": with_header(data_offsets=[begin, 2**40]),
        "offsets that overlap": with_header(data_offsets=[begin + 4, end + 4]),
        "a shape that does not fit the offsets": with_header(shape=[2**40]),
        "an unknown dtype": with_header(dtype="F7"),
    }
    for content in cases.values():
        path.write_bytes(content)
        refused("model.safetensors: not a safetensors file", load, folder)


def first_weight(tensors) -> str:
    return next(name for name in sorted(tensors) if tensors[name].ndim == 2)


def poison(value):
    def change(tensors):
        name = first_weight(tensors)
        tensors[name] = tensors[name].astype(np.float64)
        tensors[name][0, 0] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {name: t[name] for name in t if name != first_weight(t)}, "tensors are missing: '"),
        (lambda t: dict.fromkeys("abc", np.zeros(1)), "tensors are missing: .* and .* more"),
        (lambda t: t | {"value.weight": np.zeros((2, 8))}, "tensors that a .* so configured has not: '.*value.weight'"),
        (lambda t: t | {first_weight(t): t[first_weight(t)][1:]}, r"got shape \(.*\), expected \("),
        (lambda t: t | {first_weight(t): t[first_weight(t)][None]}, r"got shape \(1, .*\), expected \("),
        (lambda t: t | {first_weight(t): t[first_weight(t)].astype(np.int8)}, "got dtype I8, expected one of F64, F32"),
        (poison(np.nan), "has values that are not finite numbers in float32"),
        (poison(-np.inf), "has values that are not finite numbers in float32"),
        (poison(1e300), "has values that are not finite numbers in float32"),
        (lambda t: t | {first_weight(t).split(".", 1)[1]: t[first_weight(t)]}, "is there twice, with and without"),
        (lambda t: {"a": np.zeros(1)}, "2 layers in the configuration, 1 tensors in the files"),
    ],
)  # fmt: skip
def test_weights_that_are_refused(folder, family, change, message):
    refused(message, load, edit_weights(folder, change))


def test_biases_that_the_configuration_does_not_have_are_surplus(llama):
    edit_weights(llama, lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)})
    refused("so configured has not: 'model.layers.0.self_attn.q_proj.bias'", load, llama)
    refused(
        r"tensors are missing: '.*\.bias', .* and 10 more", load, edit_config(llama, attention_bias=True, mlp_bias=True)
    )


def test_a_claim_of_many_layers_is_refused_at_once(folder, family):
    edit_config(folder, **{FAMILIES[family].keys["num_layers"].name: 2**31 - 1})
    refused("2147483647 layers in the configuration", load, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, first: m | {first: "../model.safetensors"}, r"refuses '../model.safetensors', expected the name"),
        (lambda m, first: m | {first: "/etc/passwd"}, "refuses '/etc/passwd'"),
        (lambda m, first: m | {first: "sub/a.safetensors"}, "refuses 'sub/a.safetensors'"),
        (lambda m, first: m | {first: "..\\a.safetensors"}, "refuses "),
        (lambda m, first: m | {first: ".."}, "refuses '..'"),
        (lambda m, first: m | {first: ""}, "refuses ''"),
        (lambda m, first: m | {first: "pytorch_model.bin"}, "refuses 'pytorch_model.bin'"),
        (lambda m, first: m | {first: "model-00009-of-00003.safetensors"}, "names 'model-00009.*, which is not there"),
        (lambda m, first: m | {first: "model-00002-of-00003.safetensors"}, "the index and the file differ in '"),
        (lambda m, first: m | {"extra": m[first]}, "the index and the file differ in 'extra'"),
        (lambda m, first: {first: m[first]}, "the index and the file differ in '"),
        (lambda m, first: m | {first: 3}, "weight_map is not a table"),
        (lambda m, first: {}, "weight_map is not a table"),
        (lambda m, first: [first], "weight_map is not a table"),
    ],
)
def test_indexes_that_are_refused(folder, family, change, message):
    weight_map = shard(folder)
    write_index(folder, change(weight_map, sorted(weight_map)[0]))
    refused(message, load, folder)


def test_an_index_that_is_not_json(folder, family):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    refused("model.safetensors.index.json: not readable as JSON", load, folder)


# Finding folders.


def test_a_local_folder_is_itself(folder, family, monkeypatch):
    assert hub.resolve(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert load(hub.resolve("model")).keys() == load(folder).keys()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert hub.resolve("~/model") == folder


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere", "~/nowhere", "a/b/c", "a/", "", "-x", "a b"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    refused(f"model '{name}': no such folder", hub.resolve, name)


@pytest.mark.parametrize("name", ["no-such-model", "no-such-owner/no-such-model"])
def test_an_unknown_name_offline(name):
    refused(f"model '{name}': no such local folder, and the Hugging Face hub gave none", hub.resolve, name)


def test_a_hub_download_leaves_pickles_and_subfolders_out(monkeypatch, tmp_path):
    from fnmatch import fnmatch

    def download(name, allow_patterns, ignore_patterns):
        def taken(path):
            allowed, ignored = ([fnmatch(path, p) for p in ps] for ps in (allow_patterns, ignore_patterns))
            return any(allowed) and not any(ignored)

        assert name == "openai-community/gpt2"
        assert all(map(taken, ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"]))
        assert all(map(taken, ["model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "merges.txt"]))
        assert all(map(taken, ["tokenizer_config.json", "vocab.json", "chat_template.jinja", "generation_config.json"]))
        assert not any(map(taken, ["pytorch_model.bin", "onnx/model.safetensors", "modeling.py", "tf_model.h5"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.resolve("openai-community/gpt2") == tmp_path


def test_a_file_or_nothing_where_a_folder_should_be(folder, family):
    refused("is a file, expected a folder", hub.resolve, str(folder / "config.json"))
    refused("no such folder", hub.load_config, folder / "nowhere")
    refused("no such folder", hub.load_params, folder / "nowhere", CONFIGS[family])
    (folder / "config.json").unlink()
    refused("config.json: no such file", hub.load_config, folder)


# Writing: what is refused, and what a death leaves behind.


def test_what_save_refuses(folder, family, rng, tmp_path):
    config, params = CONFIGS[family], load(folder)
    out = tmp_path / "out"
    refused("parameters that do not fit the configuration: 'decoder/", hub.save, out, {"decoder": params}, config)
    wider = dataclasses.replace(config, vocab_size=14)
    refused(r"parameters that do not fit the configuration: 'embed/embedding'", hub.save, out, params, wider)
    broken = params | {"embed": {"embedding": np.full((13, 8), np.nan, np.float32)}}
    refused("embed/embedding: values that are not finite numbers", hub.save, out, broken, config)
    integers = jax.tree.map(lambda leaf: leaf.astype(np.int32), params)
    refused("has dtype int32, expected one of float32, float16, bfloat16", hub.save, out, integers, config)
    mixed = dataclasses.replace(config, norm="layernorm" if family == "llama" else "rmsnorm")
    refused("no family of gpt2, llama, qwen2, qwen3 has files for", hub.save, out, random_params(rng, mixed), mixed)
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_is_no_model_is_not_replaced(folder, family, tmp_path):
    place = tmp_path / "home"
    place.mkdir()
    hub.save(place, load(folder), CONFIGS[family])  # empty: taken
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    refused("other exists and is no model folder", hub.save, other, load(folder), CONFIGS[family])
    refused("thesis.txt exists and is no", hub.save, other / "thesis.txt", load(folder), CONFIGS[family])
    assert (other / "thesis.txt").read_text() == "years of work"


class BadTokenizer:
    """Fails when nearly everything has been written."""

    def save_pretrained(self, folder):
        assert (Path(folder) / "model.safetensors").exists()
        raise OSError("disk full")


def test_a_failed_save_leaves_the_old_folder(folder, family, rng):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        hub.save(folder, random_params(rng, CONFIGS[family]), CONFIGS[family], BadTokenizer())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failure_between_the_two_renames_brings_the_old_folder_back(folder, family, rng, monkeypatch):
    before, rename = load(folder), Path.rename

    def fail_at_the_second(source, target):
        if source.suffix == ".new":
            assert not folder.exists()
            raise OSError("device gone")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_second)
    with pytest.raises(OSError, match="device gone"):
        hub.save(folder, random_params(rng, CONFIGS[family]), CONFIGS[family])
    assert_same(load(folder), before)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_save_replaces_the_old_folder_whole(folder, family, rng):
    (folder / "stale.json").write_text("{}")
    params = random_params(rng, CONFIGS[family])
    hub.save(folder, params, CONFIGS[family])
    assert_same(load(folder), params)
    assert not (folder / "stale.json").exists()


def test_a_death_between_the_two_renames_is_repaired(folder, family, rng):
    old = folder.with_name(f".{folder.name}.old")
    before = load(folder)
    folder.rename(old)
    (folder.parent / f".{folder.name}.new").mkdir()
    with pytest.raises(OSError, match="disk full"):
        hub.save(folder, before, CONFIGS[family], BadTokenizer())
    assert_same(load(folder), before)
    params = random_params(rng, CONFIGS[family])
    folder.rename(old)
    hub.save(folder, params, CONFIGS[family])
    assert_same(load(folder), params)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_killed_process_leaves_the_old_folder(llama, rng):
    script = """
        import os, signal, sys
        from ppo_jax import hub

        class Killer:
            def save_pretrained(self, folder):
                os.kill(os.getpid(), signal.SIGKILL)

        config = hub.load_config(sys.argv[1])
        hub.save(sys.argv[1], hub.load_params(sys.argv[1], config), config, Killer(), eos_ids=[7])
    """
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    command = [sys.executable, "-c", textwrap.dedent(script), str(llama)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before
    assert [path.name for path in llama.parent.glob(".*")] == [".llama_model.new"]
    params = random_params(rng, CONFIGS["llama"])
    hub.save(llama, params, CONFIGS["llama"])
    assert_same(load(llama), params)
    assert not list(llama.parent.glob(".*"))
