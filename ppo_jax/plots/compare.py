"""Learning curves of several methods in one picture."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppo_jax.plots.style import (
    COLORS,
    GREY,
    INK,
    PALE,
    SMALL,
    NothingToDraw,
    draw_level,
    new_figure,
    number,
    save,
    style,
    style_steps,
)

_STYLES = ("-", "-.", ":")  # of the first, second and third round of colours


@dataclass(frozen=True)
class Course:
    """One line of the picture.

    Args:
        name: in the legend.
        steps: [T], where the values stand on the horizontal axis.
        values: [T].
        spread: [T], of a band values +- spread; None, or NaN: no band.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    spread: Sequence[float] | None = None


def plot_comparison(
    courses: Sequence[Course],
    out_png: str | Path,
    *,
    unit: str,
    below: str = "episodes",
    references: Sequence[Course] = (),
    levels: Mapping[str, float] | None = None,
    title: str = "",
) -> None:
    """Draws the courses of what was compared, and of others as dashed lines and levels.

    Values that are no numbers are left out; so is a course without any.

    Args:
        courses: full lines, each in a colour of its own, with their bands.
        out_png: the picture; its folder must exist.
        unit: label of the vertical axis.
        below: label of the horizontal axis.
        references: dashed lines in grey.
        levels: end values by name, dashed and horizontal.
        title: written above all.

    Raises:
        NothingToDraw: there is no course with a value.
    """
    ours, others = _drawable(courses), _drawable(references)
    if not ours:
        raise NothingToDraw(f"comparison: nothing to draw, none of {len(courses)} courses has a value")
    figure = new_figure(7.6, 4.4, title)
    axes = figure.add_subplot(1, 1, 1)
    style(axes, "", unit, below)
    style_steps(axes, np.concatenate([steps for _, steps, _, _ in ours + others]))
    for (name, steps, values, _), color in zip(others, itertools.cycle((GREY, PALE)), strict=False):
        axes.plot(steps, values, color=color, linewidth=1.2, linestyle="--", label=name)
    looks = itertools.cycle(itertools.product(_STYLES, COLORS))
    for (name, steps, values, spread), (line, color) in zip(ours, looks, strict=False):
        axes.plot(steps, values, color=color, linewidth=1.5, linestyle=line, label=name)
        axes.fill_between(steps, values - spread, values + spread, color=color, alpha=0.18, linewidth=0)
    for name, level in (levels or {}).items():
        if np.isfinite(number(level)):
            draw_level(axes, number(level), name, GREY, left=True)  # where courses are low yet
    axes.legend(fontsize=SMALL, frameon=False, labelcolor=INK, loc="best")
    save(figure, out_png)


def _drawable(courses: Sequence[Course]) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Name, steps, values and spread of the courses that have a value, where they have one; NaN is no spread."""
    drawable = []
    for course in courses:
        spread = itertools.repeat(None) if course.spread is None else course.spread
        rows = [tuple(map(number, row)) for row in zip(course.steps, course.values, spread, strict=False)]
        table = np.array(rows, np.float64).reshape(-1, 3)
        table = table[np.isfinite(table[:, :2]).all(axis=1)]
        if len(table):
            drawable.append((course.name, *table.T))
    return drawable
