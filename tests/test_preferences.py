"""Judgements read from rows: every format, what is refused, and with which words."""

import json

import pytest

from ppo_jax.data import DataError
from ppo_jax.preferences import FORMATS, Judged, read_judged

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
RANKING = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]}
CHOICE = {"prompt": "p", "completions": ["a", "b", "c"], "choice": 2}
SCORE = {"prompt": "p", "completion": "a", "score": 0.5}
ROWS = {"pair": PAIR, "ranking": RANKING, "choice": CHOICE, "score": SCORE}

HI = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be kind"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def render(messages) -> str:
    return "".join(f"<{one['role']}>{one['content']}" for one in messages) + "<assistant>"


@pytest.fixture
def read(tmp_path):
    """Writes rows to a file and reads them."""

    def write_and_read(*rows, **options):
        path = tmp_path / "judged.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_judged(str(path), **options)

    return write_and_read


def refused(read, *rows, **options) -> str:
    with pytest.raises(DataError) as error:
        read(*rows, **options)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 800, text
    return text.partition("judged.jsonl: ")[2] or text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, Judged("p", ("good", "bad"), (1, 2), None)),
        ({"chosen": "Human: a", "rejected": ""}, Judged("", ("Human: a", ""), (1, 2), None)),
        (PAIR | {"prompt": None, "margin": None}, Judged("", ("good", "bad"), (1, 2), None)),
        (PAIR | {"margin": 2}, Judged("p", ("good", "bad"), (1, 2), None, margin=2.0)),
        (PAIR | {"annotator": "zoë", "time": "2026-01-01T00:00:00Z"},
         Judged("p", ("good", "bad"), (1, 2), None, annotator="zoë", time="2026-01-01T00:00:00Z")),
        (PAIR | {"annotator": 17, "time": None}, Judged("p", ("good", "bad"), (1, 2), None, annotator="17")),
        (PAIR | {"score": 3.0, "id": 7, "source": {"name": "elsewhere"}}, Judged("p", ("good", "bad"), (1, 2), None)),
        (RANKING, Judged("p", ("a", "b", "c"), (2, 1, 2), None)),
        (RANKING | {"ranks": [7, 3, 9]}, Judged("p", ("a", "b", "c"), (2, 1, 3), None)),
        (RANKING | {"ranks": [5, 5, 5]}, Judged("p", ("a", "b", "c"), (1, 1, 1), None)),
        (RANKING | {"ranks": [1, 1, 1], "both_bad": True},
         Judged("p", ("a", "b", "c"), (1, 1, 1), None, both_bad=True)),
        (RANKING | {"both_bad": False}, Judged("p", ("a", "b", "c"), (2, 1, 2), None)),
        (CHOICE, Judged("p", ("a", "b", "c"), (2, 2, 1), None)),
        (CHOICE | {"completions": ["x", "y"], "choice": 0}, Judged("p", ("x", "y"), (1, 2), None)),
        (SCORE, Judged("p", ("a",), None, 0.5)),
        (SCORE | {"score": -3, "prompt": ""}, Judged("", ("a",), None, -3.0)),
        (SCORE | {"chosen": None, "rejected": None, "ranks": None}, Judged("p", ("a",), None, 0.5)),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_of_each_format(read, row, expected):
    assert read(row) == [expected]


def test_rows_of_several_formats_in_order(read):
    assert [one.responses[0] for one in read(PAIR, SCORE, RANKING, CHOICE)] == ["good", "a", "a", "a"]


def test_numbers_are_floats(read):
    (pair,), (score,) = read(PAIR | {"margin": 1}), read(SCORE | {"score": 1})
    assert (type(pair.margin), type(score.score)) == (float, float)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("way", ["missing", "null"])
