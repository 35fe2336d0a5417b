"""Data in: JSONL files or Hugging Face datasets, token arrays padded as the model wants them, and their order."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ppo_jax.errors import InputError, check
from ppo_jax.tokenizers import SpecialTokens, TokenizerError, encode_prompt, render_chat

LONG_PROMPTS = ("drop", "keep_start", "keep_end")
PROMPT_COLUMNS = ("prompt", "messages", "text")


class DataError(InputError):
    """Data that cannot be used; the message names the source and, where there is one, the line."""


def load_rows(source: str, split: str = "train") -> list[dict[str, Any]]:
    """All rows of a JSONL file, or of a Hugging Face dataset.

    Args:
        source: path of a `.jsonl` (or `.json` lines) file, or `name` / `org/name` of a dataset on the hub.
        split: of the hub dataset; a file has none.

    Returns:
        At least one row.

    Raises:
        DataError: no such file or dataset, a line that is not a JSON object (with file and line number), no rows.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = list(_jsonl_rows(path))
    elif path.suffix in (".jsonl", ".json") or path.exists() or source.startswith((".", "/", "~")) or not source:
        raise DataError(
            f"{source or 'data source'}: no such file; expected a JSONL file or the name of a Hugging Face dataset"
        )
    else:
        rows = _hub_rows(source, split)
    if not rows:
        raise DataError(f"{source}: it is empty; expected at least one row")
    return rows


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number too long to be one
                raise DataError(f"{path}:{number}: broken line: {str(error).splitlines()[0]}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: got a JSON {type(row).__name__}, expected an object")
            yield row


