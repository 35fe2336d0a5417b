"""The glossary: letters for shapes, and the immutable pytrees that flow through one PPO iteration.

Letters used in every shape comment:

    B  sequences in a batch          P  prompt tokens (padded left)       R  response tokens (padded right)
    S  P + R                         T  steps of one trajectory           V  vocabulary
    D  width of the model            N  query heads                       K  key/value heads
    H  size of one head              C  texts in a comparison

A mask is boolean and True counts.
"""

import dataclasses
from typing import Any, Self

import jax

Params = Any
"""A nested dictionary of arrays, as `flax.linen.Module.init` makes it (without the outer `"params"`)."""

Metrics = dict[str, jax.Array]
"""Named scalars."""


class _Replaceable:
    def replace(self, **changes: Any) -> Self:
        """The same pytree with some fields exchanged."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts(_Replaceable):
    """A batch of prompts, each of at least one token, padded left so that every response starts at slot P."""

    tokens: jax.Array  # [B, P] int32
    mask: jax.Array  # [B, P] bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Examples(_Replaceable):
    """A batch of texts to learn from: rows that hold one or several texts, one after the other, and padding on the
    right. The texts of a row do not see each other.
    """

    tokens: jax.Array  # [B, S] int32
    segments: jax.Array  # [B, S] int32: which text of its row a token belongs to, from 1; 0 is padding
    target_mask: jax.Array  # [B, S] bool: tokens that the model is to predict (a completion, without its prompt)

    @property
    def mask(self) -> jax.Array:
        """Real tokens [B, S] bool."""
        return self.segments > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Comparisons(_Replaceable):
    """A batch of judged comparisons, each of C texts (prompt, response, EOS) with their ranks, padded right."""

    tokens: jax.Array  # [B, C, S] int32
    mask: jax.Array  # [B, C, S] bool: real tokens
    ranks: jax.Array  # [B, C] int32: 1 is best, equal ranks are ties, 0 is no text
    margin: jax.Array  # [B] float32: by how much, in units of the score, a better text is to win; 0 if unknown


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ratings(_Replaceable):
    """A batch of texts (prompt, response, EOS) with a score each, padded right."""

    tokens: jax.Array  # [B, S] int32
    mask: jax.Array  # [B, S] bool: real tokens
    scores: jax.Array  # [B] float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout(_Replaceable):
    """What acting leaves behind: prompts with sampled responses, and what the policy thought of each token.

    `logprobs[:, t]` and `values[:, t]` belong to response token t: its log-probability under the distribution that it
    was drawn from (nats), and the critic's value of the state before it.
    """

    tokens: jax.Array  # [B, S] int32
    mask: jax.Array  # [B, S] bool: prompt tokens, and response tokens up to and with the first EOS
    logprobs: jax.Array  # [B, R] float32, 0 where masked
    values: jax.Array  # [B, R] float32, 0 where masked

    @property
    def response_tokens(self) -> jax.Array:
        """Response tokens [B, R]."""
        return self.tokens[:, -self.logprobs.shape[1] :]

    @property
    def response_mask(self) -> jax.Array:
        """Mask of the response tokens [B, R]."""
        return self.mask[:, -self.logprobs.shape[1] :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience(Rollout):
    """A rollout with its learning targets.

    Its `logprobs` and `values` are the old ones of the loss: of acting, or of the learner's own pass where
    `experience.asks_learner` says so.
    """

    advantages: jax.Array  # [B, R] float32, 0 where masked
    returns: jax.Array  # [B, R] float32: what the critic should have said
    importance: jax.Array | None = None  # [B, R] float32: weight of each token, where the actor was another policy
    ref_logprobs: jax.Array | None = None  # [B, R] float32: for a KL penalty in the loss
    ref_hidden: jax.Array | None = None  # [B, R, D]: for the exact one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores(_Replaceable):
    """What the judges said of a rollout."""

    total: jax.Array  # [B] float32: the weighted sum of their scores of whole responses
    tokens: jax.Array | None = None  # [B, R] float32: the same of those who judge each token
    parts: dict[str, jax.Array] = dataclasses.field(
        default_factory=dict
    )  # each [B] float32: of several, what each said
    greedy: jax.Array | None = None  # [B] float32: `whole` of the likeliest response to the same prompt (ReMax)

    @property
    def whole(self) -> jax.Array:
        """Score of each response, that of its tokens included, `[B]`."""
        return self.total if self.tokens is None else self.total + self.tokens.sum(axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Running(_Replaceable):
    """The scalars that training carries."""

    kl_coef: jax.Array  # [] float32: weight of the KL penalty
    baseline: jax.Array  # [] float32: running mean of the reward of a response
    score_count: jax.Array  # [] float32: scores seen so far, and their mean and summed squared deviation from it
    score_mean: jax.Array  # [] float32
    score_m2: jax.Array  # [] float32
    skipped: jax.Array  # [] int32: iterations in a row in which something was not finite, and was not learned from


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState(_Replaceable):
    """Everything that training carries from one iteration to the next; arrays only.

    Functions (the model, the optimizer) are closed over by `make_train_step`, so that a restored state has the same
    tree as a fresh one.
    """

    step: jax.Array  # [] int32: iterations done
    params: Params  # what is trained: {"decoder": ..., "value_head": ..., "critic": ...}; see `policy_params`
    opt_state: Any
    key: jax.Array  # a typed key; iteration i uses fold_in(key, i)
    running: Running
    ema_params: Params | None = None  # the moving average of params["decoder"], if one is kept
    pending: tuple[Rollout, ...] = ()  # that wait to be learned from, if acting runs ahead of learning
