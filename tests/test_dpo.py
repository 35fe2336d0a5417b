"""Direct preference learning: the completions' log-probabilities and each loss against loops, what is learned from
planted preferences, parts of a batch, one device and eight; pairs, labels and mismatched completions.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from ppo_jax.comparisons import JudgedSet
from ppo_jax.dpo import (
    LOSSES,
    DPOConfig,
    Preferences,
    PreferenceSet,
    completion_logprobs,
    labelled,
    make_dpo_step,
    mismatch,
    pairs_of,
    preference_loss,
    reference_point,
)
from ppo_jax.errors import InputError
from ppo_jax.models import Decoder, ModelConfig
from ppo_jax.optim import fresh_state, make_optimizer
from ppo_jax.preferences import Judged
from ppo_jax.sharding import make_mesh, make_shardings
from ppo_jax.types import Examples

pytestmark = pytest.mark.usefixtures("empty_caches")

B, S, V = 8, 40, 37  # more than a chunk of 32 logits
CONFIG = ModelConfig(
    vocab_size=V, num_layers=1, num_heads=4, num_kv_heads=2, width=16, mlp_width=24, max_positions=S, rope_theta=100.0
)
MODEL = Decoder(CONFIG)
GOOD = 20  # tokens from here on are what the planted preference likes
BETA = 0.3
CONFIGS = {
    "dpo": DPOConfig("dpo", BETA, label_smoothing=0.1),
    "ipo": DPOConfig("ipo", BETA),
    "kto": DPOConfig("kto", BETA, desirable_weight=1.5, undesirable_weight=0.5),
}


def random_params(rng, scale: float = 0.4):
    """Parameters of the decoder, every one random and, at this scale, large enough to matter; norms around one."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), tokens, jnp.ones((1, 2), bool))["params"]

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape)
        return jnp.asarray(1 + 0.3 * drawn if "scale" in str(path[-1]) else scale * drawn, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_texts(rng, shape: tuple[int, ...], length: int = S) -> Examples:
    """Prompts, some of them empty, with completions of one token and more; the padding on the right is garbage."""
    sizes = rng.integers(2, length + 1, shape)
    sizes[0], prompts = length, rng.integers(0, sizes)
    slots = np.arange(length)
    mask = slots < sizes[..., None]
    return Examples(
        tokens=rng.integers(0, V, (*shape, length)).astype(np.int32),
        segments=mask.astype(np.int32),
        target_mask=mask & (slots >= prompts[..., None]),
    )


def random_batch(rng, loss: str) -> Preferences:
    if loss != "kto":
        return Preferences(random_texts(rng, (B, 2)))
    texts = random_texts(rng, (B, 1))
    desirable = rng.permutation(np.arange(B) < 3)
    return Preferences(texts, desirable, random_texts(rng, (B,)))


def planted(rng, loss: str, num: int = 64) -> Preferences:
    """Completions of good tokens, which are preferred, and of others, to the same random prompts; as the data of a run
    makes them.
    """
    length, start = 8, 3
    prompts = np.repeat(rng.integers(0, V, (num, 1, start)), 2, axis=1)
    liked = rng.integers(GOOD, V, (num, 1, length - start))
    disliked = rng.integers(0, GOOD, (num, 1, length - start))
    tokens = np.concatenate([prompts, np.concatenate([liked, disliked], axis=1)], axis=2).astype(np.int32)
    ones = np.ones(tokens.shape, bool)
    texts = Examples(tokens, ones.astype(np.int32), ones & (np.arange(length) >= start))
    if loss != "kto":
        return Preferences(texts)
    flat = jax.tree.map(lambda x: x.reshape(-1, length), texts)
    data = PreferenceSet(flat, np.repeat(np.arange(num), 2), np.arange(2 * num)[:, None], np.arange(2 * num) % 2 == 0)
    return data.batch(rng.permutation(2 * num))


@jax.jit
def logits_of(params, tokens, mask):
    return MODEL.apply({"params": params}, tokens, mask)


def oracle_logprobs(params, texts: Examples) -> np.ndarray:
    """Of each completion the log-probabilities of its tokens, one after the other: a list in an array of objects."""
    flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, x.shape[-1]), texts)
    logits = np.asarray(logits_of(params, flat.tokens, flat.segments > 0))
    found = np.empty(len(flat.tokens), object)
    for row, tokens in enumerate(flat.tokens):
        counted = [t for t in range(1, len(tokens)) if flat.target_mask[row, t]]
        found[row] = [oracles.log_softmax(logits[row, t - 1])[tokens[t]] for t in counted]
    return found.reshape(texts.tokens.shape[:-1])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def oracle_loss(loss: str, params, ref_params, batch: Preferences) -> float:
    """From the papers, completion by completion."""
    config = CONFIGS[loss]
    ours, theirs = (oracle_logprobs(p, batch.texts) for p in (params, ref_params))
    ratio = [[sum(a) - sum(b) for a, b in zip(x, y, strict=True)] for x, y in zip(ours, theirs, strict=True)]
    if loss == "dpo":
        odds = [config.beta * (chosen - rejected) for chosen, rejected in ratio]
        return oracles.mean([-0.9 * math.log(sigmoid(d)) - 0.1 * math.log(sigmoid(-d)) for d in odds])
    if loss == "ipo":
        means = [
            [x / max(1, len(tokens)) for x, tokens in zip(*row, strict=True)] for row in zip(ratio, ours, strict=True)
        ]
        return oracles.mean([(chosen - rejected - 1 / (2 * config.beta)) ** 2 for chosen, rejected in means])
    ours, theirs = (oracle_logprobs(p, batch.mismatched) for p in (params, ref_params))
    point = max(0.0, oracles.mean([sum(a) - sum(b) for a, b in zip(ours, theirs, strict=True)]))
    losses = [
        1.5 * (1 - sigmoid(config.beta * (r - point))) if good else 0.5 * (1 - sigmoid(config.beta * (point - r)))
        for (r,), good in zip(ratio, batch.desirable, strict=True)
    ]
    return oracles.mean(losses)


