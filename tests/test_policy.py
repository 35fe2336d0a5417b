"""Who acts and what is thought of it: acting and learning compute the same, whatever is trained and whoever judges."""

import dataclasses
import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import (
    COLD,
    MODELS,
    ONE_LAYER,
    PAD,
    PPO,
    PROMPT_SIZES,
    SIX,
    P,
    R,
    close,
    full_pass,
    left_padded,
    loss_of,
    policy_logprobs,
    random_params,
)

from experiments.methods import resolve
from ppo_jax import policy
from ppo_jax.models import ActorCritic, LoRAConfig, init_adapter, merge, overlay, upper_layers
from ppo_jax.policy import act, policy_params, policy_sampling, response_hidden, response_kl
from ppo_jax.sampling import SamplingConfig, generate
from ppo_jax.types import Experience
from ppo_jax.update import make_minibatch, ppo_loss

GPT2, LLAMA = ONE_LAYER["gpt2"], ONE_LAYER["llama"]
ROTARY_HOT = SamplingConfig(R, tuple(range(1, 9)), PAD, temperature=1.3, min_new_tokens=3)
CUT = SamplingConfig(R, (1,), PAD, truncate_id=5, truncate_after=4)


def with_ones(rollout) -> Experience:
    """A rollout whose advantages and returns are one."""
    ones = jnp.ones_like(rollout.logprobs)
    return Experience(**vars(rollout), advantages=ones, returns=ones)


@functools.cache
def acting(model, config, sampling):
    """(parameters of the whole, prompts, key) to a rollout, compiled once for all tests."""
    return jax.jit(partial(act, ActorCritic(model), config=config, sampling=sampling))


def fresh_rollout(rng, key, model, sampling):
    """(parameters, what they sampled)."""
    params, prompts = random_params(rng, model), left_padded(rng, PROMPT_SIZES, P)
    return params, acting(model, SIX, sampling)(params, prompts, key)


# Acting and learning compute the same thing.


def assert_ratio_one(metrics) -> None:
    assert 0 <= metrics["policy/ratio_dev"] <= 1e-4
    assert abs(metrics["policy/approx_kl"]) <= 1e-8
    assert abs(metrics["policy/approx_kl_k1"]) <= 1e-4
    assert metrics["policy/clip_frac"] == 0
    # With advantage 1 everywhere, the policy loss is minus the mean ratio.
    assert abs(metrics["policy/loss"] + 1) < 1e-5


@pytest.mark.parametrize(
    ("model", "sampling"),
    [(MODELS["gpt2"], COLD), (MODELS["llama"], ROTARY_HOT), (GPT2, CUT)],
    ids=["gpt2", "llama", "truncated"],
)
def test_the_ratio_of_a_fresh_rollout_is_one(model, sampling, rng, key):
    params, rollout = fresh_rollout(rng, key, model, sampling)
    assert_ratio_one(loss_of(model, SIX, sampling)(params, with_ones(rollout))[1])


def test_the_ratio_tells_of_wrong_positions_masks_and_temperatures(rng, key, monkeypatch):
    params, rollout = fresh_rollout(rng, key, GPT2, COLD)
    positions_of, causal_mask = policy.positions_of, policy.causal_mask
    defects = {
        "none": {},
        "positions of slots": {"positions_of": lambda mask: positions_of(jnp.ones_like(mask))},
        "positions from one": {"positions_of": lambda mask: positions_of(mask) + 1},
        "padding is seen": {"causal_mask": lambda mask: causal_mask(jnp.ones_like(mask))},
        "a token is not seen": {"causal_mask": lambda mask: causal_mask(mask.at[:, P - 1].set(False))},
        "temperature": {"sampling": dataclasses.replace(COLD, temperature=0.75)},
        "forbidden tokens": {"sampling": SamplingConfig(R, tuple(range(9)), PAD, 0.7, min_new_tokens=R)},
    }
    batch = make_minibatch(with_ones(rollout), None, resolve(SIX))

    def looked_at(sampling=COLD, **functions):
        with monkeypatch.context() as patch:
            for name, function in functions.items():
                patch.setattr(policy, name, function)
            return ppo_loss(params, {}, ActorCritic(GPT2), batch, jnp.float32(0), resolve(SIX), sampling)[1]

    metrics = jax.jit(lambda: {name: looked_at(**defect) for name, defect in defects.items()})()
    assert metrics["none"]["policy/ratio_dev"] <= 1e-4
    for name in list(defects)[1:]:
        assert metrics[name]["policy/ratio_dev"] > 1e-2, name
        assert metrics[name]["policy/approx_kl"] > 1e-6, name


