"""Surrogates of the policy (Schulman et al. 2017 and what came after it)."""

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
from ppo_jax.errors import InputError

B, R = 5, 7
LENGTHS = [R, 1, 0, R - 1, 3]
COUNT = sum(LENGTHS)
EPS, HIGH, DUAL = 0.2, 0.4, 2.0
# One token: difference, bound, exponential (two), product; then a sum over COUNT tokens and a division.
OPS = COUNT + 8
# |log ratio| <= 1 and |advantage| <= 4 are drawn.
SCALE = 4 * math.e

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
SURROGATES = {
    "clip": (losses.clip_surrogate, {"clip_eps": EPS, "clip_eps_high": HIGH, "dual_clip": DUAL}),
    "gspo": (losses.gspo_surrogate, {"clip_eps": EPS, "clip_eps_high": HIGH}),
    "cispo": (losses.cispo_surrogate, {"clip_eps_high": HIGH}),
    "unclipped": (losses.unclipped_surrogate, {}),
}
every_surrogate = pytest.mark.parametrize("name", SURROGATES)


def draw(rng, batch: tuple[int, ...] = ()):
    """Draw logprobs, old_logprobs, advantages, mask; no ratio within 0.01 of a bound, where rounding picks the side."""
    old = float32(-rng.uniform(0.1, 5.0, size=(*batch, B, R)))
    log_ratio = np.clip(0.4 * rng.normal(size=old.shape), -1.0, 1.0)
    for bound in (1 - EPS, 1 + EPS, 1 + HIGH, DUAL):
        log_ratio = np.where(np.abs(np.exp(log_ratio) - bound) < 0.01, 0.0, log_ratio)
    advantages = float32(np.clip(rng.normal(size=old.shape), -4, 4))
    mask = np.broadcast_to(oracles.response_mask(LENGTHS, R), old.shape)
    return float32(old + log_ratio), old, advantages, mask


def stepper(name: str, aggregation: str = "token", **settings):
    """Jitted `(logprobs, old, advantages, mask) -> ((loss, [B, R] bool), gradient)`."""
    surrogate, defaults = SURROGATES[name]

    def total(logprobs, old, advantages, mask):
        loss, clipped = surrogate(logprobs, old, advantages, mask, **(settings or defaults))
        return jnp.sum(losses.aggregation_weights(mask, aggregation) * loss), clipped

    return jax.jit(jax.value_and_grad(total, has_aux=True))


default_step = functools.cache(stepper)
clip_step = functools.cache(functools.partial(stepper, "clip", clip_eps=EPS))


def one(x) -> np.ndarray:
    return float32([[x]])


# what other libraries compute


@pytest.mark.parametrize("name", GOLDEN["policy"])
def test_golden_of_verl(name):
    case = GOLDEN["policy"][name]
    mask = oracles.response_mask(GOLDEN["lengths"], 4)
    arguments = (float32(GOLDEN["logprobs"]), float32(GOLDEN["old_logprobs"]), float32(case["advantages"]), mask)
    (loss, clipped), grad = stepper(case["kind"], case["aggregation"], **case["settings"])(*arguments)
    # Log-probabilities up to 4 round at that size; ratios are at most 5, advantages 2, nine tokens.
    assert_close(loss, case["loss"], 20, 10)
    assert_close(grad, case["grad"], 20, 10)
    assert_close(np.mean(np.asarray(clipped)[mask]), case["clip_frac"], 1)


# by hand


