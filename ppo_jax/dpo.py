"""Direct preference learning: a policy from judged texts, with neither a reward model nor sampling.

    completions --policy, reference--> logprobs [B, C] --dpo_loss | ipo_loss | kto_loss--> Adam

The reference is the policy before the first step. DPO and IPO learn from pairs (of a ranking, from every strictly
ordered two), KTO from single texts that are desirable or not.

Sources: Rafailov et al. 2023 (arXiv:2305.18290), Azar et al. 2023 (arXiv:2310.12036), Ethayarajh et al. 2024
(arXiv:2402.01306).
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Wrapped

from ppo_jax.comparisons import JudgedSet
from ppo_jax.config import option
from ppo_jax.errors import check
from ppo_jax.losses import dpo_loss, ipo_loss, kto_loss
from ppo_jax.models import Decoder
from ppo_jax.sft import predicted, token_logprobs
from ppo_jax.sharding import Shardings, jit_training, minibatches
from ppo_jax.types import Examples, Metrics, Params, TrainState

LOSSES = ("dpo", "ipo", "kto")


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """What is minimised.

    Raises:
        InputError: a field outside its range, or one that the loss does not read.
    """

    loss: str = option("dpo", "dpo or ipo, which learn from pairs, or kto, from texts that are desirable or not")
    beta: float = option(0.1, "how close the policy stays to the reference: weight of the log ratios (IPO's tau)")
    label_smoothing: float = option(0.0, "dpo: probability that a preference is the wrong way round")
    desirable_weight: float = option(1.0, "kto: of a desirable text")
    undesirable_weight: float = option(1.0, "kto: of an undesirable text")

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check("loss", self.loss, self.loss in LOSSES, "one of " + ", ".join(LOSSES))
        check("beta", self.beta, 0 < self.beta < float("inf"), "a number above 0")
        check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "a number in [0, 0.5)")
        smooth = self.loss == "dpo" or self.label_smoothing == 0
        check("label_smoothing", self.label_smoothing, smooth, f"0 with loss={self.loss}")
        for name in ("desirable_weight", "undesirable_weight"):
            weight = getattr(self, name)
            check(name, weight, 0 < weight < float("inf"), "a number above 0")
            check(name, weight, self.loss == "kto" or weight == 1, f"1 with loss={self.loss}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preferences:
    """A batch of judged completions: pairs (C = 2, the chosen one first), or single ones (C = 1)."""

    texts: Examples  # of arrays [B, C, S]: prompt, completion and EOS; the targets are completion and EOS
    desirable: jax.Array | None = None  # [B] bool; None: pairs
    mismatched: Examples | None = None  # of arrays [B, S]: each prompt with a completion of another; None: pairs


@dataclasses.dataclass(frozen=True)
class PreferenceSet:
    """Judgements ready to be batched (host arrays); a text that is in several pairs is kept once."""

    texts: Examples  # of arrays [T, S], padded right
    prompts: np.ndarray  # [T] int: texts with the same number answer the same prompt
    rows: np.ndarray  # [num, C] int: which texts
    desirable: np.ndarray | None  # [num] bool; None: pairs

    def __len__(self) -> int:
        """How many there are to learn from."""
        return len(self.rows)

    def batch(self, where: np.ndarray) -> Preferences:
        """Some of them, as a train step takes them."""
        rows = self.rows[where]
        texts = jax.tree.map(lambda x: x[rows], self.texts)
        if self.desirable is None:
            return Preferences(texts)
        single = jax.tree.map(lambda x: x[:, 0], texts)
        return Preferences(texts, self.desirable[where], mismatch(single, self.prompts[rows[:, 0]]))


def pairs_of(judged: JudgedSet) -> PreferenceSet:
    """Every strictly ordered pair of the texts of each comparison."""
    ranks = judged.ranks
    better = (ranks[:, :, None] > 0) & (ranks[:, :, None] < ranks[:, None, :])
    comparison, chosen, rejected = np.nonzero(better)
    rows = comparison[:, None] * ranks.shape[1] + np.stack([chosen, rejected], axis=1)
    return PreferenceSet(*_texts_of(judged), rows, None)


def labelled(judged: JudgedSet, threshold: float = 0.0) -> PreferenceSet:
    """Single texts that are desirable or not.

    Args:
        judged: of a comparison the best texts are desirable and the last ones undesirable; those between say nothing
            and are left out.
        threshold: a rated text is desirable if its score is above it.
    """
    ranks = judged.ranks
    if judged.are_ratings:
        desirable = judged.scores[:, None] > threshold
        clear = np.ones_like(desirable)
    else:
        desirable = ranks == 1
        clear = desirable | (ranks == ranks.max(axis=1, keepdims=True))
    return PreferenceSet(*_texts_of(judged), np.flatnonzero(clear)[:, None], desirable[clear])


def _texts_of(judged: JudgedSet) -> tuple[Examples, np.ndarray]:
    """All texts `[num * C, S]`, and the number of the prompt of each."""
    num, most, length = judged.tokens.shape
    tokens, mask = (x.reshape(num * most, length) for x in (judged.tokens, judged.mask))
    begins = mask.sum(axis=1) - judged.response_lengths.reshape(-1) - 1  # the EOS counts
    targets = mask & (np.arange(length) >= begins[:, None])
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(judged.prompts))}
    prompts = np.repeat([numbers[prompt] for prompt in judged.prompts], most)
    return Examples(tokens, mask.astype(np.int32), targets), prompts


def mismatch(texts: Examples, prompts: np.ndarray) -> Examples:
    """Each prompt with the completion of the next row (after the last comes the first) that answers another prompt; of
    the very next row, where all answer the same.

    KTO's estimate of the KL divergence: "mismatched" completions stand for what the policy says to anything.

    Args:
        texts: of host arrays `[B, S]`.
        prompts: `[B]`: rows with the same number answer the same prompt.

    Returns:
        The same shapes; what is longer than S is cut at its end.

    Source: Ethayarajh et al. 2024, section 4.1: completion j = (i + 1) mod m for prompt i. TRL 1.x does so once, over
    neighbours of the data in a fixed order, which may answer the same prompt; here partners are new in each epoch.
    """
    num, length = texts.tokens.shape
    partner = np.roll(np.arange(num), -1)
    if np.any(prompts != prompts[0]):
        for i in reversed(range(2 * num)):  # twice around: at the end of the first turn it is known who follows
            here, after = i % num, (i + 1) % num
            partner[here] = after if prompts[here] != prompts[after] else partner[after]
    result = jax.tree.map(np.zeros_like, texts)
    for i, j in enumerate(partner):
        prompt = texts.tokens[i][texts.mask[i] & ~texts.target_mask[i]]
        whole = np.concatenate([prompt, texts.tokens[j][texts.target_mask[j]]])[:length]
        result.tokens[i, : len(whole)] = whole
        result.segments[i, : len(whole)] = 1
        result.target_mask[i, len(prompt) : len(whole)] = True
    return result


def completion_logprobs(model: Decoder, params: Params, texts: Examples, per_token: bool = False) -> jax.Array:
    """Log-probability of each completion (and its EOS), given its prompt.

    Args:
        model: the policy.
        params: its parameters.
        texts: of arrays `[..., S]`.
        per_token: the mean over its tokens instead of the sum.

    Returns:
        `[...]` float32 nats.
    """
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), texts)
    counts = predicted(flat)
    total = jnp.sum(jnp.where(counts, token_logprobs(model, params, flat), 0.0), axis=1)
    if per_token:
        total = total / jnp.maximum(jnp.sum(counts, axis=1), 1)
    return total.reshape(texts.tokens.shape[:-1])


def reference_point(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """KTO's estimate of KL(policy || reference) from mismatched completions: max(0, mean(log ratio)).

    Args:
        logprobs: nats, of all mismatched completions of a batch under the policy, any shape.
        ref_logprobs: the same under the reference.

    Returns:
        `[]` nats.

    Source: Ethayarajh et al. 2024, section 4.1. TRL takes the mean of the means of each device, here it is over the
    whole batch, on whatever devices and in whatever parts it is.
    """
    return jnp.maximum(0.0, jnp.mean(logprobs - ref_logprobs))


def preference_loss(
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    desirable: jax.Array | None,
    kl: jax.Array | None,
    config: DPOConfig,
) -> tuple[jax.Array, Metrics]:
    """The loss that the configuration names.

    Args:
        logprobs: `[B, C]` nats, of the completions under the policy (see `DPOStep.logprobs`).
        ref_logprobs: the same under the reference.
        desirable: `[B]` bool; None for pairs.
        kl: `[]` nats, the `reference_point`; None for pairs.
        config: what is minimised.

    Returns:
        (loss `[]`, metrics: see `dpo_loss`, `ipo_loss` and `kto_loss`, and `reference_kl` for KTO).
    """
    if desirable is not None and kl is not None:
        weights = {"desirable_weight": config.desirable_weight, "undesirable_weight": config.undesirable_weight}
        loss, metrics = kto_loss(logprobs[:, 0], ref_logprobs[:, 0], desirable, kl, beta=config.beta, **weights)
        return loss, metrics | {"reference_kl": kl}
    of_pairs = partial(dpo_loss, label_smoothing=config.label_smoothing) if config.loss == "dpo" else ipo_loss
    both = (logprobs[:, 0], logprobs[:, 1], ref_logprobs[:, 0], ref_logprobs[:, 1])
    return of_pairs(*both, beta=config.beta)


class DPOStep(NamedTuple):
    """The compiled programs.

    `learn(state, ref_params, batch) -> (state, metrics)` donates the state; `logprobs(params, texts [B, ..., S]) ->
    [B, ...]` reads completions as the loss does: summed, or for IPO the mean over the tokens.
    """

    learn: Wrapped
    logprobs: Wrapped


def make_dpo_step(
    model: Decoder, tx: optax.GradientTransformation, shardings: Shardings, config: DPOConfig, accumulation: int = 1
) -> DPOStep:
    """One gradient step over judged completions, compiled over the mesh.

    The reference reads the batch in the same program: it costs a forward pass, and nothing has to be kept.

    Args:
        model: the policy.
        tx: the optimizer, as `TrainState.opt_state` was made.
        shardings: where state, reference and batches live.
        config: what is minimised.
        accumulation: parts that a batch is cut into; one after the other they need the memory of one. The step is that
            of the whole batch.
    """
    # IPO's authors compare means over tokens (TRL's dpo_trainer.py tells so); their paper leaves the length open.
    logprobs_of = partial(completion_logprobs, model, per_token=config.loss == "ipo")

    def read(params: Params, parts: Examples) -> jax.Array:
        return jax.lax.map(partial(logprobs_of, params), parts)

    def learn(state: TrainState, ref_params: Params, batch: Preferences) -> tuple[TrainState, Metrics]:
        parts = minibatches(batch, accumulation)
        ref_logprobs, kl = read(ref_params, parts.texts), None
        if parts.mismatched is not None:
            kl = reference_point(read(state.params, parts.mismatched), read(ref_params, parts.mismatched))

        def part_loss(params: Params, part: Preferences, ref_logprobs: jax.Array) -> tuple[jax.Array, jax.Array]:
            logprobs = logprobs_of(params, part.texts)
            return preference_loss(logprobs, ref_logprobs, part.desirable, kl, config)[0] / accumulation, logprobs

        def add(sums: Params, part: tuple[Preferences, jax.Array]) -> tuple[Params, jax.Array]:
            grads, logprobs = jax.grad(part_loss, has_aux=True)(state.params, *part)
            return jax.tree.map(jnp.add, sums, grads), logprobs

        grads, logprobs = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state.params), (parts, ref_logprobs))
        logprobs, ref_logprobs, desirable = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (logprobs, ref_logprobs, parts.desirable)
        )
        loss, metrics = preference_loss(logprobs, ref_logprobs, desirable, kl, config)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {f"preference/{name}": x for name, x in (metrics | {"loss": loss}).items()}
        metrics["optim/grad_norm"] = optax.tree.norm(grads)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    at = shardings
    return DPOStep(
        learn=jit_training(learn, (at.state, at.ref_params, at.batch), (at.state, at.replicated)),
        logprobs=jax.jit(logprobs_of, in_shardings=(at.ref_params, at.batch), out_shardings=at.batch),
    )
