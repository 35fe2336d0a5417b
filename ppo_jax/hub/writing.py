"""Model folders out: everything that transformers needs to open one, written so that it stands whole or not at all."""

import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppo_jax.hub.configs import write_config
from ppo_jax.hub.errors import HubError
from ppo_jax.hub.families import FAMILIES
from ppo_jax.hub.layout import Tensor, file_layout, flatten, param_shapes
from ppo_jax.hub.tensors import WEIGHTS, Writable, listed, write_weights
from ppo_jax.models import ModelConfig
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
) -> pathlib.Path:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` of transformers open.

    All is written to a hidden sibling first, which then takes the place of what stood there. A process that dies leaves
    the old folder or the new one, whole; if it dies between the two renames, the old one stands beside it as
    `.NAME.old`, and the next `save` brings it back before it begins. One process at a time may write one folder.

    Args:
        folder: where to; a model folder that stands there is replaced, with everything in it.
        params: of a `Decoder`, float32, bfloat16 or float16; stored as they are.
        config: the model.
        tokenizer: anything with `save_pretrained(folder)`; without one, no tokenizer files are written.
        eos_ids: tokens that end a text; None: the tokenizer's. Likewise `pad_id` and `bos_id`.

    Returns:
        The folder, absolute.

    Raises:
        HubError: no family can express the model, parameters that do not fit `config` or are not finite, a place that
            holds something else than a model.
    """
    target = pathlib.Path(folder).expanduser().resolve()
    fresh, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    _bring_back(old, target)
    if target.exists() and not (target / "config.json").is_file() and not _is_empty_folder(target):
        raise HubError(f"save: {target} exists and is no model folder")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        fresh.mkdir()
        _write(fresh, params, config, tokenizer, _token_ids(tokenizer, eos_ids, pad_id, bos_id))
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
    """The three entries of `generation_config.json`; several EOS ids are a list, one is a number, none is null."""
    ids = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if eos_ids is not None:
        ids["eos_token_id"] = [int(i) for i in eos_ids] if len(eos_ids) > 1 else next(map(int, eos_ids), None)
    if pad_id is not None:
        ids["pad_token_id"] = int(pad_id)
    if bos_id is not None:
        ids["bos_token_id"] = int(bos_id)
    return ids


def _write(
    folder: pathlib.Path, params: Params, config: ModelConfig, tokenizer: Any, token_ids: Mapping[str, Any]
) -> None:
    flat = flatten(params)
    misfits = dict({path: tuple(leaf.shape) for path, leaf in flat.items()}.items() ^ param_shapes(config).items())
    if misfits:
        raise HubError(f"save: parameters that do not fit the configuration: {listed(misfits)}")
    raw = write_config(config, np.dtype(flat["embed/embedding"].dtype).name, token_ids)
    layout = file_layout(FAMILIES[raw["model_type"]], config, where="save")
    write_weights(folder / WEIGHTS, {tensor.name: _writable(tensor, flat) for tensor in layout})
    for name, content in (("config.json", raw), ("generation_config.json", token_ids)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _writable(tensor: Tensor, flat: Mapping[str, Any]) -> Writable:
    def read() -> np.ndarray:
        array = np.concatenate([np.asarray(flat[path]) for path in tensor.paths], axis=-1)
        if not np.isfinite(array).all():
            raise HubError(f"save: {', '.join(tensor.paths)}: values that are not finite numbers")
        return array.T if tensor.transposed else array

    return Writable(tensor.stored_shape, np.dtype(flat[tensor.paths[0]].dtype), read)
