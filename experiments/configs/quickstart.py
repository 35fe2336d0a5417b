"""The whole road on two CPU cores, offline: write a corpus of reviews, pretrain a small Llama on it, PPO towards
praise.

    make quickstart

Two to four minutes on two cores. The score rises from 0.09 to 0.89 of 1, at a KL of 2.7 nats a response (limit: 20),
and the grammar of the corpus accepts as many sentences as before (80 % against 76 %).
"""

import ml_collections

from experiments.settings import RLHFExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(RLHFExperiment)

    config.pretrain.length = 52  # the longest review has 51 tokens
    config.pretrain.num_steps = 900
    config.pretrain.batch_size = 32
    config.pretrain.lr = 3e-3
    config.pretrain.warmup_steps = 30
    config.pretrain.checkpoint_every = 250
    config.pretrain.eval_every = 250
    config.pretrain.log_every = 50
    config.pretrain.architecture.num_layers = 4
    config.pretrain.architecture.num_heads = 4
    config.pretrain.architecture.num_kv_heads = 2
    config.pretrain.architecture.width = 128
    config.pretrain.architecture.mlp_width = 384
    config.pretrain.architecture.max_positions = 96

    config.ppo.reward = "jax:experiments.rewards:praise"
    config.ppo.num_iterations = 40
    config.ppo.kl_limit = 20.0
    config.ppo.ppo.batch_size = 64
    config.ppo.ppo.prompt_length = 24
    config.ppo.ppo.response_length = 40
    config.ppo.ppo.num_epochs = 2
    config.ppo.ppo.num_minibatches = 4
    config.ppo.ppo.lr = 1e-4
    config.ppo.ppo.kl_coef = 0.05
    return config