def test_a_missing_column_is_told_with_the_formats(read, kind, way):
    for column in FORMATS[kind]:
        row = ROWS[kind] | {column: None}
        if way == "missing":
            del row[column]
        text = refused(read, PAIR, row)
        assert text.startswith("row 2: got columns ")
        assert f"{kind} ({', '.join(FORMATS[kind])})" in text
        assert all(name in text for name in FORMATS)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, "got columns none"),
        ({"text": "t"}, "got columns text"),
        ({"prompt": "p", "completion": "c", "label": True}, "got columns prompt, completion, label"),
        (PAIR | CHOICE, "those of pair and choice"),
        (PAIR | SCORE, "those of pair and score"),
        ({f"column {i}": 1 for i in range(10_000)}, "got columns column 0"),
        (PAIR | {"rejected": "good"}, "chosen and rejected are equal"),
        (PAIR | {"chosen": 3}, "got 3, expected text"),
        (PAIR | {"chosen": ["a"]}, "expected text or a list of chat messages"),
        (PAIR | {"prompt": 3}, "expected text"),
        (PAIR | {"prompt": {"a": 1}}, "expected text"),
        (PAIR | {"chosen": "half \ud83d"}, "response: it holds text that is not Unicode"),
        (PAIR | {"prompt": "\udc00"}, "prompt: it holds text that is not Unicode"),
        (PAIR | {"annotator": "\udc00"}, "annotator: it holds"),
        (PAIR | {"margin": -0.5}, "margin: got -0.5, expected a number >= 0"),
        (PAIR | {"margin": 10**400}, "margin: got 1000"),
        (PAIR | {"margin": "1"}, "margin: got '1', expected a finite number"),
        (PAIR | {"margin": True}, "margin: got True"),
        (PAIR | {"annotator": ["a"]}, "annotator: got"),
        (PAIR | {"annotator": False}, "annotator: got False"),
        (PAIR | {"time": 1.7e9}, "time: got 1700000000.0, expected text"),
        (RANKING | {"completions": "abc"}, "completions: got 'abc', expected a list"),
        (RANKING | {"completions": ["a"], "ranks": [1]}, "completions: got 1, expected 2 or more"),
        (RANKING | {"completions": [], "ranks": []}, "completions: got 0, expected 2 or more"),
        (RANKING | {"completions": ["a", "b", "a"]}, "two of them are equal"),
        (RANKING | {"completions": ["a", "b", None]}, "got None, expected text"),
        (RANKING | {"ranks": [1, 2]}, "ranks: got [1, 2], expected 3 whole numbers >= 1"),
        (RANKING | {"ranks": [0, 1, 2]}, "ranks: got"),
        (RANKING | {"ranks": [1.0, 2.0, 3.0]}, "ranks: got"),
        (RANKING | {"ranks": [True, 2, 3]}, "ranks: got"),
        (RANKING | {"ranks": "123"}, "ranks: got '123'"),
        (RANKING | {"ranks": list(range(100_000))}, "ranks: got [0, 1, 2"),
        (RANKING | {"both_bad": True}, "both_bad: got True"),
        (RANKING | {"both_bad": 1}, "both_bad: got 1"),
        (CHOICE | {"choice": 3}, "choice: got 3, expected a whole number from 0 to 2"),
        (CHOICE | {"choice": -1}, "choice: got -1"),
        (CHOICE | {"choice": 1.0}, "choice: got 1.0"),
        (CHOICE | {"choice": True}, "choice: got True"),
        (CHOICE | {"choice": "c"}, "choice: got 'c'"),
        (SCORE | {"score": 10**400}, "score: got 1000"),
        (SCORE | {"score": "5"}, "score: got '5'"),
        (SCORE | {"score": False}, "score: got False"),
        (SCORE | {"completion": ["a"]}, "expected text or a list of chat messages"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_used_is_told_by_row(read, row, expected):
    text = refused(read, PAIR, SCORE, row)
    assert text.startswith("row 3: ")
    assert expected in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"prompt": "p", "chosen": "a", "rej', ":2: broken line"),
        (b'{"chosen": "latin-1 \xe9", "rejected": "b"}', ":2: broken line"),
        (b"[]", ":2: got a JSON list"),
        (b'{"chosen": "' + b"x" * 50_000_000 + b'", "rejected": "b"}', ":2: line of more than 1 MiB"),
    ],
    ids=["broken", "not_utf8", "list", "50_MB"],
)
def test_damaged_files_are_told_by_line(tmp_path, line, expected):
    path = tmp_path / "judged.jsonl"
    path.write_bytes(b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        read_judged(str(path))
    assert str(error.value).startswith(f"{path}{expected}")
    assert len(str(error.value)) < 400


def test_parquet_files(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    import datetime

    time = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
    # One table: the columns that a format has not are null.
    rows = [PAIR | {"margin": 0.5, "time": time}, RANKING, CHOICE, SCORE]
    names = dict.fromkeys(name for row in rows for name in row)
    table = arrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    parquet.write_table(table, tmp_path / "judged.parquet")
    assert read_judged(str(tmp_path / "judged.parquet")) == [
        Judged("p", ("good", "bad"), (1, 2), None, 0.5, time="2026-01-02T03:04:00+00:00"),
        Judged("p", ("a", "b", "c"), (2, 1, 2), None),
        Judged("p", ("a", "b", "c"), (2, 2, 1), None),
        Judged("p", ("a",), None, 0.5),
    ]


# Chats


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, HI], "chosen": [answer("good")], "rejected": [answer("bad")]},
        {"prompt": [SYSTEM, HI], "chosen": "good", "rejected": "bad"},
        {"prompt": [SYSTEM, HI], "chosen": [SYSTEM, HI, answer("good")], "rejected": [SYSTEM, HI, answer("bad")]},
        {"chosen": [SYSTEM, HI, answer("good")], "rejected": [SYSTEM, HI, answer("bad")]},
        {"prompt": "hi", "chosen": [SYSTEM, HI, answer("good")], "rejected": [SYSTEM, HI, answer("bad")]},
    ],
    ids=["answers", "texts", "all", "no_prompt", "prompt_as_text"],
)
def test_chats_are_rendered_up_to_the_answer(read, row):
    expected = Judged("<system>be kind<user>hi<assistant>", ("good", "bad"), (1, 2), None)
    assert read(row, render=render) == [expected]
    assert refused(read, row).startswith("row 1: got chat messages, expected texts")


