"""The finite guard: which quantity was the first that is not a finite number."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import numbered_experience

from ppo_jax.guard import EXPERIENCE, LOSS, broken_experience, broken_leaves, first_broken, is_broken, quantities
from ppo_jax.types import Scores

BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture
def clean(rng):
    """(scores, experience, reference logprobs) without a flaw, with responses of several lengths."""
    experience = numbered_experience(rng, 4, lengths=[20, 1, 0, 7])
    return Scores(jnp.arange(4.0)), experience, experience.logprobs - 1


def names_of(flags) -> list[str]:
    return [name for name, flag in zip(EXPERIENCE, flags, strict=True) if flag]


def test_what_is_finite_is_not_broken(clean):
    assert names_of(broken_experience(*clean)) == []
    assert first_broken(broken_experience(*clean)) == -1


@pytest.mark.parametrize("bad", BAD)
def test_each_quantity_is_named_and_the_first_comes_first(clean, bad):
    scores, experience, ref = clean

    def spoil(x):
        return x.at[3, 6].set(bad)  # the last token of the last response

    fields = {"response logprob": "logprobs", "value": "values", "advantage": "advantages", "return": "returns"}
    for name, field in fields.items():
        flags = broken_experience(scores, experience.replace(**{field: spoil(getattr(experience, field))}), ref)
        assert names_of(flags) == [name]
        assert EXPERIENCE[int(first_broken(flags))] == name
    assert names_of(broken_experience(scores, experience, spoil(ref))) == ["reference logprob"]
    all_bad = experience.replace(**{field: spoil(getattr(experience, field)) for field in fields.values()})
    assert first_broken(broken_experience(scores, all_bad, ref)) == 1


@pytest.mark.parametrize("bad", BAD)
def test_a_broken_score_is_named_whoever_gave_it(clean, bad):
    scores, experience, ref = clean
    spoilt = [
        scores.replace(total=scores.total.at[1].set(bad)),
        scores.replace(tokens=jnp.zeros((4, 20)).at[3, 2].set(bad)),
        scores.replace(greedy=jnp.zeros(4).at[0].set(bad)),
    ]
    for each in spoilt:
        assert names_of(broken_experience(each, experience, ref)) == ["score"]
    fine = scores.replace(tokens=jnp.zeros((4, 20)), greedy=jnp.zeros(4))
    assert names_of(broken_experience(fine, experience, ref)) == []


@pytest.mark.parametrize("bad", BAD)
def test_what_is_masked_may_be_anything(clean, bad):
    scores, experience, ref = clean
    mask = experience.response_mask

    def spoil(x):
        return jnp.where(mask, x, bad)

    names = ("logprobs", "values", "advantages", "returns")
    other = experience.replace(**{name: spoil(getattr(experience, name)) for name in names})
    assert names_of(broken_experience(scores, other, spoil(ref))) == []


def test_quantities_are_named_in_the_order_of_the_flags(rng):
    params = {"b": {"y": jnp.zeros(2), "x": jnp.zeros((2, 2))}, "a": jnp.zeros(())}
    names = quantities(params)
    assert names[: len(EXPERIENCE) + len(LOSS)] == [*EXPERIENCE, *LOSS]
    assert names[len(EXPERIENCE) + len(LOSS) :] == ["gradient of a", "gradient of b/x", "gradient of b/y"]
    # As the flags of the leaves are.
    broken = broken_leaves(params | {"b": params["b"] | {"x": jnp.full((2, 2), jnp.nan)}})
    assert broken.tolist() == [False, True, False]


def test_first_broken_is_a_number_as_metrics_are():
    flags = np.zeros(5, bool)
    assert first_broken(jnp.array(flags)) == -1
    flags[[2, 4]] = True
    first = jax.jit(first_broken)(jnp.array(flags))
    assert first == 2
    assert (first.dtype, first.shape) == (jnp.float32, ())


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_number_among_many_is_found(rng, bad):
    x = rng.normal(size=(30, 40)).astype(np.float32)
    assert not is_broken(jnp.asarray(x))
    assert not is_broken(jnp.asarray(x * (1e38 / np.abs(x).max())))  # large is not infinite
    assert not is_broken(None)
    assert not is_broken(jnp.zeros((0, 3)))
    x[tuple(rng.integers(0, (30, 40)))] = bad
    assert is_broken(jnp.asarray(x))
