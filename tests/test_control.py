"""PPO for control: targets, loss, networks and whole runs against loops and against the core that it shares."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy import stats

from experiments.methods import bind_control, resolve_control
from ppo_jax.config import ControlConfig
from ppo_jax.control import (
    Plan,
    Steps,
    Trajectory,
    act,
    architecture,
    control_loss,
    evaluate,
    make_host_steps,
    make_targets,
    make_training,
    new_worlds,
    to_environment,
)
from ppo_jax.envs import CARTPOLE, PENDULUM, QUADRANTS, Box, CartPoleState
from ppo_jax.errors import InputError
from ppo_jax.models.control import action_logprobs, choose, draw_noise, init_networks, policy_output, value

TINY = ControlConfig(num_envs=4, num_steps=16, num_epochs=2, num_minibatches=2, width=8, whiten_advantages="none")


def noisy_params(rng, net, scale=0.5):
    """Parameters at which every one matters."""
    shapes = jax.eval_shape(lambda: init_networks(jax.random.key(0), net))
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), shapes)


def random_trajectory(rng, net, steps: int, envs: int) -> Trajectory:
    """Random everything; some steps terminate, some are cut, some both."""
    seen, reached = (rng.normal(size=(steps, envs, net.observation_size)) for _ in range(2))
    actions = rng.integers(0, net.action_size, (steps, envs))
    numbers = (rng.uniform(-3, -0.1, (steps, envs)), rng.normal(size=(steps, envs)))
    ends = (rng.random((steps, envs)) < 0.2, rng.random((steps, envs)) < 0.2)
    as_float = [jnp.asarray(x, jnp.float32) for x in (seen, *numbers, reached)]
    return Trajectory(
        as_float[0], jnp.asarray(actions, jnp.int32), *as_float[1:3], *map(jnp.asarray, ends), as_float[3]
    )


# Targets and loss


def test_truncation_is_bootstrapped_and_termination_is_not(rng):
    """Episode by episode, backwards in plain Python: nothing of one episode reaches another."""
    net = architecture(CARTPOLE, TINY)
    params, trajectory = noisy_params(rng, net), random_trajectory(rng, net, 12, 3)
    steps = make_targets(net, params, trajectory, TINY)
    values, after = (np.float64(value(params, net, x)) for x in (trajectory.observations, trajectory.reached))
    expected = np.zeros((12, 3))
    for n in range(3):
        following = None
        for t in reversed(range(12)):
            dies, cut = bool(trajectory.terminated[t, n]), bool(trajectory.truncated[t, n])
            if dies or cut:
                following = None
            # What comes is nothing after a termination; what the critic says of the reached state where it was cut, or
            # where the rollout ends; and the next step's own value where the episode goes on.
            ahead = 0.0 if dies else after[t, n] if cut or t == 11 else values[t + 1, n]
            delta = float(trajectory.rewards[t, n]) + TINY.gamma * ahead - values[t, n]
            following = delta + TINY.gamma * TINY.gae_lambda * (following or 0.0)
            expected[t, n] = following
    np.testing.assert_allclose(np.reshape(steps.advantages, (12, 3)), expected, atol=1e-5)
    np.testing.assert_allclose(np.reshape(steps.returns, (12, 3)), expected + values, atol=1e-5)


@pytest.mark.parametrize("whitening", ["none", "minibatch"])
def test_the_loss_equals_its_parts_case_by_case(whitening, rng):
    net = architecture(CARTPOLE, TINY)
    params, n = noisy_params(rng, net), 24
    observations = jnp.asarray(rng.normal(size=(n, 4)), jnp.float32)
    actions = jnp.asarray(rng.integers(0, 2, n), jnp.int32)
    new, entropy = oracles.logprobs_and_entropy(
        np.asarray(policy_output(params, net, observations)), np.asarray(actions)
    )
    values = np.float64(value(params, net, observations))
    old = new - np.log(rng.choice([0.6, 0.95, 1.1, 1.5], n))  # none near a clip boundary
    old_values, returns, advantages = values + rng.choice([-0.5, 0.1], n), rng.normal(size=n) * 5, rng.normal(size=n)
    config = dataclasses.replace(TINY, ent_coef=0.03, value_loss="clip", whiten_advantages=whitening)
    given = (jnp.asarray(x, jnp.float32) for x in (old, old_values, advantages, returns))
    loss, metrics = control_loss(params, net, Steps(observations, actions, *given), resolve_control(config))
    if whitening == "minibatch":
        advantages = (advantages - advantages.mean()) / advantages.std()
    mask = np.ones(n, bool)
    policy_loss, policy_metrics, _ = oracles.clipped_policy_loss(new, old, advantages, mask, 0.2)
    value_loss, _, _ = oracles.clipped_value_loss(values, old_values, returns, mask, 0.2)
    expected = policy_loss + 0.5 * value_loss - 0.03 * np.mean(entropy)
    assert abs(loss - expected) < 1e-5 * (1 + abs(value_loss))
    assert abs(metrics["policy/clip_frac"] - policy_metrics["clip_frac"]) < 1e-6


# Networks


@pytest.mark.parametrize(("trunk", "depth"), [("separate", 2), ("shared", 3), ("separate", 1)])
def test_matrices_are_orthogonal_with_their_gains(trunk, depth, key):
    net = architecture(CARTPOLE, dataclasses.replace(TINY, trunk=trunk, depth=depth, width=16))
    params = init_networks(key, net)
    names = ("trunk",) if trunk == "shared" else ("actor", "critic")
    assert set(params) == {f"{name}_{i}" for name in names for i in range(depth)} | {"action", "value"}
    for name, layer in params.items():
        kernel, gain = np.float64(layer["kernel"]), {"action": 0.01, "value": 1.0}.get(name, math.sqrt(2))
        small = kernel.T @ kernel if kernel.shape[0] >= kernel.shape[1] else kernel @ kernel.T
        np.testing.assert_allclose(small, gain**2 * np.eye(len(small)), atol=1e-5 * gain**2)
        assert not np.any(layer["bias"])
    kernels = [np.asarray(x["kernel"]) for x in params.values() if x["kernel"].shape == (16, 16)]
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(kernels) for b in kernels[:i])


def test_a_gaussian_policy_is_the_one_of_scipy(rng):
    net = architecture(PENDULUM, TINY)._replace(action_size=3)
    params = noisy_params(rng, net)
    output, actions = (jnp.asarray(rng.normal(size=(5, 3)), jnp.float32) for _ in range(2))
    logprobs, entropy = action_logprobs(params, net, output, actions)
    there = stats.norm(np.float64(output), np.exp(np.float64(params["log_std"])))
    np.testing.assert_allclose(logprobs, there.logpdf(np.float64(actions)).sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, np.broadcast_to(there.entropy(), (5, 3)).sum(1), rtol=1e-5, atol=1e-5)


def test_actions_are_drawn_from_the_policy(rng, key):
    net = architecture(CARTPOLE, TINY)
    params = noisy_params(rng, net, 1.0)
    observations = jnp.broadcast_to(jnp.asarray(rng.normal(size=4), jnp.float32), (4000, 4))
    actions, logprobs = choose(params, net, observations, draw_noise(key, net, (4000,)))
    probability = float(jax.nn.softmax(policy_output(params, net, observations[0]))[1])
    assert abs(np.mean(actions) - probability) < 5 * math.sqrt(probability * (1 - probability) / 4000) + 1e-9
    told = np.where(np.asarray(actions) == 1, math.log(probability), math.log1p(-probability))
    np.testing.assert_allclose(logprobs, told, rtol=1e-4, atol=1e-5)
    best, _ = choose(params, net, observations[:1], jnp.zeros((1, 2)))
    assert int(best[0]) == int(probability > 0.5)


def test_continuous_actions_are_mapped_to_their_range():
    given = to_environment(jnp.array([[-1.0, 0.0], [1.0, 5.0], [-9.0, 0.5]]), Box((-2.0, 0.0), (2.0, 4.0)))
    np.testing.assert_allclose(given, [[-2, 2], [2, 4], [-2, 3]])


# Acting


def test_acting_is_the_environment_step_by_step(rng, key):
    """Replayed from the recorded actions, one environment at a time, with Python's ifs."""
    net = architecture(CARTPOLE, TINY)
    params = noisy_params(rng, net)
    # It mostly pushes to one side, so that no drawn policy balances all poles to the end.
    params["action"] = {"kernel": 0.1 * params["action"]["kernel"], "bias": jnp.array([0.0, 2.0])}
    world_key, act_key = jax.random.split(key)
    worlds = new_worlds(CARTPOLE, world_key, 3)
    after, trajectory, ended = jax.jit(lambda p, w, k: act(CARTPOLE, net, p, w, k, 60))(params, worlds, act_key)
    step = jax.jit(CARTPOLE.step)
    count = total = 0.0
    for n in range(3):
        state = jax.tree.map(lambda x, n=n: x[n], worlds.states)
        returns = 0.0
        for t in range(60):
            told = step(state, trajectory.actions[t, n])
            np.testing.assert_allclose(trajectory.reached[t, n], told.observation, rtol=1e-5, atol=1e-5)
            assert (trajectory.terminated[t, n], trajectory.truncated[t, n]) == (told.terminated, told.truncated)
            returns += 1.0
            following = trajectory.observations[t + 1, n] if t < 59 else after.observations[n]
            if told.terminated or told.truncated:
                count, total, returns = count + 1, total + returns, 0.0
                assert np.abs(following).max() <= 0.05  # a fresh one
                state = CartPoleState(following, jnp.int32(0))
            else:
                state = told.state
                np.testing.assert_allclose(following, told.observation, rtol=1e-5, atol=1e-5)
        assert float(after.returns[n]) == returns
    assert count > 0
    assert float(ended["count"]) == count
    assert float(ended["return"]) == total == float(ended["length"])


