"""The parameters that a critic with a trunk of its own starts as."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from ppo_jax import hub
from ppo_jax.errors import check
from ppo_jax.models import ModelConfig
from ppo_jax.rewards.registry import split_judges
from ppo_jax.tokenizers import load_tokenizer, same_tokenizer
from ppo_jax.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OF_THE_POLICY = {"tie_embeddings", "lora_scale", "remat"}
"""A critic has neither a vocabulary projection nor an adapter, and is trained as the policy is."""


def load_critic(
    name: str, reward: str, policy: ModelConfig, tokenizer: PreTrainedTokenizerBase, decoder: Params
) -> Params:
    """The critic's part of `TrainState.params`.

    Args:
        name: "policy", for the policy's own trunk with a value head of zeros; "reward", for the reward model that
            `reward` names, whose score is then the first value; or the folder or hub name of a reward model, or of a
            saved critic: the same with the whole value head beside it, in value_head.safetensors.
        reward: the judges, as `load_reward` takes them.
        policy: the policy's configuration, which the critic's trunk shares.
        tokenizer: the policy's.
        decoder: the policy's parameters, for "policy".

    Returns:
        `{"critic": trunk, "value_head": {"kernel": [D, 1], "bias": [1]}}`, in buffers of their own.

    Raises:
        InputError: it cannot be used, or has another shape or tokenizer than the policy.
    """
    head = {"kernel": jnp.zeros((policy.width, 1)), "bias": jnp.zeros(1)}
    if name == "policy":
        trunk = {part: params for part, params in decoder.items() if part != "lm_head"}
        return {"critic": jax.tree.map(jnp.copy, trunk), "value_head": head}
    if name == "reward":
        models = [judge.removeprefix("model:") for judge, _ in split_judges(reward) if judge.startswith("model:")]
        check("config.reward", reward, len(models) == 1, "model:FOLDER, with critic=reward, and no second one")
        (name,) = models
    folder = hub.resolve(name)
    config, params = hub.load_reward_model(folder, dtype=policy.dtype, param_dtype=policy.param_dtype)
    ours, theirs = (dataclasses.asdict(one) for one in (policy, config))
    differing = [f"{x}={theirs[x]}" for x in ours if x not in _OF_THE_POLICY and ours[x] != theirs[x]]
    check("config.critic", name, not differing, f"a reward model of the policy's shape; it has {', '.join(differing)}")
    same = same_tokenizer(load_tokenizer(folder), tokenizer)
    check("config.critic", name, same, "a reward model with the policy's tokenizer")
    head |= hub.load_value_head(folder) or params["score_head"]
    return jax.tree.map(jnp.array, {"critic": params["decoder"], "value_head": head})
