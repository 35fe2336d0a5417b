"""Pictures of control tasks: bands over seeds, choices, maps, and a pole that leans to the side it falls to."""

import io
import math

import numpy as np
import pytest
import scipy.stats
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import imread
from PIL import Image

from ppo_jax.errors import InputError
from ppo_jax.plots import (
    Learning,
    NothingToDraw,
    animate_pole,
    control,
    plot_choices,
    plot_learning,
    plot_maps,
)
from ppo_jax.plots.style import BLUE, ORANGE


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been saved; the files are written as well."""
    caught, save = [], control.save

    def kept(figure, out_png):
        caught.append(figure)
        save(figure, out_png)

    monkeypatch.setattr(control, "save", kept)
    return caught


def line(axes, label):
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return found


def seed_lines(axes):
    """The faint lines, [points, (x, y)] each."""
    return [line.get_xydata().tolist() for line in axes.get_lines() if line.get_alpha() is not None]


def band(axes, i=0):
    """Low and high end of a band at each step where it is drawn."""
    corners = np.concatenate([path.vertices for path in axes.collections[i].get_paths()])
    return {x: (corners[corners[:, 0] == x, 1].min(), corners[corners[:, 0] == x, 1].max()) for x in corners[:, 0]}


# --- returns of agents ---


def test_a_run_is_a_line_without_a_band(tmp_path, figures):
    rows = [
        {"env_steps": 0, "eval/return_mean": 20.0, "eval/return_std": 3.0},
        {"env_steps": 512},  # a row without an evaluation
        {"env_steps": 1024, "eval/return_mean": 300.0},
        {"env_steps": None, "eval/return_mean": 310.0},
        {"env_steps": 2048, "eval/return_mean": math.inf},
        {"env_steps": 4096, "eval/return_mean": 500.0},
    ]
    plot_learning([Learning.of_run(rows, "ppo")], tmp_path / "r.png", title="CartPole", solved_at=475)
    (axes,) = figures[0].axes
    assert line(axes, "ppo").get_xydata().tolist() == [[0, 20], [1024, 300], [4096, 500]]
    assert (len(axes.collections), seed_lines(axes), axes.get_legend()) == (0, [], None)
    assert [text.get_text() for text in axes.texts] == ["solved at 475"]
    (level,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert set(level.get_ydata()) == {475}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps of the environment", "return")
    assert figures[0].get_suptitle() == "CartPole"
    assert imread(tmp_path / "r.png").ndim == 3


def test_the_mean_over_seeds_and_its_band(tmp_path, figures):
    # Seeds 1, 2, 6: mean 3, squares of the deviations 4 + 1 + 9 = 14, s = sqrt(14 / 2), standard error sqrt(7 / 3).
    # Student's 97.5 % quantile with 2 degrees of freedom is 4.30265 (any table). Seeds that agree have no width.
    plot_learning([Learning("ppo", [0, 10], [[1, 5], [2, 5], [6, 5]])], tmp_path / "r.png")
    (axes,) = figures[0].axes
    assert line(axes, "ppo").get_xydata().tolist() == [[0, 3], [10, 5]]
    half = 4.30265 * math.sqrt(7 / 3)
    np.testing.assert_allclose(band(axes)[0], (3 - half, 3 + half), rtol=1e-5)
    assert band(axes)[10] == (5, 5)
    assert seed_lines(axes) == [[[0, 1], [10, 5]], [[0, 2], [10, 5]], [[0, 6], [10, 5]]]
    assert axes.get_legend() is None  # of one name
    assert "95 %" in axes.get_title(loc="left")


def test_the_band_is_scipys_interval_also_where_seeds_are_missing(tmp_path, figures, rng):
    returns = rng.normal(100, 30, (13, 50))
    returns[rng.random(returns.shape) < 0.3] = math.nan
    returns[:, 7] = math.nan  # no seed: the step is left out
    returns[1:, 8] = math.nan  # a single seed: a mean without a band
    returns[:, 9] = rng.normal(size=13)
    returns[0, 8] = 50.0
    steps = np.arange(50) * 1000
    plot_learning([Learning("ppo", steps, returns)], tmp_path / "r.png")
    (axes,) = figures[0].axes
    drawn, bands = dict(line(axes, "ppo").get_xydata().tolist()), band(axes)
    assert seed_lines(axes) == []  # more than twelve
    assert 7000 not in drawn
    assert drawn[8000] == 50
    assert 8000 not in bands
    for step, column in zip(steps, returns.T, strict=True):
        known = column[np.isfinite(column)]
        if len(known) > 1:
            expected = scipy.stats.t.interval(0.95, len(known) - 1, loc=known.mean(), scale=scipy.stats.sem(known))
            np.testing.assert_allclose((drawn[step], *bands[step]), (known.mean(), *expected), rtol=1e-9, atol=1e-9)


def test_agents_differ_in_look_and_are_named(tmp_path, figures):
    curves = [Learning(f"agent {i}", [0, 1], [[i, i + 1], [i, i + 3]]) for i in range(9)]
    curves.insert(4, Learning("empty", [0, 1], [[None, math.nan]]))
    plot_learning(curves, tmp_path / "r.png")
    (axes,) = figures[0].axes
    names = [f"agent {i}" for i in range(9)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == names
    looks = {(line(axes, name).get_color(), line(axes, name).get_linestyle()) for name in names}
    assert len(looks) == 9
    for i, name in enumerate(names):
        assert to_hex(axes.collections[i].get_facecolor()[0]) == line(axes, name).get_color()


def test_a_level_above_all_returns_is_in_the_picture(tmp_path, figures):
    plot_learning([Learning("a", [0, 1], [[10, 20]])], tmp_path / "r.png", solved_at=475)
    assert figures[0].axes[0].get_ylim()[1] > 475


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (Learning("a", [[0, 1]], [[1, 2]]), r"env_steps of 'a': shape: got \(1, 2\), expected \[T\]"),
        (Learning("a", [0, 1], [1, 2]), r"returns of 'a': shape: got \(2,\), expected \[seeds, T = 2\]"),
        (Learning("a", [0, 1], [[1, 2, 3]]), r"got \(1, 3\)"),
        (Learning("a", [0, 1], [[1, 2], [3]]), r"got \(2,\)"),
    ],
)
def test_returns_that_do_not_fit_are_refused(tmp_path, curve, message):
    with pytest.raises(InputError, match=message):
        plot_learning([curve], tmp_path / "r.png")
    assert list(tmp_path.iterdir()) == []


def test_a_level_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(InputError, match="solved_at: got nan"):
        plot_learning([Learning("a", [0], [[1]])], tmp_path / "r.png", solved_at=math.nan)


@pytest.mark.parametrize("curves", [[], [Learning("a", [0, 1], [[None, math.nan]])], [Learning.of_run([{"x": 1}])]])
def test_without_a_return_there_is_no_picture(tmp_path, curves):
    with pytest.raises(NothingToDraw, match="none of"):
        plot_learning(curves, tmp_path / "r.png", solved_at=475)
    assert list(tmp_path.iterdir()) == []


# --- choices ---


def test_states_are_coloured_by_the_probability_of_action_1(tmp_path, figures, rng):
    states = rng.uniform(-1, 1, (200, 2))
    panels = [("before", states, np.full(200, 0.5)), ("during", states, rng.random(200)), ("after", [[0, 0.5]], [1])]
    plot_choices(panels, tmp_path / "c.png", title="a plane")
    *cells, bar = figures[0].axes
    assert [axes.get_title(loc="left") for axes in cells] == ["before", "during", "after"]
    for axes, (_, places, chances) in zip(cells, panels, strict=True):
        (dots,) = axes.collections
        np.testing.assert_array_equal(dots.get_offsets(), places)
        np.testing.assert_array_equal(dots.get_array(), chances)
        assert dots.get_clim() == (0, 1)
        assert axes.get_aspect() == 1
        assert sorted(np.ravel([line.get_xydata() for line in axes.get_lines()])) == [0, 0, 0, 0, 0, 0, 1, 1]
    colors = cells[0].collections[0].get_cmap()
    assert (to_hex(colors(0.0)), to_hex(colors(1.0))) == (BLUE, ORANGE)
    assert np.ptp(colors(0.5)[:3]) < 0.02  # grey
    assert bar.get_ylim() == (0, 1)
    assert bar.get_ylabel() == "probability of action 1"
    assert imread(tmp_path / "c.png").ndim == 3


def test_points_without_a_number_are_left_out(tmp_path, figures):
    panels = [("a", [[0, 0], [math.nan, 1], [3, 1]], [0.5, 1, None]), ("b", [[None, 0]], [1])]
    plot_choices(panels, tmp_path / "c.png")
    cells = figures[0].axes[:-1]
    assert [axes.collections[0].get_offsets().tolist() for axes in cells] == [[[0, 0]]]


def test_states_beyond_the_square_are_in_the_picture_and_rows_are_filled(tmp_path, figures):
    plot_choices([(str(i), [[-3.0, i]], [0.2]) for i in range(5)], tmp_path / "c.png")
    cells = figures[0].axes[:-1]
    assert len(cells) == 5
    assert all(axes.get_xlim()[0] < -3 and axes.get_ylim()[1] > 4 for axes in cells)


@pytest.mark.parametrize(
    ("states", "chances", "message"),
    [
        ([0, 1], [0.5, 0.5], r"states of 'a': shape: got \(2,\), expected \[N, 2\]"),
        ([[0, 1, 2]], [0.5], r"states of 'a': shape: got \(1, 3\)"),
        ([[0, 1]], [0.5, 0.5], r"probabilities of 'a': shape: got \(2,\), expected \[1\]"),
        ([[0, 1]], [1.5], r"probabilities of 'a': got \[1.5\], expected numbers in \[0, 1\]"),
        ([[0, 1]], [-0.5], r"got \[-0.5\]"),
    ],
)
def test_choices_that_do_not_fit_are_refused(tmp_path, states, chances, message):
    with pytest.raises(InputError, match=message):
        plot_choices([("a", states, chances)], tmp_path / "c.png")


@pytest.mark.parametrize("panels", [[], [("a", np.zeros((0, 2)), [])], [("a", [[0, 0]], [math.nan])]])
def test_without_a_point_there_is_no_picture(tmp_path, panels):
    with pytest.raises(NothingToDraw, match="none of"):
        plot_choices(panels, tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []


# --- maps ---


def test_maps_with_a_colour_bar_each(tmp_path, figures, rng):
    x, y = np.linspace(-0.2, 0.2, 5), np.linspace(-2, 2, 4)
    value, policy = rng.normal(size=(4, 5)), rng.random((4, 5))
    value[1, 2] = math.nan
    maps = [("value", value, None), ("policy", policy, (0, 1)), ("empty", np.full((4, 5), math.nan), None)]
    plot_maps(x, y, maps, tmp_path / "m.png", labels=("angle", "speed"), title="CartPole")
    first, second, bar, other_bar = figures[0].axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["value", "policy"]
    assert {(axes.get_xlabel(), axes.get_ylabel()) for axes in (first, second)} == {("angle", "speed")}
    meshes = [axes.collections[0] for axes in (first, second)]
    np.testing.assert_array_equal(meshes[0].get_array().filled(math.nan), value)
    np.testing.assert_array_equal(meshes[1].get_array(), policy)
    # Cells lie around their places: 4 steps of 0.1 and half a cell at both ends, 3 steps of 4/3 likewise.
    corners = meshes[0].get_coordinates().reshape(-1, 2)
    np.testing.assert_allclose([corners.min(axis=0), corners.max(axis=0)], [[-0.25, -8 / 3], [0.25, 8 / 3]])
    assert meshes[0].get_clim() == (np.nanmin(value), np.nanmax(value))
    assert meshes[1].get_clim() == (0, 1)
    assert bar.get_ylim() == pytest.approx((np.nanmin(value), np.nanmax(value)))
    assert other_bar.get_ylim() == (0, 1)
    assert imread(tmp_path / "m.png").ndim == 3


def test_the_first_row_of_a_map_is_at_the_bottom(tmp_path):
    grid = np.array([[0.0, 0.0], [1.0, 1.0]])
    plot_maps([0, 1], [0, 1], [("a", grid, (0, 1))], tmp_path / "m.png", labels=("x", "y"))
    picture = imread(tmp_path / "m.png")[..., :3]
    rows = {color: np.where(np.abs(picture - to_rgb(color)).max(axis=2) < 0.01)[0] for color in (BLUE, ORANGE)}
    assert np.median(rows[ORANGE]) < np.median(rows[BLUE])  # rows of pixels go down


def test_a_map_of_one_value_is_drawn(tmp_path):
    plot_maps([0, 1], [0, 1], [("a", np.full((2, 2), 3.0), None)], tmp_path / "m.png", labels=("x", "y"))
    assert imread(tmp_path / "m.png").ndim == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": [[0, 1]]}, r"x: shape: got \(1, 2\), expected one dimension"),
        ({"y": [0]}, r"y: shape: got \(1,\)"),
        ({"x": [1, 0, 2]}, r"x: got \[1.0, 0.0, 2.0\], expected rising"),
        ({"y": [0, math.nan]}, r"y: got \[0.0, nan\]"),
        ({"grid": np.zeros((3, 2))}, r"map 'a': shape: got \(3, 2\), expected \[y, x\] = \(2, 3\)"),
        ({"limits": (1, 0)}, r"map 'a': limits: got \(1, 0\), expected two numbers"),
        ({"limits": (0, math.nan)}, "limits"),
        ({"limits": (0, 1, 2)}, "limits"),
    ],
)
def test_maps_that_do_not_fit_are_refused(tmp_path, changed, message):
    given = {"x": [0, 1, 2], "y": [0, 1], "grid": np.zeros((2, 3)), "limits": None} | changed
    with pytest.raises(InputError, match=message):
        plot_maps(
            given["x"], given["y"], [("a", given["grid"], given["limits"])], tmp_path / "m.png", labels=("x", "y")
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("maps", [[], [("a", np.full((2, 2), math.inf), None)]])
def test_without_a_value_there_is_no_map(tmp_path, maps):
    with pytest.raises(NothingToDraw, match="none of"):
        plot_maps([0, 1], [0, 1], maps, tmp_path / "m.png", labels=("x", "y"))


# --- the pole ---


def still(x=0.0, theta=0.0, steps=2):
    return np.tile([x, 0.0, theta, 0.0], (steps, 1))


def frames(path):
    """The pictures of a GIF, [frames, height, width, 3] in [0, 1], and how long each is shown, in ms."""
    shown, durations = [], []
    with Image.open(io.BytesIO(path.read_bytes())) as animation:
        for i in range(animation.n_frames):
            animation.seek(i)
            shown.append(np.asarray(animation.convert("RGB")) / 255)
            durations.append(animation.info["duration"])
        assert animation.info["loop"] == 0
    return np.stack(shown), durations


def where(picture, color):
    """Places of the pixels of a colour, [pixels, (down, right)]."""
    return np.argwhere(np.abs(picture - to_rgb(color)).max(axis=-1) < 0.02)


def test_every_second_state_is_a_frame_in_real_time(tmp_path):
    states = still(steps=101)
    states[:, 0] = np.linspace(-2, 2, 101)
    animate_pole(states, tmp_path / "p.gif")
    pictures, durations = frames(tmp_path / "p.gif")
    assert durations == [40] * 51
    middles = np.array([where(picture, BLUE)[:, 1].mean() for picture in pictures])
    # The cart goes 4 m at 64 pixels a metre from left to right, half the frames on each side of the middle.
    np.testing.assert_allclose(middles, middles[25] + 64 * np.linspace(-2, 2, 51), atol=1)
    assert abs(middles[25] - pictures.shape[2] / 2) < 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.gif"]


def test_states_that_stand_still_are_frames_of_their_own(tmp_path):
    animate_pole(still(steps=10), tmp_path / "p.gif")  # the counter goes on
    pictures, durations = frames(tmp_path / "p.gif")
    assert durations == [40] * 5
    changed = np.argwhere((pictures[0] != pictures[4]).any(axis=-1))
    assert len(changed)
    assert changed.max(axis=0)[1] < pictures.shape[2] / 3


@pytest.mark.parametrize("theta", [0.0, 0.2, -0.2, 1.2])
def test_the_pole_leans_to_the_right_for_positive_angles(tmp_path, theta):
    animate_pole(still(theta=theta), tmp_path / "p.gif")
    ((picture,), _) = frames(tmp_path / "p.gif")
    pole = where(picture, ORANGE)
    middle = picture.shape[1] / 2
    highest = pole[pole[:, 0] == pole[:, 0].min(), 1].mean() - middle
    # One metre is 64 pixels, from the hinge, 0.05 m below the upper edge of the cart, to the tip with its round end of
    # 3 pixels.
    assert abs(highest - 64 * math.sin(theta)) < 3
    hinge, tip = where(picture, BLUE)[:, 0].min() + 0.05 * 64, pole[:, 0].min() + 3
    assert abs(hinge - tip - 64 * math.cos(theta)) < 2


def test_the_limits_are_marked_and_reached(tmp_path):
    animate_pole(still(x=2.4), tmp_path / "p.gif")
    ((picture,), _) = frames(tmp_path / "p.gif")
    red = where(picture, control.LIMIT_COLOR)[:, 1]
    assert abs(where(picture, BLUE)[:, 1].mean() - red.max()) < 20  # the text below it is wider than the mark
    assert abs((red.min() + red.max()) / 2 - picture.shape[1] / 2) < 3


def test_a_cart_out_of_sight_leaves_the_track(tmp_path):
    animate_pole(still(x=1e50), tmp_path / "p.gif")
    ((picture,), _) = frames(tmp_path / "p.gif")
    assert not len(where(picture, BLUE))
    assert len(where(picture, control.LIMIT_COLOR))


def test_five_hundred_steps_are_a_small_file(tmp_path):
    time = np.arange(500)
    states = np.stack([2 * np.sin(time / 80), 0 * time, 0.2 * np.sin(time / 9), 0 * time], axis=1)
    animate_pole(states, tmp_path / "p.gif")
    assert (tmp_path / "p.gif").stat().st_size < 300_000
    assert len(frames(tmp_path / "p.gif")[0]) == 250


def test_edges_are_smooth_and_the_background_is_white(tmp_path):
    animate_pole(still(theta=0.2), tmp_path / "p.gif")
    ((picture,), _) = frames(tmp_path / "p.gif")
    assert (picture[0] == 1).all()
    right = picture[:60, 150:]  # beside the text: the pole, and no cart
    assert len(np.unique(right.reshape(-1, 3), axis=0)) > 4


@pytest.mark.parametrize(
    ("settings", "count", "duration"),
    [
        ({"max_frames": 3}, 3, 40),
        ({"seconds_per_step": 0.05}, 20, 50),
        ({"seconds_per_step": 0.01}, 5, 40),
        ({"seconds_per_step": 0.57}, 20, 570),
        ({"max_frames": 1}, 1, None),
    ],
)
def test_the_settings(tmp_path, settings, count, duration):
    animate_pole(still(steps=20), tmp_path / "p.gif", **settings)
    with Image.open(tmp_path / "p.gif") as animation:
        assert animation.n_frames == count
        assert duration is None or animation.info["duration"] == duration


def test_a_failure_leaves_the_old_animation(tmp_path, monkeypatch):
    animate_pole(still(), tmp_path / "p.gif")
    old = (tmp_path / "p.gif").read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        animate_pole(still(theta=0.3), tmp_path / "p.gif")
    assert [path.name for path in tmp_path.iterdir()] == ["p.gif"]
    assert (tmp_path / "p.gif").read_bytes() == old


@pytest.mark.parametrize(
    ("states", "settings", "message"),
    [
        (np.zeros(4), {}, r"states: shape: got \(4,\), expected \[T, 4\]"),
        (np.zeros((5, 3)), {}, r"states: shape: got \(5, 3\)"),
        ([[0, 0, 0, 0], [1, 0, math.nan, 0]], {}, r"states: got \[\[1.0, 0.0, nan, 0.0\]\], expected finite"),
        (still(), {"seconds_per_step": 0}, "seconds_per_step: got 0, expected 0.001 to 10"),
        (still(), {"seconds_per_step": math.nan}, "seconds_per_step: got nan"),
        (still(), {"max_frames": 0}, "max_frames: got 0, expected a whole number, at least 1"),
        (still(), {"max_frames": 2.5}, "max_frames: got 2.5"),
    ],
)
def test_poles_that_cannot_be_are_refused(tmp_path, states, settings, message):
    with pytest.raises(InputError, match=message):
        animate_pole(states, tmp_path / "p.gif", **settings)
    assert list(tmp_path.iterdir()) == []


def test_without_a_state_there_is_no_animation(tmp_path):
    with pytest.raises(NothingToDraw, match="no state"):
        animate_pole(np.zeros((0, 4)), tmp_path / "p.gif")
    assert list(tmp_path.iterdir()) == []
