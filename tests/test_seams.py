"""Labels tile by tile against labels of the whole image: the same objects up to their numbers."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import label
from skimage.segmentation import watershed

from limner.seams import label_tiles, number_objects
from limner.tiles import TileGrid


def nuclei(shape, n, seed=0):
    """Probability of nucleus: ellipses with radii from 4 to 9 pixels, some of them touching, blurred."""
    draw = np.random.default_rng(seed)
    y, x = np.indices(shape)
    mask = np.zeros(shape)
    for _ in range(n):
        cy, cx = draw.uniform(0, shape[0]), draw.uniform(0, shape[1])
        ry, rx = draw.uniform(4, 9, 2)
        mask = np.maximum(mask, ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1)
    return ndimage.gaussian_filter(mask, 0.7)


def split_by_watershed(probability):
    """Instances: every maximum of the smoothed distance to the border begins one."""
    mask = probability > 0.5
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(np.pad(mask, 1, mode="reflect")), 1)[1:-1, 1:-1]
    peaks = (ndimage.maximum_filter(distance, 7) == distance) & mask
    return watershed(-distance, label(peaks, connectivity=2), mask=mask)


def same_objects(a, b):
    """Whether two label images differ by their numbers only."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return all(len(np.unique(row)) == pairs.shape[1] for row in pairs) and ((a == 0) == (b == 0)).all()


def tiled(grid, labelled, same="overlap"):
    found = np.full(grid.shape, -1)

    def write(tile, ids):
        assert ids.dtype == np.int32
        found[tile.core.slices] = ids

    count = label_tiles(grid, labelled, write, same)
    assert sorted(np.unique(found[found > 0])) == list(range(1, count + 1))
    return found


def test_the_comparison_of_these_tests_sees_splits_merges_and_losses():
    whole = np.array([[1, 1, 0, 2]])
    assert same_objects(whole, np.array([[5, 5, 0, 3]]))
    for other in ([[1, 3, 0, 2]], [[1, 1, 0, 1]], [[1, 1, 0, 0]], [[1, 1, 1, 2]]):
        assert not same_objects(whole, np.array(other))
        assert not same_objects(np.array(other), whole)


@pytest.mark.parametrize("window", [97, 128, 150])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nuclei_split_by_watershed_are_those_of_the_whole_image(window, seed):
    probability = nuclei((250, 330), 160, seed)
    whole = split_by_watershed(probability)
    grid = TileGrid(probability.shape, window, margin=32)
    cores = np.zeros(grid.shape, int)
    for tile in grid:
        cores[tile.core.slices] = 1 + tile.index[0] * grid.counts[1] + tile.index[1]
    on_seams = sum(len(np.unique(cores[whole == k])) > 1 for k in range(1, whole.max() + 1))
    assert on_seams > 10
    assert same_objects(tiled(grid, lambda tile: split_by_watershed(probability[tile.kept.slices])), whole)


def test_an_object_on_the_corner_of_four_tiles_is_one():
    grid = TileGrid((100, 100), window=64, margin=16)
    corner = grid[1, 1].core.top, grid[1, 1].core.left
    mask = np.zeros(grid.shape, bool)
    mask[corner[0] - 5 : corner[0] + 4, corner[1] - 3 : corner[1] + 6] = True
    for same in ("overlap", "shared pixel"):
        found = tiled(grid, lambda tile: label(mask[tile.kept.slices]), same)
        np.testing.assert_array_equal(found, mask)


def test_an_object_that_meets_only_the_diagonal_tiles_is_one():
    grid = TileGrid((40, 40), window=22, margin=1)
    corner = grid[1, 1].core.top, grid[1, 1].core.left
    for side in (0, 1):  # from upper left to lower right, and from upper right to lower left
        mask = np.zeros(grid.shape, bool)
        mask[corner[0] - 1, corner[1] - 1 + side] = mask[corner[0], corner[1] - side] = True

        def labelled(tile, mask=mask):
            return label(mask[tile.kept.slices], connectivity=2)

        assert tiled(grid, labelled, "overlap").max() == 1
        assert tiled(grid, labelled, "shared pixel").max() == 1


@pytest.mark.parametrize("connectivity", [1, 2])
@pytest.mark.parametrize("share", [0.45, 0.6, 0.7])
def test_components_of_any_size_are_joined_by_a_shared_pixel(connectivity, share):
    """Percolating noise: components wind through many tiles and come back."""
    mask = np.random.default_rng(5).random((120, 150)) < share
    grid = TileGrid(mask.shape, window=23, margin=1)
    found = tiled(grid, lambda tile: label(mask[tile.kept.slices], connectivity=connectivity), "shared pixel")
    assert same_objects(found, label(mask, connectivity=connectivity))


def test_neighbours_that_touch_on_a_seam_stay_two():
    """Two nuclei that meet exactly where tiles do: joined by touch, they would be one."""
    grid = TileGrid((40, 80), window=56, margin=12)
    seam = grid[0, 1].core.left
    truth = np.zeros(grid.shape, int)
    truth[10:20, seam - 9 : seam], truth[10:20, seam : seam + 9] = 1, 2
    for same in ("overlap", "shared pixel"):
        assert same_objects(tiled(grid, lambda tile: truth[tile.kept.slices], same), truth)


def test_a_sliver_swallowed_at_the_far_end_of_the_margin_joins_nothing():
    """One tile sees the edge of the second nucleus only and gives it to the first: they stay two by 'overlap'."""
    grid = TileGrid((40, 80), window=56, margin=12)
    seam = grid[0, 1].core.left
    truth = np.zeros(grid.shape, int)
    truth[10:20, seam - 8 : seam + 9], truth[10:20, seam + 9 : seam + 20] = 1, 2

    def labelled(tile):
        seen = truth[tile.kept.slices]
        return np.minimum(seen, 1) if tile.index == (0, 0) else seen

    assert same_objects(tiled(grid, labelled), truth)


def test_tiles_without_objects_and_images_without_tiles_to_join():
    mask = np.zeros((60, 70), bool)
    mask[5:9, 5:60] = True
    grid = TileGrid(mask.shape, window=30, margin=4)

    def labelled(tile):
        return None if not mask[tile.kept.slices].any() else label(mask[tile.kept.slices])

    np.testing.assert_array_equal(tiled(grid, labelled, "shared pixel"), mask)
    assert label_tiles(grid, lambda _: None, lambda *_: None) == 0
    one = TileGrid((60, 70), window=80)
    assert same_objects(tiled(one, lambda _: label(mask)), mask.astype(int))


def test_labels_with_gaps_and_of_small_types_get_ids_without():
    whole = np.zeros((30, 70), np.uint8)
    whole[3:6, 3:6], whole[9:12, 30:40], whole[20:25, 60:66] = 200, 7, 90
    assert same_objects(tiled(TileGrid(whole.shape, 32, margin=8), lambda tile: whole[tile.kept.slices]), whole)


def test_progress_counts_both_passes():
    grid, told = TileGrid((30, 70), 32, margin=8), []
    label_tiles(grid, lambda tile: np.ones(tile.kept.shape, int), lambda *_: None, progress=lambda *s: told.append(s))
    assert told == [(i, 2 * len(grid)) for i in range(1, 2 * len(grid) + 1)]


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(ValueError, match="give the grid a margin"):
        number_objects(TileGrid((30, 30), 16), lambda tile: np.ones(tile.kept.shape, int))
    with pytest.raises(ValueError, match="label all of them"):
        number_objects(TileGrid((30, 30), 16, margin=2), lambda tile: np.ones(tile.core.shape, int))
