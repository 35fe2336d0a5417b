"""How a script ends: after its work, early but saved, or with one line about what it could not use."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from ppo_jax.checkpoint import Checkpointer
from ppo_jax.errors import InputError
from ppo_jax.types import TrainState

STOPPED = 75
"""Exit status of a run that was asked to end, and saved: the same command goes on. EX_TEMPFAIL of sysexits.h."""

_STARTED = time.monotonic()


class StoppedEarly(Exception):
    """A run was asked to end and has saved what it did; the message says by whom, and how far it is."""


@contextlib.contextmanager
def told_in_one_line(interrupted: str = "interrupted") -> Iterator[None]:
    """Ends the process, where what is done within fails by a mistake in the input: one line, and exit status 1; or
    where it was stopped early: one line, and exit status `STOPPED`.

    Args:
        interrupted: the line for Ctrl-C, whose exit status is 130.
    """
    try:
        yield
    except (InputError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except StoppedEarly as stopped:
        print(f"stopped: {stopped}; the same command goes on from there", file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def asked_to_end(max_hours: float = 0.0) -> Iterator[Callable[[], str]]:
    """Within, a SIGTERM or SIGINT (Ctrl-C) only asks for the end; a second one ends the process at once.

    Args:
        max_hours: hours since the process started after which the end is asked for as well; 0: never.

    Yields:
        A function that says who has asked, "" for nobody. What goes on in turns calls it after each, and `end_early`.
    """
    asked: list[str] = []

    def who() -> str:
        if not asked and 0 < max_hours < (time.monotonic() - _STARTED) / 3600:
            asked.append(f"max_hours={max_hours:g}")
        return asked[0] if asked else ""

    if threading.current_thread() is not threading.main_thread():  # signals are no other thread's business
        yield who
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def watch() -> None:
        # Not in a handler: Python calls one only when the device's program, which may take minutes, has returned.
        while number := ours.recv(1):
            if number[0] in numbers:
                if asked:
                    os._exit(128 + number[0])
                asked.append(signal.Signals(number[0]).name)

    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield who
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        theirs.close()
        watcher.join()
        ours.close()


def end_early(checkpoints: Checkpointer, state: TrainState, who: str, done: str) -> NoReturn:
    """Saves and ends.

    Args:
        checkpoints: of the run.
        state: after what is done.
        who: asked for it.
        done: how far it is, "3 of 8 iterations" say.

    Raises:
        StoppedEarly: always.
    """
    checkpoints.save(state)
    checkpoints.wait()
    raise StoppedEarly(f"{who}; {done} are saved")
