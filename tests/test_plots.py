"""Pictures of reward models and of scores. The curves of runs are in test_metrics.py."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from scipy.stats import binomtest

from ppo_jax.plots import (
    NothingToDraw,
    plot_frontier,
    plot_proxy_and_gold,
    plot_reliability,
    plot_reward_model,
    reward_model,
    scores,
)
from ppo_jax.plots.style import BLUE, GREEN, ORANGE, column, number, running_mean

BEST_OF_N = [  # of a reward model whose best of 16 gains 2 in proxy and 4 in gold
    {"n": 1, "kl": 0.0, "proxy": 1.0, "gold": -2.0},
    {"n": 4, "kl": 0.64, "proxy": 2.0, "gold": 0.5},
    {"n": 16, "kl": 1.84, "proxy": 3.0, "gold": 2.0},
]
ODD = (None, math.nan, math.inf, -math.inf, "", "text", True, 10**400, 1e308, -1e-300, [], {}, [1], {"n": 1}, 0, -3)


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been saved; the files are written as well."""
    caught = []
    for module in (reward_model, scores):

        def save(figure, out_png, save=module.save):
            caught.append(figure)
            save(figure, out_png)

        monkeypatch.setattr(module, "save", save)
    return caught


def ppo_rows(*values):
    """Rows of metrics from (KL, proxy, gold) of each iteration."""
    keys = ("objective/kl", "objective/score", "objective/gold")
    return [{"iteration": i} | dict(zip(keys, value, strict=True)) for i, value in enumerate(values)]


def line(axes, label):
    """[points, (x, y)] of the line with this label."""
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return found.get_xydata()


def texts(axes):
    return [text.get_text() for text in axes.texts]


# --- numbers ---


def test_what_is_no_number_is_nan():
    assert [number(value) for value in (3, "0.5", np.float32(0.25), True)] == [3.0, 0.5, 0.25, 1.0]
    for value in (None, math.nan, math.inf, "", "text", 10**400, 1e308, [], {}):
        assert math.isnan(number(value))
    np.testing.assert_array_equal(column([{"a": 1}, {}, {"a": None}], "a"), [1, math.nan, math.nan])


def test_running_mean_is_shorter_at_the_ends():
    # Windows of 3 around each: (1+2)/2, (1+2+6)/3, (2+6+4)/3, (6+4)/2.
    np.testing.assert_allclose(running_mean(np.array([1.0, 2.0, 6.0, 4.0]), 3), [1.5, 3.0, 4.0, 5.0])
    np.testing.assert_allclose(running_mean(np.array([5.0]), 3), [5.0])


# --- reward model ---

BINS = [
    {"confidence": 0.55, "accuracy": 0.5, "count": 40},
    {"confidence": 0.75, "accuracy": 0.8, "count": 50},
    {"confidence": 0.95, "accuracy": 1.0, "count": 10},
]


def test_reliability_shows_bins_intervals_and_counts(tmp_path, figures):
    plot_reliability(BINS, 0.0421, tmp_path / "r.png")
    above, below = figures[0].axes
    assert above.get_title(loc="left") == "reliability, ECE 0.042"
    points = np.array([(row["confidence"], row["accuracy"]) for row in BINS])
    assert any(np.array_equal(line.get_xydata(), points) for line in above.get_lines())
    for row, ends in zip(BINS, above.collections[0].get_segments(), strict=True):
        interval = binomtest(round(row["accuracy"] * row["count"]), row["count"]).proportion_ci(method="wilson")
        np.testing.assert_allclose(ends[:, 1], [interval.low, interval.high], atol=1e-9)
    assert [ends[:, 1].tolist() for ends in below.collections[0].get_segments()] == [[0, 40], [0, 50], [0, 10]]
    (diagonal,) = [line for line in above.get_lines() if line.get_label() == "calibrated"]
    assert diagonal.get_xydata().tolist() == [[0.5, 0.5], [1, 1]]  # the preferred side has at least one half
    assert imread(tmp_path / "r.png").ndim == 3


