"""The simulated annotator: its noise is the one that is promised, and follows from item, seed and name alone."""

import dataclasses
import itertools
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ppo_jax.errors import InputError
from ppo_jax.feedback.agreement import agreement
from ppo_jax.feedback.simulated import BATCH, annotate, simulated_annotator, simulated_score
from ppo_jax.feedback.store import Item, Store
from ppo_jax.rewards import RewardError

ROOT = Path(__file__).parents[1]


def length(prompts, completions, **columns) -> list[float]:
    return [float(len(text)) for text in completions]


def pairs(count: int) -> list[Item]:
    """The second response is one longer than the first."""
    return [Item("compare", f"prompt {i}", ("x" * (i % 7), "y" * (i % 7 + 1))) for i in range(count)]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "feedback.db"


def said(store: Store) -> dict[Item, tuple]:
    return {one.item: (one.annotator, one.ranks, one.score, one.order) for one in store.judgements()}


# The noise


@pytest.mark.parametrize(("difference", "temperature"), [(0.0, 1.0), (1.0, 1.0), (-2.0, 0.5), (3.0, 10.0)])
def test_pairs_follow_bradley_terry(rng, difference, temperature):
    wins = sum(simulated_annotator([difference, 0.0], rng, temperature) == [1, 2] for _ in range(4000))
    expected = 1 / (1 + np.exp(-difference / temperature))
    assert wins / 4000 == pytest.approx(expected, abs=0.04)  # 5 standard errors of a half


def test_rankings_follow_plackett_luce(rng):
    # Worths 4, 2, 1 at temperature 1. P(order abc) = 4/7 * 2/3, acb = 4/7 * 1/3, bac = 2/7 * 4/5, bca = 2/7 * 1/5,
    # cab = 1/7 * 4/6, cba = 1/7 * 2/6; the keys are the ranks of a, b, c.
    expected = {(1, 2, 3): 8 / 21, (1, 3, 2): 4 / 21, (2, 1, 3): 8 / 35}
    expected |= {(3, 1, 2): 2 / 35, (2, 3, 1): 2 / 21, (3, 2, 1): 1 / 21}
    assert sum(expected.values()) == pytest.approx(1)
    gold = np.log([4.0, 2.0, 1.0])
    counts = Counter(tuple(simulated_annotator(gold, rng, 1.0)) for _ in range(6000))
    assert set(counts) <= set(expected)
    for ranks, probability in expected.items():
        assert counts[ranks] / 6000 == pytest.approx(probability, abs=0.032)  # 5 standard errors of a half


def test_an_annotator_who_is_sure_follows_the_gold(rng):
    gold = rng.permutation(10).astype(float)
    ranks = simulated_annotator(gold, rng, 1e-6)
    assert [gold[ranks.index(place)] for place in range(1, 11)] == sorted(gold, reverse=True)
    assert all(type(rank) is int for rank in ranks)


def test_scores_follow_their_formula(rng):
    # P(upper half of the scale) = P(gold + temperature * noise > 0) = sigmoid(gold / temperature).
    upper = sum(simulated_score(1.0, 4, rng, 2.0) >= 3 for _ in range(4000))
    assert upper / 4000 == pytest.approx(1 / (1 + np.exp(-0.5)), abs=0.04)
    # Of gold 0 with temperature 1 all scores are equally likely: the sigmoid of logistic noise is uniform.
    counts = Counter(simulated_score(0.0, 5, rng, 1.0) for _ in range(5000))
    assert set(counts) == {1, 2, 3, 4, 5}
    assert all(count / 5000 == pytest.approx(0.2, abs=0.03) for count in counts.values())
    # Without noise: sigmoid(-2) = 0.119, sigmoid(0.5) = 0.622, sigmoid(3) = 0.953, of 5 parts.
    assert [simulated_score(gold, 5, rng, 1e-9) for gold in (-2.0, 0.5, 3.0)] == [1, 4, 5]
    assert [simulated_score(gold, 7, rng, 1.0) for gold in (-1e6, 1e6)] == [1, 7]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_make_no_sense(path, rng, temperature):
    for call in (
        lambda: simulated_annotator([0.0, 1.0], rng, temperature),
        lambda: simulated_score(0.0, 5, rng, temperature),
        lambda: annotate(Store(path), length, temperature, 0),
    ):
        with pytest.raises(InputError, match=r"temperature: got .*, expected a number > 0"):
            call()


# Over the store


def mixed(rng) -> list[Item]:
    items = pairs(30)
    items += [Item("rank", f"rank {i}", tuple("x" * n for n in rng.choice(9, 4, replace=False))) for i in range(10)]
    return items + [Item("score", f"score {i}", ("x" * i,), scale=5) for i in range(10)]


