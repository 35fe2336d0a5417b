"""Files out of the store and into it: what was judged, no more and no less; all of a file or nothing."""

import contextlib
import datetime
import itertools
import json
import sqlite3
from pathlib import Path

import pytest

from ppo_jax.data import DataError
from ppo_jax.errors import InputError
from ppo_jax.feedback.agreement import agreement
from ppo_jax.feedback.formats import EXPORTS, Imported, export, import_rows, write_export
from ppo_jax.feedback.store import FeedbackError, Item, Store
from ppo_jax.preferences import read_judged

TIME = datetime.datetime(2026, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)
SAID = {"annotator": "anna", "time": "2026-05-06T07:08:09.000+00:00", "comment": ""}


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "feedback.db") as store:
        yield store


@pytest.fixture
def source(tmp_path):
    """Writes rows to a file and gives its name."""

    def write(*rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def everything(store: Store) -> list[list[tuple]]:
    with contextlib.closing(sqlite3.connect(store.path)) as connection:
        return [connection.execute(f"SELECT * FROM {name}").fetchall() for name in ("items", "showings", "judgements")]


def judged(store: Store, item: Item, annotator: str = "anna", **said) -> None:
    store.add_items([item])
    store.add_judgement(store.item_id(item), annotator, time=TIME, **said)


# Out


def test_an_export_holds_what_was_judged(store):
    judged(store, Item("compare", "p1", ("a", "b"), ("x", "y")), ranks=[2, 1], comment="why")
    judged(store, Item("compare", "p2", ("a", "b")), ranks=[1, 1])
    judged(store, Item("compare", "p3", ("a", "b")), both_bad=True)
    judged(store, Item("rank", "p4", ("a", "b", "c")), ranks=[2, 1, 2])
    judged(store, Item("rank", "p5", ("a", "b", "c")), ranks=[1, 1, 2])
    judged(store, Item("score", "p6", ("a",), scale=5), score=4)
    judged(store, Item("score", "p7", ("b",)), score=-0.25)
    assert export(store, "pairs") == [
        {"prompt": "p1", "chosen": "b", "rejected": "a", **SAID, "comment": "why"},
        {"prompt": "p4", "chosen": "b", "rejected": "a", **SAID},
        {"prompt": "p4", "chosen": "b", "rejected": "c", **SAID},
        {"prompt": "p5", "chosen": "a", "rejected": "c", **SAID},
        {"prompt": "p5", "chosen": "b", "rejected": "c", **SAID},
    ]
    two, three = {"completions": ["a", "b"]}, {"completions": ["a", "b", "c"]}
    assert export(store, "rankings") == [
        {"prompt": "p1", **two, "ranks": [2, 1], "both_bad": False, **SAID, "comment": "why"},
        {"prompt": "p2", **two, "ranks": [1, 1], "both_bad": False, **SAID},
        {"prompt": "p3", **two, "ranks": [1, 1], "both_bad": True, **SAID},
        {"prompt": "p4", **three, "ranks": [2, 1, 2], "both_bad": False, **SAID},
        {"prompt": "p5", **three, "ranks": [1, 1, 2], "both_bad": False, **SAID},
    ]
    assert export(store, "choices") == [
        {"prompt": "p1", **two, "choice": 1, **SAID, "comment": "why"},
        {"prompt": "p4", **three, "choice": 1, **SAID},
    ]
    assert export(store, "scores") == [
        {"prompt": "p6", "completion": "a", "score": 4.0, **SAID},
        {"prompt": "p7", "completion": "b", "score": -0.25, **SAID},
    ]


def test_pairs_of_a_ranking_are_all_strict_ones(store, rng):
    responses = tuple("abcdef")
    ranks = rng.integers(1, 5, 6).tolist()
    judged(store, Item("rank", "p", responses), ranks=ranks)
    found = {(row["chosen"], row["rejected"]) for row in export(store, "pairs")}
    by_text = dict(zip(responses, ranks, strict=True))
    assert found == {(a, b) for a in responses for b in responses if by_text[a] < by_text[b]}
    assert len(export(store, "pairs")) == len(found)


def test_undone_judgements_are_not_exported(store):
    judged(store, Item("compare", "p", ("a", "b")), ranks=[1, 2])
    store.undo("anna")
    assert [export(store, kind) for kind in EXPORTS] == [[], [], [], []]


def test_what_is_pressed_on_the_page_is_what_is_exported(store, rng):
    store.add_items([Item("rank", f"p{i}", ("a", "b", "c", "d")) for i in range(20)])
    pressed = {}
    while (shown := store.next_item("anna")) is not None:
        ranks = (1 + rng.permutation(4)).tolist()
        store.judge("anna", shown.item_id, shown.form_token, ranks=ranks)
        pressed[shown.prompt] = dict(zip(shown.responses, ranks, strict=True))
    rows = export(store, "rankings")
    assert {row["prompt"]: dict(zip(row["completions"], row["ranks"], strict=True)) for row in rows} == pressed
    for row in export(store, "choices"):
        assert pressed[row["prompt"]][row["completions"][row["choice"]]] == 1


def test_files_are_written_whole(store, tmp_path):
    judged(store, Item("compare", "zwölf 猫\u2028", ("a\nb", "\x00")), ranks=[1, 2])
    path = tmp_path / "out" / "deep" / "pairs.jsonl"
    assert write_export(store, path, "pairs") == 1
    (line,) = path.read_bytes().decode().split("\n")[:-1]
    assert json.loads(line) == export(store, "pairs")[0]
    assert "zwölf 猫" in line
    assert write_export(store, str(path), "scores") == 0
    assert path.read_bytes() == b""
    assert [one.name for one in path.parent.iterdir()] == ["pairs.jsonl"]


def test_exports_that_cannot_be_made(store, tmp_path):
    with pytest.raises(FeedbackError, match="kind 'pair', expected one of pairs, rankings, choices, scores"):
        export(store, "pair")
    for name in ("pairs.parquet", "pairs"):
        with pytest.raises(FeedbackError, match=r"expected the name of a \.jsonl file"):
            write_export(store, tmp_path / name, "pairs")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder.jsonl", tmp_path / "file" / "pairs.jsonl"):
        with pytest.raises(FeedbackError, match="cannot be written") as error:
            write_export(store, path, "pairs")
        assert str(path) in str(error.value)


# In


def test_each_format_becomes_items_with_judgements(store, source):
    name = source(
        {"prompt": "p1", "chosen": "good", "rejected": "bad", "margin": 1.5, "annotator": "zoë"},
        {"prompt": "p2", "completions": ["a", "b", "c"], "ranks": [3, 1, 3], "time": "2026-01-01T12:00:00+02:00"},
        {"prompt": "p3", "completions": ["a", "b", "c"], "choice": 2, "annotator": 7},
        {"prompt": "p4", "completions": ["a", "b"], "ranks": [1, 1], "both_bad": True, "time": "2026-01-01"},
        {"prompt": "p5", "completion": "a", "score": 0.25, "id": "x"},
        {"chosen": "text", "rejected": ""},
    )
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(milliseconds=1)
    assert import_rows(store, name) == Imported(rows=6, items=6, judgements=6, repeated=0)
    pair, ranking, choice, bad, score, texts = store.judgements()
    assert (pair.kind, pair.item.prompt, pair.margin, pair.annotator) == ("compare", "p1", 1.5, "zoë")
    assert pair.item.responses[pair.ranks.index(1)] == "good"
    assert (ranking.kind, ranking.item.responses, ranking.ranks) == ("rank", ("a", "b", "c"), (2, 1, 2))
    assert (ranking.annotator, ranking.time) == ("imported", "2026-01-01T10:00:00.000+00:00")
    assert (choice.kind, choice.ranks, choice.annotator) == ("rank", (2, 2, 1), "7")
    assert (bad.kind, bad.both_bad, bad.time) == ("compare", True, "2026-01-01T00:00:00.000+00:00")
    assert (score.item, score.score) == (Item("score", "p5", ("a",)), 0.25)
    assert (texts.item.prompt, texts.item.responses[texts.ranks.index(1)]) == ("", "text")
    assert before <= datetime.datetime.fromisoformat(pair.time) <= datetime.datetime.now(datetime.UTC)
    assert store.complete()


def by_text(rows: list[dict]) -> list[dict]:
    """The rows with what is said of each text, in whatever order the texts come."""
    for row in rows:
        texts = row.pop("completions", [])
        if "ranks" in row:
            row["ranks"] = dict(zip(texts, row["ranks"], strict=True))
        if "choice" in row:
            row["choice"] = (texts[row["choice"]], set(texts))
    return rows


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_that_is_imported_is_the_same_export(store, tmp_path, kind, rng):
    for i in range(12):
        count = int(rng.integers(2, 5))
        item = Item("compare" if count == 2 else "rank", f"p{i}", tuple(f"{i} {j}" for j in range(count)))
        judged(
            store,
            item,
            f"annotator {i % 2}",
            ranks=rng.permutation(count).tolist() and (1 + rng.permutation(count)).tolist(),
        )
        judged(store, Item("score", f"p{i}", (f"r{i}",), scale=7), score=int(rng.integers(1, 8)))
    judged(store, Item("rank", "bad", ("a", "b", "c")), both_bad=True)
    store.add_items([Item("compare", "margin", ("a", "b"))])
    store.add_judgement(store.item_id(Item("compare", "margin", ("a", "b"))), "anna", ranks=[2, 1], margin=0.5)
    path = tmp_path / "out.jsonl"
    count = write_export(store, path, kind)
    assert len(read_judged(str(path))) == count > 10
    with Store(tmp_path / "other.db") as other:
        done = import_rows(other, str(path))
        assert (done.rows, done.judgements, done.repeated) == (count, count, 0)
        assert by_text(export(other, kind)) == by_text(export(store, kind))


def test_a_file_imported_twice_changes_nothing(store, source):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(5)]
    name = source(*rows, rows[0])
    assert import_rows(store, name) == Imported(rows=6, items=5, judgements=5, repeated=1)
    before = everything(store)
    assert import_rows(store, name) == Imported(rows=6, items=0, judgements=0, repeated=6)
    assert everything(store) == before


