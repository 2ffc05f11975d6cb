"""The working grid of `limner.methods.scribbles`."""

from __future__ import annotations

import numpy as np
import pytest

from limner.methods.scribbles import Grid


@pytest.mark.parametrize("factor", [2, 5, 6, 9])
def test_enlarged_chances_stay_chances(factor: int) -> None:
    """The weights of the interpolation add up to a little over 1 at some factors."""
    shape = (1, 17 * factor - 1, 5 * factor)
    levels = np.zeros((1, 17, 5, 1), np.float32)
    grid = Grid(levels, (0.05, 0.01 * factor, 0.01 * factor), factor, shape)
    enlarged = grid.enlarged(np.ones((2, 17, 5), np.float32))
    assert enlarged.shape == (2, *shape[1:])
    assert enlarged.max() <= 1
    assert enlarged.min() == pytest.approx(1)
