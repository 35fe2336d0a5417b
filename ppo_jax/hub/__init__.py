"""Hugging Face model folders in and out: the families of `families.py`, safetensors only.

`resolve` finds a folder, `load_config` and `load_params` read it, `save` writes one that transformers opens;
`load_reward_model` and `save_reward_model` do so for a sequence classifier with one label, `load_adapter` and
`save_adapter` for an adapter of PEFT, `load_value_head` and `save_value_head` for a critic's head beside a model.
"""

from ppo_jax.hub.errors import HubError
from ppo_jax.hub.peft import load_adapter, save_adapter
from ppo_jax.hub.reading import (
    load_config,
    load_dtype,
    load_eos_ids,
    load_pad_id,
    load_params,
    load_reward_model,
    resolve,
)
from ppo_jax.hub.value_head import load_value_head, save_value_head
from ppo_jax.hub.writing import save, save_reward_model

__all__ = [
    "HubError",
    "load_adapter",
    "load_config",
    "load_dtype",
    "load_eos_ids",
    "load_pad_id",
    "load_params",
    "load_reward_model",
    "load_value_head",
    "resolve",
    "save",
    "save_adapter",
    "save_reward_model",
    "save_value_head",
]
