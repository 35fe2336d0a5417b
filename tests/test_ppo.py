"""PPO of a language model: acting and learning agree, targets and loss are those of plain loops, every setting matters.

Tolerances: a logprob that comes by two ways through the model differs by some 1e-6 (see test_sampling.py); what follows
from it in a few sums keeps that size, so 1e-5 times the size of the quantity is allowed unless a comment says more.
"""

import dataclasses
import functools
import math
import re
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from small import (
    MODELS,
    PAD,
    V,
    assert_consumed,
    full_pass,
    left_padded,
    make_bench,
    policy_logprobs,
    random_params,
    random_rollout,
    taken,
    token_set_score,
)

from ppo_jax import ppo
from ppo_jax.config import PPOConfig
from ppo_jax.errors import InputError
from ppo_jax.models import ActorCritic
from ppo_jax.ppo import init_state, make_experience, make_train_step, policy_sampling, ppo_loss, update
from ppo_jax.sampling import SamplingConfig, generate
from ppo_jax.types import Experience, TrainState

GPT2, LLAMA = (dataclasses.replace(MODELS[name], num_layers=1) for name in ("gpt2", "llama"))
P, R = 5, 20  # R is more than a chunk of 16 logits
CONFIG = PPOConfig(
    batch_size=16,
    prompt_length=P,
    response_length=R,
    num_epochs=2,
    num_minibatches=2,
    lr=2e-2,
    adam_eps=1e-4,
    kl_coef=0.01,
    kl_target=2.0,
    kl_horizon=80.0,
)
LOSS_CONFIG = dataclasses.replace(CONFIG, vf_coef=0.3, ent_coef=0.05)
PROMPT_SIZES = (5, 1, 3, 4, 2, 5)
LENGTHS = (R, 1, 0, 7, R - 1, 2)  # full, EOS first, nothing at all, ...


def close(actual, expected, scale: float = 1.0) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale)


# Acting and learning compute the same thing.


@functools.cache
def loss_of(model, config: PPOConfig, sampling):
    """(parameters, experience) to (loss, metrics), compiled once for all tests."""
    return jax.jit(lambda params, batch: ppo_loss(params, ActorCritic(model), batch, config, sampling))


def fresh_rollout(rng, key, model, sampling):
    """(parameters, what they sampled, with advantages and returns of one)."""
    params, prompts = random_params(rng, model), left_padded(rng, PROMPT_SIZES, P)
    rollout = jax.jit(partial(generate, ActorCritic(model), sampling=sampling))(params, prompts, key)
    ones = jnp.ones_like(rollout.logprobs)
    return params, Experience(**vars(rollout), advantages=ones, returns=ones)


LEARNED_COLD = SamplingConfig(R, (1, 2), PAD, temperature=0.7)
ROTARY_HOT = SamplingConfig(R, tuple(range(1, 9)), PAD, temperature=1.3, min_new_tokens=3)


@pytest.mark.parametrize(
    ("model", "sampling"), [(MODELS["gpt2"], LEARNED_COLD), (MODELS["llama"], ROTARY_HOT)], ids=["gpt2", "llama"]
)
def test_the_ratio_of_a_fresh_rollout_is_one(model, sampling, rng, key):
    _, metrics = loss_of(model, CONFIG, sampling)(*fresh_rollout(rng, key, model, sampling))
    assert 0 <= metrics["policy/ratio_dev"] <= 1e-4
    assert abs(metrics["policy/approx_kl"]) <= 1e-8
    assert metrics["policy/clip_frac"] == 0
    # With advantage 1 everywhere, the policy loss is minus the mean ratio.
    assert abs(metrics["policy/loss"] + 1) < 1e-5


def test_the_ratio_tells_of_wrong_positions_masks_and_temperatures(rng, key, monkeypatch):
    model = GPT2
    params, batch = fresh_rollout(rng, key, model, LEARNED_COLD)
    positions_of, causal_mask = ppo.positions_of, ppo.causal_mask
    defects = {
        "none": {},
        "positions of slots": {"positions_of": lambda mask: positions_of(jnp.ones_like(mask))},
        "positions from one": {"positions_of": lambda mask: positions_of(mask) + 1},
        "padding is seen": {"causal_mask": lambda mask: causal_mask(jnp.ones_like(mask))},
        "a token is not seen": {"causal_mask": lambda mask: causal_mask(mask.at[:, P - 1].set(False))},
        "temperature": {"sampling": dataclasses.replace(LEARNED_COLD, temperature=0.75)},
        "forbidden tokens": {"sampling": SamplingConfig(R, tuple(range(9)), PAD, 0.7, min_new_tokens=R)},
    }

    def looked_at(sampling=LEARNED_COLD, **functions):
        with monkeypatch.context() as patch:
            for name, function in functions.items():
                patch.setattr(ppo, name, function)
            return ppo_loss(params, ActorCritic(model), batch, CONFIG, sampling)[1]

    metrics = jax.jit(lambda: {name: looked_at(**defect) for name, defect in defects.items()})()
    assert metrics["none"]["policy/ratio_dev"] <= 1e-4
    for name in list(defects)[1:]:
        assert metrics[name]["policy/ratio_dev"] > 1e-2, name
        assert metrics[name]["policy/approx_kl"] > 1e-6, name


