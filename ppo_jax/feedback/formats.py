"""Judgements out of the store into files that others read, and out of such files into the store."""

import datetime
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.errors import InputError
from ppo_jax.feedback.database import utc
from ppo_jax.feedback.store import FeedbackError, Item, Judgement, Store
from ppo_jax.metrics import atomic_write
from ppo_jax.preferences import Judged, read_judged

Rows = Iterator[dict[str, Any]]


def _said(one: Judgement) -> dict[str, Any]:
    return {"annotator": one.annotator, "time": one.time, "comment": one.comment}


def _pairs(one: Judgement) -> Rows:
    ranks = one.ranks or ()
    for better, worse in itertools.permutations(range(len(ranks)), 2):
        if ranks[better] < ranks[worse]:
            sides = {"chosen": one.item.responses[better], "rejected": one.item.responses[worse]}
            known = {"margin": one.margin} if one.margin else {}
            yield {"prompt": one.item.prompt, **sides, **known, **_said(one)}


def _rankings(one: Judgement) -> Rows:
    if one.ranks is not None:
        order = {"completions": list(one.item.responses), "ranks": list(one.ranks), "both_bad": one.both_bad}
        yield {"prompt": one.item.prompt, **order, **_said(one)}


def _choices(one: Judgement) -> Rows:
    if one.ranks is not None and one.ranks.count(1) == 1:
        best = {"completions": list(one.item.responses), "choice": one.ranks.index(1)}
        yield {"prompt": one.item.prompt, **best, **_said(one)}


def _scores(one: Judgement) -> Rows:
    if one.score is not None:
        yield {"prompt": one.item.prompt, "completion": one.item.responses[0], "score": one.score, **_said(one)}


EXPORTS: dict[str, Callable[[Judgement], Rows]] = {
    "pairs": _pairs,
    "rankings": _rankings,
    "choices": _choices,
    "scores": _scores,
}
"""The kinds of export, and the rows that a judgement gives in each."""


def export(store: Store, kind: str) -> list[dict[str, Any]]:
    """The judgements that count, as rows, in the order in which they were made.

    Each row has `prompt`, `annotator`, `time` (ISO 8601, UTC), `comment` and:

    - pairs: `chosen`, `rejected`: the better and the worse of a comparison, and of a ranking of K each such pair; a tie
      and "both bad" give none. `margin` where a file that was imported said it: nobody is asked for it on the page.
    - rankings: `completions`, `ranks` (1 = best, equal = tie), `both_bad`; comparisons are rankings of two.
    - choices: `completions`, `choice` (index, from 0) of comparisons and rankings that have one best response.
    - scores: `completion`, `score`.

    Args:
        store: the store.
        kind: one of `EXPORTS`.

    Raises:
        FeedbackError: another kind.
    """
    if kind not in EXPORTS:
        raise FeedbackError(f"export: got kind {kind!r}, expected one of {', '.join(EXPORTS)}")
    return [row for one in store.judgements() for row in EXPORTS[kind](one)]


def write_export(store: Store, path: str | Path, kind: str) -> int:
    """Writes an export as JSON Lines; after a crash the old file is there or the new one, never a part.

    Args:
        store: the store.
        path: a `.jsonl` file; its folders are made when missing.
        kind: see `export`.

    Returns:
        How many rows.

    Raises:
        FeedbackError: another kind, another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise FeedbackError(f"export: got {path}, expected the name of a .jsonl file")
    rows = export(store, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    except OSError as error:
        raise FeedbackError(f"export {path}: cannot be written: {error}") from error
    return len(rows)


class Imported(NamedTuple):
    """What an import did."""

    rows: int
    items: int  # new ones
    judgements: int  # new ones
    repeated: int  # rows left out: their annotator has judged the item, here or in an earlier row


def import_rows(store: Store, source: str, split: str = "train") -> Imported:
    """Takes the judgements of a file or dataset into the store: all of it or, with any error, nothing.

    A pair becomes a comparison, a ranking or choice of K > 2 a ranking (the best before all others), a score an item
    without a scale, which nobody is asked about. Who judged comes from the row, or is "imported"; when it was judged
    as well, or is now. An annotator judges an item once: a file that is imported twice changes nothing, and of rows
    that say different things about the same item under one name the first counts.

    Two responses are put into an order that does not tell the better one, so that pairs of several annotators meet in
    one item and their agreement can be measured.

    Args:
        store: the store. Others wait while it is filled, about 10 s for 100,000 rows.
        source: see `ppo_jax.preferences.read_judged`; texts, no chats.
        split: see there.

    Returns:
        What was done.

    Raises:
        DataError: see `read_judged`.
        FeedbackError: a name or time that cannot be used; with the row's number.
    """
    judged = read_judged(source, split)
    items = [_item(one) for one in judged]
    with store.transaction():
        num_items = store.add_items(items)
        num_judgements = 0
        for number, (one, item) in enumerate(zip(judged, items, strict=True), start=1):
            try:
                num_judgements += _add(store, one, item)
            except InputError as error:
                raise FeedbackError(f"{source}: row {number}: {error}") from error
    return Imported(len(judged), num_items, num_judgements, len(judged) - num_judgements)


def _item(one: Judged) -> Item:
    """What was judged."""
    if one.ranks is None:
        return Item("score", one.prompt, one.responses)
    if len(one.responses) > 2:
        return Item("rank", one.prompt, one.responses)
    responses = sorted(one.responses, key=lambda text: hashlib.sha256(text.encode()).digest())
    return Item("compare", one.prompt, tuple(responses))


def _add(store: Store, one: Judged, item: Item) -> bool:
    """Adds one judgement, unless it is there."""
    annotator, item_id, time = one.annotator or "imported", store.item_id(item), _moment(one.time)
    if store.has_judged(annotator, item_id):
        return False
    said: dict[str, Any] = {"score": one.score, "both_bad": one.both_bad, "margin": one.margin}
    if one.ranks is not None and not one.both_bad:
        rank_of = dict(zip(one.responses, one.ranks, strict=True))
        said["ranks"] = [rank_of[response] for response in item.responses]
    store.add_judgement(item_id, annotator, time=time, **said)
    return True


def _moment(text: str) -> datetime.datetime | None:
    if not text:
        return None
    try:
        moment = datetime.datetime.fromisoformat(text)
        utc(moment)  # a time zone can move it out of the calendar
    except (ValueError, OverflowError) as error:
        raise FeedbackError(f"time: got {text[:60]!r}, expected ISO 8601, as 2026-01-31T12:00:00+00:00") from error
    return moment
