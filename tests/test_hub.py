"""Hugging Face folders: what is read, what is written, and everything that is refused; no torch, no network."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from families import CONFIGS, FAMILY_OF, SIZES
from safetensors.numpy import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from ppo_jax import hub
from ppo_jax.hub import tensors
from ppo_jax.hub.families import FAMILIES
from ppo_jax.hub.layout import flatten
from ppo_jax.models import Decoder, ModelConfig
from ppo_jax.models.rope import Llama3Scaling
from ppo_jax.sharding import make_mesh, make_place, param_shardings


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
    named = dataclasses.replace(config, family=FAMILY_OF.get(name, name))
    assert hub.load_config(folder, param_dtype=dtype) == named
    assert_same(hub.load_params(folder, config), params)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("family", ["", "llama", "mistral", "phi3"])
def test_a_model_is_saved_as_its_family(family, rng, tmp_path):
    """Three families can express it: the one of the configuration does, to the byte when it is saved again."""
    config = ModelConfig(**SIZES, num_kv_heads=2, family=family)
    how_it_is_trained = dataclasses.replace(config, remat="full", lora_scale=2.0)
    folder = hub.save(tmp_path / "model", random_params(rng, config), how_it_is_trained)
    assert json.loads((folder / "config.json").read_text())["model_type"] == (family or "llama")
    assert hub.load_config(folder) == dataclasses.replace(config, family=family or "llama")
    fused = "model.layers.0.self_attn.qkv_proj.weight" in load_file(folder / "model.safetensors")
    assert fused == (family == "phi3")
    again = hub.save(tmp_path / "again", load(folder), hub.load_config(folder))
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mamba"])
def test_a_family_that_cannot_express_a_model(family, rng, tmp_path):
    config = ModelConfig(**SIZES, family=family)
    message = "family 'mamba' is not supported" if family == "mamba" else f"no family of {family} has files for"
    refused(message, hub.save, tmp_path / "model", random_params(rng, config), config)


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
        ({"max_position_embeddings": ...}, {"max_positions": 2048}),
        ({"pretraining_tp": 2, "max_sequence_length": 2048, "unk_token_id": 1, "_model_name_or_path": "a"}, {}),
        ({"attention_dropout": 0.1, "is_llama_config": True, "transformers.js_config": {"kv_cache_dtype": {}}}, {}),
    ],
)
def test_llama_keys(llama, changes, expected):
    expected = dataclasses.replace(CONFIGS["llama"], family="llama", **expected)
    assert hub.load_config(edit_config(llama, **changes)) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_inner": None}, {"mlp_width": 32}),
        ({"n_inner": ..., "layer_norm_epsilon": ...}, {"mlp_width": 32, "norm_eps": 1e-5}),
        ({"activation_function": ..., "tie_word_embeddings": ...}, {}),
        ({"activation_function": "gelu"}, {"activation": "gelu"}),
        ({"n_ctx": 10, "resid_pdrop": 0.1, "summary_type": "cls_index", "task_specific_params": {"a": {}}}, {}),
        ({"n_positions": ...}, {"max_positions": 1024}),
        ({"predict_special_tokens": True, "output_past": True, "hidden_size": 8, "intermediate_size": 37}, {}),
        ({"reorder_and_upcast_attn": True, "scale_attn_weights": True, "add_cross_attention": False}, {}),
    ],
)
def test_gpt2_keys(gpt2, changes, expected):
    expected = dataclasses.replace(CONFIGS["gpt2"], family="gpt2", **expected)
    assert hub.load_config(edit_config(gpt2, **changes)) == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_absent_key_says_what_it_says_to_transformers(model_type, tmp_path):
    """A file with all of their defaults, and the same without one key; a few keys must be there."""
    defaults = CONFIG_MAPPING[model_type]().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(defaults))
    whole, family = hub.load_config(tmp_path), FAMILIES[model_type]
    read = {key.name for key in family.keys.values()}.union(*(codec.keys for codec in family.codecs))

    def read_without(name: str) -> ModelConfig | str:
        (tmp_path / "config.json").write_text(json.dumps({key: x for key, x in defaults.items() if key != name}))
        try:
            return hub.load_config(tmp_path)
        except hub.HubError as error:
            return str(error)

    missing = {name for name in read & defaults.keys() if read_without(name) != whole}
    assert len(missing) <= 5, missing
    for name in missing:
        assert f"config.json: {name} is missing" in str(read_without(name))


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

LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3, "factor": 2}


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
        ({"num_hidden_layers": 10_001}, "got 10001 layers, expected at most 10000"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: got '1e-6', expected a number"),
        ({"rms_norm_eps": {"__float__": "Infinity"}}, "rms_norm_eps: got {'__float__'"),
        ({"rms_norm_eps": 0}, "norm_eps: got 0.0, expected a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: got 1, expected true or false"),
        ({"num_key_value_heads": 3}, r"num_kv_heads: got 3, expected a divisor of num_heads \(4\)"),
        ({"head_dim": 5}, "head_dim: got 5, expected an even number"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported, only gelu_new, .* relu"),
        ({"hidden_act": ["silu"]}, r"hidden_act \['silu'\] is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved: got True, only False is supported"),
        ({"rope_interleaved": [True]}, r"rope_interleaved: got \[True\], only False is supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, expected 1"),
        ({"rope_scaling": {"type": "linear"}}, "config.json: factor is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "RoPE of type 'linear': factor: got 0.0, expected a positive",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "'linear': 'beta_fast' is not supp"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            r"high_freq_factor: got 1.0, expected more than low_freq_",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "RoPE of type 'dynamic' is not supported, only def",
        ),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"RoPE of type \['linear'\] is not supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "beta_fast": 1, "factor": 2}},
            "beta_fast: got 1.0, expected more than",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": 1}},
            "short_factor: got 1, expected a list of numbers",
        ),
        (
            {"rope_scaling": LONG | {"long_factor": [1.0]}},
            r"long_factors: got \(1.0,\), expected 3 numbers, one for each",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "RoPE of type 'default': 'factor' is not supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2}, "rope_theta": 1},
            "rope_theta: got 1.0, expected more than",
        ),
        (
            {"rope_scaling": LONG | {"original_max_position_embeddings": 1}},
            "original_max_positions: got 1, expected at l",
        ),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 500.0 and, in rope_parameters, 1000000.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: got 0.5"),
        ({"rope_parameters": {"mrope_section": [1]}}, "RoPE of type 'default': 'mrope_section' is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "'full_attention' is not supported"),
        ({"rope_scaling": ["linear"]}, r"rope_scaling: got \['linear'\], expected an object"),
        ({"sliding_window": 4096}, "not understood: 'sliding_window'; it may change what the model computes"),
        ({"attn_logit_softcapping": 30.0, "qk_norm": True}, "not understood: 'attn_logit_softcapping', 'qk_norm'"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config: quantised weights are not supported",
        ),
        ({"quantization": {"group_size": 64}}, "quantization: quantised weights are not supported"),
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
        ({"use_sliding_window": 1}, "use_sliding_window: got 1, expected true or false"),
        (
            {"use_sliding_window": True, "sliding_window": "4"},
            "sliding_window: got '4', expected a positive whole number",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "expected a sliding_window that is in use"),
        ({"layer_types": ["full_attention", None]}, "layer_types: got .* only a list of 'full_attention' and"),
        ({"layer_types": ["full_attention"]}, "layer_types: got 1 layers, expected 2"),
        ({"layer_types": "full_attention"}, "layer_types: got 'full_attention', only a list"),
        ({"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers: got -1, expected a whole number"),
        ({"mlp_bias": True}, "not understood: 'mlp_bias'"),
    ],
)
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_qwen_configurations_that_are_refused(name, changes, message, rng, tmp_path):
    folder = hub.save(tmp_path / "model", random_params(rng, CONFIGS[name]), CONFIGS[name])
    whole = hub.load_config(edit_config(folder, layer_types=["full_attention"] * 2))
    assert whole == dataclasses.replace(CONFIGS[name], family=name)
    refused(message, hub.load_config, edit_config(folder, **({"layer_types": ...} | changes)))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("mistral", {"sliding_window": ...}, {"layer_windows": (4096, 4096)}),
        ("mistral", {"sliding_window": None}, {"layer_windows": ()}),
        ("qwen2_window", {"layer_types": ...}, {}),
        ("qwen2_window", {"layer_types": ..., "max_window_layers": 0}, {"layer_windows": (3, 3)}),
        ("qwen2_window", {"layer_types": ..., "max_window_layers": ...}, {"layer_windows": ()}),
        ("qwen2_window", {"layer_types": ..., "use_sliding_window": False}, {"layer_windows": ()}),
        ("smollm3", {"no_rope_layers": ...}, {"unrotated_layers": ()}),
        ("smollm3", {"no_rope_layers": ..., "no_rope_layer_interval": 2}, {"unrotated_layers": (1,)}),
        ("smollm3_window", {"layer_types": ...}, {}),
        ("gemma2", {"layer_types": ...}, {}),
        ("gemma2", {"attn_logit_softcapping": None}, {"attention_softcap": 0.0}),
        ("gemma2_without_caps", {"attn_logit_softcapping": ..., "final_logit_softcapping": ...},
         {"attention_softcap": 50.0, "final_softcap": 30.0}),
        ("gemma2_without_caps", {"query_pre_attn_scalar": ...}, {"query_pre_attn_scalar": 256}),
        ("gemma3", {"layer_types": ...}, {"layer_windows": (3, 3)}),
        ("gemma3", {"layer_types": ..., "sliding_window_pattern": 2}, {}),
        ("gemma3", {"rope_local_base_freq": ...}, {"local_rope_theta": 10_000.0}),
        ("gemma3", {"rope_local_base_freq": ..., "rope_theta": ..., "rope_scaling": ..., "rope_parameters":
         {"sliding_attention": {"rope_type": "default", "rope_theta": 50}, "full_attention": {"rope_theta": 7}}},
         {"local_rope_theta": 50.0, "rope_theta": 7.0, "rope_scaling": None}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, {}),
        ("gemma", {"hidden_act": ...}, {}),
        ("gpt_neox", {"rotary_pct": ..., "rotary_emb_base": ...}, {}),
        ("gpt_neox", {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rope_theta": 10_000.0}, {}),
        ("opt", {"word_embed_proj_dim": ...}, {}),
        ("phi3_long", {"original_max_position_embeddings": ...}, {}),
        ("llama3", {"rope_scaling": LLAMA3}, {"rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 10)}),
    ],
)  # fmt: skip
def test_keys_of_the_other_families(name, changes, expected, rng, tmp_path):
    config = CONFIGS[name]
    folder = hub.save(tmp_path / "model", random_params(rng, config), config)
    if name == "gpt_neox" and "rotary_pct" in changes and changes["rotary_pct"] is ...:
        edit_config(folder, num_attention_heads=2)  # a quarter of a wider head
        expected = expected | {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8}
    expected = dataclasses.replace(config, **({"family": FAMILY_OF.get(name, name)} | expected))
    assert hub.load_config(edit_config(folder, **changes)) == expected


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window: got 0, expected a positive whole number"),
        ("mistral", {"attention_bias": True}, "not understood: 'attention_bias'"),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers: got \[1\], expected a list of 0 and 1 for each of 2"),
        ("smollm3", {"no_rope_layers": [1, 2]}, r"no_rope_layers: got \[1, 2\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: got 2, only 1 is supported"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers: got \[0\], only \[\] is supported"),
        ("qwen3_moe", {"num_local_experts": 6}, "num_experts is 5 and num_local_experts is 6, expected the same"),
        ("mixtral", {"num_experts_per_tok": 5}, r"experts_per_token: got 5, expected at most num_experts \(4\)"),
        ("olmo2", {"clip_qkv": 8.0}, "not understood: 'clip_qkv'"),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear' is not supported, only default, "),
        ("phi3", {"partial_rotary_factor": 0.5}, "rotary_dim: got 5, expected an even number, at most 10"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor: got 1.5, expected at most 1"),
        ("phi3", {"partial_rotary_factor": 0.01}, "partial_rotary_factor: got 0.01, with which nothing of 10 numbers"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention: got True, only False"),
        ("gemma2", {"sliding_window": None}, "layer_types has 'sliding_attention', expected a sliding_window"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping: got -1.0, expected a number"),
        ("gemma3", {"sliding_window_pattern": 0, "layer_types": ...}, "sliding_window_pattern: got 0, expected a"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"factor": 2.0}}}, "RoPE of sliding_attention: factor"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 2.0}}}, "rope_local_base_freq is 100.0"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {}, "factor": 2.0}}, "rope_parameters: 'factor' is not"),
        ("gpt_neox", {"rotary_pct": 0.25, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.25 and, in"),
        ("gpt_neox", {"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ("opt", {"word_embed_proj_dim": 4}, r"word_embed_proj_dim: got 4, only the width of the layers \(8\) is "),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before: got False, only True is supported"),
        ("opt", {"enable_bias": False}, "enable_bias: got False, only True is supported"),
    ],
)  # fmt: skip
def test_configurations_of_the_other_families_that_are_refused(name, changes, message, rng, tmp_path):
    folder = hub.save(tmp_path / "model", random_params(rng, CONFIGS[name]), CONFIGS[name])
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


def test_a_tied_head_may_stand_for_the_embedding(folder, family):
    """As safetensors' `save_model` leaves it: of tensors that share their memory it keeps one name."""
    expected = load(folder)
    name = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}[family]
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors.pop(name)})
    assert_same(load(folder), expected)
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"][1:]})
    refused("lm_head.weight: got shape", load, folder)


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


