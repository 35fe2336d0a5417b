"""Sampling responses: one prefill, then a decode loop that stops when every sequence has ended, all in one program."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from ppo_jax.errors import check
from ppo_jax.models import ActorCritic, Cache, by_output, causal_mask, empty_cache, positions_of
from ppo_jax.numerics import logprobs_and_entropy
from ppo_jax.types import Params, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Raises:
        InputError: a field outside its range.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]  # any of these ends a response
    pad_id: int  # stands after the end; never scored
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability
    min_p: float = 0.0  # only tokens at least this times as probable as the likeliest
    repetition_penalty: float = 1.0  # logits of tokens that are there already are divided by it, below 0 multiplied
    min_new_tokens: int = 0  # no EOS before this many tokens
    truncate_id: int | None = None  # this token, too, ends a response
    truncate_after: int = 0  # as response token number `truncate_after` (from 0) or later

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "a number in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "a number in [0, 1]"),
            "repetition_penalty": (self.repetition_penalty > 0, "a positive number"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            "truncate_after": (0 <= self.truncate_after <= self.max_new_tokens, "from 0 to max_new_tokens"),
        }
        for name, (holds, expected) in ranges.items():
            check(name, getattr(self, name), holds, expected)


def policy_logits(logits: jax.Array, positions: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """The logits of the distribution that is the policy: at its temperature, without EOS where that is not allowed.

    Acting, the reference and training all go through here, so that the ratio of a fresh rollout is one.

    Args:
        logits: `[B, T, V]` float32, the model's.
        positions: `[T]` int, which response token each column predicts.
        sampling: temperature 0 is left at 1 here: greedy choice, the model's own probabilities.

    Returns:
        `[B, T, V]`; -inf forbids a token.
    """
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    if sampling.min_new_tokens:
        is_eos = jnp.zeros(logits.shape[-1], bool).at[jnp.array(sampling.eos_ids, jnp.int32)].set(True)
        too_early = positions < sampling.min_new_tokens
        logits = jnp.where((too_early[:, None] & is_eos[None, :])[None], -jnp.inf, logits)
    return logits


def ends_response(tokens: jax.Array, positions: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Where a response ends: at an EOS, or at the truncation token from its position on.

    Cutting while sampling is the same as sampling on and cutting afterwards, since no token depends on later ones.

    Args:
        tokens: `[B, T]` response tokens.
        positions: `[T]` int, their numbers in the response.
        sampling: what ends a response.

    Returns:
        `[B, T]` bool.

    Source: openai/lm-human-preferences, `lm_human_preferences/lm_tasks.py`, `truncate_token` and `truncate_after`.
    """
    ended = jnp.isin(tokens, jnp.array(sampling.eos_ids, jnp.int32))
    if sampling.truncate_id is None:
        return ended
    return ended | ((tokens == sampling.truncate_id) & (positions >= sampling.truncate_after)[None, :])


def penalize_repetition(logits: jax.Array, tokens: jax.Array, mask: jax.Array, penalty: float) -> jax.Array:
    """Makes tokens that are in the text already less likely.

    Args:
        logits: `[B, V]` float32.
        tokens: `[B, S]` the prompt and the response so far.
        mask: `[B, S]` which of them are there.
        penalty: p; a logit x of such a token becomes x / p if it is positive, else x p. 1 changes nothing.

    Returns:
        `[B, V]`.

    Source: Keskar et al. 2019, arXiv:1909.05858 (CTRL), section 4.1; for negative logits as transformers has it.
    """
    rows = jnp.broadcast_to(jnp.arange(len(tokens))[:, None], tokens.shape)
    seen = jnp.zeros(logits.shape, bool).at[rows, tokens].max(mask)
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: jax.Array, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> jax.Array:
    """Forbids all but the `top_k` likeliest tokens, then all outside the nucleus of probability `top_p`, then all less
    than `min_p` times as probable as the likeliest.

    Args:
        logits: `[B, V]` float32.
        top_k: 0 keeps all. Ties with the k-th are kept.
        top_p: 1 keeps all. The token that crosses `top_p` is kept, so one always is.
        min_p: 0 keeps all.

    Returns:
        `[B, V]` with -inf where forbidden.

    Source: Holtzman et al. 2019, arXiv:1904.09751 (nucleus sampling); Nguyen et al. 2024, arXiv:2407.01082 (min-p).
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if top_p < 1.0:
        descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probs = jax.nn.softmax(descending, axis=-1)
        inside = jnp.cumsum(probs, axis=-1) - probs < top_p
        threshold = jnp.min(descending, axis=-1, where=inside, initial=jnp.inf, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if min_p > 0.0:
        threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def draw(key: jax.Array, logits: jax.Array, block: int = 256) -> jax.Array:
    """One token a row from softmax(logits), by inverting the cumulative distribution in two levels.

    The first uniform number picks a block of the vocabulary, the second a token in it. Two numbers a row instead of V
    (`jax.random.categorical` adds Gumbel noise to every logit). The grain is 1e-7 of the
    weight of a block.

    Args:
        key: a typed key.
        logits: `[B, V]` float32; -inf is never drawn.
        block: tokens a block.

    Returns:
        `[B]` int32.
    """
    batch, vocabulary = logits.shape
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -vocabulary % block))).reshape(batch, -1, block)
    uniform = jax.random.uniform(key, (2, batch))
    chosen_block = _invert_cumulative(jnp.sum(weights, axis=-1), uniform[0])
    within = jnp.take_along_axis(weights, chosen_block[:, None, None], axis=1)[:, 0]
    return chosen_block * block + _invert_cumulative(within, uniform[1])


def _invert_cumulative(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index drawn in proportion to `weights` `[B, n]` by `uniform` `[B]` in [0, 1); never one of weight zero; `[B]`
    int32.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    total = cumulative[:, -1]
    reached = (cumulative > (uniform * total)[:, None]) & (weights > 0)
    # Rounding may lift the target to the total, where nothing lies beyond; the heaviest then stands in.
    heaviest = jnp.argmax(weights, axis=-1)
    return jnp.where(jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1), heaviest).astype(jnp.int32)


class _Decoding(NamedTuple):
    """What the decode loop carries."""

    t: jax.Array  # [] int32: response tokens drawn
    alive: jax.Array  # [B] bool: no EOS yet
    cache: Cache
    rollout: Rollout


Watch = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""What sees new tokens on the host: (tokens `[B]`, their number in the response `[]`) -> rows that end here `[B]`."""


