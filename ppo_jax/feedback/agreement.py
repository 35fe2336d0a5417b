"""How far annotators agree about what several of them judged: as a share, and beyond what chance would give."""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from ppo_jax.errors import check
from ppo_jax.feedback.store import Judgement, Store

LEVELS = ("nominal", "ordinal", "interval")

Unit = Sequence[Any]
"""What was said about one thing: a value for each annotator, None where one said nothing."""


def percent_agreement(units: Sequence[Unit]) -> float:
    """Of all pairs of judgements about the same thing, the share that are equal.

    Args:
        units: see `Unit`.

    Returns:
        0 to 1; nan if nothing was judged twice.
    """
    pairs = [one == other for values in _said(units) for one, other in itertools.combinations(values, 2)]
    return sum(pairs) / len(pairs) if pairs else math.nan


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Agreement of two annotators beyond chance: (p_o - p_e) / (1 - p_e).

    p_o is the share of equal judgements, p_e what it would be if each drew from their own frequencies independently.

    Args:
        first: categories given by one annotator; None where they said nothing, and that unit is left out.
        second: by the other, of the same units.

    Returns:
        At most 1, 0 for chance; nan if they have nothing in common or both used one same category alone.

    Source: Cohen 1960, A coefficient of agreement for nominal scales.
    """
    check("second", len(second), len(first) == len(second), f"{len(first)} judgements, as many as the first's")
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    one, other = Counter(a for a, _ in both), Counter(b for _, b in both)
    by_chance = sum(one[category] * other[category] for category in one)  # times n^2; whole numbers, so 1 is exact
    if by_chance == len(both) ** 2:
        return math.nan
    return (len(both) * sum(a == b for a, b in both) - by_chance) / (len(both) ** 2 - by_chance)


def krippendorff_alpha(units: Sequence[Unit], level: str = "nominal") -> float:
    """Agreement of any number of annotators beyond chance, with gaps: 1 - D_o / D_e.

    D_o is the mean disagreement of two judgements of the same unit, D_e that of any two judgements. Disagreement of a
    and b: nominal, [a != b]; interval, (a - b)^2; ordinal, the square of how many judgements lie between them, a and b
    themselves counting half.

    Args:
        units: see `Unit`; numbers for "ordinal" and "interval".
        level: "nominal", "ordinal" or "interval".

    Returns:
        At most 1, 0 for chance; nan if nothing was judged twice, or all judgements are equal.

    Source: Krippendorff 2011, Computing Krippendorff's alpha-reliability.
    """
    check("level", level, level in LEVELS, "one of " + ", ".join(LEVELS))
    said = _said(units)
    values = [value for unit in said for value in unit]
    if level != "nominal":
        numbers = np.array(values, np.float64)
        check("units", "not finite", bool(np.isfinite(numbers).all()), "finite numbers")
        if level == "ordinal":  # interval disagreement of places in the order
            _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
            numbers = (np.cumsum(counts) - counts / 2)[inverse]
        values = numbers.tolist()
    of_all = _disagreement(values, level)
    if not of_all:
        return math.nan
    rest = iter(values)
    within = sum(_disagreement(list(itertools.islice(rest, len(unit))), level) / (len(unit) - 1) for unit in said)
    return 1.0 - (len(values) - 1) * within / of_all


def _said(units: Sequence[Unit]) -> list[list[Any]]:
    """Without gaps, and without units that fewer than two judged."""
    present = [[value for value in unit if value is not None] for unit in units]
    return [unit for unit in present if len(unit) >= 2]


def _disagreement(values: Sequence[Any], level: str) -> float:
    """Summed over all ordered pairs of values."""
    if level == "nominal":
        return len(values) ** 2 - sum(count**2 for count in Counter(values).values())
    return 2.0 * len(values) * float(np.square(np.subtract(values, np.mean(values))).sum()) if values else 0.0


def agreement(store: Store) -> dict[str, dict[str, Any]]:
    """How far annotators agree about the items that two or more of them judged.

    Comparisons and rankings are taken apart into pairs of responses. About a pair, four things can be said: "first" or
    "second" is better, in the item's order and not the page's, "tie", "both bad". They are categories of the nominal
    level. Scores are numbers of the interval level; percent and kappa count equal ones.

    Returns:
        For each kind of item ("compare", "rank", "score") of which some were judged twice: `items` and `judgements`,
        how many; `annotators`, their names; `percent`, 0 to 1; `kappa`, for two annotators, else None; `alpha`; `level`
        of alpha. A number is None where it is not defined.
    """
    by_item: dict[int, list[Judgement]] = {}
    for one in store.judgements():
        by_item.setdefault(one.item_id, []).append(one)
    shared = [ones for ones in by_item.values() if len(ones) >= 2]
    kinds = [kind for kind in ("compare", "rank", "score") if any(ones[0].kind == kind for ones in shared)]
    return {kind: _report([ones for ones in shared if ones[0].kind == kind]) for kind in kinds}


def _report(shared: list[list[Judgement]]) -> dict[str, Any]:
    names = sorted({one.annotator for ones in shared for one in ones})
    level = "interval" if shared[0][0].kind == "score" else "nominal"
    units = [unit for ones in shared for unit in _units(ones, names)]
    numbers = {
        "percent": percent_agreement(units),
        "kappa": cohen_kappa(*zip(*units, strict=True)) if len(names) == 2 else math.nan,
        "alpha": krippendorff_alpha(units, level),
    }
    return {
        "items": len(shared),
        "judgements": sum(map(len, shared)),
        "annotators": names,
        **{name: None if math.isnan(number) else number for name, number in numbers.items()},
        "level": level,
    }


def _units(ones: list[Judgement], names: list[str]) -> Iterable[Unit]:
    """What was said about one item: a unit for its score, or for each pair of its responses."""
    by_name = {one.annotator: _values(one) for one in ones}
    nothing = [None] * len(next(iter(by_name.values())))
    return zip(*(by_name.get(name, nothing) for name in names), strict=True)


def _values(one: Judgement) -> list[Any]:
    if one.ranks is None:
        return [one.score]
    pairs = itertools.combinations(one.ranks, 2)
    return ["both bad" if one.both_bad else "first" if a < b else "second" if a > b else "tie" for a, b in pairs]
