"""What a folder may look like after a crash: which of a process's writes had reached the disk, which had not."""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

WATCHER = Path(__file__).parent / "native" / "watch_writes.c"


def compile_watcher(folder: Path) -> Path:
    """The library that is preloaded; see its source."""
    library = folder / "watch_writes.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(WATCHER), "-ldl", "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    return library


class Call(NamedTuple):
    """One line of the watcher's log."""

    number: int
    name: str
    path: Path
    new_path: Path | None


def read_calls(log: Path) -> list[Call]:
    """All calls, in their order."""
    rows = [line.split("\t") for line in log.read_text().splitlines()]
    return [Call(int(number), name, Path(a), Path(b) if b else None) for number, name, a, b in rows]


class Unsynced:
    """What a power loss may undo: contents since the file's last fsync, names since their folder's."""

    def __init__(self) -> None:
        self.contents: set[Path] = set()
        self.made: set[Path] = set()
        self.renames: list[tuple[Path, Path]] = []

    def follow(self, calls: Iterable[Call]) -> "Unsynced":
        """After these calls."""
        for call in calls:
            self._note(call)
        return self

    def _note(self, call: Call) -> None:
        path = call.path
        if call.name in ("fsync", "fdatasync"):
            self.contents.discard(path)
            self.made = {made for made in self.made if made.parent != path}
            self.renames = [(old, new) for old, new in self.renames if new.parent != path]
        elif call.name == "open":
            self.made.add(path)
            self.contents.add(path)
        elif call.name.startswith("mkdir"):
            self.made.add(path)
        elif call.name.startswith("rename"):
            self.contents = {moved(one, path, call.new_path) for one in self.contents}
            self.made = {moved(one, path, call.new_path) for one in self.made}
            self.renames = [(moved(old, path, call.new_path), moved(new, path, call.new_path))
                            for old, new in self.renames] + [(path, call.new_path)]  # fmt: skip
        elif "write" in call.name or "truncate" in call.name:
            self.contents.add(path)

    def lose_some(self, rng: np.random.Generator, place) -> None:
        """Undoes each with even chances, in a copy of the folder; `place` says where a path is in there."""
        for path in sorted(self.contents):
            if place(path).is_file() and rng.random() < 0.5:
                spoil(place(path), rng)
        for old, new in reversed(self.renames):
            if place(new).exists() and not place(old).exists() and place(old).parent.exists() and rng.random() < 0.5:
                place(new).rename(place(old))
        for path in sorted(self.made):
            if place(path).is_file() and rng.random() < 0.5:
                place(path).unlink()


def spoil(path: Path, rng: np.random.Generator) -> None:
    """Cuts a file somewhere, or fills its end with zeros from there, as file systems do."""
    data = path.read_bytes()
    cut = int(rng.integers(0, len(data) + 1))
    path.write_bytes(data[:cut] + b"\0" * (len(data) - cut) * bool(rng.integers(2)))


def moved(path: Path, old: Path, new: Path) -> Path:
    """Where a path is after a rename."""
    return new / path.relative_to(old) if path.is_relative_to(old) else path
