import numpy as np
import pytest
from scipy import ndimage

from limner.registration.section_pairs import LEFT_TO_RIGHT, TOP_TO_BOTTOM, TURNED
from limner.registration.section_resampling import moved
from limner.registration.stack_alignment import (
    Inspection,
    align,
    find_blank,
    find_faults,
    find_torn,
    inspect,
    reach,
)

SPACING = (0.1, 0.12)  # mm
SHAPE = (72, 80)
BACKGROUND, TISSUE = 230.0, 90.0  # as of a stain in bright field
N = 9


@pytest.fixture(scope="module")
def brain():
    """Dark, unsymmetric tissue that changes slowly along z, (Z, Y, X), on a bright background."""
    rng = np.random.default_rng(0)
    texture = ndimage.gaussian_filter(rng.normal(0, 1, (N, *SHAPE)), (2.0, 3.0, 3.0))
    y, x = np.indices(SHAPE)
    down, right = (y - 35) / 18, (x - 39) / 20
    inside = down**2 + right**2 * (1 + 0.5 * down) + 0.25 * right < 1
    grey = BACKGROUND - inside * (TISSUE + 40 * texture / texture.std())
    return grey.astype(np.float32)


def rigid(degrees, shift):
    angle = np.radians(degrees)
    return np.array([[np.cos(angle), -np.sin(angle), shift[0]], [np.sin(angle), np.cos(angle), shift[1]]])


def displaced(brain, seed=0, degrees=20.0, share=0.08, brightness=0.2):
    """Each section turned, shifted and brighter or darker; and the true transforms."""
    rng = np.random.default_rng(seed)
    extent = np.array(SHAPE) * SPACING
    true = [rigid(rng.uniform(-degrees, degrees), rng.uniform(-share, share, 2) * extent) for _ in brain]
    sections = []
    for section, matrix in zip(brain, true, strict=True):
        back = np.column_stack([matrix[:, :2].T, -matrix[:, :2].T @ matrix[:, 2]])
        placed = moved(section, back, SPACING, SHAPE, fill=BACKGROUND)
        sections.append(placed * rng.uniform(1 - brightness, 1 + brightness))
    return np.stack(sections)[:, None].astype(np.float32), np.array(true)


def residuals(found, true):
    """What is left between neighbours: degrees (Z - 1,), and mm (Z - 1,) in the middle."""
    relative = true[:, :, :2].transpose(0, 2, 1) @ found[:, :, :2]
    turned = np.degrees(np.arctan2(relative[:, 1, 0], relative[:, 0, 0]))
    at = np.einsum("nji,nj->ni", found[:, :, :2], true[:, :, 2] - found[:, :, 2])
    return np.abs(np.diff(turned)), np.hypot(*np.diff(at, axis=0).T)


@pytest.mark.parametrize("colours", [1, 3])
def test_sections_that_each_lie_differently_are_aligned(brain, colours):
    sections, true = displaced(brain)
    sections = np.concatenate([sections, 0.8 * sections, 0.5 * sections][:colours], axis=1)
    inspection = inspect(sections, SPACING)
    assert inspection.faults() == {}
    degrees, mm = residuals(align(sections, SPACING, inspection), true)
    assert degrees.max() < 1.0
    assert mm.max() < 0.1  # under a pixel; the sections lie up to 1 mm apart


def test_a_stack_that_lies_well_stays_as_it_is(brain):
    sections = brain[:, None]
    matrices = align(sections, SPACING, inspect(sections, SPACING))
    degrees, mm = residuals(matrices, np.tile(np.eye(2, 3), (N, 1, 1)))
    assert degrees.max() < 0.5
    assert mm.max() < 0.05


@pytest.mark.parametrize(
    ("z", "axes", "orientation"),
    [(4, (1, 2), TURNED), (4, (2,), LEFT_TO_RIGHT), (4, (1,), TOP_TO_BOTTOM), (0, (1, 2), TURNED), (8, (2,), 2)],
)
def test_turned_and_mirrored_sections_are_found_and_set_right(brain, z, axes, orientation):
    sections, true = displaced(brain)
    sections[z] = np.flip(sections[z], axes)
    true[z] *= np.array([-1 if 1 in axes else 1, -1 if 2 in axes else 1])[:, None]
    inspection = inspect(sections, SPACING)
    assert inspection.orientations.tolist() == [orientation if i == z else 0 for i in range(N)]
    assert inspection.torn == inspection.blank == ()
    degrees, mm = residuals(align(sections, SPACING, inspection), true)
    assert degrees.max() < 1.0
    assert mm.max() < 0.1
    assert not inspect(sections, SPACING, keep_orientation=True).orientations.any()


