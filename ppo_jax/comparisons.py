"""Judged texts as arrays: what a reward model is trained and measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ppo_jax.data import DataError, pad
from ppo_jax.preferences import Judged
from ppo_jax.tokenizers import SpecialTokens, encode_text
from ppo_jax.types import Comparisons, Ratings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class JudgedSet:
    """Judgements ready to be batched; fields as in `types.Comparisons` and `types.Ratings`, over all rows."""

    tokens: np.ndarray  # [num, C, S] int32, padded right; C is 1 for ratings
    mask: np.ndarray  # [num, C, S] bool
    ranks: np.ndarray  # [num, C] int32; all 0 for ratings
    margin: np.ndarray  # [num] float32
    scores: np.ndarray  # [num] float32; 0 for comparisons
    response_lengths: np.ndarray  # [num, C] int32: tokens of a response, without prompt and EOS
    judged: tuple[Judged, ...]  # where the rows come from
    num_long: int  # left out: a text of more than S tokens
    num_tied: int  # left out: nothing better than anything

    @property
    def prompts(self) -> tuple[str, ...]:
        """Of the rows."""
        return tuple(one.prompt for one in self.judged)

    @property
    def are_ratings(self) -> bool:
        """Whether these are ratings; comparisons otherwise."""
        return not self.ranks.any()

    def rows(self, where: np.ndarray) -> JudgedSet:
        """Some of the rows."""
        names = ("tokens", "mask", "ranks", "margin", "scores", "response_lengths")
        parts = {name: getattr(self, name)[where] for name in names}
        return dataclasses.replace(self, **parts, judged=tuple(self.judged[i] for i in where))

    def pair_differences(self, scores: np.ndarray) -> np.ndarray:
        """Score of the better text minus score of the worse, of every pair that is strictly ordered.

        Args:
            scores: `[num, C]`.

        Returns:
            `[pairs]`.
        """
        ranks = self.ranks
        better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0)
        return (scores[:, :, None] - scores[:, None, :])[better]

    def batch(self, where: np.ndarray) -> Comparisons | Ratings:
        """Some of the rows, as a train step takes them."""
        tokens, mask = self.tokens[where], self.mask[where]
        if self.are_ratings:
            return Ratings(tokens[:, 0], mask[:, 0], self.scores[where])
        return Comparisons(tokens, mask, self.ranks[where], self.margin[where])


def encode_judged(
    judged: Sequence[Judged], tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, length: int
) -> JudgedSet:
    """Tokenizes judged texts: prompt, response and EOS.

    Args:
        judged: at least one; all comparisons, or all ratings.
        tokenizer: of the reward model.
        special: pad and EOS.
        length: most tokens of a text; a judgement with a longer one is left out. S is the longest that is kept.

    Raises:
        DataError: comparisons and ratings in one, or nothing left.
    """
    if len({one.ranks is None for one in judged}) > 1:
        raise DataError("data: comparisons and scores in one source; expected one kind, each trains a model of its own")
    texts = [[encode_text(tokenizer, special, one.prompt, text) for text in one.responses] for one in judged]
    prompt_sizes = [len(encode_text(tokenizer, special, one.prompt, "")) for one in judged]  # and EOS
    tied = [one.ranks is not None and len(set(one.ranks)) == 1 for one in judged]
    long = [max(map(len, row)) > length for row in texts]
    kept = [i for i in range(len(judged)) if not tied[i] and not long[i]]
    if not kept:
        raise DataError(
            f"data: of {len(judged)} judgements {sum(tied)} are ties and {sum(long)} have a text of more than "
            f"{length} tokens; expected some that are neither"
        )
    most = max(len(texts[i]) for i in kept)
    length = max(len(text) for i in kept for text in texts[i])
    rows = [text for i in kept for text in texts[i] + [[]] * (most - len(texts[i]))]
    sizes = [[len(text) - prompt_sizes[i] for text in texts[i]] + [0] * (most - len(texts[i])) for i in kept]
    tokens, mask = pad(rows, length, special.pad_id, side="right")
    ranks = [judged[i].ranks or (0,) for i in kept]
    return JudgedSet(
        tokens=tokens.reshape(len(kept), most, length),
        mask=mask.reshape(len(kept), most, length),
        ranks=np.array([[*row, *[0] * (most - len(row))] for row in ranks], np.int32),
        margin=np.array([judged[i].margin for i in kept], np.float32),
        scores=np.array([judged[i].score or 0.0 for i in kept], np.float32),
        response_lengths=np.maximum(np.array(sizes, np.int32), 0),
        judged=tuple(judged[i] for i in kept),
        num_long=sum(long),
        num_tied=sum(tied),
    )


def split_by_prompt(judged: JudgedSet, share: float) -> tuple[JudgedSet, JudgedSet]:
    """The first prompts to train on, the last `share` of them held out, each with all its rows; at least one of each.

    Raises:
        DataError: fewer than two prompts.
    """
    distinct = list(dict.fromkeys(judged.prompts))
    if len(distinct) == 1:  # whole texts without a prompt, or one prompt for all
        distinct, keys = list(range(len(judged.prompts))), list(range(len(judged.prompts)))
    else:
        keys = list(judged.prompts)
    if len(distinct) < 2:
        raise DataError("data: got one judgement, expected at least two, one of them held out")
    num_heldout = min(max(1, round(len(distinct) * share)), len(distinct) - 1)
    heldout = set(distinct[-num_heldout:])
    is_heldout = np.array([key in heldout for key in keys])
    return judged.rows(np.flatnonzero(~is_heldout)), judged.rows(np.flatnonzero(is_heldout))
