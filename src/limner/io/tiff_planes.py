"""Regions of one page of a TIFF, of which only the tiles or strips touched are read and decoded.

tifffile would also read regions, through zarr; reading the tiles here is as short, and safe where several threads read
at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from numpy.typing import NDArray

from limner.io.content import reading, unreadable

JPEG_CODES = (6, 7, 33007, 34892)  # compressions whose tiles share tables or a header
STRIP_BYTES = 1 << 16


@dataclass(frozen=True)
class Plane:
    """What is needed to read tiles (or strips) of one page once the file is closed."""

    path: Path
    size: tuple[int, int]
    samples: int
    dtype: np.dtype[Any]
    tile: tuple[int, int]
    separate: bool
    offsets: tuple[int, ...]
    n_bytes: tuple[int, ...]
    decode: Callable[[bytes, int], NDArray[Any] | None]


def planes_of(path: Path, series: tifffile.TiffPageSeries) -> list[Plane] | None:
    """Planes of all pages of a series in order; None where some are missing or lie in another file."""
    page = series.keyframe
    n_pages = math.prod(series.shape[: series.ndim - page.ndim])
    offset = series.dataoffset
    if offset is not None and not _separate(page):  # ImageJ states one page for all of a stack above 4 GB
        return [_raw_plane(path, page, offset + i * page.nbytes) for i in range(n_pages)]
    pages = [p for p in series.pages if p is not None and p.parent is page.parent]
    return [plane_of(path, p) for p in pages] if len(pages) == n_pages else None


def plane_of(path: Path, page: tifffile.TiffPage | tifffile.TiffFrame) -> Plane:
    """What one page says of itself.

    Raises
    ------
    ValueError
        If its pixels are of a type that NumPy does not know.
    """
    keyframe = page.keyframe
    if keyframe is None or keyframe.dtype is None:
        raise ValueError(f"read(): {path} holds pixels of an unknown type; export it as 8- or 16-bit integers")
    if keyframe.is_final and len(page.dataoffsets) == 1 and not _separate(keyframe):
        return _raw_plane(path, keyframe, page.dataoffsets[0])
    size = (keyframe.imagelength, keyframe.imagewidth)
    strip = (min(keyframe.rowsperstrip, size[0]), size[1])
    decode = keyframe.decode
    tables: dict[str, Any] = {}
    if keyframe.compression in JPEG_CODES:
        tables = {"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader}

    def decode_tile(data: bytes, index: int) -> NDArray[Any] | None:
        decoded = decode(data, index, **tables)[0]
        return None if decoded is None else decoded[0]

    return Plane(
        path,
        size,
        keyframe.samplesperpixel,
        np.dtype(keyframe.dtype).newbyteorder("="),
        (keyframe.tilelength, keyframe.tilewidth) if keyframe.is_tiled else strip,
        _separate(keyframe),
        tuple(page.dataoffsets),
        tuple(page.databytecounts),
        decode_tile,
    )


def _separate(page: tifffile.TiffPage) -> bool:
    return page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1


def _raw_plane(path: Path, page: tifffile.TiffPage, offset: int) -> Plane:
    """Pixels like those of `page` that lie at `offset` as they are: one strip or many, they are read in narrow ones."""
    height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
    stored = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)
    row_bytes = width * samples * stored.itemsize
    rows = min(height, max(1, STRIP_BYTES // max(1, row_bytes)))
    starts = range(0, height, max(1, rows))

    def decode(data: bytes, _: int) -> NDArray[Any]:
        return np.frombuffer(data, stored).reshape(-1, width, samples)

    return Plane(
        path,
        (height, width),
        samples,
        stored.newbyteorder("="),
        (rows, width),
        False,
        tuple(offset + y * row_bytes for y in starts),
        tuple(min(rows, height - y) * row_bytes for y in starts),
        decode,
    )


def read_plane(plane: Plane, region: tuple[int, int, int, int], absent: int = 0) -> NDArray[Any]:
    """A region (y0, y1, x0, x1) of one page, (y, x, samples), from the tiles it touches; `absent` where one is not."""
    y0, y1, x0, x1 = region
    (tile_y, tile_x), (height, width) = plane.tile, plane.size
    grid_y, grid_x = -(-height // tile_y), -(-width // tile_x)
    pixels = np.full((y1 - y0, x1 - x0, plane.samples), absent, plane.dtype)
    rows, columns = range(y0 // tile_y, -(-y1 // tile_y)), range(x0 // tile_x, -(-x1 // tile_x))
    with plane.path.open("rb") as file:
        for s, row, column in product(range(plane.samples if plane.separate else 1), rows, columns):
            tile = _tile(plane, file, (s * grid_y + row) * grid_x + column)
            if tile is None:
                continue
            top, left = row * tile_y, column * tile_x
            a0, a1 = max(y0, top), min(y1, top + tile.shape[0])
            b0, b1 = max(x0, left), min(x1, left + tile.shape[1])
            samples = slice(s, s + 1) if plane.separate else slice(None)
            pixels[a0 - y0 : a1 - y0, b0 - x0 : b1 - x0, samples] = tile[a0 - top : a1 - top, b0 - left : b1 - left]
    return pixels


def _tile(plane: Plane, file: BinaryIO, index: int) -> NDArray[Any] | None:
    """Tile or strip `index` as (y, x, samples); None where the file leaves it out."""
    if index >= min(len(plane.n_bytes), len(plane.offsets)):
        raise unreadable(plane.path, f"it has no tile {index}, which its size asks for")
    n_bytes = plane.n_bytes[index]
    if n_bytes == 0:
        return None
    file.seek(plane.offsets[index])
    data = file.read(n_bytes)
    if len(data) < n_bytes:
        raise unreadable(plane.path, f"tile {index} has {len(data)} of {n_bytes} bytes")
    with reading(plane.path):
        return plane.decode(data, index)
