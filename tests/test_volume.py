from pathlib import Path

import numpy as np
import pytest

from limner.space import Space
from limner.volume import Label, LabelMap, MadeSections, Source, Volume

SPACE = Space((2, 3, 4), (1, 1, 1))


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 3)])
def test_grey_and_rgb(shape):
    assert Volume(np.zeros(shape), SPACE).pixels.shape == shape


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 4), (2, 3, 4, 1), (1, 2, 3, 4, 3)])
def test_other_layouts_are_refused(shape):
    with pytest.raises(ValueError, match=r"give \(z, y, x\) for grey or \(z, y, x, 3\) for RGB"):
        Volume(np.zeros(shape), SPACE)


def test_pixels_and_space_agree():
    with pytest.raises(ValueError, match=r"shape \(2, 3, 5\), the space \(2, 3, 4\)"):
        Volume(np.zeros((2, 3, 5)), SPACE)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 5\), the space \(2, 3, 4\)"):
        LabelMap(np.zeros((2, 3, 5), int), SPACE)


def test_labels_are_integers():
    with pytest.raises(ValueError, match="dtype float64; labels must be integers"):
        LabelMap(np.zeros((2, 3, 4)), SPACE)


def test_names():
    assert Volume(np.zeros((2, 3, 4)), SPACE).section_names == ("0", "1")
    source = Source("folder", Path("stack"), ".png", names=("a.png", "b.png"))
    assert Volume(np.zeros((2, 3, 4)), SPACE, source).section_names == ("a.png", "b.png")
    label_map = LabelMap(np.zeros((2, 3, 4), int), SPACE, {1: Label("CA1", (1, 2, 3))})
    assert (label_map.name_of(1), label_map.name_of(2)) == ("CA1", "label 2")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_labels_that_are_present(dtype):
    labels = np.zeros((2, 3, 4), dtype)
    labels[0, 1, 1], labels[1, 2, 3], labels[1, 0, 0] = 7, 3, np.iinfo(dtype).max
    assert LabelMap(labels, SPACE).present == (0, 3, 7, np.iinfo(dtype).max)
    assert LabelMap(np.full((2, 3, 4), 5, dtype), SPACE).present == (5,)


def test_made_sections_are_made_one_at_a_time_and_not_kept():
    asked = []

    def make(z):
        asked.append(z)
        return np.full((3, 4), z, np.float32)

    sections = MadeSections((2, 3, 4), make)
    assert (len(sections), sections.dtype, asked) == (2, np.float32, [])
    assert [section.max() for section in sections] == [0, 1]
    sections[1]
    assert asked == [0, 1, 1]
    np.testing.assert_array_equal(np.asarray(sections), np.broadcast_to([[[0.0]], [[1.0]]], (2, 3, 4)))
    for outside in (2, -1):
        with pytest.raises(IndexError, match=f"section {outside} is asked for; there are 0 to 1"):
            sections[outside]
    with pytest.raises(ValueError, match="always a copy"):
        np.asarray(sections, copy=False)
