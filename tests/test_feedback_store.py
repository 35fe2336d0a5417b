"""The store of items and judgements: nothing is lost or counted twice, whoever writes and whenever they are killed."""

import contextlib
import dataclasses
import datetime
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ppo_jax.errors import InputError
from ppo_jax.feedback import store as store_module
from ppo_jax.feedback.store import FeedbackError, Item, Judgement, Progress, Store

ROOT = Path(__file__).parents[1]
PAIR = Item("compare", "prompt", ("good", "bad"))
UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "feedback.db"


@pytest.fixture
def store(path):
    with Store(path) as store:
        yield store


def pairs(count: int) -> list[Item]:
    return [Item("compare", f"prompt {i}", (f"a{i}", f"b{i}")) for i in range(count)]


def judge_next(store: Store, annotator: str, **said) -> Judgement | None:
    """Judges what is shown next, the first of the page as the best or as `said`; None when nothing is left."""
    shown = store.next_item(annotator)
    if shown is None:
        return None
    said = said or {"ranks": list(range(1, len(shown.responses) + 1))}
    return store.judge(annotator, shown.item_id, shown.form_token, **said)


def rows(path: Path, query: str) -> list[tuple]:
    """What another program reads in the file."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def everything(path: Path) -> list[list[tuple]]:
    return [rows(path, f"SELECT * FROM {table} ORDER BY 1") for table in ("items", "showings", "judgements", "overlap")]


def refused(call, *arguments, match: str, **named) -> str:
    with pytest.raises(FeedbackError, match=match) as error:
        call(*arguments, **named)
    assert isinstance(error.value, InputError)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400, text
    return text


# Items


def test_items_are_added_once(store, path):
    items = [PAIR, Item("rank", "p", ("a", "b", "c"), ("x", "y", "x")), Item("score", "", ("",), scale=5)]
    assert store.add_items(items) == 3
    assert store.add_items(items[::-1]) == 0
    assert store.add_items([*items, PAIR, Item("compare", "prompt", ("bad", "good"))]) == 1
    assert store.add_items([]) == 0
    assert [item for _, item in store.pending("anna")] == [*items, Item("compare", "prompt", ("bad", "good"))]
    assert [store.item_id(item) for item in items] == [1, 2, 3]
    refused(store.item_id, Item("compare", "prompt", ("good", "worse")), match="not in")


@pytest.mark.parametrize("change", ["kind", "prompt", "responses", "sources", "scale"])
def test_every_part_of_an_item_makes_it_another(change):
    one = Item("score", "p", ("r",), ("s",), 5)
    other = {"kind": "rank", "prompt": "", "responses": ("p",), "sources": (), "scale": 0}[change]
    assert dataclasses.replace(one, **{change: other}).hash != one.hash
    assert dataclasses.replace(one).hash == one.hash


@pytest.mark.parametrize(
    ("item", "match"),
    [
        (Item("pair", "p", ("a", "b")), "kind 'pair', expected one of compare, rank, score"),
        (Item("compare", "p", ("a",)), "got 1 responses, expected 2"),
        (Item("compare", "p", ("a", "b", "c")), "got 3 responses, expected 2"),
        (Item("rank", "p", ("a",)), "got 1 responses, expected 2 or more"),
        (Item("rank", "p", ()), "got 0 responses"),
        (Item("score", "p", ("a", "b"), scale=5), "got 2 responses, expected 1"),
        (Item("compare", "p", ("same", "same")), "equal"),
        (Item("rank", "p", ("a", "b", "a")), "equal"),
        (Item("compare", "p", ("a", "b"), ("x",)), "got 1 sources"),
        (Item("compare", "p", ("a", "b"), scale=5), "scale 5, expected 0"),
        (Item("score", "p", ("a",), scale=1), "scale 1, expected 0 or 2 to 1000"),
        (Item("score", "p", ("a",), scale=10**9), "scale"),
        (Item("score", "p", ("a",), scale=True), "scale"),
        (Item("compare", "p", ["a", "b"]), "tuple"),
        (Item("compare", "p", "ab"), "tuple"),
        (Item("compare", None, ("a", "b")), "NoneType, expected text"),
        (Item("compare", "p", ("a", 1)), "int, expected text"),
        (Item("compare", "half \ud83d", ("a", "b")), "not Unicode"),
        (Item("compare", "p", ("a", "\udcff")), "not Unicode"),
    ],
)
def test_what_cannot_be_judged_is_refused_and_nothing_is_added(store, path, item, match):
    assert refused(store.add_items, [PAIR, item], match=match).startswith("item 2 of 2: ")
    assert store.pending("anna") == []


def test_text_comes_back_as_it_was(store):
    odd = ("<script>alert(1)</script>", "zwölf 猫 🐈\u2028\x00\r\n\t'; DROP TABLE items; --", "x" * 1_000_000, "")
    item = Item("rank", '\x00 & "', odd, ("sources", "are", "text", "as well"))
    store.add_items([item])
    judgement = judge_next(store, "Zoë O'Neil; 猫", ranks=[1, 2, 3, 4], comment=odd[1] + odd[0])
    assert judgement.item == item
    assert (judgement.annotator, judgement.comment) == ("Zoë O'Neil; 猫", odd[1] + odd[0])
    assert store.judgements() == [judgement]


# Showing


def test_what_is_shown_is_a_permutation_that_is_recorded(store, rng):
    items = [
        Item("rank", f"p{i}", tuple(f"{i}{letter}" for letter in "abcde"[: rng.integers(2, 6)])) for i in range(30)
    ]
    store.add_items(items)
    for item in items:
        shown = store.next_item("anna")
        assert (shown.prompt, shown.kind, shown.scale) == (item.prompt, "rank", 0)
        assert shown.responses == tuple(item.responses[index] for index in shown.order)
        assert sorted(shown.order) == list(range(len(item.responses)))
        said = rng.integers(1, 4, len(item.responses)).tolist()
        judgement = store.judge("anna", shown.item_id, shown.form_token, ranks=said)
        # In the item's order and without gaps: what was said about each text, and the order of what was said.
        said_of = dict(zip(shown.responses, said, strict=True))
        rank_of = dict(zip(item.responses, judgement.ranks, strict=True))
        assert set(judgement.ranks) == set(range(1, len(set(said)) + 1))
        for one in item.responses:
            for other in item.responses:
                assert (said_of[one] < said_of[other]) == (rank_of[one] < rank_of[other])
        assert judgement.order == shown.order
    assert [one.item for one in store.judgements()] == items


def test_the_order_is_random(store):
    store.add_items(pairs(200))
    orders = Counter(judge_next(store, "anna").order for _ in range(200))
    # Binomial(200, 1/2): outside 100 +- 50 with a probability below 1e-12.
    assert set(orders) == {(0, 1), (1, 0)}
    assert all(50 <= count <= 150 for count in orders.values())


def test_a_reload_and_a_restart_show_the_same(store, path):
    store.add_items([Item("rank", f"p{i}", tuple("abcdefgh")) for i in range(3)])
    shown = store.next_item("anna")
    assert store.next_item(" anna\t") == shown
    with Store(path) as again:
        assert again.next_item("anna") == shown
    assert len(rows(path, "SELECT * FROM showings")) == 1


def test_two_annotators_get_different_items_until_all_are_out(store):
    store.add_items(pairs(3))
    out = [store.next_item(name) for name in ("anna", "ben", "carl")]
    assert [shown.item_id for shown in out] == [1, 2, 3]
    assert store.next_item("dora") is None
    assert store.progress("dora") == Progress(0, 0, 0, 3, None)
    assert store.progress("anna").available == 1


@pytest.fixture
def wait(monkeypatch):
    """A function that moves the store's clock on, in seconds."""
    waited = datetime.timedelta()

    def move(seconds: float) -> None:
        nonlocal waited
        waited += datetime.timedelta(seconds=seconds)

    monkeypatch.setattr(store_module, "_now", lambda: datetime.datetime.now(datetime.UTC) + waited)
    return move


