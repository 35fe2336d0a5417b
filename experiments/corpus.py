"""The quickstart's files: the generated reviews of `experiments/reviews.py`, and a tokenizer of their words."""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from experiments.reviews import draw_review
from ppo_jax.errors import InputError
from ppo_jax.metrics import write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Item = TypeVar("Item")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A word-level tokenizer with Llama's conventions: `<s>` is put in front, a space belongs to the word after it.

    Each word and each punctuation mark is one token, so `decode(encode(text))` is the text and a lexicon word is one
    token. The special tokens `<pad>`, `<s>`, `</s>` and `<unk>` (a word that the texts do not hold) come first, then
    the words by falling frequency.

    Raises:
        InputError: the texts need more than `vocab_size` tokens.
    """
    # Imported here so that the score and the recogniser do not pay for it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")])
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted(counts, key=lambda word: (-counts[word], word))]
    if len(words) > vocab_size:
        raise InputError(f"vocab_size={vocab_size}: the texts need {len(words)} (words and four special tokens)")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def write_corpus(
    folder: str | Path, num_train: int, num_heldout: int, num_demonstrations: int, num_prompts: int, seed: int
) -> None:
    """Writes four files, each whole or not at all; no text stands twice in all of them, and no prompt opens one.

    `train.jsonl` and `heldout.jsonl` (column `text`) hold reviews to pretrain on, `demonstrations.jsonl` (`prompt`,
    `completion`) reviews to fine-tune on, `prompts.jsonl` (`prompt`) openings alone.

    Raises:
        InputError: more distinct texts are asked for than the grammar has (tens of thousands of openings).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    reviews = _distinct(lambda: draw_review(rng), num_train + num_heldout + num_demonstrations)
    texts, demonstrations = reviews[: num_train + num_heldout], reviews[num_train + num_heldout :]
    opened = {review.prompt for review in reviews}
    prompts = _distinct(lambda: draw_review(rng).prompt, num_prompts, without=opened)
    write_jsonl(folder / "train.jsonl", [{"text": review.text} for review in texts[:num_train]])
    write_jsonl(folder / "heldout.jsonl", [{"text": review.text} for review in texts[num_train:]])
    rows = [{"prompt": review.prompt, "completion": " " + review.completion} for review in demonstrations]
    write_jsonl(folder / "demonstrations.jsonl", rows)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])


def _distinct(draw: Callable[[], Item], num: int, without: Collection[Item] = ()) -> list[Item]:
    found: dict[Item, None] = {}
    for _ in range(20 * num):
        if len(found) < num and (drawn := draw()) not in without:
            found.setdefault(drawn)
    if len(found) < num:
        raise InputError(f"asked for {num} distinct texts, but the grammar gave only {len(found)}")
    return list(found)
