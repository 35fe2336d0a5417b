"""Agreement of annotators: published numbers, arithmetic by hand, identities."""

import itertools
import math

import numpy as np
import pytest

from ppo_jax.errors import InputError
from ppo_jax.feedback.agreement import LEVELS, agreement, cohen_kappa, krippendorff_alpha, percent_agreement
from ppo_jax.feedback.store import Item, Store

_ = None
# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, part C: 4 observers, 12 units, gaps.
PUBLISHED = list(
    zip(
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
        strict=True,
    )
)


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_krippendorffs_example(level, alpha):
    assert krippendorff_alpha(PUBLISHED, level) == pytest.approx(alpha, abs=5e-4)


def test_alpha_by_hand():
    # Values 1 1 | 1 2 | 2 2; the unit of one value does not count. n = 6, three of each.
    # nominal: D_o = (0 + 2 + 0) / 6 = 1/3; D_e = 2 * 3 * 3 / (6 * 5) = 18/30; alpha = 1 - (1/3) / (3/5) = 4/9.
    units = [(1, 1), (1, 2), (2, 2), (3, None)]
    assert krippendorff_alpha(units) == pytest.approx(4 / 9, abs=1e-12)
    # Two values only: every level says the same.
    assert [krippendorff_alpha(units, level) for level in LEVELS] == pytest.approx([4 / 9] * 3, abs=1e-12)
    # interval, values 0 0 | 1 3: D_o = (0 + 2 * 4) / 4 = 2; D_e = 2 * (0 + 1 + 9 + 1 + 9 + 4) / (4 * 3) = 4.
    assert krippendorff_alpha([(0, 0), (1, 3)], "interval") == pytest.approx(1 - 2 / 4, abs=1e-12)
    # ordinal, the same: n_0 = 2, n_1 = n_3 = 1. 0 to 1: 2/2 + 1/2 = 1.5; 0 to 3: 2/2 + 1 + 1/2 = 2.5; 1 to 3: 1.
    # D_o = 2 * 1 / 4 = 1/2; D_e = 2 * (2 * 2.25 + 2 * 6.25 + 1) / 12 = 3.
    assert krippendorff_alpha([(0, 0), (1, 3)], "ordinal") == pytest.approx(1 - 0.5 / 3, abs=1e-12)


