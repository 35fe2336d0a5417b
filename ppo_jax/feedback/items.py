"""What is judged, how it is shown and what was said about it: the records of the store."""

import dataclasses
import hashlib
import json
import sqlite3
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

from ppo_jax.feedback.database import FeedbackError

KINDS = ("compare", "rank", "score")
MAX_NAME = 100  # characters of an annotator's name
MAX_COMMENT = 10_000  # characters
MAX_SCALE = 1000


@dataclasses.dataclass(frozen=True)
class Item:
    """Something to judge: the better of two responses ("compare"), an order of K ("rank"), or one on a scale ("score").

    Responses of one item differ from each other: between equal ones there is nothing to choose.
    """

    kind: str
    prompt: str
    responses: tuple[str, ...]
    sources: tuple[str, ...] = ()  # who wrote each response; never shown
    scale: int = 0  # a "score" item is given 1..scale; 0: its scores come from a file, and nobody is asked

    @property
    def hash(self) -> str:
        """SHA-256 of the content: items are equal when these are."""
        return _sha256([self.kind, self.prompt, list(self.responses), list(self.sources), self.scale])

    @property
    def shown_hash(self) -> str:
        """SHA-256 of what an annotator can see: the content without who wrote it."""
        return _sha256([self.kind, self.prompt, list(self.responses), self.scale])


