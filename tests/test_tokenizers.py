"""Tokenizers: which token is pad and which are the end, by the stated rules; responses back to text."""

import contextlib
import copy
import json
import shutil
from pathlib import Path

import folders
import numpy as np
import pytest
from tokenizers import normalizers, processors
from transformers import AutoTokenizer

from ppo_jax import hub
from ppo_jax.errors import InputError
from ppo_jax.tokenizers import (
    SpecialTokens,
    TokenizerError,
    decode_responses,
    encode_pieces,
    encode_prompt,
    encode_text,
    load_tokenizer,
    render_chat,
    render_turns,
    same_tokenizer,
    special_tokens,
)

ALL = folders.SPECIAL


def word_tokenizer(*names: str, **options):
    """A word tokenizer that has only these special tokens."""
    return folders.word_tokenizer(special={f"{name}_token": ALL[f"{name}_token"] for name in names}, **options)


@pytest.fixture(scope="module")
def stories(shared):
    return load_tokenizer(shared / "models" / "stories15M")


@pytest.fixture(scope="module")
def gpt2(shared):
    return load_tokenizer(shared / "tokenizers" / "gpt2")


# Loading


def test_a_saved_tokenizer_loads_again(tmp_path):
    folder = folders.make_folder(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    assert tokenizer("the cat")["input_ids"] == folders.word_tokenizer()("the cat")["input_ids"]
    assert special_tokens(tokenizer) == SpecialTokens(pad_id=0, eos_ids=(2,))


@pytest.mark.parametrize("content", [None, "", "{}", "no json"], ids=["no_file", "empty", "no_model", "broken"])
def test_a_folder_without_a_readable_tokenizer_is_refused_in_one_line(tmp_path, content):
    folder = folders.make_folder(tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match="cannot load one from") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, InputError)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "gemma", "llama"])
