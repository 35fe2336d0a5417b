"""A folder that is on the disk whole, and says so: the SHA-256 of every file in it, and its own.

The order is that of a commit: the files, then the manifest, each forced to the disk, then one rename that makes the
folder visible under its name. Whatever is lost before the rename was never there; what changes after it is noticed.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ppo_jax.errors import InputError
from ppo_jax.metrics.jsonl import sync_folder

NAME = "manifest.json"


class DamagedError(InputError):
    """Files are not what their manifest says; the message names the first one and how it differs."""


def commit(written: Path, target: Path, facts: dict[str, Any]) -> None:
    """Makes a written folder durable and gives it its name; at any moment it is absent or whole there.

    Args:
        written: the folder, beside `target`; nobody writes in it any more.
        target: where it is to be; nothing is there yet.
        facts: what else the manifest is to hold; anything that JSON can.

    Raises:
        OSError: the disk is full or fails; nothing has this name then.
    """
    files = {}
    for path in _files(written):
        with path.open("rb") as file:
            files[str(path.relative_to(written))] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
            os.fsync(file.fileno())
    with (written / NAME).open("wb") as file:
        file.write(_encode({"facts": facts, "files": files}))
        file.flush()
        os.fsync(file.fileno())
    for folder, _, _ in os.walk(written):
        sync_folder(Path(folder))
    written.rename(target)
    try:
        sync_folder(target.parent)
    except OSError:
        target.rename(written)  # what may be gone after a crash is not called saved
        raise


def verify(folder: Path) -> dict[str, Any]:
    """Reads every file of a folder and compares it with the manifest.

    Returns:
        The facts that were given to `commit`.

    Raises:
        DamagedError: the manifest or a file is missing or has changed, by as little as a bit.
    """
    held = _read(folder)
    for name, wanted in held["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DamagedError(f"{path}: {error.strerror or error}") from error
        if size != wanted["bytes"]:
            raise DamagedError(f"{path}: got {size:,} bytes, expected {wanted['bytes']:,}")
        if digest != wanted["sha256"]:
            raise DamagedError(f"{path}: got SHA-256 {digest[:12]}..., expected {wanted['sha256'][:12]}...")
    return held["facts"]


def facts_of(folder: Path) -> dict[str, Any]:
    """The facts that were given to `commit`; the other files are not looked at.

    Raises:
        DamagedError: the manifest is missing or has changed.
    """
    return _read(folder)["facts"]


def retire(folder: Path) -> None:
    """Removes a folder so that at any moment it is whole under its name or not there.

    Raises:
        OSError: it cannot be removed; it has lost its name, or is whole.
    """
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    sync_folder(folder.parent)  # or a crash could bring the name back, without some of its files
    shutil.rmtree(aside)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _encode(held: dict[str, Any]) -> bytes:
    """The manifest as it is written: with its own digest, and in one form only, so that no bit of it is free."""
    text = json.dumps(held, sort_keys=True, indent=1)
    return json.dumps(held | {"sha256": hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True, indent=1).encode()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        data = path.read_bytes()
        held = json.loads(data)
        if _encode({name: held[name] for name in ("facts", "files")}) == data:
            return held
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise DamagedError(f"{path}: it is not as it was written")