# Targets.


def shaped(rng, config: PPOConfig, lengths=LENGTHS, sampling=LEARNED_COLD):
    """(experience, metrics, what went in): targets of a random rollout against a random reference."""
    model, params = LLAMA, random_params(rng, LLAMA)["decoder"]
    rollout = random_rollout(rng, PROMPT_SIZES, lengths, P, R)
    scores = jnp.asarray(rng.normal(size=len(lengths)), jnp.float32)
    experience, metrics = targets(model, params, rollout, scores, config, sampling)
    return experience, metrics, (model, params, rollout, scores, config, sampling)


@functools.cache
def targets_of(model, config: PPOConfig, sampling):
    """`make_experience`, compiled once for all tests."""
    return jax.jit(partial(make_experience, ActorCritic(model), config=config, sampling=sampling))


def targets(model, params, rollout, scores, config, sampling, kl_coef=0.3):
    return jax.device_get(targets_of(model, config, sampling)(params, rollout, scores, jnp.float32(kl_coef)))


def oracle_targets(model, params, rollout, scores, config, sampling, kl_coef=0.3):
    """(advantages, returns, metrics) row by row; nothing of a row beyond its length is ever looked at."""
    head = {"kernel": np.zeros((model.width, 1), np.float32), "bias": np.zeros(1, np.float32)}
    logits, _ = full_pass(model, {"decoder": params, "value_head": head}, rollout)
    ref = taken(policy_logprobs(logits, sampling), rollout)
    mask, tokens = np.asarray(rollout.response_mask), np.asarray(rollout.response_tokens)
    logprobs, values = np.float64(rollout.logprobs), np.float64(rollout.values)
    rewards = oracles.kl_shaped_rewards(scores, logprobs, ref, mask, kl_coef, config.kl_estimator)
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for row, length in enumerate(mask.sum(1)):
        discounts = [config.gamma] * (length - 1) + [0.0]
        if length:
            advantages[row, :length], returns[row, :length] = oracles.gae(
                rewards[row, :length], discounts, [*values[row, :length], 1e9], config.gae_lambda
            )
    every, real_returns = oracles.kept(advantages, mask), oracles.kept(returns, mask)
    if config.whiten_advantages:
        deviation = math.sqrt(oracles.variance(every) + 1e-8)
        advantages = np.where(mask, (advantages - oracles.mean(every)) / deviation, 0.0)
    errors = oracles.kept(returns - values, mask)
    metrics = {
        "objective/score": oracles.mean(list(scores)),
        "objective/score_std": math.sqrt(oracles.variance(list(scores))),
        "objective/kl": oracles.mean([sum(oracles.kept(x, m)) for x, m in zip(logprobs - ref, mask, strict=True)]),
        "objective/ref_nll": -oracles.mean(oracles.kept(ref, mask)),
        "objective/kl_coef": kl_coef,
        "objective/reward": oracles.mean([sum(row) for row in rewards]),
        "objective/length": oracles.mean(list(mask.sum(1))),
        "objective/eos_frac": oracles.mean(
            [any(t in sampling.eos_ids for t in row[m]) for row, m in zip(tokens, mask, strict=True)]
        ),
        "objective/entropy": -oracles.mean(oracles.kept(logprobs, mask)),
        "value/mean": oracles.mean(oracles.kept(values, mask)),
        "value/explained_var": 1 - oracles.variance(errors) / oracles.variance(real_returns),
    }
    return advantages, returns, metrics


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": 0.9, "gae_lambda": 0.8},
        {"whiten_advantages": False, "kl_estimator": "k3", "num_minibatches": 3, "batch_size": 6},
    ],
    ids=["whitened", "raw"],
)
def test_targets_equal_the_oracle(changes, rng):
    experience, metrics, given = shaped(rng, dataclasses.replace(CONFIG, **changes))
    advantages, returns, expected = oracle_targets(*given)
    size = max(1.0, np.abs(returns).max())
    close(experience.advantages, advantages, size)
    close(experience.returns, returns, size)
    assert metrics.keys() == expected.keys()
    for name in expected:
        close(metrics[name], expected[name], max(1.0, abs(expected[name])))
    chex.assert_trees_all_equal(
        *([x.tokens, x.mask, x.logprobs, x.values] for x in (experience, jax.device_get(given[2])))
    )


def test_whitened_advantages_have_mean_zero_and_variance_one_over_the_batch(rng):
    experience, _, _ = shaped(rng, CONFIG)
    inside = oracles.kept(experience.advantages, experience.response_mask)
    assert abs(oracles.mean(inside)) < 1e-5
    assert abs(oracles.variance(inside) - 1) < 1e-5


def test_an_empty_response_gets_nothing_and_changes_nobody(rng):
    # Row 2 is empty: whatever its score, its targets are zero and the others' stay.
    experience, metrics, (model, params, rollout, scores, config, sampling) = shaped(rng, CONFIG)
    other, _ = targets(model, params, rollout, scores.at[2].set(1e6), config, sampling)
    chex.assert_trees_all_equal(experience, other)
    assert np.all(experience.advantages[2] == 0)
    assert np.all(experience.returns[2] == 0)
    assert all(np.isfinite(x) for x in metrics.values())


