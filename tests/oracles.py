"""Plain Python loops in float64: the formulas of the papers, written without looking at the package.

Nothing here imports jax or ppo_jax. Every oracle takes arrays of any float dtype, computes in float64 with scalar
loops, and returns float64.

Tolerances: `assert_close(actual, expected, ops, scale)` allows `ops * eps32 * scale`, where `ops` counts the float32
roundings on the longest path to a result (a sum of n terms counts n) and `scale` bounds the magnitude of the
intermediate values. The float32 rounding unit is eps32 / 2, so the count has a factor of two to spare.
"""

import math

import numpy as np

EPS32 = float(np.finfo(np.float32).eps)  # 2**-23


def assert_close(actual, expected, ops: float, scale: float | None = None) -> None:
    """Hold |actual - expected| <= ops * eps32 * scale; scale is max(1, max|expected|) unless given."""
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if scale is None:
        finite = np.abs(expected[np.isfinite(expected)])
        scale = max(1.0, float(finite.max())) if finite.size else 1.0
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=ops * EPS32 * scale)


def float32(x) -> np.ndarray:
    """The float32 array that both the package and the oracle are given."""
    return np.asarray(x, np.float32)


def response_mask(lengths, width: int) -> np.ndarray:
    """[B, width] bool, True on the first lengths[b] tokens of row b."""
    return np.array([[t < n for t in range(width)] for n in lengths], bool)


def pad(x, extra: int, value) -> np.ndarray:
    """Append `extra` columns of `value` on the right of x."""
    x = np.asarray(x)
    return np.concatenate([x, np.full((*x.shape[:-1], extra), value, x.dtype)], axis=-1)


def kept(x, mask) -> list[float]:
    """The values of x where mask is True, as Python floats."""
    return [float(v) for v, m in zip(np.ravel(x), np.ravel(mask), strict=True) if m]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def variance(values: list[float]) -> float:
    """Population variance."""
    m = mean(values)
    return mean([(v - m) ** 2 for v in values])


def log_softmax(row) -> list[float]:
    row = [float(v) for v in row]
    top = max(row)
    log_z = top + math.log(math.fsum(math.exp(v - top) for v in row))
    return [v - log_z for v in row]


def logprobs_and_entropy(logits, tokens) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.asarray(tokens)
    logits = np.asarray(logits)
    logprobs, entropy = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for index in np.ndindex(*tokens.shape):
        row = log_softmax(logits[index])
        logprobs[index] = row[int(tokens[index])]
        entropy[index] = -math.fsum(math.exp(lp) * lp for lp in row if lp > -math.inf)
    return logprobs, entropy


def gae(rewards, discounts, values, gae_lambda: float) -> tuple[np.ndarray, np.ndarray]:
    """The definition, A_t = sum_k (prod_{j<k} discount_{t+j} lambda) delta_{t+k}: a double sum, no recursion."""
    r, d, v = ([float(z) for z in np.asarray(x)] for x in (rewards, discounts, values))
    steps = len(r)
    delta = [r[t] + d[t] * v[t + 1] - v[t] for t in range(steps)]
    advantages = np.zeros(steps)
    for t in range(steps):
        for end in range(t, steps):
            weight = 1.0
            for j in range(t, end):
                weight *= d[j] * gae_lambda
            advantages[t] += weight * delta[end]
    return advantages, np.array([advantages[t] + v[t] for t in range(steps)])


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps: float):
    """Case by case (Schulman et al. 2017, figure 1), not as a maximum: (loss, metrics, d loss / d logprobs)."""
    logprobs = np.asarray(logprobs)
    count = int(np.sum(mask))
    losses, ratios, kls, clipped = [], [], [], 0
    grad = np.zeros(logprobs.shape)
    for index in np.ndindex(*logprobs.shape):
        if not mask[index]:
            continue
        log_ratio = float(logprobs[index]) - float(old_logprobs[index])
        ratio, a = math.exp(log_ratio), float(advantages[index])
        if a > 0 and ratio > 1 + clip_eps:
            losses.append(-a * (1 + clip_eps))
            clipped += 1
        elif a < 0 and ratio < 1 - clip_eps:
            losses.append(-a * (1 - clip_eps))
            clipped += 1
        else:
            losses.append(-a * ratio)
            grad[index] = -a * ratio / count
        ratios.append(ratio)
        kls.append(math.expm1(log_ratio) - log_ratio)
    metrics = {
        "clip_frac": clipped / count,
        "approx_kl": mean(kls),
        "ratio_max": max(ratios),
        "ratio_dev": max(abs(r - 1) for r in ratios),
    }
    return mean(losses), metrics, grad


def clipped_value_loss(values, old_values, returns, mask, clip_eps: float):
    """(loss, clip_frac, d loss / d values), case by case."""
    values = np.asarray(values)
    count = int(np.sum(mask))
    losses, clipped = [], 0
    grad = np.zeros(values.shape)
    for index in np.ndindex(*values.shape):
        if not mask[index]:
            continue
        v, old, target = float(values[index]), float(old_values[index]), float(returns[index])
        near = old + clip_eps if v > old + clip_eps else old - clip_eps if v < old - clip_eps else v
        if abs(near - target) > abs(v - target):
            losses.append(0.5 * (near - target) ** 2)
            clipped += 1
        else:
            losses.append(0.5 * (v - target) ** 2)
            grad[index] = (v - target) / count
    return mean(losses), clipped / count, grad


def kl_estimate(logprob: float, ref_logprob: float, estimator: str) -> float:
    """Schulman, "Approximating KL divergence" (2020), with r = q(x) / p(x) and x drawn from p."""
    log_r = float(ref_logprob) - float(logprob)
    return {"k1": -log_r, "k2": 0.5 * log_r * log_r, "k3": math.expm1(log_r) - log_r}[estimator]


def kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef: float, estimator: str) -> np.ndarray:
    rewards = np.zeros(np.asarray(mask).shape)
    for b in range(rewards.shape[0]):
        last = -1
        for t in range(rewards.shape[1]):
            if mask[b][t]:
                last = t
                rewards[b, t] = -kl_coef * kl_estimate(logprobs[b][t], ref_logprobs[b][t], estimator)
        if last >= 0:
            rewards[b, last] += float(scores[b])
    return rewards


def finite_difference(function, x, step: float = 1e-5) -> np.ndarray:
    """Central differences of a float64 scalar function; truncation and rounding are both near 1e-10."""
    x = np.array(x, np.float64)
    grad = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        grad[index] = (function(up) - function(down)) / (2 * step)
    return grad
