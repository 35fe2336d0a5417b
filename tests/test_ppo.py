"""Whole iterations: one program, or two around a score on the host; what they carry on, and what they leave alone.

The parts have tests of their own: test_policy.py, test_experience.py, test_update_loss.py, test_update.py.
"""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import (
    MODELS,
    ONE_LAYER,
    PPO,
    R,
    V,
    assert_consumed,
    close,
    make_bench,
    random_params,
    random_texts,
    token_set_score,
)

from experiments.methods import resolve
from ppo_jax import policy, ppo
from ppo_jax.checkpoint import Checkpointer
from ppo_jax.errors import InputError
from ppo_jax.guard import EXPERIENCE, quantities
from ppo_jax.models import ActorCritic, LoRAConfig, init_adapter, upper_layers
from ppo_jax.optim import make_optimizer
from ppo_jax.ppo import due, init_state, make_train_step, nothing_sampled
from ppo_jax.types import Scores, TrainState

pytestmark = pytest.mark.usefixtures("empty_caches")

LLAMA, TWO_LAYERS = ONE_LAYER["llama"], MODELS["llama"]
CONFIG = dataclasses.replace(PPO, kl_target=2.0, kl_horizon=80.0)
GROUPS = dataclasses.replace(
    CONFIG,
    lr=5e-2,
    advantage="grpo",
    responses_per_prompt=4,
    num_minibatches=4,
    kl_in="loss",
    kl_estimator="k3",
    ema_decay=0.75,
)
STALE = dataclasses.replace(
    PPO, stale_iterations=2, importance="truncate", score_scale="running", weight_decay=0.1, kl_target=2.0
)
REMAX = dataclasses.replace(PPO, advantage="remax", responses_per_prompt=2, ptx_coef=0.5, num_epochs=1)


# The parameters are the same in each run: these are programs that learn, and learning takes a few iterations.
BENCHES = {
    "gae": lambda: make_bench(parameters(LLAMA), LLAMA, CONFIG, score=token_set_score),
    "groups": lambda: make_bench(
        parameters(LLAMA, 0.3), dataclasses.replace(LLAMA, lora_scale=2.0), GROUPS, score=token_set_score,
        trained=lambda base: init_adapter(base, LoRAConfig(rank=2), jax.random.key(5)),
    ),
    "stale": lambda: make_bench(
        parameters(TWO_LAYERS), TWO_LAYERS, STALE, score=token_set_score,
        trained=lambda base: upper_layers(base, TWO_LAYERS, 1),
    ),
    "remax": lambda: make_bench(parameters(LLAMA), LLAMA, REMAX, score=token_set_score),
}  # fmt: skip


def parameters(model, scale: float = 0.1):
    return random_params(np.random.default_rng(1), model, scale)


@functools.cache
def the(name: str):
    """A train step whose score is a share of tokens; compiled once for all tests."""
    return BENCHES[name]()


@functools.cache
def compiled(name: str):
    """`iterate`, compiled ahead of time."""
    bench, rng = the(name), np.random.default_rng(2)
    return bench.step.iterate.lower(bench.state(), bench.reference(), bench.prompts(rng), (), texts_of(name)).compile()


def texts_of(name: str):
    return random_texts(np.random.default_rng(3), rows=16) if name == "remax" else None


def run(name: str, iterations: int, seed: int = 0):
    """(the state after so many iterations, a list of (metrics, experience, scores))."""
    bench, rng, history = the(name), np.random.default_rng(seed), []
    state, reference = bench.state(seed), bench.reference()
    for _ in range(iterations):
        state, *results = compiled(name)(state, reference, bench.prompts(rng), (), texts_of(name))
        history.append(jax.device_get(results))
    return state, history


def numbers(state: TrainState):
    """A state as arrays that can be compared."""
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


# One program.


@pytest.mark.parametrize(("name", "iterations", "end"), [("gae", 16, 0.75), ("groups", 40, 0.65)])
def test_a_policy_learns_what_is_rewarded(name, iterations, end):
    _, history = run(name, iterations)
    scores = [metrics["objective/score"] for metrics, _, _ in history]
    assert np.mean(scores[:2]) < 0.55
    assert np.mean(scores[-2:]) > end
    assert all(0 <= metrics["policy/first_ratio_dev"] <= 1e-4 for metrics, _, _ in history)
    assert all(abs(metrics["policy/first_approx_kl"]) <= 1e-8 for metrics, _, _ in history)
    assert all(np.isfinite(x) for metrics, _, _ in history for x in metrics.values())
    assert all(metrics["guard/first_broken"] == -1 for metrics, _, _ in history)
    assert all(metrics["policy/updates"] == the(name).config.updates_per_iteration for metrics, _, _ in history)
    assert history[-1][0]["objective/kl"] > history[0][0]["objective/kl"]
    assert abs(history[0][0]["objective/kl"]) < 1e-4  # the policy starts as its reference


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    (state, history), (again, same) = run("gae", 3), run("gae", 3)
    chex.assert_trees_all_equal(numbers(state), numbers(again))
    chex.assert_trees_all_equal(history, same)
    _, other = run("gae", 1, seed=1)
    assert np.any(other[0][1].tokens != history[0][1].tokens)


