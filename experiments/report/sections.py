"""The parts of a report, each from what the stages left."""

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report.road import STAGES, Findings
from experiments.report.samples import choose_samples, side_by_side
from ppo_jax.plots import NothingToDraw, plot_frontier, plot_proxy_and_gold, plot_reward_model
from ppo_jax.plots.style import column, number

TRAINED = ("pretrain", "sft", "reward_model", "ppo")
"""Stages that draw curves."""
NUM_SAMPLES = 3
"""Of each kind."""

_WORDS = {  # for the keys of summary.json
    "reward_model/accuracy": "reward model: accuracy on held-out comparisons",
    "reward_model/accuracy_low": "lower end of its 95% interval",
    "reward_model/accuracy_high": "upper end of its 95% interval",
    "reward_model/ece": "expected calibration error: mean distance of accuracy and confidence",
    "reward_model/annotator_ceiling": "the simulated annotator's ceiling: how often it chooses what it prefers",
    "num_prompts": "prompts of the evaluation",
    "proxy/base": "proxy score of the base policy",
    "proxy/best_of_16": "proxy score of its best of 16",
    "proxy/ppo": "proxy score after PPO",
    "proxy/win_rate": "share of prompts on which PPO beats the base policy, by the proxy",
    "gold/base": "gold score of the base policy",
    "gold/best_of_16": "gold score of its best of 16, as the reward model chooses",
    "gold/best_of_16_by_gold": "gold score of its best of 16, as gold itself would choose",
    "gold/ppo": "gold score after PPO",
    "gold/win_rate": "share of prompts on which PPO beats the base policy, by gold",
    "objective/kl": "KL of the policy after PPO to the base policy, nats a response",
    "objective/kl_limit": "its limit, nats a response",
}
_HOW_TO_READ = (
    "Base policy: the model that PPO starts from. Proxy: the score of the reward model, which PPO raises. Gold: a "
    "judge that PPO never sees; it is only logged. When the proxy goes on rising while gold stands still or falls, the "
    "policy over-optimises the reward model: it has learned what the reward model gets wrong.",
    "Best of n: the reward model's choice among n responses of the base policy. It costs log n - (n - 1)/n nats of KL "
    "(exactly so if no two responses score alike, at most that otherwise) and no training: a yardstick for what the "
    "reward model is worth. KL: how far the policy has moved from the base policy, in nats a response.",
)


