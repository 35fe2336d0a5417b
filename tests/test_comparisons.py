"""Judged texts as arrays: what is encoded, what is left out and counted, what is held out."""

import folders
import numpy as np
import pytest

from ppo_jax.comparisons import encode_judged, split_by_prompt
from ppo_jax.data import DataError
from ppo_jax.preferences import Judged
from ppo_jax.tokenizers import SpecialTokens
from ppo_jax.types import Comparisons, Ratings

PAD, BOS, EOS = 0, 1, 2
SPECIAL = SpecialTokens(PAD, (EOS, 7))
LENGTH = 8


@pytest.fixture(scope="module")
def tokenizer():
    return folders.word_tokenizer()


@pytest.fixture(scope="module")
def ids(tokenizer):
    """Tokens of words, one each."""
    return lambda text: [tokenizer.get_vocab()["▁" + word] for word in text.split()]


def pair(prompt: str, better: str, worse: str, margin: float = 0.0) -> Judged:
    return Judged(prompt, (better, worse), (1, 2), None, margin)


def rating(prompt: str, response: str, score: float) -> Judged:
    return Judged(prompt, (response,), None, score)


def real(judged, row: int, text: int = 0) -> list[int]:
    """The real tokens of a text; what follows them is padding."""
    tokens, mask = judged.tokens[row, text], judged.mask[row, text]
    assert mask.tolist() == sorted(mask, reverse=True), "padded on the right"
    assert np.all(tokens[~mask] == PAD)
    return tokens[mask].tolist()


# Comparisons


def test_a_pair_is_two_texts_of_prompt_response_and_end(tokenizer, ids):
    judged = encode_judged([pair("the cat", " sat here", " was bad", 0.5)], tokenizer, SPECIAL, LENGTH)
    assert judged.tokens.shape == judged.mask.shape == (1, 2, 6)  # as long as the longest: BOS, four words, EOS
    assert judged.response_lengths.tolist() == [[2, 2]]
    assert (judged.tokens.dtype, judged.mask.dtype) == (np.int32, bool)
    assert real(judged, 0, 0) == [BOS, *ids("the cat sat here"), EOS]
    assert real(judged, 0, 1) == [BOS, *ids("the cat was bad"), EOS]
    assert judged.ranks.tolist() == [[1, 2]]
    assert judged.margin.tolist() == [0.5]
    assert judged.prompts == ("the cat",)
    assert not judged.are_ratings


def test_texts_without_a_prompt_are_read_whole(tokenizer, ids):
    judged = encode_judged([pair("", "the cat sat", "a dog")], tokenizer, SPECIAL, LENGTH)
    assert real(judged, 0, 0) == [BOS, *ids("the cat sat"), EOS]
    assert real(judged, 0, 1) == [BOS, *ids("a dog"), EOS]


def test_comparisons_of_several_sizes_share_an_array(tokenizer, ids):
    rows = [
        pair("the cat", " sat", " was"),
        Judged("a dog", (" was", " is", " sat", " here"), (2, 1, 2, 3), None),
        Judged("a film", (" was", " is", " sat"), (2, 2, 1), None),
    ]
    judged = encode_judged(rows, tokenizer, SPECIAL, LENGTH)
    assert judged.tokens.shape == (3, 4, 5)
    assert judged.response_lengths.tolist() == [[1, 1, 0, 0], [1] * 4, [1, 1, 1, 0]]
    # The better minus the worse: 0-1 of the first; 1-0, 1-2, 1-3, 0-3, 2-3 of the second; 2-0, 2-1 of the third.
    scores = np.array([[4.0, 1.0, 99.0, 99.0], [1.0, 3.0, 2.0, 0.5], [1.0, 2.0, 5.0, 99.0]])
    assert sorted(judged.pair_differences(scores)) == sorted([3.0, 2.0, 1.0, 2.5, 0.5, 1.5, 4.0, 3.0])
    assert judged.ranks.tolist() == [[1, 2, 0, 0], [2, 1, 2, 3], [2, 2, 1, 0]]
    for row, one in enumerate(rows):
        for text in range(4):
            there = text < len(one.responses)
            expected = [BOS, *ids(one.prompt + one.responses[text]), EOS] if there else []
            assert real(judged, row, text) == expected


