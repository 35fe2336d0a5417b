"""Rotary positions (Su et al. 2021): which frequencies, and the rotation by them.

A model that was stretched to a longer context than it was trained on says how; each way is a class here.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ppo_jax.errors import check


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by `factor`. Source: Chen et al. 2023, arXiv:2306.15595 (position interpolation)."""

    factor: float

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        _check_positive(self, "factor")


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Slow frequencies divided by `factor`, fast ones kept, a ramp between.

    A frequency counts by the turns that it makes over the original context: fewer than `low_freq_factor` is slow, more
    than `high_freq_factor` is fast.

    Source: transformers 5.23.0 `modeling_rope_utils.py`, `_compute_llama3_parameters`, which is Meta's of Llama 3.1.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        _check_positive(self, "factor", "low_freq_factor", "original_max_positions")
        low, high = self.low_freq_factor, self.high_freq_factor
        check("high_freq_factor", high, high > low, f"more than low_freq_factor ({low})")


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """As `Llama3Scaling`, with a ramp over the number of the frequency, and what is rotated made larger.

    Source: Peng et al. 2023, arXiv:2309.00071 (YaRN); transformers 5.23.0, `_compute_yarn_parameters`.
    """

    factor: float
    original_max_positions: int
    magnitude: float  # of what is rotated; the paper advises 1 + 0.1 ln(factor)
    beta_fast: float = 32.0  # turns over the original context from which on a frequency is kept
    beta_slow: float = 1.0  # turns up to which it is divided by `factor`
    truncate: bool = True  # the ends of the ramp are whole numbers

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        _check_positive(self, "factor", "original_max_positions", "magnitude", "beta_slow")
        slow, fast = self.beta_slow, self.beta_fast
        check("beta_fast", fast, fast > slow, f"more than beta_slow ({slow})")


@dataclasses.dataclass(frozen=True)
class LongScaling:
    """Each frequency divided by a factor of its own, one of two lists, and what is rotated made larger.

    The long list counts where there are more slots than original positions, padding included: so acting and learning,
    whose sequences have the same slots, agree. Transformers goes by the largest position in the batch.

    Source: Ding et al. 2024, arXiv:2402.13753 (LongRoPE); transformers 5.23.0, `_compute_longrope_parameters`.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    magnitude: float

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        _check_positive(self, "magnitude")
        check("original_max_positions", self.original_max_positions, self.original_max_positions > 1, "at least 2")
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            check(name, factors, all(factor > 0 for factor in factors), "positive numbers")


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongScaling


def magnitude(scaling: RopeScaling | None) -> float:
    """How much larger rotated queries and keys are for how a model was stretched."""
    return scaling.magnitude if isinstance(scaling, YarnScaling | LongScaling) else 1.0


def frequencies(size: int, theta: float, scaling: RopeScaling | None = None, length: int = 0) -> jax.Array:
    """Radians a position: theta^(-2i/size) for i = 0 ... size/2 - 1, scaled; `[size / 2]` float32.

    Args:
        size: how many numbers of a head are rotated, in pairs.
        theta: base of the frequencies.
        scaling: how the model was stretched, if it was.
        length: slots of the sequences, for `LongScaling`.
    """
    half = size // 2
    plain = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    match scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return plain / factor
        case Llama3Scaling(factor, low, high, original):
            turns = plain * (original / (2 * math.pi))
            return plain * _between(1 / factor, 1.0, jnp.clip((turns - low) / (high - low), 0, 1))
        case YarnScaling():
            first, last = _yarn_ramp(scaling, size, theta)
            slowness = jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / (last - first), 0, 1)
            return plain * _between(1.0, 1 / scaling.factor, slowness)
        case LongScaling(short, long, original):
            return plain / jnp.asarray(long if length > original else short, jnp.float32)


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array, magnitude: float = 1.0) -> jax.Array:
    """Rotary position embedding; the first half of what is rotated pairs with the second (the Hugging Face layout).

    Args:
        x: `[B, T, heads, H]`.
        positions: `[B, T]` int.
        frequencies: `[F]` float32, F <= H/2: the first 2 F numbers of a head are rotated, the others pass.
        magnitude: what is rotated becomes larger by this.

    Returns:
        Rotated heads in the dtype of `x`; angles are float32.
    """
    angles = (positions[..., None].astype(jnp.float32) * frequencies[None, None, :])[:, :, None, :]  # [B, T, 1, F]
    cos, sin = magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)
    rotated, rest = jnp.split(x.astype(jnp.float32), [2 * len(frequencies)], axis=-1)
    first, second = jnp.split(rotated, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def _between(start: float, end: float, part: jax.Array) -> jax.Array:
    return (1 - part) * start + part * end


def _yarn_ramp(scaling: YarnScaling, size: int, theta: float) -> tuple[float, float]:
    """Numbers of the frequencies (from 0, not whole) at which the ramp begins and ends."""

    def number_with(turns: float) -> float:
        return size * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = number_with(scaling.beta_fast), number_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    return first, last + 0.001 if first == last else last  # no division by zero


def _check_positive(scaling: RopeScaling, *names: str) -> None:
    for name in names:
        check(name, getattr(scaling, name), getattr(scaling, name) > 0, "a positive number")
