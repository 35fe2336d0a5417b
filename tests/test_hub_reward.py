"""Reward models: which token is scored, and Hugging Face folders of them in and out; no torch, no network.

`tests/parity/test_reward_models.py` has what torch says.
"""

import dataclasses
import functools
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import SPECIAL, gpt2_config, llama_config, word_tokenizer
from folders import random_params as decoder_params
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from ppo_jax import hub
from ppo_jax.hub.families import FAMILIES
from ppo_jax.models import Decoder, ModelConfig, RewardModel, causal_mask, positions_of
from ppo_jax.models.reward import scored_slot
from ppo_jax.sharding import make_mesh, param_shardings

V, PAD, WIDTH = 32, 3, 12
CONFIGS = {
    "gpt2": gpt2_config(V, num_layers=2, mlp_width=20),
    "llama": llama_config(V, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=20),
    "llama_biases": llama_config(V, attention_bias=True, mlp_bias=True, head_dim=6),
}


@pytest.fixture(params=["gpt2", "llama"])
def family(request):
    return request.param


def random_params(rng: np.random.Generator, config: ModelConfig):
    kernel = rng.normal(size=(config.width, 1)).astype(np.float32)
    return {"decoder": decoder_params(config, int(rng.integers(2**31))), "score_head": {"kernel": kernel}}


@functools.cache
def compiled(config: ModelConfig, method: str = "__call__"):
    return jax.jit(partial(RewardModel(config).apply, method=method))


@functools.cache
def compiled_trunk(config: ModelConfig):
    return jax.jit(partial(Decoder(config).apply, method="trunk"))


def score(config: ModelConfig, params, tokens, mask, pad_id=PAD) -> np.ndarray:
    return np.asarray(compiled(config)({"params": params}, jnp.asarray(tokens), jnp.asarray(mask), pad_id))


def scores_alone(config: ModelConfig, params, texts) -> np.ndarray:
    """By hand, and without masks or padding: the trunk's state at the last token of each text, times the kernel.

    The texts stand at the left; the zeros after them are tokens like any other, and come too late to matter.
    """
    tokens = jnp.array([[*text, *[0] * (WIDTH - len(text))] for text in texts], jnp.int32)
    mask = jnp.ones(tokens.shape, bool)
    arguments = tokens, positions_of(mask), causal_mask(mask)
    hidden = np.asarray(compiled_trunk(config)({"params": params["decoder"]}, *arguments)[0], np.float64)
    last = np.array([state[len(text) - 1] for state, text in zip(hidden, texts, strict=True)])
    return last @ np.float64(params["score_head"]["kernel"])[:, 0]


def random_texts(rng: np.random.Generator, sizes, no=PAD) -> list[np.ndarray]:
    """Token rows of these sizes, none of them the pad id."""
    return [rng.choice([i for i in range(V) if i != no], size) for size in sizes]


