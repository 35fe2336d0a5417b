"""The finite guard: which quantity of an iteration was the first that is not a finite number."""

from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.types import Experience, Params, Scores

EXPERIENCE = ("score", "response logprob", "reference logprob", "value", "advantage", "return")
LOSS = ("learned logprob", "learned value", "loss")


def quantities(params: Params) -> list[str]:
    """Names of the quantities, in the order of a judgement by `broken_experience`, `broken_loss`, `broken_leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return [*EXPERIENCE, *LOSS, *(f"gradient of {path}" for path in paths)]


def broken_experience(scores: Scores, experience: Experience, ref_logprobs: jax.Array) -> jax.Array:
    """Which of `EXPERIENCE` hold a number that is not finite, `[6]` bool; what is masked does not count, nor what the
    shaping of the scores has replaced or clipped.
    """
    mask = experience.response_mask
    per_token = (experience.logprobs, ref_logprobs, experience.values, experience.advantages, experience.returns)
    score = is_broken(scores.total) | is_broken(scores.tokens) | is_broken(scores.greedy)
    return jnp.stack([score, *(is_broken(jnp.where(mask, x, 0.0)) for x in per_token)])


def broken_leaves(tree: Any) -> jax.Array:
    """Which leaves of a tree hold a number that is not finite; `[leaves]` bool."""
    return jnp.stack([is_broken(leaf) for leaf in jax.tree.leaves(tree)])


def is_broken(x: jax.Array | None) -> jax.Array:
    """Whether an array holds a number that is not finite; `[]` bool."""
    return jnp.array(False) if x is None else ~jnp.all(jnp.isfinite(x))


def first_broken(broken: jax.Array) -> jax.Array:
    """Number of the first True of `[n]`; -1: there is none; `[]` float32, as a metric is."""
    return jnp.where(jnp.any(broken), jnp.argmax(broken), -1).astype(jnp.float32)
