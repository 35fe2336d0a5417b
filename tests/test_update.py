"""Gradient steps: parts of a minibatch add up, an update is so many steps of the loss, what breaks is not learned."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import (
    COLD,
    ONE_LAYER,
    PPO,
    SIX,
    Bigram,
    V,
    bigram_update,
    close,
    experience_of,
    numbered_experience,
    random_params,
    random_texts,
    with_reference,
)

from experiments.methods import resolve
from ppo_jax.losses import AGGREGATIONS
from ppo_jax.models import ActorCritic
from ppo_jax.update import gradient, make_minibatch, ppo_loss, shuffle

GPT2, LLAMA = ONE_LAYER["gpt2"], ONE_LAYER["llama"]
CONFIG = dataclasses.replace(SIX, vf_coef=0.3, ent_coef=0.05)


def changed(config=CONFIG, **changes):
    return dataclasses.replace(config, **changes)


# Gradients in parts.


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_accumulated_gradients_are_those_of_the_whole_minibatch(how, rng):
    """Every term of the loss is a weighted sum, so that parts add up, however unequal: here with an empty response.

    In float32 the two differ by the order of sums of some 300 terms: by about sqrt(300) eps32 = 2e-6 of the gradient's
    norm; 1e-5 of it are allowed. A mean of the parts' means would be off by a tenth.
    """
    params, texts = random_params(rng, LLAMA), random_texts(rng)
    batch, reference, *_ = with_reference(rng, params, LLAMA, experience_of(rng, params, LLAMA), exact=True)
    config = changed(kl_in="loss", kl_estimator="exact", loss_aggregation=how, ptx_coef=0.4, num_minibatches=1,
                     whiten_advantages="minibatch")  # fmt: skip
    method = resolve(config)

    def loss(params, part):
        return ppo_loss(params, reference, ActorCritic(LLAMA), part, jnp.float32(0.2), method, COLD)

    @jax.jit
    def both():
        minibatch = make_minibatch(batch, texts, method)
        return {parts: gradient(params, minibatch, loss, parts) for parts in (1, 3)}

    (whole, metrics), (added, added_metrics) = both().values()
    whole_flat, added_flat = (jax.flatten_util.ravel_pytree(x)[0] for x in (whole, added))
    size = np.linalg.norm(whole_flat)
    assert size > 0.1
    assert np.linalg.norm(whole_flat - added_flat) < 1e-5 * size
    small, big = (added_metrics.pop(f"noise/{name}") for name in ("small", "big"))
    close(big, float(optax.tree.norm(added)) ** 2, 1 + float(big))
    assert small > size**2  # the mean over the parts; smaller batches have more noise
    assert metrics.keys() == added_metrics.keys()
    for name in metrics:
        close(added_metrics[name], metrics[name], 10 * max(1.0, abs(metrics[name])))


def joined(parts, num):
    """Minibatches out of their parts."""
    return [list(itertools.chain(*parts[i : i + num])) for i in range(0, len(parts), num)]


def test_an_update_in_parts_is_the_update(rng, key):
    config = changed(PPO, batch_size=12, num_minibatches=2, lr=0.5)
    experience = numbered_experience(rng, 12, lengths=[20, 1, 0, 7, 19, 2, 3, 20, 0, 5, 11, 4])
    params, metrics, batches, _ = bigram_update(config)(experience, key)
    parted = bigram_update(changed(config, accumulation=3))
    same, same_metrics, parts, _ = parted(experience, jax.random.clone(key))
    assert [sorted(rows) for rows in joined(parts, 3)] == [sorted(rows) for rows in batches]
    chex.assert_trees_all_close(params, same, rtol=0, atol=1e-6)
    for name in metrics:
        close(same_metrics[name], metrics[name], max(1.0, abs(metrics[name])))


def test_the_noise_scale_is_that_of_the_squared_norms(rng, key):
    # Without a step (learning rate 0 for two passes over one minibatch) both norms are known: 12 rows in 3 parts of 4.
    config = changed(PPO, batch_size=12, num_minibatches=1, accumulation=3, noise_scale=True, vf_coef=0.0)
    experience = numbered_experience(rng, 12)
    _, metrics, batches, _ = bigram_update(config, optax.sgd(0.0))(experience, key)

    def norm2(rows):
        part = jax.tree.map(lambda x: x[jnp.array(rows)], experience)
        method = resolve(config)
        loss = jax.grad(lambda p: ppo_loss(p, {}, Bigram(), make_minibatch(part, None, method), 0.0, method, COLD)[0])
        return float(optax.tree.norm(jax.jit(loss)(Bigram.params())) ** 2)

    small, big = np.mean([norm2(rows) for rows in batches]), norm2(range(12))
    # McCandlish et al.: |G|^2 = (12 big - 4 small) / 8 and tr(Sigma) = (small - big) / (1/4 - 1/12).
    expected = (small - big) / (1 / 4 - 1 / 12) / ((12 * big - 4 * small) / 8)
    # The squared norms are right to some roundings of float32; both differences of them may be small against either.
    lost = (small + big) / abs(small - big) + (12 * big + 4 * small) / abs(12 * big - 4 * small)
    np.testing.assert_allclose(metrics["optim/noise_scale"], expected, rtol=3e-6 * lost)


# The update: a model of one table, so that it compiles at once, that notes the rows that it learns from.


@pytest.mark.parametrize(("num_epochs", "num_minibatches"), [(3, 4), (2, 1), (1, 12)])
def test_every_epoch_sees_every_row_once_in_a_new_order(num_epochs, num_minibatches, rng, key):
    config = changed(PPO, batch_size=12, num_epochs=num_epochs, num_minibatches=num_minibatches)
    _, _, batches, _ = bigram_update(config)(numbered_experience(rng, 12), key)
    assert [len(batch) for batch in batches] == [12 // num_minibatches] * (num_epochs * num_minibatches)
    orders = np.array(batches).reshape(num_epochs, 12).tolist()
    assert all(sorted(order) == list(range(12)) for order in orders)
    # 12! orders: two are equal, or one is the identity, once in 10^8 runs.
    assert len({tuple(order) for order in [*orders, range(12)]}) == num_epochs + 1


@pytest.mark.parametrize("size", [1, 2, 64, 1625])
def test_a_shuffle_is_a_random_permutation(size, key):
    chex.assert_trees_all_equal(shuffle(key, size), jax.random.permutation(jax.random.clone(key), size))


def test_a_large_shuffle_has_every_row_once_and_anywhere(key):
    size = 4096
    order = np.asarray(shuffle(key, size))
    assert np.array_equal(np.sort(order), np.arange(size))
    # The rank correlation of a random order with 0, 1, 2, ... has a deviation of 1 / sqrt(size - 1).
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 6 / np.sqrt(size)


def test_metrics_of_an_update_are_means_over_its_steps_but_for_the_first_and_the_extremes(rng, key):
    config = changed(PPO, batch_size=4, num_epochs=1, num_minibatches=1, lr=5.0)
    experience = numbered_experience(rng, 4)
    first, second, both = jax.random.split(key, 3)
    step = bigram_update(config)
    params, one, *_ = step(experience, first)
    _, two, *_ = step(experience, second, params)
    _, metrics, *_ = bigram_update(changed(config, num_epochs=2))(experience, both)
    assert abs(one["policy/first_ratio_dev"]) < 1e-5
    assert abs(one["policy/first_approx_kl"]) < 1e-8
    assert two["policy/first_ratio_dev"] > 0.1
    assert two["policy/first_approx_kl"] == two["policy/approx_kl"] > 1e-3
    expected = {name: (one[name] + two[name]) / 2 for name in one}
    expected |= {name: one[name] for name in ("policy/first_ratio_dev", "policy/first_approx_kl")}
    expected |= {"policy/ratio_max": two["policy/ratio_max"], "policy/ratio_min": two["policy/ratio_min"]}
    expected |= {"policy/updates": 2, "guard/skipped": 0}
    assert two["policy/ratio_max"] > one["policy/ratio_max"]
    assert two["policy/ratio_min"] < one["policy/ratio_min"]
    assert metrics.keys() == expected.keys()
    for name in expected:
        close(metrics[name], expected[name], max(1.0, abs(expected[name])))


def steps_of(config, experience, batches, params, lr):
    """(parameters, approximate KL) before each gradient step over these rows, and after the last; plain descent."""
    method = resolve(config)

    @jax.jit
    def step(params, rows):
        batch = make_minibatch(jax.tree.map(lambda x: x[rows], experience), None, method)
        loss = jax.grad(lambda p: ppo_loss(p, {}, Bigram(), batch, 0.0, method, COLD), has_aux=True)
        grads, metrics = loss(params)
        return jax.tree.map(lambda x, g: x - lr * g, params, grads), metrics["policy/approx_kl"]

    history = []
    for rows in batches:
        after, kl = step(params, jnp.array(rows))
        history.append((params, float(kl)))
        params = after
    return [*history, (params, None)]


def test_an_update_is_so_many_gradient_steps_of_the_loss(rng, key):
    config = changed(PPO, batch_size=12, num_epochs=2, num_minibatches=3, lr=0.5)
    experience = numbered_experience(rng, 12)
    params, _, batches, _ = bigram_update(config)(experience, key)
    expected, _ = steps_of(config, experience, batches, Bigram.params(), 0.5)[-1]
    assert np.abs(expected["decoder"]["table"]).max() > 0.01
    chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-6)


def test_the_optimizers_state_goes_from_step_to_step(rng, key):
    config = changed(PPO, batch_size=4, num_epochs=3, num_minibatches=1)
    experience, model, method = numbered_experience(rng, 4), Bigram(), resolve(config)
    params, *_ = bigram_update(config, optax.sgd(0.5, momentum=0.9))(experience, key)
    batch = make_minibatch(experience, None, method)
    grad = jax.jit(jax.grad(lambda p: ppo_loss(p, {}, model, batch, 0.0, method, COLD)[0]))
    expected = moved = Bigram.params()
    for _ in range(3):
        moved = jax.tree.map(lambda m, g: 0.9 * m + g, moved, grad(expected))
        expected = jax.tree.map(lambda x, m: x - 0.5 * m, expected, moved)
    chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-6)


def test_every_setting_of_the_update_changes_the_parameters(rng, key):
    experience = numbered_experience(rng, 8)

    def made(**changes):
        config = changed(PPO, batch_size=8, lr=0.5, **changes)
        return bigram_update(config)(experience, jax.random.clone(key))[0]["decoder"]["table"]

    base = made()
    for name, value in {"num_epochs": 3, "num_minibatches": 4, "target_kl": 1e-6, "ratio_threshold": 0.5}.items():
        assert np.abs(made(**{name: value}) - base).max() > 1e-5, f"{name} is ignored"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_passes_end_at_the_first_minibatch_beyond_target_kl(accumulation, rng, key):
    """The oracle: the same steps without a target, and the KL before each of them."""
    config = changed(PPO, batch_size=12, num_epochs=3, num_minibatches=3, lr=3.0, accumulation=accumulation)
    experience = numbered_experience(rng, 12)
    _, metrics, batches, _ = bigram_update(config)(experience, key)
    batches = joined(batches, accumulation)
    history = steps_of(config, experience, batches, Bigram.params(), 3.0)
    kls = [kl for _, kl in history[:-1]]
    assert metrics["policy/updates"] == 9
    # Those that are further than any before: the first step always is. And once never.
    further = [i for i in range(1, 9) if kls[i] > 1.01 * max(kls[:i])]
    for stop in (further[0], further[-1], 9):
        target = 2 * max(kls) if stop == 9 else (max(kls[:stop]) + kls[stop]) / 2
        run = bigram_update(changed(config, target_kl=target))
        params, metrics, seen, _ = run(experience, jax.random.clone(key))
        assert metrics["policy/updates"] == stop
        chex.assert_trees_all_close(params, history[stop][0], rtol=0, atol=1e-5)
        close(metrics["policy/approx_kl"], np.mean(kls[:stop]))
        # The minibatch that is beyond is looked at, and none after it.
        assert len(seen) == min(stop + 1, 9) * accumulation
        assert metrics["guard/skipped"] == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_minibatch_beyond_the_ratio_threshold_is_passed_over(accumulation, rng, key):
    """The first three rows were sampled by a policy that liked their tokens half as much: ratio 2. In a minibatch of
    four rows, all full, the mean ratio is 1 + (how many there are) / 4.
    """
    config = changed(PPO, batch_size=12, num_minibatches=3, lr=1e-3, accumulation=accumulation, ratio_threshold=1.4)
    experience = numbered_experience(rng, 12)
    experience = experience.replace(logprobs=experience.logprobs.at[:3].add(-np.log(2)))
    params, metrics, batches, _ = bigram_update(config)(experience, key)
    batches = joined(batches, accumulation)
    learned = [rows for rows in batches if sum(row < 3 for row in rows) < 2]
    assert metrics["policy/updates"] == len(learned)
    assert metrics["guard/skipped"] == 0
    expected, _ = steps_of(config, experience, learned, Bigram.params(), 1e-3)[-1]
    chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-6)


# What is not finite is not learned.


class Poisoned(Bigram):
    """A bigram with a parameter at zero whose share of the logits is finite, and its gradient is not."""

    def logits(self, params, hidden):
        return super().logits(params, hidden) + jnp.sqrt(params["decoder"]["poison"])[None, None]

    @staticmethod
    def params():
        return {"decoder": Bigram.params()["decoder"] | {"poison": jnp.zeros(V)}} | {"value_head": {
            "kernel": jnp.zeros(V)}}  # fmt: skip


def test_a_gradient_that_is_not_finite_is_not_applied_and_is_named(rng, key):
    config = changed(PPO, batch_size=4, num_minibatches=2)
    params, metrics, _, broken = bigram_update(config, optax.adam(0.1), Poisoned)(numbered_experience(rng, 4), key)
    chex.assert_trees_all_equal(params, Poisoned.params())
    # logprob, value, loss; then the leaves in order: decoder/poison, decoder/table, value_head/kernel.
    assert broken.tolist() == [False, False, False, True, False, False]
    assert (metrics["guard/skipped"], metrics["policy/updates"]) == (4, 0)


def test_a_minibatch_that_breaks_is_left_out_and_the_others_are_learned(rng, key):
    config = changed(PPO, batch_size=12, num_epochs=2, num_minibatches=3, lr=0.5)
    experience = numbered_experience(rng, 12)
    bad = experience.replace(advantages=experience.advantages.at[5, 7].set(jnp.nan))
    run = bigram_update(config)
    params, metrics, batches, broken = run(bad, key)
    good = [rows for rows in batches if 5 not in rows]
    assert len(good) == 4
    expected, _ = steps_of(config, experience, good, Bigram.params(), 0.5)[-1]
    chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-6)
    assert (metrics["guard/skipped"], metrics["policy/updates"]) == (2, 4)
    assert broken.tolist() == [False, False, True, True, False]  # the loss, the table; the values are fine
    # What is reported is about those that were learned.
    assert all(np.isfinite(x) for x in metrics.values())
