"""Drawing tokens and the decode loop: the right distribution, the right ends, and logprobs that a full pass confirms.

Random draws are judged by Pearson's chi-square with the bound that it exceeds once in a million tests. For k degrees of
freedom P(X > k + 2 sqrt(k x) + 2 x) <= exp(-x) (Laurent and Massart 2000, lemma 1), with x = ln(10^6) here. Cells of
fewer than 50 expected draws are merged, so that the statistic has that distribution.

Logprobs of two ways through the model differ by float32 rounding: of logits that reach about 10, chained a hundred
times, some 1e-6 each time; 1e-5 leaves room, and is what is promised.
"""

import dataclasses
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import GPT2, LLAMA, MODELS, PAD, V, full_pass, left_padded, policy_logprobs, random_params, taken

from ppo_jax.errors import InputError
from ppo_jax.models import ActorCritic
from ppo_jax.sampling import (
    SamplingConfig,
    draw,
    ends_response,
    filter_logits,
    generate,
    penalize_repetition,
    policy_logits,
)
from ppo_jax.types import Prompts

TOLERANCE = 5e-5  # half of what training may see between acting and learning (1e-4); the worst draw so far: 1.5e-5
R = 10
SIZES = (1, 5, 3, 4, 2, 5)


def chi_square_bound(freedom: int) -> float:
    x = math.log(1e6)
    return freedom + 2 * math.sqrt(freedom * x) + 2 * x


def assert_distribution(counts, probs) -> None:
    """Hold drawn counts [V] against their probabilities [V]; cells in order of size, small ones merged."""
    order = np.argsort(probs)
    cells, seen, expected = [], 0.0, 0.0
    for count, wanted in zip(counts[order], counts.sum() * probs[order], strict=True):
        seen, expected = seen + count, expected + wanted
        if expected >= 50:
            cells.append((seen, expected))
            seen, expected = 0.0, 0.0
    cells[-1] = cells[-1][0] + seen, cells[-1][1] + expected
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    assert statistic < chi_square_bound(len(cells) - 1)


def softmax(logits) -> np.ndarray:
    weights = np.exp(np.float64(logits) - np.max(logits))
    return weights / weights.sum()


def count_draws(key, logits, block: int, batches: int = 10, rows: int = 1000) -> np.ndarray:
    """How often each token comes in batches x rows draws, [V]."""
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, len(logits)))
    tokens = jax.jit(lambda keys: jax.lax.map(lambda key: draw(key, many, block), keys))(jax.random.split(key, batches))
    return np.bincount(np.ravel(tokens), minlength=len(logits))


def peaked(rng) -> np.ndarray:
    """One token has 99 % of it, in the middle; 610 others share the rest unequally."""
    weights = rng.uniform(0.5, 1.5, 611)
    weights[305] = 99 * (weights.sum() - weights[305])
    return np.log(weights)


LOGITS = {
    "fewer tokens than a block": (lambda rng: rng.normal(size=23), 64),
    "exactly a block": (lambda rng: rng.normal(size=64), 64),
    "blocks that do not fill up": (lambda rng: 2 * rng.normal(size=301), 64),
    "blocks of one token": (lambda rng: rng.normal(size=9), 1),
    "the default block": (lambda rng: rng.normal(size=611), 256),
    "a peak and a thin tail": (peaked, 64),
    "large logits": (lambda rng: 3e4 + rng.normal(size=130), 64),
    "forbidden tokens": (lambda rng: np.where(np.arange(150) % 3 == 1, -np.inf, rng.normal(size=150)), 64),
    "forbidden blocks": (lambda rng: np.where((np.arange(150) < 70) | (np.arange(150) > 140), -np.inf, 1.0), 32),
}


@pytest.mark.parametrize("name", LOGITS)
def test_draws_have_the_distribution_of_softmax(name, rng, key):
    make, block = LOGITS[name]
    logits = np.float32(make(rng))
    counts, probs = count_draws(key, logits, block), softmax(logits)
    assert counts.shape == probs.shape  # none outside the vocabulary
    assert counts[probs == 0].sum() == 0
    assert_distribution(counts, probs)


