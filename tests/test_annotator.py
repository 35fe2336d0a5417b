"""The simulated annotator's hidden preference: what it likes, and by how much."""

import random

import numpy as np
import pytest

from experiments.annotator import gives_a_reason, gold
from experiments.reviews import draw_review
from ppo_jax.rewards import call_reward, load_host_reward

SPEC = "experiments.annotator:gold"


def reviews(seed: int, num: int = 60):
    rng = random.Random(seed)
    return [draw_review(rng) for _ in range(num)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I liked it because it was short.", True),
        ("Because of the songs.", True),
        ("It was so loud that we left.", True),
        ("It was so loud. That was all.", True),
        ("It was so loud.", False),
        ("That was so loud.", False),
        ("I think that it was loud.", False),
        ("That it was so loud, I knew.", False),
        ("The sofa was soft.", False),
        ("", False),
    ],
)
def test_a_reason(text, expected):
    assert gives_a_reason(text) is expected


def test_the_gold_is_found_by_its_name_and_judges_any_text(seed):
    drawn = reviews(seed)
    prompts, completions = [one.prompt for one in drawn], [one.completion for one in drawn]
    scores = call_reward(load_host_reward(SPEC), prompts, completions, [{"number": i} for i in range(len(drawn))])
    assert scores.tolist() == pytest.approx(gold(prompts, completions))
    assert gold([], []) == []
    for text in ("", " ", "!!!", "naïve 猫", "the " * 1000):
        (score,) = gold(["x"], [text])
        assert np.isfinite(score)


def test_praise_is_liked_and_blame_is_not(seed):
    """Reviews of the grammar: whole sentences, so that only praise, blame and reasons count."""
    for one in reviews(seed):
        (score,) = gold([one.prompt], [one.completion])
        assert score == pytest.approx(2 * one.sentiment + gives_a_reason(one.completion))
        assert -2 <= score <= 3


def test_what_is_no_sentence_is_liked_less(seed):
    one = reviews(seed, 1)[0]
    words = one.completion.split()
    (whole,), (shuffled,) = gold([""], [one.completion]), gold([""], [" ".join(sorted(words)) + " ."])
    if gives_a_reason(one.completion) == gives_a_reason(" ".join(sorted(words))):
        assert shuffled < whole
    (garbage,) = gold([""], ["of of of ."])
    assert garbage == pytest.approx(-1)


def test_the_prompt_does_not_matter(seed):
    texts = [one.completion for one in reviews(seed, 10)]
    assert gold(["a"] * 10, texts) == gold(["b"] * 10, texts)