def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path, model_type):
    """Of some families transformers makes one of special tokens only."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"there is no tokenizer\.json, nor files that it is made of"):
        load_tokenizer(tmp_path)


def test_a_message_of_one_word_is_told_with_its_kind(tmp_path, monkeypatch):
    folder = folders.make_folder(tmp_path / "model")

    def fail(*_, **__):
        raise KeyError("added_tokens")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(TokenizerError, match=r"KeyError 'added_tokens'$"):
        load_tokenizer(folder)


def test_code_in_a_folder_is_not_run(tmp_path):
    folder = folders.make_folder(tmp_path / "model")
    marker = tmp_path / "it_ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    config = (folder / "tokenizer_config.json").read_text().rstrip().removesuffix("}").rstrip()
    (folder / "tokenizer_config.json").write_text(config + ', "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}')
    with contextlib.suppress(TokenizerError):  # loaded without it or refused: either will do
        load_tokenizer(folder)
    assert not marker.exists()


# Pad and end


def test_a_tokenizer_with_everything_is_taken_as_it_is():
    assert special_tokens(word_tokenizer("pad", "bos", "eos", "unk")) == SpecialTokens(pad_id=0, eos_ids=(2,))


def test_the_unknown_token_is_borrowed_as_pad():
    tokenizer = word_tokenizer("eos", "unk")
    assert special_tokens(tokenizer) == SpecialTokens(pad_id=3, eos_ids=(2,))
    assert tokenizer.pad_token == "<unk>"  # what is saved with the policy says the same


def test_the_stories_tokenizer_borrows_its_unknown_token(stories, shared):
    assert stories.pad_token_id is None or stories.pad_token_id == 0
    eos_ids = hub.load_eos_ids(shared / "models" / "stories15M")
    assert special_tokens(stories, eos_ids) == SpecialTokens(pad_id=0, eos_ids=(2,))


def test_gpt2_pads_with_its_only_special_token(shared, tmp_path):
    # Pad, unknown and end are the same token, which is harmless: masks decide, not ids.
    folder = tmp_path / "gpt2"
    shutil.copytree(shared / "tokenizers" / "gpt2", folder)
    shutil.copy(Path(__file__).parent / "golden" / "gpt2" / "config.json", folder)  # it names the family
    assert special_tokens(load_tokenizer(folder)) == SpecialTokens(pad_id=50256, eos_ids=(50256,))


def test_gpt2_without_its_configuration_needs_to_be_told_its_end(gpt2):
    gpt2 = copy.deepcopy(gpt2)
    with pytest.raises(TokenizerError, match="no EOS token"):
        special_tokens(gpt2)
    end = "<|endoftext|>"
    assert special_tokens(gpt2, pad_token=end, eos_token=end) == SpecialTokens(pad_id=50256, eos_ids=(50256,))


def test_a_tokenizer_without_end_is_refused():
    with pytest.raises(TokenizerError, match=r"no EOS token; expected one, or .* in config\.eos_token"):
        special_tokens(word_tokenizer("pad", "unk"))


def test_an_end_of_the_model_does_not_replace_that_of_the_tokenizer():
    """Without an EOS token of its own the exported tokenizer would not know its end."""
    with pytest.raises(TokenizerError, match="no EOS token"):
        special_tokens(word_tokenizer("pad", "unk"), extra_eos_ids=(2,))


def test_a_tokenizer_without_pad_and_unknown_token_is_refused():
    with pytest.raises(
        TokenizerError, match=r"neither a pad nor an unknown token; expected one, or .* config\.pad_token"
    ):
        special_tokens(word_tokenizer("eos"))


def test_given_tokens_stand_for_the_missing_ones():
    tokenizer = word_tokenizer()
    assert special_tokens(tokenizer, pad_token="<unk>", eos_token="▁.") == SpecialTokens(
        pad_id=3, eos_ids=(tokenizer.convert_tokens_to_ids("▁."),)
    )
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<unk>", "▁.")


def test_given_tokens_override_everything():
    tokenizer = word_tokenizer("pad", "bos", "eos", "unk")
    special = special_tokens(tokenizer, extra_eos_ids=(7, 8), pad_token="</s>", eos_token="<s>")
    assert special == SpecialTokens(pad_id=2, eos_ids=(1,))


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_a_given_token_outside_the_vocabulary_is_refused(name):
    tokenizer = word_tokenizer("pad", "eos", "unk")
    before = len(tokenizer)
    with pytest.raises(TokenizerError, match=f"config.{name}: got '<end>', expected a token of the tokenizer's vocab"):
        special_tokens(tokenizer, **{name: "<end>"})
    assert len(tokenizer) == before


@pytest.mark.parametrize(
    ("saved", "expected"), [([7, 2], (2, 7)), ([2], (2,)), ([5, 2, 5, 6], (2, 5, 6)), (None, (2,))]
)
def test_several_ends_come_from_generation_config(tmp_path, saved, expected):
    folder = folders.make_folder(tmp_path / "model", eos_ids=saved)
    assert special_tokens(load_tokenizer(folder), hub.load_eos_ids(folder)).eos_ids == expected


def test_a_folder_without_generation_config_has_the_ends_of_its_config(tmp_path):
    folder = folders.make_folder(tmp_path / "model", eos_ids=[7])
    (folder / "generation_config.json").unlink()
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 7
    assert special_tokens(load_tokenizer(folder), hub.load_eos_ids(folder)).eos_ids == (2, 7)


# Texts in pieces


def tokens_of(tokenizer, pieces: list[str]) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(ids) for ids in encode_pieces(tokenizer, pieces, is_chat=False)]


def test_pieces_are_the_tokens_of_the_whole_where_it_has_a_border_there(stories, gpt2):
    assert tokens_of(stories, ["The cat", " sat."]) == [["<s>", "▁The", "▁cat"], ["▁sat", "."]]
    assert tokens_of(gpt2, ["The cat", " sat."]) == [["The", "Ġcat"], ["Ġsat", "."]]
    assert tokens_of(stories, ["", "The cat", "", " sat."]) == [["<s>"], ["▁The", "▁cat"], [], ["▁sat", "."]]


def test_the_first_piece_is_a_prompt_where_the_whole_has_no_border(stories, gpt2):
    # As one text it would be "cats" and "12": one token each.
    assert tokens_of(gpt2, ["The cat", "s sat"]) == [["The", "Ġcat"], ["s", "Ġsat"]]
    assert tokens_of(gpt2, ["Is it 1", "2?"]) == [["Is", "Ġit", "Ġ1"], ["2", "?"]]
    assert tokens_of(gpt2, ["a: ", "b"]) == [["a", ":", "Ġ"], ["b"]]
    # Without the space that SentencePiece puts in front of what stands alone.
    assert tokens_of(stories, ["The cat", "s sat"]) == [["<s>", "▁The", "▁cat"], ["s", "▁sat"]]


def test_pieces_of_a_chat_get_no_special_tokens(stories):
    (first, second) = encode_pieces(stories, ["the cat", " sat"], is_chat=True)
    assert stories.convert_ids_to_tokens(first + second) == ["▁the", "▁cat", "▁sat"]


def test_a_conversation_falls_into_questions_and_answers():
    tokenizer = word_tokenizer("eos", "pad")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] + m.content }};{% endfor %}" + (
        "{% if add_generation_prompt %}a{% endif %}"
    )
    turns = [{"role": role, "content": str(i)} for i, role in enumerate(("user", "assistant", "user") * 2)]
    assert render_turns(tokenizer, turns) == ["u0;a", "1;", "u2;u3;a", "4;"]
    assert render_turns(tokenizer, turns, start=2) == ["u0;a1;u2;u3;a", "4;"]
    assert render_chat(tokenizer, turns[:4]) == "u0;a1;u2;u3;a"
    assert render_chat(tokenizer, turns[:2], add_generation_prompt=False) == "u0;a1;"


# Back to text

PAD, BOS, EOS, UNK = 0, 1, 2, 3


def rollout(tokenizer, prompt: str, response: list[int], prompt_length: int = 6, response_length: int = 6):
    """A row as `generate` makes it: prompt padded left, response up to and with EOS, padded right."""
    ids = encode_prompt(tokenizer, prompt)
    tokens = [PAD] * (prompt_length - len(ids)) + ids + response + [PAD] * (response_length - len(response))
    mask = [False] * (prompt_length - len(ids)) + [True] * (len(ids) + len(response))
    return tokens, mask + [False] * (response_length - len(response))


def decoded(tokenizer, *rows, response_length: int = 6) -> list[str]:
    tokens, mask = (np.array(part) for part in zip(*rows, strict=True))
    return decode_responses(tokenizer, tokens, mask, response_length)


def test_responses_without_prompt_padding_and_special_tokens():
    tokenizer = folders.word_tokenizer()
    cat, sat, the = tokenizer.convert_tokens_to_ids(["▁cat", "▁sat", "▁the"])
    texts = decoded(
        tokenizer,
        rollout(tokenizer, "the", [cat, sat, EOS]),  # ended
        rollout(tokenizer, "the old cat", [sat] * 6),  # no end at all
        rollout(tokenizer, "the", [EOS]),  # the end at once
        rollout(tokenizer, "the", []),  # nothing, not even an end
        rollout(tokenizer, "the", [cat, PAD, BOS, UNK, sat, EOS]),  # special tokens in the middle
        rollout(tokenizer, "the", [the, cat]),  # a response that repeats its prompt
    )
    assert texts == [" cat sat", " sat" * 6, "", "", " cat sat", " the cat"]


def test_a_leading_space_stays_with_sentencepiece_and_bytes(stories, gpt2):
    for tokenizer in (stories, gpt2):
        for words in (" a little dog.", ", said Tim.", " was", "\nNew line", " naïve 猫"):
            whole = tokenizer("Once upon")["input_ids"]
            ids = tokenizer("Once upon" + words)["input_ids"]
            assert ids[: len(whole)] == whole, "the tokens of the prompt change with what follows: choose other words"
            response = ids[len(whole) :]
            row = rollout(tokenizer, "Once upon", response, response_length=24)
            assert decoded(tokenizer, row, response_length=24) == [words]


def test_a_character_cut_between_prompt_and_response_does_not_take_the_response_along(gpt2):
    ids = gpt2(" 猫 sat")["input_ids"]  # three bytes of the character, several tokens
    cut = 2
    row = ([*ids[:cut], *ids[cut:]], [True] * len(ids))
    (text,) = decoded(gpt2, row, response_length=len(ids) - cut)
    assert text.endswith(" sat")


def test_random_responses_come_back_as_they_were(rng):
    tokenizer = folders.word_tokenizer()
    rows, expected = [], []
    for _ in range(100):
        prompt = " ".join(rng.choice(folders.WORDS, rng.integers(1, 5)))
        words = rng.choice(folders.WORDS, rng.integers(0, 6)).tolist()
        ids = tokenizer.convert_tokens_to_ids(["▁" + word for word in words])
        rows.append(rollout(tokenizer, prompt, [*ids, EOS] if rng.random() < 0.5 else ids))
        expected.append("".join(" " + word for word in words))
    assert decoded(tokenizer, *rows) == expected


def test_a_tokenizer_folder_without_a_model_is_enough(tmp_path, shared):
    shutil.copytree(shared / "tokenizers" / "gpt2", tmp_path / "gpt2")
    assert load_tokenizer(tmp_path / "gpt2")("Hello world")["input_ids"] == [15496, 995]


# What a reward model reads

SPECIAL = SpecialTokens(PAD, (EOS, 7))


def test_a_text_is_prompt_response_and_the_first_of_the_ends():
    tokenizer = folders.word_tokenizer()
    the, cat, sat = tokenizer.convert_tokens_to_ids(["▁the", "▁cat", "▁sat"])
    for prompt, response, expected in (
        ("the cat", " sat", [BOS, the, cat, sat, EOS]),
        ("the", "", [BOS, the, EOS]),
        ("", "the cat", [BOS, the, cat, EOS]),
        ("", "", [BOS, EOS]),
        ("the cat", " unheard of", [BOS, the, cat, UNK, UNK, EOS]),
    ):
        assert encode_text(tokenizer, SPECIAL, prompt, response) == expected
    assert encode_text(folders.word_tokenizer(bos=False), SPECIAL, "the", " cat") == [the, cat, EOS]


def test_an_end_that_the_tokenizer_puts_there_itself_is_the_only_one():
    tokenizer = folders.word_tokenizer()
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = ends
    the, cat = tokenizer.convert_tokens_to_ids(["▁the", "▁cat"])
    assert tokenizer("the cat")["input_ids"] == [BOS, the, cat, EOS]
    assert encode_text(tokenizer, SPECIAL, "the", " cat") == [BOS, the, cat, EOS]
    assert encode_text(tokenizer, SPECIAL, "", "the cat") == [BOS, the, cat, EOS]


def test_a_prompt_with_a_bos_of_its_template_gets_no_second_one():
    tokenizer = folders.word_tokenizer([*folders.WORDS, "user", "bot", ":"])
    tokenizer.chat_template = "<s>" + folders.CHAT_TEMPLATE
    messages = [{"role": "user", "content": "the cat"}]
    prompt = render_chat(tokenizer, messages)
    ids = encode_text(tokenizer, SPECIAL, prompt, " sat")
    assert ids.count(BOS) == 1
    assert ids == [*encode_prompt(tokenizer, messages), tokenizer.convert_tokens_to_ids("▁sat"), EOS]


def test_the_prompt_has_the_tokens_that_the_policy_is_asked_with(stories, gpt2, rng):
    """Whatever follows it, also where the two would be one token together; and nothing of either is lost."""
    prompts = ["Once upon a time", "Lily sa", "The", "A line\n", "naïve 猫"]
    responses = [" there was a dog.", "w a big box", "", "\nNew line", "  two spaces", "!", "猫 sat"]
    for tokenizer, eos in ((stories, 2), (gpt2, 50256)):
        for prompt in prompts:
            for response in responses:
                ids, asked = encode_text(tokenizer, SpecialTokens(0, (eos,)), prompt, response), prompt + response
                begin = encode_prompt(tokenizer, prompt)
                assert ids[: len(begin)] == begin
                assert ids[-1] == eos
                assert eos not in ids[:-1]
                assert tokenizer.decode(ids[:-1], skip_special_tokens=True) == asked


def test_words_sampled_after_a_prompt_are_read_again_as_they_were(rng):
    """With one token a word: the tokens of a rollout are those of its text."""
    tokenizer = folders.word_tokenizer()
    for _ in range(50):
        prompt = " ".join(rng.choice(folders.WORDS, rng.integers(1, 5)))
        ids = rng.integers(4, len(tokenizer), rng.integers(0, 6)).tolist()
        (response,) = decoded(tokenizer, rollout(tokenizer, prompt, ids))
        assert encode_text(tokenizer, SPECIAL, prompt, response) == [*encode_prompt(tokenizer, prompt), *ids, EOS]


# One tokenizer or two


def test_a_tokenizer_is_that_of_its_folder(tmp_path, stories, gpt2):
    for name, tokenizer in {"words": folders.word_tokenizer(), "stories": stories, "gpt2": gpt2}.items():
        tokenizer.save_pretrained(tmp_path / name)
        saved = load_tokenizer(tmp_path / name)
        assert same_tokenizer(tokenizer, tokenizer)
        assert same_tokenizer(tokenizer, saved)
        assert same_tokenizer(saved, tokenizer)
    assert not same_tokenizer(stories, gpt2)


def test_names_and_padding_are_no_difference(tmp_path):
    one, other = folders.word_tokenizer(), folders.word_tokenizer()
    other.name_or_path, other.chat_template, other.padding_side = "another", "{{ messages }}", "left"
    other(["the cat", "a"], padding=True, truncation=True, max_length=1)
    assert other.backend_tokenizer.padding
    assert same_tokenizer(one, other)
    other.eos_token, other.pad_token = "▁.", "<unk>"  # what ends and what pads is no rule of the tokens either
    assert same_tokenizer(one, other)


def with_merged_words():
    tokenizer = folders.word_tokenizer()
    tokenizer.add_tokens(["the cat"])
    return tokenizer


def with_lower_case():
    tokenizer = folders.word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [
        lambda: folders.word_tokenizer(reversed(folders.WORDS)),
        lambda: folders.word_tokenizer([*folders.WORDS, "more"]),
        lambda: folders.word_tokenizer(folders.WORDS[:-1]),
        lambda: folders.word_tokenizer(bos=False),
        with_merged_words,
        with_lower_case,
    ],
    ids=["other ids", "one more", "one less", "no bos", "added token", "normalizer"],
)
def test_other_rules_are_another_tokenizer(make):
    assert not same_tokenizer(folders.word_tokenizer(), make())
    assert not same_tokenizer(make(), folders.word_tokenizer())
    assert same_tokenizer(make(), make())
