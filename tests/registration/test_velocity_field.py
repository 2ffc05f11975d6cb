from dataclasses import replace

import numpy as np
import pytest
import torch

from limner.registration.velocity_field import Options, Registration, _as_batch, exponential, register, smooth
from limner.registration.warp import compose

SHAPE = (96, 112)
SPACING = (0.05, 0.05)
# The default stiffness suits chains of neighbouring sections; large local deformations want less (see Options).
SOFT = Options(stiffness=1.0)


def in_pixels(displacement, spacing=SPACING):
    return displacement.numpy() / np.array(spacing)[:, None, None]


def rotated_and_shifted(displacement, degrees, shift):
    """The displacement (pixels) that follows a first one, then a rotation about the centre, then a shift."""
    points = np.indices(displacement.shape[1:]) - (np.array(displacement.shape[1:]) - 1)[:, None, None] / 2
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turned = np.einsum("ij,jyx->iyx", [[cos, -sin], [sin, cos]], points + displacement)
    return turned + np.array(shift)[:, None, None] - points


@pytest.fixture(scope="module")
def pairs(make_phantom, smooth_warp, sampled):
    """Three pairs: warped; warped, turned by 25 degrees and shifted; empty. Fixed, moving, truth (pixels), inside."""
    bend = smooth_warp(SHAPE, 4.0)
    truth = [bend, rotated_and_shifted(bend, 25, (6, -8)), np.zeros_like(bend)]
    moving, inside = zip(*(make_phantom(SHAPE, seed) for seed in range(3)), strict=True)
    fixed = [sampled(m, u) for m, u in zip(moving, truth, strict=True)]
    fixed[2] = np.full(SHAPE, 7.0)
    inside = [sampled(i.astype(float), u) > 0.5 for i, u in zip(inside, truth, strict=True)]
    return np.array(fixed), np.array(moving), np.array(truth), np.array(inside)


@pytest.fixture(scope="module")
def registered(pairs):
    with pytest.warns(UserWarning, match=r"^register\(\): pairs \[2\] hold an empty or constant section"):
        return register(pairs[0], pairs[1], SPACING, options=SOFT)


def endpoint_error(found, truth, inside):
    """Mean over the object, pixels."""
    return float(np.hypot(*(found - truth))[inside].mean())


@pytest.mark.parametrize("pair", [0, 1])
def test_register_recovers_a_known_warp(pairs, registered, pair):
    """To under half a pixel on average: a third of a pixel of the finest level, which is reduced 112 / 68 times."""
    _, _, truth, inside = (x[pair] for x in pairs)
    error = endpoint_error(in_pixels(registered.displacement[pair]), truth, inside)
    assert error < 0.5
    assert endpoint_error(0 * truth, truth, inside) > 2.5  # no registration
    if pair == 1:  # nor would a rotation and shift alone do
        placed = rotated_and_shifted(0 * truth, 25, (6, -8))
        assert endpoint_error(placed, truth, inside) > 4 * error


def test_default_stiffness_follows_a_warp_over_half_way(pairs):
    """It holds back large local deformations on purpose, but still leaves less than half of the error."""
    fixed, moving, truth, inside = (x[0] for x in pairs)
    found = register(fixed, moving, SPACING)
    error = endpoint_error(in_pixels(found.displacement[0]), truth, inside)
    assert error < 1.0
    assert error < 0.4 * endpoint_error(0 * truth, truth, inside)
    soft = register(fixed, moving, SPACING, options=SOFT)
    assert found.jacobian_determinants().std() < 0.6 * soft.jacobian_determinants().std()


def test_moved_image_resembles_the_fixed_one(pairs, registered):
    fixed, moving, _, inside = pairs
    moved = registered.warp(moving)
    for n in range(2):
        before = np.corrcoef(fixed[n][inside[n]], moving[n][inside[n]])[0, 1]
        after = np.corrcoef(fixed[n][inside[n]], moved[n][inside[n]])[0, 1]
        assert after > 0.95
        assert before < 0.85


