"""From a judged rollout to learning targets: what plain loops say, row by row."""

import dataclasses
import functools
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from small import (
    COLD,
    LENGTHS,
    ONE_LAYER,
    PROMPT_SIZES,
    SIX,
    P,
    R,
    V,
    close,
    full_pass,
    loss_of,
    policy_logprobs,
    random_params,
    random_rollout,
    running,
    taken,
)

from experiments.methods import METHODS, resolve
from ppo_jax import experience as experience_module
from ppo_jax.experience import Opinions, correlation, estimate, make_experience
from ppo_jax.models import ActorCritic
from ppo_jax.types import Scores

LLAMA = ONE_LAYER["llama"]
GROUPS = dataclasses.replace(SIX, responses_per_prompt=3)


class Given(dict):
    """What `make_experience` is given, by name; `given(changes)` is the same with some of it exchanged."""

    def __call__(self, **changes):
        return Given(self | changes)


def some(rng, lengths=LENGTHS, **changes) -> Given:
    """A random rollout that one random policy has sampled, with random scores, and another as the reference."""
    scores = Scores(jnp.asarray(rng.normal(size=6), jnp.float32))
    return Given(
        params=random_params(rng, LLAMA),
        ref_params=random_params(rng, LLAMA)["decoder"],
        rollout=random_rollout(rng, PROMPT_SIZES, lengths, P, R),
        scores=scores,
        running=running(),
    )(**changes)


@functools.cache
def program(config, sampling, exact_kl):
    method = resolve(config)
    return jax.jit(
        partial(make_experience, ActorCritic(LLAMA), method=method, sampling=sampling, exact_kl=exact_kl),
    )


def targets(given, config=SIX, sampling=COLD, exact_kl=False):
    """(experience, running, metrics, broken), as host arrays."""
    return jax.device_get(program(config, sampling, exact_kl)(**given))


def log_policy(decoder, rollout, sampling=COLD) -> np.ndarray:
    """Log-probabilities [B, R, V] by full passes, one row at a time."""
    head = {"kernel": np.zeros((LLAMA.width, 1), np.float32), "bias": np.zeros(1, np.float32)}
    return policy_logprobs(full_pass(LLAMA, {"decoder": decoder, "value_head": head}, rollout)[0], sampling)


