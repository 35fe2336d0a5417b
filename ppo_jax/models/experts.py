"""What the routers of a mixture of experts choose, and how evenly the experts are used."""

from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.types import Params


def run_trunk(
    model: Any, params: Params, tokens: jax.Array, positions: jax.Array, mask: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """The trunk of a `Decoder`, or of what has one, over whole rows; arguments as `Decoder.trunk`.

    Returns:
        (hidden `[B, T, D]`, the weights that the router of each layer gives to the experts, each `[B, T, E]`: an empty
        list where there are no experts).
    """
    arguments = ({"params": params}, tokens, positions, mask)
    if not model.config.num_experts:
        return model.apply(*arguments, method="trunk")[0], []
    (hidden, _), kept = model.apply(*arguments, method="trunk", mutable=["intermediates"])
    return hidden, jax.tree.leaves(kept)


def load_balance(routed: list[jax.Array], experts_per_token: int, counted: jax.Array) -> jax.Array:
    """The load-balancing loss, over all layers together: E times the sum over experts of f P.

    f is how many of a token's choices fall on an expert, P the weight that the router gives it, each a mean over the
    tokens. It is `experts_per_token` where all experts are used alike, and E where every token chooses the same ones.

    Args:
        routed: from `run_trunk`, each `[B, T, E]`.
        experts_per_token: how many each token chooses.
        counted: `[B, T]` bool: real tokens.

    Returns:
        `[]` float32, without a gradient.

    Source: Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6; for several choices and layers transformers 5.23.0,
    `load_balancing_loss_func` of Qwen3-MoE.
    """
    probs = jax.lax.stop_gradient(jnp.stack(routed))  # [layers, B, T, E]
    num_experts = probs.shape[-1]
    chosen = jax.nn.one_hot(jax.lax.top_k(probs, experts_per_token)[1], num_experts).sum(axis=-2)
    weights = jnp.broadcast_to(counted[None, ..., None], probs.shape)
    share, weight = (jnp.mean(x, axis=(0, 1, 2), where=weights) for x in (chosen, probs))
    return num_experts * jnp.sum(share * weight)