def test_the_rare_and_the_impossible_are_told_apart(key):
    # 1000 tokens share 2 % of the mass, 2e-5 each: some 200 of 10000 draws, half of them before the peak.
    logits = np.full(1001, math.log(0.02 / 1000))
    logits[500] = math.log(0.98)
    counts = count_draws(key, logits, block=128, batches=10)
    groups = np.array([counts[:500].sum(), counts[500], counts[501:].sum()])
    assert_distribution(groups, np.array([0.01, 0.98, 0.01]))


def test_rows_are_drawn_independently_from_their_own_logits(key):
    # Row b can only give tokens b and b + 20; a fair coin decides, and not the same one for all rows.
    batch = 20
    logits = np.full((batch, 40), -np.inf, np.float32)
    logits[np.arange(batch), np.arange(batch)] = logits[np.arange(batch), 20 + np.arange(batch)] = 3.0
    tokens = np.asarray(jax.vmap(lambda key: draw(key, jnp.asarray(logits), 8))(jax.random.split(key, 2000)))
    assert np.all(tokens % 20 == np.arange(batch))
    coins = tokens >= 20
    # A mean of 2000 coins has standard deviation 0.0112, a correlation of two columns 0.0224: five of them, 210 times,
    # is passed once in 8000 runs; seven once in 10^9.
    assert np.all(np.abs(coins.mean(0) - 0.5) < 7 * 0.0112)
    correlations = np.corrcoef(coins.T)[np.triu_indices(batch, 1)]
    assert np.all(np.abs(correlations) < 7 * 0.0224)


@pytest.mark.parametrize("block", [16, 256, 600])
@pytest.mark.parametrize("uniform", [0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_the_ends_of_the_uniform_interval_draw_possible_tokens(uniform, block, monkeypatch, rng, key):
    # Sums of more than 256 numbers are made in pieces, and may rise or fall by rounding where a weight is zero.
    rows, vocabulary = 4000, 600
    logits = np.where(rng.random((rows, vocabulary)) < 0.5, -np.inf, rng.normal(size=(rows, vocabulary)))
    logits[:, [0, -1]] = -np.inf
    logits[:, 550] = -80.0  # far below rounding
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, uniform, jnp.float32))
    tokens = np.asarray(draw(key, jnp.asarray(logits, jnp.float32), block))
    assert np.all((tokens >= 0) & (tokens < vocabulary))
    assert np.all(np.isfinite(logits[np.arange(rows), tokens]))


def test_a_key_decides_the_draw(key):
    logits = jnp.zeros((50, 100))
    same, other = jax.random.split(key)
    again = jax.random.clone(same)
    first = draw(same, logits)
    np.testing.assert_array_equal(first, draw(again, logits))
    assert np.any(first != draw(other, logits))


# Filters, against sets of tokens picked by sorting.


def oracle_filter(logits, top_k: int, top_p: float) -> tuple[set[int], float]:
    """(tokens that stay, how near the nucleus came to ending elsewhere); equal logits stay or go together."""
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
    if top_k:
        ranked = [token for token in ranked if logits[token] >= logits[ranked[min(top_k, len(ranked)) - 1]]]
    probs = softmax([logits[token] for token in ranked])
    reached = np.cumsum(probs)
    last = next((i for i, mass in enumerate(reached) if mass >= top_p), len(ranked) - 1)
    margin = 1.0 if top_p == 1 else float(np.min(np.abs(reached - top_p)))
    return {token for token in ranked if logits[token] >= logits[ranked[last]]}, margin


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.45, 1e-9])
@pytest.mark.parametrize("top_k", [0, 1, 5, V, V + 3])
@pytest.mark.parametrize("ties", [False, True])
def test_filters_keep_the_tokens_of_the_oracle(top_k, top_p, ties, rng):
    logits = np.float32(2 * rng.normal(size=(40, V)))
    if ties:
        logits = np.round(logits)
    logits[0, 5:] = -np.inf
    filtered = np.asarray(filter_logits(jnp.asarray(logits), top_k, top_p))
    judged = 0
    for row, kept in zip(logits, filtered, strict=True):
        expected, margin = oracle_filter(row, top_k, top_p)
        if margin > 1e-5:  # nearer, float32 may decide otherwise
            assert set(np.flatnonzero(kept > -np.inf)) == {token for token in expected if row[token] > -np.inf}
            assert all(kept[token] == row[token] for token in expected)
            judged += 1
    assert judged > 30


