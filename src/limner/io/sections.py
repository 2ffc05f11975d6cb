"""A folder of section images: PNG, TIFF or JPEG, one file a section, in natural order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from limner.io.content import (
    Content,
    PartialSpacing,
    complete_spacing,
    reading,
    real_pixels,
    type_in_memory,
    without_alpha,
)
from limner.io.tiff import load_pages, open_pages
from limner.volume import Source

Image.MAX_IMAGE_PIXELS = None  # a section of 10,000 x 10,000 is no attack, as Pillow would take it to be
SECTION_ENDINGS = (".png", ".tif", ".tiff", ".jpg", ".jpeg")


def natural_key(name: str) -> list[str | int]:
    """Sorting key under which ``s2.png`` comes before ``s10.png``.

    Examples
    --------
    >>> sorted(["s10.png", "s2.png"], key=natural_key)
    ['s2.png', 's10.png']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def list_sections(folder: Path) -> list[Path]:
    """The folder's section images in natural order; hidden files and other endings are passed over.

    Raises
    ------
    ValueError
        If there is none, or two differ in their ending alone.
    """
    files = [p for p in folder.iterdir() if p.suffix.lower() in SECTION_ENDINGS and not p.name.startswith(".")]
    files = sorted((p for p in files if p.is_file()), key=lambda p: (natural_key(p.name), p.name))
    if not files:
        raise ValueError(f"read(): {folder} holds no section images; give a folder of PNG, TIFF or JPEG files")
    by_stem: dict[str, Path] = {}
    for file in files:
        if file.stem in by_stem:
            raise ValueError(
                f"read(): {folder} holds both {by_stem[file.stem].name} and {file.name}; keep one file for each section"
            )
        by_stem[file.stem] = file
    return files


def load_folder(folder: Path, labels: bool = False) -> Content:
    """Read every section of a folder and centre it on the largest section's canvas.

    Parameters
    ----------
    folder : Path
        An existing folder.
    labels : bool
        Keep palette indices, allow integers of several widths, and pad with 0 instead of the border's median.

    Returns
    -------
    Content
        Pixels (Z, Y, X) or (Z, Y, X, 3); the source keeps each section's own size.

    Raises
    ------
    ValueError
        If a section cannot be read or differs from the first in channels or type (images) or spacing.
    """
    files = list_sections(folder)
    loaded = [load_section(file, labels) for file in files]
    sections, spacings = [pixels for pixels, _ in loaded], [spacing for _, spacing in loaded]
    del loaded
    _check_alike(files, sections, spacings, labels)
    sizes = tuple((s.shape[0], s.shape[1]) for s in sections)
    pixels = _stacked(sections, labels)
    source = Source("folder", folder, files[0].suffix.lower(), names=tuple(f.name for f in files), sizes=sizes)
    return Content(pixels, complete_spacing(spacings[0], len(files)), source)


def _stacked(sections: list[NDArray[Any]], labels: bool) -> NDArray[Any]:
    """The sections on one canvas; the list is emptied on the way, so that memory never holds two copies of all."""
    canvas = (max(s.shape[0] for s in sections), max(s.shape[1] for s in sections))
    pixels = np.empty((len(sections), *canvas, *sections[0].shape[2:]), np.result_type(*sections))
    for i in range(len(sections)):
        pixels[i] = centre(sections[i], canvas, 0 if labels else border_median(sections[i]))
        sections[i] = np.empty(0)
    sections.clear()
    return pixels


def load_section(file: Path, labels: bool = False) -> tuple[NDArray[Any], PartialSpacing]:
    """One section, (Y, X) or (Y, X, 3), with the spacings its metadata state."""
    if file.suffix.lower() in (".tif", ".tiff"):
        pages, spacing = load_pages(file, labels)
        _check_one_page(file, len(pages))
        return pages[0], spacing
    with reading(file):
        pixels = _load_png_or_jpeg(file, labels)
    return real_pixels(without_alpha(pixels, file) if pixels.ndim == 3 else pixels, file), (None, None, None)


