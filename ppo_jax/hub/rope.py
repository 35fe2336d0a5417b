"""Rotary positions in `config.json`: theta, how much of a head is rotated, and how it is stretched; both directions.

Transformers 4 has `rope_theta` and `rope_scaling`, 5 has all of it in `rope_parameters`, for Gemma 3 by kind of layer.
Source: transformers 5.23.0 `modeling_rope_utils.py` and each family's `convert_rope_params_to_dict`.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ppo_jax.errors import InputError
from ppo_jax.hub.codecs import FULL, WINDOW, Codec, Fields, Raw
from ppo_jax.hub.errors import HubError
from ppo_jax.hub.keys import REQUIRED, Key, read_key, words
from ppo_jax.models import ModelConfig
from ppo_jax.models.rope import LinearScaling, Llama3Scaling, LongScaling, RopeScaling, YarnScaling

_PLACES = ("rope_scaling", "rope_parameters")
_SAID = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
"""What every kind may say, and what is read elsewhere."""

_ORIGINAL = "original_max_position_embeddings"


def rope_codec(
    theta: float = 10_000.0,
    theta_key: str = "rope_theta",
    partial: tuple[str, float] | None = None,
    local_theta: float = 0.0,
    kinds: Mapping[str, str] | None = None,
    original: int = 0,
) -> Codec:
    """The keys of one family.

    Args:
        theta: of a file that says none.
        theta_key: what theta is called outside of the objects, beside `rope_theta`.
        partial: what the rotated part of a head is called there, beside `partial_rotary_factor`, and that of a file
            that says none; None: all of it.
        local_theta: likewise of layers with a window, which are not stretched; 0: they are like the others.
        kinds: what their name of a kind means; None: each of `_KINDS` what it says.
        original: `original_max_position_embeddings` of a file that does not say it, where that stands outside of the
            objects and counts more than what they say; 0: it stands inside, and `max_position_embeddings` is the
            default.
    """
    kinds = {name: name for name in _KINDS} if kinds is None else kinds
    partial_key = partial[0] if partial else "partial_rotary_factor"
    names = {theta_key: "rope_theta", "rope_theta": "rope_theta"}
    names |= {partial_key: "partial_rotary_factor", "partial_rotary_factor": "partial_rotary_factor"}
    keys = {*names, *_PLACES}
    keys |= {"rope_local_base_freq"} if local_theta else set()
    keys |= {_ORIGINAL} if original else set()

    def read(raw: Raw, fields: Fields, where: object) -> dict[str, Any]:
        rope, local = _merged(raw, names, nested=bool(local_theta), where=where)
        read_fields = {"rope_theta": read_key(rope, Key("rope_theta", float, theta), where)}
        head_dim = fields.get("head_dim") or fields["width"] // fields["num_heads"]
        part = read_key(rope, Key("partial_rotary_factor", float, partial[1] if partial else 1.0), where)
        if part > 1 or (part != 1 and not partial):
            raise HubError(f"{where}: {partial_key}: got {part}, expected {'at most ' if partial else ''}1")
        read_fields["rotary_dim"] = int(head_dim * part) if part != 1 else 0
        if part != 1 and not read_fields["rotary_dim"]:
            raise HubError(f"{where}: {partial_key}: got {part}, with which nothing of {head_dim} numbers is rotated")
        if original:
            rope[_ORIGINAL] = read_key(raw, Key(_ORIGINAL, int, original), where)
        else:
            rope.setdefault(_ORIGINAL, fields["max_positions"])
        read_fields["rope_scaling"] = _read_scaling(rope, kinds, fields["max_positions"], where)
        if local_theta and any(fields["layer_windows"]):
            read_fields["local_rope_theta"] = _read_local(raw, local, local_theta, where)
        return read_fields

    def write(config: ModelConfig) -> dict[str, Any]:
        written: dict[str, Any] = {theta_key: config.rope_theta}
        if partial:
            written[partial_key] = _part(config)
        if config.local_rope_theta:
            written["rope_local_base_freq"] = config.local_rope_theta
        scaling = config.rope_scaling
        if scaling is not None:
            name, kind = next((name, kind) for name, kind in _KINDS.items() if kind.scaling is type(scaling))
            written["rope_scaling"] = {"rope_type": name, **kind.write(scaling)}
            if original:
                written[_ORIGINAL] = written["rope_scaling"].pop(_ORIGINAL, original)
        return written

    return Codec(frozenset(keys), read, write)


def _part(config: ModelConfig) -> float:
    """The rotated part of a head, such that its product with the head, rounded down, is what is rotated."""
    part = config.num_rotated / config.head_dim
    return part if int(config.head_dim * part) == config.num_rotated else math.nextafter(part, 1.0)


def _merged(raw: Raw, names: Mapping[str, str], nested: bool, where: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is said of the layers, what is said of those with a window alone).

    A value that is said twice, and not the same, is refused here, and not there.
    """
    merged: dict[str, Any] = {}
    local: dict[str, Any] = {}

    def add(name: str, value: Any, place: str) -> None:
        if value is not None and merged.setdefault(name, value) != value:
            raise HubError(f"{where}: {name} is {merged[name]!r} and, in {place}, {reprlib.repr(value)}")

    for name, meaning in names.items():
        add(meaning, raw.get(name), name)
    for place in _PLACES:
        said = _object(raw.get(place), place, where)
        if nested and said.keys() & {FULL, WINDOW}:
            surplus = said.keys() - {FULL, WINDOW}
            if surplus:
                raise HubError(f"{where}: {place}: {reprlib.repr(sorted(surplus)[0])} is not supported")
            local |= _object(said.get(WINDOW), f"{place}: {WINDOW}", where)
            said = _object(said.get(FULL), f"{place}: {FULL}", where)
        if "rope_type" not in said and "type" in said:
            said = said | {"rope_type": said["type"]}
        for name, value in said.items():
            add(name, value, place)
    return merged, local


