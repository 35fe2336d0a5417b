"""Several judges as one: their weighted sum, and what each one said."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.errors import InputError, check
from ppo_jax.rewards.host import HostReward, call_reward
from ppo_jax.types import Params, Rollout, Scores

Score = Callable[[Params, Rollout], jax.Array]
"""A judge in pure JAX: its parameters (`()` if it has none) and a rollout, to one score a response, `[B]`, or one a
token, `[B, R]`.
"""

Array = TypeVar("Array", np.ndarray, jax.Array)


class Judge(NamedTuple):
    """One judge: a function of texts on the host, or one of tokens in the program. One of the two is None."""

    host: HostReward | None = None
    score: Score | None = None


class Judges(NamedTuple):
    """One or several judges. Place `params` with `_replace`, where the program runs on several devices."""

    names: tuple[str, ...]  # short and different
    weights: tuple[float, ...]
    members: tuple[Judge, ...]
    params: tuple[Params, ...]  # of each; () for one without
    score: Callable[[tuple[Params, ...], Rollout], Scores] | None  # of all; None if one of them is on the host

    def judge(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Sequence[dict[str, Any]],
        rollout: Rollout,
    ) -> Scores:
        """What `score` says, in any mix of judges: those of texts are called, those in JAX run as programs of their
        own.

        Args:
            prompts: B texts.
            completions: B texts.
            columns: for each row the data's other columns; see `call_reward`.
            rollout: the same responses as tokens.

        Returns:
            NumPy arrays; see `combine_scores`.

        Raises:
            RewardError: a judge of texts failed, or said something that is not B finite numbers. What judges in JAX
                say is not checked.
        """
        # These return at once: the device works while the host judges.
        begun = [m.score and m.score(params, rollout) for m, params in zip(self.members, self.params, strict=True)]
        said = [
            np.asarray(scores) if member.host is None else call_reward(member.host, prompts, completions, columns)
            for member, scores in zip(self.members, begun, strict=True)
        ]
        return combine_scores(self.names, self.weights, said)


def make_judges(
    names: Sequence[str], weights: Sequence[float], members: Sequence[Judge], params: Sequence[Params]
) -> Judges:
    """Puts judges together. Those in JAX are to come from `judge_in_jax`."""
    names, weights = tuple(names), tuple(weights)
    scores = [member.score for member in members if member.score]

    def score(params: tuple[Params, ...], rollout: Rollout) -> Scores:
        said = [one(own, rollout) for one, own in zip(scores, params, strict=True)]
        return combine_scores(names, weights, said)

    in_program = len(scores) == len(members)
    return Judges(names, weights, tuple(members), tuple(params), score if in_program else None)


def judge_in_jax(score: Score) -> Judge:
    """A judge in the program: float32, 0 where the response is masked. A shape that is neither `[B]` nor `[B, R]` is an
    InputError when it is traced.
    """

    @jax.jit
    def checked(params: Params, rollout: Rollout) -> jax.Array:
        said, mask = jnp.asarray(score(params, rollout), jnp.float32), rollout.response_mask
        per_response, per_token = mask.shape[:1], mask.shape
        expected = f"{per_response}, one score a response, or {per_token}, one a token"
        check("shape", said.shape, said.shape in (per_response, per_token), expected)
        return said if said.ndim == 1 else jnp.where(mask, said, 0.0)

    return Judge(score=checked)


def combine_scores(names: Sequence[str], weights: Sequence[float], said: Sequence[Array]) -> Scores:
    """The weighted sum of scores: that of whole responses, and that of tokens.

    A weight of 0 leaves a judge out of the sums, whatever it said (also NaN).

    Args:
        names: of the judges.
        weights: of the judges.
        said: of each judge `[B]`, or `[B, R]` with 0 where masked, float32.

    Returns:
        `total` is 0 if all judges judge tokens, `tokens` is None if none does. `parts` holds the unweighted scores of
        several judges, and of one who judges tokens their sum over the response; with one judge it is empty.
    """

    def weighted(ndim: int) -> Any:
        terms = [w * x for w, x in zip(weights, said, strict=True) if w and x.ndim == ndim]
        return sum(terms) if terms else None

    total = weighted(1)
    total = np.zeros(len(said[0]), np.float32) if total is None else total
    parts = {name: x if x.ndim == 1 else x.sum(axis=1) for name, x in zip(names, said, strict=True)}
    return Scores(total=total, tokens=weighted(2), parts=parts if len(said) > 1 else {})


def check_score(name: str, judges: Judges, batch_size: int, prompt_length: int, response_length: int) -> Scores:
    """Tries judges in JAX on shapes, without computing anything; one on the host gives one number a response.

    Args:
        name: of all judges together, for the message.
        judges: the judges.
        batch_size: responses.
        prompt_length: slots of a prompt.
        response_length: slots of a response.

    Returns:
        The scores that `judges` will give, as shapes.

    Raises:
        InputError: one fails, or does not return one number a response or one a token.
    """
    length = prompt_length + response_length
    per_token: Any = jax.ShapeDtypeStruct((batch_size, response_length), jnp.float32)
    slots: list[Any] = [jax.ShapeDtypeStruct((batch_size, length), dtype) for dtype in (jnp.int32, jnp.bool)]
    rollout = Rollout(*slots, logprobs=per_token, values=per_token)
    said = []
    for own_name, member, params in zip(judges.names, judges.members, judges.params, strict=True):
        where = f"config.reward: {name}: " + f"{own_name}: " * (len(judges.names) > 1)
        if member.score is None:
            said.append(jax.ShapeDtypeStruct((batch_size,), jnp.float32))
            continue
        try:
            said.append(jax.eval_shape(member.score, params, rollout))
        except InputError as error:
            raise InputError(f"{where}{error}") from error
        except Exception as error:  # the score is the user's, and may raise anything
            raise InputError(f"{where}{type(error).__name__}: {error}") from error
    return jax.eval_shape(lambda said: combine_scores(judges.names, judges.weights, said), said)
