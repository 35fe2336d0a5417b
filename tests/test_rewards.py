"""Judges: what a user's function is given, what is refused of what it returns, how a judge is found by its name."""

import sys
from dataclasses import dataclass

import chex
import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import reviews
from experiments.corpus import train_tokenizer
from ppo_jax.errors import InputError
from ppo_jax.rewards import (
    RewardError,
    call_reward,
    check_score,
    load_host_reward,
    load_reward,
    make_lexicon_score,
    sentiment,
)
from ppo_jax.rewards.combined import Judge, judge_in_jax, make_judges
from ppo_jax.rewards.registry import split_judges
from ppo_jax.types import Rollout

PROMPTS, ANSWERS = ["the cat", "a dog", "the film"], [" sat", " was good", ""]
NO_COLUMNS = [{}, {}, {}]


@pytest.fixture(scope="module")
def tokenizer():
    return folders.word_tokenizer()


def refused(reward, prompts=PROMPTS, columns=NO_COLUMNS) -> str:
    """The message with which what the reward does is refused."""
    with pytest.raises(RewardError) as error:
        call_reward(reward, prompts, ANSWERS[: len(prompts)], columns)
    assert isinstance(error.value, InputError)
    text = str(error.value)
    assert "\n" not in text, text
    return text


# Calls of a user's function


def test_a_reward_gets_texts_and_columns_as_lists():
    given = {}

    def reward(prompts, completions, **columns):
        given.update(prompts=prompts, completions=completions, **columns)
        return [1, 0.5, -2.0]

    columns = [{"label": 1, "tag": "x"}, {"label": 0}, {"label": None, "extra": [1]}]
    scores = call_reward(reward, tuple(PROMPTS), tuple(ANSWERS), columns)
    np.testing.assert_array_equal(scores, np.float32([1, 0.5, -2]))
    assert scores.dtype == np.float32
    # A row that lacks a column passes None.
    assert given == {
        "prompts": PROMPTS,
        "completions": ANSWERS,
        "label": [1, 0, None],
        "tag": ["x", None, None],
        "extra": [None, None, [1]],
    }


def test_columns_named_as_the_two_arguments_are_left_out():
    columns = [{"prompts": "x", "completions": "y", "label": 1}] * 3
    assert call_reward(lambda prompts, completions, label: label, PROMPTS, ANSWERS, columns).tolist() == [1, 1, 1]


def test_a_reward_cannot_change_the_texts_of_the_run():
    prompts, answers = list(PROMPTS), list(ANSWERS)

    def reward(prompts, completions, **columns):
        prompts.clear()
        completions.clear()
        return [0.0] * 3

    call_reward(reward, prompts, answers, NO_COLUMNS)
    assert (prompts, answers) == (PROMPTS, ANSWERS)


@pytest.mark.parametrize(
    "scores",
    [
        [1, 0, 1],
        (1.0, 0.0, 1.0),
        [True, False, True],
        np.array([1, 0, 1], np.float64),
        np.array([1, 0, 1], np.int8),
        jnp.array([1.0, 0.0, 1.0]),
        (x for x in (1, 0, 1)),
        {"a": 1, "b": 0, "c": 1}.values(),
        [np.float32(1), jnp.float32(0), np.int64(1)],
    ],
    ids=["ints", "tuple", "bools", "float64", "int8", "jax", "generator", "view", "scalars"],
)
def test_anything_that_gives_one_number_a_prompt_is_taken(scores):
    assert call_reward(lambda *_, **__: scores, PROMPTS, ANSWERS, NO_COLUMNS).tolist() == [1, 0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), np.float32("nan"), 1e300])
def test_a_score_that_is_not_finite_is_refused_with_its_prompts(bad):
    text = refused(lambda *_, **__: [0.0, bad, bad])
    assert text.startswith("reward <lambda>: got ")
    assert "for 2 of 3 responses, expected finite numbers" in text
    assert "'a dog'" in text
    assert "'the film'" in text
    assert "the cat" not in text


