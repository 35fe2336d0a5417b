"""One process a folder: whoever opens it holds a lock until the process ends, however it ends."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from ppo_jax.errors import InputError

NAME = ".lock"
_held: dict[Path, int] = {}  # descriptors by the lock's path; the system takes them back when the process ends


class LockedError(InputError):
    """Another process uses the folder; the message says which one, where, and since when."""


def lock_folder(folder: Path) -> None:
    """Takes a folder for this process, until it ends; it may be taken again by the same process.

    The lock is the system's (`flock`), on the file `.lock`: a process that was killed has none any more.

    Args:
        folder: it exists.

    Raises:
        LockedError: another process has it.
        OSError: the file cannot be written, or the file system has no locks.
    """
    path = folder.resolve() / NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if path in _held and os.path.sameopenfile(_held[path], descriptor):  # not where the folder was moved and made anew
        os.close(descriptor)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(descriptor, 4096).decode(errors="replace")
        os.close(descriptor)
        raise LockedError(
            f"workdir {folder}: in use by {_tell(owner)}; expected its end, or another workdir"
        ) from error
    mine = {"host": socket.gethostname(), "process": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(mine).encode())
    _held[path] = descriptor


def _tell(owner: str) -> str:
    try:
        told = json.loads(owner)
        return f"process {told['process']} on {told['host']} since {told['start']}"
    except (ValueError, TypeError, KeyError):  # it has just taken the lock, and not written yet
        return "another process"
