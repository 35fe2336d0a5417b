"""From a judged rollout to learning targets: the reward of each token, and its advantage."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.advantages import Targets, running_baseline
from ppo_jax.config import PPOConfig
from ppo_jax.guard import broken_experience
from ppo_jax.kl import kl_estimate, kl_shaped_rewards
from ppo_jax.losses import importance_weights
from ppo_jax.models import ActorCritic, Decoder
from ppo_jax.numerics import explained_variance, masked_mean, masked_std, masked_whiten, standard_error
from ppo_jax.policy import response_hidden, response_kl, response_logprobs, response_values
from ppo_jax.sampling import SamplingConfig, ends_response
from ppo_jax.shaping import Moments, add_batch, batch_moments, length_penalties, scale_scores
from ppo_jax.sharding import by_minibatch
from ppo_jax.types import Experience, Metrics, Params, Rollout, Running, Scores


class Method(NamedTuple):
    """The settings of PPO with their names resolved to functions, whose own settings are bound."""

    config: PPOConfig
    advantages: Callable[[Targets], tuple[jax.Array, jax.Array]]  # -> (advantages, returns), see ppo_jax/advantages.py
    surrogate: Callable[..., tuple[jax.Array, jax.Array]]  # the policy's loss, see ppo_jax/losses/policy.py
    value_error: Callable[..., tuple[jax.Array, jax.Array]]  # the critic's, see ppo_jax/losses/value.py
    whitening: str = "batch"  # of the advantages: none, batch, minibatch
    critic: bool = True  # the advantages need values
    greedy: bool = False  # and the score of the likeliest response


class Opinions(NamedTuple):
    """What the networks think of the response tokens, each `[B, R]` float32 or None; arbitrary where masked."""

    ref_logprobs: jax.Array
    ref_hidden: jax.Array | None  # [B, R, D], where the loss needs the whole distribution
    exact_kl: jax.Array | None  # policy against reference, over the whole vocabulary
    logprobs: jax.Array | None  # of the policy that learns, see `asks_learner`
    values: jax.Array | None


def asks_learner(model: ActorCritic, config: PPOConfig) -> bool:
    """Whether the old log-probabilities and values come from one more pass of the policy that learns, not from acting.

    They do where `importance` weighs the difference. They do as well in bfloat16, whose rounding is another in each
    program: one token at a time over a cache and whole rows differ by up to 0.1 nats at a token, which would pass for a
    step of the policy. In float32 acting and learning agree within 1e-4, and the pass is saved. Of a stale rollout
    without `importance` the old policy is the one that acted, in any precision.
    """
    rounds = model.config.dtype != "float32" and not config.stale_iterations
    return rounds or config.importance != "none"


def consult(
    model: ActorCritic,
    params: Params,
    ref_params: Params,
    rollout: Rollout,
    config: PPOConfig,
    sampling: SamplingConfig,
    exact_kl: bool,
) -> Opinions:
    """Asks the reference, and where it is needed the policy that learns, about a rollout.

    Args:
        model: the actor-critic; the reference is its decoder with `ref_params`.
        params: of the whole of it.
        ref_params: decoder parameters of the frozen reference.
        rollout: B responses.
        config: which opinions are needed.
        sampling: the policy's distribution.
        exact_kl: the exact KL is needed.
    """
    reference = Decoder(model.config)
    recompute = asks_learner(model, config)
    keep_hidden = config.kl_in == "loss" and config.kl_estimator == "exact"

    def ask(part: Rollout) -> Opinions:
        ref_hidden = response_hidden(reference, ref_params, part)
        ref_logprobs, _ = response_logprobs(reference, ref_params, ref_hidden, part, sampling)
        kl = logprobs = values = None
        if exact_kl or recompute:
            hidden = response_hidden(model, params, part)
            if exact_kl:
                kl = response_kl(model, params, hidden, ref_params, ref_hidden, sampling)
            if recompute:
                logprobs, _ = response_logprobs(model, params, hidden, part, sampling)
            if recompute and "value_head" in params:
                values = response_values(model, params, hidden, part)
        return Opinions(ref_logprobs, ref_hidden if keep_hidden else None, kl, logprobs, values)

    return by_minibatch(ask, rollout, config.num_minibatches * config.accumulation)


def shape_scores(
    rollout: Rollout, scores: Scores, running: Running, config: PPOConfig, sampling: SamplingConfig
) -> tuple[Scores, Running]:
    """The judges' scores on their way to the reward: see `RewardOptions`, in whose order this goes.

    Returns:
        (scores, the running moments with this batch in them).
    """
    scores = truncation_scores(rollout, scores, config, sampling)
    mask, total, tokens, greedy = rollout.response_mask, scores.total, scores.tokens, scores.greedy
    whole = scores.whole
    moments = Moments(running.score_count, running.score_mean, running.score_m2)
    if config.score_scale == "running":
        moments = add_batch(moments, whole)
        running = running.replace(score_count=moments.count, score_mean=moments.mean, score_m2=moments.m2)
    elif config.score_scale == "batch":
        moments = batch_moments(whole)
    if config.score_scale != "none":
        scale = partial(scale_scores, moments=moments)
        total = scale(total, shift=config.score_shift)
        tokens = None if tokens is None else scale(tokens, shift=False)  # a shift is for the response, not each token
        greedy = None if greedy is None else scale(greedy, shift=config.score_shift)
    clip = partial(jnp.clip, min=-config.score_clip, max=config.score_clip)
    total, tokens, greedy = (None if x is None else clip(x) for x in (total, tokens, greedy))
    total -= jnp.where(has_ended(rollout, sampling), 0.0, config.missing_eos_penalty)
    total -= length_penalties(
        jnp.sum(mask, axis=1),
        length_penalty=config.length_penalty,
        overlong_buffer=config.overlong_buffer,
        overlong_penalty=config.overlong_penalty,
        response_length=config.response_length,
    )
    return scores.replace(total=total, tokens=tokens, greedy=greedy), running


def truncation_scores(rollout: Rollout, scores: Scores, config: PPOConfig, sampling: SamplingConfig) -> Scores:
    """The judges' scores, with `missing_token_score` where a truncation token is asked for and is not there."""
    if sampling.truncate_id is None:
        return scores
    there = has_ended(rollout, dataclasses.replace(sampling, eos_ids=()))
    return scores.replace(total=jnp.where(there, scores.total, config.missing_token_score))


