"""KL estimators (Schulman 2020), KL-shaped rewards and the adaptive coefficient (Ziegler et al. 2019)."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import EPS32, assert_close, float32

from ppo_jax import kl

GOLDEN = Path(__file__).parent / "golden"
ESTIMATORS = [name for name in kl.KL_ESTIMATORS if name != "exact"]
B, R = 5, 6
# Full, EOS as the very first token, empty, one before full, two tokens.
LENGTHS = [R, 1, 0, R - 1, 2]
# Difference, exponential (two roundings), two sums, coefficient, score: at most ten; |log ratio| < 4 is drawn.
OPS, SCALE = 10, math.exp(4)


def draw(rng):
    """logprobs, ref_logprobs."""
    ref = -rng.uniform(0.1, 5.0, size=(B, R))
    return float32(ref + np.clip(rng.normal(size=ref.shape), -3.9, 3.9)), float32(ref)


def draw_rewards(rng, batch: tuple[int, ...] = ()):
    """scores, kl, mask, token_scores."""
    scores, token_scores = float32(rng.normal(size=(*batch, B))), float32(rng.normal(size=(*batch, B, R)))
    mask = np.broadcast_to(oracles.response_mask(LENGTHS, R), token_scores.shape)
    return scores, float32(rng.uniform(-1.0, 4.0, size=mask.shape)), mask, token_scores


def estimate_oracle(logprob, ref_logprob, estimator: str, clamp: float = math.inf) -> tuple[float, float]:
    """(value, slope in the policy's logprob), by cases in float64."""
    log_ratio = float(logprob) - float(ref_logprob)
    slope_of_clamp = 1.0 if abs(log_ratio) < clamp else 0.0
    log_ratio = clamp if log_ratio > clamp else -clamp if log_ratio < -clamp else log_ratio
    k2, k3 = log_ratio**2 / 2, 1 / math.exp(log_ratio) - 1 + log_ratio
    value = {"k1": log_ratio, "k2": k2, "k3": k3, "abs": math.fabs(log_ratio), "k3_k2": k3}[estimator]
    slopes = {"k1": 1.0, "k2": log_ratio, "k3": 1 - 1 / math.exp(log_ratio), "abs": math.copysign(1.0, log_ratio)}
    return value, slope_of_clamp * slopes["k2" if estimator == "k3_k2" else estimator]


def estimates_oracle(logprobs, ref, estimator: str, clamp: float = math.inf) -> tuple[np.ndarray, np.ndarray]:
    pairs = [
        [estimate_oracle(*pair, estimator, clamp) for pair in zip(*rows, strict=True)]
        for rows in zip(logprobs, ref, strict=True)
    ]
    values, slopes = np.moveaxis(np.array(pairs), -1, 0)
    return values, slopes


def rewards_oracle(scores, penalties, mask, kl_coef: float, token_scores) -> np.ndarray:
    rewards = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        kept = [t for t, counts in enumerate(row) if counts]
        for t in kept:
            rewards[b, t] = float(token_scores[b][t]) - kl_coef * float(penalties[b][t])
        if kept:
            rewards[b, kept[-1]] += float(scores[b])
    return rewards


def log_distributions(rng, size: int):
    """Two float32 rows of logprobs, each normalised as well as float32 can hold."""
    return [float32(oracles.log_softmax(row)) for row in rng.normal(size=(2, size))]


# estimators


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # lr = log 2: the policy gives the token twice the reference's probability. log 2 = 0.6931471805599453
        ("k1", 0.6931471805599453),
        # 0.6931471805599453^2 / 2 = 0.4804530139182014 / 2
        ("k2", 0.2402265069591007),
        # 1/2 - 1 + 0.6931471805599453
        ("k3", 0.1931471805599453),
        ("abs", 0.6931471805599453),
        # the value of k3
        ("k3_k2", 0.1931471805599453),
    ],
)
def test_estimate_golden(estimator, expected):
    # log 0.5 = -0.6931..., log 0.25 = -1.3862...
    actual = kl.kl_estimate(jnp.array([-0.6931471805599453]), jnp.array([-1.3862943611198906]), estimator)
    assert_close(actual, [expected], 4)


