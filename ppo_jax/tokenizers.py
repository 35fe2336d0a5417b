"""Tokenizers: loading, the special tokens that training needs, prompts in and text out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ppo_jax.errors import InputError


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
    try:
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
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _known(tokenizer: PreTrainedTokenizerBase, name: str, token: str) -> str:
    if token not in tokenizer.get_vocab():
        raise TokenizerError(f"config.{name}: got {token!r}, expected a token of the tokenizer's vocabulary")
    return token


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

    Raises:
        TokenizerError: chat messages for a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        try:
            ids = tokenizer(prompt)["input_ids"]
        except (TypeError, UnicodeError) as error:  # half a surrogate pair, which JSON can hold and UTF-8 cannot
            raise TokenizerError(f"tokenizer: cannot encode {prompt[:60]!r}: {_reason(error)}") from error
        # Some tokenizers append EOS to everything; a prompt that ends with it has no response.
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    return list(tokenizer(render_chat(tokenizer, prompt), add_special_tokens=False)["input_ids"])


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """The text of a conversation, up to where the assistant answers.

    Raises:
        TokenizerError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise TokenizerError(
            "tokenizer: it has no chat template; "
            "expected one for prompts that are chat messages, or prompts that are text"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what its author wrote
        raise TokenizerError(f"tokenizer: its chat template refuses {messages!r}: {_reason(error)}") from error


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
