"""PPO for language models, on one page.

One iteration, read from top to bottom:

    prompts --act--> rollout --score--> scores                                        (acting and judging)
    rollout, scores, reference --make_experience--> advantages, returns               (targets)
    experience --epochs x minibatches of ppo_loss and Adam--> new parameters          (update)

`make_train_step` composes these into compiled programs: one, when the score is JAX; two with the score on the host in
between, when it is a Python function. Both run the same functions. Which advantages, which surrogate and which error of
the critic is the `Method`'s business.

Sources: Ziegler et al. 2019 (arXiv:1909.08593) for the KL-shaped reward and one PPO over whole responses; Schulman et
al. 2017 (arXiv:1707.06347) for the clipped loss; Huang et al. 2024, "The N Implementation Details of RLHF with PPO".
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.stages import Wrapped

from ppo_jax.config import PPOConfig
from ppo_jax.errors import InputError
from ppo_jax.experience import Method, make_experience
from ppo_jax.guard import broken_leaves, first_broken
from ppo_jax.kl import adaptive_kl_coef
from ppo_jax.models import ActorCritic
from ppo_jax.optim import ema_update, fresh_state
from ppo_jax.policy import act, policy_params, policy_sampling
from ppo_jax.sampling import SamplingConfig, generate
from ppo_jax.sharding import Shardings, jit_training
from ppo_jax.types import Examples, Experience, Metrics, Params, Prompts, Rollout, Scores, TrainState
from ppo_jax.update import update

Score = Callable[[Params, Rollout], Scores]
"""A judge in pure JAX: its parameters (a reward model's; `()` if it has none) and a rollout, to scores."""


def due(state: TrainState, newest: Rollout) -> Rollout:
    """The rollout to learn from: the newest, or the oldest of those that wait."""
    return (*state.pending, newest)[0]


class TrainStep(NamedTuple):
    """The compiled programs of an iteration.

    With a score in pure JAX the whole iteration is one program, `iterate(state, ref_params, prompts, judge_params,
    texts) -> (state, metrics, experience, scores)`. With a score on the host `iterate` and `score` are None, and the
    caller runs `act(state, ref_params, prompts) -> rollout`, scores `due(state, rollout)`, and `learn(state,
    ref_params, rollout, scores, texts) -> (state, metrics, experience)`. The state that goes into `iterate` and `learn`
    is donated: use the one that comes out. `texts` are `Examples` for the auxiliary next-token loss, or None.

    With `stale_iterations` n the state holds the rollouts of the last n policies, and the oldest is learned from while
    the newest waits.

    `greedy(state, ref_params, prompts) -> rollout` is the likeliest response to each prompt. `measure(state,
    ref_params, rollout, scores) -> metrics` and `score(judge_params, rollout) -> scores` only look at a rollout.

    Any of them may be compiled ahead for arguments of known shapes: `.lower(...).compile()`.
    """

    act: Wrapped
    greedy: Wrapped
    learn: Wrapped
    measure: Wrapped
    score: Wrapped | None
    iterate: Wrapped | None


def make_train_step(
    model: ActorCritic,
    tx: optax.GradientTransformation,
    method: Method,
    sampling: SamplingConfig,
    shardings: Shardings,
    score: Score | None = None,
) -> TrainStep:
    """Composes the functions above into compiled, sharded programs.

    Args:
        model: the actor-critic.
        tx: the optimizer, as `TrainState.opt_state` was made.
        method: the settings of PPO.
        sampling: as `policy_sampling` makes it; filters (top-k, top-p) and greedy choice are refused.
        shardings: where state, reference and batches live.
        score: a judge in pure JAX; None: the scores come from the host.

    Raises:
        InputError: a sampling rule that the log-probabilities of training do not know.
    """
    config = method.config
    if sampling != policy_sampling(config, sampling.eos_ids, sampling.pad_id, sampling.truncate_id):
        raise InputError(
            f"sampling: got {sampling}, expected the distribution of the configuration without filters "
            "(top_k=0, top_p=1): PPO trains on the distribution that it samples from"
        )

    def keys(state: TrainState) -> jax.Array:
        """One key to act and one to learn, different in every iteration and the same after a resume."""
        return jax.random.split(jax.random.fold_in(state.key, state.step))

    def sample(state: TrainState, ref_params: Params, prompts: Prompts) -> Rollout:
        return act(model, policy_params(state.params, ref_params), prompts, keys(state)[0], config, sampling)

    def likeliest(state: TrainState, ref_params: Params, prompts: Prompts) -> Rollout:
        params, best = policy_params(state.params, ref_params), dataclasses.replace(sampling, temperature=0.0)
        return generate(model, params, prompts, keys(state)[0], best)

    def measure(state: TrainState, ref_params: Params, rollout: Rollout, scores: Scores) -> Metrics:
        params = policy_params(state.params, ref_params)
        given = (model, params, ref_params, rollout, scores, state.running, method, sampling)
        return make_experience(*given, exact_kl=True)[2]

    def learn(
        state: TrainState,
        ref_params: Params,
        newest: Rollout,
        scores: Scores,
        texts: Examples | None,
    ) -> tuple[TrainState, Metrics, Experience]:
        rollout = due(state, newest)
        params = policy_params(state.params, ref_params)
        experience, running, metrics, broken = make_experience(
            model, params, ref_params, rollout, scores, state.running, method, sampling
        )
        key = keys(state)[1]
        spoilt = jnp.any(broken) | ~jnp.any(rollout.response_mask)  # nothing was sampled: see `nothing_sampled`
        after, broken_update, update_metrics = update(
            model, tx, state, ref_params, experience, texts, key, method, sampling, shardings, spoilt
        )
        broken = jnp.concatenate([broken, broken_update])
        metrics |= update_metrics | {"guard/first_broken": first_broken(broken)}
        if config.kl_target:
            kl = metrics["objective/kl"]
            coef = adaptive_kl_coef(running.kl_coef, kl, config.kl_target, config.kl_horizon, config.batch_size)
            running = running.replace(kl_coef=coef)
        # What is carried stays as it was if a broken rollout would spoil it.
        spoilt |= jnp.any(broken_leaves(running))
        running = jax.tree.map(lambda new, old: jnp.where(spoilt, old, new), running, state.running)
        ema = state.ema_params
        if ema is not None:
            ema = ema_update(ema, after.params["decoder"], config.ema_decay)
        return (
            after.replace(
                step=state.step + 1,
                running=running.replace(skipped=jnp.where(jnp.any(broken), state.running.skipped + 1, 0)),
                ema_params=ema,
                pending=(*state.pending, newest)[1:],
            ),
            metrics,
            experience,
        )

    def iterate(
        state: TrainState, ref_params: Params, prompts: Prompts, judge_params: Params, texts: Examples | None
    ) -> tuple[TrainState, Metrics, Experience, Scores]:
        assert score is not None
        newest = sample(state, ref_params, prompts)
        scores = score(judge_params, due(state, newest))
        if method.greedy:
            best = score(judge_params, likeliest(state, ref_params, prompts)).whole
            scores = scores.replace(greedy=jnp.repeat(best, config.responses_per_prompt))
        return *learn(state, ref_params, newest, scores, texts), scores

    at = shardings
    looks = {"in_shardings": (at.state, at.ref_params, at.batch), "out_shardings": at.batch}
    learned = (at.state, at.replicated, at.batch)
    return TrainStep(
        act=jax.jit(sample, **looks),
        greedy=jax.jit(likeliest, **looks),
        learn=jit_training(learn, (at.state, at.ref_params, at.batch, at.batch, at.batch), learned),
        measure=jax.jit(
            measure, in_shardings=(at.state, at.ref_params, at.batch, at.batch), out_shardings=at.replicated
        ),
        score=jax.jit(score, in_shardings=(at.judge_params, at.batch), out_shardings=at.batch) if score else None,
        iterate=jit_training(
            iterate, (at.state, at.ref_params, at.batch, at.judge_params, at.batch), (*learned, at.batch)
        )
        if score
        else None,
    )


def init_state(
    trained: Params,
    model: ActorCritic,
    tx: optax.GradientTransformation,
    method: Method,
    key: jax.Array,
    critic: Params | None = None,
) -> TrainState:
    """A fresh train state: what is trained of a pretrained decoder, with a critic if the method needs one.

    The state takes the parameters over, and a train step donates them with it: the reference needs a copy of its own.
    Place the state by `make_shardings(mesh, state).state` before the first step, or that step compiles twice.

    Args:
        trained: of the policy's decoder: everything, adapters, or the upper layers; see `policy_params`.
        model: the actor-critic.
        tx: the optimizer.
        method: the settings.
        key: of the whole run.
        critic: `{"value_head"}`, or `{"critic", "value_head"}` with a trunk of its own, to start as. None: a value
            head of zeros on the policy's trunk.
    """
    head_key, key = jax.random.split(key)
    params = {"decoder": trained}
    if method.critic:
        head = model.init(head_key, jnp.zeros((1, model.config.width)), method="value")["params"]["value_head"]
        params |= {"value_head": head} | (critic or {})
    config = method.config
    state = fresh_state(params, tx, key, config.kl_coef, ema=config.ema_decay > 0)
    return state.replace(pending=tuple(nothing_sampled(config) for _ in range(config.stale_iterations)))


def nothing_sampled(config: PPOConfig) -> Rollout:
    """A rollout without a token, in the place of those that will wait to be learned from."""
    shape = (config.batch_size, config.prompt_length + config.response_length)
    per_token = (config.batch_size, config.response_length)
    return Rollout(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(per_token), jnp.zeros(per_token))
