"""One process a folder: whoever opens it holds a lock until the process ends, however it ends."""

import errno
import fcntl
import json
import logging
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

    The lock is the system's (`flock`), on the file `.lock`: a process that was killed has none any more, and forked
    children have none. Where the file system has no locks, a warning is logged and nothing is locked.

    Args:
        folder: it exists.

    Raises:
        LockedError: another process has it.
        OSError: the file cannot be written.
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
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        logging.warning("workdir %s: its file system has no locks (%s): keep other processes away", folder, error)
    mine = {"host": socket.gethostname(), "process": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(mine).encode())
    _held[path] = descriptor


def _leave_to_the_parent() -> None:
    """In a forked child: it outlives its parent at times, and is no owner."""
    for descriptor in _held.values():
        os.close(descriptor)  # which unlocks nothing: the parent's copy holds on
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)


def _tell(owner: str) -> str:
    try:
        told = json.loads(owner)
        return f"process {told['process']} on {told['host']} since {told['start']}"
    except (ValueError, TypeError, KeyError):  # it has just taken the lock, and not written yet
        return "another process"
