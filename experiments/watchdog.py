"""Says so when something takes much longer than it did before."""

import collections
import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator

FACTOR = 10.0
LEAST = 5
"""Turns before there is a median to speak of."""
SHORTEST_S = 1.0
"""What is shorter is not worth a word."""


class Watchdog:
    """Tells of a turn while it goes on: after ten times the median of the hundred before it.

    A service that hangs, a machine that swaps: the program itself cannot say, since it waits.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        """Args:
        tell: is called from another thread, once a turn at most.
        """
        self._tell, self._seconds = tell, collections.deque[float](maxlen=100)

    @contextlib.contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """One turn."""
        began, timer = time.perf_counter(), None
        if len(self._seconds) >= LEAST:
            usual = statistics.median(self._seconds)
            told = f"{name} takes {FACTOR:.0f} times as long as is usual ({usual:.2g} s), and goes on"
            timer = threading.Timer(max(FACTOR * usual, SHORTEST_S), self._tell, (told,))
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            if timer:
                timer.cancel()
        self._seconds.append(time.perf_counter() - began)
