"""A score from word lists, in pure JAX: it runs inside the compiled iteration."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.errors import InputError
from ppo_jax.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_lexicon_score(
    tokenizer: PreTrainedTokenizerBase, positive: Collection[str], negative: Collection[str]
) -> Callable[[Rollout], jax.Array]:
    """Score of a response: (positive words - negative words) / max(1, positive words + negative words), in [-1, 1].

    Args:
        tokenizer: a word must be a single token of it (as it stands within a sentence).
        positive: words that count +1.
        negative: words that count -1.

    Returns:
        `score(rollout) -> [B]` float32.

    Raises:
        InputError: a word that the tokenizer splits.
    """
    weights = np.zeros(len(tokenizer), np.float32)
    for words, weight in ((positive, 1.0), (negative, -1.0)):
        for word in sorted(words):
            ids = tokenizer.encode(" " + word, add_special_tokens=False)
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise InputError(
                    f"lexicon: got {word!r}, which the tokenizer splits or does not know; expected a single token"
                )
            weights[ids[0]] = weight

    def score(rollout: Rollout) -> jax.Array:
        # A model may have more ids than its tokenizer (a vocabulary padded to a round number): those weigh nothing.
        word_weights = jnp.asarray(weights).at[rollout.response_tokens].get(mode="fill", fill_value=0.0)
        found = jnp.where(rollout.response_mask, word_weights, 0.0)
        return jnp.sum(found, axis=1) / jnp.maximum(jnp.sum(jnp.abs(found), axis=1), 1.0)

    return score
