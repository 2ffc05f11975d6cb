import tracemalloc

import numpy as np
import pytest

import limner.intensity
from limner.annotations import Scribbles
from limner.organ_maps import to_full_size
from limner.space import Space
from limner.volume import LabelMap, Volume
from limner.working_grid import Grid


def test_labels_are_the_strokes_own_and_strokes_stay_as_drawn():
    """Two classes, 0 and 7, on a grid of half the pixels; by hand."""
    space = Space((1, 2, 4), (0.1, 0.01, 0.01))
    marks = np.array([[[1, 0, 0, 0], [0, 8, 0, 0]]], np.uint8)
    strokes = Scribbles.from_marks(LabelMap(marks, space))
    grid = Grid(np.zeros((1, 1, 2, 1), np.float32), (0.1, 0.02, 0.02), 2, space.shape)
    chances = np.array([[[[1.0, 0.2]]], [[[0.0, 0.8]]]], np.float32)
    maps = to_full_size(grid, chances, np.array([[[0, 1]]]), strokes, space)
    assert maps.labels.dtype == np.uint8
    np.testing.assert_array_equal(maps.labels[0], [[0, 0, 7, 7], [0, 7, 7, 7]])
    row = [0, 0.2, 0.6, 0.8]  # linear between the middles of the two pixels
    np.testing.assert_allclose(maps.heat_maps[1][0], [row, row], atol=1e-6)
    np.testing.assert_allclose(maps.uncertainty[0], [[0, 0.2, 0.4, 0.2], [0, 0, 0.4, 0.2]], atol=1e-6)
    (organ,) = maps.organs
    assert organ.label == 7
    assert np.array([organ.volume_mm3, *organ.interval_mm3]) / 1e-5 == pytest.approx([5, 2, 5])


def test_full_size_takes_few_bytes_a_voxel(phantom, strokes_on, monkeypatch):
    """One of the labels, and what one section needs at a time; images and strokes apart."""
    monkeypatch.setattr(limner.intensity, "SAMPLED", 2**14)
    images, labels = phantom(shape=(60, 200, 200))
    strokes = strokes_on(images, labels, [1, 2])
    tracemalloc.start()
    grid = Grid.of(Volume(images.pixels, images.space), 500.0)
    marks = grid.marks(strokes)
    chances = np.stack([marks == mark for mark in (1, 2, 3)]).astype(np.float32)
    maps = to_full_size(grid, chances, np.maximum(marks, 1) - 1, strokes, images.space)
    assert sum(section.sum() for section in maps.uncertainty) > 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(np.unique(maps.labels)) == {0, 1, 2}
    assert peak < 3 * labels.size
