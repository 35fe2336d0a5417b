"""The one place where items and judgements are: a SQLite file that several threads and processes use at once.

A write is one transaction, on the disk when the call returns: a kill at any moment loses nothing that was answered and
leaves nothing half done. The file must be on a local disk (SQLite's write-ahead log does not work over a network), and
a `Store` is not carried across a fork.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_jax.feedback.database import IS_FREE, JUDGEMENTS, NOT_JUDGED, Database, FeedbackError, utc
from ppo_jax.feedback.items import (
    MAX_COMMENT,
    Item,
    Judgement,
    Progress,
    Shown,
    check_item,
    check_name,
    check_text,
    check_verdict,
    item_of,
    judgement_of,
    shown_of,
)

__all__ = ["FeedbackError", "Item", "Judgement", "Progress", "Shown", "Store"]

# What `undo` withdraws: not what a file said about an item that nobody can be asked about.
LAST = """SELECT max(j.id) FROM judgements j JOIN items ON items.id = j.item
  WHERE j.annotator = :annotator AND j.undone IS NULL AND needed > 0"""


class Store:
    """Items, who sees which, and what was said about them.

    Safe to use from several threads; other processes open a `Store` of their own on the same file. Names of annotators
    lose the spaces around them. Every method raises `FeedbackError` when the file cannot be read or written (full
    disk, another process that writes for more than 30 s).

    Args:
        path: the SQLite file; it and its folders are made when missing.
        lease_s: for how long, in seconds, an item that was shown to one annotator is kept from others.

    Raises:
        FeedbackError: the file is no store, or of another version; it is left as it is.
    """

    def __init__(self, path: str | Path, lease_s: float = 900.0):
        self.path = Path(path)
        self._lease = datetime.timedelta(seconds=lease_s)
        self._db = Database(self.path)

    def close(self) -> None:
        """Lets go of the file; a store that nobody has any more is closed by itself."""
        self._db.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """Writes everything inside together or not at all; other threads and processes wait meanwhile."""
        return self._db.transaction()

    # Items

    def add_items(self, items: Sequence[Item]) -> int:
        """Adds what is not there yet (items are equal when their content is), so that filling can be repeated.

        Responses of an item must differ from each other; who samples them leaves out equal ones beforehand.

        Returns:
            How many were new.

        Raises:
            FeedbackError: an item that cannot be judged (with its number); then none is added.
        """
        for number, item in enumerate(items, start=1):
            try:
                check_item(item)
            except FeedbackError as error:
                raise FeedbackError(f"item {number} of {len(items)}: {error}") from error
        with self.transaction():
            added = sum(self._add(item) for item in items)
            self._spread_overlap()
        return added

    def _add(self, item: Item) -> bool:
        query = """INSERT INTO items (hash, kind, prompt, responses, sources, scale)
            VALUES (:hash, :kind, :prompt, :responses, :sources, :scale) ON CONFLICT (hash) DO NOTHING RETURNING id"""
        values = dataclasses.asdict(item) | {name: json.dumps(getattr(item, name)) for name in ("responses", "sources")}
        return bool(self._db.sql(query, hash=item.hash, **values))

    def item_id(self, item: Item) -> int:
        """The id of the item with this content.

        Raises:
            FeedbackError: it is not there.
        """
        row = self._db.row("SELECT id FROM items WHERE hash = :hash", hash=item.hash)
        if row is None:
            raise FeedbackError(f"item: got one that is not in {self.path}, expected one that was added")
        return row["id"]

    def set_overlap(self, share: float, annotators: int) -> None:
        """Has a part of the items judged by several people, the rest by one.

        Of each kind, round(share * items) are judged by `annotators`; which ones follows from their content. It holds
        for items that are added later too, and may be changed at any time.

        Args:
            share: 0 to 1.
            annotators: how many people judge an item of that part.
        """
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise FeedbackError(f"overlap: got share {share!r}, expected 0 to 1")
        if type(annotators) is not int or not 1 <= annotators <= 1000:
            raise FeedbackError(f"overlap: got {annotators!r} annotators, expected 1 to 1000")
        with self.transaction():
            self._db.sql("UPDATE overlap SET share = :share, annotators = :n", share=float(share), n=annotators)
            self._spread_overlap()

    def _spread_overlap(self) -> None:
        # Items without a scale hold scores from a file; nobody can be asked for another.
        self._db.sql(
            """UPDATE items SET needed = new.needed FROM (
              SELECT items.id, CASE
                WHEN kind = 'score' AND scale = 0 THEN 0
                WHEN row_number() OVER (PARTITION BY kind ORDER BY hash)
                  <= round(share * count(*) OVER (PARTITION BY kind)) THEN annotators
                ELSE 1 END AS needed
              FROM items, overlap) AS new
            WHERE new.id = items.id AND new.needed <> items.needed"""
        )

    # Showing and judging

    def next_item(self, annotator: str) -> Shown | None:
        """The item that this annotator judges next: one that they have not judged and that still needs judgements.

        It is kept from others for the time of the lease, which each call renews; after a reload, a restart of the
        server or in a second window it is the same item in the same order with the same form token. What was undone
        comes first. A lease that ran out lets others have the item, and the late judgement is taken all the same.

        Args:
            annotator: 1 to 100 characters.

        Returns:
            The item with its responses in a random order, which is recorded; None when there is nothing (left).
        """
        name = check_name(annotator)
        with self.transaction():
            now = _now()
            row = self._db.row(
                f"""SELECT items.*, s.id AS showing, s.token, s.places FROM showings s JOIN items ON items.id = s.item
                WHERE s.annotator = :annotator AND s.leased_until IS NOT NULL
                  AND (s.leased_until > :now OR {IS_FREE})
                ORDER BY s.id DESC LIMIT 1""",
                annotator=name,
                now=utc(now),
            )
            if row is not None:
                renew = "UPDATE showings SET leased_until = :until WHERE id = :id"
                self._db.sql(renew, until=utc(now + self._lease), id=row["showing"])
                return shown_of(row, row["token"], json.loads(row["places"]))
            fresh = f"SELECT * FROM items WHERE {IS_FREE} AND {NOT_JUDGED} ORDER BY id LIMIT 1"
            row = self._db.row(fresh, annotator=name, now=utc(now))
            if row is None:
                return None
            order = _shuffled(len(json.loads(row["responses"])))
            _, token = self._show(row["id"], name, order, utc(now), utc(now + self._lease))
            return shown_of(row, token, order)

    def judge(
        self,
        annotator: str,
        item_id: int,
        form_token: str,
        ranks: Sequence[int] | None = None,
        score: float | None = None,
        both_bad: bool = False,
        comment: str = "",
    ) -> Judgement:
        """Takes a judgement of what `next_item` showed. A form that comes twice is answered with its first judgement.

        Args:
            annotator: to whom it was shown.
            item_id: of the item that was shown.
            form_token: of the showing.
            ranks: K whole numbers in the order of the page, 1 = best, equal = tie; None with `score` or `both_bad`.
            score: for a "score" item, a whole number in 1..scale.
            both_bad: none of the responses is any good (no tie, and no ranks); for "compare" and "rank".
            comment: up to 10,000 characters.

        Returns:
            The judgement with ranks in the item's order. It may be another than the one given when the form came
            before, and may have been undone since.

        Raises:
            FeedbackError: nothing was written. An unknown form, one of another annotator or item, ranks or score that
                do not fit the item, a comment or name that is too long, an item that they have judged otherwise.
        """
        name = check_name(annotator)
        check_text("form", form_token)
        check_text("comment", comment, MAX_COMMENT)
        with self.transaction():
            showing = self._db.row("SELECT * FROM showings WHERE token = :token", token=form_token)
            if showing is None or showing["annotator"] != name:
                raise FeedbackError(f"form: got one that was not shown to {name}, expected one of their pages")
            if showing["item"] != item_id:
                raise FeedbackError(f"item: got {str(item_id)[:30]}, expected the one of the form")
            first = self._db.row(f"{JUDGEMENTS} WHERE j.showing = :showing", showing=showing["id"])
            if first is not None:
                return judgement_of(first)
            (row,) = self._db.sql("SELECT * FROM items WHERE id = :id", id=item_id)
            self._check_not_judged(name, item_id)
            ranks, score = check_verdict(item_of(row), ranks, score, both_bad)
            if ranks is not None:
                by_response = sorted(zip(json.loads(showing["places"]), ranks, strict=True))
                ranks = tuple(rank for _, rank in by_response)
            said = dict(score=score, both_bad=bool(both_bad), comment=comment, margin=0.0)
            return self._record(item_id, name, ranks, showing=showing["id"], **said)

    def add_judgement(
        self,
        item_id: int,
        annotator: str,
        ranks: Sequence[int] | None = None,
        score: float | None = None,
        both_bad: bool = False,
        comment: str = "",
        margin: float = 0.0,
        order: Sequence[int] | None = None,
        time: datetime.datetime | None = None,
    ) -> Judgement:
        """Takes a judgement that was not made on the page, for importers and simulated annotators.

        Args:
            item_id: of the item.
            annotator: who judged.
            ranks: K whole numbers in the ITEM's order.
            score: see `judge`; any finite number where the item has no scale.
            both_bad: see `judge`.
            comment: see `judge`.
            margin: for "compare": by how much the better is better, >= 0; 0 where it is not known.
            order: in which the annotator saw the responses; drawn when None.
            time: when it was judged; now when None.

        Raises:
            FeedbackError: nothing was written. As `judge`; an unknown item; this annotator has judged it already.
        """
        name = check_name(annotator)
        check_text("comment", comment, MAX_COMMENT)
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < math.inf:
            raise FeedbackError(f"margin: got {margin!r}, expected a number >= 0")
        with self.transaction():
            row = self._db.row("SELECT * FROM items WHERE id = :id", id=item_id)
            if row is None:
                raise FeedbackError(f"item: got {str(item_id)[:30]}, expected the id of an item")
            item = item_of(row)
            if margin and item.kind != "compare":
                raise FeedbackError(f"margin: got {margin}, expected none for a {item.kind} item")
            count = len(item.responses)
            order = _shuffled(count) if order is None else [int(place) for place in order]
            if sorted(order) != list(range(count)):
                raise FeedbackError(f"order: got {order}, expected each of 0 to {count - 1} once")
            self._check_not_judged(name, item_id)
            ranks, score = check_verdict(item, ranks, score, both_bad)
            moment = utc(time or _now())
            showing, _ = self._show(item_id, name, order, moment, None)
            said = dict(score=score, both_bad=bool(both_bad), comment=comment, margin=float(margin))
            return self._record(item_id, name, ranks, moment, showing=showing, **said)

    def has_judged(self, annotator: str, item_id: int) -> bool:
        """Whether a judgement of this annotator about the item counts."""
        query = "SELECT 1 FROM judgements WHERE item = :item AND annotator = :annotator AND undone IS NULL"
        return self._db.row(query, item=item_id, annotator=check_name(annotator)) is not None

    def _check_not_judged(self, name: str, item_id: int) -> None:
        if self.has_judged(name, item_id):
            raise FeedbackError(f"item {item_id}: {name} has judged it already; expected another item")

    def _show(self, item_id: int, name: str, order: Sequence[int], shown_at: str, until: str | None) -> tuple[int, str]:
        """Records a showing; gives its id and its form token."""
        token = secrets.token_urlsafe(16)
        places = json.dumps(list(order))
        values = dict(token=token, item=item_id, annotator=name, places=places, shown_at=shown_at, leased_until=until)
        return self._db.insert("showings", **values), token

    def _record(
        self, item_id: int, name: str, ranks: Sequence[int] | None, time: str | None = None, **values: Any
    ) -> Judgement:
        values |= dict(ranks=None if ranks is None else json.dumps(ranks), time=time or utc(_now()))
        judgement = self._db.insert("judgements", item=item_id, annotator=name, **values)
        mine = "item = :item AND annotator = :annotator AND leased_until IS NOT NULL"
        self._db.sql(f"UPDATE showings SET leased_until = NULL WHERE {mine}", item=item_id, annotator=name)
        (recorded,) = self._db.sql(f"{JUDGEMENTS} WHERE j.id = :id", id=judgement)
        return judgement_of(recorded)

    def undo(self, annotator: str, judgement_id: int | None = None) -> int | None:
        """Withdraws the latest judgement of an annotator, which stays in the table, and shows its item to them next.

        Args:
            annotator: whose.
            judgement_id: undoes only if it is the latest (see `Progress.last_judgement`), so that pressing twice undoes
                once; None undoes whatever is the latest.

        Returns:
            The id of the item; None when there was nothing to undo.
        """
        name = check_name(annotator)
        with self.transaction():
            last = self._db.row(f"{JUDGEMENTS} WHERE j.id = ({LAST})", annotator=name)
            if last is None or (judgement_id is not None and judgement_id != last["id"]):
                return None
            now = _now()
            self._db.sql("UPDATE judgements SET undone = :now WHERE id = :id", now=utc(now), id=last["id"])
            self._show(last["item"], name, json.loads(last["places"]), utc(now), utc(now + self._lease))
            return last["item"]

    # What there is

    def progress(self, annotator: str) -> Progress:
        """How far this annotator is, and all of them."""
        (row,) = self._db.sql(
            f"""SELECT
              (SELECT count(*) FROM judgements WHERE annotator = :annotator AND undone IS NULL) AS judged,
              (SELECT count(*) FROM items WHERE {IS_FREE} AND {NOT_JUDGED}) AS available,
              (SELECT coalesce(sum(min(judged, needed)), 0) FROM items) AS total_judged,
              (SELECT coalesce(sum(needed), 0) FROM items) AS total_needed,
              ({LAST}) AS last_judgement""",
            annotator=check_name(annotator),
            now=utc(_now()),
        )
        return Progress(**dict(row))

    def complete(self) -> bool:
        """Whether there are items and each has the judgements that it needs."""
        (row,) = self._db.sql(
            """SELECT EXISTS (SELECT 1 FROM items) AND NOT EXISTS (SELECT 1 FROM items WHERE judged < needed) AS yes"""
        )
        return bool(row["yes"])

    def pending(self, annotator: str) -> list[tuple[int, Item]]:
        """(id, item) of all that still needs judgements and that this annotator has not judged, leased or not."""
        name = check_name(annotator)
        rows = self._db.sql(f"SELECT * FROM items WHERE judged < needed AND {NOT_JUDGED} ORDER BY id", annotator=name)
        return [(row["id"], item_of(row)) for row in rows]

    def judgements(self, include_undone: bool = False) -> list[Judgement]:
        """All judgements in the order in which they were made."""
        condition = "" if include_undone else "WHERE j.undone IS NULL"
        return [judgement_of(row) for row in self._db.sql(f"{JUDGEMENTS} {condition} ORDER BY j.id")]


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _shuffled(count: int) -> list[int]:
    return secrets.SystemRandom().sample(range(count), count)
