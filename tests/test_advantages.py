"""Generalised advantage estimation (Schulman et al. 2016), and estimators of responses with and without a critic."""

import functools
import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import assert_close, float32

from ppo_jax import advantages
from ppo_jax.advantages import Targets

GOLDEN = Path(__file__).parent / "golden"
# A_t is a sum of at most T terms, each a product of at most 2T factors of size <= 1 with a delta of three roundings.
STEPS = 9
OPS = 3 * STEPS + 3


def draw(rng, steps: int = STEPS, batch: tuple[int, ...] = ()):
    rewards = float32(rng.normal(size=(*batch, steps)))
    discounts = float32(rng.uniform(0.5, 1.0, size=(*batch, steps)))
    values = float32(rng.normal(size=(*batch, steps + 1)))
    return rewards, discounts, values


def test_golden_three_steps():
    # rewards 1, 2, 3; discount 0.5 everywhere; values 2, 4, 6, 8; lambda 0.5
    # delta_0 = 1 + 0.5*4 - 2 = 1      delta_1 = 2 + 0.5*6 - 4 = 1      delta_2 = 3 + 0.5*8 - 6 = 1
    # A_2 = 1      A_1 = 1 + 0.25*1 = 1.25      A_0 = 1 + 0.25*1.25 = 1.3125       returns = A + (2, 4, 6)
    advantage, returns = advantages.gae(
        jnp.array([1.0, 2.0, 3.0]), jnp.full(3, 0.5), jnp.array([2.0, 4.0, 6.0, 8.0]), 0.5
    )
    # Every number above is a short binary fraction: float32 holds it exactly.
    np.testing.assert_array_equal(advantage, [1.3125, 1.25, 1.0])
    np.testing.assert_array_equal(returns, [3.3125, 5.25, 7.0])


def test_golden_with_the_episode_ending_in_the_middle():
    # rewards 1, 1, 1; discounts 1, 0, 1 (the episode ends after step 1); values 1, 2, 4, 8; lambda 0.5
    # delta_0 = 1 + 2 - 1 = 2      delta_1 = 1 + 0 - 2 = -1      delta_2 = 1 + 8 - 4 = 5
    # A_2 = 5      A_1 = -1 + 0 = -1      A_0 = 2 + 0.5*(-1) = 1.5
    advantage, returns = advantages.gae(jnp.ones(3), jnp.array([1.0, 0.0, 1.0]), jnp.array([1.0, 2.0, 4.0, 8.0]), 0.5)
    np.testing.assert_array_equal(advantage, [1.5, -1.0, 5.0])
    np.testing.assert_array_equal(returns, [2.5, 1.0, 9.0])


def test_gae_agrees_with_rlax():
    cases = json.loads((GOLDEN / "rlax.json").read_text())["cases"]
    assert len(cases) == 12
    for case in cases:
        rewards, discounts, values = (float32(case[name]) for name in ("rewards", "discounts", "values"))
        advantage, returns = advantages.gae(rewards, discounts, values, case["gae_lambda"])
        expected = np.array(case["advantages"])
        # The file's numbers are decimal fractions, which float32 rounds: three more roundings.
        assert_close(advantage, expected, 3 * len(expected) + 6, scale=len(expected) * 4)
        assert_close(returns, expected + case["values"][:-1], 3 * len(expected) + 7, scale=len(expected) * 4)


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_oracle(rng, steps, gae_lambda):
    rewards, discounts, values = draw(rng, steps)
    actual = advantages.gae(rewards, discounts, values, gae_lambda)
    expected = oracles.gae(rewards, discounts, values, gae_lambda)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == jnp.float32
        assert_close(a, e, OPS, scale=steps * 4)


def test_lambda_one_is_discounted_returns_minus_values(rng):
    rewards, discounts, values = draw(rng)
    total, expected = float(values[-1]), np.zeros(STEPS)
    for t in reversed(range(STEPS)):
        total = float(rewards[t]) + float(discounts[t]) * total
        expected[t] = total
    advantage, returns = advantages.gae(rewards, discounts, values, 1.0)
    assert_close(returns, expected, OPS, scale=STEPS * 4)
    assert_close(advantage, expected - values[:-1], OPS, scale=STEPS * 4)


def test_lambda_zero_is_the_temporal_difference(rng):
    rewards, discounts, values = draw(rng)
    r, d, v = (np.float64(x) for x in (rewards, discounts, values))
    advantage, returns = advantages.gae(rewards, discounts, values, 0.0)
    assert_close(advantage, r + d * v[1:] - v[:-1], 3, scale=8)
    assert_close(returns, r + d * v[1:], 4, scale=8)


