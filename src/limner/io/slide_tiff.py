"""Slides in TIFF: SVS, NDPI, OME-TIFF and other tiled TIFF, of which only the tiles touched are read and decoded.

tifffile knows the dialects, among them NDPI's one huge JPEG a level, which its restart markers cut into tiles.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from limner.io.content import unreadable
from limner.io.tiff import damage_raises, ome_spacing
from limner.io.tiff_planes import plane_of, read_plane

# Above this a resolution tag describes printing (72 to 600 dpi are 353 to 42 um), not tissue.
LARGEST_UM_PER_PX = 20.0
UM_PER_RESOLUTION_UNIT = {2: 25400.0, 3: 10000.0}  # inch, centimetre

ReadRegion = Callable[[int, int, int, int], NDArray[Any]]


@dataclass(frozen=True)
class RawLevel:
    """One level as it is stored: its shape (y, x), channels, type, and a function from y0, y1, x0, x1 to pixels.

    The function gives (y1 - y0, x1 - x0, channels) for a region within the image.
    """

    shape: tuple[int, int]
    channels: int
    dtype: np.dtype[Any]
    read: ReadRegion


def open_tiff_levels(path: Path) -> tuple[list[RawLevel], tuple[float, float] | None]:
    """Levels of the largest image in a TIFF, finest first, and its um per pixel (y, x) where the file states it.

    The file is opened anew for each region that is read, so that threads need no lock and nothing stays open.

    Raises
    ------
    ValueError
        If the image is CMYK, a stack or a time series, or has channels that are neither grey nor RGB.
    """
    with damage_raises(path), tifffile.TiffFile(path) as tif:
        level_series = _levels(tif)
        return [_raw_level(path, series) for series in level_series], _um_per_px(tif, level_series[0])


def _levels(tif: tifffile.TiffFile) -> list[tifffile.TiffPageSeries]:
    """The largest series and its reduced versions, which some writers store as series of their own."""
    all_series = sorted(tif.series, key=lambda s: -_area(s))
    first = all_series[0]
    levels = list(first.levels)
    if len(levels) > 1 or tif.is_ome or tif.is_svs or tif.is_ndpi:
        return levels
    height, width = _size(first)
    for series in all_series[1:]:
        y, x = _size(series)
        scale = height / y
        fits = abs(width / scale - x) <= 2 and y < _size(levels[-1])[0]
        if (
            fits
            and series.keyframe.is_tiled
            and series.dtype == first.dtype
            and _page_axes(series) == _page_axes(first)
        ):
            levels.append(series)
    return levels


def _size(series: tifffile.TiffPageSeries) -> tuple[int, int]:
    return series.keyframe.imagelength, series.keyframe.imagewidth


def _area(series: tifffile.TiffPageSeries) -> int:
    y, x = _size(series)
    return y * x


def _page_axes(series: tifffile.TiffPageSeries) -> str:
    return series.axes.replace("I", "")


def _raw_level(path: Path, series: tifffile.TiffPageSeries) -> RawLevel:
    page = series.keyframe
    if page.photometric == tifffile.PHOTOMETRIC.SEPARATED:
        raise ValueError(f"open_slide(): {path} holds CMYK colours; export it as RGB or grey")
    lengths = dict(zip(series.axes, series.shape, strict=True))
    if any(n > 1 for axis, n in lengths.items() if axis not in "YXSC"):
        raise ValueError(f"open_slide(): {path} is a stack (axes {series.axes}); give one plane, or use read()")
    planes = [plane_of(path, p) for p in series.pages if p is not None]
    palette = page.colormap if page.photometric == tifffile.PHOTOMETRIC.PALETTE else None
    white = np.iinfo(planes[0].dtype).max if planes[0].dtype.kind == "u" else 0  # the glass around what was scanned
    inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE

    def read(y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        try:
            parts = [read_plane(plane, (y0, y1, x0, x1), white) for plane in planes]
        except (OSError, ArithmeticError) as error:
            raise unreadable(path, error) from None
        pixels = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        if palette is not None:
            return (palette.T[pixels[..., 0]] >> 8).astype(np.uint8)
        return np.iinfo(pixels.dtype).max - pixels if inverted and pixels.dtype.kind == "u" else pixels

    channels = 3 if palette is not None else sum(plane.samples for plane in planes)
    dtype = np.dtype(np.uint8) if palette is not None else planes[0].dtype
    return RawLevel(_size(series), channels, dtype, read)


def _um_per_px(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> tuple[float, float] | None:
    """What the dialect states, else the resolution tags where they cannot describe printing."""
    page = tif.pages.first
    if tif.ome_metadata:
        number = next(i for i, s in enumerate(tif.series) if s is series)
        _, y, x = ome_spacing(tif.ome_metadata, image=number)
        return None if y is None or x is None else (y * 1e3, x * 1e3)
    if tif.is_svs:
        mpp = re.search(r"\|\s*MPP\s*=\s*([\d.]+)", page.description)
        return (float(mpp[1]), float(mpp[1])) if mpp else None
    tags = page.tags
    unit = UM_PER_RESOLUTION_UNIT.get(int(tags.valueof("ResolutionUnit", 2)))
    sizes = []
    for name in ("YResolution", "XResolution"):
        numerator, denominator = tags.valueof(name, (0, 1))
        if not unit or not numerator or not 0 < unit * denominator / numerator <= LARGEST_UM_PER_PX:
            return None
        sizes.append(unit * denominator / numerator)
    return sizes[0], sizes[1]
