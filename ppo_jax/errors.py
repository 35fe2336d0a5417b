"""Mistakes in what a user gave: told in one line, without a traceback."""

from typing import Any


class InputError(ValueError):
    """Something given from outside cannot be used; the message names it, its value and what was expected."""


def check(name: str, value: Any, holds: bool, expected: str) -> None:
    """Raises `InputError` with the name, the value and what was expected, unless the condition holds."""
    if not holds:
        raise InputError(f"{name}: got {value!r}, expected {expected}")
