"""The policy and its critic: one decoder, two heads."""

import flax.linen as nn
import jax

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import ValueHead
from ppo_jax.models.masks import causal_mask, positions_of
from ppo_jax.models.transformer import Cache, Decoder


class ActorCritic(nn.Module):
    """A `Decoder` with a `ValueHead` on its trunk. Parameters: `{"decoder": ..., "value_head": ...}`."""

    config: ModelConfig

    def setup(self) -> None:
        """Makes both parts."""
        self.decoder = Decoder(self.config)
        self.value_head = ValueHead()

    def trunk(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Cache | None = None,
        slot: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """See `Decoder.trunk`."""
        return self.decoder.trunk(tokens, positions, mask, cache, slot)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """See `Decoder.logits`."""
        return self.decoder.logits(hidden)

    def value(self, hidden: jax.Array) -> jax.Array:
        """Value of the state that ends in this token: `[..., D]` to `[...]` float32."""
        return self.value_head(hidden)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(logits `[B, S, V]`, values `[B, S]`) of padded sequences: for initialisation and small models."""
        hidden, _ = self.trunk(tokens, positions_of(mask), causal_mask(mask))
        return self.logits(hidden), self.value(hidden)