def test_an_item_that_was_left_lying_goes_to_another(store, wait):
    store.add_items([PAIR])
    first = store.next_item("anna")
    assert store.next_item("ben") is None
    wait(800)
    store.next_item("anna")  # renews the lease of 900 s
    wait(800)
    assert store.next_item("ben") is None
    wait(101)
    second = store.next_item("ben")
    assert (second.item_id, second.form_token != first.form_token) == (first.item_id, True)
    assert store.next_item("anna") is None
    # Both of them answer: neither judgement is lost, one was needed.
    store.judge("ben", second.item_id, second.form_token, both_bad=True)
    store.judge("anna", first.item_id, first.form_token, ranks=[1, 1])
    assert [(one.annotator, one.both_bad) for one in store.judgements()] == [("ben", True), ("anna", False)]
    assert (store.progress("anna").total_judged, store.complete()) == (1, True)


def test_an_expired_lease_that_nobody_took_is_still_the_same_showing(path):
    with Store(path, lease_s=0.0) as store:
        store.add_items(pairs(2))
        assert store.next_item("anna") == store.next_item("anna")


# Overlap and progress


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_overlap_is_exact_and_the_same_everywhere(tmp_path, share, rng):
    items = [*pairs(20), *(Item("score", f"p{i}", ("r",), scale=3) for i in range(10))]
    needed = []
    for name in ("one.db", "other.db"):
        with Store(tmp_path / name) as store:
            store.set_overlap(share, 3)
            for part in (items[:7], items[7:]):
                rng.shuffle(part)
                store.add_items(part)
            assert store.progress("anna").total_needed == 30 + 2 * (share * 20 + share * 10)
        needed.append(dict(rows(tmp_path / name, "SELECT hash, needed FROM items")))
    assert needed[0] == needed[1]
    assert Counter(needed[0].values()) == Counter({3: round(share * 30), 1: 30 - round(share * 30)}) - Counter()