@pytest.mark.parametrize("min_p", [0.5, 0.01, 1.0])
def test_min_p_keeps_what_is_likely_enough(min_p, rng):
    logits = np.float32(2 * rng.normal(size=(40, V)))
    kept = np.asarray(filter_logits(jnp.asarray(logits), 7, 0.9, min_p)) > -np.inf
    before = np.asarray(filter_logits(jnp.asarray(logits), 7, 0.9)) > -np.inf
    probs = np.exp(logits.astype(np.float64))
    relative = probs / probs.max(axis=1, keepdims=True)  # the same among those that the other filters have left
    sure = np.abs(relative - min_p) > 1e-6
    np.testing.assert_array_equal(kept[sure], (before & (relative >= min_p))[sure])
    assert kept.any(axis=1).all()


def test_repetition_is_penalized_by_hand():
    """Tokens 0 and 3 are in the text (2 is padding): 2 / 2, and -1 x 2; the others stay."""
    tokens, mask = jnp.array([[2, 0, 3, 0]]), jnp.array([[False, True, True, True]])
    logits = jnp.array([[2.0, 1.0, 4.0, -1.0, -3.0]])
    assert penalize_repetition(logits, tokens, mask, 2.0).tolist() == [[1.0, 1.0, 4.0, -2.0, -3.0]]


def test_what_is_penalized_is_the_prompt_and_the_response_so_far(rng, key):
    sampling = SamplingConfig(R, (1,), PAD, temperature=0.8, repetition_penalty=1.7)
    params, prompts = random_params(rng, LLAMA), left_padded(rng, SIZES, 5)
    rollout = sampled(LLAMA, sampling)(params, prompts, key)
    assert_well_formed(rollout, prompts, sampling)
    logits, mask = np.asarray(full_pass(LLAMA, params, rollout)[0], np.float64), np.asarray(rollout.response_mask)
    for row, t in np.argwhere(mask):
        before = np.asarray(rollout.tokens[row, : 5 + t])[np.asarray(rollout.mask[row, : 5 + t])]
        penalized = logits[row, t].copy()
        for token in set(before.tolist()):
            penalized[token] = penalized[token] / 1.7 if penalized[token] > 0 else penalized[token] * 1.7
        expected = np.log(softmax(penalized / 0.8))[int(rollout.response_tokens[row, t])]
        assert abs(rollout.logprobs[row, t] - expected) < TOLERANCE


def test_a_watch_sees_every_token_and_ends_rows(rng, key):
    """Row i ends with its token number i; what is sampled until then is what would have been sampled anyway."""
    sampling = SamplingConfig(R, (), PAD)
    params, prompts = random_params(rng, LLAMA), left_padded(rng, SIZES, 5)
    seen = []

    def watch(tokens, number):
        seen.append((int(number), np.array(tokens)))
        return np.arange(len(tokens)) <= number

    act = jax.jit(partial(generate, ActorCritic(LLAMA), sampling=sampling, watch=watch))
    rollout, free = act(params, prompts, key), sampled(LLAMA, sampling)(params, prompts, key)
    num = min(len(SIZES), R)
    sizes = np.minimum(np.arange(len(SIZES)) + 1, R)
    np.testing.assert_array_equal(rollout.response_mask, np.arange(R) < sizes[:, None])
    tokens = np.where(rollout.response_mask, free.response_tokens, PAD)
    np.testing.assert_array_equal(rollout.response_tokens, tokens)
    assert [number for number, _ in seen] == list(range(num))
    np.testing.assert_array_equal(np.stack([tokens for _, tokens in seen], 1), rollout.response_tokens[:, :num])


# The policy's distribution.


