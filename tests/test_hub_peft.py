"""Adapter folders of PEFT and value heads beside a model: what is written, read and refused; no torch, no peft.

What peft itself makes of these files is in tests/parity/test_peft.py.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppo_jax import hub
from ppo_jax.models import Decoder, LoRAConfig, ModelConfig, init_adapter, overlay

SIZES = {"vocab_size": 13, "num_layers": 2, "num_heads": 4, "width": 8, "mlp_width": 6, "max_positions": 10}
LLAMA = ModelConfig(**SIZES, num_kv_heads=2, head_dim=6)
GPT2 = ModelConfig(
    **SIZES,
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    attention_bias=True,
    mlp_bias=True,
)
MODELS = {"gpt2": GPT2, "llama": LLAMA}
KINDS = {
    "lora": LoRAConfig(rank=3, alpha=6),
    "rslora": LoRAConfig(rank=3, alpha=0.7, rslora=True),
    "dora": LoRAConfig(rank=2, alpha=3, dora=True, rslora=True),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def random_params(rng, config):
    tree = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), tree["params"])


def random_adapter(rng, model, lora):
    tree = init_adapter(random_params(rng, model), lora, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tree)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder, **changes):
    raw = config_of(folder) | changes
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return folder


def edit_tensors(folder, change, file="adapter_model.safetensors"):
    tensors = load_file(folder / file)
    changed = change(tensors)
    tensors = tensors if changed is None else changed
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / file)
    return folder


def refused(pattern, function, *arguments):
    """Holds that a call ends in the typed error, and that it is one line."""
    with pytest.raises(hub.HubError, match=pattern) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.fixture
def folder(rng, tmp_path):
    """A good folder of a Llama's adapter, to be spoilt."""
    lora = LoRAConfig(rank=2, alpha=4)
    return hub.save_adapter(tmp_path / "adapter", random_adapter(rng, LLAMA, lora), lora, LLAMA, "base")


# There and back.


@pytest.mark.parametrize("targets", ["", "query|value", "key", "mlp/", "layer_1/.*(output|up)"])
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_is_exact(kind, targets, model, rng, tmp_path):
    lora = dataclasses.replace(KINDS[kind], targets=targets)
    adapter = random_adapter(rng, model, lora)
    if lora.dora and model is GPT2 and targets in ("query|value", "key"):
        needed = r"c_attn is one for DoRA: expected adapters on all of layer_0/attention/query, .*key, .*value"
        return refused(needed, hub.save_adapter, tmp_path / "a", adapter, lora, model)
    folder = hub.save_adapter(tmp_path / "deep" / "adapter", adapter, lora, model)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    again, tree = hub.load_adapter(folder, model)
    assert_same(tree, adapter)
    assert dataclasses.replace(again, targets=targets) == lora
    # The expression that comes back matches what it was, and nothing else.
    fresh = init_adapter(random_params(rng, model), again, jax.random.key(0))
    assert jax.tree.structure(fresh) == jax.tree.structure(adapter)


@pytest.mark.parametrize("targets", ["", "query|value"])
def test_an_adapter_that_was_never_trained_keeps_its_rank(targets, model, rng, key, tmp_path):
    """B is zero, and no block of GPT-2's c_attn can be told from another by it."""
    lora = LoRAConfig(rank=3, targets=targets)
    adapter = jax.device_get(init_adapter(random_params(rng, model), lora, key))
    _, tree = hub.load_adapter(hub.save_adapter(tmp_path / "a", adapter, lora, model), model)
    assert_same(tree, adapter)


