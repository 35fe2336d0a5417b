"""What the critic minimises.

Each is `x_value_error(values, old_values, returns, mask, *, <settings>) -> (error [B, R], clipped [B, R] bool)`, by
token: `aggregation_weights` makes one number of it. Where masked, the error is 0 and has no gradient, whatever stands
there. The half is in the error, so that vf_coef means the same for all.
"""

import chex
import jax
import jax.numpy as jnp

Error = tuple[jax.Array, jax.Array]
"""(error `[B, R]`, `[B, R]` bool: a clip binds)."""


def clipped_value_error(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    value_clip_eps: float | jax.Array,
) -> Error:
    """Squared error, pessimistic about moves of more than `value_clip_eps` from the old value.

    error = 1/2 max((v - R)^2, (clip(v, v_old - eps, v_old + eps) - R)^2)

    Args:
        values: `[B, R]`, of the parameters that learn.
        old_values: `[B, R]`, of the parameters that acted.
        returns: `[B, R]`, the targets.
        mask: `[B, R]` bool.
        value_clip_eps: largest rewarded move, in units of the value.

    Returns:
        (error `[B, R]`, `[B, R]` bool: the clip binds, so that the token has no gradient).

    Source: openai/baselines, ppo2/model.py; openai/lm-human-preferences, train_policy.py.
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    near = jnp.clip(values, old_values - value_clip_eps, old_values + value_clip_eps)
    unclipped = jnp.square(jnp.where(mask, values - returns, 0.0))
    clipped = jnp.square(jnp.where(mask, near - returns, 0.0))
    return 0.5 * jnp.maximum(unclipped, clipped), clipped > unclipped


def squared_value_error(values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array) -> Error:
    """Half the squared error: 1/2 (v - R)^2.

    Args:
        values: `[B, R]`, of the parameters that learn.
        old_values: `[B, R]`; their shape only.
        returns: `[B, R]`, the targets.
        mask: `[B, R]` bool.

    Returns:
        (error `[B, R]`, False `[B, R]`).
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    return 0.5 * jnp.square(jnp.where(mask, values - returns, 0.0)), jnp.zeros_like(mask)


def huber_value_error(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, huber_delta: float | jax.Array
) -> Error:
    """Huber's error: half the square of small errors, a straight line of slope `huber_delta` for larger ones.

    With e = v - R:  error = e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2)

    Args:
        values: `[B, R]`, of the parameters that learn.
        old_values: `[B, R]`; their shape only.
        returns: `[B, R]`, the targets.
        mask: `[B, R]` bool.
        huber_delta: where the line begins, in units of the value, > 0.

    Returns:
        (error `[B, R]`, `[B, R]` bool: the token is on the line, so that its gradient is delta).

    Source: Huber 1964, "Robust Estimation of a Location Parameter".
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    error = jnp.where(mask, values - returns, 0.0)
    near = jnp.clip(error, -huber_delta, huber_delta)
    return near * (error - 0.5 * near), near != error
