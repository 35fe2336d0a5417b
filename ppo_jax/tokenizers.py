"""Tokenizers: loading, the special tokens that training needs, prompts in and text out."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
"""Files of which a folder with a tokenizer has one."""


class TokenizerError(InputError):
    """A tokenizer that cannot be used as it is; the message says what is missing and which setting gives it."""


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning of their own."""

    pad_id: int  # stands where a mask is False; its value is never scored
    eos_ids: tuple[int, ...]  # any of these ends a response


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Opens the tokenizer of a Hugging Face folder. No code from the folder is run.

    Raises:
        TokenizerError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    if folder.is_dir() and not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        # transformers would make an empty one, of special tokens only.
        raise TokenizerError(
            f"tokenizer: cannot load one from {folder}: there is no tokenizer.json, nor files that it is made of"
        )
    try:
        from transformers import AutoTokenizer  # slow to import

        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises many types here
        raise TokenizerError(f"tokenizer: cannot load one from {folder}: {_reason(error)}") from error


def special_tokens(
    tokenizer: PreTrainedTokenizerBase, extra_eos_ids: Sequence[int] = (), pad_token: str = "", eos_token: str = ""
) -> SpecialTokens:
    """Resolves pad and EOS by stated rules, and sets the tokenizer's own accordingly.

    EOS is `eos_token`, or else the tokenizer's EOS together with `extra_eos_ids` (a model's generation_config may name
    several). Pad is `pad_token`, or else the tokenizer's pad, or else its unknown token; it may coincide with EOS,
    since what counts is decided by masks and never by comparing with the pad id.

    Args:
        tokenizer: changed in place where a token was given or borrowed.
        extra_eos_ids: further ids that end a response.
        pad_token: a token of the vocabulary, or "" for the rule.
        eos_token: a token of the vocabulary, or "" for the rule.

    Raises:
        TokenizerError: no EOS, no pad, or a given token that is not in the vocabulary.
    """
    if eos_token:
        tokenizer.eos_token = _known(tokenizer, "eos_token", eos_token)
        extra_eos_ids = ()
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            "tokenizer: it has no EOS token; expected one, or a token of its vocabulary in config.eos_token"
        )
    if pad_token:
        tokenizer.pad_token = _known(tokenizer, "pad_token", pad_token)
    elif tokenizer.pad_token_id is None:
        if tokenizer.unk_token_id is None:
            raise TokenizerError(
                "tokenizer: it has neither a pad nor an unknown token; "
                "expected one, or a token of its vocabulary in config.pad_token"
            )
        tokenizer.pad_token = tokenizer.unk_token
    eos_ids = dict.fromkeys([int(tokenizer.eos_token_id), *(int(i) for i in extra_eos_ids)])
    return SpecialTokens(pad_id=int(tokenizer.pad_token_id), eos_ids=tuple(eos_ids))


def _reason(error: Exception) -> str:
    """The message, in one line of some length, with the kind of an error that says next to nothing."""
    told = " ".join(str(error).split())
    told = told if " " in told else f"{type(error).__name__} {told}".strip()
    return told if len(told) <= 300 else told[:300] + " ..."


def _known(tokenizer: PreTrainedTokenizerBase, name: str, token: str) -> str:
    if token not in tokenizer.get_vocab():
        raise TokenizerError(f"config.{name}: got {token!r}, expected a token of the tokenizer's vocabulary")
    return token


def one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a text that is a single token, by its name in the vocabulary or as it is encoded.

    Raises:
        TokenizerError: the tokenizer splits it.
    """
    if text in tokenizer.get_vocab():
        return tokenizer.get_vocab()[text]
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise TokenizerError(f"token: got {text!r}, which the tokenizer encodes as {len(ids)} tokens; expected one")
    return ids[0]


def check_vocabulary(special: SpecialTokens, tokens: np.ndarray, vocab_size: int) -> None:
    """Refuses token ids that the model has no embedding for (a token added to the tokenizer alone, say).

    Raises:
        TokenizerError: one of the ids is not below `vocab_size`.
    """
    highest = int(max(tokens.max(), special.pad_id, *special.eos_ids))
    if highest >= vocab_size:
        raise TokenizerError(
            f"tokenizer: got token id {highest}, expected ids below the model's vocabulary of {vocab_size}"
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]]) -> list[int]:
    """Token ids of a prompt: text with the tokenizer's own special tokens, or chat messages through its template.

    A text that begins with BOS, as one that a chat template has rendered may, gets no second one.

    Raises:
        TokenizerError: chat messages for a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        ids = _encode(tokenizer, prompt, special=not has_bos)
        # Some tokenizers append EOS to everything; a prompt that ends with it has no response.
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    return _encode(tokenizer, render_chat(tokenizer, prompt), special=False)


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str], is_chat: bool) -> list[list[int]]:
    """Token ids of a text in pieces: prompt and response, or the turns of a conversation (`render_turns`).

    The ids of the first piece are those that `encode_prompt` gives it, whatever follows, since a policy is asked with
    them. The ids of the others continue it as the tokenizer would, where it has a token end at the border; else they
    are encoded alone.

    Args:
        tokenizer: of the model.
        pieces: at least one; their concatenation is the text.
        is_chat: the pieces were rendered by a chat template, which writes all the special tokens it wants.

    Raises:
        TokenizerError: text that is no Unicode.
    """
    encoded: list[list[int]] = []
    before: list[int] = []
    for i, piece in enumerate(pieces):
        text = "".join(pieces[: i + 1])
        ids = _encode(tokenizer, text, special=False) if is_chat else encode_prompt(tokenizer, text)
        fits = ids[: len(before)] == before
        encoded.append(ids[len(before) :] if fits else _encode_alone(tokenizer, piece))
        before = before + encoded[-1]
    return encoded


