"""Hugging Face model folders in and out: GPT-2 and Llama, safetensors only.

`resolve` finds a folder, `load_config` and `load_params` read it, `save` writes one that transformers opens.
"""

from ppo_jax.hub.errors import HubError
from ppo_jax.hub.reading import load_config, load_eos_ids, load_params, resolve
from ppo_jax.hub.writing import save

__all__ = ["HubError", "load_config", "load_eos_ids", "load_params", "resolve", "save"]