def test_exact_values_have_no_advantage(rng):
    # v_t = r_t + discount_t v_{t+1} makes every delta zero, whatever lambda.
    rewards, discounts, values = draw(rng)
    for t in reversed(range(STEPS)):
        values[t] = rewards[t] + discounts[t] * values[t + 1]
    advantage, returns = advantages.gae(rewards, discounts, values, 0.9)
    assert_close(advantage, np.zeros(STEPS), OPS, scale=STEPS * 4)
    assert_close(returns, values[:-1], OPS, scale=STEPS * 4)


def test_zero_discount_separates_two_episodes(rng):
    rewards, discounts, values = draw(rng)
    discounts[3] = 0.0
    whole = advantages.gae(rewards, discounts, values, 0.9)
    first = advantages.gae(rewards[:4], discounts[:4], values[:5], 0.9)
    second = advantages.gae(rewards[4:], discounts[4:], values[4:], 0.9)
    for w, a, b in zip(whole, first, second, strict=True):
        assert_close(w, np.concatenate([a, b]), OPS, scale=STEPS * 4)


def test_the_value_after_the_end_is_ignored(rng):
    rewards, discounts, values = draw(rng)
    discounts[-1] = 0.0
    before = advantages.gae(rewards, discounts, values, 0.9)
    values[-1] = 1e6
    after = advantages.gae(rewards, discounts, values, 0.9)
    np.testing.assert_array_equal(before, after)


def test_padding_after_the_end_changes_nothing(rng):
    rewards, discounts, values = draw(rng)
    discounts[-1] = 0.0
    short = advantages.gae(rewards, discounts, values, 0.9)
    long = advantages.gae(
        oracles.pad(rewards, 4, 7.0), oracles.pad(discounts, 4, 1.0), oracles.pad(values, 4, -5.0), 0.9
    )
    for s, p in zip(short, long, strict=True):
        assert_close(p[:STEPS], s, OPS, scale=STEPS * 4)


def test_vmapped_equals_a_loop(rng):
    rewards, discounts, values = draw(rng, batch=(5,))
    batched = jax.vmap(advantages.gae, in_axes=(0, 0, 0, None))(rewards, discounts, values, 0.95)
    for b in range(5):
        single = oracles.gae(rewards[b], discounts[b], values[b], 0.95)
        for a, e in zip(batched, single, strict=True):
            assert_close(a[b], e, OPS, scale=STEPS * 4)


def test_jitted_with_a_traced_lambda_and_vmapped_over_it(rng):
    trajectory = draw(rng)
    lambdas = float32([0.0, 0.3, 1.0])
    swept = jax.jit(jax.vmap(functools.partial(advantages.gae, *trajectory)))(lambdas)
    for i, gae_lambda in enumerate(lambdas):
        for a, e in zip(swept, oracles.gae(*trajectory, float(gae_lambda)), strict=True):
            assert_close(a[i], e, OPS, scale=STEPS * 4)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_gradient(rng, argument):
    trajectory = draw(rng, 4)
    weights = float32(rng.normal(size=(2, 4)))

    def weighted(gae, x):
        arguments = list(trajectory)
        arguments[argument] = x
        advantage, returns = gae(*arguments, 0.8)
        return (weights[0] * advantage + weights[1] * returns).sum()

    actual = jax.jit(jax.grad(functools.partial(weighted, advantages.gae)))(trajectory[argument])
    expected = oracles.finite_difference(functools.partial(weighted, oracles.gae), trajectory[argument])
    # Backward repeats the forward's products: twice the operations, then the weights.
    assert_close(actual, expected, 2 * OPS, scale=4 * 4 * 4)


@pytest.mark.parametrize(("steps", "discounts", "values"), [(3, 3, 3), (3, 2, 4), (3, 3, 5)])
def test_wrong_lengths_are_refused(steps, discounts, values):
    with pytest.raises(AssertionError):
        advantages.gae(jnp.zeros(steps), jnp.ones(discounts), jnp.zeros(values), 0.9)


@pytest.mark.parametrize(("steps", "values"), [((2, 3), (2, 4)), ((3, 2), (4, 2))])
def test_a_batch_is_refused_whichever_axis_is_time(steps, values):
    with pytest.raises(AssertionError):
        advantages.gae(jnp.zeros(steps), jnp.ones(steps), jnp.zeros(values), 0.9)