def test_overlapped_items_are_judged_by_as_many_and_the_rest_by_one(store):
    store.add_items(pairs(20))
    store.set_overlap(0.25, 2)
    assert not store.complete()
    assert sum(1 for _ in iter(lambda: judge_next(store, "anna"), None)) == 20
    assert store.progress("anna") == Progress(20, 0, 20, 25, 20)
    assert store.progress("ben") == Progress(0, 5, 20, 25, None)
    assert sum(1 for _ in iter(lambda: judge_next(store, "ben"), None)) == 5
    assert store.complete()
    assert store.next_item("carl") is None
    counts = Counter(one.item_id for one in store.judgements())
    assert Counter(counts.values()) == {1: 15, 2: 5}
    store.set_overlap(0.25, 3)
    assert store.progress("carl").available == 5


def test_nothing_is_not_complete(store):
    assert not store.complete()
    assert store.next_item("anna") is None


@pytest.mark.parametrize(
    ("share", "annotators"), [(-0.1, 2), (1.1, 2), (float("nan"), 2), ("1", 2), (True, 2), (0.5, 0), (0.5, 2.0)]
)
def test_an_overlap_that_cannot_be_is_refused(store, path, share, annotators):
    before = everything(path)
    refused(store.set_overlap, share, annotators, match="overlap: got")
    assert everything(path) == before


# Judging


@pytest.mark.parametrize(
    ("said", "ranks", "both_bad"),
    [
        ({"ranks": [1, 1]}, (1, 1), False),
        ({"ranks": (7, 7)}, (1, 1), False),
        ({"both_bad": True}, (1, 1), True),
    ],
)
def test_a_tie_and_both_bad_are_two_things(store, said, ranks, both_bad):
    store.add_items([PAIR])
    judgement = judge_next(store, "anna", **said)
    assert (judgement.ranks, judgement.both_bad, judgement.score) == (ranks, both_bad, None)


def test_a_judgement_says_who_what_and_when(store):
    store.add_items([Item("score", "p", ("r",), scale=5)])
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(milliseconds=1)
    judgement = judge_next(store, " Anna ", score=4, comment="why")
    shown, said = map(datetime.datetime.fromisoformat, (judgement.shown_at, judgement.time))
    assert before <= shown <= said <= datetime.datetime.now(datetime.UTC)
    when = {"shown_at": judgement.shown_at, "time": judgement.time, "undone": None}
    assert judgement == Judgement(
        id=1, item_id=1, item=Item("score", "p", ("r",), scale=5), annotator="Anna", ranks=None, score=4.0,
        both_bad=False, comment="why", margin=0.0, order=(0,), **when,
    )  # fmt: skip
    assert judgement.kind == "score"