def test_a_batch_of_empty_responses_gives_zeros_and_no_nan(rng):
    experience, metrics, (model, params, *_) = shaped(rng, CONFIG, lengths=(0,) * 6)
    assert np.all(experience.advantages == 0)
    assert all(np.isfinite(x) for x in metrics.values())
    params = random_params(rng, model)
    loss = loss_of(model, LOSS_CONFIG, LEARNED_COLD)
    (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, jax.device_put(experience))
    assert value == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_what_lies_beyond_the_end_of_a_response_changes_no_target(rng):
    experience, metrics, (model, params, rollout, scores, config, sampling) = shaped(rng, CONFIG)
    mask = np.asarray(rollout.response_mask)
    garbage = rng.integers(0, V, mask.shape)
    tokens = jnp.asarray(np.where(mask, rollout.response_tokens, garbage), jnp.int32)
    other = rollout.replace(
        tokens=jnp.concatenate([rollout.tokens[:, :P], tokens], 1),
        logprobs=jnp.where(mask, rollout.logprobs, -50.0),
        values=jnp.where(mask, rollout.values, 1e3),
    )
    again, same_metrics = targets(model, params, other, scores, config, sampling)
    np.testing.assert_array_equal(experience.advantages, again.advantages)
    np.testing.assert_array_equal(np.where(mask, experience.returns, 0), np.where(mask, again.returns, 0))
    chex.assert_trees_all_equal(metrics, same_metrics)

    def wider(x):
        return jnp.pad(jnp.asarray(x), ((0, 0), (0, 3)))

    longer = jax.tree.map(wider, rollout)
    again, more_metrics = targets(model, params, longer, scores, config, sampling)
    close(again.advantages, wider(experience.advantages))
    close(again.returns, wider(experience.returns), 10)
    chex.assert_trees_all_close(metrics, more_metrics, rtol=1e-5, atol=1e-5)


# The loss.


def experience_of(rng, params, model, lengths=LENGTHS, sampling=LEARNED_COLD) -> Experience:
    """An experience whose ratios under these parameters are between 0.5 and 1.8, none near a clip boundary."""
    rollout = random_rollout(rng, PROMPT_SIZES, lengths, P, R)
    logits, values = full_pass(model, params, rollout)
    mask, new = np.asarray(rollout.response_mask), taken(policy_logprobs(logits, sampling), rollout)
    new = np.where(np.isfinite(new), new, -3.0)

    def away(x, boundary):
        near = np.abs(np.abs(x) - boundary) < 0.1
        return np.where(near, 0.0, x)

    ratio = 1 + away(rng.uniform(-0.5, 0.8, mask.shape), 0.2)
    move = away(rng.uniform(-0.6, 0.6, mask.shape), 0.2)
    # The value loss has a second kink, where the return is as far from the value as from its clipped move.
    clipped_by = move - np.clip(move, -0.2, 0.2)
    error = rng.normal(size=mask.shape)
    error = np.where(np.abs(error - clipped_by / 2) < 0.1, 1.0, error)
    masked = partial(np.where, mask)
    return Experience(
        tokens=rollout.tokens,
        mask=rollout.mask,
        logprobs=jnp.asarray(masked(new - np.log(ratio), 0), jnp.float32),
        values=jnp.asarray(masked(values - move, 0), jnp.float32),
        advantages=jnp.asarray(masked(rng.normal(size=mask.shape), 0), jnp.float32),
        returns=jnp.asarray(masked(values - error, 0), jnp.float32),
    )


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_loss_equals_its_parts_from_full_logits(model, rng):
    # No token of the responses is an EOS that would be forbidden, and of probability zero.
    sampling = SamplingConfig(R, (V - 1,), PAD, temperature=1.2, min_new_tokens=4)
    params = random_params(rng, model)
    batch = experience_of(rng, params, model, sampling=sampling)
    batch = batch.replace(tokens=jnp.where(batch.tokens == V - 1, 3, batch.tokens))
    logits, values = full_pass(model, params, batch)
    policy, mask = policy_logprobs(logits, sampling), batch.response_mask
    entropies = -np.sum(np.exp(policy) * np.where(np.isfinite(policy), policy, 0), -1)
    policy_loss, policy_metrics, _ = oracles.clipped_policy_loss(
        taken(policy, batch), batch.logprobs, batch.advantages, mask, 0.2
    )
    value_loss, value_clip_frac, _ = oracles.clipped_value_loss(values, batch.values, batch.returns, mask, 0.2)
    entropy = oracles.mean(oracles.kept(entropies, mask))
    expected = {f"policy/{name}": x for name, x in policy_metrics.items()} | {
        "policy/loss": policy_loss,
        "policy/entropy": entropy,
        "value/loss": value_loss,
        "value/clip_frac": value_clip_frac,
    }
    loss, metrics = loss_of(model, LOSS_CONFIG, sampling)(params, batch)
    close(loss, policy_loss + 0.3 * value_loss - 0.05 * entropy, 10)
    assert metrics.keys() == expected.keys()
    for name in expected:
        # A token whose EOS was exchanged above has any ratio: the largest may be large.
        close(metrics[name], expected[name], 10 * max(1.0, policy_metrics["ratio_max"]))


