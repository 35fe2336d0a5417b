"""How good a reward model is on held-out comparisons: accuracy, calibration, accuracy by margin."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from ppo_jax.evaluation import wilson_interval
from ppo_jax.plots.style import (
    BLUE,
    GREEN,
    GREY,
    PALE,
    SMALL,
    NothingToDraw,
    column,
    draw_level,
    new_figure,
    note,
    number,
    save,
    style,
    tick,
)

_CHANCE = 0.5
_MOST_MARGIN_LABELS = 6  # that fit below a panel side by side


def plot_reliability(rows: Sequence[Mapping[str, Any]], ece: float, out_png: str | Path) -> None:
    """Draws a reliability diagram: accuracy against confidence, and below it how many comparisons are how confident.

    A calibrated model lies on the diagonal. The bars are Wilson's 95 % intervals of the accuracy.

    Args:
        rows: `confidence` (mean of the bin, a probability), `accuracy` and `count` of each bin; empty bins are left
            out.
        ece: expected calibration error, mean of |accuracy - confidence| weighted by count; named in the title.
        out_png: the picture; its folder must exist.

    Raises:
        NothingToDraw: every bin is empty.
    """
    bins = _known_bins(rows)
    if not bins:
        raise NothingToDraw(f"reliability: got {len(rows)} bins, expected one with a confidence, accuracy and count")
    figure = new_figure(4.2, 4.4)
    _draw_reliability(figure, figure.add_gridspec(1, 1)[0], bins, number(ece))
    save(figure, out_png)


def plot_reward_model(results: Mapping[str, Any], out_png: str | Path, *, ceiling: float | None = None) -> None:
    """Draws accuracy with its interval, the reliability diagram, and accuracy by margin, side by side.

    Args:
        results: `accuracy`, `accuracy_low`, `accuracy_high` (95 %), `reliability` and `ece` (see `plot_reliability`),
            and `accuracy_by_margin`: `low`, `high` (ends of |difference of the scores|), `accuracy`, `count`
            of each group. What is missing is left out.
        out_png: the picture; its folder must exist.
        ceiling: accuracy that a judge who knows the simulated annotator's mind would have; None: it is not known.

    Raises:
        NothingToDraw: there is none of the three.
    """
    margins, bins = _known(results.get("accuracy_by_margin")), _known_bins(results.get("reliability"))
    has_accuracy = math.isfinite(number(results.get("accuracy")))
    widths = [2.4] * has_accuracy + [3.6] * bool(bins) + [4.2] * bool(margins)
    if not widths:
        raise NothingToDraw("reward model: nothing to draw, expected accuracy, reliability or accuracy_by_margin")
    figure = new_figure(sum(widths), 3.6)
    cells = iter(figure.add_gridspec(1, len(widths), width_ratios=widths))
    if has_accuracy:
        _draw_accuracy(figure.add_subplot(next(cells)), results, number(ceiling))
    if bins:
        _draw_reliability(figure, next(cells), bins, number(results.get("ece")))
    if margins:
        _draw_margins(figure.add_subplot(next(cells)), margins)
    save(figure, out_png)


def _known(rows: Any) -> list[dict[str, float]]:
    """The rows with an accuracy in [0, 1] that something was counted for; every field as a number, or NaN."""
    rows = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list | tuple) else []
    rows = [{key: number(row.get(key)) for key in ("accuracy", "count", "confidence", "low", "high")} for row in rows]
    return [row for row in rows if 0 <= row["accuracy"] <= 1 and row["count"] > 0]


def _known_bins(rows: Any) -> list[dict[str, float]]:
    return [row for row in _known(rows) if 0 <= row["confidence"] <= 1]


def _draw_accuracy(axes: Axes, results: Mapping[str, Any], ceiling: float) -> None:
    accuracy, low, high = (number(results.get(key)) for key in ("accuracy", "accuracy_low", "accuracy_high"))
    style(axes, "held-out accuracy", "fraction of comparisons")
    if math.isfinite(low + high):
        axes.plot([0, 0], [low, high], color=BLUE, linewidth=6, alpha=0.3, solid_capstyle="butt")
        note(axes, 0.08, low, "95 % interval", BLUE, va="bottom")
    axes.plot([0], [accuracy], marker="o", color=BLUE, markersize=7)
    axes.text(-0.08, accuracy, f"{accuracy:.1%}", ha="right", va="center", fontsize=9, color=BLUE, fontweight="bold")
    if math.isfinite(ceiling):
        draw_level(axes, ceiling, f"simulated annotator's ceiling {ceiling:.1%}", GREEN)
    draw_level(axes, _CHANCE, "chance", GREY, ":")
    known = [value for value in (accuracy, low, high, ceiling, _CHANCE) if math.isfinite(value)]
    room = 0.08 * (max(known) - min(known) or 1)
    axes.set_ylim(min(known) - room, max(known) + 1.5 * room)
    axes.set_xlim(-0.5, 0.5)
    axes.set_xticks([])


def _draw_reliability(figure: Figure, cell: SubplotSpec, rows: Sequence[dict[str, float]], ece: float) -> None:
    """Two panels in a cell of the figure's grid, one above the other."""
    confidence, accuracy, count = (column(rows, key) for key in ("confidence", "accuracy", "count"))
    grid = cell.subgridspec(2, 1, height_ratios=(5, 1))
    axes = figure.add_subplot(grid[0])
    style(axes, f"reliability, ECE {ece:.3f}" if math.isfinite(ece) else "reliability", "accuracy")
    least = _CHANCE if confidence.min() >= _CHANCE else 0.0  # of a pair, the side preferred has at least 0.5
    axes.plot([least, 1], [least, 1], color=PALE, linewidth=1, linestyle="--", label="calibrated")
    _draw_fractions(axes, confidence, accuracy, count)
    axes.plot(confidence, accuracy, color=BLUE, linewidth=1.4)
    axes.legend(fontsize=SMALL, frameon=False, labelcolor=GREY, loc="lower right")
    room = 0.03 * (1 - least)
    axes.set_xlim(least - room, 1 + room)
    axes.tick_params(labelbottom=False)

    below = figure.add_subplot(grid[1], sharex=axes)
    style(below, "", "count", "confidence: probability given to the preferred side")
    below.vlines(confidence, 0, count, color=BLUE, linewidth=5, alpha=0.5)
    below.set_ylim(bottom=0)


