"""Control tasks: CartPole and Pendulum against Gymnasium, step by step; quadrants against NumPy; keys and batches."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracles import EPS32, assert_close, float32

from ppo_jax.envs import ENVIRONMENTS, Box, CartPoleState, Discrete, PendulumState

CARTPOLE, PENDULUM, QUADRANTS = ENVIRONMENTS.values()

# The state is rounded on its way in, and the sum on its way out. The dozen roundings of an acceleration count 0.02 of
# its size, less than half of one each. Measured: at most 1 over 160,000 steps.
STEP_OPS = 6

each_task = pytest.mark.parametrize("task", ENVIRONMENTS.values(), ids=ENVIRONMENTS)


class Record(NamedTuple):
    """Gymnasium's steps, one after the other, in float64: everything before and after each."""

    states: np.ndarray  # [N, D]
    steps: np.ndarray  # [N]: taken before
    actions: np.ndarray
    next_states: np.ndarray  # [N, D]
    observations: np.ndarray  # [N, O]
    rewards: np.ndarray  # [N]
    terminated: np.ndarray  # [N]
    truncated: np.ndarray  # [N]


@pytest.fixture(scope="module")
def gymnasium():
    return pytest.importorskip("gymnasium")


def record(env, starts, choose, interfere=lambda episode, steps, state: state) -> Record:
    """Episodes from the given states, to their ends; `interfere` may put something else in a state's place."""
    rows = []
    for episode, start in enumerate(starts):
        env.reset(seed=episode)
        env.unwrapped.state = np.asarray(start, np.float64)
        done, steps = False, 0
        while not done:
            state = np.array(interfere(episode, steps, env.unwrapped.state))
            env.unwrapped.state = state
            action = choose(state)
            observation, reward, terminated, truncated, _ = env.step(action)
            rows.append(
                (state, steps, action, np.array(env.unwrapped.state), observation, reward, terminated, truncated)
            )
            done, steps = terminated or truncated, steps + 1
    return Record(*map(np.array, zip(*rows, strict=True)))


def starts(task, key, episodes: int):
    return jax.vmap(task.reset)(jax.random.split(key, episodes))[0]


def rollout(task, key, choose, steps: int):
    """`steps` steps of one environment that starts again at each end: observations acted upon, actions, transitions."""
    start_key, later_key = jax.random.split(key)

    def one(carry, time):
        state, observation = carry
        action_key, reset_key = jax.random.split(jax.random.fold_in(later_key, time))
        action = choose(action_key, observation)
        transition = task.step(state, action)
        ended = transition.terminated | transition.truncated
        after = (transition.state, transition.observation)
        carry = jax.tree.map(lambda new, old: jnp.where(ended, new, old), task.reset(reset_key), after)
        return carry, (observation, action, transition._replace(state=None))

    return jax.lax.scan(one, task.reset(start_key), jnp.arange(steps))[1]


def random_action(task):
    """Uniform over the choices, or over twice the range of a vector."""
    if isinstance(task.actions, Discrete):
        return lambda key, _: jax.random.randint(key, (), 0, task.actions.num_actions)
    low, high = map(jnp.array, (task.actions.low, task.actions.high))
    return lambda key, _: jax.random.uniform(key, (task.actions.size,), jnp.float32, 2 * low, 2 * high)


def balance(state) -> int:
    """Against the fall of the pole, and a little against the way of the cart."""
    x, speed, angle, spin = state
    return (angle + 0.5 * spin + 0.05 * x + 0.1 * speed > 0) * 1


# what all tasks have in common


def test_the_tasks_say_what_they_are():
    facts = {name: (task.observation_size, task.actions, task.solved_at) for name, task in ENVIRONMENTS.items()}
    assert facts == {
        "CartPole-v1": (4, Discrete(2), 475.0),
        "Pendulum-v1": (3, Box((-2.0,), (2.0,)), -200.0),
        "quadrants": (2, Discrete(2), 30.0),
    }
    assert all(task.name == name for name, task in ENVIRONMENTS.items())
    assert Box((-1.0, 0.0), (1.0, 2.0)).size == 2


