"""Supervised learning of the next token: pretraining on text, fine-tuning on completions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.stages import Wrapped  # what jax.jit returns

from ppo_jax.losses import next_token_loss
from ppo_jax.models import Decoder, causal_mask, positions_of
from ppo_jax.numerics import chunked_logprobs_and_entropy
from ppo_jax.sharding import Shardings
from ppo_jax.types import Examples, Metrics, Params, TrainState


def token_logprobs(model: Decoder, params: Params, batch: Examples) -> jax.Array:
    """Log-probability of every token but the first given those before it, `[B, S - 1]` float32 nats."""
    hidden, _ = model.apply(
        {"params": params}, batch.tokens, positions_of(batch.mask), causal_mask(batch.mask), method="trunk"
    )

    def project(hidden: jax.Array, positions: jax.Array) -> jax.Array:
        del positions  # the same rule everywhere
        return model.apply({"params": params}, hidden, method="logits")

    return chunked_logprobs_and_entropy(project, hidden[:, :-1], batch.tokens[:, 1:], chunk_size=32)[0]


def sft_loss(params: Params, model: Decoder, batch: Examples) -> tuple[jax.Array, Metrics]:
    """Mean negative log-likelihood of the target tokens, and its `perplexity`."""
    return next_token_loss(token_logprobs(model, params, batch), batch.target_mask[:, 1:])


class SFTStep(NamedTuple):
    """The compiled programs of supervised training.

    `learn(state, batch) -> (state, metrics)` donates the state; `measure(params, batch) -> (summed negative
    log-likelihood, tokens)` serves held-out perplexity.
    """

    learn: Wrapped
    measure: Wrapped


def make_sft_step(model: Decoder, tx: optax.GradientTransformation, shardings: Shardings) -> SFTStep:
    """One gradient step over a batch of examples, compiled over the mesh.

    Args:
        model: the decoder.
        tx: the optimizer, as `TrainState.opt_state` was made.
        shardings: where state and batches live.
    """

    def learn(state: TrainState, batch: Examples) -> tuple[TrainState, Metrics]:
        (loss, metrics), grads = jax.value_and_grad(sft_loss, has_aux=True)(state.params, model, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {f"sft/{name}": x for name, x in metrics.items()}
        metrics |= {"sft/loss": loss, "optim/grad_norm": optax.tree.norm(grads)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def measure(params: Params, batch: Examples) -> tuple[jax.Array, jax.Array]:
        targets = batch.target_mask[:, 1:]
        logprobs = token_logprobs(model, params, batch)
        return -jnp.sum(jnp.where(targets, logprobs, 0.0)), jnp.sum(targets)

    at = shardings
    return SFTStep(
        learn=jax.jit(
            learn,
            in_shardings=(at.state, at.batch),
            out_shardings=(at.state, at.replicated),
            donate_argnames="state",
        ),
        measure=jax.jit(measure, in_shardings=(at.state.params, at.batch), out_shardings=at.replicated),
    )


def init_sft_state(params: Params, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A fresh train state over decoder parameters; there is no KL penalty, so its coefficient is 0."""
    return TrainState(jnp.int32(0), params, tx.init(params), key, jnp.float32(0.0))
