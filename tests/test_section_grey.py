import numpy as np
import pytest
from scipy import ndimage

from limner.section_grey import (
    LARGEST_SIGMA,
    SAMPLED,
    Smoothed,
    grey_statistics,
    margin_level,
    relative_noise,
    sigma_for,
    with_noise_at_most,
)


class Watched:
    """An image that notes what is read of it."""

    def __init__(self, pixels):
        self.pixels, self.shape, self.read = pixels, pixels.shape, []

    def __getitem__(self, region):
        self.read.append(self.pixels[region].shape)
        return self.pixels[region]


def test_mean_and_deviation_of_a_large_section_from_some_of_it_in_bands():
    pixels = np.random.default_rng(0).integers(0, 255, (3001, 1300), dtype=np.uint8)
    image = Watched(pixels)
    mean, deviation = grey_statistics(image)
    some = pixels[::2, ::2].astype(float)  # 3.9 times SAMPLED pixels
    assert some.size <= 1.01 * SAMPLED
    np.testing.assert_allclose((mean, deviation), (some.mean(), some.std()))
    bands = [rows for rows, columns in image.read if columns == 1300 and rows > 1]
    assert max(bands) <= 600
    assert sum(bands) == 3001
    assert len(image.read) == len(bands) + 4  # and the four outermost lines


def test_mean_and_deviation_of_a_small_section_and_of_one_grey():
    pixels = np.random.default_rng(0).normal(50, 9, (70, 90))
    np.testing.assert_allclose(grey_statistics(pixels), (pixels.mean(), pixels.std()))
    assert grey_statistics(np.full((3, 4), 7, np.uint8))[0] == 7
    assert grey_statistics(np.full((3, 4), 7, np.uint8))[1] > 0


def blobs(seed, shape=(400, 500)):
    """Smooth structures with a deviation of 40 and hardly any noise."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 6)
    return 120 + 40 * smooth / smooth.std()


def noisy(image, sigma, seed=1):
    return image + np.random.default_rng(seed).normal(0, sigma, image.shape)


def test_relative_noise_is_that_which_was_added():
    image = blobs(0)
    assert relative_noise(image) < 0.01
    for sigma in (4.0, 12.0):
        assert relative_noise(noisy(image, sigma)) == pytest.approx(sigma / np.hypot(40, sigma), rel=0.1)


def test_a_margin_has_no_say_in_the_noise():
    inside = noisy(blobs(0), 8.0)
    moved = np.zeros((800, 900))
    moved[200:600, 200:700] = inside
    assert margin_level(moved) == 0
    assert relative_noise(moved) == pytest.approx(relative_noise(inside), rel=0.1)
    assert relative_noise(np.full((50, 60), 7)) == 0


def test_noise_is_brought_down_to_what_is_known():
    image = noisy(blobs(0), 10.0)
    found = with_noise_at_most(image, 0.05)
    assert isinstance(found, Smoothed)
    left = found[0:400, 0:500] - Smoothed(blobs(0), found.sigma)[0:400, 0:500]
    assert left.std() == pytest.approx(0.05 * image.std(), rel=0.1)
    assert with_noise_at_most(image, 0.5) is image
    assert with_noise_at_most(image, 0.0) is image
    assert with_noise_at_most(image, float("nan")) is image


def test_any_part_of_a_smoothed_section_is_that_of_the_whole():
    image = noisy(blobs(0, (90, 70)), 20.0)
    smooth = Smoothed(image, 1.3)
    whole = ndimage.gaussian_filter(image.astype(np.float32), 1.3, radius=6)
    np.testing.assert_allclose(smooth[0:90, 0:70], whole, rtol=1e-5)
    for rows, columns in ((slice(0, 20), slice(50, 70)), (slice(31, 64), slice(3, 9)), (slice(80, 90), slice(0, 70))):
        np.testing.assert_allclose(smooth[rows, columns], whole[rows, columns], rtol=1e-5)
    assert smooth.shape == (90, 70)


def test_a_margin_keeps_its_level_when_smoothed():
    image = np.zeros((80, 90))
    image[20:60, 20:70] = noisy(blobs(0, (40, 50)), 20.0).clip(1)
    smooth = Smoothed(image, 1.0, margin_level(image))[0:80, 0:90]
    assert (smooth[image == 0] == 0).all()
    assert (smooth[image != 0] != 0).all()


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.15])
def test_sigma_leaves_that_share_of_white_noise(share):
    noise = np.random.default_rng(0).normal(size=(700, 700))
    left = ndimage.gaussian_filter(noise, sigma_for(share)).std()
    assert left == pytest.approx(share, rel=0.02)
    assert sigma_for(0.001) == LARGEST_SIGMA