def test_a_reliability_below_one_half_is_drawn_from_zero(tmp_path, figures):
    plot_reliability([{"confidence": 0.2, "accuracy": 0.1, "count": 5}], math.nan, tmp_path / "r.png")
    above, _ = figures[0].axes
    assert above.get_title(loc="left") == "reliability"
    assert line(above, "calibrated").tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"confidence": 0.7, "accuracy": None, "count": 0}],
        [{"confidence": 0.7, "accuracy": 0.7, "count": 0}],
        [{"confidence": 1.7, "accuracy": 0.7, "count": 3}, {"confidence": 0.7, "accuracy": -1, "count": 3}, {}],
    ],
)
def test_a_reliability_without_bins_is_an_error_and_makes_no_file(tmp_path, rows):
    with pytest.raises(NothingToDraw, match=f"got {len(rows)} bins"):
        plot_reliability(rows, 0.1, tmp_path / "r.png")
    assert list(tmp_path.iterdir()) == []


RESULTS = {
    "accuracy": 0.75,
    "accuracy_low": 0.7,
    "accuracy_high": 0.8,
    "ece": 0.04,
    "reliability": BINS,
    "accuracy_by_margin": [
        {"low": 0.01, "high": 0.5, "accuracy": 0.6, "count": 1000},
        {"low": 0.52, "high": 3.2, "accuracy": 0.9, "count": 12345},
    ],
}


def test_reward_model_shows_accuracy_beside_the_ceiling(tmp_path, figures):
    plot_reward_model(RESULTS, tmp_path / "r.png", ceiling=0.78)
    accuracy, *_, margins = figures[0].axes
    assert texts(accuracy) == ["95 % interval", "75.0%", "simulated annotator's ceiling 78.0%", "chance"]
    heights = [sorted(set(line.get_ydata())) for line in accuracy.get_lines()]
    assert heights == [[0.7, 0.8], [0.75], [0.78], [0.5]]
    labels = [label.get_text() for label in margins.get_xticklabels()]
    assert labels == ["0.01–0.5\nn=1000", "0.52–3.2\nn=12,345"]


def test_without_a_ceiling_nothing_is_called_simulated(tmp_path, figures):
    plot_reward_model(RESULTS, tmp_path / "r.png")
    assert not any("simulated" in text for axes in figures[0].axes for text in texts(axes))


@pytest.mark.parametrize(
    ("results", "panels"),
    [
        ({"accuracy": 1.0}, 1),
        ({"accuracy": None, "reliability": BINS}, 2),
        ({"accuracy": 0.0, "accuracy_by_margin": [{"accuracy": 1, "count": 2}]}, 2),
        ({"reliability": "no list", "accuracy_by_margin": RESULTS["accuracy_by_margin"] * 20}, 1),
    ],
)
def test_what_is_missing_of_a_reward_model_is_left_out(tmp_path, figures, results, panels):
    plot_reward_model(results, tmp_path / "r.png", ceiling=math.nan)
    assert len(figures[0].axes) == panels


@pytest.mark.parametrize("results", [{}, {"accuracy": math.nan, "reliability": [], "accuracy_by_margin": None}])
def test_a_reward_model_without_results_is_an_error(tmp_path, results):
    with pytest.raises(NothingToDraw):
        plot_reward_model(results, tmp_path / "r.png")
    assert list(tmp_path.iterdir()) == []


# --- proxy and gold ---


def test_proxy_and_gold_on_their_scales_and_on_the_common_one(tmp_path, figures):
    plot_proxy_and_gold(ppo_rows((0, 1.0, -2.0), (1, 2.0, 1.0), (2, 4.0, -1.0)), BEST_OF_N, tmp_path / "p.png")
    proxy, gold, common = figures[0].axes
    assert line(proxy, "proxy").tolist() == [[0, 1], [1, 2], [2, 4]]
    assert line(gold, "gold").tolist() == [[0, -2], [1, 1], [2, -1]]
    assert texts(gold) == ["base policy", "best of 16"]
    # From base to best of 16 the proxy goes 1 -> 3 and gold -2 -> 2: (2 - 1)/2 = 0.5, (4 - 1)/2 = 1.5 and
    # (1 + 2)/4 = 0.75, (-1 + 2)/4 = 0.25.
    np.testing.assert_allclose(line(common, "proxy")[:, 1], [0, 0.5, 1.5])
    np.testing.assert_allclose(line(common, "gold")[:, 1], [0, 0.75, 0.25])
    assert [to_hex(line.get_color()) for line in common.get_lines()[:2]] == [BLUE, ORANGE]


