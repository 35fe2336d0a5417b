"""The generated reviews: repeatable, balanced, varied, recognised by their grammar, whole under their tokenizer."""

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from experiments import corpus as corpus_files
from experiments import reviews
from experiments.corpus import train_tokenizer, write_corpus
from experiments.reviews import Review, is_grammatical, lexicon_score, sentence_fraction

LEXICON = reviews.POSITIVE_WORDS | reviews.NEGATIVE_WORDS


@pytest.fixture(scope="module")
def corpus() -> list[Review]:
    return reviews.generate_reviews(10_000, seed=0)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer((review.text for review in corpus[:5000]), vocab_size=1024)


@pytest.fixture
def sentences(seed) -> list[str]:
    """Complete sentences, new in each run."""
    return [sentence for review in reviews.generate_reviews(100, seed) for sentence in split(review.text)]


def split(text: str) -> list[str]:
    return re.findall(r"[^.!]+[.!]", text)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def without_stop(sentence: str) -> tuple[list[str], str]:
    """The words, with the commas that hang on them, and the full stop."""
    return sentence.strip()[:-1].split(), sentence.strip()[-1]


# Generation


def test_a_seed_gives_the_same_reviews_in_a_process_with_another_hash_seed():
    code = "from experiments.reviews import generate_reviews; print([r.text for r in generate_reviews(50, seed=7)])"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    root = Path(reviews.__file__).parents[1]
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert printed.strip() == str([review.text for review in reviews.generate_reviews(50, seed=7)])


def test_a_seed_gives_the_same_reviews_under_every_python():
    # A digest, made by Python 3.11, 3.12 and 3.13 alike. It changes with the tables, and then a new one belongs here.
    text = "\n".join(review.text for review in reviews.generate_reviews(3000, seed=0))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "13535b071c9f7641"


def test_a_longer_corpus_begins_with_the_shorter_one():
    assert reviews.generate_reviews(30, seed=3)[:10] == reviews.generate_reviews(10, seed=3)
    assert reviews.generate_reviews(10, seed=3) != reviews.generate_reviews(10, seed=4)
    assert reviews.generate_reviews(0, seed=3) == []


def test_sentiment_is_balanced(corpus):
    scores = [review.sentiment for review in corpus]
    # The standard error of the mean of 10,000 scores in [-1, 1] is 0.01 at most.
    assert abs(statistics.mean(scores)) < 0.04
    for sign in (1, -1):
        assert 0.34 < sum(score == sign for score in scores) / len(scores) < 0.41
    assert all(review.sentiment == lexicon_score(review.completion) for review in corpus[:1000])
    # Mixed reviews hold one word of each kind, or two of one and one of the other; nothing else mixes.
    assert set(scores) == {-1, -1 / 3, 0, 1 / 3, 1}


def test_reviews_differ(corpus):
    assert len({review.text for review in corpus}) > 9900
    assert len({review.completion for review in corpus}) > 9900
    assert len({review.prompt for review in corpus}) > 5000


def test_prompts_are_neutral(corpus):
    assert not {word for review in corpus for word in words(review.prompt.lower())} & LEXICON
    assert all(lexicon_score(review.prompt) == 0 for review in corpus)


def test_each_completion_says_something(corpus):
    assert all(set(words(review.completion.lower())) & LEXICON for review in corpus)


def test_articles_agree(corpus):
    pairs = {pair for review in corpus for pair in re.findall(r"\b(an?) (\w)", review.text, re.IGNORECASE)}
    assert len(pairs) > 10
    assert all((article.lower() == "an") == (letter in "aeiou") for article, letter in pairs)


def test_a_lonely_narrator_does_not_say_we(corpus):
    lonely = [review for review in corpus if not re.search(r"\b(we|us|and I)\b", review.prompt, re.IGNORECASE)]
    assert len(lonely) > 1000
    assert not [review for review in lonely if re.search(r"\b[Ww]e\b", review.completion)]


# Score


