"""Objects found tile by tile, against those of the whole image at once and against scikit-image's measures."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from skimage.color import rgb2hed
from skimage.measure import regionprops

from limner.inference import Options
from limner.io import LabelStream
from limner.io.outlines import fill_all
from limner.methods.partial_nuclei import Separation, separate
from limner.slide_objects import join_tiles, measure, open_tiles, separate_tiles, tally_of
from limner.tissue import TissueMap

OPTIONS = Options(window=448, margin=64, device="cpu")
ONE_WINDOW = replace(OPTIONS, window=4096)


def nuclei(probability):
    return separate(probability, 0.25, Separation())


def find(network, image, folder, options=OPTIONS, **more):
    tiles = open_tiles(folder, options.grid(network, image.shape[:2]), "key")
    separate_tiles(network, image, nuclei, tiles, options, **more)
    labels, probability = np.zeros(image.shape[:2], np.int32), np.zeros(image.shape[:2], np.uint8)
    tally = join_tiles(tiles, labels, probability)
    return tiles, tally, labels, probability


def same_objects(a, b):
    """Whether two label images differ by their numbers only."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return all(len(np.unique(row)) == pairs.shape[1] for row in pairs) and ((a == 0) == (b == 0)).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_many_tiles_find_the_objects_of_the_whole_image(dark_network, blobs, tmp_path, seed):
    image = blobs((700, 600), 330, seed)
    tiles, _, found, probability = find(dark_network, image, tmp_path / "many")
    one, _, whole, whole_probability = find(dark_network, image, tmp_path / "one", ONE_WINDOW)
    assert (len(one.grid), tiles.grid.counts) == (1, (3, 3))
    darkness = 1 - image.mean(axis=2) / 255
    expected = 1 / (1 + np.exp(-20 * (darkness - 0.5)))
    np.testing.assert_allclose(whole_probability / 255, expected, atol=0.51 / 255)
    assert same_objects(whole, nuclei(expected.astype(np.float32)))
    assert same_objects(found, whole)
    np.testing.assert_allclose(probability.astype(int), whole_probability, atol=1)
    owner = np.zeros(found.shape, int)
    for number, tile in enumerate(tiles.grid):
        owner[tile.core.slices] = number
    shared = [len(np.unique(owner[found == k])) for k in range(1, found.max() + 1)]
    assert sum(n > 1 for n in shared) > 20
    assert max(shared) > 2  # on a corner


def check_against_regionprops(parts, labels, image, probability):
    """Every object once, with scikit-image's measures, and outlines that fill to the very pixels."""
    rows = {int(k): (part, i) for part in parts for i, k in enumerate(part.table["label"])}
    assert sum(len(part.table["label"]) for part in parts) == len(rows)
    stain = rgb2hed(image)[..., 0]
    expected = regionprops(labels, np.stack([stain, probability / 255], axis=-1))
    assert sorted(rows) == [prop.label for prop in expected]
    for prop in expected:
        part, i = rows[prop.label]
        row = {name: column[i] for name, column in part.table.items()}
        assert (row["centroid_y_px"], row["centroid_x_px"]) == pytest.approx(prop.centroid)
        assert row["centroid_y_um"] == pytest.approx((prop.centroid[0] + 0.5) * 0.25)
        assert row["area_um2"] == pytest.approx(prop.num_pixels * 0.0625)
        assert row["eccentricity"] == pytest.approx(prop.eccentricity)
        assert (row["mean_haematoxylin"], row["mean_probability"]) == pytest.approx(tuple(prop.intensity_mean))
    outlines = [outline for part in parts for outline in part.outlines()]
    np.testing.assert_array_equal(fill_all(outlines, [o.label for o in outlines], labels.shape), labels)


@pytest.mark.parametrize("side", [64, 1024])
def test_measures_and_outlines_are_those_of_the_label_image(dark_network, blobs, tmp_path, side):
    image = blobs((500, 450), 120)
    _, tally, labels, probability = find(dark_network, image, tmp_path)
    assert tally.present.tolist() == list(range(1, labels.max() + 1))
    told = []
    parts = list(measure(tally, labels, image, (0.25, 0.25), lambda *said: told.append(said), side=side))
    assert (len(parts) > 30) == (side == 64)
    assert told[-1] == (len(tally.present), len(tally.present))
    check_against_regionprops(parts, labels, image, probability)


def test_objects_streamed_to_ome_zarr_are_read_back_from_there(dark_network, blobs, tmp_path):
    image = blobs((420, 430), 60)
    tiles, _, labels, probability = find(dark_network, image, tmp_path / "tiles")
    with LabelStream(tmp_path / "a.zarr", (420, 430), (0.25, 0.25)) as stream:
        tally = join_tiles(tiles, stream)
        check_against_regionprops(list(measure(tally, stream, image, (0.25, 0.25))), labels, image, probability)


