"""Memory of this process, as Linux counts it."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path


def resident_bytes() -> int:
    """What is resident now."""
    return _status("VmRSS")


@contextlib.contextmanager
def peak_bytes() -> Iterator[Callable[[], int]]:
    """The largest resident size within the block, to be asked for after it."""
    Path("/proc/self/clear_refs").write_text("5")
    found = 0
    yield lambda: found
    found = _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, name
    return int(found[1]) * 1024
