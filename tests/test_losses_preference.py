"""Losses of preferences: DPO, IPO and KTO."""

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

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())["preference"]


def with_gradient(loss, argnums=0, **settings):
    return jax.jit(jax.value_and_grad(functools.partial(loss, **settings), argnums=argnums, has_aux=True))


def assert_scalars(loss, metrics, names):
    assert set(metrics) == set(names)
    for value in (loss, *metrics.values()):
        assert value.shape == ()
        assert value.dtype == jnp.float32


# direct preference optimisation

NUM = 6
METRICS = ["accuracy", "margin", "chosen_reward", "rejected_reward"]
# Sums of log-probabilities reach 40 nats; beta at most 1; a logarithm and an exponential; a mean of NUM.
DIRECT_OPS, DIRECT_SCALE = NUM + 12, 40
DIRECT = {
    "dpo": (losses.dpo_loss, {"beta": 0.4}),
    "smooth": (losses.dpo_loss, {"beta": 0.4, "label_smoothing": 0.2}),
    "ipo": (losses.ipo_loss, {"beta": 0.4}),
}


def draw_pairs(rng):
    """Log-probabilities of chosen and rejected responses, under the policy and under the reference."""
    ref = -rng.uniform(5.0, 30.0, size=(2, NUM))
    policy = ref + np.clip(3 * rng.normal(size=ref.shape), -8, 8)
    return tuple(float32(x) for x in (*policy, *ref))


@pytest.mark.parametrize("name", ["dpo", "dpo, smooth", "ipo"])
def test_direct_golden_of_trl(name):
    case = GOLDEN[name]
    arguments = [float32(GOLDEN[key]) for key in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
    loss_of = losses.ipo_loss if name == "ipo" else losses.dpo_loss
    (loss, metrics), grads = with_gradient(loss_of, (0, 1), **case["settings"])(*arguments)
    assert_scalars(loss, metrics, METRICS)
    # IPO squares a gap of up to 8 nats.
    assert_close(loss, case["loss"], DIRECT_OPS, 64)
    for actual, expected in zip(grads, (case["grad_chosen"], case["grad_rejected"]), strict=True):
        assert_close(actual, expected, DIRECT_OPS, 8)
    for key in ("accuracy", "chosen_reward", "rejected_reward"):
        assert_close(metrics[key], case[key], DIRECT_OPS, DIRECT_SCALE)
    assert_close(metrics["margin"], case["chosen_reward"] - case["rejected_reward"], DIRECT_OPS, DIRECT_SCALE)


def test_dpo_golden():
    # beta 1/2; log ratios chosen log 4, 0; rejected 0, log 9: d = log 2, -log 3.
    # sigmoid: 2/3 and 1/4, of -d 1/3 and 3/4. Loss: -(log 2/3 + log 1/4)/2 = log(6)/2; with smoothing 1/4:
    # -(3/4 log(2/3 x 1/4) + 1/4 log(1/3 x 3/4)) / 2 = (3/4 log 6 + 1/4 log 4) / 2. One of two pairs is right.
    zero = jnp.zeros(2)
    chosen, rejected = jnp.log(jnp.array([4.0, 1.0])), jnp.log(jnp.array([1.0, 9.0]))
    loss, metrics = losses.dpo_loss(chosen, rejected, zero, zero, beta=0.5)
    assert_close(loss, math.log(6) / 2, 12)
    expected = [0.5, (math.log(2) - math.log(3)) / 2, math.log(4) / 4, math.log(9) / 4]
    for name, value in zip(METRICS, expected, strict=True):
        assert_close(metrics[name], value, 12)
    smooth, _ = losses.dpo_loss(chosen, rejected, zero, zero, beta=0.5, label_smoothing=0.25)
    assert_close(smooth, (0.75 * math.log(6) + 0.25 * math.log(4)) / 2, 12)


def test_ipo_golden():
    # beta 1/4: gaps are to be 2. Log ratios 3 - 0 = 3 and 1 - 2 = -1: (3-2)^2 and (-1-2)^2, mean 5.
    # Gradient 2 (gap - 2) / 2: 1 and -3, and the opposite.
    arguments = float32([[-1, -4], [-5, -6], [-4, -5], [-5, -8]])
    (loss, metrics), grads = with_gradient(losses.ipo_loss, (0, 1), beta=0.25)(*arguments)
    assert loss == 5
    np.testing.assert_array_equal(grads, [[1, -3], [-1, 3]])
    assert {name: float(x) for name, x in metrics.items()} == {
        "accuracy": 0.5, "margin": 0.25, "chosen_reward": 0.5, "rejected_reward": 0.25,
    }  # fmt: skip


def direct_oracle(name: str, chosen, rejected, ref_chosen, ref_rejected) -> float:
    """With the Bradley-Terry probability of the implied rewards (DPO); by Azar et al.'s equation 17 (IPO)."""
    found = []
    for c, r, ref_c, ref_r in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True):
        good, bad = 0.4 * (float(c) - float(ref_c)), 0.4 * (float(r) - float(ref_r))
        right = math.exp(good) / (math.exp(good) + math.exp(bad))
        wrong = math.exp(bad) / (math.exp(good) + math.exp(bad))
        if name == "ipo":
            found.append(((good - bad) / 0.4 - 1 / 0.8) ** 2)
        else:
            flipped = 0.2 if name == "smooth" else 0.0
            found.append(-(1 - flipped) * math.log(right) - flipped * math.log(wrong))
    return oracles.mean(found)


