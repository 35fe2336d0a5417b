"""Supervised training: the loss of the targets and of nothing else, its sums, its steps, on one device and on eight."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from small import MODELS, V, assert_consumed, random_params

from ppo_jax.models import Decoder
from ppo_jax.optim import make_optimizer
from ppo_jax.sft import SFTStep, init_sft_state, make_sft_step, sft_loss
from ppo_jax.sharding import make_mesh, make_shardings
from ppo_jax.types import Examples

S = 40  # more than a chunk of 32 logits
LLAMA = dataclasses.replace(MODELS["llama"], num_layers=1)
MODEL = Decoder(LLAMA)


def examples(rng, batch: int = 8) -> Examples:
    """Prompts with completions of random sizes; the padding on the right is garbage. The last row has no target."""
    sizes = rng.integers(2, S + 1, batch)
    sizes[0] = S
    prompts = np.array([rng.integers(0, size) for size in sizes])
    prompts[:2], prompts[-1] = 0, sizes[-1]
    slots = np.arange(S)
    mask = slots < sizes[:, None]
    return Examples(
        tokens=jnp.asarray(rng.integers(0, V, (batch, S)), jnp.int32),
        mask=jnp.asarray(mask),
        target_mask=jnp.asarray(mask & (slots >= prompts[:, None])),
    )


def oracle_nll(params, batch: Examples) -> list[float]:
    """Negative log-likelihood of every target token that has one before it."""
    logits = np.asarray(jax.jit(MODEL.apply)({"params": params}, batch.tokens, batch.mask))
    losses = []
    for row, t in np.argwhere(np.asarray(batch.target_mask)):
        if t > 0:
            losses.append(-oracles.log_softmax(logits[row, t - 1])[int(batch.tokens[row, t])])
    return losses


def decoder_params(rng):
    return random_params(rng, LLAMA)["decoder"]


def make_step(mesh=(1, 1, 1), lr: float = 1e-2):
    """(step, how to place a state, how to place a batch)."""
    # A large eps makes the step a smooth function of the gradient, so that 1 and 8 devices can be compared.
    tx = make_optimizer(optax.constant_schedule(lr), eps=1e-3)
    abstract = jax.eval_shape(lambda: init_sft_state(decoder_params(np.random.default_rng(0)), tx, jax.random.key(0)))
    shardings = make_shardings(make_mesh(*mesh), abstract)

    def state_of(params):
        state = init_sft_state(jax.tree.map(jnp.array, params), tx, jax.random.key(0))
        return jax.device_put(state, shardings.state)

    return make_sft_step(MODEL, tx, shardings), state_of, lambda batch: jax.device_put(batch, shardings.batch)


@pytest.fixture(scope="module")
def one_device() -> tuple[SFTStep, object, object]:
    return make_step()


@pytest.fixture(scope="module")
def loss():
    return jax.jit(lambda params, batch: sft_loss(params, MODEL, batch))


def test_loss_is_the_mean_over_the_targets_from_full_logits(rng, loss):
    params, batch = decoder_params(rng), examples(rng)
    value, metrics = loss(params, batch)
    expected = oracles.mean(oracle_nll(params, batch))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(expected), rtol=1e-4)


def test_prompts_are_read_and_not_predicted(rng, loss):
    params, batch = decoder_params(rng), examples(rng)
    # Row 2 alone: a prompt of ten tokens, of which the last but one is exchanged, and a completion.
    slots = jnp.arange(S)
    prompt = jnp.broadcast_to(slots < 10, (8, S))
    row = jnp.broadcast_to((jnp.arange(8) == 2)[:, None], (8, S))
    batch = batch.replace(mask=jnp.ones((8, S), bool), target_mask=row & ~prompt)
    changed = batch.replace(tokens=batch.tokens.at[2, 8].set((batch.tokens[2, 8] + 1) % V))
    assert loss(params, batch)[0] != loss(params, changed)[0]  # it is read

    # Asked for the loss of the prompt as well, the same model gives another number.
    assert loss(params, batch)[0] != loss(params, batch.replace(target_mask=row))[0]

    # What comes after the last target, and other rows, change nothing.
    batch = batch.replace(target_mask=batch.target_mask & (slots < 20)[None])
    garbage = jnp.asarray(rng.integers(0, V, (8, S)), jnp.int32)
    other = batch.replace(tokens=jnp.where(row & (slots < 20)[None], batch.tokens, garbage))
    np.testing.assert_array_equal(loss(params, batch)[0], loss(params, other)[0])


def test_the_first_token_of_a_text_is_no_target(rng, loss):
    params, batch = decoder_params(rng), examples(rng)
    without = batch.replace(target_mask=batch.target_mask.at[:, 0].set(False))
    chex.assert_trees_all_equal(loss(params, batch), loss(params, without))


def test_measure_gives_sums_that_add_up(rng, one_device):
    step, state_of, place = one_device
    params, batches = state_of(decoder_params(rng)).params, [examples(rng), examples(rng)]
    totals = [step.measure(params, place(batch)) for batch in batches]
    losses = [oracle_nll(params, batch) for batch in batches]
    for (nll, count), expected in zip(totals, losses, strict=True):
        assert count == len(expected)
        np.testing.assert_allclose(nll, sum(expected), rtol=1e-5)


def test_measure_of_nothing_is_nothing(rng, one_device):
    step, state_of, place = one_device
    params, batch = state_of(decoder_params(rng)).params, examples(rng)
    nll, count = step.measure(params, place(batch.replace(target_mask=batch.mask & False)))
    assert (nll, count) == (0, 0)


def test_a_few_steps_learn_a_batch_by_heart(rng, one_device, loss):
    step, state_of, place = one_device
    params, batch = decoder_params(rng), examples(rng)
    state, losses = state_of(params), []
    value, grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    for _ in range(12):
        before = state
        state, metrics = step.learn(state, place(batch))
        assert_consumed(before)
        losses.append(float(metrics["sft/loss"]))
    np.testing.assert_allclose(losses[0], value[0], rtol=1e-6)
    assert losses[-1] < losses[0] - 0.3
    assert losses == sorted(losses, reverse=True)
    assert metrics.keys() == {"sft/loss", "sft/perplexity", "optim/grad_norm"}
    assert state.step == 12
    assert optax.tree.norm(grads) > 0
    assert step.learn._cache_size() == 1


def test_eight_devices_take_the_same_steps_as_one(rng, one_device):
    params, batches = decoder_params(rng), [examples(rng) for _ in range(2)]
    results = []
    for step, state_of, place in (one_device, make_step(mesh=(2, 2, 2))):
        state, history = state_of(params), []
        for batch in batches:
            state, metrics = step.learn(state, place(batch))
            history.append(metrics)
        results.append(jax.device_get((state.params, history, step.measure(state.params, place(batches[0])))))
    # Sums in another order, rounded by 1e-7; Adam divides by at least 1e-3 and multiplies by the rate of 1e-2.
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)