# What is trained may be less than everything.

TRAINED = {
    "lora": lambda base, key: init_adapter(base, LoRAConfig(rank=2, targets="query|value|down"), key),
    "dora": lambda base, key: init_adapter(base, LoRAConfig(rank=2, dora=True), key),
    "hydra": lambda base, key: upper_layers(base, MODELS["llama"], 1),
}


@pytest.mark.parametrize("form", TRAINED)
def test_what_is_trained_acts_and_learns_over_the_frozen_rest(form, rng, key):
    """The ratio is one; the policy is that of the merged parameters, and not the reference; the gradient is its own."""
    adapt, sample = jax.random.split(key)
    model = dataclasses.replace(MODELS["llama"], lora_scale=2.0)
    params = random_params(rng, model)
    base = params["decoder"]
    trained = TRAINED[form](base, adapt)
    trained = jax.tree.map(lambda x: x + 0.3 * jnp.asarray(rng.normal(size=x.shape), x.dtype), trained)
    state_params = {"decoder": trained, "value_head": params["value_head"]}
    whole = policy_params(state_params, base)
    chex.assert_trees_all_equal(whole, {"decoder": overlay(base, trained), "value_head": params["value_head"]})
    prompts = left_padded(rng, PROMPT_SIZES, P)
    rollout = acting(model, SIX, COLD)(whole, prompts, sample)
    batch = with_ones(rollout)
    (_, metrics), grads = jax.jit(jax.value_and_grad(loss_of(model, SIX), has_aux=True))(state_params, batch, base)
    assert_ratio_one(metrics)
    chex.assert_trees_all_equal_shapes(grads, state_params)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))

    plain = {"decoder": merge(whole["decoder"], model.lora_scale), "value_head": params["value_head"]}
    mask, tokens = np.asarray(rollout.response_mask), np.asarray(rollout.response_tokens)
    for parameters, same in ((plain, True), (params, False)):
        logprobs = policy_logprobs(full_pass(model, parameters, rollout)[0], COLD)
        chosen = np.take_along_axis(logprobs, tokens[..., None], 2)[..., 0]
        error = np.abs(np.asarray(rollout.logprobs) - chosen)[mask].max()
        assert error < 1e-4 if same else error > 0.1


# Several responses to a prompt.


