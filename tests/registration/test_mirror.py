import numpy as np
import pytest
import torch
from scipy import ndimage

from limner.registration.mirror import Column, along, carried, fit_reflection, reflection, section_points

POSITIONS = torch.tensor([0.0, 0.1, 0.3, 0.35, 0.6])
SPACING = (0.1, 0.2)


def test_along_is_interpolation_of_indices():
    z = torch.linspace(-0.2, 0.8, 37).view(1, 37)
    expected = np.interp(z.numpy(), POSITIONS.numpy(), np.arange(5))
    np.testing.assert_allclose(along(POSITIONS, z).numpy(), expected, atol=1e-5)
    assert along(POSITIONS[:1], z).abs().max() == 0


def test_column_reads_between_pixels_and_uneven_sections():
    generator = torch.Generator().manual_seed(0)
    column = Column(torch.rand(5, 2, 6, 7, generator=generator), POSITIONS, SPACING)
    points = torch.rand(3, 4, 3, generator=generator) - 0.5  # some beyond the border
    z = np.interp(points[0].numpy() + 0.5, POSITIONS.numpy(), np.arange(5))
    y, x = (points[i].numpy() / s + (n - 1) / 2 for i, n, s in ((1, 6, 0.1), (2, 7, 0.2)))
    shifted = torch.cat([points[:1] + 0.5, points[1:]])
    for read, values in zip(column.at(shifted), column.values.transpose(0, 1), strict=True):
        expected = ndimage.map_coordinates(values.numpy(), [z, y, x], order=1, mode="nearest")
        np.testing.assert_allclose(read.numpy(), expected, atol=1e-5)


def test_column_holds_what_is_on_its_canvas():
    column = Column(torch.zeros(1, 1, 6, 7), torch.zeros(1), SPACING)
    y, x = torch.tensor([[0.29, 0.31, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -0.69, -0.71]])
    assert column.holds(torch.stack([torch.zeros_like(y), y, x])).tolist() == [[True, False, True, False]]


def test_reflection_of_a_reflection_is_the_point_itself():
    matrix = reflection(torch.tensor([0.05, -0.03, 0.2]), 3.0)
    points = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) + 2
    moved = carried(matrix, points)
    assert (moved - points).abs().max() > 1
    torch.testing.assert_close(carried(matrix, moved), points)
    on_plane = torch.tensor([3.0, 0.0, 0.2]).view(3, 1, 1)
    torch.testing.assert_close(carried(matrix, on_plane), on_plane)


def test_reflection_of_a_turned_plane():
    """A normal turned by a towards z: a point of x alone lands 2 a further along z, to first order."""
    a = 0.01
    moved = carried(reflection(torch.tensor([a, 0.0, 0.0]), 0.0), torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)).flatten()
    assert moved[0] == pytest.approx(-2 * a, abs=1e-5)
    assert moved[2] == pytest.approx(-1, abs=1e-3)


def test_fit_reflection_finds_the_plane_of_a_phantom():
    planted = torch.tensor([0.08, -0.05, 0.15])
    positions = 0.1 * torch.arange(25)
    matrix = reflection(planted, float(positions.mean()))
    points = torch.stack([section_points(float(z), (24, 30), (0.1, 0.1)) for z in positions])
    here = list(points)

    def shown(p):  # something that is nowhere symmetric by itself
        return torch.sin(2 * p[0] + p[1]) + torch.cos(1.5 * p[2] - p[0])

    images = torch.stack([(shown(p) + shown(carried(matrix, p)))[None] for p in here])  # the same seen in the mirror
    column = Column(images, positions, (0.1, 0.1))
    inner = [(p[:, 6:-6, 8:-8], i[:, 6:-6, 8:-8]) for p, i in zip(here[8:17:2], images[8:17:2], strict=True)]
    found = fit_reflection(inner, lambda _: column, 0.1)
    assert (found - matrix).abs().max() < 0.03
    assert (found - reflection(torch.tensor([0.0, 0.0, 0.1]), 1.2)).abs().max() > 0.1  # where it began


def test_fit_reflection_stays_where_it_began_on_blank_images():
    points = section_points(0.0, (5, 6), (0.1, 0.1))
    blank = Column(torch.zeros(2, 1, 5, 6), torch.tensor([0.0, 0.1]), (0.1, 0.1))
    found = fit_reflection([(points, torch.zeros(1, 5, 6))], lambda _: blank, 0.2)
    torch.testing.assert_close(found, reflection(torch.tensor([0.0, 0.0, 0.2]), 0.0))