# responses

EACH, WIDTH = 3, 3
# Three responses to each of two prompts, of 2, 1, 3, 3, 1 and 2 tokens, whose rewards sum to 1, 2, 6 and 0, 0, 3.
REWARDS = [[0.5, 0.5, 0.0], [2.0, 0.0, 0.0], [-1.0, 1.0, 6.0], [1.0, -2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, 4.0, 0.0]]
MASK = oracles.response_mask([2, 1, 3, 3, 1, 2], WIDTH)
SUMS = [1.0, 2.0, 6.0, 0.0, 0.0, 3.0]

GROUPED = ["rloo", "grpo", "dr_grpo", "reinforce_pp_baseline"]
TO_GO = ["reinforce_pp", "remax", "reinforce"]
SETTINGS = (
    {"gae": {"gamma": 0.9, "gae_lambda": 0.8, "critic_lambda": 1.0, "lambda_length_scale": 0.7}}
    | {name: {"responses_per_prompt": EACH} for name in GROUPED}
    | {name: {"gamma": 0.9} for name in TO_GO}
)


def estimate(name: str, targets: Targets, **settings):
    return getattr(advantages, f"{name}_advantages")(targets, **SETTINGS[name] | settings)


def make_targets(rewards, mask, values=None, greedy=None, baseline=0.0) -> Targets:
    rewards, mask = jnp.asarray(float32(rewards)), jnp.asarray(mask)
    values = jnp.zeros_like(rewards) if values is None else jnp.asarray(float32(values))
    greedy = jnp.zeros(len(rewards)) if greedy is None else jnp.asarray(float32(greedy))
    return Targets(rewards, mask, values, greedy, jnp.float32(baseline))


def draw_targets(rng, lengths=(4, 1, 6, 5, 2, 6), width=6) -> Targets:
    mask = oracles.response_mask(lengths, width)
    rewards, values = (np.where(mask, rng.normal(size=mask.shape), 0.0) for _ in range(2))
    return make_targets(rewards, mask, values, rng.normal(size=len(lengths)), rng.normal())


def on_tokens(x, mask=MASK) -> np.ndarray:
    """A number for each response, on all of its tokens."""
    return np.array([[float(value) if counts else 0.0 for counts in row] for value, row in zip(x, mask, strict=True)])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Each minus the mean of the other two: 1 - 4, 2 - 3.5, 6 - 1.5; 0 - 1.5, 0 - 1.5, 3 - 0
        ("rloo", [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]),
        # Means 3 and 1
        ("dr_grpo", [-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]),
        ("reinforce_pp_baseline", [-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]),
        # The same, divided by sqrt((4 + 1 + 9) / 2) = 2.64575131 and sqrt((1 + 1 + 4) / 2) = 1.73205081, each + 1e-4:
        # 2 / 2.64585131 = 0.75590038, 1 / 2.64585131 = 0.37795019, 3 / 2.64585131 = 1.13385056
        # 1 / 1.73215081 = 0.57731694, 2 / 1.73215081 = 1.15463388
        ("grpo", [-0.75590038, -0.37795019, 1.13385056, -0.57731694, -0.57731694, 1.15463388]),
    ],
)
def test_group_golden(name, expected):
    advantage, returns = estimate(name, make_targets(REWARDS, MASK))
    assert_close(advantage, on_tokens(expected), 8)
    assert_close(returns, on_tokens(SUMS), 4)


# gamma 1/2, from the last token backwards:
# 0.5, 0.5 + 0.25 = 0.75 | 2 | 6, 1 + 3 = 4, -1 + 2 = 1 | 1, -2 + 0.5 = -1.5, 1 - 0.75 = 0.25 | 0 | 4, -1 + 2 = 1
HALVED = [[0.75, 0.5, 0], [2, 0, 0], [1, 4, 6], [0.25, -1.5, 1], [0, 0, 0], [1, 4, 0]]


@pytest.mark.parametrize(
    ("name", "subtracted"),
    [
        ("reinforce_pp", [0.0] * 6),
        ("remax", [1.0, 1.0, 1.0, -2.0, -2.0, -2.0]),  # the greedy response's score, not discounted
        ("reinforce", [0.25] * 6),
    ],
)
def test_reward_to_go_golden(name, subtracted):
    targets = make_targets(REWARDS, MASK, greedy=[1, 1, 1, -2, -2, -2], baseline=0.25)
    advantage, returns = estimate(name, targets, gamma=0.5)
    # Short binary fractions: exact.
    np.testing.assert_array_equal(returns, HALVED)
    np.testing.assert_array_equal(advantage, np.array(HALVED) - on_tokens(subtracted))