# Whole runs


PLAN = Plan(num_iterations=4, eval_every=2, eval_episodes=6, eval_greedy=True)


def test_the_first_minibatch_has_ratio_one_and_every_row_its_shape(key):
    snapshots, metrics = jax.jit(make_training(QUADRANTS, TINY, bind_control, PLAN))(key, {})
    assert all(x.shape[0] == 3 for x in jax.tree.leaves(snapshots))
    assert all(x.shape == (3,) for x in metrics.values())
    assert np.all(metrics["policy/first_ratio_dev"][1:] < 1e-6)
    assert np.all(np.isfinite([x[1:] for x in metrics.values()]))  # 128 steps a stage: four episodes end in each
    assert np.all(metrics["guard/first_broken"][1:] == -1)
    np.testing.assert_allclose(metrics["policy/updates"][1:], 4)
    moved = jax.tree.map(lambda x: float(jnp.abs(x[0] - x[-1]).max()), snapshots)
    assert min(jax.tree.leaves(moved)) > 0


def test_agents_side_by_side_are_the_agents_alone(seed):
    """One after the other and in one program: first the same, then the same up to rounding that grows with training."""
    keys = jax.vmap(jax.random.key)(jnp.arange(2) + seed % 1000)
    plan = PLAN._replace(num_iterations=2)
    train = make_training(QUADRANTS, TINY, bind_control, plan)
    values = {"lr": jnp.array([1e-3, 1e-2]), "gamma": jnp.array([0.9, 0.5]), "clip_eps": jnp.array([0.1, 0.3])}
    with jax.debug_key_reuse(False):  # it takes the transposed keys of a scan under vmap for a second use
        together, _ = jax.jit(jax.vmap(train))(keys, values)
    for i in range(2):
        told = {name: float(x[i]) for name, x in values.items()}
        config = dataclasses.replace(TINY, **told)
        alone, _ = jax.jit(make_training(QUADRANTS, config, bind_control, plan))(keys[i], {})
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(b[i], a, atol=2e-4)
    first, second = (jax.tree.map(lambda x, i=i: x[i], together) for i in range(2))
    gaps = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)]
    assert max(gaps) > 1e-2


