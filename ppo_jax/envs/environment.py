"""What a control task is: two pure functions, and what there is to choose from."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


@dataclasses.dataclass(frozen=True)
class Discrete:
    """One of `num_actions` choices, an int32 in [0, num_actions)."""

    num_actions: int


@dataclasses.dataclass(frozen=True)
class Box:
    """A float32 vector, whose useful range is [low, high] in each dimension; a task clips what is beyond."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def size(self) -> int:
        """How many numbers an action has."""
        return len(self.low)


class Transition(NamedTuple):
    """What one action led to.

    An episode ends when either flag is set, and both may be. The future is worth 0 after `terminated`; after
    `truncated` alone it was only not watched, and the value of `observation` stands for it.
    """

    state: Any
    observation: jax.Array  # [D] float32: of the state that was reached, before any reset
    reward: jax.Array  # [] float32
    terminated: jax.Array  # [] bool
    truncated: jax.Array  # [] bool


@dataclasses.dataclass(frozen=True)
class Environment:
    """A task as two pure functions; one episode, no batch: the caller vmaps, resets and counts.

    A state is a pytree of arrays with all that `step` depends on, steps taken and random keys included, so that a step
    is a deterministic function. What follows the end of an episode is undefined.

    Source: the protocol of Gymnasium (reset, step, terminated, truncated), with the state outside of the object.
    """

    name: str
    observation_size: int  # D
    actions: Discrete | Box
    reset: Callable[[jax.Array], tuple[Any, jax.Array]]  # key -> (state, observation [D] float32)
    step: Callable[[Any, jax.Array], Transition]  # (state, action) -> Transition; action [] int32, or [A] float32
    solved_at: float  # mean undiscounted return of an episode at which the task counts as solved
