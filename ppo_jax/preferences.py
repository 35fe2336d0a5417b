"""Judgements of responses as rows: pairs, rankings, choices and scores, read from files and the hub (host data)."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ppo_jax.data import DataError, load_rows
from ppo_jax.errors import InputError

FORMATS = {
    "pair": ("chosen", "rejected"),
    "ranking": ("prompt", "completions", "ranks"),
    "choice": ("prompt", "completions", "choice"),
    "score": ("prompt", "completion", "score"),
}
"""The columns by which a row is told; a pair has a `prompt` as well, unless its sides are whole texts."""

Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Judged:
    """What somebody said about the responses to one prompt: an order of K, or a score of one."""

    prompt: str
    responses: tuple[str, ...]  # they differ from each other
    ranks: tuple[int, ...] | None  # dense: 1 = best, equal = tie; a choice is 1 and 2, 2, ...; None with a score
    score: float | None
    margin: float = 0.0  # of a pair: by how much the chosen is better; 0 where it is not known
    annotator: str = ""
    time: str = ""  # ISO 8601, UTC, as it was given
    both_bad: bool = False  # of a ranking: none is any good; all ranks are 1


def read_judged(source: str, split: str = "train", render: Callable[[Messages], str] | None = None) -> list[Judged]:
    """Reads judgements; each row is of the format that its columns tell.

    - pair: `prompt` (or none: "", the sides are whole texts), `chosen`, `rejected`, perhaps `margin` >= 0
    - ranking: `prompt`, `completions` (K texts), `ranks` (K whole numbers, 1 = best, equal = tie), perhaps `both_bad`
    - choice: `prompt`, `completions` (K texts), `choice` (index of the best, counted from 0)
    - score: `prompt`, `completion`, `score`

    Each may have `annotator` and `time`; further columns are not read, and an empty (null) column counts as missing.

    Prompts and responses may be chats if `render` is given. A response that is a chat is one message of the assistant,
    alone or after those of the prompt; its content is the response.

    Args:
        source: see `ppo_jax.data.load_rows`.
        split: see there.
        render: the text of a conversation up to where the assistant answers (`ppo_jax.tokenizers.render_chat`).

    Returns:
        One for each row, in order.

    Raises:
        DataError: with the row's number (blank lines do not count): columns of no format or of two, a wrong type, equal
            responses, fewer than two completions, ranks that do not fit, a choice out of range, a score or margin that
            is not finite. See `load_rows` for what it refuses.
    """
    judged = []
    for number, row in enumerate(load_rows(source, split), start=1):
        try:
            judged.append(_judged(row, render))
        except InputError as error:
            raise DataError(f"{source}: row {number}: {error}") from error
    return judged


def _judged(row: Mapping[str, Any], render: Callable[[Messages], str] | None) -> Judged:
    row = {name: value for name, value in row.items() if value is not None}
    kind = _format(row)
    prompt, responses = _texts(row.get("prompt"), _responses(kind, row), render)
    who = {"annotator": _annotator(row.get("annotator", "")), "time": _time(row.get("time", ""))}
    if kind == "score":
        return Judged(prompt, responses, None, _number("score", row["score"]), **who)
    if len(responses) < 2:
        raise DataError(f"completions: got {len(responses)}, expected 2 or more")
    if len(set(responses)) < len(responses):
        raise DataError("chosen and rejected are equal" if kind == "pair" else "completions: two of them are equal")
    if kind == "pair":
        margin = _number("margin", row.get("margin", 0.0))
        if margin < 0:
            raise DataError(f"margin: got {margin}, expected a number >= 0")
        return Judged(prompt, responses, (1, 2), None, margin, **who)
    if kind == "choice":
        return Judged(prompt, responses, _chosen(row["choice"], len(responses)), None, **who)
    ranks, both_bad = _ranks(row["ranks"], len(responses)), row.get("both_bad", False)
    if not isinstance(both_bad, bool) or (both_bad and max(ranks) > 1):
        raise DataError(f"both_bad: got {_short(both_bad)}, expected true with equal ranks, or false")
    return Judged(prompt, responses, ranks, None, **who, both_bad=both_bad)


def _format(row: Mapping[str, Any]) -> str:
    found = [name for name, columns in FORMATS.items() if all(column in row for column in columns)]
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in FORMATS.items())
    expected = f"expected those of one of: {known}" if not found else f"which are those of {' and '.join(found)}"
    columns = ", ".join([*row][:10]) + ", ..." * (len(row) > 10)
    raise DataError(f"got columns {columns[:200] or 'none'}, {expected}")


def _responses(kind: str, row: Mapping[str, Any]) -> list[Any]:
    if kind == "pair":
        return [row["chosen"], row["rejected"]]
    if kind == "score":
        return [row["completion"]]
    if not isinstance(row["completions"], list):
        raise DataError(f"completions: got {_short(row['completions'])}, expected a list")
    return row["completions"]


def _texts(prompt: Any, responses: list[Any], render: Callable[[Messages], str] | None) -> tuple[str, tuple[str, ...]]:
    """The prompt and the responses as text, chats rendered."""
    for value in responses if prompt is None else [prompt, *responses]:
        if not isinstance(value, str):
            _check_messages(value)
            if render is None:
                raise DataError("got chat messages, expected texts (a tokenizer's chat template can make them texts)")
    are_chats = {isinstance(response, list) for response in responses}
    if len(are_chats) > 1:
        raise DataError("some responses are texts and some are chats, expected one kind")
    if True in are_chats:
        prompt, responses = _before(prompt, responses), [chat[-1]["content"] for chat in responses]
    text = render(prompt) if render and prompt and isinstance(prompt, list) else prompt or ""
    return _unicode("prompt", text), tuple(_unicode("response", response) for response in responses)


def _before(prompt: str | Messages | None, chats: list[Messages]) -> Messages:
    """The messages that the last of each chat answers."""
    if any(not chat or chat[-1]["role"] != "assistant" for chat in chats):
        raise DataError("a response that is a chat does not end with a message of the assistant")
    before = chats[0][:-1]
    if any(chat[:-1] != before for chat in chats):
        raise DataError("the chats differ before their last message, expected one answer each to the same messages")
    if isinstance(prompt, str) and (not before or before[-1]["content"] != prompt):
        raise DataError("the prompt is text and the responses are chats that do not hold it, expected both of one kind")
    if isinstance(prompt, list) and before and before != prompt:
        raise DataError("the responses are chats that begin with other messages than the prompt")
    return prompt if isinstance(prompt, list) else before


def _check_messages(value: Any) -> None:
    is_chat = isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in value
    )
    if not is_chat:
        raise DataError(f"got {_short(value)}, expected text or a list of chat messages (role and content, as text)")


def _unicode(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can hold
        raise DataError(f"{name}: it holds text that is not Unicode: {error.reason}") from error
    return text


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:  # whole numbers can be larger
        raise DataError(f"{name}: got {_short(value)}, expected a finite number")
    return float(value)


def _ranks(value: Any, count: int) -> tuple[int, ...]:
    fits = isinstance(value, list) and len(value) == count and all(type(rank) is int and rank >= 1 for rank in value)
    if not fits:
        raise DataError(f"ranks: got {_short(value)}, expected {count} whole numbers >= 1, one for each completion")
    places = sorted(set(value))  # (2, 7, 2) is (1, 2, 1)
    return tuple(1 + places.index(rank) for rank in value)


def _chosen(value: Any, count: int) -> tuple[int, ...]:
    if type(value) is not int or not 0 <= value < count:
        raise DataError(f"choice: got {_short(value)}, expected a whole number from 0 to {count - 1}")
    return tuple(1 if index == value else 2 for index in range(count))


def _annotator(value: Any) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise DataError(f"annotator: got {_short(value)}, expected a name or a number")
    return _unicode("annotator", str(value))


def _time(value: Any) -> str:
    text = value.isoformat() if hasattr(value, "isoformat") else value  # Parquet can hold times
    if not isinstance(text, str):
        raise DataError(f"time: got {_short(value)}, expected text (ISO 8601, UTC)")
    return _unicode("time", text)


def _short(value: Any, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