def padded(texts, left, fill) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask `[B, WIDTH]`, with `left[i]` slots of padding before text i; `fill` is what stands there."""
    mask = np.zeros((len(texts), WIDTH), bool)
    tokens = np.broadcast_to(fill, mask.shape).copy()
    for row, (text, n) in enumerate(zip(texts, left, strict=True)):
        tokens[row, n : n + len(text)], mask[row, n : n + len(text)] = text, True
    return tokens, mask


# Which token is scored.


@pytest.mark.parametrize(
    ("tokens", "mask", "slot"),
    [
        # Padding by both, right, left, on both sides.
        ([5, 6, 7, 3, 3], [1, 1, 1, 0, 0], 2),
        ([3, 3, 5, 6, 7], [0, 0, 1, 1, 1], 4),
        ([3, 5, 6, 7, 3], [0, 1, 1, 1, 0], 3),
        ([5, 6, 7, 8, 9], [1, 1, 1, 1, 1], 4),
        ([5, 3, 3, 3, 3], [1, 0, 0, 0, 0], 0),
        # Garbage where the mask is False: it is not scored.
        ([5, 6, 7, 8, 9], [0, 1, 1, 0, 0], 2),
        # The pad id is EOS, and real: it is passed over at the end, and nowhere else.
        ([5, 6, 7, 3, 3], [1, 1, 1, 1, 0], 2),
        ([5, 6, 7, 3, 3], [1, 1, 1, 1, 1], 2),
        ([5, 3, 7, 3, 3], [1, 1, 1, 1, 0], 2),
        ([3, 3, 7, 3, 3], [1, 1, 1, 1, 0], 2),
        ([3, 3, 3, 5, 3], [0, 0, 1, 1, 1], 3),
        # Nothing real but the pad id: the first real token, wherever the padding is.
        ([3, 3, 3, 3, 3], [1, 1, 1, 1, 1], 0),
        ([3, 3, 3, 3, 3], [1, 1, 0, 0, 0], 0),
        ([3, 3, 3, 3, 3], [0, 0, 0, 1, 1], 3),
        ([3, 3, 3, 8, 9], [0, 1, 1, 0, 0], 1),
        # Nothing real at all.
        ([3, 3, 3, 3, 3], [0, 0, 0, 0, 0], 0),
        ([5, 6, 7, 8, 9], [0, 0, 0, 0, 0], 0),
    ],
)
def test_scored_slot(tokens, mask, slot):
    tokens, mask = jnp.array([tokens]), jnp.array([mask], bool)
    for pad_id in (3, np.int64(3), jnp.int32(3)):
        found = scored_slot(tokens, mask, pad_id)
        assert (found.shape, found.dtype, int(found[0])) == ((1,), jnp.int32, slot)


def test_without_a_pad_id_the_mask_decides():
    tokens = jnp.array([[5, 6, 7, 3, 3], [3, 3, 3, 3, 3], [0, 0, 0, 0, 0]])
    mask = jnp.array([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]], bool)
    assert scored_slot(tokens, mask, None).tolist() == [3, 4, 0]


# The score.


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_the_texts_alone(name, rng):
    """Padded left, right and on both sides, with anything in the padding, the scores are those without padding."""
    config = CONFIGS[name]
    params, sizes = random_params(rng, config), (9, 4, 1, 7)
    texts = random_texts(rng, sizes)
    expected = scores_alone(config, params, texts)
    assert np.std(expected) > 0.1, "texts that tell nothing"
    space = WIDTH - np.array(sizes)
    for left in (0 * space, space, rng.integers(0, space + 1)):
        for fill in (PAD, rng.integers(0, V, (4, WIDTH))):
            scores = score(config, params, *padded(texts, left, fill))
            assert (scores.shape, scores.dtype) == ((4,), np.float32)
            np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-5)


def test_a_pad_id_that_ends_a_text_is_passed_over(rng, family):
    config, sizes = CONFIGS[family], (6, 2, 9, 4)
    params, texts = random_params(rng, config), random_texts(rng, sizes)
    texts[0][2] = PAD  # inside, it is a token like any other
    expected = scores_alone(config, params, texts)
    ended = [np.append(text, [PAD] * n) for text, n in zip(texts, (1, 2, 3, 0), strict=True)]
    for left in ([0] * 4, [WIDTH - len(text) for text in ended]):
        np.testing.assert_allclose(score(config, params, *padded(ended, left, PAD)), expected, rtol=0, atol=2e-5)


def test_a_row_of_pad_ids_alone_scores_its_first_token(rng, family):
    """Of one or several, padded left or right: always the same number."""
    config = CONFIGS[family]
    params = random_params(rng, config)
    texts = [[PAD] * size for size in (1, 4, 2, 12)]
    scores = score(config, params, *padded(texts, [4, 8, 0, 0], PAD))
    np.testing.assert_allclose(scores, scores_alone(config, params, [[PAD]] * 4), rtol=0, atol=2e-5)


def test_a_row_without_real_tokens_gives_a_number(rng, family):
    params = random_params(rng, CONFIGS[family])
    assert np.isfinite(score(CONFIGS[family], params, *padded([[]] * 4, [0] * 4, PAD))).all()


def test_what_the_head_reads_is_apart(rng, family):
    """The state at the scored token, from which `score` goes on: for heads that are tried on it."""
    config, texts = CONFIGS[family], random_texts(rng, (5, 8, 2, 1))
    params = random_params(rng, config)
    tokens, mask = map(jnp.asarray, padded(texts, [0, 1, 10, 4], PAD))
    hidden = compiled(config, "last_hidden")({"params": params}, tokens, mask, PAD)
    assert hidden.shape == (4, config.width)
    expected = scores_alone(config, params, texts)
    np.testing.assert_allclose(hidden @ params["score_head"]["kernel"][:, 0], expected, rtol=0, atol=2e-5)
    on_any_shape = compiled(config, "score")({"params": params}, hidden[None, :, None])  # [..., D] to [...]
    np.testing.assert_allclose(on_any_shape, expected[None, :, None], rtol=0, atol=2e-5)


def test_gradients(rng, family):
    """By the kernel it is the sum of what the head reads; tokens after the scored one, and padding, get none."""
    config = CONFIGS[family]
    params = random_params(rng, config)
    # The first text ends with a real pad id; the second stands between garbage.
    tokens, mask = map(jnp.asarray, padded([[10, 11, 12, 13, PAD], [20, 21, 22]] * 2, [0, 2, 7, 9], 30))
    apply, call = compiled(config), ({"params": params}, tokens, mask, PAD)
    gradient = jax.jit(jax.grad(lambda variables, *batch: jnp.sum(apply(variables, *batch))))(*call)["params"]
    hidden = compiled(config, "last_hidden")(*call)
    np.testing.assert_allclose(gradient["score_head"]["kernel"][:, 0], np.sum(hidden, 0), rtol=0, atol=5e-5)
    touched = np.flatnonzero(np.abs(gradient["decoder"]["embed"]["embedding"]).max(-1))
    assert touched.tolist() == [10, 11, 12, 13, 20, 21, 22]


def test_the_head_starts_as_openais(key):
    """Width 3: a standard deviation of 1 / sqrt(3 + 1) = 0.5, of 60,000 draws to within 0.01 (seven standard errors of
    0.5 / sqrt(120,000) = 0.0014); 1 / sqrt(3) would be 0.577.
    """
    model = RewardModel(llama_config(V, num_heads=1, width=3, head_dim=2))
    heads = jax.vmap(lambda key: model.init(key, jnp.zeros(3), method="score"))(jax.random.split(key, 20_000))
    kernels = np.asarray(heads["params"]["score_head"]["kernel"], np.float64)
    assert kernels.shape == (20_000, 3, 1)
    assert abs(kernels.mean()) < 0.015
    assert abs(kernels.std() - 0.5) < 0.01
    fourth = np.mean(kernels**4) / np.mean(kernels**2) ** 2  # 3 for a normal distribution, 1.8 for a uniform one
    assert abs(fourth - 3) < 0.3


@pytest.mark.parametrize("tied", [True, False])
def test_parameters(family, tied):
    """Those of a decoder without a projection, and a head that is float32 always."""
    config = dataclasses.replace(CONFIGS[family], tie_embeddings=tied, dtype="bfloat16", param_dtype="bfloat16")
    tokens, mask = jnp.zeros((2, 3), int), jnp.ones((2, 3), bool)
    init = partial(RewardModel(config).init_with_output, jax.random.key(0))
    scores, made = jax.eval_shape(lambda tokens, mask: init(tokens, mask, PAD), tokens, mask)
    params = made["params"]
    plain = dataclasses.replace(config, tie_embeddings=True)
    decoder = jax.eval_shape(Decoder(plain).init, jax.random.key(0), tokens, mask)["params"]
    assert params == {"decoder": decoder, "score_head": {"kernel": jax.ShapeDtypeStruct((16, 1), jnp.float32)}}
    assert decoder["embed"]["embedding"].dtype == jnp.bfloat16
    assert (scores.shape, scores.dtype) == ((2,), jnp.float32)


def test_on_eight_devices_it_scores_alike(rng, family):
    """Every parameter has a place: the matrices are cut, the head is whole everywhere."""
    config, texts = CONFIGS[family], random_texts(rng, [5] * 4)
    params = random_params(rng, config)
    placed = param_shardings(make_mesh(2, 2, 2), params)
    assert placed["score_head"]["kernel"].is_fully_replicated
    assert placed["decoder"]["layer_0"]["mlp"]["up"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    scores = score(config, jax.device_put(params, placed), *padded(texts, [0, 1, 2, 7], PAD))
    np.testing.assert_allclose(scores, scores_alone(config, params, texts), rtol=0, atol=2e-5)


# Folders, there and back.


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def save(folder, params, config, tokenizer=None, eos_ids=(2,), pad_id=PAD, **ids) -> Path:
    return hub.save_reward_model(folder, params, config, tokenizer, eos_ids=eos_ids, pad_id=pad_id, **ids)


@pytest.fixture
def folder(family, rng, tmp_path):
    """A good folder of either family, to be spoilt."""
    return save(tmp_path / "model", random_params(rng, CONFIGS[family]), CONFIGS[family])


def edit_config(folder: Path, **changes) -> Path:
    """Changes keys of config.json; `...` removes one."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {name: value for name, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def edit_weights(folder: Path, change) -> Path:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: np.require(tensor, None, "C") for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def refused(pattern, function, *arguments, **options):
    """Holds that a call ends in the typed error, and that it is one line."""
    with pytest.raises(hub.HubError, match=pattern) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_is_exact(name, param_dtype, rng, tmp_path):
    config = dataclasses.replace(CONFIGS[name], param_dtype=param_dtype)
    params = random_params(rng, config)
    params["decoder"] = jax.tree.map(lambda leaf: leaf.astype(param_dtype), params["decoder"])
    folder = save(tmp_path / "deep" / "model", params, config)
    again, loaded = hub.load_reward_model(folder, param_dtype=param_dtype)
    assert again == dataclasses.replace(config, family=name.removesuffix("_biases"))
    assert_same(loaded, params)
    assert hub.load_reward_model(folder, "bfloat16", param_dtype)[0].dtype == "bfloat16"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    # What stands in the file, by hand: torch's Linear is [out, in], and the head keeps its precision.
    kernel = load_file(folder / "model.safetensors")["score.weight"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, params["score_head"]["kernel"].T)