def test_score_on_the_host_gives_the_iteration_of_the_single_program():
    bench, rng = the("gae"), np.random.default_rng(0)
    step, state, reference = bench.step, bench.state(), bench.reference()
    expected_state, history = run("gae", 2)
    for expected_metrics, experience, scores in history:
        rollout = step.act(state, reference, bench.prompts(rng))
        assert due(state, rollout) is rollout
        np.testing.assert_array_equal(rollout.tokens, experience.tokens)
        close(rollout.logprobs, experience.logprobs)
        host_scores = Scores(jnp.asarray(np.asarray(step.score((), rollout).total)))
        np.testing.assert_array_equal(host_scores.total, scores.total)
        before, measured = state, step.measure(state, reference, rollout, host_scores)
        state, metrics, learned = step.learn(state, reference, rollout, host_scores, None)
        assert_consumed(before)
        assert metrics.keys() == expected_metrics.keys()
        # Two programs round differently, by 1e-6 in the gradient; Adam divides that by at least its eps of 1e-4.
        chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-3, atol=1e-4)
        chex.assert_trees_all_close(jax.device_get(learned), experience, rtol=0, atol=1e-4)
        # To measure asks for the exact KL as well; what else it says is what learning says.
        assert measured.keys() - metrics.keys() == {"kl/exact", "kl/exact_se"}
        same = {name: metrics[name] for name in measured if name in metrics}
        chex.assert_trees_all_close({name: measured[name] for name in same}, same, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(state.params, expected_state.params, rtol=0, atol=1e-4)
    assert state.step == expected_state.step == 2
    # Second iterations compiled nothing.
    assert [f._cache_size() for f in (step.act, step.learn, step.measure, step.score)] == [1, 1, 1, 1]


def test_the_state_is_donated_and_the_reference_is_not_touched():
    bench = the("gae")
    state, reference, prompts = bench.state(), bench.reference(), bench.prompts(np.random.default_rng(0))
    before = jax.device_get(reference)
    new_state, *_ = compiled("gae")(state, reference, prompts, (), None)
    assert_consumed(state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new_state, reference, prompts)))
    chex.assert_trees_all_equal(jax.device_get(reference), before)
    moved = jax.tree.map(lambda a, b: np.any(a != b), jax.device_get(new_state.params["decoder"]), before)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", BENCHES)
def test_a_new_state_of_the_same_tree_comes_out(name):
    state = the(name).state()
    expected = jax.eval_shape(lambda: state)
    key = np.array(jax.random.key_data(state.key))
    new_state, _ = run(name, 1)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, expected)
    assert jax.tree.structure(new_state) == jax.tree.structure(expected)
    np.testing.assert_array_equal(jax.random.key_data(new_state.key), key)
    counts = [int(count) for _, count in optax.tree_utils.tree_get_all_with_path(new_state.opt_state, "count")]
    # Adam's and the schedule's, of the policy and of the critic; a rollout without a token is not learned from.
    assert set(counts) == {0 if name == "stale" else the(name).config.updates_per_iteration}


def test_each_iteration_acts_with_a_key_of_its_own():
    bench = the("gae")
    prompts, state, reference = bench.prompts(np.random.default_rng(0)), bench.state(), bench.reference()
    rollouts = [bench.step.act(state.replace(step=state.step + i), reference, prompts) for i in (0, 1, 0)]
    np.testing.assert_array_equal(rollouts[0].tokens, rollouts[2].tokens)
    assert np.mean(rollouts[0].response_tokens != rollouts[1].response_tokens) > 0.5


