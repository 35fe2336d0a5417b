"""10,000 damaged weight files and indexes: each is read for what it says, or ends in the typed error; nothing else."""

import json
import resource
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from families import CONFIGS
from folders import random_params

from ppo_jax import hub

ROUNDS = 1000  # of each kind
STRANGE = [-1, 0, 1, 2**31, 2**53, 2**63, 2**64, 10**30, 1.5, True, None, "", "F32", [], {}, [[]], "\x00", "../x"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with one file, and the same in two files."""
    place, config = tmp_path_factory.mktemp("good"), CONFIGS["llama"]
    hub.save(place / "one", random_params(config), config)
    shutil.copytree(place / "one", place / "two")
    raw = (place / "one" / "model.safetensors").read_bytes()
    (place / "two" / "model.safetensors").unlink()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    header.pop("__metadata__")
    names, weight_map = sorted(header), {}
    for part in (0, 1):
        file, table, body = f"model-{part}.safetensors", {}, b""
        for name in names[part::2]:
            begin, end = header[name]["data_offsets"]
            table[name] = header[name] | {"data_offsets": [len(body), len(body) + end - begin]}
            body += data[begin:end]
            weight_map[name] = file
        (place / "two" / file).write_bytes(with_header(table, body))
    (place / "two" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return place


def with_header(header, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def flip(rng, raw: bytes, low: int, high: int) -> bytes:
    """Some bytes of a range become others."""
    damaged = bytearray(raw)
    for at in rng.integers(low, high, rng.integers(1, 6)):
        damaged[at] = rng.integers(256)
    return bytes(damaged)


def cut(rng, raw: bytes) -> bytes:
    """A piece is left out, put in twice, or the end is missing."""
    begin, end = sorted(rng.integers(0, len(raw), 2).tolist())
    return [raw[:begin] + raw[end:], raw[:end] + raw[begin:], raw[:begin]][rng.integers(3)]


def mutate(rng, value, depth: int = 0):
    """One leaf or branch of a JSON value becomes another."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = list(value)[rng.integers(len(value))]
        how = rng.random()
        if how < 0.1:
            return {key: x for key, x in value.items() if key != name}
        if how < 0.2:
            return value | {name + "x": value[name]}
        return value | {name: mutate(rng, value[name], depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.integers(len(value))
        return [*value[:at], mutate(rng, value[at], depth + 1), *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.7:
        return int(value + rng.integers(-9, 10))
    return STRANGE[rng.integers(len(STRANGE))]


def damage(rng, kind: str, folder: Path) -> None:
    """Spoils a fresh copy in place."""
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    path = index if kind.startswith("index") else weights if weights.exists() else folder / "model-1.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    if kind == "length":
        raw = int(rng.integers(0, 2**63) >> rng.integers(64)).to_bytes(8, "little") + raw[8:]
    elif kind == "header bytes":
        raw = flip(rng, raw, 8, 8 + size)
    elif kind == "any bytes":
        raw = flip(rng, raw, 0, len(raw))
    elif kind == "pieces":
        raw = cut(rng, raw)
    elif kind == "header values":
        raw = with_header(mutate(rng, json.loads(raw[8 : 8 + size])), raw[8 + size :])
    elif kind == "index bytes":
        raw = flip(rng, raw, 0, len(raw))
    elif kind == "index pieces":
        raw = cut(rng, raw)
    else:
        raw = json.dumps(mutate(rng, json.loads(raw))).encode()
    path.write_bytes(raw)


KINDS = {
    "length": "one", "header bytes": "one", "any bytes": "one", "pieces": "one", "header values": "one",
    "index bytes": "two", "index pieces": "two", "index values": "two", "part header values": "two",
    "part pieces": "two",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kind, good, rng, tmp_path):
    config = hub.load_config(good / KINDS[kind])
    expected = hub.load_params(good / KINDS[kind], config)
    shapes = jax.tree.map(np.shape, expected)
    refused, slowest, before = 0, 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(ROUNDS):
        folder = Path(shutil.copytree(good / KINDS[kind], tmp_path / str(number)))
        damage(rng, kind.removeprefix("part "), folder)
        begin = time.perf_counter()
        try:
            params = hub.load_params(folder, config)
        except hub.HubError as error:
            refused += "\n" not in str(error)
        else:
            assert jax.tree.map(np.shape, params) == shapes
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        slowest = max(slowest, time.perf_counter() - begin)
        shutil.rmtree(folder)
    assert refused > ROUNDS / 20
    assert slowest < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("name", ["model.safetensors", "model-1.safetensors"])
def test_a_link_out_of_the_folder_is_refused(name, good, tmp_path):
    folder = Path(shutil.copytree(good / ("one" if name == "model.safetensors" else "two"), tmp_path / "model"))
    (folder / name).rename(tmp_path / "elsewhere.safetensors")
    (folder / name).symlink_to(tmp_path / "elsewhere.safetensors")
    config = hub.load_config(folder)
    with pytest.raises(hub.HubError, match=f"{name}: is a link to .*elsewhere.safetensors, out of its folder"):
        hub.load_params(folder, config)
    (folder / name).unlink()
    (tmp_path / "elsewhere.safetensors").rename(folder / "inside.safetensors")
    (folder / name).symlink_to("inside.safetensors")
    hub.load_params(folder, config)


def test_links_of_the_hubs_cache_are_followed(good, tmp_path):
    """models--owner--name/snapshots/REVISION/FILE leads to models--owner--name/blobs/HASH."""
    folder, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for number, path in enumerate((good / "one").iterdir()):
        shutil.copy(path, blobs / str(number))
        (folder / path.name).symlink_to(f"../../blobs/{number}")
    config = hub.load_config(folder)
    found, expected = hub.load_params(folder, config), hub.load_params(good / "one", config)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
