"""From the judge's score to the reward's: scaled, clipped and priced, in this order."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from small import COLD, PAD, SIX, R, random_rollout, running

from ppo_jax.experience import shape_scores
from ppo_jax.sampling import SamplingConfig
from ppo_jax.types import Scores


def shaped(config, tokens, lengths, total, sampling, before=None, dense=None):
    """(what becomes of the scores of a whole response [B], of each token [B, R], running) of responses like this."""
    mask = np.arange(R) < np.array(lengths)[:, None]
    zeros = jnp.zeros(mask.shape)
    rollout = random_rollout(np.random.default_rng(0), [1] * len(mask), lengths, 1, R)
    rollout = rollout.replace(tokens=rollout.tokens.at[:, 1:].set(jnp.asarray(tokens)), logprobs=zeros, values=zeros)
    scores = Scores(jnp.asarray(total, jnp.float32), None if dense is None else jnp.asarray(dense, jnp.float32))
    made, after = shape_scores(rollout, scores, before or running(), config, sampling)
    return np.asarray(made.total), made.tokens if dense is None else np.asarray(made.tokens), after


def test_by_default_a_score_stays_as_it_is(rng):
    total, before = np.float32(rng.normal(size=4) * 100), running(score_mean=3)
    made, _, after = shaped(SIX, np.full((4, R), 9), (R, 1, 0, 4), total, COLD, before)
    np.testing.assert_array_equal(made, total)
    assert after == before


def test_scores_are_scaled_clipped_and_priced_in_this_order():
    # Scores 2, 4, 4, 6, 9 have mean 5 and variance (9 + 1 + 1 + 1 + 16) / 5 = 5.6: standard deviation 2.36643191.
    # Shifted and scaled: -1.26773138, -0.42257713, -0.42257713, 0.42257713, 1.69030851; clipped at 1.
    # Row 0 has 20 tokens and no EOS: less 0.5, less 0.01 x 20, less 2 (all of the overlong buffer).
    # Row 1 has an EOS as token 3 of 3: less 0.03. Row 2 has 18 tokens and no EOS: 0.5 + 0.18 + 2 x (18 - 15) / 5.
    # Row 3 has none: 0.5 (it has not ended). Row 4 has an EOS beyond its end, which does not count: 15 tokens, so 0.5
    # + 0.15 and nothing of the buffer.
    config = dataclasses.replace(
        SIX, score_scale="batch", score_shift=True, score_clip=1.0, missing_eos_penalty=0.5, length_penalty=0.01,
        overlong_buffer=5, overlong_penalty=2.0,
    )  # fmt: skip
    tokens = np.full((5, R), 9)
    tokens[1, 2] = 2
    tokens[4, 15] = 1
    made, _, after = shaped(config, tokens, (20, 3, 18, 0, 15), [2, 4, 4, 6, 9], COLD)
    expected = [-1 - 0.5 - 0.2 - 2, -0.42257713 - 0.03, -0.42257713 - 0.5 - 0.18 - 1.2, 0.42257713 - 0.5, 1 - 0.65]
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-6)
    assert after == running()


def test_the_running_scale_is_that_of_all_scores_so_far(rng):
    config = dataclasses.replace(SIX, score_scale="running", score_shift=False)
    batches, at = rng.normal(3, 2, (3, 6)), running()
    for i, batch in enumerate(batches):
        made, _, at = shaped(config, np.full((6, R), 9), (3,) * 6, batch, COLD, at)
        so_far = batches[: i + 1]
        np.testing.assert_allclose(made, batch / np.std(so_far), rtol=1e-5)
        np.testing.assert_allclose(at.score_mean, np.mean(so_far), rtol=1e-5)
    assert at.score_count == 18
    # "reference": as it was measured before the first iteration, and never again.
    config = dataclasses.replace(SIX, score_scale="reference")
    made, _, after = shaped(config, np.full((6, R), 9), (3,) * 6, batches[0], COLD, at)
    np.testing.assert_allclose(made, (batches[0] - np.mean(batches)) / np.std(batches), rtol=1e-4, atol=1e-5)
    assert after == at


def test_scores_of_tokens_share_the_scale_and_not_the_shift(rng):
    dense, total = rng.normal(size=(4, R)), rng.normal(size=4)
    config = dataclasses.replace(SIX, score_scale="batch", score_shift=True, score_clip=0.5)
    made, tokens, _ = shaped(config, np.full((4, R), 9), (R,) * 4, total, COLD, dense=dense)
    whole = total + dense.sum(1)
    np.testing.assert_allclose(made, np.clip((total - whole.mean()) / whole.std(), -0.5, 0.5), rtol=0, atol=1e-5)
    np.testing.assert_allclose(tokens, np.clip(dense / whole.std(), -0.5, 0.5), rtol=0, atol=1e-5)


def test_a_response_without_the_truncation_token_has_a_fixed_score():
    sampling = SamplingConfig(R, (), PAD, truncate_id=5, truncate_after=4)
    config = dataclasses.replace(SIX, missing_token_score=-7.0, truncate_after=4)
    tokens = np.full((5, R), 9)
    tokens[0, 6] = tokens[1, 4] = 5  # at its end, and at the earliest place
    tokens[2, 3] = 5  # too early to end anything
    tokens[3, 9] = 5  # beyond the end of the response
    made, _, _ = shaped(config, tokens, (7, 5, R, 9, R), [1, 2, 3, np.nan, 5], sampling)
    np.testing.assert_array_equal(made, [1, 2, -7, -7, -7])
    # It is a score like another one: scaled with the others, and its length is priced as well.
    config = dataclasses.replace(config, score_scale="batch", score_shift=False, length_penalty=0.1)
    scaled, _, _ = shaped(config, tokens, (7, 5, R, 9, R), [1, 2, 3, 4, 5], sampling)
    np.testing.assert_allclose(scaled, made / made.std() - 0.1 * np.array([7, 5, R, 9, R]), rtol=1e-5)


def test_the_greedy_score_shares_scale_shift_and_clip(rng):
    greedy, total = rng.normal(size=4), np.float32(rng.normal(size=4))
    config = dataclasses.replace(SIX, score_scale="batch", score_shift=True, score_clip=0.8, missing_eos_penalty=3.0)
    rollout = random_rollout(rng, [1] * 4, [R] * 4, 1, R)
    scores = Scores(jnp.asarray(total), greedy=jnp.asarray(greedy, jnp.float32))
    made, _ = shape_scores(rollout, scores, running(), config, SamplingConfig(R, (), PAD))
    scaled = np.clip((greedy - total.mean()) / total.std(), -0.8, 0.8)
    np.testing.assert_allclose(made.greedy, scaled, rtol=0, atol=1e-5)