def has_ended(rollout: Rollout, sampling: SamplingConfig) -> jax.Array:
    """Which responses ended by themselves, not by their length limit; `[B]` bool."""
    positions = jnp.arange(rollout.logprobs.shape[1])
    ends = ends_response(rollout.response_tokens, positions, sampling)
    return jnp.any(rollout.response_mask & ends, axis=1)


def make_experience(
    model: ActorCritic,
    params: Params,
    ref_params: Params,
    rollout: Rollout,
    scores: Scores,
    running: Running,
    method: Method,
    sampling: SamplingConfig,
    exact_kl: bool = False,
) -> tuple[Experience, Running, Metrics, jax.Array]:
    """Turns a judged rollout into learning targets: shaped scores, the KL penalty, advantages, whitening.

    Args:
        model: the actor-critic; the reference is its decoder with `ref_params`.
        params: of the whole of it; see `policy_params`.
        ref_params: decoder parameters of the frozen reference.
        rollout: B responses.
        scores: the judges'.
        running: what earlier iterations left behind.
        method: the settings.
        sampling: the policy's distribution.
        exact_kl: measures the exact KL even if the settings do not ask for it.

    Returns:
        (experience, running scalars, metrics, what is not finite: see `guard.broken_experience`). `objective/kl` is the
        k1 estimate summed over a response, whichever estimator the penalty uses; `_se` is the standard error of a mean.
    """
    config, mask = method.config, rollout.response_mask
    exact_kl |= config.exact_kl or (config.kl_in == "reward" and config.kl_estimator == "exact")
    told = consult(model, params, ref_params, rollout, config, sampling, exact_kl)
    importance, behaviour = None, rollout.logprobs
    if told.logprobs is not None:
        rollout = rollout.replace(logprobs=jnp.where(mask, told.logprobs, 0.0))
    if config.importance != "none":
        how = {"how": config.importance, "cap": config.importance_cap}
        importance = importance_weights(rollout.logprobs, behaviour, mask, **how)
    if told.values is not None:
        rollout = rollout.replace(values=jnp.where(mask, told.values, 0.0))

    shaped, running = shape_scores(rollout, scores, running, config, sampling)
    penalty = jnp.zeros_like(rollout.logprobs)
    if config.kl_in == "reward" and config.kl_coef:  # else 0, also of an infinite KL
        penalty = token_kl(rollout.logprobs, told.ref_logprobs, told.exact_kl, mask, config)
    rewards = kl_shaped_rewards(shaped.total, penalty, mask, running.kl_coef, shaped.tokens)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    greedy = jnp.zeros_like(scores.total) if shaped.greedy is None else shaped.greedy
    raw, returns = method.advantages(Targets(rewards, mask, rollout.values, greedy, running.baseline))
    advantages = raw
    if method.whitening == "batch":
        advantages = masked_whiten(raw, mask, shift_mean=config.whiten_shift)

    metrics = rollout_metrics(rollout, scores, told, sampling)
    metrics |= estimate("objective/reward", jnp.sum(rewards, axis=1))
    metrics |= {
        "objective/kl_coef": running.kl_coef,
        "advantage/mean": masked_mean(raw, mask),
        "advantage/std": masked_std(raw, mask),
    }
    if method.critic:
        metrics["value/mean"] = masked_mean(rollout.values, mask)
        metrics["value/explained_var"] = explained_variance(rollout.values, returns, mask)
    if told.logprobs is not None:
        metrics |= stale_metrics(behaviour, rollout)
    if importance is not None:
        metrics |= importance_metrics(importance, behaviour, rollout, config)
    running = running.replace(
        baseline=running_baseline(running.baseline, jnp.sum(rewards, axis=1), config.baseline_decay)
    )
    in_loss = config.kl_in == "loss"
    experience = Experience(
        **{name: getattr(rollout, name) for name in ("tokens", "mask", "logprobs", "values")},
        advantages=advantages,
        returns=returns,
        importance=importance,
        ref_logprobs=told.ref_logprobs if in_loss else None,
        ref_hidden=told.ref_hidden,
    )
    return experience, running, metrics, broken_experience(shaped, experience, told.ref_logprobs)


