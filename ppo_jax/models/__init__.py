"""The networks: one decoder that is GPT-2 or Llama by configuration, and a value head on its trunk."""

from ppo_jax.models.actor_critic import ActorCritic
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.transformer import Cache, Decoder, causal_mask, empty_cache, positions_of

__all__ = ["ActorCritic", "Cache", "Decoder", "ModelConfig", "causal_mask", "empty_cache", "positions_of"]