@pytest.mark.parametrize(
    ("estimator", "expected", "slope"),
    [
        # lr = -log 2: half the reference's probability; exp(-lr) = 2. Slopes 1, lr, 1 - exp(-lr), sign(lr), and lr.
        ("k1", -0.6931471805599453, 1.0),
        ("k2", 0.2402265069591007, -0.6931471805599453),
        ("k3", 2 - 1 - 0.6931471805599453, 1 - 2),
        ("abs", 0.6931471805599453, -1.0),
        ("k3_k2", 2 - 1 - 0.6931471805599453, -0.6931471805599453),
    ],
)
def test_estimate_golden_below_the_reference_with_its_slope(estimator, expected, slope):
    value, grad = jax.value_and_grad(lambda p: kl.kl_estimate(p, jnp.float32(-1.0), estimator))(-1.6931471805599453)
    assert_close(value, expected, 4)
    assert_close(grad, slope, 4)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_estimate_and_gradient_agree_with_verl(estimator):
    record = json.loads((GOLDEN / "verl.json").read_text())["kl"]
    ref = float32(record["ref_logprobs"])
    logprobs, (values, slopes) = float32(record["logprobs"]), record["results"][estimator]
    assert_close(kl.kl_estimate(logprobs, ref, estimator), values, OPS, SCALE)
    assert_close(jax.grad(lambda p: kl.kl_estimate(p, ref, estimator).sum())(logprobs), slopes, OPS, SCALE)


@pytest.mark.parametrize("clamp", [math.inf, 0.75])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimate_oracle(rng, estimator, clamp):
    logprobs, ref = draw(rng)
    actual = kl.kl_estimate(logprobs, ref, estimator, clamp)
    assert actual.dtype == jnp.float32
    assert_close(actual, estimates_oracle(logprobs, ref, estimator, clamp)[0], OPS, SCALE)


@pytest.mark.parametrize(
    ("estimator", "above", "below"),
    [
        # lr = +-5 clamped to +-1: exp(-1) = 0.36787944, exp(1) = 2.71828183
        ("k1", 1.0, -1.0),
        ("k2", 0.5, 0.5),
        ("k3", 0.36787944117144233, 0.7182818284590451),
        ("abs", 1.0, 1.0),
        ("k3_k2", 0.36787944117144233, 0.7182818284590451),
    ],
)
def test_the_clamp_bounds_the_log_ratio_on_both_sides(estimator, above, below):
    actual = kl.kl_estimate(jnp.array([-1.0, -6.0]), jnp.array([-6.0, -1.0]), estimator, clamp=1.0)
    assert_close(actual, [above, below], OPS)


@pytest.mark.parametrize("estimator", ["k3", "k3_k2"])
def test_a_clamp_keeps_k3_finite_with_its_gradient(estimator):
    # The policy has given up a token that the reference likes: exp(100) is beyond float32.
    def at(clamp):
        return jax.value_and_grad(lambda p: kl.kl_estimate(p, jnp.float32(-0.1), estimator, clamp))(-100.1)

    assert math.isinf(at(math.inf)[0])
    value, grad = at(10.0)
    assert_close(value, math.exp(10) - 11, OPS, math.exp(10))
    assert float(grad) == 0.0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimate_of_equal_policies_is_exactly_zero(rng, estimator):
    logprobs, _ = draw(rng)
    np.testing.assert_array_equal(kl.kl_estimate(logprobs, logprobs, estimator), np.zeros((B, R)))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_under_the_policy_is_the_exact_kl(rng, estimator):
    # Enumerating a vocabulary of 7 leaves no sampling error. What is left of "exactly": the estimator's own 8 roundings
    # of values up to exp(max |lr|) and, for k3, sum(p) and sum(q), which float32 logprobs leave 7 eps32 from 1.
    logp, logq = (np.float64(row) for row in log_distributions(rng, 7))
    exact = math.fsum(math.exp(p) * (p - q) for p, q in zip(logp, logq, strict=True))
    estimates = np.asarray(kl.kl_estimate(float32(logp), float32(logq), estimator), np.float64)
    scale = math.exp(float(np.abs(logp - logq).max()))
    assert_close(math.fsum(np.exp(logp) * estimates), exact, 8 + 14, scale)


