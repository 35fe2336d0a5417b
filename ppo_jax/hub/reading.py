"""Model folders in: find one, read its configuration, read its weights."""

import collections
import dataclasses
import math
import pathlib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.hub import configs
from ppo_jax.hub.errors import HubError
from ppo_jax.hub.family import Family, Model
from ppo_jax.hub.layout import Tensor, file_layout
from ppo_jax.hub.tensors import listed, open_weights
from ppo_jax.models import Decoder, ModelConfig, RewardModel
from ppo_jax.types import Params

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DOWNLOADED = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "adapter_config.json",
    "adapter_model.safetensors",
]
_FLOATS = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What may be stored -> what it is written as again."""
_PIECE = 2**22
"""Bytes of a tensor that are read at a time."""

Place = Callable[[str, np.ndarray], Any]
"""(path of a parameter, the array) -> what is kept of it."""


def resolve(model: str) -> pathlib.Path:
    """The folder of a model: a local one, or a copy of a Hugging Face repository (safetensors and text files only).

    Args:
        model: a path, or a hub id: `name` or `owner/name`. An existing folder wins. What looks like a path (it begins
            with `/`, `./`, `../` or `~`, or has more than one slash) is never asked of the hub.

    Raises:
        HubError: neither exists, or the hub cannot be reached (offline, `HF_HUB_OFFLINE=1`) and has left no copy here.
    """
    folder = pathlib.Path(model).expanduser() if model.startswith("~") else pathlib.Path(model)
    if model and folder.is_dir():
        return folder
    if model and folder.exists():
        raise HubError(f"model {model!r}: is a file, expected a folder")
    if not _HUB_ID.fullmatch(model):
        raise HubError(f"model {model!r}: no such folder")
    import huggingface_hub  # slow to import, and most runs start from a local folder

    try:
        copy = huggingface_hub.snapshot_download(model, allow_patterns=_DOWNLOADED, ignore_patterns=["*/*"])
    except Exception as error:  # it raises the types of several network libraries
        raise HubError(
            f"model {model!r}: no such local folder, and the Hugging Face hub gave none of that name "
            f"({type(error).__name__}: offline, or not there?)"
        ) from error
    return pathlib.Path(copy)


def load_config(folder: str | pathlib.Path, dtype: str = "float32", param_dtype: str = "float32") -> ModelConfig:
    """Reads `config.json`.

    Args:
        folder: a Hugging Face model folder.
        dtype: of the computation, `float32` or `bfloat16`.
        param_dtype: of the parameters, the same choice; what the file stores does not decide it.

    Raises:
        HubError: an unknown family, or a key that is missing, malformed or would change what is computed.
    """
    path = existing(folder) / "config.json"
    return configs.read_config(configs.read_json(path), path, dtype, param_dtype)


def load_eos_ids(folder: str | pathlib.Path) -> tuple[int, ...]:
    """The tokens that end a text, by id: those of `generation_config.json`; if there is no such file, of `config.json`.

    Raises:
        HubError: the file is malformed.
    """
    path = existing(folder) / "generation_config.json"
    path = path if path.exists() else path.with_name("config.json")
    ids = configs.read_json(path).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(map(_is_id, ids)):
        raise HubError(f"{path}: eos_token_id {ids!r}: expected an id or a list of ids")
    return tuple(ids)


def load_pad_id(folder: str | pathlib.Path) -> int | None:
    """The pad id of `config.json`, by which a reward model finds the token that it scores; None: it has none.

    Raises:
        HubError: the file is malformed.
    """
    path = existing(folder) / "config.json"
    pad_id = configs.read_json(path).get("pad_token_id")
    if not (pad_id is None or _is_id(pad_id)):
        raise HubError(f"{path}: pad_token_id {reprlib.repr(pad_id)}: expected an id or null")
    return pad_id


def load_dtype(folder: str | pathlib.Path) -> str:
    """The dtype that a folder's weights are stored with, most of them if not all: `float32`, `float16` or `bfloat16`.

    Raises:
        HubError: pickles only, a damaged file, or mostly no floats.
    """
    folder, sizes = existing(folder), collections.Counter[str]()
    with open_weights(folder) as holders:
        for name, file in holders.items():
            header = file.get_slice(name)
            sizes[header.get_dtype()] += math.prod(header.get_shape())
    ((most, _),) = sizes.most_common(1) or [("nothing", 0)]
    if most not in _FLOATS:
        raise HubError(f"{folder}: got mostly dtype {most}, expected one of {', '.join(_FLOATS)}")
    return _FLOATS[most]


def load_params(folder: str | pathlib.Path, config: ModelConfig, place: Place | None = None) -> Params:
    """Reads the weights of a causal language model, one tensor at a time.

    Args:
        folder: a Hugging Face model folder with `model.safetensors`, or several such files and their index.
        config: from `load_config`; its `param_dtype` is what the weights are cast to.
        place: what becomes of each array as soon as it is read, by its path and itself, such as
            `ppo_jax.sharding.make_place`, by which the host holds one tensor at a time; None: they stay as they are.

    Returns:
        The parameters of a `Decoder`: nested dictionaries of numpy arrays, or of what `place` makes of them.

    Raises:
        HubError: pickles only; a damaged file; a tensor that is missing, surplus, of another shape, or not of finite
            floats; a sequence classifier.
    """
    return _read_params(existing(folder), Decoder(config), place)


def load_reward_model(
    folder: str | pathlib.Path, dtype: str = "float32", param_dtype: str = "float32"
) -> tuple[ModelConfig, Params]:
    """Reads a sequence-classification model with one label, as a reward model; its pad id is read by `load_pad_id`.

    Args:
        folder: of `LlamaForSequenceClassification` or its like of another family, or from `save_reward_model`.
        dtype: as `load_config`.
        param_dtype: as `load_config`; the score head is float32 in any case.

    Returns:
        (the configuration, with `tie_embeddings=True` whatever the file says: there is no vocabulary projection; the
        parameters of a `RewardModel`, as `load_params`).

    Raises:
        HubError: as `load_config` and `load_params`; another number of labels than one; a causal language model.
    """
    folder = existing(folder)
    path = folder / "config.json"
    raw = configs.read_json(path)
    config = dataclasses.replace(configs.read_config(raw, path, dtype, param_dtype), tie_embeddings=True)
    configs.check_one_label(raw, path)
    return config, _read_params(folder, RewardModel(config))


def _read_params(folder: pathlib.Path, model: Model, place: Place | None = None) -> Params:
    family = configs.read_family(configs.read_json(folder / "config.json"), folder / "config.json")
    params: dict[str, Any] = {}
    with open_weights(folder) as holders:
        named = _by_full_name(family, holders, folder)
        _check_kind(model, named, folder)
        place = place or (lambda path, array: array)
        layout = file_layout(family, model, where=folder, limit=len(named))
        tied = isinstance(model, Decoder) and model.config.tie_embeddings
        copy = named.pop(family.head("lm_head"), None) if tied else None
        embedding = next(tensor.name for tensor in layout if tensor.paths[0].endswith("embed/embedding"))
        if copy is not None and embedding not in named:  # a file may have either of the two names, or both
            named[embedding], copy = copy, None
        _check_names(family.architectures[type(model)], named, layout, folder)
        for path, array in _arrays(layout, named, model.config.num_experts, folder):
            if copy is not None and path == "embed/embedding":
                _check_tie(copy, array, folder)
            put(params, path, place(path, array))
    return params


def _arrays(
    layout: Sequence[Tensor], named: Mapping[str, "Source"], num_experts: int, where: object
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters by path, each as soon as it is read; the experts, which stand one after the other, are one."""
    together = np.empty(0)
    for tensor in layout:
        array = read_array(named[tensor.name], tensor, where)
        if tensor.expert is None:
            for path, part in zip(tensor.paths, tensor.split(array), strict=True):
                yield path, np.ascontiguousarray(part)
            continue
        if tensor.expert == 0:
            together = np.empty((num_experts, *array.shape), array.dtype)
        together[tensor.expert] = array
        if tensor.expert == num_experts - 1:
            yield tensor.paths[0], together