def make_step(loss: str, mesh=(1, 1, 1), lr: float = 1e-2, accumulation: int = 1, **changes):
    """(step, how to place a state, how to place a reference, how to place a batch)."""
    # A large eps makes the step a smooth function of the gradient, so that 1 and 8 devices can be compared.
    tx = make_optimizer(optax.constant_schedule(lr), eps=1e-3)
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: fresh_state(random_params(rng), tx, jax.random.key(0)))
    shardings = make_shardings(make_mesh(*mesh), abstract)

    def state_of(params):
        state = fresh_state(jax.tree.map(jnp.array, params), tx, jax.random.key(0))
        return jax.device_put(state, shardings.state)

    def reference(params):
        return jax.device_put(jax.tree.map(jnp.array, params), shardings.ref_params)

    config = dataclasses.replace(CONFIGS[loss], **changes)
    step = make_dpo_step(MODEL, tx, shardings, config, accumulation)
    return step, state_of, reference, lambda batch: jax.device_put(batch, shardings.batch)


@pytest.fixture(scope="module")
def steps():
    """The step of each loss on one device."""
    return {loss: make_step(loss) for loss in LOSSES}


# Log-probabilities and losses


def test_completions_are_summed_token_by_token(rng):
    params, texts = random_params(rng), random_texts(rng, (4, 3))
    expected = oracle_logprobs(params, texts)
    sums, means = (completion_logprobs(MODEL, params, texts, per_token) for per_token in (False, True))
    np.testing.assert_allclose(sums, np.vectorize(sum, otypes=[float])(expected), rtol=1e-5, atol=1e-4)
    lengths = np.vectorize(len, otypes=[int])(expected)
    np.testing.assert_allclose(means, sums / np.maximum(lengths, 1), rtol=1e-5)
    assert len(np.unique(lengths)) > 2


