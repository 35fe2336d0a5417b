"""Tiny Hugging Face folders, prompts and rewards for the tests of the host side: everything that a run starts from."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ppo_jax import hub
from ppo_jax.models import Decoder, ModelConfig

GOOD = ("good", "fine", "great", "kind")
BAD = ("bad", "dull", "poor", "rude")
WORDS = (*GOOD, *BAD, "the", "a", "cat", "dog", "old", "film", "was", "is", "and", "very", "sat", "here", ".", ",")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} . {% endfor %}{% if add_generation_prompt %}bot :{% endif %}"

# Rewards as a user writes them, in a file of its own. `count_good` and `score_good` judge alike.
REWARDS = '''
import time

import jax.numpy as jnp

GOOD = ("good", "fine", "great", "kind")


def count_good(prompts, completions, **columns):
    return [sum(word in GOOD for word in text.split()) / 4 for text in completions]


def score_good(tokenizer):
    ids = jnp.array([tokenizer.encode(" " + word, add_special_tokens=False)[0] for word in GOOD])

    def score(rollout):
        good = jnp.isin(rollout.response_tokens, ids) & rollout.response_mask
        return jnp.sum(good, axis=1) / 4.0

    return score


def nan_at_dog(prompts, completions, **columns):
    return [float("nan") if "dog" in prompt else 0.0 for prompt in prompts]


def too_few(prompts, completions, **columns):
    return [0.0] * (len(prompts) - 1)


def raises(prompts, completions, **columns):
    raise RuntimeError("the judge\\nis asleep")


def score_nan(tokenizer):
    return lambda rollout: jnp.where(rollout.tokens[:, 0] >= 0, jnp.nan, 0.0)
'''


def word_tokenizer(words: Iterable[str] = WORDS, special: dict[str, str] | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, with Llama's conventions: a space belongs to the word after it, `<s>` stands in front.

    Args:
        words: the vocabulary, beside the special tokens.
        special: which special tokens it has (default: pad, bos, eos, unk); the ids of all four exist in any case.
        bos: whether `<s>` is put in front of a text.
    """
    special = SPECIAL if special is None else special
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *("▁" + word for word in words)])}
    # Without an unknown token in the model itself an unknown word would vanish; that is a case of its own.
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def llama_config(vocab_size: int, **changes: Any) -> ModelConfig:
    """A Llama of one layer and width 16."""
    fields = dict(vocab_size=vocab_size, num_layers=1, num_heads=2, width=16, mlp_width=32, max_positions=32, init_std=0.2)
    return ModelConfig(**(fields | changes))


def gpt2_config(vocab_size: int, **changes: Any) -> ModelConfig:
    """A GPT-2 of one layer and width 16."""
    family = dict(
        positions="learned", norm="layernorm", activation="gelu_tanh", gated_mlp=False, attention_bias=True, mlp_bias=True,
        tie_embeddings=True,
    )  # fmt: skip
    return llama_config(vocab_size, **(family | changes))


def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Random parameters of a `Decoder`."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(Decoder(config).init)(jax.random.key(seed), tokens, jnp.ones((1, 2), bool))["params"]


def make_folder(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    config: ModelConfig | None = None,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
) -> Path:
    """A Hugging Face folder with a random model and its tokenizer; see `llama_config`, `word_tokenizer`."""
    tokenizer = word_tokenizer() if tokenizer is None else tokenizer
    config = llama_config(len(tokenizer)) if config is None else config
    return hub.save(folder, random_params(config, seed), config, tokenizer, eos_ids=eos_ids)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """One object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def prompt_rows(num: int = 20) -> list[dict[str, Any]]:
    """Distinct prompts of 2 to 5 words, with a column of their number."""
    subjects, verbs = ("the cat", "the dog", "a film", "the old cat", "the very old dog"), ("was", "is", "sat", "here")
    return [{"prompt": f"{subjects[i % 5]} {verbs[i // 5 % 4]}", "number": i} for i in range(num)]
