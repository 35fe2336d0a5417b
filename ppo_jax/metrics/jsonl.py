"""JSON Lines files that survive a kill: one object a line, one write call a line.

A line counts when it is complete. The only damage that a killed process can do is a torn last line without its newline:
readers skip it, `truncate_jsonl` and `JsonlWriter` remove it. Any other line that is not a JSON object is an error.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ppo_jax.errors import InputError


def atomic_write(path: str | Path, data: bytes) -> None:
    """Replaces a file's content: after a crash at any moment the old or the new content is there, never a mixture.

    Args:
        path: the file; its folder must exist, and holds `.NAME.tmp` for a moment.
        data: the new content.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # a fixed name: what a kill leaves behind, the next call overwrites
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)  # the new name is on the disk only when its folder is


def sync_folder(folder: Path) -> None:
    """Forces the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class JsonlWriter:
    """Appends JSON objects to a file, one a line, each with a single write call.

    The line is on the disk when `write` returns: a kill or a power loss loses at most the line being written.
    The output is strict JSON: NaN and the infinities become null (`read_jsonl` gives None). NumPy and JAX arrays and
    scalars become numbers and lists. Text stays readable (UTF-8, not escaped).

    Args:
        path: the file, made with its folders when missing. A torn last line is removed first.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend_last_line(self.path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (unbuffered: one write() is one system call)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one object.

        Raises:
            OSError: the line could not be written whole (a full disk).
            TypeError: a value has no JSON form.
        """
        line = _encode(row)
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: wrote {written} of {len(line)} bytes; is the disk full?")
        os.fsync(self._file.fileno())  # a checkpoint that is on the disk has its rows there

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> "JsonlWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a whole file, its lines as `JsonlWriter` would; at any moment it is absent, old or new."""
    atomic_write(path, b"".join(map(_encode, rows)))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Reads all objects of a JSON Lines file, a torn last line and blank lines left out.

    Raises:
        InputError: another line is not a JSON object; the message has the file and the line number.
    """
    return [row for _, _, row in _lines(Path(path))]


def truncate_jsonl(path: str | Path, key: str, limit: float) -> int:
    """Drops the rows with `row[key] >= limit` and a torn last line, atomically: what a resumed run will write again.

    Call it before the file is opened for writing: it is replaced, and an open writer would go on with the old one.

    Args:
        path: the file; a missing one is left missing.
        key: name of a number that every row has, `"iteration"` say.
        limit: first value that is dropped (the iteration with which the run goes on).

    Returns:
        The number of whole rows that were dropped.

    Raises:
        InputError: a row has no number under `key`, or is not a JSON object; the message has the file and the line.
    """
    path = Path(path)
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for number, line, row in _lines(path):
        value = row.get(key)
        if not isinstance(value, int | float):
            raise InputError(f"{path}:{number}: expected a number under {key!r}, got {value!r}")
        if value >= limit:
            dropped += 1
        else:
            kept.append(line.removesuffix(b"\n") + b"\n")
    content = b"".join(kept)
    if len(content) != path.stat().st_size:
        atomic_write(path, content)
    return dropped


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Yields line number, line and object of each complete line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _parse(line)
            if row is not None:
                yield number, line, row
            elif line.endswith(b"\n"):
                raise InputError(f"{path}:{number}: expected a JSON object, got {_excerpt(line)}")


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None for anything else, a torn line too: a part of an object is never an object."""
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _mend_last_line(path: Path) -> None:
    """Makes the file end with a newline: a torn last line goes, a whole one that lacks only its newline gets it."""
    data = path.read_bytes() if path.exists() else b""
    end = data.rfind(b"\n") + 1
    if end == len(data):
        return
    if _parse(data[end:]) is None:
        os.truncate(path, end)
    else:
        with open(path, "ab") as file:
            file.write(b"\n")


def _encode(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(_jsonable(row), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes \udxxx, which is its JSON escape


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX
        return _jsonable(value.tolist())
    return value


def _excerpt(line: bytes, length: int = 60) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= length else text[:length] + "...")
