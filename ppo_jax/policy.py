"""The networks over a rollout: who acts, and what policy, critic and reference think of what was done.

What is trained (`TrainState.params`) may be less than the whole policy: adapters, or the upper layers. The rest comes
from the reference, which is the base as well; see `policy_params`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ppo_jax.config import PPOConfig
from ppo_jax.models import ActorCritic, Decoder, causal_mask, overlay, positions_of, run_trunk
from ppo_jax.numerics import chunked_kl, chunked_logprobs_and_entropy
from ppo_jax.sampling import SamplingConfig, generate, policy_logits
from ppo_jax.sharding import by_minibatch
from ppo_jax.types import Params, Prompts, Rollout


def policy_sampling(
    config: PPOConfig, eos_ids: tuple[int, ...], pad_id: int, truncate_id: int | None = None
) -> SamplingConfig:
    """The distribution that PPO acts with, and therefore trains: no filters, never greedy."""
    return SamplingConfig(
        max_new_tokens=config.response_length,
        eos_ids=eos_ids,
        pad_id=pad_id,
        temperature=config.temperature,
        min_new_tokens=config.min_new_tokens,
        truncate_id=truncate_id,
        truncate_after=config.truncate_after,
    )


def policy_params(params: Params, ref_params: Params) -> Params:
    """The whole actor-critic: what is trained, over the frozen rest of the reference.

    Args:
        params: `TrainState.params`: "decoder" holds what is trained of the policy (everything, adapters, or the upper
            layers); "value_head" and "critic" (a trunk of its own) are there if there is a critic.
        ref_params: the reference's decoder, which is also the base.
    """
    return params | {"decoder": overlay(ref_params, params["decoder"])}


def response_hidden(model: ActorCritic | Decoder, params: Params, rollout: Rollout) -> jax.Array:
    """The trunk's state from which each response token is predicted, `[B, R, D]`: that of the token before it."""
    return response_trunk(model, params, rollout)[0]


def response_trunk(model: ActorCritic | Decoder, params: Params, rollout: Rollout) -> tuple[jax.Array, list[jax.Array]]:
    """`response_hidden`, and what the routers of experts say of all tokens; see `run_trunk`."""
    hidden, routed = run_trunk(model, params, rollout.tokens, positions_of(rollout.mask), causal_mask(rollout.mask))
    return hidden[:, -rollout.logprobs.shape[1] - 1 : -1], routed


def response_logprobs(
    model: ActorCritic | Decoder, params: Params, hidden: jax.Array, rollout: Rollout, sampling: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each response token under the policy with these parameters, and the policy's entropy there.

    The same distribution as in `generate`: same temperature, same forbidden tokens.

    Returns:
        (logprobs, entropy), each `[B, R]` float32 nats; arbitrary (finite) where masked.
    """
    return chunked_logprobs_and_entropy(_projection(model, params, sampling), hidden, rollout.response_tokens)


def response_kl(
    model: ActorCritic,
    params: Params,
    hidden: jax.Array,
    ref_params: Params,
    ref_hidden: jax.Array,
    sampling: SamplingConfig,
) -> jax.Array:
    """KL(policy || reference) over the whole vocabulary at each response token, `[B, R]` float32 nats."""
    reference = Decoder(model.config)
    project, ref_project = (
        _projection(model, params, sampling),
        _projection(reference, ref_params, sampling),
    )
    return chunked_kl(project, ref_project, hidden, ref_hidden)


def _projection(
    model: ActorCritic | Decoder, params: Params, sampling: SamplingConfig
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def project(hidden: jax.Array, positions: jax.Array) -> jax.Array:
        return policy_logits(model.apply({"params": params}, hidden, method="logits"), positions, sampling)

    return project


def response_values(model: ActorCritic, params: Params, hidden: jax.Array | None, rollout: Rollout) -> jax.Array:
    """Value of the state before each response token, `[B, R]` float32.

    Args:
        model: the actor-critic.
        params: of the whole of it. A critic with a trunk of its own (`params["critic"]`) has the policy's shape and no
            vocabulary projection.
        hidden: `[B, R, D]`, the policy's trunk, which a critic without one reads, and no other.
        rollout: B responses.
    """
    if "critic" in params:
        trunk = Decoder(dataclasses.replace(model.config, tie_embeddings=True))
        hidden = response_hidden(trunk, params["critic"], rollout)
    return model.apply({"params": params}, hidden, method="value")


def act(
    model: ActorCritic, params: Params, prompts: Prompts, key: jax.Array, config: PPOConfig, sampling: SamplingConfig
) -> Rollout:
    """Samples `responses_per_prompt` responses to each prompt, with the critic's value of every state: the value head
    reads the policy's trunk on the way, a critic with a trunk of its own reads the finished rollout.

    Args:
        model: the actor-critic.
        params: of the whole of it; see `policy_params`.
        prompts: B / responses_per_prompt of them.
        key: a typed key.
        config: sizes.
        sampling: the policy's distribution.

    Returns:
        B responses; those to one prompt stand one after the other.
    """
    rollout = generate(model, params, prompts, key, sampling, responses_per_prompt=config.responses_per_prompt)
    if "critic" not in params:
        return rollout

    def values(part: Rollout) -> jax.Array:
        return response_values(model, params, None, part)

    values_of = by_minibatch(values, rollout, config.num_minibatches * config.accumulation)
    return rollout.replace(values=jnp.where(rollout.response_mask, values_of, 0.0))