def test_acting_and_learning_have_keys_of_their_own_in_every_iteration(monkeypatch):
    def generate(model, params, prompts, key, sampling, **more):
        return jax.random.key_data(key)

    def update(model, tx, state, ref_params, experience, texts, key, *rest):
        return state, jnp.zeros(3, bool), {"key": jax.random.key_data(key)}

    def make_experience(model, params, ref_params, rollout, scores, running, *rest):
        return rollout, running, {"objective/kl": jnp.float32(1.0)}, jnp.zeros(6, bool)

    monkeypatch.setattr(policy, "generate", generate)
    monkeypatch.setattr(ppo, "update", update)
    monkeypatch.setattr(ppo, "make_experience", make_experience)
    bench = the("gae")
    step = make_train_step(bench.model, bench.tx, bench.method, bench.sampling, bench.shardings)
    state, used, rollout = bench.state(), [], nothing_sampled(CONFIG)
    used.append(np.array(jax.random.key_data(state.key)))
    for _ in range(3):
        used.append(np.asarray(step.act(state, bench.reference(), bench.prompts(np.random.default_rng(0)))))
        state, metrics, _ = step.learn(state, bench.reference(), rollout, Scores(jnp.zeros(16)), None)
        used.append(np.asarray(metrics["key"]))
    assert len(np.unique(used, axis=0)) == 7  # the state's own key is not among them


def test_the_adaptive_kl_coefficient_follows_its_formula():
    # kl_target 2 nats, horizon 80 sequences, 16 sequences an iteration: at most 4 % up or down.
    state, history = run("gae", 6)
    coefficients = [metrics["objective/kl_coef"] for metrics, _, _ in history] + [state.running.kl_coef]
    assert coefficients[0] == np.float32(CONFIG.kl_coef)
    for (metrics, _, _), before, after in zip(history, coefficients[:-1], coefficients[1:], strict=True):
        error = min(max(metrics["objective/kl"] / 2.0 - 1, -0.2), 0.2)
        np.testing.assert_allclose(after, before * (1 + error * 16 / 80), rtol=1e-6)
    assert coefficients[1] < coefficients[0]  # no divergence at first
    assert coefficients[-1] > coefficients[-2]  # too much at last


def test_the_running_baseline_follows_the_rewards_of_responses():
    state, history = run("gae", 3)
    expected = 0.0
    for metrics, _, _ in history:
        expected = 0.9 * expected + 0.1 * metrics["objective/reward"]
    close(state.running.baseline, expected)


def test_no_array_holds_the_logits_of_all_response_tokens():
    shapes = re.findall(rf"\[([\d,]*\b{V}\b[\d,]*)\]", compiled("gae").as_text())
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
        {"truncate_after": 3},
    ],
)
def test_training_on_another_distribution_than_the_sampled_one_is_refused(changes):
    bench = the("gae")
    sampling = dataclasses.replace(bench.sampling, **changes)
    with pytest.raises(InputError, match="PPO trains on the distribution that it samples from"):
        make_train_step(bench.model, bench.tx, bench.method, sampling, bench.shardings)


def test_without_a_jax_score_there_is_no_single_program():
    bench = the("gae")
    step = make_train_step(bench.model, bench.tx, bench.method, bench.sampling, bench.shardings)
    assert step.score is None
    assert step.iterate is None


# What is not finite is not learned.


def spoil(what: str, rollout, scores):
    if what == "score":
        return rollout, scores.replace(total=scores.total.at[0].set(jnp.nan))
    at = rollout.logprobs.at[0, 0].set(-jnp.inf)  # every response has a first token
    return rollout.replace(logprobs=at), scores


@pytest.mark.parametrize("what", ["score", "response logprob"])
@pytest.mark.parametrize("name", ["gae", "groups"])
def test_what_is_broken_is_not_learned_and_the_next_is(name, what):
    bench, rng = the(name), np.random.default_rng(0)
    step, state, reference = bench.step, bench.state(), bench.reference()
    for skipped in (1, 2):
        rollout = step.act(state, reference, bench.prompts(rng))
        rollout, scores = spoil(what, rollout, step.score((), rollout))
        before = numbers(state)
        state, metrics, experience = step.learn(state, reference, rollout, scores, None)
        after = numbers(state)
        assert quantities(state.params)[int(metrics["guard/first_broken"])] == what
        assert metrics["guard/skipped"] == bench.config.updates_per_iteration
        assert metrics["policy/updates"] == 0
        assert (after.step, after.running.skipped) == (skipped, skipped)
        running = before.running.replace(skipped=after.running.skipped)
        for old, new in ((before.params, after.params), (before.opt_state, after.opt_state), (running, after.running),
                         (before.ema_params, after.ema_params)):  # fmt: skip
            chex.assert_trees_all_equal(old, new)
        np.testing.assert_array_equal(experience.tokens, rollout.tokens)  # to be looked at
    rollout = step.act(state, reference, bench.prompts(rng))
    before = numbers(state)
    state, metrics, _ = step.learn(state, reference, rollout, step.score((), rollout), None)
    assert metrics["guard/first_broken"] == -1
    assert state.running.skipped == 0
    assert all(np.isfinite(x) for x in metrics.values())
    moved = jax.tree.map(lambda a, b: np.any(a != b), numbers(state).params, before.params)
    assert all(jax.tree.leaves(moved))