def test_gymnasium_says_the_same(gymnasium):
    assert gymnasium.spec("CartPole-v1").reward_threshold == CARTPOLE.solved_at
    for task in (CARTPOLE, PENDULUM):
        env = gymnasium.make(task.name)
        assert env.observation_space.shape == (task.observation_size,)
    assert gymnasium.make("CartPole-v1").action_space.n == CARTPOLE.actions.num_actions
    box = gymnasium.make("Pendulum-v1").action_space
    assert (tuple(box.low), tuple(box.high)) == (PENDULUM.actions.low, PENDULUM.actions.high)


@each_task
def test_shapes_and_dtypes_last_and_nothing_compiles_twice(task, key):
    reset_key, action_key = jax.random.split(key)
    state, observation = task.reset(reset_key)
    action = random_action(task)(action_key, observation)
    step = jax.jit(chex.assert_max_traces(task.step, 1))
    transition = step(state, action)
    again = step(transition.state, action)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, transition.state, again.state)
    for seen in (observation, transition.observation):
        chex.assert_shape(seen, (task.observation_size,))
        assert seen.dtype == jnp.float32
    dtypes = [x.dtype for x in transition[2:]]
    assert dtypes == [jnp.float32, jnp.bool_, jnp.bool_]
    chex.assert_shape(transition[2:], ())


