"""Scores from any Python function, with its mistakes caught at the door."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ppo_jax.errors import InputError

HostReward = Callable[..., Sequence[float]]
"""`reward(prompts, completions, **columns) -> list[float]`: lists of B texts; `columns` holds the data's other
columns.
"""


class RewardError(InputError):
    """A reward function failed or returned something that is not B finite numbers; names the prompts that did it."""


def call_reward(
    reward: HostReward, prompts: Sequence[str], completions: Sequence[str], columns: Sequence[dict[str, Any]]
) -> np.ndarray:
    """Calls a host reward and checks what comes back.

    Args:
        reward: the function.
        prompts: B texts.
        completions: B texts.
        columns: for each row the data's other columns; a row that lacks one passes None.

    Returns:
        Scores `[B]` float32.

    Raises:
        RewardError: it raised, or returned the wrong number of scores, or a score that is not a finite number.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    keys = dict.fromkeys(key for row in columns for key in row if key not in ("prompts", "completions"))
    try:
        returned = reward(list(prompts), list(completions), **{key: [row.get(key) for row in columns] for key in keys})
        scores = [] if isinstance(returned, str | dict) else list(returned)
        if isinstance(returned, str | dict) or any(isinstance(score, str) for score in scores):
            raise TypeError(f"got {type(returned).__name__}, expected a list of numbers")
        scores = [float(score) for score in scores]
    except RewardError:  # it calls others, as we do
        raise
    except Exception as error:  # the function is the user's, and may raise anything
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise RewardError(f"reward {name}: {type(error).__name__}: {reason}; prompts: {_shorten(prompts)}") from error
    return check_scores(name, scores, prompts)


def check_scores(name: str, scores: Sequence[float] | np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """The scores as an array `[B]` float32.

    Raises:
        RewardError: the wrong number of scores, or a score that is not a finite number; names the prompts that did it.
    """
    if len(scores) != len(prompts):
        raise RewardError(
            f"reward {name}: got {len(scores)} scores, expected {len(prompts)}, one a prompt; "
            f"prompts: {_shorten(prompts)}"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused
        result = np.asarray(scores, np.float32)
    bad = np.flatnonzero(~np.isfinite(result))
    if bad.size:
        raise RewardError(
            f"reward {name}: got {result[bad[0]]} for {bad.size} of {len(scores)} responses, expected finite numbers; "
            f"prompts: {_shorten([prompts[i] for i in bad])}"
        )
    return result


def _shorten(prompts: Sequence[str], most: int = 3, width: int = 60) -> str:
    shown = [repr(text if len(text) <= width else text[: width - 3] + "...") for text in prompts[:most]]
    return ", ".join(shown) + (f" and {len(prompts) - most} more" if len(prompts) > most else "")
