"""What PPO did to its score: proxy against gold over the iterations, and the score that each nat of KL has bought."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, PercentFormatter

from ppo_jax.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIMIT_COLOR,
    ORANGE,
    PURPLE,
    SMALL,
    NothingToDraw,
    column,
    draw_level,
    draw_line,
    new_figure,
    note,
    number,
    room_above,
    save,
    style,
    style_steps,
    tick,
)

Rows = Sequence[Mapping[str, Any]]

_JUDGES = {  # name -> (key in the metrics, colour, title)
    "proxy": ("objective/score", BLUE, "proxy: the reward model"),
    "gold": ("objective/gold", ORANGE, "gold: logged, never trained on"),
}
_PATH_COLORS = LinearSegmentedColormap.from_list("iterations", ["#b9d2ea", BLUE, "#0f2a47"])
_LARGE_DOTS_UP_TO = 100  # iterations
_ROUND = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)]


def plot_proxy_and_gold(metrics: Rows, best_of_n: Rows, out_png: str | Path) -> None:
    """Draws the proxy and the gold score over the iterations of PPO, each on its scale and both on a common one.

    The common scale is the way from the base policy to its best of n, separately for each judge,
    (score - base) / (best of n - base): 0 is the base policy, 1 as good as choosing the best of the largest n. Where
    the proxy rises and gold does not follow, the policy over-optimises its reward model.

    Args:
        metrics: rows with `iteration`, `objective/score` (proxy) and `objective/gold`; panels without data are left
            out.
        best_of_n: rows with `n`, `proxy` and `gold` (means); n = 1 is the base policy.
        out_png: the picture; its folder must exist.

    Raises:
        NothingToDraw: there is neither score.

    Source: Gao, Schulman, Hilton 2022 (arXiv:2210.10760), figure 1, over iterations instead of KL.
    """
    metrics = [row for row in metrics if math.isfinite(number(row.get("iteration")))]
    steps = column(metrics, "iteration")
    scores = {name: column(metrics, key) for name, (key, _, _) in _JUDGES.items()}
    scores = {name: values for name, values in scores.items() if np.isfinite(values).any()}
    if not scores:
        raise NothingToDraw(f"{len(metrics)} rows: nothing to draw, no row has objective/score or objective/gold")
    ways = _ways(best_of_n) if len(scores) == len(_JUDGES) else np.empty((0, 3))
    across = len(scores) + bool(len(ways))
    figure = new_figure(4.2 * across, 3.3)
    for i, (name, values) in enumerate(scores.items()):
        _, color, title = _JUDGES[name]
        axes = figure.add_subplot(1, across, i + 1)
        style(axes, title, "mean score", "iteration")
        style_steps(axes, steps)
        draw_line(axes, steps, values, color, name)
        _draw_levels(axes, _known(best_of_n, "n", name))
    if len(ways):
        axes = figure.add_subplot(1, across, across)
        style(axes, "both on a common scale", "way from the base policy to its best", "iteration")
        style_steps(axes, steps)
        _draw_common_scale(axes, steps, scores, ways)
    save(figure, out_png)


def plot_frontier(
    metrics: Rows,
    best_of_n: Rows,
    out_png: str | Path,
    *,
    evaluated: Mapping[str, Any] | None = None,
    kl_limit: float = 0.0,
    sqrt: bool = False,
) -> None:
    """Draws score against KL to the base policy, proxy and gold: PPO's path and the best of n as a yardstick.

    Args:
        metrics: rows with `iteration`, `objective/kl` (nats a response), `objective/score` (proxy), `objective/gold`;
            one dot a row.
        best_of_n: rows with `n`, `kl` (nats a response: log n - (n - 1) / n), `proxy` and `gold` (means).
        out_png: the picture; its folder must exist.
        evaluated: `kl`, `proxy` and `gold` of the policy at the end, on the evaluation's prompts.
        kl_limit: nats a response, drawn when the path comes near it; 0: none.
        sqrt: the horizontal axis goes with the square root of the KL (labelled in nats), as in the paper.

    Raises:
        NothingToDraw: no row has a KL and a score.

    Source: Stiennon et al. 2020 (arXiv:2009.01325), appendix G.3, the KL of best-of-n; Gao, Schulman, Hilton 2022
        (arXiv:2210.10760), figure 1, and its forms in d = sqrt(KL).
    """
    evaluated = evaluated or {}
    paths = {name: _known(metrics, "iteration", "objective/kl", key) for name, (key, _, _) in _JUDGES.items()}
    yardsticks = {name: _known(best_of_n, "n", "kl", name) for name in _JUDGES}
    names = [name for name in _JUDGES if len(paths[name]) or len(yardsticks[name])]
    if not names:
        raise NothingToDraw(f"{len(metrics)} rows: nothing to draw, no row has a KL and a score")
    figure = new_figure(5.4 * len(names), 3.8)
    panels, dots = [], None
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        style(axes, _JUDGES[name][2], "mean score", "KL to the base policy, nats a response" + ", √ scale" * sqrt)
        dots = _draw_path(axes, paths[name]) or dots
        _draw_best_of_n(axes, yardsticks[name])
        kl, score = number(evaluated.get("kl")), number(evaluated.get(name))
        if math.isfinite(kl + score):
            label = "PPO at the end, evaluated"
            axes.plot([kl], [score], marker="*", markersize=12, color=PURPLE, linestyle="", label=label, zorder=3)
        _scale(axes, sqrt, kl_limit)
        room_above(axes, 0.05)
        panels.append(axes)
    _legend_below(figure, panels)
    if dots is not None:
        bar = figure.colorbar(dots, ax=panels, shrink=0.8, pad=0.01, aspect=30)
        bar.set_label("iteration", fontsize=8, color=INK)
        bar.ax.tick_params(labelsize=SMALL, colors=INK, length=2)
        bar.outline.set_visible(False)
    save(figure, out_png)


def _legend_below(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels."""
    drawn = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(drawn.values()), list(drawn), loc="outside lower center", ncols=len(drawn),
        fontsize=8, frameon=False, labelcolor=INK,
    )  # fmt: skip


