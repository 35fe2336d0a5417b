"""The parts of a decoder that look at each token alone: norms, projections, the MLP, a mixture of experts.

Sources: Zhang and Sennrich 2019 (RMSNorm), Shazeer 2020 (gated MLP), Jiang et al. 2024 (experts, in Mixtral).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.lora import Params, column_norms

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "silu": nn.silu,
    "relu": nn.relu,
}


_float32_dot = partial(jnp.dot, preferred_element_type=jnp.float32)  # bfloat16 in, float32 out


class Norm(nn.Module):
    """LayerNorm or RMSNorm, with float32 statistics."""

    config: ModelConfig
    out_dtype: str | None = None  # None: the compute dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `[..., D]`."""
        config = self.config
        init = nn.initializers.zeros if config.norm_unit_offset else nn.initializers.ones
        scale = self.param("scale", init, x.shape[-1:], jnp.dtype(config.param_dtype)).astype(jnp.float32)
        if config.norm_unit_offset:
            scale = scale + 1
        y = x.astype(jnp.float32)
        if config.norm == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.norm_eps)
        # Broadcasts are spelled out: tests forbid that ranks are promoted silently.
        y = y * jnp.broadcast_to(scale, y.shape)
        if config.norm == "layernorm":
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.dtype(config.param_dtype))
            y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
        return y.astype(self.out_dtype or config.dtype)


PRODUCT = "product with a layer's matrix"  # what `remat="dots"` keeps

BY_OUTPUT = "by_output"


def by_output(params: Params) -> dict[str, Any]:
    """A decoder's parameters with the matrix of each `Projection` by output, `[features, in]`, and the embedding named
    as one for the vocabulary's projection. The matrices are copies, worth it once a rollout; see `product_by_output`.

    Args:
        params: nested dict of arrays. What has DoRA's magnitudes stays as it is: their norms are of columns.
    """
    if jnp.ndim(params.get("kernel", 0)) == 2 and "lora_magnitude" not in params:
        rest = {name: x for name, x in params.items() if name != "kernel"}
        return rest | {BY_OUTPUT: params["kernel"].T}
    own = {name: by_output(x) if isinstance(x, Mapping) else x for name, x in params.items()}
    return own | {BY_OUTPUT: own["embedding"]} if "embedding" in own else own


def product_by_output(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """`[features, in]` and `[..., in]` to `[..., features]` float32: made by output, and turned afterwards. On a CPU it
    is the fastest for few tokens.

    XLA would turn the operands instead, which takes 1.2 to 2.4 times as long (16 tokens, 384 x 1536 to 50257 x 768,
    float32, jax 0.10.2). `reduce_precision` to float32, which changes no number, stands in its way.
    """
    y = jnp.einsum("oi,...i->o...", matrix, x, preferred_element_type=jnp.float32)
    return jnp.moveaxis(jax.lax.reduce_precision(y, exponent_bits=8, mantissa_bits=23), 0, -1)


class Projection(nn.Module):
    """A linear layer: `[..., in]` to `[..., features]`; with the adapter that its parameters hold, if they hold one.

    y = x W + s (x A) B + b. With DoRA's magnitudes m, y = m (x W + s (x A) B) / ||W + s A B|| + b, in which the norm
    (of each column) is a constant to the gradient, as the authors advise (section 4.3) and PEFT does. The norm is
    computed anew in each call: `merge` before much is sampled.

    The matrix is `kernel` `[in, features]`, or what `by_output` makes of it.
    """

    config: ModelConfig
    features: int
    use_bias: bool
    init_std: float | None = None  # None: the configuration's
    out_dtype: str | None = None  # None: the compute dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` to `[..., features]`."""
        dtype, param_dtype = jnp.dtype(self.config.dtype), jnp.dtype(self.config.param_dtype)
        init = nn.initializers.normal(self.init_std or self.config.init_std)
        x = x.astype(dtype)
        if self.has_variable("params", BY_OUTPUT):
            kernel = self.get_variable("params", BY_OUTPUT).astype(dtype)
            y, kernel = product_by_output(kernel, x), kernel.T
        else:
            kernel = self.param("kernel", init, (x.shape[-1], self.features), param_dtype)
            y = _float32_dot(x, kernel.astype(dtype))
        if self.has_variable("params", "lora_a"):
            y = self._adapted(x, y, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), param_dtype)
            y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
        return checkpoint_name(y.astype(self.out_dtype or dtype), PRODUCT)

    def _adapted(self, x: jax.Array, y: jax.Array, kernel: jax.Array) -> jax.Array:
        scale = self.config.lora_scale
        a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
        y = y + scale * _float32_dot(_float32_dot(x, a.astype(x.dtype)).astype(x.dtype), b.astype(x.dtype))
        if self.has_variable("params", "lora_magnitude"):
            norms = checkpoint_name(jax.lax.stop_gradient(column_norms(kernel, a, b, scale)), PRODUCT)
            y = checkpoint_name(y, PRODUCT)  # the gradient of a magnitude reads it
            y = y * jnp.broadcast_to(self.get_variable("params", "lora_magnitude") / norms, y.shape)
        return y


