"""Who may look at whom, and where each token stands: padding on either side, texts packed in a row, windows."""

import jax
import jax.numpy as jnp


def positions_of(mask: jax.Array) -> jax.Array:
    """Position of each token among the True ones of its row, from 0; `[B, S]` bool to `[B, S]` int32."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def causal_mask(mask: jax.Array) -> jax.Array:
    """Who may look at whom: `[B, S]` bool to `[B, S, S]` bool; query t sees the True tokens at t and before."""
    slots = jnp.arange(mask.shape[-1])
    return mask[:, None, :] & (slots[:, None] >= slots[None, :])[None]


def segment_positions(segments: jax.Array) -> jax.Array:
    """Position of each token within its text, from 0: `[B, S]` int to `[B, S]` int32; see `Examples.segments`."""
    slots = jnp.broadcast_to(jnp.arange(segments.shape[-1], dtype=jnp.int32), segments.shape)
    begins = segments[:, 1:] != segments[:, :-1]
    starts = jnp.where(jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True), slots, 0)
    return slots - jax.lax.cummax(starts, axis=1)


def segment_mask(segments: jax.Array) -> jax.Array:
    """Who may look at whom: `[B, S]` int to `[B, S, S]` bool; query t sees the tokens of its own text at t and before,
    and padding sees nothing. See `Examples.segments`.
    """
    return causal_mask(segments > 0) & (segments[:, :, None] == segments[:, None, :])


def within_window(mask: jax.Array, slot: jax.Array | int, window: int) -> jax.Array:
    """What is left of a mask where a token sees only the `window` newest slots, its own included.

    Args:
        mask: `[B, T, S]` bool; query t stands in slot `slot + t`.
        slot: of the first query.
        window: slots, at least 1. The tokens of a text stand in slots without a gap, so this counts tokens.
    """
    queries = slot + jnp.arange(mask.shape[1])[:, None]
    return mask & (queries - jnp.arange(mask.shape[2])[None, :] < window)[None]
