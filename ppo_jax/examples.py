"""Texts to learn from: which of their tokens are targets, and their place in rows of one length."""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_jax.data import DataError, as_messages, load_rows, told_at
from ppo_jax.tokenizers import SpecialTokens, encode_pieces, encode_prompt, render_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Texts:
    """Tokenized texts, each of at least one target, and what was done to the long ones."""

    tokens: list[np.ndarray]  # each [n] int32
    target_masks: list[np.ndarray]  # each [n] bool: tokens that the model is to predict
    num_cut: int  # were longer, and lost their end
    num_dropped: int  # had no target, or none before the cut, and were left out

    def __len__(self) -> int:
        """How many there are."""
        return len(self.tokens)

    def __getitem__(self, where: slice) -> Texts:
        """Some of them."""
        return dataclasses.replace(self, tokens=self.tokens[where], target_masks=self.target_masks[where])


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """Texts in rows of one length; fields as in `types.Examples`, over all rows."""

    tokens: np.ndarray  # [num, S] int32, padded right
    segments: np.ndarray  # [num, S] int32: which text of its row, from 1; 0 is padding
    target_mask: np.ndarray  # [num, S] bool
    num_cut: int  # of the texts: see `Texts`
    num_dropped: int

    @property
    def num_texts(self) -> int:
        """How many texts the rows hold."""
        return int(self.segments.max(axis=1).sum())

    @property
    def filled(self) -> float:
        """The share of slots that are no padding."""
        return float(np.mean(self.segments > 0))


def load_examples(
    source: str, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, length: int, split: str = "train"
) -> Texts:
    """Reads and tokenizes texts to learn from. A row is the first of these that it has all columns of:

    - `prompt` and `completion`, both text or both chat messages: the completion and its EOS are targets;
    - `messages`, a conversation: every answer of the assistant is a target, up to the token that ends its turn;
    - `text`: all of it and an EOS are targets.

    A response that contains an EOS ends there, as it would in sampling; any other gets one.

    Args:
        source: see `load_rows`.
        tokenizer: of the model.
        special: pad and EOS.
        length: most tokens of a text; what is longer is cut at its end.
        split: see `load_rows`.

    Raises:
        DataError: a row with other columns, or no row with a target within `length` tokens.
        TokenizerError: text or messages that cannot be encoded; see `render_turns`.
    """
    texts, num_cut, num_dropped = [], 0, 0
    for number, row in enumerate(load_rows(source, split), start=1):
        where = f"{source}: row {number}"
        with told_at(where):
            ids, targets = _tokenize(row, tokenizer, special.eos_ids, where)
        if not any(targets[1:length]):  # nothing precedes the first token to predict it from
            num_dropped += 1
        else:
            num_cut += len(ids) > length
            texts.append((np.array(ids[:length], np.int32), np.array(targets[:length], bool)))
    if not texts:
        raise DataError(
            f"{source}: no completion begins within {length} tokens, so there is nothing to learn; raise the length"
        )
    tokens, target_masks = zip(*texts, strict=True)
    return Texts(list(tokens), list(target_masks), num_cut, num_dropped)


def _tokenize(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, eos_ids: tuple[int, ...], where: str
) -> tuple[list[int], list[bool]]:
    """Ids of a row's text, and which of them are targets."""
    prompt, completion, messages, text = (row.get(name) for name in ("prompt", "completion", "messages", "text"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return _mark_answers(encode_pieces(tokenizer, [prompt, completion], is_chat=False), eos_ids)
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = as_messages(prompt, f"{where}: prompt"), as_messages(completion, f"{where}: completion")
        turns = render_turns(tokenizer, before + after, start=len(before))
    elif isinstance(messages, list):
        turns = render_turns(tokenizer, as_messages(messages, f"{where}: messages"))
    elif isinstance(text, str):
        ids = encode_prompt(tokenizer, text)
        ids = ids if ids and ids[-1] in eos_ids else [*ids, eos_ids[0]]
        return ids, [True] * len(ids)
    else:
        found = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
        raise DataError(
            f"{where}: got columns {found or 'none'}, "
            "expected text, prompt and completion (both text or both chat messages), or messages"
        )
    return _mark_answers(encode_pieces(tokenizer, turns, is_chat=True), eos_ids)


def _mark_answers(pieces: Sequence[list[int]], eos_ids: tuple[int, ...]) -> tuple[list[int], list[bool]]:
    """Joins what was encoded in turn before and in answers. An answer is a target up to its first EOS; the text ends
    with that of the last answer, which gets one if it has none.
    """
    ids: list[int] = []
    targets: list[bool] = []
    for number, piece in enumerate(pieces, start=1):
        is_answer, is_last = number % 2 == 0, number == len(pieces)
        end = next((i for i, token in enumerate(piece, start=1) if token in eos_ids), 0) if is_answer else 0
        if is_last:
            piece = piece[:end] if end else [*piece, eos_ids[0]]
        ids += piece
        targets += [is_answer and (i < end or not end) for i in range(len(piece))]
    return ids, targets


def make_rows(texts: Texts, length: int, pad_id: int, pack: bool) -> ExampleSet:
    """Puts texts into rows.

    Args:
        texts: of at most `length` tokens each.
        length: S.
        pad_id: fills the rest of a row.
        pack: as many texts to a row as fit (`pack_sizes`), instead of one.

    Returns:
        The rows; without packing, row i is text i.
    """
    sizes = [len(tokens) for tokens in texts.tokens]
    rows = pack_sizes(sizes, length) if pack else [[i] for i in range(len(texts))]
    tokens = np.full((len(rows), length), pad_id, np.int32)
    segments, target_mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row, start=1):
            where = (number, slice(start, start := start + sizes[i]))
            tokens[where], segments[where], target_mask[where] = texts.tokens[i], segment, texts.target_masks[i]
    return ExampleSet(tokens, segments, target_mask, texts.num_cut, texts.num_dropped)


def pack_sizes(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which texts share a row: the longest first, each into the fullest row that still has room, or a new one.

    O(n log n) for n texts (and a bounded length): rows are found by their room, of which there are `length` values.

    Args:
        sizes: tokens of each text, at most `length`.
        length: tokens of a row.

    Returns:
        Indices into `sizes`, each once, by row; at most 11/9 of the fewest rows that could do, and 4.

    Source: best fit decreasing: Johnson, Demers, Ullman, Garey and Graham 1974, SIAM J. Comput. 3(4).
    """
    rows: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # room -> rows
    rooms: list[int] = []  # the keys of `with_room` that have rows, rising
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect.bisect_left(rooms, sizes[i])
        if place == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        rows[row].append(i)
        room -= sizes[i]
        if not with_room[room]:
            bisect.insort(rooms, room)
        with_room[room].append(row)
    return rows