def test_chats_of_the_other_formats(read):
    row = {"prompt": [HI], "completions": [[answer("a")], [answer("b")]]}
    first, second = read(row | {"ranks": [2, 1]}, row | {"choice": 1}, render=render)
    assert first == second == Judged("<user>hi<assistant>", ("a", "b"), (2, 1), None)
    (score,) = read({"prompt": [HI], "completion": [answer("a")], "score": 1}, render=render)
    assert score == Judged("<user>hi<assistant>", ("a",), None, 1.0)


def test_a_text_needs_no_template(read):
    def fail(messages):
        raise AssertionError("there are no messages")

    assert read(PAIR, render=fail) == read(PAIR)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [HI], "chosen": [answer("a")], "rejected": "b"}, "some responses are texts and some are chats"),
        ({"prompt": "hello", "chosen": [HI, answer("a")], "rejected": [HI, answer("b")]}, "do not hold it"),
        ({"prompt": "hi", "chosen": [answer("a")], "rejected": [answer("b")]}, "do not hold it"),
        ({"prompt": [SYSTEM], "chosen": [HI, answer("a")], "rejected": [HI, answer("b")]}, "begin with other messages"),
        ({"chosen": [HI, answer("a")], "rejected": [SYSTEM, answer("b")]}, "differ before their last message"),
        ({"chosen": [HI, answer("a")], "rejected": [HI, answer("a")]}, "are equal"),
        ({"chosen": [HI], "rejected": [HI, answer("a")]}, "does not end with a message of the assistant"),
        ({"chosen": [], "rejected": [HI, answer("a")]}, "does not end with"),
        ({"chosen": [HI, {"role": "assistant"}], "rejected": [HI, answer("a")]}, "role and content"),
        ({"chosen": [HI, {"role": "assistant", "content": [{"type": "image"}]}], "rejected": [HI]}, "role and content"),
        ({"chosen": [HI, answer("\ud800")], "rejected": [HI, answer("a")]}, "not Unicode"),
    ],
    ids=str,
)
def test_chats_that_cannot_be_used(read, row, expected):
    text = refused(read, row, render=render)
    assert text.startswith("row 1: ")
    assert expected in text


def test_a_template_that_refuses_is_told_by_row(read):
    def refuse(messages):
        raise DataError("no template")

    row = {"chosen": [HI, answer("a")], "rejected": [HI, answer("b")]}
    assert refused(read, PAIR, row, render=refuse) == "row 2: no template"
