import base64
import zlib

import imageio.v3 as iio
import numpy as np

from limner.report.section_pixels import (
    MOST_PIXELS,
    grey_range,
    pack_hundredths,
    pack_image,
    pack_labels,
    pack_strokes,
    shown_size,
    surround_colour,
)


def unpack_image(text: str) -> np.ndarray:
    return iio.imread(base64.b64decode(text), extension=".jpg")


def unpack(text: str, dtype: str, size: tuple[int, int]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).reshape(size)


def test_labels_come_back_exactly():
    labels = np.random.default_rng(0).integers(0, 65536, (31, 17))
    np.testing.assert_array_equal(unpack(pack_labels(labels, (31, 17)), "<u2", (31, 17)), labels)


def test_smaller_labels_are_nearest_pixels_and_never_mixed():
    labels = np.kron([[1, 200], [30, 4]], np.ones((50, 50), int))
    np.testing.assert_array_equal(unpack(pack_labels(labels, (2, 2)), "<u2", (2, 2)), [[1, 200], [30, 4]])


def test_a_stroke_of_one_pixel_survives_where_sections_are_shown_smaller():
    strokes = np.zeros((40, 60), int)
    strokes[7, 20:50], strokes[:, 3], strokes[33, 41] = 1, 2, 300
    np.testing.assert_array_equal(unpack(pack_strokes(strokes, (40, 60)), "<u2", (40, 60)), strokes)
    expected = strokes.reshape(4, 10, 6, 10).max(axis=(1, 3))
    np.testing.assert_array_equal(unpack(pack_strokes(strokes, (4, 6)), "<u2", (4, 6)), expected)
    assert set(np.unique(expected)) == {0, 1, 2, 300}


def test_uncertainty_is_kept_to_a_hundredth_and_averaged_over_areas():
    uncertainty = np.array([[0.0, 0.5, 1.0, 1.0], [0.5, 0.2, 0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(unpack(pack_hundredths(uncertainty, (1, 2)), "u1", (1, 2)), [[30, 50]])
    np.testing.assert_array_equal(unpack(pack_hundredths(uncertainty, (2, 4)), "u1", (2, 4)), uncertainty * 100)


def test_area_mean_over_areas_that_do_not_divide_evenly_keeps_the_mean():
    row = np.arange(10, dtype=np.float32)[None] / 10
    expected = np.round([100 * row[0, a:b].mean() for a, b in ((0, 3), (3, 6), (6, 10))])
    np.testing.assert_array_equal(unpack(pack_hundredths(row, (1, 3)), "u1", (1, 3))[0], expected)


def test_image_maps_its_range_to_black_and_white():
    ramp = np.repeat(np.linspace(-100, 1100, 64)[None], 64, axis=0)
    shown = unpack_image(pack_image(ramp, (0.0, 1000.0), (64, 64))).astype(float)
    np.testing.assert_allclose(shown, np.clip(ramp / 1000, 0, 1) * 255, atol=4)


def test_eight_bit_colours_stay_as_they_are():
    section = np.full((16, 16, 3), (250, 120, 30), np.uint8)
    assert grey_range(section[None]) == (0, 255)
    np.testing.assert_allclose(unpack_image(pack_image(section, (0, 255), (16, 16))), section, atol=3)


def test_grey_range_is_that_of_the_stack_and_passes_over_nan():
    pixels = np.random.default_rng(1).normal(50, 10, (4, 100, 100))
    pixels[0, 0, :5] = np.nan
    pixels[3, 0, 0] = np.inf
    np.testing.assert_allclose(grey_range(pixels), np.percentile(pixels[np.isfinite(pixels)], (0.5, 99.5)))
    assert grey_range(np.full((2, 3, 3), np.nan)) == (0, 1)


def test_nan_and_flat_images_are_shown_black_without_a_warning():
    section = np.full((16, 16), np.nan)
    assert unpack_image(pack_image(section, (5.0, 5.0), (16, 16))).max() == 0


def test_surround_is_the_colour_of_the_corners():
    pixels = np.zeros((3, 20, 20), np.uint16)
    pixels[:, 2:-2, 2:-2] = 900
    pixels[1, 0, 0] = 900  # one speck of dirt does not tip the median
    assert surround_colour(pixels, (0, 900)) == "#000000"
    assert surround_colour(900 - pixels, (0, 900)) == "#ffffff"


def test_shown_size_keeps_the_proportions_and_the_sum_of_pixels():
    assert shown_size((10, 3000, 1500)) == (1000, 500)
    height, width = shown_size((5000, 2000, 1000))
    assert height * width * 5000 <= MOST_PIXELS * 1.01
    assert abs(height / width - 2) < 0.02
