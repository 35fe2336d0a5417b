"""The decoder: GPT-2, Llama, Gemma and others by `ModelConfig`, with a key/value cache that is an explicit argument and
result.

What a matrix product reads, and what the cache keeps, is rounded to the compute dtype (`ModelConfig.dtype`); in
between, and along the residual stream, everything is float32. In bfloat16 that halves how far the log-probabilities of
one program are from those of another, which rounds at other places.

Sources: Radford et al. 2019 (GPT-2), Touvron et al. 2023 (Llama), Henry et al. 2020 (normalised queries and keys), Wang
and Komatsuzaki 2021 (attention and MLP in parallel, in GPT-J), Gemma Team 2024 (norms before and after), Jiang et al.
2023 (windows, in Mistral), Team OLMo 2024 (norms after, queries and keys normalised as a whole).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.errors import InputError
from ppo_jax.models import rope
from ppo_jax.models.attention import attend, softcap
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.layers import BY_OUTPUT, MLP, PRODUCT, Experts, Norm, Projection, product_by_output, residual_std
from ppo_jax.models.masks import causal_mask, positions_of, within_window

LayerCache = tuple[jax.Array, jax.Array]
"""Keys and values of one layer, each [B, K, S, H]; slot s belongs to token s of the padded sequence. A head's keys lie
side by side, as its products read them: in any other order a decode step would begin by copying the whole cache.
"""

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a layer's forward pass keeps for its backward pass, which computes the rest again, by `ModelConfig.remat`."""

Cache = tuple[LayerCache, ...]
"""A `LayerCache` for each layer."""


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """A cache of zeros for `batch` sequences of `length` slots.

    In the compute dtype; on a CPU in float32, since XLA would convert all of a bfloat16 cache in every step.
    """
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    zeros = partial(jnp.zeros, shape, "float32" if jax.default_backend() == "cpu" else config.dtype)
    return tuple((zeros(), zeros()) for _ in range(config.num_layers))


class Attention(nn.Module):
    """Grouped-query self-attention over the given keys, or over a cache that it extends."""

    config: ModelConfig
    number: int  # of the layer

    def setup(self) -> None:
        """Makes the four projections, and the norms of queries and keys."""
        config = self.config
        self.query = Projection(config, config.num_heads * config.head_dim, config.attention_bias, out_dtype="float32")
        self.key = Projection(config, config.num_kv_heads * config.head_dim, config.attention_bias, out_dtype="float32")
        self.value = Projection(config, config.num_kv_heads * config.head_dim, config.attention_bias)
        output_bias = config.attention_bias and config.attention_output_bias
        self.output = Projection(config, config.width, output_bias, residual_std(config), out_dtype="float32")
        if config.qk_norm != "none":
            self.query_norm, self.key_norm = Norm(config), Norm(config)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: LayerCache | None,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Arguments as `Decoder.trunk`, for one layer."""
        config = self.config
        batch, length, _ = x.shape
        query, key = self.query(x), self.key(x)
        if config.qk_norm == "projection":
            query, key = self.query_norm(query), self.key_norm(key)
        query = query.reshape(batch, length, config.num_heads, config.head_dim)
        key = key.reshape(batch, length, config.num_kv_heads, config.head_dim)
        value = self.value(x).reshape(batch, length, config.num_kv_heads, config.head_dim)
        if config.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        if config.positions == "rotary" and self.number not in config.unrotated_layers:
            query, key = self._rotated(query, key, positions, mask.shape[-1])
        query, key = query.astype(config.dtype), key.astype(config.dtype)
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache[0], key.astype(cache[0].dtype), slot, axis=2)
            value = jax.lax.dynamic_update_slice_in_dim(cache[1], value.astype(cache[1].dtype), slot, axis=2)
            cache = (key, value)
        heads = attend(query.astype(key.dtype), key, value, mask, config.attention_scale, config.attention_softcap)
        return self.output(heads.reshape(batch, length, -1)), cache

    def _rotated(
        self, query: jax.Array, key: jax.Array, positions: jax.Array, slots: int
    ) -> tuple[jax.Array, jax.Array]:
        config = self.config
        local = config.local_rope_theta if config.window(self.number) else 0.0
        scaling = None if local else config.rope_scaling
        frequencies = rope.frequencies(config.num_rotated, local or config.rope_theta, scaling, slots)
        turn = partial(rope.rotate, positions=positions, frequencies=frequencies, magnitude=rope.magnitude(scaling))
        return turn(query), turn(key)


class Block(nn.Module):
    """One layer: attention and MLP, normalised before or after or both, and added to the residual stream."""

    config: ModelConfig
    number: int  # of the layer

    def setup(self) -> None:
        """Makes the parts."""
        config = self.config
        self.attention = Attention(config, self.number)
        self.mlp = Experts(config) if config.num_experts else MLP(config)
        if config.norm_placement != "after":
            self.attention_norm, self.mlp_norm = Norm(config), Norm(config)
        if config.norm_placement != "before":
            self.attention_post_norm = Norm(config, out_dtype="float32")
            self.mlp_post_norm = Norm(config, out_dtype="float32")

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: LayerCache | None,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Arguments as `Decoder.trunk`, for one layer."""
        before, after = self.config.norm_placement != "after", self.config.norm_placement != "before"
        heads, cache = self.attention(self.attention_norm(x) if before else x, positions, mask, cache, slot)
        attended = x + (self.attention_post_norm(heads) if after else heads)
        x = x if self.config.parallel_residual else attended
        inner = self.mlp(self.mlp_norm(x) if before else x)
        return attended + (self.mlp_post_norm(inner) if after else inner), cache