@dataclass(frozen=True)
class Picture:
    """A PNG: its path from the workdir, and its bytes."""

    path: str
    png: bytes
    alt: str
    caption: str

    @property
    def base64(self) -> str:
        """The bytes as text."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Table:
    """Texts in rows; a column with the header `key` holds names."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """A part of the report, shown in this order.

    Args:
        title: its heading.
        paragraphs: texts.
        tables: see `Table`.
        pictures: see `Picture`.
        samples: title -> rows as `side_by_side` makes them.
        folded: title -> text that is shown on demand.
    """

    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)


def all_sections(road: Findings) -> list[Section]:
    """In the order of the page."""
    parts = (_summary, _reward_model, _proxy_and_gold, _frontier, _samples, _curves, _settings)
    return [part(road) for part in parts]


def lead(road: Findings) -> str:
    """What was walked, and who judged."""
    walked = ", ".join(words for stage, words in STAGES.items() if stage in road.stages)
    if math.isfinite(road.ceiling):
        judge = (
            "The comparisons were made by a simulated annotator: a program with a hidden preference and Bradley-Terry "
            "noise. No person judged anything here."
        )
    else:
        judge = "The comparisons were made by people, or come from a file."
    return f"Stages: {walked}. {judge}"


def _summary(road: Findings) -> Section:
    rows = [(_WORDS.get(key, key), show(value), key) for key, value in road.summary.items()]
    return Section("Summary", [*_HOW_TO_READ], [Table(("what", "value", "key"), rows)])


def _reward_model(road: Findings) -> Section:
    results, section = road.reward_model, Section("Reward model")
    section.pictures = _draw(
        road,
        "reward_model.png",
        "held-out accuracy with its 95% interval, reliability diagram, accuracy by difference of the scores",
        "Left: accuracy with its 95% interval. Middle: of the comparisons decided with so much confidence, how many "
        "are right; a calibrated model lies on the diagonal, and ECE is the mean distance from it. Right: the larger "
        "the difference of the two scores, the surer the choice should be.",
        lambda path: plot_reward_model(results, path, ceiling=road.ceiling),
    )
    if not section.pictures:
        section.paragraphs.append("No held-out comparison was decided by a reward model.")
    if math.isfinite(rmse := number(results.get("heldout/rmse"))):
        section.paragraphs.append(f"Held-out root mean square error: {rmse:.3f}, in units of the ratings.")
    length = results.get("length_correlation")
    named = length if isinstance(length, Mapping) else {"": length}
    if known := [f"{value:+.2f} {name}".strip() for name, x in named.items() if math.isfinite(value := number(x))]:
        section.paragraphs.append(
            f"Correlation of score and length: {', '.join(known)}. Far from 0, the reward model pays for length too."
        )
    moments = results.get("normalization")
    if isinstance(moments, Mapping):
        known = {when: x for when in ("before", "after") if isinstance(x := moments.get(when), Mapping)}
        rows = [(f"{when} training", _fixed(x.get("mean")), _fixed(x.get("std"))) for when, x in known.items()]
        section.tables.append(Table(("scores of the reference's samples", "mean", "standard deviation"), rows))
        section.paragraphs.append("Both times these were then set to 0 and 1, by the head's gain and bias.")
    return section


def _proxy_and_gold(road: Findings) -> Section:
    section = Section("Proxy against gold")
    section.pictures = _draw(
        road,
        "proxy_and_gold.png",
        "proxy score and gold score over the iterations of PPO",
        "Mean score of each iteration's responses. On the common scale, 0% is the base policy and 100% its best of n, "
        "for each judge: a gap that opens between the two lines is over-optimisation.",
        lambda path: plot_proxy_and_gold(road.ppo, road.best_of_n, path),
    )
    if not section.pictures:
        section.paragraphs.append("PPO has logged no scores.")
    elif not np.isfinite(column(road.ppo, "objective/gold")).any():
        section.paragraphs.append("There is no gold score: PPO was given no judge besides the reward model.")
    return section


def _frontier(road: Findings) -> Section:
    section = Section("Score against KL")
    evaluated = {"kl": road.value("objective/kl"), "proxy": road.value("proxy/ppo"), "gold": road.value("gold/ppo")}

    def plot(path: Path, sqrt: bool) -> None:
        plot_frontier(road.ppo, road.best_of_n, path, evaluated=evaluated, kl_limit=road.kl_limit, sqrt=sqrt)

    alt = "score against KL to the base policy: PPO iteration by iteration, best of n, PPO at the end"
    linear = "What each nat of KL has bought: PPO iteration by iteration, and the best of n."
    root = "The same over the square root of the KL, which spreads out the beginning."
    section.pictures = [
        *_draw(road, "frontier.png", alt, linear, lambda path: plot(path, sqrt=False)),
        *_draw(road, "frontier_sqrt.png", alt, root, lambda path: plot(path, sqrt=True)),
    ]
    if not section.pictures:
        section.paragraphs.append("No KL and score are known.")
    points = [(_best_of(row), row) for row in road.best_of_n] + [("PPO at the end", evaluated)]
    rows = [(who, *(_fixed(row.get(key)) for key in ("kl", "proxy", "gold"))) for who, row in points]
    section.tables.append(Table(("policy", "KL, nats a response", "proxy", "gold"), rows))
    return section


def _best_of(row: Mapping[str, Any]) -> str:
    return "base policy" if row.get("n") == 1 else f"best of {show(row.get('n'))}"


def _samples(road: Findings) -> Section:
    section = Section("Samples")
    for title, rows in choose_samples(road.responses, NUM_SAMPLES).items():
        if rows:
            section.samples[title] = [side_by_side(row) for row in rows]
    if not section.samples:
        section.paragraphs.append("The evaluation has left no responses.")
    return section


def _curves(road: Findings) -> Section:
    section = Section("Learning curves")
    for stage in (stage for stage in TRAINED if stage in road.stages):
        if png := road.curves[stage]:
            words = STAGES[stage]
            picture = Picture(f"{stage}/curves.png", png, f"learning curves: {words}", words[0].upper() + words[1:])
            section.pictures.append(picture)
        else:
            section.paragraphs.append(f"There are no curves of the stage {stage}/.")
    return section


def _settings(road: Findings) -> Section:
    known = {f"{stage}/config.json": config for stage, config in road.configs.items() if config}
    folded = {name: json.dumps(config, indent=2, ensure_ascii=False) for name, config in known.items()}
    return Section("Settings", [] if folded else ["No stage has left its settings."], folded=folded)


def _draw(road: Findings, name: str, alt: str, caption: str, plot: Callable[[Path], None]) -> list[Picture]:
    """A picture in `report/`; none where there is nothing to draw."""
    path = road.workdir / "report" / name
    try:
        plot(path)
    except NothingToDraw:
        path.unlink(missing_ok=True)  # of an earlier report
        return []
    return [Picture(f"report/{name}", path.read_bytes(), alt, caption)]


def show(value: Any) -> str:
    """A value in a table: numbers with four significant digits, a dash for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _fixed(value: Any) -> str:
    return show(None) if math.isnan(number(value)) else f"{number(value):.3f}"