def test_responses_to_one_prompt_stand_one_after_the_other(rng, key):
    config = dataclasses.replace(PPO, batch_size=12, responses_per_prompt=3)
    params, prompts = random_params(rng, LLAMA), left_padded(rng, (5, 1, 3, 4), P)
    rollout = acting(LLAMA, config, COLD)(params, prompts, key)
    for row in range(12):
        np.testing.assert_array_equal(rollout.tokens[row, :P], prompts.tokens[row // 3])
        np.testing.assert_array_equal(rollout.mask[row, :P], prompts.mask[row // 3])
    # As if the prompts had come three times: the same draws.
    repeated = jax.tree.map(lambda x: jnp.asarray(np.repeat(x, 3, axis=0)), prompts)
    sampling = jax.jit(partial(generate, ActorCritic(LLAMA), sampling=COLD))
    again = sampling(params, repeated, jax.random.clone(key))
    np.testing.assert_array_equal(rollout.tokens, again.tokens)
    # And different ones for each of the three: V^3 first tokens of a flat enough policy.
    responses = np.where(rollout.response_mask, rollout.response_tokens, -1).reshape(4, 3, R)
    assert sum(len(np.unique(group, axis=0)) for group in responses) > 8


# The settings of the policy.


def test_the_policy_samples_as_the_config_says():
    config = dataclasses.replace(PPO, temperature=0.7, min_new_tokens=3, truncate_after=5)
    expected = SamplingConfig(R, (1, 2), PAD, temperature=0.7, min_new_tokens=3, truncate_id=8, truncate_after=5)
    assert policy_sampling(config, (1, 2), PAD, truncate_id=8) == expected
    assert policy_sampling(PPO, (1, 2), PAD) == SamplingConfig(R, (1, 2), PAD)


def test_every_setting_of_the_policy_changes_its_logprobs(rng, key):
    params, rollout = fresh_rollout(rng, key, LLAMA, SamplingConfig(R, tuple(range(1, 9)), PAD))
    changes = {"": {}, "temperature": {"temperature": 0.5}, "min_new_tokens": {"min_new_tokens": 4}}
    batch = make_minibatch(with_ones(rollout), None, resolve(SIX))

    @jax.jit
    def entropies():
        def of(changed):
            sampling = policy_sampling(dataclasses.replace(SIX, **changed), tuple(range(1, 9)), PAD)
            given = params, {}, ActorCritic(LLAMA), batch, jnp.float32(0), resolve(SIX), sampling
            return ppo_loss(*given)[1]["policy/entropy"]

        return {name: of(changed) for name, changed in changes.items()}

    found = entropies()
    for name in list(changes)[1:]:
        assert abs(found[name] - found[""]) > 1e-3, f"{name} is ignored"


# Parts of a batch, and the divergence of whole distributions.


@pytest.mark.parametrize("sampling", [COLD, ROTARY_HOT], ids=["cold", "forbidden tokens"])
def test_the_exact_kl_is_the_sum_over_the_vocabulary(sampling, rng, key):
    params, rollout = fresh_rollout(rng, key, LLAMA, sampling)
    reference = random_params(rng, LLAMA)
    model = ActorCritic(LLAMA)

    @jax.jit
    def exact(ref_params):
        hidden, ref_hidden = (response_hidden(model, p, rollout) for p in (params, ref_params))
        return response_kl(model, params, hidden, ref_params["decoder"], ref_hidden, sampling)

    mask = np.asarray(rollout.response_mask)
    ours, theirs = (policy_logprobs(full_pass(LLAMA, p, rollout)[0], sampling) for p in (params, reference))
    allowed = np.isfinite(ours)
    ours, theirs = np.where(allowed, ours, 0), np.where(allowed, theirs, 0)
    expected = np.sum(np.where(allowed, np.exp(ours) * (ours - theirs), 0), -1)
    assert expected[mask].min() > 0.01
    close(np.where(mask, exact(reference), 0), np.where(mask, expected, 0), 10)
    # Of the policy from itself: log-probabilities that differ by rounding, 1e-6 or so, squared.
    assert np.abs(exact(params)).max() < 1e-10


# A critic with a trunk of its own.


def with_critic(rng, model):
    """(parameters of an actor-critic that has one, those of the same critic alone with the decoder's head for show)."""
    params, critic = random_params(rng, model), random_params(rng, model)
    trunk = {name: x for name, x in critic["decoder"].items() if name != "lm_head"}
    return params | {"critic": trunk, "value_head": critic["value_head"]}, critic


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_critic_of_its_own_values_every_state_and_changes_no_sample(model, rng, key):
    params, critic = with_critic(rng, model)
    config = dataclasses.replace(SIX, num_minibatches=3)
    prompts = left_padded(rng, PROMPT_SIZES, P)
    sample = acting(model, config, COLD)
    rollout = sample(params, prompts, key)
    mask = np.asarray(rollout.response_mask)
    close(rollout.values, np.where(mask, full_pass(model, critic, rollout)[1], 0), 10)
    assert np.all(rollout.values[~mask] == 0)

    without = {name: params[name] for name in ("decoder", "value_head")}
    other = sample(without, prompts, jax.random.clone(key))
    chex.assert_trees_all_equal(rollout.replace(values=0), other.replace(values=0))
    assert np.abs(rollout.values - other.values).max() > 0.1

    # What was sampled has ratio one, and the values of acting are those of learning.
    _, metrics = loss_of(model, config)(params, with_ones(rollout).replace(returns=rollout.values))
    assert 0 <= metrics["policy/ratio_dev"] <= 1e-4
    assert metrics["value/loss"] < 1e-9


def test_without_a_critic_there_are_no_values_and_the_same_responses(rng, key):
    params, prompts = random_params(rng, LLAMA), left_padded(rng, PROMPT_SIZES, P)
    sample = acting(LLAMA, SIX, COLD)
    rollout = sample(params, prompts, key)
    bare = sample({"decoder": params["decoder"]}, prompts, jax.random.clone(key))
    chex.assert_trees_all_equal(rollout.replace(values=0), bare.replace(values=0))
    np.testing.assert_array_equal(bare.values, np.zeros((6, R)))
    assert np.any(rollout.values != 0)
