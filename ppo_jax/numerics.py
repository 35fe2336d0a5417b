"""Masked statistics, and log-probabilities that never hold a `[B, R, V]` array."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Mean of `x` where `mask` is True; 0 where the mask is empty (with finite gradients).

    Args:
        x: any shape, any unit.
        mask: the shape of `x`, bool.
        axis: reduce over this axis only; None reduces over all.

    Returns:
        The mean, in the unit of `x`: `[]`, or the shape of `x` without `axis`.
    """
    chex.assert_equal_shape([x, mask])
    total = jnp.sum(jnp.where(mask, x, 0.0), axis=axis)
    return total / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def masked_var(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Population variance (divided by the count, not by count - 1) of `x` where `mask` is True; `[]`."""
    centred = jnp.where(mask, x - masked_mean(x, mask), 0.0)
    return masked_mean(jnp.square(centred), mask)


def masked_std(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Population standard deviation of `x` where `mask` is True; `[]`."""
    return jnp.sqrt(masked_var(x, mask))


def masked_whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True, eps: float = 1e-8) -> jax.Array:
    """`x` scaled to unit variance and, if `shift_mean`, to zero mean, over all True positions; 0 elsewhere.

    Under `jit` over a mesh the statistics are those of the whole batch, never of one device's share.

    Args:
        x: any shape.
        mask: the shape of `x`, bool.
        shift_mean: also subtract the mean.
        eps: added to the variance.

    Returns:
        Whitened values, the shape of `x`.

    Source: openai/lm-human-preferences, utils/core.py `whiten`; masked here.
    """
    mean = masked_mean(x, mask)
    whitened = jnp.where(mask, x - mean, 0.0) * jax.lax.rsqrt(masked_var(x, mask) + eps)
    whitened = whitened if shift_mean else whitened + mean
    return jnp.where(mask, whitened, 0.0)


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect critic, 0 no better than a constant;
    `[]`.
    """
    return 1.0 - masked_var(returns - values, mask) / (masked_var(returns, mask) + 1e-8)


def logprobs_and_entropy(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each token and entropy of its distribution, in float32.

    log p(token) = logits[token] - logsumexp(logits);  H = logsumexp(logits) - sum_v p_v logits_v

    Args:
        logits: `[..., V]`, any float type; -inf forbids a token.
        tokens: `[...]` int.

    Returns:
        (logprobs, entropy), each `[...]` float32, in nats.
    """
    chex.assert_shape(logits, (*tokens.shape, None))
    logits = logits.astype(jnp.float32)
    # A shift common to all logits changes nothing, but would cost the digits of the difference below.
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    probs = jnp.exp(logits - normalizer[..., None])
    # A forbidden token has p = 0 and logit -inf; its share p * logit is 0, and must not become NaN.
    mean_logit = jnp.sum(probs * jnp.where(jnp.isneginf(logits), 0.0, logits), axis=-1)
    return chosen - normalizer, normalizer - mean_logit


def chunked_logprobs_and_entropy(
    logits_fn: Callable[[jax.Array, jax.Array], jax.Array],
    hidden: jax.Array,
    tokens: jax.Array,
    chunk_size: int = 16,
) -> tuple[jax.Array, jax.Array]:
    """`logprobs_and_entropy` of a vocabulary projection, computed `chunk_size` positions at a time.

    Neither the forward nor the backward pass holds more than one `[B, chunk_size, V]` block of logits: the backward
    pass projects each chunk again (`jax.checkpoint`).

    Args:
        logits_fn: `(hidden [B, C, D], positions [C] int) -> logits [B, C, V]`; `positions` are response positions, for
            rules that depend on them (no EOS before the n-th token).
        hidden: `[B, R, D]`, the state from which response token t is predicted.
        tokens: `[B, R]` int.
        chunk_size: positions per block, at least 1.

    Returns:
        (logprobs, entropy), each `[B, R]` float32, in nats.
    """
    chex.assert_rank([hidden, tokens], [3, 2])
    chex.assert_equal_shape_prefix([hidden, tokens], 2)
    batch, length, width = hidden.shape
    chunk_size = min(chunk_size, length)
    num_chunks = -(-length // chunk_size)
    chunk_size = -(-length // num_chunks)  # as even as can be: what fills the last chunk is computed for nothing
    padding = num_chunks * chunk_size - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, num_chunks, chunk_size, width)
    tokens = jnp.pad(tokens, ((0, 0), (0, padding))).reshape(batch, num_chunks, chunk_size)

    @jax.checkpoint
    def block(_: None, chunk: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        block_hidden, block_tokens, positions = chunk
        return None, logprobs_and_entropy(logits_fn(block_hidden, positions), block_tokens)

    positions = jnp.arange(num_chunks * chunk_size).reshape(num_chunks, chunk_size)
    _, results = jax.lax.scan(block, None, (hidden.swapaxes(0, 1), tokens.swapaxes(0, 1), positions))
    logprobs, entropy = (x.swapaxes(0, 1).reshape(batch, -1)[:, :length] for x in results)
    return logprobs, entropy