def test_k1_is_not_unbiased_under_the_reference(rng):
    # The direction matters: under q, the mean of k1 is -KL(q||p), which is negative.
    logp, logq = log_distributions(rng, 7)
    estimates = np.asarray(kl.kl_estimate(logp, logq, "k1"), np.float64)
    reverse = math.fsum(math.exp(q) * (q - p) for p, q in zip(np.float64(logp), np.float64(logq), strict=True))
    assert_close(math.fsum(np.exp(np.float64(logq)) * estimates), -reverse, 8, scale=8)


def test_k2_approaches_the_kl_from_second_order(rng):
    # E_p[k2] and KL(p||q) share their second-order term: for logits that differ by h the relative difference is O(h).
    # |third-order term| <= E|lr|^3 / 2 with |lr| <= 2h, against a KL of about h^2 Var(direction) / 2.
    logits, direction = rng.normal(size=5), np.array([1.0, -1.0, 0.5, -0.5, 0.0])
    h = 0.02
    logp, logq = oracles.log_softmax(logits), oracles.log_softmax(logits + h * direction)
    exact = math.fsum(math.exp(p) * (p - q) for p, q in zip(logp, logq, strict=True))
    k2 = np.asarray(kl.kl_estimate(float32(logp), float32(logq), "k2"), np.float64)
    third = math.fsum(math.exp(p) * abs(p - q) ** 3 for p, q in zip(logp, logq, strict=True))
    # logprobs of size 8 carry 8 eps32, times |lr| <= 2h.
    assert abs(math.fsum(np.exp(logp) * k2) - exact) <= third / 2 + 4 * 8 * EPS32 * 2 * h


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs", "k3_k2"])
def test_all_but_k1_are_never_negative(rng, estimator):
    logprobs, ref = draw(rng)
    assert (np.asarray(kl.kl_estimate(logprobs, ref, estimator)) >= 0).all()


def test_k3_keeps_its_digits_near_zero():
    # k3 is lr^2 / 2 - lr^3 / 6: 5e-9 here. exp(-lr) - 1 would be off by eps32 = 1.2e-7; the error must scale with lr.
    lr = float32([1e-4, -1e-4, 3e-5, -2e-6])
    actual = kl.kl_estimate(lr, np.zeros_like(lr), "k3")
    expected = [oracles.kl_estimate(x, 0.0, "k3") for x in lr]
    assert_close(actual, expected, 2, scale=1e-4)


@pytest.mark.parametrize("clamp", [math.inf, 0.75])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimate_gradient(rng, estimator, clamp):
    logprobs, ref = draw(rng)
    gradient = jax.grad(lambda p, q: kl.kl_estimate(p, q, estimator, clamp).sum(), argnums=(0, 1))
    expected = estimates_oracle(logprobs, ref, estimator, clamp)[1]
    for actual, sign in zip(gradient(logprobs, ref), (1, -1), strict=True):
        assert_close(actual, sign * expected, OPS, SCALE)


def test_straight_through_is_exactly_the_value_of_k3_with_exactly_the_gradient_of_k2(rng):
    logprobs, ref = draw(rng)

    def of(estimator):
        # Operation by operation: two compiled programs may round the same expm1 differently.
        return jax.vjp(lambda p: kl.kl_estimate(p, ref, estimator), logprobs)

    (value, pull), (k3, _), (_, k2_pull) = (of(name) for name in ("k3_k2", "k3", "k2"))
    np.testing.assert_array_equal(value, k3)
    np.testing.assert_array_equal(pull(jnp.ones_like(value)), k2_pull(jnp.ones_like(value)))
    assert (np.asarray(value) != np.asarray(kl.kl_estimate(logprobs, ref, "k2"))).any()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_k2"])