def test_the_files_of_a_llama(rng, tmp_path):
    lora = LoRAConfig(rank=2, alpha=4.0, targets="query|down")
    adapter = random_adapter(rng, LLAMA, lora)
    folder = hub.save_adapter(tmp_path / "adapter", adapter, lora, LLAMA, "owner/name")
    assert config_of(folder) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "owner/name",
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "target_modules": ["down_proj", "q_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors = tensors_of(folder)
    layers = [f"base_model.model.model.layers.{i}" for i in range(2)]
    assert tensors.keys() == {
        f"{layer}.{module}.lora_{matrix}.weight"
        for layer in layers
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for matrix in "AB"
    }
    query = adapter["layer_1"]["attention"]["query"]
    np.testing.assert_array_equal(tensors[f"{layers[1]}.self_attn.q_proj.lora_A.weight"], query["lora_a"].T)  # [2, 8]
    np.testing.assert_array_equal(tensors[f"{layers[1]}.self_attn.q_proj.lora_B.weight"], query["lora_b"].T)  # [24, 2]


def test_the_fused_module_of_a_gpt2(rng, tmp_path):
    """Query and value have adapters of rank 2, key none: A is [6, 8], B [24, 6] in three blocks of [8, 2], and the
    scale 4 / 2 is (3 * 4) / (3 * 2).
    """
    lora = LoRAConfig(rank=2, alpha=4, targets="layer_0/attention/(query|value)")
    adapter = random_adapter(rng, GPT2, lora)
    folder = hub.save_adapter(tmp_path / "adapter", adapter, lora, GPT2)
    raw, tensors = config_of(folder), tensors_of(folder)
    assert (raw["r"], raw["lora_alpha"], raw["fan_in_fan_out"]) == (2, 4, True)
    assert raw["base_model_name_or_path"] is None
    assert raw["target_modules"] == ["transformer.h.0.attn.c_attn"]  # by its whole name: layer 1 has none
    assert (raw["rank_pattern"], raw["alpha_pattern"]) == ({"c_attn": 6}, {"c_attn": 12})
    query, value = (adapter["layer_0"]["attention"][name] for name in ("query", "value"))
    a, b = (tensors[f"base_model.model.transformer.h.0.attn.c_attn.lora_{name}.weight"] for name in "AB")
    np.testing.assert_array_equal(a, np.concatenate([query["lora_a"].T, np.zeros((2, 8)), value["lora_a"].T]))
    expected = np.zeros((24, 6))
    expected[:8, :2], expected[16:, 4:] = query["lora_b"].T, value["lora_b"].T
    np.testing.assert_array_equal(b, expected)


def test_alpha_of_a_fused_module_with_rslora(rng, tmp_path):
    """Scale: alpha / sqrt(r) = 5 / sqrt(4) = 2.5 = alpha' / sqrt(12): alpha' = 5 sqrt(3)."""
    lora = LoRAConfig(rank=4, alpha=5, rslora=True, targets="query|key|value|output")
    raw = config_of(hub.save_adapter(tmp_path / "adapter", random_adapter(rng, GPT2, lora), lora, GPT2))
    assert raw["rank_pattern"] == {"c_attn": 12}
    assert raw["alpha_pattern"]["c_attn"] == pytest.approx(8.660254037844386, rel=1e-14)
    assert raw["target_modules"] == [f"transformer.h.{i}.attn.{name}" for i in (0, 1) for name in ("c_attn", "c_proj")]


def delta(one, scale):
    return scale * np.float64(one["lora_a"]) @ np.float64(one["lora_b"])


def test_a_fused_module_that_shares_its_a(rng, tmp_path):
    """As peft trains GPT-2: one A of rank 4 for query, key and value, and a B without zeros."""
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 8), (24, 4)))
    prefix = "base_model.model.transformer.h.1.attn.c_attn"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "fan_in_fan_out": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    lora, adapter = hub.load_adapter(tmp_path, GPT2)
    projections = "|".join(f"layer_1/attention/{name}" for name in ("key", "query", "value"))
    assert lora == LoRAConfig(rank=4, alpha=6, targets=f"({projections})$")
    parts = adapter["layer_1"]["attention"]
    got = np.concatenate([delta(parts[name], lora.scale) for name in ("query", "key", "value")], axis=1)
    np.testing.assert_allclose(got, 1.5 * (b.astype(np.float64) @ a).T, rtol=1e-12)

    # Out and in again: the same function, in blocks; nothing grows any more.
    folder = hub.save_adapter(tmp_path / "again", adapter, lora, GPT2)
    assert_same(hub.load_adapter(folder, GPT2)[1], adapter)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_give_modules_scales_of_their_own(rslora, rng, tmp_path):
    """All have r = 4, alpha = 8; q_proj has rank 1 and alpha 3 by a word, layer 1's up_proj alpha 5."""
    lora = LoRAConfig(rank=4, alpha=8, targets="query|up", rslora=rslora)
    adapter = random_adapter(rng, LLAMA, lora)
    for layer in adapter.values():
        query = layer["attention"]["query"]
        query.update(lora_a=query["lora_a"][:, :1], lora_b=query["lora_b"][:1])
    folder = hub.save_adapter(tmp_path / "adapter", adapter, lora, LLAMA)
    assert config_of(folder)["rank_pattern"] == {"q_proj": 1}
    assert config_of(folder)["alpha_pattern"] == {"q_proj": 4 if rslora else 2}  # the scale of the whole: 8 / 2, 8 / 4
    assert_same(hub.load_adapter(folder, LLAMA)[1], adapter)

    edit_config(folder, alpha_pattern={"q_proj": 3, r"layers\.1\.mlp\..*": 5, "up_proj": 8})
    _, read = hub.load_adapter(folder, LLAMA)
    scales = {  # of query: 3 / 1; of layer 1's up: 5 / 4 or 5 / 2; of layer 0's up: 8 / 4 or 8 / 2
        ("layer_0", "attention", "query"): 3,
        ("layer_1", "attention", "query"): 3,
        ("layer_0", "mlp", "up"): 4 if rslora else 2,
        ("layer_1", "mlp", "up"): 2.5 if rslora else 1.25,
    }
    for (layer, part, name), scale in scales.items():
        got, expected = delta(read[layer][part][name], lora.scale), delta(adapter[layer][part][name], scale)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "expression", ["^model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", r".*layers\.[0]\.self.*"]
)
def test_what_an_expression_matches(expression, rng, tmp_path):
    r"""`(.*\.)?(EXPRESSION)$` from the first letter of `model.layers...` on, as in peft: a `^` is its beginning."""
    lora = LoRAConfig(rank=2, alpha=2, targets="query")
    adapter = random_adapter(rng, LLAMA, lora)
    folder = edit_config(hub.save_adapter(tmp_path / "a", adapter, lora, LLAMA), alpha_pattern={expression: 6})
    read = hub.load_adapter(folder, LLAMA)[1]
    for layer, factor in (("layer_0", 3), ("layer_1", 1)):
        expected = adapter[layer]["attention"]["query"]["lora_b"] * factor
        np.testing.assert_array_equal(read[layer]["attention"]["query"]["lora_b"], expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_become_float32(dtype, folder, rng):
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    stored = {name: tensor.astype(kind) for name, tensor in tensors_of(folder).items()}
    edit_tensors(folder, lambda tensors: stored)
    adapter = hub.load_adapter(folder, LLAMA)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {np.dtype("float32")}
    expected = stored["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].astype(np.float32).T
    np.testing.assert_array_equal(adapter["layer_0"]["mlp"]["up"]["lora_a"], expected)


def test_what_peft_writes_beside_it_is_understood(folder):
    """Every other key of peft 0.21.2, with its default, as its `save_pretrained` wrote them."""
    defaults = {
        "alora_invocation_tokens": None, "arrow_config": None, "auto_mapping": None, "corda_config": None,
        "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "init_lora_weights": True,
        "kasa_config": None, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
        "loftq_config": {}, "lora_bias": False, "lora_dropout": 0.1, "lora_ga_config": None, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None, "peft_version": "0.21.2",
        "qalora_group_size": 16, "revision": None, "target_parameters": None, "trainable_token_indices": None,
        "use_bdlora": None, "use_qalora": False, "velora_config": None,
    }  # fmt: skip
    before = hub.load_adapter(folder, LLAMA)
    after = hub.load_adapter(edit_config(folder, **defaults), LLAMA)
    assert before[0] == after[0]
    assert_same(after[1], before[1])


def test_a_tokenizer_goes_with_it_and_the_folder_is_replaced_whole(folder, rng):
    class Tokenizer:
        def save_pretrained(self, place):
            (folder.with_name(place.rsplit("/", 1)[-1]) / "tokenizer.json").write_text("{}")

    (folder / "notes.txt").write_text("of the old one")
    lora = LoRAConfig(rank=1)
    adapter = random_adapter(rng, LLAMA, lora)
    hub.save_adapter(folder, adapter, lora, LLAMA, "base", Tokenizer())
    names = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert_same(hub.load_adapter(folder, LLAMA)[1], adapter)

    class Broken:
        def save_pretrained(self, place):
            raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        hub.save_adapter(folder, random_adapter(rng, LLAMA, lora), lora, LLAMA, "base", Broken())
    assert_same(hub.load_adapter(folder, LLAMA)[1], adapter)  # the old one stands
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_a_place_with_something_else_is_left_alone(rng, tmp_path):
    lora = LoRAConfig(rank=1)
    adapter = random_adapter(rng, LLAMA, lora)
    model = hub.save(tmp_path / "model", random_params(rng, LLAMA), LLAMA)
    refused(
        "exists and is no model folder .adapter_config.json is missing", hub.save_adapter, model, adapter, lora, LLAMA
    )
    assert (model / "model.safetensors").exists()


# What cannot be written.


def test_what_does_not_fit_is_not_written(rng, tmp_path):
    lora = LoRAConfig(rank=2, dora=True)
    good = random_adapter(rng, LLAMA, lora)
    query = good["layer_0"]["attention"]["query"]

    def save(change, config=lora, model=LLAMA):
        adapter = overlay(good, {"layer_0": {"attention": {"query": change}}})
        hub.save_adapter(tmp_path / "adapter", adapter, config, model)

    refused(r"no part of such an adapter .*'layer_0/attention/query/kernel'", save, {"kernel": np.ones((8, 24))})
    refused(r"no part of such an adapter .*lora_magnitude' and 11 more", save, {}, LoRAConfig(rank=2))
    refused(r"lora_a: got shape \(9, 2\), expected \(8, 2\)", save, {"lora_a": np.ones((9, 2))})
    refused(r"lora_a: got shape \(8, 3\), expected \(8, 2\)", save, {"lora_a": np.ones((8, 3))})
    refused(r"lora_b: got shape \(\), expected \(1, 24\)", save, {"lora_a": np.ones((8, 1)), "lora_b": np.ones(())})
    refused(r"got shape \(8, 0\), expected \(8, 1\)", save, {"lora_a": np.ones((8, 0)), "lora_b": np.ones((0, 24))})
    refused(r"lora_b: got shape \(2, 23\), expected \(2, 24\)", save, {"lora_b": np.ones((2, 23))})
    refused(r"lora_magnitude: got shape \(23,\), expected \(24,\)", save, {"lora_magnitude": np.ones(23)})
    for bad in (np.nan, np.inf):
        refused("query/lora_b: values that are not finite", save, {"lora_b": query["lora_b"] * bad})
    lost = overlay(good, {})
    lost["layer_0"] = overlay(lost["layer_0"], {})
    lost["layer_0"]["attention"] = good["layer_0"]["attention"] | {"query": {"lora_a": query["lora_a"]}}
    refused("layer_0/attention/query has only 'lora_a'", hub.save_adapter, tmp_path / "adapter", lost, lora, LLAMA)
    refused("the adapter is empty", hub.save_adapter, tmp_path / "adapter", {}, lora, LLAMA)
    refused("no part of such an adapter", save, {}, lora, GPT2)
    strange = dataclasses.replace(LLAMA, norm="layernorm")
    refused("no family of gpt2, llama, .* has files for", save, {}, lora, strange)
    assert not list(tmp_path.iterdir())


def test_a_model_folder_does_not_take_an_adapter_for_weights(rng, tmp_path):
    lora = LoRAConfig(rank=1)
    both = overlay(random_params(rng, LLAMA), random_adapter(rng, LLAMA, lora))
    refused("parameters that do not fit the configuration: .*lora_a", hub.save, tmp_path / "m", both, LLAMA)


# What cannot be read.


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"peft_type": "IA3"}, "peft_type: got 'IA3', only LORA is supported"),
        ({"bias": "all"}, "bias: got 'all', only none is supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', only True is supported"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: got 'loftq'"),
        ({"modules_to_save": ["lm_head"]}, "not understood: 'modules_to_save'"),
        ({"lora_bias": True}, "not understood: 'lora_bias'"),
        ({"use_qalora": True}, "not understood: 'use_qalora'"),
        ({"layer_replication": [[0, 1]]}, "not understood: 'layer_replication'"),
        ({"trainable_token_indices": [3]}, "not understood: 'trainable_token_indices'"),
        ({"alora_invocation_tokens": [1]}, "not understood: 'alora_invocation_tokens'"),
        ({"of_tomorrow": 1}, "not understood: 'of_tomorrow'"),
        ({"r": ...}, "r is missing"),
        ({"r": 0}, "r: got 0, expected a positive whole number"),
        ({"r": "8"}, "r: got '8', expected a positive whole number"),
        ({"r": 3}, r"lora_A.weight: got shape \(2, 8\), expected \(3, 8\)"),
        ({"lora_alpha": ...}, "lora_alpha is missing"),
        ({"lora_alpha": 0}, "alpha: got 0.0, expected a positive number"),
        ({"lora_alpha": -1}, "lora_alpha: got -1, expected a number"),
        ({"use_rslora": 1}, "use_rslora: got 1, expected true or false"),
        ({"use_dora": True}, "tensors are missing: .*q_proj.lora_magnitude_vector"),
        ({"rank_pattern": {"q_proj": 3}}, r"q_proj.lora_A.weight: got shape \(2, 8\), expected \(3, 8\)"),
        ({"rank_pattern": [1]}, r"rank_pattern: got \[1\], expected an object"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj: got 0, expected a positive whole number"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: q_proj: got 'x', expected a number"),
        ({"alpha_pattern": {"q_proj": 1e300}}, "layers.0.self_attn.q_proj.lora_B.weight: values that are not finite"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: q_proj is missing"),
        ({"alpha_pattern": {"(q_proj": 1}}, r"alpha_pattern: '\(q_proj': no regular expression"),
        ({"alpha_pattern": {"(a+)+b": 1}}, r"alpha_pattern: .*\(too many repetitions\)"),
        ({"alpha_pattern": {"(o|p|[a-z])*?x.*y.*z.*": 1}}, "too many repetitions"),
        ({"alpha_pattern": {".?.?.?.?.?": 1}}, "too many repetitions"),
    ],
)
def test_a_configuration_that_is_refused(changes, pattern, folder):
    refused(pattern, hub.load_adapter, edit_config(folder, **changes), LLAMA)


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "pattern"),
    [
        (f"{QUERY}.lora_B.weight", None, "tensors are missing: .*layers.0.self_attn.q_proj.lora_B"),
        (f"{QUERY}.lora_A.weight", np.ones((2, 9), "f"), r"got shape \(2, 9\), expected \(2, 8\)"),
        (f"{QUERY}.lora_B.weight", np.ones((2, 24), "f"), r"got shape \(2, 24\), expected \(24, 2\)"),
        (f"{QUERY}.lora_A.weight", np.ones((2, 8), "i"), "got dtype I32"),
        (f"{QUERY}.lora_A.weight", np.full((2, 8), np.nan, "f"), "values that are not finite"),
        (f"{QUERY}.lora_A.weight", np.full((2, 8), 1e300), "values that are not finite"),
        (f"{QUERY}.lora_magnitude_vector", np.ones(24, "f"), "belong to no projection .*magnitude"),
        (f"{QUERY.replace('0', '2')}.lora_A.weight", np.ones((2, 8), "f"), "belong to no projection .*layers.2"),
        ("base_model.model.lm_head.lora_A.weight", np.ones((2, 8), "f"), "belong to no projection .*lm_head"),
    ],
)
def test_a_tensor_that_is_refused(name, tensor, pattern, folder):
    def change(tensors):
        return {key: x for key, x in (tensors | {name: tensor}).items() if x is not None}

    refused(pattern, hub.load_adapter, edit_tensors(folder, change), LLAMA)