def test_an_untied_model_has_nothing_more_to_save(rng, family, tmp_path):
    """`tie_embeddings` is of no consequence: there is no projection. What is read back is called tied."""
    config = CONFIGS[family]
    params = random_params(rng, config)
    folder = save(tmp_path / "model", params, dataclasses.replace(config, tie_embeddings=False))
    config = dataclasses.replace(config, family=family)
    assert hub.load_reward_model(folder)[0] == config
    for said in (True, False, None, ...):
        again, loaded = hub.load_reward_model(edit_config(folder, tie_word_embeddings=said))
        assert again == config
        assert_same(loaded, params)


def test_transformers_reads_the_configuration(folder, family):
    theirs = AutoConfig.from_pretrained(folder)
    architecture = {"gpt2": "GPT2ForSequenceClassification", "llama": "LlamaForSequenceClassification"}[family]
    assert (theirs.model_type, theirs.architectures) == (family, [architecture])
    assert (theirs.num_labels, theirs.id2label, theirs.label2id) == (1, {0: "LABEL_0"}, {"LABEL_0": 0})
    assert theirs.problem_type == "regression"
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, 2, PAD)


def test_the_ids_and_the_tokenizer_come_with_it(rng, family, tmp_path):
    tokenizer = word_tokenizer()
    config = dataclasses.replace(CONFIGS[family], vocab_size=len(tokenizer))
    params = random_params(rng, config)
    folder = save(tmp_path / "model", params, config, tokenizer, eos_ids=[2, 5], pad_id=0)
    raw = json.loads((folder / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (1, [2, 5], 0)
    assert (hub.load_eos_ids(folder), hub.load_pad_id(folder)) == ((2, 5), 0)
    text = "the cat was kind"
    again = AutoTokenizer.from_pretrained(folder)
    assert (again(text)["input_ids"], again.pad_token_id) == (tokenizer(text)["input_ids"], 0)
    save(folder, params, config, tokenizer, pad_id=0, bos_id=4)
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] == 4


def test_names_without_the_prefix_and_several_files(folder, family):
    """As base models are stored, and large ones; `score.weight` has no prefix in any case."""
    expected = hub.load_reward_model(folder)[1]
    prefix = FAMILIES[family].prefix
    edit_weights(folder, lambda t: {name.removeprefix(prefix): tensor for name, tensor in t.items()})
    assert_same(hub.load_reward_model(folder)[1], expected)
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(2):
        name = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file(dict(tensors[i::2]), folder / name)
        weight_map |= dict.fromkeys(dict(tensors[i::2]), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(hub.load_reward_model(folder)[1], expected)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (7, 7), (None, None), (..., None)])