@pytest.mark.parametrize("scores", [[], [1.0], [1.0] * 4])
def test_the_wrong_number_of_scores_is_refused(scores):
    text = refused(lambda *_, **__: scores)
    assert f"got {len(scores)} scores, expected 3, one a prompt" in text
    assert "'the cat', 'a dog', 'the film'" in text


@pytest.mark.parametrize(
    "returned",
    [
        None,
        0.5,
        [0.1, None, 0.2],
        [[0.1], [0.2], [0.3]],
        ["0.1", "0.2", "0.3"],
        "123",
        {"1": 0.1, "2": 0.2, "3": 0.3},
        [1j, 0, 0],
        np.zeros((3, 2)),
        np.zeros((3, 1)),
        [object()] * 3,
    ],
    ids=[
        "none",
        "number",
        "none_inside",
        "nested",
        "strings",
        "string",
        "dict",
        "complex",
        "matrix",
        "column",
        "objects",
    ],
)
def test_what_is_no_list_of_numbers_is_refused(returned):
    text = refused(lambda *_, **__: returned)
    assert text.startswith("reward <lambda>: ")
    assert "prompts: 'the cat', 'a dog', 'the film'" in text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no such label"), "ValueError: no such label;"),
        (KeyError("answer"), "KeyError: 'answer';"),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line;"),
        (RuntimeError("\nfirst line is empty"), "RuntimeError: "),
        (ZeroDivisionError(), "ZeroDivisionError: "),
        (RecursionError("deep"), "RecursionError: deep;"),
    ],
)
def test_what_a_reward_raises_is_told_with_the_prompts(error, told):
    def judge(prompts, completions, **columns):
        raise error

    text = refused(judge)
    assert text.startswith(f"reward judge: {told}")
    assert text.endswith("prompts: 'the cat', 'a dog', 'the film'")


def test_an_error_while_the_scores_are_drawn_is_told():
    def judge(prompts, completions, **columns):
        yield 1.0
        raise ValueError("halfway")

    assert refused(judge).startswith("reward judge: ValueError: halfway; ")


def test_a_column_that_the_reward_does_not_take_is_told():
    text = refused(lambda prompts, completions: [0.0] * 3, columns=[{"label": 1}] * 3)
    assert "unexpected keyword argument 'label'" in text