def test_prompt_padding_and_neighbours_count_by_context_only(rng):
    """What stands behind a completion changes nothing; what stands before it does, without being counted."""
    params, texts = random_params(rng), random_texts(rng, (6,))
    sums = completion_logprobs(MODEL, params, texts)
    garbage = rng.integers(0, V, texts.tokens.shape).astype(np.int32)
    padded = texts.replace(tokens=np.where(texts.segments > 0, texts.tokens, garbage))
    np.testing.assert_array_equal(sums, completion_logprobs(MODEL, params, padded))
    has_prompt = ~texts.target_mask[:, 0]
    other = texts.replace(tokens=np.where(texts.target_mask, texts.tokens, garbage))
    moved = np.abs(np.asarray(sums - completion_logprobs(MODEL, params, other)))
    assert np.all(moved[~has_prompt] == 0)
    if has_prompt.any():
        assert moved[has_prompt].max() > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_costs_what_the_papers_say(rng, steps, loss):
    step, state_of, reference, place = steps[loss]
    params, ref_params, batch = random_params(rng, 0.2), random_params(rng, 0.2), random_batch(rng, loss)
    _, metrics = step.learn(state_of(params), reference(ref_params), place(batch))
    expected = oracle_loss(loss, params, ref_params, batch)
    np.testing.assert_allclose(metrics["preference/loss"], expected, rtol=1e-4, atol=1e-5)
    names = {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward"} | set(["reference_kl"] * (loss == "kto"))
    assert metrics.keys() == {f"preference/{name}" for name in names} | {"optim/grad_norm"}
    # What the held-out numbers are made of.
    kl, labels = None, None
    texts = [step.logprobs(reference(p), place(batch.texts)) for p in (params, ref_params)]
    if loss == "kto":
        kl = reference_point(*(step.logprobs(reference(p), place(batch.mismatched)) for p in (params, ref_params)))
        labels = jnp.asarray(batch.desirable)
    again, parts = preference_loss(*texts, labels, kl, CONFIGS[loss])
    np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-5)
    for name, x in parts.items():
        np.testing.assert_allclose(x, metrics[f"preference/{name}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("dpo", math.log(2)),  # -log sigmoid(0), whatever the smoothing
        ("ipo", (1 / (2 * BETA)) ** 2),
        ("kto", (3 * 1.5 + 5 * 0.5) / 8 / 2),  # 1 - sigmoid(0) = 1/2 of each, 3 of 8 desirable
    ],
)
def test_where_the_policy_is_its_reference_nothing_is_told_apart(rng, steps, loss, expected):
    step, state_of, reference, place = steps[loss]
    params = random_params(rng)
    _, metrics = step.learn(state_of(params), reference(params), place(random_batch(rng, loss)))
    assert float(metrics["preference/loss"]) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["preference/accuracy"]) == 0.5
    assert float(metrics["preference/margin"]) == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_the_slope_of_the_loss(rng, steps, loss):
    """KTO's reference point is held fixed, as the paper holds it: no gradient goes through it."""
    ref_params, batch, config = random_params(rng, 0.2), random_batch(rng, loss), CONFIGS[loss]
    params = random_params(rng, 0.2)
    per_token = loss == "ipo"

    def read(params, texts):
        return completion_logprobs(MODEL, params, texts, per_token)

    ref_logprobs, kl, labels = read(ref_params, batch.texts), None, None
    if loss == "kto":
        kl = reference_point(read(params, batch.mismatched), read(ref_params, batch.mismatched))
        labels = jnp.asarray(batch.desirable)

    @jax.jit
    def loss_of(params):
        return preference_loss(read(params, batch.texts), ref_logprobs, labels, kl, config)[0]

    flat, unravel = jax.flatten_util.ravel_pytree(params)
    gradient = np.asarray(jax.flatten_util.ravel_pytree(jax.grad(loss_of)(params))[0], np.float64)

    def central(step):
        ends = (flat + jnp.asarray(sign * step * gradient / np.linalg.norm(gradient), jnp.float32) for sign in (1, -1))
        up, down = (float(loss_of(unravel(end))) for end in ends)
        return (up - down) / (2 * step)

    slope = (4 * central(2e-3) - central(4e-3)) / 3
    assert slope == pytest.approx(np.linalg.norm(gradient), rel=2e-2, abs=1e-2)
    # And it is the gradient of the step.
    step, state_of, reference, place = steps[loss]
    _, metrics = step.learn(state_of(params), reference(ref_params), place(batch))
    np.testing.assert_allclose(metrics["optim/grad_norm"], np.linalg.norm(gradient), rtol=1e-3)


# Steps