class Source(NamedTuple):
    """Where a tensor is read from."""

    name: str  # in the file
    file: Any


def existing(folder: str | pathlib.Path) -> pathlib.Path:
    """The folder, if it is one.

    Raises:
        HubError: it is not.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise HubError(f"{folder}: no such folder")
    return folder


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Puts a leaf into nested dictionaries, at a path with slashes."""
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf


def _by_full_name(family: Family, holders: Mapping[str, Any], where: object) -> dict[str, Source]:
    """A model's tensors, with the family's prefix where a file leaves it out, and without those that are ignored."""
    named: dict[str, Source] = {}
    known = (family.prefix, *(family.head(ours).removesuffix("weight") for ours in ("lm_head", "score_head")))
    for name, holder in holders.items():
        full = name if name.startswith(known) else family.prefix + name
        if full in named:
            raise HubError(f"{where}: {full!r} is there twice, with and without {family.prefix!r}")
        if not any(re.fullmatch(pattern, full) for pattern in family.ignored):
            named[full] = Source(name, holder)
    return named


def _check_kind(model: Model, named: Mapping[str, Source], where: object) -> None:
    """A folder of another kind than the one that was asked for is told so, before its tensors are compared."""
    score = named.get("score.weight")  # so called in every family
    if isinstance(model, Decoder) and score:
        raise HubError(f"{where}: a sequence classifier (score.weight is there), expected a causal language model")
    if isinstance(model, RewardModel) and not score:
        raise HubError(f"{where}: no sequence classifier (score.weight is missing), expected one with one label")
    shape = score.file.get_slice(score.name).get_shape() if score else ()
    if len(shape) == 2 and shape[0] != 1:
        raise HubError(f"{where}: score.weight has {shape[0]} labels, expected one: a reward")