def test_an_evaluation_is_whole_episodes(rng, key):
    """`eval_episodes` of them; `eval_greedy` takes the likeliest action, which here is always the right one."""
    net = architecture(QUADRANTS, TINY)
    zeros = jax.tree.map(jnp.zeros_like, noisy_params(rng, net))
    always = zeros | {"action": {"kernel": zeros["action"]["kernel"], "bias": jnp.array([0.0, 1.0])}}
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    at = jax.random.key_data(keys[0])  # twice the same points
    greedy = evaluate(QUADRANTS, net, always, jax.random.wrap_key_data(at), 50, True)
    assert greedy.shape == (50,)
    # Always action 1: right in half of 32 points, with a deviation of sqrt(8) in each of 50 episodes.
    assert abs(np.mean(greedy) - 16) < 5 * math.sqrt(8 / 50)
    # By sampling, action 1 comes with probability 0.73, whatever the point: right in half of them as well, but others.
    sampled = evaluate(QUADRANTS, net, always, jax.random.wrap_key_data(at), 50, False)
    assert not np.array_equal(greedy, sampled)
    assert evaluate(QUADRANTS, net, always, keys[1], 7, True).shape == (7,)
    # The pole: the only reward is time, so a return is a length, at least 8 steps and at most 500.
    net = architecture(CARTPOLE, TINY)
    lengths = evaluate(CARTPOLE, net, noisy_params(rng, net), keys[2], 9, True)
    assert np.all((lengths >= 8) & (lengths <= 500))