def brute_force_alpha(units, level):
    """Krippendorff's definition with its sums written out, over every ordered pair of values."""
    units = [[value for value in unit if value is not None] for unit in units]
    units = [unit for unit in units if len(unit) > 1]
    pooled = [value for unit in units for value in unit]

    def delta(a, b):
        if level == "nominal":
            return float(a != b)
        if level == "interval":
            return (a - b) ** 2
        low, high = min(a, b), max(a, b)
        between = sum(low <= value <= high for value in pooled)
        return (between - (pooled.count(a) + pooled.count(b)) / 2) ** 2 if a != b else 0.0

    observed = sum(sum(delta(a, b) for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    expected = sum(delta(a, b) for a, b in itertools.permutations(pooled, 2)) / (len(pooled) - 1)
    return 1 - observed / expected


@pytest.mark.parametrize("level", LEVELS)
def test_alpha_is_its_definition(level, rng):
    for _round in range(5):
        values = rng.integers(-3, 4, (12, 4)) * float(rng.choice([1, 0.5, 1e6])) + float(rng.choice([0, 1e6]))
        units = np.where(rng.random((12, 4)) < 0.3, None, values).tolist()
        assert krippendorff_alpha(units, level) == pytest.approx(brute_force_alpha(units, level), abs=1e-9)


def test_alpha_of_equal_judgements_is_1_and_of_chance_0(rng):
    values = rng.integers(0, 5, 20_000)
    for level in LEVELS:
        assert krippendorff_alpha([(v, v, v) for v in values.tolist()], level) == 1.0
        # The standard error of the share of equal pairs is below 0.005 with 10,000 units.
        assert krippendorff_alpha(values.reshape(-1, 2).tolist(), level) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("units", [[], [(1,), (2, None)], [(None, None)], [(2, 2), (2, 2, 2)]])
@pytest.mark.parametrize("level", LEVELS)
def test_alpha_without_disagreement_to_expect_is_nan(units, level):
    assert math.isnan(krippendorff_alpha(units, level))


def test_alpha_refuses_what_it_cannot_use():
    with pytest.raises(InputError, match="level: got 'ratio', expected one of nominal, ordinal, interval"):
        krippendorff_alpha(PUBLISHED, "ratio")
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="finite"):
            krippendorff_alpha([(1, bad), (1, 2)], "interval")


def test_kappa_by_hand():
    # 50 units: both yes 20, yes/no 5, no/yes 10, both no 15. p_o = 35/50 = 0.7;
    # p_e = 25/50 * 30/50 + 25/50 * 20/50 = 0.5; kappa = (0.7 - 0.5) / (1 - 0.5) = 0.4.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4, abs=1e-12)
    # Where one of them said nothing, nothing counts.
    assert cohen_kappa([*first, None, "yes"], [*second, "no", None]) == pytest.approx(0.4, abs=1e-12)
    # Cohen's 1960 table of proportions for three categories: .25 .13 .12 / .12 .02 .16 / .03 .15 .02.
    table = [[25, 13, 12], [12, 2, 16], [3, 15, 2]]
    pairs = [(row, column) for row in range(3) for column in range(3) for _i in range(table[row][column])]
    # p_o = .29; p_e = .5 * .4 + .3 * .3 + .2 * .3 = .35; kappa = -.06 / .65.
    assert cohen_kappa(*zip(*pairs, strict=True)) == pytest.approx(-0.06 / 0.65, abs=1e-12)


def test_kappa_of_equal_judgements_is_1_and_undefined_for_one_category():
    assert cohen_kappa(["a", "b", "b"], ["a", "b", "b"]) == 1.0
    assert cohen_kappa(["a", "a"], ["b", "b"]) == 0.0  # p_o = p_e = 0
    for first, second in [([], []), (["a"], ["a"]), (["a", "a"], ["a", "a"]), ([None], ["a"])]:
        assert math.isnan(cohen_kappa(first, second))
    with pytest.raises(InputError, match="second: got 1, expected 2 judgements"):
        cohen_kappa(["a", "b"], ["a"])


def test_percent_by_hand():
    # Pairs: 1 of 1; of three judgements a a b 1 of 3 is equal; 0 of 1; a single one has no pair: 2 of 5.
    assert percent_agreement([("x", "x"), ("a", "a", "b"), ("x", None, "y"), ("z", None)]) == pytest.approx(2 / 5)
    assert math.isnan(percent_agreement([("z",)]))


# Over the store


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "feedback.db") as store:
        yield store


def judge(store: Store, annotator: str, *said) -> None:
    """Judges items 1, 2, 3 ...; None leaves one out."""
    for item_id, one in enumerate(said, start=1):
        if one is not None:
            store.add_judgement(item_id, annotator, **one)


FIRST, SECOND, TIE, BAD = {"ranks": [1, 2]}, {"ranks": [2, 1]}, {"ranks": [1, 1]}, {"both_bad": True}


def test_agreement_about_comparisons_by_hand(store):
    store.add_items([Item("compare", f"p{i}", ("a", "b")) for i in range(8)])
    judge(store, "anna", FIRST, FIRST, SECOND, TIE, BAD, BAD, FIRST, FIRST)
    judge(store, "ben", FIRST, SECOND, SECOND, TIE, BAD, TIE, None, FIRST)
    # 7 in common, 5 equal. anna: 3 first, 1 second, 1 tie, 2 bad; ben: 2 first, 2 second, 2 ties, 1 bad.
    # p_e = (3*2 + 1*2 + 1*2 + 2*1) / 49 = 12/49; kappa = (35 - 12) / (49 - 12) = 23/37.
    # alpha: 14 values, 5 first, 3 second, 3 ties, 3 bad. D_o = 4/14; D_e = (196 - 25 - 27) / (14 * 13) = 144/182.
    report = agreement(store)["compare"]
    assert (report["items"], report["judgements"], report["annotators"]) == (7, 14, ["anna", "ben"])
    assert report["percent"] == pytest.approx(5 / 7)
    assert report["kappa"] == pytest.approx(23 / 37)
    assert report["alpha"] == pytest.approx(1 - (4 / 14) / (144 / 182))
    assert report["level"] == "nominal"