BAD_RANKS = [
    {},
    {"ranks": None},
    {"ranks": []},
    {"ranks": [1]},
    {"ranks": [1, 2, 3]},
    {"ranks": [0, 1]},
    {"ranks": [-1, 1]},
    {"ranks": [1.0, 2.0]},
    {"ranks": [True, 2]},
    {"ranks": ["1", "2"]},
    {"ranks": "12"},
    {"ranks": {1: 1, 2: 2}},
    {"ranks": list(range(1, 100_000))},
    {"ranks": [1, 2], "both_bad": True},
    {"ranks": [1, 2], "score": 1},
    {"score": 1},
]
BAD_SCORES = [
    *({"score": score} for score in (None, 0, 6, -1, 3.5, float("nan"), float("inf"), True, "3", 10**400)),
    {"ranks": [1]},
    {"both_bad": True},
    {"score": 3, "ranks": [1]},
]


@pytest.mark.parametrize(
    ("item", "said"),
    [(PAIR, said) for said in BAD_RANKS] + [(Item("score", "p", ("r",), scale=5), said) for said in BAD_SCORES],
    ids=str,
)
def test_what_does_not_fit_the_item_is_refused_and_nothing_is_written(store, path, item, said):
    store.add_items([item])
    shown = store.next_item("anna")
    before = everything(path)
    refused(store.judge, "anna", shown.item_id, shown.form_token, **said, match="ranks|score")
    refused(store.add_judgement, shown.item_id, "anna", **said, match="ranks|score")
    assert everything(path) == before
    fits = {"score": 3} if item.kind == "score" else {"ranks": [1, 2]}
    store.judge("anna", shown.item_id, shown.form_token, **fits)


def test_forms_of_others_and_unknown_ones_are_refused(store, path):
    store.add_items(pairs(2))
    anna, ben = store.next_item("anna"), store.next_item("ben")
    before = everything(path)
    for name, item_id, token, match in [
        ("anna", anna.item_id, ben.form_token, "not shown to anna"),
        ("ben", anna.item_id, anna.form_token, "not shown to ben"),
        ("anna", ben.item_id, anna.form_token, "item: got"),
        ("anna", 10**30, anna.form_token, "item: got 1000"),
        ("anna", "' OR 1", anna.form_token, "item: got"),
        ("anna", None, anna.form_token, "item: got"),
        ("anna", anna.item_id, "", "not shown"),
        ("anna", anna.item_id, "x" * 1_000_000, "not shown"),
        ("anna", anna.item_id, "\udcff", "not Unicode"),
        ("anna", anna.item_id, None, "expected text"),
    ]:
        refused(store.judge, name, item_id, token, ranks=[1, 2], match=match)
    assert everything(path) == before


@pytest.mark.parametrize("name", ["", "  ", "x" * 101, "a\nb", "a\x00b", "\u202eanna", "\udcff", None, 3, b"anna"])
def test_names_that_are_none_are_refused(store, path, name):
    store.add_items([PAIR])
    before = everything(path)
    for call in (store.next_item, store.progress, store.undo, store.pending):
        refused(call, name, match="annotator: got")
    refused(store.judge, name, 1, "token", ranks=[1, 2], match="annotator: got")
    refused(store.add_judgement, 1, name, ranks=[1, 2], match="annotator: got")
    assert everything(path) == before


def test_one_name_in_two_spellings_is_one_annotator(store):
    store.add_items(pairs(2))
    assert store.next_item("Zoe\u0308") == store.next_item("Zoë")
    assert store.next_item("x" * 100) is not None


@pytest.mark.parametrize(
    ("comment", "match"),
    [
        ("x" * 10_001, "10,001 characters, expected 10,000"),
        ("x" * 10_000_000, "10,000,000"),
        ("\ud800", "not Unicode"),
        (None, "expected text"),
    ],
)
def test_comments_that_are_too_much_are_refused(store, path, comment, match):
    store.add_items([PAIR])
    shown = store.next_item("anna")
    before = everything(path)
    refused(store.judge, "anna", shown.item_id, shown.form_token, ranks=[1, 2], comment=comment, match=match)
    refused(store.add_judgement, shown.item_id, "anna", ranks=[1, 2], comment=comment, match=match)
    assert everything(path) == before
    judgement = store.judge("anna", shown.item_id, shown.form_token, ranks=[1, 2], comment="猫" * 10_000)
    assert judgement.comment == "猫" * 10_000