def _hub_rows(name: str, split: str) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f'{name}: hub datasets need the "data" extra: pip install "ppo_jax[data]"') from error
    try:
        return datasets.load_dataset(name, split=split).to_list()
    except Exception as error:  # the library raises many types for "not found" and "no network"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{name}: no such file, and no such Hugging Face dataset could be loaded: {reason}") from error


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts ready to be batched, and what was done to the long ones."""

    tokens: np.ndarray  # [num, P] int32, padded left
    mask: np.ndarray  # [num, P] bool
    texts: list[str]  # as the reward function sees them
    columns: list[dict[str, Any]]  # the other columns of each row
    num_dropped: int  # longer than P tokens and left out
    num_cut: int  # longer than P tokens and cut


def load_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    pad_id: int,
    prompt_length: int,
    long_prompts: str = "drop",
    split: str = "train",
) -> PromptSet:
    """Reads, tokenizes and pads prompts.

    The prompt is the first of the columns `prompt` (text or chat messages), `messages` (chat) and `text` that a row
    has.

    Args:
        source: see `load_rows`.
        tokenizer: of the policy.
        pad_id: fills the left of shorter prompts.
        prompt_length: P, slots for a prompt.
        long_prompts: what happens to prompts of more than P tokens: "drop", "keep_start" (their first P tokens) or
            "keep_end" (their last P).
        split: see `load_rows`.

    Raises:
        DataError: a row without a prompt, an empty prompt, or nothing left.
    """
    check("long_prompts", long_prompts, long_prompts in LONG_PROMPTS, "one of " + ", ".join(LONG_PROMPTS))
    rows = load_rows(source, split)
    ids, texts, columns, num_dropped, num_cut = [], [], [], 0, 0
    for number, row in enumerate(rows, start=1):
        prompt, others = _take_prompt(row, f"{source}: row {number}")
        tokens = _encode(tokenizer, prompt, f"{source}: row {number}")
        if not tokens:
            raise DataError(f"{source}: row {number}: the prompt is empty; expected at least one token")
        text = prompt if isinstance(prompt, str) else render_chat(tokenizer, prompt)
        if len(tokens) > prompt_length:
            if long_prompts == "drop":
                num_dropped += 1
                continue
            num_cut += 1
            tokens = tokens[:prompt_length] if long_prompts == "keep_start" else tokens[-prompt_length:]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
        ids.append(tokens)
        texts.append(text)
        columns.append(others)
    if not ids:
        raise DataError(
            f"{source}: all {num_dropped} prompts are longer than prompt_length ({prompt_length} tokens); "
            "raise config.ppo.prompt_length or set config.long_prompts to keep_start or keep_end"
        )
    tokens, mask = pad(ids, prompt_length, pad_id, side="left")
    return PromptSet(tokens, mask, texts, columns, num_dropped, num_cut)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str | list, where: str) -> list[int]:
    try:
        return encode_prompt(tokenizer, prompt)
    except TokenizerError as error:
        raise TokenizerError(f"{where}: {error}") from error


def _take_prompt(row: dict[str, Any], where: str) -> tuple[str | list, dict[str, Any]]:
    for name in PROMPT_COLUMNS:
        if name in row:
            prompt = row[name]
            is_chat = isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt)
            if not isinstance(prompt, str) and not is_chat:
                raise DataError(
                    f"{where}: column {name!r}: got {type(prompt).__name__}, expected text or a list of chat messages"
                )
            if name == "messages" and is_chat and prompt[-1].get("role") == "assistant":
                prompt = prompt[:-1]  # a whole conversation; its last answer is what the policy is to find
            return prompt, {key: value for key, value in row.items() if key != name}
    raise DataError(f"{where}: got columns {', '.join(row) or 'none'}, expected one of {', '.join(PROMPT_COLUMNS)}")


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """Texts ready to be batched for supervised learning; fields as in `types.Examples`, over all rows."""

    tokens: np.ndarray  # [num, S] int32, padded right
    mask: np.ndarray  # [num, S] bool
    target_mask: np.ndarray  # [num, S] bool
    num_cut: int  # texts longer than S tokens, of which the end was left out


def load_examples(
    source: str, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, length: int, split: str = "train"
) -> ExampleSet:
    """Reads texts (`text`), or prompts with completions (`prompt`, `completion`), and ends each with EOS.

    With a prompt, only the completion and its EOS are targets.

    Args:
        source: see `load_rows`.
        tokenizer: of the model.
        special: pad and EOS.
        length: S, slots for a text; what is longer is cut at its end.
        split: see `load_rows`.

    Raises:
        DataError: a row with neither `text` nor `prompt` and `completion`.
    """
    ids, prompt_sizes = [], []
    for number, row in enumerate(load_rows(source, split), start=1):
        if isinstance(row.get("text"), str):
            prompt, text = "", row["text"]
        elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            prompt, text = row["prompt"], row["prompt"] + row["completion"]
        else:
            raise DataError(
                f"{source}: row {number}: got columns {', '.join(row) or 'none'}, expected text or prompt, completion"
            )
        where = f"{source}: row {number}"
        ids.append([*_encode(tokenizer, text, where), special.eos_ids[0]])
        prompt_sizes.append(len(_encode(tokenizer, prompt, where)) if prompt else 0)
    tokens, mask = pad([row[:length] for row in ids], length, special.pad_id, side="right")
    target_mask = mask & (np.arange(length)[None, :] >= np.array(prompt_sizes)[:, None])
    if not target_mask[:, 1:].any():
        raise DataError(
            f"{source}: no completion begins within {length} tokens, so there is nothing to learn; raise the length"
        )
    return ExampleSet(tokens, mask, target_mask, num_cut=sum(len(row) > length for row in ids))


def pad(rows: Sequence[Sequence[int]], length: int, pad_id: int, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Stacks token lists of at most `length` into (tokens `[num, length]` int32, mask bool), padded on "left" or
    "right".
    """
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, True
    return tokens, mask


def batch_indices(num_rows: int, batch_size: int, iteration: int, seed: int) -> np.ndarray:
    """Which rows iteration `iteration` uses: a pure function, so that a resumed run reads on where it stopped.

    The rows go by in a fresh random order each epoch; a batch may reach into the next epoch.

    Returns:
        `[batch_size]` int.
    """
    places = np.arange(iteration * batch_size, (iteration + 1) * batch_size)
    epochs = places // num_rows
    orders = {int(e): np.random.default_rng((seed, int(e))).permutation(num_rows) for e in np.unique(epochs)}
    return np.array([orders[int(e)][p % num_rows] for e, p in zip(epochs, places, strict=True)])
