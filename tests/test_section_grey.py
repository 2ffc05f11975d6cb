import numpy as np
import pytest
from scipy import ndimage

from limner.section_grey import (
    LARGEST_SIGMA,
    SAMPLED,
    Quieted,
    Smoothed,
    Smoothing,
    grey_statistics,
    margin_level,
    relative_noise,
    sigma_for,
    smoothing_to,
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


@pytest.mark.parametrize(("sigma", "wanted"), [(10.0, 0.05), (60.0, 0.3)])
def test_noise_is_brought_down_to_what_is_known(sigma, wanted):
    image = noisy(blobs(0), sigma)
    smoothing = smoothing_to(image, wanted)
    found, structures = (Smoothed(x, smoothing)[:, :] for x in (image, blobs(0)))
    assert (found - structures).std() / found.std() == pytest.approx(wanted, rel=0.1)


def test_noise_that_is_known_or_unknown_is_left():
    image = noisy(blobs(0), 10.0)
    for noise in (0.5, 0.2, 0.0, float("nan")):  # .24 is within the scatter of sections that have .2
        assert smoothing_to(image, noise).sigma == 0
    assert smoothing_to(image, 1e-3).sigma == LARGEST_SIGMA


def test_any_part_of_a_smoothed_section_is_that_of_the_whole():
    image = noisy(blobs(0, (90, 70)), 20.0)
    smooth = Smoothed(image, Smoothing(1.3))
    whole = ndimage.gaussian_filter(image.astype(np.float32), 1.3, radius=6)
    np.testing.assert_allclose(smooth[0:90, 0:70], whole, rtol=1e-5)
    for rows, columns in ((slice(0, 20), slice(50, 70)), (slice(31, 64), slice(3, 9)), (slice(80, 90), slice(0, 70))):
        np.testing.assert_allclose(smooth[rows, columns], whole[rows, columns], rtol=1e-5)
    assert smooth.shape == (90, 70)


@pytest.mark.parametrize("level", [0, 255])
def test_a_margin_keeps_its_level_and_nothing_of_it_comes_in(level):
    """Saturated pixels within the section are smoothed like the others."""
    section = noisy(blobs(0, (40, 50)), 20.0)
    section[4::9, 3::7] = level
    image = np.full((80, 90), float(level))
    image[20:60, 20:70] = section
    smooth = Smoothed(image, Smoothing(1.0, margin_level(image)))
    whole = smooth[:, :]
    outside = np.ones(image.shape, bool)
    outside[20:60, 20:70] = False
    assert (whole[outside] == level).all()
    alone = ndimage.gaussian_filter(section, 1.0, mode="constant", radius=4)
    alone /= ndimage.gaussian_filter(np.ones(section.shape), 1.0, mode="constant", radius=4)
    np.testing.assert_allclose(whole[20:60, 20:70], alone, rtol=1e-4)
    np.testing.assert_allclose(smooth[15:31, 60:77], whole[15:31, 60:77], rtol=1e-5)


def test_a_section_is_read_for_its_noise_when_its_pixels_are_asked_for():
    image, asked = noisy(blobs(0), 10.0), []

    def find():
        asked.append(1)
        return smoothing_to(image, 0.05)

    quieted = Quieted(image, find)
    assert quieted.shape == image.shape and not asked
    np.testing.assert_array_equal(quieted[3:9, 4:20], Smoothed(image, quieted.smoothing)[3:9, 4:20])
    np.testing.assert_array_equal(Quieted(image, Smoothing)[3:9, 4:20], image[3:9, 4:20])
    assert len(asked) == 1


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.15])
def test_sigma_leaves_that_share_of_white_noise(share):
    noise = np.random.default_rng(0).normal(size=(700, 700))
    left = ndimage.gaussian_filter(noise, sigma_for(share)).std()
    assert left == pytest.approx(share, rel=0.02)
    assert sigma_for(0.001) == LARGEST_SIGMA