def test_the_order_of_the_page_does_not_matter(store, rng):
    store.add_items([Item("compare", f"p{i}", ("a", "b")) for i in range(12)])
    store.set_overlap(1.0, 2)
    likes = rng.permutation([True, False] * 6).tolist()
    for name in ("anna", "ben"):  # both always press the text that is liked, wherever it stands
        while (shown := store.next_item(name)) is not None:
            best = shown.responses.index("a" if likes[shown.item_id - 1] else "b")
            store.judge(name, shown.item_id, shown.form_token, ranks=[1 if i == best else 2 for i in range(2)])
    report = agreement(store)["compare"]
    assert (report["percent"], report["kappa"], report["alpha"]) == (1.0, 1.0, 1.0)


def test_agreement_about_rankings_is_about_their_pairs(store):
    store.add_items([Item("rank", f"p{i}", ("a", "b", "c")) for i in range(2)])
    judge(store, "anna", {"ranks": [1, 2, 3]}, BAD)
    judge(store, "ben", {"ranks": [1, 3, 2]}, {"ranks": [1, 1, 2]})
    # Pairs ab, ac, bc. Item 1: first first first | first first second; item 2: bad bad bad | tie first first.
    # percent = 2/6. Values: 7 first (3 + 2 + 2), 1 second, 1 tie, 3 bad; n = 12.
    # D_o = 2 * 4 / 12; D_e = (144 - 49 - 1 - 1 - 9) / (12 * 11) = 84/132. p_e = (3*4 + 0 + 0 + 3*0) / 36 = 1/3.
    report = agreement(store)["rank"]
    assert report["items"] == 2
    assert report["percent"] == pytest.approx(2 / 6)
    assert report["alpha"] == pytest.approx(1 - (8 / 12) / (84 / 132))
    assert report["kappa"] == pytest.approx((2 / 6 - 1 / 3) / (1 - 1 / 3))


def test_agreement_about_scores_of_three(store):
    store.add_items([Item("score", f"p{i}", ("a",), scale=5) for i in range(3)])
    for name, scores in {"anna": (1, 3, 5), "ben": (1, 4, None), "carl": (2, None, None)}.items():
        judge(store, name, *(None if score is None else {"score": score} for score in scores))
    # Units 1 1 2 | 3 4: pairs equal 1 of 4. interval: n = 5, values 1 1 2 3 4.
    # D_o = (2 * (0 + 1 + 1) / 2 + 2 * 1) / 5 = 4/5; squares of differences: 0 1 4 9 1 4 9 1 4 1 = 34; D_e = 68/20.
    report = agreement(store)["score"]
    assert report == {
        "items": 2,
        "judgements": 5,
        "annotators": ["anna", "ben", "carl"],
        "percent": 1 / 4,
        "kappa": None,
        "alpha": pytest.approx(1 - 0.8 / 3.4),
        "level": "interval",
    }


def test_what_is_undone_or_judged_once_does_not_count(store):
    assert agreement(store) == {}
    store.add_items([Item("compare", "p", ("a", "b")), Item("score", "p", ("a",), scale=3)])
    judge(store, "anna", FIRST, {"score": 1})
    judge(store, "ben", SECOND)
    assert agreement(store)["compare"]["percent"] == 0.0
    store.undo("ben")
    assert agreement(store) == {}


def test_what_is_not_defined_is_none(store):
    store.add_items([Item("compare", "p", ("a", "b"))])
    judge(store, "anna", TIE)
    judge(store, "ben", TIE)
    report = agreement(store)["compare"]
    assert (report["percent"], report["kappa"], report["alpha"]) == (1.0, None, None)
