"""Keys of `config.json` and fields of `ModelConfig` that are not one to one: windows, soft caps, layers unrotated."""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ppo_jax.errors import check
from ppo_jax.hub.errors import HubError
from ppo_jax.hub.keys import Key, read_key
from ppo_jax.models import ModelConfig

Raw = Mapping[str, Any]
Fields = Mapping[str, Any]

WINDOW, FULL = "sliding_attention", "full_attention"
"""What their `layer_types` says of a layer."""


class Codec(NamedTuple):
    """Some keys, read together and written together."""

    keys: frozenset[str]
    read: Callable[[Raw, Fields, object], dict[str, Any]]  # (file, the fields so far, its path) -> more fields
    write: Callable[[ModelConfig], dict[str, Any]]


def nullable(field: str, name: str, kind: type, absent: Any) -> Codec:
    """A number whose null says none at all (our 0), which is not what an absent key says."""

    def read(raw: Raw, fields: Fields, where: object) -> dict[str, Any]:
        switched_off = raw.get(name, absent) is None
        return {field: kind(0) if switched_off else read_key(raw, Key(name, kind, absent), where)}

    return Codec(frozenset({name}), read, lambda config: {name: getattr(config, field) or None})


def query_scalar(absent: int) -> Codec:
    """Gemma's `query_pre_attn_scalar`, which is written also where it says what is the default elsewhere."""
    name = "query_pre_attn_scalar"

    def read(raw: Raw, fields: Fields, where: object) -> dict[str, Any]:
        return {name: read_key(raw, Key(name, int, absent), where)}

    return Codec(frozenset({name}), read, lambda config: {name: config.query_pre_attn_scalar or config.head_dim})


def same_as(field: str, name: str, written: bool = False) -> Codec:
    """A key that may only say once more what a field is: another name of it, or a size that could differ elsewhere.

    Args:
        field: a field that is read before.
        name: of the key.
        written: whether our files have it.
    """

    def read(raw: Raw, fields: Fields, where: object) -> dict[str, Any]:
        if raw.get(name) not in (None, fields[field]):
            told = reprlib.repr(raw[name])
            raise HubError(
                f"{where}: {name}: got {told}, only the {field} of the layers ({fields[field]}) is supported"
            )
        return {}

    return Codec(frozenset({name}), read, lambda config: {name: getattr(config, field)} if written else {})


def either(field: str, first: str, second: str, absent: int) -> Codec:
    """A number that has two names, which say the same if both are there; the first one is written."""

    def read(raw: Raw, fields: Fields, where: object) -> dict[str, Any]:
        said = {name: read_key(raw, Key(name), where) for name in (first, second) if raw.get(name) is not None}
        if len({*said.values()}) > 1:
            raise HubError(f"{where}: {first} is {said[first]} and {second} is {said[second]}, expected the same")
        return {field: next(iter(said.values()), absent)}

    return Codec(frozenset({first, second}), read, lambda config: {first: getattr(config, field)})


def gemma_activation(name: str, gelu_has_tanh: bool = False) -> Codec:
    """The activation, spelled as vLLM wants it of Gemma.

    Args:
        name: of the key.
        gelu_has_tanh: `gelu` means the approximation, as in `GemmaConfig.__post_init__` of transformers 5.23.0.
    """
    tanh = "gelu_pytorch_tanh"

    def read(raw: Raw, fields: Fields, where: object) -> dict[str, Any]:
        activation = read_key(raw, Key(name, str, tanh), where)
        return {"activation": "gelu_tanh" if gelu_has_tanh and raw.get(name) == "gelu" else activation}

    def write(config: ModelConfig) -> dict[str, Any]:
        exact = "gelu_python" if gelu_has_tanh else "gelu"
        return {name: {"gelu_tanh": tanh, "gelu": exact}.get(config.activation, config.activation)}

    return Codec(frozenset({name}), read, write)


def same_window(absent: int | None) -> Codec:
    """A window in every layer, or in none.

    Args:
        absent: the window of a file without the key.
    """
    name = "sliding_window"

    def read(raw: Raw, fields: Fields, where: object) -> dict[str, Any]:
        window = _read_window(raw, absent, where)
        return {"layer_windows": (window,) * fields["num_layers"] if window else ()}

    return Codec(frozenset({name}), read, lambda config: {name: max(config.layer_windows, default=None)})


