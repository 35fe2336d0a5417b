"""A reward model as a judge: inside the compiled iteration where it shares the policy's tokenizer, on text where it
has one of its own.

Both read the same thing: the score of prompt, response and EOS. A response that was cut by its length limit gets its
EOS here, as every text did in the model's training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import hub
from ppo_jax.data import pad
from ppo_jax.models import ModelConfig, RewardModel
from ppo_jax.rewards.host import HostReward
from ppo_jax.sharding import by_minibatch
from ppo_jax.tokenizers import SpecialTokens, encode_text, load_tokenizer, special_tokens
from ppo_jax.types import Params, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LENGTH_STEP = 32  # texts are padded to a multiple of this, so that few programs are compiled
_ROWS = 32  # texts in one pass, on each device; more where their number cannot be divided so


def make_model_score(config: ModelConfig, special: SpecialTokens) -> Callable[[Params, Rollout], jax.Array]:
    """The score of rollouts by a reward model with the policy's tokenizer.

    Args:
        config: of the reward model.
        special: the reward model's pad; the EOS that it knows, then others of the policy that are no part of a text.

    Returns:
        `score(params, rollout) -> [B]` float32.
    """
    model = RewardModel(config)

    def score(params: Params, rollout: Rollout) -> jax.Array:
        def of(part: Rollout) -> jax.Array:
            return model.apply({"params": params}, *with_eos(part, special), special.pad_id)

        rows, devices = len(rollout.tokens), jax.device_count()
        most = -(-rows // (_ROWS * devices))
        even = (num for num in range(1, most + 1) if rows % (num * devices) == 0)
        return by_minibatch(of, rollout, max(even, default=1))

    return score


def with_eos(rollout: Rollout, special: SpecialTokens) -> tuple[jax.Array, jax.Array]:
    """Tokens and mask `[B, S + 1]` of a rollout in which each response ends with the first of the EOS ids: put after a
    response that was cut, and in the place of another EOS.
    """
    slots = jnp.arange(rollout.tokens.shape[1] + 1)
    tokens = jnp.pad(rollout.tokens, ((0, 0), (0, 1)), constant_values=special.pad_id)
    mask = jnp.pad(rollout.mask, ((0, 0), (0, 1)))
    prompt_length = rollout.tokens.shape[1] - rollout.logprobs.shape[1]
    end = prompt_length + jnp.sum(rollout.response_mask, axis=1)  # the slot after the last response token
    last = jnp.take_along_axis(tokens, end[:, None] - 1, axis=1)
    is_eos = jnp.any(last == jnp.array(special.eos_ids, jnp.int32)[None, :], axis=1)
    ends = slots[None, :] == (end - is_eos)[:, None]
    return jnp.where(ends, special.eos_ids[0], tokens), mask | ends


def load_scorer(folder: Path) -> tuple[ModelConfig, Params, PreTrainedTokenizerBase, SpecialTokens]:
    """A reward model's folder: configuration, parameters, tokenizer, and pad and EOS as the folder means them.

    Raises:
        InputError: it cannot be used.
    """
    config, params = hub.load_reward_model(folder)
    tokenizer = load_tokenizer(folder)
    special = special_tokens(tokenizer, hub.load_eos_ids(folder))
    pad_id = hub.load_pad_id(folder)
    if pad_id is not None:
        special = SpecialTokens(pad_id, special.eos_ids)
    return config, params, tokenizer, special


def make_text_score(
    config: ModelConfig, params: Params, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens
) -> HostReward:
    """The score of texts: `reward(prompts, completions) -> list[float]`.

    A text longer than the model's positions loses its beginning.
    """
    apply = jax.jit(
        lambda params, tokens, mask: RewardModel(config).apply({"params": params}, tokens, mask, special.pad_id)
    )
    params = jax.device_put(params)

    def reward_model(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        ids = [
            encode_text(tokenizer, special, prompt, completion)[-config.max_positions :]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        scores: list[float] = []
        for start in range(0, len(ids), _ROWS):
            part = ids[start : start + _ROWS]
            longest = max(map(len, part))
            length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, config.max_positions)
            filled = part + part[:1] * (_ROWS - len(part))  # one shape, one program
            tokens, mask = pad(filled, length, special.pad_id, side="right")
            scores += np.asarray(apply(params, tokens, mask))[: len(part)].tolist()
        return scores

    return reward_model