def _object(value: Any, name: str, where: object) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise HubError(f"{where}: {name}: got {reprlib.repr(value)}, expected an object")
    return dict(value or {})


def _read_scaling(rope: Raw, kinds: Mapping[str, str], max_positions: int, where: object) -> RopeScaling | None:
    named = rope.get("rope_type", "default")
    if named != "default" and (not isinstance(named, str) or named not in kinds):
        raise HubError(
            f"{where}: RoPE of type {reprlib.repr(named)} is not supported, only default, {', '.join(kinds)}"
        )
    kind = None if named == "default" else _KINDS[kinds[named]]
    known = {*_SAID, _ORIGINAL, *(kind.keys if kind else ())}
    surplus = sorted(name for name in rope if name not in known)
    if surplus:
        raise HubError(f"{where}: RoPE of type {named!r}: {reprlib.repr(surplus[0])} is not supported")
    if kind is None:
        return None
    try:
        return kind.read(rope, max_positions, where)
    except InputError as error:
        raise HubError(f"{where}: RoPE of type {named!r}: {error}") from error


def _read_local(raw: Raw, local: Mapping[str, Any], default: float, where: object) -> float:
    """Theta of layers with a window; whatever else is said of them must be what says nothing."""
    nothing = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
    for name, value in local.items():
        if name != "rope_theta" and value not in (None, nothing.get(name)):
            raise HubError(f"{where}: RoPE of {WINDOW}: {name}: got {reprlib.repr(value)}, which is not supported")
    thetas = [theta for theta in (local.get("rope_theta"), raw.get("rope_local_base_freq")) if theta is not None]
    if len(thetas) == 2 and thetas[0] != thetas[1]:
        raise HubError(f"{where}: rope_local_base_freq is {thetas[1]!r} and, in rope_parameters, {thetas[0]!r}")
    return read_key({"rope_theta": next(iter(thetas), None)}, Key("rope_theta", float, default), where)


def _numbers(rope: Raw, name: str, where: object) -> tuple[float, ...]:
    value = rope.get(name)
    if not isinstance(value, list):
        raise HubError(f"{where}: {name}: got {reprlib.repr(value)}, expected a list of numbers")
    return tuple(read_key({name: one}, Key(name, float), where) for one in value)


def _number(rope: Raw, name: str, where: object, default: Any = REQUIRED) -> Any:
    return read_key(rope, Key(name, float, default), where)


def _read_linear(rope: Raw, max_positions: int, where: object) -> RopeScaling:
    return LinearScaling(_number(rope, "factor", where))


def _read_llama3(rope: Raw, max_positions: int, where: object) -> RopeScaling:
    low, high = _number(rope, "low_freq_factor", where), _number(rope, "high_freq_factor", where)
    return Llama3Scaling(_number(rope, "factor", where), low, high, read_key(rope, Key(_ORIGINAL), where))


def _read_yarn(rope: Raw, max_positions: int, where: object) -> RopeScaling:
    original = read_key(rope, Key(_ORIGINAL), where)
    factor = _number(rope, "factor", where, max_positions / original)
    magnitude = _number(rope, "attention_factor", where, None)
    if magnitude is None:

        def advised(scale: float = 1.0) -> float:
            return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1

        scales = [_number(rope, name, where, 0.0) for name in ("mscale", "mscale_all_dim")]
        magnitude = advised(scales[0]) / advised(scales[1]) if all(scales) else advised()
    fast, slow = (_number(rope, name, where, default) for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    truncate = read_key(rope, Key("truncate", bool, True), where)
    return YarnScaling(factor, original, magnitude, fast or 32.0, slow or 1.0, truncate)


def _read_long(rope: Raw, max_positions: int, where: object) -> RopeScaling:
    original = read_key(rope, Key(_ORIGINAL), where)
    factor = _number(rope, "factor", where, max_positions / original)
    advised = 1.0 if factor <= 1 or original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    magnitude = _number(rope, "attention_factor", where, advised)
    return LongScaling(_numbers(rope, "short_factor", where), _numbers(rope, "long_factor", where), original, magnitude)


class _Kind(NamedTuple):
    """One way to stretch: our class, what an object of theirs may say, and both directions."""

    scaling: type
    keys: frozenset[str]
    read: Callable[[Raw, int, object], RopeScaling]  # (object, max_positions, path)
    write: Callable[[Any], dict[str, Any]]


_KINDS: Mapping[str, _Kind] = {
    "linear": _Kind(LinearScaling, words("factor"), _read_linear, lambda s: {"factor": s.factor}),
    "llama3": _Kind(
        Llama3Scaling,
        words("factor low_freq_factor high_freq_factor"),
        _read_llama3,
        lambda s: {
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            _ORIGINAL: s.original_max_positions,
        },
    ),
    "yarn": _Kind(
        YarnScaling,
        words("factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate"),
        _read_yarn,
        lambda s: {
            "factor": s.factor,
            "attention_factor": s.magnitude,
            "beta_fast": s.beta_fast,
            "beta_slow": s.beta_slow,
            "truncate": s.truncate,
            _ORIGINAL: s.original_max_positions,
        },
    ),
    "longrope": _Kind(
        LongScaling,
        words("factor attention_factor short_factor long_factor"),
        _read_long,
        lambda s: {
            "short_factor": list(s.short_factors),
            "long_factor": list(s.long_factors),
            "attention_factor": s.magnitude,
            _ORIGINAL: s.original_max_positions,
        },
    ),
}
"""By their name."""