def _known(rows: Rows, *keys: str) -> np.ndarray:
    """The rows in which all of these are numbers, as an array [rows, keys] in the order of the first."""
    table = np.stack([column(rows, key) for key in keys], axis=1)
    table = table[np.isfinite(table).all(axis=1)]
    return table[np.argsort(table[:, 0], kind="stable")]


def _ways(best_of_n: Rows) -> np.ndarray:
    """The base policy and its best of the largest n, [2, (n, proxy, gold)]; empty unless both judges see it better."""
    table = _known(best_of_n, "n", *_JUDGES)
    upwards = len(table) > 1 and table[0, 0] == 1 and (table[-1] > table[0]).all()
    return table[[0, -1]] if upwards else table[:0]


def _draw_common_scale(axes: Axes, steps: np.ndarray, scores: Mapping[str, np.ndarray], ways: np.ndarray) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    base, best = ways
    for i, (name, values) in enumerate(scores.items(), start=1):
        draw_line(axes, steps, (values - base[i]) / (best[i] - base[i]), _JUDGES[name][1], name)
    _draw_levels(axes, np.array([(base[0], 0.0), (best[0], 1.0)]))
    room_above(axes, 0.15)
    axes.legend(fontsize=SMALL, frameon=False, labelcolor=INK, loc="upper left", ncols=2, borderaxespad=0.2)


def _draw_levels(axes: Axes, points: np.ndarray) -> None:
    """The scores of the smallest and the largest n, points being [., (n, score)], as levels."""
    for n, score in points[[0, -1][: len(points)]]:
        if n == 1:
            draw_level(axes, score, "base policy", GREY, ":")
        else:
            draw_level(axes, score, f"best of {n:g}", GREY, left=True)  # PPO comes to it on the right


def _draw_path(axes: Axes, points: np.ndarray) -> PathCollection | None:
    """PPO iteration by iteration, [., (iteration, KL, score)], darker as it goes on; the dots of several iterations."""
    if not len(points):
        return None
    iteration, kl, score = points.T
    axes.plot(kl, score, color=BLUE, linewidth=0.6, alpha=0.35)
    size = 14 if len(points) <= _LARGE_DOTS_UP_TO else 5
    dots = axes.scatter(kl, score, c=iteration, cmap=_PATH_COLORS, s=size, zorder=2.5, label="PPO, an iteration each")
    return dots if iteration.min() < iteration.max() else None


def _draw_best_of_n(axes: Axes, points: np.ndarray) -> None:
    """A line through [., (n, KL, score)], each with its n."""
    _, kl, score = points.T
    label = "best of n of the base policy" if len(points) else None
    axes.plot(kl, score, color=GREEN, linewidth=1.4, marker="s", markersize=4.5, label=label)
    place = {"xytext": (-5, 3), "textcoords": "offset points", "ha": "right"}
    for n, x, y in points.tolist():
        axes.annotate(f"{n:g}", (x, y), fontsize=SMALL, color=GREEN, **place)


def _scale(axes: Axes, sqrt: bool, kl_limit: float) -> None:
    """The horizontal axis; the KL limit where the data come near it."""
    low, high = axes.get_xlim()
    if 0 < kl_limit < 1.25 * high:
        axes.axvline(kl_limit, color=LIMIT_COLOR, linewidth=1, linestyle="--")
        top = axes.get_xaxis_transform()
        note(axes, kl_limit, 0.02, f"limit {tick(kl_limit)} ", LIMIT_COLOR, transform=top, ha="right", va="bottom")
        low, high = min(low, 0.0), max(high, 1.05 * kl_limit)  # also where all the data are beyond it
    if not sqrt:
        axes.set_xlim(low, high)
        return
    high = max(high, 1e-3)
    # An estimated KL may be a little below zero: the root goes on there, mirrored.
    least = _signed_root(min(axes.dataLim.x0, 0.0)) - 0.03 * math.sqrt(high)
    axes.set_xscale("function", functions=(_signed_root, _signed_square))
    axes.set_xlim(_signed_square(least), high)
    axes.xaxis.set_major_locator(FixedLocator(_root_ticks(high, 0.08 * (math.sqrt(high) - least))))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))  # the scale has set its own


def _root_ticks(high: float, gap: float) -> list[float]:
    """Round numbers from 0 to `high` whose roots are at least `gap` apart."""
    ticks = [0.0]
    for value in _ROUND:
        if value <= high and math.sqrt(value) - math.sqrt(ticks[-1]) >= gap:
            ticks.append(value)
    return ticks


def _signed_root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: Any) -> Any:
    return np.sign(x) * np.square(x)
