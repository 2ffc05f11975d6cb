from pathlib import Path

import numpy as np
import pytest

from limner.space import Space
from limner.volume import Label, LabelMap, Source, Volume

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
