"""A grid of tiles over an image: what each tile reads, what it keeps and what it answers for. Pure geometry.

Three rectangles, each inside the next::

    core    the tile answers for these pixels; the cores of a grid partition the image
    kept    the core and `margin` around it: results hold here, and neighbours see one another's objects
    read    the kept pixels and `halo` around them: what a network must see for its results to hold

None of them leaves the image: where the image ends, so does the tile, and a network's padding meets the same border as
on the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Rectangle:
    """Pixels of an image: rows `top` to `bottom` and columns `left` to `right`, the last ones not included.

    Examples
    --------
    >>> seen = Rectangle(0, 8, 16, 32)
    >>> seen.shape, seen.slices
    ((8, 16), (slice(0, 8, None), slice(16, 32, None)))
    >>> Rectangle(2, 4, 20, 24).within(seen)
    (slice(2, 4, None), slice(4, 8, None))
    """

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bottom - self.top, self.right - self.left

    @property
    def slices(self) -> tuple[slice, slice]:
        """The rectangle as an index into the image."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def within(self, other: Rectangle) -> tuple[slice, slice]:
        """The rectangle as an index into what was read of `other`, which holds it."""
        rows = slice(self.top - other.top, self.bottom - other.top)
        return rows, slice(self.left - other.left, self.right - other.left)

    def intersection(self, other: Rectangle) -> Rectangle:
        """Pixels of both; of shape (0, .) or (., 0) when there are none."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        return Rectangle(top, max(top, min(self.bottom, other.bottom)), left, max(left, min(self.right, other.right)))


@dataclass(frozen=True)
class Tile:
    """One tile of a grid.

    Parameters
    ----------
    index : tuple of int
        Row and column in the grid.
    core, kept, read : Rectangle
        See the head of this module.
    """

    index: tuple[int, int]
    core: Rectangle
    kept: Rectangle
    read: Rectangle


@dataclass(frozen=True)
class TileGrid:
    """Tiles over an image of shape (Y, X), every one within a window of at most `window` pixels along each side.

    Windows begin at multiples of `stride`; the last of a row or column ends with the image. A tile at the border has
    no halo there, but a larger core.

    Parameters
    ----------
    shape : tuple of int
        Size (Y, X) of the image, at least one pixel.
    window : int
        Longest side of `read`: it bounds the memory. A multiple of `alignment`.
    halo, margin : int
        Pixels around `kept` and around `core`; each is rounded up to a multiple of `alignment`.
    alignment : int
        All rectangles begin at multiples of it, so that a network's poolings fall on the same pixels as in the whole
        image: the product of the poolings.

    Raises
    ------
    ValueError
        When the image is empty, or the window is no multiple of the alignment or holds nothing but halo and margin.

    Examples
    --------
    >>> grid = TileGrid((50, 300), window=128, halo=20, alignment=16)
    >>> grid.counts, grid.halo, grid.stride
    ((1, 4), 32, 64)
    >>> for tile in grid:
    ...     print(tile.core.slices[1], tile.read.slices[1])
    slice(0, 96, None) slice(0, 128, None)
    slice(96, 160, None) slice(64, 192, None)
    slice(160, 224, None) slice(128, 256, None)
    slice(224, 300, None) slice(192, 300, None)
    """

    shape: tuple[int, int]
    window: int
    halo: int = 0
    margin: int = 0
    alignment: int = 1

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"TileGrid(): the image has shape {self.shape}; give at least one pixel")
        if min(self.halo, self.margin) < 0 or self.alignment < 1:
            raise ValueError("TileGrid(): halo and margin are 0 or more, alignment is 1 or more")
        for name in ("halo", "margin"):
            rounded = math.ceil(getattr(self, name) / self.alignment) * self.alignment
            object.__setattr__(self, name, rounded)
        least = 2 * (self.halo + self.margin) + self.alignment
        if self.window % self.alignment or self.window < least:
            raise ValueError(
                f"TileGrid(): a window of {self.window} does not fit halo {self.halo} and margin {self.margin}; "
                f"give a multiple of {self.alignment} from {least} on"
            )

    @property
    def stride(self) -> int:
        """Distance between windows."""
        return self.window - 2 * (self.halo + self.margin)

    @property
    def counts(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        around = 2 * (self.halo + self.margin)
        rows, columns = (max(1, math.ceil((size - around) / self.stride)) for size in self.shape)
        return rows, columns

    def __len__(self) -> int:
        return math.prod(self.counts)

    def __iter__(self) -> Iterator[Tile]:
        rows, columns = self.counts
        return (self[row, column] for row in range(rows) for column in range(columns))

    def __getitem__(self, index: tuple[int, int]) -> Tile:
        if not all(0 <= i < n for i, n in zip(index, self.counts, strict=True)):
            raise IndexError(f"TileGrid(): no tile {index} in a grid of {self.counts}")
        core, kept, read = (
            Rectangle(*self._span(index[0], 0, inset), *self._span(index[1], 1, inset))
            for inset in (self.halo + self.margin, self.halo, 0)
        )
        return Tile(index, core, kept, read)

    def _span(self, i: int, axis: int, inset: int) -> tuple[int, int]:
        """The i-th window along an axis, drawn in by `inset` on the sides where the image goes on."""
        begin, size = i * self.stride, self.shape[axis]
        first, last = i == 0, i == self.counts[axis] - 1
        return begin + (0 if first else inset), size if last else begin + self.window - inset

    def later_neighbours(self, tile: Tile) -> list[Tile]:
        """The up to four tiles that touch `tile`, corners included, and follow it in the order of the grid."""
        row, column = tile.index
        rows, columns = self.counts
        around = ((row, column + 1), (row + 1, column - 1), (row + 1, column), (row + 1, column + 1))
        return [self[r, c] for r, c in around if r < rows and 0 <= c < columns]