def residual_std(config: ModelConfig) -> float:
    """GPT-2's smaller initialisation of what adds to the residual stream, so that its variance does not grow with
    depth.
    """
    return config.init_std / (2 * config.num_layers) ** 0.5


class MLP(nn.Module):
    """Two layers, or three when gated."""

    config: ModelConfig

    def setup(self) -> None:
        """Makes the projections."""
        config = self.config
        if config.gated_mlp:
            self.gate = Projection(config, config.mlp_width, config.mlp_bias)
        self.up = Projection(config, config.mlp_width, config.mlp_bias)
        self.down = Projection(config, config.width, config.mlp_bias, residual_std(config), out_dtype="float32")

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` to `[..., D]` float32."""
        activation = ACTIVATIONS[self.config.activation]
        if self.config.gated_mlp:
            return self.down(activation(self.gate(x).astype(jnp.float32)) * self.up(x).astype(jnp.float32))
        return self.down(activation(self.up(x).astype(jnp.float32)))


class ExpertProjection(nn.Module):
    """As many linear layers as there are experts, for tokens that stand expert by expert."""

    config: ModelConfig
    features: int
    init_std: float

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`[n, in]` to `[n, features]` float32; the first `sizes[0]` rows through the first layer, and so on."""
        config = self.config
        shape, init = (config.num_experts, x.shape[-1], self.features), nn.initializers.normal(self.init_std)
        kernel = self.param("kernel", init, shape, jnp.dtype(config.param_dtype))
        x, kernel = x.astype(config.dtype), kernel.astype(config.dtype)
        return checkpoint_name(jax.lax.ragged_dot(x, kernel, sizes, preferred_element_type=jnp.float32), PRODUCT)


class Experts(nn.Module):
    """A mixture of experts: each token goes through those few MLPs that its router gives the most weight.

    y = sum over the chosen e of p_e MLP_e(x), p the softmax of the router, divided by its sum over them where
    `normalize_experts`. No token is dropped, and no expert is computed for a token that did not choose it.
    """

    config: ModelConfig

    def setup(self) -> None:
        """Makes the router and the projections of all experts."""
        config = self.config
        self.router = Projection(config, config.num_experts, use_bias=False, out_dtype="float32")
        self.expert_gate = ExpertProjection(config, config.mlp_width, config.init_std)
        self.expert_up = ExpertProjection(config, config.mlp_width, config.init_std)
        self.expert_down = ExpertProjection(config, config.width, residual_std(config))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` to `[..., D]` float32."""
        config, tokens = self.config, x.reshape(-1, x.shape[-1])
        probs = jax.nn.softmax(self.router(tokens), axis=-1)
        self.sow("intermediates", "router_probs", probs.reshape(*x.shape[:-1], -1))  # for `load_balance`
        weights, chosen = jax.lax.top_k(probs, config.experts_per_token)  # each [n, k]
        if config.normalize_experts:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1))  # by expert
        sizes = jnp.bincount(chosen.reshape(-1), length=config.num_experts)
        rows = tokens[order // config.experts_per_token]
        inner = ACTIVATIONS[config.activation](self.expert_gate(rows, sizes)) * self.expert_up(rows, sizes)
        outer = self.expert_down(inner, sizes)[jnp.argsort(order)]  # back by token
        y = jnp.einsum("nk,nkd->nd", weights, outer.reshape(*weights.shape, -1))
        return y.reshape(x.shape)