@each_task
def test_the_same_key_and_actions_are_the_same_episode_to_the_bit(task, seed):
    play = jax.jit(lambda key: rollout(task, key, random_action(task), 300))
    first, again, other = (play(jax.random.key(s)) for s in (seed, seed, seed + 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.any(np.all(first[0] == other[0], axis=-1))


@each_task
def test_a_batch_is_its_episodes(task, key):
    keys = jax.random.split(key, 7)
    play = jax.jit(lambda key: rollout(task, key, random_action(task), 40))
    alone = [play(one) for one in keys]
    batch = jax.vmap(play)(jax.random.clone(keys))
    # Compiled twice, sines and products may be rounded or fused in two ways, and 40 steps of CartPole make more of it.
    jax.tree.map(
        lambda together, *single: np.testing.assert_allclose(together, np.stack(single), rtol=0, atol=1e-3),
        batch,
        *alone,
    )


@each_task
def test_different_keys_are_different_starts(task, key):
    observations = np.array(jax.vmap(task.reset)(jax.random.split(key, 1000))[1])
    assert len(np.unique(observations, axis=0)) == 1000


def assert_uniform(numbers, low: float, high: float) -> None:
    """Every column within its range and uniform in it, and no two columns correlated: 1 in a million by chance."""
    numbers = np.asarray(numbers, np.float64)
    assert numbers.min() >= low
    assert numbers.max() <= high
    for column in numbers.T:
        assert scipy.stats.kstest(column, scipy.stats.uniform(low, high - low).cdf).pvalue > 1e-6
    correlations = np.corrcoef(numbers.T) - np.eye(numbers.shape[1])
    assert np.abs(correlations).max() < 5.5 / np.sqrt(len(numbers))  # each is normal, 1 / sqrt(n) wide


def test_resets_are_uniform(key):
    cart_key, pendulum_key, point_key = jax.random.split(key, 3)
    cart = starts(CARTPOLE, cart_key, 4000)
    assert_uniform(cart.observation, np.float32(-0.05), np.float32(0.05))

    pendulum, seen = jax.vmap(PENDULUM.reset)(jax.random.split(pendulum_key, 4000))
    assert_uniform(np.stack([pendulum.angle / np.float32(np.pi), pendulum.speed], -1), -1.0, 1.0)
    expected = np.stack([np.cos(pendulum.angle), np.sin(pendulum.angle), pendulum.speed], -1)
    assert_close(seen, expected, 4)

    points = starts(QUADRANTS, point_key, 4000)
    assert_uniform(points.point, -1.0, 1.0)
    for state in (cart, pendulum, points):
        assert not np.any(state.steps)


# CartPole


def test_cartpole_golden():
    # Upright, at rest in the middle, pushed by 10 N. Over the mass of 1.1 kg: 10 / 1.1 = 9.0909.
    # The pole falls back: -9.0909 / (0.5 (4/3 - 0.1 / 1.1)) = -9.0909 / 0.621212 = -14.6341 rad/s^2.
    # The cart: 9.0909 + 0.05 * 14.6341 / 1.1 = 9.7561 m/s^2.   Both for 0.02 s; nothing has moved yet.
    state = CartPoleState(jnp.zeros(4), jnp.int32(0))
    right = CARTPOLE.step(state, jnp.int32(1))
    assert_close(right.observation, [0.0, 0.195121951, 0.0, -0.292682927], STEP_OPS)
    np.testing.assert_array_equal(CARTPOLE.step(state, jnp.int32(0)).observation, -right.observation)
    assert int(right.state.steps) == 1
    assert [float(x) for x in right[2:]] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("place", "steps", "terminated", "truncated"),
    [
        ([2.39, 0, 0, 0], 7, False, False),
        ([2.39, 1, 0, 0], 7, True, False),  # 2.39 + 0.02 > 2.4
        ([-2.39, -1, 0, 0], 7, True, False),
        ([2.41, -1, 0, 0], 7, False, False),  # it is the state reached that counts
        ([-2.4001, 0, 0, 0], 7, True, False),
        ([2.3999, 0, 0, 0], 7, False, False),
        ([0, 0, 0.2095, 0], 7, True, False),  # the limit is 0.209440
        ([0, 0, -0.2094, 0], 7, False, False),
        ([0, 0, 0.2, 1], 7, True, False),  # 0.2 + 0.02 > 12 degrees
        ([0, 0, -0.2, -1], 7, True, False),
        ([0, 0, 0, 0], 498, False, False),
        ([0, 0, 0, 0], 499, False, True),
        ([0, 0, 0.2, 1], 499, True, True),
    ],
)
def test_cartpole_ends(place, steps, terminated, truncated):
    transition = CARTPOLE.step(CartPoleState(jnp.array(place, jnp.float32), jnp.int32(steps)), jnp.int32(0))
    assert [float(x) for x in transition[2:]] == [1.0, terminated, truncated]


def assert_cartpole_is(known: Record) -> None:
    state = CartPoleState(jnp.array(float32(known.states)), jnp.array(known.steps, jnp.int32))
    ours = jax.jit(jax.vmap(CARTPOLE.step))(state, jnp.array(known.actions, jnp.int32))
    # Speeds of a few units; an acceleration of at most some 20 is multiplied by 0.02.
    assert_close(ours.observation, known.next_states, STEP_OPS, max(1.0, np.abs(known.next_states).max()))
    np.testing.assert_array_equal(ours.state.observation, ours.observation)
    np.testing.assert_array_equal(ours.state.steps, known.steps + 1)
    np.testing.assert_array_equal(ours.reward, known.rewards)
    np.testing.assert_array_equal(ours.truncated, known.truncated)
    # A number within rounding of its limit may be on either side of it. It moves by 0.02 and more in the step that
    # crosses: one crossing in 10^4 or fewer is in doubt.
    limits = np.array([2.4, 12 * np.pi / 180])
    doubtful = (np.abs(np.abs(known.next_states[:, [0, 2]]) - limits) < 4 * EPS32 * limits).any(axis=1)
    assert doubtful.sum() <= 3
    np.testing.assert_array_equal(ours.terminated[~doubtful], known.terminated[~doubtful])


def test_cartpole_is_gymnasiums_in_a_thousand_random_episodes(gymnasium, rng, key):
    env = gymnasium.make("CartPole-v1", disable_env_checker=True)
    start = starts(CARTPOLE, key, 1000).observation
    known = record(env, start, lambda _: int(rng.integers(2)))
    assert known.terminated.sum() == 1000
    np.testing.assert_array_equal(float32(known.next_states), known.observations)
    assert_cartpole_is(known)


def test_cartpole_is_gymnasiums_in_fast_and_far_states(gymnasium, rng):
    # Where a random policy seldom comes: speeds of tens, sines that are not angles, carts at both walls.
    env = gymnasium.make("CartPole-v1", disable_env_checker=True)
    start = rng.uniform(-1, 1, size=(2000, 4)) * [2.5, 10, 0.25, 10]
    assert_cartpole_is(record(env, start, lambda _: int(rng.integers(2))))


def test_cartpole_is_gymnasiums_to_the_time_limit(gymnasium, rng, key):
    # Balanced to the end. In every second episode the pole is almost down before the last push, which ends it twice.
    env = gymnasium.make("CartPole-v1", disable_env_checker=True)
    falling = [0.0, 0.0, 0.2, 1.0]
    known = record(
        env,
        starts(CARTPOLE, key, 20).observation,
        balance,
        lambda episode, steps, state: falling if steps == 499 and episode % 2 else state,
    )
    assert known.truncated.sum() == 20
    assert (known.truncated & known.terminated).sum() == 10
    assert len(known.steps) == 20 * 500
    assert_cartpole_is(known)


def test_cartpole_is_balanced_for_five_hundred_steps(key):
    # The whole loop with nothing of Gymnasium's in it: feedback keeps both in the same place, whatever the rounding.
    play = jax.vmap(lambda key: rollout(CARTPOLE, key, lambda _, seen: balance(seen), 1000)[-1])
    ours = jax.jit(play)(jax.random.split(key, 50))
    assert not np.any(ours.terminated)
    np.testing.assert_array_equal(np.flatnonzero(np.all(ours.truncated, axis=0)), [499, 999])
    assert np.sum(ours.truncated) == 100


# Pendulum


def test_pendulum_golden():
    # Horizontal at 1 rad/s, torque 5 clipped to 2: 1 + 0.05 (15 sin(pi/2) + 3 * 2) = 1 + 1.05 = 2.05 rad/s.
    # Angle pi/2 + 0.05 * 2.05 = 1.673296.   Cost (pi/2)^2 + 0.1 + 0.001 * 4 = 2.467401 + 0.104 = 2.571401.
    horizontal = jnp.float32(np.pi / 2)
    swung = PENDULUM.step(PendulumState(horizontal, jnp.float32(1), jnp.int32(0)), jnp.array([5.0]))
    assert_close(swung.state.angle, 1.6732963267948966, 4)
    assert_close(swung.observation, [-0.10232051, 0.99475149, 2.05], 8)
    assert_close(swung.reward, -2.5714011002723395, 8)
    # One turn on is the same place; 7.9 + 0.05 (15 + 6) is beyond the greatest speed, 8.
    turned = PENDULUM.step(PendulumState(horizontal + 2 * np.pi, jnp.float32(7.9), jnp.int32(199)), jnp.array([2.0]))
    assert_close(turned.reward, -(2.4674011002723395 + 6.241 + 0.004), 64)
    assert float(turned.state.speed) == 8.0
    assert [bool(x) for x in (swung.truncated, turned.truncated, turned.terminated)] == [False, True, False]


def test_pendulum_is_gymnasiums(gymnasium, rng, key):
    env = gymnasium.make("Pendulum-v1", disable_env_checker=True)
    begin = starts(PENDULUM, key, 250)
    # Some start at the greatest speed: they turn over and over, so that the angle is far from its first turn.
    fast = np.stack([rng.uniform(-np.pi, np.pi, size=50), rng.choice([-8, 8], size=50)], -1)
    start = np.concatenate([np.stack([begin.angle, begin.speed], -1), fast])
    known = record(env, start, lambda _: float32(rng.uniform(-3, 3, size=1)))
    assert len(known.steps) == 300 * 200
    assert known.truncated.sum() == 300

    state = PendulumState(*map(jnp.array, float32(known.states).T), jnp.array(known.steps, jnp.int32))
    ours = jax.jit(jax.vmap(PENDULUM.step))(state, jnp.array(known.actions))
    # An angle of many turns is rounded as it comes in; what is seen of it, and its way around, are rounded as much.
    far = np.abs(known.next_states[:, 0]).max() + np.pi
    np.testing.assert_array_equal(float32(known.observations), known.observations)
    assert_close(ours.state.angle, known.next_states[:, 0], 2, far)
    assert_close(ours.state.speed, known.next_states[:, 1], 8, 8 + far)
    assert_close(ours.observation, known.observations, 8, 8 + far)
    # The square of an angle up to pi moves 2 pi times as far; costs are at most pi^2 + 6.4 + 0.004 = 16.3.
    assert_close(ours.reward, known.rewards, 4, 2 * np.pi * far + 16.3)
    np.testing.assert_array_equal(ours.state.steps, known.steps + 1)
    np.testing.assert_array_equal(ours.terminated, known.terminated)
    np.testing.assert_array_equal(ours.truncated, known.truncated)


# quadrants


def test_quadrants_is_a_loop_in_numpy(key):
    play = jax.jit(jax.vmap(lambda key: rollout(QUADRANTS, key, random_action(QUADRANTS), 96)))
    points, actions, played = jax.tree.map(np.array, play(jax.random.split(key, 20)))
    same_sign = {(1, 1), (-1, -1)}
    for point, action, reward in zip(points.reshape(-1, 2), actions.ravel(), played.reward.ravel(), strict=True):
        x, y = map(int, np.sign(point))
        assert reward == (1.0 if action == ((x, y) in same_sign) else 0.0)
    # Three whole episodes; none is cut off; the point that is reached is the next one, other than at an end.
    np.testing.assert_array_equal(played.terminated, np.tile(np.arange(1, 97) % 32 == 0, (20, 1)))
    assert not played.truncated.any()
    follows = (played.observation[:, :-1] == points[:, 1:]).all(axis=-1)
    np.testing.assert_array_equal(follows, ~played.terminated[:, :-1])


@pytest.mark.parametrize(
    ("point", "right"),
    [((0.5, 0.5), 1), ((-0.5, 0.5), 0), ((-0.5, -0.5), 1), ((0.5, -0.5), 0), ((0.0, 0.5), 0), ((0.0, 0.0), 0)],
)
def test_quadrants_golden(key, point, right):
    state = QUADRANTS.reset(key)[0]._replace(point=jnp.array(point))
    assert [float(QUADRANTS.step(state, jnp.int32(action)).reward) for action in (right, 1 - right)] == [1.0, 0.0]


def test_quadrants_returns(key):
    def episode_return(choose, keys):
        play = jax.vmap(lambda key: rollout(QUADRANTS, key, choose, 32)[-1].reward.sum())
        return np.array(jax.jit(play)(keys))

    perfect_key, random_key = jax.random.split(key)
    right = episode_return(lambda _, point: jnp.int32(point[0] * point[1] > 0), jax.random.split(perfect_key, 100))
    np.testing.assert_array_equal(right, 32.0)
    # A guess is right with probability 1/2: 16 of 32, deviation sqrt(32) / 2; the mean of 400 within 5.5 of its own.
    guessed = episode_return(random_action(QUADRANTS), jax.random.split(random_key, 400))
    assert abs(guessed.mean() - 16) < 5.5 * np.sqrt(32) / 2 / 20


def test_quadrants_points_are_uniform_and_new(key):
    points, *_ = jax.vmap(lambda key: rollout(QUADRANTS, key, random_action(QUADRANTS), 32))(jax.random.split(key, 400))
    points = np.array(points)  # [400, 32, 2]
    assert_uniform(points.reshape(-1, 2), -1.0, 1.0)
    assert_uniform(np.concatenate([points[:, :-1:2], points[:, 1::2]], -1).reshape(-1, 4), -1.0, 1.0)  # and neighbours
    assert len(np.unique(points.reshape(-1, 2), axis=0)) == 400 * 32
