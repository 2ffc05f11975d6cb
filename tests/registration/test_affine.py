import numpy as np
import pytest
import torch

from limner.losses.similarity import global_correlation
from limner.registration import affine
from limner.registration.warp import warp

SPACING = (0.1, 0.05)
SHAPE = (64, 96)  # 6.4 x 4.8 mm


def rigid(degrees, shift_mm):
    angle = np.deg2rad(degrees)
    matrix = [[np.cos(angle), -np.sin(angle), shift_mm[0]], [np.sin(angle), np.cos(angle), shift_mm[1]]]
    return torch.tensor([matrix], dtype=torch.float32)


def largest_difference(a, b, spacing=SPACING, shape=SHAPE):
    """In mm, over the middle half of the image."""
    step = affine.to_displacement(a, shape, spacing) - affine.to_displacement(b, shape, spacing)
    middle = step[:, :, shape[0] // 4 : -shape[0] // 4, shape[1] // 4 : -shape[1] // 4]
    return middle.norm(dim=1).amax(dim=(1, 2))


def object_of(points_mm):
    """Grey levels of an object without symmetry at points (2, Y, X) in mm from the image centre."""
    y, x = points_mm

    def blob(at_y, at_x, size):
        return torch.exp(-((y - at_y) ** 2 + (x - at_x) ** 2) / (2 * size**2))

    return blob(0, 0, 0.5) + 0.8 * blob(-0.9, 0.5, 0.25) + 0.6 * blob(0.4, 0.9, 0.2) + 0.5 * blob(0.9, -0.6, 0.25)


def pair(transform, spacing=SPACING, shape=SHAPE):
    """Fixed and moving images (1, 1, Y, X) that `transform` matches, without resampling: fixed(p) = moving(T p)."""
    points = affine.centred_points(shape, spacing, torch.device("cpu"))
    matched = points + affine.to_displacement(transform, shape, spacing)[0]
    return object_of(matched)[None, None], object_of(points)[None, None]


def test_invert():
    generator = torch.Generator().manual_seed(0)
    matrix = affine.identity(5) + 0.3 * torch.randn(5, 2, 3, generator=generator)
    back = affine.invert(matrix)
    points = torch.randn(5, 2, 11, generator=generator)
    there = matrix[:, :, :2] @ points + matrix[:, :, 2:]
    torch.testing.assert_close(back[:, :, :2] @ there + back[:, :, 2:], points, atol=1e-4, rtol=0)
    torch.testing.assert_close(affine.invert(affine.identity(2)), affine.identity(2))


def test_displacement_of_a_transform_by_hand():
    """A quarter turn takes the point 1 mm below the centre (y = 1) to 1 mm right of it (x = 1)."""
    displacement = affine.to_displacement(rigid(90, (0, 0)), (5, 9), (0.5, 0.25))
    torch.testing.assert_close(displacement[0, :, 4, 4], torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(displacement[0, :, 2, 4], torch.zeros(2))
    shifted = affine.to_displacement(rigid(0, (0.3, -0.7)), (4, 6), (0.5, 0.25))
    torch.testing.assert_close(shifted[0, :, 3, 0], torch.tensor([0.3, -0.7]))


@pytest.mark.parametrize(("degrees", "shift"), [(24, (0.6, -0.4)), (-36, (-0.5, 0.7)), (0, (1.0, 0.9)), (18, (0, 0))])
def test_search_recovers_rotation_and_shift(degrees, shift):
    """Angles that are tried: right to the pixel by which shifts are sought."""
    fixed, moving = pair(rigid(degrees, shift))
    found = affine.search_rigid(fixed, moving, SPACING, max_angle=42)
    assert largest_difference(found, rigid(degrees, shift)) < max(SPACING)
    assert largest_difference(affine.identity(1), rigid(degrees, shift)) > 5 * max(SPACING)


def test_search_keeps_to_its_largest_angle_and_solves_pairs_on_their_own():
    transforms = [rigid(30, (0, 0)), rigid(-12, (0.4, 0.3)), rigid(0, (-0.4, 0))]
    fixed, moving = (torch.cat(images) for images in zip(*map(pair, transforms), strict=True))
    found = affine.search_rigid(fixed, moving, SPACING, max_angle=15)
    angles = torch.rad2deg(torch.atan2(found[:, 1, 0], found[:, 0, 0]))
    torch.testing.assert_close(angles, torch.tensor([12.0, -12.0, 0.0]), atol=1e-3, rtol=0)
    for n in range(3):
        torch.testing.assert_close(affine.search_rigid(fixed[n : n + 1], moving[n : n + 1], SPACING, 15)[0], found[n])


@pytest.mark.parametrize("only_rigid", [True, False])
def test_refine_recovers_what_lies_between_the_angles(only_rigid):
    truth = rigid(21, (0.53, -0.37))
    fixed, moving = pair(truth)
    start = affine.search_rigid(fixed, moving, SPACING, max_angle=42)
    found = affine.refine(fixed, moving, torch.ones_like(fixed), SPACING, start, rigid=only_rigid)
    assert largest_difference(found, truth) < 0.02  # mm, under half the smaller pixel
    assert largest_difference(found, truth) < 0.3 * largest_difference(start, truth)


def test_only_the_affine_recovers_shear_and_size():
    truth = torch.tensor([[[1.1, 0.15, 0.1], [0.0, 0.9, -0.1]]])
    fixed, moving = pair(truth)
    weights = torch.ones_like(fixed)
    free = affine.refine(fixed, moving, weights, SPACING, affine.identity(1))
    stiff = affine.refine(fixed, moving, weights, SPACING, affine.identity(1), rigid=True)
    assert largest_difference(free, truth) < 0.05
    assert largest_difference(stiff, truth) > 0.1
    torch.testing.assert_close(stiff[0, :, :2] @ stiff[0, :, :2].T, torch.eye(2), atol=1e-5, rtol=0)
    assert torch.linalg.det(stiff[0, :, :2]) > 0


def test_refine_never_lowers_the_correlation():
    generator = torch.Generator().manual_seed(0)
    fixed, moving = pair(rigid(4, (0.1, 0.0)))
    fixed, moving = fixed.repeat(6, 1, 1, 1), moving.repeat(6, 1, 1, 1)
    fixed[5] = torch.rand(fixed[5].shape, generator=generator)  # nothing to be found
    weights = torch.rand(fixed.shape, generator=generator)
    start = affine.identity(6) + 0.2 * torch.randn(6, 2, 3, generator=generator)
    start[0] = rigid(4, (0.1, 0.0))  # the optimum

    def score(matrix):
        moved = warp(moving, affine.to_displacement(matrix, SHAPE, SPACING), SPACING)
        return global_correlation(fixed, moved, weights)

    before = score(start)
    for steps in (0, 1, 8):
        found = affine.refine(fixed, moving, weights, SPACING, start, steps=steps)
        assert (score(found) >= before - 1e-6).all()
    torch.testing.assert_close(affine.refine(fixed, moving, weights, SPACING, start, steps=0), start)
