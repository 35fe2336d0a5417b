"""The SQLite file under the store: its tables, how it is opened, and what is refused."""

import contextlib
import datetime
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppo_jax.errors import InputError

APPLICATION_ID = 0x70706F6A  # "ppoj", in the header of the file: it is one of ours
VERSION = 1  # of the tables below, in the header as well
BUSY_S = 30.0  # how long a write waits for another process's

# Judgements are never deleted: undoing one dates it. Of the others there is one for an item and annotator at most, and
# one for a showing, which is what makes a second press of the same button count for nothing. Triggers count the
# judgements of an item, so that finding the next one does not read those that are done.
TABLES = """
CREATE TABLE items (
  id INTEGER PRIMARY KEY,
  hash TEXT NOT NULL UNIQUE,
  needed INTEGER NOT NULL DEFAULT 1,
  judged INTEGER NOT NULL DEFAULT 0,
  kind TEXT NOT NULL CHECK (kind IN ('compare', 'rank', 'score')),
  scale INTEGER NOT NULL,
  prompt TEXT NOT NULL,
  responses TEXT NOT NULL,
  sources TEXT NOT NULL
) STRICT;

CREATE INDEX counts ON items (needed, judged);

CREATE INDEX unfinished ON items (id) WHERE judged < needed;

CREATE TABLE overlap (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  share REAL NOT NULL CHECK (share BETWEEN 0 AND 1),
  annotators INTEGER NOT NULL CHECK (annotators >= 1)
) STRICT;

INSERT INTO overlap VALUES (1, 0, 1);

CREATE TABLE showings (
  id INTEGER PRIMARY KEY,
  token TEXT NOT NULL UNIQUE,
  item INTEGER NOT NULL REFERENCES items (id),
  annotator TEXT NOT NULL,
  places TEXT NOT NULL,
  shown_at TEXT NOT NULL,
  leased_until TEXT
) STRICT;

CREATE INDEX open_showings ON showings (item, annotator) WHERE leased_until IS NOT NULL;

CREATE TABLE judgements (
  id INTEGER PRIMARY KEY,
  showing INTEGER NOT NULL UNIQUE REFERENCES showings (id),
  item INTEGER NOT NULL REFERENCES items (id),
  annotator TEXT NOT NULL,
  ranks TEXT,
  score REAL,
  both_bad INTEGER NOT NULL CHECK (both_bad IN (0, 1)),
  margin REAL NOT NULL CHECK (margin >= 0),
  comment TEXT NOT NULL,
  time TEXT NOT NULL,
  undone TEXT,
  CHECK ((ranks IS NULL) <> (score IS NULL))
) STRICT;

CREATE UNIQUE INDEX live_judgements ON judgements (item, annotator) WHERE undone IS NULL;

CREATE INDEX by_annotator ON judgements (annotator) WHERE undone IS NULL;

CREATE TRIGGER count_judgement AFTER INSERT ON judgements WHEN NEW.undone IS NULL
BEGIN UPDATE items SET judged = judged + 1 WHERE id = NEW.item; END;

CREATE TRIGGER count_undoing AFTER UPDATE OF undone ON judgements WHEN OLD.undone IS NULL AND NEW.undone IS NOT NULL
BEGIN UPDATE items SET judged = judged - 1 WHERE id = NEW.item; END
"""

# Parts of queries over `items`, with the parameters :annotator and :now: whether this annotator has not judged it;
# whether it needs one more judgement than others have given or, having it before them, will give.
NOT_JUDGED = """NOT EXISTS (SELECT 1 FROM judgements j
  WHERE j.item = items.id AND j.annotator = :annotator AND j.undone IS NULL)"""
IS_FREE = """judged < needed AND needed > judged + (SELECT count(DISTINCT o.annotator) FROM showings o
  WHERE o.item = items.id AND o.annotator <> :annotator AND o.leased_until > :now)"""
JUDGEMENTS = """SELECT kind, prompt, responses, sources, scale, j.*, s.places, s.shown_at FROM judgements j
  JOIN items ON items.id = j.item JOIN showings s ON s.id = j.showing"""


class FeedbackError(InputError):
    """A store, an item or a judgement that cannot be used; nothing was written."""