def test_the_first_of_two_submissions_counts(store, path):
    store.add_items(pairs(2))
    shown = store.next_item("anna")
    first = store.judge("anna", shown.item_id, shown.form_token, ranks=[1, 2], comment="first")
    before = everything(path)
    assert store.judge("anna", shown.item_id, shown.form_token, ranks=[2, 1], comment="second") == first
    assert store.judge("anna", shown.item_id, shown.form_token) == first
    assert everything(path) == before


def test_a_double_click_of_many_threads_counts_once(store):
    store.add_items(pairs(20))
    for _ in range(20):
        shown, barrier = store.next_item("anna"), threading.Barrier(8)

        def press(number, shown=shown, barrier=barrier):
            barrier.wait()
            return store.judge("anna", shown.item_id, shown.form_token, both_bad=True, comment=str(number))

        with ThreadPoolExecutor(8) as pool:
            answers = set(pool.map(press, range(8)))
        assert len(answers) == 1
    assert len(store.judgements(include_undone=True)) == 20


def test_a_judgement_by_another_way_is_not_counted_again(store, path):
    store.add_items([PAIR])
    shown = store.next_item("anna")
    store.add_judgement(shown.item_id, "anna", ranks=[2, 1])
    before = everything(path)
    refused(store.judge, "anna", shown.item_id, shown.form_token, ranks=[1, 2], match="has judged it already")
    refused(store.add_judgement, shown.item_id, "anna", ranks=[1, 2], match="has judged it already")
    assert everything(path) == before
    assert (store.has_judged("anna", 1), store.has_judged("ben", 1)) == (True, False)


# Undo


def test_undo_keeps_the_judgement_and_shows_the_item_again(store, path):
    store.add_items(pairs(3))
    first, second = judge_next(store, "anna"), judge_next(store, "anna", both_bad=True)
    waiting = store.next_item("anna")
    assert store.undo("ben") is None
    assert store.undo("anna") == second.item_id
    assert store.judgements() == [first]
    kept = store.judgements(include_undone=True)[1]
    assert dataclasses.replace(kept, undone=None) == second
    assert datetime.datetime.fromisoformat(kept.undone) >= datetime.datetime.fromisoformat(second.time)
    again = store.next_item("anna")
    assert (again.item_id, again.order) == (second.item_id, second.order)
    # The old form, sent once more, is answered and counts for nothing; the new one counts.
    (old,) = rows(path, f"SELECT token FROM showings WHERE item = {second.item_id} ORDER BY id LIMIT 1")
    assert store.judge("anna", second.item_id, old[0], ranks=[1, 2]) == kept
    assert store.judgements() == [first]
    store.judge("anna", again.item_id, again.form_token, ranks=[2, 1])
    assert [one.both_bad for one in store.judgements(include_undone=True)] == [False, True, False]
    assert store.next_item("anna") == waiting


def test_undo_goes_back_step_by_step(store):
    store.add_items(pairs(3))
    made = [judge_next(store, "anna").item_id for _ in range(3)]
    assert [store.undo("anna") for _ in range(4)] == [*made[::-1], None]
    assert [judge_next(store, "anna").item_id for _ in range(3)] == made
    assert len(store.judgements(include_undone=True)) == 6
    assert store.complete()


def test_undo_pressed_twice_undoes_once(store):
    store.add_items(pairs(3))
    for _ in range(3):
        judge_next(store, "anna")
    last = store.progress("anna").last_judgement
    assert [store.undo("anna", last) for _ in range(3)] == [3, None, None]
    assert store.progress("anna") == Progress(2, 1, 2, 3, 2)


def test_what_was_undone_is_kept_for_the_one_who_undid_it(store):
    store.add_items([PAIR])
    judge_next(store, "anna")
    store.undo("anna")
    assert store.next_item("ben") is None
    assert judge_next(store, "anna") is not None


def test_an_undone_item_is_shown_again_even_if_others_have_judged_it(store, wait):
    store.add_items([PAIR])
    shown = store.next_item("anna")
    wait(901)
    judge_next(store, "ben")
    store.judge("anna", shown.item_id, shown.form_token, ranks=[1, 1])
    assert store.undo("anna") == 1
    assert judge_next(store, "anna", both_bad=True).both_bad
    assert len(store.judgements()) == 2


# Judgements from elsewhere