@pytest.mark.parametrize("loss", LOSSES)
def test_a_planted_preference_is_learned(rng, steps, loss):
    """From texts never seen twice, and measured on others: the margin of the chosen rises."""
    step, state_of, reference, place = steps[loss]
    params = random_params(rng, 0.1)
    state, ref_params, heldout = state_of(params), reference(params), place(planted(rng, loss))
    before = step.learn(state_of(params), ref_params, heldout)[1]
    assert float(before["preference/margin"]) == 0.0
    taught = []
    for _ in range(40):
        state, metrics = step.learn(state, ref_params, place(planted(rng, loss)))
        taught.append(float(metrics["preference/loss"]))
    after = step.learn(state, ref_params, heldout)[1]
    assert taught[-1] < taught[0]
    assert float(after["preference/loss"]) < float(before["preference/loss"])
    assert float(after["preference/margin"]) > (0.2 if loss == "ipo" else 1.0)
    assert float(after["preference/accuracy"]) > 0.9


def test_the_state_is_consumed_and_the_reference_is_not(rng, steps):
    step, state_of, reference, place = steps["dpo"]
    params = random_params(rng)
    state, ref_params = state_of(params), reference(params)
    after, _ = step.learn(state, ref_params, place(random_batch(rng, "dpo")))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    chex.assert_trees_all_equal(ref_params, params)
    assert int(after.step) == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_of_a_batch_and_eight_devices_take_the_same_step(rng, steps, loss):
    """KTO's reference point is that of the whole batch, and a part may hold nothing desirable."""
    params, ref_params, batch = random_params(rng, 0.2), random_params(rng, 0.2), random_batch(rng, loss)

    def taken(made):
        step, state_of, reference, place = made
        state, metrics = step.learn(state_of(params), reference(ref_params), place(batch))
        return jax.device_get((state.params, metrics))

    whole = taken(steps[loss])
    chex.assert_trees_all_close(taken(make_step(loss, mesh=(2, 2, 2))), whole, rtol=2e-4, atol=2e-5)
    chex.assert_trees_all_close(taken(make_step(loss, accumulation=4)), whole, rtol=2e-4, atol=2e-5)


def test_batches_of_one_shape_compile_once(rng):
    step, state_of, reference, place = make_step("kto")
    state, ref_params = state_of(random_params(rng)), reference(random_params(rng))
    for _ in range(3):
        state, _ = step.learn(state, ref_params, place(random_batch(rng, "kto")))
    assert step.learn._cache_size() == 1


# The data


def judged_set(ranks, scores=None, prompts=None, length: int = 6) -> JudgedSet:
    """Text number t (from 10 on) is a prompt token 1, then t and EOS 2; shorter than `length`."""
    ranks = np.array(ranks, np.int32)
    num, most = ranks.shape
    present = ranks > 0 if scores is None else np.ones_like(ranks, bool)
    tokens = np.zeros((num, most, length), np.int32)
    tokens[..., 0], tokens[..., 1], tokens[..., 2] = 1, 10 + np.arange(num * most).reshape(num, most), 2
    mask = present[..., None] & (np.arange(length) < 3)
    prompts = prompts or [f"prompt {i}" for i in range(num)]
    judged = tuple(Judged(prompt, ("a",), None, 0.0) for prompt in prompts)
    return JudgedSet(
        tokens, mask, ranks, np.zeros(num, np.float32), np.zeros(num, np.float32) if scores is None else scores,
        np.where(present, 1, 0), judged, num_long=0, num_tied=0,
    )  # fmt: skip


def test_every_ordered_pair_of_a_comparison_is_a_pair():
    data = pairs_of(judged_set([[1, 2, 0], [2, 1, 2], [3, 1, 2]]))
    batch = data.batch(np.arange(len(data)))
    found = [tuple(pair) for pair in batch.texts.tokens[:, :, 1]]
    # Texts 10 and 11 (12 is none); 14 before 13 and 15; 17 before 18 before 16.
    assert sorted(found) == [(10, 11), (14, 13), (14, 15), (17, 16), (17, 18), (18, 16)]
    assert (batch.desirable, batch.mismatched) == (None, None)
    np.testing.assert_array_equal(batch.texts.target_mask[0, 0], [False, True, True, False, False, False])
    np.testing.assert_array_equal(batch.texts.segments[0, 0], [1, 1, 1, 0, 0, 0])


