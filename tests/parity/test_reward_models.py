"""Reward models of transformers and ours: the same scores of the same folders, in both directions.

Left-padded batches are given to torch with their positions: GPT-2 counts from the first slot there, padding included.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.torch_side import PROMISE, TOLERANCE, doubled, randomize, torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    GemmaConfig,
    GemmaForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
    Olmo2Config,
    Olmo2ForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    Phi3Config,
    Phi3ForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForSequenceClassification,
    SmolLM3Config,
    SmolLM3ForSequenceClassification,
    pipeline,
)

from ppo_jax import hub
from ppo_jax.hub.families import FAMILIES
from ppo_jax.models import ModelConfig, RewardModel
from ppo_jax.tokenizers import load_tokenizer, special_tokens

PAD, V, LONGEST = 3, 53, 40


def gpt2(**changes):
    sizes = {"vocab_size": V, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": LONGEST, "num_labels": 1}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    return GPT2ForSequenceClassification(GPT2Config(**(sizes | ids | changes)))


SIZES = {"vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_labels": 1}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": LONGEST, "pad_token_id": PAD}


def llama(**changes):
    return LlamaForSequenceClassification(LlamaConfig(**(SIZES | changes)))


def qwen2(**changes):
    return Qwen2ForSequenceClassification(Qwen2Config(**(SIZES | {"num_key_value_heads": 2} | changes)))


def others(model, config, **sizes):
    """A model of another family."""
    return model(config(**(SIZES | {"bos_token_id": 1, "eos_token_id": 2} | sizes)))


def grouped(model, config, **sizes):
    return others(model, config, **({"num_key_value_heads": 2} | sizes))


def opt():
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    return OPTForSequenceClassification(OPTConfig(**sizes, ffn_dim=40, bos_token_id=1, eos_token_id=2))


MODELS = {
    "mistral": partial(grouped, MistralForSequenceClassification, MistralConfig, sliding_window=6),
    "qwen3": partial(grouped, Qwen3ForSequenceClassification, Qwen3Config, head_dim=8),
    "mixtral": partial(grouped, MixtralForSequenceClassification, MixtralConfig, num_local_experts=4),
    "qwen3_moe": partial(
        grouped,
        Qwen3MoeForSequenceClassification,
        Qwen3MoeConfig,
        head_dim=8,
        num_experts=5,
        moe_intermediate_size=16,
        num_experts_per_tok=2,
    ),
    "smollm3": partial(grouped, SmolLM3ForSequenceClassification, SmolLM3Config, num_hidden_layers=4),
    "olmo2": partial(grouped, Olmo2ForSequenceClassification, Olmo2Config),
    "phi3": partial(grouped, Phi3ForSequenceClassification, Phi3Config),
    "gemma": partial(grouped, GemmaForSequenceClassification, GemmaConfig, head_dim=8),
    "gemma2": partial(grouped, Gemma2ForSequenceClassification, Gemma2Config, head_dim=8, sliding_window=6),
    "gemma3_text": partial(
        grouped,
        Gemma3TextForSequenceClassification,
        Gemma3TextConfig,
        head_dim=8,
        sliding_window=6,
        num_hidden_layers=6,
    ),
    "gpt_neox": partial(others, GPTNeoXForSequenceClassification, GPTNeoXConfig, hidden_size=32),
    "opt": opt,
    "gpt2": gpt2,
    "gpt2_untied_gelu": partial(gpt2, tie_word_embeddings=False, activation_function="gelu"),
    "gpt2_pad_is_eos": partial(gpt2, pad_token_id=2),
    "llama_untied": llama,
    "llama_tied_grouped": partial(llama, tie_word_embeddings=True, num_key_value_heads=2),
    "llama_grouped_biases": partial(llama, num_key_value_heads=1, attention_bias=True, mlp_bias=True, head_dim=8),
    "qwen2_tied": partial(qwen2, tie_word_embeddings=True),
    "qwen2_untied": qwen2,
    "llama_pad_is_eos": partial(llama, pad_token_id=2, num_key_value_heads=2),
}


def test_every_family_is_compared():
    assert {name.removesuffix("_tied").removesuffix("_untied") for name in MODELS} >= FAMILIES.keys()


def padded(texts, side: str, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask `[B, S]`."""
    longest = max(map(len, texts))
    fill = [[pad_id] * (longest - len(text)) for text in texts]
    rows = [[*f, *text] if side == "left" else [*text, *f] for text, f in zip(texts, fill, strict=True)]
    before = np.array([[len(f) if side == "left" else 0] for f in fill])
    slots, sizes = np.arange(longest), np.array([[len(text)] for text in texts])
    return np.array(rows), (slots >= before) & (slots < before + sizes)


