"""Masked statistics; and log-probabilities, entropy and divergence that never hold a `[B, R, V]` array."""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

SUMMED = "summed over the vocabulary"  # what the backward pass takes from the forward pass


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


def standard_error(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Standard error of `masked_mean(x, mask)`: sqrt(sum (x - mean)^2 / (n (n - 1))); 0 of fewer than two numbers.

    It takes the numbers for independent: of tokens, which are not, it says too little.

    Args:
        x: any shape, any unit.
        mask: the shape of `x`, bool.

    Returns:
        In the unit of `x`, `[]`.
    """
    return jnp.sqrt(masked_var(x, mask) / jnp.maximum(jnp.sum(mask) - 1, 1))


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
    # A shift common to all logits changes nothing, but would cost the digits of the differences below.
    largest = checkpoint_name(jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)), SUMMED)
    logits = logits.astype(jnp.float32) - largest.astype(jnp.float32)
    normalizer, mean_logit = _normalizer_and_mean(logits)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return (chosen - normalizer)[..., 0], (normalizer - mean_logit)[..., 0]


@jax.custom_vjp
def _normalizer_and_mean(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(logsumexp, sum_v p_v logits_v), each `[..., 1]`, of `[..., V]` of which the largest is 0.

    The gradients are p_v and p_v (1 + logits_v - sum_u p_u logits_u), written out so that the backward pass reads the
    logits once and sums nothing over the vocabulary again.
    """
    normalizer = jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
    return normalizer, jnp.sum(jnp.exp(logits - normalizer) * _allowed(logits), axis=-1, keepdims=True)


def _allowed(logits: jax.Array) -> jax.Array:
    """A forbidden token has p = 0 and logit -inf; its share p * logit is 0, and must not become NaN."""
    return jnp.where(jnp.isneginf(logits), 0.0, logits)


def _normalized(logits: CustomVJPPrimal) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    sums = [checkpoint_name(x, SUMMED) for x in _normalizer_and_mean(logits.value)]
    return tuple(sums), (logits.value, *sums)


def _normalized_gradient(kept: tuple, gradients: tuple) -> tuple[jax.Array]:
    logits, normalizer, mean_logit = kept
    of_normalizer, of_mean = gradients
    factor = 0.0 if isinstance(of_normalizer, SymbolicZero) else of_normalizer
    if not isinstance(of_mean, SymbolicZero):  # where nobody asks for the entropy, there is no mean to be computed
        factor = factor + of_mean * (1 + _allowed(logits) - mean_logit)
    return (jnp.exp(logits - normalizer) * factor,)


_normalizer_and_mean.defvjp(_normalized, _normalized_gradient, symbolic_zeros=True)


def kl_divergence(logits: jax.Array, ref_logits: jax.Array) -> jax.Array:
    """KL(policy || reference) over the whole vocabulary, in float32.

    sum_v p_v log(p_v / q_v), which is summed as sum_v (q_v - p_v - p_v log(q_v / p_v)): no term is negative, and near
    p = q none is lost in the rounding of the others.

    Args:
        logits: `[..., V]` of the policy, any float type; -inf forbids a token.
        ref_logits: `[..., V]` of the reference; nothing is learned through it.

    Returns:
        `[...]` float32 nats, >= 0; infinite if the reference forbids a token that the policy allows.
    """
    chex.assert_equal_shape([logits, ref_logits])
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    ref_logprobs = jax.lax.stop_gradient(jax.nn.log_softmax(ref_logits.astype(jnp.float32)))
    probs = jnp.exp(logprobs)
    # A token that the policy forbids has p log(p / q) = 0, and must not become NaN.
    log_ratio = jnp.where(jnp.isneginf(logprobs), 0.0, logprobs - ref_logprobs)
    near = (jnp.abs(log_ratio) < 1.0) & ~jnp.isneginf(logprobs)
    # In the other branch of each `where`, a number whose exp, and whose gradient, is finite.
    small = jnp.where(near, log_ratio, 0.0)
    terms = jnp.where(near, probs * (jnp.expm1(-small) + small), jnp.exp(ref_logprobs) - probs + probs * log_ratio)
    return jnp.sum(terms, axis=-1)


def chunked_logprobs_and_entropy(
    logits_fn: Callable[[jax.Array, jax.Array], jax.Array],
    hidden: jax.Array,
    tokens: jax.Array,
    chunk_size: int = 16,
) -> tuple[jax.Array, jax.Array]:
    """`logprobs_and_entropy` of a vocabulary projection, computed `chunk_size` positions at a time.

    Neither the forward nor the backward pass holds more than one `[B, chunk_size, V]` block of logits: the backward
    pass projects each chunk again (`jax.checkpoint`), and takes the sums over it from the forward pass.

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

    def block(positions: jax.Array, hidden: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return logprobs_and_entropy(logits_fn(hidden, positions), tokens)

    return _by_chunk(block, (hidden, tokens), chunk_size)


def chunked_kl(
    logits_fn: Callable[[jax.Array, jax.Array], jax.Array],
    ref_logits_fn: Callable[[jax.Array, jax.Array], jax.Array],
    hidden: jax.Array,
    ref_hidden: jax.Array,
    chunk_size: int = 16,
) -> jax.Array:
    """`kl_divergence` of two vocabulary projections, computed `chunk_size` positions at a time.

    Neither the forward nor the backward pass holds more than one `[B, chunk_size, V]` block of each's logits.

    Args:
        logits_fn: the policy's, as in `chunked_logprobs_and_entropy`.
        ref_logits_fn: the reference's; nothing is learned through it.
        hidden: `[B, R, D]`, the policy's state from which response token t is predicted.
        ref_hidden: `[B, R, D']`, the reference's.
        chunk_size: positions per block, at least 1.

    Returns:
        KL(policy || reference) at each position, `[B, R]` float32 nats.
    """
    chex.assert_rank([hidden, ref_hidden], 3)

    def block(positions: jax.Array, hidden: jax.Array, ref_hidden: jax.Array) -> jax.Array:
        return kl_divergence(logits_fn(hidden, positions), ref_logits_fn(ref_hidden, positions))

    return _by_chunk(block, (hidden, ref_hidden), chunk_size)


def _by_chunk(block: Callable[..., Any], arrays: tuple[jax.Array, ...], chunk_size: int) -> Any:
    """`block(positions [C], *arrays [B, C, ...])` to arrays `[B, C]`, over `[B, R, ...]`, C positions at a time."""
    chex.assert_equal_shape_prefix(arrays, 2)
    batch, length = arrays[0].shape[:2]
    chunk_size = min(chunk_size, length)
    num_chunks = -(-length // chunk_size)
    chunk_size = -(-length // num_chunks)  # as even as can be: what fills the last chunk is computed for nothing
    padding = num_chunks * chunk_size - length

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, num_chunks, chunk_size, *x.shape[2:]).swapaxes(0, 1)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(SUMMED))
    def step(_: None, chunk: tuple[jax.Array, ...]) -> tuple[None, Any]:
        return None, block(*chunk)

    positions = jnp.arange(num_chunks * chunk_size).reshape(num_chunks, chunk_size)
    _, results = jax.lax.scan(step, None, (positions, *map(split, arrays)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, :length], results)


def with_its_gradient(loss: Callable[[Any, Any], tuple[jax.Array, Any]]) -> Callable[[Any, Any], tuple[jax.Array, Any]]:
    """The same loss, whose gradient is computed together with its value: when what follows it runs, nothing of its
    forward pass is kept but the gradient. For a loss that is a term of another, with parameters of its own.

    Args:
        loss: (parameters, data) to (a number `[]`, what else it says). A gradient flows to the parameters alone, and
            through the number alone.
    """

    def forward(params: Any, data: Any) -> tuple[tuple[jax.Array, Any], Any]:
        told, gradient = jax.value_and_grad(loss, has_aux=True)(params, data)
        return jax.lax.optimization_barrier((told, gradient))

    def backward(gradient: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any, None]:
        return jax.tree.map(lambda x: cotangents[0].astype(x.dtype) * x, gradient), None

    function = jax.custom_vjp(loss)
    function.defvjp(forward, backward)
    return function
