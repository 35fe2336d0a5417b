"""Judges. In the program: a score in pure JAX, of a rollout's tokens. On the host: `reward(prompts, completions,
**columns)`, in this process or behind a web address. Several at once are weighted and summed.
"""

from ppo_jax.rewards.combined import Judges, check_score
from ppo_jax.rewards.critic import load_critic
from ppo_jax.rewards.host import HostReward, RewardError, call_reward
from ppo_jax.rewards.http import HttpOptions
from ppo_jax.rewards.lexicon import make_lexicon_score
from ppo_jax.rewards.registry import load_host_reward, load_reward

__all__ = [
    "HostReward",
    "HttpOptions",
    "Judges",
    "RewardError",
    "call_reward",
    "check_score",
    "load_critic",
    "load_host_reward",
    "load_reward",
    "make_lexicon_score",
]
