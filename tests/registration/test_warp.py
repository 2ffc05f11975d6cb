import numpy as np
import pytest
import torch
from scipy import ndimage

from limner.registration.warp import compose, covers, jacobian_determinants, resize_displacement, warp

SPACING = (0.2, 0.05)
MM = torch.tensor(SPACING).view(1, 2, 1, 1)


def random_displacement(shape, pixels, seed=0, n=2):
    """Shape (n, 2, Y, X), mm."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(n, 2, *shape, generator=generator) - 1) * pixels * MM


@pytest.mark.parametrize(("mode", "order"), [("bilinear", 1), ("nearest", 0)])
@pytest.mark.parametrize(("outside", "scipy_mode"), [("border", "nearest"), ("zeros", "grid-constant")])
def test_warp_is_scipys_map_coordinates(mode, order, outside, scipy_mode):
    image = torch.rand(2, 3, 13, 17, generator=torch.Generator().manual_seed(1))
    displacement = random_displacement((13, 17), 4.0)
    found = warp(image, displacement, SPACING, mode, outside)
    for n, c in np.ndindex(2, 3):
        points = np.indices((13, 17)) + (displacement / MM)[n].numpy()
        expected = ndimage.map_coordinates(image[n, c].numpy(), points, order=order, mode=scipy_mode)
        np.testing.assert_allclose(found[n, c], expected, atol=1e-5)


def test_displacement_along_y_moves_rows_by_the_spacing_of_y():
    image = torch.arange(20.0).view(1, 1, 5, 4)
    displacement = torch.zeros(1, 2, 5, 4)
    displacement[:, 0] = 2 * SPACING[0]
    torch.testing.assert_close(warp(image, displacement, SPACING)[0, 0, :3], image[0, 0, 2:])
    displacement = torch.zeros(1, 2, 5, 4)
    displacement[:, 1] = -1 * SPACING[1]
    torch.testing.assert_close(warp(image, displacement, SPACING)[0, 0, :, 1:], image[0, 0, :, :3])


def test_covers_up_to_the_outer_edge_of_the_last_pixel():
    for pixels, expected in [(0.0, 6), (0.49, 6), (0.51, 5), (1.51, 4), (-0.49, 6), (-2.51, 3), (50.0, 0)]:
        displacement = torch.zeros(1, 2, 3, 6)
        displacement[:, 1] = pixels * SPACING[1]
        assert covers(displacement, SPACING).sum() == 3 * expected
    displacement = torch.zeros(1, 2, 3, 6)
    displacement[:, 0] = SPACING[0]  # past the last row only
    assert covers(displacement, SPACING)[0, 0, :, 0].tolist() == [True, True, False]


def test_compose_of_translations_is_their_sum():
    first, second = torch.zeros(2, 1, 2, 6, 7)
    first[:, 0], first[:, 1] = 0.3, -0.1
    second[:, 0], second[:, 1] = -0.5, 0.02
    found = compose(first, second, SPACING)
    torch.testing.assert_close(found[0, :, 3, 3], torch.tensor([-0.2, -0.08]))
    torch.testing.assert_close(found, first + second)


def test_compose_follows_the_first_and_then_the_second():
    """Warping by the composed field equals warping twice, the second field's image first."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 60), indexing="ij")
    bump = torch.exp(-4 * (x**2 + y**2))
    first = torch.stack([2 * bump, 4 * bump * x])[None] * MM
    second = torch.stack([-3 * bump * y, 3 * bump])[None] * MM
    image = (torch.sin(4 * x) + torch.cos(5 * y))[None, None]
    twice = warp(warp(image, second, SPACING), first, SPACING)
    composed = warp(image, compose(first, second, SPACING), SPACING)
    swapped = warp(image, compose(second, first, SPACING), SPACING)
    assert (composed - twice).abs().max() < 0.02  # `twice` interpolates the image twice
    assert (swapped - twice).abs().max() > 0.05


def test_jacobian_determinant_of_a_linear_field():
    """u = M p with p in mm: det(I + M) everywhere."""
    rows, columns = torch.arange(9.0) * SPACING[0], torch.arange(7.0) * SPACING[1]
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    for m in ([[0.1, 0.3], [-0.2, 0.25]], [[0.0, 1.5], [1.5, 0.0]]):
        (a, b), (c, d) = m
        displacement = torch.stack([a * y + b * x, c * y + d * x])[None]
        expected = torch.full((1, 9, 7), (1 + a) * (1 + d) - b * c)
        torch.testing.assert_close(jacobian_determinants(displacement, SPACING), expected, atol=1e-5, rtol=0)


def test_resized_displacement_keeps_millimetres_and_place():
    """A linear field keeps its values at the positions of the new pixel centres."""
    coarse, fine = (10, 6), (30, 12)
    extent = (3.0, 1.2)

    def field(shape):
        axes = [(torch.arange(n) + 0.5) * e / n for n, e in zip(shape, extent, strict=True)]
        y, x = torch.meshgrid(*axes, indexing="ij")
        return torch.stack([0.1 * y - 0.2 * x, 0.3 * x + 1])[None]

    found = resize_displacement(field(coarse), fine)
    torch.testing.assert_close(found[..., 3:-3, 2:-2], field(fine)[..., 3:-3, 2:-2])
    assert resize_displacement(found, fine) is found
