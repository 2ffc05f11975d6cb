import numpy as np
import pytest

from limner.distances import signed_distance, signed_distances


def blobs(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Rectangles and single pixels, some at the image border."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    for _ in range(4):
        y, x = rng.integers(0, shape[0] - 3), rng.integers(0, shape[1] - 3)
        mask[y : y + rng.integers(1, 8), x : x + rng.integers(1, 8)] = True
    return mask


def by_brute_force(mask: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """To the nearest pixel of the other kind, less half a pixel; no clipping."""
    result = np.zeros(mask.shape)
    for p in np.ndindex(mask.shape):
        others = np.argwhere(mask != mask[p])
        steps = (others - p) * spacing
        nearest = steps[np.argmin(np.hypot(*steps.T))]
        pixel = spacing[0] if nearest[1] == 0 else spacing[1] if nearest[0] == 0 else min(spacing)
        result[p] = (np.hypot(*nearest) - pixel / 2) * (1 if mask[p] else -1)
    return result


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.05, 0.05), (0.05, 0.031), (0.013, 0.07)])
def test_against_brute_force(spacing):
    mask = blobs((21, 26))
    np.testing.assert_allclose(signed_distance(mask, spacing, 100.0), by_brute_force(mask, spacing), rtol=1e-5)


@pytest.mark.parametrize("clip_pixels", [1.5, 4.0])
@pytest.mark.parametrize("spacing", [(0.05, 0.05), (0.05, 0.031)])
def test_window_does_not_change_the_result(spacing, clip_pixels):
    mask = np.zeros((60, 80), bool)
    mask[30:42, 33:41] = blobs((12, 8))  # far from the border, so that the window is smaller than the image
    clip = clip_pixels * spacing[0]
    unclipped = signed_distance(mask, spacing, 1000.0)
    clipped = signed_distance(mask, spacing, clip)
    assert clipped.min() == np.float32(-clip)
    assert unclipped.min() < -2 * clip
    np.testing.assert_array_equal(clipped, np.clip(unclipped, -np.float32(clip), np.float32(clip)))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("spacing", [(1.0, 0.25), (0.25, 1.0)])
def test_straight_border_runs_halfway_between_pixels(axis, spacing):
    """Half a pixel is that of the axis across the border, whatever the other spacing."""
    inside_from = 6
    along = np.arange(12)
    mask = np.moveaxis(np.tile(along >= inside_from, (9, 1)), 1, axis)
    expected = np.moveaxis(np.tile((along - inside_from + 0.5) * spacing[axis], (9, 1)), 1, axis)
    np.testing.assert_allclose(signed_distance(mask, spacing, 100.0), expected, rtol=1e-6)


def test_mask_and_its_complement_have_opposite_distances():
    mask = blobs((21, 26))
    for spacing in [(1.0, 1.0), (0.3, 1.0)]:
        np.testing.assert_array_equal(signed_distance(mask, spacing, 3.0), -signed_distance(~mask, spacing, 3.0))


def test_disc_has_its_radius_under_anisotropic_spacing():
    """A disc of 2 mm is 40 pixels wide and 16 high; distances are right to about half the longer side of a pixel."""
    spacing = (0.25, 0.1)
    y, x = (np.indices((31, 61)) - np.array([15, 30])[:, None, None]) * np.array(spacing)[:, None, None]
    distance = signed_distance(np.hypot(y, x) <= 2.0, spacing, 10.0)
    np.testing.assert_allclose(distance, 2.0 - np.hypot(y, x), atol=0.15)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.5, 2.0)])
def test_absent_and_full_structures(spacing):
    assert (signed_distance(np.zeros((4, 5), bool), spacing, 3.0) == -3.0).all()
    assert (signed_distance(np.ones((4, 5), bool), spacing, 3.0) == 3.0).all()


def test_every_structure_of_a_section_background_too():
    labels = np.zeros((8, 9), np.uint16)
    labels[2:5, 1:4], labels[5:, 6:] = 7, 300
    found = signed_distances(labels, [0, 300, 7, 9], (0.2, 0.1), 0.5)
    assert (found.shape, found.dtype) == ((4, 8, 9), np.float32)
    for distance, structure in zip(found, [0, 300, 7], strict=False):
        np.testing.assert_array_equal(distance > 0, labels == structure)
        np.testing.assert_array_equal(distance, signed_distance(labels == structure, (0.2, 0.1), 0.5))
    assert (found[3] == -0.5).all()
