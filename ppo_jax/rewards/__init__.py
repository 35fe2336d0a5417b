"""Judges. In the program: a `Score`, rollout to `[B]`, in pure JAX. On the host: `reward(prompts, completions,
**columns)`.
"""

from ppo_jax.rewards.host import HostReward, RewardError, call_reward, check_scores
from ppo_jax.rewards.lexicon import make_lexicon_score
from ppo_jax.rewards.model import load_critic
from ppo_jax.rewards.registry import Judge, check_score, load_host_reward, load_reward

__all__ = [
    "HostReward",
    "Judge",
    "RewardError",
    "call_reward",
    "check_score",
    "check_scores",
    "load_critic",
    "load_host_reward",
    "load_reward",
    "make_lexicon_score",
]
