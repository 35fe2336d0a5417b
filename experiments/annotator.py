"""What the quickstart's simulated annotator prefers: the gold that the reward model never sees, only its choices."""

from collections.abc import Sequence
from typing import Any

from experiments.reviews import lexicon_score, sentence_fraction


def gold(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """How much the annotator likes each review, in units of the log odds of preferring one over another.

    2 x (praising - blaming words) / (praising + blaming words), in [-2, 2]; 1 for giving a reason ("because", "so ...
    that"); minus the share of sentences that are none.
    """
    return [2 * lexicon_score(text) + gives_a_reason(text) - (1 - sentence_fraction(text)) for text in completions]


def gives_a_reason(text: str) -> bool:
    """Whether a sentence says why."""
    words = text.lower().split()
    return "because" in words or ("so" in words and "that" in words[words.index("so") :])
