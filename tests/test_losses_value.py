"""The critic's errors: clipped (baselines' ppo2), squared, Huber's."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import assert_close, float32

from ppo_jax import losses

B, R = 5, 7
LENGTHS = [R, 1, 0, R - 1, 3]
COUNT = sum(LENGTHS)
EPS, DELTA = 0.2, 0.7
OPS = COUNT + 8
ERRORS = {
    "clipped": (losses.clipped_value_error, {"value_clip_eps": EPS}),
    "squared": (losses.squared_value_error, {}),
    "huber": (losses.huber_value_error, {"huber_delta": DELTA}),
}
every_error = pytest.mark.parametrize("name", ERRORS)
GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())


def draw(rng, batch: tuple[int, ...] = ()):
    """Draw values, old_values, returns, mask; none within 0.01 of a bound or of a tie of the two clipped errors."""
    old = rng.normal(size=(*batch, B, R))
    returns = np.clip(rng.normal(size=old.shape), -3, 3)
    move = np.clip(0.4 * rng.normal(size=old.shape), -1.0, 1.0)
    clipped = np.clip(move, -EPS, EPS)
    tie = np.abs(np.abs(old + move - returns) - np.abs(old + clipped - returns)) < 0.01
    move = np.where((np.abs(np.abs(move) - EPS) < 0.01) | tie, 0.1, move)
    returns = np.where(np.abs(np.abs(old + move - returns) - DELTA) < 0.01, old + move, returns)
    mask = np.broadcast_to(oracles.response_mask(LENGTHS, R), old.shape)
    return float32(old + move), float32(old), float32(returns), mask


@functools.cache
def step(name: str, **settings):
    """Jitted `(values, old, returns, mask) -> ((mean error, [B, R] bool), gradient)`."""
    error_of, defaults = ERRORS[name]

    def mean(values, old, returns, mask):
        error, clipped = error_of(values, old, returns, mask, **(settings or defaults))
        return jnp.sum(losses.aggregation_weights(mask, "token") * error), clipped

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


@every_error
def test_golden_of_verl_and_torch(name):
    golden = GOLDEN["value"]
    case = golden["errors"][name]
    arrays = [float32(golden[key]) for key in ("values", "old_values", "returns")]
    mask = oracles.response_mask(GOLDEN["lengths"], 4)
    (loss, _), grad = step(name, **case["settings"])(*arrays, mask)
    assert_close(loss, case["loss"], 20, 8)
    assert_close(grad, case["grad"], 10, 4)


def test_clipped_golden():
    # old 0, clip_eps 0.5
    # v        2      2      0.25   -2      0.5    9 (masked)
    # clipped  0.5    0.5    0.25   -0.5    0.5
    # R        3      0      1.25   -3     -1
    # (v-R)^2  1      4      1       1      2.25
    # (c-R)^2  6.25   0.25   1       6.25   2.25
    # max      6.25*  4      1       6.25*  2.25   (* the clip binds)
    values = float32([[2.0, 2.0, 0.25, -2.0, 0.5, 9.0]])
    returns = float32([[3.0, 0.0, 1.25, -3.0, -1.0, 0.0]])
    error, clipped = losses.clipped_value_error(
        values, np.zeros_like(values), returns, oracles.response_mask([5], 6), value_clip_eps=0.5
    )
    assert error.dtype == jnp.float32
    np.testing.assert_array_equal(error, [[3.125, 2.0, 0.5, 3.125, 1.125, 0.0]])  # halves of exact squares
    np.testing.assert_array_equal(clipped, [[True, False, False, True, False, False]])


def test_huber_golden():
    # delta 2; v - R: 1, -1, 2, 3, -5 and 9, which is masked: 1/2, 1/2, 2, 2 (3 - 1) = 4, 2 (5 - 1) = 8; slopes v - R
    # up to 2, then +-2.
    values = float32([[2.0, 0.0, 3.0, 4.0, -4.0, 9.0]])
    arguments = (np.zeros_like(values), np.ones_like(values), oracles.response_mask([5], 6))

    def total(values):
        error, clipped = losses.huber_value_error(values, *arguments, huber_delta=2.0)
        return error.sum(), (error, clipped)

    grad, (error, clipped) = jax.grad(total, has_aux=True)(values)
    np.testing.assert_array_equal(error, [[0.5, 0.5, 2.0, 4.0, 8.0, 0.0]])
    np.testing.assert_array_equal(grad, [[1, -1, 2, 2, -2, 0]])
    np.testing.assert_array_equal(clipped, [[False, False, False, True, True, False]])


def test_clipped_oracle(rng):
    arguments = draw(rng)
    (loss, clipped), grad = step("clipped")(*arguments)
    expected, clip_frac, expected_grad = oracles.clipped_value_loss(*arguments, EPS)
    # Errors reach 8 (returns 3, values about 5), squares 64.
    assert_close(loss, expected, OPS, 64)
    assert_close(np.sum(clipped) / COUNT, clip_frac, 1)
    np.testing.assert_array_equal(np.asarray(grad) == 0, expected_grad == 0)
    assert_close(grad, expected_grad, 8, 8 / COUNT)


def oracle(name: str, values, old, returns, mask) -> float:
    found = []
    for value, before, target in zip(*(oracles.kept(x, mask) for x in (values, old, returns)), strict=True):
        error = abs(value - target)
        if name == "clipped":
            error = max(error, abs(before + min(max(value - before, -EPS), EPS) - target))
        straight = name == "huber" and error > DELTA
        found.append(DELTA * error - DELTA**2 / 2 if straight else error**2 / 2)
    return oracles.mean(found)


@every_error
def test_oracle_and_gradient(rng, name):
    values, *others = draw(rng)
    (loss, _), grad = step(name)(values, *others)
    assert_close(loss, oracle(name, values, *others), OPS, 64)
    expected = oracles.finite_difference(lambda x: oracle(name, x, *others), values)
    assert_close(grad, expected, 8, 8 / COUNT)


def test_huber_gradient_is_the_errors_cut_to_delta(rng):
    values, old, returns, mask = draw(rng)
    (_, clipped), grad = step("huber")(values, old, returns, mask)
    error = np.where(mask, np.float64(values) - np.float64(returns), 0.0)
    assert_close(grad, np.clip(error, -DELTA, DELTA) / COUNT, 8, 8 / COUNT)
    np.testing.assert_array_equal(np.asarray(clipped), np.abs(error) > DELTA)


@pytest.mark.parametrize(
    ("value", "target", "expected"),
    # old 0, clip_eps 0.5. Toward the return beyond the interval: stopped. Away from it: pulled back. Inside: v - R.
    [(2.0, 3.0, 0.0), (-2.0, -3.0, 0.0), (2.0, 0.0, 2.0), (-2.0, 0.0, -2.0), (0.25, 1.0, -0.75), (0.0, 1.0, -1.0)],
)
def test_clipped_gradient_golden(value, target, expected):
    one = np.ones((1, 1), np.float32)
    (_, clipped), grad = step("clipped", value_clip_eps=0.5)(value * one, 0 * one, target * one, one > 0)
    assert_close(grad, [[expected]], 3, scale=2)
    assert bool(clipped[0, 0]) == (expected == 0)


def test_without_a_limit_all_are_half_the_mean_squared_error(rng):
    values, old, returns, mask = draw(rng)
    expected = 0.5 * oracles.mean([x * x for x in oracles.kept(np.float64(values) - np.float64(returns), mask)])
    limits = {"clipped": {"value_clip_eps": math.inf}, "squared": {}, "huber": {"huber_delta": math.inf}}
    for name, settings in limits.items():
        (loss, clipped), grad = step(name, **settings)(values, old, returns, mask)
        assert_close(loss, expected, OPS, 64)
        assert_close(grad, np.where(mask, np.float64(values) - returns, 0.0) / COUNT, 8, 8 / COUNT)
        assert not np.any(clipped)


@every_error
@pytest.mark.parametrize("garbage", [50.0, 1e30, -math.inf, math.nan])
def test_padding_changes_neither_value_nor_gradient(rng, name, garbage):
    values, old, returns, mask = draw(rng)
    padded = (
        oracles.pad(np.where(mask, values, np.float32(garbage)), 3, garbage),
        oracles.pad(old, 3, 0.0),
        oracles.pad(np.where(mask, returns, np.float32(garbage)), 3, 7.0),
        oracles.pad(mask, 3, False),
    )
    (loss, clipped), grad = step(name)(values, old, returns, mask)
    (padded_loss, padded_clipped), padded_grad = step(name)(*padded)
    assert_close(padded_loss, loss, OPS, 64)
    np.testing.assert_array_equal(padded_clipped, oracles.pad(clipped, 3, False))
    np.testing.assert_array_equal(padded_grad, oracles.pad(np.where(mask, grad, 0), 3, 0.0))


@every_error
def test_an_empty_batch_costs_nothing_with_zero_gradient(rng, name):
    values, old, returns, mask = draw(rng)
    (loss, clipped), grad = step(name)(values, old, returns, np.zeros_like(mask))
    assert loss == 0
    assert not np.any(clipped)
    np.testing.assert_array_equal(grad, np.zeros((B, R)))


@pytest.mark.parametrize("name", ["clipped", "huber"])
def test_vmapped_over_batches_and_settings(rng, name):
    arguments = draw(rng, (3,))
    error_of, (setting,) = ERRORS[name]
    limits = float32([0.1, EPS, 100.0])
    mapped, _ = jax.jit(jax.vmap(lambda x, limit: error_of(*x, **{setting: limit})))(arguments, limits)
    for i in range(3):
        single, _ = error_of(*(x[i] for x in arguments), **{setting: float(limits[i])})
        assert_close(mapped[i], single, 4, 64)


@every_error
@pytest.mark.parametrize("wrong", range(4))
def test_mismatched_shapes_are_refused(rng, name, wrong):
    arguments = list(draw(rng))
    arguments[wrong] = arguments[wrong][:, :-1]
    error_of, settings = ERRORS[name]
    with pytest.raises(AssertionError):
        error_of(*arguments, **settings)
