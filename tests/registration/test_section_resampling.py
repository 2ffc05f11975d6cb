import numpy as np
import pytest
from scipy import ndimage

from limner.registration.section_resampling import moved, small_section

SPACING = (0.1, 0.25)
IDENTITY = np.eye(2, 3)


@pytest.mark.parametrize("nearest", [False, True])
def test_a_transform_in_mm_is_that_of_scipy_in_pixels(nearest):
    rng = np.random.default_rng(0)
    section = ndimage.gaussian_filter(rng.random((40, 50)), 2)
    angle = 0.3
    matrix = np.array([[np.cos(angle), -np.sin(angle), 0.21], [np.sin(angle), np.cos(angle), -0.4]])
    found = moved(section, matrix, SPACING, (44, 46), fill=-1.0, nearest=nearest)
    step, from_middle, to_middle = np.array(SPACING), np.array([43, 45]) / 2, np.array([39, 49]) / 2
    linear = matrix[:, :2] * step / step[:, None]
    offset = to_middle - linear @ from_middle + matrix[:, 2] / step
    expected = ndimage.affine_transform(section, linear, offset, (44, 46), order=0 if nearest else 1, cval=-1.0)
    inside = (found != -1) & (expected != -1)  # scipy cuts half a pixel more at the border
    assert inside.mean() > 0.4
    np.testing.assert_allclose(found[inside], expected[inside], atol=0 if nearest else 1e-6)


def test_identity_keeps_every_type_and_colour():
    rng = np.random.default_rng(0)
    for dtype in (np.uint8, np.int16, np.uint16, np.uint32, np.float32):
        section = (rng.random((7, 9, 3)) * 250).astype(dtype)
        found = moved(section, IDENTITY, SPACING, (7, 9))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, section)


def test_integers_are_rounded_not_cut():
    section = np.array([[10, 11, 10, 11]], np.uint8)
    shift = np.array([[1.0, 0, 0], [0, 1, 0.9 * SPACING[1]]])
    assert moved(section, shift, SPACING, (1, 4))[0, :3].tolist() == [11, 10, 11]  # 10.9, 10.1, 10.9


def test_each_channel_has_its_fill():
    far = np.array([[1.0, 0, 100], [0, 1, 0]])
    assert moved(np.zeros((2, 2, 3), np.uint8), far, SPACING, (1, 1), fill=np.array([1, 2, 3])).tolist() == [
        [[1, 2, 3]]
    ]


def test_large_labels_survive():
    labels = np.array([[2**31 - 1, 2**24 + 1]], np.int32)
    np.testing.assert_array_equal(moved(labels, IDENTITY, SPACING, (1, 2), nearest=True), labels)


@pytest.mark.parametrize("shape", [(90, 120), (97, 131)])
def test_a_small_section_shows_the_same_at_the_same_place(shape):
    """A ramp in mm from the middle, whether or not the pixels divide evenly."""
    y, x = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, SPACING, strict=True))
    ramp = np.stack([y[:, None] + 0 * x, 0 * y[:, None] + x], axis=-1)
    small = small_section(ramp, SPACING, (20, 24), (0.4, 1.1), np.zeros(2))
    assert small.shape == (2, 20, 24)
    rows, columns = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip((20, 24), (0.4, 1.1), strict=True))
    inner = np.s_[2:-2, 2:-2]
    np.testing.assert_allclose(small[0][inner], np.broadcast_to(rows[:, None], (20, 24))[inner], atol=1e-4)
    np.testing.assert_allclose(small[1][inner], np.broadcast_to(columns, (20, 24))[inner], atol=1e-4)


def test_a_small_section_is_a_mean():
    """Every other pixel is bright: taking single pixels would give one or the other."""
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 100
    small = small_section(checks.astype(np.uint8), (1.0, 1.0), (10, 10), (6.0, 6.0), np.zeros(1))
    np.testing.assert_allclose(small[0, 1:-1, 1:-1], 50, atol=2)