def test_there_and_back_is_the_identity(registered):
    """Within 0.1 pixel, at pixels whose match lies inside the other image by a margin."""
    there, back = registered.displacement, registered.inverse_displacement
    for first, second in ((there, back), (back, there)):
        loop = np.hypot(*np.moveaxis(in_pixels(compose(first, second, SPACING)), 1, 0))
        points = np.indices(SHAPE) + in_pixels(first)
        margin = 6  # pixels; there the velocity is smoothed against zero
        limits = np.array(SHAPE)[:, None, None] - 1 - margin
        inside = ((points >= margin) & (points <= limits)).all(axis=1)
        assert inside[:, 40:60, 40:60].all()
        assert loop[inside].max() < 0.1
    swapped = registered.inverse()
    assert swapped.displacement is back
    assert swapped.inverse_displacement is there


def test_nothing_folds(registered):
    determinants = registered.jacobian_determinants()
    assert determinants.shape == (3, *SHAPE)
    assert determinants.min() > 0.3
    assert determinants[:2].std() > 0.02  # it is no mere rotation


def test_empty_section_stays_in_place_and_spoils_nothing(pairs, registered):
    assert registered.matched == (True, True, False)
    assert registered.displacement.isfinite().all()
    assert registered.inverse_displacement.isfinite().all()
    assert registered.displacement[2].abs().max() == registered.inverse_displacement[2].abs().max() == 0
    np.testing.assert_allclose(registered.warp(pairs[1])[2], pairs[1][2], atol=1e-6)


def test_batch_gives_what_single_pairs_give(pairs):
    """After a few steps: over many, sums in another order part the two by some hundredths of a pixel."""
    few = Options(stiffness=1.0, steps=4)
    with pytest.warns(UserWarning, match="hold an empty or constant section"):
        together = register(pairs[0], pairs[1], SPACING, options=few)
    alone = register(pairs[0][1], pairs[1][1], SPACING, options=few)
    assert (alone.matched, alone.displacement.shape) == ((True,), (1, 2, *SHAPE))
    assert np.abs(in_pixels(alone.displacement[0])).max() > 0.5
    difference = in_pixels(alone.displacement[0] - together.displacement[1])
    assert np.abs(difference).max() < 0.002


