import numpy as np
import pytest

from limner.registration.template import find_brain, make_template, mean_intensities, paint
from limner.registration.volume_transform import AffineTransform
from limner.space import Space
from limner.volume import LabelMap, Volume

SPACE = Space((60, 50, 70), (1.0, 2.0, 1.5), (10.0, 20.0, 30.0), ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0)))


def ball(radius_mm=20.0):
    z, y, x = np.meshgrid(
        *((np.arange(n) - 30) * s for n, s in zip(SPACE.shape, SPACE.spacing, strict=True)), indexing="ij"
    )
    return z**2 + y**2 + x**2 < radius_mm**2


def test_grid_is_cropped_to_the_brain_in_multiples_of_16():
    pixels = np.where(ball(), 100.0, 0.0)
    template = make_template(Volume(pixels, SPACE), spacing_mm=2.0)
    assert template.space.shape == (32, 32, 32)  # 40 mm are 20 voxels, 3 more on each side
    assert template.space.spacing == (2.0, 2.0, 2.0)
    assert template.space.direction == SPACE.direction
    assert template.brain.sum() * 8 == pytest.approx(ball().sum() * 3, rel=0.02)
    centre = template.space.to_physical(np.argwhere(template.brain).mean(axis=0))
    np.testing.assert_allclose(centre, SPACE.to_physical((30, 30, 30)), atol=0.5)
    assert not template.brain[[0, 1, 2, -3, -2, -1]].any()


def test_intensities_are_between_0_and_1_and_0_outside():
    pixels = np.where(ball(), np.random.default_rng(0).normal(500, 50, SPACE.shape), 0)
    pixels[30, 30, 30] = 1e6
    template = make_template(Volume(pixels, SPACE), spacing_mm=1.0)
    inside = template.pixels[template.brain]
    assert inside.min() > 0
    assert inside.max() <= 1 + 1e-5
    assert 0.3 < np.median(inside) < 0.8


def test_brain_of_a_stripped_scan_and_of_one_with_noise_around_it():
    draw = np.random.default_rng(0)
    stripped = np.where(ball(), draw.normal(500, 50, SPACE.shape), 0)
    assert np.array_equal(find_brain(stripped), ball())
    noisy = np.abs(draw.normal(0, 10, SPACE.shape)) + np.where(ball(), 500, 0)
    assert np.mean(find_brain(noisy) == ball()) > 0.999


def test_what_a_brain_encloses_belongs_to_it():
    dark_inside = np.where(ball() & ~ball(8), 100, 7)
    assert np.array_equal(find_brain(dark_inside), ball())
    open_inside = dark_inside.copy()
    open_inside[30, 30, 30:] = 7  # a way out
    assert np.array_equal(find_brain(open_inside), open_inside > 7)


@pytest.mark.parametrize(
    ("spacing_mm", "found"),
    [
        (2.5, "spans 15 voxels, at least 16 are needed"),  # of 38 mm
        (40.0, "spans 0 voxels, at least 16 are needed"),
        (0.1, r"needs a grid of 5\.9e\+07 voxels, at most 5e\+07 are possible"),  # 400 x 368 x 400
    ],
)
def test_a_spacing_that_does_not_suit_the_brain(spacing_mm, found):
    head = Volume(np.where(ball(), 100.0, 0.0), SPACE)
    says = rf"^make_template\(\): spacing_mm is {spacing_mm:g}, at which the brain of 39 x 38 x 40.5 mm \(z, y, x\) "
    with pytest.raises(ValueError, match=rf"{says}{found}; give 0\.45$"):
        make_template(head, spacing_mm)
    assert max(make_template(head, 0.45).space.shape) == 96
    assert make_template(head, 2.3).brain.any()


def test_spacings_proposed_for_flat_brains():
    slab = np.zeros((20, 200, 200), np.float32)
    slab[4:16] = 1
    thick, thin = (Volume(slab, Space(slab.shape, (z, 1.0, 1.0))) for z in (2.0, 0.5))
    with pytest.raises(ValueError, match=r"brain of 24 x 200 x 200 mm \(z, y, x\) spans 12 voxels, .*; give 1\.4$"):
        make_template(thick, 2.0)
    assert make_template(thick, 1.4).brain.any()
    with pytest.raises(ValueError, match=r"give a brain that is not so flat$"):
        make_template(thin, 2.0)


def test_labels_are_painted_and_measured():
    labels = np.where(ball(10), 41, np.where(ball(), 1001, 0))
    label_map = LabelMap(labels, SPACE)
    image = paint(label_map, {41: 90.0, 1001: 60.0})
    assert np.array_equal(image, np.where(ball(10), 90, np.where(ball(), 60, 0)))
    template = make_template(Volume(image, SPACE), spacing_mm=1.0)
    means = mean_intensities(label_map, template, AffineTransform())
    assert means[41] == pytest.approx(0.95, abs=0.05)
    assert means[1001] == pytest.approx(0.15, abs=0.1)
    with pytest.raises(ValueError, match=r"^paint\(\): labels \[1001\] have no intensity; give one each"):
        paint(label_map, {41: 90.0})