def _sha256(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Shown:
    """An item as one annotator sees it."""

    item_id: int
    kind: str
    prompt: str
    responses: tuple[str, ...]  # in the order of the page
    order: tuple[int, ...]  # order[place on the page] = index in the item
    form_token: str  # of this showing; answers one judgement
    scale: int


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What an annotator said about an item."""

    id: int
    item_id: int
    item: Item
    annotator: str
    ranks: tuple[int, ...] | None  # in the item's order, dense, 1 = best, equal = tie; None for scores
    score: float | None
    both_bad: bool  # none of the responses is any good; ranks are all 1, and yet it is no tie
    comment: str
    margin: float  # by how much the better is better, where a file said so; else 0
    order: tuple[int, ...]  # order[place on the page] = index in the item
    shown_at: str  # ISO 8601, UTC
    time: str  # ISO 8601, UTC
    undone: str | None  # when it was withdrawn; None while it counts

    @property
    def kind(self) -> str:
        """Of the item."""
        return self.item.kind


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far one annotator and the whole store are, in judgements that count."""

    judged: int  # by this annotator
    available: int  # items that need a judgement and that this annotator can be shown now
    total_judged: int  # by all, of those that are needed
    total_needed: int
    last_judgement: int | None  # the id that `undo` would withdraw


def item_of(row: sqlite3.Row) -> Item:
    """From a row that holds the columns of `items`."""
    responses, sources = tuple(json.loads(row["responses"])), tuple(json.loads(row["sources"]))
    return Item(row["kind"], row["prompt"], responses, sources, row["scale"])


def shown_of(row: sqlite3.Row, token: str, order: Sequence[int]) -> Shown:
    """From a row that holds the columns of `items`, and how it is shown."""
    item = item_of(row)
    responses = tuple(item.responses[index] for index in order)
    return Shown(row["id"], item.kind, item.prompt, responses, tuple(order), token, item.scale)


def judgement_of(row: sqlite3.Row) -> Judgement:
    """From a row of `database.JUDGEMENTS`."""
    return Judgement(
        id=row["id"],
        item_id=row["item"],
        item=item_of(row),
        annotator=row["annotator"],
        ranks=None if row["ranks"] is None else tuple(json.loads(row["ranks"])),
        score=row["score"],
        both_bad=bool(row["both_bad"]),
        comment=row["comment"],
        margin=row["margin"],
        order=tuple(json.loads(row["places"])),
        shown_at=row["shown_at"],
        time=row["time"],
        undone=row["undone"],
    )


def check_item(item: Item) -> None:
    """Refuses an item that cannot be judged.

    Raises:
        FeedbackError: names the field.
    """
    if item.kind not in KINDS:
        raise FeedbackError(f"item: got kind {item.kind!r}, expected one of {', '.join(KINDS)}")
    if not isinstance(item.responses, tuple) or not isinstance(item.sources, tuple):
        raise FeedbackError(f"{item.kind} item: responses and sources: expected tuples of texts")
    for text in (item.prompt, *item.responses, *item.sources):
        check_text(f"{item.kind} item", text)
    count = len(item.responses)
    least, most = {"compare": (2, 2), "rank": (2, count), "score": (1, 1)}[item.kind]
    if not least <= count <= most:
        wanted = f"{least} or more" if item.kind == "rank" else least
        raise FeedbackError(f"{item.kind} item: got {count} responses, expected {wanted}")
    if len(set(item.responses)) < count:
        raise FeedbackError(f"{item.kind} item: two of its responses are equal, expected different ones")
    if item.sources and len(item.sources) != count:
        raise FeedbackError(f"{item.kind} item: got {len(item.sources)} sources, expected none or {count}")
    can_be_asked = item.kind == "score" and item.scale in range(2, MAX_SCALE + 1)
    if type(item.scale) is not int or (item.scale and not can_be_asked):
        wanted = f"0 or 2 to {MAX_SCALE}" if item.kind == "score" else 0
        raise FeedbackError(f"{item.kind} item: got scale {item.scale!r}, expected {wanted}")


def check_text(name: str, text: Any, longest: int | None = None) -> str:
    """The text, if it is one that can be written as UTF-8 and is not too long.

    Raises:
        FeedbackError: otherwise.
    """
    if not isinstance(text, str):
        raise FeedbackError(f"{name}: got {type(text).__name__}, expected text")
    if longest is not None and len(text) > longest:
        raise FeedbackError(f"{name}: got {len(text):,} characters, expected {longest:,} at most")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can hold
        raise FeedbackError(f"{name}: got text that is not Unicode ({error.reason}), expected UTF-8") from error
    return text


def check_name(annotator: Any) -> str:
    """The name of an annotator without spaces around it, in one spelling of its accents.

    Raises:
        FeedbackError: empty, longer than 100 characters, or with characters that cannot be seen.
    """
    name = unicodedata.normalize("NFC", check_text("annotator", annotator, MAX_NAME)).strip()
    if not name or not name.isprintable():
        raise FeedbackError(f"annotator: got {annotator!r}, expected 1 to {MAX_NAME} visible characters")
    return name


def check_verdict(
    item: Item, ranks: Sequence[int] | None, score: float | None, both_bad: bool
) -> tuple[tuple[int, ...] | None, float | None]:
    """(dense ranks, None) or (None, score): what was said, if it fits the item.

    Raises:
        FeedbackError: ranks for a score item or the other way round, none or more than one of ranks, score, both bad; a
            wrong value.
    """
    if item.kind == "score":
        if ranks is not None or both_bad:
            raise FeedbackError("score item: got ranks or both_bad, expected a score only")
        return None, _score(item.scale, score)
    if score is not None:
        raise FeedbackError(f"{item.kind} item: got a score, expected ranks or both_bad")
    if both_bad and ranks is not None:
        raise FeedbackError(f"{item.kind} item: got ranks and both_bad, expected one of them")
    return (1,) * len(item.responses) if both_bad else _dense(len(item.responses), ranks), None


def _dense(count: int, ranks: Any) -> tuple[int, ...]:
    given = list(ranks) if isinstance(ranks, list | tuple) else []
    if len(given) != count or any(type(rank) is not int or rank < 1 for rank in given):
        raise FeedbackError(f"ranks: got {_short(ranks)}, expected {count} whole numbers, 1 = best, equal = tie")
    places = sorted(set(given))
    return tuple(1 + places.index(rank) for rank in given)


def _score(scale: int, score: Any) -> float:
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if scale:
        if not is_number or score not in range(1, scale + 1):
            raise FeedbackError(f"score: got {_short(score)}, expected a whole number from 1 to {scale}")
    elif not is_number or not abs(score) <= sys.float_info.max:
        raise FeedbackError(f"score: got {_short(score)}, expected a finite number")
    return float(score)


def _short(value: Any, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else text[:width] + "..."