def test_lexicon():
    assert not reviews.POSITIVE_WORDS & reviews.NEGATIVE_WORDS
    assert min(len(reviews.POSITIVE_WORDS), len(reviews.NEGATIVE_WORDS)) >= 50
    assert all(word == word.lower() and word.isalpha() for word in LEXICON)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0.0),
        ("We sat by the window.", 0.0),
        ("The soup was tasty.", 1.0),
        ("Tasty, TASTY and tasty!", 1.0),  # no more than the line above
        ("The soup was bland.", -1.0),
        ("The soup was tasty, but the waiter was rude.", 0.0),
        ("The soup was tasty and fresh, but the waiter was rude.", 1 / 3),  # (2 - 1) / 3
        ("An untasty soup", 0.0),  # whole words only
    ],
)
def test_lexicon_score(text, score):
    assert lexicon_score(text) == pytest.approx(score)


# Recogniser


def test_every_review_is_grammatical(corpus):
    for review in corpus[:2000]:
        assert is_grammatical(review.prompt), review
        assert is_grammatical(review.text), review
        assert sentence_fraction(review.text) == 1


@pytest.mark.parametrize(
    "sentence",
    [
        "The soup was tasty and the waiter was kind.",
        "What an awful film!",
        "Although the rooms were clean, the lobby was really gloomy.",
        "The battery is reliable, and I also loved the design.",
        "Last week we tried the small diner by the river.",
    ],
)
def test_a_sentence_that_the_grammar_makes(sentence):
    assert is_grammatical(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "The soup were tasty.",
        "The rooms was clean.",
        "The soup is tasty.",  # meals are told in the past
        "The battery was reliable.",  # devices in the present
        "The soup was cramped.",
        "What a awful film!",
        "the soup was tasty.",
        "The Soup was tasty.",
        "The soup was tasty",
        "The soup was tasty .",
        "The soup  was tasty.",
        "The soup was tasty..",
        "The soup was tasty, but the waiter was kind.",  # no opposites
        "The soup was tasty and the soup was fresh.",
        "Tasty.",
        "tasty tasty tasty tasty.",
        "Colorless green ideas sleep furiously.",
        ".",
        "",
        "  ",
    ],
)
def test_a_sentence_that_the_grammar_does_not_make(sentence):
    assert not is_grammatical(sentence)


def test_shuffled_words_are_rejected(sentences, rng):
    shuffled = []
    for sentence in sentences:
        inner, stop = without_stop(sentence)
        order = rng.permutation(inner).tolist()
        if order != inner:
            shuffled.append(" ".join(order) + stop)
    # A few permutations are sentences too: "the soup and the rooms" for "the rooms and the soup".
    assert sum(map(is_grammatical, shuffled)) < 0.02 * len(shuffled)


def test_a_repeated_word_is_rejected(sentences, rng):
    for sentence in sentences:
        inner, stop = without_stop(sentence)
        at = rng.integers(len(inner))
        doubled = [*inner[: at + 1], inner[at].strip(",").lower(), *inner[at + 1 :]]
        assert not is_grammatical(" ".join(doubled) + stop)


def test_a_truncated_sentence_is_rejected(sentences, rng):
    closed = 0
    for sentence in sentences:
        inner, stop = without_stop(sentence)
        for length in (len(inner), rng.integers(1, len(inner))):
            assert not is_grammatical(" ".join(inner[:length]))  # no full stop
        cut = inner[: rng.integers(1, len(inner))]
        closed += is_grammatical(" ".join(cut).rstrip(",") + stop)
    # With a full stop a few beginnings are sentences: "The soup was tasty." of "The soup was tasty and the ..."
    assert closed < 0.05 * len(sentences)


def test_an_unfinished_end_is_left_out_when_it_could_go_on(sentences, rng):
    for sentence in sentences:
        inner, _ = without_stop(sentence)
        start = " ".join(inner[: rng.integers(1, len(inner) + 1)])
        assert sentence_fraction(f"The soup was tasty. {start}") == 1
        assert sentence_fraction(f"The soup was tasty. {start} of of") == 0.5


def test_sentence_fraction_counts_sentences():
    assert sentence_fraction("The soup was tasty. Soup tasty soup. What a great lunch! We kind.") == 0.5
    assert sentence_fraction("") == 0
    assert sentence_fraction("The soup was") == 0  # no complete sentence
    assert sentence_fraction("tasty " * 30) == 0
    assert sentence_fraction("...") == 0