def _draw_margins(axes: Axes, rows: Sequence[dict[str, float]]) -> None:
    accuracy, count = column(rows, "accuracy"), column(rows, "count")
    places = np.arange(len(rows))
    style(axes, "accuracy by margin", "fraction of comparisons", "|difference of the two scores|, and how many pairs")
    _draw_fractions(axes, places, accuracy, count)
    draw_level(axes, _CHANCE, "chance", GREY, ":")
    shown = places[:: math.ceil(len(places) / _MOST_MARGIN_LABELS)]
    axes.set_xticks(shown, [_margin_label(rows[i]) for i in shown])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, _CHANCE - 0.05), high)
    axes.grid(False, axis="x")


def _margin_label(row: dict[str, float]) -> str:
    ends = [f"{end:.2g}" for end in (row["low"], row["high"]) if math.isfinite(end)]
    return "–".join(dict.fromkeys(ends)) + f"\nn={tick(row['count'])}"


def _draw_fractions(axes: Axes, where: np.ndarray, fraction: np.ndarray, count: np.ndarray) -> None:
    """Fractions as dots with their 95 % intervals."""
    low, high = np.transpose([wilson_interval(p * n, n) for p, n in zip(fraction, count, strict=True)])
    axes.vlines(where, low, high, color=BLUE, linewidth=1.2, alpha=0.6)
    axes.plot(where, fraction, color=BLUE, linestyle="", marker="o", markersize=5)