def _check_names(architecture: str, named: Mapping[str, Any], layout: Sequence[Tensor], where: object) -> None:
    expected = {tensor.name for tensor in layout}
    missing, surplus = expected - named.keys(), named.keys() - expected
    if missing:
        raise HubError(f"{where}: tensors are missing: {listed(missing)}")
    if surplus:
        raise HubError(f"{where}: tensors that a {architecture} so configured has not: {listed(surplus)}")


def _check_tie(source: Source, embedding: np.ndarray, where: object) -> None:
    """A vocabulary projection that is stored although it is tied must be the embedding: one of two would be lost."""
    tensor = Tensor(source.name, (), False, embedding.shape, (), embedding.dtype)
    if not all(np.array_equal(piece, embedding[rows]) for rows, piece in _pieces(source, tensor, where)):
        raise HubError(f"{where}: {source.name} is not the embedding, although tie_word_embeddings is true")


def read_array(source: Source, tensor: Tensor, where: object) -> np.ndarray:
    """One tensor, in our orientation and dtype.

    Raises:
        HubError: another shape, no floats, or values that are not finite.
    """
    array = np.empty(tensor.shape, tensor.dtype)
    target = array.T if tensor.transposed else array
    for rows, piece in _pieces(source, tensor, where):
        target[rows] = piece
    return array


def _pieces(source: Source, tensor: Tensor, where: object) -> Iterator[tuple[slice, np.ndarray]]:
    """The rows of a tensor as it is stored, some at a time, in our dtype; raises what `read_array` says."""
    header = source.file.get_slice(source.name)
    shape, stored = tuple(header.get_shape()), header.get_dtype()
    if shape != tensor.stored_shape:
        raise HubError(f"{where}: {source.name}: got shape {shape}, expected {tensor.stored_shape}")
    if stored not in _FLOATS:
        raise HubError(f"{where}: {source.name}: got dtype {stored}, expected one of {', '.join(_FLOATS)}")
    num = max(1, _PIECE // (8 * math.prod(shape[1:])))  # of no more than 8 bytes a number
    for begin in range(0, shape[0], num):
        rows = slice(begin, min(begin + num, shape[0]))
        with np.errstate(over="ignore"):  # an infinity is found at once, by name
            piece = header[rows].astype(tensor.dtype, copy=False)
        if not np.isfinite(piece).all():
            raise HubError(f"{where}: {source.name} has values that are not finite numbers in {tensor.dtype}")
        yield rows, piece
