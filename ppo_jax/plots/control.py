"""Pictures of control tasks: returns of agents, choices of a policy, maps of a value, and a pole that is balanced."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageColor, ImageDraw, ImageFont
from scipy.special import stdtrit

from ppo_jax.errors import check
from ppo_jax.metrics import atomic_write
from ppo_jax.plots.style import (
    BLUE,
    COLORS,
    GREY,
    INK,
    LIMIT_COLOR,
    ORANGE,
    PALE,
    SMALL,
    NothingToDraw,
    column,
    draw_level,
    new_figure,
    number,
    save,
    style,
    style_steps,
    tick,
)

_LOOKS = list(itertools.product(("-", "-.", ":"), COLORS))  # of lines, one after the other
_SINGLE_SEEDS_UP_TO = 12  # lines that can be told apart
_DOTS_UP_TO = 40  # values in a line
_TWO_SIDED = 0.975  # the quantile whose mirror image leaves 95 % between

_TWO_ACTIONS = LinearSegmentedColormap.from_list("two actions", [BLUE, "#d9d9d9", ORANGE])
_HEIGHTS = LinearSegmentedColormap.from_list("heights", ["#f1f5fa", "#8fb4da", BLUE, "#0f2a47"])
_MOST_ACROSS = 3  # panels in a row

# The cart-pole, in metres.
_TRACK = 2.4  # from the middle to the limit, where an episode ends
_POLE = 2 * 0.5  # the task's length is that of half a pole
_CART = (0.5, 0.26)  # width and height
_VIEW = (5.8, 1.95)  # width and height of the picture
_GROUND = 0.42  # from the lower edge up to the track
_SCALE = 64  # pixels a metre
_FINER = 3  # drawn so many times as large: the average over a pixel smooths the edges
_FRAME_S = 0.04  # 25 frames a second; much more is slowed down by browsers
_SHADES = 8  # in the palette, between two colours


@dataclass(frozen=True)
class Learning:
    """How an agent learned, one line of the picture.

    Args:
        name: in the legend.
        env_steps: [T], steps of the environment (of one seed) before each evaluation.
        returns: [seeds, T], mean return of an evaluation; NaN or None where there is none.
    """

    name: str
    env_steps: Sequence[float] | np.ndarray
    returns: Sequence[Sequence[float]] | np.ndarray

    @classmethod
    def of_run(cls, rows: Sequence[Mapping[str, Any]], name: str = "") -> "Learning":
        """A single run from its metrics: `env_steps` and `eval/return_mean` of the rows."""
        return cls(name, column(rows, "env_steps"), column(rows, "eval/return_mean")[None])


def plot_learning(
    curves: Sequence[Learning], out_png: str | Path, *, title: str = "", solved_at: float | None = None
) -> None:
    """Draws returns against steps of the environment: the mean over seeds and how well it is known.

    The band is mean ± t s / √n with s the standard deviation over the n seeds and t the 97.5 % quantile of
    Student's distribution of n - 1 degrees of freedom: a 95 % interval of the mean. A single seed has none. Up to 12
    seeds are also drawn one by one. Values that are no numbers are left out, and so is an agent without any.

    Args:
        curves: the agents, each in a look of its own, named in a legend when there are several.
        out_png: the picture; its folder must exist.
        title: written above all.
        solved_at: return from which the task counts as solved, a dashed level.

    Raises:
        InputError: shapes that do not fit together, or a level that is no number.
        NothingToDraw: no agent has a value.

    Source: Student 1908, "The Probable Error of a Mean".
    """
    check("solved_at", solved_at, solved_at is None or math.isfinite(number(solved_at)), "a number")
    drawable = [(curve.name, *_known(curve)) for curve in curves]
    drawable = [(name, steps, returns) for name, steps, returns in drawable if len(steps)]
    if not drawable:
        raise NothingToDraw(f"learning: nothing to draw, none of {len(curves)} agents has a return")
    figure = new_figure(7.2, 4.0, title)
    axes = figure.add_subplot(1, 1, 1)
    several = any(len(returns) > 1 for _, _, returns in drawable)
    style(axes, "mean over seeds and its 95 % interval" if several else "", "return", "steps of the environment")
    style_steps(axes, np.concatenate([steps for _, steps, _ in drawable]))
    for (name, steps, returns), (line, color) in zip(drawable, itertools.cycle(_LOOKS), strict=False):
        _draw_learning(axes, steps, returns, name, line, color)
    if solved_at is not None:
        draw_level(axes, solved_at, f"solved at {tick(solved_at)}", GREY, left=True)  # where returns are low yet
    if len(drawable) > 1:
        axes.legend(fontsize=SMALL, frameon=False, labelcolor=INK, loc="lower right")  # where returns are high already
    save(figure, out_png)


def plot_choices(panels: Sequence[tuple[str, np.ndarray, np.ndarray]], out_png: str | Path, *, title: str = "") -> None:
    """Draws which of two actions a policy takes at points of a plane, a panel for each moment of its training.

    Args:
        panels: (label, states [N, 2], probabilities [N] of action 1) of each moment; a point with a value that is
            no number is left out, and so is a panel without any.
        out_png: the picture; its folder must exist.
        title: written above all.

    Raises:
        InputError: shapes that do not fit together, or a probability outside [0, 1].
        NothingToDraw: no panel has a point.
    """
    shown = [(label, _known_points(label, states, chances)) for label, states, chances in panels]
    shown = [(label, points) for label, points in shown if len(points)]
    if not shown:
        raise NothingToDraw(f"choices: nothing to draw, none of {len(panels)} panels has a point")
    figure, cells = _panels(len(shown), 3.0, 3.1, title)
    scale = Normalize(0, 1)
    reach = 1.04 * max(1.0, *(float(np.abs(points[:, :2]).max()) for _, points in shown))
    for i, (axes, (label, points)) in enumerate(zip(cells, shown, strict=True)):
        first_of_row = i % _MOST_ACROSS == 0
        style(axes, label, "second number of the state" if first_of_row else "", "first number of the state")
        axes.grid(False)
        axes.axhline(0, color=PALE, linewidth=0.8)
        axes.axvline(0, color=PALE, linewidth=0.8)
        x, y, chance = points.T
        size = float(np.clip(6000 / len(points), 3, 24))
        axes.scatter(x, y, c=chance, cmap=_TWO_ACTIONS, norm=scale, s=size, linewidths=0, zorder=2)
        axes.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    _color_bar(figure, ScalarMappable(scale, _TWO_ACTIONS), cells, "probability of action 1")
    save(figure, out_png)


def plot_maps(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    maps: Sequence[tuple[str, np.ndarray, tuple[float, float] | None]],
    out_png: str | Path,
    *,
    labels: tuple[str, str],
    title: str = "",
) -> None:
    """Draws maps over two numbers of an observation, of the value or the policy, each with its colour bar.

    Args:
        x: [X], rising, the places of the columns.
        y: [Y], rising, the places of the rows.
        maps: (name, grid [Y, X], limits) of each. Limits are the two ends of a scale whose middle matters, as 0 and 1
            of a probability, in two colours; without limits (None) the map has one colour over the range of its
            values. A value that is no number leaves a hole; a map without any is left out.
        out_png: the picture; its folder must exist.
        labels: of x and of y.
        title: written above all.

    Raises:
        InputError: shapes that do not fit together, places that do not rise, limits that are no range.
        NothingToDraw: no map has a value.
    """
    x, y = _places("x", x), _places("y", y)
    shown = []
    for name, grid, limits in maps:
        grid = _numbers(grid)
        shape = (len(y), len(x))
        check(f"map {name!r}: shape", grid.shape, grid.shape == shape, f"[y, x] = {shape}")
        if limits is not None:
            rise = len(limits) == 2 and number(limits[0]) < number(limits[1])
            check(f"map {name!r}: limits", limits, rise, "two numbers, the lower one first")
        if np.isfinite(grid).any():
            shown.append((name, grid, limits))
    if not shown:
        raise NothingToDraw(f"maps: nothing to draw, none of {len(maps)} maps has a value")
    figure, cells = _panels(len(shown), 3.7, 3.0, title)
    for axes, (name, grid, limits) in zip(cells, shown, strict=True):
        style(axes, name, labels[1], labels[0])
        axes.grid(False)
        colors, (low, high) = (_HEIGHTS, (None, None)) if limits is None else (_TWO_ACTIONS, limits)
        known = np.ma.masked_invalid(grid)
        mesh = axes.pcolormesh(x, y, known, cmap=colors, vmin=low, vmax=high, shading="nearest")
        _color_bar(figure, mesh, [axes], "")
    save(figure, out_png)


def animate_pole(
    states: Sequence[Sequence[float]] | np.ndarray,
    out_gif: str | Path,
    *,
    seconds_per_step: float = 0.02,
    max_frames: int = 250,
) -> None:
    """Writes a GIF of a cart that balances a pole, about 25 frames a second in real time, in an endless loop.

    At the usual 0.02 s every second state is a frame of 40 ms. The file appears whole or not at all.

    Args:
        states: [T, 4]: place of the cart (m), its speed, angle of the pole (rad; 0 is upright, positive leans to the
            right), its speed. The speeds are not drawn.
        out_gif: the picture; its folder must exist.
        seconds_per_step: between two states, from 0.001 to 10; a frame lasts whole hundredths of a second.
        max_frames: what comes later is left out; at least 1.

    Raises:
        InputError: states that are not [T, 4] finite numbers, or a setting outside its range.
        NothingToDraw: there is no state.

    Source: Barto, Sutton, Anderson 1983, the task; the limits and lengths are those of Gymnasium's CartPole-v1.
    """
    states = _numbers(states)
    if not states.size:
        raise NothingToDraw("pole: nothing to draw, there is no state")
    check("states: shape", states.shape, states.ndim == 2 and states.shape[1] == 4, "[T, 4]")
    broken = ~np.isfinite(states).all(axis=1)
    check("states", states[broken][:1].tolist(), not broken.any(), "finite numbers")
    check("seconds_per_step", seconds_per_step, 0.001 <= number(seconds_per_step) <= 10, "0.001 to 10")
    check("max_frames", max_frames, isinstance(max_frames, int) and max_frames >= 1, "a whole number, at least 1")
    every = max(1, round(_FRAME_S / seconds_per_step))
    steps = range(0, len(states), every)[:max_frames]
    colors, palette = _colors(), Image.new("P", (1, 1))
    palette.putpalette(colors)
    scene, font = _scene(), ImageFont.load_default(13 * _FINER)
    places = np.clip(states[:, 0], -_VIEW[0], _VIEW[0])  # beyond that it is out of sight
    first, *others = [_frame(scene, font, step, places[step], states[step, 2], palette) for step in steps]
    settings = {
        "duration": 10 * max(1, round(100 * every * seconds_per_step)),  # ms, of which the format keeps tens
        "loop": 0,  # endless
        "palette": colors,  # one for all frames: each with its own is half as large again
        "interlace": False,  # which compresses better
    }
    picture = io.BytesIO()
    first.save(picture, "GIF", save_all=True, append_images=others, **settings)
    atomic_write(out_gif, picture.getvalue())


def _numbers(values: Any) -> np.ndarray:
    """An array of float64 with NaN for what is no number; where rows differ in length, one of fewer dimensions."""
    values = np.array(values, object)
    return np.array([number(value) for value in values.flat], np.float64).reshape(values.shape)


def _places(name: str, values: Any) -> np.ndarray:
    places = _numbers(values)
    check(f"{name}: shape", places.shape, places.ndim == 1 and places.size > 1, "one dimension, at least 2 places")
    check(name, places.tolist(), bool((np.diff(places) > 0).all()), "rising numbers")
    return places


def _known(curve: Learning) -> tuple[np.ndarray, np.ndarray]:
    """Steps [T'] and returns [seeds', T'] without the seeds and the evaluations that have no value at all."""
    steps, returns = _numbers(curve.env_steps), _numbers(curve.returns)
    check(f"env_steps of {curve.name!r}: shape", steps.shape, steps.ndim == 1, "[T]")
    fits = returns.ndim == 2 and returns.shape[1] == len(steps)
    check(f"returns of {curve.name!r}: shape", returns.shape, fits, f"[seeds, T = {len(steps)}]")
    known = np.isfinite(returns) & np.isfinite(steps)
    return steps[known.any(axis=0)], returns[known.any(axis=1)][:, known.any(axis=0)]


def _draw_learning(axes: Axes, steps: np.ndarray, returns: np.ndarray, name: str, line: str, color: str) -> None:
    """The mean of [seeds, T] as a line; with several seeds its band, and the seeds when they are few."""
    known = np.ma.masked_invalid(returns)
    seeds, mean = known.count(axis=0), known.mean(axis=0)
    marker = "o" if len(steps) <= _DOTS_UP_TO else ""
    axes.plot(steps, mean, color=color, linewidth=1.6, linestyle=line, marker=marker, markersize=2.5, label=name)
    if len(returns) == 1:
        return
    half = stdtrit(seeds - 1, _TWO_SIDED) * known.std(axis=0, ddof=1) / np.sqrt(seeds)  # masked where a single one is
    axes.fill_between(steps, mean - half, mean + half, color=color, alpha=0.18, linewidth=0)
    if len(returns) <= _SINGLE_SEEDS_UP_TO:
        for single in returns:
            has = np.isfinite(single)
            axes.plot(steps[has], single[has], color=color, linewidth=0.5, alpha=0.35)


def _known_points(label: str, states: Any, probabilities: Any) -> np.ndarray:
    """The points [N', (x, y, probability)] of a panel."""
    states, chances = _numbers(states), _numbers(probabilities)
    check(f"states of {label!r}: shape", states.shape, states.ndim == 2 and states.shape[1] == 2, "[N, 2]")
    check(f"probabilities of {label!r}: shape", chances.shape, chances.shape == states.shape[:1], f"[{len(states)}]")
    outside = chances[(chances < 0) | (chances > 1)]
    check(f"probabilities of {label!r}", outside[:1].tolist(), not len(outside), "numbers in [0, 1]")
    points = np.column_stack([states, chances])
    return points[np.isfinite(points).all(axis=1)]


def _panels(count: int, width: float, height: float, title: str) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels of so many inches each, row by row."""
    across = min(count, _MOST_ACROSS)
    down = math.ceil(count / across)
    figure = new_figure(width * across + 0.6, height * down, title)
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(count)]


def _color_bar(figure: Figure, shown: ScalarMappable, panels: list[Axes], label: str) -> None:
    bar = figure.colorbar(shown, ax=panels, pad=0.02, aspect=30)
    bar.set_label(label, fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=SMALL, colors=INK, length=2)
    bar.outline.set_visible(False)


def _pixels(x: float, y: float) -> tuple[float, float]:
    """Of a place in metres, x from the middle and y from the track upwards, in the picture that is drawn finer."""
    scale = _SCALE * _FINER
    return (x + _VIEW[0] / 2) * scale, (_VIEW[1] - _GROUND - y) * scale


def _scene() -> Image.Image:
    """What does not move: the track and its limits."""
    scene = Image.new("RGB", (_FINER * round(_VIEW[0] * _SCALE), _FINER * round(_VIEW[1] * _SCALE)), "white")
    draw, font = ImageDraw.Draw(scene), ImageFont.load_default(10 * _FINER)
    draw.line([_pixels(-_VIEW[0], 0), _pixels(_VIEW[0], 0)], PALE, width=_FINER)
    for limit in (-_TRACK, _TRACK):
        draw.line([_pixels(limit, 0.12), _pixels(limit, -0.12)], LIMIT_COLOR, width=2 * _FINER)
        draw.text(_pixels(limit, -0.16), f"{limit:+.1f} m", LIMIT_COLOR, font, anchor="mt")
    return scene


def _frame(scene: Image.Image, font: Any, step: int, x: float, theta: float, palette: Image.Image) -> Image.Image:
    picture = scene.copy()
    draw = ImageDraw.Draw(picture)
    width, height = _CART
    draw.rounded_rectangle([*_pixels(x - width / 2, height), *_pixels(x + width / 2, 0.03)], 4 * _FINER, BLUE)
    hinge = (x, height - 0.05)
    tip = (hinge[0] + _POLE * math.sin(theta), hinge[1] + _POLE * math.cos(theta))
    draw.line([_pixels(*hinge), _pixels(*tip)], ORANGE, width=6 * _FINER)
    for end, color, radius in ((tip, ORANGE, 3 * _FINER), (hinge, ORANGE, 3 * _FINER), (hinge, INK, 2 * _FINER)):
        draw.circle(_pixels(*end), radius, color)
    draw.text((8 * _FINER, 6 * _FINER), f"step {step}", INK, font)
    return picture.reduce(_FINER).quantize(palette=palette, dither=Image.Dither.NONE)


def _colors() -> bytes:
    """The colours of the scene and what lies between two of them, 3 bytes each: at most the 256 of a palette."""
    pure = [np.array(ImageColor.getrgb(name)) for name in ("white", BLUE, ORANGE, INK, PALE, LIMIT_COLOR)]
    shares = np.linspace(0, 1, _SHADES)[:, None]
    mixed = [one + shares * (other - one) for one, other in itertools.combinations(pure, 2)]
    return np.unique(np.concatenate(mixed).round().astype(np.uint8), axis=0).tobytes()
