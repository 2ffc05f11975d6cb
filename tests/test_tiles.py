"""Tile grids: every property is checked on many grids drawn at random, and on the awkward ones by name."""

import numpy as np
import pytest

from limner.tiles import Rectangle, TileGrid

AWKWARD = [
    TileGrid((1, 1), window=16, alignment=16),
    TileGrid((1, 500), window=64, halo=5, alignment=4),
    TileGrid((63, 65), window=64, halo=16, alignment=16),
    TileGrid((64, 64), window=64, halo=16, alignment=16),
    TileGrid((97, 81), window=48, halo=16, alignment=16),
    TileGrid((100, 37), window=3, halo=1),
    TileGrid((90, 41), window=40, halo=8, margin=8, alignment=8),
]


def random_grids(n=300, seed=0):
    draw = np.random.default_rng(seed)
    for _ in range(n):
        alignment = int(draw.choice([1, 2, 3, 4, 8, 16]))
        halo, margin = (int(draw.integers(0, 3 * alignment + 2)) for _ in range(2))
        rounded = sum(-(-side // alignment) * alignment for side in (halo, margin))
        window = 2 * rounded + alignment * int(draw.integers(1, 6))
        yield TileGrid(tuple(draw.integers(1, 200, 2).tolist()), window, halo, margin, alignment)


GRIDS = [*AWKWARD, *random_grids()]


def sides(rectangle):
    return (rectangle.top, rectangle.bottom), (rectangle.left, rectangle.right)


def test_cores_partition_the_image():
    for grid in GRIDS:
        seen = np.zeros(grid.shape, int)
        for tile in grid:
            assert min(tile.core.shape) > 0
            seen[tile.core.slices] += 1
        assert (seen == 1).all(), grid


def test_halo_and_margin_are_whole_wherever_the_image_goes_on():
    for grid in GRIDS:
        for tile in grid:
            for inner, outer, width in ((tile.core, tile.kept, grid.margin), (tile.kept, tile.read, grid.halo)):
                for (a, b), (c, d), size in zip(sides(inner), sides(outer), grid.shape, strict=True):
                    assert c == (0 if a == 0 else a - width), (grid, tile)
                    assert d == size if b == size else d == b + width, (grid, tile)
                    assert 0 <= c <= a < b <= d <= size


def test_rectangles_begin_at_multiples_of_the_alignment_and_end_there_or_with_the_image():
    for grid in GRIDS:
        for tile in grid:
            for rectangle in (tile.core, tile.kept, tile.read):
                for (begin, end), size in zip(sides(rectangle), grid.shape, strict=True):
                    assert begin % grid.alignment == 0
                    assert end % grid.alignment == 0 or end == size


def test_no_tile_reads_more_than_the_window_and_all_are_enumerated_in_order():
    for grid in GRIDS:
        tiles = list(grid)
        assert len(tiles) == len(grid)
        assert [t.index for t in tiles] == sorted(t.index for t in tiles)
        assert all(max(tile.read.shape) <= grid.window for tile in tiles)


def test_no_fewer_tiles_would_do():
    """Along an axis n windows with halos answer for at most n * stride + 2 * (halo + margin) pixels."""
    for grid in GRIDS:
        for n, size in zip(grid.counts, grid.shape, strict=True):
            assert n == 1 or (n - 1) * grid.stride + 2 * (grid.halo + grid.margin) < size


def test_the_papers_windows_of_256_every_128():
    grid = TileGrid((700, 256), window=256, halo=64)
    assert [sides(t.read)[0] for t in grid] == [(0, 256), (128, 384), (256, 512), (384, 640), (512, 700)]
    assert [sides(t.core)[0] for t in grid] == [(0, 192), (192, 320), (320, 448), (448, 576), (576, 700)]


def test_each_pair_of_touching_tiles_is_named_once():
    for grid in (TileGrid((70, 50), window=20, halo=4), TileGrid((70, 10), 20, 4), TileGrid((10, 70), 20, 4)):
        named = [(tile.index, other.index) for tile in grid for other in grid.later_neighbours(tile)]
        touching = {
            (a.index, b.index)
            for a in grid
            for b in grid
            if a.index < b.index and max(abs(i - j) for i, j in zip(a.index, b.index, strict=True)) == 1
        }
        assert len(named) == len(set(named))
        assert set(named) == touching


def test_a_rectangle_within_another_reads_the_same_pixels():
    image = np.arange(30 * 40).reshape(30, 40)
    outer, inner = Rectangle(3, 25, 8, 33), Rectangle(7, 20, 9, 11)
    np.testing.assert_array_equal(image[outer.slices][inner.within(outer)], image[inner.slices])
    assert inner.shape == (13, 2)


def test_intersections():
    a = Rectangle(0, 10, 0, 10)
    assert a.intersection(Rectangle(4, 20, 6, 8)) == Rectangle(4, 10, 6, 8)
    assert 0 in a.intersection(Rectangle(10, 20, 0, 10)).shape
    assert 0 in a.intersection(Rectangle(15, 20, 12, 19)).shape


def test_grids_that_cannot_be():
    with pytest.raises(ValueError, match="multiple of 16 from 208 on"):
        TileGrid((500, 500), window=192, halo=94, alignment=16)
    with pytest.raises(ValueError, match="multiple of 16"):
        TileGrid((500, 500), window=250, alignment=16)
    with pytest.raises(ValueError, match="at least one pixel"):
        TileGrid((0, 5), window=16)
    with pytest.raises(ValueError, match="0 or more"):
        TileGrid((5, 5), window=16, halo=-1)
    with pytest.raises(IndexError, match=r"no tile \(0, 1\)"):
        TileGrid((5, 5), window=16)[0, 1]
