"""Tensors in safetensors files: one file or several with an index, read and written one tensor at a time.

Pickles (`pytorch_model.bin` and its kin) are refused by name: to read one is to run it.
"""

import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors

from ppo_jax.hub.configs import read_json
from ppo_jax.hub.errors import HubError

WEIGHTS = "model.safetensors"
SHARD_BYTES = 5 * 10**9
"""Of the largest file, where there is more than one tensor in it; transformers has the same."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Writable(NamedTuple):
    """A tensor to be written: what the header says at once, the data when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@contextlib.contextmanager
def open_weights(folder: pathlib.Path, weights: str = WEIGHTS) -> Iterator[dict[str, Any]]:
    """Opens the files of a folder; yields tensor name -> open file that holds it. Nothing is read but the headers.

    Args:
        folder: where they are.
        weights: name of the file; if there is none of that name, but an index, the files that the index names.

    Raises:
        HubError: no safetensors (pickles only, or nothing), a damaged file, an index that does not fit its files.
    """
    shards = _shards(folder, weights)
    with contextlib.ExitStack() as stack:
        holders: dict[str, Any] = {}
        for path, promised in shards.items():
            _check_inside(path)
            try:
                file = stack.enter_context(safetensors.safe_open(path, framework="np"))
            except (OSError, safetensors.SafetensorError) as error:
                raise HubError(f"{path}: not a safetensors file ({error})") from error
            names = set(file.keys())
            if promised is not None and names != promised:
                raise HubError(f"{path}: the index and the file differ in {listed(names ^ promised)}")
            holders |= dict.fromkeys(names, file)
        yield holders


def _check_inside(path: pathlib.Path) -> None:
    """Refuses a link that leads out of its folder, other than into the blobs of the hub's cache, which is made so."""
    folder, target = path.parent.resolve(), path.resolve()
    if not target.is_relative_to(folder) and target.parent != folder.parent.parent / "blobs":
        raise HubError(f"{path}: is a link to {target}, out of its folder, expected a file in it")


def _shards(folder: pathlib.Path, weights: str) -> dict[pathlib.Path, set[str] | None]:
    """Files to open, each with the tensors that an index promises in it (None: no index, whatever it holds)."""
    if (folder / weights).is_file():
        return {folder / weights: None}
    index = folder / f"{weights}.index.json"
    if not index.is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise HubError(
                f"{folder}: only pickle weights ({listed(pickles)}), which run code when opened and are refused; "
                f"expected {weights}"
            )
        raise HubError(f"{folder}: no weights, expected {weights} or {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise HubError(f"{index}: weight_map is not a table of tensor names and file names")
    shards: dict[pathlib.Path, set[str] | None] = {}
    for shard in sorted(set(weight_map.values())):
        if shard != pathlib.PurePosixPath(shard).name or "\\" in shard or not shard.endswith(".safetensors"):
            raise HubError(f"{index}: refuses {shard!r}, expected the name of a safetensors file in the same folder")
        if not (folder / shard).is_file():
            raise HubError(f"{index}: names {shard!r}, which is not there")
        shards[folder / shard] = {name for name, file in weight_map.items() if file == shard}
    return shards


def write_shards(folder: pathlib.Path, tensors: Mapping[str, Writable]) -> None:
    """Writes `model.safetensors`, or several files with an index, none of them larger than `SHARD_BYTES`.

    Args:
        folder: where to.
        tensors: by name, in the order in which they are divided.

    Raises:
        HubError: as `write_weights`.
    """
    sizes = {name: math.prod(tensor.shape) * tensor.dtype.itemsize for name, tensor in tensors.items()}
    shards: list[dict[str, Writable]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sizes[name] + sum(sizes[other] for other in shards[-1]) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_weights(folder / WEIGHTS, tensors)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_weights(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / f"{WEIGHTS}.index.json").write_text(text, encoding="utf-8")


def write_weights(path: pathlib.Path, tensors: Mapping[str, Writable]) -> None:
    """Writes one safetensors file, its names sorted: the same tensors give the same bytes.

    Source: the format, huggingface/safetensors README: 8 bytes length, a JSON header padded with blanks, the data.

    Args:
        path: the file.
        tensors: by name.

    Raises:
        HubError: a dtype that is not float32, float16 or bfloat16.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.dtype.name not in _CODES:
            raise HubError(f"save: {name} has dtype {tensor.dtype.name}, expected one of {', '.join(_CODES)}")
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _CODES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name].read()).reshape(-1).view(np.uint8).data)


def listed(names: Any, limit: int = 3) -> str:
    """A few names for a message, sorted, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
