"""PPO for language models, on one page.

One iteration, read from top to bottom:

    prompts --generate--> rollout --score--> scores                                   (acting and judging)
    rollout, scores, reference --make_experience--> advantages, returns               (targets)
    = collect
    experience --epochs x minibatches of ppo_loss and Adam--> new parameters          (update)

`make_train_step` composes these into compiled programs: one, when the score is JAX; two with the score on the host in
between, when it is a Python function. Both run the same functions.

Sources: Ziegler et al. 2019 (arXiv:1909.08593) for the KL-shaped reward and one PPO over whole responses; Schulman et
al. 2017 (arXiv:1707.06347) for the clipped loss; Huang et al. 2024, "The N Implementation Details of RLHF with PPO".
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.stages import Wrapped

from ppo_jax.advantages import gae
from ppo_jax.config import PPOConfig
from ppo_jax.errors import InputError
from ppo_jax.kl import adaptive_kl_coef, is_last, kl_estimate, kl_shaped_rewards
from ppo_jax.losses import clipped_policy_loss, clipped_value_loss
from ppo_jax.models import ActorCritic, Decoder, causal_mask, positions_of
from ppo_jax.numerics import chunked_logprobs_and_entropy, explained_variance, masked_mean, masked_whiten
from ppo_jax.optim import fresh_state
from ppo_jax.sampling import SamplingConfig, generate, policy_logits
from ppo_jax.sharding import Shardings, minibatches
from ppo_jax.types import Experience, Metrics, Params, Prompts, Rollout, TrainState

Score = Callable[[Params, Rollout], jax.Array]
"""A judge in pure JAX: its parameters (a reward model's; `()` if it has none) and a rollout, to scores `[B]`."""


def policy_sampling(config: PPOConfig, eos_ids: tuple[int, ...], pad_id: int) -> SamplingConfig:
    """The distribution that PPO acts with, and therefore trains: no filters, never greedy."""
    return SamplingConfig(
        max_new_tokens=config.response_length,
        eos_ids=eos_ids,
        pad_id=pad_id,
        temperature=config.temperature,
        min_new_tokens=config.min_new_tokens,
    )


def by_minibatch(function: Callable[[Rollout], jax.Array], rollout: Rollout, num: int) -> jax.Array:
    """A function of a rollout, `[B, R]`, a minibatch at a time: acting never needs more memory than learning."""
    parts = jax.lax.map(function, minibatches(rollout, num))
    return parts.swapaxes(0, 1).reshape(rollout.response_mask.shape)  # the rows back in their places


def response_hidden(model: ActorCritic | Decoder, params: Params, rollout: Rollout) -> jax.Array:
    """The trunk's state from which each response token is predicted, `[B, R, D]`: that of the token before it."""
    hidden, _ = model.apply(
        {"params": params}, rollout.tokens, positions_of(rollout.mask), causal_mask(rollout.mask), method="trunk"
    )
    return hidden[:, -rollout.logprobs.shape[1] - 1 : -1]


def response_logprobs(
    model: ActorCritic | Decoder, params: Params, hidden: jax.Array, rollout: Rollout, sampling: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each response token under the policy with these parameters, and the policy's entropy there.

    The same distribution as in `generate`: same temperature, same forbidden tokens.

    Returns:
        (logprobs, entropy), each `[B, R]` float32 nats; arbitrary (finite) where masked.
    """

    def project(hidden: jax.Array, positions: jax.Array) -> jax.Array:
        return policy_logits(model.apply({"params": params}, hidden, method="logits"), positions, sampling)

    return chunked_logprobs_and_entropy(project, hidden, rollout.response_tokens)


def act(
    model: ActorCritic, params: Params, prompts: Prompts, key: jax.Array, config: PPOConfig, sampling: SamplingConfig
) -> Rollout:
    """Samples responses, with the critic's value of every state: the value head reads the policy's trunk on the way, a
    critic with a trunk of its own (`params["critic"]`) reads the finished rollout.
    """
    rollout = generate(model, params, prompts, key, sampling)
    if "critic" not in params:
        return rollout
    values = by_minibatch(lambda part: critic_values(model, params, part), rollout, config.num_minibatches)
    return rollout.replace(values=jnp.where(rollout.response_mask, values, 0.0))


def critic_values(model: ActorCritic, params: Params, rollout: Rollout) -> jax.Array:
    """Value of the state before each response token, `[B, R]` float32, by a critic with a trunk of its own.

    The trunk has the policy's shape; it has no vocabulary projection.
    """
    trunk = Decoder(dataclasses.replace(model.config, tie_embeddings=True))
    hidden = response_hidden(trunk, params["critic"], rollout)
    return model.apply({"params": params}, hidden, method="value")


def make_experience(
    model: ActorCritic,
    ref_params: Params,
    rollout: Rollout,
    scores: jax.Array,
    kl_coef: jax.Array,
    config: PPOConfig,
    sampling: SamplingConfig,
) -> tuple[Experience, Metrics]:
    """Turns a judged rollout into learning targets: KL-shaped rewards, then GAE, then whitening.

    Args:
        model: the actor-critic; the reference is its decoder with `ref_params`.
        ref_params: decoder parameters of the frozen reference.
        rollout: B responses.
        scores: `[B]`, the judge's.
        kl_coef: reward per nat.
        config: gamma, gae_lambda, kl_estimator, whitening.
        sampling: the policy's distribution.

    Returns:
        (experience, metrics). `objective/kl` is the k1 estimate summed over a response, whichever estimator the reward
        uses.
    """
    mask = rollout.response_mask
    reference = Decoder(model.config)

    def reference_logprobs(part: Rollout) -> jax.Array:
        hidden = response_hidden(reference, ref_params, part)
        return response_logprobs(reference, ref_params, hidden, part, sampling)[0]

    ref_logprobs = by_minibatch(reference_logprobs, rollout, config.num_minibatches)
    rewards = kl_shaped_rewards(scores, rollout.logprobs, ref_logprobs, mask, kl_coef, config.kl_estimator)
    discounts = jnp.where(mask & ~is_last(mask), config.gamma, 0.0)  # a response that was cut has ended as well
    values = jnp.pad(rollout.values, ((0, 0), (0, 1)))  # nothing follows, so the bootstrap value is never read
    advantages, returns = jax.vmap(gae, in_axes=(0, 0, 0, None))(rewards, discounts, values, config.gae_lambda)
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    lengths = jnp.sum(mask, axis=1)
    kl = jnp.sum(jnp.where(mask, kl_estimate(rollout.logprobs, ref_logprobs), 0.0), axis=1)
    ended = jnp.any(mask & jnp.isin(rollout.response_tokens, jnp.array(sampling.eos_ids, jnp.int32)), axis=1)
    metrics = {
        "objective/score": jnp.mean(scores),
        "objective/score_std": jnp.std(scores),
        "objective/kl": jnp.mean(kl),
        "objective/ref_nll": -masked_mean(ref_logprobs, mask),
        "objective/kl_coef": kl_coef,
        "objective/reward": jnp.mean(jnp.sum(rewards, axis=1)),
        "objective/length": jnp.mean(lengths.astype(jnp.float32)),
        "objective/eos_frac": jnp.mean(ended.astype(jnp.float32)),
        "objective/entropy": -masked_mean(rollout.logprobs, mask),
        "value/mean": masked_mean(rollout.values, mask),
        "value/explained_var": explained_variance(rollout.values, returns, mask),
    }
    fields = {name: getattr(rollout, name) for name in ("tokens", "mask", "logprobs", "values")}
    return Experience(**fields, advantages=advantages, returns=returns), metrics


def collect(
    model: ActorCritic,
    params: Params,
    ref_params: Params,
    prompts: Prompts,
    score: Callable[[Rollout], jax.Array],
    key: jax.Array,
    kl_coef: jax.Array,
    config: PPOConfig,
    sampling: SamplingConfig,
) -> tuple[Experience, jax.Array, Metrics]:
    """Acts, judges, and makes the learning targets: everything before the first gradient.

    Returns:
        (experience, scores `[B]`, `objective/*` metrics).
    """
    rollout = act(model, params, prompts, key, config, sampling)
    scores = score(rollout)
    experience, metrics = make_experience(model, ref_params, rollout, scores, kl_coef, config, sampling)
    return experience, scores, metrics


def ppo_loss(
    params: Params, model: ActorCritic, batch: Experience, config: PPOConfig, sampling: SamplingConfig
) -> tuple[jax.Array, Metrics]:
    """Clipped policy loss + vf_coef x clipped value loss - ent_coef x entropy, over one minibatch.

    Returns:
        (loss `[]`, `policy/*` and `value/*` metrics).
    """
    mask = batch.response_mask
    hidden = response_hidden(model, params, batch)
    logprobs, entropy = response_logprobs(model, params, hidden, batch, sampling)
    if "critic" in params:
        values = critic_values(model, params, batch)
    else:
        values = model.apply({"params": params}, hidden, method="value")
    policy_loss, policy = clipped_policy_loss(logprobs, batch.logprobs, batch.advantages, mask, config.clip_eps)
    value_loss, value = clipped_value_loss(values, batch.values, batch.returns, mask, config.value_clip_eps)
    mean_entropy = masked_mean(entropy, mask)
    loss = policy_loss + config.vf_coef * value_loss
    if config.ent_coef:  # without the bonus the entropy is only reported, and needs no backward pass
        loss = loss - config.ent_coef * mean_entropy
    metrics = {f"policy/{name}": x for name, x in policy.items()} | {f"value/{name}": x for name, x in value.items()}
    return loss, metrics | {"policy/loss": policy_loss, "value/loss": value_loss, "policy/entropy": mean_entropy}


def update(
    model: ActorCritic,
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    experience: Experience,
    key: jax.Array,
    config: PPOConfig,
    sampling: SamplingConfig,
    shardings: Shardings,
) -> tuple[Params, optax.OptState, Metrics]:
    """`num_epochs` passes over the experience in `num_minibatches` gradient steps each, reshuffled every pass.

    Returns:
        (new parameters, new optimizer state, metrics averaged over the gradient steps).
    """

    def gradient_step(carry: tuple[Params, optax.OptState], batch: Experience) -> tuple[tuple, Metrics]:
        params, opt_state = carry
        batch = jax.lax.with_sharding_constraint(batch, shardings.batch)
        grads, metrics = jax.grad(ppo_loss, has_aux=True)(params, model, batch, config, sampling)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics["optim/grad_norm"] = optax.tree.norm(grads)
        return (optax.apply_updates(params, updates), opt_state), metrics

    def epoch(carry: tuple[Params, optax.OptState], key: jax.Array) -> tuple[tuple, Metrics]:
        order = jax.random.permutation(key, len(experience.tokens))
        shuffled = jax.tree.map(lambda x: x[order], experience)
        return jax.lax.scan(gradient_step, carry, minibatches(shuffled, config.num_minibatches))

    keys = jax.random.split(key, config.num_epochs)
    (params, opt_state), history = jax.lax.scan(epoch, (params, opt_state), keys)
    metrics = {name: jnp.mean(x) for name, x in history.items()}  # each x is [num_epochs, num_minibatches]
    metrics["policy/ratio_max"] = jnp.max(history["policy/ratio_max"])
    # Before the first gradient step the policy that learns is the policy that acted: a ratio that differs from one by
    # more than rounding is a defect.
    del metrics["policy/ratio_dev"]
    metrics["policy/first_ratio_dev"] = history["policy/ratio_dev"][0, 0]
    metrics["policy/first_approx_kl"] = history["policy/approx_kl"][0, 0]
    return params, opt_state, metrics


class TrainStep(NamedTuple):
    """The compiled programs of an iteration.

    With a score in pure JAX the whole iteration is one program, `iterate(state, ref_params, prompts, judge_params) ->
    (state, metrics, experience, scores)`. With a score on the host `iterate` and `score` are None, and the caller runs
    `act(state, prompts) -> rollout`, scores it, and `learn(state, ref_params, rollout, scores) -> (state, metrics)`.
    The state that goes into `iterate` and `learn` is donated: use the one that comes out. `measure(state, ref_params,
    rollout, scores) -> metrics` and `score(judge_params, rollout) -> scores` only look at a rollout.
    """

    act: Wrapped
    learn: Wrapped
    measure: Wrapped
    score: Wrapped | None
    iterate: Wrapped | None


def make_train_step(
    model: ActorCritic,
    tx: optax.GradientTransformation,
    config: PPOConfig,
    sampling: SamplingConfig,
    shardings: Shardings,
    score: Score | None = None,
) -> TrainStep:
    """Composes the functions above into compiled, sharded programs.

    Args:
        model: the actor-critic.
        tx: the optimizer, as `TrainState.opt_state` was made.
        config: the settings of PPO.
        sampling: as `policy_sampling` makes it; filters (top-k, top-p) and greedy choice are refused.
        shardings: where state, reference and batches live.
        score: a judge in pure JAX; None: the scores come from the host.

    Raises:
        InputError: a sampling rule that the log-probabilities of training do not know.
    """
    if sampling != policy_sampling(config, sampling.eos_ids, sampling.pad_id):
        raise InputError(
            f"sampling: got {sampling}, expected the distribution of the configuration without filters "
            "(top_k=0, top_p=1): PPO trains on the distribution that it samples from"
        )

    def keys(state: TrainState) -> jax.Array:
        """One key to act and one to learn, different in every iteration and the same after a resume."""
        return jax.random.split(jax.random.fold_in(state.key, state.step))

    def act_once(state: TrainState, prompts: Prompts) -> Rollout:
        return act(model, state.params, prompts, keys(state)[0], config, sampling)

    def improve(state: TrainState, experience: Experience, metrics: Metrics) -> tuple[TrainState, Metrics]:
        params, opt_state, update_metrics = update(
            model, tx, state.params, state.opt_state, experience, keys(state)[1], config, sampling, shardings
        )
        kl_coef = state.kl_coef
        if config.kl_target:
            kl = metrics["objective/kl"]
            kl_coef = adaptive_kl_coef(kl_coef, kl, config.kl_target, config.kl_horizon, config.batch_size)
        state = TrainState(state.step + 1, params, opt_state, state.key, kl_coef)
        return state, metrics | update_metrics

    def measure(state: TrainState, ref_params: Params, rollout: Rollout, scores: jax.Array) -> Metrics:
        return make_experience(model, ref_params, rollout, scores, state.kl_coef, config, sampling)[1]

    def learn(state: TrainState, ref_params: Params, rollout: Rollout, scores: jax.Array) -> tuple[TrainState, Metrics]:
        experience, metrics = make_experience(model, ref_params, rollout, scores, state.kl_coef, config, sampling)
        return improve(state, experience, metrics)

    def iterate(
        score: Score, state: TrainState, ref_params: Params, prompts: Prompts, judge_params: Params
    ) -> tuple[TrainState, Metrics, Experience, jax.Array]:
        experience, scores, metrics = collect(
            model,
            state.params,
            ref_params,
            prompts,
            partial(score, judge_params),
            keys(state)[0],
            state.kl_coef,
            config,
            sampling,
        )
        return *improve(state, experience, metrics), experience, scores

    at = shardings
    return TrainStep(
        act=jax.jit(act_once, in_shardings=(at.state, at.batch), out_shardings=at.batch),
        learn=jax.jit(
            learn,
            in_shardings=(at.state, at.ref_params, at.batch, at.batch),
            out_shardings=(at.state, at.replicated),
            donate_argnames="state",
        ),
        measure=jax.jit(
            measure,
            in_shardings=(at.state, at.ref_params, at.batch, at.batch),
            out_shardings=at.replicated,
        ),
        score=jax.jit(score, in_shardings=(at.judge_params, at.batch), out_shardings=at.batch) if score else None,
        iterate=jax.jit(
            partial(iterate, score),
            in_shardings=(at.state, at.ref_params, at.batch, at.judge_params),
            out_shardings=(at.state, at.replicated, at.batch, at.batch),
            donate_argnames="state",
        )
        if score
        else None,
    )


def init_state(
    decoder_params: Params,
    model: ActorCritic,
    tx: optax.GradientTransformation,
    config: PPOConfig,
    key: jax.Array,
    critic: Params | None = None,
) -> TrainState:
    """A fresh train state: a pretrained decoder with a critic.

    The state takes the parameters over, and a train step donates them with it: the reference needs a copy of its own.
    Place the state by `make_shardings(mesh, state).state` before the first step, or that step compiles twice.

    Args:
        decoder_params: of the policy.
        model: the actor-critic.
        tx: the optimizer.
        config: gives the first KL coefficient.
        key: of the whole run.
        critic: a reward model of the policy's shape, `{"decoder", "score_head"}`: the critic starts as that model, on
            a trunk of its own (Stiennon et al. 2020). None: a value head of zeros on the policy's trunk.
    """
    head_key, key = jax.random.split(key)
    hidden = jnp.zeros((1, model.config.width))
    value_head = model.init(head_key, hidden, method="value")["params"]["value_head"]
    params = {"decoder": decoder_params, "value_head": value_head}
    if critic is not None:
        params |= {"critic": critic["decoder"], "value_head": value_head | critic["score_head"]}
    return fresh_state(params, tx, key, config.kl_coef)
