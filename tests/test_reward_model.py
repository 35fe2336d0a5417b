"""Reward models: the loss of judged texts, its steps on one device and eight, the fresh head, the normalised head."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from folders import word_tokenizer
from small import MODELS, PAD, V, assert_consumed
from small import random_params as actor_critic_params

from ppo_jax import hub
from ppo_jax.errors import InputError
from ppo_jax.models import ModelConfig, RewardModel
from ppo_jax.optim import fresh_state, make_optimizer
from ppo_jax.reward_model import (
    init_reward_params,
    make_reward_step,
    normalized_head,
    reward_loss,
)
from ppo_jax.sharding import make_mesh, make_shardings
from ppo_jax.types import Comparisons, Ratings

pytestmark = pytest.mark.usefixtures("empty_caches")

B, C, S = 8, 3, 7
LLAMA, GPT2 = (dataclasses.replace(MODELS[name], num_layers=1, tie_embeddings=True) for name in ("llama", "gpt2"))
MODEL = RewardModel(LLAMA)
GOOD = 20  # tokens from here on are what the planted preference likes


def random_params(rng, config: ModelConfig = LLAMA):
    """A decoder and a head, every parameter random and large enough to matter."""
    params = actor_critic_params(rng, config)
    kernel = jnp.asarray(rng.normal(size=(config.width, 1)), jnp.float32)
    return {"decoder": params["decoder"], "score_head": {"kernel": kernel}}


def random_texts(rng, shape: tuple[int, ...]):
    """Random tokens of random sizes; the padding on the right is garbage."""
    sizes = rng.integers(1, S + 1, shape)
    tokens = rng.integers(1, V, (*shape, S))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(np.arange(S) < sizes[..., None])


def comparisons(rng, batch: int = B) -> Comparisons:
    """Of two or three texts each, with ties, margins and rows of no text."""
    ranks = rng.permuted(np.array([[1, 2, 3], [1, 2, 2], [1, 1, 2], [2, 1, 0]] * (batch // 4)), axis=1)
    tokens, mask = random_texts(rng, (batch, C))
    margin = jnp.asarray(rng.uniform(0, 1, batch), jnp.float32)
    return Comparisons(tokens, mask & (ranks > 0)[..., None], jnp.asarray(ranks, jnp.int32), margin)


def ratings(rng, batch: int = B) -> Ratings:
    return Ratings(*random_texts(rng, (batch,)), jnp.asarray(rng.normal(size=batch), jnp.float32))


def planted(rng, batch: int = B) -> Comparisons:
    """Pairs of full texts, of which the one with more good tokens is better."""
    tokens = np.zeros((0, 2, S), int)
    while len(tokens) < batch:
        drawn = rng.integers(1, V, (batch, 2, S))
        counts = np.sum(drawn >= GOOD, axis=2)
        tokens = np.concatenate([tokens, drawn[counts[:, 0] != counts[:, 1]]])[:batch]
    better = np.sum(tokens >= GOOD, axis=2).argmax(axis=1)
    ranks = np.where(np.arange(2) == better[:, None], 1, 2)
    tokens, ranks = jnp.asarray(tokens, jnp.int32), jnp.asarray(ranks, jnp.int32)
    return Comparisons(tokens, jnp.ones(tokens.shape, bool), ranks, jnp.zeros(batch))


@jax.jit
def score(params, tokens, mask):
    return MODEL.apply({"params": params}, tokens, mask, PAD)


def scores_of(params, batch: Comparisons) -> np.ndarray:
    """Scores `[B, C]` of each text by itself."""
    one_by_one = [score(params, batch.tokens[:, i], batch.mask[:, i]) for i in range(batch.tokens.shape[1])]
    return np.stack(one_by_one, axis=1).astype(np.float64)


@jax.jit
def last_hidden(params, tokens, mask):
    return MODEL.apply({"params": params}, tokens, mask, PAD, method="last_hidden")


@jax.jit
def loss_of(params, batch):
    return reward_loss(params, MODEL, batch, PAD, 0.0)


@jax.jit
def centred_loss_of(params, batch):
    return reward_loss(params, MODEL, batch, PAD, 0.25)


def make_step(mesh=(1, 1, 1), lr: float = 1e-2, center_coef: float = 0.0):
    """(step, how to place a state, how to place a batch)."""
    # A large eps makes the step a smooth function of the gradient, so that 1 and 8 devices can be compared.
    tx = make_optimizer(optax.constant_schedule(lr), eps=1e-3)
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: fresh_state(random_params(rng), tx, jax.random.key(0)))
    shardings = make_shardings(make_mesh(*mesh), abstract)

    def state_of(params):
        state = fresh_state(jax.tree.map(jnp.array, params), tx, jax.random.key(0))
        return jax.device_put(state, shardings.state)

    step = make_reward_step(MODEL, tx, shardings, PAD, center_coef)
    return step, state_of, lambda batch: jax.device_put(batch, shardings.batch)


@pytest.fixture(scope="module")
def one_device():
    return make_step()


# The loss


def test_a_pair_costs_what_its_scores_say(rng):
    params, batch = random_params(rng), planted(rng)
    loss, metrics = loss_of(params, batch)
    scores = scores_of(params, batch)
    chosen, rejected = (scores[np.asarray(batch.ranks) == rank] for rank in (1, 2))
    expected = oracles.mean(list(np.logaddexp(0, rejected - chosen)))
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(chosen > rejected), atol=1e-6)


def test_texts_are_scored_in_their_places(rng):
    """Moving the texts of a comparison about, with their ranks, changes nothing."""
    params, batch, order = random_params(rng), comparisons(rng), jnp.array([2, 0, 1])
    other = batch.replace(
        tokens=batch.tokens[:, order], mask=batch.mask[:, order], ranks=batch.ranks[:, order], margin=batch.margin
    )
    chex.assert_trees_all_close(loss_of(params, batch), loss_of(params, other), rtol=1e-5)
    assert abs(loss_of(params, batch)[0] - loss_of(params, batch.replace(ranks=batch.ranks[:, order]))[0]) > 1e-3


def test_ratings_cost_half_their_mean_squared_error(rng):
    params, batch = random_params(rng), ratings(rng)
    loss, metrics = loss_of(params, batch)
    errors = np.float64(score(params, batch.tokens, batch.mask)) - np.asarray(batch.scores)
    np.testing.assert_allclose(loss, 0.5 * np.mean(errors**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["rmse"], np.sqrt(np.mean(errors**2)), rtol=1e-5)
    # There is nothing to centre: the ratings say where the scores are to be.
    chex.assert_trees_all_equal(centred_loss_of(params, batch), loss_of(params, batch))


def test_centring_adds_four_times_the_squared_mean_of_a_comparison(rng):
    params, batch = random_params(rng), comparisons(rng)
    added = float(centred_loss_of(params, batch)[0]) - float(loss_of(params, batch)[0])
    scores, present = scores_of(params, batch), np.asarray(batch.ranks) > 0
    means = [oracles.mean(list(row[here])) for row, here in zip(scores, present, strict=True)]
    np.testing.assert_allclose(added, 0.25 * oracles.mean([4 * m * m for m in means]), rtol=1e-4, atol=1e-5)
    # For a pair it is the published (s_1 + s_2)^2.
    pair = planted(rng)
    added = float(centred_loss_of(params, pair)[0]) - float(loss_of(params, pair)[0])
    np.testing.assert_allclose(added, 0.25 * np.mean(scores_of(params, pair).sum(axis=1) ** 2), rtol=1e-4, atol=1e-5)


def test_what_is_no_text_changes_neither_loss_nor_gradient(rng):
    params, batch = random_params(rng), comparisons(rng)
    step = jax.jit(jax.value_and_grad(lambda p, b: reward_loss(p, MODEL, b, PAD, 0.1)[0]))
    loss, grads = step(params, batch)
    garbage = jnp.asarray(rng.integers(0, V, batch.tokens.shape), jnp.int32)
    other = batch.replace(tokens=jnp.where(batch.mask, batch.tokens, garbage))
    other_loss, other_grads = step(params, other)
    assert loss == other_loss
    chex.assert_trees_all_close(grads, other_grads, atol=1e-6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert optax.tree.norm(grads) > 1e-2


def test_the_gradient_of_the_loss_is_its_slope(rng):
    params, batch = random_params(rng), comparisons(rng)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    gradient = jax.flatten_util.ravel_pytree(jax.grad(lambda p: centred_loss_of(p, batch)[0])(params))[0]
    gradient = np.asarray(gradient, np.float64)
    size = np.linalg.norm(gradient)

    def central(direction, step):
        ends = (flat + jnp.asarray(sign * step * direction, jnp.float32) for sign in (1, -1))
        up, down = (float(centred_loss_of(unravel(end), batch)[0]) for end in ends)
        return (up - down) / (2 * step)

    random = rng.normal(size=gradient.shape)
    for direction in (gradient / size, random / np.linalg.norm(random)):
        # Extrapolated from two steps; a loss of about 1 to 10 is rounded by 1e-6, which the step divides into 1e-3.
        slope = (4 * central(direction, 2e-3) - central(direction, 4e-3)) / 3
        assert abs(slope - gradient @ direction) < 1e-2 * (1 + size)


# Steps


def test_a_planted_preference_is_learned(rng, one_device):
    """From texts never seen twice, and measured on others."""
    step, state_of, place = one_device
    state = state_of(init_reward_params(actor_critic_params(rng, LLAMA, 0.1)["decoder"], LLAMA, jax.random.key(1)))
    fresh = [planted(rng, 64) for _ in range(2)]
    accuracies = []
    for number in range(81):
        if number in (0, 80):
            accuracies.append(np.mean([loss_of(state.params, batch)[1]["accuracy"] for batch in fresh]))
        before = state
        state, metrics = step.learn(state, place(planted(rng)))
        assert_consumed(before)
    assert accuracies[0] < 0.75
    assert accuracies[1] > 0.85
    assert metrics.keys() == {"reward/loss", "reward/accuracy", "optim/grad_norm"}
    assert all(np.isfinite(x) for x in metrics.values())
    assert state.step == 81
    assert step.learn._cache_size() == 1


def test_ratings_are_learned(rng, one_device):
    step, state_of, place = one_device
    state, batch, history = state_of(random_params(rng)), ratings(rng), []
    for _ in range(30):
        state, metrics = step.learn(state, place(batch))
        history.append(float(metrics["reward/rmse"]))
    assert metrics.keys() == {"reward/loss", "reward/rmse", "optim/grad_norm"}
    assert history[-1] < 0.7 * history[0]


def test_centring_draws_the_scores_to_zero(rng):
    step, state_of, place = make_step(center_coef=1.0)
    params, batch = random_params(rng), comparisons(rng)
    state = state_of(params)
    for _ in range(30):
        state, _ = step.learn(state, place(batch))
    present = np.asarray(batch.ranks) > 0
    before, after = (np.abs(scores_of(p, batch)[present].mean()) for p in (params, jax.device_get(state.params)))
    assert after < max(0.5 * before, 0.3)


def test_eight_devices_take_the_same_steps_as_one(rng, one_device):
    params, batches = random_params(rng), [comparisons(rng) for _ in range(2)]
    results = []
    for step, state_of, place in (one_device, make_step(mesh=(2, 2, 2))):
        state, history = state_of(params), []
        for batch in batches:
            state, metrics = step.learn(state, place(batch))
            history.append(metrics)
        texts = place((batches[0].tokens[:, 0], batches[0].mask[:, 0]))
        read = step.score(state.params, *texts), step.last_hidden(state.params, *texts)
        results.append(jax.device_get((state.params, history, read)))
    # Sums in another order, rounded by 1e-7; Adam divides by at least 1e-3 and multiplies by the rate of 1e-2.
    chex.assert_trees_all_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    chex.assert_trees_all_close(*(result[1:] for result in results), rtol=1e-4, atol=1e-4)


def test_a_batch_of_another_kind_is_another_program_and_no_error(rng, one_device):
    step, state_of, place = one_device
    params = random_params(rng)
    for batch in (planted(rng), comparisons(rng), ratings(rng)):
        _, metrics = step.learn(state_of(params), place(batch))
        np.testing.assert_allclose(metrics["reward/loss"], loss_of(params, batch)[0], rtol=1e-5)


def test_texts_are_read_alike_by_all_programs(rng, one_device):
    step, state_of, place = one_device
    params, (tokens, mask) = random_params(rng), random_texts(rng, (B,))
    placed = state_of(params).params
    scores, hidden = step.score(placed, *place((tokens, mask))), step.last_hidden(placed, *place((tokens, mask)))
    np.testing.assert_allclose(scores, score(params, tokens, mask), atol=1e-5)
    np.testing.assert_allclose(hidden @ params["score_head"]["kernel"][:, 0], scores, atol=1e-5)


# The fresh model


@pytest.mark.parametrize("tied", [True, False])
def test_a_fresh_reward_model_is_the_decoder_under_a_new_head(rng, tied, tmp_path):
    config = dataclasses.replace(LLAMA, tie_embeddings=tied)
    decoder = actor_critic_params(rng, config)["decoder"]
    assert ("lm_head" in decoder) != tied
    params = init_reward_params(decoder, LLAMA, jax.random.key(0))
    assert params.keys() == {"decoder", "score_head"}
    chex.assert_trees_all_equal(params["decoder"], {name: x for name, x in decoder.items() if name != "lm_head"})
    assert params["score_head"]["kernel"].shape == (LLAMA.width, 1)
    assert "lm_head" not in params["decoder"]
    # It is what the network takes, and what a folder holds.
    assert np.isfinite(score(params, jnp.ones((1, S), jnp.int32), jnp.ones((1, S), bool)))


def test_the_fresh_head_is_drawn_by_its_key_with_the_published_size(rng):
    wide = dataclasses.replace(LLAMA, width=4096)
    heads = [init_reward_params({}, wide, jax.random.key(i))["score_head"]["kernel"] for i in (0, 1, 0)]
    np.testing.assert_array_equal(heads[0], heads[2])
    assert np.all(heads[0] != heads[1])
    # N(0, 1 / (D + 1)): the spread of 4096 draws is known to 1.1 %, five times that is allowed.
    np.testing.assert_allclose(np.std(heads[0]) * math.sqrt(4097), 1, atol=0.055)


def test_a_fresh_state(rng):
    params, tx = random_params(rng), optax.adam(1e-3)
    key = jax.random.key(3)
    state = fresh_state(params, tx, key)
    assert (state.step, state.running.kl_coef) == (0, 0)
    chex.assert_trees_all_equal(state.params, params)
    chex.assert_trees_all_equal(state.opt_state, tx.init(params))
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(key))


# The normalised head


def hidden_states(rng, num: int, mean: float, width: int = 12) -> np.ndarray:
    """Like those of a trained trunk: a large common part, and a smaller one that differs."""
    common = rng.normal(size=width)
    return np.float32(mean * common / np.linalg.norm(common) * math.sqrt(width) + rng.normal(size=(num, width)))


@pytest.mark.parametrize("num", [2, 5, 12, 300])
@pytest.mark.parametrize("mean", [0.1, 1.0, 30.0])
def test_normalised_scores_have_mean_zero_and_standard_deviation_one(rng, num, mean):
    hidden, kernel = hidden_states(rng, num, mean), rng.normal(size=(12, 1)).astype(np.float32)
    head = normalized_head(kernel, hidden)
    assert head.shape == (12, 1)
    assert head.dtype == np.float32
    # The head is rounded to float32 once: by 6e-8 of its size times that of the states.
    rounding = 1e-7 * np.linalg.norm(head) * np.max(np.linalg.norm(hidden, axis=1))
    scores = np.float64(hidden) @ np.float64(head)[:, 0]
    assert rounding < 0.1
    assert abs(scores.mean()) < rounding
    assert abs(scores.std() - 1) < rounding


def test_normalising_keeps_the_order_where_the_states_have_a_large_mean(rng):
    """Compared on states that were not normalised over: nearly one line, upwards."""
    hidden = hidden_states(rng, 1024, mean=10.0)
    constant = hidden.mean(axis=0) / np.sum(np.square(hidden.mean(axis=0)))  # reads about 1 from every state
    kernel = rng.normal(size=12)
    kernel += (3 * np.std(hidden @ kernel) - np.mean(hidden @ kernel)) * constant
    head = normalized_head(np.float32(kernel)[:, None], hidden[:512])
    before, after = hidden[512:] @ kernel, hidden[512:] @ head[:, 0]
    # The constant differs from 1 by 1/35 (the states' mean is as long as 35 of their deviations); scores whose mean is
    # three deviations are off their line by 3/35 of a deviation.
    assert np.corrcoef(before, after)[0, 1] > 0.99
    # As good as a bias would do: mean 0 and deviation 1 on the others as well, within five standard errors of both
    # halves.
    assert abs(after.mean()) < 5 * math.sqrt(2 / 512)
    assert abs(after.std() - 1) < 5 * math.sqrt(1 / 512)


def test_a_constant_coordinate_is_a_bias(rng):
    """States with a coordinate that is always one: the new scores are a line of the old ones."""
    hidden = np.concatenate([rng.normal(size=(40, 5)), np.ones((40, 1))], axis=1).astype(np.float32)
    kernel = rng.normal(size=(6, 1)).astype(np.float32)
    before, after = (np.float64(hidden) @ np.float64(k)[:, 0] for k in (kernel, normalized_head(kernel, hidden, 1e-6)))
    np.testing.assert_allclose(after, (before - before.mean()) / before.std(), atol=1e-4)


def test_normalising_twice_is_normalising_once_and_scale_is_forgotten(rng):
    hidden, kernel = hidden_states(rng, 64, mean=3.0), rng.normal(size=(12, 1)).astype(np.float32)
    head = normalized_head(kernel, hidden)
    np.testing.assert_allclose(normalized_head(head, hidden), head, atol=1e-4)
    np.testing.assert_allclose(normalized_head(1000 * kernel, hidden), head, atol=1e-4)


@pytest.mark.parametrize("case", ["one text over and over", "a head of zeros", "one sample"])
def test_scores_without_spread_are_refused(rng, case):
    hidden, kernel = hidden_states(rng, 8, mean=3.0), rng.normal(size=(12, 1)).astype(np.float32)
    hidden = {"one text over and over": np.tile(hidden[:1], (8, 1)), "one sample": hidden[:1]}.get(case, hidden)
    kernel = 0 * kernel if case == "a head of zeros" else kernel
    with pytest.raises(
        InputError, match=f"scores of {len(hidden)} samples have no spread; expected differing"
    ) as error:
        normalized_head(kernel, hidden)
    assert "\n" not in str(error.value)


def test_a_normalised_model_is_saved_with_its_gain_and_bias(rng, tmp_path):
    """The bias needs no place of its own: the folder gives the normalised scores."""
    params, (tokens, mask) = random_params(rng), random_texts(rng, (B,))
    kernel, hidden = np.asarray(params["score_head"]["kernel"]), np.asarray(last_hidden(params, tokens, mask))
    params["score_head"] = {"kernel": normalized_head(kernel, hidden)}
    hub.save_reward_model(tmp_path / "model", params, LLAMA, word_tokenizer(), eos_ids=(2,), pad_id=PAD)
    _, loaded = hub.load_reward_model(tmp_path / "model")
    scores = score(loaded, tokens, mask)
    assert abs(np.mean(scores)) < 1e-4
    assert abs(np.std(scores) - 1) < 1e-4