def test_the_best_are_desirable_the_last_are_not_and_those_between_say_nothing():
    data = labelled(judged_set([[1, 2, 0], [2, 1, 2], [3, 1, 2]]))
    batch = data.batch(np.arange(len(data)))
    found = dict(zip(batch.texts.tokens[:, 0, 1].tolist(), batch.desirable.tolist(), strict=True))
    assert found == {10: True, 11: False, 13: False, 14: True, 15: False, 16: False, 17: True}
    assert batch.texts.tokens.shape == (7, 1, 6)
    # To other prompts: each prompt is the token 1, so these are the completions of others.
    partners = dict(zip(found, batch.mismatched.tokens[:, 1].tolist(), strict=True))
    assert partners == {10: 13, 11: 13, 13: 16, 14: 16, 15: 16, 16: 10, 17: 10}


def test_a_score_above_the_threshold_is_desirable():
    data = labelled(judged_set([[0]] * 4, np.array([0.5, 1.0, 1.5, -2.0], np.float32)), threshold=1.0)
    np.testing.assert_array_equal(data.desirable, [False, False, True, False])
    assert len(data) == 4


def test_a_mismatched_text_is_a_prompt_with_the_completion_of_another(rng):
    texts, prompts = random_texts(rng, (12,), 9), rng.integers(0, 3, 12)
    prompts[:2] = 0, 1
    found = mismatch(texts, prompts)
    assert found.tokens.shape == (12, 9)
    for i in range(12):
        j = next(j % 12 for j in range(i + 1, i + 13) if prompts[j % 12] != prompts[i])
        prompt = [t for t, real, target in zip(*rows_of(texts, i), strict=True) if real and not target]
        completion = [t for t, _, target in zip(*rows_of(texts, j), strict=True) if target]
        tokens, real, targets = rows_of(found, i)
        expected = (prompt + completion)[:9]  # cut where it is too long
        assert tokens[: len(expected)].tolist() == expected
        assert real.tolist() == [1] * len(expected) + [0] * (9 - len(expected))
        is_target = [len(prompt) <= t < len(expected) for t in range(9)]
        assert targets.tolist() == is_target


def rows_of(texts: Examples, i: int):
    return texts.tokens[i], texts.segments[i], texts.target_mask[i]


def test_where_all_answer_one_prompt_the_next_completion_is_taken(rng):
    texts = random_texts(rng, (5,))
    found = mismatch(texts, np.zeros(5, int))
    last = [t for t, _, target in zip(*rows_of(texts, 0), strict=True) if target]
    begin = int(np.argmax(texts.target_mask[4]))
    assert found.tokens[4, begin : begin + len(last)].tolist() == last[: S - begin]


# Settings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss": "ppo"}, "loss: got 'ppo', expected one of dpo, ipo, kto"),
        ({"beta": 0.0}, r"beta: got 0.0, expected a number above 0"),
        ({"beta": float("nan")}, "beta: got nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing: got 0.5, expected a number in \[0, 0.5\)"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing: got 0.1, expected 0 with loss=ipo"),
        ({"loss": "kto", "desirable_weight": 0.0}, "desirable_weight: got 0.0, expected a number above 0"),
        ({"undesirable_weight": 2.0}, "undesirable_weight: got 2.0, expected 1 with loss=dpo"),
    ],
)
def test_what_cannot_be_is_refused(changes, told):
    with pytest.raises(InputError, match=told):
        DPOConfig(**changes)


@pytest.mark.parametrize(
    ("loss", "changes"),
    [("dpo", {"label_smoothing": 0.0}), ("kto", {"desirable_weight": 1.0}), ("kto", {"undesirable_weight": 1.0})]
    + [(loss, {"beta": 0.05}) for loss in LOSSES],
)
def test_every_setting_changes_the_step(rng, steps, loss, changes):
    params, ref_params, batch = random_params(rng, 0.2), random_params(rng, 0.2), random_batch(rng, loss)
    losses = []
    for made in (steps[loss], make_step(loss, **changes)):
        step, state_of, reference, place = made
        losses.append(float(step.learn(state_of(params), reference(ref_params), place(batch))[1]["preference/loss"]))
    assert abs(losses[0] - losses[1]) > 1e-4