def test_a_gradient_that_breaks_is_named_in_the_iteration(monkeypatch):
    """An optimizer's step away from a finite loss: here the update says that the second leaf's gradient broke."""

    def update(model, tx, state, *rest):
        return state, jnp.zeros(3 + len(leaves), bool).at[4].set(True), {}

    bench = the("gae")
    leaves = jax.tree.leaves(bench.params)
    monkeypatch.setattr(ppo, "update", update)
    step = make_train_step(bench.model, bench.tx, bench.method, bench.sampling, bench.shardings)
    state, reference = bench.state(), bench.reference()
    rollout = the("gae").step.act(state, reference, bench.prompts(np.random.default_rng(0)))
    state, metrics, _ = step.learn(state, reference, rollout, Scores(jnp.zeros(16)), None)
    assert metrics["guard/first_broken"] == len(EXPERIENCE) + 4
    assert state.running.skipped == 1


# Methods without a critic; adapters; a moving average.


def test_a_method_without_a_critic_has_no_value_head_and_no_value_metrics():
    state, history = run("groups", 1)
    assert state.params.keys() == {"decoder"}
    assert not [name for name in history[0][0] if name.startswith("value/")]
    assert np.all(history[0][1].values == 0)


def test_an_adapter_is_all_that_is_trained_and_averaged():
    bench, (state, history) = the("groups"), run("groups", 3)
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.ema_params))
    assert all("lora_" in str(path[-1]) for path, _ in leaves)
    # Three responses to each prompt besides the first.
    tokens = history[0][1].tokens[:, :5].reshape(4, 4, 5)
    np.testing.assert_array_equal(tokens, np.repeat(tokens[:, :1], 4, axis=1))
    # The average after each iteration, beginning at the fresh parameters.
    expected = numbers(bench.state()).params["decoder"]
    for iterations in (1, 2, 3):
        params = numbers(run("groups", iterations)[0]).params["decoder"]
        expected = jax.tree.map(lambda average, x: 0.75 * average + 0.25 * x, expected, params)
    chex.assert_trees_all_close(numbers(state).ema_params, expected, rtol=1e-5, atol=1e-6)


# Acting ahead of learning.


def test_rollouts_wait_in_a_queue_and_the_oldest_is_learned_from():
    bench, rng = the("stale"), np.random.default_rng(0)
    state, reference, acted = bench.state(), bench.reference(), []
    base, fresh = jax.device_get(reference), numbers(state)
    for i in range(5):
        prompts = bench.prompts(rng)
        acted.append(jax.device_get(bench.step.act(state, reference, prompts)))
        state, metrics, experience, scores = compiled("stale")(state, reference, prompts, (), None)
        waiting = jax.device_get(state.pending)
        assert len(waiting) == 2
        for waits, rollout in zip(waiting[::-1], acted[::-1], strict=False):
            np.testing.assert_array_equal(waits.tokens, rollout.tokens)
        assert state.step == i + 1
        assert 0 <= metrics["policy/first_ratio_dev"] <= 1e-4  # to the learner, who asks itself again
        assert all(np.isfinite(x) for x in metrics.values())
        if i < 2:  # nothing has been sampled yet that could be learned from: the state is as it was
            assert not experience.response_mask.any()
            assert scores.total.shape == (16,)
            for part in ("params", "opt_state", "running"):
                chex.assert_trees_all_equal(getattr(numbers(state), part), getattr(fresh, part))
            continue
        learned = acted[i - 2]
        np.testing.assert_array_equal(experience.tokens, learned.tokens)
        np.testing.assert_array_equal(scores.total, bench.step.score((), learned).total)
        mask = learned.response_mask
        log_ratio = np.float64(experience.logprobs - learned.logprobs)[mask]
        close(np.asarray(experience.importance)[mask], np.minimum(np.exp(log_ratio), 2.0), 10)
        close(metrics["stale/kl"], np.mean(np.expm1(log_ratio) - log_ratio), 10)
        close(metrics["stale/ratio_max"], np.exp(log_ratio.max()), 10)
        # The first that is learned from was sampled by the fresh policy, and so was the second: i = 3 learns from it
        # after an update.
        assert (metrics["stale/kl"] < 1e-8) == (i == 2)
        assert state.running.score_count == 16 * (i - 1)
    # The lower layer is the reference's, and not in the state.
    assert state.params["decoder"].keys() == {"layer_1", "final_norm"}
    chex.assert_trees_all_equal(jax.device_get(reference), base)


