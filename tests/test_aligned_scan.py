from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from limner.aligned_scan import at_voxels, place, sampled, spread
from limner.registration.template import Template
from limner.registration.volume_affine import Alignment
from limner.registration.volume_transform import AffineTransform
from limner.space import Space
from limner.volume import Volume

SHIFT = (4.0, -2.0, 6.0)  # mm, z, y, x: from the template to the scan


def scan_and_template(flip=False):
    """A ball of two levels in a scan of 1 x 1.5 x 2 mm, the template on a grid of 2 mm; and their alignment."""
    space = Space((40, 30, 24), (1.0, 1.5, 2.0), (-20.0, -22.0, -24.0))
    at = np.stack(np.meshgrid(*(np.arange(n) for n in space.shape), indexing="ij"), axis=-1)
    points = at * np.array(space.spacing) + np.array(space.origin) - np.array(SHIFT)
    radius = np.linalg.norm(points, axis=-1)
    pixels = np.where(radius < 14, np.where(points[..., 2] > 0, 200.0, 100.0), 0.0)
    pixels += np.where(radius < 14, np.random.default_rng(0).normal(0, 2, pixels.shape), 0)
    if flip:
        pixels = pixels[:, :, ::-1]
        space = replace(
            space, origin=(-20.0, -22.0, -24.0 + 2 * 23), direction=((1.0, 0, 0), (0, 1.0, 0), (0, 0, -1.0))
        )
    grid = Space((16, 16, 16), (2.0, 2.0, 2.0), (-15.0, -15.0, -15.0))
    template = Template(np.ones(grid.shape, np.float32), grid)
    return Volume(pixels, space), template, Alignment(AffineTransform(shift=SHIFT), 1.0, 1.0)


@pytest.mark.parametrize("flip", [False, True])
def test_the_scan_lies_where_the_template_does(flip):
    volume, template, alignment = scan_and_template(flip)
    placed = place(volume, alignment, template)
    assert placed.inside[8, 8, 8] and not placed.inside[0, 0, 0]
    # bright on the side of larger x, whichever way the scan's own axis runs
    assert placed.image[8, 8, 11] > 0.8 and placed.image[8, 8, 4] < 0.2
    assert placed.image[~placed.inside].max() == placed.image[~placed.inside].min() == 0
    assert placed.noise == pytest.approx(2, rel=0.4)
    assert placed.scale == pytest.approx(1 / 100, rel=0.1)


@pytest.mark.parametrize("flip", [False, True])
def test_maps_come_back_to_the_voxels_of_the_brain(flip):
    volume, template, alignment = scan_and_template(flip)
    placed = place(volume, alignment, template)
    x = torch.arange(16.0).expand(16, 16, 16) * 2 - 15  # mm
    found = spread(at_voxels(x[None], template.space, placed)[0].numpy(), placed.brain)
    at = np.argwhere(placed.brain)
    steps = np.array(volume.space.direction) @ np.diag(volume.space.spacing)
    true = at @ steps.T[:, 2] + volume.space.origin[2] - SHIFT[2]
    assert found[placed.brain] == pytest.approx(true, abs=1e-3)
    assert (found[~placed.brain] == 0).all()


def test_what_lies_outside_the_field_of_view_is_unknown():
    volume, template, alignment = scan_and_template()
    cut = Volume(volume.pixels[:25], replace(volume.space, shape=(25, 30, 24)))
    placed = place(cut, alignment, template)
    assert not placed.known[-1].any() and placed.known[0].all()
    assert placed.inside[~placed.known].sum() == 0


def test_interpolation_is_that_of_scipy():
    generator = np.random.default_rng(1)
    maps = generator.normal(size=(2, 5, 6, 7)).astype(np.float32)
    indices = generator.uniform(-1, 7, (50, 3))
    expected = [ndimage.map_coordinates(m, indices.T, order=1, mode="nearest") for m in maps]
    assert sampled(torch.from_numpy(maps), indices).numpy() == pytest.approx(np.stack(expected), abs=1e-4)


def test_faults_are_told():
    volume, template, alignment = scan_and_template()
    away = replace(alignment, transform=AffineTransform(shift=(500.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match=r"place\(\): nothing of the brain lies on the template's grid"):
        place(volume, away, template)
    flat = Volume(np.where(volume.pixels > 0, 7.0, 0.0), volume.space)
    with pytest.raises(ValueError, match="the brain shows the grey level 7 alone"):
        place(flat, alignment, template)
