import numpy as np
import pytest

from limner.intensity import background_level, tissue_mask, to_8_bit


def ramp(background=0.0, low=1000.0, high=2000.0):
    """A stack on an even background with a block of tissue whose values run evenly from `low` to `high`."""
    stack = np.full((3, 40, 40), background)
    stack[:, 10:30, 10:30] = np.linspace(low, high, 3 * 400).reshape(3, 20, 20)
    return stack


def test_percentiles_of_the_tissue_become_0_and_255():
    """Tissue 1000 to 2000, background 1005, between the percentiles 1005 and 1995: 255 / 990 a grey level."""
    stack = ramp(background=1005.0)
    mask = tissue_mask(stack)
    low, high = np.percentile(stack[mask], (0.5, 99.5))
    found = to_8_bit(stack)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.clip((stack - 1005.0) / (high - 1005.0) * 255, 0, 255), atol=1e-3)
    assert low > 1005  # the background is kept distinct


def test_dark_background_stays_distinct_from_the_darkest_tissue():
    """Background 0, tissue 1000 to 2000, of which the 99.5 percentile is 1995."""
    found = to_8_bit(ramp())
    assert found[0, 0, 0] == 0
    assert found[0, 10, 10] == pytest.approx(255 * 1000 / 1995, abs=0.01)
    assert found[2, 29, 29] == 255


def test_bright_background():
    """Background 3000 is white; the 0.5 percentile of the tissue, 1005, is black."""
    stack = ramp(background=3000.0)
    np.testing.assert_array_equal(tissue_mask(stack), stack < 3000)
    found = to_8_bit(stack)
    assert found[0, 0, 0] == 255
    assert found[0, 10, 10] == 0
    assert found[1, 15, 15] == pytest.approx(255 * (stack[1, 15, 15] - 1005) / 1995, abs=0.01)


def test_outliers_do_not_stretch_the_scale():
    stack = ramp()
    stack[0, 15, 15] = 8000
    np.testing.assert_allclose(np.delete(to_8_bit(stack), 15, axis=1), np.delete(to_8_bit(ramp()), 15, axis=1), atol=2)


def test_gain_and_offset_do_not_matter():
    np.testing.assert_allclose(to_8_bit(ramp() * 7 + 30), to_8_bit(ramp()), atol=1e-2)


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 5, 6, 3)])
@pytest.mark.parametrize("value", [0, 200])
def test_constant_stack_is_0_without_tissue(shape, value):
    stack = np.full(shape, value, dtype=np.uint16)
    assert not tissue_mask(stack).any()
    assert not to_8_bit(stack).any()
    assert to_8_bit(stack).shape == shape


def test_colour_shares_one_scale_and_one_mask():
    colour = np.stack([ramp(), 0.5 * ramp(), np.zeros((3, 40, 40))], axis=-1)
    np.testing.assert_array_equal(tissue_mask(colour), ramp() > 0)
    found = to_8_bit(colour)
    np.testing.assert_allclose(found[..., 1][found[..., 0] < 255], 0.5 * found[..., 0][found[..., 0] < 255], atol=1e-3)
    assert not found[..., 2].any()


def test_background_level_is_the_median_of_the_borders():
    pixels = np.zeros((2, 9, 9, 2))
    pixels[..., 1] = 7
    pixels[:, 1:-1, 1:-1] = 100
    assert background_level(pixels).tolist() == [0, 7]


def test_hot_pixels_do_not_hide_the_tissue() -> None:
    stack = np.zeros((5, 48, 56))
    stack[:, 12:36, 14:42] = 100.0
    clean = tissue_mask(stack)
    stack[1, 5, 5] = 65535.0
    hot = tissue_mask(stack)
    assert hot.sum() == clean.sum() + 1
    assert to_8_bit(stack)[2, 20, 20] > 200