def test_judgements_from_elsewhere_are_in_the_items_order(store):
    store.add_items([Item("rank", "p", ("a", "b", "c")), Item("score", "p", ("a",)), PAIR])
    moment = datetime.datetime(2020, 2, 29, 12, 30, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    one = store.add_judgement(1, "anna", ranks=[3, 1, 3], order=[2, 0, 1], time=moment, comment="c")
    assert (one.ranks, one.order, one.comment) == ((2, 1, 2), (2, 0, 1), "c")
    assert one.time == one.shown_at == "2020-02-29T10:30:00.000+00:00"
    two = store.add_judgement(2, "anna", score=-0.25)
    assert (two.score, two.order) == (-0.25, (0,))
    three = store.add_judgement(3, "anna", ranks=[1, 2], margin=2)
    assert (three.margin, sorted(three.order)) == (2.0, [0, 1])
    assert store.judgements() == [one, two, three]
    # Nobody is asked about an item without a scale, nor can its score be undone on the page.
    assert store.undo("anna") == 3
    assert store.undo("anna") == 1
    assert store.undo("anna") is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"item_id": 2}, "got 2, expected the id"),
        ({"item_id": 0}, "expected the id"),
        ({"item_id": "1; DROP TABLE items"}, "expected the id"),
        ({"item_id": 2**70}, "too large"),
        ({"margin": -1}, "margin"),
        ({"margin": float("inf")}, "margin"),
        ({"margin": float("nan")}, "margin"),
        ({"margin": True}, "margin"),
        ({"order": [0]}, "order"),
        ({"order": [0, 0]}, "order"),
        ({"order": [1, 2]}, "order"),
    ],
)
def test_odd_judgements_from_elsewhere_are_refused(store, path, arguments, match):
    store.add_items([PAIR])
    before = everything(path)
    refused(store.add_judgement, **({"item_id": 1, "annotator": "anna", "ranks": [1, 2]} | arguments), match=match)
    assert everything(path) == before


def test_only_a_comparison_has_a_margin(store):
    store.add_items([Item("rank", "p", ("a", "b", "c"))])
    refused(store.add_judgement, 1, "anna", ranks=[1, 2, 3], margin=0.5, match="margin: got 0.5, expected none")


def test_a_transaction_is_whole_or_nothing(store, path):
    store.add_items(pairs(5))
    before = everything(path)

    def fail_late():
        with store.transaction():
            store.add_items([PAIR])
            store.add_judgement(1, "anna", ranks=[1, 2])
            with store.transaction():
                judge_next(store, "anna")
            assert everything(path) == before  # others do not see it yet
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_late()
    assert everything(path) == before
    with store.transaction():
        store.add_judgement(1, "anna", ranks=[1, 2])
    assert len(rows(path, "SELECT * FROM judgements")) == 1


# The file


def test_folders_are_made_and_the_file_says_whose_it_is(tmp_path):
    path = tmp_path / "deep" / "er" / "feedback.db"
    with Store(str(path)) as store:
        store.add_items([PAIR])
        assert rows(path, "PRAGMA journal_mode") == [("wal",)]
    assert path.read_bytes()[68:72] == b"ppoj"  # application_id, SQLite's file format, section 1.3
    assert os.listdir(path.parent) == ["feedback.db"]  # closed: the log is part of it
    assert rows(path, "SELECT count(*) FROM pragma_table_list WHERE schema = 'main' AND strict") == [(4,)]


def foreign_database(path: Path, *statements: str) -> bytes:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"not a database\n", "not a database"),
        (b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 1000, "not a database"),
        (b"SQLite format 3\x00" + b"\xff" * 5000, "not a database|malformed|cannot be opened"),
    ],
    ids=["text", "jsonl", "damaged"],
)
def test_a_file_that_is_no_database_is_left_as_it_is(path, content, match):
    path.write_bytes(content)
    assert str(path) in refused(Store, path, match=match)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    ("statements", "match"),
    [
        (["CREATE TABLE notes (id INTEGER)"], "of something else"),
        (["PRAGMA user_version = 1"], "of something else"),
        (["PRAGMA application_id = 7"], "of something else"),
        (["PRAGMA application_id = 1886416746", "PRAGMA user_version = 2"], "version 2, expected version 1"),
    ],
)
def test_a_database_of_something_else_or_another_version_is_left_as_it_is(path, statements, match):
    content = foreign_database(path, *statements)
    assert str(path) in refused(Store, path, match=match)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_places_that_cannot_hold_a_store(tmp_path):
    (tmp_path / "file").write_text("")
    refused(Store, tmp_path, match="cannot be opened")
    refused(Store, tmp_path / "file" / "feedback.db", match="cannot be opened")
    refused(Store, ":memory:", match="journal mode memory, expected a file")


