"""Learning rates and Adam, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppo_jax.optim import LR_SCHEDULES, make_optimizer, make_schedule

HALF = 2**-0.5  # cos(pi / 4)


@pytest.mark.parametrize(
    ("kind", "warmup_steps", "num_steps", "expected"),
    [
        ("constant", 0, 4, [0.1, 0.1, 0.1, 0.1, 0.1]),
        # down by a quarter of the peak each step, and nothing left at step num_steps
        ("linear", 0, 4, [0.1, 0.075, 0.05, 0.025, 0.0, 0.0]),
        # (1 + cos(pi t / 4)) / 2 of the peak
        ("cosine", 0, 4, [0.1, 0.05 * (1 + HALF), 0.05, 0.05 * (1 - HALF), 0.0]),
        # a quarter of the peak more each step, the first included: no step is lost
        ("constant", 4, 9, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]),
        ("linear", 2, 6, [0.05, 0.1, 0.1, 0.075, 0.05, 0.025, 0.0]),
        ("cosine", 2, 6, [0.05, 0.1, 0.1, 0.05 * (1 + HALF), 0.05, 0.05 * (1 - HALF), 0.0]),
        # a warm-up of one step is none
        ("linear", 1, 3, [0.1, 0.1, 0.05, 0.0]),
        # a run that ends within its warm-up
        ("cosine", 4, 2, [0.025, 0.05]),
    ],
)
def test_learning_rates(kind, warmup_steps, num_steps, expected):
    schedule = make_schedule(0.1, kind, warmup_steps, num_steps)
    np.testing.assert_allclose([schedule(step) for step in range(len(expected))], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", LR_SCHEDULES)
def test_a_schedule_can_be_traced(kind):
    schedule = make_schedule(0.1, kind, 2, 6)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(4)), schedule(4), rtol=1e-6)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"^lr_schedule: got 'step', expected one of constant, linear, cosine"):
        make_schedule(0.1, "step", 0, 4)


def walk(tx, params, grads):
    """Parameters after each gradient."""
    opt_state = tx.init(params)
    for grad in grads:
        updates, opt_state = tx.update(grad, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield params


def test_two_steps_of_adam_by_hand():
    # b1 = b2 = 1/2, rate 0.1, weight decay 0.1.
    # Step 1: the gradient (3, 4) has norm 5 and is scaled down to (0.6, 0.8). Both moments, corrected for their start
    # at zero, are the gradient and its square: the direction is (1, 1). The matrix also decays by 0.1 x 2.
    #   matrix: 2 - 0.1 (1 + 0.2) = 1.88;  vector: 1 - 0.1 = 0.9
    # Step 2: the gradient (0.06, 0.08) has norm 0.1 and stays.
    #   first moment (0.3 / 2 + 0.06 / 2) / (1 - 1/4) = 0.24, second (0.18 / 2 + 0.0036 / 2) / (1 - 1/4) = 0.1224
    #   the same direction for both, 0.24 / sqrt(0.1224) = 0.6859943
    #   matrix: 1.88 - 0.1 (0.6859943 + 0.188) = 1.7926006;  vector: 0.9 - 0.06859943 = 0.8314006
    tx = make_optimizer(optax.constant_schedule(0.1), b1=0.5, b2=0.5, weight_decay=0.1, max_grad_norm=1.0)
    params = {"matrix": jnp.array([[2.0]]), "vector": jnp.array([1.0])}
    grads = [{"matrix": jnp.array([[w]]), "vector": jnp.array([b])} for w, b in ((3.0, 4.0), (0.06, 0.08))]
    first, second = walk(tx, params, grads)
    np.testing.assert_allclose([first["matrix"][0, 0], first["vector"][0]], [1.88, 0.9], rtol=1e-6)
    np.testing.assert_allclose([second["matrix"][0, 0], second["vector"][0]], [1.7926006, 0.8314006], rtol=1e-6)


def test_eps_is_added_to_the_root_of_the_second_moment():
    # direction 0.6 / (0.6 + 0.2) = 0.75
    tx = make_optimizer(optax.constant_schedule(1.0), eps=0.2)
    (params,) = walk(tx, jnp.array([1.0]), [jnp.array([0.6])])
    np.testing.assert_allclose(params, [0.25], rtol=1e-6)


def test_the_first_step_has_the_first_learning_rate_of_the_schedule():
    tx = make_optimizer(make_schedule(0.1, "constant", warmup_steps=2, num_steps=9))
    first, second = walk(tx, jnp.array([1.0]), [jnp.array([0.5])] * 2)
    np.testing.assert_allclose([first[0], second[0]], [0.95, 0.85], rtol=1e-6)
