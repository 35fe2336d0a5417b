"""Losses: of the policy, of the critic, of texts, of preferences; and how those by token become one number."""

from ppo_jax.losses.aggregation import AGGREGATIONS, aggregation_weights
from ppo_jax.losses.policy import (
    cispo_surrogate,
    clip_surrogate,
    gspo_surrogate,
    importance_weights,
    ratio_metrics,
    unclipped_surrogate,
)
from ppo_jax.losses.preference import dpo_loss, ipo_loss, kto_loss, ranking_loss, rating_loss
from ppo_jax.losses.text import next_token_loss
from ppo_jax.losses.value import clipped_value_error, huber_value_error, squared_value_error

__all__ = [
    "AGGREGATIONS",
    "aggregation_weights",
    "cispo_surrogate",
    "clip_surrogate",
    "clipped_value_error",
    "dpo_loss",
    "gspo_surrogate",
    "huber_value_error",
    "importance_weights",
    "ipo_loss",
    "kto_loss",
    "next_token_loss",
    "ranking_loss",
    "ratio_metrics",
    "rating_loss",
    "squared_value_error",
    "unclipped_surrogate",
]