def test_expected_gradient_of_a_loss_over_sampled_tokens(rng, estimator):
    # sum_v p_v d estimate_v / d logits, over all tokens of a vocabulary of 7. With estimates' slopes s_v and
    # d log p_v / d logit_u = [u = v] - p_u it is p_u (s_u - sum_v p_v s_v): for k1 zero, for k2 that of KL(p || q),
    # p_u (lr_u - KL), for k3 that of KL(q || p), p_u - q_u.
    logits, logq = float32(rng.normal(size=7)), log_distributions(rng, 7)[0]

    def loss(z):
        logp = jax.nn.log_softmax(z)
        return (jax.lax.stop_gradient(jnp.exp(logp)) * kl.kl_estimate(logp, logq, estimator)).sum()

    p, q = np.exp(oracles.log_softmax(logits)), np.exp(np.float64(logq))
    forward = p * (np.log(p / q) - (p * np.log(p / q)).sum())
    expected = {"k1": np.zeros(7), "k2": forward, "k3": p - q, "k3_k2": forward}[estimator]
    # As many roundings as an estimate and a softmax over 7 have; the largest number is max q / p.
    assert_close(jax.grad(loss)(logits), expected, OPS + 2 * 14, max(8.0, float((q / p).max())))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimate_under_jit_and_vmap(rng, estimator):
    logprobs, ref = draw(rng)
    eager = kl.kl_estimate(logprobs, ref, estimator)
    mapped = jax.jit(jax.vmap(functools.partial(kl.kl_estimate, estimator=estimator)))(logprobs, ref)
    assert_close(mapped, eager, OPS, SCALE)


@pytest.mark.parametrize("estimator", ["k4", "K1", ""])
def test_unknown_estimator_is_a_value_error_that_lists_the_known(estimator):
    with pytest.raises(ValueError, match=r"k1.*k2.*k3") as error:
        kl.kl_estimate(jnp.zeros(2), jnp.zeros(2), estimator)
    assert repr(estimator) in str(error.value)


def test_the_exact_kl_is_no_estimate_from_a_token():
    assert "exact" in kl.KL_ESTIMATORS
    with pytest.raises(ValueError, match="exact"):
        kl.kl_estimate(jnp.zeros(2), jnp.zeros(2), "exact")


# rewards


def test_rewards_golden():
    # kl_coef 0.5. Rows: three tokens kept of four; EOS as the first token; nothing; all (no EOS). kl 1, -2, 3, 4 each.
    # row 0, score 10: -0.5, +1, -1.5 + 10 = 8.5, 0          row 1, score 20: -0.5 + 20 = 19.5, 0, 0, 0
    # row 2, score 30: zeros                                 row 3, score 40: -0.5, 1, -1.5, -2 + 40 = 38
    penalties = jnp.tile(jnp.array([1.0, -2.0, 3.0, 4.0]), (4, 1))
    mask = oracles.response_mask([3, 1, 0, 4], 4)
    scores = jnp.array([10.0, 20.0, 30.0, 40.0])
    expected = [[-0.5, 1.0, 8.5, 0.0], [19.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-0.5, 1.0, -1.5, 38.0]]
    np.testing.assert_array_equal(kl.kl_shaped_rewards(scores, penalties, mask, 0.5), expected)
    # Dense scores 0.25 on every token, kept or not: kept tokens get them on top.
    dense = kl.kl_shaped_rewards(scores, penalties, mask, 0.5, jnp.full((4, 4), 0.25))
    np.testing.assert_array_equal(dense, np.array(expected) + 0.25 * mask)


def test_rewards_golden_with_a_mask_that_starts_late_or_has_a_hole():
    # No penalty: score 5 on the last kept token and nowhere else, whatever lies before it.
    mask = np.array([[False, True, True, False], [True, False, True, False], [False, False, False, True]])
    actual = kl.kl_shaped_rewards(jnp.full(3, 5.0), jnp.ones((3, 4)), mask, 0.0)
    np.testing.assert_array_equal(actual, [[0, 0, 5, 0], [0, 0, 5, 0], [0, 0, 0, 5]])