@pytest.mark.parametrize("name", DIRECT)
def test_direct_oracle_and_gradient(rng, name):
    chosen, *others = draw_pairs(rng)
    loss_of, settings = DIRECT[name]
    (loss, metrics), grad = with_gradient(loss_of, **settings)(chosen, *others)
    assert_scalars(loss, metrics, METRICS)
    # IPO squares gaps of up to 18.
    assert_close(loss, direct_oracle(name, chosen, *others), DIRECT_OPS, 400 if name == "ipo" else DIRECT_SCALE)
    expected = oracles.finite_difference(lambda x: direct_oracle(name, x, *others), chosen)
    assert_close(grad, expected, DIRECT_OPS, DIRECT_SCALE)


@pytest.mark.parametrize("name", DIRECT)
def test_direct_loss_of_the_reference_itself(rng, name):
    # No reward, no margin: DPO is at log 2 whatever the labels' noise, IPO at the square of its target; half are right.
    chosen, rejected, _, _ = draw_pairs(rng)
    loss_of, settings = DIRECT[name]
    loss, metrics = loss_of(chosen, rejected, chosen, rejected, **settings)
    assert_close(loss, 1 / 0.8**2 if name == "ipo" else math.log(2), 6)
    assert [float(metrics[key]) for key in METRICS] == [0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", DIRECT)
def test_direct_loss_stays_finite_far_away(name):
    # 4000 nats apart, the right way round and the wrong one: no reward is without limit, and its slope is at most beta.
    far, zero = float32([2000, -2000]), np.zeros(2, np.float32)
    loss_of, settings = DIRECT[name]
    (loss, _), grad = with_gradient(loss_of, **settings)(far, -far, zero, zero)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()
    if name == "dpo":
        assert_close(loss, 0.4 * 4000 / 2, 2)
        assert_close(grad, [0.0, -0.2], 2)


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("wrong", range(4))
def test_direct_mismatched_shapes_are_refused(rng, name, wrong):
    arguments = list(draw_pairs(rng))
    arguments[wrong] = arguments[wrong][:-1]
    loss_of, settings = DIRECT[name]
    with pytest.raises(AssertionError):
        loss_of(*arguments, **settings)


# Kahneman-Tversky optimisation

KTO = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}


def draw_labelled(rng):
    """Log-probabilities under policy and reference, labels of both kinds, a reference point."""
    logprobs, _, ref, _ = draw_pairs(rng)
    return logprobs, ref, rng.permutation(np.arange(NUM) < rng.integers(1, NUM)), np.float32(rng.uniform(0, 3))


