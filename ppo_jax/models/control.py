"""The networks of control tasks: a policy and a critic of a few hidden layers, over the numbers that are observed.

Plain functions over a dictionary of matrices: a program of a second of training is not to spend two on tracing modules.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ppo_jax.numerics import logprobs_and_entropy
from ppo_jax.types import Params

LOG_TWO_PI = math.log(2 * math.pi)


class Architecture(NamedTuple):
    """Sizes of the networks."""

    observation_size: int
    action_size: int  # actions to choose from, or dimensions of one
    discrete: bool
    trunk: str  # "separate" hidden layers for policy and critic, or "shared" ones
    width: int
    depth: int


def init_networks(key: jax.Array, net: Architecture) -> Params:
    """Orthogonal matrices of gain sqrt(2), the policy's last one of 0.01 and the critic's of 1; biases of 0.

    The policy begins nearly uniform (or, of continuous actions, near 0 with a standard deviation of 1).

    Source: Huang et al. 2022, "The 37 Implementation Details of PPO", details 2 and c1.
    """
    sizes = {}
    for trunk in trunks(net):
        widths = [net.observation_size, *[net.width] * net.depth]
        sizes |= {f"{trunk}_{i}": (*widths[i : i + 2], math.sqrt(2)) for i in range(net.depth)}
    sizes |= {"action": (net.width, net.action_size, 0.01), "value": (net.width, 1, 1.0)}
    # The square ones that they are cut from, all of a size in one decomposition: compiling one each takes seconds.
    sides = [max(rows, columns) for rows, columns, _ in sizes.values()]
    squares = {side: iter(_orthogonal(jax.random.fold_in(key, side), sides.count(side), side)) for side in set(sides)}
    params: Params = {
        name: {"kernel": gain * next(squares[side])[:rows, :columns], "bias": jnp.zeros(columns)}
        for (name, (rows, columns, gain)), side in zip(sizes.items(), sides, strict=True)
    }
    return params if net.discrete else params | {"log_std": jnp.zeros(net.action_size)}


def _orthogonal(key: jax.Array, count: int, side: int) -> jax.Array:
    """Uniformly random orthogonal matrices `[count, side, side]`."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (count, side, side)))
    return q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]  # else they are not uniform


def pack(params: Params) -> tuple[Params, Callable[[Params], Params]]:
    """All matrices in one array and everything else in another, and the function that takes them apart again.

    What an optimizer does with a dozen small arrays takes several times as long, to run and to compile.

    Returns:
        ({"matrices": `[1, n]`, which decay as matrices do, "vectors": `[m]`}, packed -> params).
    """
    leaves, tree = jax.tree.flatten(params)
    flat, unravel = {}, {}
    for name, ours in (("matrices", lambda x: x.ndim == 2), ("vectors", lambda x: x.ndim != 2)):
        flat[name], unravel[name] = ravel_pytree([x for x in leaves if ours(x)])

    def unpack(packed: Params) -> Params:
        parts = {name: iter(unravel[name](x.ravel())) for name, x in packed.items()}
        return tree.unflatten(next(parts["matrices" if x.ndim == 2 else "vectors"]) for x in leaves)

    return {"matrices": flat["matrices"][None], "vectors": flat["vectors"]}, unpack


def trunks(net: Architecture) -> tuple[str, ...]:
    """What the hidden layers are called."""
    return ("trunk",) if net.trunk == "shared" else ("actor", "critic")


def policy_output(params: Params, net: Architecture, observations: jax.Array) -> jax.Array:
    """Logits `[..., A]` of the actions, or their mean."""
    return _dense(params["action"], _hidden(params, net, trunks(net)[0], observations))


def value(params: Params, net: Architecture, observations: jax.Array) -> jax.Array:
    """Value `[...]` of observations `[..., D]`."""
    return _dense(params["value"], _hidden(params, net, trunks(net)[-1], observations))[..., 0]


def draw_noise(key: jax.Array, net: Architecture, shape: tuple[int, ...]) -> jax.Array:
    """What makes choices of that shape random, `[*shape, A]`: drawn for many steps at once."""
    draw = jax.random.gumbel if net.discrete else jax.random.normal
    return draw(key, (*shape, net.action_size))


def choose(params: Params, net: Architecture, observations: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Actions and their log-probabilities.

    Args:
        params: of the networks.
        net: their sizes.
        observations: `[..., D]`.
        noise: `[..., A]` from `draw_noise`; zeros choose the likeliest action.

    Returns:
        (actions `[...]` int32 or `[..., A]` float32, log-probabilities `[...]` in nats).
    """
    output = policy_output(params, net, observations)
    if net.discrete:
        actions = jnp.argmax(output + noise, axis=-1).astype(jnp.int32)
    else:
        actions = output + jnp.exp(params["log_std"]).reshape((1,) * (noise.ndim - 1) + (-1,)) * noise
    return actions, action_logprobs(params, net, output, actions)[0]


def action_logprobs(
    params: Params, net: Architecture, output: jax.Array, actions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each action under the policy's output, and entropy of the distribution; each `[...]`, nats.

    Of continuous actions the density of a Gaussian with independent dimensions: sum_a -(z^2 + log 2 pi) / 2 - log std,
    z = (action - mean) / std, and its entropy sum_a (1 + log 2 pi) / 2 + log std.
    """
    if net.discrete:
        return logprobs_and_entropy(output, actions)
    log_std = jnp.broadcast_to(params["log_std"], output.shape)
    z = (actions - output) * jnp.exp(-log_std)
    logprobs = jnp.sum(-0.5 * (jnp.square(z) + LOG_TWO_PI) - log_std, axis=-1)
    return logprobs, jnp.sum(0.5 * (1 + LOG_TWO_PI) + log_std, axis=-1)


def _hidden(params: Params, net: Architecture, trunk: str, x: jax.Array) -> jax.Array:
    for i in range(net.depth):
        x = jnp.tanh(_dense(params[f"{trunk}_{i}"], x))
    return x


def _dense(layer: Params, x: jax.Array) -> jax.Array:
    bias = layer["bias"]
    return x @ layer["kernel"] + bias.reshape((1,) * (x.ndim - 1) + bias.shape)
