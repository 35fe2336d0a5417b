"""Supervised training: the loss of the targets and of nothing else, its sums, its steps; texts that share a row; parts
of a batch; one device and eight.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from small import MODELS, V, assert_consumed, random_params

from ppo_jax.examples import Texts, make_rows
from ppo_jax.models import Decoder, load_balance, run_trunk, segment_mask, segment_positions
from ppo_jax.optim import fresh_state, make_optimizer
from ppo_jax.sft import SFTStep, make_sft_step, sft_loss, token_logprobs
from ppo_jax.sharding import make_mesh, make_shardings, minibatches
from ppo_jax.types import Examples

pytestmark = pytest.mark.usefixtures("empty_caches")

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
        segments=jnp.asarray(mask, jnp.int32),
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


def make_step(mesh=(1, 1, 1), lr: float = 1e-2, accumulation: int = 1):
    """(step, how to place a state, how to place a batch)."""
    # A large eps makes the step a smooth function of the gradient, so that 1 and 8 devices can be compared.
    tx = make_optimizer(optax.constant_schedule(lr), eps=1e-3)
    abstract = jax.eval_shape(lambda: fresh_state(decoder_params(np.random.default_rng(0)), tx, jax.random.key(0)))
    shardings = make_shardings(make_mesh(*mesh), abstract)

    def state_of(params):
        state = fresh_state(jax.tree.map(jnp.array, params), tx, jax.random.key(0))
        return jax.device_put(state, shardings.state)

    step = make_sft_step(MODEL, tx, shardings, accumulation)
    return step, state_of, lambda batch: jax.device_put(batch, shardings.batch)


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
    batch = batch.replace(segments=jnp.ones((8, S), jnp.int32), target_mask=row & ~prompt)
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


def test_the_load_balance_of_experts_is_reported(rng):
    """Of the tokens that are there, before the step; in parts, their mean."""
    config = dataclasses.replace(LLAMA, num_experts=4, experts_per_token=2)
    model, batch = Decoder(config), examples(rng)
    params = random_params(rng, config)["decoder"]
    tx = make_optimizer(optax.constant_schedule(1e-2), eps=1e-3)
    shardings = make_shardings(make_mesh(), jax.eval_shape(lambda: fresh_state(params, tx, jax.random.key(0))))

    def balance(part: Examples) -> float:
        where = segment_positions(part.segments), segment_mask(part.segments)
        return float(load_balance(run_trunk(model, params, part.tokens, *where)[1], 2, part.mask))

    for parts in (1, 2):
        state = jax.device_put(fresh_state(jax.tree.map(jnp.array, params), tx, jax.random.key(0)), shardings.state)
        step = make_sft_step(model, tx, shardings, parts)
        _, metrics = step.learn(state, jax.device_put(batch, shardings.batch))
        cut = [jax.tree.map(lambda x, i=i: x[i], minibatches(batch, parts)) for i in range(parts)]
        expected = np.mean([balance(part) for part in cut])
        np.testing.assert_allclose(metrics["router/load_balance"], expected, rtol=1e-5)


# Several texts to a row


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    """A model with positions that are learned (GPT-2) or rotary (Llama); its loss with gradient, and its logprobs."""
    config = dataclasses.replace(MODELS[request.param], num_layers=2)
    model = Decoder(config)
    loss = jax.jit(jax.value_and_grad(lambda params, batch: sft_loss(params, model, batch)[0]))
    return config, model, loss, jax.jit(lambda params, batch: token_logprobs(model, params, batch))


def random_texts(rng, num: int) -> Texts:
    """Texts of 2 to 19 tokens with targets anywhere; the first of them is all target, from its first token on."""
    tokens = [rng.integers(0, V, rng.integers(2, 20)).astype(np.int32) for _ in range(num)]
    targets = [rng.random(len(ids)) < 0.6 for ids in tokens]
    targets[0][:] = True
    return Texts(tokens, targets, 0, 0)


def rows_of(texts: Texts, pack: bool, num_rows: int) -> Examples:
    """The texts in rows of S tokens, and rows of padding up to a fixed number."""
    rows = make_rows(texts, S, pad_id=0, pack=pack)
    fill = [(0, num_rows - len(rows.tokens)), (0, 0)]
    return Examples(*(jnp.asarray(np.pad(x, fill)) for x in (rows.tokens, rows.segments, rows.target_mask)))


def test_texts_that_share_a_row_have_the_loss_and_gradient_of_texts_alone(rng, family):
    config, model, loss, _ = family
    params, texts = random_params(rng, config)["decoder"], random_texts(rng, 12)
    packed, alone = rows_of(texts, True, 12), rows_of(texts, False, 12)
    assert int(packed.mask.any(axis=1).sum()) < 12  # some do share a row
    (packed_loss, packed_grads), (alone_loss, alone_grads) = loss(params, packed), loss(params, alone)
    # Sums of a hundred terms in another order, rounded by 1e-7 each.
    np.testing.assert_allclose(packed_loss, alone_loss, rtol=1e-5)
    chex.assert_trees_all_close(packed_grads, alone_grads, rtol=1e-3, atol=1e-5)
    assert optax.tree.norm(alone_grads) > 0.1

    # And against the full logits of each text in a row of its own, which know of padding and of no segments.
    logits = np.asarray(jax.jit(model.apply)({"params": params}, alone.tokens, alone.mask))
    nll = [
        -oracles.log_softmax(logits[i, t - 1])[ids[t]]
        for i, (ids, targets) in enumerate(zip(texts.tokens, texts.target_masks, strict=True))
        for t in range(1, len(ids))
        if targets[t]
    ]
    np.testing.assert_allclose(packed_loss, np.mean(nll), rtol=1e-5)


def test_a_text_is_blind_to_the_others_of_its_row(rng, family):
    config, _, _, logprobs = family
    params, batch = random_params(rng, config)["decoder"], rows_of(random_texts(rng, 12), True, 12)
    row = int(jnp.argmax(jnp.max(batch.segments, axis=1)))
    segments = np.asarray(batch.segments[row])
    assert segments.max() >= 2
    same_text = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
    before = np.asarray(logprobs(params, batch))[row]
    for segment in range(0, segments.max() + 1):  # the padding too
        (slots,) = np.nonzero(segments == segment)
        if not len(slots):
            continue
        changed = batch.tokens.at[row, slots[0]].set((batch.tokens[row, slots[0]] + 1) % V)
        after = np.asarray(logprobs(params, batch.replace(tokens=changed)))[row]
        others = same_text & (segments[1:] != segment)
        np.testing.assert_array_equal(before[others], after[others])
        if segment and len(slots) > 1:  # its own second token depends on its first
            assert before[slots[1] - 1] != after[slots[1] - 1]


# Parts of a batch


@pytest.fixture(scope="module")
def in_parts() -> tuple[SFTStep, object, object]:
    return make_step(accumulation=4)


def test_parts_of_a_batch_make_the_same_step(rng, one_device, in_parts):
    params, batch = decoder_params(rng), examples(rng)
    results = []
    for step, state_of, place in (one_device, in_parts):
        state, metrics = step.learn(state_of(params), place(batch))
        results.append(
            jax.device_get((state.params, state.opt_state, metrics, step.measure(state.params, place(batch))))
        )
    # The targets of the parts differ in number (some rows have none), so a mean of means would differ.
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)


def test_parts_of_a_batch_on_eight_devices(rng, one_device):
    params, batches = decoder_params(rng), [examples(rng) for _ in range(2)]
    results = []
    for step, state_of, place in (one_device, make_step(mesh=(2, 2, 2), accumulation=2)):
        state = state_of(params)
        for batch in batches:
            state, metrics = step.learn(state, place(batch))
        results.append(jax.device_get((state.params, metrics)))
        assert step.learn._cache_size() == 1
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


def test_a_batch_in_parts_needs_less_memory(rng):
    batch = jax.tree.map(lambda x: jnp.tile(x, (4, 1)), examples(rng))
    needs = []
    for accumulation in (1, 8):
        step, state_of, place = make_step(accumulation=accumulation)
        program = step.learn.lower(state_of(decoder_params(rng)), place(batch)).compile()
        needs.append(program.memory_analysis().temp_size_in_bytes)
    assert needs[1] < needs[0] / 3


def test_a_batch_without_a_target_changes_nothing_but_the_step(rng, in_parts):
    step, state_of, place = in_parts
    params, batch = decoder_params(rng), examples(rng)
    state, metrics = step.learn(state_of(params), place(batch.replace(target_mask=batch.target_mask & False)))
    assert (metrics["sft/loss"], metrics["optim/grad_norm"]) == (0, 0)
    chex.assert_trees_all_equal(jax.device_get(state.params), jax.device_get(params))
