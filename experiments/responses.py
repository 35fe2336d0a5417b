"""Responses of a model to prompts: what collecting feedback, normalising a reward model and evaluating ask for."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.settings import FeedbackExperiment
from experiments.settings.evaluation import AskingSettings
from ppo_jax import hub
from ppo_jax.data import pad
from ppo_jax.errors import check
from ppo_jax.models import ActorCritic
from ppo_jax.sampling import SamplingConfig, generate
from ppo_jax.sharding import make_mesh, param_shardings
from ppo_jax.tokenizers import check_vocabulary, decode_responses, encode_prompt, load_tokenizer, special_tokens
from ppo_jax.types import Params, Prompts, Rollout

Prompt = str | list[dict[str, Any]]


class Responder:
    """A model that answers prompts, by one compiled program for all batches."""

    def __init__(
        self,
        model: str,
        prompt_length: int,
        response_length: int,
        temperature: float = 1.0,
        batch_size: int = 64,
        dtype: str = "float32",
        pad_token: str = "",
        eos_token: str = "",
    ) -> None:
        """Loads the model.

        Args:
            model: a Hugging Face folder, or a name on the hub.
            prompt_length: slots for a prompt, in tokens.
            response_length: longest response, in tokens.
            temperature: of the sampling; 0: greedy.
            batch_size: responses that are sampled at a time.
            dtype: of the model's matrix products.
            pad_token: overrides the tokenizer's.
            eos_token: overrides the tokenizer's.

        Raises:
            InputError: the model cannot be used, or is too short for prompt and response.
        """
        folder = hub.resolve(model)
        config = hub.load_config(folder, dtype=dtype)
        length = prompt_length + response_length
        check("prompt_length + response_length", length, length <= config.max_positions,
              f"at most the {config.max_positions} positions of {model}")  # fmt: skip
        self.tokenizer = load_tokenizer(folder)
        self.special = special_tokens(self.tokenizer, hub.load_eos_ids(folder), pad_token, eos_token)
        self.prompt_length, self.batch_size = prompt_length, batch_size
        self._vocab_size, self._name = config.vocab_size, model
        self._sampling = SamplingConfig(response_length, self.special.eos_ids, self.special.pad_id, temperature)
        mesh = make_mesh(jax.device_count() if batch_size % jax.device_count() == 0 else 1)
        head = {"kernel": np.zeros((config.width, 1), np.float32), "bias": np.zeros(1, np.float32)}
        params = {"decoder": hub.load_params(folder, config), "value_head": head}
        self._params = jax.device_put(params, param_shardings(mesh, params))
        network = ActorCritic(config)

        def answer(params: Params, prompts: Prompts, key: jax.Array) -> Rollout:
            return generate(network, params, prompts, key, self._sampling)

        batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        self._answer = jax.jit(answer, in_shardings=(None, batch, None), out_shardings=batch)

    def respond(self, prompts: Sequence[Prompt], num_responses: int = 1, seed: int = 0) -> list[list[str]]:
        """Samples `num_responses` responses to every prompt; the same seed gives the same ones on any devices.

        Raises:
            InputError: a prompt is empty, or longer than `prompt_length`.
        """
        ids = [self._encode(prompt, row) for row, prompt in enumerate(prompts, start=1)]
        if not ids:
            return []
        tokens, mask = pad(ids, self.prompt_length, self.special.pad_id, side="left")
        check_vocabulary(self.special, tokens, self._vocab_size)
        rows = np.repeat(np.arange(len(ids)), num_responses)
        texts: list[str] = []
        for number, start in enumerate(range(0, len(rows), self.batch_size)):
            # The last batch is filled up with the first rows, so that one program serves all.
            batch = np.resize(rows[start : start + self.batch_size], self.batch_size)
            key = jax.random.fold_in(jax.random.key(seed), jnp.int32(number))
            rollout = self._answer(self._params, Prompts(tokens[batch], mask[batch]), key)
            answers, real = jax.device_get((rollout.tokens, rollout.mask))
            texts += decode_responses(self.tokenizer, answers, real, self._sampling.max_new_tokens)
        return [texts[i * num_responses : (i + 1) * num_responses] for i in range(len(ids))]

    def _encode(self, prompt: Prompt, row: int) -> list[int]:
        ids = encode_prompt(self.tokenizer, prompt)
        check(f"prompt {row}: tokens", len(ids), 1 <= len(ids) <= self.prompt_length, f"1 to {self.prompt_length}")
        return ids


def options_of(settings: FeedbackExperiment | AskingSettings) -> dict[str, Any]:
    """The arguments of a `Responder`, beside the model, that the settings of a script have."""
    names = "prompt_length response_length temperature batch_size dtype pad_token eos_token"
    return {name: getattr(settings, name) for name in names.split()}
