"""Sentiment by VADER's lexicon and rules (Hutto and Gilbert 2014), a host reward."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any


def vader(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """VADER's compound score of each completion alone, in [-1, 1]; the prompt does not count."""
    analyzer = _analyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in completions]


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError('the "vader" reward needs the "eval" extra: pip install -e ".[eval]"') from error
    return SentimentIntensityAnalyzer()
