"""The optimizer: Adam with decoupled weight decay, a clipped gradient and a schedule."""

import jax
import jax.numpy as jnp
import optax

from ppo_jax.types import Params, TrainState

LR_SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(lr: float, kind: str, warmup_steps: int, num_steps: int) -> optax.Schedule:
    """Learning rate by gradient step: linear over the warm-up (1/w of the peak in the first of w steps), then constant,
    or down to 0 at `num_steps`.

    Args:
        lr: the peak.
        kind: one of `LR_SCHEDULES`.
        warmup_steps: gradient steps of warm-up.
        num_steps: gradient steps of the whole run.

    Returns:
        `step -> learning rate`.

    Raises:
        ValueError: an unknown kind.
    """
    decay_steps = max(1, num_steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(lr, decay_steps),
    }
    if kind not in after:
        raise ValueError(f"lr_schedule: got {kind!r}, expected one of {', '.join(LR_SCHEDULES)}")
    # The first step after 0 of w has 1/w of the peak, not nothing: a step with learning rate zero is a step lost.
    warmup = optax.linear_schedule(lr / max(1, warmup_steps), lr, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, after[kind]], [warmup_steps]) if warmup_steps else after[kind]


def make_optimizer(
    schedule: optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015) with decoupled weight decay on matrices only, after clipping by the global norm."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_is_matrix),
    )


def fresh_state(params: Params, tx: optax.GradientTransformation, key: jax.Array, kl_coef: float = 0.0) -> TrainState:
    """The state before the first step; `kl_coef` is PPO's, and 0 where there is no KL penalty."""
    return TrainState(jnp.int32(0), params, tx.init(params), key, jnp.float32(kl_coef))


def _is_matrix(params: Params) -> Params:
    return jax.tree.map(lambda x: jnp.ndim(x) >= 2, params)