def test_clip_golden():
    # ratio  2      2      4      0.5    1      8 (masked)
    # A      1     -1      0     -1      3      100
    # clip_eps 0.25: clipped ratio 1.25, 1.25, 1.25, 0.75, 1
    # -A r  -2      2      0      0.5   -3
    # -A c  -1.25   1.25   0      0.75  -3
    # max   -1.25*  2      0      0.75* -3    (* the clip binds)
    ratio = float32([[2.0, 2.0, 4.0, 0.5, 1.0, 8.0]])
    advantages = float32([[1.0, -1.0, 0.0, -1.0, 3.0, 100.0]])
    arguments = (np.log(ratio), np.zeros_like(ratio), advantages, oracles.response_mask([5], 6))
    loss, clipped = losses.clip_surrogate(*arguments, clip_eps=0.25)
    assert loss.dtype == jnp.float32
    assert_close(loss, [[-1.25, 2.0, 0.0, 0.75, -3.0, 0.0]], 8)
    np.testing.assert_array_equal(clipped, [[True, False, False, True, False, False]])
    # Up to 1 + 1.5 = 2.5 the first token may go; the dual clip caps the second's ratio at 1.75 (max(-A r) = 2 > 1.75).
    loss, clipped = losses.clip_surrogate(*arguments, clip_eps=0.25, clip_eps_high=1.5, dual_clip=1.75)
    assert_close(loss, [[-2.0, 1.75, 0.0, 0.75, -3.0, 0.0]], 8)
    np.testing.assert_array_equal(clipped, [[False, True, False, True, False, False]])


def test_gspo_golden():
    # log ratios 3 l, -l (l = log 2): mean l, ratio 2 for both. clip_eps 0.5, A = -1, 2: the first is -A r = 2 (the
    # unclipped is the larger), the second clipped to 1.5: -3. Second row: one token, log ratio -l: 0.5, A = 4, -2.
    log2 = math.log(2)
    logprobs = float32([[3 * log2, -log2, 5.0], [-log2, 9.0, 9.0]])
    advantages = float32([[-1.0, 2.0, 7.0], [4.0, 7.0, 7.0]])
    mask = oracles.response_mask([2, 1], 3)
    loss, clipped = losses.gspo_surrogate(logprobs, np.zeros_like(logprobs), advantages, mask, clip_eps=0.5)
    assert_close(loss, [[2.0, -3.0, 0.0], [-2.0, 0.0, 0.0]], 8)
    np.testing.assert_array_equal(clipped, [[False, True, False], [False, False, False]])