def test_pad_ids(folder, value, expected):
    assert hub.load_pad_id(edit_config(folder, pad_token_id=value)) == expected


@pytest.mark.parametrize("value", [-1, True, 2.0, "2", [2], {}, "x" * 1000])
def test_pad_ids_that_are_none(folder, value):
    edit_config(folder, pad_token_id=value)
    refused("config.json: pad_token_id .* expected an id or null", hub.load_pad_id, folder)


def test_pad_id_of_no_folder(tmp_path):
    refused("no such folder", hub.load_pad_id, tmp_path / "nowhere")
    refused("config.json: no such file", hub.load_pad_id, tmp_path)


# What is refused in reading.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "bad", "1": "good"}}, "config.json: id2label: got 2 labels, expected one: a reward"),
        ({"id2label": {str(i): str(i) for i in range(9)}}, "id2label: got 9 labels, expected one"),
        ({"id2label": {}}, "id2label: got 0 labels, expected one"),
        ({"id2label": ["good"]}, r"id2label: got \['good'\] labels, expected one"),
        ({"num_labels": 3, "id2label": ...}, "num_labels: got 3 labels, expected one"),
        ({"num_labels": "many"}, "num_labels: got 'many' labels, expected one"),
        ({"model_type": "bert"}, "model_type 'bert' is not supported"),
        ({"sliding_window": 4}, "not understood: 'sliding_window'"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: got 'yes', expected true or false"),
    ],
)
def test_configurations_that_are_refused(folder, changes, message):
    refused(message, hub.load_reward_model, edit_config(folder, **changes))


