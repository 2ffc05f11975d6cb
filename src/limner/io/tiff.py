"""TIFF: one page is one section, several pages are a stack. Spacing comes from ImageJ or OME metadata, or our own.

Plain resolution tags (72 or 96 dpi, say) describe printing, not tissue, and never give a spacing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from limner.io.content import (
    Content,
    Pages,
    PartialSpacing,
    Triple,
    complete_spacing,
    reading,
    real_pixels,
    type_in_memory,
    unreadable,
    without_alpha,
)
from limner.volume import Source

MM_PER_UNIT = {
    "nm": 1e-6,
    "nanometer": 1e-6,
    "um": 1e-3,
    "µm": 1e-3,  # micro sign
    "μm": 1e-3,  # Greek mu
    "micron": 1e-3,
    "microns": 1e-3,
    "micrometer": 1e-3,
    "micrometre": 1e-3,
    "mm": 1.0,
    "millimeter": 1.0,
    "cm": 10.0,
    "centimeter": 10.0,
    "in": 25.4,
    "inch": 25.4,
}
OME_TIFF_ENDINGS = (".ome.tif", ".ome.tiff")
OME_SMALLEST_LEVEL = 1024  # the pyramid ends with the first level that is no longer than this along y and x
OME_TILE = (512, 512)
IMAGEJ_TYPES = (np.uint8, np.uint16, np.float32)
IMAGEJ_LARGEST_BYTES = 2**32 - 2**26


@dataclass(frozen=True)
class OpenPages:
    """A TIFF that is open, and how its pages are to be taken.

    Parameters
    ----------
    series : list of tifffile.TiffPageSeries
        One, or one a section.
    axes : str
        Of all series together: Y and X, perhaps Z (sections) and S (samples, channels), in the file's order.
    shape : tuple of int
        Lengths along `axes`.
    palette : ndarray or None
        Shape (3, n), uint16; None where the pixels are to be taken as they are.
    spacing : tuple of (float or None)
        Along z, y, x in mm.
    """

    series: list[tifffile.TiffPageSeries]
    axes: str
    shape: tuple[int, ...]
    palette: NDArray[np.uint16] | None
    spacing: PartialSpacing

    def dtype_in_memory(self, path: Path) -> np.dtype[Any]:
        """Type of the pixels once they are read from `path`."""
        return np.dtype(np.uint8) if self.palette is not None else type_in_memory(self.series[0].dtype, path)


def load_tiff(path: Path, labels: bool = False) -> Content:
    """Read a TIFF stack, or a single page as one section.

    Parameters
    ----------
    path : Path
        An existing file.
    labels : bool
        Keep the indices of palette pages; otherwise they become RGB, except in ImageJ files, whose palette is a display
        setting.

    Returns
    -------
    Content
        Pixels (Z, Y, X) or (Z, Y, X, 3); the spacing is None where the metadata do not state it along z, y and x.

    Raises
    ------
    ValueError
        If the file is damaged, or holds time points, other than 1 or 3 channels, or pages of different shapes.
    """
    pixels, partial = load_pages(path, labels)
    return Content(pixels, complete_spacing(partial, pixels.shape[0]), tiff_source(path))


def tiff_source(path: Path) -> Source:
    """The form of a TIFF; an OME-TIFF has the ending ``.ome.tif``."""
    name = path.name.lower()
    return Source("tiff", path, next((e for e in OME_TIFF_ENDINGS if name.endswith(e)), path.suffix.lower()))


def load_pages(path: Path, labels: bool = False) -> tuple[NDArray[Any], PartialSpacing]:
    """Pixels as of `load_tiff`, with whichever of the spacings along z, y, x (mm) the metadata state, else None."""
    with open_pages(path, labels) as pages, reading(path):
        arrays = [s.asarray() for s in pages.series]
    pixels = _sections_first(arrays[0] if len(arrays) == 1 else np.stack(arrays), pages.axes)
    if pages.palette is not None:
        pixels = through_palette(pixels, pages.palette)
    return real_pixels(without_alpha(pixels, path) if pixels.ndim == 4 else pixels, path), pages.spacing


@contextmanager
def open_pages(path: Path, labels: bool = False) -> Iterator[OpenPages]:
    """Open a TIFF without reading its pixels; arguments and errors as of `load_tiff`."""
    with damage_raises(path):
        with reading(path):
            tif = tifffile.TiffFile(path)
        with tif:
            with reading(path):
                series, page, spacing = list(tif.series), tif.pages.first, _spacing(tif)
                palette = None if labels or tif.is_imagej else page.colormap
            axes, shape = _section_axes(path, series)
            if page.photometric == tifffile.PHOTOMETRIC.SEPARATED:
                raise ValueError(f"read(): {path} holds CMYK colours; export it as RGB or grey")
            yield OpenPages(series, axes, shape, palette, spacing)


def save_ome_tiff(path: Path, pixels: NDArray[Any] | Pages, spacing: Triple | None) -> None:
    """Write (Z, Y, X) or (Z, Y, X, 3) pixels as OME-TIFF, zlib-compressed, tiled and with a pyramid where large.

    Integers of one channel are taken for labels: a coarser level holds every second pixel and never a mean. Spacing
    (z, y, x) in mm is stated in micrometre. One section is in memory at a time; coarser levels wait in a file without
    name beside `path`.
    """
    metadata: dict[str, Any] = {"axes": "ZYXS"[: len(pixels.shape)]}
    for axis, mm in zip("ZYX", spacing or (), strict=False):
        metadata |= {f"PhysicalSize{axis}": float(f"{mm * 1e3:.12g}"), f"PhysicalSize{axis}Unit": "µm"}
    shapes = [pixels.shape]
    while max(shapes[-1][1:3]) > OME_SMALLEST_LEVEL:
        z, y, x, *samples = shapes[-1]
        shapes.append((z, -(-y // 2), -(-x // 2), *samples))
    options: dict[str, Any] = {
        "dtype": pixels.dtype,
        "compression": "zlib",
        "photometric": "rgb" if len(pixels.shape) == 4 else "minisblack",
        "tile": OME_TILE if len(shapes) > 1 else None,
    }
    big = pixels.nbytes > IMAGEJ_LARGEST_BYTES // 2
    with ExitStack() as stack, tifffile.TiffWriter(path, ome=True, bigtiff=big) as tif:
        files = [stack.enter_context(TemporaryFile(dir=path.parent)) for _ in shapes[1:]]
        coarser = [np.memmap(f, pixels.dtype, shape=s) for f, s in zip(files, shapes[1:], strict=True)]
        levels: list[Iterable[NDArray[Any]]] = [_reduced_into(coarser, pixels), *coarser]
        for level, sections in enumerate(levels):
            data = _cut_into_tiles(sections) if len(shapes) > 1 else iter(sections)
            of_level = {"subfiletype": 1} if level else {"subifds": len(coarser), "metadata": metadata}
            tif.write(data, shape=shapes[level], **of_level, **options)


def _reduced_into(coarser: Sequence[NDArray[Any]], pixels: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The sections as they are; each is first put into the coarser levels."""
    for z, section in enumerate(pixels):
        reduced = section
        for level in coarser:
            reduced = _halved(reduced)
            level[z] = reduced
        yield section