def _encode_alone(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that continues another. SentencePiece puts a space in front of whatever it encodes: it goes to a
    newline, which is left out again. Where a newline is no token, or one with what follows, there is no such space.
    """
    newline, ids = (_encode(tokenizer, part, special=False) for part in ("\n", "\n" + text))
    stands_alone = tokenizer.unk_token_id not in newline and ids[: len(newline)] == newline
    return ids[len(newline) :] if stands_alone else _encode(tokenizer, text, special=False)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except (TypeError, UnicodeError) as error:  # half a surrogate pair, which JSON can hold and UTF-8 cannot
        raise TokenizerError(f"tokenizer: cannot encode {text[:60]!r}: {_reason(error)}") from error


def render_turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], start: int = 0) -> list[str]:
    """A conversation in pieces: what stands before an answer of the assistant, the answer, and so on to the last one.

    What stands before an answer is what `render_chat` makes of the messages before it, so the template must render the
    first turns of a conversation alike whatever follows. An answer is all that the template renders for its message,
    the token that ends the turn included.

    Args:
        tokenizer: with a chat template.
        messages: the conversation; what follows the last answer is left out.
        start: answers before this message belong to what stands before.

    Returns:
        An even number of texts.

    Raises:
        TokenizerError: no answer, nothing before the first one, or a template that is missing, refuses the messages, or
            renders the same turns differently when more of them follow.
    """
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant" and i >= start]
    if not answers or not answers[0]:
        raise TokenizerError("messages: expected an assistant's turn, and before the first one a turn that it answers")
    text = render_chat(tokenizer, messages[: answers[-1] + 1], add_generation_prompt=False)
    borders = [0]
    for i in answers:
        for end in (i, i + 1):
            beginning = render_chat(tokenizer, messages[:end], add_generation_prompt=end == i)
            if not text.startswith(beginning) or len(beginning) < borders[-1]:
                raise TokenizerError(
                    f"tokenizer: its chat template renders the first {end} of these {answers[-1] + 1} messages "
                    "differently when the others follow, so there is no telling which tokens are an answer; expected "
                    "another template, or rows of a prompt and a completion with one answer each"
                )
            borders.append(len(beginning))
    return [text[begin:end] for begin, end in itertools.pairwise(borders)]


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], add_generation_prompt: bool = True
) -> str:
    """The text of a conversation, by default up to where the assistant answers.

    Raises:
        TokenizerError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise TokenizerError(
            "tokenizer: it has no chat template; "
            "expected one for prompts that are chat messages, or prompts that are text"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template raises what its author wrote
        raise TokenizerError(f"tokenizer: its chat template refuses {messages!r}: {_reason(error)}") from error


def encode_text(tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, prompt: str, response: str) -> list[int]:
    """Token ids of a prompt with its response, and EOS: what a reward model reads."""
    pieces = encode_pieces(tokenizer, [prompt, response] if prompt else [response], is_chat=False)
    return [*(token for piece in pieces for token in piece), special.eos_ids[0]]


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers make the same tokens of every text: compares their rules, not their names."""
    if one is other:
        return True
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (one, other)]
    if any(backend is None for backend in backends):
        return type(one) is type(other) and one.get_vocab() == other.get_vocab()
    rules = [json.loads(backend.to_str()) for backend in backends if backend is not None]
    for rule in rules:  # how batches are padded and cut is no rule of the tokens
        rule["padding"] = rule["truncation"] = None
    return rules[0] == rules[1]


def decode_responses(
    tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, mask: np.ndarray, response_length: int
) -> list[str]:
    """Text of each response, without special tokens.

    A prompt and its response are decoded together and the prompt's text is cut off again: decoded alone, a response
    would lose the space that it begins with in SentencePiece vocabularies.

    Args:
        tokenizer: of the model.
        tokens: `[B, S]` int.
        mask: `[B, S]` bool.
        response_length: R; the last R slots are the response.
    """
    rows = [
        (row[:-response_length][keep[:-response_length]], row[keep]) for row, keep in zip(tokens, mask, strict=True)
    ]
    prompts = tokenizer.batch_decode([prompt for prompt, _ in rows], skip_special_tokens=True)
    texts = tokenizer.batch_decode([whole for _, whole in rows], skip_special_tokens=True)
    alone = tokenizer.batch_decode([whole[len(prompt) :] for prompt, whole in rows], skip_special_tokens=True)
    return [
        text[len(prompt) :] if text.startswith(prompt) else response
        for prompt, text, response in zip(prompts, texts, alone, strict=True)
    ]