def test_tensors_that_are_refused(folder):
    edit_tensors(folder, lambda tensors: {name.removeprefix("base_model."): x for name, x in tensors.items()})
    refused("belong to no projection .* more", hub.load_adapter, folder, LLAMA)
    edit_tensors(folder, lambda tensors: {})
    refused("the adapter is empty", hub.load_adapter, folder, LLAMA)


def test_folders_that_are_refused(folder, rng, tmp_path):
    refused("nowhere: no such folder", hub.load_adapter, tmp_path / "nowhere", LLAMA)
    refused("belong to no projection of this model", hub.load_adapter, folder, GPT2)
    wider = dataclasses.replace(LLAMA, width=12)
    refused(r"got shape \(2, 8\), expected \(2, 12\)", hub.load_adapter, folder, wider)
    refused("belong to no projection", hub.load_adapter, folder, dataclasses.replace(LLAMA, num_layers=1))
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        refused("not a safetensors file", hub.load_adapter, folder, LLAMA)
    weights.unlink()
    refused("no weights, expected adapter_model.safetensors", hub.load_adapter, folder, LLAMA)
    (folder / "adapter_model.bin").write_bytes(b"")
    refused("only pickle weights .'adapter_model.bin'", hub.load_adapter, folder, LLAMA)
    (folder / "adapter_config.json").write_text("[]")
    refused(r"adapter_config.json: got \[\], expected a JSON object", hub.load_adapter, folder, LLAMA)
    (folder / "adapter_config.json").unlink()
    refused("adapter_config.json: no such file", hub.load_adapter, folder, LLAMA)


