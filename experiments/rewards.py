"""Rewards that the shipped configurations name."""

from collections.abc import Callable

import jax
from transformers import PreTrainedTokenizerBase

from experiments.reviews import NEGATIVE_WORDS, POSITIVE_WORDS
from ppo_jax.rewards import make_lexicon_score
from ppo_jax.types import Rollout


def praise(tokenizer: PreTrainedTokenizerBase) -> Callable[[Rollout], jax.Array]:
    """(praising - blaming words) / (praising + blaming words) of a generated review, in [-1, 1]; compiled into the
    iteration.
    """
    return make_lexicon_score(tokenizer, POSITIVE_WORDS, NEGATIVE_WORDS)