def oracle(given, config, sampling=COLD, kl_coef=0.3):
    """(advantages, returns, metrics) of GAE row by row; nothing of a row beyond its length is ever looked at."""
    rollout, scores = given["rollout"], np.float64(given["scores"].total)
    theirs = log_policy(given["ref_params"], rollout, sampling)
    ref = taken(theirs, rollout)
    mask, tokens = np.asarray(rollout.response_mask), np.asarray(rollout.response_tokens)
    logprobs, values = np.float64(rollout.logprobs), np.float64(rollout.values)
    kl = {name: np.zeros(mask.shape) for name in ("k1", "k2", "k3", "abs")}
    for at in zip(*np.nonzero(mask), strict=True):
        for name in ("k1", "k2", "k3"):
            kl[name][at] = oracles.kl_estimate(logprobs[at], ref[at], name)
        kl["abs"][at] = abs(logprobs[at] - ref[at])
    ours = log_policy(given["params"]["decoder"], rollout, sampling)
    kl["exact"] = np.where(mask, np.sum(np.exp(ours) * (ours - theirs), -1), 0)
    rewards = np.zeros(mask.shape)
    dense = np.zeros(mask.shape) if given["scores"].tokens is None else np.float64(given["scores"].tokens)
    for row, length in enumerate(mask.sum(1)):
        for t in range(length):
            priced = kl[config.kl_estimator][row, t] if config.kl_in == "reward" else 0.0
            if config.kl_estimator in ("k1", "abs", "exact"):
                priced = max(-config.kl_clamp, min(config.kl_clamp, priced))
            rewards[row, t] = -kl_coef * priced + dense[row, t] + (scores[row] if t == length - 1 else 0)
    if config.whiten_rewards:
        every = oracles.kept(rewards, mask)
        middle, deviation = oracles.mean(every), math.sqrt(oracles.variance(every))
        rewards = np.where(mask, (rewards - middle) / deviation + middle, 0)
    raw, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for row, length in enumerate(mask.sum(1)):
        discounts = [config.gamma] * (length - 1) + [0.0]
        if length:
            raw[row, :length], returns[row, :length] = oracles.gae(
                rewards[row, :length], discounts, [*values[row, :length], 1e9], config.gae_lambda
            )
    every, real_returns = oracles.kept(raw, mask), oracles.kept(returns, mask)
    deviation = math.sqrt(oracles.variance(every) + 1e-8)
    advantages = raw
    if config.whiten_advantages in ("auto", "batch"):
        shift = oracles.mean(every) if config.whiten_shift else 0.0
        advantages = np.where(mask, (raw - oracles.mean(every)) / deviation + oracles.mean(every) - shift, 0.0)
    errors = oracles.kept(returns - values, mask)
    lengths, whole = mask.sum(1), scores + dense.sum(1)
    ends = [any(t in sampling.eos_ids for t in row[m]) for row, m in zip(tokens, mask, strict=True)]
    metrics = {
        "objective/score_std": math.sqrt(oracles.variance(list(whole))),
        "objective/score_length_corr": np.corrcoef(whole, lengths)[0, 1],
        "objective/ref_nll": -oracles.mean(oracles.kept(ref, mask)),
        "objective/kl_coef": kl_coef,
        "objective/eos_frac": oracles.mean(ends),
        "objective/entropy": -oracles.mean(oracles.kept(logprobs, mask)),
        "advantage/mean": oracles.mean(every),
        "advantage/std": math.sqrt(oracles.variance(every)),
        "value/mean": oracles.mean(oracles.kept(values, mask)),
        "value/explained_var": 1 - oracles.variance(errors) / oracles.variance(real_returns),
    }
    estimates = {"objective/score": whole, "objective/reward": rewards.sum(1), "objective/length": lengths}
    estimates |= {"objective/kl" if name == "k1" else f"kl/{name}": x.sum(1) for name, x in kl.items()}
    for name, x in estimates.items():
        # The standard error of a mean, with the unbiased variance: n - 1.
        metrics |= {name: np.mean(x), f"{name}_se": np.std(x, ddof=1) / math.sqrt(len(x))}
    return advantages, returns, metrics


CASES = {
    "whitened": {"gamma": 0.9, "gae_lambda": 0.8},
    "raw": {"whiten_advantages": "none", "kl_estimator": "k3", "num_minibatches": 3},
    "by minibatch later": {"whiten_advantages": "minibatch", "kl_estimator": "k2", "num_minibatches": 1},
    "not shifted": {"whiten_shift": False, "kl_estimator": "abs", "kl_clamp": 1.5},
    "clamped": {"kl_clamp": 0.7},
    "exact": {"kl_estimator": "exact", "kl_clamp": 2.0},
    "white rewards": {"whiten_rewards": True},
    "no KL in the reward": {"kl_in": "loss", "kl_estimator": "k3"},
}


@pytest.mark.parametrize("name", CASES)
def test_targets_equal_the_oracle(name, rng):
    given, config = some(rng), dataclasses.replace(SIX, **CASES[name])
    tokens = jnp.asarray(rng.normal(size=(6, R)) * np.asarray(given["rollout"].response_mask), jnp.float32)
    given = given(scores=Scores(given["scores"].total, tokens))  # one judge of each token besides that of the whole
    experience, _, metrics, broken = targets(given, config, exact_kl=True)
    advantages, returns, expected = oracle(given, config)
    size = max(1.0, np.abs(returns).max())
    close(experience.advantages, advantages, size)
    close(experience.returns, returns, size)
    assert metrics.keys() == expected.keys()
    for name in expected:
        close(metrics[name], expected[name], 5 * max(1.0, abs(expected[name])))
    sampled = jax.device_get(given["rollout"])
    chex.assert_trees_all_equal(*([x.tokens, x.mask, x.logprobs, x.values] for x in (experience, sampled)))
    assert not broken.any()


def test_whitened_advantages_have_mean_zero_and_variance_one_over_the_batch(rng):
    experience, *_ = targets(some(rng))
    inside = oracles.kept(experience.advantages, experience.response_mask)
    assert abs(oracles.mean(inside)) < 1e-5
    assert abs(oracles.variance(inside) - 1) < 1e-5