@pytest.mark.parametrize(
    ("settings", "expected", "returns"),
    [
        # gamma 1. Row 0, three tokens: rewards 0, 0, 4, values 1, 2, 3: deltas 0 + 2 - 1, 0 + 3 - 2, 4 - 3: 1, 1, 1.
        # Row 1, two tokens: rewards 0, 2, values 1, 1: deltas 0 + 1 - 1 = 0 and 2 - 1 = 1.
        # lambda 1/2: 1 + 0.75, 1 + 0.5, 1 and 0 + 0.5, 1; returns those plus the values
        ({}, [[1.75, 1.5, 1], [0.5, 1, 0]], [[2.75, 3.5, 4], [1.5, 2, 0]]),
        # the critic's own lambda 1: what was earned, 4 and 2
        ({"critic_lambda": 1.0}, [[1.75, 1.5, 1], [0.5, 1, 0]], [[4, 4, 4], [2, 2, 0]]),
        # the critic's 0: the reward and the next value
        ({"critic_lambda": 0.0}, [[1.75, 1.5, 1], [0.5, 1, 0]], [[2, 3, 4], [1, 2, 0]]),
        # lambda of the length, scale 2: 1 - 1/6 = 5/6: 1 + 5/6 * 11/6 = 91/36, 11/6, 1; and 1 - 1/4: 3/4, 1.
        # The critic's stays 1/2.
        ({"lambda_length_scale": 2.0}, [[91 / 36, 11 / 6, 1], [0.75, 1, 0]], [[2.75, 3.5, 4], [1.5, 2, 0]]),
        # scale 0.5: 1 - 1/1.5 = 1/3: 1 + 4/9, 4/3, 1; and 1 - 1/1 = 0
        ({"lambda_length_scale": 0.5}, [[13 / 9, 4 / 3, 1], [0, 1, 0]], [[2.75, 3.5, 4], [1.5, 2, 0]]),
        # scale 0.1: 1 - 1/0.3 is below 0, which is as low as it goes: deltas
        ({"lambda_length_scale": 0.1}, [[1, 1, 1], [0, 1, 0]], [[2.75, 3.5, 4], [1.5, 2, 0]]),
    ],
)
def test_gae_of_responses_golden(settings, expected, returns):
    targets = make_targets([[0, 0, 4], [0, 2, 0]], oracles.response_mask([3, 2], 3), [[1, 2, 3], [1, 1, 0]])
    settings = {"gamma": 1.0, "gae_lambda": 0.5, "critic_lambda": -1.0, "lambda_length_scale": 0.0} | settings
    actual = advantages.gae_advantages(targets, **settings)
    assert_close(actual[0], expected, 8)
    assert_close(actual[1], returns, 8)


@pytest.mark.parametrize("name", ["gae", *GROUPED, "reinforce_pp", "remax"])
def test_responses_agree_with_verl(name):
    record = json.loads((GOLDEN / "verl.json").read_text())["advantages"]
    mask = oracles.response_mask(record["lengths"], 5)
    targets = make_targets(record["rewards"], mask, record["values"], record["greedy"])
    settings = {
        "gae": {"gae_lambda": record["gae_lambda"], "critic_lambda": -1.0, "lambda_length_scale": 0.0},
        "remax": {"gamma": 1.0},  # theirs has no discount
    }
    advantage, returns = estimate(name, targets, **settings.get(name, {}))
    assert SETTINGS[name].get("gamma", record["gamma"]) == record["gamma"]
    expected, expected_returns = record["results"][name]
    assert_close(advantage, expected, 3 * 5 + 6, scale=20)
    if name not in GROUPED:  # there theirs are the advantages once more
        assert_close(returns, expected_returns, 3 * 5 + 6, scale=20)