def generate(
    model: ActorCritic,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    sampling: SamplingConfig,
    watch: Watch | None = None,
    responses_per_prompt: int = 1,
) -> Rollout:
    """Samples responses to every prompt.

    Args:
        model: the actor-critic; its value of every state is taken along, since the trunk has run anyway.
        params: its parameters. Values are 0 without a "value_head", or if that head reads a "critic"'s trunk.
        prompts: `[B / responses_per_prompt, P]`, padded left.
        key: a typed key; token t uses `fold_in(key, t)`.
        sampling: how tokens are chosen, and what ends a response.
        watch: shows text as it comes, and ends responses for reasons of its own; None: nothing leaves the device.
        responses_per_prompt: those to one prompt share its prefill, and stand one after the other.

    Returns:
        A `Rollout` of B responses with R = `sampling.max_new_tokens`. The logprobs are those of the distribution that
        was drawn from, filters included.
    """
    apply = partial(model.apply, {"params": params})
    asked, prompt_length = prompts.tokens.shape
    num_new = sampling.max_new_tokens
    batch, length = asked * responses_per_prompt, prompt_length + num_new

    visible = jnp.pad(causal_mask(prompts.mask), ((0, 0), (0, 0), (0, num_new)))
    empty = empty_cache(model.config, asked, length)
    hidden, cache = apply(prompts.tokens, positions_of(prompts.mask), visible, empty, method="trunk")
    prompts, hidden, cache = jax.tree.map(
        lambda x: jnp.repeat(x, responses_per_prompt, axis=0), (prompts, hidden[:, -1], cache)
    )
    prompt_sizes = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)
    if jax.default_backend() == "cpu":
        params = {name: by_output(part) if name == "decoder" else part for name, part in params.items()}
    apply_step = partial(model.apply, {"params": params})
    reads_trunk = "value_head" in params and "critic" not in params

    def emit(hidden: jax.Array, at: _Decoding) -> _Decoding:
        """Draws response token t from the state before it and writes it down."""
        logits = apply_step(hidden, method="logits")
        if sampling.repetition_penalty != 1.0:
            logits = penalize_repetition(logits, at.rollout.tokens, at.rollout.mask, sampling.repetition_penalty)
        logits = policy_logits(logits[:, None], at.t[None], sampling)[:, 0]
        logits = filter_logits(logits, sampling.top_k, sampling.top_p, sampling.min_p)
        if sampling.temperature == 0:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            token = draw(jax.random.fold_in(key, at.t), logits)
        token = jnp.where(at.alive, token, sampling.pad_id)
        logprob, _ = logprobs_and_entropy(logits, token)
        value = apply(hidden, method="value") if reads_trunk else jnp.zeros(batch)
        slot, rollout = prompt_length + at.t, at.rollout
        rollout = Rollout(
            tokens=rollout.tokens.at[:, slot].set(token),
            mask=rollout.mask.at[:, slot].set(at.alive),
            logprobs=rollout.logprobs.at[:, at.t].set(jnp.where(at.alive, logprob, 0.0)),
            values=rollout.values.at[:, at.t].set(jnp.where(at.alive, value, 0.0)),
        )
        ended = ends_response(token[:, None], at.t[None], sampling)[:, 0]
        if watch is not None:
            ended |= io_callback(watch, jax.ShapeDtypeStruct((batch,), bool), token, at.t)
        return _Decoding(at.t + 1, at.alive & ~ended, at.cache, rollout)

    def decode(at: _Decoding) -> _Decoding:
        """Runs the newest token through the model, then draws the next."""
        slot = prompt_length + at.t - 1
        newest = jax.lax.dynamic_slice_in_dim(at.rollout.tokens, slot, 1, axis=1)
        positions = (prompt_sizes + at.t - 1)[:, None]
        written = jnp.arange(length) <= slot
        visible = jnp.pad(prompts.mask, ((0, 0), (0, num_new)), constant_values=True) & written[None, :]
        hidden, cache = apply_step(newest, positions, visible[:, None], at.cache, slot, method="trunk")
        return emit(hidden[:, 0], at._replace(cache=cache))

    start = Rollout(
        tokens=jnp.pad(prompts.tokens, ((0, 0), (0, num_new)), constant_values=sampling.pad_id),
        mask=jnp.pad(prompts.mask, ((0, 0), (0, num_new))),
        logprobs=jnp.zeros((batch, num_new)),
        values=jnp.zeros((batch, num_new)),
    )
    first = emit(hidden, _Decoding(jnp.int32(0), jnp.ones(batch, bool), cache, start))
    last = jax.lax.while_loop(lambda at: (at.t < num_new) & jnp.any(at.alive), decode, first)
    return last.rollout