def test_everything_is_judged_once(path, rng, seed):
    with Store(path) as store:
        store.add_items(mixed(rng))
        store.add_judgement(1, "anna", ranks=[1, 2])
        assert annotate(store, length, 1.0, seed) == 49
        assert store.complete()
        assert annotate(store, length, 1.0, seed) == 0
        assert Counter(one.annotator for one in store.judgements()) == {"anna": 1, "simulated": 49}
        for one in store.judgements():
            assert sorted(one.order) == list(range(len(one.item.responses)))


def test_what_is_said_does_not_depend_on_the_other_items(tmp_path, rng, seed):
    items, found = mixed(rng), []
    for order in (items, items[::-1], items[25:], items[:25]):
        with Store(tmp_path / f"{len(found)}.db") as store:
            store.add_items(order)
            annotate(store, length, 1.0, seed)
            found.append(said(store))
    assert found[0] == found[1] == found[2] | found[3]
    assert len(found[0]) == 50


def test_what_is_said_does_not_depend_on_who_wrote_it(tmp_path, rng, seed):
    """Sources hold the folder of a model: the same road in another folder hears the same answers."""
    items, found = mixed(rng), []
    for source in ("runs/a", "/home/somebody/runs/b"):
        written = [dataclasses.replace(item, sources=(source,) * len(item.responses)) for item in items]
        with Store(tmp_path / f"{len(found)}.db") as store:
            store.add_items(written)
            annotate(store, length, 1.0, seed)
            found.append({dataclasses.replace(item, sources=()): what for item, what in said(store).items()})
    assert found[0] == found[1]
    assert len(found[0]) == 50


def test_seeds_and_names_are_different_annotators(tmp_path):
    found = {}
    for seed, name in itertools.product((0, 1), ("simulated", "another")):
        with Store(tmp_path / f"{seed}{name}.db") as store:
            store.add_items(pairs(60))
            annotate(store, lambda prompts, completions: [0.0] * len(prompts), 1.0, seed, name)
            found[seed, name] = tuple(one.ranks for one in store.judgements())
    assert len(set(found.values())) == 4


def test_two_annotators_agree_as_their_noise_lets_them(path):
    with Store(path) as store:
        store.add_items(pairs(2000))
        store.set_overlap(1.0, 2)
        assert annotate(store, length, 1.0, 3, "one") == annotate(store, length, 1.0, 3, "two") == 2000
        assert annotate(store, length, 1.0, 3, "three") == 0
        # p = sigmoid(1) = 0.731: both right or both wrong with p^2 + (1 - p)^2 = 0.6068.
        assert agreement(store)["compare"]["percent"] == pytest.approx(0.6068, abs=0.055)
        share = np.mean([one.ranks == (2, 1) for one in store.judgements()])
        assert share == pytest.approx(0.731, abs=0.035)


def test_a_gold_that_fails_keeps_what_was_judged_before(path, seed):
    calls = 0

    def fails_late(prompts, completions, **columns):
        nonlocal calls
        calls += 1
        return length(prompts, completions) if calls < 3 else [float("nan")] * len(prompts)

    with Store(path) as store:
        store.add_items(pairs(3 * BATCH))
        with pytest.raises(RewardError, match="got nan"):
            annotate(store, fails_late, 1.0, seed)
        assert len(store.judgements()) == 2 * BATCH
        assert annotate(store, length, 1.0, seed) == BATCH


@pytest.mark.parametrize("value", [-1, 0.5, None])
def test_seeds_that_are_none(path, value):
    with Store(path) as store, pytest.raises(InputError, match="seed: got"):
        annotate(store, length, 1.0, value)


def test_a_kill_changes_nothing_in_the_end(tmp_path, rng):
    script = """
import sys, time
from ppo_jax.feedback.simulated import annotate
from ppo_jax.feedback.store import Store

def slow(prompts, completions, **columns):
    print("batch", flush=True)
    time.sleep(0.02)
    return [float(len(text)) for text in completions]

annotate(Store(sys.argv[1]), slow, 1.0, 5)
"""
    items = pairs(8 * BATCH)
    with Store(tmp_path / "whole.db") as store:
        store.add_items(items)
        annotate(store, length, 1.0, 5)
        expected = said(store)
    with Store(tmp_path / "killed.db") as store:
        store.add_items(items)
    command = [sys.executable, "-c", script, str(tmp_path / "killed.db")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            assert process.stdout.readline() == "batch\n"
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with Store(tmp_path / "killed.db") as store:
        before = len(store.judgements())
        assert 2 * BATCH <= before < 8 * BATCH
        assert before % BATCH == 0
        assert annotate(store, length, 1.0, 5) == 8 * BATCH - before
        assert said(store) == expected
