"""Training a reward model: from comparisons (pairs, choices, rankings) or from ratings.

    texts --RewardModel--> scores --ranking_loss | rating_loss--> Adam

Sources: Ziegler et al. 2019 (arXiv:1909.08593) for the head, the choice of one in four and the normalisation; Stiennon
et al. 2020 (arXiv:2009.01325) for pairs; Ouyang et al. 2022 (arXiv:2203.02155) for rankings.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Wrapped

from ppo_jax.errors import InputError
from ppo_jax.losses import ranking_loss, rating_loss
from ppo_jax.models import ModelConfig, RewardModel
from ppo_jax.sharding import Shardings, jit_training
from ppo_jax.types import Comparisons, Metrics, Params, Ratings, TrainState


def reward_loss(
    params: Params, model: RewardModel, batch: Comparisons | Ratings, pad_id: int, center_coef: float
) -> tuple[jax.Array, Metrics]:
    """Loss of judged texts: `ranking_loss` of comparisons, `rating_loss` of ratings.

    Args:
        params: of the reward model.
        model: the reward model.
        batch: judged texts.
        pad_id: never scored.
        center_coef: weight of (2 x mean score of a comparison)^2, which draws the scores, that a comparison leaves free
            up to a constant, to 0 (Eisenstein et al. 2023, arXiv:2312.09244, whose (s_1 + s_2)^2 it is for a pair).

    Returns:
        (loss `[]`, metrics: `accuracy` of comparisons or `rmse` of ratings).
    """
    length = batch.tokens.shape[-1]
    scores = model.apply(
        {"params": params}, batch.tokens.reshape(-1, length), batch.mask.reshape(-1, length), pad_id
    ).reshape(batch.tokens.shape[:-1])
    if isinstance(batch, Ratings):
        return rating_loss(scores, batch.scores)
    loss, metrics = ranking_loss(scores, batch.ranks, batch.margin)
    if center_coef:
        mean = jnp.mean(scores, axis=1, where=batch.ranks > 0)
        loss = loss + center_coef * jnp.mean(jnp.square(2.0 * mean))
    return loss, metrics


class RewardStep(NamedTuple):
    """The compiled programs.

    `learn(state, batch) -> (state, metrics)` donates the state; `score(params, tokens, mask) -> [B]` and
    `last_hidden(params, tokens, mask) -> [B, D]` read texts.
    """

    learn: Wrapped
    score: Wrapped
    last_hidden: Wrapped


def make_reward_step(
    model: RewardModel, tx: optax.GradientTransformation, shardings: Shardings, pad_id: int, center_coef: float = 0.0
) -> RewardStep:
    """One gradient step over judged texts, compiled over the mesh.

    Args:
        model: the reward model.
        tx: the optimizer, as `TrainState.opt_state` was made.
        shardings: where state and batches live.
        pad_id: never scored.
        center_coef: see `reward_loss`.
    """

    def learn(state: TrainState, batch: Comparisons | Ratings) -> tuple[TrainState, Metrics]:
        (loss, metrics), grads = jax.value_and_grad(reward_loss, has_aux=True)(
            state.params, model, batch, pad_id, center_coef
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {f"reward/{name}": x for name, x in metrics.items()}
        metrics |= {"reward/loss": loss, "optim/grad_norm": optax.tree.norm(grads)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def score(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens, mask, pad_id)

    def last_hidden(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens, mask, pad_id, method="last_hidden")

    at = shardings
    compiled = partial(jax.jit, in_shardings=(at.state.params, at.batch, at.batch), out_shardings=at.batch)
    return RewardStep(
        learn=jit_training(learn, (at.state, at.batch), (at.state, at.replicated)),
        score=compiled(score),
        last_hidden=compiled(last_hidden),
    )


def init_reward_params(decoder: Params, config: ModelConfig, key: jax.Array) -> Params:
    """A pretrained decoder, without its vocabulary projection, under a fresh head.

    Args:
        decoder: parameters of a `Decoder`.
        config: of that decoder.
        key: draws the head, N(0, 1 / (D + 1)).
    """
    hidden = jnp.zeros((1, config.width))
    head = RewardModel(config).init(key, hidden, method="score")["params"]["score_head"]
    trunk = {name: leaf for name, leaf in decoder.items() if name != "lm_head"}
    return {"decoder": trunk, "score_head": head}


def normalized_head(kernel: np.ndarray, hidden: np.ndarray, ridge: float = 0.1) -> np.ndarray:
    """The head whose scores have mean 0 and standard deviation 1 over the given samples.

    OpenAI's reward model has a gain and a bias for this. The folders that everybody reads have a head without bias, so
    the bias is spent as the read-out v that is closest to constant over the samples (least squares, v . h = 1):

        kernel' = (kernel - mean(s) / mean(c) v) / std,    s = hidden kernel,  c = hidden v

    Mean and standard deviation are exact; how far c is from constant is how far the order of two scores may change
    beyond a shift, and is small because trained hidden states have a large mean.

    Args:
        kernel: `[D, 1]`.
        hidden: `[n, D]`, what the head reads for n samples of the reference policy, n >= 2.
        ridge: of the least squares, relative to the mean square of a coordinate. It matters where samples are hardly
            more than coordinates, and costs nothing elsewhere.

    Returns:
        `[D, 1]` float32.

    Raises:
        InputError: all samples have the same score, so no gain can give them a spread.

    Source: Ziegler et al. 2019, section 2.1; openai/lm-human-preferences, train_reward.py (normalisation before and
    after training).
    """
    weights, states = np.asarray(kernel, np.float64)[:, 0], np.asarray(hidden, np.float64)
    second_moment = states.T @ states / len(states)
    regularizer = ridge * np.trace(second_moment) / len(weights) * np.eye(len(weights))
    constant = np.linalg.solve(second_moment + regularizer, states.mean(axis=0))
    centred = weights - np.mean(states @ weights) / np.mean(states @ constant) * constant
    spread = np.std(states @ centred)
    if not spread > 1e-8 * np.max(np.abs(states)) * np.linalg.norm(weights):
        raise InputError(f"normalisation: the scores of {len(states)} samples have no spread; expected differing texts")
    return (centred / spread).astype(np.float32)[:, None]