def test_an_empty_file_becomes_a_store(path):
    path.touch()  # what a process leaves that was killed before its first write
    with Store(path) as store:
        assert store.add_items([PAIR]) == 1


def test_a_full_disk_is_told_and_nothing_is_half_written(store, path):
    store.add_items(pairs(5))
    store._db.sql("PRAGMA max_page_count = 1")  # SQLite's own name for a disk that is full; at least what there is
    before = everything(path)
    refused(store.add_items, [Item("compare", "x" * 1_000_000, ("a", "b"))], match="full")
    assert everything(path) == before
    store._db.sql("PRAGMA max_page_count = 1000000")
    assert judge_next(store, "anna") is not None


def test_a_closed_store_says_so(path):
    store = Store(path)
    store.close()
    store.close()
    refused(store.next_item, "anna", match="closed")


def test_a_store_that_nobody_has_closes_itself(path):
    store = Store(path)
    store.add_items([PAIR])
    assert path.with_name("feedback.db-wal").exists()
    del store
    assert os.listdir(path.parent) == [path.name]


def test_a_writer_waits_for_another(store, path):
    store.add_items(pairs(2))
    with Store(path) as other, ThreadPoolExecutor(1) as pool:
        with store.transaction():
            waiting = pool.submit(judge_next, other, "anna")
            time.sleep(0.2)
            assert not waiting.done()
            judge_next(store, "ben")
        assert waiting.result(timeout=20).annotator == "anna"
    assert {one.item_id for one in store.judgements()} == {1, 2}


# Several processes, and kills

LABELLER = """
import random, sys
from ppo_jax.feedback.store import Store, FeedbackError
path, name, lease_s = sys.argv[1:]
store = Store(path, lease_s=float(lease_s))
print("ready", flush=True)
sys.stdin.readline()
while (shown := store.next_item(name)) is not None:
    if random.random() < 0.3:
        store.next_item(name)
    if random.random() < 0.1 and (last := store.progress(name).last_judgement):
        print("undo", last, flush=True)
        store.undo(name, last)
        print("undone", last, flush=True)
        continue
    for press in range(random.choice([1, 1, 2])):
        said = store.judge(name, shown.item_id, shown.form_token, ranks=[1, 2], comment="c" * random.randrange(2000))
        print("judged", said.id, flush=True)
print("end", flush=True)
"""


def start(code: str, *arguments: str) -> subprocess.Popen:
    """A process of its own, which shares nothing with this one but the file."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def labellers(path: Path, names: list[str], lease_s: float = 900):
    """Processes that judge until nothing is left, started at the same moment; killed at the end."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start(LABELLER, str(path), name, str(lease_s))) for name in names]
        for process in processes:
            stack.callback(process.kill)
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * len(names)
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        yield processes


def told(output: str) -> dict[str, list[int]]:
    """What a process said before it ended, by word; a line that a kill cut off does not count."""
    found: dict[str, list[int]] = {"judged": [], "undo": [], "undone": []}
    for line in output.splitlines(keepends=True):
        word, _, number = line.strip().partition(" ")
        if line.endswith("\n") and number:
            found[word].append(int(number))
    return found


def check_whole(path: Path) -> None:
    """The file is sound, counts are right, and nobody has two judgements of one item that count."""
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    assert rows(path, "PRAGMA foreign_key_check") == []
    live = "SELECT count(*) FROM judgements WHERE item = items.id AND undone IS NULL"
    assert rows(path, f"SELECT id FROM items WHERE judged <> ({live})") == []
    twice = "SELECT item, annotator FROM judgements WHERE undone IS NULL GROUP BY item, annotator HAVING count(*) > 1"
    assert rows(path, twice) == []


def test_annotators_in_several_processes(path):
    with Store(path) as store:
        store.add_items(pairs(60))
        store.set_overlap(0.5, 2)
        # Two of them under one name: a second window.
        with labellers(path, ["anna", "ben", "ben"]) as processes:
            outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert all(output.endswith("end\n") for output in outputs)
        check_whole(path)
        assert store.complete()
        live = store.judgements()
        # Every item as often as needed and no oftener: a lease of 15 minutes kept the others away.
        assert Counter(Counter(one.item_id for one in live).values()) == {1: 30, 2: 30}
        known = {one.id for one in store.judgements(include_undone=True)}
        assert known == {number for output in outputs for number in told(output)["judged"]}
        assert known - {one.id for one in live} <= {number for output in outputs for number in told(output)["undo"]}


