"""Adapter folders in and out, as PEFT writes and opens them: `adapter_config.json`, `adapter_model.safetensors`.

An adapter in such a file belongs to one of torch's modules. Where that is several of our projections (GPT-2's `c_attn`
is query, key and value), their A's are stacked, each B has columns of its own, zero in the rows of the others' A's, and
the file says the greater rank and alpha of that module: the same function, to the bit.

Source: huggingface/peft 0.21.2 `src/peft/tuners/lora/` and `src/peft/utils/save_and_load.py`.
"""

import dataclasses
import json
import math
import pathlib
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.errors import InputError
from ppo_jax.hub.configs import check_keys, family_that_holds, read_json
from ppo_jax.hub.errors import HubError
from ppo_jax.hub.families import FAMILIES
from ppo_jax.hub.keys import Key, read_key, words
from ppo_jax.hub.layout import Tensor, file_layout, flatten
from ppo_jax.hub.reading import Source, existing, put, read_array
from ppo_jax.hub.tensors import Writable, listed, open_weights, write_weights
from ppo_jax.hub.writing import replace_folder
from ppo_jax.models import Decoder, LoRAConfig, ModelConfig
from ppo_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

KEYS: Mapping[str, Key] = {
    "rank": Key("r"),
    "alpha": Key("lora_alpha", float),
    "rslora": Key("use_rslora", bool, False),
    "dora": Key("use_dora", bool, False),
}
"""Field of `LoRAConfig` -> key of the file."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the base as well
}
"""Keys with the values that we can compute."""

IRRELEVANT = words(
    "task_type auto_mapping base_model_name_or_path revision inference_mode peft_version lora_dropout runtime_config",
    # what has an adapter is seen by its tensors
    "target_modules exclude_modules layers_to_transform layers_pattern ensure_weight_tying",
    # how the base is stored, or initialised
    "fan_in_fan_out megatron_core loftq_config eva_config qalora_group_size",
)
"""Keys that change no logit."""

_REPEATED = re.compile(r"[*+?})][*+{]|([*+?{].*){5}")
"""Patterns that could take a lifetime to match: a repetition of a repetition, or more of them than anybody needs."""


class _Module(NamedTuple):
    """One of torch's linear layers: its name, and the projections that it is for us."""

    name: str
    paths: tuple[str, ...]
    num_in: int
    nums_out: tuple[int, ...]
    weight: Tensor


def save_adapter(
    folder: str | pathlib.Path,
    adapter: Params,
    config: LoRAConfig,
    model: ModelConfig,
    base: str = "",
    tokenizer: Any = None,
) -> pathlib.Path:
    """Writes a folder that `peft.PeftModel.from_pretrained` opens over the base model.

    It is replaced whole or not at all, as by `save`.

    Args:
        folder: where to; an adapter folder that stands there is replaced, with everything in it.
        adapter: as from `init_adapter`; stored as float32. A rank in it may be another than `config.rank`.
        config: what made it.
        model: the model that it is laid over.
        base: path or hub id of that model, for whoever opens the folder without naming one.
        tokenizer: anything with `save_pretrained(folder)`.

    Returns:
        The folder, absolute.

    Raises:
        HubError: no family can express the model; an adapter that is empty, does not fit the model, or is not finite.
    """
    modules = _modules(model)
    tensors, ranks = _tensors(flatten(adapter), config, modules)
    raw = _write_config(config, base, ranks, modules)

    def write(new: pathlib.Path) -> None:
        write_weights(new / WEIGHTS, tensors)
        (new / CONFIG).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))

    return replace_folder(folder, CONFIG, write)


def load_adapter(folder: str | pathlib.Path, model: ModelConfig) -> tuple[LoRAConfig, dict[str, Any]]:
    """Reads an adapter folder of PEFT: LoRA, rsLoRA or DoRA on the projections of the layers.

    A module whose alpha or rank is not that of the whole has its own scale; it is multiplied into its B, so that the
    scale of the whole is right everywhere. `c_attn` of GPT-2 becomes three adapters; they share a copy of its A, other
    than in a file of `save_adapter`, which comes back as it was.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        model: the model that it is to be laid over.

    Returns:
        (what made it: its `scale` is the `ModelConfig.lora_scale` to compute with, its `targets` match what has an
        adapter; the adapter, a tree for `overlay`, numpy float32).

    Raises:
        HubError: a damaged file; an option that we cannot compute; tensors that are missing, surplus, of another shape,
            or not of finite floats; pickles only.
    """
    folder = existing(folder)
    path = folder / CONFIG
    raw = read_json(path)
    patterns = {name: _read_pattern(raw, name, path) for name in ("rank_pattern", "alpha_pattern")}
    check_keys(raw, ONLY, IRRELEVANT | patterns.keys() | {key.name for key in KEYS.values()}, path)
    config = _read_config(raw, path)
    modules = _modules(model)
    adapter: dict[str, Any] = {}
    with open_weights(folder, WEIGHTS) as holders:
        left = dict(holders)
        for module in modules:
            _read_module(adapter, module, left, config, patterns, folder)
    if left:
        raise HubError(f"{folder}: tensors that belong to no projection of this model: {listed(left)}")
    return dataclasses.replace(config, targets=_targets(adapter, modules, folder)), adapter