@pytest.mark.parametrize("scale", [0.0, 0.4, 3.0])
def test_gae_of_responses_oracle(rng, scale):
    targets = draw_targets(rng)
    settings = {"gamma": 0.9, "gae_lambda": 0.7, "critic_lambda": 0.6, "lambda_length_scale": scale}
    actual = jax.jit(functools.partial(advantages.gae_advantages, **settings))(targets)
    expected = np.zeros((2, *targets.mask.shape))
    for b, length in enumerate((4, 1, 6, 5, 2, 6)):
        discounts = [0.9] * (length - 1) + [0.0]
        trajectory = (targets.rewards[b, :length], discounts, [*targets.values[b, :length], 123.0])
        policy = max(0.0, 1 - 1 / (scale * length)) if scale else 0.7
        expected[0, b, :length] = oracles.gae(*trajectory, policy)[0]
        expected[1, b, :length] = oracles.gae(*trajectory, 0.6)[1]
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, OPS, scale=6 * 4)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("each", [2, 3, 6])
def test_group_oracle(rng, name, each):
    targets = draw_targets(rng)
    actual, returns = jax.jit(functools.partial(estimate, name, responses_per_prompt=each))(targets)
    sums = [math.fsum(row) for row in np.float64(targets.rewards).tolist()]
    expected, units = [], []
    for i, own in enumerate(sums):
        group = sums[i // each * each : i // each * each + each]
        others = [sums[j] for j in range(i // each * each, i // each * each + each) if j != i]
        mean = math.fsum(group) / each
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / (each - 1))
        expected.append(own - (math.fsum(others) / len(others) if name == "rloo" else mean))
        units.append(deviation + 1e-4 if name == "grpo" else 1.0)
    # Not divided by what may be small: rewards that nearly agree have lost digits in their difference.
    assert_close(actual * on_tokens(units, targets.mask), on_tokens(expected, targets.mask), 24, 12)
    assert_close(returns, on_tokens(sums, targets.mask), 12, 12)


@pytest.mark.parametrize("name", TO_GO)
def test_reward_to_go_oracle(rng, name):
    targets = draw_targets(rng)
    actual, returns = jax.jit(functools.partial(estimate, name))(targets)
    expected, to_go = np.zeros((2, *targets.mask.shape))
    for b, t in np.ndindex(*targets.mask.shape):
        if targets.mask[b, t]:
            to_go[b, t] = sum(0.9 ** (s - t) * float(targets.rewards[b, s]) for s in range(t, 6))
            subtracted = {"reinforce_pp": 0.0, "remax": targets.greedy[b], "reinforce": targets.baseline}[name]
            expected[b, t] = to_go[b, t] - float(subtracted)
    assert_close(actual, expected, OPS, scale=12)
    assert_close(returns, to_go, OPS, scale=12)


def test_without_a_critic_gae_at_lambda_one_is_the_reward_to_go(rng):
    targets = draw_targets(rng)
    targets = targets._replace(values=jnp.zeros_like(targets.values))
    actual = estimate("gae", targets, gae_lambda=1.0, lambda_length_scale=0.0)
    for a, e in zip(actual, estimate("reinforce_pp", targets), strict=True):
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("name", SETTINGS)
def test_shapes_types_and_zeros_where_masked(rng, name):
    targets = draw_targets(rng)
    for x in estimate(name, targets):
        assert x.dtype == jnp.float32
        assert x.shape == targets.mask.shape
        assert (np.asarray(x)[~targets.mask] == 0).all()
        assert (np.asarray(x)[targets.mask] != 0).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_padding_responses_changes_nothing(rng, name):
    targets = draw_targets(rng)
    wider = targets._replace(
        **{x: jnp.pad(getattr(targets, x), ((0, 0), (0, 3))) for x in "rewards mask values".split()}
    )
    for short, long in zip(estimate(name, targets), estimate(name, wider), strict=True):
        # The sum over a longer row may be made in another order.
        assert_close(long, jnp.pad(short, ((0, 0), (0, 3))), 400 if name == "grpo" else 24, 12)


@pytest.mark.parametrize("name", GROUPED)
def test_what_all_responses_to_a_prompt_earn_is_no_advantage(rng, name):
    targets = draw_targets(rng)
    bonus = jnp.repeat(jnp.array([[8.0], [-4.0]]), EACH, axis=0)
    richer = targets._replace(rewards=targets.rewards.at[:, :1].add(bonus))
    assert_close(estimate(name, richer)[0], estimate(name, targets)[0], 200, 16)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 12345.678])
def test_a_prompt_whose_responses_earn_the_same_teaches_exactly_nothing(name, reward):
    # Their mean in float32 is not always their common value, and grpo divides by 1e-4.
    mask = oracles.response_mask([1] * 7, 2)
    targets = make_targets(np.where(mask, reward, 0.0), mask)
    np.testing.assert_array_equal(estimate(name, targets, responses_per_prompt=7)[0], np.zeros((7, 2)))


