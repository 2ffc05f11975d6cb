"""From a network and an image of any size to its objects, in memory bounded by the tile.

Three stages, each of which a stopped run goes on from:

1. `separate_tiles`: the network's probability of each tile, made objects by a function handed in, into one file a tile;
2. `join_tiles`: objects made one across seams, ids written region by region, and what is known of each counted up;
3. `measure`: the table and outlines of the objects, those of one tile after the other, each object once.

Where what `separate` finds at a pixel depends on pixels no further than the grid's margin, the result is that of the
whole image at once.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from skimage.measure import block_reduce

from limner.inference import Image, Options, TiledNetwork, predict
from limner.io.outlines import Outline, trace
from limner.object_table import object_table
from limner.run_record import ONE_READS, content_key, write_atomically
from limner.seams import number_objects
from limner.tiles import Rectangle, Tile, TileGrid
from limner.tissue import TissueMap

Separate = Callable[[NDArray[np.float32]], NDArray[np.int32]]
Progress = Callable[[int, int], None]
PROBABILITY_STEPS = 255  # probabilities are kept in 8 bit
KEY = "key"


class Region(Protocol):
    """Pixels (Y, X) that are written and read by two slices: an array, or `limner.io.LabelStream`."""

    def __setitem__(self, key: tuple[slice, slice], values: NDArray[Any]) -> None:
        """Write a region."""

    def __getitem__(self, key: tuple[slice, slice]) -> NDArray[Any]:
        """Read a region."""


@dataclass(frozen=True)
class SeparatedTiles:
    """What was found in each tile of a grid, one compressed file a tile; made by `open_tiles`.

    Parameters
    ----------
    folder : Path
        Holds ``tile-ROW-COLUMN.npz`` and the key of what they were made from.
    grid : TileGrid
        The tiles.
    """

    folder: Path
    grid: TileGrid

    def __contains__(self, tile: Tile) -> bool:
        """Whether the tile is done: its file is there, for files come complete or not at all."""
        return self._path(tile).exists()

    def save(self, tile: Tile, labels: NDArray[np.int32], probability: NDArray[np.uint8]) -> None:
        """Keep a tile: its labels on the kept pixels, its probability in the core in 1/255."""
        small = labels.astype(np.min_scalar_type(int(labels.max(initial=0))))
        write_atomically(
            self._path(tile), lambda file: np.savez_compressed(file, labels=small, probability=probability)
        )

    def labels(self, tile: Tile) -> NDArray[Any] | None:
        """Labels of the kept pixels, 1 to n; None where the tile was passed over."""
        return self._load(tile, "labels")

    def probability(self, tile: Tile) -> NDArray[Any] | None:
        """Probability in the core, in 1/255; None where the tile was passed over."""
        return self._load(tile, "probability")

    def _load(self, tile: Tile, name: str) -> NDArray[Any] | None:
        path = self._path(tile)
        if not path.exists():
            return None
        try:
            with ONE_READS, path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                return np.asarray(saved[name])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"SeparatedTiles(): {path} is damaged ({error}); delete it and run again") from None

    def _path(self, tile: Tile) -> Path:
        return self.folder / f"tile-{tile.index[0]:05}-{tile.index[1]:05}.npz"


def open_tiles(folder: Path, grid: TileGrid, key: str) -> SeparatedTiles:
    """The tiles of `grid` that lie in a folder; those made from something else are removed first.

    Parameters
    ----------
    folder : Path
        Made if missing.
    grid : TileGrid
        From `Options.grid`.
    key : str
        Names what the tiles are made from: image, network and settings (`content_key`).

    Examples
    --------
    >>> import tempfile
    >>> grid = TileGrid((4, 4), window=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     open_tiles(Path(folder), grid, "a").save(grid[0, 0], np.eye(4, dtype=np.int32), np.zeros((4, 4), np.uint8))
    ...     [grid[0, 0] in open_tiles(Path(folder), grid, key) for key in "aba"]
    [True, False, False]
    """
    folder.mkdir(parents=True, exist_ok=True)
    note, whole_key = folder / KEY, content_key(key, grid)
    if not note.exists() or note.read_text(encoding="ascii", errors="replace") != whole_key:
        for file in folder.glob("tile-*.npz"):
            file.unlink()
        write_atomically(note, lambda file: file.write(whole_key.encode()))
    return SeparatedTiles(folder, grid)


def separate_tiles(
    network: TiledNetwork,
    image: Image,
    separate: Separate,
    tiles: SeparatedTiles,
    options: Options,
    *,
    tissue: TissueMap | None = None,
    progress: Progress = lambda *_: None,
) -> None:
    """Objects of every tile, kept in `tiles`; those that are there already are passed over, and so is glass.

    Parameters
    ----------
    network : TiledNetwork
        Its class 1 is what is looked for.
    image : array-like
        Shape (Y, X, C), such as `limner.io.Level`.
    separate : callable
        From the probability of class 1 (y, x), float32, to labels (y, x), 1 to n.
    tiles : SeparatedTiles
        Of the grid that `options` gives.
    options : Options
        Windows, margin, device, scheduler.
    tissue : TissueMap, optional
        Tiles that keep no tissue are neither read nor computed.
    progress : callable
        ``progress(done, total)`` in tiles.
    """

    def write(tile: Tile, probabilities: NDArray[np.float32]) -> None:
        labels = separate(probabilities[1])
        core = probabilities[1][tile.core.within(tile.kept)]
        tiles.save(tile, labels, np.rint(core * PROBABILITY_STEPS).astype(np.uint8))

    def is_glass(tile: Tile) -> bool:
        kept = tile.kept
        return tissue is not None and not tissue.holds_tissue((kept.top, kept.bottom), (kept.left, kept.right))

    done = {tile.index for tile in tiles.grid if tile in tiles or is_glass(tile)}
    predict(network, image, write, options, done=done, progress=progress)


class Tally:
    """What is counted of each object while ids are written: 32 bytes an object.

    Parameters
    ----------
    count : int
        Largest id; ids count from 1.

    Attributes
    ----------
    top, bottom, left, right : ndarray of int32
        By id: the object's box, last row and column not included.
    pixels : ndarray of int64
        By id: number of pixels.
    probability : ndarray of int64
        By id: sum of the probability, in 1/255.
    """

    def __init__(self, count: int) -> None:
        most = np.iinfo(np.int32).max
        self.top, self.left = np.full(count + 1, most, np.int32), np.full(count + 1, most, np.int32)
        self.bottom, self.right = np.zeros(count + 1, np.int32), np.zeros(count + 1, np.int32)
        self.pixels, self.probability = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)

    def add(self, region: Rectangle, ids: NDArray[np.int32], probability: NDArray[np.uint8]) -> None:
        """Count a region's ids (y, x) and their probability in 1/255; no pixel may be counted twice."""
        rows, columns = np.nonzero(ids)
        found = ids[rows, columns]
        np.minimum.at(self.top, found, (rows + region.top).astype(np.int32))
        np.maximum.at(self.bottom, found, (rows + region.top + 1).astype(np.int32))
        np.minimum.at(self.left, found, (columns + region.left).astype(np.int32))
        np.maximum.at(self.right, found, (columns + region.left + 1).astype(np.int32))
        np.add.at(self.pixels, found, 1)
        np.add.at(self.probability, found, probability[rows, columns].astype(np.int64))

    @property
    def present(self) -> NDArray[np.int64]:
        """Ids that have pixels, increasing."""
        return np.flatnonzero(self.pixels)

    def mean_probability(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Mean probability of objects, 0 to 1."""
        return self.probability[ids] / self.pixels[ids] / PROBABILITY_STEPS

    def box(self, ids: NDArray[np.integer[Any]]) -> Rectangle:
        """The smallest rectangle that holds all of some objects."""
        return Rectangle(
            int(self.top[ids].min()), int(self.bottom[ids].max()), int(self.left[ids].min()), int(self.right[ids].max())
        )


def tally_of(labels: NDArray[np.int32], probability: NDArray[np.uint8]) -> Tally:
    """What is counted of a label image (Y, X) in memory; the probability is in 1/255.

    Examples
    --------
    >>> tally = tally_of(np.array([[0, 2, 2]], np.int32), np.array([[9, 255, 0]], np.uint8))
    >>> tally.present.tolist(), tally.box(tally.present), tally.mean_probability(tally.present).tolist()
    ([2], Rectangle(top=0, bottom=1, left=1, right=3), [0.5])
    """
    tally = Tally(int(labels.max(initial=0)))
    tally.add(Rectangle(0, labels.shape[0], 0, labels.shape[1]), labels, probability)
    return tally


def join_tiles(
    tiles: SeparatedTiles, labels: Region, probability: Region | None = None, progress: Progress = lambda *_: None
) -> Tally:
    """Make the objects of all tiles one across seams, and write their ids.

    Parameters
    ----------
    tiles : SeparatedTiles
        As `separate_tiles` left them.
    labels : array-like
        Ids are written there, 1 to the number of objects, increasing from tile to tile; 0 is background. It must be 0
        before, for of tiles passed over nothing is written.
    probability : array-like, optional
        The probability is written there, in 1/255; likewise 0 before.
    progress : callable
        ``progress(done, total)``, twice the number of tiles in total.

    Returns
    -------
    Tally
        Of the ids written.

    Raises
    ------
    ValueError
        If a tile's file is damaged.
    """
    grid = tiles.grid
    total = 2 * len(grid)
    numbering = number_objects(grid, tiles.labels, progress=lambda done, _: progress(done, total))
    tally = Tally(numbering.count)
    for done, tile in enumerate(grid, 1):
        separated, found = tiles.labels(tile), tiles.probability(tile)
        if separated is not None and found is not None:
            ids = numbering.apply(tile, separated)
            labels[tile.core.slices] = ids
            if probability is not None:
                probability[tile.core.slices] = found
            tally.add(tile.core, ids, found)
        progress(len(grid) + done, total)
    return tally


@dataclass(frozen=True)
class Measured:
    """Some whole objects.

    Parameters
    ----------
    region : Rectangle
        Where they lie.
    labels : ndarray of int32
        The region without any other object, in pixels `step` times as large as the image's.
    table : dict of str to ndarray
        As of `object_table`, with the mean probability.
    step : int
        1, but for an object too large to be looked at pixel by pixel: its table then has no haematoxylin.
    """

    region: Rectangle
    labels: NDArray[np.int32]
    table: dict[str, NDArray[Any]]
    step: int = 1

    def outlines(self) -> Iterator[Outline]:
        """Their outlines, in pixels of the whole image, by increasing label."""
        for outline in trace(self.labels):
            yield outline.scaled(self.step, self.step).shifted(self.region.top, self.region.left)


def measure(
    tally: Tally,
    labels: Region,
    image: Image,
    um_per_px: tuple[float, float],
    progress: Progress = lambda *_: None,
    *,
    side: int = 1024,
) -> Iterator[Measured]:
    """Measure every object once, some at a time, by reading back where they lie.

    Parameters
    ----------
    tally : Tally
        Of the labels.
    labels : array-like
        Ids (Y, X) as they were written.
    image : array-like
        RGB (Y, X, 3) of 8 bit, on the same pixels.
    um_per_px : tuple of float
        Size of a pixel (y, x) in micrometres.
    progress : callable
        ``progress(done, total)`` in objects.
    side : int
        Objects whose boxes begin in the same square of this side are measured together. Longer ones come alone, and
        thinned out where they are longer than twice that: it bounds the memory.

    Yields
    ------
    Measured
        Square by square.
    """
    done, present = 0, tally.present
    for ids in _by_square(tally, present, side):
        yield _measured(tally, ids, labels, image, um_per_px, 2 * side)
        done += len(ids)
        progress(done, len(present))


def _by_square(tally: Tally, ids: NDArray[np.int64], side: int) -> Iterator[NDArray[np.int64]]:
    """Ids whose boxes begin in the same square; those longer than a square come alone."""
    height, width = tally.bottom[ids] - tally.top[ids], tally.right[ids] - tally.left[ids]
    large = np.maximum(height, width) > side
    small = ids[~large]
    row, column = tally.top[small].astype(np.int64) // side, tally.left[small].astype(np.int64) // side
    square = row * (column.max(initial=0) + 1) + column
    order = np.argsort(square, kind="stable")
    yield from (part for part in np.split(small[order], np.flatnonzero(np.diff(square[order])) + 1) if len(part))
    yield from np.split(ids[large], large.sum()) if large.any() else ()


def _own(labels: Region, region: Rectangle, ids: NDArray[np.int64]) -> NDArray[np.int32]:
    """A region without any other object."""
    found = np.asarray(labels[region.slices])
    return np.where(np.isin(found, ids), found, 0).astype(np.int32)


def _thinned(labels: Region, region: Rectangle, ids: NDArray[np.int64], step: int) -> NDArray[np.int32]:
    """One object of a region in pixels `step` times as large: each of which any part belongs to it."""
    rows = [
        Rectangle(top, min(top + step, region.bottom), region.left, region.right)
        for top in range(region.top, region.bottom, step)
    ]
    return np.concatenate([block_reduce(_own(labels, row, ids), step, np.max) for row in rows])  # type: ignore[no-untyped-call]


def _measured(
    tally: Tally, ids: NDArray[np.int64], labels: Region, image: Image, um_per_px: tuple[float, float], longest: int
) -> Measured:
    region = tally.box(ids)
    step = math.ceil(max(region.shape) / longest)
    own = _own(labels, region, ids) if step == 1 else _thinned(labels, region, ids, step)
    pixels = np.asarray(image[region.slices]) if step == 1 else None
    size = um_per_px[0] * step, um_per_px[1] * step
    table = object_table(own, pixels, size)
    for axis, start, size_px in (("y", region.top, um_per_px[0]), ("x", region.left, um_per_px[1])):
        # the middle of a coarse pixel, in pixels of the whole image
        table[f"centroid_{axis}_px"] = (table[f"centroid_{axis}_px"] + 0.5) * step - 0.5 + start
        table[f"centroid_{axis}_um"] = (table[f"centroid_{axis}_px"] + 0.5) * size_px
    table["area_um2"] = tally.pixels[table["label"]] * um_per_px[0] * um_per_px[1]
    table["mean_probability"] = tally.mean_probability(table["label"])
    return Measured(region, own, table, step)
