import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import label
from skimage.morphology import h_minima, remove_small_objects

from limner.watershed import cells_between, closed_contours, fuse, link_sections, link_stack


def smooth_map(seed, shape=(60, 70), sigma=3.0):
    """Smooth noise that fills [0, 1]."""
    values = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return ((values - values.min()) / np.ptp(values)).astype(np.float32)


def wall(gap=0.0, shape=(21, 31)):
    """A membrane down the middle, of probability `gap` in rows 8 to 11."""
    probability = np.zeros(shape, np.float32)
    probability[:, 14:17] = 0.9
    probability[8:12, 14:17] = gap
    return probability


def parts(mask):
    return label(mask, connectivity=1)


def random_cells(seed, shape=(24, 30), n=9):
    """Label map 1, 2, ... with gaps between the cells; not every one in one piece."""
    draw = np.random.default_rng(seed)
    blocks = np.kron(draw.integers(0, n + 1, (shape[0] // 3, shape[1] // 3)), np.ones((3, 3), int))
    _, found = np.unique(np.where(draw.random(shape) < 0.1, 0, blocks), return_inverse=True)
    return found.reshape(shape).astype(np.int32)


# ---- closed contours ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0.3, 0.15])
def test_a_line_closes_a_gap(gap):
    """Below the threshold 0.5 in the gap, so that the map alone makes one cell of two."""
    probability = wall(gap)
    assert parts(probability < 0.5).max() == 1
    contours = closed_contours(probability, sigma=0, depth=0.1)
    assert parts(~contours).max() == 2
    assert contours[:, 14:17].any(axis=1).all()
    assert not contours[:, :13].any()
    assert parts(fuse(probability, contours, w_f=0.5) < 0.5).max() == 2


def test_a_gap_that_is_a_passage_is_left_open():
    assert not closed_contours(wall(gap=0.05), sigma=0, depth=0.1).any()


@pytest.mark.parametrize("seed", range(6))
def test_every_part_between_the_lines_is_one_basin(seed):
    """As many 4-connected parts as deep minima, one in each, and no line that parts nothing."""
    probability = smooth_map(seed)
    for depth in (0.02, 0.1, 0.3):
        contours = closed_contours(probability, sigma=0, depth=depth)
        found, minima = (
            parts(~contours),
            parts(h_minima(probability, depth, footprint=ndimage.generate_binary_structure(2, 1))),
        )
        assert found.max() == minima.max()
        assert len(np.unique(found[minima > 0])) == found.max()
        beside = ndimage.generic_filter(found, lambda near: len(set(near) - {0}), size=3, mode="nearest")
        assert (beside[contours] >= 2).mean() > 0.99


def test_lines_run_along_the_ridges():
    y, x = np.mgrid[:40, :60]
    probability = np.exp(-((x - 20 - 5 * np.sin(y / 6)) ** 2) / 20).astype(np.float32)
    contours = closed_contours(probability, sigma=1, depth=0.1)
    assert contours.sum(axis=1).min() >= 1
    assert (probability[contours] > 0.95).all()


def test_basins_shallower_than_the_depth_are_one_with_a_neighbour():
    """Three basins with floors 0, 0.3, 0 and passes at 0.5: the middle one is 0.2 deep."""
    probability = np.zeros((9, 31), np.float32)
    probability[:, 10], probability[:, 11:20], probability[:, 20] = 0.5, 0.3, 0.5
    counts = [parts(~closed_contours(probability, 0, depth)).max() for depth in (0.1, 0.19, 0.21, 0.6)]
    assert counts == [3, 3, 2, 1]


def test_smoothing_takes_noise_away():
    noise = np.random.default_rng(0).normal(0, 0.08, (21, 31))
    noisy = np.clip(wall(gap=0.9) + noise, 0, 1).astype(np.float32)
    rough, smooth = (parts(~closed_contours(noisy, sigma, depth=0.1)).max() for sigma in (0, 2))
    assert rough > smooth == 2


def test_lines_reach_the_edge_of_the_image():
    for contours in (closed_contours(wall(0.3), 0, 0.1), closed_contours(wall(0.3).T, 0, 0.1)):
        ends = contours[0].any() and contours[-1].any(), contours[:, 0].any() and contours[:, -1].any()
        assert sorted(ends) == [False, True]


def test_a_map_without_membranes_has_no_lines():
    for level in (0.0, 0.7, 1.0):
        assert not closed_contours(np.full((9, 11), level, np.float32), sigma=1, depth=0.05).any()


def test_more_basins_than_16_bits_count():
    y, x = np.mgrid[:600, :520]
    found = closed_contours(((y % 2) | (x % 2)).astype(np.float32), sigma=0, depth=0.1)
    assert parts(~found).max() == 300 * 260


def test_fusion_by_hand():
    p = np.array([[0.0, 0.2, 1.0, 0.6]], np.float32)
    lines = np.array([[True, False, True, False]])
    np.testing.assert_allclose(fuse(p, lines, 0.3), [[0.3, 0.14, 1.0, 0.42]], rtol=1e-6)
    np.testing.assert_array_equal(fuse(p, lines, 0.0), p)
    np.testing.assert_array_equal(fuse(p, lines, 1.0), lines)
    assert fuse(p, lines, 0.3).dtype == np.float32
    assert fuse(np.zeros((1, 1), np.float32), np.array([[True]]), 0.5) >= 0.5  # half a weight closes any gap


# ---- cells --------------------------------------------------------------------------------------------------------


def test_cells_touch_along_sides_are_numbered_by_rows_and_have_the_least_size():
    membrane = ~np.array(
        [
            [1, 1, 0, 0, 1],
            [1, 0, 0, 1, 0],
            [0, 0, 1, 0, 0],
            [1, 1, 0, 0, 1],
        ],
        bool,
    )
    np.testing.assert_array_equal(
        cells_between(membrane), [[1, 1, 0, 0, 2], [1, 0, 0, 3, 0], [0, 0, 4, 0, 0], [5, 5, 0, 0, 6]]
    )
    np.testing.assert_array_equal(
        cells_between(membrane, least=2), [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [2, 2, 0, 0, 0]]
    )
    assert cells_between(membrane).dtype == np.int32


@pytest.mark.parametrize("least", [0, 5, 40])
def test_cells_as_scikit_image_finds_them(least):
    membrane = smooth_map(3, sigma=1.5) > 0.5
    kept = remove_small_objects(parts(~membrane), max_size=max(least - 1, 0))
    np.testing.assert_array_equal(cells_between(membrane, least), parts(kept > 0))


def test_no_cell_and_nothing_but_one():
    assert not cells_between(np.ones((4, 5), bool)).any()
    assert (cells_between(np.zeros((4, 5), bool), least=20) == 1).all()
    assert not cells_between(np.zeros((4, 5), bool), least=21).any()
    assert cells_between(np.zeros((0, 5), bool)).shape == (0, 5)


# ---- through the stack --------------------------------------------------------------------------------------------


def linked_by_pairs(before, cells, first_new, share):
    """Cell by cell and pair by pair; the first of equals."""
    known, here = (sorted(set(ids[ids > 0].tolist())) for ids in (before, cells))
    both = {(a, b): int(np.sum((before == a) & (cells == b))) for a in known for b in here}
    ids = np.zeros(max(here, default=0) + 1, np.int64)
    for b in here:
        a = max(known, key=lambda a: (both[a, b], -a), default=None)
        if a is None or not both[a, b] or b != max(here, key=lambda b: (both[a, b], -b)):
            continue
        if both[a, b] >= share * min(np.sum(before == a), np.sum(cells == b)):
            ids[b] = a
    for b in here:
        if not ids[b]:
            ids[b], first_new = first_new, first_new + 1
    return ids


@pytest.mark.parametrize("seed", range(30))
def test_links_as_found_pair_by_pair(seed):
    draw = np.random.default_rng(seed)
    before, cells = random_cells(seed), random_cells(seed + 1000)
    if seed % 2:
        cells = np.where(draw.random(cells.shape) < 0.7, before, cells)  # much alike, so that many are linked
        cells = np.unique(cells, return_inverse=True)[1].reshape(cells.shape).astype(np.int32)
    ids_before = np.append(0, draw.choice(100, int(before.max()), replace=False) + 5)[before]
    for share in (0.0, 0.3, 0.5, 0.9):
        found = link_sections(ids_before, cells, first_new=1000, share=share)
        np.testing.assert_array_equal(found, linked_by_pairs(ids_before, cells, 1000, share))
        assert len(set(found[1:])) == cells.max()  # one to one
    assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("before", "cells", "expected"),
    [
        pytest.param([4, 4, 4, 4, 0, 6], [1, 1, 1, 0, 2, 2], [0, 4, 6], id="the same cells, moved"),
        pytest.param([4, 4, 4, 4, 4, 4], [1, 1, 1, 1, 0, 2], [0, 4, 10], id="split: the larger part stays"),
        pytest.param([4, 4, 4, 0, 6, 6], [1, 1, 1, 1, 1, 1], [0, 4], id="merged: the larger id stays"),
        pytest.param([4, 4, 0, 6, 6, 6], [0, 0, 0, 1, 1, 1], [0, 6], id="one ends"),
        pytest.param([4, 4, 0, 0, 0, 0], [1, 1, 0, 2, 2, 2], [0, 4, 10], id="one begins"),
        pytest.param([4, 4, 4, 4, 4, 0], [0, 0, 0, 0, 1, 1], [0, 4], id="half of the smaller is enough"),
        pytest.param([4, 4, 4, 4, 4, 0, 0], [0, 0, 0, 0, 1, 1, 1], [0, 10], id="a third is not"),
        pytest.param([0, 0, 0, 0], [1, 1, 0, 2], [0, 10, 11], id="nothing before"),
        pytest.param([4, 4, 0, 6], [0, 0, 0, 0], [0], id="nothing here"),
        pytest.param([4, 4, 0, 6], [3, 3, 0, 1], [0, 6, 0, 4], id="a number that no pixel has"),
    ],
)
def test_links_by_hand(before, cells, expected):
    found = link_sections(np.array([before]), np.array([cells], np.int32), first_new=10)
    np.testing.assert_array_equal(found, expected)


def test_large_ids_stay_what_they_are():
    large = 2**53 + 1  # no number of 64 bits with a point holds it
    before = np.array([[large, large, 0, large + 1]])
    found = link_sections(before, np.array([[1, 1, 0, 2]], np.int32), first_new=large + 2)
    assert found.tolist() == [0, large, large + 1]


def test_sections_of_one_size():
    with pytest.raises(ValueError, match=r"^link_sections\(\): sections of shape \(2, 3\) and \(3, 2\) found; give"):
        link_sections(np.zeros((2, 3), int), np.zeros((3, 2), np.int32), 1)
    with pytest.raises(ValueError, match=r"^link_sections\(\): sections of shape \(2, 3\) and \(1, 3\) found"):
        list(link_stack([np.ones((2, 3), np.int32), np.ones((1, 3), np.int32)]))


def tubes(sections=6, shape=(40, 60)):
    """Three tubes: one straight, one that wanders, one that ends in the middle and another that begins there later."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    truth = np.zeros((sections, *shape), int)
    for z in range(sections):
        centres = {1: (10, 10), 2: (28, 15 + 4 * z), 3: (8, 45) if z < 2 else None, 4: (8, 45) if z > 3 else None}
        for tube, centre in centres.items():
            if centre:
                truth[z][(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 36] = tube
    return truth


def test_a_volume_of_tubes_gets_an_id_each():
    truth = tubes()
    linked = np.stack(list(link_stack(cells_between(section == 0) for section in truth)))
    assert linked.dtype == np.int64
    np.testing.assert_array_equal(linked > 0, truth > 0)
    pairs = set(zip(linked[truth > 0].tolist(), truth[truth > 0].tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 4
    assert {a for a, _ in pairs} == {1, 2, 3, 4}


def test_ids_are_unique_over_the_volume():
    """No id comes back after its cell ended, nor twice in a section."""
    sections = [random_cells(seed) for seed in range(8)]
    linked = list(link_stack(sections))
    lives: dict[int, list[int]] = {}
    for z, (ids, cells) in enumerate(zip(linked, sections, strict=True)):
        assert len(np.unique(ids[ids > 0])) == cells.max()
        for i in np.unique(ids[ids > 0]).tolist():
            lives.setdefault(i, []).append(z)
    assert sorted(lives) == list(range(1, len(lives) + 1))
    assert all(zs == list(range(zs[0], zs[-1] + 1)) for zs in lives.values())
    assert len(lives) < sum(cells.max() for cells in sections)


def test_the_id_of_a_cell_that_ended_is_not_given_again():
    sections = np.array([[[1, 0, 2]], [[1, 0, 0]], [[1, 0, 2]]], np.int32)
    assert [ids.tolist() for ids in link_stack(sections)] == [[[1, 0, 2]], [[1, 0, 0]], [[1, 0, 3]]]


def test_a_missing_section_is_passed_over():
    section = random_cells(1)
    first, missing, last = link_stack([section, np.zeros_like(section), section])
    np.testing.assert_array_equal(first, last)
    assert not missing.any()
    late = list(link_stack([np.zeros_like(section), section]))[1]
    np.testing.assert_array_equal(late, section)


def test_sections_are_taken_one_at_a_time():
    taken = []

    def sections():
        for z in range(4):
            taken.append(z)
            yield random_cells(z)

    linked = link_stack(sections())
    assert taken == []
    next(linked)
    next(linked)
    assert taken == [0, 1]
    assert list(link_stack([])) == []
