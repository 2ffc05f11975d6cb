"""Objects labelled tile by tile, made one object with one id where a seam runs through them.

Every tile is labelled by itself on its kept pixels: its core and a margin. Two neighbours thus both label the pixels on
either side of the seam between them, and there it is decided which of their labels mean the same object. In the end
each pixel gets the id of what the tile answering for it found there. Further from the seam nothing is compared: near
the end of its margin a tile sees objects cut off, and comparing those joined touching nuclei that are two.

Where what is found at a pixel depends on pixels no further than the margin (a watershed of nuclei smaller than it),
neighbours agree and the result is that of the whole image up to the numbering. Where they do not, `'overlap'` errs to
the side of parting. `'shared pixel'` is exact for connected components of any size, given a margin of one pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from limner.tiles import Rectangle, Tile, TileGrid

Rule = Literal["overlap", "shared pixel"]
Labels = NDArray[Any]
Labelled = Callable[[Tile], Labels | None]


@dataclass(frozen=True)
class Numbering:
    """Ids of the objects of all tiles.

    Parameters
    ----------
    offsets : dict of (int, int) to int
        Of each tile that holds objects: its label k is object ``offsets[index] + k - 1`` of all labels.
    ids : ndarray of int32
        Id of each label of each tile, 1 to `count`; 0 for those that no tile answers for.
    count : int
        Number of objects in the image.
    """

    offsets: dict[tuple[int, int], int]
    ids: NDArray[np.int32]
    count: int

    def apply(self, tile: Tile, labels: Labels | None) -> NDArray[np.int32]:
        """Ids in a tile's core, from its labels (on the kept pixels) as `number_objects` was given them."""
        if labels is None or tile.index not in self.offsets:
            return np.zeros(tile.core.shape, np.int32)
        offset = self.offsets[tile.index]
        core = labels[tile.core.within(tile.kept)].astype(np.int64)
        return np.where(core > 0, self.ids[np.maximum(core, 1) + (offset - 1)], np.int32(0))


def label_tiles(
    grid: TileGrid,
    labelled: Labelled,
    write: Callable[[Tile, NDArray[np.int32]], None],
    same: Rule = "overlap",
    progress: Callable[[int, int], None] = lambda *_: None,
) -> int:
    """Label an image tile by tile, ids unique over the image and without gaps.

    Memory: one tile, two rows of pixels along one row of tiles, and some 20 bytes for each object.

    Parameters
    ----------
    grid : TileGrid
        With a margin of at least one pixel; as wide as what the labels of a pixel depend on.
    labelled : callable
        ``labelled(tile)`` gives the labels of ``tile.kept``, 1 to n, 0 background, or None where there are none. Called
        twice for each tile and must answer alike; what costs much should be computed once and read from a store.
    write : callable
        ``write(tile, ids)`` with the ids of ``tile.core``.
    same : {'overlap', 'shared pixel'}
        When labels of two neighbours are one object: of the pixels beside the seam that have either label more than
        half have both; or any has both.
    progress : callable
        ``progress(done, total)``, twice the number of tiles in total.

    Returns
    -------
    int
        Number of objects.

    Raises
    ------
    ValueError
        When the grid has no margin but more than one tile, or labels are not of the shape of ``tile.kept``.

    Examples
    --------
    >>> from skimage.measure import label
    >>> mask = np.zeros((8, 30), bool)
    >>> mask[2:4, 3:27] = mask[6, 5] = True
    >>> found = np.zeros(mask.shape, int)
    >>> def write(tile, ids):
    ...     found[tile.core.slices] = ids
    >>> grid = TileGrid(mask.shape, window=10, margin=1)
    >>> label_tiles(grid, lambda tile: label(mask[tile.kept.slices]), write, same="shared pixel")
    2
    >>> found[3, 3], found[3, 26], found[6, 5]
    (np.int64(1), np.int64(1), np.int64(2))
    """
    total = 2 * len(grid)
    numbering = number_objects(grid, labelled, same, lambda done, _: progress(done, total))
    for done, tile in enumerate(grid, 1):
        write(tile, numbering.apply(tile, labelled(tile)))
        progress(len(grid) + done, total)
    return numbering.count


