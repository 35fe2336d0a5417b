"""What takes ten times as long as is usual is told while it goes on."""

import threading
import time

import pytest

from experiments.watchdog import LEAST, Watchdog


def turns(watchdog: Watchdog, *seconds: float) -> None:
    for number, wait in enumerate(seconds):
        with watchdog.watch(f"iteration {number}"):
            time.sleep(wait)


def test_a_long_turn_is_told_while_it_goes_on():
    told, heard = [], threading.Event()
    watchdog = Watchdog(lambda text: (told.append(text), heard.set()))
    turns(watchdog, *[0.02] * LEAST)
    assert told == []
    with watchdog.watch("iteration 7"):
        assert heard.wait(30), "it was to be told before the turn ends"
    assert len(told) == 1
    assert told[0].startswith("iteration 7 takes 10 times as long as is usual (0.02")


def test_the_first_turns_and_usual_ones_are_not_told():
    told = []
    watchdog = Watchdog(told.append)
    turns(watchdog, 0.001, 0.5, *[0.05] * LEAST, 0.6, 0.05)
    time.sleep(1.1)  # a timer that was not cancelled would speak
    assert told == []


def test_a_turn_that_fails_leaves_no_timer():
    told = []
    watchdog = Watchdog(told.append)
    turns(watchdog, *[0.01] * LEAST)
    with pytest.raises(ValueError, match="broken"), watchdog.watch("iteration 5"):
        raise ValueError("broken")
    time.sleep(1.1)
    assert told == []