def torch_scores(model, tokens, mask) -> np.ndarray:
    ones = torch.tensor(mask, dtype=torch.long)
    positions = (ones.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(torch.tensor(tokens), attention_mask=ones, position_ids=positions).logits
    assert logits.shape == (len(tokens), 1)
    return logits[:, 0].double().numpy()


def our_scorer(folder, **dtypes):
    """`score(tokens, mask) -> [B]` of a folder, with the pad id that it names."""
    config, params = hub.load_reward_model(folder, **dtypes)
    pad_id = hub.load_pad_id(folder)
    apply = jax.jit(RewardModel(config).apply)
    return lambda tokens, mask: np.asarray(apply({"params": params}, jnp.asarray(tokens), jnp.asarray(mask), pad_id))


def new_head(config: ModelConfig, key) -> dict:
    """A fresh score head, as training would start from."""
    return RewardModel(config).init(key, jnp.zeros(config.width), method="score")["params"]["score_head"]


@pytest.fixture(params=MODELS)
def model(request, seed):
    return randomize(MODELS[request.param](), seed)


@pytest.fixture
def texts(model, rng):
    """64 token rows of 1 to 40 tokens; any of them may hold the pad id, a third ends with it."""
    rows = [rng.integers(0, V, size).tolist() for size in [1, LONGEST, *rng.integers(1, LONGEST + 1, 62)]]
    for row in rows[::3]:
        row[-1] = model.config.pad_token_id
    return rows


def test_scores_and_folders(model, texts, tmp_path):
    """A folder saved by torch gives us its scores; one saved by us gives torch ours."""
    model.save_pretrained(tmp_path / "theirs")
    pad_id = model.config.pad_token_id
    assert hub.load_pad_id(tmp_path / "theirs") == pad_id
    score = our_scorer(tmp_path / "theirs")
    config, params = hub.load_reward_model(tmp_path / "theirs")
    hub.save_reward_model(tmp_path / "ours", params, config, None, eos_ids=[2, 5], pad_id=pad_id)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    for side in ("right", "left"):
        tokens, mask = padded(texts, side, pad_id)
        theirs, ours = torch_scores(model, tokens, mask), score(tokens, mask)
        if side == "left":  # theirs may lie outside of a text that is nothing but the pad id
            kept = np.array([any(token != pad_id for token in text) for text in texts])
            tokens, mask, theirs, ours = tokens[kept], mask[kept], theirs[kept], ours[kept]
        assert np.std(theirs) > 0.1, "texts that tell nothing"
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=PROMISE)
        np.testing.assert_allclose(torch_scores(again, tokens, mask), ours, rtol=0, atol=PROMISE)

    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert (again.config.num_labels, again.config.problem_type) == (1, "regression")
    assert (again.config.eos_token_id, again.config.pad_token_id) == ([2, 5], pad_id)

    # The yardstick, last: it changes the model.
    model = doubled(model)
    alone = [row[keep][None] for row, keep in zip(tokens, mask, strict=True)]  # padded, Gemma 2 overflows
    exact = [torch_scores(model, text, np.ones_like(text, bool))[0] for text in alone]
    np.testing.assert_allclose(ours, exact, rtol=0, atol=TOLERANCE)


def test_a_text_of_pad_ids_alone(model, tmp_path):
    """Padded right, as torch has it, its first token is scored; alone, likewise."""
    model.save_pretrained(tmp_path)
    score, pad_id = our_scorer(tmp_path), model.config.pad_token_id
    tokens, mask = padded([[pad_id], [pad_id] * 4, [pad_id] * 9, [5, 6]], "right", pad_id)
    theirs = torch_scores(model, tokens, mask)
    assert np.ptp(theirs[:3]) < PROMISE
    np.testing.assert_allclose(score(tokens, mask), theirs, rtol=0, atol=PROMISE)