@pytest.mark.parametrize("dense", [False, True])
def test_rewards_oracle(rng, dense):
    *arguments, token_scores = draw_rewards(rng)
    actual = kl.kl_shaped_rewards(*arguments, 0.3, token_scores if dense else None)
    assert actual.dtype == jnp.float32
    expected = rewards_oracle(*arguments, 0.3, token_scores if dense else np.zeros_like(token_scores))
    assert_close(actual, expected, OPS, 8)


def test_rewards_sum_to_the_scores_minus_the_penalty(rng):
    scores, penalties, mask, token_scores = draw_rewards(rng)
    rewards = np.asarray(kl.kl_shaped_rewards(scores, penalties, mask, 0.3, token_scores), np.float64)
    for b, length in enumerate(LENGTHS):
        terms = np.float64(token_scores[b, :length]) - 0.3 * np.float64(penalties[b, :length])
        assert_close(rewards[b].sum(), (float(scores[b]) if length else 0.0) + math.fsum(terms), OPS * R, scale=8)


def test_rewards_without_penalty_are_the_score_on_the_last_token(rng):
    scores, penalties, mask, _ = draw_rewards(rng)
    expected = np.zeros((B, R), np.float32)
    for b, length in enumerate(LENGTHS):
        if length:
            expected[b, length - 1] = scores[b]
    np.testing.assert_array_equal(kl.kl_shaped_rewards(scores, penalties, mask, 0.0), expected)


@pytest.mark.parametrize("garbage", [1e30, -math.inf, math.nan])
def test_rewards_ignore_what_lies_outside_the_mask(rng, garbage):
    scores, penalties, mask, token_scores = draw_rewards(rng)
    clean = kl.kl_shaped_rewards(scores, penalties, mask, 0.3, token_scores)
    dirty = [
        jnp.asarray(oracles.pad(np.where(mask, x, np.float32(garbage)), 3, garbage)) for x in (penalties, token_scores)
    ]
    padded = kl.kl_shaped_rewards(scores, dirty[0], oracles.pad(mask, 3, False), 0.3, dirty[1])
    np.testing.assert_array_equal(padded[:, :R], clean)
    np.testing.assert_array_equal(padded[:, R:], np.zeros((B, 3)))


def test_rewards_of_integer_scores_keep_the_fractions_of_the_penalty():
    # -0.5 * 0.25 + 1 + 2 = 2.875: an integer buffer would hold 2 or 3.
    actual = kl.kl_shaped_rewards(jnp.array([1]), jnp.full((1, 1), 0.25), np.ones((1, 1), bool), 0.5, jnp.array([[2]]))
    assert actual.dtype == jnp.float32
    np.testing.assert_array_equal(actual, [[2.875]])


def test_rewards_gradient(rng):
    # d reward / d score is 1 on the last token; d / d kl is -coef, d / d token score 1 on kept tokens, 0 elsewhere.
    scores, penalties, mask, token_scores = draw_rewards(rng)
    grads = jax.grad(lambda s, k, d: kl.kl_shaped_rewards(s, k, mask, 0.25, d).sum(), argnums=(0, 1, 2))(
        scores, penalties, token_scores
    )
    np.testing.assert_array_equal(grads[0], [float(n > 0) for n in LENGTHS])
    np.testing.assert_array_equal(grads[1], np.where(mask, -0.25, 0.0))
    np.testing.assert_array_equal(grads[2], np.where(mask, 1.0, 0.0))


