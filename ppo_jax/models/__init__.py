"""The networks: one decoder that is GPT-2, Llama or another by configuration, and heads on its trunk: a value, a score.

What is trained may be less than the whole: an adapter, or the upper layers, laid over a frozen base (`overlay`).
"""

from ppo_jax.models.actor_critic import ActorCritic
from ppo_jax.models.config import REMATS, ModelConfig
from ppo_jax.models.experts import load_balance, run_trunk
from ppo_jax.models.layers import by_output
from ppo_jax.models.lora import LoRAConfig, init_adapter, merge, overlay, upper_layers
from ppo_jax.models.masks import causal_mask, positions_of, segment_mask, segment_positions
from ppo_jax.models.reward import RewardModel
from ppo_jax.models.transformer import Cache, Decoder, empty_cache

__all__ = [
    "REMATS",
    "ActorCritic",
    "Cache",
    "Decoder",
    "LoRAConfig",
    "ModelConfig",
    "RewardModel",
    "by_output",
    "causal_mask",
    "empty_cache",
    "init_adapter",
    "load_balance",
    "merge",
    "overlay",
    "positions_of",
    "run_trunk",
    "segment_mask",
    "segment_positions",
    "upper_layers",
]