def test_kills_lose_nothing_that_was_answered(path, rng):
    with Store(path) as store:
        store.add_items(pairs(5_000))  # more than can be judged here
    judged, undone, maybe_undone = set(), set(), set()
    for _ in range(5):
        with labellers(path, ["anna", "ben"], lease_s=0.01) as processes:
            time.sleep(rng.uniform(0.05, 0.4))
            for process in processes:
                process.send_signal(signal.SIGKILL)
            for process in processes:
                said = told(process.communicate(timeout=60)[0])
                assert process.returncode == -signal.SIGKILL
                judged |= set(said["judged"])
                undone |= set(said["undone"])
                maybe_undone |= set(said["undo"])
        with Store(path) as store:  # a server that was killed starts again
            check_whole(path)
            everyone = store.judgements(include_undone=True)
            assert judged <= {one.id for one in everyone}
            # Beyond what was answered there is at most what each process was in the middle of.
            assert len(everyone) <= len(judged) + 2 * 5
            withdrawn = {one.id for one in everyone if one.undone}
            assert undone <= withdrawn <= maybe_undone
            assert judge_next(store, "carl") is not None
            judged.add(store.progress("carl").last_judgement)
    assert len(judged) > 5


def test_a_kill_while_items_are_added_leaves_all_or_none(path, rng):
    filler = """
import sys
from ppo_jax.feedback.store import Item, Store
items = [Item("compare", f"prompt {i}", ("a", "b")) for i in range(8_000)]
print("ready", flush=True)
store = Store(sys.argv[1])
store.add_items(items)
print("added", flush=True)
sys.stdin.readline()
"""
    for i in range(5):
        file = path.with_name(f"{i}.db")
        with start(filler, str(file)) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.0, 0.3))
            process.kill()
            finished = "added" in process.communicate(timeout=60)[0]
        with Store(file) as store:
            found = store.progress("anna").total_needed
            assert found in ({8_000} if finished else {0, 8_000})
            check_whole(file)
            again = [Item("compare", f"prompt {number}", ("a", "b")) for number in range(8_000)]
            assert store.add_items(again) == 8_000 - found


def test_one_store_is_made_by_many_at_once(tmp_path):
    def make(path: Path, barrier: threading.Barrier) -> int:
        barrier.wait()
        with Store(path) as store:  # a connection of its own, as in another process
            return store.add_items([PAIR])

    with ThreadPoolExecutor(6) as pool:
        for i in range(30):
            barrier = threading.Barrier(6)
            made = pool.map(make, [tmp_path / f"{i}.db"] * 6, [barrier] * 6)
            assert sorted(made) == [0, 0, 0, 0, 0, 1]
    check_whole(tmp_path / "0.db")


def test_threads_share_a_store(store):
    store.add_items(pairs(60))
    store.set_overlap(1.0, 2)

    def work(name: str) -> int:
        return sum(1 for _ in iter(lambda: judge_next(store, name), None))

    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(work, ["anna", "ben", "anna", "ben", "carl", "carl"]))
    # A lease can be refused in passing, so some may leave early; the rest is done by whoever comes next.
    made += [work("anna"), work("ben"), work("carl")]
    assert len(store.judgements(include_undone=True)) == 120
    assert sum(made) >= 120
    assert Counter(Counter(one.item_id for one in store.judgements()).values()) == {2: 60}


def test_it_stays_quick_with_many_items(store):
    store.add_items(pairs(5_000))
    with store.transaction():
        for item_id, _ in store.pending("anna")[:4_900]:
            store.add_judgement(item_id, "anna", ranks=[1, 2])
    # Counted in steps of SQLite's machine and not in seconds: finding the next item passes over what is done.
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    store._db._connection.set_progress_handler(count, 100)
    shown = store.next_item("ben")
    store._db._connection.set_progress_handler(None, 0)
    assert shown.item_id == 4_901
    assert steps < 20, f"{steps}00 steps"  # 198 without the index
