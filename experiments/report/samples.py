"""Responses of the base policy, its best of 16, and PPO, side by side."""

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.report.road import Row
from ppo_jax.plots.style import column, number

MAX_CHARS = 4000
"""Shown of a text."""


def choose_samples(rows: Sequence[Row], num: int, seed: int = 0) -> dict[str, list[Row]]:
    """Some rows at random, those in which PPO gained most, and those in which it lost most.

    Args:
        rows: with `gold_base` and `gold_ppo`, or, where no row has both, `proxy_base` and `proxy_ppo`.
        num: rows of each kind, at most.
        seed: of the random choice; the same rows and seed give the same choice.

    Returns:
        title -> rows of each kind, the largest change first.
    """
    gains = {judge: column(rows, f"{judge}_ppo") - column(rows, f"{judge}_base") for judge in ("gold", "proxy")}
    judge = "gold" if np.isfinite(gains["gold"]).any() else "proxy"
    gain = gains[judge]
    best_first, worst_first = np.argsort(-gain, kind="stable"), np.argsort(gain, kind="stable")
    chosen = {
        "At random": random.Random(seed).sample(range(len(rows)), min(num, len(rows))),
        f"Biggest gains, by the {judge} score": [i for i in best_first if gain[i] > 0][:num],
        f"Biggest losses, by the {judge} score": [i for i in worst_first if gain[i] < 0][:num],
    }
    return {title: [rows[i] for i in places] for title, places in chosen.items()}


def side_by_side(row: Row) -> dict[str, Any]:
    """A row of evaluation/responses.jsonl as `prompt` and `answers`, each with `who`, `scores` and `text`."""
    answers = []
    for key, who in (("base", "base policy"), ("best_of_16", "best of 16"), ("ppo", "PPO")):
        scores = {judge: number(row.get(f"{judge}_{key}")) for judge in ("proxy", "gold")}
        shown = ", ".join(f"{judge} {score:.2f}" for judge, score in scores.items() if math.isfinite(score))
        answers.append({"who": who, "scores": shown, "text": _cut(row.get(key))})
    return {"prompt": _cut(row.get("prompt")), "answers": answers}


def _cut(value: Any) -> str:
    """A text (or whatever stands in its place) of bounded length."""
    if value is None:
        return "–"
    text = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).strip()
    if len(text) > MAX_CHARS:
        text = f"{text[:MAX_CHARS]} … ({len(text) - MAX_CHARS:,} more characters)"
    return text or "(nothing)"
