"""PPO fine-tuning (RLHF) of causal language models in JAX: one compiled, mesh-sharded train step over a Flax model."""

__version__ = "0.1.0"
