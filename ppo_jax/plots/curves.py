"""Curves of a run as one picture of small panels."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from ppo_jax.metrics import read_jsonl
from ppo_jax.plots.style import (
    COLORS,
    INK,
    LIMIT_COLOR,
    SMALL,
    NothingToDraw,
    column,
    draw_level,
    draw_line,
    new_figure,
    number,
    room_above,
    save,
    style,
    style_steps,
    tick,
)

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
        NothingToDraw: no panel has data.
    """
    rows = read_jsonl(metrics) if isinstance(metrics, str | Path) else metrics
    rows = [row for row in rows if math.isfinite(number(row.get(step_key)))]
    steps = column(rows, step_key)
    shown = [panel for panel in panels if any(np.isfinite(column(rows, key)).any() for key, _ in panel.lines)]
    if not shown:
        source = metrics if isinstance(metrics, str | Path) else f"{len(rows)} rows"
        raise NothingToDraw(f"{source}: nothing to draw, no row has {step_key!r} and a key of a panel")

    across = min(len(shown), 4 if len(shown) > 6 else 3)
    down = math.ceil(len(shown) / across)
    figure = new_figure(3.6 * across, 2.5 * down, title)
    for i, panel in enumerate(shown):
        lowest = i + across >= len(shown)  # of its column
        axes = figure.add_subplot(down, across, i + 1)
        style(axes, panel.title, panel.unit, step_key if lowest else "")
        style_steps(axes, steps)
        _draw(axes, panel, rows, steps)
    save(figure, out_png)


def _draw(axes: Axes, panel: Panel, rows: Sequence[Mapping[str, Any]], steps: np.ndarray) -> None:
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    for (key, label), color in zip(panel.lines, itertools.cycle(COLORS), strict=False):
        values = column(rows, key)
        if panel.log:  # dots alone: between zero and the rest a line says nothing
            values = np.maximum(values, _LOG_FLOOR)
            axes.plot(steps, values, color=color, linestyle="", marker="o", markersize=2.5, label=label)
        else:
            draw_line(axes, steps, values, color, label)
    if panel.band is not None:
        center, spread = column(rows, panel.lines[0][0]), column(rows, panel.band)
        axes.fill_between(steps, center - spread, center + spread, color=COLORS[0], alpha=0.15, linewidth=0)
    if len(panel.lines) > 1:
        if not panel.log:
            room_above(axes, 0.2)  # for the labels above the lines
        columns = len(panel.lines)
        axes.legend(fontsize=SMALL, frameon=False, labelcolor=INK, loc="upper left", ncols=columns, borderaxespad=0.2)
    if panel.limit is not None:
        _draw_limit(axes, panel.limit, panel.log)


def _draw_limit(axes: Axes, limit: float, log: bool) -> None:
    low, high = axes.get_ylim()
    room = limit * 10 if log else limit + 0.12 * (high - low)  # for the text above the line
    axes.set_ylim(low, max(high, room))
    draw_level(axes, limit, f"limit {tick(limit)}", LIMIT_COLOR)
