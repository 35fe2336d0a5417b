"""How a script ends: after its work, early but saved, or with one line about what it could not use."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from ppo_jax.checkpoint import Checkpointer
from ppo_jax.errors import InputError
from ppo_jax.types import TrainState

STOPPED = 75
"""Exit status of a run that was asked to end, and saved: the same command goes on. EX_TEMPFAIL of sysexits.h."""


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

    In a notebook, and in another thread than the main one, signals are left alone.

    Args:
        max_hours: hours after which the end is asked for as well; 0: never.

    Yields:
        A function that says who has asked, "" for nobody. What goes on in turns calls it after each, and `end_early`.
    """
    began, signals = time.monotonic(), list[str]()

    def who() -> str:
        late = 0 < max_hours < (time.monotonic() - began) / 3600
        return signals[0] if signals else f"max_hours={max_hours:g}" if late else ""

    if threading.current_thread() is not threading.main_thread() or "ipykernel" in sys.modules:
        yield who
        return
    with _listening(signals):
        yield who


@contextlib.contextmanager
def _listening(signals: list[str]) -> Iterator[None]:
    """Notes the first signal, and ends the process at the second.

    By a thread and not in a handler: Python calls one only when the device's program, which may take minutes, has
    returned.
    """
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def listen() -> None:
        while number := ours.recv(1):
            if number[0] in numbers:
                if signals:
                    os._exit(128 + number[0])
                signals.append(signal.Signals(number[0]).name)

    handlers: dict[Any, Any] = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    _replaced.update(handlers)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        _replaced.clear()
        signal.set_wakeup_fd(wakeup)
        _restore(handlers)
        theirs.close()
        listener.join()
        ours.close()


_replaced: dict[Any, Any] = {}  # handlers that wait to be put back


def _restore(handlers: dict[Any, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by no Python


def _leave_to_the_parent() -> None:
    """A forked child (of a reward's process pool, say) is no run: its signals are its own."""
    if _replaced:
        signal.set_wakeup_fd(-1)
        _restore(_replaced)
        _replaced.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)


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
    checkpoints.save(state, early=True)
    checkpoints.wait()
    raise StoppedEarly(f"{who}; {done} are saved")
