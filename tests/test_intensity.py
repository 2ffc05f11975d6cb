import numpy as np
import pytest

from limner.intensity import background_level, estimate_noise, normalise_scan, tissue_mask, to_8_bit


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


def smooth_scan(shape, noise, seed=0):
    """Shading along every axis, bright and dark halves with an edge between them, white noise."""
    z = np.indices(shape)
    shading = sum(30 * np.sin(axis / 9) for axis in z)
    return 100.0 + shading + 200 * (z[-1] > shape[-1] // 2) + np.random.default_rng(seed).normal(0, noise, shape)


@pytest.mark.parametrize("noise", [2.0, 20.0])
@pytest.mark.parametrize("shape", [(300, 300), (40, 50, 60), (1, 300, 300)])
def test_known_noise_is_found(shape, noise):
    assert estimate_noise(smooth_scan(shape, noise)) == pytest.approx(noise, rel=0.05)


def test_noise_by_hand_is_that_of_immerkaers_mask():
    """One bright pixel: the mask's absolute values sum to 16, over 9 x 9 inner pixels of 11 x 11."""
    section = np.zeros((11, 11))
    section[5, 5] = 3
    assert estimate_noise(section) == pytest.approx(np.sqrt(np.pi / 2) * 3 * 16 / 6 / 81)


def test_noise_within_the_mask_alone():
    scan = smooth_scan((30, 40, 40), 5.0)
    scan[:, 20:] = 0  # no noise here, and a jagged edge
    mask = scan != 0
    assert estimate_noise(scan, mask) == pytest.approx(5, rel=0.05)
    assert estimate_noise(scan) < 4
    assert estimate_noise(7 * scan + 30, mask) == pytest.approx(35, rel=0.05)


@pytest.mark.parametrize(
    ("shape", "mask", "said"),
    [
        ((9, 9), np.zeros((9, 9), bool), "the mask is empty"),
        ((9, 9), np.ones((9, 8), bool), r"mask has shape \(9, 8\), pixels \(9, 9\)"),
        ((9, 9), np.eye(9, dtype=bool), "no pixel has all its neighbours"),
        ((2, 9), None, "no pixel has all its neighbours"),
    ],
)
def test_noise_of_too_little(shape, mask, said):
    with pytest.raises(ValueError, match=said):
        estimate_noise(np.zeros(shape), mask)


def test_percentiles_of_a_scan_become_0_and_1():
    scan = np.arange(101.0).reshape(1, 1, 101)
    np.testing.assert_allclose(normalise_scan(scan)[0, 0, [5, 50, 95]], [0, 0.5, 1], atol=1e-6)
    mask = scan <= 20
    np.testing.assert_allclose(normalise_scan(scan, mask)[0, 0, [1, 10, 19, 100]], [0, 0.5, 1, 2], atol=1e-6)


def test_scans_of_any_scale_become_one():
    scan = smooth_scan((20, 20, 20), 5.0)
    np.testing.assert_allclose(normalise_scan(12 * scan - 400), normalise_scan(scan), atol=1e-5)
    hot = scan.copy()
    hot[3, 4, 5] = 1e6
    np.testing.assert_allclose(np.delete(normalise_scan(hot), 3, 0), np.delete(normalise_scan(scan), 3, 0), atol=1e-3)
    assert normalise_scan(hot)[3, 4, 5] == 2


def test_a_scan_of_one_value_is_0():
    assert not normalise_scan(np.full((4, 4), 7, np.uint8)).any()
    with pytest.raises(ValueError, match=r"normalise_scan\(\): the mask is empty"):
        normalise_scan(np.ones((4, 4)), np.zeros((4, 4), bool))