def test_the_gradient_of_the_loss_is_its_slope(rng):
    params = random_params(rng, LLAMA)
    batch = experience_of(rng, params, LLAMA)
    loss = loss_of(LLAMA, LOSS_CONFIG, LEARNED_COLD)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    gradient, _ = jax.jit(jax.grad(loss, has_aux=True))(params, batch)
    gradient = np.asarray(jax.flatten_util.ravel_pytree(gradient)[0], np.float64)
    size = np.linalg.norm(gradient)
    assert size > 1e-2

    def central(direction, step):
        ends = (flat + jnp.asarray(sign * step * direction, jnp.float32) for sign in (1, -1))
        up, down = (float(loss(unravel(end), batch)[0]) for end in ends)
        return (up - down) / (2 * step)

    random = rng.normal(size=gradient.shape)
    for direction in (gradient / size, random / np.linalg.norm(random)):
        # Extrapolated from two steps, so that what is left is of fourth order. A loss of about 1 is rounded by 1e-7 a
        # few times, which the step divides into some 1e-3; no ratio moves so far that it meets its clip boundary.
        slope = (4 * central(direction, 1e-3) - central(direction, 2e-3)) / 3
        assert abs(slope - gradient @ direction) < 5e-3 * (1 + size)


def test_only_the_sampled_tokens_and_their_past_matter_to_the_loss(rng):
    params = random_params(rng, LLAMA)
    batch = experience_of(rng, params, LLAMA)
    mask = np.asarray(batch.response_mask)

    def garbage(x):
        return jnp.where(mask, x, jnp.asarray(rng.normal(size=mask.shape), jnp.float32))

    names = ("logprobs", "values", "advantages", "returns")
    other = batch.replace(**{name: garbage(getattr(batch, name)) for name in names})
    tokens = np.where(batch.mask, batch.tokens, rng.integers(0, V, batch.tokens.shape)).astype(np.int32)
    loss = loss_of(LLAMA, LOSS_CONFIG, LEARNED_COLD)
    chex.assert_trees_all_equal(loss(params, batch), loss(params, other.replace(tokens=jnp.asarray(tokens))))


# The update: a model of one table, so that it compiles at once, that notes the rows that it learns from.


class Bigram:
    """Stands for an `ActorCritic`: logits and value of the next token depend on the newest token alone."""

    def __init__(self):
        self.batches = []

    def apply(self, variables, *args, method):
        return getattr(self, method)(variables["params"], *args)

    def trunk(self, params, tokens, positions, mask):
        jax.debug.callback(lambda rows: self.batches.append(rows.tolist()), tokens[:, 0], ordered=True)
        return jax.nn.one_hot(tokens, V), None

    def logits(self, params, hidden):
        return hidden @ params["table"]

    def value(self, params, hidden):
        return hidden @ params["values"]