@pytest.mark.parametrize("changes", [{"id2label": ..., "label2id": ...}, {"id2label": None}, {"num_labels": 1}])
def test_a_configuration_may_leave_the_label_to_the_tensor(folder, changes):
    expected = hub.load_reward_model(folder)[1]
    assert_same(hub.load_reward_model(edit_config(folder, **changes))[1], expected)
    two = np.zeros((2, 16), np.float32)
    edit_weights(folder, lambda t: t | {"score.weight": two})
    refused("model: score.weight has 2 labels, expected one: a reward", hub.load_reward_model, folder)


def of_trunk(tensors) -> str:
    return min(tensors.keys() - {"score.weight"})


def but(**changes):
    return lambda tensors: tensors | {"score." + name: np.array(value, np.float32) for name, value in changes.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (but(weight=np.zeros((5, 16))), "score.weight has 5 labels, expected one"),
        (but(weight=np.zeros((16, 1))), "score.weight has 16 labels, expected one"),
        (but(weight=np.zeros((0, 16))), "score.weight has 0 labels, expected one"),
        (but(weight=np.zeros((1, 15))), r"score.weight: got shape \(1, 15\), expected \(1, 16\)"),
        (but(weight=np.zeros(16)), r"score.weight: got shape \(16,\), expected \(1, 16\)"),
        (but(weight=0.0), r"score.weight: got shape \(\), expected \(1, 16\)"),
        (but(weight=np.full((1, 16), np.nan)), "score.weight has values that are not finite numbers in float32"),
        (but(weight=np.full((1, 16), np.inf)), "score.weight has values that are not finite"),
        (but(bias=[0.0]), "tensors that a .*ForSequenceClassification so configured has not: 'score.bias'"),
        (lambda t: t | {"lm_head.weight": np.zeros((V, 16), np.float32)}, "configured has not: 'lm_head.weight'"),
        (lambda t: t | {"v_head.weight": np.zeros((1, 16), np.float32)}, "configured has not: '.*v_head.weight'"),
        (lambda t: {name: t[name] for name in t if name != of_trunk(t)}, "tensors are missing: '"),
        (lambda t: t | {of_trunk(t): t[of_trunk(t)] * np.float32(np.nan)}, "has values that are not finite numbers"),
        (lambda t: {"score.weight": t["score.weight"]}, "2 layers in the configuration, 1 tensors in the files"),
    ],
)
def test_weights_that_are_refused(folder, change, message):
    refused(message, hub.load_reward_model, edit_weights(folder, change))