def test_the_policy_is_the_model_at_its_temperature_without_early_eos(rng):
    logits = np.float32(rng.normal(size=(2, 4, 6)))
    sampling = SamplingConfig(max_new_tokens=9, eos_ids=(1, 4), pad_id=0, temperature=0.5, min_new_tokens=6)
    policy = np.asarray(policy_logits(jnp.asarray(logits), jnp.array([7, 5, 6, 0]), sampling))
    np.testing.assert_array_equal(policy[:, 0], logits[:, 0] * 2)  # position 7 is the eighth token: free
    np.testing.assert_array_equal(policy[:, 2], logits[:, 2] * 2)  # six tokens came before it
    assert np.all(policy[:, [1, 3]][..., [1, 4]] == -np.inf)
    np.testing.assert_array_equal(policy[:, [1, 3]][..., [0, 2, 3, 5]], 2 * logits[:, [1, 3]][..., [0, 2, 3, 5]])


def test_greedy_policy_has_the_models_own_probabilities(rng):
    logits = jnp.asarray(np.float32(rng.normal(size=(2, 3, 6))))
    sampling = SamplingConfig(max_new_tokens=3, eos_ids=(1,), pad_id=0, temperature=0.0)
    np.testing.assert_array_equal(policy_logits(logits, jnp.arange(3), sampling), logits)


# Whole responses of real models, against full passes over the sequences without padding and without a cache.


def sampled(config, sampling):
    return jax.jit(partial(generate, ActorCritic(config), sampling=sampling))


def assert_well_formed(rollout, prompts, sampling) -> None:
    """Prompt kept; response masked up to and with its first end; pad tokens, logprob 0 and value 0 after it."""
    width = prompts.tokens.shape[1]
    np.testing.assert_array_equal(rollout.tokens[:, :width], prompts.tokens)
    np.testing.assert_array_equal(rollout.mask[:, :width], prompts.mask)
    rows = zip(rollout.response_tokens, rollout.response_mask, rollout.logprobs, rollout.values, strict=True)
    for tokens, mask, logprobs, values in (map(np.asarray, row) for row in rows):
        cut = (tokens[mask] == sampling.truncate_id) & (np.arange(mask.sum()) >= sampling.truncate_after)
        ends = np.flatnonzero(np.isin(tokens[mask], sampling.eos_ids) | cut)
        length = ends[0] + 1 if ends.size else sampling.max_new_tokens
        np.testing.assert_array_equal(mask, np.arange(sampling.max_new_tokens) < length)
        assert np.all(tokens[length:] == sampling.pad_id)
        assert np.all(logprobs[length:] == 0)
        assert np.all(values[length:] == 0)


SAMPLINGS = {
    "plain": SamplingConfig(R, (1,), PAD),
    "cold": SamplingConfig(R, (1, 2, 3), PAD, temperature=0.7),
    "hot and long": SamplingConfig(R, tuple(range(1, 20)), PAD, temperature=1.6, min_new_tokens=4),
}