def test_an_interrupt_is_not_an_error_of_the_reward():
    def judge(prompts, completions, **columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_reward(judge, PROMPTS, ANSWERS, NO_COLUMNS)


def test_of_many_and_long_prompts_a_few_are_told_and_shortened():
    prompts = ["line one\nline two " + "x" * 200, *(f"prompt {i}" for i in range(9))]
    with pytest.raises(RewardError) as error:
        call_reward(lambda *_, **__: [], prompts, [""] * 10, [{}] * 10)
    text = str(error.value)
    assert "\n" not in text
    assert r"'line one\nline two xxx" in text
    assert text.endswith("and 7 more")
    assert len(text) < 300


def test_a_reward_that_is_an_object_is_named_by_its_class():
    @dataclass
    class Judge:
        score: float

        def __call__(self, prompts, completions, **columns):
            return [self.score] * len(prompts)

    assert call_reward(Judge(2.0), PROMPTS, ANSWERS, NO_COLUMNS).tolist() == [2, 2, 2]
    assert refused(Judge(float("nan"))).startswith("reward Judge: ")


# VADER


def test_vader_gives_the_numbers_that_its_authors_print():
    # The examples in the README of vaderSentiment 3.3.2 (Hutto and Gilbert), with their compound scores.
    golden = {
        "VADER is smart, handsome, and funny.": 0.8316,
        "VADER is smart, handsome, and funny!": 0.8439,
        "VADER is VERY SMART, handsome, and FUNNY!!!": 0.9342,  # README: 0.9342 with three, 0.9469 with "uber"
        "The book was good.": 0.4404,
        "At least it isn't a horrible book.": 0.431,
        "Today SUX!": -0.5461,
        "": 0.0,
    }
    scores = sentiment.vader([""] * len(golden), list(golden))
    assert scores == pytest.approx(list(golden.values()), abs=1e-9)
    # The prompt does not count, nor does a column.
    assert sentiment.vader(["I hate this."], ["The book was good."], label=[0]) == [0.4404]


def test_a_missing_package_is_told_with_what_installs_it(monkeypatch, tokenizer):
    sentiment._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(InputError, match=r'config\.reward: .*pip install -e "\.\[eval\]"'):
        load_reward("vader*0.5,vader", tokenizer)
    sentiment._analyzer.cache_clear()


# By name


@pytest.fixture(autouse=True)
def module_path(monkeypatch):
    """Where modules are found, as it was, after each test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(folders.REWARDS)
    yield path
    sys.modules.pop("my_rewards", None)


def test_vader_is_found_by_its_name(tokenizer):
    judges = load_reward("vader", tokenizer)
    assert (judges.names, judges.weights, judges.params) == (("vader",), (1.0,), ((),))
    assert judges.members[0].host is sentiment.vader
    assert judges.score is judges.members[0].score is None


def test_a_function_in_a_file(reward_file, tokenizer, monkeypatch):
    judges = load_reward(f"{reward_file}:count_good", tokenizer)
    assert judges.score is None
    assert judges.names == ("count_good",)
    rollout = rollout_of(tokenizer, [["a"], ["a"]], [["good", "cat", "kind"], []])
    assert judges.judge(["a", "a"], [" good cat kind", ""], [{}, {}], rollout).total.tolist() == [0.5, 0]
    monkeypatch.chdir(reward_file.parent)
    assert load_host_reward("my_rewards.py:count_good").__name__ == "count_good"


def test_a_dataclass_in_the_file_works(tmp_path, tokenizer):
    """Dataclasses look their module up by name."""
    path = tmp_path / "with_dataclass.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\n\n@dataclasses.dataclass\nclass Judge:\n"
        "    weight: float = 2.0\n\n    def __call__(self, prompts, completions, **columns):\n"
        "        return [self.weight] * len(prompts)\n\njudge = Judge()\n"
    )
    reward = load_host_reward(f"{path}:judge")
    assert reward(["a"], ["b"]) == [2.0]
    sys.modules.pop("with_dataclass", None)


def test_a_file_named_as_a_module_of_python_does_not_replace_it(tmp_path, tokenizer):
    (tmp_path / "json.py").write_text("def judge(prompts, completions, **columns):\n    return [1.0]\n")
    reward = load_host_reward(f"{tmp_path / 'json.py'}:judge")
    assert reward(["a"], ["b"]) == [1.0]
    assert hasattr(sys.modules["json"], "dumps")


def test_a_file_finds_its_neighbours(tmp_path, tokenizer):
    (tmp_path / "my_neighbour.py").write_text("WEIGHT = 3.0\n")
    (tmp_path / "mine.py").write_text(
        "from my_neighbour import WEIGHT\n\ndef judge(prompts, completions, **columns):\n    return [WEIGHT]\n"
    )
    assert load_host_reward(f"{tmp_path / 'mine.py'}:judge")(["a"], ["b"]) == [3.0]
    sys.modules.pop("my_neighbour")


def test_a_function_in_a_module(tokenizer):
    assert load_host_reward("ppo_jax.rewards.sentiment:vader") is sentiment.vader


def test_a_score_in_jax_from_a_file_and_from_a_module(reward_file, tokenizer, monkeypatch):
    monkeypatch.chdir(reward_file.parent)
    judges = load_reward(f"jax:{reward_file}:score_good", tokenizer)
    assert judges.members[0].host is None
    row = rollout_of(tokenizer, [["the"]], [["good", "cat", "kind"]])
    scores = jax.jit(judges.score)(judges.params, row)
    np.testing.assert_allclose(scores.total, [0.5])
    assert (scores.tokens, scores.parts, scores.greedy) == (None, {}, None)
    judges = load_reward("jax:my_rewards:score_good", tokenizer)
    np.testing.assert_allclose(judges.score(judges.params, row).total, [0.5])


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("", "got '', expected one of vader"),
        ("vadre", "got 'vadre', expected one of vader"),
        ("jax:vader", "got 'jax:vader', expected"),
        ("jax:", "got 'jax:', expected"),
        (":judge", "got ':judge', expected"),
        ("FILE:", "expected one of vader"),
        ("no/such/file.py:judge", "there is no file no/such/file.py"),
        ("jax:no/such/file.py:judge", "there is no file no/such/file.py"),
        ("no.such.module:judge", "no.such.module cannot be imported"),
        ("ppo_jax.rewards.sentiment:veder", "has no function 'veder'"),
        ("FILE:count_god", "has no function 'count_god'"),
        ("FILE:GOOD", "has no function 'GOOD'"),  # it is there, and is no function
    ],
)
def test_what_names_no_judge_is_told(spec, told, reward_file, tokenizer):
    with pytest.raises(InputError, match=r"config\.reward: ") as error:
        load_reward(spec.replace("FILE", str(reward_file)), tokenizer)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


BROKEN = {
    "syntax": "def judge(:\n",
    "name": "nothing\n",
    "import": "import no_such_package\n",
    "raises": "raise RuntimeError('at import')\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("way", ["file", "module"])
def test_a_reward_file_that_cannot_be_imported_is_told(tmp_path, monkeypatch, tokenizer, content, way, request):
    name = f"broken_{request.node.callspec.id.replace('-', '_')}"
    path = tmp_path / f"{name}.py"
    path.write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=rf"config\.reward: .*{name}.* cannot be imported"):
        load_reward(f"{path if way == 'file' else name}:judge", tokenizer)
    sys.modules.pop(name, None)


def test_a_function_that_cannot_make_its_score_is_told(tmp_path, tokenizer):
    """It runs before the start, so its mistake is told as any other mistake in the configuration."""
    path = tmp_path / "no_score.py"
    path.write_text("def make(tokenizer):\n    raise RuntimeError('no weights\\nhere')\n")
    with pytest.raises(InputError, match=r"config\.reward: .*RuntimeError: no weights"):
        load_reward(f"jax:{path}:make", tokenizer)


# Several judges

JUDGES = """
import jax.numpy as jnp

GOOD = ("good", "fine", "great", "kind")


def length(tokenizer):
    return lambda rollout: jnp.sum(rollout.response_mask, axis=1)  # integers


def each_good(tokenizer):
    ids = jnp.array([tokenizer.encode(" " + word, add_special_tokens=False)[0] for word in GOOD])
    return lambda rollout: jnp.where(rollout.response_mask, jnp.isin(rollout.response_tokens, ids) * 1.0, jnp.nan)


def share(prompts, completions, **columns):
    return [len(text.split()) / (2 * len(prompt.split())) for prompt, text in zip(prompts, completions)]
"""


@pytest.fixture
def judge_file(tmp_path):
    path = tmp_path / "judges.py"
    path.write_text(JUDGES)
    return path


WORDS = [["the", "cat"], ["a"]], [["good", "cat", "kind"], ["good", "good"]]
TEXTS = ["the cat", "a"], [" good cat kind", " good good"], [{}, {}]


def test_golden_of_four_judges_on_the_host(judge_file, tokenizer):
    spec = f"jax:{judge_file}:length*-0.25, jax:{judge_file}:each_good*2,{judge_file}:share,{judge_file}:share * 0.5"
    judges = load_reward(spec, tokenizer)
    assert judges.score is None
    assert judges.names == ("length", "each_good", "share", "share_2")
    assert judges.weights == (-0.25, 2, 1, 0.5)
    scores = judges.judge(*TEXTS, rollout_of(tokenizer, *WORDS, length=4))
    # Lengths 3 and 2; shares 3 / (2 x 2) = 0.75 and 2 / (2 x 1) = 1.
    # -0.25 x 3 + 1 x 0.75 + 0.5 x 0.75 = 0.375, and -0.25 x 2 + 1 x 1 + 0.5 x 1 = 1
    assert scores.total.tolist() == [0.375, 1]
    # Good are the tokens 1 and 3 of the first, both of the second; each counts 2; what is masked is 0, not NaN.
    assert scores.tokens.tolist() == [[2, 0, 2, 0], [2, 2, 0, 0]]
    said = {name: part.tolist() for name, part in scores.parts.items()}
    assert said == {"length": [3, 2], "each_good": [2, 2], "share": [0.75, 1], "share_2": [0.75, 1]}
    assert scores.greedy is None
    arrays = jax.tree.leaves(scores)
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in arrays)


def test_golden_of_two_judges_in_the_program(judge_file, tokenizer):
    judges = load_reward(f"jax:{judge_file}:each_good*0.5,jax:{judge_file}:length*3", tokenizer)
    rollout = rollout_of(tokenizer, *WORDS, length=4)
    once = jax.jit(chex.assert_max_traces(judges.score, n=1))
    for _ in range(2):
        scores = once(judges.params, rollout)
    assert scores.total.tolist() == [9, 6]
    assert scores.tokens.tolist() == [[0.5, 0, 0.5, 0], [0.5, 0.5, 0, 0]]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {"each_good": [2, 2], "length": [3, 2]}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(scores))
    # On the host the same judges say the same.
    chex.assert_trees_all_equal(judges.judge(*TEXTS, rollout), jax.device_get(scores))


def test_one_judge_of_tokens_leaves_the_whole_at_zero(judge_file, tokenizer):
    judges, rollout = load_reward(f"jax:{judge_file}:each_good", tokenizer), rollout_of(tokenizer, *WORDS, length=4)
    for scores in (jax.jit(judges.score)(judges.params, rollout), judges.judge(*TEXTS, rollout)):
        assert scores.total.tolist() == [0, 0]
        assert scores.tokens.tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
        assert scores.parts == {}


def random_judges(rng, batch_size: int, response_length: int, kinds: str):
    """Judges that say random numbers: h on the host, j in JAX, t in JAX for each token; and what they say."""
    members, said = [], []
    for kind in kinds:
        shape = (batch_size, response_length) if kind == "t" else (batch_size,)
        numbers = rng.normal(size=shape).astype(np.float32)
        of_text = Judge(host=lambda *_, numbers=numbers, **__: numbers.tolist())
        members.append(of_text if kind == "h" else judge_in_jax(lambda numbers, rollout: numbers))
        said.append(numbers)
    params = [() if kind == "h" else numbers for kind, numbers in zip(kinds, said, strict=True)]
    weights = rng.normal(size=len(kinds)).tolist()
    return make_judges([f"judge{i}" for i in range(len(kinds))], weights, members, params), said


@pytest.mark.parametrize("kinds", ["jj", "tt", "jt", "hh", "hj", "ht", "hjt", "tjhjt", "h", "j", "t"])
def test_the_sums_are_those_of_plain_loops(rng, kinds):
    size, length = 4, 3
    judges, said = random_judges(rng, size, length, kinds)
    mask = rng.random((size, length)) < 0.6
    rollout = Rollout(jnp.zeros((size, length), jnp.int32), jnp.asarray(mask), *[jnp.zeros((size, length))] * 2)
    found = [judges.judge(["p"] * size, ["c"] * size, [{}] * size, rollout)]
    assert (judges.score is None) == ("h" in kinds)
    if judges.score:
        found.append(jax.jit(judges.score)(judges.params, rollout))
    total, tokens = np.zeros(size), np.zeros((size, length))
    parts = {f"judge{i}": np.zeros(size) for i in range(len(kinds))}
    for number, kind in enumerate(kinds):
        for row in range(size):
            if kind != "t":
                total[row] += judges.weights[number] * said[number][row]
                parts[f"judge{number}"][row] = said[number][row]
                continue
            for place in range(length):
                if mask[row, place]:
                    tokens[row, place] += judges.weights[number] * said[number][row, place]
                    parts[f"judge{number}"][row] += said[number][row, place]
    for scores in found:
        np.testing.assert_allclose(scores.total, total, atol=1e-5)
        assert (scores.tokens is None) == ("t" not in kinds)
        if scores.tokens is not None:
            np.testing.assert_allclose(scores.tokens, tokens, atol=1e-5)
        assert scores.parts.keys() == (parts.keys() if len(kinds) > 1 else set())
        for name, part in scores.parts.items():
            np.testing.assert_allclose(part, parts[name], atol=1e-5)
    # What is known of them beforehand is what they give.
    shapes = check_score("these", judges, size, 0, length)
    assert jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), shapes) == jax.tree.map(
        lambda x: (x.shape, np.dtype(x.dtype)), found[0]
    )


def test_parameters_are_given_with_each_call(rng):
    judges, (numbers, _) = random_judges(rng, 2, 3, "jh")
    row = Rollout(jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool), *[jnp.zeros((2, 3))] * 2)
    others = judges._replace(params=(numbers + 1, ()))
    before, after = (one.judge(["p"] * 2, ["c"] * 2, [{}] * 2, row) for one in (judges, others))
    np.testing.assert_allclose(after.total - before.total, [judges.weights[0]] * 2, atol=1e-5)


def test_a_weight_of_zero_logs_only(reward_file, tokenizer):
    """Also a judge that says NaN: nothing is learned from it."""
    spec = f"jax:{reward_file}:score_good,jax:{reward_file}:score_nan*0"
    judges, rollout = load_reward(spec, tokenizer), rollout_of(tokenizer, *WORDS)
    scores = jax.jit(judges.score)(judges.params, rollout)
    assert scores.total.tolist() == [0.5, 0.5]
    assert np.isnan(scores.parts["score_nan"]).all()


def test_of_several_judges_the_one_that_fails_is_told(reward_file, tokenizer):
    """What JAX says is for the guard in the program; what a judge of texts says is refused here."""
    rollout = rollout_of(tokenizer, *WORDS)
    judges = load_reward(f"jax:{reward_file}:score_nan,{reward_file}:count_good", tokenizer)
    assert np.isnan(judges.judge(*TEXTS, rollout).total).all()
    for name in ("raises", "too_few"):
        judges = load_reward(f"{reward_file}:count_good,{reward_file}:{name}*0,jax:{reward_file}:score_good", tokenizer)
        with pytest.raises(RewardError, match=f"^reward {name}: "):
            judges.judge(*TEXTS, rollout)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("vader", [("vader", 1)]),
        (" vader * 2 ", [("vader", 2)]),
        ("model:runs/rm*-1e-2,vader", [("model:runs/rm", -0.01), ("vader", 1)]),
        ("http://h:1/a*b*0.5,jax:m:f*+3", [("http://h:1/a*b", 0.5), ("jax:m:f", 3)]),
        ("a*0,b*1", [("a", 0), ("b", 1)]),
        ("", [("", 1)]),
    ],
)
def test_a_list_of_judges(spec, expected):
    assert split_judges(spec) == expected


@pytest.mark.parametrize("spec", ["vader*", "vader*two", "vader*nan", "vader*inf", "vader,vader*1;2", "*", "a*b"])
def test_a_weight_that_is_no_number_is_refused(spec, tokenizer):
    bad = spec.rpartition(",")[2]
    with pytest.raises(InputError) as error:
        load_reward(spec, tokenizer)
    assert str(error.value) == f"config.reward: got {bad!r}, expected a finite number after the *"


def test_a_judge_that_counts_nothing_is_no_judge(tokenizer):
    with pytest.raises(InputError, match=r"got 'vader\*0,vader\*-0.0', expected a weight other than 0"):
        load_reward("vader*0,vader*-0.0", tokenizer)


@pytest.mark.parametrize("spec", ["vader,", ",vader", "vader,,vader"])
def test_an_empty_place_in_a_list_is_told(spec, tokenizer):
    with pytest.raises(InputError, match="got '', expected one of vader, "):
        load_reward(spec, tokenizer)


def test_names_are_short_and_different(tokenizer, judge_file):
    other = judge_file.parent / "other.py"
    other.write_text("def share_2(prompts, completions, **columns): ...\n")
    share, web = f"{judge_file}:share", "http://127.0.0.1:8000/v1/score?key=secret"
    judges = load_reward(f"{share},{share},{other}:share_2,jax:{judge_file}:length,{web}", tokenizer)
    assert judges.names == ("share", "share_2", "share_2_2", "length", "127.0.0.1_8000_v1_score")


SHAPES = {
    "fits": ("(2,)", None),
    "fits each token": ("(2, 4)", None),
    "one for all": ("()", r"shape: got \(\), expected \(2,\), one score a response, or \(2, 4\), one a token"),
    "column": ("(2, 1)", r"shape: got \(2, 1\), expected "),
    "turned": ("(4, 2)", r"shape: got \(4, 2\), expected "),
    "with the prompt": ("(2, 7)", r"shape: got \(2, 7\), expected "),
    "more": ("(2, 4, 1)", r"shape: got \(2, 4, 1\), expected "),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_score_of_a_wrong_shape_is_refused_before_the_start(name, tmp_path, tokenizer):
    shape, told = SHAPES[name]
    path = tmp_path / "shaped.py"
    path.write_text(f"import jax.numpy as jnp\n\ndef make(tokenizer):\n    return lambda row: jnp.zeros({shape})\n")
    spec = f"jax:{path}:make"
    for one, where in ((spec, ""), (f"vader,{spec}*2", "make: ")):
        judges = load_reward(one, tokenizer)
        if told is None:
            scores = check_score(one, judges, 2, 3, 4)
            assert scores.total.shape == (2,)
            assert scores.tokens is None or scores.tokens.shape == (2, 4)
            continue
        with pytest.raises(InputError, match=rf"^config\.reward: .*make.*: {where}{told}"):
            check_score(one, judges, 2, 3, 4)


def test_a_score_that_is_no_program_is_refused_before_the_start(tmp_path, tokenizer):
    path = tmp_path / "no_program.py"
    path.write_text("def make(tokenizer):\n    return lambda rollout: [float(x) for x in rollout.tokens[:, 0]]\n")
    judges = load_reward(f"jax:{path}:make", tokenizer)
    with pytest.raises(InputError, match=r"^config\.reward: mine: ConcretizationTypeError: "):
        check_score("mine", judges, 2, 3, 4)


# Word lists


def rollout_of(tokenizer, prompts, responses, length: int = 0, garbage: str = "<pad>") -> Rollout:
    """Words to a rollout: prompts padded left, responses padded right (with `garbage`, which is masked)."""
    spelled = [
        [["▁" + w if not w.startswith("<") else w for w in row] for row in rows] for rows in (prompts, responses)
    ]
    width, length = max(map(len, prompts)), length or max(map(len, responses))
    tokens, mask = [], []
    for prompt, response in zip(*spelled, strict=True):
        row = ["<pad>"] * (width - len(prompt)) + prompt + response + [garbage] * (length - len(response))
        tokens.append(tokenizer.convert_tokens_to_ids(row))
        mask.append(
            [False] * (width - len(prompt))
            + [True] * (len(prompt) + len(response))
            + [False] * (length - len(response))
        )
    zeros = jnp.zeros((len(tokens), length))
    return Rollout(jnp.array(tokens, jnp.int32), jnp.array(mask), zeros, zeros)


def test_the_word_score_counts_responses_only(tokenizer):
    score = make_lexicon_score(tokenizer, folders.GOOD, folders.BAD)
    prompts = [["good"], ["bad"], ["the", "cat"], ["the"], ["the"], ["the"]]
    responses = [
        ["good", "good", "kind", "</s>"],  # (3 - 0) / 3
        ["good", "bad", "cat", "great"],  # (2 - 1) / 3
        ["bad", "</s>"],  # (0 - 1) / 1
        ["cat", "sat"],  # 0 / max(1, 0)
        ["</s>"],
        [],
    ]
    scores = jax.jit(score)(rollout_of(tokenizer, prompts, responses, garbage="▁good"))
    np.testing.assert_allclose(scores, [1, 1 / 3, -1, 0, 0, 0], rtol=1e-6)
    assert scores.dtype == jnp.float32


def test_the_word_score_is_traced_once_and_maps(tokenizer):
    score = jax.jit(chex.assert_max_traces(make_lexicon_score(tokenizer, folders.GOOD, folders.BAD), n=1))
    for response in (["good"], ["bad"]):
        score(rollout_of(tokenizer, [["the"]], [response], length=2))


def test_tokens_beyond_the_tokenizer_count_nothing():
    """A model's vocabulary is often padded to a round number: ids that no token has can be sampled."""
    tokenizer = folders.word_tokenizer(["the", "cat", "good"])  # a word of the lexicon is the last token
    row = rollout_of(tokenizer, [["the"]], [["cat", "cat"]])
    row = row.replace(tokens=row.tokens.at[0, -1].set(len(tokenizer) + 5))
    np.testing.assert_array_equal(make_lexicon_score(tokenizer, ["good"], [])(row), [0.0])


@pytest.mark.parametrize("word", ["unknown", "very old"])
def test_a_word_that_is_not_one_token_is_refused(tokenizer, word):
    with pytest.raises(InputError, match=f"lexicon: got '{word}', .* expected a single token"):
        make_lexicon_score(tokenizer, ["good", word], [])


def test_the_compiled_praise_is_the_score_of_the_text(seed):
    """Token ids in the program against words of the decoded text on the host, on reviews and on shuffled words."""
    texts = [review.text for review in reviews.generate_reviews(200, seed)]
    tokenizer = train_tokenizer([review.text for review in reviews.generate_reviews(3000, 0)] + texts, 2048)
    rng = np.random.default_rng(seed)
    lexicon = sorted(reviews.POSITIVE_WORDS | reviews.NEGATIVE_WORDS)
    texts += [" ".join(rng.choice(lexicon, rng.integers(1, 12))) for _ in range(100)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    cuts = [int(rng.integers(1, len(row))) for row in ids]  # where the response begins
    length = max(map(len, ids))
    tokens, mask = np.zeros((len(ids), 2 * length), np.int32), np.zeros((len(ids), 2 * length), bool)
    for i, (row, cut) in enumerate(zip(ids, cuts, strict=True)):
        tokens[i, length - cut : length - cut + len(row)], mask[i, length - cut : length - cut + len(row)] = row, True
    zeros = jnp.zeros((len(ids), length))
    praise = make_lexicon_score(tokenizer, reviews.POSITIVE_WORDS, reviews.NEGATIVE_WORDS)
    scores = jax.jit(praise)(Rollout(jnp.asarray(tokens), jnp.asarray(mask), zeros, zeros))
    responses = [tokenizer.decode(row[cut:]) for row, cut in zip(ids, cuts, strict=True)]
    expected = [reviews.lexicon_score(text) for text in responses]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert len(set(np.sign(expected))) == 3