@pytest.mark.parametrize("tied", [True, False])
def test_the_two_kinds_of_folders_are_told_apart(folder, family, tied, tmp_path):
    classifier = "a sequence classifier .score.weight is there., expected a causal language model"
    edit_config(folder, tie_word_embeddings=tied)
    refused(classifier, hub.load_params, folder, hub.load_config(folder))
    config = dataclasses.replace(CONFIGS[family], tie_embeddings=tied)
    causal = hub.save(tmp_path / "causal", decoder_params(config), config)
    refused("causal: no sequence classifier .score.weight is missing.", hub.load_reward_model, causal)


# What is refused in writing, and what stands afterwards.


def decoder_alone(params):
    return params["decoder"]


def with_head(**head):
    return lambda params: {**params, "score_head": head}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (decoder_alone, "parameters that do not fit the configuration: "),
        (with_head(), "parameters that do not fit the configuration: 'score_head/kernel'"),
        (with_head(kernel=np.zeros((16, 2))), "do not fit the configuration: 'score_head/kernel'"),
        (with_head(kernel=np.zeros((16, 1)), bias=np.zeros(1)), "do not fit the configuration: 'score_head/bias'"),
        (lambda p: {**p, "value_head": p["score_head"]}, "do not fit the configuration: 'value_head/kernel'"),
        (with_head(kernel=np.full((16, 1), np.nan, np.float32)), "score_head/kernel: values that are not finite"),
        (with_head(kernel=np.full((16, 1), 1e39)), "score_head/kernel: values that are not finite numbers in float32"),
    ],
)
def test_parameters_that_are_not_saved(folder, family, change, message):
    params = hub.load_reward_model(folder)[1]
    refused("save: .*" + message, save, folder, change(params), CONFIGS[family])
    assert_same(hub.load_reward_model(folder)[1], params)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_reward_model_is_not_saved_as_a_language_model(folder, family):
    params = hub.load_reward_model(folder)[1]
    refused("parameters that do not fit the configuration", hub.save, folder, params, CONFIGS[family])


@pytest.mark.parametrize("pad_id", [-1, V, 10**9])
def test_a_pad_id_outside_the_vocabulary(folder, family, pad_id):
    params = hub.load_reward_model(folder)[1]
    message = f"save: pad_id: got {pad_id}, expected an id in the vocabulary of {V}"
    refused(message, save, folder, params, CONFIGS[family], pad_id=pad_id)


def test_a_tokenizer_that_pads_with_another_id(rng, family, tmp_path):
    """It would be scored there. A tokenizer that has no pad token cannot, and is let pass."""
    config, params = CONFIGS[family], random_params(rng, CONFIGS[family])
    refused("save: pad_id: got 3, expected 0, with which the tokenizer pads", save, tmp_path / "model", params, config,
            word_tokenizer())  # fmt: skip
    assert not (tmp_path / "model").exists()
    unpadded = word_tokenizer(special={name: word for name, word in SPECIAL.items() if name != "pad_token"})
    save(tmp_path / "model", params, config, unpadded)


class BadTokenizer:
    """Fails when nearly everything has been written."""

    pad_token_id = PAD

    def save_pretrained(self, folder):
        assert (Path(folder) / "model.safetensors").exists()
        raise OSError("disk full")


def test_a_failed_save_leaves_the_old_folder(folder, family, rng):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        save(folder, random_params(rng, CONFIGS[family]), CONFIGS[family], BadTokenizer())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_save_replaces_a_language_model_whole(family, rng, tmp_path):
    config = CONFIGS[family]
    folder = hub.save(tmp_path / "model", decoder_params(config), config)
    params = random_params(rng, config)
    assert save(str(folder), params, config) == folder
    assert_same(hub.load_reward_model(folder)[1], params)
    assert not (folder / "generation_config.json").exists()
