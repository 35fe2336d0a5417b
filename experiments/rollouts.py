"""Rollouts between the device and the host: their prompts, their texts, what judges say of them."""

import jax
import numpy as np

from experiments.ppo_setup import Setup
from ppo_jax.data import PromptSet
from ppo_jax.rewards import HostReward, call_reward
from ppo_jax.tokenizers import decode_responses
from ppo_jax.types import Prompts, Rollout, Scores


def batch_of(setup: Setup, prompts: PromptSet, rows: np.ndarray) -> Prompts:
    """The prompts of these rows, on their devices."""
    return jax.device_put(Prompts(prompts.tokens[rows], prompts.mask[rows]), setup.shardings.batch)


def texts_of(setup: Setup, rollout: Rollout) -> list[str]:
    """Responses as text."""
    tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
    return decode_responses(setup.tokenizer, tokens, mask, setup.sampling.max_new_tokens)


def judge(
    setup: Setup, prompts: PromptSet, rows: np.ndarray, rollout: Rollout, greedy: Rollout | None = None
) -> Scores:
    """What the judges say of a rollout, on its devices.

    Args:
        setup: of the run.
        prompts: where `rows` lie.
        rows: the prompts, each once.
        rollout: `responses_per_prompt` responses to each.
        greedy: the likeliest response to each, where the method asks for its score.
    """
    each = setup.settings.ppo.responses_per_prompt
    scores = _judge(setup, prompts, np.repeat(rows, each), rollout)
    if greedy is not None:
        best = np.asarray(_judge(setup, prompts, rows, greedy).whole)
        scores = scores.replace(greedy=np.repeat(best, each))
    return jax.device_put(scores, setup.shardings.batch)


def _judge(setup: Setup, prompts: PromptSet, rows: np.ndarray, rollout: Rollout) -> Scores:
    if setup.step.score:
        return setup.step.score(setup.judges.params, rollout)
    texts, columns = [prompts.texts[i] for i in rows], [prompts.columns[i] for i in rows]
    return setup.judges.judge(texts, texts_of(setup, rollout), columns, rollout)


def judge_on_host(reward: HostReward, prompts: PromptSet, rows: np.ndarray, responses: list[str]) -> np.ndarray:
    """Scores `[B]` of responses to these prompts by one host reward."""
    texts, columns = [prompts.texts[i] for i in rows], [prompts.columns[i] for i in rows]
    return call_reward(reward, texts, responses, columns)
