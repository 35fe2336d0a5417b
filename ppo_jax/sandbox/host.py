"""Runs Python code that nobody has read, on Linux, with bubblewrap (https://github.com/containers/bubblewrap).

It sees a read-only /usr and an empty, bounded /tmp; no network, no other process, no variable and no file of ours. It
runs as a user with no rights, in namespaces of its own, with limits on time, memory, processes, files and output; when
it ends, everything that it has started ends. What was expected of it stays outside: see `ppo_jax/rewards/code.py`.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.errors import InputError, check

_NOBODY = 65534
_GUEST = Path(__file__).with_name("guest.py")
_READY = b"ready\n"


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
    ended: str  # "" by itself, else by which limit: "time", "output", or the signal's name


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
    """The interpreter that the sandbox uses: ours if the user without rights may read it, else the system's.

    Raises:
        SandboxError: none runs in a sandbox here; says why.
    """
    if not shutil.which("bwrap"):
        raise SandboxError(
            "sandbox: got no bwrap on PATH, expected bubblewrap (Debian, Ubuntu: apt-get install bubblewrap): code is "
            "not run without isolation"
        )
    ours = str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}")
    told = []
    for python in (ours, "/usr/bin/python3", "/usr/local/bin/python3"):
        if not Path(python).exists():
            continue
        try:
            if _run(python, _task("def f(): return 1", "f", [{}], Limits()), Limits()).values == [1]:
                return python
        except SandboxError as error:
            told.append(str(error))
    raise SandboxError("; ".join(told) or "sandbox: no Python was found to run in it")


def _task(source: str, entry_point: str, calls: Sequence[dict[str, Any]], limits: Limits) -> bytes:
    given = {"source": source, "entry_point": entry_point, "calls": list(calls), "limits": dataclasses.asdict(limits)}
    return json.dumps(given).encode()


def _run(python: str, task: bytes, limits: Limits) -> Result:
    deadline = time.monotonic() + limits.wall_s
    guest, given = _in_memory(_GUEST.read_bytes()), _in_memory(task)
    reader, writer = os.pipe()
    as_nobody: dict[str, Any] = {}
    if os.geteuid() == 0:  # whom no limit on processes holds
        as_nobody = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
    try:
        process = subprocess.Popen(
            _command(python, guest, given, writer, limits),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(guest, given, writer),
            cwd="/",
            env={},
            start_new_session=True,
            **as_nobody,
        )
    except OSError as error:
        os.close(reader)
        raise SandboxError(f"sandbox: {error}") from error
    finally:
        for descriptor in (guest, given, writer):
            os.close(descriptor)
    try:
        said, complaint, ended = _listen(process, reader, deadline, limits.output_bytes)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its init dies, and with it everything in its namespace
        process.wait()
        if process.stderr:
            process.stderr.close()
        os.close(reader)
    if not said.startswith(_READY):
        if ended:
            raise SandboxError(f"sandbox: {python} did not start within its limits ({ended})")
        raise SandboxError(
            f"sandbox: {python}: {complaint.decode(errors='replace').strip()[:300] or 'it did not start'}"
        )
    return _read(said.removeprefix(_READY), ended)


def _command(python: str, guest: int, given: int, writer: int, limits: Limits) -> list[str]:
    prefix = str(Path(python).resolve().parents[1])
    binds = [] if prefix == "/usr" else ["--ro-bind", prefix, prefix]
    libraries = [part for name in ("lib", "lib64", "bin") if Path(f"/{name}").exists() for part in _system_folder(name)]
    return [
        shutil.which("bwrap") or "bwrap",
        *"--unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup".split(),
        *f"--uid {_NOBODY} --gid {_NOBODY} --hostname sandbox --die-with-parent --new-session".split(),
        *"--disable-userns --clearenv --setenv PATH /usr/bin --setenv HOME /tmp --setenv LANG C.UTF-8".split(),
        *["--ro-bind", "/usr", "/usr", *libraries, *binds, "--proc", "/proc", "--dev", "/dev"],
        *["--size", str(limits.disk_mb << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"],
        *["--ro-bind-data", str(guest), "/sandbox/guest.py", "--ro-bind-data", str(given), "/sandbox/task.json"],
        *["--remount-ro", "/dev", "--remount-ro", "/"],  # of nothing but memory, and without a limit of their own
        *[python, "-I", "-S", "-B", "/sandbox/guest.py", str(writer)],
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


def _listen(process: subprocess.Popen, reader: int, deadline: float, most: int) -> tuple[bytes, bytes, str]:
    """What comes from the guest and on stderr until it ends, or until a limit ends it."""
    assert process.stderr
    stderr = process.stderr.fileno()
    held = {reader: b"", stderr: b""}
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
                if len(held[key.fd]) > most + len(_READY):
                    return held[reader][: most + len(_READY)], held[stderr], "output"
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return held[reader], held[stderr], "time"
    number = status - 128 if status > 128 else -status  # bubblewrap tells a signal as a shell does
    return held[reader], held[stderr], signal.Signals(number).name if number > 0 else ""


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