def some_windows(pattern: Callable[[Raw, Fields, int], bool], *keys: str, switch: bool, absent: int | None) -> Codec:
    """Windows in the layers that `layer_types` names, or else in those that an older key implies.

    Args:
        pattern: (file, the fields so far, number of a layer) -> whether it has a window where no `layer_types` says it.
        keys: what the pattern reads, beside fields.
        switch: whether nothing of all this counts without `use_sliding_window`.
        absent: the window of a file without `sliding_window`.
    """
    every = frozenset({"sliding_window", "layer_types", *keys, *(("use_sliding_window",) if switch else ())})

    def read(raw: Raw, fields: Fields, where: object) -> dict[str, Any]:
        layers = range(fields["num_layers"])
        window = _read_window(raw, absent, where)
        if switch and not read_key(raw, Key("use_sliding_window", bool, False), where):
            window = None
        types = _read_layer_types(raw, fields["num_layers"], where)
        if types is None:
            types = [WINDOW if window and pattern(raw, fields, i) else FULL for i in layers]
        if WINDOW in types and not window:
            raise HubError(f"{where}: layer_types has {WINDOW!r}, expected a sliding_window that is in use")
        return {"layer_windows": tuple((window or 0) * (kind == WINDOW) for kind in types)}

    def write(config: ModelConfig) -> dict[str, Any]:
        windows = config.layer_windows or (0,) * config.num_layers
        if switch and not any(windows):
            return {}
        written: dict[str, Any] = {
            "sliding_window": max(windows) or None,
            "layer_types": [WINDOW if window else FULL for window in windows],
        }
        if switch:
            written["use_sliding_window"] = True
        if "max_window_layers" in keys:
            written["max_window_layers"] = next(i for i, window in enumerate(windows) if window)
        return written

    return Codec(every, read, write)


def read_count(raw: Raw, name: str, absent: int, least: int = 0) -> int:
    """A whole number that may be 0.

    Raises:
        InputError: anything else, or less than `least`.
    """
    value = raw.get(name)
    value = absent if value is None else value
    check(name, value, type(value) is int and value >= least, f"a whole number, at least {least}")
    return value


def _read_window(raw: Raw, absent: int | None, where: object) -> int | None:
    if "sliding_window" in raw and raw["sliding_window"] is None:
        return None
    return read_key(raw, Key("sliding_window", int, absent), where)


def _read_layer_types(raw: Raw, num_layers: int, where: object) -> list[str] | None:
    types = raw.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or any(kind not in (WINDOW, FULL) for kind in types):
        told = reprlib.repr(types)
        raise HubError(f"{where}: layer_types: got {told}, only a list of {FULL!r} and {WINDOW!r} is supported")
    if len(types) != num_layers:
        raise HubError(f"{where}: layer_types: got {len(types)} layers, expected {num_layers}")
    return types


def _read_unrotated(raw: Raw, fields: Fields, where: object) -> dict[str, Any]:
    """Source: transformers 5.23.0, `SmolLM3Config.__post_init__`; their list says 1 for a layer with positions."""
    rotated, layers = raw.get("no_rope_layers"), range(fields["num_layers"])
    if rotated is None:
        every = read_key(raw, Key("no_rope_layer_interval", int, 4), where)
        return {"unrotated_layers": tuple(i for i in layers if (i + 1) % every == 0)}
    if not isinstance(rotated, list) or len(rotated) < len(layers) or any(one not in (0, 1) for one in rotated):
        told, expected = reprlib.repr(rotated), f"a list of 0 and 1 for each of {len(layers)} layers"
        raise HubError(f"{where}: no_rope_layers: got {told}, expected {expected}")
    return {"unrotated_layers": tuple(i for i in layers if not rotated[i])}


UNROTATED = Codec(
    frozenset({"no_rope_layers", "no_rope_layer_interval"}),
    _read_unrotated,
    lambda config: {"no_rope_layers": [int(i not in config.unrotated_layers) for i in range(config.num_layers)]},
)
"""SmolLM3's layers without positions."""