# A value head beside a model.


@pytest.fixture
def trunk(rng, model, tmp_path):
    return hub.save(tmp_path / "critic", random_params(rng, model), model)


def random_head(rng, width=8):
    return {"kernel": rng.normal(size=(width, 1)).astype("f"), "bias": rng.normal(size=1).astype("f")}


def test_a_value_head_comes_back(rng, trunk):
    assert hub.load_value_head(trunk) is None
    for _ in range(2):  # the second takes the place of the first
        head = random_head(rng)
        path = hub.save_value_head(trunk, head)
        assert_same(hub.load_value_head(trunk), head)
    stored = load_file(path)
    assert path == trunk / "value_head.safetensors"
    np.testing.assert_array_equal(stored["weight"], head["kernel"].T)  # [1, 8], torch's Linear
    np.testing.assert_array_equal(stored["bias"], head["bias"])
    assert not [path.name for path in trunk.iterdir() if path.name.startswith(".")]
    jax_head = jax.tree.map(jnp.asarray, head)
    hub.save_value_head(trunk, jax_head)
    assert_same(hub.load_value_head(trunk), head)


def test_the_trunk_is_read_as_before(rng, trunk, model):
    before = hub.load_params(trunk, model)
    hub.save_value_head(trunk, random_head(rng))
    assert_same(hub.load_params(trunk, model), before)


