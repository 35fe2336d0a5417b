"""The loss of a language model on a text that it should write."""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.numerics import masked_mean
from ppo_jax.types import Metrics


def next_token_loss(logprobs: jax.Array, mask: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean negative log-likelihood of the masked tokens.

    Args:
        logprobs: `[B, T]` nats.
        mask: `[B, T]` bool.

    Returns:
        (loss `[]` in nats per token, metrics): `perplexity`, its exponential.
    """
    chex.assert_equal_shape([logprobs, mask])
    loss = -masked_mean(logprobs, mask)
    return loss, {"perplexity": jnp.exp(loss)}