def test_rollouts(model, texts, rng, tmp_path):
    """Prompts padded left, responses padded right: the scores that torch gives to each text alone."""
    model.save_pretrained(tmp_path)
    pad_id, prompt_width, width = model.config.pad_token_id, LONGEST // 2, LONGEST
    rows, masks = [], []
    texts = [text for text in texts if 2 <= len(text) <= LONGEST // 2][:16]
    for text in texts:
        cut = int(rng.integers(1, len(text)))
        before, after = prompt_width - cut, width - prompt_width - (len(text) - cut)
        rows.append([pad_id] * before + text + [pad_id] * after)
        masks.append([False] * before + [True] * len(text) + [False] * after)
    alone = [torch_scores(model, np.array([text]), np.ones((1, len(text)), bool))[0] for text in texts]
    ours = our_scorer(tmp_path)(np.array(rows), np.array(masks))
    np.testing.assert_allclose(ours, alone, rtol=0, atol=PROMISE)


def test_without_a_pad_id(seed, rng, tmp_path):
    """Theirs scores one text at a time then, at its last token whatever it is."""
    model = randomize(llama(pad_token_id=None), seed)
    model.save_pretrained(tmp_path)
    assert hub.load_pad_id(tmp_path) is None
    texts = [rng.integers(0, V, size).tolist() for size in (7, 1, 12)]
    alone = [torch_scores(model, np.array([text]), np.ones((1, len(text)), bool))[0] for text in texts]
    for side in ("left", "right"):
        ours = our_scorer(tmp_path)(*padded(texts, side, 0))
        np.testing.assert_allclose(ours, alone, rtol=0, atol=PROMISE)


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_more_labels_are_refused(make, labels, tmp_path):
    """Two labels, the default of transformers, are in no configuration that it writes: the tensor says so."""
    make(num_labels=labels).save_pretrained(tmp_path)
    with pytest.raises(hub.HubError, match=f"{labels} labels, expected one: a reward"):
        hub.load_reward_model(tmp_path)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_half_precision_parameters(make, seed, rng, tmp_path):
    """What we keep in bfloat16 is what torch reads, and the score itself is float32."""
    randomize(make(), seed).save_pretrained(tmp_path / "theirs")
    config, params = hub.load_reward_model(tmp_path / "theirs", param_dtype="bfloat16")
    folder = hub.save_reward_model(tmp_path / "ours", params, config, None, eos_ids=[2], pad_id=PAD)
    again = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, mask = padded(
        [rng.integers(4, V, size).tolist() for size in rng.integers(1, LONGEST + 1, 16)], "right", PAD
    )
    ours = our_scorer(folder, param_dtype="bfloat16")(tokens, mask)
    np.testing.assert_allclose(ours, torch_scores(again, tokens, mask), rtol=0, atol=PROMISE)


# Real tokenizers, from text to score.

WORDS = "the a cat dog film story was is good bad very not and sat happy sad day little friend , . ! ?".split()


def random_text(rng) -> str:
    """1 to 20 words, with now and then a character from anywhere."""
    strange = [chr(i) for i in rng.integers(0xA1, 0x3000, 3)]
    return " ".join(rng.choice([*WORDS, *strange], rng.integers(1, 21)))


def assert_scored_alike(folder, texts):
    """As a user scores texts: the folder's own tokenizer pads them, on either side, and says what is padding."""
    model, score = AutoModelForSequenceClassification.from_pretrained(folder).eval(), our_scorer(folder)
    for side in ("right", "left"):
        batch = AutoTokenizer.from_pretrained(folder, padding_side=side)(texts, padding=True, return_tensors="np")
        tokens, mask = batch["input_ids"], batch["attention_mask"].astype(bool)
        assert mask[:, 0 if side == "right" else -1].all()
        assert not mask.all()
        theirs = torch_scores(model, tokens, mask)
        assert np.std(theirs) > 0.1, "texts that tell nothing"
        np.testing.assert_allclose(score(tokens, mask), theirs, rtol=0, atol=PROMISE)


@pytest.fixture
def gpt2_folder(shared, seed, key, tmp_path):
    """A small model with the vocabulary of GPT-2, whose EOS is also what pads."""
    tokenizer = load_tokenizer(shared / "tokenizers" / "gpt2")
    special = special_tokens(tokenizer, pad_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert (special.pad_id, special.eos_ids) == (50256, (50256,))
    ids = {"vocab_size": len(tokenizer), "n_positions": 128, "bos_token_id": None, "eos_token_id": 50256}
    randomize(gpt2(**ids, pad_token_id=50256), seed).save_pretrained(tmp_path / "random")
    config, params = hub.load_reward_model(tmp_path / "random")
    params["score_head"] = new_head(config, key)
    folder, ids = tmp_path / "reward_model", {"eos_ids": special.eos_ids, "pad_id": special.pad_id}
    return hub.save_reward_model(folder, params, config, tokenizer, **ids)


@pytest.mark.parametrize("end", ["", "<|endoftext|>"])
def test_texts_through_gpt2s_tokenizer(gpt2_folder, end, rng):
    assert_scored_alike(gpt2_folder, [random_text(rng) + end for _ in range(64)])


def test_a_pipeline_gives_the_score_as_it_is(gpt2_folder, rng):
    """No sigmoid, since the folder says that it is a regression."""
    texts = [random_text(rng) for _ in range(4)]
    batch = AutoTokenizer.from_pretrained(gpt2_folder)(texts, padding=True, return_tensors="np")
    ours = our_scorer(gpt2_folder)(batch["input_ids"], batch["attention_mask"].astype(bool))
    said = pipeline("text-classification", model=str(gpt2_folder), device="cpu")(texts)
    np.testing.assert_allclose([answer["score"] for answer in said], ours, rtol=0, atol=PROMISE)


def test_stories_with_a_head(shared, rng, key, tmp_path):
    """A pretrained Llama as the trunk: a fresh head of ours on it, and one of torch's."""
    stories = shared / "models" / "stories15M"
    tokenizer = load_tokenizer(stories)
    special = special_tokens(tokenizer, hub.load_eos_ids(stories))
    config = hub.load_config(stories)
    params = {"decoder": hub.load_params(stories, config), "score_head": new_head(config, key)}
    ids = {"eos_ids": special.eos_ids, "pad_id": special.pad_id}
    folder = hub.save_reward_model(tmp_path / "ours", params, config, tokenizer, **ids)
    texts = [random_text(rng) for _ in range(64)]
    assert_scored_alike(folder, texts)

    begun = AutoModelForSequenceClassification.from_pretrained(stories, num_labels=1, pad_token_id=special.pad_id)
    begun.score.weight.data.normal_(generator=torch.Generator().manual_seed(int(rng.integers(2**31))), std=0.05)
    begun.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["id2label"] == {"0": "LABEL_0"}
    assert_scored_alike(tmp_path / "theirs", texts)
