"""Whitening as in openai/lm-human-preferences (utils/core.py `whiten`), with and without the shift: hand arithmetic."""

import numpy as np
import pytest
from oracles import assert_close

from ppo_jax.numerics import masked_whiten

# Kept: 2, 4, 4, 4, 5, 5, 7, 9. Sum 40, mean 5. Squared distances 9, 1, 1, 1, 0, 0, 4, 16: sum 32, variance 32 / 8 = 4,
# deviation 2 (with count - 1 it would be 2.138). Masked numbers are far away, and not finite.
X = np.array([[2.0, 4.0, 4.0, 1e6], [4.0, 5.0, np.nan, -1e6], [5.0, 7.0, 9.0, np.inf]], np.float32)
MASK = np.array([[True, True, True, False], [True, True, False, False], [True, True, True, False]])
# (x - 5) / 2: -1.5, -0.5, -0.5 | -0.5, 0 | 0, 1, 2
WHITE = np.array([[-1.5, -0.5, -0.5, 0.0], [-0.5, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 0.0]])


@pytest.mark.parametrize(("shift_mean", "expected"), [(True, WHITE), (False, np.where(MASK, WHITE + 5.0, 0.0))])
def test_whitening(shift_mean, expected):
    # The 1e-8 beside a variance of 4 moves a result by 2 * 1.25e-9: far below a rounding.
    assert_close(masked_whiten(X, MASK, shift_mean), expected, 4)


@pytest.mark.parametrize(
    ("shift_mean", "expected"),
    # 3e-4 and 5e-4: mean 4e-4, variance 1e-8. With 1e-8 added under the root: 1e-4 / sqrt(2e-8) = 1 / sqrt(2)
    # = 0.70710678; added to the deviation it would be 0.9999. Without the shift: + 4e-4.
    [(True, [[-0.70710678, 0.70710678]]), (False, [[-0.70670678, 0.70750678]])],
)
def test_where_the_small_number_stands(shift_mean, expected):
    actual = masked_whiten(np.array([[3e-4, 5e-4]], np.float32), np.ones((1, 2), bool), shift_mean)
    # The distances from the mean, 1e-4, carry the roundings of numbers five times as large, and the variance twice.
    assert_close(actual, expected, 4 * 5 + 4)
