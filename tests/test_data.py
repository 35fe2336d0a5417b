"""Data in: what is read, what is refused and with which words, how it is padded, cut and ordered."""

import gzip
import json
import random
import re
import sys
import tracemalloc
from types import SimpleNamespace

import folders
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from ppo_jax import data
from ppo_jax.data import MAX_LINE_BYTES, DataError, batch_indices, load_prompts, load_rows, pad
from ppo_jax.errors import InputError
from ppo_jax.tokenizers import TokenizerError, load_tokenizer, special_tokens


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word, `<s>` (id 1) in front, `</s>` is 2, `<pad>` 0."""
    return folders.word_tokenizer()


@pytest.fixture
def source(tmp_path):
    """Writes rows to a file and gives its path."""
    return lambda rows: str(folders.write_jsonl(tmp_path / "rows.jsonl", rows))


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert isinstance(error.value, InputError)
    assert "\n" not in text, text
    return text


# Rows


def test_rows_of_a_jsonl_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    # Line ends of Windows, blank lines, text beyond ASCII (also a line separator, which ends no line of
    # JSONL), no newline at the end.
    path.write_bytes('{"a": 1}\r\n\n   \n{"a": "zwölf\u2028猫"}\n{"a": null, "b": [1, {"c": 2}]}'.encode())
    assert load_rows(str(path)) == [{"a": 1}, {"a": "zwölf\u2028猫"}, {"a": None, "b": [1, {"c": 2}]}]


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "cut of',
        b"{'prompt': 'python'}",
        b'{"prompt": "latin-1 \xe9"}',
        b'{"prompt": "a"} {"prompt": "b"}',
        b"no json",
        b"[" * 100_000,
        b'{"prompt": ' + b"1" * 5000 + b"}",
    ],
    ids=["cut", "quotes", "not_utf8", "two_in_a_line", "text", "deep", "number_of_5000_digits"],
)
def test_a_broken_line_is_told_by_file_and_number(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "first"}\n\n' + line + b'\n{"prompt": "last"}\n')
    with pytest.raises(DataError, match="broken line") as error:
        load_rows(str(path))
    assert one_line(error).startswith(f"{path}:3: ")


@pytest.mark.parametrize(("line", "kind"), [("[1]", "list"), ('"a"', "str"), ("3", "int"), ("null", "NoneType")])
def test_a_line_that_is_no_object_is_told_by_file_and_number(tmp_path, line, kind):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(DataError, match=f"JSON {kind}, expected an object") as error:
        load_rows(str(path))
    assert one_line(error).startswith(f"{path}:2: ")


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="empty; expected at least one row") as error:
        load_rows(str(path))
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    "name",
    [
        "nothing.jsonl",
        "sub/nothing.json",
        "a.parquet",
        "b.jsonl.gz",
        "./nothing",
        "/no/such/file",
        "~/no/such/file",
        "",
    ],
)
def test_a_missing_file_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(data, "_dataset_rows", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file") as error:
        load_rows(name)
    assert name in one_line(error)


def test_a_dataset_is_opened_by_its_name_or_folder_and_split(tmp_path, monkeypatch):
    def load_dataset(name, split):
        return SimpleNamespace(to_list=lambda: [{"name": name, "split": split}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("org/name", "name", str(tmp_path)):
        assert load_rows(name, "dev") == [{"name": name, "split": "dev"}]
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("org/name", str(tmp_path)):
        with pytest.raises(DataError, match=r'need the "data" extra: pip install -e "\.\[data\]"') as error:
            load_rows(name)
        assert name in one_line(error)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=re.escape(str(tmp_path))) as error:
        load_rows(str(tmp_path))
    one_line(error)


def test_a_dataset_that_the_hub_does_not_give_is_refused():
    # Without the package, with the package and offline: one line either way.
    with pytest.raises(DataError, match="nobody/nothing") as error:
        load_rows("nobody/nothing")
    one_line(error)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    folders.write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_rows("~/rows.jsonl") == [{"a": 1}]


def test_a_line_may_be_long_but_not_endless(tmp_path):
    """A file of 50 MB in one line is refused after 1 MiB, whatever follows."""
    path = tmp_path / "rows.jsonl"
    just_fits = b'{"a": "' + b"x" * (MAX_LINE_BYTES - 10) + b'"}\n'
    assert len(just_fits) == MAX_LINE_BYTES
    path.write_bytes(just_fits + b'{"a": 1}\n')
    assert [len(str(row["a"])) for row in load_rows(str(path))] == [MAX_LINE_BYTES - 10, 1]
    path.write_bytes(b'{"a": 1}\n' + b'{"a": "' + b"x" * 50_000_000 + b'"}\n')
    tracemalloc.start()
    with pytest.raises(DataError, match="line of more than 1 MiB") as error:
        load_rows(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert one_line(error).startswith(f"{path}:2: ")
    assert peak < 3 * MAX_LINE_BYTES


def test_a_gzipped_file(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b'{"a": "' + random.Random(0).randbytes(4000).hex().encode() + b'"}\n{"a": 2}\n')
    path.write_bytes(whole)
    assert [set(row) for row in load_rows(str(path))] == [{"a"}, {"a"}]
    corrupt = bytearray(whole)
    corrupt[len(whole) // 2] ^= 255
    for damaged in (whole[: len(whole) // 2], bytes(corrupt), b'{"a": 1}\n'):  # cut, a flipped byte, no gzip at all
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz:\d+: cannot be read: .") as error:
            load_rows(str(path))
        one_line(error)
    path.write_bytes(gzip.compress(b"[" + b" " * 50_000_000))  # 50 kB that would be 50 MB
    with pytest.raises(DataError, match="line of more than 1 MiB"):
        load_rows(str(path))


PARQUET_ROWS = [
    {"prompt": "zwölf 猫", "messages": [{"role": "user", "content": "a", "name": None}], "score": 0.5},
    {"prompt": None, "messages": [{"role": "assistant", "content": "b", "name": "c"}] * 2, "score": None},
]


def test_rows_of_a_parquet_file(tmp_path):
    # A folder whose name looks like a partition of a larger table adds no column.
    path = tmp_path / "part=1" / "rows.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(PARQUET_ROWS), path, row_group_size=1)
    assert load_rows(str(path)) == PARQUET_ROWS


def test_a_damaged_parquet_file_is_refused(tmp_path, rng):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(PARQUET_ROWS), path)
    whole = path.read_bytes()
    for damaged in (b"", b'{"a": 1}\n', whole[:-20], whole[20:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows\.parquet: it cannot be read as Parquet: .") as error:
            load_rows(str(path))
        one_line(error)
    no_utf8 = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": no_utf8}), path)
    with pytest.raises(DataError, match=r"cannot be read as Parquet: .*utf-8"):
        load_rows(str(path))
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(DataError, match="empty; expected at least one row"):
        load_rows(str(path))


def test_a_parquet_file_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'need the "data" extra: pip install -e "\.\[data\]"') as error:
        load_rows(str(tmp_path / "rows.parquet"))
    one_line(error)


# Padding


def test_padding_left_and_right():
    tokens, mask = pad([[5, 6], [7], [], [1, 2, 3]], 3, pad_id=9, side="left")
    assert tokens.tolist() == [[9, 5, 6], [9, 9, 7], [9, 9, 9], [1, 2, 3]]
    assert mask.tolist() == [[False, True, True], [False, False, True], [False] * 3, [True] * 3]
    tokens, mask = pad([[5, 6], [7], [], [1, 2, 3]], 3, pad_id=9, side="right")
    assert tokens.tolist() == [[5, 6, 9], [7, 9, 9], [9, 9, 9], [1, 2, 3]]
    assert mask.tolist() == [[True, True, False], [True, False, False], [False] * 3, [True] * 3]
    assert tokens.dtype == np.int32
    assert mask.dtype == bool


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_every_token_in_its_order(rng, side):
    rows = [rng.integers(0, 100, rng.integers(0, 9)).tolist() for _ in range(50)]  # 0, the pad id, is a token as well
    tokens, mask = pad(rows, 8, pad_id=0, side=side)
    assert [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)] == rows
    steps = np.diff(mask.astype(int), axis=1)
    assert (steps >= 0).all() if side == "left" else (steps <= 0).all()


# Prompts


def test_prompts_are_tokenized_and_padded_left(tokenizer, source):
    rows = [{"prompt": "the cat sat", "id": 7, "tag": "x"}, {"id": 8, "prompt": "dog"}]
    prompts = load_prompts(source(rows), tokenizer, pad_id=0, prompt_length=5)
    bos, (the, cat, sat, dog) = 1, tokenizer.convert_tokens_to_ids(["▁the", "▁cat", "▁sat", "▁dog"])
    assert prompts.tokens.tolist() == [[0, bos, the, cat, sat], [0, 0, 0, bos, dog]]
    assert prompts.mask.tolist() == [[False, True, True, True, True], [False, False, False, True, True]]
    assert prompts.texts == ["the cat sat", "dog"]
    assert prompts.columns == [{"id": 7, "tag": "x"}, {"id": 8}]
    assert (prompts.num_dropped, prompts.num_cut) == (0, 0)


def test_the_prompt_is_the_first_known_column(tokenizer, source):
    rows = [{"text": "the cat", "prompt": "a dog"}, {"text": "the cat", "other": 1}]
    prompts = load_prompts(source(rows), tokenizer, 0, 4)
    assert prompts.texts == ["a dog", "the cat"]
    assert prompts.columns == [{"text": "the cat"}, {"other": 1}]


def test_a_row_without_a_prompt_is_named(tokenizer, source):
    path = source([{"prompt": "the cat"}, {"promt": "a dog", "id": 1}])
    with pytest.raises(
        DataError, match="row 2: got columns promt, id, expected one of prompt, messages, text"
    ) as error:
        load_prompts(path, tokenizer, 0, 4)
    assert path in one_line(error)


@pytest.mark.parametrize("value", [None, 3, ["a"], [], {"role": "user"}, [[{"role": "user"}]]])
def test_a_prompt_of_another_type_is_named(tokenizer, source, value):
    with pytest.raises(
        DataError, match=r"row 1: column 'prompt': got .*, expected text or a list of chat messages"
    ) as error:
        load_prompts(source([{"prompt": value}]), tokenizer, 0, 4)
    one_line(error)


@pytest.mark.parametrize(
    ("turn", "found"),
    [
        ({"from": "human", "value": "hi"}, "from, value"),
        ({"role": "user"}, "role"),
        ({"role": None, "content": "hi"}, "content"),
        ({"role": "user", "content": None}, "role"),
        ({}, "nothing"),
    ],
)
def test_a_message_without_role_or_content_is_named(tokenizer, source, turn, found):
    rows = [{"prompt": "the"}, {"messages": [{"role": "user", "content": "hi"}, turn]}]
    with pytest.raises(DataError) as error:
        load_prompts(source(rows), tokenizer, 0, 4)
    assert f"row 2: column 'messages': message 2: got {found}, expected role and content" in one_line(error)


def test_an_answer_to_nothing_is_no_prompt(tokenizer, source):
    with pytest.raises(DataError, match="row 1: column 'messages': got an answer only") as error:
        load_prompts(source([{"messages": [{"role": "assistant", "content": "hi"}]}]), tokenizer, 0, 4)
    one_line(error)


def test_an_empty_prompt_is_refused(source):
    tokenizer = folders.word_tokenizer(bos=False)
    with pytest.raises(DataError, match="row 2: the prompt is empty") as error:
        load_prompts(source([{"prompt": "the"}, {"prompt": ""}]), tokenizer, 0, 4)
    one_line(error)


def test_text_that_is_no_unicode_is_refused_with_its_row(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(r'{"prompt": "the cat"}' + "\n" + r'{"prompt": "half a pair: \ud83d"}' + "\n")
    with pytest.raises(TokenizerError) as error:
        load_prompts(str(path), tokenizer, 0, 8)
    assert "2" in one_line(error).removeprefix(str(path))


# prompt_length is 4 and `<s>` takes a slot: two prompts are too long.
LONG = [
    {"prompt": "the cat sat"},
    {"prompt": "a very old dog sat here"},
    {"prompt": "the"},
    {"prompt": "the film was dull ."},
]


def test_long_prompts_are_dropped_and_counted(tokenizer, source):
    prompts = load_prompts(source(LONG), tokenizer, 0, 4, long_prompts="drop")
    assert prompts.texts == ["the cat sat", "the"]
    assert (prompts.num_dropped, prompts.num_cut) == (2, 0)
    assert len(prompts.columns) == len(prompts.tokens) == 2


@pytest.mark.parametrize(
    ("rule", "words", "texts"),
    [
        ("keep_start", ["<s>", "▁a", "▁very", "▁old"], ["a very old", "the film was"]),
        ("keep_end", ["▁old", "▁dog", "▁sat", "▁here"], ["old dog sat here", "film was dull ."]),
    ],
)
def test_long_prompts_are_cut_and_counted(tokenizer, source, rule, words, texts):
    prompts = load_prompts(source(LONG), tokenizer, 0, 4, long_prompts=rule)
    assert tokenizer.convert_ids_to_tokens(prompts.tokens[1].tolist()) == words
    assert [text.strip() for text in prompts.texts] == ["the cat sat", texts[0], "the", texts[1]]
    assert (prompts.num_dropped, prompts.num_cut) == (0, 2)
    assert prompts.mask[1].all()


def test_all_prompts_too_long_is_an_error(tokenizer, source):
    with pytest.raises(DataError, match=r"all 2 prompts are longer than prompt_length \(2 tokens\)") as error:
        load_prompts(source([{"prompt": "the cat"}, {"prompt": "a dog"}]), tokenizer, 0, 2)
    assert "keep_start" in one_line(error)


def test_an_unknown_rule_for_long_prompts_is_refused(tokenizer, source):
    with pytest.raises(InputError, match="long_prompts: got 'cut', expected one of drop, keep_start, keep_end"):
        load_prompts(source([{"prompt": "a"}]), tokenizer, 0, 2, long_prompts="cut")


CHAT = [{"role": "system", "content": "the film"}, {"role": "user", "content": "was good"}]


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_chat_messages_go_through_the_template(source, column):
    tokenizer = folders.word_tokenizer([*folders.WORDS, "system", "user", ":", "bot"])
    tokenizer.chat_template = folders.CHAT_TEMPLATE
    prompts = load_prompts(source([{column: CHAT, "id": 1}]), tokenizer, 0, 16)
    text = "system : the film . user : was good . bot :"
    assert prompts.texts == [text]
    assert prompts.columns == [{"id": 1}]
    # The template writes every special token that it wants: `<s>` is not put in front a second time.
    assert tokenizer.convert_ids_to_tokens(prompts.tokens[0][prompts.mask[0]].tolist()) == [
        "▁" + w for w in text.split()
    ]


def test_chat_messages_without_a_template_are_refused(tokenizer, source):
    with pytest.raises(
        TokenizerError, match="no chat template; expected one for prompts that are chat messages"
    ) as error:
        load_prompts(source([{"messages": CHAT}]), tokenizer, 0, 16)
    one_line(error)


@pytest.mark.parametrize("complaint", ["roles must alternate", ""])
def test_what_a_template_refuses_is_told(source, complaint):
    tokenizer = folders.word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('" + complaint + "') }}"
    with pytest.raises(TokenizerError, match=complaint or "template refuses") as error:
        load_prompts(source([{"messages": CHAT}]), tokenizer, 0, 16)
    one_line(error)


def test_an_end_token_that_the_tokenizer_appends_is_taken_off_a_prompt(source):
    from tokenizers import processors

    tokenizer = folders.word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    prompts = load_prompts(source([{"prompt": "the cat"}]), tokenizer, 0, 6)
    assert tokenizer.convert_ids_to_tokens(prompts.tokens[0][prompts.mask[0]].tolist()) == ["<s>", "▁the", "▁cat"]


# The order of the data


@pytest.mark.parametrize(("num_rows", "batch_size"), [(7, 3), (8, 4), (5, 5), (1, 4), (3, 10)])
def test_each_epoch_visits_each_row_once(num_rows, batch_size, seed):
    iterations = 4 * num_rows // batch_size + 2
    stream = np.concatenate([batch_indices(num_rows, batch_size, i, seed) for i in range(iterations)])
    epochs = stream[: len(stream) // num_rows * num_rows].reshape(-1, num_rows)
    assert len(epochs) >= 4
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_rows))


def test_the_order_is_a_pure_function(seed):
    rows = batch_indices(100, 7, 31, seed)
    np.random.default_rng().random(3)
    assert batch_indices(100, 7, 31, seed).tolist() == rows.tolist()
    assert rows.shape == (7,)
    assert np.issubdtype(rows.dtype, np.integer)


def test_the_order_differs_by_epoch_and_seed():
    # 50! orders: a coincidence would be a defect.
    first, second = (batch_indices(50, 50, epoch, seed=1) for epoch in (0, 1))
    other = batch_indices(50, 50, 0, seed=2)
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.tolist()
    assert first.tolist() != list(range(50))
    # The stream of one seed is not that of the next seed, an epoch later.
    assert second.tolist() != other.tolist()


def test_the_order_does_not_depend_on_the_batch_size(seed):
    """A run of batch 6 reads the same stream of rows as one of batch 4."""
    by_four = np.concatenate([batch_indices(9, 4, i, seed) for i in range(6)])
    by_six = np.concatenate([batch_indices(9, 6, i, seed) for i in range(4)])
    assert by_four.tolist() == by_six.tolist()


def test_the_real_prompts_load_with_the_real_tokenizer(shared):
    tokenizer = load_tokenizer(shared / "models" / "stories15M")
    path = shared / "data" / "story_openings" / "prompts.jsonl"
    prompts = load_prompts(str(path), tokenizer, special_tokens(tokenizer).pad_id, 32, long_prompts="keep_start")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(prompts.texts) == len(rows) == 1024
    assert [len(prompts.texts) - prompts.num_cut, prompts.num_dropped] == [1024 - prompts.num_cut, 0]
    # Each begins with `<s>`, id 1, at its first real slot.
    first = prompts.tokens[np.arange(1024), prompts.mask.argmax(axis=1)]
    assert (first == 1).all()


# JSON that is none, or says two things


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"prompt": "a", "x": NaN}', "NaN is not JSON"),
        (b'{"prompt": "a", "x": [-Infinity]}', "-Infinity is not JSON"),
        (b'{"prompt": "a", "x": 1e999}', "1e999 is larger than any number"),
        (b'{"prompt": "a", "x": -1e999}', "-1e999 is larger"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' stands there twice"),
        (b'{"prompt": "a", "x": {"y": 1, "y": 1}}', "'y' stands there twice"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "BOM"),
        (b"[" * 100_000, "recursion"),
        (b'{"x": ' * 100_000, "recursion"),
        (b'{"x": ' + b"9" * 100_000 + b"}", "digits"),
        (b'{"prompt": "a\nb"}', ""),
        (b"{'prompt': 'a'}", "Expecting property name"),
        (b'{"prompt": "a",}', ""),
    ],
)
def test_json_that_is_none_is_told_with_its_line(tmp_path, line, told):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        load_rows(str(path))
    assert str(error.value).startswith(f"{path}:2: broken line: ")
    assert told in str(error.value)
    assert len(str(error.value)) < 500


def test_json_that_is_unusual_is_taken_as_it_stands(tmp_path):
    """A byte order mark at the beginning, separators of lines that are none, escapes in pairs, numbers of any size."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a\u2028b\u2029c\x85d"}, {"prompt": "\U0001f600", "x": 10**30, "y": 1e308}, {"prompt": "\x00"}]
    path.write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=i == 1) for i, row in enumerate(rows)).encode()
    )
    assert load_rows(str(path)) == rows


def test_rows_of_any_bytes_are_rows_or_errors(tmp_path, rng, times):
    """Rows with some bytes changed: never another error, never slow."""
    good = json.dumps(
        {"prompt": "a \u2603 \\ud83d", "messages": [{"role": "user", "content": "x"}], "n": [1.5, None, True]}
    )
    path, refused = tmp_path / "rows.jsonl", 0
    for _ in range(1000 * times):
        data = bytearray(good.encode())
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(len(data)))
            match int(rng.integers(4)):
                case 0:
                    data[at] = int(rng.integers(256))
                case 1:
                    del data[at : at + int(rng.integers(1, 9))]
                case 2:
                    data[at:at] = bytes(rng.choice(list(b'{}[]",:\\/\n0eE-.tfnu'), int(rng.integers(1, 9))).tolist())
                case 3:
                    data[at:at] = data[int(rng.integers(len(data))) :]
            if not data:
                break
        path.write_bytes(data)
        try:
            assert all(isinstance(row, dict) for row in load_rows(str(path)))
        except DataError:
            refused += 1
    assert refused > 200 * times