def bigram_update(config: PPOConfig, tx=None):
    """(experience, key[, parameters]) to (new parameters, metrics, minibatches as lists of row numbers)."""
    model, tx = Bigram(), tx or optax.sgd(config.lr)
    shardings = SimpleNamespace(batch=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    compiled = jax.jit(partial(update, model, tx, config=config, sampling=LEARNED_COLD, shardings=shardings))

    def run(experience, key, params=None):
        params = params or {"table": jnp.zeros((V, V)), "values": jnp.zeros(V)}
        params, _, metrics = compiled(params, tx.init(params), experience, key)
        jax.effects_barrier()
        return params, jax.device_get(metrics), model.batches

    return run


def numbered_experience(rng, batch: int) -> Experience:
    """Full rows whose first token is their number, sampled by a uniform policy."""
    rollout = random_rollout(rng, [P] * batch, [R] * batch, P, R)
    return Experience(
        tokens=rollout.tokens.at[:, 0].set(jnp.arange(batch)),
        mask=rollout.mask,
        logprobs=jnp.full((batch, R), -math.log(V)),
        values=jnp.zeros((batch, R)),
        advantages=rollout.values,
        returns=jnp.flip(rollout.values),
    )


@pytest.mark.parametrize(("num_epochs", "num_minibatches"), [(3, 4), (2, 1), (1, 12)])
def test_every_epoch_sees_every_row_once_in_a_new_order(num_epochs, num_minibatches, rng, key):
    config = dataclasses.replace(CONFIG, batch_size=12, num_epochs=num_epochs, num_minibatches=num_minibatches)
    _, _, batches = bigram_update(config)(numbered_experience(rng, 12), key)
    assert [len(batch) for batch in batches] == [12 // num_minibatches] * (num_epochs * num_minibatches)
    orders = np.array(batches).reshape(num_epochs, 12).tolist()
    assert all(sorted(order) == list(range(12)) for order in orders)
    # 12! orders: two are equal, or one is the identity, once in 10^8 runs.
    assert len({tuple(order) for order in [*orders, range(12)]}) == num_epochs + 1


def test_metrics_of_an_update_are_means_over_its_steps_but_for_the_first_and_the_largest(rng, key):
    config = dataclasses.replace(CONFIG, batch_size=4, num_epochs=1, num_minibatches=1, lr=5.0)
    experience = numbered_experience(rng, 4)
    first, second, both = jax.random.split(key, 3)
    step = bigram_update(config)
    params, one, _ = step(experience, first)
    _, two, _ = step(experience, second, params)
    _, metrics, _ = bigram_update(dataclasses.replace(config, num_epochs=2))(experience, both)
    assert abs(one["policy/first_ratio_dev"]) < 1e-5
    assert abs(one["policy/first_approx_kl"]) < 1e-8
    assert two["policy/first_ratio_dev"] > 0.1
    assert two["policy/first_approx_kl"] == two["policy/approx_kl"] > 1e-3
    expected = {name: (one[name] + two[name]) / 2 for name in one}
    expected |= {name: one[name] for name in ("policy/first_ratio_dev", "policy/first_approx_kl")}
    expected["policy/ratio_max"] = two["policy/ratio_max"]
    assert two["policy/ratio_max"] > one["policy/ratio_max"]
    assert metrics.keys() == expected.keys()
    for name in expected:
        close(metrics[name], expected[name], max(1.0, abs(expected[name])))


def test_an_update_is_so_many_gradient_steps_of_the_loss(rng, key):
    config = dataclasses.replace(CONFIG, batch_size=4, num_epochs=3, num_minibatches=1)
    experience, model, tx = numbered_experience(rng, 4), Bigram(), optax.sgd(0.5, momentum=0.9)
    params, _, _ = bigram_update(config, tx)(experience, key)
    grad = jax.jit(jax.grad(lambda p: ppo_loss(p, model, experience, config, LEARNED_COLD)[0]))
    expected = {"table": jnp.zeros((V, V)), "values": jnp.zeros(V)}
    moved = expected
    for _ in range(3):  # the optimizer's state goes from step to step
        moved = jax.tree.map(lambda m, g: 0.9 * m + g, moved, grad(expected))
        expected = jax.tree.map(lambda x, m: x - 0.5 * m, expected, moved)
    assert np.abs(expected["table"]).max() > 0.01
    chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-6)


# Every setting changes what it is about. Optimizer first, then targets, loss, update; the rest have tests of their own.

CHANGES = {
    "optimizer": {
        "lr": 1e-3, "lr_schedule": "cosine", "warmup_iterations": 3, "adam_b1": 0.5, "adam_b2": 0.5, "adam_eps": 1e-1,
        "weight_decay": 0.1, "max_grad_norm": 0.1,
    },
    "targets": {"gamma": 0.9, "gae_lambda": 0.5, "whiten_advantages": False, "kl_estimator": "k2"},
    "loss": {"clip_eps": 0.1, "value_clip_eps": 0.1, "vf_coef": 0.2, "ent_coef": 0.01},
    "update": {"num_epochs": 3, "num_minibatches": 4},
    "policy": {"temperature": 0.5, "min_new_tokens": 4},
    # Sizes, and the KL coefficient with its rule: see the tests of the whole iteration below.
    "elsewhere": dict.fromkeys("batch_size prompt_length response_length kl_coef kl_target kl_horizon".split()),
}  # fmt: skip


def test_every_field_of_the_config_stands_in_one_row_of_the_table():
    names = [name for row in CHANGES.values() for name in row]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(PPOConfig))


def variants(what: str, base: PPOConfig) -> dict[str, PPOConfig]:
    return {"": base} | {name: dataclasses.replace(base, **{name: x}) for name, x in CHANGES[what].items()}


def assert_all_differ(results: dict[str, object]) -> None:
    base = jax.tree.leaves(results.pop(""))
    for name, result in results.items():
        moved = max(np.max(np.abs(np.asarray(a) - b)) for a, b in zip(base, jax.tree.leaves(result), strict=True))
        assert moved > 1e-5, f"{name} is ignored"


def test_every_setting_of_the_optimizer_changes_its_steps(rng):
    params = {"matrix": jnp.asarray(rng.normal(size=(3, 2))), "vector": jnp.ones(2)}
    grads = [jax.tree.map(lambda x, s=s: jnp.asarray(s * rng.normal(size=x.shape)), params) for s in (1.0, 3.0, 0.1)]
    model_params = random_params(rng, GPT2)

    def steps(config):
        tx, moved = make_bench(model_params, GPT2, config, num_iterations=10).tx, params
        opt_state = tx.init(params)
        for grad in grads:
            updates, opt_state = tx.update(grad, opt_state, moved)
            moved = optax.apply_updates(moved, updates)
        return moved

    config = dataclasses.replace(CONFIG, num_epochs=1, num_minibatches=1)
    assert_all_differ({name: steps(changed) for name, changed in variants("optimizer", config).items()})


def test_every_setting_of_the_targets_changes_them(rng):
    _, _, (model, params, rollout, scores, *_) = shaped(rng, CONFIG)

    @jax.jit
    def all_targets():
        def of(config):
            given = params, rollout, scores, jnp.float32(0.3), config, LEARNED_COLD
            made, _ = make_experience(ActorCritic(model), *given)
            return made.advantages, made.returns

        return {name: of(config) for name, config in variants("targets", CONFIG).items()}

    assert_all_differ(all_targets())


