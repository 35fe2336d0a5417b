"""Responses of a model: the same for the same seed on any devices, by one program, to prompts that fit."""

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import responses
from experiments.responses import Responder
from ppo_jax import hub
from ppo_jax.errors import InputError
from ppo_jax.models import Decoder
from ppo_jax.tokenizers import decode_responses

PROMPTS = [row["prompt"] for row in folders.prompt_rows(12)]
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a chat template."""
    tokenizer = folders.word_tokenizer([*folders.WORDS, "user", "bot", ":", "x"])
    tokenizer.chat_template = folders.CHAT_TEMPLATE
    return str(folders.make_folder(tmp_path_factory.mktemp("model") / "model", tokenizer))


@pytest.fixture(scope="module")
def responder(model):
    return Responder(model, 8, 6, batch_size=16)


def count_programs(monkeypatch) -> list[int]:
    """The number of traces of `generate`, one entry each."""
    traces, generate = [], responses.generate
    monkeypatch.setattr(responses, "generate", lambda *given: traces.append(1) or generate(*given))
    return traces


def test_every_prompt_gets_its_number_of_responses(responder, rng):
    for num in (1, 3):
        answers = responder.respond(PROMPTS, num, seed=int(rng.integers(2**31)))
        assert len(answers) == len(PROMPTS)
        assert all(len(texts) == num for texts in answers)
        texts = [text for own in answers for text in own]
        assert all(type(text) is str for text in texts)
        assert len(set(texts)) > len(texts) / 2, "they are to differ"
        # Words of the vocabulary and nothing of the prompt or of what ends and pads.
        assert {word for text in texts for word in text.split()} <= {*folders.WORDS, "user", "bot", ":", "x"}
        assert all(len(text.split()) <= 6 for text in texts)


def test_no_prompts_have_no_responses(responder):
    assert responder.respond([], 3) == []


def test_the_seed_decides(responder, seed):
    first, again, other = (responder.respond(PROMPTS, 2, seed=s) for s in (seed, seed, seed + 1))
    assert first == again
    assert first != other
    assert responder.respond(PROMPTS) == responder.respond(PROMPTS, seed=0)


def test_a_new_responder_says_the_same(model, responder, seed):
    assert Responder(model, 8, 6, batch_size=16).respond(PROMPTS[:5], 2, seed) == responder.respond(
        PROMPTS[:5], 2, seed
    )


def devices_of(responder) -> set[int]:
    return {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(responder._params)}


def test_the_number_of_devices_changes_nothing(model, responder, seed, monkeypatch):
    """Eight devices share a batch of 16; one takes it alone."""
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        alone = Responder(model, 8, 6, batch_size=16)
    assert (devices_of(alone), devices_of(responder)) == ({1}, {8})
    assert alone.respond(PROMPTS, 3, seed) == responder.respond(PROMPTS, 3, seed)


def test_a_batch_that_the_devices_cannot_share_is_one_devices(model, seed):
    odd = Responder(model, 8, 6, batch_size=5)
    assert devices_of(odd) == {1}
    answers = odd.respond(PROMPTS, 1, seed)
    assert [len(texts) for texts in answers] == [1] * len(PROMPTS)
    assert answers == odd.respond(PROMPTS, 1, seed)


def test_one_program_serves_all_batches(model, monkeypatch):
    """Full ones and the last; few prompts and many, short ones and long ones."""
    traces = count_programs(monkeypatch)
    responder = Responder(model, 8, 6, batch_size=8)
    for num_prompts, num in ((12, 1), (3, 1), (12, 3), (1, 8)):
        responder.respond(PROMPTS[:num_prompts], num)
    assert len(traces) == 1


def test_batches_have_random_numbers_of_their_own(responder):
    """48 responses to one prompt, in three batches: not three times the same."""
    (texts,) = responder.respond(PROMPTS[:1], 48)
    parts = [texts[start : start + 16] for start in (0, 16, 32)]
    assert parts[0] != parts[1] != parts[2] != parts[0]


def test_the_last_batch_is_filled_up_and_its_filling_thrown_away(responder, seed):
    """The first responses are the same however many are asked for after them."""
    few, many = (responder.respond(PROMPTS[:1] * num, 1, seed) for num in (3, 20))
    assert len(few) == 3
    assert few == many[:3]


def test_the_prompt_and_its_place_decide_and_the_other_prompts_do_not(responder, seed):
    texts = responder.respond(["the cat was"] * 8 + ["a film"] * 8, 1, seed)
    others = responder.respond(["the cat was"] * 8 + ["the old dog"] * 8, 1, seed)
    assert texts[:8] == others[:8]
    assert texts[8:] != others[8:]


def greedy(model, prompt_ids: list[int], length: int) -> list[int]:
    """The likeliest tokens one after the other, by whole forward passes."""
    config = hub.load_config(model)
    params = hub.load_params(model, config)
    apply = jax.jit(lambda tokens: Decoder(config).apply({"params": params}, tokens, jnp.ones(tokens.shape, bool)))
    ids = list(prompt_ids)
    for _ in range(length):
        tokens = jnp.array([[*ids, *[0] * (16 - len(ids))]])
        ids.append(int(jnp.argmax(apply(tokens)[0, len(ids) - 1])))
        if ids[-1] == EOS:
            break
    return ids[len(prompt_ids) :]


def test_without_temperature_the_likeliest_tokens_come(model):
    responder = Responder(model, 8, 6, temperature=0.0, batch_size=8)
    answers = responder.respond(PROMPTS[:3], 2, seed=5)
    assert answers == responder.respond(PROMPTS[:3], 2, seed=6)
    for prompt, (one, two) in zip(PROMPTS, answers, strict=False):
        assert one == two
        ids = responder.tokenizer(prompt)["input_ids"]
        row = np.array([[*ids, *greedy(model, ids, 6)]])
        assert [one] == decode_responses(responder.tokenizer, row, np.ones(row.shape, bool), row.shape[1] - len(ids))


def test_the_temperature_is_that_of_the_policy(model, responder):
    """Cold sampling varies less."""
    cold = Responder(model, 8, 6, temperature=0.05, batch_size=16)
    kinds = [len(set(asked.respond(PROMPTS[:1], 48)[0])) for asked in (cold, responder)]
    assert kinds[0] < kinds[1] / 2


def test_conversations_go_through_the_template(model, seed):
    """As the text that it makes of them, without a BOS of the tokenizer's own."""
    responder = Responder(model, 12, 4, temperature=0.0, batch_size=8)
    chat = [{"role": "user", "content": "the cat was"}]
    ids = responder.tokenizer("user : the cat was . bot :", add_special_tokens=False)["input_ids"]
    row = np.array([[*ids, *greedy(model, ids, 4)]])
    expected = decode_responses(responder.tokenizer, row, np.ones(row.shape, bool), row.shape[1] - len(ids))
    assert responder.respond([chat, "the cat"])[0] == expected