def test_gold_that_people_did_not_give_is_left_out(tmp_path, figures):
    plot_proxy_and_gold(
        ppo_rows((0, 1.0, None), (1, 2.0, None)), [row | {"gold": None} for row in BEST_OF_N], tmp_path / "p.png"
    )
    (proxy,) = figures[0].axes
    assert len(line(proxy, "proxy")) == 2


@pytest.mark.parametrize(
    "best_of_n",
    [
        [],
        BEST_OF_N[:1],
        BEST_OF_N[1:],  # no base
        [BEST_OF_N[0], BEST_OF_N[2] | {"gold": -2.0}],  # gold sees no difference: nothing to divide by
        [BEST_OF_N[0] | {"proxy": None}, BEST_OF_N[2]],
    ],
)
def test_without_a_way_upwards_there_is_no_common_scale(tmp_path, figures, best_of_n):
    plot_proxy_and_gold(ppo_rows((0, 1.0, -2.0), (1, 2.0, 1.0)), best_of_n, tmp_path / "p.png")
    assert len(figures[0].axes) == 2


def test_over_many_iterations_their_running_mean_is_drawn(tmp_path, figures, rng):
    noisy = rng.normal(size=300)
    plot_proxy_and_gold(ppo_rows(*((0, score, None) for score in noisy)), [], tmp_path / "p.png")
    drawn = line(figures[0].axes[0], "proxy")
    assert drawn.shape == (300, 2)
    assert drawn[:, 1].std() < 0.6 * noisy.std()


# --- frontier ---


@pytest.mark.parametrize("sqrt", [False, True])
def test_the_frontier_holds_path_yardstick_and_end(tmp_path, figures, sqrt):
    rows = ppo_rows((0.0, 1.0, -2.0), (1.5, 2.0, 1.0), (4.0, 3.5, 0.5))
    end = {"kl": 3.9, "proxy": 3.4, "gold": 0.6}
    plot_frontier(rows, BEST_OF_N, tmp_path / "f.png", evaluated=end, sqrt=sqrt)
    proxy, gold, bar = figures[0].axes
    for axes, name, path in ((proxy, "proxy", [1, 2, 3.5]), (gold, "gold", [-2, 1, 0.5])):
        (dots,) = axes.collections
        assert dots.get_offsets().tolist() == [[0, path[0]], [1.5, path[1]], [4, path[2]]]
        assert dots.get_array().tolist() == [0, 1, 2]  # the colour is the iteration
        assert line(axes, "best of n of the base policy").tolist() == [[row["kl"], row[name]] for row in BEST_OF_N]
        assert line(axes, "PPO at the end, evaluated").tolist() == [[3.9, end[name]]]
        assert texts(axes) == ["1", "4", "16"]
        assert "nats" in axes.get_xlabel()
    assert bar.get_ylabel() == "iteration"
    assert len(figures[0].legends) == 1


def test_the_root_scale_is_one_and_says_nats(tmp_path, figures):
    plot_frontier(ppo_rows((0.0, 1, 1), (1.0, 2, 2), (16.0, 3, 3)), [], tmp_path / "f.png", sqrt=True)
    axes = figures[0].axes[0]
    zero, one, sixteen = axes.transData.transform([(0, 1), (1, 1), (16, 1)])[:, 0]
    assert (sixteen - zero) / (one - zero) == pytest.approx(4)  # sqrt(16) / sqrt(1)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[0] == "0"
    assert {"1", "2", "5", "10"} <= set(labels)


def test_a_kl_estimated_below_zero_stays_inside(tmp_path, figures):
    plot_frontier(ppo_rows((-0.04, 1, 1), (-0.01, 2, 2)), [], tmp_path / "f.png", sqrt=True)
    for axes in figures[0].axes[:2]:
        assert axes.get_xlim()[0] < -0.04
        assert axes.get_xlim()[1] > 0


