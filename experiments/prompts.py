"""Prompts for policies with tokenizers of their own, as texts and conversations, and what people answered to them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from experiments.responses import Prompt
from experiments.settings import EvaluateExperiment
from experiments.settings.evaluation import REFERENCES
from ppo_jax.data import DataError, load_rows, take_prompt, told_at
from ppo_jax.errors import check
from ppo_jax.evaluation import bleu, rouge
from ppo_jax.tokenizers import TokenizerError, encode_prompt, render_chat


class Data(NamedTuple):
    """What is asked, and what belongs to each prompt; lists of the same length."""

    prompts: list[Prompt]  # as the policies get them
    texts: list[str]  # as the judge gets them
    columns: list[dict[str, Any]]  # the other columns of each row
    references: list[list[str]]  # empty where the data has none


def read_data(settings: EvaluateExperiment, tokenizers: Sequence[PreTrainedTokenizerBase]) -> Data:
    """The first `num_prompts` prompts that fit, with their references.

    Raises:
        InputError: a row that cannot be used, fewer than two prompts, references in some rows only or, where they are
            needed, in none; a package is missing that compares with them.
    """
    data, dropped, cut = Data([], [], [], []), 0, 0
    how = (settings.prompts_split, tokenizers, settings.prompt_length, settings.long_prompts)
    for asked in fitted(settings.prompts, *how):
        if asked.prompt is None:
            dropped += 1
            continue
        with told_at(asked.where):
            text = asked.prompt if isinstance(asked.prompt, str) else render_chat(tokenizers[0], asked.prompt)
        cut += asked.prompt != asked.whole
        data.prompts.append(asked.prompt)
        data.texts.append(text)
        data.columns.append(asked.columns)
        data.references.append(references_of(asked.row, asked.where))
        if len(data.prompts) == settings.num_prompts:
            break
    source, limit = settings.prompts, settings.prompt_length
    told = f"at least 2 of at most {limit} tokens ({dropped} are longer); config.prompt_length and config.long_prompts"
    check(f"{source}: prompts", len(data.prompts), len(data.prompts) >= 2, told)
    print(f"prompts: {len(data.prompts):,} of at most {limit} tokens ({dropped} dropped, {cut} cut)", flush=True)
    return data._replace(references=check_references(settings, data.references))


class Asked(NamedTuple):
    """A row of a source of prompts."""

    where: str  # for messages
    row: dict[str, Any]
    columns: dict[str, Any]  # without the prompt's
    whole: Prompt
    prompt: Prompt | None  # as much of it as is used; None: it is too long, and left out


def fitted(
    source: str, split: str, tokenizers: Sequence[PreTrainedTokenizerBase], length: int, long_prompts: str
) -> Iterator[Asked]:
    """The prompts of a source, each with what of it fits; see `fit`.

    Raises:
        InputError: a row that cannot be used, by its number.
    """
    for number, row in enumerate(load_rows(source, split), start=1):
        where = f"{source}: row {number}"
        whole, columns = take_prompt(row, where)
        with told_at(where):
            prompt = fit(whole, tokenizers, length, long_prompts)
        yield Asked(where, row, columns, whole, prompt)


def fit(prompt: Prompt, tokenizers: Sequence[PreTrainedTokenizerBase], length: int, long_prompts: str) -> Prompt | None:
    """The prompt, or as much of it as fits into `length` tokens of every policy; None: it is left out.

    A conversation is never cut: it would lose what its template begins or ends with.

    Raises:
        TokenizerError: an empty prompt.
    """

    def size(text: Prompt) -> int:
        return max(len(encode_prompt(tokenizer, text)) for tokenizer in tokenizers)

    tokens = encode_prompt(tokenizers[0], prompt)
    if not tokens:
        raise TokenizerError("the prompt is empty; expected at least one token")
    if size(prompt) <= length:
        return prompt
    if long_prompts == "drop" or not isinstance(prompt, str):
        return None
    for kept in range(length, 0, -1):  # what was cut may have more tokens when it is encoded again
        part = tokens[:kept] if long_prompts == "keep_start" else tokens[-kept:]
        text = tokenizers[0].decode(part, skip_special_tokens=True)
        if 1 <= size(text) <= length:
            return text
    return None


def references_of(row: dict[str, Any], where: str) -> list[str]:
    """What people wrote: the column `references` (texts) or `completion` (a text, or a chat message), or else the
    answer at the end of `messages`; empty where there is none.

    Raises:
        DataError: a column of this name that holds something else.
    """
    last = row["messages"][-1] if "messages" in row and "prompt" not in row else {}
    answer = last.get("content") if last.get("role") == "assistant" else None
    found = {"references": row.get("references"), "completion": row.get("completion"), "messages": answer}
    name, value = next(((name, value) for name, value in found.items() if value is not None), ("", []))
    texts: Any = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and len(texts) == 1 and isinstance(texts[0], dict):
        texts = [texts[0].get("content")]
    if name and not (isinstance(texts, list) and texts and all(map(is_text, texts))):
        raise DataError(f"{where}: column {name!r}: got {str(value)[:60]!r}, expected a text, or texts in references")
    return texts


def is_text(value: Any) -> bool:
    """Whether this is text with something to read in it, which can be written as UTF-8."""
    return isinstance(value, str) and bool(value.strip()) and value == value.encode(errors="ignore").decode()


def check_references(settings: EvaluateExperiment, references: list[list[str]]) -> list[list[str]]:
    """The references of all prompts, or of none.

    Raises:
        InputError: see `read_data`.
    """
    have = sum(map(bool, references))
    needed = settings.against == REFERENCES or bool(settings.language) or have
    expected = f"{len(references)}, one for each prompt, in the column references or completion"
    check(f"{settings.prompts}: references", have, not needed or have == len(references), expected)
    if not have:
        return []
    # What is missing for these shows itself now, and not after the sampling.
    bleu([row[0] for row in references], references, settings.language)
    rouge(references[0][:1], references[:1])
    return references