def test_large_models_are_saved_in_several_files(folder, family, tmp_path, monkeypatch):
    """Each of at most 1,000 bytes, or of one tensor; the index is what transformers writes."""
    monkeypatch.setattr(tensors, "SHARD_BYTES", 1000)
    params = load(folder)
    out = hub.save(tmp_path / "out", params, CONFIGS[family])
    assert_same(load(out), params)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("model-*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 2
    held = {path.name: load_file(path) for path in files}
    assert index["weight_map"] == {name: file for file, table in held.items() for name in table}
    sizes = {file: sum(tensor.nbytes for tensor in table.values()) for file, table in held.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 1000 or len(held[file]) == 1 for file, size in sizes.items())
    again = hub.save(tmp_path / "again", load(out), CONFIGS[family])
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in out.iterdir())


@pytest.mark.parametrize("name", ["llama", "gpt2_untied", "phi3", "gpt_neox"])
def test_the_host_holds_one_tensor_at_a_time(name, rng, tmp_path):
    """At most 1.3 times the largest, where each is taken away as soon as it is there: 12 MB of a model of 50 MB."""
    sizes = {"vocab_size": 12_000, "width": 256, "mlp_width": 1024, "num_layers": 8, "layer_windows": ()}
    config = dataclasses.replace(CONFIGS[name], **sizes, num_heads=4, num_kv_heads=4, head_dim=64, rotary_dim=0)
    largest = 4 * 12_000 * 256
    folder = hub.save(tmp_path / "model", random_params(rng, config), config)
    seen = {}

    def place(path, array):
        seen[path] = (array.shape, float(array.sum()))
        return path

    tracemalloc.start()
    try:
        placed = hub.load_params(folder, config, place)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.3 * largest + 2e6
    expected = flatten(hub.load_params(folder, config))
    assert 2.5 * largest < sum(leaf.nbytes for leaf in expected.values())
    assert seen == {path: (leaf.shape, float(leaf.sum())) for path, leaf in expected.items()}
    assert flatten(placed) == {path: path for path in expected}


def test_parameters_go_straight_to_their_devices(rng, tmp_path):
    config = dataclasses.replace(CONFIGS["llama"], vocab_size=16)
    folder = hub.save(tmp_path / "model", random_params(rng, config), config)
    mesh = make_mesh(1, 4, 2)
    params, expected = hub.load_params(folder, config, make_place(mesh)), hub.load_params(folder, config)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == param_shardings(mesh, expected)
    assert_same(jax.device_get(params), expected)


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
    refused("got 2147483647 layers, expected at most 10000", load, folder)
    edit_config(folder, **{FAMILIES[family].keys["num_layers"].name: 9_999})
    refused("9999 layers in the configuration", load, folder)


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
    refused("no family of gpt2, llama, mistral, .* has files for", hub.save, out, random_params(rng, mixed), mixed)
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