def test_objects_larger_than_a_square_come_alone_and_the_largest_thinned_out():
    labels = np.zeros((400, 500), np.int32)
    labels[3:5, 3:9] = 1
    labels[10:390, 20:60] = 2  # longer than four squares of 32: every sixth pixel
    labels[300:350, 100:120] = 3
    tally = tally_of(labels, np.full(labels.shape, 51, np.uint8))
    parts = list(measure(tally, labels, np.full((*labels.shape, 3), 90, np.uint8), (0.5, 0.25), side=32))
    assert [part.table["label"].tolist() for part in parts] == [[1], [2], [3]]
    assert [part.step for part in parts] == [1, 6, 1]
    large = parts[1].table
    assert large["area_um2"].tolist() == [380 * 40 * 0.125]
    assert large["centroid_y_px"][0] == pytest.approx(199.5, abs=3)
    assert large["centroid_x_um"][0] == pytest.approx(10.0, abs=0.75)
    assert np.isnan(large["mean_haematoxylin"]).all()
    assert [part.table["mean_probability"].tolist() for part in parts] == [[0.2]] * 3
    (outline,) = parts[1].outlines()
    assert outline.area == pytest.approx(380 * 40, rel=0.1)


def test_a_long_thin_object_is_measured_too():
    labels = np.zeros((12, 500), np.int32)
    labels[4, 11:480] = 1
    labels[3, 12] = 1  # every sixth row and column would meet none of it
    tally = tally_of(labels, np.full(labels.shape, 51, np.uint8))
    (part,) = measure(tally, labels, np.full((*labels.shape, 3), 90, np.uint8), (0.5, 0.5), side=32)
    assert part.step > 1
    assert part.table["label"].tolist() == [1]
    assert part.table["area_um2"].tolist() == [470 * 0.25]
    assert part.table["centroid_x_px"][0] == pytest.approx(245, abs=6)
    assert len(list(part.outlines())) == 1


class Watched:
    """An image that counts who reads it, and may stop the run."""

    def __init__(self, pixels, most=10**9):
        self.pixels, self.shape, self.reads, self.most = pixels, pixels.shape, 0, most

    def __getitem__(self, region):
        if self.reads == self.most:
            raise KeyboardInterrupt
        self.reads += 1
        return self.pixels[region]


def test_a_stopped_run_goes_on_and_other_settings_start_anew(dark_network, blobs, tmp_path):
    image = blobs((700, 600), 300)
    _, _, expected, _ = find(dark_network, image, tmp_path / "at once")
    with pytest.raises(KeyboardInterrupt):
        find(dark_network, Watched(image, most=5), tmp_path / "stopped")
    again = Watched(image)
    _, _, found, _ = find(dark_network, again, tmp_path / "stopped")
    assert again.reads == 9 - 5
    np.testing.assert_array_equal(found, expected)
    grid = OPTIONS.grid(dark_network, image.shape[:2])
    (tmp_path / "stopped" / "tile-notes.txt").write_text("a user's")
    other = open_tiles(tmp_path / "stopped", grid, "another key")
    assert not any(tile in other for tile in grid)
    assert (tmp_path / "stopped" / "tile-notes.txt").exists()
    other_grid = ONE_WINDOW.grid(dark_network, image.shape[:2])
    shutil.copytree(tmp_path / "at once", tmp_path / "copy")
    assert grid[0, 0] in open_tiles(tmp_path / "copy", grid, "key")
    assert other_grid[0, 0] not in open_tiles(tmp_path / "copy", other_grid, "key")


def test_a_damaged_tile_is_named(dark_network, blobs, tmp_path):
    tiles, *_ = find(dark_network, blobs((60, 60), 3), tmp_path)
    path = tmp_path / "tile-00000-00000.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"tile-00000-00000.npz is damaged .*; delete it and run again"):
        join_tiles(tiles, np.zeros((60, 60), np.int32))


def test_glass_is_not_looked_at(dark_network, blobs, tmp_path):
    image = Watched(blobs((700, 600), 300))
    mask = np.zeros((7, 6), bool)
    mask[1, 1] = True
    tiles, tally, labels, probability = find(dark_network, image.pixels, tmp_path, tissue=TissueMap(mask, (700, 600)))
    kept = [tile for tile in tiles.grid if tile in tiles]
    assert [tile.index for tile in kept] == [(0, 0)]  # what the others keep begins at pixel 192
    outside = np.ones(labels.shape, bool)
    outside[kept[0].core.slices] = False
    assert not labels[outside].any()
    assert not probability[outside].any()
    assert len(tally.present) == labels.max() > 10


def test_an_image_without_objects(dark_network, tmp_path):
    image = np.full((500, 480, 3), 255, np.uint8)
    _, tally, labels, _ = find(dark_network, image, tmp_path)
    assert not labels.any()
    assert list(measure(tally, labels, image, (0.25, 0.25))) == []