# ReMax, and texts beside the responses.


def test_remax_compares_with_the_likeliest_response_to_the_same_prompt():
    bench, rng = the("remax"), np.random.default_rng(0)
    state, reference = bench.state(), bench.reference()
    for _ in range(2):
        prompts = bench.prompts(rng)
        best = bench.step.greedy(state, reference, prompts)
        expected = np.repeat(np.asarray(token_set_score(best)), 2)
        logprobs = np.asarray(best.logprobs)
        state, metrics, experience, scores = compiled("remax")(state, reference, prompts, (), texts_of("remax"))
        np.testing.assert_allclose(scores.greedy, expected, rtol=1e-6)
        np.testing.assert_array_equal(experience.tokens[::2, :5], best.tokens[:, :5])
        last = np.asarray(experience.response_mask).sum(1) - 1
        at = (np.arange(16), last)
        # At the last token the reward to go is the score, less the price of that token's KL.
        shaped = np.asarray(scores.total) - np.asarray(experience.returns)[at]
        close(np.asarray(experience.advantages)[at], np.asarray(scores.total) - shaped - expected)
        assert np.all(np.exp(logprobs[np.asarray(best.response_mask)]) >= 1 / V)
        assert np.isfinite(metrics["policy/ptx_loss"])
    assert state.params.keys() == {"decoder"}


def test_texts_are_learned_beside_the_responses():
    _, history = run("remax", 8)
    losses = [metrics["policy/ptx_loss"] for metrics, _, _ in history]
    assert losses[-1] < losses[0] - 0.05  # the same texts each time


# A run that goes on.


@pytest.mark.parametrize("name", ["stale", "groups"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(name, tmp_path):
    """With rollouts that wait and running moments; with a moving average of an adapter. A kill: see test_resume.py."""
    bench, program = the(name), compiled(name)
    expected, history = run(name, 4)
    half, _ = run(name, 2)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(half)
    state = checkpoints.restore(bench.state(seed=7))
    checkpoints.close()
    chex.assert_trees_all_equal(numbers(state), numbers(half))
    rng, reference = np.random.default_rng(0), bench.reference()
    batches = [bench.prompts(rng) for _ in range(4)]
    for prompts, (metrics, experience, _) in zip(batches[2:], history[2:], strict=True):
        state, *results = program(state, reference, prompts, (), None)
        chex.assert_trees_all_equal(jax.device_get(results[:2]), [metrics, experience])
    chex.assert_trees_all_equal(numbers(state), numbers(expected))


# The beginning.


def test_a_fresh_state_has_the_given_decoder_and_a_critic_that_says_zero(rng, key):
    params = random_params(rng, LLAMA)["decoder"]
    method = resolve(dataclasses.replace(CONFIG, kl_coef=0.25))
    state = init_state(params, ActorCritic(LLAMA), optax.sgd(1.0), method, jax.random.clone(key))
    chex.assert_trees_all_equal(state.params["decoder"], params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(state.params["value_head"]))
    assert (state.step, state.running.kl_coef, state.running.skipped) == (0, 0.25, 0)
    assert state.ema_params is None
    assert state.pending == ()
    assert np.any(jax.random.key_data(state.key) != jax.random.key_data(key))
    bare = init_state(params, ActorCritic(LLAMA), optax.sgd(1.0), resolve(GROUPS), jax.random.clone(key))
    assert bare.params.keys() == {"decoder"}
    chex.assert_trees_all_equal(bare.ema_params, params)


def test_a_fresh_state_with_a_critic_has_it_and_the_same_random_numbers(rng, key):
    params, critic = (random_params(rng, LLAMA) for _ in range(2))
    given = {"critic": critic["decoder"], "value_head": critic["value_head"]}
    tx, method = make_optimizer(optax.constant_schedule(1e-3)), resolve(CONFIG)
    state = init_state(params["decoder"], ActorCritic(LLAMA), tx, method, jax.random.clone(key), given)
    assert state.params.keys() == {"decoder", "critic", "value_head"}
    chex.assert_trees_all_equal(state.params, {"decoder": params["decoder"]} | given)
    # Adam has moments for all of it.
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    other = init_state(params["decoder"], ActorCritic(LLAMA), tx, method, jax.random.clone(key))
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(other.key))