def test_pairs_of_two_annotators_meet_in_one_item(store, source):
    # anna and ben agree about 3 of 4, and the first response of an item is not always the better one.
    rows = [
        {"prompt": f"p{i}", "chosen": chosen, "rejected": "b" if chosen == "a" else "a", "annotator": name}
        for name, choices in {"anna": "abab", "ben": "abaa"}.items()
        for i, chosen in enumerate(choices)
    ]
    assert import_rows(store, source(*rows)).items == 4
    assert agreement(store)["compare"]["percent"] == 0.75
    assert {one.item.responses for one in store.judgements()} in ({("a", "b")}, {("b", "a")})


def test_the_order_of_an_imported_pair_does_not_tell_the_better(store, source):
    import_rows(store, source(*({"prompt": "p", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(64))))
    better = [one.ranks.index(1) for one in store.judgements()]
    # Fixed texts and SHA-256: the same in every run. 32 expected, standard deviation 4.
    assert 16 < sum(better) < 48


def test_an_imported_pair_is_shown_to_another_annotator_when_items_overlap(store, source):
    score = {"prompt": "p", "completion": "a", "score": 1}
    import_rows(store, source({"prompt": "p", "chosen": "a", "rejected": "b"}, score))
    assert store.next_item("anna") is None
    store.set_overlap(1.0, 2)
    shown = store.next_item("anna")
    store.judge("anna", shown.item_id, shown.form_token, ranks=[1, 2])
    assert store.next_item("anna") is None  # nobody is asked about a score without a scale
    assert store.complete()


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD | {"rejected": "a"}, "row 3: chosen and rejected are equal"),
        ({"prompt": "p", "chosen": "a"}, "row 3: got columns prompt, chosen, expected those of one of: pair"),
        (GOOD | {"time": "yesterday"}, "row 3: time: got 'yesterday', expected ISO 8601"),
        (GOOD | {"time": "0001-01-01T00:00:00+23:59"}, "row 3: time: got"),
        (GOOD | {"annotator": "x" * 101}, "row 3: annotator: got 101 characters"),
        (GOOD | {"annotator": "a\nb"}, "row 3: annotator: got"),
        (GOOD | {"annotator": " "}, "row 3: annotator: got"),
        (GOOD | {"prompt": [{"role": "user", "content": "hi"}]}, "row 3: got chat messages, expected texts"),
    ],
    ids=lambda value: str(value)[:70],
)
def test_one_bad_row_and_nothing_is_written(store, source, row, expected):
    judged(store, Item("compare", "there before", ("a", "b")), ranks=[1, 2])
    before = everything(store)
    name = source(GOOD, GOOD | {"prompt": "q"}, row, GOOD | {"prompt": "r"})
    with pytest.raises(InputError) as error:
        import_rows(store, name)
    text = str(error.value)
    assert text.startswith(f"{name}: {expected}")
    assert "\n" not in text
    assert everything(store) == before
    assert import_rows(store, source(GOOD, name="other.jsonl")).judgements == 1  # and the store goes on


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"prompt": "p", "chosen"', ":2: broken line"),
        (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', ":2: broken line"),
        (b'{"prompt": "' + b"x" * 50_000_000 + b'", "chosen": "a", "rejected": "b"}', ":2: line of more than 1 MiB"),
    ],
    ids=["broken", "not_utf8", "50_MB"],
)
def test_a_damaged_line_and_nothing_is_written(store, tmp_path, line, expected):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    before = everything(store)
    with pytest.raises(DataError) as error:
        import_rows(store, str(path))
    assert str(error.value).startswith(f"{path}{expected}")
    assert everything(store) == before


def test_hostile_text_comes_through_as_text(store, source, tmp_path):
    odd = ["<script>alert(1)</script>", "'); DROP TABLE items; --", "\u0000\u2028\r", "=cmd|'/C calc'!A0", ""]
    rows = [{"prompt": a, "chosen": a, "rejected": b} for a, b in itertools.permutations(odd, 2)]
    assert import_rows(store, source(*rows)).repeated == 0
    exported = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in export(store, "pairs")]
    assert exported == rows
    assert Path(store.path).exists()