@pytest.mark.parametrize("name", GROUPED)
def test_prompts_do_not_see_each_other(rng, name):
    targets = draw_targets(rng)
    other = targets._replace(rewards=targets.rewards.at[EACH:].multiply(-3.0))
    np.testing.assert_array_equal(estimate(name, other)[0][:EACH], estimate(name, targets)[0][:EACH])


def test_grpo_does_not_see_the_unit_of_the_rewards(rng):
    # Up to the 1e-4: 1e-4 / deviation, and deviations here are above 0.01 but for a draw in a million.
    targets = draw_targets(rng)
    larger = targets._replace(rewards=1024 * targets.rewards)
    np.testing.assert_allclose(estimate("grpo", larger)[0], estimate("grpo", targets)[0], rtol=0.02)


@pytest.mark.parametrize(("name", "factor"), [("rloo", 1.0), ("dr_grpo", 0.5)])
def test_expected_gradient_is_that_of_the_expected_reward(rng, name, factor):
    # Responses of one token out of three, two to a prompt: all nine pairs, weighted by their probability. RLOO has no
    # bias; the mean that includes the response itself makes every gradient (k - 1) / k as long.
    logits, rewards = float32(rng.normal(size=3)), float32(rng.normal(size=3))
    p = np.exp(oracles.log_softmax(logits))
    expected = factor * p * (rewards - (p * rewards).sum())
    actual = np.zeros(3)
    for pair in itertools.product(range(3), repeat=2):
        targets = make_targets([[rewards[token]] for token in pair], np.ones((2, 1), bool))
        advantage = np.float64(estimate(name, targets, responses_per_prompt=2)[0][:, 0])
        for token, a in zip(pair, advantage, strict=True):
            actual += p[pair[0]] * p[pair[1]] * a * (np.eye(3)[token] - p) / 2
    assert_close(actual, expected, 18 * 4, 8)


@pytest.mark.parametrize("name", ["remax", "reinforce"])
def test_no_baseline_moves_the_expected_gradient(rng, name):
    # Token 1: stop (reward 1) or go on; token 2: one of two (rewards 2, -3). A baseline that is discounted by the
    # tokens to come would know at token 1 whether the response goes on, and would reward that.
    first, second = rng.uniform(0.2, 0.8, size=2)
    cases = [(first, [1.0, 0.0], 1, (1 - first, 0.0))]
    cases += [((1 - first) * second, [0.0, 2.0], 2, (-first, 1 - second))]
    cases += [((1 - first) * (1 - second), [0.0, -3.0], 2, (-first, -second))]
    probabilities, rewards, lengths, slopes = zip(*cases, strict=True)  # slopes: d log p(token) / d its logit

    def expected_gradient(baseline: float) -> np.ndarray:
        mask = oracles.response_mask(lengths, 2)
        targets = make_targets(rewards, mask, greedy=[baseline] * 3, baseline=baseline)
        advantage = np.float64(estimate(name, targets, gamma=0.5)[0])
        return (np.array(probabilities)[:, None] * advantage * np.array(slopes)).sum(axis=0)

    assert_close(expected_gradient(5.0), expected_gradient(0.0), 6 * 4, 8)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("each", [1, 0, 4, 7])
def test_groups_that_cannot_be_are_refused_by_name(rng, name, each):
    with pytest.raises(ValueError, match=f"responses_per_prompt: got {each}, expected"):
        jax.jit(functools.partial(estimate, name, responses_per_prompt=each))(draw_targets(rng))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gae", {"values": jnp.zeros((6, 5))}),
        ("gae", {"mask": jnp.ones((6, 5), bool)}),
        ("reinforce_pp", {"mask": jnp.ones((1, 6), bool)}),
        ("remax", {"greedy": jnp.zeros(1)}),
        ("reinforce", {"baseline": jnp.zeros(1)}),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(rng, name, wrong):
    with pytest.raises((AssertionError, ValueError)):
        estimate(name, draw_targets(rng)._replace(**wrong))


def test_running_baseline_golden():
    # decay 3/4 from 0: means 8, 4, 0 of two responses each: 2; 1.5 + 1 = 2.5; 1.875. decay 0: the last mean.
    baseline, seen = jnp.float32(0), []
    for returns in ([6.0, 10.0], [4.0, 4.0], [-1.0, 1.0]):
        baseline = advantages.running_baseline(baseline, jnp.array(returns), 0.75)
        assert baseline.shape == ()
        seen.append(float(baseline))
    assert seen == [2.0, 2.5, 1.875]
    assert float(advantages.running_baseline(baseline, jnp.array([6.0, 10.0]), 0.0)) == 8.0
