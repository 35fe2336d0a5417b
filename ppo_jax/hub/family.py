"""What there is to say of a model family: `Family`, and `Row`, of which its table of names is made."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ppo_jax.hub.codecs import Codec
from ppo_jax.hub.keys import Key
from ppo_jax.models import Decoder, RewardModel

Model = Decoder | RewardModel
"""What a folder can hold: a causal language model, or a sequence classifier with one label."""


class Row(NamedTuple):
    """One tensor: its name in the file, and its path in our tree."""

    theirs: str
    ours: str
    transposed: bool = False  # the file holds the transpose
    by_head: bool = False  # several of ours stand in it head by head: a head of each in turn

    def parts(self) -> tuple[str, ...]:
        """Our paths: one, or several that share their tensor."""
        fused = next((segment for segment in self.ours.split("/") if "+" in segment), "")
        return tuple(self.ours.replace(fused, name) for name in fused.split("+")) if fused else (self.ours,)


def embedding(theirs: str, ours: str) -> tuple[Row, ...]:
    """The row of an embedding."""
    return (Row(f"{theirs}.weight", f"{ours}/embedding"),)


def norm(theirs: str, ours: str) -> tuple[Row, ...]:
    """The rows of a norm."""
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")


def linear(theirs: str, ours: str, by_head: bool = False) -> tuple[Row, ...]:
    """The rows of torch's `Linear`, which stores the transpose; `by_head` as in `Row`."""
    weight = Row(f"{theirs}.weight", f"{ours}/kernel", transposed=True, by_head=by_head)
    return weight, Row(f"{theirs}.bias", f"{ours}/bias", by_head=by_head)


def without(rows: tuple[Row, ...], *parts: str) -> tuple[Row, ...]:
    """The rows of a table but those of these parts of ours."""
    return tuple(row for row in rows if row.ours.split("/")[-2] not in parts)


def conv1d(theirs: str, ours: str) -> tuple[Row, ...]:
    """The rows of GPT-2's `Conv1D`."""
    return Row(f"{theirs}.weight", f"{ours}/kernel"), Row(f"{theirs}.bias", f"{ours}/bias")


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular to one `model_type`.

    Attributes:
        architectures: the class of transformers that opens each of our models.
        prefix: what their tensor names start with, where a file without the vocabulary projection may leave it out.
        rows: the table of names.
        ignored: regular expressions of tensors that are no parameters: masks and frequencies, recomputed by everybody.
        keys: field of `ModelConfig` -> key of `config.json`.
        codecs: what is not one to one, in the order in which it is read.
        implied: fields of `ModelConfig` that every model of the family has, that no key says, and that are not its
            defaults.
        only: keys with the values that we can compute; any other value is an error.
        irrelevant: keys that change nothing in the logits (dropout: training here uses none).
    """

    architectures: Mapping[type, str]
    prefix: str
    rows: tuple[Row, ...]
    ignored: tuple[str, ...]
    keys: Mapping[str, Key]
    codecs: tuple[Codec, ...]
    implied: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    irrelevant: frozenset[str]

    def head(self, ours: str) -> str:
        """What the tensor of a head is called in their files: of `lm_head` or `score_head`."""
        return next(row.theirs for row in self.rows if row.ours == f"{ours}/kernel")
