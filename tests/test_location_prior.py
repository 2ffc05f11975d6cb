import numpy as np
import pytest
from scipy import ndimage

from limner.location_prior import label_frequencies

ONE_MM = (1.0, 1.0, 1.0)


def test_frequencies_by_hand():
    """Of four maps one has label 2 in the first voxel; in the second two of the three known ones have label 1."""
    labels = [np.array([[[n, m]]]) for n, m in ((2, 1), (0, 1), (0, 0), (0, 2))]
    known = [None, None, None, np.array([[[True, False]]])]
    found = label_frequencies(zip(labels, known, strict=True), 3, ONE_MM, sigma_mm=0, floor=0.01)
    expected = np.array([[3 / 4, 1 / 3], [0, 2 / 3], [1 / 4, 0]]) * (1 - 3 * 0.01) + 0.01
    np.testing.assert_allclose(found[:, 0, 0], expected, atol=1e-6)
    assert found.dtype == np.float32


def test_smoothing_is_in_mm_and_loses_nothing_at_the_border():
    labels = np.zeros((9, 21, 15), int)
    labels[4, 10, 7] = 1
    spacing = (3.0, 1.0, 2.0)
    found = label_frequencies([(labels, None)], 2, spacing, sigma_mm=2.0, floor=1e-6)
    spread = ndimage.gaussian_filter((labels == 1).astype(float), [2 / 3, 2.0, 1.0], mode="constant")
    np.testing.assert_allclose(found[1, 2:-2, 8:-8, 4:-4], spread[2:-2, 8:-8, 4:-4], atol=1e-5)
    everywhere = label_frequencies([(np.ones((9, 21, 15), int), None)], 2, spacing, sigma_mm=2.0, floor=1e-6)
    np.testing.assert_allclose(everywhere[1], 1, atol=1e-5)  # no background comes in from outside


def test_every_label_has_some_chance_and_all_sum_to_1():
    labels = np.random.default_rng(0).integers(0, 5, (6, 7, 8))
    found = label_frequencies([(labels, None)], 40, ONE_MM)
    assert found.shape == (40, 6, 7, 8)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-6)
    assert found.min() >= 1e-4 * (1 - 1e-5)
    assert np.isfinite(np.log(found)).all()


def test_what_lies_outside_the_field_of_view_is_filled_by_others_or_is_background():
    known = np.ones((1, 1, 40), bool)
    known[..., 20:] = False
    labels = np.where(known, 1, 0)
    found = label_frequencies([(labels, known)], 2, ONE_MM, sigma_mm=1.0)
    assert found[1, 0, 0, 19] > 0.99  # not diluted by what is unknown beside it
    assert found[0, 0, 0, 39] > 0.99
    both = label_frequencies([(labels, known), (np.ones((1, 1, 40), int), None)], 2, ONE_MM, sigma_mm=1.0)
    assert both[1].min() > 0.99


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([], "there is no label map"),
        ([np.zeros((1, 2, 2), int), np.zeros((1, 2, 3), int)], r"map 1 has shape \(1, 2, 3\), the first \(1, 2, 2\)"),
        ([np.full((1, 2, 2), 3)], "map 0 has labels from 3 to 3; give 0 to 2"),
        ([np.full((1, 2, 2), -1)], "map 0 has labels from -1 to -1; give 0 to 2"),
    ],
)
def test_bad_maps(maps, message):
    with pytest.raises(ValueError, match=rf"^label_frequencies\(\): {message}"):
        label_frequencies([(labels, None) for labels in maps], 3, ONE_MM)


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_bad_floor(floor):
    with pytest.raises(ValueError, match=r"^label_frequencies\(\): floor is 0.*; give one above 0 and below 1 / 2$"):
        label_frequencies([(np.zeros((1, 1, 1), int), None)], 2, ONE_MM, floor=floor)
