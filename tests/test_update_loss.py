"""The loss of PPO and its gradient: what plain loops say of full logits."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from small import (
    COLD,
    ONE_LAYER,
    PAD,
    SIX,
    Bigram,
    R,
    V,
    close,
    experience_of,
    full_pass,
    loss_of,
    policy_logprobs,
    random_params,
    random_texts,
    taken,
    with_reference,
)

from experiments.methods import resolve
from ppo_jax.models import ActorCritic
from ppo_jax.sampling import SamplingConfig
from ppo_jax.update import make_minibatch, ppo_loss

GPT2, LLAMA = ONE_LAYER["gpt2"], ONE_LAYER["llama"]
CONFIG = dataclasses.replace(SIX, vf_coef=0.3, ent_coef=0.05, value_loss="clip")


def changed(config=CONFIG, **changes):
    return dataclasses.replace(config, **changes)


# The loss.


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_loss_equals_its_parts_from_full_logits(model, rng):
    # No token of the responses is an EOS that would be forbidden, and of probability zero.
    sampling = SamplingConfig(R, (V - 1,), PAD, temperature=1.2, min_new_tokens=4)
    params = random_params(rng, model)
    batch = experience_of(rng, params, model, sampling=sampling)
    batch = batch.replace(tokens=jnp.where(batch.tokens == V - 1, 3, batch.tokens))
    logits, values = full_pass(model, params, batch)
    policy, mask = policy_logprobs(logits, sampling), np.asarray(batch.response_mask)
    entropies = -np.sum(np.exp(policy) * np.where(np.isfinite(policy), policy, 0), -1)
    new = taken(policy, batch)
    policy_loss, policy_metrics, _ = oracles.clipped_policy_loss(new, batch.logprobs, batch.advantages, mask, 0.2)
    value_loss, value_clip_frac, _ = oracles.clipped_value_loss(values, batch.values, batch.returns, mask, 0.2)
    entropy = oracles.mean(oracles.kept(entropies, mask))
    log_ratios = oracles.kept(new - np.float64(batch.logprobs), mask)
    policy_metrics |= {
        "approx_kl_k1": -oracles.mean(log_ratios),
        "ratio_mean": oracles.mean([math.exp(x) for x in log_ratios]),
        "ratio_min": math.exp(min(log_ratios)),
    }
    expected = {f"policy/{name}": x for name, x in policy_metrics.items()} | {
        "policy/loss": policy_loss,
        "policy/entropy": entropy,
        "value/loss": value_loss,
        "value/clip_frac": value_clip_frac,
        "broken/logprob": 0,
        "broken/value": 0,
        "broken/loss": 0,
    }
    loss, metrics = loss_of(model, CONFIG, sampling)(params, batch)
    close(loss, policy_loss + 0.3 * value_loss - 0.05 * entropy, 10)
    assert metrics.keys() == expected.keys()
    for name in expected:
        # A token whose EOS was exchanged above has any ratio: the largest may be large.
        close(metrics[name], expected[name], 10 * max(1.0, policy_metrics["ratio_max"]))


def weights_of(mask, how):
    """What each token weighs in the loss, with loops."""
    rows, responses = mask.sum(1), np.sum(mask.any(1))
    weight = {"token": lambda row: 1 / mask.sum(), "sequence": lambda row: 1 / (responses * rows[row]),
              "constant": lambda row: 1 / mask.size}[how]  # fmt: skip
    weights = np.zeros(mask.shape)
    for row, t in np.argwhere(mask):
        weights[row, t] = weight(row)
    return weights


@pytest.mark.parametrize(
    ("estimator", "how"), [("k3", "token"), ("k3_k2", "sequence"), ("exact", "constant"), ("k2", "constant")]
)
def test_a_kl_in_the_loss_equals_the_oracle_under_every_aggregation(estimator, how, rng):
    params = random_params(rng, LLAMA)
    batch = experience_of(rng, params, LLAMA)
    batch, reference, ours, theirs = with_reference(rng, params, LLAMA, batch, estimator == "exact")
    config = changed(kl_in="loss", kl_estimator=estimator, loss_aggregation=how, vf_coef=0.0, kl_clamp=3.0)
    mask = np.asarray(batch.response_mask)
    log_ratio = np.clip(taken(ours, batch) - taken(theirs, batch), -3, 3)
    kl = {
        "k2": log_ratio**2 / 2,
        "k3": np.expm1(-log_ratio) + log_ratio,
        "k3_k2": np.expm1(-log_ratio) + log_ratio,
        "exact": np.minimum(np.sum(np.exp(ours) * (ours - theirs), -1), 3),
    }[estimator]
    weights, a = weights_of(mask, how), np.float64(batch.advantages)
    ratio = np.exp(taken(ours, batch) - np.float64(batch.logprobs))
    surrogate = np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.2))
    entropy = -np.sum(np.exp(ours) * ours, -1)
    loss, metrics = loss_of(LLAMA, config)(params, batch, reference, 0.7)
    close(metrics["policy/kl_loss"], np.sum(weights * np.where(mask, kl, 0)), 50)
    close(metrics["policy/loss"], np.sum(weights * np.where(mask, surrogate, 0)), 10)
    expected = np.sum(weights * np.where(mask, surrogate + 0.7 * kl, 0)) - 0.05 * np.mean(entropy[mask])
    close(loss, expected, 50)


def test_k3_k2_has_the_value_of_k3_and_the_gradient_of_k2(rng):
    params = random_params(rng, LLAMA)
    batch = experience_of(rng, params, LLAMA)
    batch, reference, *_ = with_reference(rng, params, LLAMA, batch, exact=False)
    found = {}
    for name in ("k2", "k3", "k3_k2"):
        loss = loss_of(LLAMA, changed(kl_in="loss", kl_estimator=name, kl_clamp=3.0))
        found[name] = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, reference)
    close(found["k3_k2"][0][0], found["k3"][0][0], 10)
    assert abs(found["k3"][0][0] - found["k2"][0][0]) > 1e-2
    flat = {name: jax.flatten_util.ravel_pytree(grads)[0] for name, (_, grads) in found.items()}
    size = np.linalg.norm(flat["k2"])
    assert np.linalg.norm(flat["k3_k2"] - flat["k2"]) < 1e-5 * size
    assert np.linalg.norm(flat["k3_k2"] - flat["k3"]) > 1e-2 * size


@pytest.mark.parametrize("what", ["clip", "k3", "exact"])
def test_the_gradient_of_the_loss_is_its_slope(what, rng):
    params = random_params(rng, LLAMA)
    batch, reference = experience_of(rng, params, LLAMA), None
    config = CONFIG
    if what != "clip":
        batch, reference, *_ = with_reference(rng, params, LLAMA, batch, what == "exact")
        config = changed(kl_in="loss", kl_estimator=what, loss_aggregation="sequence", vf_coef=0.0, ent_coef=0.0)
    loss = loss_of(LLAMA, config)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    grads, _ = jax.jit(jax.grad(loss, has_aux=True))(params, batch, reference, 0.1)
    grads = np.asarray(jax.flatten_util.ravel_pytree(grads)[0], np.float64)
    size = np.linalg.norm(grads)
    assert size > 1e-2

    def central(direction, step):
        ends = (flat + jnp.asarray(sign * step * direction, jnp.float32) for sign in (1, -1))
        up, down = (float(loss(unravel(end), batch, reference, 0.1)[0]) for end in ends)
        return (up - down) / (2 * step)

    random = rng.normal(size=grads.shape)
    for direction in (grads / size, random / np.linalg.norm(random)):
        # Extrapolated from two steps, so that what is left is of fourth order. A loss of about 1 is rounded by 1e-7 a
        # few times, which the step divides into some 1e-3. The steps are this small because a steep draw moved a ratio
        # by 0.1, to its clip boundary, with ten times larger ones (1 draw in 60).
        slope = (4 * central(direction, 1.5e-4) - central(direction, 3e-4)) / 3
        assert abs(slope - grads @ direction) < 5e-3 * (1 + size)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_only_the_sampled_tokens_and_their_past_matter_to_the_loss(estimator, rng):
    """What is masked may be anything: a reference that forbids a token there, say, or one that is no number."""
    params = random_params(rng, LLAMA)
    batch = experience_of(rng, params, LLAMA)
    batch, reference, *_ = with_reference(rng, params, LLAMA, batch, exact=False)
    batch = batch.replace(importance=jnp.asarray(rng.uniform(0.5, 2, batch.logprobs.shape), jnp.float32))
    mask = np.asarray(batch.response_mask)
    names = ("logprobs", "values", "advantages", "returns", "ref_logprobs", "importance")
    batch = batch.replace(**{name: jnp.where(mask, getattr(batch, name), 0) for name in names})
    place = {"k1": "reward", "k3": "loss"}[estimator]
    loss = jax.jit(jax.value_and_grad(loss_of(LLAMA, changed(kl_in=place, kl_estimator=estimator)), has_aux=True))
    expected = loss(params, batch, reference)

    def garbage(x):
        return jnp.where(mask, x, jnp.asarray(rng.normal(size=mask.shape), jnp.float32))

    other = batch.replace(**{name: garbage(getattr(batch, name)) for name in names})
    tokens = np.where(batch.mask, batch.tokens, rng.integers(0, V, batch.tokens.shape)).astype(np.int32)
    other = other.replace(tokens=jnp.asarray(tokens))
    for bad in (0.0, -math.inf):
        other = other.replace(ref_logprobs=jnp.where(mask, other.ref_logprobs, other.ref_logprobs + bad))
        (value, metrics), grads = loss(params, other, reference)
        assert value == expected[0][0]
        chex.assert_trees_all_equal(metrics, expected[0][1])
        chex.assert_trees_all_close(grads, expected[1], rtol=0, atol=1e-6)


def test_importance_weights_the_surrogate_and_nothing_else(rng):
    params = random_params(rng, LLAMA)
    batch = experience_of(rng, params, LLAMA)
    weights = jnp.asarray(rng.uniform(0.5, 2, batch.logprobs.shape), jnp.float32)
    loss = loss_of(LLAMA, CONFIG)
    _, plain = loss(params, batch)
    # A weight is as good as an advantage of that size: the clip of PPO does not depend on it.
    _, weighted = loss(params, batch.replace(importance=weights))
    _, scaled = loss(params, batch.replace(advantages=weights * batch.advantages))
    close(weighted["policy/loss"], scaled["policy/loss"])
    assert abs(weighted["policy/loss"] - plain["policy/loss"]) > 1e-4
    for name in plain.keys() - {"policy/loss"}:
        close(weighted[name], plain[name])


def test_texts_add_their_mean_next_token_loss(rng):
    params, texts = random_params(rng, LLAMA), random_texts(rng)
    batch = experience_of(rng, params, LLAMA)
    config = changed(ptx_coef=0.7)
    plain, _ = loss_of(LLAMA, config)(params, batch)
    loss, metrics = loss_of(LLAMA, config)(params, batch, texts=texts)
    tokens, inside = np.asarray(texts.tokens), np.asarray(texts.mask)
    logits, _ = jax.jit(ActorCritic(LLAMA).apply)({"params": params}, texts.tokens, texts.mask)
    surprises = [-oracles.log_softmax(logits[row, t - 1])[tokens[row, t]] for row, t in np.argwhere(inside) if t]
    close(metrics["policy/ptx_loss"], np.mean(surprises), 10)
    close(loss, plain + 0.7 * np.mean(surprises), 10)


def test_an_infinite_value_clip_turns_it_off(rng):
    params = random_params(rng, LLAMA)
    batch = experience_of(rng, params, LLAMA)
    _, metrics = loss_of(LLAMA, changed(value_clip_eps=math.inf))(params, batch)
    values, mask = full_pass(LLAMA, params, batch)[1], np.asarray(batch.response_mask)
    assert metrics["value/clip_frac"] == 0
    close(metrics["value/loss"], 0.5 * np.mean((values - np.asarray(batch.returns))[mask] ** 2), 10)


def test_a_critic_of_its_own_learns_apart_from_the_policy(rng):
    params, critic = random_params(rng, LLAMA), random_params(rng, LLAMA)
    trunk = {name: x for name, x in critic["decoder"].items() if name != "lm_head"}
    params |= {"critic": trunk, "value_head": critic["value_head"]}
    batch = experience_of(rng, params, LLAMA)
    gradient_of, deaf = (
        jax.jit(jax.grad(loss_of(LLAMA, changed(vf_coef=vf_coef)), has_aux=True)) for vf_coef in (0.3, 0.0)
    )
    (grads, metrics), (others, _) = gradient_of(params, batch), deaf(params, batch)
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


CHANGES = {
    "policy_loss": "none", "clip_eps": 0.1, "clip_eps_high": 0.4, "dual_clip": 1.3,
    "loss_aggregation": "sequence", "ent_coef": 0.01, "value_loss": "squared", "value_clip_eps": 0.1, "vf_coef": 0.2,
    "whiten_advantages": "minibatch",
}  # fmt: skip


def test_every_setting_of_the_loss_changes_it(rng):
    params = random_params(rng, LLAMA)
    batch = experience_of(rng, params, LLAMA)
    batch = batch.replace(advantages=2 * batch.advantages)
    model = Bigram()  # all of this is beyond the network
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), Bigram.params())
    offsets = jnp.asarray(rng.uniform(-0.7, 0.7, batch.logprobs.shape), jnp.float32)
    logprobs, _ = jax.jit(lambda: bigram_logprobs(params, batch))()
    batch = batch.replace(logprobs=jnp.where(batch.response_mask, logprobs + offsets, 0))

    def of(**changes):
        method = resolve(changed(**changes))
        given = params, {}, model, make_minibatch(batch, None, method), jnp.float32(0.3), method, COLD
        return float(jax.jit(lambda: ppo_loss(*given)[0])())

    base = of()
    for name, value in CHANGES.items():
        assert abs(of(**{name: value}) - base) > 1e-5, f"{name} is ignored"


def bigram_logprobs(params, batch):
    """(log-probabilities of the response tokens of a bigram model at the temperature of COLD, its entropies)."""
    before, tokens = batch.tokens[:, -R - 1 : -1], batch.response_tokens
    rows = jax.nn.log_softmax(params["decoder"]["table"][before] / COLD.temperature)
    return jnp.take_along_axis(rows, tokens[..., None], 2)[..., 0], -jnp.sum(jnp.exp(rows) * rows, -1)