@pytest.mark.parametrize(("model", "name"), [("gpt2", "cold"), ("llama", "hot and long"), ("llama", "plain")])
def test_logprobs_and_values_are_those_of_a_full_pass(model, name, rng, key):
    config, sampling = MODELS[model], SAMPLINGS[name]
    params, prompts = random_params(rng, config), left_padded(rng, SIZES, 5)
    rollout = sampled(config, sampling)(params, prompts, key)
    assert_well_formed(rollout, prompts, sampling)
    logits, values = full_pass(config, params, rollout)
    expected, mask = taken(policy_logprobs(logits, sampling), rollout), np.asarray(rollout.response_mask)
    np.testing.assert_allclose(np.asarray(rollout.logprobs)[mask], expected[mask], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(np.asarray(rollout.values)[mask], values[mask], rtol=0, atol=TOLERANCE)
    assert mask[:, : sampling.min_new_tokens].all()  # nobody ended early


def test_filtered_logprobs_are_those_of_the_tokens_that_stay(rng, key):
    sampling = SamplingConfig(R, (1,), PAD, temperature=0.8, top_k=12, top_p=0.8)
    params, prompts = random_params(rng, LLAMA), left_padded(rng, SIZES, 5)
    rollout = sampled(LLAMA, sampling)(params, prompts, key)
    assert_well_formed(rollout, prompts, sampling)
    logprobs = policy_logprobs(full_pass(LLAMA, params, rollout)[0], sampling)
    mask, judged = np.asarray(rollout.response_mask), 0
    for row, t in np.argwhere(mask):
        token = int(rollout.response_tokens[row, t])
        stay, margin = oracle_filter(logprobs[row, t], 12, 0.8)
        if margin > 1e-5:
            assert token in stay
            expected = logprobs[row, t, token] - np.log(np.exp(logprobs[row, t, list(stay)]).sum())
            assert abs(rollout.logprobs[row, t] - expected) < TOLERANCE
            judged += 1
    assert judged > 0.9 * mask.sum()


@pytest.mark.parametrize("model", MODELS)
def test_every_greedy_token_is_the_argmax_of_a_full_pass_over_those_before_it(model, rng, key):
    config, sampling = MODELS[model], SamplingConfig(R, (1, 2), PAD, temperature=0.0, min_new_tokens=1)
    params, prompts = random_params(rng, config), left_padded(rng, SIZES, 5)
    rollout = sampled(config, sampling)(params, prompts, key)
    assert_well_formed(rollout, prompts, sampling)
    logprobs = policy_logprobs(full_pass(config, params, rollout)[0], sampling)
    mask, chosen = np.asarray(rollout.response_mask), taken(logprobs, rollout)
    # By induction these are the tokens of a loop of full passes; nearer than the tolerance, either is an argmax.
    assert np.all(chosen[mask] >= logprobs.max(-1)[mask] - TOLERANCE)
    np.testing.assert_allclose(np.asarray(rollout.logprobs)[mask], chosen[mask], rtol=0, atol=TOLERANCE)


def test_every_token_is_drawn_with_new_numbers(rng, key):
    # A script of no preferences: all tokens are uniform over the vocabulary, and independent.
    sampling = SamplingConfig(40, (), PAD)
    model = Scripted(np.full((20, 40), -1), 3)  # the one-hot of -1 is zero everywhere
    rollout = jax.jit(partial(generate, model, sampling=sampling))({}, left_padded(rng, [3] * 20, 3), key)
    tokens = np.asarray(rollout.response_tokens)
    # A position agrees with the next, and a row with the next, once in V times: 21 of 780 with deviation 4.6.
    assert np.sum(tokens[:, 1:] == tokens[:, :-1]) < 60
    assert np.sum(tokens[1:] == tokens[:-1]) < 60


def test_more_padding_on_the_left_changes_no_response(rng, key):
    params, prompts, more = random_params(rng, GPT2), left_padded(rng, SIZES, 5), left_padded(rng, (1,) * 6, 4)
    padded = Prompts(
        tokens=jnp.concatenate([more.tokens, prompts.tokens], 1),
        mask=jnp.concatenate([jnp.zeros_like(more.mask), prompts.mask], 1),
    )
    act = sampled(GPT2, SAMPLINGS["cold"])
    rollout, other = act(params, prompts, key), act(params, padded, jax.random.clone(key))
    np.testing.assert_array_equal(rollout.response_tokens, other.response_tokens)
    np.testing.assert_array_equal(rollout.response_mask, other.response_mask)
    np.testing.assert_allclose(rollout.logprobs, other.logprobs, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(rollout.values, other.values, rtol=0, atol=TOLERANCE)


def test_one_trace_serves_every_prompt_and_key_and_equal_keys_give_equal_rollouts(rng, key):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def act(params, prompts, key):
        return generate(ActorCritic(LLAMA), params, prompts, key, SAMPLINGS["cold"])

    params, prompts, other = random_params(rng, LLAMA), left_padded(rng, SIZES, 5), left_padded(rng, SIZES[::-1], 5)
    first, second = jax.random.split(key)
    rollout, repeated = act(params, prompts, first), act(params, prompts, jax.random.clone(first))
    chex.assert_trees_all_equal(rollout, repeated)
    assert np.any(act(params, prompts, second).response_tokens != rollout.response_tokens)
    act(random_params(rng, LLAMA), other, jax.random.clone(second))


def test_responses_to_one_prompt_share_its_prefill(rng, key):
    each, prompts = 3, left_padded(rng, SIZES, 5)
    params, sampling = random_params(rng, LLAMA), SAMPLINGS["cold"]

    def act(params, prompts, key):
        return generate(ActorCritic(LLAMA), params, prompts, key, sampling, responses_per_prompt=each)

    repeated = jax.tree.map(lambda x: np.repeat(x, each, axis=0), prompts)
    alone = sampled(LLAMA, sampling)(params, repeated, jax.random.clone(key))
    rollout = jax.jit(act)(params, prompts, jax.random.clone(key))
    np.testing.assert_array_equal(rollout.tokens, alone.tokens)
    np.testing.assert_array_equal(rollout.mask, alone.mask)
    np.testing.assert_allclose(rollout.logprobs, alone.logprobs, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(rollout.values, alone.values, rtol=0, atol=TOLERANCE)

    program = str(jax.make_jaxpr(act)(params, prompts, key))  # the residual stream of the prompts
    assert f"f32[{len(SIZES)},5,{LLAMA.width}]" in program
    assert f"f32[{each * len(SIZES)},5,{LLAMA.width}]" not in program


def test_more_tokens_than_positions_are_refused(rng, key):
    config = dataclasses.replace(GPT2, max_positions=14)
    params, prompts = random_params(rng, config), left_padded(rng, SIZES, 5)
    with pytest.raises(InputError, match=r"got 15 tokens .* at most the model's 14 positions"):
        jax.eval_shape(sampled(config, SAMPLINGS["plain"]), params, prompts, key)
    jax.eval_shape(sampled(config, SamplingConfig(9, (1,), PAD)), params, prompts, key)


# How responses end: a model that says what a script says.


class Scripted:
    """Stands for an `ActorCritic`: row b answers with `script[b]`, and values its t-th state 10 b + t + 1.

    It is certain of every token, reads nothing but positions, and notes each pass of its trunk.
    """

    config = dataclasses.replace(GPT2, num_layers=1)

    def __init__(self, script, prompt_size: int):
        self.script, self.prompt_size = jnp.array(script), prompt_size
        self.passes = []

    def apply(self, variables, *args, method):
        return getattr(self, method)(*args)

    def trunk(self, tokens, positions, mask, cache, slot=0):
        jax.debug.callback(lambda slot: self.passes.append(int(slot)), slot)
        rows = jnp.broadcast_to(jnp.arange(len(tokens))[:, None], tokens.shape)
        return jnp.stack([rows, positions + 1 - self.prompt_size], -1), cache

    def logits(self, hidden):
        return 1e4 * jax.nn.one_hot(self.script[hidden[..., 0], hidden[..., 1]], V)

    def value(self, hidden):
        return 10.0 * hidden[..., 0] + hidden[..., 1] + 1


def recite(script, rng, **changes):
    """(rollout, how many passes the trunk made) for a script; EOS ids are 1 and 2, the padding is 7."""
    sampling = SamplingConfig(**{"max_new_tokens": len(script[0]), "eos_ids": (1, 2), "pad_id": 7, **changes})
    prompts, model = left_padded(rng, [3] * len(script), 5), Scripted(script, 3)
    rollout = jax.jit(partial(generate, model, sampling=sampling))({"value_head": {}}, prompts, jax.random.key(0))
    jax.effects_barrier()
    assert_well_formed(rollout, prompts, sampling)
    return rollout, len(model.passes)


def test_the_loop_stops_when_the_last_response_has_ended(rng):
    rollout, passes = recite([[5, 1, 9, 9, 9, 9], [5, 6, 8, 2, 9, 9]], rng)
    np.testing.assert_array_equal(rollout.response_tokens, [[5, 1, 7, 7, 7, 7], [5, 6, 8, 2, 7, 7]])
    np.testing.assert_array_equal(rollout.response_mask, [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(rollout.values, [[1, 2, 0, 0, 0, 0], [11, 12, 13, 14, 0, 0]])
    np.testing.assert_array_equal(rollout.logprobs, np.zeros((2, 6)))
    assert passes == 4  # the prompt, and one for each of tokens 2 to 4


def test_eos_as_the_first_token_is_a_response_of_one_token(rng):
    rollout, passes = recite([[1, 5, 5], [2, 1, 5]], rng)
    np.testing.assert_array_equal(rollout.response_tokens, [[1, 7, 7], [2, 7, 7]])
    np.testing.assert_array_equal(rollout.response_mask, [[1, 0, 0], [1, 0, 0]])
    assert passes == 1  # the prompt


def test_without_eos_a_response_has_full_length(rng):
    rollout, passes = recite([[5, 7, 5, 7]], rng)  # the padding token may well be said
    np.testing.assert_array_equal(rollout.response_tokens, [[5, 7, 5, 7]])
    assert rollout.response_mask.all()
    assert passes == 4


def test_eos_as_the_last_token_and_no_eos_at_all_differ_in_nothing_but_the_token(rng):
    (ended, _), (cut, _) = recite([[5, 6, 1]], rng), recite([[5, 6, 8]], rng)
    np.testing.assert_array_equal(ended.response_tokens, [[5, 6, 1]])
    np.testing.assert_array_equal(ended.response_mask, cut.response_mask)


def test_without_eos_ids_nothing_ends(rng):
    rollout, passes = recite([[1, 2, 1]], rng, eos_ids=())
    np.testing.assert_array_equal(rollout.response_tokens, [[1, 2, 1]])
    assert passes == 3


def test_a_single_new_token_needs_no_decoding(rng):
    rollout, passes = recite([[5], [1]], rng)
    np.testing.assert_array_equal(rollout.response_tokens, [[5], [1]])
    assert passes == 1


def test_padding_that_is_also_an_eos_ends_a_response_once(rng):
    rollout, _ = recite([[5, 1, 9], [5, 6, 1]], rng, pad_id=1)
    np.testing.assert_array_equal(rollout.response_tokens, [[5, 1, 1], [5, 6, 1]])
    np.testing.assert_array_equal(rollout.response_mask, [[1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_eos_comes_before_its_time_however_likely(temperature, rng):
    rollout, _ = recite([[1, 2, 1, 2, 5]] * 4, rng, min_new_tokens=2, temperature=temperature)
    tokens = np.asarray(rollout.response_tokens)
    assert not np.isin(tokens[:, :2], (1, 2)).any()
    np.testing.assert_array_equal(tokens[:, 2:], [[1, 7, 7]] * 4)


# The truncation token.


def test_the_truncation_token_ends_a_response_from_its_place_on(rng):
    script = [[5, 9, 9, 9, 9, 9], [9, 9, 5, 9, 9, 9], [9, 5, 9, 9, 5, 9], [9, 1, 9, 5, 9, 9], [9, 9, 9, 9, 9, 9]]
    rollout, passes = recite(script, rng, truncate_id=5, truncate_after=2)
    expected = [[5, 9, 9, 9, 9, 9], [9, 9, 5, 7, 7, 7], [9, 5, 9, 9, 5, 7], [9, 1, 7, 7, 7, 7], [9, 9, 9, 9, 9, 9]]
    np.testing.assert_array_equal(rollout.response_tokens, expected)
    np.testing.assert_array_equal(rollout.response_mask.sum(1), [6, 3, 5, 2, 6])
    assert passes == 6


def test_a_batch_of_truncated_responses_is_not_decoded_on(rng):
    rollout, passes = recite([[9, 5, 9, 9, 9], [9, 9, 5, 9, 9]], rng, truncate_id=5)
    np.testing.assert_array_equal(rollout.response_mask.sum(1), [2, 3])
    assert passes == 3  # the prompt, and one for each of tokens 2 and 3


def test_min_new_tokens_holds_back_eos_and_not_the_truncation_token(rng):
    rollout, _ = recite([[1, 5, 9, 9], [1, 1, 1, 1]], rng, truncate_id=5, min_new_tokens=3)
    assert rollout.response_tokens[0, 1] == 5
    np.testing.assert_array_equal(rollout.response_mask.sum(1), [2, 4])


def test_cutting_while_sampling_is_cutting_afterwards(rng, key):
    """Same keys, same tokens; a loop over the finished responses says where they end."""
    params, prompts = random_params(rng, LLAMA), left_padded(rng, SIZES, 5)
    plain = SamplingConfig(R, (1,), PAD)
    whole = sampled(LLAMA, plain)(params, prompts, key)
    cut_id = int(np.bincount(np.asarray(whole.response_tokens)[:, 2:].ravel())[2:].argmax()) + 2  # a frequent one
    sampling = dataclasses.replace(plain, truncate_id=cut_id, truncate_after=2)
    cut = sampled(LLAMA, sampling)(params, prompts, jax.random.clone(key))
    for row, (tokens, mask) in enumerate(zip(whole.response_tokens, np.asarray(whole.response_mask), strict=True)):
        places = [t for t in range(2, int(mask.sum())) if tokens[t] == cut_id]
        length = places[0] + 1 if places else int(mask.sum())
        np.testing.assert_array_equal(cut.response_tokens[row, :length], tokens[:length])
        np.testing.assert_array_equal(cut.response_mask[row], np.arange(R) < length)
        np.testing.assert_allclose(cut.logprobs[row, :length], whole.logprobs[row, :length], rtol=0, atol=TOLERANCE)
    assert cut.response_mask.sum() < whole.response_mask.sum()


def test_ends_of_responses_are_where_a_loop_finds_them(rng):
    tokens = rng.integers(0, 9, (30, 12))
    sampling = SamplingConfig(12, (1, 2), PAD, truncate_id=4, truncate_after=5)
    found = np.asarray(ends_response(jnp.asarray(tokens), jnp.arange(12), sampling))
    for (row, t), token in np.ndenumerate(tokens):
        assert found[row, t] == (token in (1, 2) or (token == 4 and t >= 5))
    # Positions are those of the response, and not of the columns.
    later = ends_response(jnp.asarray(tokens[:, :3]), jnp.arange(5, 8), sampling)
    np.testing.assert_array_equal(later, np.isin(tokens[:, :3], (1, 2, 4)))
    without = ends_response(jnp.asarray(tokens), jnp.arange(12), dataclasses.replace(sampling, truncate_id=None))
    np.testing.assert_array_equal(without, np.isin(tokens, (1, 2)))


# A policy without a critic.


def test_without_a_value_head_the_values_are_zero_and_nothing_else_changes(rng, key):
    params, prompts = random_params(rng, LLAMA), left_padded(rng, SIZES, 5)
    act = sampled(LLAMA, SAMPLINGS["cold"])
    rollout, bare = act(params, prompts, key), act({"decoder": params["decoder"]}, prompts, jax.random.clone(key))
    assert not np.any(bare.values)
    assert np.any(rollout.values)
    chex.assert_trees_all_equal(rollout.replace(values=0), bare.replace(values=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected at least 1"),
        ({"temperature": -0.1}, r"temperature: got -0.1, expected 0 \(greedy\) or more"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"top_k": -1}, r"top_k: got -1, expected 0 \(all tokens\) or more"),
        ({"top_p": 0.0}, r"top_p: got 0.0, expected a number in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"min_p": 1.1}, r"min_p: got 1.1, expected a number in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0, expected a positive number"),
        ({"min_new_tokens": -1}, "min_new_tokens: got -1, expected from 0 to max_new_tokens"),
        ({"min_new_tokens": 5}, "min_new_tokens: got 5"),
        ({"truncate_after": -1}, "truncate_after: got -1, expected from 0 to max_new_tokens"),
        ({"truncate_after": 5}, "truncate_after: got 5"),
    ],
)
def test_sampling_config_refuses(changes, message):
    with pytest.raises(InputError, match=f"^{message}"):
        SamplingConfig(**{"max_new_tokens": 4, "eos_ids": (1,), "pad_id": 0, **changes})
