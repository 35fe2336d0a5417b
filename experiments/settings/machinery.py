"""From a settings dataclass to an ml_collections ConfigDict and back, with every mistake named."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import ml_collections

from ppo_jax.errors import InputError, check

Settings = TypeVar("Settings")


def defaults(kind: type) -> ml_collections.ConfigDict:
    """A ConfigDict of the defaults of a settings dataclass, nested ones included; what has to be named is still
    empty.
    """
    values = {
        field.name: defaults(_kind(field)) if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(kind)
    }
    return ml_collections.ConfigDict(values).lock()  # locked: a mistyped field is an error with a suggestion


def from_config_dict(kind: Callable[..., Settings], config: ml_collections.ConfigDict) -> Settings:
    """The settings dataclass of a ConfigDict, checked.

    Raises:
        InputError: a field that is missing or unknown, or whose value is refused.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyrefly: ignore[bad-argument-type]
    if unknown := sorted(set(config) - set(fields)):
        raise InputError(f"config: unknown field {unknown[0]!r}, expected some of {', '.join(fields)}")
    return kind(**{name: _read(fields[name], config[name]) for name in config})


def _read(field: dataclasses.Field, value: Any) -> Any:
    if field.default is dataclasses.MISSING:
        check(field.name, value, isinstance(value, ml_collections.ConfigDict), "its fields")
        return from_config_dict(_kind(field), value)
    wanted = type(field.default)
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    check(field.name, value, fits, f"a value of type {wanted.__name__}")
    return value


def describe(kind: type, config: ml_collections.ConfigDict, prefix: str = "config.") -> list[tuple[str, Any, str]]:
    """(name, value, help) of every field, for `--print_config`."""
    rows = []
    for field in dataclasses.fields(kind):
        value = config[field.name]
        if isinstance(value, ml_collections.ConfigDict):
            rows += describe(_kind(field), value, f"{prefix}{field.name}.")
        else:
            rows.append((prefix + field.name, value, field.metadata["help"]))
    return rows


def _kind(field: dataclasses.Field) -> type:
    return type(field.default_factory())  # pyrefly: ignore[not-callable]


def check_at_least(settings: Any, least: float, names: str) -> None:
    """Refuses any of these fields (names separated by blanks) below `least`."""
    for name in names.split():
        check(name, getattr(settings, name), getattr(settings, name) >= least, f"at least {least}")
