"""Heads on the trunk's last hidden state."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ValueHead(nn.Module):
    """A linear critic in float32. It starts at zero, so that the first advantages are those of no critic, not of
    noise.
    """

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """`[..., D]` to `[...]` float32."""
        kernel = self.param("kernel", nn.initializers.zeros, (hidden.shape[-1], 1), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (1,), jnp.float32)
        return (hidden.astype(jnp.float32) @ kernel)[..., 0] + bias[0]