def test_every_setting_of_the_loss_changes_it(rng):
    params = random_params(rng, LLAMA)
    batch = experience_of(rng, params, LLAMA)

    @jax.jit
    def all_losses():
        configs = variants("loss", CONFIG).items()
        return {name: ppo_loss(params, ActorCritic(LLAMA), batch, config, LEARNED_COLD)[0] for name, config in configs}

    assert_all_differ(all_losses())


def test_every_setting_of_the_update_changes_the_parameters(rng, key):
    experience = numbered_experience(rng, 8)
    configs = variants("update", dataclasses.replace(CONFIG, lr=0.5)).items()
    assert_all_differ({name: bigram_update(config)(experience, jax.random.clone(key))[0] for name, config in configs})


def test_every_setting_of_the_policy_changes_its_logprobs(rng):
    params = random_params(rng, LLAMA)
    batch = experience_of(rng, params, LLAMA)
    configs = variants("policy", CONFIG).items()
    samplings = {name: make_bench(params, LLAMA, config, eos_ids=range(1, 9)).sampling for name, config in configs}

    @jax.jit
    def all_losses():
        return {
            name: ppo_loss(params, ActorCritic(LLAMA), batch, CONFIG, sampling)[1]["policy/entropy"]
            for name, sampling in samplings.items()
        }

    assert_all_differ(all_losses())


def test_an_infinite_value_clip_turns_it_off(rng):
    params = random_params(rng, LLAMA)
    batch = experience_of(rng, params, LLAMA)
    config = dataclasses.replace(CONFIG, value_clip_eps=math.inf)
    _, metrics = loss_of(LLAMA, config, LEARNED_COLD)(params, batch)
    values, mask = full_pass(LLAMA, params, batch)[1], np.asarray(batch.response_mask)
    assert metrics["value/clip_frac"] == 0
    close(metrics["value/loss"], 0.5 * np.mean((values - np.asarray(batch.returns))[mask] ** 2), 10)


# The train step: a whole iteration as one program, and as two around a score on the host.


@pytest.fixture(scope="module")
def bench():
    """A train step whose score is a share of tokens; the parameters are the same in each run."""
    return make_bench(random_params(np.random.default_rng(1), LLAMA, scale=0.1), LLAMA, CONFIG, score=token_set_score)


@pytest.fixture(scope="module")
def program(bench):
    """`iterate`, compiled ahead of time."""
    prompts = bench.prompts(np.random.default_rng(2))
    return bench.step.iterate.lower(bench.state(), bench.reference(), prompts, ()).compile()


def run(bench, program, iterations: int, seed: int = 0):
    """(the state after so many iterations, a list of (metrics, experience, scores))."""
    state, reference, rng, history = bench.state(seed), bench.reference(), np.random.default_rng(seed), []
    for _ in range(iterations):
        state, *results = program(state, reference, bench.prompts(rng), ())
        history.append(jax.device_get(results))
    return state, history


def numbers(state: TrainState):
    """A state as arrays that can be compared."""
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def test_a_policy_learns_what_is_rewarded(bench, program):
    _, history = run(bench, program, 16)
    scores = [metrics["objective/score"] for metrics, _, _ in history]
    assert np.mean(scores[:2]) < 0.55
    assert np.mean(scores[-2:]) > 0.75
    assert all(0 <= metrics["policy/first_ratio_dev"] <= 1e-4 for metrics, _, _ in history)
    assert all(abs(metrics["policy/first_approx_kl"]) <= 1e-8 for metrics, _, _ in history)
    assert all(np.isfinite(x) for metrics, _, _ in history for x in metrics.values())
    assert history[-1][0]["objective/kl"] > history[0][0]["objective/kl"]
    assert abs(history[0][0]["objective/kl"]) < 1e-4  # the policy starts as its reference


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(bench, program):
    (state, history), (again, same) = run(bench, program, 3), run(bench, program, 3)
    chex.assert_trees_all_equal(numbers(state), numbers(again))
    chex.assert_trees_all_equal(history, same)
    _, other = run(bench, program, 1, seed=1)
    assert np.any(other[0][1].tokens != history[0][1].tokens)


def test_score_on_the_host_gives_the_iteration_of_the_single_program(bench, program):
    state, reference, rng = bench.state(), bench.reference(), np.random.default_rng(0)
    expected_state, history = run(bench, program, 2)
    for expected_metrics, experience, scores in history:
        rollout = bench.step.act(state, bench.prompts(rng))
        np.testing.assert_array_equal(rollout.tokens, experience.tokens)
        close(rollout.logprobs, experience.logprobs)
        host_scores = jnp.asarray(np.asarray(bench.step.score((), rollout)))
        np.testing.assert_array_equal(host_scores, scores)
        before, measured = state, bench.step.measure(state, reference, rollout, host_scores)
        state, metrics = bench.step.learn(state, reference, rollout, host_scores)
        assert_consumed(before)
        assert metrics.keys() == expected_metrics.keys()
        # Two programs round differently, by 1e-6 in the gradient; Adam divides that by at least its eps of 1e-4.
        chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-3, atol=1e-4)
        chex.assert_trees_all_close(measured, {name: metrics[name] for name in measured}, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(state.params, expected_state.params, rtol=0, atol=1e-4)
    assert state.step == expected_state.step == 2
    # Second iterations compiled nothing.
    assert [f._cache_size() for f in (bench.step.act, bench.step.learn, bench.step.measure)] == [1, 1, 1]


def test_the_state_is_donated_and_the_reference_is_not_touched(bench, program):
    state, reference, prompts = bench.state(), bench.reference(), bench.prompts(np.random.default_rng(0))
    before = jax.device_get(reference)
    new_state, *_ = program(state, reference, prompts, ())
    assert_consumed(state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new_state, reference, prompts)))
    chex.assert_trees_all_equal(jax.device_get(reference), before)
    moved = jax.tree.map(lambda a, b: np.any(a != b), jax.device_get(new_state.params["decoder"]), before)
    assert all(jax.tree.leaves(moved))