def _halved(section: NDArray[Any]) -> NDArray[Any]:
    """Every second pixel of labels (Y, X), else the mean of 2 x 2; an odd last row or column counts twice."""
    if section.ndim == 2 and section.dtype.kind in "iu":
        return section[::2, ::2]
    even = np.pad(section, [*((0, n % 2) for n in section.shape[:2]), (0, 0)][: section.ndim], mode="edge")
    mean = np.mean([even[y::2, x::2] for y in (0, 1) for x in (0, 1)], axis=0, dtype=np.float32)
    return (mean if section.dtype.kind == "f" else np.rint(mean)).astype(section.dtype)


def _cut_into_tiles(sections: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    for section in sections:
        for y, x in product(*(range(0, n, t) for n, t in zip(section.shape, OME_TILE, strict=False))):
            yield section[y : y + OME_TILE[0], x : x + OME_TILE[1]]


def save_tiff(path: Path, pixels: NDArray[Any] | Pages, spacing: Triple | None, colour: bool = False) -> None:
    """Write (Y, X), (Z, Y, X) or, where `colour`, (..., 3) pixels, zlib-compressed; spacing (z, y, x) in mm is stated.

    Types that ImageJ knows get its metadata; others, and stacks near 4 GB, the same keys as JSON beside
    resolution tags in cm. Of `Pages` one section is in memory at a time.
    """
    metadata: dict[str, Any] = {"axes": "ZYXS"[3 + colour - len(pixels.shape) : 3 + colour]}
    photometric = "rgb" if colour else "minisblack"
    options: dict[str, Any] = {"metadata": metadata, "compression": "zlib", "photometric": photometric}
    known = pixels.dtype == np.uint8 if colour else pixels.dtype in IMAGEJ_TYPES
    if known and pixels.nbytes < IMAGEJ_LARGEST_BYTES:
        options["imagej"] = True
        if spacing is not None:
            metadata |= {"spacing": spacing[0] * 1e3, "unit": "um"}
            options["resolution"] = (1e-3 / spacing[2], 1e-3 / spacing[1])
    else:
        options["bigtiff"] = pixels.nbytes >= IMAGEJ_LARGEST_BYTES
        if spacing is not None:
            metadata["spacing_mm"] = list(spacing)
            options |= {"resolution": (10 / spacing[2], 10 / spacing[1]), "resolutionunit": "CENTIMETER"}
    data = iter(pixels) if isinstance(pixels, Pages) else pixels
    tifffile.imwrite(path, data, shape=pixels.shape, dtype=pixels.dtype, **options)


def _section_axes(path: Path, series: list[tifffile.TiffPageSeries]) -> tuple[str, tuple[int, ...]]:
    """Axes of the whole file, of the letters Z (sections), Y, X and S (samples, channels), and their lengths."""
    if len({(s.shape, s.axes, s.dtype) for s in series}) > 1:
        raise ValueError(f"read(): {path} holds {len(series)} images of different shapes; save one stack in each file")
    axes, shape = series[0].axes, series[0].shape
    if len(series) > 1:
        axes, shape = "Z" + axes, (len(series), *shape)
    # Pages that nothing describes (I: sequence, Q: unknown) are taken as sections.
    letters = ["Z" if a in "IQ" else a for a in axes]
    letters = ["S" if a == "C" and n in (1, 3) else a for a, n in zip(letters, shape, strict=True)]
    if len(set(letters)) < len(letters) or not {"Y", "X"} <= set(letters) <= set("ZYXS"):
        raise ValueError(
            f"read(): {path} has axes {axes} of lengths {shape}; give one time point and one channel or RGB, its "
            "sections marked as Z (slices)"
        )
    return "".join(letters), shape


def _sections_first(array: NDArray[Any], axes: str) -> NDArray[Any]:
    order = [axes.index(a) for a in "ZYXS" if a in axes]
    pixels = array.transpose(order)
    return pixels if "Z" in axes else pixels[np.newaxis]


def through_palette(pixels: NDArray[Any], palette: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """RGB, 8 bit, of indices into a palette (3, n)."""
    return (palette.T[pixels] >> 8).astype(np.uint8)


def _spacing(tif: tifffile.TiffFile) -> PartialSpacing:
    if tif.is_imagej:
        return _imagej_spacing(tif)
    if tif.ome_metadata:
        return ome_spacing(tif.ome_metadata)
    own = (tif.shaped_metadata or ({},))[0].get("spacing_mm")
    return (own[0], own[1], own[2]) if own else (None, None, None)


def _imagej_spacing(tif: tifffile.TiffFile) -> PartialSpacing:
    metadata, tags = tif.imagej_metadata or {}, tif.pages.first.tags
    mm = _mm_per(str(metadata.get("unit", "")))
    if mm is None:
        return None, None, None

    def pixel(name: str) -> float | None:
        per_pixel = tags[name].value if name in tags else (0, 1)
        return mm * per_pixel[1] / per_pixel[0] if per_pixel[0] else None

    z = float(metadata.get("spacing", 0)) * mm
    return (z if z > 0 else None), pixel("YResolution"), pixel("XResolution")


def ome_spacing(xml: str, image: int = 0) -> PartialSpacing:
    """Spacings along z, y, x in mm that OME-XML states for its `image`-th image; None where it states none."""
    all_pixels = [e for e in ElementTree.fromstring(xml).iter() if e.tag.endswith("}Pixels")]
    pixels = all_pixels[image] if image < len(all_pixels) else None

    def size(axis: str) -> float | None:
        stated = None if pixels is None else pixels.get(f"PhysicalSize{axis}")
        mm = None if pixels is None else _mm_per(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        return float(stated) * mm if stated and mm else None

    return size("Z"), size("Y"), size("X")


def _mm_per(unit: str) -> float | None:
    # ImageJ writes the micro sign as a six-character escape.
    return MM_PER_UNIT.get(unit.strip().strip('"').replace("\\u00B5", "µ").lower())


@contextmanager
def damage_raises(path: Path) -> Iterator[None]:
    """tifffile logs a broken chain of pages and goes on with fewer; raise instead, and keep the log off stderr."""
    logger, records = logging.getLogger("tifffile"), _Records()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(records)
    try:
        yield
    except ValueError:
        if not records.damage:
            raise
    finally:
        logger.removeHandler(records)
        logger.propagate = propagate
    if records.damage:
        raise unreadable(path, records.damage[0])


class _Records(logging.Handler):
    """Keeps tifffile's messages on damage; a single unreadable tag is no damage to the pixels."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.damage: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "TiffTag" not in record.getMessage():
            self.damage.append(record.getMessage())
