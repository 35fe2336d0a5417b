"""Softmax attention: cuDNN's fused kernel where that can do it, plain products elsewhere.

Sources: Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries); Gemma Team 2024 (soft caps); Dao et al. 2022
(arXiv:2205.14135) for attention that never holds its scores, which is what cuDNN's kernel does.
"""

import re

import jax
import jax.numpy as jnp


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """C tanh(x / c): nearly x where |x| is much smaller than c, and never beyond c; a cap of 0 is none."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scale: float, cap: float = 0.0
) -> jax.Array:
    """Softmax attention with grouped queries: N / K query heads share a key head, which is not repeated in memory.

    Args:
        query: `[B, T, N, H]`.
        key: `[B, K, S, H]`.
        value: `[B, K, S, H]`.
        mask: `[B, T, S]` bool.
        scale: of the scores.
        cap: of the scores, see `softcap`.

    Returns:
        `[B, T, N, H]`. A query that may look at nothing (padding) gets an average, never NaN.

    JAX's rule for mapping cuDNN's kernel (`jax.vmap`) takes no mask that all heads share (0.10.2).
    """
    if fits_cudnn(query, key, cap):
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale, implementation="cudnn")
    batch, length, heads, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, key, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask[:, None, None], softcap(scores, cap), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bksh->btkgh", weights, value).reshape(query.shape)


def fits_cudnn(query: jax.Array, key: jax.Array, cap: float) -> bool:
    """Whether attention is cuDNN's: on an NVIDIA GPU, in bfloat16, of several queries at once, an even number of them
    and of slots, heads of a multiple of 8 up to 128 and as many as the mesh's `tensor` axis divides, no soft cap. One
    query (a decode step) is a product and a sum, for which plain XLA reads no more memory.
    """
    length, size, slots = query.shape[1], query.shape[3], key.shape[2]
    tensor = dict(jax.typeof(query).sharding.mesh.shape).get("tensor", 1)
    whole = query.shape[2] % tensor == 0 and key.shape[1] % tensor == 0
    even = length > 1 and length % 2 == 0 and slots % 2 == 0
    fits = query.dtype == jnp.bfloat16 and even and whole and size % 8 == 0 and size <= 128 and not cap
    return fits and _on_cuda()


def _on_cuda() -> bool:
    """Whether programs run on NVIDIA GPUs that cuDNN's kernel knows: from compute capability 8.0 on (Ampere)."""
    capability = getattr(jax.devices()[0], "compute_capability", "") if jax.default_backend() == "gpu" else ""
    return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8
