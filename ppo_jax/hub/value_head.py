"""A critic's head, in a safetensors file beside the model on whose trunk it sits: torch's names and orientation."""

import os
import pathlib

import numpy as np

from ppo_jax.hub.configs import read_config, read_json
from ppo_jax.hub.errors import HubError
from ppo_jax.hub.layout import Tensor
from ppo_jax.hub.reading import Source, existing, read_array
from ppo_jax.hub.tensors import Writable, listed, open_weights, write_weights
from ppo_jax.types import Params

WEIGHTS = "value_head.safetensors"


def save_value_head(folder: str | pathlib.Path, value_head: Params) -> pathlib.Path:
    """Writes `value_head.safetensors` into a folder of `save` or `save_reward_model`, which must stand already.

    Args:
        folder: of the critic's trunk.
        value_head: `{"kernel": [D, 1], "bias": [1]}`.

    Returns:
        The file: `weight` [1, D] and `bias` [1], float32, as torch's `Linear` has them.

    Raises:
        HubError: no model folder, other parameters, another width than the model's, or values that are not finite.
    """
    folder = existing(folder)
    tensors = _layout(folder)
    if value_head.keys() != tensors.keys():
        raise HubError(f"save: value head: got {listed(value_head)}, expected {listed(tensors)}")
    writable = {}
    for name, tensor in tensors.items():
        array = np.asarray(value_head[name], np.float32)
        if array.shape != tensor.shape or not np.isfinite(array).all():
            what = "values that are not finite numbers" if array.shape == tensor.shape else f"shape {array.shape}"
            raise HubError(f"save: value head: {name}: got {what}, expected finite numbers of shape {tensor.shape}")
        stored = array.T
        writable[tensor.name] = Writable(stored.shape, stored.dtype, lambda stored=stored: stored)
    fresh = folder / f".{WEIGHTS}.new"
    write_weights(fresh, writable)
    os.replace(fresh, folder / WEIGHTS)  # the file is whole or not there
    return folder / WEIGHTS


def load_value_head(folder: str | pathlib.Path) -> dict[str, np.ndarray] | None:
    """Reads the head that `save_value_head` wrote beside a model.

    Returns:
        `{"kernel": [D, 1], "bias": [1]}` float32; None: there is none.

    Raises:
        HubError: no model folder, a damaged file, tensors that are missing, surplus, of another shape or not finite.
    """
    folder = existing(folder)
    if not (folder / WEIGHTS).exists():
        return None
    tensors = _layout(folder)
    with open_weights(folder, WEIGHTS) as holders:
        expected = {tensor.name for tensor in tensors.values()}
        if holders.keys() != expected:
            raise HubError(f"{folder / WEIGHTS}: got tensors {listed(holders)}, expected {listed(expected)}")
        return {
            name: read_array(Source(tensor.name, holders[tensor.name]), tensor, folder / WEIGHTS)
            for name, tensor in tensors.items()
        }


def _layout(folder: pathlib.Path) -> dict[str, Tensor]:
    """Our name -> the tensor of the file, in the width of the model in the folder."""
    path = folder / "config.json"
    width = read_config(read_json(path), path, "float32", "float32").width
    dtype = np.dtype(np.float32)
    return {
        "kernel": Tensor("weight", (), True, (width, 1), (), dtype),
        "bias": Tensor("bias", (), True, (1,), (), dtype),
    }