def test_batches_are_rows(tokenizer):
    rows = [pair(f"the {word}", " was good", " was bad", i) for i, word in enumerate(folders.WORDS[8:16])]
    judged = encode_judged(rows, tokenizer, SPECIAL, LENGTH)
    where = np.array([5, 0, 5])
    batch = judged.batch(where)
    assert isinstance(batch, Comparisons)
    for name in ("tokens", "mask", "ranks", "margin"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(judged, name)[where])
    part = judged.rows(where)
    assert part.prompts == tuple(rows[i].prompt for i in where)
    assert part.margin.tolist() == [5, 0, 5]
    np.testing.assert_array_equal(part.tokens, judged.tokens[where])


# Ratings


def test_ratings_are_texts_with_a_score(tokenizer, ids):
    rows = [rating("the cat", " sat", 0.0), rating("a dog", " was good", -2.5), rating("", "a film", 4)]
    judged = encode_judged(rows, tokenizer, SPECIAL, LENGTH)
    assert judged.are_ratings
    assert judged.tokens.shape == (3, 1, 6)
    assert judged.pair_differences(np.zeros((3, 1))).size == 0
    assert [real(judged, i) for i in range(3)] == [
        [BOS, *ids(one.prompt + one.responses[0]), EOS] for one in rows
    ]  # fmt: skip
    assert judged.scores.tolist() == [0.0, -2.5, 4.0]
    batch = judged.batch(np.array([2, 1]))
    assert isinstance(batch, Ratings)
    assert batch.tokens.shape == batch.mask.shape == (2, 6)
    assert batch.scores.tolist() == [4.0, -2.5]
    np.testing.assert_array_equal(batch.tokens, judged.tokens[[2, 1], 0])


# What is left out


def test_long_and_tied_judgements_are_left_out_whole_and_counted(tokenizer):
    rows = [
        pair("the cat", " sat", " was"),
        pair("the cat", " sat here and was very", " was"),  # 9 tokens in all
        Judged("a dog", (" was", " is"), (1, 1), None),
        pair("a dog", " sat here and was", " is"),  # 8, which fit
        Judged("a film", (" was", " is", " sat here and was very"), (1, 1, 2), None),
        Judged("a film", (" was", " is", " here"), (1, 1, 2), None),
    ]
    judged = encode_judged(rows, tokenizer, SPECIAL, LENGTH)
    assert judged.prompts == ("the cat", "a dog", "a film")
    assert (judged.num_long, judged.num_tied) == (2, 1)
    assert judged.mask.sum(axis=2).max() == LENGTH
    assert judged.ranks.tolist() == [[1, 2, 0], [1, 2, 0], [1, 1, 2]]


def test_a_text_is_never_cut(tokenizer, rng):
    """Whatever the length: each judgement that is there is there whole, in its order."""
    rows = [pair("the cat", " sat", " was")]
    for i in range(1, 30):
        better, worse = (" " + " ".join(rng.choice(folders.WORDS, rng.integers(1, 9))) for _ in range(2))
        rows.append(pair(f"the {folders.WORDS[i % 8]}", better, worse, float(i)))
    sizes = [3 + max(len(text.split()) for text in one.responses) + 1 for one in rows]  # BOS, prompt, response, EOS
    for length in (6, 9, 30):
        judged = encode_judged(rows, tokenizer, SPECIAL, length)
        assert judged.margin.tolist() == [i for i, size in enumerate(sizes) if size <= length]
        assert judged.num_long == 30 - len(judged.margin)
        for row, number in enumerate(judged.margin):
            for text in range(2):
                assert len(real(judged, row, text)) == 4 + len(rows[int(number)].responses[text].split())


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([pair("a", " cat", " dog"), rating("a", " cat", 1.0)], "comparisons and scores in one source"),
        ([Judged("a", (" cat", " dog"), (1, 1), None)] * 2, "of 2 judgements 2 are ties and 0 have a text of more"),
        ([pair("the old cat", " sat here and was", " dog")], "0 are ties and 1 have a text of more than 8 tokens"),
        ([rating("the old cat", " sat here and was", 1.0)], "1 have a text of more than 8 tokens"),
    ],
    ids=["two kinds", "ties", "long pair", "long rating"],
)
def test_what_leaves_nothing_is_refused(tokenizer, rows, told):
    with pytest.raises(DataError, match=told) as error:
        encode_judged(rows, tokenizer, SPECIAL, LENGTH)
    assert "\n" not in str(error.value)
    assert "expected" in str(error.value)


