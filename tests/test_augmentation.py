import numpy as np
import pytest
import torch
from scipy import ndimage

from limner.augmentation import Augmentation, augment, elastic, random_transforms

NOTHING = Augmentation(rotation=0, translation=0, scaling=0, contrast=0, brightness=0)
SHAPE = (48, 80)


def moves(**ranges) -> Augmentation:
    return Augmentation(**{"rotation": 0, "translation": 0, "scaling": 0, "contrast": 0, "brightness": 0} | ranges)


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disc(n=1, at=(24, 40), radius=12, shape=SHAPE):
    y, x = np.indices(shape)
    inside = torch.from_numpy(np.hypot(y - at[0], x - at[1]) <= radius)
    return inside.long().expand(n, -1, -1)


def test_zero_ranges_change_nothing():
    images = torch.rand(3, 2, *SHAPE, generator=seeded())
    targets = torch.randint(0, 300, (3, *SHAPE), generator=seeded())
    moved, labels, weights = augment(images, targets, NOTHING, seeded())
    torch.testing.assert_close(moved, images, atol=2e-5, rtol=0)
    assert torch.equal(labels, targets)
    assert labels.dtype == torch.long
    assert (weights == 1).all()


def test_labels_move_with_the_image():
    """An image equal to its labels stays equal to them, but for the pixels where it was interpolated."""
    targets = ndimage.zoom(np.random.default_rng(0).integers(0, 4, (4, 6, 8)), (1, 8, 10), order=0)
    targets = torch.from_numpy(targets).long()
    ranges = moves(rotation=40, translation=0.2, scaling=0.3)
    moved, labels, weights = augment(targets[:, None].float(), targets, ranges, seeded())
    moved = moved[:, 0]
    whole = (moved - moved.round()).abs() < 1e-4  # where a single label was read
    assert whole.float().mean() > 0.5
    assert torch.equal(moved[whole].round().long(), labels[whole])
    assert (moved - labels).abs().max() < 3
    assert (labels != targets).float().mean() > 0.3
    assert 0.5 < weights.mean() < 0.999
    assert len({tuple(w.flatten().tolist()) for w in weights}) == 4  # each section differently


def test_at_half_the_size_pixels_are_means_of_four_and_labels_one_of_them():
    images = torch.rand(2, 3, *SHAPE, generator=seeded())
    targets = torch.randint(0, 300, (2, *SHAPE), generator=seeded())
    moved, labels, weights = augment(images, targets, NOTHING, seeded(), (24, 40))
    torch.testing.assert_close(moved, torch.nn.functional.avg_pool2d(images, 2), atol=2e-5, rtol=0)
    blocks = targets.view(2, 24, 2, 40, 2).permute(0, 1, 3, 2, 4).flatten(3)
    assert (blocks == labels[..., None]).any(dim=-1).all()
    assert weights.shape == (2, 24, 40)
    assert (weights == 1).all()


@pytest.mark.parametrize("half", [(24, 40), (25, 41)])
def test_sections_move_as_far_at_half_the_size(half):
    """Places as shares of the section: a disc's middle, seen at both sizes after the same draws."""
    targets = disc(4, (20, 44), 9)
    ranges = moves(rotation=30, translation=0.1, scaling=0.1)
    middles = []
    for shape in (SHAPE, half):
        labels = augment(targets[:, None].float(), targets, ranges, seeded(), shape)[1]
        middles.append([(np.argwhere(section.numpy()) + 0.5).mean(axis=0) / shape for section in labels])
    assert np.ptp(middles[0], axis=0).min() > 0.05
    np.testing.assert_allclose(*middles, atol=0.01)  # a quarter of a pixel at half the size


def test_seed_decides():
    images = torch.rand(2, 1, *SHAPE, generator=seeded())
    targets = disc(2)
    first, again, other = (augment(images, targets, Augmentation(), seeded(s)) for s in (5, 5, 6))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("shape", [(48, 120), (120, 48), (64, 64)])
def test_rotated_disc_stays_a_disc(shape):
    """At the centre, where rotation alone leaves it in place whatever the section's proportions."""
    centre = ((shape[0] - 1) / 2, (shape[1] - 1) / 2)
    targets = disc(6, centre, 14, shape)
    _, labels, weights = augment(targets[:, None].float(), targets, moves(rotation=90), seeded())
    changed = (labels != targets).float().mean(dim=(1, 2)) / targets.float().mean()
    assert changed.max() < 0.06  # pixels of its rim
    for section in labels:
        y, x = np.nonzero(section.numpy())
        assert abs(np.ptp(y) - np.ptp(x)) <= 2
    assert weights.mean() < 0.95 or shape == (64, 64)  # it did turn


