"""Curves of a run as one picture of small panels (floor 4)."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ppo_jax.metrics import atomic_write, read_jsonl

_COLORS = ("#2563a8", "#d1702a", "#3f8f5b", "#8a4fa0")
_INK, _FAINT = "#333333", "#e4e4e4"
_LIMIT_COLOR = "#b03030"
_DOTS_UP_TO = 40  # values in a line
_SMOOTH_FROM = 100  # values in a line
_TICK_STEPS = (1, 2, 2.5, 5, 10)
_LOG_FLOOR = 1e-9  # stands for zero on a logarithmic axis


@dataclass(frozen=True)
class Panel:
    """One panel.

    Args:
        title: what is shown.
        lines: (key of the metrics, label) of each line; labels are shown when there are two or more.
        unit: label of the vertical axis.
        band: key of a spread, drawn as first line +- spread.
        log: a logarithmic vertical axis, on which values below 1e-9 (zero, say) are drawn at 1e-9.
        limit: a value not to be passed, drawn as a dashed line; above zero on a logarithmic axis.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    unit: str
    band: str | None = None
    log: bool = False
    limit: float | None = None


PPO_PANELS = (
    Panel("score (mean ± standard deviation)", (("objective/score", "score"),), "score", band="objective/score_std"),
    Panel("KL to the reference", (("objective/kl", "KL"),), "nats per sequence"),
    Panel("entropy of the policy", (("objective/entropy", "entropy"),), "nats per token"),
    Panel("response length", (("objective/length", "length"),), "tokens"),
    Panel("policy loss", (("policy/loss", "loss"),), "loss"),
    Panel("KL of the update, old to new policy", (("policy/approx_kl", "KL"),), "nats per token"),
    Panel(
        "clipped tokens",
        (("policy/clip_frac", "policy"), ("value/clip_frac", "value")),
        "fraction of tokens",
    ),
    Panel(
        "|ratio - 1| before the first update",
        (("policy/first_ratio_dev", "largest"),),
        "largest over tokens (1e-9: zero)",
        log=True,
        limit=1e-4,
    ),
    Panel("value loss", (("value/loss", "loss"),), "loss"),
    Panel("variance that the values explain", (("value/explained_var", "explained"),), "fraction"),
    Panel("gradient norm", (("optim/grad_norm", "norm"),), "norm"),
    Panel("speed", (("time/tokens_per_s", "tokens"),), "tokens per second"),
)


def plot_curves(
    metrics: str | Path | Sequence[Mapping[str, Any]],
    out_png: str | Path,
    panels: Sequence[Panel] = PPO_PANELS,
    *,
    title: str = "",
    step_key: str = "iteration",
) -> None:
    """Draws the metrics of a run against its iterations; panels without any data are left out.

    The file appears whole or not at all. Lines go on over missing and null values (a
    metric may come every tenth iteration). Over more than 100 values their running mean is drawn, except on logarithmic
    axes. matplotlib's global state is not touched.

    Args:
        metrics: path of a metrics.jsonl, or its rows.
        out_png: the picture; its folder must exist.
        panels: what to draw, row by row.
        title: written above all.
        step_key: key of the horizontal axis.

    Raises:
        ValueError: no panel has data.
    """
    rows = read_jsonl(metrics) if isinstance(metrics, str | Path) else metrics
    rows = [row for row in rows if row.get(step_key) is not None]
    steps = _column(rows, step_key)
    shown = [panel for panel in panels if any(np.isfinite(_column(rows, key)).any() for key, _ in panel.lines)]
    if not shown:
        source = metrics if isinstance(metrics, str | Path) else f"{len(rows)} rows"
        raise ValueError(f"{source}: nothing to draw, no row has {step_key!r} and a key of a panel")

    across = min(len(shown), 4 if len(shown) > 6 else 3)
    down = math.ceil(len(shown) / across)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(3.6 * across, 2.5 * down + (0.4 if title else 0)), dpi=130, layout=layout)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK, fontweight="bold", parse_math=False)
    for i, panel in enumerate(shown):
        axes = figure.add_subplot(down, across, i + 1)
        _draw(axes, panel, rows, steps)
        if i + across >= len(shown):  # the lowest of its column
            axes.set_xlabel(step_key, fontsize=8, color=_INK)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor="white")
    atomic_write(out_png, picture.getvalue())


