"""What somebody who reads five lines of a report has to know."""

import math
from dataclasses import dataclass

import numpy as np

from experiments.report.road import Findings
from ppo_jax.plots.style import column, number, running_mean

WANTED_GOLD = 0.5
"""Of the distance in gold from the base policy to its best of 16."""
WANTED_ACCURACY = 0.05
"""Most that the reward model's accuracy may be below its ceiling."""


@dataclass(frozen=True)
class Verdict:
    """One line: kind is good, bad or note."""

    kind: str
    topic: str
    text: str


def verdicts(road: Findings) -> list[Verdict]:
    """KL, gold, proxy, reward model, over-optimisation; what is not known says so."""
    found = [_kl(road), _way(road, "gold"), _way(road, "proxy"), _accuracy(road)]
    return [*found, *_overoptimization(road)]


def _kl(road: Findings) -> Verdict:
    kl = road.value("objective/kl")
    if not math.isfinite(kl):
        return Verdict("note", "KL", "not known.")
    if not road.kl_limit > 0:
        return Verdict("note", "KL", f"{kl:.2f} nats a response; no limit was set.")
    held = kl <= road.kl_limit
    word = "limit held" if held else "limit NOT held"
    return Verdict("good" if held else "bad", "KL", f"{word}: {kl:.2f} of at most {road.kl_limit:g} nats a response.")


def _way(road: Findings, judge: str) -> Verdict:
    """From the base policy to PPO, as a share of the way to the best of 16."""
    base, ppo, best = (road.value(f"{judge}/{who}") for who in ("base", "ppo", "best_of_16"))
    if not math.isfinite(base + ppo):
        return Verdict("note", judge, "not known.")
    text = f"{base:.3f} before PPO, {ppo:.3f} after"
    if not best > base:
        return Verdict("note", judge, f"{text}.")
    share = (ppo - base) / (best - base)
    text += f": {share:+.0%} of the distance from the base policy to its best of 16 ({best:.3f})"
    if judge == "proxy":
        return Verdict("note", judge, f"{text}.")
    return Verdict("good" if share >= WANTED_GOLD else "bad", judge, f"{text}; wanted: at least {WANTED_GOLD:+.0%}.")


def _accuracy(road: Findings) -> Verdict:
    accuracy, ceiling = road.value("reward_model/accuracy"), road.ceiling
    if not math.isfinite(accuracy):
        return Verdict("note", "reward model", "accuracy not known.")
    text = f"{accuracy:.1%} of the held-out comparisons right"
    low, high = (number(road.reward_model.get(key)) for key in ("accuracy_low", "accuracy_high"))
    if math.isfinite(low + high):
        text += f" (95% interval: {low:.1%} to {high:.1%})"
    if not math.isfinite(ceiling):
        return Verdict("note", "reward model", f"{text}.")
    below = ceiling - accuracy
    text += (
        f", {100 * abs(below):.2f} points {'below' if below >= 0 else 'above'} the simulated annotator's ceiling of "
    )
    text += f"{ceiling:.1%}; wanted: at most {100 * WANTED_ACCURACY:.0f} below."
    return Verdict("good" if below <= WANTED_ACCURACY else "bad", "reward model", text)


def _overoptimization(road: Findings) -> list[Verdict]:
    """Where gold was highest, in running means, and where both judges went from there; nothing for short runs."""
    judges = np.stack([column(road.ppo, key) for key in ("objective/score", "objective/gold", "iteration")], axis=1)
    judges = judges[np.isfinite(judges).all(axis=1)]
    window = max(3, len(judges) // 8)
    if len(judges) < 2 * window:
        return []
    proxy, gold = (running_mean(values, window) for values in judges.T[:2])
    peak = int(gold.argmax())
    text = (
        f"gold, as a mean over {window} iterations, was highest around iteration {judges[peak, 2]:g}, at "
        f"{gold[peak]:.3f}, and ended at {gold[-1]:.3f}; the proxy went from {proxy[peak]:.3f} to {proxy[-1]:.3f} "
        "meanwhile."
    )
    return [Verdict("note", "over-optimisation", text)]
