import numpy as np
import pytest
import SimpleITK as sitk

from limner.space import Space

# A quarter turn: index axis z runs along physical y, y along -z.
QUARTER_TURN = ((0.0, -1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))


def test_positions_of_evenly_spaced_sections():
    assert Space((3, 4, 5), (0.5, 1, 1)).section_positions.tolist() == [0, 0.5, 1]


def test_given_positions_leave_the_nominal_spacing():
    space = Space((4, 4, 5), (9, 2, 3)).with_positions([1, 1.5, 2, 4])
    assert space.spacing == (9, 2, 3)
    assert space.section_positions.tolist() == [1, 1.5, 2, 4]
    assert Space((1, 4, 5), (9, 2, 3)).with_positions([1]).spacing == (9, 2, 3)


def test_physical_position_by_hand():
    space = Space((9, 9, 9), (2, 3, 5), origin=(100, 200, 300), direction=QUARTER_TURN)
    assert space.to_physical((1, 10, 2)).tolist() == [100 - 30, 200 + 2, 300 + 10]


def test_physical_position_agrees_with_simpleitk():
    a = np.deg2rad(25)
    matrix = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])[:, [1, 2, 0]]  # x, y, z
    image = sitk.Image(7, 6, 5, sitk.sitkUInt8)
    image.SetSpacing((0.5, 2, 3))
    image.SetOrigin((10, -20, 30))
    image.SetDirection(matrix.ravel().tolist())
    direction = tuple(tuple(row) for row in matrix[::-1, ::-1].tolist())
    space = Space((5, 6, 7), (3, 2, 0.5), (30, -20, 10), direction)
    expected = image.TransformContinuousIndexToPhysicalPoint((1.5, 2, 4))
    np.testing.assert_allclose(space.to_physical((4, 2, 1.5))[::-1], expected)
    np.testing.assert_allclose(space.to_index(expected[::-1]), (4, 2, 1.5), atol=1e-12)


@pytest.mark.parametrize("spacing", [(0, 1, 1), (1, -1, 1), (1, 1, float("nan")), (1, float("inf"), 1)])
def test_spacing_must_be_positive_and_finite(spacing):
    with pytest.raises(ValueError, match=r"^Space\(\): spacing is"):
        Space((2, 2, 2), spacing)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ((0, 1), "2 section positions for 3 sections"),
        ((0, 1, 1), "section 1 is at 1.* 2 at 1"),
        ((0, 2, 1), "increase"),
    ],
)
def test_positions_must_increase(positions, message):
    with pytest.raises(ValueError, match=message):
        Space((3, 2, 2), (1, 1, 1)).with_positions(positions)
