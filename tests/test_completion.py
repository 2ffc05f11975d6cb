import numpy as np
import pytest

from limner.completion import (
    Completion,
    SectionResult,
    Size,
    areas,
    pixels_between,
    suggest_sections,
    volumes,
)
from limner.space import Space
from limner.volume import LabelMap


def test_suggestions_are_uncertain_inside_structures_and_apart():
    means = np.array([0.9, 0.1, 0.5, 0.6, 0.4, 0.2, 0.3, 0.0], dtype=np.float32)
    labels = np.zeros((8, 2, 2), int)
    labels[:, 0] = 5
    uncertainty = np.where(labels > 0, means[:, None, None], 0)
    uncertainty[5, 1] = 9.0  # background does not count
    assert suggest_sections(uncertainty, labels, [0]) == (3, 6, 1)  # 0 is labelled; 2 and 4 lie beside 3, 5 beside 6
    assert suggest_sections(uncertainty, labels, range(7)) == ()  # 7 is certain
    assert suggest_sections(uncertainty, np.zeros_like(labels), [0]) == ()


def test_pixels_between_are_those_that_are_likely_enough():
    """Columns are pixels; the interval of 90 % counts from .95 and from .05 on."""
    chances = np.array([[0.96, 0.94, 0.5, 0.04, 0.01], [0.03, 0.04, 0.3, 0.9, 0.02], [0.01, 0.02, 0.2, 0.06, 0.97]])
    assert pixels_between(chances[:, None]).tolist() == [[1, 0, 1], [3, 1, 1], [3, 2, 3]]
    assert pixels_between(chances[:, None], share=0.5).tolist() == [[2, 1, 1], [3, 1, 1], [3, 2, 1]]


def completed():
    """Four sections of 2 x 2 pixels of .5 x .2 mm at 0, 1, 3 and 4 mm; the first and last are labelled."""
    labels = np.array([[[1, 1], [0, 0]], [[1, 0], [0, 0]], [[1, 2], [0, 0]], [[2, 2], [2, 0]]])
    space = Space((4, 2, 2), (1.0, 0.5, 0.2), positions=(0.0, 1.0, 3.0, 4.0))
    nothing = np.zeros((2, 2), np.float32)

    def result(z, structures, areas):
        structures, areas = np.array(structures), np.array(areas)
        return SectionResult(labels[z].astype(np.int32), nothing, structures, areas, None, [], 0.0, 0.0, 0.0)

    sections = {
        1: result(1, [0, 1, 2], [[2, 0, 0], [3, 1, 0], [4, 2, 0]]),
        2: result(2, [0, 1, 2], [[1, 1, 0], [2, 1, 1], [3, 1, 2]]),
    }
    return Completion(LabelMap(labels, space), np.zeros(labels.shape, np.float32), sections, (), {}, {}, ())


def test_areas_of_each_section():
    found = areas(completed())
    assert found[0] == [Size(1, pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.2))]
    assert found[1] == [Size(1, pytest.approx(0.1), 0.0, pytest.approx(0.2))]  # 2 cannot be there
    assert found[2] == [
        Size(1, pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1)),
        Size(2, pytest.approx(0.1), 0.0, pytest.approx(0.2)),
    ]
    assert [size.structure for size in found[3]] == [2]


def test_volumes_take_half_the_way_to_either_neighbour():
    """Sections stand for 1, 1.5, 1.5 and 1 mm."""
    one, two = volumes(completed())
    assert (one.structure, two.structure) == (1, 2)
    assert one.likeliest == pytest.approx(0.2 * 1 + 0.1 * 1.5 + 0.1 * 1.5)
    assert (one.fewest, one.most) == (pytest.approx(0.2 + 0 + 0.15), pytest.approx(0.2 + 0.3 + 0.15))
    assert two.likeliest == pytest.approx(0.1 * 1.5 + 0.3 * 1)
    assert (two.fewest, two.most) == (pytest.approx(0.3), pytest.approx(0.3 + 0.3))
