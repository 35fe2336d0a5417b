"""Text while it is sampled: what a response says so far, whether a stop string has come, and showing it as it comes."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from ppo_jax.tokenizers import decode_responses


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first of the stop strings in it, and whether there was one."""
    found = [text.index(one) for one in stop if one in text]
    return (text[: min(found)], True) if found else (text, False)


def settled(text: str, stop: Sequence[str]) -> str:
    """What of a text will stay whatever comes: no half of a character at its end, and no beginning of a stop string."""
    kept = text.rstrip("\ufffd")
    sizes = [n for one in stop for n in range(1, len(one)) if kept.endswith(one[:n])]
    return kept[: len(kept) - max(sizes, default=0)]


class Watcher:
    """A `Watch` for `generate`: it reads along, ends a row where a stop string has come, and shows the first row."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Collection[int],
        stop: Sequence[str] = (),
        show: Callable[[str], None] | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            tokenizer: of the model.
            eos_ids: what ends a response without its doing.
            stop: texts that end a response; they are not part of it.
            show: gets the first row's text in pieces.
        """
        self._tokenizer, self._eos_ids, self._stop, self._show = tokenizer, set(eos_ids), stop, show
        self._prompts: list[np.ndarray] = []
        self._responses: list[list[int]] = []
        self._ended = np.zeros(0, bool)
        self._shown = ""

    def begin(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        """What comes next are responses to these prompts, `[B, P]`."""
        self._prompts = [row[keep] for row, keep in zip(tokens, mask, strict=True)]
        self._responses = [[] for _ in self._prompts]
        self._ended = np.zeros(len(tokens), bool)
        self._shown = ""

    def __call__(self, tokens: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Reads a token of each row, `[B]`; returns which rows end with it, `[B]` bool."""
        for row, token in enumerate(np.asarray(tokens).tolist()):
            if self._ended[row]:
                continue
            self._responses[row].append(token)
            if self._stop or (row == 0 and self._show):
                text, stopped = cut_at(self._text(row), self._stop)
                self._ended[row] = stopped
                if row == 0 and self._show:
                    self._show_more(text if stopped else settled(text, self._stop))
            self._ended[row] |= token in self._eos_ids
        return self._ended

    def finish(self) -> None:
        """Shows what was held back in case that more would come."""
        if self._show:
            self._show_more(cut_at(self._text(0), self._stop)[0])

    def _text(self, row: int) -> str:
        response = self._responses[row]
        whole = np.concatenate([self._prompts[row], response])[None]
        return decode_responses(self._tokenizer, whole.astype(int), np.ones_like(whole, bool), len(response))[0]

    def _show_more(self, text: str) -> None:
        if self._show and text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text
