"""Supervised learning of the next token: pretraining on text, fine-tuning on completions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.stages import Wrapped  # what jax.jit returns

from ppo_jax.losses import next_token_loss
from ppo_jax.models import Decoder, load_balance, run_trunk, segment_mask, segment_positions
from ppo_jax.numerics import chunked_logprobs_and_entropy
from ppo_jax.sharding import Shardings, jit_training, minibatches
from ppo_jax.types import Examples, Metrics, Params, TrainState


def token_logprobs(model: Decoder, params: Params, batch: Examples) -> jax.Array:
    """Log-probability of every token but the first of each row, given those before it in its text.

    Returns:
        `[B, S - 1]` float32 nats; arbitrary (finite) where `predicted(batch)` is False.
    """
    return _logprobs_and_routes(model, params, batch)[0]


def _logprobs_and_routes(model: Decoder, params: Params, batch: Examples) -> tuple[jax.Array, list[jax.Array]]:
    hidden, routed = run_trunk(
        model, params, batch.tokens, segment_positions(batch.segments), segment_mask(batch.segments)
    )

    def project(hidden: jax.Array, positions: jax.Array) -> jax.Array:
        del positions  # the same rule everywhere
        return model.apply({"params": params}, hidden, method="logits")

    return chunked_logprobs_and_entropy(project, hidden[:, :-1], batch.tokens[:, 1:], chunk_size=32)[0], routed


def predicted(batch: Examples) -> jax.Array:
    """The targets that are learned, `[B, S - 1]` bool: those with a token of their own text before them."""
    return batch.target_mask[:, 1:] & (batch.segments[:, 1:] == batch.segments[:, :-1])


def sft_loss(params: Params, model: Decoder, batch: Examples) -> tuple[jax.Array, Metrics]:
    """Mean negative log-likelihood of the target tokens, and its `perplexity`; of experts also the `load_balance`."""
    logprobs, routed = _logprobs_and_routes(model, params, batch)
    loss, metrics = next_token_loss(logprobs, predicted(batch))
    if routed:
        metrics["load_balance"] = load_balance(routed, model.config.experts_per_token, batch.mask)
    return loss, metrics


class SFTStep(NamedTuple):
    """The compiled programs of supervised training.

    `learn(state, batch) -> (state, metrics)` donates the state; `measure(params, batch) -> (summed negative
    log-likelihood, tokens)` serves held-out perplexity.
    """

    learn: Wrapped
    measure: Wrapped


def make_sft_step(
    model: Decoder, tx: optax.GradientTransformation, shardings: Shardings, accumulation: int = 1
) -> SFTStep:
    """One gradient step over a batch of examples, compiled over the mesh.

    Args:
        model: the decoder.
        tx: the optimizer, as `TrainState.opt_state` was made.
        shardings: where state and batches live.
        accumulation: parts that a batch is cut into; one after the other they need the memory of one. The gradient is
            that of the mean over all target tokens of the batch, however they fall into parts.
    """

    def learn(state: TrainState, batch: Examples) -> tuple[TrainState, Metrics]:
        num_targets = jnp.sum(predicted(batch))

        def share_of_loss(params: Params, part: Examples) -> tuple[jax.Array, Metrics]:
            loss, metrics = sft_loss(params, model, part)
            return loss * (jnp.sum(predicted(part)) / jnp.maximum(num_targets, 1)), metrics

        def add(sums: tuple[jax.Array, Params], part: Examples) -> tuple[tuple[jax.Array, Params], Metrics]:
            (loss, metrics), grads = jax.value_and_grad(share_of_loss, has_aux=True)(state.params, part)
            return jax.tree.map(jnp.add, sums, (loss, grads)), metrics

        zeros = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, state.params))
        (loss, grads), parts = jax.lax.scan(add, zeros, minibatches(batch, accumulation))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"sft/loss": loss, "sft/perplexity": jnp.exp(loss), "optim/grad_norm": optax.tree.norm(grads)}
        if "load_balance" in parts:
            metrics["router/load_balance"] = jnp.mean(parts["load_balance"])
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def measure(params: Params, batch: Examples) -> tuple[jax.Array, jax.Array]:
        def sums(part: Examples) -> tuple[jax.Array, jax.Array]:
            count = jnp.sum(predicted(part))
            return sft_loss(params, model, part)[0] * count, count

        losses, counts = jax.lax.map(sums, minibatches(batch, accumulation))
        return jnp.sum(losses), jnp.sum(counts)

    at = shardings
    return SFTStep(
        learn=jit_training(learn, (at.state, at.batch), (at.state, at.replicated)),
        measure=jax.jit(measure, in_shardings=(at.state.params, at.batch), out_shardings=at.replicated),
    )
