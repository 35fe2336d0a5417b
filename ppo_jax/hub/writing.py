"""Model folders out: everything that transformers needs to open one, written so that it stands whole or not at all."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ppo_jax.hub.configs import write_config
from ppo_jax.hub.errors import HubError
from ppo_jax.hub.families import FAMILIES
from ppo_jax.hub.family import Model
from ppo_jax.hub.layout import Tensor, file_layout, flatten, param_shapes
from ppo_jax.hub.tensors import Writable, listed, write_shards
from ppo_jax.models import Decoder, ModelConfig, RewardModel
from ppo_jax.types import Params


def save(
    folder: str | pathlib.Path,
    params: Params,
    config: ModelConfig,
    tokenizer: Any = None,
    *,
    eos_ids: Sequence[int] | None = None,
    pad_id: int | None = None,
    bos_id: int | None = None,
    dtype: str | None = None,
) -> pathlib.Path:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` of transformers open.

    All is written to a hidden sibling first, which then takes the place of what stood there. A process that dies leaves
    the old folder or the new one, whole; if it dies between the two renames, the old one stands beside it as
    `.NAME.old`, and the next `save` brings it back before it begins. One process at a time may write one folder.

    Args:
        folder: where to; a model folder that stands there is replaced, with everything in it.
        params: of a `Decoder`.
        config: the model.
        tokenizer: anything with `save_pretrained(folder)`; without one, no tokenizer files are written.
        eos_ids: tokens that end a text; None: the tokenizer's. Likewise `pad_id` and `bos_id`.
        dtype: `float32`, `float16` or `bfloat16`, which the weights are rounded to; None: what the embedding has.

    Returns:
        The folder, absolute.

    Raises:
        HubError: no family can express the model, parameters that do not fit `config` or are not finite (in `dtype`:
            float16 ends at 65,504), another dtype, a place that holds something else than a model.
    """
    ids = _token_ids(tokenizer, eos_ids, pad_id, bos_id)
    model = Decoder(config)
    return replace_folder(folder, "config.json", lambda new: _write(new, params, model, tokenizer, ids, dtype))


def save_reward_model(
    folder: str | pathlib.Path,
    params: Params,
    config: ModelConfig,
    tokenizer: Any,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    bos_id: int | None = None,
    dtype: str | None = None,
) -> pathlib.Path:
    """Writes a folder that `AutoModelForSequenceClassification` of transformers opens, and scores with alike.

    Texts that are padded left need `position_ids` there, for GPT-2: it counts positions from the first slot, padding
    included. It is replaced whole or not at all, as by `save`.

    Args:
        folder: as `save`.
        params: of a `RewardModel`.
        config: the model; `tie_embeddings` does not matter.
        tokenizer: as `save`; where it pads, it must pad with `pad_id`.
        eos_ids: tokens that end a text.
        pad_id: the id by which the scored token is found; transformers scores no batches without one.
        bos_id: None: the tokenizer's.
        dtype: as `save`; the score head is stored in float32 in any case.

    Returns:
        The folder, absolute.

    Raises:
        HubError: as `save`; a pad id outside the vocabulary, or other than the tokenizer's.
    """
    if not 0 <= pad_id < config.vocab_size:
        raise HubError(f"save: pad_id: got {pad_id}, expected an id in the vocabulary of {config.vocab_size}")
    theirs = getattr(tokenizer, "pad_token_id", None)
    if theirs not in (None, pad_id):
        raise HubError(f"save: pad_id: got {pad_id}, expected {theirs}, with which the tokenizer pads")
    model = RewardModel(dataclasses.replace(config, tie_embeddings=True))
    ids = _token_ids(tokenizer, eos_ids, pad_id, bos_id)
    return replace_folder(folder, "config.json", lambda new: _write(new, params, model, tokenizer, ids, dtype))


def replace_folder(folder: str | pathlib.Path, mark: str, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """What `save` says of its folder: the new one is complete before it takes the place of the old one.

    Args:
        folder: where to.
        mark: a file that tells a folder of this kind, which may be replaced, from any other.
        write: fills an empty folder.

    Returns:
        The folder, absolute.

    Raises:
        HubError: the place holds something else.
    """
    target = pathlib.Path(folder).expanduser().resolve()
    fresh, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    _bring_back(old, target)
    if target.exists() and not (target / mark).is_file() and not _is_empty_folder(target):
        raise HubError(f"save: {target} exists and is no model folder ({mark} is missing)")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        fresh.mkdir()
        write(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException:
        _bring_back(old, target)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return target


def _bring_back(old: pathlib.Path, target: pathlib.Path) -> None:
    if old.exists() and not target.exists():
        old.rename(target)


def _is_empty_folder(path: pathlib.Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _token_ids(
    tokenizer: Any, eos_ids: Sequence[int] | None, pad_id: int | None, bos_id: int | None
) -> dict[str, int | list[int] | None]:
    """The three entries of both configuration files; several EOS ids are a list, one is a number, none is null."""
    ids = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if eos_ids is not None:
        ids["eos_token_id"] = [int(i) for i in eos_ids] if len(eos_ids) > 1 else next(map(int, eos_ids), None)
    if pad_id is not None:
        ids["pad_token_id"] = int(pad_id)
    if bos_id is not None:
        ids["bos_token_id"] = int(bos_id)
    return ids


def _write(
    folder: pathlib.Path,
    params: Params,
    model: Model,
    tokenizer: Any,
    token_ids: Mapping[str, Any],
    dtype: str | None,
) -> None:
    flat = flatten(params)
    shapes, expected = ({path: tuple(x.shape) for path, x in tree.items()} for tree in (flat, param_shapes(model)))
    misfits = dict(shapes.items() ^ expected.items())
    if misfits:
        raise HubError(f"save: parameters that do not fit the configuration: {listed(misfits)}")
    dtype = dtype or np.dtype(params.get("decoder", params)["embed"]["embedding"].dtype).name
    raw = write_config(model, dtype, token_ids)
    layout = file_layout(FAMILIES[raw["model_type"]], model, where="save")
    write_shards(folder, {tensor.name: _writable(tensor, flat, dtype) for tensor in layout})
    files: dict[str, Mapping[str, Any]] = {"config.json": raw}
    if isinstance(model, Decoder):  # a classifier generates nothing
        files["generation_config.json"] = token_ids
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _writable(tensor: Tensor, flat: Mapping[str, Any], dtype: str) -> Writable:
    stored = np.dtype("float32" if tensor.paths[0].startswith("score_head/") else dtype)

    def read() -> np.ndarray:
        with np.errstate(over="ignore"):  # told below
            parts = [np.asarray(flat[path]) for path in tensor.paths]
            parts = parts if tensor.expert is None else [part[tensor.expert] for part in parts]
            array = tensor.join(parts).astype(stored, copy=False)
        if not np.isfinite(array).all():
            raise HubError(f"save: {', '.join(tensor.paths)}: values that are not finite numbers in {stored.name}")
        return array.T if tensor.transposed else array

    return Writable(tensor.stored_shape, stored, read)