def number_objects(
    grid: TileGrid,
    labelled: Labelled,
    same: Rule = "overlap",
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Numbering:
    """Which labels of which tiles are one object; parameters as for `label_tiles`."""
    if grid.margin == 0 and len(grid) > 1:
        raise ValueError("number_objects(): tiles without a margin do not see each other; give the grid a margin")
    pairs: list[tuple[int, int]] = []
    offsets: dict[tuple[int, int], int] = {}
    answered_for: list[NDArray[np.bool_]] = []
    waiting: dict[tuple[int, int], list[tuple[Rectangle, NDArray[np.int64]]]] = {}
    total = 0
    for done, tile in enumerate(grid, 1):
        seen = waiting.pop(tile.index, [])
        labels = _checked(labelled(tile), tile)
        if labels is not None and (n := int(labels.max(initial=0))):
            offsets[tile.index] = total
            numbered = np.where(labels > 0, labels.astype(np.int64) + total, 0)
            for place, before in seen:
                pairs += _same(before, numbered[place.within(tile.kept)], same)
            for other in grid.later_neighbours(tile):
                place = _beside_seam(tile, other)
                waiting.setdefault(other.index, []).append((place, numbered[place.within(tile.kept)].copy()))
            answered_for.append(np.bincount(labels[tile.core.within(tile.kept)].ravel(), minlength=n + 1)[1:] > 0)
            total += n
        progress(done, len(grid))
    root = _roots(total, pairs)
    in_core = np.concatenate(answered_for) if answered_for else np.zeros(0, bool)
    shown, first = np.unique(root[in_core], return_index=True)
    numbers = np.zeros(total, np.int32)
    numbers[shown[np.argsort(first)]] = np.arange(1, len(shown) + 1)  # in the order in which tiles show them
    return Numbering(offsets, numbers[root], len(shown))


def _checked(labels: Labels | None, tile: Tile) -> Labels | None:
    if labels is not None and labels.shape != tile.kept.shape:
        raise ValueError(
            f"number_objects(): labels of tile {tile.index} have shape {labels.shape}, "
            f"its kept pixels {tile.kept.shape}; label all of them"
        )
    return labels


def _beside_seam(tile: Tile, other: Tile) -> Rectangle:
    """Pixels on either side of the seam of two tiles: two rows or columns, or four pixels where corners meet."""

    def grown(core: Rectangle) -> Rectangle:
        return Rectangle(core.top - 1, core.bottom + 1, core.left - 1, core.right + 1)

    seam = grown(tile.core).intersection(grown(other.core))
    return seam.intersection(tile.kept).intersection(other.kept)


def _same(a: NDArray[np.int64], b: NDArray[np.int64], same: Rule) -> list[tuple[int, int]]:
    """Pairs of labels that are one object, from what two tiles found in the same pixels."""
    common = (a > 0) & (b > 0)
    pairs, together = np.unique(np.stack([a[common], b[common]]), axis=1, return_counts=True)
    if same == "overlap":
        alone = [dict(zip(*np.unique(found, return_counts=True), strict=True)) for found in (a, b)]
        sizes = np.array([[of[n] for n in row] for of, row in zip(alone, pairs, strict=True)]).reshape(pairs.shape)
        pairs = pairs[:, 2 * together > sizes.sum(axis=0) - together]
    return [(int(i), int(j)) for i, j in pairs.T]


def _roots(total: int, pairs: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """The smallest label (from 0) of the object of each of labels 1 to `total`."""
    parent = np.arange(total)

    def find(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = int(parent[label])
        return label

    for a, b in pairs:
        i, j = find(a - 1), find(b - 1)
        parent[max(i, j)] = min(i, j)
    while (parent[parent] != parent).any():
        parent = parent[parent]
    return parent
