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
