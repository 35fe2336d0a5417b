"""Whether the files that a run reads are still those that it began with."""

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

_ENDS = 1 << 20  # bytes at the beginning and at the end of a file; gigabytes of weights take no time


def fingerprints(config: dict[str, Any], may_change: Collection[str] = ()) -> dict[str, str]:
    """A digest of each file and folder that a configuration names.

    It covers names, sizes, and the first and last MiB of each file, not times: a copy is the same.

    Args:
        config: nested dictionary of settings. A text may name several, separated by commas, each with `jax:` or
            `model:` before it and `:function` or `*WEIGHT` after it, as judges do.
        may_change: top-level fields that are left out.

    Returns:
        By `FIELD PATH`.
    """
    found = {}
    for field, value in config.items():
        if field not in may_change:
            found |= {f"{field} {path}": _digest(path) for path in _paths(value)}
    return found


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, dict):
        for nested in value.values():
            yield from _paths(nested)
    if not isinstance(value, str):
        return
    for part in value.split(","):
        name = part.strip().rpartition("*")[0] or part.strip()
        name = name.removeprefix("jax:").removeprefix("model:")
        for candidate in (name, name.rpartition(":")[0]):
            path = Path(candidate).expanduser()
            if candidate and os.path.exists(path):
                yield path
                break


def _digest(path: Path) -> str:
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        whole.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as data:
            whole.update(data.read(_ENDS))
            data.seek(max(_ENDS, size - _ENDS))
            whole.update(data.read(_ENDS))
    return whole.hexdigest()