# Tokenizer


def test_special_tokens(tokenizer):
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert ids == [0, 1, 2, 3]
    assert len(tokenizer) == len(tokenizer.get_vocab()) <= 1024


def test_round_trip(corpus, tokenizer):
    for review in corpus[5000:7000]:  # the tokenizer has not seen these
        ids = tokenizer.encode(review.text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == review.text


def test_a_prompt_is_the_beginning_of_its_review(corpus, tokenizer):
    for review in corpus[:200]:
        prompt, text = tokenizer.encode(review.prompt), tokenizer.encode(review.text)
        assert text[: len(prompt)] == prompt
        assert tokenizer.decode(text[len(prompt) :]) == review.completion


def test_a_lexicon_word_is_one_token(tokenizer):
    for word in LEXICON:
        ids = tokenizer.encode(f"The {word}")
        assert len(ids) == 3
        assert tokenizer.unk_token_id not in ids


def test_lengths_in_tokens(corpus, tokenizer):
    lengths = [len(tokenizer.encode(review.text)) + 1 for review in corpus[:2000]]  # with BOS and EOS
    completions = [len(tokenizer.encode(review.completion)) for review in corpus[:2000]]  # with EOS for BOS
    assert 30 < statistics.mean(lengths) < 38
    assert sum(20 <= length <= 42 for length in lengths) > 0.9 * len(lengths)
    assert max(lengths) <= 64
    assert sum(length <= 32 for length in completions) > 0.95 * len(completions)


def test_saved_and_reopened(corpus, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    # The saved folder of a policy has the model's configuration beside the tokenizer.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    reopened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for review in corpus[:100]:
        ids = reopened.encode(review.text)
        assert ids == tokenizer.encode(review.text)
        assert reopened.decode(ids, skip_special_tokens=True) == review.text
    assert (reopened.pad_token, reopened.bos_token, reopened.eos_token) == ("<pad>", "<s>", "</s>")


def test_a_vocabulary_that_is_too_small_is_refused(corpus):
    with pytest.raises(ValueError, match=r"vocab_size=100: the texts need \d+"):
        train_tokenizer((review.text for review in corpus[:500]), vocab_size=100)


# Files


def read(path: Path, *columns: str) -> list[tuple[str, ...]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(list(row) == list(columns) for row in rows)
    return [tuple(row.values()) for row in rows]


COUNTS = {"num_train": 500, "num_heldout": 100, "num_demonstrations": 200, "num_prompts": 300}


def test_corpus_files(tmp_path):
    write_corpus(tmp_path / "new" / "corpus", **COUNTS, seed=1)
    folder = tmp_path / "new" / "corpus"
    names = ["demonstrations.jsonl", "heldout.jsonl", "prompts.jsonl", "train.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == names
    train, heldout = read(folder / "train.jsonl", "text"), read(folder / "heldout.jsonl", "text")
    demonstrations = read(folder / "demonstrations.jsonl", "prompt", "completion")
    prompts = read(folder / "prompts.jsonl", "prompt")
    assert (len(train), len(heldout), len(demonstrations), len(prompts)) == (500, 100, 200, 300)
    assert len({*train, *heldout, *[(prompt + completion,) for prompt, completion in demonstrations]}) == 800
    assert all(is_grammatical(prompt + completion) for prompt, completion in demonstrations)
    assert len(set(prompts)) == 300
    openings = {split(text)[0] for (text,) in train + heldout} | {prompt for prompt, _ in demonstrations}
    assert not openings & {prompt for (prompt,) in prompts}
    assert all(len(split(prompt)) == 1 and is_grammatical(prompt) for (prompt,) in prompts)
    write_corpus(tmp_path / "again", **COUNTS, seed=1)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_more_prompts_than_there_are_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_files, "draw_review", lambda rng: Review("Always the same.", f"{rng.random()}", 0.0))
    with pytest.raises(ValueError, match="asked for 300 distinct texts, but the grammar gave only 0"):
        write_corpus(tmp_path, **COUNTS, seed=0)
    assert list(tmp_path.iterdir()) == []
