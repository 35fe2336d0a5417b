"""The reward model: one decoder without its vocabulary projection, and one score a text."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.masks import causal_mask, positions_of
from ppo_jax.models.transformer import Decoder


def scored_slot(tokens: jax.Array, mask: jax.Array, pad_id: jax.Array | int | None) -> jax.Array:
    """Where each row is scored: the last token that is real and is not padding by its id either.

    A pad id that is also EOS thus counts as padding wherever it ends a text. Where nothing but the pad id is real, it
    is the first real token; in a row without one, slot 0, whose score means nothing.

    Args:
        tokens: `[B, S]` int.
        mask: `[B, S]` bool: real tokens, wherever the padding is.
        pad_id: the model's; None: it has none, and the mask alone decides.

    Returns:
        `[B]` int32.

    Source: transformers 5.23.0, `GPT2ForSequenceClassification.forward` and `GenericForSequenceClassification.forward`:
    the rightmost token that is not the pad id, else slot 0. There the mask has no say: a padded slot with another id
    in it is scored, and a row of pad ids that is padded left is scored at a slot that is not real.
    """
    scored = mask if pad_id is None else mask & (tokens != pad_id)
    last = jnp.max(jnp.where(scored, jnp.arange(mask.shape[1])[None, :], -1), axis=1)
    return jnp.where(last >= 0, last, jnp.argmax(mask, axis=1))


class RewardModel(nn.Module):
    """A `Decoder` and a linear score without bias. Parameters: `{"decoder": ..., "score_head": ...}`.

    The decoder has no `lm_head`, whatever `tie_embeddings` says.

    The head starts with a standard deviation of 1 / sqrt(D + 1).

    Source: openai/lm-human-preferences `language/model.py`, `fc_layer` (Ziegler et al. 2019, arXiv:1909.08593). Theirs
    has a bias; transformers', and so ours, has none.
    """

    config: ModelConfig

    def setup(self) -> None:
        """Makes both parts; the head is float32."""
        self.decoder = Decoder(self.config)
        std = (self.config.width + 1) ** -0.5
        self.score_head = nn.Dense(1, use_bias=False, dtype=jnp.float32, kernel_init=nn.initializers.normal(std))

    def score(self, hidden: jax.Array) -> jax.Array:
        """Score of a text that ends in this token: `[..., D]` to `[...]` float32."""
        return self.score_head(hidden)[..., 0]

    def __call__(self, tokens: jax.Array, mask: jax.Array, pad_id: jax.Array | int | None) -> jax.Array:
        """Scores `[B]` float32 of texts padded left, right, or both (a rollout); arguments as `scored_slot`."""
        return self.score(self.last_hidden(tokens, mask, pad_id))

    def last_hidden(self, tokens: jax.Array, mask: jax.Array, pad_id: jax.Array | int | None) -> jax.Array:
        """What the head reads: the trunk's state at `scored_slot`, `[B, D]`."""
        hidden, _ = self.decoder.trunk(tokens, positions_of(mask), causal_mask(mask))
        slot = scored_slot(tokens, mask, pad_id)
        return jnp.take_along_axis(hidden, slot[:, None, None], axis=1)[:, 0]
