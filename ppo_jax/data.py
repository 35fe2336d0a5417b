"""Data in: rows of JSONL and Parquet files or Hugging Face datasets, prompts padded for a model, the order of rows."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import itertools
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_jax.errors import InputError, check
from ppo_jax.tokenizers import TokenizerError, encode_pieces, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_SUFFIXES = (".jsonl", ".json", ".gz", ".parquet")
MAX_LINE_BYTES = 2**20  # of a JSONL file: a tokenizer takes 200 times as much memory, and cannot be interrupted
LONG_PROMPTS = ("drop", "keep_start", "keep_end")
PROMPT_COLUMNS = ("prompt", "messages", "text")


class DataError(InputError):
    """Data that cannot be used; the message names the source and, where there is one, the line."""


def load_rows(source: str, split: str = "train") -> list[dict[str, Any]]:
    """All rows of a JSONL or Parquet file, or of a Hugging Face dataset.

    Args:
        source: path of a JSONL file (which may be gzipped: `.gz`) or of a `.parquet` file; or `name` / `org/name` of a
            dataset on the hub, or a folder that holds one.
        split: of the dataset; a file has none.

    Returns:
        At least one row.

    Raises:
        DataError: no such file or dataset; a line that is not a JSON object of strict JSON in UTF-8, or is longer than
            1 MiB (with file and line number); a damaged file; no rows.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = _parquet_rows(path) if path.suffix == ".parquet" else list(_jsonl_rows(path))
    elif source and path.is_dir():
        rows = _dataset_rows(str(path), split)
    elif path.suffix in FILE_SUFFIXES or path.exists() or source.startswith((".", "/", "~")) or not source:
        raise DataError(
            f"{source or 'data source'}: no such file; "
            "expected a JSONL or Parquet file, or the name of a Hugging Face dataset"
        )
    else:
        rows = _dataset_rows(source, split)
    if not rows:
        raise DataError(f"{source}: it is empty; expected at least one row")
    return rows


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # a byte order mark may stand at the beginning
            row = json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_each_once)
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number too long to be one
            raise DataError(f"{path}:{number}: broken line: {_reason(error)}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: got a JSON {type(row).__name__}, expected an object")
        yield row


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is larger than any number")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return row


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, of which none is read that does not fit into memory."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number in itertools.count(1):
            try:
                line = file.readline(MAX_LINE_BYTES + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path}:{number}: cannot be read: {_reason(error)}") from error
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}:{number}: line of more than {MAX_LINE_BYTES >> 20} MiB, expected shorter ones")
            if not line:
                return
            yield line


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f'{path}: Parquet files need the "data" extra: pip install -e ".[data]"') from error
    try:
        with parquet.ParquetFile(path) as file:
            return file.read().to_pylist()
    except Exception as error:  # the library raises many types for a damaged file
        raise DataError(f"{path}: it cannot be read as Parquet: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _dataset_rows(name: str, split: str) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f'{name}: hub datasets need the "data" extra: pip install -e ".[data]"') from error
    try:
        return datasets.load_dataset(name, split=split).to_list()
    except Exception as error:  # the library raises many types for "not found" and "no network"
        told = f"no such file, and no such Hugging Face dataset could be loaded: {_reason(error)}"
        raise DataError(f"{name}: {told}") from error


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
        where = f"{source}: row {number}"
        prompt, others = take_prompt(row, where)
        with told_at(where):
            text = prompt if isinstance(prompt, str) else render_chat(tokenizer, prompt)
            (tokens,) = encode_pieces(tokenizer, [text], is_chat=not isinstance(prompt, str))
        if not tokens:
            raise DataError(f"{where}: the prompt is empty; expected at least one token")
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


@contextlib.contextmanager
def told_at(where: str) -> Iterator[None]:
    """Puts the place of a row in front of what its text is refused for."""
    try:
        yield
    except TokenizerError as error:
        raise TokenizerError(f"{where}: {error}") from error


def as_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Chat messages as a template expects them.

    Fields that are null are left out: Parquet fills each message of a column up with the fields of all others.

    Raises:
        DataError: not a list of messages, each with a role and content (or calls of tools).
    """
    if not (isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)):
        raise DataError(f"{where}: got {type(value).__name__}, expected text or a list of chat messages")
    turns = [{name: field for name, field in turn.items() if field is not None} for turn in value]
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn.get("role"), str) or not ("content" in turn or "tool_calls" in turn):
            found = ", ".join(turn) or "nothing"
            raise DataError(f"{where}: message {number}: got {found}, expected role and content")
    return turns


def take_prompt(row: dict[str, Any], where: str) -> tuple[str | list, dict[str, Any]]:
    """The prompt of a row, and its other columns.

    Raises:
        DataError: no prompt, or one that is neither text nor chat messages.
    """
    for name in PROMPT_COLUMNS:
        if name in row:
            prompt = row[name]
            if not isinstance(prompt, str):
                prompt = as_messages(prompt, f"{where}: column {name!r}")
                if name == "messages" and prompt[-1]["role"] == "assistant":
                    prompt = prompt[:-1]  # a whole conversation; its last answer is what the policy is to find
                    if not prompt:
                        raise DataError(f"{where}: column {name!r}: got an answer only, expected what it answers")
            return prompt, {key: value for key, value in row.items() if key != name}
    raise DataError(f"{where}: got columns {', '.join(row) or 'none'}, expected one of {', '.join(PROMPT_COLUMNS)}")


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