def _modules(model: ModelConfig) -> list[_Module]:
    """The linear layers within the layers, in the order of the files."""
    layout = file_layout(FAMILIES[family_that_holds(model)], Decoder(model), where="adapter")
    return [
        _module(tensor) for tensor in layout if re.match(r"layer_\d+/.*/(?!expert_|router)\w+/kernel$", tensor.paths[0])
    ]


def _module(tensor: Tensor) -> _Module:
    paths = tuple(path.removesuffix("/kernel") for path in tensor.paths)
    nums_out = np.diff([0, *tensor.cuts, tensor.shape[1]]).tolist()
    return _Module(tensor.name.removesuffix(".weight"), paths, tensor.shape[0], tuple(nums_out), tensor)


def _selection(chosen: Iterable[str], universe: Iterable[str], separator: str) -> list[str]:
    """The last words of the chosen names, where these words mean the same of all names; else the names."""
    chosen = set(chosen)
    last = {name.rpartition(separator)[2] for name in chosen}
    meant = {name for name in universe if name.rpartition(separator)[2] in last}
    return sorted(last if meant == chosen else chosen)


# Out.


def _tensors(
    flat: Mapping[str, Any], config: LoRAConfig, modules: list[_Module]
) -> tuple[dict[str, Writable], dict[str, int]]:
    """The tensors of the file by name, and the rank of each module that has some."""
    kinds = ("lora_a", "lora_b", *(["lora_magnitude"] if config.dora else []))
    lost = flat.keys() - {f"{path}/{kind}" for module in modules for path in module.paths for kind in kinds}
    if lost:
        raise HubError(f"save: parameters that are no part of such an adapter of this model: {listed(lost)}")
    tensors: dict[str, Writable] = {}
    ranks: dict[str, int] = {}
    for module in modules:
        parts = [_part(flat, module, i, kinds) for i in range(len(module.paths))]
        if not any(parts):
            continue
        if config.dora and not all(parts):
            raise HubError(
                f"save: {module.name} is one for DoRA: expected adapters on all of {', '.join(module.paths)}"
            )
        arrays = _joined(module, parts, config.rank)
        ranks[module.name] = len(arrays["lora_A.weight"])
        for name, array in arrays.items():
            tensors[f"{PREFIX}{module.name}.{name}"] = _writable(array)
    if not tensors:
        raise HubError("save: the adapter is empty")
    return tensors, ranks


def _part(flat: Mapping[str, Any], module: _Module, i: int, kinds: Iterable[str]) -> dict[str, np.ndarray]:
    """The i-th projection's arrays by their kind, checked; none if it has no adapter."""
    path, num_out = module.paths[i], module.nums_out[i]
    part = {kind: np.asarray(flat[f"{path}/{kind}"], np.float32) for kind in kinds if f"{path}/{kind}" in flat}
    if not part:
        return part
    if len(part) < len(tuple(kinds)):
        raise HubError(f"save: the adapter of {path} has only {listed(part)}")
    rank = max(1, len(np.atleast_1d(part["lora_b"])))
    shapes = {"lora_a": (module.num_in, rank), "lora_b": (rank, num_out), "lora_magnitude": (num_out,)}
    for kind, array in part.items():
        if array.shape != shapes[kind]:
            raise HubError(f"save: {path}/{kind}: got shape {array.shape}, expected {shapes[kind]}")
        if not np.isfinite(array).all():
            raise HubError(f"save: {path}/{kind}: values that are not finite numbers")
    return part


def _joined(module: _Module, parts: list[dict[str, np.ndarray]], rank: int) -> dict[str, np.ndarray]:
    """A's stacked, B's beside each other in rows of their own, magnitudes likewise. A projection without has zeros."""
    pairs = [
        (part["lora_a"], part["lora_b"])
        if part
        else (np.zeros((module.num_in, rank), np.float32), np.zeros((rank, num_out), np.float32))
        for part, num_out in zip(parts, module.nums_out, strict=True)
    ]
    ends = np.cumsum([len(b) for _, b in pairs])
    columns = [np.pad(b, ((end - len(b), ends[-1] - end), (0, 0))) for (_, b), end in zip(pairs, ends, strict=True)]
    arrays = {
        "lora_A.weight": np.concatenate([a.T for a, _ in pairs]),
        "lora_B.weight": np.ascontiguousarray(module.weight.join(columns).T),
    }
    if all("lora_magnitude" in part for part in parts):
        arrays["lora_magnitude_vector"] = module.weight.join([part["lora_magnitude"] for part in parts])
    return arrays


def _writable(array: np.ndarray) -> Writable:
    return Writable(array.shape, array.dtype, lambda: array)


