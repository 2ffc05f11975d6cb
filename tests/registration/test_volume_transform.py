import numpy as np
import pytest
from scipy import ndimage

from limner.registration.volume_transform import AffineTransform, covered, resample
from limner.space import Space
from limner.volume import Label, LabelMap, Volume

A = np.deg2rad(25)
TURNED = ((np.cos(A), -np.sin(A), 0.0), (np.sin(A), np.cos(A), 0.0), (0.0, 0.0, -1.0))
OWN = Space((12, 14, 16), (2.0, 1.0, 1.5), (5.0, -3.0, 9.0), TURNED)
ONTO = Space((9, 13, 11), (1.0, 0.8, 1.2), (-2.0, 4.0, 1.0), ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)))
MOVE = AffineTransform(((0.9, 0.1, 0.0), (-0.1, 1.1, 0.05), (0.0, 0.0, 1.0)), (8.0, 2.0, -8.0))


def index_in_own(space=ONTO, move=MOVE):
    """Continuous index in `OWN` of every voxel of `space`, shape (3, Z, Y, X), voxel by voxel."""
    index = np.empty((3, *space.shape))
    for at in np.ndindex(space.shape):
        index[(slice(None), *at)] = OWN.to_index(move(space.to_physical(at)))
    return index


def test_resample_agrees_with_scipy():
    pixels = np.random.default_rng(0).normal(size=OWN.shape)
    index = index_in_own()
    within = ((index >= 0) & (index <= np.reshape(OWN.shape, (3, 1, 1, 1)) - np.ones((3, 1, 1, 1)))).all(axis=0)
    assert 0.2 < within.mean() < 0.95  # the test looks at both
    found = resample(Volume(pixels, OWN), ONTO, MOVE).pixels
    np.testing.assert_allclose(found[within], ndimage.map_coordinates(pixels, index, order=1)[within], atol=1e-5)
    labels = np.random.default_rng(1).integers(0, 3000, OWN.shape)
    nearest = resample(LabelMap(labels, OWN, {3: Label("CA1", (1, 2, 3))}), ONTO, MOVE)
    at = np.rint(index).astype(int)[:, within]
    assert np.mean(nearest.labels[within] == labels[tuple(at)]) > 0.99  # halves are rounded either way
    assert nearest.labels.dtype == labels.dtype
    assert nearest.name_of(3) == "CA1"
    assert nearest.space == ONTO


def test_covered_is_where_the_grid_lies():
    index = index_in_own()
    limits = np.reshape(OWN.shape, (3, 1, 1, 1)) - 0.5
    expected = ((index >= -0.5) & (index <= limits)).all(axis=0)
    found = covered(OWN, ONTO, MOVE)
    assert 0.2 < expected.mean() < 0.99
    assert np.mean(found == expected) > 0.99
    assert not resample(LabelMap(np.ones(OWN.shape, int), OWN), ONTO, MOVE).labels[~found].any()


def test_same_grid_is_no_change():
    pixels = np.random.default_rng(0).normal(size=OWN.shape).astype(np.float32)
    np.testing.assert_allclose(resample(Volume(pixels, OWN), OWN).pixels, pixels, atol=1e-5)


def test_noise_is_averaged_onto_a_coarser_grid():
    fine = Space((40, 40, 40), (1.0, 1.0, 1.0))
    coarse = Space((10, 10, 10), (4.0, 4.0, 4.0), (1.5, 1.5, 1.5))
    noise = np.random.default_rng(0).normal(100, 10, fine.shape)
    found = resample(Volume(noise, fine), coarse).pixels[2:-2, 2:-2, 2:-2]
    assert found.std() < 3
    assert abs(found.mean() - 100) < 1


def test_inverse_and_composition():
    points = np.random.default_rng(0).normal(0, 50, (7, 3))
    np.testing.assert_allclose(MOVE.inverse()(MOVE(points)), points, atol=1e-10)
    np.testing.assert_allclose(MOVE([1.0, 2.0, 3.0]), [0.9 + 0.2 + 8, -0.1 + 2.2 + 0.15 + 2, 3 - 8])


def test_bad_input():
    with pytest.raises(ValueError, match=r"^resample\(\): the image is in colour"):
        resample(Volume(np.zeros((*OWN.shape, 3)), OWN), ONTO)