def test_a_new_state_of_the_same_tree_comes_out(bench, program):
    state = bench.state()
    expected = jax.eval_shape(lambda: state)
    key = np.array(jax.random.key_data(state.key))
    new_state, *_ = program(state, bench.reference(), bench.prompts(np.random.default_rng(0)), ())
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, expected)
    np.testing.assert_array_equal(jax.random.key_data(new_state.key), key)
    counts = [count for _, count in optax.tree_utils.tree_get_all_with_path(new_state.opt_state, "count")]
    assert counts == [CONFIG.updates_per_iteration] * 2  # Adam's and the schedule's


def test_each_iteration_acts_with_a_key_of_its_own(bench):
    prompts, state = bench.prompts(np.random.default_rng(0)), bench.state()
    rollouts = [bench.step.act(state.replace(step=state.step + i), prompts) for i in (0, 1, 0)]
    np.testing.assert_array_equal(rollouts[0].tokens, rollouts[2].tokens)
    assert np.mean(rollouts[0].response_tokens != rollouts[1].response_tokens) > 0.5


def test_acting_and_learning_have_keys_of_their_own_in_every_iteration(bench, monkeypatch):
    def generate(model, params, prompts, key, sampling):
        return jax.random.key_data(key)

    def update(model, tx, params, opt_state, experience, key, *rest):
        return params, opt_state, {"key": jax.random.key_data(key)}

    monkeypatch.setattr(ppo, "generate", generate)
    monkeypatch.setattr(ppo, "update", update)
    monkeypatch.setattr(ppo, "make_experience", lambda *given: (None, {"objective/kl": jnp.float32(1.0)}))
    step = make_train_step(bench.model, bench.tx, bench.config, bench.sampling, bench.shardings)
    state, used = bench.state(), []
    used.append(np.array(jax.random.key_data(state.key)))
    for _ in range(3):
        used.append(np.asarray(step.act(state, jnp.zeros(2))))
        state, metrics = step.learn(state, bench.reference(), jnp.zeros(2), jnp.zeros(2))
        used.append(np.asarray(metrics["key"]))
    assert len(np.unique(used, axis=0)) == 7  # the state's own key is not among them


def test_the_adaptive_kl_coefficient_follows_its_formula(bench, program):
    # kl_target 2 nats, horizon 80 sequences, 16 sequences an iteration: at most 4 % up or down.
    state, history = run(bench, program, 6)
    coefficients = [metrics["objective/kl_coef"] for metrics, _, _ in history] + [state.kl_coef]
    assert coefficients[0] == np.float32(CONFIG.kl_coef)
    for (metrics, _, _), before, after in zip(history, coefficients[:-1], coefficients[1:], strict=True):
        error = min(max(metrics["objective/kl"] / 2.0 - 1, -0.2), 0.2)
        np.testing.assert_allclose(after, before * (1 + error * 16 / 80), rtol=1e-6)
    assert coefficients[1] < coefficients[0]  # no divergence at first
    assert coefficients[-1] > coefficients[-2]  # too much at last


def test_no_array_holds_the_logits_of_all_response_tokens(program):
    shapes = re.findall(rf"\[([\d,]*\b{V}\b[\d,]*)\]", program.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    minibatch, chunk = CONFIG.batch_size // CONFIG.num_minibatches, R // 2  # two even chunks of at most 16
    assert max(sizes) == minibatch * chunk * V < minibatch * R * V


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 5},
        {"top_p": 0.9},
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"min_new_tokens": 1},
        {"max_new_tokens": R - 1},
    ],
)
def test_training_on_another_distribution_than_the_sampled_one_is_refused(bench, changes):
    sampling = dataclasses.replace(bench.sampling, **changes)
    with pytest.raises(InputError, match="PPO trains on the distribution that it samples from"):
        make_train_step(bench.model, bench.tx, bench.config, sampling, bench.shardings)


def test_the_policy_samples_as_the_config_says():
    config = dataclasses.replace(CONFIG, temperature=0.7, min_new_tokens=3)
    sampling = policy_sampling(config, (1, 2), PAD)
    assert sampling == SamplingConfig(R, (1, 2), PAD, temperature=0.7, min_new_tokens=3)


def test_without_a_jax_score_there_is_no_single_program(bench):
    step = make_train_step(bench.model, bench.tx, bench.config, bench.sampling, bench.shardings)
    assert step.score is None
    assert step.iterate is None