def test_given_tokens_end_and_pad(model, seed):
    """A tokenizer without an end, or one that is to end sooner."""
    sooner = Responder(model, 8, 6, batch_size=8, eos_token="▁.")
    texts = [text for own in sooner.respond(PROMPTS, 4, seed) for text in own]
    assert any("." in text for text in texts)
    assert all("." not in text.rstrip(" .").split() for text in texts)  # nothing comes after the end
    assert sooner.special.eos_ids == (sooner.tokenizer.convert_tokens_to_ids("▁."),)
    assert Responder(model, 8, 6, pad_token="<unk>").special.pad_id == 3


REFUSED = {
    "no model": (lambda root: dict(model="./nowhere"), "no such folder"),
    "positions": (lambda root: dict(response_length=25), r"response_length: got 33, expected at most the 32 positions"),
    "no end": (
        lambda root: dict(model=str(folders.make_folder(root / "m", folders.word_tokenizer(special={}), eos_ids=()))),
        "no EOS token",
    ),
    "unknown end": (lambda root: dict(eos_token="<end>"), "config.eos_token: got '<end>'"),
    "temperature": (lambda root: dict(temperature=-1.0), "temperature"),
    "no response": (lambda root: dict(response_length=0), "max_new_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_answer_is_refused(model, tmp_path, name):
    make, told = REFUSED[name]
    with pytest.raises(InputError, match=told) as error:
        Responder(**(dict(model=model, prompt_length=8, response_length=6) | make(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (["the cat", "the very old dog and the very old cat sat here"], "prompt 2: tokens: got 12, expected 1 to 8"),
        (["the cat", [{"role": "user", "content": "a very old cat sat here"}]], "prompt 2: tokens: got 11, expected"),
    ],
    ids=["long", "long chat"],
)
def test_prompts_that_do_not_fit_are_refused_by_their_number(responder, prompts, told):
    with pytest.raises(InputError, match=told):
        responder.respond(prompts)


def test_an_empty_prompt_is_refused_where_it_has_no_token(tmp_path):
    folder = folders.make_folder(tmp_path / "model", folders.word_tokenizer(bos=False))
    with pytest.raises(InputError, match="prompt 1: tokens: got 0, expected 1 to 8"):
        Responder(str(folder), 8, 6).respond([""])


def test_a_token_that_the_model_does_not_know_is_refused(tmp_path):
    small = folders.llama_config(len(folders.word_tokenizer(folders.WORDS[:10])))
    folder = folders.make_folder(tmp_path / "model", folders.word_tokenizer(), small)
    with pytest.raises(InputError, match=r"token id .* expected ids below the model's vocabulary of 14"):
        Responder(str(folder), 8, 6).respond(["a film was here"])