def test_value_heads_that_are_refused(rng, trunk, tmp_path):
    good = random_head(rng)
    refused("got 'kernel', expected 'bias', 'kernel'", hub.save_value_head, trunk, {"kernel": good["kernel"]})
    refused("expected 'bias', 'kernel'", hub.save_value_head, trunk, good | {"scale": good["bias"]})
    wide = r"kernel: got shape \(9, 1\), expected finite numbers of shape \(8, 1\)"
    refused(wide, hub.save_value_head, trunk, random_head(rng, 9))
    refused("bias: got values that are not finite", hub.save_value_head, trunk, good | {"bias": np.array([np.nan])})
    refused("config.json: no such file", hub.save_value_head, tmp_path, good)
    refused("no such folder", hub.save_value_head, tmp_path / "nowhere", good)
    refused("no such folder", hub.load_value_head, tmp_path / "nowhere")
    assert hub.load_value_head(trunk) is None  # nothing was written

    hub.save_value_head(trunk, good)
    file = "value_head.safetensors"
    for change, pattern in (
        (lambda t: {"weight": t["weight"]}, "got tensors 'weight', expected 'bias', 'weight'"),
        (lambda t: t.update(more=t["bias"]), "got tensors 'bias', 'more', 'weight'"),
        (lambda t: t.update(weight=t["weight"].T), r"weight: got shape \(8, 1\), expected \(1, 8\)"),
        (lambda t: t.update(bias=np.array([np.inf], "f")), "bias has values that are not finite"),
        (lambda t: t.update(bias=np.array([1])), "bias: got dtype I64"),
    ):
        hub.save_value_head(trunk, good)
        refused(pattern, hub.load_value_head, edit_tensors(trunk, change, file))
    (trunk / file).write_bytes(b"torn")
    refused("value_head.safetensors: not a safetensors file", hub.load_value_head, trunk)