# What is held out


def judged_set(tokenizer, prompts):
    """One pair for each prompt; the margin is its number."""
    rows = [pair(prompt, " was good", " was bad", i) for i, prompt in enumerate(prompts)]
    return encode_judged(rows, tokenizer, SPECIAL, 16)


def words(numbers) -> list[str]:
    return [" ".join(folders.WORDS[int(digit)] for digit in str(number)) for number in numbers]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.8])
def test_no_prompt_is_on_both_sides(tokenizer, rng, share):
    prompts = words(rng.integers(0, 12, 60))
    judged = judged_set(tokenizer, prompts)
    train, heldout = split_by_prompt(judged, share)
    assert not set(train.prompts) & set(heldout.prompts)
    assert set(train.prompts) | set(heldout.prompts) == set(prompts)
    # Nothing is lost, doubled or moved about; the rows are still those of their prompts.
    assert sorted([*train.margin, *heldout.margin]) == list(range(60))
    for part in (train, heldout):
        assert part.margin.tolist() == sorted(part.margin)
        assert part.prompts == tuple(prompts[int(i)] for i in part.margin)
        np.testing.assert_array_equal(part.tokens, judged.tokens[part.margin.astype(int)])
    # The last ones are held out, in the order of their first rows.
    distinct = list(dict.fromkeys(prompts))
    num = max(1, round(len(distinct) * share))
    assert list(dict.fromkeys(heldout.prompts)) == sorted(distinct[-num:], key=prompts.index)


@pytest.mark.parametrize("prompt", ["", "the cat"])
def test_without_different_prompts_the_rows_themselves_are_split(tokenizer, prompt):
    rows = [pair(prompt, f"the {word}", "a dog", i) for i, word in enumerate(folders.WORDS[:10])]
    train, heldout = split_by_prompt(encode_judged(rows, tokenizer, SPECIAL, 16), 0.2)
    assert (train.margin.tolist(), heldout.margin.tolist()) == ([*range(8)], [8, 9])


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("num", [2, 3, 10])
def test_both_sides_have_something(tokenizer, share, num):
    for prompts in (words(range(num)), ["the cat"] * num):
        train, heldout = split_by_prompt(judged_set(tokenizer, prompts), share)
        assert len(train.tokens) >= 1
        assert len(heldout.tokens) >= 1
        assert len(train.tokens) + len(heldout.tokens) == num


def test_one_judgement_cannot_be_split(tokenizer):
    with pytest.raises(DataError, match="got one judgement, expected at least two, one of them held out"):
        split_by_prompt(judged_set(tokenizer, ["the cat"]), 0.5)


def test_ratings_split_alike(tokenizer):
    rows = [rating(prompt, " was good", i) for i, prompt in enumerate(words([1, 2, 1, 3]))]
    train, heldout = split_by_prompt(encode_judged(rows, tokenizer, SPECIAL, LENGTH), 0.3)
    assert (train.scores.tolist(), heldout.scores.tolist()) == ([0, 1, 2], [3])
    assert train.are_ratings
    assert heldout.are_ratings
