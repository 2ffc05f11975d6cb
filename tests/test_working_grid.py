"""The working grid."""

from __future__ import annotations

import numpy as np
import pytest

from limner.annotations import Scribbles
from limner.space import Space
from limner.volume import LabelMap, Volume
from limner.working_grid import Grid


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


def test_reduces_by_means_and_keeps_every_stroke() -> None:
    draw = np.random.default_rng(0)
    space = Space((2, 5, 7), (0.1, 0.01, 0.01))
    images = Volume(draw.integers(0, 256, space.shape).astype(np.uint8), space)
    grid = Grid.of(images, working_um=20.0)
    full = Grid.of(images, None)
    assert (grid.factor, grid.levels.shape, grid.spacing) == (2, (2, 3, 4, 1), (0.1, 0.02, 0.02))
    np.testing.assert_allclose(grid.levels[1, 1, 2, 0], full.levels[1, 2:4, 4:6, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(grid.levels[1, 2, 3, 0], full.levels[1, 4, 6, 0], rtol=1e-5)  # the last pixel repeated
    marks = np.zeros(space.shape, np.uint8)
    marks[0, 0, 0], marks[0, 1, 1], marks[1, 4, 6] = 1, 2, 1  # an organ's stroke wins over background in one pixel
    reduced = grid.marks(Scribbles.from_marks(LabelMap(marks, space)))
    assert reduced[0, 0, 0] == 2
    assert reduced[1, 2, 3] == 1
    assert (reduced > 0).sum() == 2


def test_large_stacks_are_worked_on_at_coarser_pixels() -> None:
    space = Space((10, 1500, 1500), (0.1, 0.001, 0.001))
    grid = Grid.of(Volume(np.zeros(space.shape, np.uint8), space), None)
    assert grid.factor == 2
    assert grid.um_per_px == pytest.approx(2.0)
    assert grid.enlarged(np.ones((3, 750, 750), np.float32)).shape == (3, 1500, 1500)


@pytest.mark.parametrize("labels_there", [[0, 1, 3], [2], [1, 2]])
def test_enlarged_labels_are_those_whose_enlarged_share_is_largest(labels_there: list[int]) -> None:
    labels = np.random.default_rng(0).choice(labels_there, (6, 7))
    grid = Grid(np.zeros((1, 6, 7, 1), np.float32), (0.1, 0.03, 0.03), 3, (1, 17, 20))
    shares = grid.enlarged(np.stack([labels == label for label in range(4)]).astype(np.float32))
    large = grid.enlarged_labels(labels)
    np.testing.assert_array_equal(large, shares.argmax(axis=0))
    assert large.shape == (17, 20)


def test_levels_do_not_depend_on_which_section_is_looked_at() -> None:
    """One window for the stack: a dim section stays dim."""
    space = Space((2, 8, 8), (0.1, 0.01, 0.01))
    pixels = np.zeros(space.shape, np.uint16)
    pixels[0, 2:6, 2:6], pixels[1, 2:6, 2:6] = 1000, 500
    levels = Grid.of(Volume(pixels, space), None).levels
    assert levels[0].max() == 255
    assert levels[1].max() == pytest.approx(127.5)