def test_quadrants_is_learned(key):
    config = ControlConfig(gamma=0.0, gae_lambda=0.0, num_epochs=10, num_minibatches=4, lr=3e-3)
    train = make_training(QUADRANTS, config, bind_control, Plan(40, 40, 50, True))
    with jax.debug_key_reuse(False):  # as above
        _, metrics = jax.jit(jax.vmap(lambda key: train(key, {})))(jax.random.split(key, 3))
    # A guess has 16; no straight line does better than 24. Ten seeds of 10,240 steps had 31 and more.
    assert np.all(np.abs(metrics["eval/return_mean"][:, 0] - 16) < 4)
    assert np.all(metrics["eval/return_mean"][:, -1] > 28)


def test_a_gradient_that_is_not_finite_is_counted_and_not_applied(key):
    broken = dataclasses.replace(QUADRANTS, step=lambda state, action: QUADRANTS.step(state, action)._replace(
        reward=jnp.float32(jnp.nan)))  # fmt: skip
    snapshots, metrics = jax.jit(make_training(broken, TINY, bind_control, PLAN))(key, {})
    np.testing.assert_allclose(metrics["guard/skipped"][1:], 2 * TINY.updates_per_iteration)
    assert np.all(metrics["guard/first_broken"][1:] >= 0)
    for x in jax.tree.leaves(snapshots):
        np.testing.assert_array_equal(x[0], x[-1])


def test_the_host_pieces_learn_what_the_program_learns(rng, key):
    """From the same trajectory: the same function, compiled by itself."""
    steps = make_host_steps(CARTPOLE, TINY, bind_control, PLAN.num_iterations)
    init_key, act_key, learn_key = jax.random.split(key, 3)
    params, opt_state = steps.init(init_key)
    observations = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
    actions, given, logprobs = steps.act(params, observations, act_key)
    net = architecture(CARTPOLE, TINY)
    told, _ = action_logprobs(params, net, policy_output(params, net, observations), actions)
    np.testing.assert_allclose(logprobs, told, atol=1e-6)
    np.testing.assert_array_equal(given, actions)
    after, _, metrics = steps.learn(params, opt_state, random_trajectory(rng, net, 16, 4), learn_key)
    assert metrics["guard/skipped"] == 0
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (params, after)), strict=True)) > 1e-4


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_envs": 0}, "num_envs: got 0, expected at least 1"),
        ({"gamma": 1.5}, r"gamma: got 1.5, expected a number in \[0, 1\]"),
        ({"num_minibatches": 7}, r"num_envs x num_steps: got 256, expected a multiple of num_minibatches \(7\)"),
        ({"trunk": "joint"}, "trunk: got 'joint', expected one of separate, shared"),
        ({"clip_eps": 0.0}, "clip_eps: got 0.0, expected a number above 0"),
        ({"lr": -1.0}, "lr: got -1.0, expected a number above 0"),
        ({"whiten_advantages": "auto"}, "whiten_advantages: got 'auto'"),
    ],
)
def test_settings_that_cannot_be(fields, told):
    with pytest.raises(InputError, match=told):
        ControlConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"policy_loss": "gspo"}, "ppo.policy_loss: got 'gspo', expected one of clip, cispo, none"),
        ({"huber_delta": 2.0}, "ppo.huber_delta: got 2.0, expected the default 1.0: nothing reads it"),
        ({"whiten_advantages": "none", "whiten_shift": False}, "ppo.whiten_shift: got False, expected the default"),
    ],
)
def test_settings_that_nothing_would_read(fields, told):
    with pytest.raises(InputError, match=told):
        resolve_control(ControlConfig(**fields))
