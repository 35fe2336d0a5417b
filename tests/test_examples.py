"""Texts to learn from: which tokens are targets, that prompts are those of PPO, and how texts share rows."""

import time

import folders
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from ppo_jax.data import DataError, load_prompts
from ppo_jax.errors import InputError
from ppo_jax.examples import Texts, load_examples, make_rows, pack_sizes
from ppo_jax.tokenizers import SpecialTokens, TokenizerError, load_tokenizer, special_tokens

CHAT_WORDS = (*folders.WORDS, "system", "user", "assistant", ":")
# Each turn ends with EOS, and a dot comes after it, which belongs to no answer.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }}</s> .{{ '' if loop.last else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "system", "content": "the film"},
    {"role": "user", "content": "was"},
    {"role": "assistant", "content": "very good"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "the cat"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """One token a word, `<s>` (id 1) in front, `</s>` is 2, `<pad>` 0."""
    return folders.word_tokenizer()


@pytest.fixture(scope="module")
def special(tokenizer) -> SpecialTokens:
    return special_tokens(tokenizer)


@pytest.fixture(scope="module")
def chat() -> PreTrainedTokenizerBase:
    """The same with a chat template."""
    made = folders.word_tokenizer(CHAT_WORDS)
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture
def source(tmp_path):
    """Writes rows to a file and gives its path."""
    return lambda rows: str(folders.write_jsonl(tmp_path / "rows.jsonl", rows))


def words(tokenizer, ids, keep=None) -> list[str]:
    """Tokens as text, all or those kept."""
    return tokenizer.convert_ids_to_tokens(np.array(ids)[slice(None) if keep is None else keep].tolist())


def answers(tokenizer, texts: Texts, i: int = 0) -> list[list[str]]:
    """The runs of targets of a text."""
    targets = texts.target_masks[i].astype(int)
    borders = np.flatnonzero(np.diff(targets, prepend=0, append=0))
    return [words(tokenizer, texts.tokens[i][a:b]) for a, b in borders.reshape(-1, 2)]


# Text, prompts with completions


def test_texts_end_with_eos_and_are_targets_throughout(tokenizer, special, source):
    texts = load_examples(source([{"text": "the cat"}, {"text": "a dog sat here"}]), tokenizer, special, 6)
    assert words(tokenizer, texts.tokens[0]) == ["<s>", "▁the", "▁cat", "</s>"]
    assert words(tokenizer, texts.tokens[1]) == ["<s>", "▁a", "▁dog", "▁sat", "▁here", "</s>"]
    assert all(mask.all() and len(mask) == len(ids) for ids, mask in zip(texts.tokens, texts.target_masks, strict=True))
    assert (len(texts), texts.num_cut, texts.num_dropped) == (2, 0, 0)


def test_a_text_that_ends_with_an_end_gets_no_second_one(tokenizer, special, source):
    texts = load_examples(source([{"text": "the</s>"}, {"text": "a</s> dog"}]), tokenizer, special, 6)
    assert words(tokenizer, texts.tokens[0]) == ["<s>", "▁the", "</s>"]
    # Between two documents of one text it is a target as any other token.
    assert words(tokenizer, texts.tokens[1], texts.target_masks[1]) == ["<s>", "▁a", "</s>", "▁dog", "</s>"]


def test_a_completion_and_its_end_are_targets_and_the_prompt_is_not(tokenizer, special, source):
    rows = [{"prompt": "the cat", "completion": " sat here"}, {"prompt": "a", "completion": ""}]
    texts = load_examples(source(rows), tokenizer, special, 8)
    assert words(tokenizer, texts.tokens[0]) == ["<s>", "▁the", "▁cat", "▁sat", "▁here", "</s>"]
    assert texts.target_masks[0].tolist() == [False] * 3 + [True] * 3
    # An empty completion: its end is all there is to learn.
    assert texts.target_masks[1].tolist() == [False, False, True]


def test_a_completion_ends_at_its_first_end(tokenizer, special, source):
    """What comes after EOS is never sampled, so it is not learned either."""
    texts = load_examples(source([{"prompt": "the", "completion": " cat</s> sat"}]), tokenizer, special, 8)
    assert words(tokenizer, texts.tokens[0]) == ["<s>", "▁the", "▁cat", "</s>"]


def test_the_first_of_several_ends_ends_a_text_and_any_of_them_is_one(tokenizer, source):
    special = SpecialTokens(pad_id=0, eos_ids=(3, 2))
    rows = [{"text": "the"}, {"text": "the</s>"}, {"prompt": "a", "completion": " dog</s>"}]
    texts = load_examples(source(rows), tokenizer, special, 4)
    # A tokenizer's own EOS at the end of a text may be its doing: `encode_prompt` takes it off.
    assert [ids[-1] for ids in texts.tokens] == [3, 3, 3]
    assert all(len(ids) == 3 + (i == 2) for i, ids in enumerate(texts.tokens))


def test_long_texts_are_cut_and_those_without_a_target_left_out(tokenizer, special, source):
    rows = [
        {"text": "the cat sat"},  # five tokens with `<s>` and `</s>`: fits
        {"text": "the cat sat here"},  # six: loses its end
        {"prompt": "a very old", "completion": " dog sat"},  # seven: one target is left of three
        {"prompt": "a very old dog sat", "completion": " here"},  # the prompt alone is too long: nothing to learn
        {"prompt": "a very old dog", "completion": ""},  # the prompt just fits, its end does not
    ]
    texts = load_examples(source(rows), tokenizer, special, 5)
    assert (len(texts), texts.num_cut, texts.num_dropped) == (3, 2, 2)
    assert words(tokenizer, texts.tokens[1]) == ["<s>", "▁the", "▁cat", "▁sat", "▁here"]
    assert [int(mask.sum()) for mask in texts.target_masks] == [5, 5, 1]


def test_nothing_to_learn_is_refused(special, source):
    without_bos = folders.word_tokenizer(bos=False)
    # A lone EOS has nothing before it from which it could be predicted.
    for rows in (
        [{"prompt": "the cat sat", "completion": " here"}],
        [{"prompt": "", "completion": ""}],
        [{"text": ""}],
    ):
        with pytest.raises(DataError, match="no completion begins within 3 tokens") as error:
            load_examples(source(rows), without_bos, special, 3)
        assert "\n" not in str(error.value)


# Conversations


def test_every_answer_of_a_conversation_is_a_target_up_to_its_end(chat, source):
    texts = load_examples(source([{"messages": TURNS}]), chat, special_tokens(chat), 64)
    assert (
        words(chat, texts.tokens[0])
        == (
            "▁system ▁: ▁the ▁film </s> ▁. ▁user ▁: ▁was </s> ▁. ▁assistant ▁: ▁very ▁good </s> ▁. "
            "▁user ▁: ▁and </s> ▁. ▁assistant ▁: ▁the ▁cat </s>"
        ).split()
    )
    assert answers(chat, texts) == [["▁very", "▁good", "</s>"], ["▁the", "▁cat", "</s>"]]


def test_what_follows_the_last_answer_is_left_out(chat, source):
    rows = [{"messages": TURNS}, {"messages": [*TURNS, {"role": "user", "content": "and"}]}]
    texts = load_examples(source(rows), chat, special_tokens(chat), 64)
    assert texts.tokens[0].tolist() == texts.tokens[1].tolist()


def test_a_chat_completion_is_a_target_and_answers_in_its_prompt_are_not(chat, source):
    rows = [
        {"prompt": TURNS[:4], "completion": TURNS[4:]},
        {"prompt": TURNS[:2], "completion": TURNS[2:]},  # two answers, and a turn of the user between them
    ]
    texts = load_examples(source(rows), chat, special_tokens(chat), 64)
    assert texts.tokens[0].tolist() == texts.tokens[1].tolist()
    assert answers(chat, texts, 0) == [["▁the", "▁cat", "</s>"]]
    assert answers(chat, texts, 1) == [["▁very", "▁good", "</s>"], ["▁the", "▁cat", "</s>"]]


def test_a_template_without_an_end_gets_one(source):
    """Else a policy would never learn to end its response."""
    chat = folders.word_tokenizer(CHAT_WORDS)
    chat.chat_template = CHAT_TEMPLATE.replace("</s>", "")
    texts = load_examples(source([{"messages": TURNS}]), chat, special_tokens(chat), 64)
    assert answers(chat, texts) == [["▁very", "▁good", "▁."], ["▁the", "▁cat", "▁.", "</s>"]]


def test_null_fields_of_messages_are_absent(source):
    """Parquet gives every message the fields of all others."""
    chat = folders.word_tokenizer(CHAT_WORDS)
    chat.chat_template = CHAT_TEMPLATE.replace("{{ m.role }}", "{{ m.name if m.name is defined else m.role }}")
    with_nulls = [turn | {"name": None, "tool_calls": None} for turn in TURNS]
    texts = load_examples(source([{"messages": TURNS}, {"messages": with_nulls}]), chat, special_tokens(chat), 64)
    assert texts.tokens[0].tolist() == texts.tokens[1].tolist()


TEMPLATES_THAT_DO_NOT_NEST = {
    # What the assistant is asked with is not what its answer begins with.
    "prompt": CHAT_TEMPLATE.replace(" assistant :", " bot :"),
    # EOS only after the last turn.
    "end": CHAT_TEMPLATE.replace("</s>", "{{ '</s>' if loop.last else '' }}"),
    # Answers lose their first word once the user has spoken again (as templates do that leave out the thinking).
    "thinking": CHAT_TEMPLATE.replace(
        "m.content",
        "(m.content.split()[-1] if m.role == 'assistant' and 'user' in messages[loop.index:] | map(attribute='role')"
        " else m.content)",
    ),
    # The number of turns comes first.
    "count": "{{ 'a ' * messages | length }}" + CHAT_TEMPLATE,
}


@pytest.mark.parametrize("name", TEMPLATES_THAT_DO_NOT_NEST)
def test_a_template_that_renders_the_same_turns_differently_is_refused(source, name):
    chat = folders.word_tokenizer(CHAT_WORDS)
    chat.chat_template = TEMPLATES_THAT_DO_NOT_NEST[name]
    path = source([{"text": "the"}, {"messages": TURNS}])
    with pytest.raises(TokenizerError, match=r"row 2: tokenizer: its chat template renders the first \d of") as error:
        load_examples(path, chat, special_tokens(chat), 64)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_one_answer_is_learned_where_answers_before_it_render_differently(source):
    """The way out that the refusal names."""
    chat = folders.word_tokenizer(CHAT_WORDS)
    chat.chat_template = TEMPLATES_THAT_DO_NOT_NEST["thinking"]
    texts = load_examples(source([{"prompt": TURNS[:4], "completion": TURNS[4:]}]), chat, special_tokens(chat), 64)
    assert answers(chat, texts) == [["▁the", "▁cat", "</s>"]]
    assert "▁very" not in words(chat, texts.tokens[0])


REFUSED = {
    "no known column": ({"txt": "a"}, r"got columns txt \(str\), expected text, prompt and completion"),
    "no completion": ({"prompt": "a"}, "expected text"),
    "null": ({"text": None}, r"text \(NoneType\)"),
    "number": ({"prompt": "a", "completion": 3}, r"completion \(int\)"),
    "text and chat": ({"prompt": "a", "completion": TURNS[2:3]}, r"prompt \(str\), completion \(list\)"),
    "nothing": ({}, "got columns none"),
    "no conversation": ({"messages": []}, "row 2: messages: got list, expected text or a list of chat messages"),
    "texts": ({"messages": ["a", "b"]}, "row 2: messages: got list"),
    "other names": ({"messages": [{"from": "human", "value": "a"}]}, "message 1: got from, value, expected role and"),
    "no answer": ({"messages": TURNS[:2]}, "row 2: messages: expected an assistant's turn"),
    "answer first": ({"messages": TURNS[2:]}, "row 2: messages: expected an assistant's turn, and before"),
    "answer in the prompt only": ({"prompt": TURNS[:3], "completion": TURNS[3:4]}, "expected an assistant's turn"),
    "half a pair": ({"text": "\ud83d"}, "row 2: tokenizer: cannot encode"),
    "half a pair, chat": ({"messages": [TURNS[1], {"role": "assistant", "content": "\ud83d"}]}, "row 2: tokenizer:"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_cannot_be_learned_is_named(chat, tmp_path, name):
    row, told = REFUSED[name]
    path = tmp_path / "rows.jsonl"
    lines = [folders.json.dumps(row) for row in ({"text": "the"}, row)]  # ASCII: half a pair is no UTF-8
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=told) as error:
        load_examples(str(path), chat, special_tokens(chat), 64)
    assert f"{path}: row 2" in str(error.value)
    assert "\n" not in str(error.value)


def test_chat_without_a_template_is_refused(tokenizer, special, source):
    with pytest.raises(TokenizerError, match="row 1: tokenizer: it has no chat template"):
        load_examples(source([{"messages": TURNS}]), tokenizer, special, 64)


def test_the_first_kind_that_a_row_is_counts(chat, source):
    rows = [
        {"text": "dog", "messages": TURNS, "prompt": "the", "completion": " cat"},
        {"text": "dog", "messages": TURNS, "prompt": "the"},
        {"text": "dog", "messages": None, "prompt": "the", "completion": None},
    ]
    texts = load_examples(source(rows), chat, special_tokens(chat), 64)
    assert words(chat, texts.tokens[0]) == ["<s>", "▁the", "▁cat", "</s>"]
    assert len(answers(chat, texts, 1)) == 2
    assert words(chat, texts.tokens[2]) == ["<s>", "▁dog", "</s>"]


# The prompts of PPO


def check_prompts(path: str, tokenizer, texts: Texts) -> None:
    """What stands before the last answer is what PPO asks with."""
    special = special_tokens(tokenizer)
    prompts = load_prompts(path, tokenizer, special.pad_id, 512)
    assert len(texts) == len(prompts.texts)
    for tokens, mask, ids, targets in zip(prompts.tokens, prompts.mask, texts.tokens, texts.target_masks, strict=True):
        prompt = tokens[mask]
        assert ids[: len(prompt)].tolist() == prompt.tolist()
        assert targets[len(prompt) :].all()
        assert not targets[len(prompt) - 1]


@pytest.mark.parametrize("name", ["models/stories15M", "tokenizers/gpt2"])
def test_what_is_learned_follows_the_prompt_that_ppo_asks_with(shared, rng, source, name):
    """SentencePiece and byte pairs; text that is cut within words, spaces, newlines, characters of several bytes."""
    tokenizer = load_tokenizer(shared / name)
    if tokenizer.unk_token_id is None:
        tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    special = special_tokens(tokenizer)
    parts = ["the", " cat", "s", "  ", "\n", "\n\n", " zwölf", "猫", "!", " 12", "34", "\t", "don't", "🐈"]
    # A SentencePiece tokenizer gives a leading space up, wherever it stands.
    drawn = ["x" + "".join(rng.choice(parts, 12)) + "x" for _ in range(60)]
    cuts = [int(rng.integers(1, len(text))) for text in drawn]
    rows = [{"prompt": text[:cut], "completion": text[cut:]} for text, cut in zip(drawn, cuts, strict=True)]
    path = source(rows)
    texts = load_examples(path, tokenizer, special, 512)
    check_prompts(path, tokenizer, texts)
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in texts.tokens] == drawn

    tokenizer.chat_template = CHATML
    turns = [
        [{"role": role, "content": str(rng.choice(drawn))} for role in ("user", "assistant") * 2] for _ in range(20)
    ]
    path = source([{"messages": messages} for messages in turns])
    texts = load_examples(path, tokenizer, special, 2048)
    check_prompts(path, tokenizer, last_answers_of(texts))
    for ids, messages in zip(texts.tokens, turns, strict=True):
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == rendered


def last_answers_of(texts: Texts) -> Texts:
    """The same with the last answer as the only target."""
    masks = []
    for mask in texts.target_masks:
        begins = np.flatnonzero(np.diff(mask.astype(int), prepend=0) == 1)
        masks.append(np.arange(len(mask)) >= begins[-1])
    return Texts(texts.tokens, masks, 0, 0)


def test_chat_prompts_are_those_of_ppo(chat, source):
    for rows in ([{"messages": TURNS}], [{"prompt": TURNS[:2], "completion": TURNS[2:3]}]):
        path = source(rows)
        texts = load_examples(path, chat, special_tokens(chat), 64)
        check_prompts(path, chat, last_answers_of(texts))


# Rows


def random_texts(rng, num: int, longest: int) -> Texts:
    """Texts of 1 to `longest` tokens, none of which is 0."""
    tokens = [rng.integers(1, 1000, rng.integers(1, longest + 1)).astype(np.int32) for _ in range(num)]
    return Texts(tokens, [rng.random(len(ids)) < 0.5 for ids in tokens], num_cut=3, num_dropped=4)


def test_one_text_to_a_row(rng):
    texts = random_texts(rng, 20, longest=9)
    rows = make_rows(texts, 9, pad_id=0, pack=False)
    assert rows.tokens.shape == rows.segments.shape == rows.target_mask.shape == (20, 9)
    assert (rows.tokens.dtype, rows.segments.dtype, rows.target_mask.dtype) == (np.int32, np.int32, bool)
    for i, (ids, targets) in enumerate(zip(texts.tokens, texts.target_masks, strict=True)):
        n, padding = len(ids), 9 - len(ids)
        assert rows.tokens[i].tolist() == [*ids, *[0] * padding]
        assert rows.segments[i].tolist() == [1] * n + [0] * padding
        assert rows.target_mask[i].tolist() == [*targets, *[False] * padding]
    assert (rows.num_texts, rows.num_cut, rows.num_dropped) == (20, 3, 4)


def test_packed_rows_hold_every_text_once_and_whole(rng):
    texts = random_texts(rng, 200, longest=30)
    rows = make_rows(texts, 30, pad_id=-1, pack=True)
    found = []
    for ids, segments, targets in zip(rows.tokens, rows.segments, rows.target_mask, strict=True):
        real = segments > 0
        # Texts stand one after the other from the left, numbered from 1; the padding is at the end.
        assert segments[real].tolist() == sorted(segments[real])
        assert set(segments[real]) == set(range(1, segments.max() + 1))
        assert not real[real.sum() :].any()
        assert (ids[~real] == -1).all()
        assert not targets[~real].any()
        for number in range(1, segments.max() + 1):
            found.append((ids[segments == number].tolist(), targets[segments == number].tolist()))
    expected = [(ids.tolist(), mask.tolist()) for ids, mask in zip(texts.tokens, texts.target_masks, strict=True)]
    assert sorted(found) == sorted(expected)
    assert rows.num_texts == 200
    assert rows.filled == pytest.approx(sum(map(len, texts.tokens)) / rows.tokens.size)
    assert rows.filled > 0.9


def test_the_longest_come_first_each_into_the_fullest_row_with_room():
    # Rows of 8. By size, equals in their order: 6 opens row 0 (room 2), 5 row 1 (room 3), 4 row 2 (room 4); 3 fits rows
    # 1 and 2, and 1 is the fuller; the first 2 fits rows 0 and 2, and 0 is the fuller; the second 2 is left row 2.
    assert pack_sizes([5, 3, 4, 2, 2, 6], 8) == [[5, 3], [0, 1], [2, 4]]
    assert pack_sizes([8, 8], 8) == [[0], [1]]
    assert pack_sizes([1] * 5, 2) == [[0, 1], [2, 3], [4]]


def test_rows_are_as_many_as_the_plain_rule_makes(rng):
    """The rule itself, which looks at every row for every text."""
    for _ in range(20):
        length = int(rng.integers(1, 40))
        sizes = rng.integers(1, length + 1, rng.integers(1, 120)).tolist()
        rooms: list[int] = []
        for size in sorted(sizes, reverse=True):
            fits = [(room, i) for i, room in enumerate(rooms) if room >= size]
            if fits:
                rooms[min(fits)[1]] -= size
            else:
                rooms.append(length - size)
        rows = pack_sizes(sizes, length)
        assert sorted(length - sum(sizes[i] for i in row) for row in rows) == sorted(rooms)
        assert sorted(i for row in rows for i in row) == list(range(len(sizes)))


def test_rows_are_few_where_the_fewest_are_known(rng):
    # Full rows of 64, each cut at random into texts: that many rows would do, and the rule needs at most 11/9 of them
    # and 4 (Johnson 1974).
    cuts = [np.sort(rng.choice(63, rng.integers(0, 5), replace=False)) + 1 for _ in range(500)]
    sizes = [int(size) for cut in cuts for size in np.diff(cut, prepend=0, append=64)]
    rng.shuffle(sizes)
    assert 500 <= len(pack_sizes(sizes, 64)) <= 11 / 9 * 500 + 4


def test_many_texts_are_packed_in_no_time(rng):
    """A look at every row for every text would take 10^10 steps, which is an hour."""
    sizes = rng.integers(1, 2049, 200_000).tolist()
    began = time.perf_counter()
    rows = pack_sizes(sizes, 2048)
    assert time.perf_counter() - began < 60
    assert rows == pack_sizes(sizes, 2048)