@dataclass(frozen=True)
class SectionHeader:
    """What the file of a section says before its pixels are decoded.

    Parameters
    ----------
    shape : tuple of int
        (Y, X).
    dtype : dtype
        Of its pixels in memory.
    spacing : tuple of (float or None)
        Along z, y, x in mm.
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    spacing: PartialSpacing


def section_header(file: Path) -> SectionHeader:
    """Size and type of a section without decoding it; errors as of `load_section`, where the header shows them."""
    if file.suffix.lower() in (".tif", ".tiff"):
        with open_pages(file) as pages:
            lengths = dict(zip(pages.axes, pages.shape, strict=True))
            _check_one_page(file, lengths.get("Z", 1))
            return SectionHeader((lengths["Y"], lengths["X"]), pages.dtype_in_memory(file), pages.spacing)
    with reading(file), file.open("rb") as opened:
        start = opened.read(26)
        found = iio.improps(file, plugin="pillow", index=0)
        dtype = np.dtype(np.uint16) if _is_deep_png(start) else found.dtype
    height, width = found.shape[:2]
    return SectionHeader((height, width), type_in_memory(dtype, file), (None, None, None))


def border_median(section: NDArray[Any]) -> NDArray[Any]:
    """Median of a section's outermost pixels, per channel: shape () or (3,), in the section's dtype."""
    edge = np.concatenate([section[0], section[-1], section[:, 0], section[:, -1]])
    median = np.median(edge, axis=0)
    return (median if section.dtype.kind == "f" else np.rint(median)).astype(section.dtype)


def centre(section: NDArray[Any], canvas: tuple[int, int], fill: NDArray[Any] | int) -> NDArray[Any]:
    """Place a section (Y, X[, 3]) in the middle of a canvas (y, x) filled with `fill`."""
    placed = np.empty(canvas + section.shape[2:], dtype=section.dtype)
    placed[...] = fill
    placed[centre_slices(section.shape[:2], canvas)] = section
    return placed


def centre_slices(size: tuple[int, ...], canvas: tuple[int, ...]) -> tuple[slice, slice]:
    """Where a section of `size` (y, x) lies on its canvas; the same slices crop a result back.

    Examples
    --------
    >>> centre_slices((3, 4), (6, 4))
    (slice(1, 4, None), slice(0, 4, None))
    """
    y, x = ((c - s) // 2 for s, c in zip(size, canvas, strict=True))
    return slice(y, y + size[0]), slice(x, x + size[1])


def _check_one_page(file: Path, n_pages: int) -> None:
    if n_pages > 1:
        raise ValueError(
            f"read(): {file} holds {n_pages} pages in a folder of sections; give the file itself as the stack, "
            "or one page a file"
        )


def _is_deep_png(start: bytes) -> bool:
    """Whether a file begins like a PNG of 16-bit colours, which Pillow would cut to 8 bit.

    In a PNG header, byte 24 is the bits a sample, byte 25 the colour type: 0 grey, 2 RGB, 3 palette, 4 and 6 alpha.
    """
    return start.startswith(b"\x89PNG") and start[24:25] == b"\x10" and start[25:26] != b"\x00"


def _load_png_or_jpeg(file: Path, labels: bool) -> NDArray[Any]:
    encoded = file.read_bytes()
    is_png = encoded.startswith(b"\x89PNG")
    if _is_deep_png(encoded[:26]):
        return np.asarray(imagecodecs.png_decode(encoded))
    keep_indices = labels and is_png and encoded[25:26] == b"\x03"
    pixels = iio.imread(encoded, plugin="pillow", index=0, mode="P" if keep_indices else None)
    if pixels.shape[-1:] == (4,) and not is_png:
        raise ValueError("it holds CMYK colours; export it as RGB or grey")
    return np.asarray(pixels)


def _check_alike(
    files: list[Path],
    sections: list[NDArray[Any]],
    spacings: list[PartialSpacing],
    labels: bool,
) -> None:
    first = sections[0]
    for file, section in zip(files, sections, strict=True):
        if section.ndim != first.ndim or (section.dtype != first.dtype and not labels):
            raise ValueError(
                f"read(): {file} is {_kind(section)}, but {files[0].name} is {_kind(first)}; export all sections alike"
            )
    check_spacings(files, spacings)


def check_spacings(files: list[Path], spacings: list[PartialSpacing]) -> None:
    """Raise `ValueError` where a section states another spacing than the first."""
    for file, spacing in zip(files, spacings, strict=True):
        # None becomes NaN.
        stated, expected = np.array(spacing, dtype=float), np.array(spacings[0], dtype=float)
        if not np.allclose(stated, expected, rtol=1e-3, atol=0, equal_nan=True):
            raise ValueError(
                f"read(): {file} has spacing {spacing} mm (z, y, x), but {files[0].name} {spacings[0]}; resample or "
                "export all sections alike"
            )


def _kind(section: NDArray[Any]) -> str:
    return f"{'grey' if section.ndim == 2 else 'RGB'} {section.dtype}"
