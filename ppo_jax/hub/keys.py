"""One key of a configuration file: what it is called, what it must be, and what it means where it is not there."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ppo_jax.hub.errors import HubError

REQUIRED = object()
"""Default of a key that has none."""

ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
    "gelu": ("gelu", "gelu_python"),
    "silu": ("silu", "swish"),
    "relu": ("relu",),
}
"""Our activation -> theirs that are the same function; the first one is written."""


class Key(NamedTuple):
    """A key of `config.json` that a field of `ModelConfig` comes from."""

    name: str
    kind: type = int  # int, float, bool, or str for an activation
    default: Any = REQUIRED


def positions_key(absent: int) -> dict[str, Key]:
    """How long texts may be; a file without the key has the default of transformers."""
    return {"max_positions": Key("max_position_embeddings", default=absent)}


def words(*lines: str) -> frozenset[str]:
    """All words of some lines."""
    return frozenset(" ".join(lines).split())


def read_key(raw: Mapping[str, Any], key: Key, where: object) -> Any:
    """One key, of the right kind; None where it is null or absent and something else decides.

    Raises:
        HubError: a value of another kind, or none where there must be one.
    """
    value = raw.get(key.name)
    if value is None:
        if key.default is REQUIRED:
            raise HubError(f"{where}: {key.name} is missing")
        value = key.default
        if value is None:
            return None
    if key.kind is str:
        for ours, theirs in ACTIVATIONS.items():
            if value in theirs:
                return ours
        supported = ", ".join(name for theirs in ACTIVATIONS.values() for name in theirs)
        raise HubError(f"{where}: {key.name} {reprlib.repr(value)} is not supported, only {supported}")
    if key.kind is bool:
        holds = isinstance(value, bool)
    elif key.kind is int:
        holds = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
    else:
        holds = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    if not holds:
        expected = {bool: "true or false", int: "a positive whole number", float: "a number"}[key.kind]
        raise HubError(f"{where}: {key.name}: got {reprlib.repr(value)}, expected {expected}")
    return float(value) if key.kind is float else value
