"""The learning anchor "set fraction": a task that a tiny new model learns in a minute, to compare trainers by.

The policy is a GPT-2 of two layers and width 128 with random parameters, over 512 words that mean nothing; a prompt is
32 random words. The score of a response is 10 x the share of its words from a fixed quarter of the vocabulary: chance
gives 2.5, the best policy 10. How many episodes a trainer needs, and at what KL it ends, tells its update apart from
another's.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ppo_jax import hub
from ppo_jax.metrics import write_jsonl
from ppo_jax.models import Decoder, ModelConfig
from ppo_jax.types import Rollout

MODEL = ModelConfig(
    vocab_size=512, num_layers=2, num_heads=4, width=128, mlp_width=512, max_positions=128,
    positions="learned", norm="layernorm", activation="gelu_tanh", gated_mlp=False, attention_bias=True, mlp_bias=True,
)  # fmt: skip
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}  # ids 0, 1, 2
NUM_PROMPTS, PROMPT_LENGTH = 4096, 32
REWARD = "jax:experiments.anchor:set_fraction"
BEST = 10.0
_EVERY = 4  # words of which one is in the set


def write_set_fraction(folder: Path, seed: int) -> dict[str, str]:
    """Writes a new model, its prompts, and a critic.

    The critic is the model with a value head N(0, 0.02) on it, as transformers begins a classifier and TRL its critic.
    With `ppo.value_loss=clip`, a head that begins at zero takes longer to make use of a trunk of its own.

    Args:
        folder: for `model/` and `critic/` (Hugging Face folders) and `prompts.jsonl`.
        seed: of the parameters and the prompts.

    Returns:
        The fields of `PPOExperiment` that make a run of it: model, prompts, reward.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = jnp.zeros((1, 2), jnp.int32)
    model_key, head_key = jax.random.split(jax.random.key(seed))
    params = jax.device_get(jax.jit(Decoder(MODEL).init)(model_key, tokens, jnp.ones((1, 2), bool))["params"])
    tokenizer = make_tokenizer()
    hub.save(folder / "model", params, MODEL, tokenizer)
    head = {"kernel": np.asarray(MODEL.init_std * jax.random.normal(head_key, (MODEL.width, 1)))}
    known = {"eos_ids": [tokenizer.eos_token_id], "pad_id": tokenizer.pad_token_id}
    hub.save_reward_model(folder / "critic", {"decoder": params, "score_head": head}, MODEL, tokenizer, **known)
    words = np.random.default_rng(seed).integers(len(SPECIAL), MODEL.vocab_size, (NUM_PROMPTS, PROMPT_LENGTH))
    write_jsonl(folder / "prompts.jsonl", [{"prompt": " ".join(map(_word, row))} for row in words])
    return {"model": str(folder / "model"), "prompts": str(folder / "prompts.jsonl"), "reward": REWARD}


def make_tokenizer(vocab_size: int = MODEL.vocab_size) -> PreTrainedTokenizerFast:
    """One token a word: `w3` has the id 3, and so on; nothing is put in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # here, so that the score does not pay for it

    words = [*SPECIAL.values(), *map(_word, range(len(SPECIAL), vocab_size))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["pad_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def _word(number: int) -> str:
    return f"w{number}"


def set_fraction(tokenizer: PreTrainedTokenizerBase) -> Callable[[Rollout], jax.Array]:
    """A score in pure JAX: 10 x the words with id % 4 == 0 that are not special, over the longest response.

    A response that ends early loses the words that it does not say.

    Args:
        tokenizer: not needed: the ids are the words' numbers.
    """
    del tokenizer

    def score(rollout: Rollout) -> jax.Array:
        tokens = rollout.response_tokens
        good = rollout.response_mask & (tokens >= len(SPECIAL)) & (tokens % _EVERY == 0)
        return BEST * jnp.mean(good.astype(jnp.float32), axis=1)

    return score