def test_rewards_under_jit_and_vmapped_over_coefficients(rng):
    *arguments, token_scores = draw_rewards(rng, (3,))
    coefs = float32([0.0, 0.1, 2.0])
    mapped = jax.jit(jax.vmap(kl.kl_shaped_rewards))(*arguments, coefs, token_scores)
    for i in range(3):
        expected = rewards_oracle(*(x[i] for x in arguments), float(coefs[i]), token_scores[i])
        assert_close(mapped[i], expected, OPS, 16)


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("rows", [1, B - 1])
def test_rewards_refuse_shapes_that_do_not_belong_together(rng, wrong, rows):
    # One row would broadcast: the same score for every sequence.
    arguments = list(draw_rewards(rng))
    arguments[wrong] = arguments[wrong][:rows]
    with pytest.raises(AssertionError):
        kl.kl_shaped_rewards(*arguments[:3], 0.1, arguments[3])


# adaptive coefficient


def test_twenty_steps_of_openais_adaptive_coefficient():
    record = json.loads((GOLDEN / "adaptive_kl.json").read_text())
    coef = jnp.float32(record["start"])
    assert len(record["kls"]) == 20
    for step, (current, expected) in enumerate(zip(record["kls"], record["coefs"], strict=True)):
        coef = kl.adaptive_kl_coef(
            coef, jnp.float32(current), record["target"], record["horizon"], record["batch_size"]
        )
        assert_close(coef, expected, 6 * (step + 1), scale=0.2)


def test_adaptive_coefficient_golden_over_six_steps():
    # target 6 nats, horizon 100, batch 50: the clipped error is halved. Start at 0.2.
    # kl  6    -> error 0                      -> * 1      -> 0.2
    # kl  6.6  -> error 0.1                    -> * 1.05   -> 0.21
    # kl  5.4  -> error -0.1                   -> * 0.95   -> 0.1995
    # kl 60    -> error 9, clipped to 0.2      -> * 1.1    -> 0.21945
    # kl  0    -> error -1, clipped to -0.2    -> * 0.9    -> 0.197505
    # kl -3    -> error -1.5, clipped to -0.2  -> * 0.9    -> 0.1777545   (k1 over few samples can be negative)
    coef = jnp.float32(0.2)
    expected = [0.2, 0.21, 0.1995, 0.21945, 0.197505, 0.1777545]
    for step, (current, value) in enumerate(zip([6.0, 6.6, 5.4, 60.0, 0.0, -3.0], expected, strict=True)):
        coef = kl.adaptive_kl_coef(coef, jnp.float32(current), 6.0, 100, 50)
        assert coef.dtype == jnp.float32
        assert coef.shape == ()
        # Six roundings a step: division, difference, product, quotient, sum, product.
        assert_close(coef, value, 6 * (step + 1), scale=1.0)


@pytest.mark.parametrize(
    ("current", "expected"), [(7.2, 1.1), (7.3, 1.1), (7.1, 1 + 11 / 120), (4.8, 0.9), (4.7, 0.9), (4.9, 1 - 11 / 120)]
)
def test_adaptive_coefficient_clips_the_error_at_a_fifth_on_both_sides(current, expected):
    # target 6: 7.2 and 4.8 are errors of exactly +-0.2; 7.1 and 4.9 of +-1.1/6, halved: 11/120.
    assert_close(kl.adaptive_kl_coef(jnp.float32(1.0), jnp.float32(current), 6.0, 100, 50), expected, 6)


def test_adaptive_coefficient_of_the_paper():
    # Ziegler et al. 2019: K_beta = 0.1. There mult = 1 + 0.1 * clip(error, -0.2, 0.2): horizon = 10 batches.
    assert_close(kl.adaptive_kl_coef(jnp.float32(0.5), jnp.float32(100.0), 6.0, 10_000, 1_000), 0.5 * 1.02, 6)


def test_adaptive_coefficient_under_jit_and_vmap(rng):
    coefs, kls = float32(rng.uniform(0.01, 1.0, size=8)), float32(rng.uniform(0.0, 12.0, size=8))
    mapped = jax.jit(jax.vmap(lambda c, k: kl.adaptive_kl_coef(c, k, 6.0, 1000, 64)))(coefs, kls)
    expected = [
        float(c) * (1 + max(-0.2, min(0.2, float(k) / 6 - 1)) * 64 / 1000) for c, k in zip(coefs, kls, strict=True)
    ]
    assert_close(mapped, expected, 6)
