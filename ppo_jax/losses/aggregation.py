"""How losses of tokens become one number."""

import jax
import jax.numpy as jnp

AGGREGATIONS = ("token", "sequence", "constant")


def aggregation_weights(mask: jax.Array, how: str) -> jax.Array:
    """Weight of each token in a batch's loss: loss = sum(weights * per_token).

    token: 1 / (tokens in the batch);  sequence: 1 / (responses x tokens of this response);  constant: 1 / (B R)

    A weighted sum, so that the parts of a batch add up to the whole: take the weights of the whole batch, and of them
    the rows of each part. A mean over the parts' own means would count a token of a part with few tokens for more.

    Args:
        mask: `[B, R]` bool.
        how: one of `AGGREGATIONS`. "token": each token counts alike (DAPO); "sequence": each response, long or short,
            counts alike (GRPO), but those without a token; "constant": as "token", but what a token counts does not
            depend on how many others there are (Dr. GRPO), so that the weights sum to less than 1.

    Returns:
        Weights `[B, R]` float32, 0 where masked.

    Raises:
        ValueError: an unknown `how`.

    Source: sequence: Shao et al. 2024, arXiv:2402.03300, equation 3; token: Yu et al. 2025, arXiv:2503.14476, equation
    12; constant: Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    if how == "token":
        count = jnp.sum(mask)
    elif how == "sequence":
        count = jnp.sum(mask, axis=1, keepdims=True) * jnp.sum(jnp.any(mask, axis=1))
    elif how == "constant":
        count = mask.size
    else:
        raise ValueError(f"loss_aggregation: got {how!r}, expected one of {', '.join(AGGREGATIONS)}")
    return mask.astype(jnp.float32) / jnp.maximum(count, 1)