class Decoder(nn.Module):
    """Embeddings, blocks and vocabulary projection. `trunk` and `logits` are apart, so that nobody projects what
    nobody reads.
    """

    config: ModelConfig

    def setup(self) -> None:
        """Makes all layers; parameter names are documented in `ppo_jax.hub.families`, where they meet Hugging
        Face's.
        """
        config = self.config
        embed = partial(
            nn.Embed,
            features=config.width,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=nn.initializers.normal(config.init_std),
        )
        self.embed = embed(config.vocab_size)
        if config.positions == "learned":
            self.positions = embed(config.max_positions + config.position_offset)
        block = Block if config.remat == "none" else nn.remat(Block, policy=REMAT_POLICIES[config.remat])
        self.layer = [block(config, i) for i in range(config.num_layers)]
        self.final_norm = Norm(config)
        if not config.tie_embeddings:
            self.lm_head = Projection(config, config.vocab_size, use_bias=False, out_dtype="float32")

    def trunk(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Cache | None = None,
        slot: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the layers over T tokens.

        Args:
            tokens: `[B, T]` int32.
            positions: `[B, T]` int32, see `positions_of`.
            mask: `[B, T, S]` bool: which of the S keys each query sees; S = T without a cache, else the cache's length.
            cache: keys and values of earlier tokens; the new ones are written at `slot` and after.
            slot: where token 0 stands in the cache.

        Returns:
            (hidden `[B, T, D]` after the final norm, the cache with the new tokens).

        Raises:
            InputError: (at trace time) more slots than the model has positions.
        """
        if mask.shape[-1] > self.config.max_positions:
            raise InputError(
                f"sequence length: got {mask.shape[-1]} tokens (prompt and response), "
                f"expected at most the model's {self.config.max_positions} positions"
            )
        config = self.config
        x = self.embed(tokens).astype(jnp.float32)
        if config.embed_scale:  # rounded as Gemma was trained
            x = x * jnp.asarray(config.width**0.5, config.dtype).astype(jnp.float32)
        if config.positions == "learned":
            x = x + self.positions(positions + config.position_offset).astype(jnp.float32)
        masks = {window: within_window(mask, slot, window) if window else mask for window in {0, *config.layer_windows}}
        extended: list[LayerCache] = []
        for i, layer in enumerate(self.layer):
            seen = masks[config.window(i)]
            x, layer_cache = layer(x, positions, seen, None if cache is None else cache[i], slot)
            if layer_cache is not None:
                extended.append(layer_cache)
        return self.final_norm(x), tuple(extended) or None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Vocabulary projection: `[..., D]` to `[..., V]` float32."""
        if self.config.tie_embeddings and self.embed.has_variable("params", BY_OUTPUT):
            embedding = self.embed.get_variable("params", BY_OUTPUT)
            logits = product_by_output(embedding.astype(self.config.dtype), hidden)
        elif self.config.tie_embeddings:
            embedding = self.embed.embedding.astype(self.config.dtype)
            logits = jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)
        else:
            logits = self.lm_head(hidden)
        return softcap(logits, self.config.final_softcap)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Logits `[B, S, V]` float32 of padded sequences, all at once: for tests and small models; `mask` is `[B,
        S]`.
        """
        hidden, _ = self.trunk(tokens, positions_of(mask), causal_mask(mask))
        return self.logits(hidden)