def kto_oracle(logprobs, ref, desirable, kl) -> float:
    """lambda_y - v(x, y), one text after the other (Ethayarajh et al., section 4.1)."""
    found = []
    for new, before, good in zip(logprobs, ref, desirable, strict=True):
        ratio = float(new) - float(before)
        gain = ratio - float(kl) if good else float(kl) - ratio
        weight = 1.2 if good else 0.7
        found.append(weight - weight / (1 + math.exp(-0.3 * gain)))
    return oracles.mean(found)


def test_kto_golden_of_trl():
    case = GOLDEN["kto"]
    desirable = np.array(case["desirable"])
    texts, ref = (float32(GOLDEN[f"{kind}chosen"][:3] + GOLDEN[f"{kind}rejected"][:2]) for kind in ("", "ref_"))
    step = with_gradient(losses.kto_loss, **case["settings"])
    (loss, metrics), grad = step(texts, ref, desirable, jnp.float32(case["kl"]))
    assert_scalars(loss, metrics, METRICS)
    assert_close(loss, case["loss"], DIRECT_OPS, DIRECT_SCALE)
    assert_close(grad, case["grad"], DIRECT_OPS, DIRECT_SCALE)
    for key in ("chosen_reward", "rejected_reward"):
        assert_close(metrics[key], case[key], DIRECT_OPS, DIRECT_SCALE)


def test_kto_golden():
    # beta 1, kl log 2. Desirable, log ratio log 6: gain log 3, 1 - 3/4 = 1/4, weighed by 2: 1/2.
    # Undesirable, log ratio 2 log 2: gain -log 2, 1 - 1/3 = 2/3, weighed by 3: 2. Mean 5/4. One of two on its side.
    # Slopes: -2 x 3/16 / 2 = -3/16 and 3 x 2/9 / 2 = 1/3.
    texts = jnp.log(jnp.array([6.0, 4.0]))
    step = with_gradient(losses.kto_loss, beta=1.0, desirable_weight=2.0, undesirable_weight=3.0)
    (loss, metrics), grad = step(texts, jnp.zeros(2), jnp.array([True, False]), jnp.log(2.0))
    assert_close(loss, 1.25, 12)
    assert_close(grad, [-3 / 16, 1 / 3], 12)
    for name, value in zip(METRICS, [0.5, math.log(6 / 4), math.log(6), math.log(4)], strict=True):
        assert_close(metrics[name], value, 12)


def test_kto_oracle_and_gradient(rng):
    logprobs, *others = draw_labelled(rng)
    (loss, metrics), grad = with_gradient(losses.kto_loss, **KTO)(logprobs, *others)
    assert_scalars(loss, metrics, METRICS)
    assert_close(loss, kto_oracle(logprobs, *others), DIRECT_OPS, DIRECT_SCALE)
    expected = oracles.finite_difference(lambda x: kto_oracle(x, *others), logprobs)
    assert_close(grad, expected, DIRECT_OPS, DIRECT_SCALE)
    ref, desirable, kl = others
    right = [(ratio > kl) == good for ratio, good in zip(np.float64(logprobs) - ref, desirable, strict=True)]
    assert_close(metrics["accuracy"], oracles.mean(right), 2)


def test_kto_learns_nothing_through_its_reference_point(rng):
    logprobs, ref, desirable, kl = draw_labelled(rng)
    assert jax.grad(lambda x: losses.kto_loss(logprobs, ref, desirable, x, **KTO)[0])(kl) == 0


@pytest.mark.parametrize("good", [True, False])
def test_kto_of_one_kind_of_text_has_finite_metrics(rng, good):
    logprobs, ref, _, kl = draw_labelled(rng)
    loss, metrics = losses.kto_loss(logprobs, ref, np.full(NUM, good), kl, **KTO)
    assert all(math.isfinite(x) for x in (loss, *metrics.values()))
    assert metrics["rejected_reward" if good else "chosen_reward"] == 0


def test_kto_mismatched_shapes_are_refused(rng):
    logprobs, ref, desirable, kl = draw_labelled(rng)
    for wrong in (
        (logprobs[1:], ref, desirable, kl),
        (logprobs, ref, desirable[1:], kl),
        (logprobs, ref, desirable, ref),
    ):
        with pytest.raises(AssertionError):
            losses.kto_loss(*wrong, **KTO)
