import numpy as np
import pytest

from limner.annotations import SectionLabels
from limner.space import Space
from limner.volume import LabelMap


@pytest.fixture
def label_map():
    """Five sections, labels on the second and fourth."""
    labels = np.zeros((5, 2, 2), np.uint8)
    labels[1, 0, 0], labels[3, 1, 1] = 4, 9
    return LabelMap(labels, Space((5, 2, 2), (1, 1, 1)))


def test_sections_that_hold_a_label_are_labelled(label_map):
    labels = SectionLabels.from_label_map(label_map)
    assert labels.labelled == (1, 3)
    assert labels.unlabelled == (0, 2, 4)
    assert labels.weights.tolist() == [0, 1, 0, 1, 0]


def test_named_sections_are_labelled_whatever_they_hold(label_map):
    assert SectionLabels.from_label_map(label_map, [4, 0, 4]).labelled == (0, 4)


@pytest.mark.parametrize(("labelled", "message"), [([], "no section is labelled"), ([1, 5], "section 5"), ([-1], "-1")])
def test_wrong_sections(label_map, labelled, message):
    with pytest.raises(ValueError, match=rf"^SectionLabels\(\): .*{message}"):
        SectionLabels.from_label_map(label_map, labelled)
