"""Runs Python code that nobody has read, on Linux, with bubblewrap (https://github.com/containers/bubblewrap).

It sees a read-only /usr and an empty, bounded /tmp; no network, no other process, no variable and no file of ours. It
runs as a user with no rights, in namespaces of its own, with limits on time, memory, processes, files and output; when
it ends, everything that it has started ends. What was expected of it stays outside: see `ppo_jax/rewards/code.py`.
"""

import dataclasses
import functools
import json
import math
import os
import platform
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.errors import InputError, check
from ppo_jax.sandbox.seccomp import MACHINES, make_filter

_NOBODY = 65534
_GUEST = Path(__file__).with_name("guest.py")
_READY = b"ready\n"
_START_S = 30.0  # for a sandbox to be made, on a machine that is busy


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one run may use.

    Raises:
        InputError: a field outside its range.
    """

    wall_s: float = 10.0
    cpu_s: int = 5  # of each process
    memory_mb: int = 512  # of each process
    processes: int = 4  # threads included
    disk_mb: int = 16  # of all files in /tmp
    output_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check("sandbox wall_s", self.wall_s, 0 < self.wall_s < math.inf, "a number above 0")
        for field in dataclasses.fields(self)[1:]:
            check(f"sandbox {field.name}", getattr(self, field.name), getattr(self, field.name) >= 1, "at least 1")


class SandboxError(InputError):
    """Code could not be isolated, and was not run; this says nothing about the code."""


class Result(NamedTuple):
    """What a run of some code gave."""

    values: list[Any]  # of the calls that returned, in their order; a call that raised has None
    returned: list[bool]  # for each of the first calls whether it returned; the others were never reached
    ended: str  # "" by itself, else by what: "time", "output", the signal's name, or its own exit status


def run(source: str, entry_point: str, calls: Sequence[dict[str, Any]], limits: Limits | None = None) -> Result:
    """Runs code in a fresh sandbox.

    Args:
        source: Python code.
        entry_point: the function that the calls are to; "" where each call runs the whole program.
        calls: `{"args": [...], "kwargs": {...}}` for a function, `{"stdin": "text"}` for a program, whose value is what
            it writes to its standard output; all that JSON can hold.
        limits: None: the defaults.

    Returns:
        The values as JSON holds them: a tuple is a list, a set a sorted list.

    Raises:
        SandboxError: there is no bubblewrap, or it cannot isolate here.
    """
    limits = limits or Limits()
    return _run(find_python(), _task(source, entry_point, calls, limits), limits)


@functools.cache
def find_python() -> str:
    """The system's interpreter: one of our own may lie beside files that are nobody's business.

    Raises:
        SandboxError: none runs in a sandbox here; says why.
    """
    if not shutil.which("bwrap"):
        raise SandboxError(
            "sandbox: got no bwrap on PATH, expected bubblewrap 0.8 or newer (Debian, Ubuntu: apt-get install "
            "bubblewrap): code is not run without isolation"
        )
    if platform.machine() not in MACHINES:
        raise SandboxError(f"sandbox: got the machine {platform.machine()}, expected one of {', '.join(MACHINES)}")
    told = []
    for python in filter(os.path.exists, ("/usr/bin/python3", "/usr/local/bin/python3")):
        try:
            if _run(python, _task("def f(): return 1", "f", [{}], Limits()), Limits()).values == [1]:
                return python
        except SandboxError as error:
            told.append(str(error))
    raise SandboxError("; ".join(told) or "sandbox: got no python3 in /usr/bin or /usr/local/bin, expected one there")


def _task(source: str, entry_point: str, calls: Sequence[dict[str, Any]], limits: Limits) -> bytes:
    given = {"source": source, "entry_point": entry_point, "calls": list(calls), "limits": dataclasses.asdict(limits)}
    return json.dumps(given).encode()


def _run(python: str, task: bytes, limits: Limits) -> Result:
    guest, given, calls = (_in_memory(data) for data in (_GUEST.read_bytes(), task, make_filter()))
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            _as_nobody() + _command(python, guest, given, calls, writer, limits),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(guest, given, calls, writer),
            cwd="/",
            env={},
            start_new_session=True,
        )
    except OSError as error:
        os.close(reader)
        raise SandboxError(f"sandbox: {error}") from error
    finally:
        for descriptor in (guest, given, calls, writer):
            os.close(descriptor)
    try:
        said, complaint, ended = _listen(process, reader, limits)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its init dies, and with it everything in its namespace
        process.wait()
        if process.stderr:
            process.stderr.close()
        os.close(reader)
    if not said.startswith(_READY):
        told = complaint.decode(errors="replace").strip()[:300] or "it did not start"
        raise SandboxError(f"sandbox: {python}: {told}" + f" ({ended})" * bool(ended))
    return _read(said.removeprefix(_READY), ended)


def _as_nobody() -> list[str]:
    """The beginning of a command that root gives: no limit on processes holds for root.

    Not by `Popen(user=...)`, which copies this process's page tables: seconds, where it is large.
    """
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv", path="/usr/bin:/bin")
    if not setpriv:
        raise SandboxError("sandbox: got no setpriv, expected util-linux's, since this is root")
    return [setpriv, "--reuid", str(_NOBODY), "--regid", str(_NOBODY), "--clear-groups"]


def _command(python: str, guest: int, task: int, calls: int, writer: int, limits: Limits) -> list[str]:
    libraries = [part for name in ("lib", "lib64", "bin") if Path(f"/{name}").exists() for part in _system_folder(name)]
    return [
        shutil.which("bwrap") or "bwrap",
        *"--unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup".split(),
        *f"--uid {_NOBODY} --gid {_NOBODY} --hostname sandbox --die-with-parent --new-session".split(),
        *"--disable-userns --clearenv --setenv PATH /usr/bin --setenv HOME /tmp --setenv LANG C.UTF-8".split(),
        *["--ro-bind", "/usr", "/usr", *libraries, "--proc", "/proc", "--dev", "/dev"],
        *(["--size", "4096", "--tmpfs", "/usr/src"] if Path("/usr/src").exists() else []),  # where containers put ours
        *["--size", str(limits.disk_mb << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"],
        *["--ro-bind-data", str(guest), "/sandbox/guest.py", "--ro-bind-data", str(task), "/sandbox/task.json"],
        *["--remount-ro", "/dev", "--remount-ro", "/"],  # of nothing but memory, and without a limit of their own
        *["--seccomp", str(calls), python, "-I", "-S", "-B", "/sandbox/guest.py", str(writer)],
    ]


def _system_folder(name: str) -> list[str]:
    path = Path(f"/{name}")
    return ["--symlink", f"usr/{name}", f"/{name}"] if path.is_symlink() else ["--ro-bind", f"/{name}", f"/{name}"]


def _in_memory(data: bytes) -> int:
    descriptor = os.memfd_create("sandbox")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _listen(process: subprocess.Popen, reader: int, limits: Limits) -> tuple[bytes, bytes, str]:
    """What comes from the guest and on stderr until it ends, or until a limit ends it. Its time begins when it does."""
    assert process.stderr
    stderr, most = process.stderr.fileno(), limits.output_bytes + len(_READY)
    held, began, deadline = {reader: b"", stderr: b""}, False, time.monotonic() + _START_S
    with selectors.DefaultSelector() as selector:
        for descriptor in held:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return held[reader], held[stderr], "time"
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                held[key.fd] += part
                if not part:
                    selector.unregister(key.fd)
                if len(held[key.fd]) > most:
                    return held[reader][:most], held[stderr], "output"
            if not began and held[reader].startswith(_READY):
                began, deadline = True, time.monotonic() + limits.wall_s
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return held[reader], held[stderr], "time"
    return held[reader], held[stderr], _name_of(status)


def _name_of(status: int) -> str:
    """A signal's name (bubblewrap tells it as a shell does), or the exit status; empty for 0."""
    number = status - 128 if status > 128 else -status
    names = {each.value: each.name for each in signal.Signals}
    return names.get(number, f"status {status}") if status else ""


def _read(lines: bytes, ended: str) -> Result:
    """What the guest says, a line a call; from the first that is no such line on nothing counts: it is the code's."""
    values, returned = [], []
    for line in lines.splitlines(keepends=True):
        try:
            said = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict) or len(said) != 1 or not said.keys() <= {"value", "error"}:
            break
        values.append(said.get("value"))
        returned.append("value" in said)
    return Result(values, returned, ended)