class Database:
    """One connection to the file, for all threads of a process, one after another.

    Every method raises `FeedbackError` when the file cannot be read or written.

    Args:
        path: the SQLite file; it and its folders are made when missing.

    Raises:
        FeedbackError: see `open_database`.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.RLock()
        self._connection = open_database(path)
        # At the latest when nobody has it any more, and never while a thread is using it.
        self.close = weakref.finalize(self, _close, self._lock, self._connection)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is written together or not at all; inside another one it is a part of that."""
        with self._lock:
            if self._is_inside():
                yield
                return
            try:
                self.sql("BEGIN IMMEDIATE")
                yield
                self.sql("COMMIT")
            except BaseException:
                if self._is_inside():  # a full disk has rolled it back already
                    self.sql("ROLLBACK")
                raise

    def _is_inside(self) -> bool:
        return self.close.alive and self._connection.in_transaction

    def sql(self, query: str, **values: Any) -> list[sqlite3.Row]:
        """Runs one statement; gives its rows."""
        with self._lock:
            try:
                return self._connection.execute(query, values).fetchall()
            except (sqlite3.Error, OverflowError) as error:  # the latter for an id of more than 64 bits
                raise FeedbackError(f"feedback store {self._path}: {error}") from error

    def row(self, query: str, **values: Any) -> sqlite3.Row | None:
        """The first row, if there is one."""
        return next(iter(self.sql(query, **values)), None)

    def insert(self, table: str, **values: Any) -> int:
        """Adds a row; gives its id."""
        names = ", ".join(values)
        places = ", ".join(f":{name}" for name in values)
        return self.sql(f"INSERT INTO {table} ({names}) VALUES ({places}) RETURNING id", **values)[0]["id"]


def _close(lock: threading.RLock, connection: sqlite3.Connection) -> None:
    with lock:
        connection.close()


def open_database(path: Path) -> sqlite3.Connection:
    """Opens the file, or makes it with its folders, for any thread.

    Raises:
        FeedbackError: it is no database, one of something else, or one of another version (the file stays as it is);
            the file system cannot hold it.
    """
    if sqlite3.sqlite_version_info < (3, 37):
        raise FeedbackError(f"SQLite: got version {sqlite3.sqlite_version}, expected 3.37 or newer")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as on_failure:
            connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            on_failure.callback(connection.close)
            connection.row_factory = sqlite3.Row
            _check_header(connection, path)
            _use_wal(connection, path)
            # A commit has reached the disk when it is answered: what was pressed outlives a power cut.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            _create_tables(connection)
            on_failure.pop_all()
            return connection
    except (OSError, sqlite3.Error) as error:
        raise FeedbackError(f"feedback store {path}: cannot be opened: {error}") from error


def utc(moment: datetime.datetime) -> str:
    """ISO 8601 in UTC, to the millisecond, of one width, so that texts sort as times do; without a zone it is UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    return aware.astimezone(datetime.UTC).isoformat(timespec="milliseconds")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _check_header(connection: sqlite3.Connection, path: Path) -> None:
    """Refuses what is not ours before anything is written."""
    connection.execute("BEGIN")  # one state of the file, while another process may be making it
    application, version, tables = (
        _pragma(connection, name) for name in ("application_id", "user_version", "schema_version")
    )
    connection.execute("COMMIT")
    if (application, version, tables) == (0, 0, 0):
        return  # new, or made by a process that was killed before its first commit
    if application != APPLICATION_ID:
        raise FeedbackError(f"feedback store {path}: it is a database of something else; expected another path")
    if version != VERSION:
        raise FeedbackError(f"feedback store {path}: its tables are of version {version}, expected version {VERSION}")


def _use_wal(connection: sqlite3.Connection, path: Path) -> None:
    """Readers go on while one process writes. Two processes that make this change at once are not queued by SQLite."""
    give_up = time.monotonic() + BUSY_S
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise FeedbackError(f"feedback store {path}: got journal mode {mode}, expected a file on a local disk")


def _create_tables(connection: sqlite3.Connection) -> None:
    """All tables and the numbers in the header in one transaction, unless they are there."""
    if _pragma(connection, "user_version"):
        return
    connection.execute("BEGIN IMMEDIATE")
    if not _pragma(connection, "user_version"):  # nor made by another process meanwhile
        for statement in TABLES.split(";\n\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")
