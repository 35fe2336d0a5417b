"""Whether the files that a run reads are still those that it began with."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

_ENDS = 1 << 20  # bytes at the beginning and at the end of a file; gigabytes of weights take no time


FIELDS = frozenset(
    "model tokenizer prompts heldout_prompts data heldout ptx_data reward gold judge critic reference policy".split()
)
"""Fields whose texts may be paths; any other may be a word that happens to be the name of a folder here."""
_JUDGES = ("vader", "code", "page")
WORDS = {"reward": _JUDGES, "gold": _JUDGES, "judge": _JUDGES, "critic": ("policy", "model", "reward")}
"""Values of these fields that are no paths, also where a folder has the name."""


def fingerprints(config: dict[str, Any], may_change: Collection[str] = ()) -> dict[str, str]:
    """A digest of each file and folder that a configuration names.

    It covers names, sizes, and the first and last MiB of each file, not times: a copy is the same.

    Args:
        config: settings by name, of which `FIELDS` count. A text may name several, separated by commas, each with
            `jax:` or `model:` before it and `:function` or `*WEIGHT` after it, as judges do.
        may_change: top-level fields that are left out.

    Returns:
        By `FIELD PATH`.
    """
    found = {}
    for field in sorted(FIELDS & config.keys() - set(may_change)):
        found |= {f"{field} {path}": _digest(path) for path in _paths(config[field], WORDS.get(field, ()))}
    return found


def digest_of(value: Any) -> str:
    """The SHA-256 of anything that JSON can hold; what it cannot counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _paths(value: Any, words: Collection[str]) -> Iterator[Path]:
    for part in value.split(",") if isinstance(value, str) else ():
        name = part.strip().rpartition("*")[0] or part.strip()
        if name in words:
            continue
        name = name.removeprefix("jax:").removeprefix("model:")
        for candidate in (name, name.rpartition(":")[0]):
            path = os.path.expanduser(candidate)
            if candidate and os.path.exists(path):
                yield Path(path)
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