def token_kl(
    logprobs: jax.Array, ref_logprobs: jax.Array, exact_kl: jax.Array | None, mask: jax.Array, config: PPOConfig
) -> jax.Array:
    """The KL that is penalised, by `kl_estimator` and `kl_clamp`; `[B, R]` nats, 0 where masked."""
    if exact_kl is not None and config.kl_estimator == "exact":
        return jnp.minimum(jnp.where(mask, exact_kl, 0.0), config.kl_clamp)
    # Before the estimator and not after: what is masked may be infinite, and its gradient is not to be 0 x inf.
    logprobs, ref_logprobs = (jnp.where(mask, x, 0.0) for x in (logprobs, ref_logprobs))
    return kl_estimate(logprobs, ref_logprobs, config.kl_estimator, config.kl_clamp)


def estimate(name: str, x: jax.Array) -> Metrics:
    """The mean of something of each response, `[B]`, and its standard error."""
    everything = jnp.ones_like(x, bool)
    return {name: jnp.mean(x), f"{name}_se": standard_error(x, everything)}


def rollout_metrics(rollout: Rollout, scores: Scores, told: Opinions, sampling: SamplingConfig) -> Metrics:
    """What an iteration's responses are like: every mean over the responses, or over their tokens."""
    mask = rollout.response_mask
    lengths = jnp.sum(mask, axis=1).astype(jnp.float32)
    whole = scores.whole
    metrics = estimate("objective/score", whole) | estimate("objective/length", lengths)
    metrics |= {
        "objective/score_std": jnp.std(whole),
        "objective/score_length_corr": correlation(whole, lengths),
        "objective/eos_frac": jnp.mean(has_ended(rollout, sampling).astype(jnp.float32)),
        "objective/entropy": -masked_mean(rollout.logprobs, mask),
        "objective/ref_nll": -masked_mean(told.ref_logprobs, mask),
    }
    for name, part in scores.parts.items():
        metrics[f"score/{name}"] = jnp.mean(part)
    logprobs, ref_logprobs = (jnp.where(mask, x, 0.0) for x in (rollout.logprobs, told.ref_logprobs))
    for name in ("k1", "k2", "k3", "abs"):
        kl = kl_estimate(logprobs, ref_logprobs, name)
        metrics |= estimate("objective/kl" if name == "k1" else f"kl/{name}", jnp.sum(kl, axis=1))
    if told.exact_kl is not None:
        metrics |= estimate("kl/exact", jnp.sum(jnp.where(mask, told.exact_kl, 0.0), axis=1))
    return metrics


def stale_metrics(behaviour: jax.Array, rollout: Rollout) -> Metrics:
    """How far the policy that acted, in its arithmetic, is from the one that learns in its own."""
    mask = rollout.response_mask
    log_ratio = jnp.where(mask, rollout.logprobs - behaviour, 0.0)
    return {
        "stale/kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),  # k3 of KL(actor || learner), nats a token
        "stale/ratio_max": jnp.max(jnp.exp(log_ratio), where=mask, initial=0.0),
    }


def importance_metrics(importance: jax.Array, behaviour: jax.Array, rollout: Rollout, config: PPOConfig) -> Metrics:
    """What the weights are, and how many of them were cut."""
    mask = rollout.response_mask
    log_ratio = jnp.where(mask, rollout.logprobs - behaviour, 0.0)
    cut = importance == 0 if config.importance == "mask" else log_ratio > jnp.log(config.importance_cap)
    return {
        "stale/weight_mean": masked_mean(importance, mask),
        "stale/cut_frac": masked_mean(cut.astype(jnp.float32), mask),
    }


def correlation(x: jax.Array, y: jax.Array) -> jax.Array:
    """Pearson's correlation of two `[B]`; 0 where one of them is constant."""
    x, y = x - jnp.mean(x), y - jnp.mean(y)
    return jnp.sum(x * y) / jnp.maximum(jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y)), 1e-12)