@pytest.mark.parametrize("value", [0.0, 5.0, np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_pairs_that_cannot_be_registered(make_phantom, value, side):
    image, _ = make_phantom((40, 48))
    both = [image, image]
    both[side] = image.copy()
    both[side][() if np.isfinite(value) else (20, 20)] = value
    with pytest.warns(UserWarning, match=r"pairs \[0\] hold an empty or constant section, or NaN"):
        found = register(*both, SPACING, options=Options(steps=2))
    assert found.matched == (False,)
    assert found.displacement.abs().max() == found.inverse_displacement.abs().max() == 0


@pytest.mark.parametrize(("dtype", "scale", "offset"), [(np.uint8, 250, 0), (np.uint16, -60000, 65000)])
def test_intensity_scale_is_free(make_phantom, sampled, dtype, scale, offset):
    """Bright objects on dark as well as dark ones on bright, each image on its own scale."""
    moving, inside = make_phantom((64, 72))
    shift = np.stack([np.full((64, 72), 3.0), np.full((64, 72), -4.0)])
    found = register((scale * sampled(moving, shift) + offset).astype(dtype), moving, SPACING)
    assert endpoint_error(in_pixels(found.displacement[0]), shift, sampled(inside.astype(float), shift) > 0.5) < 0.15


def test_millimetres_follow_the_spacing(pairs):
    """The same pixels, twice as far apart along y: y components double in mm, x components stay."""
    fixed, moving = pairs[0][0], pairs[1][0]
    square = register(fixed, moving, (0.05, 0.05), options=replace(SOFT, start="none")).displacement
    tall = register(fixed, moving, (0.1, 0.05), options=replace(SOFT, start="none")).displacement
    assert square[:, 0].abs().max() > 0.1
    torch.testing.assert_close(tall[:, 0], 2 * square[:, 0], atol=2e-3, rtol=0)
    torch.testing.assert_close(tall[:, 1], square[:, 1], atol=1e-3, rtol=0)


def test_rotation_is_one_of_millimetres(make_phantom, sampled):
    """An object turned by 20 degrees in space, imaged with pixels twice as long along y as along x."""
    spacing, shape = (0.1, 0.05), (64, 120)
    moving, inside = make_phantom(shape)
    points_mm = (np.indices(shape) - (np.array(shape) - 1)[:, None, None] / 2) * np.array(spacing)[:, None, None]
    cos, sin = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
    truth_mm = np.einsum("ij,jyx->iyx", [[cos, -sin], [sin, cos]], points_mm) - points_mm
    fixed = sampled(moving, truth_mm / np.array(spacing)[:, None, None])
    found = register(fixed, moving, spacing, options=Options(start="rigid"))
    error_mm = np.hypot(*(found.displacement[0].numpy() - truth_mm))[inside]
    assert error_mm.mean() < 0.02
    assert np.hypot(*truth_mm)[inside].mean() > 0.3


def test_rgb_uses_every_channel(make_phantom, sampled):
    """Texture in the third channel alone; the first two are the same flat colour in both images."""
    moving, inside = make_phantom((64, 72))
    shift = np.stack([np.full((64, 72), 4.0), np.full((64, 72), 3.0)])
    rgb = np.zeros((2, 1, 64, 72, 3))
    rgb[..., 0] = 0.9
    rgb[0, 0, ..., 2], rgb[1, 0, ..., 2] = sampled(moving, shift), moving
    found = register(rgb[0], rgb[1], SPACING)
    covered = sampled(inside.astype(float), shift) > 0.5
    assert endpoint_error(in_pixels(found.displacement[0]), shift, covered) < 0.15
    moved = found.warp(rgb[1])
    assert moved.shape == (1, 64, 72, 3)
    assert np.abs(moved - rgb[0])[0, covered].mean() < 0.02


@pytest.mark.parametrize("start", ["none", "rigid", "affine"])
def test_an_image_stays_on_itself(make_phantom, start):
    """To 0.2 pixels: the noise variance in local correlation favours a little more contrast in the moved image."""
    image, inside = make_phantom((48, 56))
    found = register(image, image, SPACING, options=Options(start=start))
    displacement = np.hypot(*in_pixels(found.displacement[0]))
    assert displacement.max() < 0.2
    assert displacement[inside].mean() < 0.05


def shifted(pixels_y, pixels_x, shape=(6, 8)):
    displacement = torch.zeros(1, 2, *shape)
    displacement[:, 0], displacement[:, 1] = pixels_y * SPACING[0], pixels_x * SPACING[1]
    return Registration(displacement, -displacement, SPACING, (True,))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_labels_keep_their_values_and_are_zero_outside(dtype):
    labels = np.random.default_rng(0).choice(np.array([0, 7, 200]), (1, 6, 8)).astype(dtype)
    if dtype == np.int32:
        labels[labels == 200] = 614454277  # an id of the Allen atlas, beyond what float32 holds
    found = shifted(2, -3).warp_labels(labels)
    assert found.dtype == dtype
    expected = np.zeros_like(labels)
    expected[:, :4, 3:] = labels[:, 2:, :5]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(shifted(0.4, 0.4).warp_labels(labels), labels)  # nearest, not mixed
    np.testing.assert_array_equal(shifted(2, -3).coverage()[0], np.pad(np.ones((4, 5), bool), ((0, 2), (3, 0))))


def test_a_single_pair_may_come_without_its_axis():
    image = np.arange(48).reshape(6, 8)
    registration = shifted(0, 2)
    np.testing.assert_array_equal(registration.warp(image), registration.warp(image[None])[0])
    labels = registration.warp_labels(image)
    np.testing.assert_array_equal(labels, registration.warp_labels(image[None])[0])
    assert labels.shape == (6, 8)


def test_tensors_stay_where_they_are():
    """Numpy cannot see a tensor on a GPU; the meta device stands for one."""
    for shape in ((2, 32, 32), (2, 32, 32, 3)):
        assert _as_batch(torch.zeros(shape, device="meta"), "fixed").device.type == "meta"


def test_warped_images_continue_at_the_border():
    image = np.arange(48.0).reshape(1, 6, 8)
    found = shifted(0, 2.5).warp(image)
    np.testing.assert_allclose(found[0, :, :5], image[0, :, 2:7] + 0.5, rtol=1e-6)
    np.testing.assert_allclose(found[0, :, 6:], image[0, :, 7:].repeat(2, axis=1), rtol=1e-6)


def test_errors():
    image = np.random.default_rng(0).random((2, 32, 32))
    for fixed, moving, spacing, message in [
        (image, image[:, :30], SPACING, r"fixed is \(2, 1, 32, 32\), moving \(2, 1, 30, 32\).*pad to one size"),
        (image, image[:1], SPACING, r"pad to one size"),
        (image, image, (0.1, 0.0), r"spacing is \(0.1, 0.0\) mm"),
        (image, image, (-0.1, 0.1), r"both must be above 0"),
        (image[..., None], image[..., None], SPACING, r"fixed has shape \(2, 32, 32, 1\)"),
        (image[0, 0], image[0, 0], SPACING, r"fixed has shape \(32,\)"),
        (image[..., :3], image[..., :3], SPACING, r"fixed has shape \(2, 32, 3\); .* for RGB, \(pairs, y, x, 3\)"),
    ]:
        with pytest.raises(ValueError, match=r"^register\(\): .*" + message):
            register(fixed, moving, spacing)
    for call in (shifted(0, 0).warp, shifted(0, 0).warp_labels):
        with pytest.raises(ValueError, match=r"images have shape \(1, 6, 9\), the registration \(1, 6, 8\)"):
            call(np.zeros((1, 6, 9)))


def test_sections_too_small_for_the_coarse_levels():
    image = np.zeros((6, 9))
    image[2:4, 3:6] = 1
    found = register(image, image, SPACING)
    assert found.matched == (True,)
    assert found.displacement.isfinite().all()


def shrinks(options, shape):
    return [shrink for shrink, _, _ in options.stages(shape)]


def test_levels_halve_and_stop_before_they_are_too_small():
    assert shrinks(Options(finest_pixels=64, levels=2), (256, 128)) == [8.0, 4.0]
    assert shrinks(Options(finest_pixels=64, levels=3), (256, 128)) == [8.0, 4.0]  # 16 would leave 8 pixels
    assert shrinks(Options(finest_pixels=64, levels=3), (256, 256)) == [16.0, 8.0, 4.0]
    assert shrinks(Options(finest_pixels=64, levels=2), (40, 50)) == [2.0, 1.0]  # never enlarged


def test_narrow_windows_allow_coarser_levels_and_a_last_one_is_finer():
    options = Options(finest_pixels=64, levels=3, steps=30, window=9, narrowing=2, last_steps=15)
    assert options.stages((256, 128)) == [(16.0, 5, 30), (8.0, 7, 30), (4.0, 9, 30), (2.0, 11, 15)]
    assert options.stages((50, 60)) == [(4.0, 5, 30), (2.0, 7, 30), (1.0, 9, 30)]  # never enlarged
    assert options.stages((80, 80))[-1] == (1.0, 11, 15)


def test_options_for_distant_pairs_come_nearer_to_a_large_warp(pairs):
    """Than stiff ones for chains, and to half a pixel as soft ones do."""
    fixed, moving, truth, inside = (x[1] for x in pairs)
    direct, chained = (register(fixed, moving, SPACING, options=o) for o in (Options.direct(), Options()))
    errors = [endpoint_error(in_pixels(found.displacement[0]), truth, inside) for found in (direct, chained)]
    assert errors[0] < 0.5 < errors[1]
    assert direct.jacobian_determinants().min() > 0.3


@pytest.mark.parametrize("window", [3, 5])
def test_smooth_is_two_box_filters_with_zeros_beyond(window):
    field = torch.rand(2, 2, 11, 14, generator=torch.Generator().manual_seed(0))
    expected = field
    for _ in range(2):
        expected = torch.nn.functional.avg_pool2d(expected, window, stride=1, padding=window // 2)
    torch.testing.assert_close(smooth(field, window), expected)


SPACE = (0.2, 0.05)


def test_exponential_of_a_constant_velocity_is_that_shift():
    velocity = torch.zeros(1, 2, 9, 11)
    velocity[:, 0], velocity[:, 1] = 0.3, -0.12
    torch.testing.assert_close(exponential(velocity, SPACE), velocity)


@pytest.mark.parametrize("rate", [0.4, -0.5])
def test_exponential_of_a_linear_velocity(rate):
    """v = a p moves p to exp(a) p; about the centre, where no path leaves the grid."""
    y, x = ((np.indices((41, 61)) - np.array([20, 30])[:, None, None]) * np.array(SPACE)[:, None, None]).astype("f4")
    points = torch.from_numpy(np.stack([y, x]))[None]
    found = exponential(rate * points, SPACE)
    middle = np.s_[..., 10:31, 15:46]
    torch.testing.assert_close(found[middle], ((np.exp(rate) - 1) * points)[middle], rtol=0.01, atol=1e-5)


def test_exponential_of_a_rotation():
    """v = w (-x, y) turns by w radians; a velocity of rotation in mm, on pixels that are not square."""
    rows, columns = (torch.arange(41.0) - 20) * 0.3, (torch.arange(121.0) - 60) * 0.1
    points = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]
    y, x = points[:, 0], points[:, 1]
    turn = 0.5
    found = exponential(turn * torch.stack([-x, y], dim=1), (0.3, 0.1))
    cos, sin = np.cos(turn), np.sin(turn)
    expected = torch.stack([cos * y - sin * x, sin * y + cos * x], dim=1) - points
    middle = np.s_[..., 12:29, 36:85]
    assert (found[middle] - expected[middle]).abs().max() < 0.02  # of up to 1.7 mm
    assert expected[middle].abs().max() > 1


def test_exponential_of_the_opposite_velocity_is_the_inverse(smooth_warp):
    pixels = torch.from_numpy(smooth_warp((60, 70), 5.0)).float()[None]
    velocity = pixels * torch.tensor(SPACE).view(1, 2, 1, 1)
    there, back = exponential(velocity, SPACE), exponential(-velocity, SPACE)
    loop = in_pixels(compose(there, back, SPACE)[0], SPACE)
    assert np.abs(loop).max() < 0.1
    naive = in_pixels(compose(there, -there, SPACE)[0], SPACE)  # minus the displacement is no inverse
    assert np.abs(naive[:, 10:-10, 10:-10]).max() > 0.5


def test_smooth_is_about_a_gaussian_of_two_pixels():
    impulse = torch.zeros(1, 1, 21, 21)
    impulse[..., 10, 10] = 1
    kernel = smooth(impulse)[0, 0].numpy()
    offsets = np.arange(21) - 10
    assert kernel.sum() == pytest.approx(1)
    assert (kernel.sum(axis=1) * offsets**2).sum() == pytest.approx(2 * (5**2 - 1) / 12)
