"""The picture of a comparison: every course, its band, and the references."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from ppo_jax.plots import Course, NothingToDraw, compare, plot_comparison


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been saved; the files are written as well."""
    caught, save = [], compare.save

    def kept(figure, out_png):
        caught.append(figure)
        save(figure, out_png)

    monkeypatch.setattr(compare, "save", kept)
    return caught


def lines(axes):
    """Label to line."""
    return {line.get_label(): line for line in axes.get_lines()}


def test_courses_bands_references_and_levels(tmp_path, figures):
    courses = [Course("ppo", [64, 128, 192], [1.0, 2.0, 4.0], [0.1, 0.2, 0.5]), Course("rloo", [64, 192], [1.5, 3.0])]
    others = [Course("their ppo", [0, 100], [1.0, 2.5])]
    plot_comparison(
        courses, tmp_path / "c.png", unit="score", references=others, levels={"their end": 2.25}, title="both"
    )
    (axes,) = figures[0].axes
    drawn = lines(axes)
    assert drawn["ppo"].get_xydata().tolist() == [[64, 1], [128, 2], [192, 4]]
    assert drawn["rloo"].get_xydata().tolist() == [[64, 1.5], [192, 3]]
    assert drawn["their ppo"].get_xydata().tolist() == [[0, 1], [100, 2.5]]
    assert drawn["ppo"].get_color() != drawn["rloo"].get_color()
    assert [drawn[name].get_linestyle() for name in ("ppo", "rloo", "their ppo")] == ["-", "-", "--"]
    band = axes.collections[0].get_paths()[0].vertices
    for corner in ([64, 0.9], [64, 1.1], [128, 1.8], [128, 2.2], [192, 3.5], [192, 4.5]):
        assert np.abs(band - corner).sum(axis=1).min() < 1e-12
    assert to_hex(axes.collections[0].get_facecolor()[0]) == drawn["ppo"].get_color()
    assert [text.get_text() for text in axes.texts] == ["their end"]
    assert [line.get_ydata()[0] for line in axes.get_lines() if len(set(line.get_ydata())) == 1] == [2.25]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("episodes", "score")
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"ppo", "rloo", "their ppo"}
    assert imread(tmp_path / "c.png").ndim == 3


def test_more_courses_than_colours_still_differ(tmp_path, figures):
    plot_comparison([Course(str(i), [0, 1], [i, i + 1]) for i in range(9)], tmp_path / "c.png", unit="score")
    looks = {(line.get_color(), line.get_linestyle()) for line in figures[0].axes[0].get_lines()}
    assert len(looks) == 9


def test_what_is_no_number_is_left_out(tmp_path, figures):
    courses = [
        Course("a", [1, 2, 3, None], [1.0, None, math.inf, 4.0], [math.nan, 1, 1, 1]),
        Course("empty", [1, 2], [None, math.nan]),
        Course("none", [], []),
    ]
    plot_comparison(courses, tmp_path / "c.png", unit="score", levels={"unknown": math.nan})
    drawn = lines(figures[0].axes[0])
    assert list(drawn) == ["a"]
    assert drawn["a"].get_xydata().tolist() == [[1, 1]]


def test_without_a_value_there_is_no_picture(tmp_path):
    with pytest.raises(NothingToDraw, match="none of 1 courses"):
        plot_comparison([Course("a", [1], [None])], tmp_path / "c.png", unit="score", levels={"theirs": 1.0})
    assert list(tmp_path.iterdir()) == []