def test_rotation_reaches_its_range_and_keeps_lengths():
    transforms = random_transforms(400, SHAPE, moves(rotation=30), seeded())
    half = torch.tensor(SHAPE).flip(0) / 2  # x, y, as affine_grid counts
    in_pixels = half[:, None] * transforms[:, :, :2] / half
    identity = torch.eye(2).expand(400, 2, 2)
    torch.testing.assert_close(in_pixels @ in_pixels.transpose(1, 2), identity, atol=1e-5, rtol=0)
    angles = torch.rad2deg(torch.atan2(in_pixels[:, 1, 0], in_pixels[:, 0, 0]))
    assert -30 <= angles.min() < -28
    assert 28 < angles.max() <= 30
    assert abs(angles.mean()) < 2
    assert (transforms[:, :, 2] == 0).all()


def test_translation_is_a_fraction_of_the_sections_size():
    """The disc's centre moves by up to a tenth of 48 rows and of 80 columns, each axis on its own."""
    targets = disc(200)
    _, labels, _ = augment(torch.zeros(200, 1, *SHAPE), targets, moves(translation=0.1), seeded())
    centres = np.array([ndimage.center_of_mass(section.numpy()) for section in labels]) - (24, 40)
    assert np.abs(centres).max(axis=0) == pytest.approx((4.8, 8.0), abs=0.6)
    assert np.abs(centres).max(axis=0)[0] < 5.4
    assert abs(np.corrcoef(centres.T)[0, 1]) < 0.3
    assert (labels.sum(dim=(1, 2)) - targets[0].sum()).abs().max() < 30  # of 441 pixels


def test_scaling_changes_both_sides_alike():
    targets = disc(200)
    _, labels, _ = augment(torch.zeros(200, 1, *SHAPE), targets, moves(scaling=0.2), seeded())
    radii = np.sqrt(labels.sum(dim=(1, 2)).numpy() / np.pi)
    assert radii.min() == pytest.approx(12 / 1.2, abs=0.3)
    assert radii.max() == pytest.approx(12 / 0.8, abs=0.3)
    for section in labels[:20]:
        y, x = np.nonzero(section.numpy())
        assert abs(np.ptp(y) - np.ptp(x)) <= 2


def test_weights_are_zero_exactly_where_the_section_did_not_reach():
    """A pixel counts if the point it was read from lies within the section's outer edge."""
    ranges = moves(rotation=25, translation=0.2, scaling=0.3)
    images = torch.rand(4, 1, *SHAPE, generator=seeded(1))
    _, _, weights = augment(images, disc(4), ranges, seeded(3))
    transforms = random_transforms(4, SHAPE, ranges, seeded(3)).double().numpy()  # the first draws of `augment`
    rows, columns = np.indices(SHAPE)
    y, x = (2 * rows + 1) / SHAPE[0] - 1, (2 * columns + 1) / SHAPE[1] - 1
    read_x, read_y = np.einsum("nij,jyx->inyx", transforms, np.stack([x, y, np.ones_like(x)]))
    outside = np.maximum(np.abs(read_x), np.abs(read_y)) - 1
    clear = np.abs(outside) > 1e-5  # not decided by rounding
    np.testing.assert_array_equal(weights.numpy()[clear], (outside <= 0)[clear])
    assert set(weights.unique().tolist()) == {0.0, 1.0}


def test_contrast_and_brightness_act_on_the_grey_levels_alone():
    images = 0.3 + 0.4 * torch.rand(200, 1, 8, 10, generator=seeded())
    targets = torch.randint(0, 5, (200, 8, 10), generator=seeded())
    for ranges in (moves(contrast=0.3), moves(brightness=0.2)):
        moved, labels, weights = augment(images, targets, ranges, seeded())
        assert torch.equal(labels, targets)
        assert (weights == 1).all()
        gain = moved.std(dim=(1, 2, 3)) / images.std(dim=(1, 2, 3))
        shift = moved.mean(dim=(1, 2, 3)) - images.mean(dim=(1, 2, 3))
        extremes = (ranges.contrast, ranges.brightness)
        for values, middle, extreme in ((gain, 1, extremes[0]), (shift, 0, extremes[1])):
            assert (values.min(), values.max()) == pytest.approx((middle - extreme, middle + extreme), abs=0.01)


def test_beyond_the_border_the_image_continues():
    images = torch.full((4, 3, *SHAPE), 0.7)
    moved, labels, weights = augment(images, torch.full((4, *SHAPE), 9), moves(translation=0.4), seeded())
    torch.testing.assert_close(moved, images)
    assert (labels == 9).all()
    assert weights.mean() < 0.95


def test_elastic_bends_channels_alike_and_by_the_pixels_asked_for():
    """An image of its own coordinates shows where each pixel came from."""
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    maps = torch.stack([y, x, x]).expand(8, 3, 96, 128)
    torch.testing.assert_close(elastic(maps, 0.0, seeded(0)), maps, atol=1e-3, rtol=0)
    bent = elastic(maps, 2.0, seeded(0))
    torch.testing.assert_close(bent[:, 1], bent[:, 2])
    shift = (bent - maps)[:, :2, 16:-16, 16:-16]
    assert 0.8 < shift.std() < 2.5
    assert shift.diff(dim=3).abs().max() < 1
    assert (shift[0] - shift[1]).abs().mean() > 0.5
