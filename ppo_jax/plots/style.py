"""What all pictures share: colours, axes, numbers that may be missing, files that appear whole."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ppo_jax.errors import InputError
from ppo_jax.metrics import atomic_write

BLUE, ORANGE, GREEN, PURPLE = COLORS = ("#2563a8", "#d1702a", "#3f8f5b", "#8a4fa0")
INK, GREY, PALE, FAINT = "#333333", "#707070", "#999999", "#e4e4e4"
LIMIT_COLOR = "#b03030"
SMALL = 7.5  # points, of ticks and labels inside a panel
_DOTS_UP_TO = 40  # values in a line
_SMOOTH_FROM = 100  # values in a line
_LARGEST = 1e100  # whose square is still a float
_TICK_STEPS = (1, 2, 2.5, 5, 10)


class NothingToDraw(InputError):
    """There is no value that a picture could show."""


def number(value: Any) -> float:
    """A number that an axis can hold, as float; NaN for everything else (null, text, infinity, beyond 1e100)."""
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return value if abs(value) <= _LARGEST else math.nan


def column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One field over the rows, [rows] float64; NaN where `number` has none."""
    return np.array([number(row.get(key)) for row in rows], np.float64)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the values in a window around each, [T]; the window is shorter at both ends."""
    ones = np.ones(min(window, len(values)))
    return np.convolve(values, ones, mode="same") / np.convolve(np.ones_like(values), ones, mode="same")


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure of so many inches, with a canvas of its own."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(width, height + (0.4 if title else 0)), dpi=130, layout=layout)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold", parse_math=False)
    return figure


def save(figure: Figure, out_png: str | Path) -> None:
    """Writes the picture, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor="white")
    atomic_write(out_png, picture.getvalue())


def style(axes: Axes, title: str, unit: str, below: str = "") -> None:
    """Title, labels, grid and ticks of a panel.

    Args:
        axes: the panel.
        title: what is shown.
        unit: label of the vertical axis.
        below: label of the horizontal axis.
    """
    axes.set_title(title, loc="left", fontsize=9, color=INK, parse_math=False)
    axes.set_ylabel(unit, fontsize=8, color=INK)
    if below:
        axes.set_xlabel(below, fontsize=8, color=INK)
    axes.tick_params(labelsize=SMALL, colors=INK, length=2)
    axes.grid(True, color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_TICK_STEPS))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(tick))


def style_steps(axes: Axes, steps: np.ndarray) -> None:
    """Whole numbers on the horizontal axis, and the same range in all panels, also where values are missing."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=_TICK_STEPS, integer=True, min_n_ticks=1))
    margin = 0.5 + 0.02 * (steps.max() - steps.min())
    axes.set_xlim(steps.min() - margin, steps.max() + margin)


def draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """A line over the finite values, with dots when they are few, and under their running mean when they are many."""
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if len(steps) > _SMOOTH_FROM:
        axes.plot(steps, values, color=color, linewidth=0.5, alpha=0.3)
        axes.plot(steps, running_mean(values, len(values) // 25), color=color, linewidth=1.5, label=label)
    elif len(steps):
        marker = "o" if len(steps) <= _DOTS_UP_TO else ""
        axes.plot(steps, values, color=color, linewidth=1.4, marker=marker, markersize=2.5, label=label)


def draw_level(axes: Axes, level: float, text: str, color: str, linestyle: str = "--", *, left: bool = False) -> None:
    """A horizontal line with a text at its right or left end."""
    axes.axhline(level, color=color, linewidth=1, linestyle=linestyle)
    across = axes.get_yaxis_transform()  # x as a fraction of the panel, y in data
    x, side = (0.01, "left") if left else (0.99, "right")
    note(axes, x, level, text, color, transform=across, ha=side, va="bottom")


def note(axes: Axes, x: float, y: float, text: str, color: str, **settings: Any) -> None:
    """A small text that stays readable on top of lines."""
    halo = [withStroke(linewidth=2, foreground="white")]
    axes.text(x, y, text, fontsize=SMALL, color=color, parse_math=False, path_effects=halo, zorder=3, **settings)


def room_above(axes: Axes, share: float) -> None:
    """Raises the upper end of the vertical axis, for text."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + share * (high - low))


def tick(value: float, _: object = None) -> str:
    """12,000 and 2.5e-5. Not matplotlib's common factor above the axis, which would lie on the title."""
    if 1e4 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    mantissa, e, exponent = f"{value:g}".partition("e")
    return mantissa + (f"e{int(exponent)}" if e else "")