def test_a_fresh_state_has_the_given_decoder_and_a_critic_that_says_zero(rng, key):
    params = random_params(rng, LLAMA)["decoder"]
    tx = optax.sgd(1.0)
    state = init_state(params, ActorCritic(LLAMA), tx, dataclasses.replace(CONFIG, kl_coef=0.25), jax.random.clone(key))
    chex.assert_trees_all_equal(state.params["decoder"], params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(state.params["value_head"]))
    assert state.step == 0
    assert state.kl_coef == 0.25
    assert np.any(jax.random.key_data(state.key) != jax.random.key_data(key))


# A critic with a trunk of its own


def with_critic(rng, model):
    """(parameters of an actor-critic that has one, those of the same critic alone with the decoder's head for show)."""
    params, critic = random_params(rng, model), random_params(rng, model)
    trunk = {name: x for name, x in critic["decoder"].items() if name != "lm_head"}
    return params | {"critic": trunk, "value_head": critic["value_head"]}, critic


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_critic_of_its_own_values_every_state_and_changes_no_sample(model, rng, key):
    params, critic = with_critic(rng, model)
    config = dataclasses.replace(CONFIG, batch_size=6, num_minibatches=3)
    prompts = left_padded(rng, PROMPT_SIZES, P)
    acting = jax.jit(partial(ppo.act, ActorCritic(model), config=config, sampling=LEARNED_COLD))
    rollout = acting(params, prompts, key)
    mask = np.asarray(rollout.response_mask)
    close(rollout.values, np.where(mask, full_pass(model, critic, rollout)[1], 0), 10)
    assert np.all(rollout.values[~mask] == 0)

    without = {name: params[name] for name in ("decoder", "value_head")}
    other = acting(without, prompts, jax.random.clone(key))
    chex.assert_trees_all_equal(rollout.replace(values=0), other.replace(values=0))
    assert np.abs(rollout.values - other.values).max() > 0.1

    # What was sampled has ratio one, and the values of acting are those of learning.
    ones = jnp.ones_like(rollout.logprobs)
    batch = Experience(**vars(rollout), advantages=ones, returns=rollout.values)
    _, metrics = loss_of(model, CONFIG, LEARNED_COLD)(params, batch)
    assert 0 <= metrics["policy/ratio_dev"] <= 1e-4
    assert metrics["value/loss"] < 1e-9


def test_a_critic_of_its_own_learns_apart_from_the_policy(rng):
    params, critic = with_critic(rng, LLAMA)
    batch = experience_of(rng, params | {"value_head": critic["value_head"]}, LLAMA)
    gradient = jax.jit(jax.grad(loss_of(LLAMA, LOSS_CONFIG, LEARNED_COLD), has_aux=True))
    deaf = jax.jit(jax.grad(loss_of(LLAMA, dataclasses.replace(LOSS_CONFIG, vf_coef=0.0), LEARNED_COLD), has_aux=True))
    (grads, metrics), (others, _) = gradient(params, batch), deaf(params, batch)
    # The value loss is that of the critic's full pass, and moves nothing of the policy; the policy moves nothing of it.
    values = full_pass(LLAMA, critic, batch)[1]
    value_loss, clip_frac, _ = oracles.clipped_value_loss(
        values, batch.values, batch.returns, np.asarray(batch.response_mask), 0.2
    )
    close(metrics["value/loss"], value_loss, 10 * max(1.0, value_loss))
    assert abs(metrics["value/clip_frac"] - clip_frac) < 0.1
    chex.assert_trees_all_close(grads["decoder"], others["decoder"], rtol=1e-4, atol=1e-5)
    assert optax.tree.norm(grads["critic"]) > 1e-2
    assert optax.tree.norm(grads["value_head"]) > 1e-2
    assert all(np.all(leaf == 0) for name in ("critic", "value_head") for leaf in jax.tree.leaves(others[name]))


def test_a_fresh_state_with_a_critic_is_the_reward_model(rng, key):
    params, (critic, _) = random_params(rng, LLAMA)["decoder"], with_critic(rng, LLAMA)
    head = {"kernel": jnp.asarray(rng.normal(size=(LLAMA.width, 1)), jnp.float32)}
    reward_model = {"decoder": critic["critic"], "score_head": head}
    tx = optax.adam(1e-3)
    state = init_state(params, ActorCritic(LLAMA), tx, CONFIG, jax.random.clone(key), reward_model)
    assert state.params.keys() == {"decoder", "critic", "value_head"}
    chex.assert_trees_all_equal(state.params["decoder"], params)
    chex.assert_trees_all_equal(state.params["critic"], reward_model["decoder"])
    np.testing.assert_array_equal(state.params["value_head"]["kernel"], head["kernel"])
    np.testing.assert_array_equal(state.params["value_head"]["bias"], [0])
    # The optimizer moves all of it, and the same run without a critic has the same random numbers.
    chex.assert_trees_all_equal_shapes(state.opt_state[0].mu, state.params)
    other = init_state(params, ActorCritic(LLAMA), tx, CONFIG, jax.random.clone(key))
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(other.key))
