"""The networks: one decoder that is GPT-2 or Llama by configuration, and heads on its trunk: a value, a score."""

from ppo_jax.models.actor_critic import ActorCritic
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.reward import RewardModel
from ppo_jax.models.transformer import (
    Cache,
    Decoder,
    causal_mask,
    empty_cache,
    positions_of,
    segment_mask,
    segment_positions,
)

__all__ = [
    "ActorCritic",
    "Cache",
    "Decoder",
    "ModelConfig",
    "RewardModel",
    "causal_mask",
    "empty_cache",
    "positions_of",
    "segment_mask",
    "segment_positions",
]