def _write_config(config: LoRAConfig, base: str, ranks: Mapping[str, int], modules: list[_Module]) -> dict[str, Any]:
    """`adapter_config.json`; what it does not say is PEFT's default. Every module keeps the scale of the whole."""
    rank_pattern, alpha_pattern = {}, {}
    for rank in sorted(set(ranks.values()) - {config.rank}):
        ratio = rank / config.rank
        for word in _selection((name for name in ranks if ranks[name] == rank), ranks, "."):
            rank_pattern[word] = rank
            alpha_pattern[word] = _plain(config.alpha * (math.sqrt(ratio) if config.rslora else ratio))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "fan_in_fan_out": not modules[0].weight.transposed,  # GPT-2's Conv1D
        "target_modules": _selection(ranks, (module.name for module in modules), "."),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def _plain(number: float) -> float | int:
    """A whole number without its point, as PEFT writes alpha."""
    return int(number) if float(number).is_integer() else float(number)


# In.


def _read_config(raw: Mapping[str, Any], where: object) -> LoRAConfig:
    fields = {field: read_key(raw, key, where) for field, key in KEYS.items()}
    try:
        return LoRAConfig(**fields)
    except InputError as error:
        raise HubError(f"{where}: {error}") from error


def _read_pattern(raw: Mapping[str, Any], name: str, where: object) -> dict[re.Pattern[str], float]:
    """`rank_pattern` or `alpha_pattern`: regular expressions of module names, each with its number."""
    pattern = raw.get(name) or {}
    if not isinstance(pattern, dict):
        raise HubError(f"{where}: {name}: got {reprlib.repr(pattern)}, expected an object")
    read = {}
    for key in pattern:
        value = read_key(pattern, Key(key, int if name == "rank_pattern" else float), f"{where}: {name}")
        try:
            if _REPEATED.search(key):
                raise re.error("too many repetitions")
            read[re.compile(rf"(.*\.)?({key})$")] = value
        except re.error as error:
            raise HubError(f"{where}: {name}: {reprlib.repr(key)}: no regular expression ({error})") from error
    return read


def _read_module(
    adapter: dict[str, Any],
    module: _Module,
    left: dict[str, Any],
    config: LoRAConfig,
    patterns: Mapping[str, Mapping[re.Pattern[str], float]],
    where: object,
) -> None:
    """Moves one module's tensors from what is `left` of the file into the adapter."""

    def own(name: str, default: float) -> float:
        return next((value for key, value in patterns[name].items() if key.match(module.name)), default)

    rank = int(own("rank_pattern", config.rank))
    shapes: dict[str, tuple[int, ...]] = {
        "lora_A.weight": (module.num_in, rank),
        "lora_B.weight": (rank, sum(module.nums_out)),
    }
    if config.dora:
        shapes["lora_magnitude_vector"] = (sum(module.nums_out),)
    names = {kind: f"{PREFIX}{module.name}.{kind}" for kind in shapes}
    missing = [name for name in names.values() if name not in left]
    if len(missing) == len(names):
        return
    if missing:
        raise HubError(f"{where}: tensors are missing: {listed(missing)}")
    a, b, *magnitude = (
        read_array(Source(name, left.pop(name)), Tensor(name, (), True, shapes[kind], (), np.dtype(np.float32)), where)
        for kind, name in names.items()
    )
    ratio = own("alpha_pattern", config.alpha) / config.alpha
    ratio *= math.sqrt(config.rank / rank) if config.rslora else config.rank / rank
    with np.errstate(over="ignore"):
        b = (b.astype(np.float64) * ratio).astype(np.float32)
    if not np.isfinite(b).all():
        raise HubError(f"{where}: {names['lora_B.weight']}: values that are not finite numbers, with their alpha")
    magnitudes = module.weight.split(magnitude[0]) if magnitude else []
    pairs = _split(a, module.weight.split(b), config.rank)
    for i, (path, (one_a, one_b)) in enumerate(zip(module.paths, pairs, strict=True)):
        if len(module.paths) > 1 and not (magnitudes or one_a.any() or one_b.any()):
            continue  # the zeros that `_joined` put where a projection has no adapter
        put(adapter, f"{path}/lora_a", np.ascontiguousarray(one_a))
        put(adapter, f"{path}/lora_b", np.ascontiguousarray(one_b))
        if magnitudes:
            put(adapter, f"{path}/lora_magnitude", np.ascontiguousarray(magnitudes[i]))


def _split(a: np.ndarray, columns: list[np.ndarray], rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(A, B) of each projection: its block, where the file is one of `_joined`; else all of A with its columns of B."""
    rows = [slice(i * rank, (i + 1) * rank) for i in range(len(columns))]
    inside = sum(np.count_nonzero(part[row]) for part, row in zip(columns, rows, strict=True))
    every = sum(map(np.count_nonzero, columns))
    if a.shape[1] == rank * len(columns) and every == inside:
        return [(a[:, row], part[row]) for part, row in zip(columns, rows, strict=True)]
    return [(a, part) for part in columns]


def _targets(adapter: Mapping[str, Any], modules: list[_Module], where: object) -> str:
    """A regular expression for `LoRAConfig.targets` that matches what has an adapter, and nothing else."""
    having = {path.removesuffix("/lora_a") for path in flatten(adapter) if path.endswith("/lora_a")}
    if not having:
        raise HubError(f"{where}: the adapter is empty")
    every = [path for module in modules for path in module.paths]
    return f"({'|'.join(_selection(having, every, '/'))})$"
