"""Responses of a model to prompts: what collecting feedback, normalising a reward model and evaluating ask for."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.settings import FeedbackExperiment
from experiments.settings.evaluation import AskingSettings
from experiments.streaming import Watcher, cut_at
from ppo_jax import hub
from ppo_jax.data import pad
from ppo_jax.errors import check
from ppo_jax.models import ActorCritic, merge, overlay
from ppo_jax.sampling import SamplingConfig, generate
from ppo_jax.sharding import make_mesh, make_place
from ppo_jax.tokenizers import check_vocabulary, decode_responses, encode_prompt, load_tokenizer, special_tokens
from ppo_jax.types import Params, Prompts, Rollout

Prompt = str | list[dict[str, Any]]


class Answer(NamedTuple):
    """A response, and how it came about."""

    text: str  # without special tokens, up to a stop string
    token_ids: list[int]  # all that were sampled, EOS and those of a stop string included
    logprobs: list[float]  # of each, in the distribution that it was drawn from; nats
    finish_reason: str  # stop (EOS or a stop string) or length


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
        adapter: str = "",
        stop: Sequence[str] = (),
        show: Callable[[str], None] | None = None,
        **filters: Any,
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
            adapter: a folder in the format of PEFT, or a name on the hub, that is laid over the model; "": none.
            stop: texts that end a response; they are not part of it.
            show: gets the text of the first response of a batch in pieces, while it is sampled.
            filters: `top_k`, `top_p`, `min_p` and `repetition_penalty` of `SamplingConfig`.

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
        self._sampling = SamplingConfig(
            response_length, self.special.eos_ids, self.special.pad_id, temperature, **filters
        )
        self._stop = stop
        self._watcher = Watcher(self.tokenizer, self.special.eos_ids, stop, show) if stop or show else None
        # What leaves the device while it samples does so from one device.
        mesh = make_mesh(jax.device_count() if batch_size % jax.device_count() == 0 and not self._watcher else 1)
        params = hub.load_params(folder, config, make_place(mesh))
        if adapter:
            lora, changes = hub.load_adapter(hub.resolve(adapter), config)
            params = merge(overlay(params, changes), lora.scale)
        self._params = {"decoder": params}
        network = ActorCritic(config)

        def answer(params: Params, prompts: Prompts, key: jax.Array) -> Rollout:
            return generate(network, params, prompts, key, self._sampling, self._watcher)

        batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        self._answer = jax.jit(answer, in_shardings=(None, batch, None), out_shardings=batch)
        self.compile_s = 0.0  # what compiling has taken so far
        self._compiled: dict[int, Any] = {}  # by the slots of a prompt

    def respond(self, prompts: Sequence[Prompt], num_responses: int = 1, seed: int = 0) -> list[list[str]]:
        """Samples `num_responses` responses to every prompt; the same seed gives the same ones on any devices.

        Raises:
            InputError: a prompt is empty, or longer than `prompt_length`.
        """
        texts = [answer.text for answer in self.answers(prompts, num_responses, seed)]
        return [texts[i * num_responses : (i + 1) * num_responses] for i in range(len(prompts))]

    def answers(self, prompts: Sequence[Prompt], num_responses: int = 1, seed: int = 0) -> Iterator[Answer]:
        """As `respond`, one response after the other, as soon as its batch is sampled."""
        ids = [self._encode(prompt, row) for row, prompt in enumerate(prompts, start=1)]
        if not ids:
            return
        tokens, mask = pad(ids, self.prompt_length, self.special.pad_id, side="left")
        check_vocabulary(self.special, tokens, self._vocab_size)
        rows = np.repeat(np.arange(len(ids)), num_responses)
        for number, start in enumerate(range(0, len(rows), self.batch_size)):
            # The last batch is filled up with the first rows, so that one program serves all.
            real = rows[start : start + self.batch_size]
            batch = np.resize(real, self.batch_size)
            key = jax.random.fold_in(jax.random.key(seed), jnp.int32(number))
            yield from self._read(self._sample(Prompts(tokens[batch], mask[batch]), key))[: len(real)]

    def _sample(self, prompts: Prompts, key: jax.Array) -> Rollout:
        slots = prompts.tokens.shape[1]
        if slots not in self._compiled:
            begin = time.perf_counter()
            self._compiled[slots] = self._answer.lower(self._params, prompts, key).compile()
            self.compile_s += time.perf_counter() - begin
        if self._watcher:
            self._watcher.begin(np.asarray(prompts.tokens), np.asarray(prompts.mask))
        rollout = jax.device_get(self._compiled[slots](self._params, prompts, key))
        if self._watcher:
            self._watcher.finish()
        return rollout

    def _read(self, rollout: Rollout) -> list[Answer]:
        texts = decode_responses(self.tokenizer, rollout.tokens, rollout.mask, self._sampling.max_new_tokens)
        answers = []
        for row, whole in enumerate(texts):
            text, stopped = cut_at(whole, self._stop)
            size = int(rollout.response_mask[row].sum())
            ids = rollout.response_tokens[row, :size].tolist()
            ended = stopped or ids[-1] in self.special.eos_ids
            answers.append(Answer(text, ids, rollout.logprobs[row, :size].tolist(), "stop" if ended else "length"))
        return answers

    def _encode(self, prompt: Prompt, row: int) -> list[int]:
        ids = encode_prompt(self.tokenizer, prompt)
        check(f"prompt {row}: tokens", len(ids), 1 <= len(ids) <= self.prompt_length, f"1 to {self.prompt_length}")
        return ids


def options_of(settings: FeedbackExperiment | AskingSettings) -> dict[str, Any]:
    """The arguments of a `Responder`, beside the model, that the settings of a script have."""
    names = "prompt_length response_length temperature batch_size dtype pad_token eos_token"
    return {name: getattr(settings, name) for name in names.split()}