def _draw(axes: Axes, panel: Panel, rows: Sequence[Mapping[str, Any]], steps: np.ndarray) -> None:
    _style(axes, panel)
    for (key, label), color in zip(panel.lines, itertools.cycle(_COLORS), strict=False):
        values = _column(rows, key)
        known = np.isfinite(values)
        if panel.log:  # dots alone: between zero and the rest a line says nothing
            values = np.maximum(values, _LOG_FLOOR)
            axes.plot(steps[known], values[known], color=color, linestyle="", marker="o", markersize=2.5, label=label)
        elif known.any():
            _draw_line(axes, steps[known], values[known], color, label)
    if panel.band is not None:
        center, spread = _column(rows, panel.lines[0][0]), _column(rows, panel.band)
        axes.fill_between(steps, center - spread, center + spread, color=_COLORS[0], alpha=0.15, linewidth=0)
    margin = 0.5 + 0.02 * (steps.max() - steps.min())  # the same range in all panels, also where values are missing
    axes.set_xlim(steps.min() - margin, steps.max() + margin)
    if len(panel.lines) > 1:
        if not panel.log:
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.2 * (high - low))  # room for the labels above the lines
        columns = len(panel.lines)
        axes.legend(fontsize=7.5, frameon=False, labelcolor=_INK, loc="upper left", ncols=columns, borderaxespad=0.2)
    if panel.limit is not None:
        _draw_limit(axes, panel.limit, panel.log)


def _draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    if len(steps) > _SMOOTH_FROM:
        axes.plot(steps, values, color=color, linewidth=0.5, alpha=0.3)
        axes.plot(steps, _running_mean(values, len(values) // 25), color=color, linewidth=1.5, label=label)
    else:
        marker = "o" if len(steps) <= _DOTS_UP_TO else ""
        axes.plot(steps, values, color=color, linewidth=1.4, marker=marker, markersize=2.5, label=label)


def _draw_limit(axes: Axes, limit: float, log: bool) -> None:
    low, high = axes.get_ylim()
    room = limit * 10 if log else limit + 0.12 * (high - low)  # for the text above the line
    axes.set_ylim(low, max(high, room))
    axes.axhline(limit, color=_LIMIT_COLOR, linewidth=1, linestyle="--")
    right = axes.get_yaxis_transform()  # x as a fraction of the panel, y in data
    text = f"limit {_tick(limit)}"
    axes.text(0.99, limit, text, transform=right, ha="right", va="bottom", fontsize=7.5, color=_LIMIT_COLOR)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the values in a window around each; the window is shorter at both ends."""
    ones = np.ones(window)
    return np.convolve(values, ones, mode="same") / np.convolve(np.ones_like(values), ones, mode="same")


def _style(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=9, color=_INK, parse_math=False)
    axes.set_ylabel(panel.unit, fontsize=8, color=_INK)
    axes.tick_params(labelsize=7.5, colors=_INK, length=2)
    axes.grid(True, color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=_TICK_STEPS, integer=True, min_n_ticks=1))
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_TICK_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))


def _tick(value: float, _: object = None) -> str:
    """12,000 and 2.5e-5. Not matplotlib's common factor above the axis, which would lie on the title."""
    if 1e4 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    mantissa, e, exponent = f"{value:g}".partition("e")
    return mantissa + (f"e{int(exponent)}" if e else "")


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One metric over the rows, [rows] float64; NaN where it is missing or null."""
    values = [row.get(key) for row in rows]
    return np.array([math.nan if value is None else float(value) for value in values], np.float64)