def test_cispo_golden():
    # ratio 4, 1/2, 2; weights at most 1 + 2 = 3: 3, 1/2, 2; A = 1, -2, 3; log-probability log 4, -log 2, log 2
    # -w A logp: -3 x 2 l, -(1/2)(-2)(-l), -2 x 3 x l = -6 l, -l, -6 l; gradient -w A = -3, 1, -6
    log2 = math.log(2)
    logprobs, advantages = float32([[2 * log2, -log2, log2, 3.0]]), float32([[1.0, -2.0, 3.0, 9.0]])
    mask = oracles.response_mask([3], 4)

    def total(x):
        loss, clipped = losses.cispo_surrogate(x, jnp.zeros_like(x), advantages, mask, clip_eps_high=2.0)
        return loss.sum(), (loss, clipped)

    grad, (loss, clipped) = jax.grad(total, has_aux=True)(logprobs)
    assert_close(loss, [[-6 * log2, -log2, -6 * log2, 0.0]], 8)
    assert_close(grad, [[-3.0, 1.0, -6.0, 0.0]], 8)
    np.testing.assert_array_equal(clipped, [[True, False, False, False]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    # d(-A r)/d logprob = -A r; the clip (0.2, dual 3) stops only what would go further the way the advantage points.
    [
        (2.0, 1.0, 0.0),
        (2.0, -1.0, 2.0),
        (4.0, -1.0, 0.0),
        (0.5, 1.0, -0.5),
        (0.5, -1.0, 0.0),
        (1.0, 3.0, -3.0),
        (1.1, 1.0, -1.1),
        (0.9, -1.0, 0.9),
    ],
)
def test_clip_gradient_golden(ratio, advantage, expected):
    def loss(x):
        return losses.clip_surrogate(x, one(0), one(advantage), one(1) > 0, clip_eps=EPS, dual_clip=3.0)[0].sum()

    assert_close(jax.grad(loss)(one(math.log(ratio))), [[expected]], 6)


# oracles


def test_clip_oracle(rng):
    arguments = draw(rng)
    (loss, clipped), grad = clip_step()(*arguments)
    expected, metrics, expected_grad = oracles.clipped_policy_loss(*arguments, EPS)
    assert_close(loss, expected, OPS, SCALE)
    assert_close(np.sum(clipped) / COUNT, metrics["clip_frac"], 1)
    np.testing.assert_array_equal(np.asarray(grad) == 0, expected_grad == 0)
    assert_close(grad, expected_grad, 8, SCALE / COUNT)


def asymmetric_oracle(logprobs, old, advantages, mask) -> float:
    """The papers' nesting of minimum and maximum, one token after the other."""
    found = []
    for new, before, a in zip(*(oracles.kept(x, mask) for x in (logprobs, old, advantages)), strict=True):
        ratio = math.exp(new - before)
        gain = min(ratio * a, min(max(ratio, 1 - EPS), 1 + HIGH) * a)  # DAPO, equation 10
        found.append(-max(gain, DUAL * a) if a < 0 else -gain)  # the dual clip
    return oracles.mean(found)


def test_clip_with_all_its_settings_and_its_gradient(rng):
    logprobs, *others = draw(rng)
    (loss, clipped), grad = default_step("clip")(logprobs, *others)
    assert_close(loss, asymmetric_oracle(logprobs, *others), OPS, SCALE)
    expected = oracles.finite_difference(lambda x: asymmetric_oracle(x, *others), logprobs)
    assert_close(grad, expected, 8, SCALE / COUNT)
    _, advantages, mask = others
    np.testing.assert_array_equal(np.asarray(clipped), mask & (np.asarray(grad) == 0) & (advantages != 0))


def gspo_oracle(logprobs, old, advantage, mask) -> float:
    """Equation 5 of Zheng et al.: one ratio, one advantage and one term for each response."""
    found = []
    for row in range(len(mask)):
        if not mask[row].any():
            continue
        new, before = (oracles.kept(x[row], mask[row]) for x in (logprobs, old))
        ratio = math.exp((math.fsum(new) - math.fsum(before)) / len(new))
        a = float(advantage[row])
        found.append(min(ratio * a, min(max(ratio, 1 - EPS), 1 + HIGH) * a))
    return -oracles.mean(found)


def test_gspo_with_one_advantage_a_response_is_the_papers_with_its_gradient(rng):
    logprobs, old, advantages, mask = draw(rng)
    same = np.repeat(advantages[:, :1], R, axis=1)
    # The mean log ratio of a response, drawn wider, has to keep away from the bounds too.
    logprobs = float32(old + np.where(rng.random((B, 1)) < 0.5, 3.0, 0.3) * (logprobs - old))
    for row in range(B):
        shift = np.mean((logprobs - old)[row], where=mask[row]) if mask[row].any() else 0.0
        if min(abs(math.exp(shift) - bound) for bound in (1 - EPS, 1 + HIGH)) < 0.01:
            logprobs[row] = old[row]
    (loss, _), grad = stepper("gspo", "sequence", **SURROGATES["gspo"][1])(logprobs, old, same, mask)
    scale = 4 * math.exp(3)
    assert_close(loss, gspo_oracle(logprobs, old, same[:, 0], mask), OPS, scale)
    expected = oracles.finite_difference(lambda x: gspo_oracle(x, old, same[:, 0], mask), logprobs)
    assert_close(grad, expected, OPS, scale)


def test_gspo_gives_each_token_its_own_credit(rng):
    # d/d logprob_t = -A_t s / count inside the clip: a token without an advantage has no gradient, whatever the others.
    logprobs, old, advantages, mask = draw(rng)
    logprobs = float32(old + 0.1 * (logprobs - old))
    advantages[:, ::2] = 0
    (_, clipped), grad = default_step("gspo")(logprobs, old, advantages, mask)
    assert not np.any(clipped)
    log_ratio = np.where(mask, np.float64(logprobs) - np.float64(old), 0.0)
    ratio = np.exp(log_ratio.sum(axis=1) / np.maximum(mask.sum(axis=1), 1))
    assert_close(grad, np.where(mask, -advantages * ratio[:, None] / COUNT, 0.0), OPS, 4 / COUNT)


# identities


def test_gspo_of_one_token_is_the_clip(rng):
    logprobs, old, advantages, _ = draw(rng)
    mask = oracles.response_mask([1] * B, R)
    settings = {"clip_eps": EPS, "clip_eps_high": HIGH}
    sequence, token = (stepper(name, **settings)(logprobs, old, advantages, mask) for name in ("gspo", "clip"))
    for a, e in zip(jax.tree.leaves(sequence), jax.tree.leaves(token), strict=True):
        np.testing.assert_array_equal(a, e)


@every_surrogate
def test_on_policy_every_gradient_is_that_of_reinforce(rng, name):
    logprobs, _, advantages, mask = draw(rng)
    (loss, clipped), grad = default_step(name)(logprobs, logprobs, advantages, mask)
    assert not np.any(clipped)
    assert_close(grad, np.where(mask, -advantages / COUNT, 0.0), 4, 4 / COUNT)
    # So is the value, of all but CISPO's: minus the mean advantage.
    values = advantages * np.float64(logprobs) if name == "cispo" else advantages
    assert_close(loss, -oracles.mean(oracles.kept(values, mask)), OPS, 20)


def test_cispo_with_a_high_cap_has_the_unclipped_gradient(rng):
    arguments = draw(rng)
    actual = stepper("cispo", clip_eps_high=10.0)(*arguments)[1]
    assert_close(actual, default_step("unclipped")(*arguments)[1], 8, SCALE / COUNT)


def test_cispo_gradient_of_a_truncated_token_is_that_of_the_cap(rng):
    logprobs, old, advantages, mask = draw(rng)
    (_, clipped), grad = default_step("cispo")(logprobs, old, advantages, mask)
    weight = np.minimum(np.exp(np.float64(logprobs) - np.float64(old)), 1 + HIGH)
    assert_close(grad, np.where(mask, -weight * advantages / COUNT, 0.0), 8, SCALE / COUNT)
    np.testing.assert_array_equal(np.asarray(clipped), mask & (weight == 1 + HIGH))


def test_unclipped_and_a_wide_clip_are_the_mean_of_ratio_times_advantage(rng):
    arguments = draw(rng)
    logprobs, old, advantages, mask = arguments
    ratio = np.exp(np.float64(logprobs) - np.float64(old))
    for step in (default_step("unclipped"), stepper("clip", clip_eps=100.0)):
        (loss, clipped), grad = step(*arguments)
        assert_close(loss, -oracles.mean(oracles.kept(ratio * advantages, mask)), OPS, SCALE)
        assert_close(grad, np.where(mask, -ratio * advantages / COUNT, 0.0), 8, SCALE / COUNT)
        assert not np.any(clipped)


def test_dual_clip_touches_nothing_but_large_ratios_of_negative_advantages(rng):
    logprobs, old, advantages, mask = draw(rng)
    plain, dual = (
        losses.clip_surrogate(logprobs, old, advantages, mask, clip_eps=EPS, dual_clip=c)[0] for c in (0.0, DUAL)
    )
    touched = mask & (advantages < 0) & (logprobs - old > math.log(DUAL))
    np.testing.assert_array_equal(np.asarray(dual)[~touched], np.asarray(plain)[~touched])
    assert_close(np.asarray(dual)[touched], -DUAL * advantages[touched], 4, 8)


@every_surrogate
def test_the_gradient_by_the_old_policy_is_that_of_a_ratio(rng, name):
    # The loss is a function of logprobs - old_logprobs: the two gradients are opposite, nothing else enters. GSPO's and
    # CISPO's slopes are the token's own: nothing flows into the old policy of the one, and of the other into nothing.
    logprobs, old, advantages, mask = draw(rng)
    surrogate, settings = SURROGATES[name]
    new_grad, old_grad = jax.grad(lambda x, y: surrogate(x, y, advantages, mask, **settings)[0].sum(), argnums=(0, 1))(
        logprobs, old
    )
    expected = np.zeros_like(old) if name == "cispo" else -np.asarray(new_grad)
    assert_close(old_grad, expected, 8, SCALE)


# masks, extremes, shapes


@every_surrogate
@pytest.mark.parametrize("garbage", [50.0, 1e30, -math.inf, math.nan])
def test_padding_changes_neither_value_nor_gradient(rng, name, garbage):
    logprobs, old, advantages, mask = draw(rng)
    padded = (
        oracles.pad(np.where(mask, logprobs, np.float32(garbage)), 3, garbage),
        oracles.pad(np.where(mask, old, np.float32(0)), 3, 0.0),
        oracles.pad(np.where(mask, advantages, np.float32(garbage)), 3, -9.0),
        oracles.pad(mask, 3, False),
    )
    (loss, clipped), grad = default_step(name)(logprobs, old, advantages, mask)
    (padded_loss, padded_clipped), padded_grad = default_step(name)(*padded)
    assert_close(padded_loss, loss, OPS, SCALE)
    np.testing.assert_array_equal(padded_clipped, oracles.pad(clipped, 3, False))
    np.testing.assert_array_equal(np.asarray(padded_grad)[~padded[3]], 0)
    assert_close(padded_grad, oracles.pad(grad, 3, 0.0), 4, SCALE / COUNT)


@every_surrogate
def test_an_empty_batch_costs_nothing_with_zero_gradient(rng, name):
    logprobs, old, advantages, mask = draw(rng)
    (loss, clipped), grad = default_step(name)(logprobs, old, advantages, np.zeros_like(mask))
    assert loss == 0
    assert not np.any(clipped)
    np.testing.assert_array_equal(grad, np.zeros((B, R)))


# Not GSPO where the advantage is negative: without a dual clip its loss is infinite there, and is to be seen.
@pytest.mark.parametrize(
    ("name", "advantage"),
    [("gspo", 1.0), ("gspo", 0.0), *((name, a) for name in ("clip", "cispo") for a in (1.0, 0.0, -1.0))],
)
def test_a_ratio_beyond_float32_is_clipped_with_a_finite_gradient(name, advantage):
    # exp(200) is infinite: clipped after exp, its gradient would be 0 x inf.
    (loss, clipped), grad = default_step(name)(one(200), one(0), one(advantage), one(1) > 0)
    high = DUAL if advantage < 0 and name == "clip" else 1 + HIGH
    value = 200.0 if name == "cispo" else 1.0  # CISPO's is a log-probability, of which that is the slope
    assert_close(loss, -advantage * high * value, 8, 500)
    assert_close(grad, [[-advantage * high if name == "cispo" else 0.0]], 8)
    assert bool(clipped[0, 0]) == (advantage != 0 or name == "cispo")


@every_surrogate
@pytest.mark.parametrize("wrong", range(4))
def test_mismatched_shapes_are_refused(rng, name, wrong):
    arguments = list(draw(rng))
    arguments[wrong] = arguments[wrong][:, :-1]
    surrogate, settings = SURROGATES[name]
    with pytest.raises(AssertionError):
        surrogate(*arguments, **settings)


def test_vmapped_over_batches_and_settings(rng):
    arguments = draw(rng, (3,))
    low, high, dual = float32([0.1, 0.3, 5.0]), float32([0.0, 0.5, 0.0]), float32([0.0, 2.5, 1.5])

    def surrogate(arguments, low, high, dual):
        return losses.clip_surrogate(*arguments, clip_eps=low, clip_eps_high=high, dual_clip=dual)[0]

    mapped = jax.jit(jax.vmap(surrogate))(arguments, low, high, dual)
    for i in range(3):
        settings = (float(low[i]), float(high[i]), float(dual[i]))
        assert_close(mapped[i], surrogate([x[i] for x in arguments], *settings), 8, SCALE)


def test_cispo_wants_a_cap(rng):
    with pytest.raises(InputError, match=r"clip_eps_high: got 0.0, expected a number above 0"):
        losses.cispo_surrogate(*draw(rng), clip_eps_high=0.0)