def test_mirror_images_that_cannot_be_told_are_no_alarm(brain):
    """Sections that are their own mirror images but for noise, as brains are nearly."""
    sections = (brain + brain[:, :, ::-1]) / 2
    sections = sections + np.random.default_rng(1).normal(0, 8, sections.shape)
    assert inspect(sections[:, None].astype(np.float32), SPACING).faults() == {}


def test_a_blank_section_is_found_and_others_are_aligned_across_it(brain):
    sections, true = displaced(brain)
    rng = np.random.default_rng(2)
    sections[4] = BACKGROUND + rng.normal(0, 3, sections[4].shape)
    inspection = inspect(sections, SPACING)
    assert inspection.faults() == {4: "blank"}
    assert np.isnan(inspection.fit[4])
    assert not np.isnan(np.delete(inspection.fit, 4)).any()
    matrices = align(sections, SPACING, inspection)
    np.testing.assert_allclose(matrices[4], np.eye(2, 3), atol=1e-12)
    degrees, mm = residuals(np.delete(matrices, 4, axis=0), np.delete(true, 4, axis=0))
    assert degrees.max() < 1.5
    assert mm.max() < 0.15


def test_a_torn_section_is_found_and_moves_no_other(brain):
    sections, true = displaced(brain)
    moved_part = np.full_like(sections[4], np.median(sections[4, 0, 0]))
    moved_part[:, :, 8:] = sections[4, :, :, :-8]
    sections[4, :, 30:] = moved_part[:, 30:]
    inspection = inspect(sections, SPACING)
    assert list(inspection.faults()) == list(inspection.torn) == [4]
    degrees, mm = residuals(*(np.delete(m, 4, axis=0) for m in (align(sections, SPACING, inspection), true)))
    assert degrees.max() < 1.5
    assert mm.max() < 0.15


def test_a_stack_that_shows_nothing():
    sections = np.full((3, 1, 20, 24), 7.0, np.float32)
    inspection = inspect(sections, SPACING)
    assert inspection.blank == (0, 1, 2)
    np.testing.assert_allclose(align(sections, SPACING, inspection), np.tile(np.eye(2, 3), (3, 1, 1)))
    assert reach(sections, SPACING, np.tile(np.eye(2, 3), (3, 1, 1)), ()) == (0.0, 0.0)


def test_small_sections_at_the_end_of_a_stack_are_not_blank():
    """A stack that tapers: each section has half of the tissue of the one before."""
    foreground = np.zeros((7, 1, 64, 64), np.float32)
    for z, side in enumerate((60, 42, 30, 21, 15, 10)):
        foreground[z, 0, :side, :side] = 1
    assert find_blank(foreground) == (6,)


def test_in_a_noisy_stack_only_what_is_unusual_is_torn():
    """Sections that deform each on their own: neighbours fit no better than next but one; that is usual there."""
    rng = np.random.default_rng(0)
    near, far = rng.normal(0.8, 0.01, 30), rng.normal(0.85, 0.01, 29)
    assert find_torn(near, far) == []
    near[[10, 11]] = 0.4
    assert find_torn(near, far) == [11]


def test_an_inspection_comes_back_from_arrays(brain):
    found = inspect(displaced(brain)[0], SPACING, refined=False)
    back = Inspection.from_arrays(found.to_arrays())
    assert (back.blank, back.torn) == (found.blank, found.torn)
    for name in ("orientations", "fit", "pairs", "matrices", "correlation"):
        np.testing.assert_array_equal(getattr(back, name), getattr(found, name))


def test_reach_of_tissue_that_is_moved():
    """A bar 3 mm wide and 1 mm high in the middle, turned by 90 degrees and 0.5 mm further down when aligned."""
    section = np.zeros((1, 1, 60, 60), np.float32)
    section[0, 0, 25:35, 15:45] = 1
    matrix = np.array([[[0.0, -1.0, 0.0], [1.0, 0.0, -0.5]]])  # aligned (0.5, 0) is the middle
    found = reach(section, (0.1, 0.1), matrix, ())
    np.testing.assert_allclose(found, (2.0, 0.5), atol=1e-6)
    assert reach(section, (0.1, 0.1), matrix, (0,)) == (0.0, 0.0)


def test_faults_of_sections_in_full_size(brain):
    """Bright background, and sides that the reduction does not divide: no rim is taken for tissue."""
    large = ndimage.zoom(brain[:, :70, :77], (1, 4, 4), order=1)[:, :, :301]
    large[3] = large[3, ::-1, ::-1]
    large[6] = BACKGROUND
    found = find_faults(large[:, None].astype(np.float32), (0.03, 0.03))
    assert found.faults() == {3: "turned by 180 degrees", 6: "blank"}
    assert np.nanmin(found.fit) > 0.9
