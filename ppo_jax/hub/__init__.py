"""Hugging Face model folders in and out: GPT-2 and Llama, safetensors only.

`resolve` finds a folder, `load_config` and `load_params` read it, `save` writes one that transformers opens;
`load_reward_model` and `save_reward_model` do so for a sequence classifier with one label.
"""

from ppo_jax.hub.errors import HubError
from ppo_jax.hub.reading import load_config, load_eos_ids, load_pad_id, load_params, load_reward_model, resolve
from ppo_jax.hub.writing import save, save_reward_model

__all__ = [
    "HubError",
    "load_config",
    "load_eos_ids",
    "load_pad_id",
    "load_params",
    "load_reward_model",
    "resolve",
    "save",
    "save_reward_model",
]