def test_an_empty_response_gets_nothing_and_changes_nobody(rng):
    # Row 2 is empty: whatever its score, its targets are zero and the others' stay.
    given = some(rng)
    experience, _, metrics, _ = targets(given)
    other, *_ = targets(given(scores=Scores(given["scores"].total.at[2].set(1e6))))
    chex.assert_trees_all_equal(experience, other)
    assert np.all(experience.advantages[2] == 0)
    assert np.all(experience.returns[2] == 0)
    assert all(np.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_a_batch_of_empty_responses_gives_zeros_and_no_nan(advantage, rng):
    config = dataclasses.replace(GROUPS, advantage=advantage)
    experience, _, metrics, broken = targets(some(rng, lengths=(0,) * 6), config)
    assert np.all(experience.advantages == 0)
    assert all(np.isfinite(x) for x in metrics.values())
    assert not broken.any()
    loss = loss_of(LLAMA, dataclasses.replace(config, ent_coef=0.1))
    (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(random_params(rng, LLAMA), jax.device_put(experience))
    assert value == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_what_lies_beyond_the_end_of_a_response_changes_no_target(rng):
    given = some(rng)
    rollout, (experience, _, metrics, _) = given["rollout"], targets(given)
    mask = np.asarray(rollout.response_mask)
    tokens = jnp.asarray(np.where(mask, rollout.response_tokens, rng.integers(0, V, mask.shape)), jnp.int32)
    other = rollout.replace(
        tokens=jnp.concatenate([rollout.tokens[:, :P], tokens], 1),
        logprobs=jnp.where(mask, rollout.logprobs, -50.0),
        values=jnp.where(mask, rollout.values, 1e3),
    )
    again, _, same_metrics, _ = targets(given(rollout=other))
    np.testing.assert_array_equal(experience.advantages, again.advantages)
    np.testing.assert_array_equal(np.where(mask, experience.returns, 0), np.where(mask, again.returns, 0))
    chex.assert_trees_all_equal(metrics, same_metrics)

    def wider(x):
        return jnp.pad(jnp.asarray(x), ((0, 0), (0, 3)))

    again, _, more_metrics, _ = targets(given(rollout=jax.tree.map(wider, rollout)))
    close(again.advantages, wider(experience.advantages))
    close(again.returns, wider(experience.returns), 10)
    chex.assert_trees_all_close(metrics, more_metrics, rtol=1e-5, atol=1e-5)


# Advantages without a critic: for each the formula of its paper, on the sums of the rewards of a response.


def critic_free(name, rewards, mask, greedy, baseline, gamma):
    """Advantages [B, R] before whitening, with loops; three responses to each of two prompts."""
    sums = [sum(row) for row in rewards]
    advantages = np.zeros(mask.shape)
    for row, t in np.argwhere(mask):
        others = [sums[i] for i in range(6) if i // 3 == row // 3 and i != row]
        group = [*others, sums[row]]
        to_go = sum(gamma ** (s - t) * rewards[row][s] for s in range(t, R))
        advantages[row, t] = {
            "rloo": sums[row] - np.mean(others),
            "grpo": (sums[row] - np.mean(group)) / (np.std(group, ddof=1) + 1e-4),
            "dr_grpo": sums[row] - np.mean(group),
            "reinforce_pp_baseline": sums[row] - np.mean(group),
            "reinforce": to_go - baseline,
            "reinforce_pp": to_go,
            "remax": to_go - greedy[row],
        }[name]
    return advantages


@pytest.mark.parametrize("name", [name for name in METHODS["advantage"] if name != "gae"])
def test_methods_without_a_critic_equal_the_oracle(name, rng):
    gamma = {"gamma": 0.9} if name in ("reinforce", "reinforce_pp", "remax") else {}
    config = dataclasses.replace(GROUPS, advantage=name, **gamma)
    greedy = np.float32(rng.normal(size=6))
    given = some(rng, running=running(baseline=0.7))
    given = given(scores=given["scores"].replace(greedy=jnp.asarray(greedy)))
    given["params"] = {"decoder": given["params"]["decoder"]}
    experience, after, metrics, broken = targets(given, config)
    rollout, mask = given["rollout"], np.asarray(given["rollout"].response_mask)
    ref = taken(log_policy(given["ref_params"], rollout), rollout)
    rewards = oracles.kl_shaped_rewards(given["scores"].total, np.float64(rollout.logprobs), ref, mask, 0.3, "k1")
    raw = critic_free(name, rewards, mask, greedy, 0.7, gamma.get("gamma", 1.0))
    every = oracles.kept(raw, mask)
    close(metrics["advantage/std"], math.sqrt(oracles.variance(every)), 50)
    if name.startswith("reinforce_pp"):
        raw = np.where(mask, (raw - oracles.mean(every)) / math.sqrt(oracles.variance(every)), 0)
    close(experience.advantages, raw, 5 * max(1, np.abs(raw).max()))
    assert not {"value/mean", "value/explained_var"} & metrics.keys()
    assert not broken.any()
    close(after.baseline, 0.9 * 0.7 + 0.1 * np.mean(rewards.sum(1)), 10)
    assert after.kl_coef == np.float32(0.3)


def test_an_infinite_score_that_is_clipped_breaks_nothing(rng):
    given = some(rng)
    endless = Scores(given["scores"].total.at[0].set(jnp.inf))
    broken = targets(given(scores=endless))[3]
    assert broken.tolist() == [True, False, False, False, True, True]  # the score, advantages, returns
    experience, _, _, broken = targets(given(scores=endless), dataclasses.replace(SIX, score_clip=2.0))
    assert not broken.any()
    clipped = Scores(jnp.clip(endless.total, -2, 2))
    np.testing.assert_array_equal(experience.advantages, targets(given(scores=clipped))[0].advantages)


# Another policy acted than the one that learns.


@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_importance_weights_compare_the_actor_with_the_learner(how, rng):
    given, config = some(rng), dataclasses.replace(SIX, importance=how, importance_cap=1.5)
    rollout, params = given["rollout"], given["params"]
    mask = np.asarray(rollout.response_mask)
    # The actor is near the learner: ratios of 0.4 to 2.5.
    logits, values = full_pass(LLAMA, params, rollout)
    learner = taken(policy_logprobs(logits, COLD), rollout)
    log_ratio = rng.uniform(-0.9, 0.9, mask.shape)
    log_ratio = np.where(np.abs(np.abs(log_ratio) - math.log(1.5)) < 0.01, 0.0, log_ratio)  # on one side of the cap
    behaviour = np.where(mask, learner - log_ratio, 0)
    given = given(rollout=rollout.replace(logprobs=jnp.asarray(behaviour, jnp.float32)))
    experience, _, metrics, _ = targets(given, config)
    expected, cut, ratios, kls = np.zeros(mask.shape), [], [], []
    for at in zip(*np.nonzero(mask), strict=True):
        ratio = math.exp(learner[at] - behaviour[at])
        inside = 1 / 1.5 <= ratio <= 1.5
        expected[at] = min(ratio, 1.5) if how == "truncate" else float(inside)
        cut.append(ratio > 1.5 if how == "truncate" else not inside)
        ratios.append(ratio)
        kls.append(ratio - 1 - math.log(ratio))
    close(experience.importance, expected, 5)
    # What PPO calls old is the learner before its first step, so that its ratio is one; values are the learner's too.
    close(experience.logprobs, np.where(mask, learner, 0), 5)
    close(experience.values, np.where(mask, values, 0), 5)
    close(metrics["stale/kl"], np.mean(kls), 10)
    close(metrics["stale/ratio_max"], max(ratios), 10)
    close(metrics["stale/weight_mean"], oracles.mean(oracles.kept(expected, mask)), 10)
    close(metrics["stale/cut_frac"], np.mean(cut))
    # Targets are those of a rollout that the learner itself had made.
    own = given["rollout"].replace(logprobs=jnp.asarray(np.where(mask, learner, 0), jnp.float32),
                                   values=jnp.asarray(np.where(mask, values, 0), jnp.float32))  # fmt: skip
    alone, _, own_metrics, _ = targets(given(rollout=own))
    close(experience.advantages, alone.advantages, 10)
    close(metrics["objective/kl"], own_metrics["objective/kl"], 100)
    assert alone.importance is None


def test_a_kl_in_the_loss_takes_the_reference_along(rng):
    given = some(rng)
    mask = np.asarray(given["rollout"].response_mask)
    ref = taken(log_policy(given["ref_params"], given["rollout"]), given["rollout"])
    for estimator, has_hidden in (("k3", False), ("exact", True)):
        config = dataclasses.replace(SIX, kl_in="loss", kl_estimator=estimator)
        experience, _, metrics, _ = targets(given, config)
        close(np.where(mask, experience.ref_logprobs, 0), np.where(mask, ref, 0), 10)
        assert (experience.ref_hidden is not None) == has_hidden
        assert "kl/exact" not in metrics
    np.testing.assert_allclose(
        metrics["objective/reward"], np.mean(np.where(mask.any(1), given["scores"].total, 0)), rtol=1e-5, atol=1e-6
    )
    assert targets(given)[0].ref_logprobs is None


# Every setting, and the helpers.

CHANGES = {
    "gamma": 0.9, "gae_lambda": 0.5, "critic_lambda": 0.9, "lambda_length_scale": 0.1, "whiten_advantages": "none",
    "whiten_shift": False, "whiten_rewards": True, "kl_estimator": "k2", "kl_clamp": 0.2, "kl_in": "loss",
    "score_scale": "batch", "score_clip": 0.3, "missing_eos_penalty": 0.5, "length_penalty": 0.1, "overlong_buffer": 9,
    "importance": "mask", "exact_kl": True,
}  # fmt: skip


def test_every_setting_of_the_targets_changes_them(rng, monkeypatch):
    """With opinions out of a hat, so that no network has to be compiled; each setting is compared with the base."""
    given, hat = some(rng), [jnp.asarray(-rng.uniform(0.5, 4, (6, R)), jnp.float32) for _ in range(3)]

    def opinions(model, params, ref_params, rollout, config, sampling, exact_kl):
        return Opinions(hat[0], None, -hat[1] if exact_kl else None, hat[2] if config.importance != "none" else None,
                        None)  # fmt: skip

    monkeypatch.setattr(experience_module, "consult", opinions)

    def made(**changes):
        method = resolve(dataclasses.replace(SIX, **changes))
        found = jax.jit(partial(make_experience, ActorCritic(LLAMA), method=method, sampling=COLD))(**given)
        return jax.tree.leaves(jax.device_get(found[::2]))

    base = made()
    for name, value in CHANGES.items():
        changed = made(**{name: value})
        differ = len(base) != len(changed) or any(
            np.max(np.abs(np.float64(a) - np.float64(b))) > 1e-5 for a, b in zip(base, changed, strict=True)
        )
        assert differ, f"{name} is ignored"


def test_the_parts_of_a_score_are_logged_by_name(rng):
    given = some(rng)
    parts = {"length": jnp.arange(6.0), "taste": jnp.asarray(rng.normal(size=6), jnp.float32)}
    metrics = targets(given(scores=given["scores"].replace(parts=parts)))[2]
    np.testing.assert_allclose([metrics["score/length"], metrics["score/taste"]], [2.5, parts["taste"].mean()], 1e-6)


def test_estimates_and_correlations_of_known_numbers():
    # 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, standard error sqrt(14 / (4 x 3)) = 1.0801234.
    told = estimate("x", jnp.array([1.0, 2.0, 3.0, 6.0]))
    assert told.keys() == {"x", "x_se"}
    np.testing.assert_allclose([told["x"], told["x_se"]], [3.0, 1.0801234], rtol=1e-6)
    # With y = 1, 3, 2, 6 around 3: products 4 + 0 + 0 + 9 = 13, both squares 14.
    np.testing.assert_allclose(correlation(jnp.array([1.0, 2, 3, 6]), jnp.array([1.0, 3, 2, 6])), 13 / 14, rtol=1e-6)
    np.testing.assert_allclose(correlation(jnp.arange(4.0), -2 * jnp.arange(4.0)), -1, rtol=1e-6)
    assert correlation(jnp.arange(4.0), jnp.full(4, 0.1)) == 0