@pytest.mark.parametrize(("limit", "drawn"), [(5.0, True), (4.2, True), (20.0, False), (0.0, False), (math.nan, False)])
@pytest.mark.parametrize("sqrt", [False, True])
def test_the_limit_is_drawn_where_the_path_comes_near(tmp_path, figures, limit, drawn, sqrt):
    plot_frontier(ppo_rows((0, 1, None), (4, 2, None)), [], tmp_path / "f.png", kl_limit=limit, sqrt=sqrt)
    axes, _ = figures[0].axes
    assert [text.strip() for text in texts(axes)] == [f"limit {limit:g}"] * drawn
    if drawn:
        assert axes.get_xlim()[1] > limit


@pytest.mark.parametrize("sqrt", [False, True])
def test_a_limit_that_all_are_beyond_is_in_the_picture(tmp_path, figures, sqrt):
    plot_frontier(ppo_rows((500, 1, None), (501, 2, None)), [], tmp_path / "f.png", kl_limit=1.0, sqrt=sqrt)
    axes, _ = figures[0].axes
    assert texts(axes) == ["limit 1 "]
    low, high = axes.get_xlim()
    assert low < 1.0
    assert high > 501


def test_one_iteration_and_a_yardstick_alone_can_be_drawn(tmp_path, figures):
    plot_frontier(ppo_rows((6e-8, 1.0, None)), [], tmp_path / "f.png", sqrt=True)
    plot_frontier([], BEST_OF_N, tmp_path / "f.png")
    assert [len(figure.axes) for figure in figures] == [1, 2]  # and no bar of colours
    (yardstick, _) = figures[1].axes
    assert to_hex(yardstick.get_lines()[-1].get_color()) == GREEN


@pytest.mark.parametrize("rows", [[], [{"objective/score": 1.0}], ppo_rows((None, 1.0, 1.0), (math.nan, 2.0, 1.0))])
def test_a_frontier_without_points_is_an_error_and_makes_no_file(tmp_path, rows):
    with pytest.raises(NothingToDraw):
        plot_frontier(rows, [{"n": 4, "kl": None, "proxy": 1.0}], tmp_path / "f.png", evaluated={"kl": 1, "proxy": 1})
    assert list(tmp_path.iterdir()) == []


def test_scores_that_are_not_there_are_an_error_and_make_no_file(tmp_path):
    for rows in ([], [{"iteration": 0}], [{"objective/score": 1.0}], ppo_rows((1, None, math.nan))):
        with pytest.raises(NothingToDraw):
            plot_proxy_and_gold(rows, BEST_OF_N, tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attempt", range(3))
def test_odd_values_never_stop_a_picture(tmp_path, rng, attempt):
    def odd(value):
        return ODD[rng.integers(len(ODD))] if rng.random() < 0.4 else value

    rows = [{key: odd(x) for key, x in row.items()} for row in ppo_rows(*rng.normal(size=(6, 3)).tolist())]
    best = [{key: odd(x) for key, x in row.items()} for row in BEST_OF_N]
    results = {key: odd(x) for key, x in RESULTS.items()}
    results["reliability"] = odd([odd({key: odd(x) for key, x in row.items()}) for row in BINS])
    end = {"kl": odd(1.0), "proxy": odd(2.0), "gold": odd(3.0)}
    drawers = (
        lambda path: plot_proxy_and_gold(rows, best, path),
        lambda path: plot_frontier(rows, best, path, evaluated=end, kl_limit=number(odd(3.0)), sqrt=False),
        lambda path: plot_frontier(rows, best, path, evaluated=end, kl_limit=number(odd(3.0)), sqrt=True),
        lambda path: plot_reward_model(results, path, ceiling=odd(0.8)),
    )
    for i, draw in enumerate(drawers):
        try:
            draw(tmp_path / f"{i}.png")
        except NothingToDraw:
            assert not (tmp_path / f"{i}.png").exists()
        else:
            assert imread(tmp_path / f"{i}.png").ndim == 3
