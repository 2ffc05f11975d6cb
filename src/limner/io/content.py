"""What a file or folder holds before its sections are moved to the front, and the checks every format shares."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.space import IDENTITY
from limner.volume import Source

LONGEST_REASON = 100  # characters of what is wrong with a file; what is longer, image libraries say of themselves
Triple = tuple[float, float, float]
PartialSpacing = tuple[float | None, float | None, float | None]


@dataclass(frozen=True)
class Content:
    """Pixels and geometry of one file or folder.

    Parameters
    ----------
    pixels : ndarray
        Shape (Z, Y, X) for grey or (Z, Y, X, 3) for RGB, in the file's own axis order (SimpleITK's array order).
    spacing : tuple of float or None
        Spacing along z, y, x in mm; None where the file does not state all three.
    source : Source
        The form of the file.
    origin : tuple of float
        Physical position of voxel (0, 0, 0) in mm, LPS, order z, y, x.
    direction : tuple of tuple of float
        3 x 3, column j the unit vector of index axis j, rows and columns in the order z, y, x.
    """

    pixels: NDArray[Any]
    spacing: Triple | None
    source: Source
    origin: Triple = (0.0, 0.0, 0.0)
    direction: tuple[Triple, ...] = IDENTITY

    def with_sections_first(self, axis: int) -> Content:
        """The same content with index axis `axis` moved to the front; physical positions stay as they are."""
        pixels = np.ascontiguousarray(np.moveaxis(self.pixels, axis, 0))
        return replace(self.with_geometry_first(axis), pixels=pixels)

    def with_geometry_first(self, axis: int) -> Content:
        """The same with all but the pixels moved."""
        a, b, c = [axis, *(i for i in range(3) if i != axis)]
        return replace(
            self,
            spacing=None if self.spacing is None else (self.spacing[a], self.spacing[b], self.spacing[c]),
            direction=tuple((row[a], row[b], row[c]) for row in self.direction),
            source=replace(self.source, section_axis=axis),
        )


@dataclass(frozen=True)
class Pages:
    """Sections that are made one by one, once, in order: those of a file too large to be held in memory.

    Parameters
    ----------
    sections : iterable of ndarray
        Z sections, all of shape (Y, X) or, in colours, (Y, X, 3), and of type `dtype`.
    shape : tuple of int
        (Z, Y, X) or (Z, Y, X, 3).
    dtype : dtype
        Of every section.
    section_axis : {0, 1, 2}
        Axis of the file's own (z, y, x) array along which the sections run.
    """

    sections: Iterable[NDArray[Any]]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    section_axis: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all sections."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def file_shape(self) -> tuple[int, int, int]:
        """Shape of the file's own array, without colours."""
        lengths = list(self.shape[1:3])
        lengths.insert(self.section_axis, self.shape[0])
        return lengths[0], lengths[1], lengths[2]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return iter(self.sections)

    def slabs(self, depth: int) -> Iterator[NDArray[Any]]:
        """Pieces of the file's own array, of `depth` sections each (the last may have fewer)."""
        sections = iter(self)
        for start in range(0, self.shape[0], depth):
            slab = np.empty((min(depth, self.shape[0] - start), *self.shape[1:]), self.dtype)
            for i in range(len(slab)):
                slab[i] = next(sections)
            yield np.moveaxis(slab, 0, self.section_axis)

    def whole(self) -> NDArray[Any]:
        """The file's own array, all of it in memory."""
        return next(self.slabs(self.shape[0]))


def unreadable(path: Path, reason: object) -> ValueError:
    """The one-line error for a file that is damaged or is not what its ending says."""
    last = (str(reason).strip().splitlines() or [type(reason).__name__])[-1].strip()
    of_library = isinstance(reason, LookupError | ArithmeticError | TypeError | struct.error) or path.name in last
    detail = "" if of_library or len(last) > LONGEST_REASON else f": {last}"
    return ValueError(f"read(): {path} cannot be read (truncated, or not what its ending says? copy it again){detail}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever an image library raises within into one `ValueError` that names `path`."""
    try:
        yield
    # Image libraries raise some twenty kinds of error on damaged files, struct.error and KeyError among them.
    except Exception as error:
        raise unreadable(path, error) from None


def complete_spacing(partial: PartialSpacing, n_sections: int) -> Triple | None:
    """All three spacings, or None; a single section takes its y spacing as its nominal z spacing."""
    z, y, x = partial
    if n_sections == 1 and z is None:
        z = y
    return None if z is None or y is None or x is None else (z, y, x)


def without_alpha(pixels: NDArray[Any], path: Path) -> NDArray[Any]:
    """Drop an alpha channel: (..., 2) becomes grey, (..., 4) becomes (..., 3), (..., 1) becomes grey.

    Raises
    ------
    ValueError
        If the last axis holds any other number of channels than 1 to 4.
    """
    channels = pixels.shape[-1]
    if channels in (1, 2):
        return pixels[..., 0]
    if channels in (3, 4):
        return pixels[..., :3]
    raise ValueError(f"read(): {path} has {channels} channels; give grey (1) or RGB (3)")


def check_finite(section: NDArray[Any], name: str | int, path: Path) -> None:
    """Raise `ValueError` where a section, or a part of it, holds NaN or infinity."""
    if section.dtype.kind == "f" and not np.isfinite(section).all():
        raise ValueError(f"read(): section {name} of {path} holds NaN or infinity; replace these pixels, with 0 say")


def real_pixels(pixels: NDArray[Any], path: Path) -> NDArray[Any]:
    """Native byte order; bool becomes uint8 (0, 1) and float16 float32; complex pixels raise `ValueError`."""
    return pixels.astype(type_in_memory(pixels.dtype, path), copy=False)


def type_in_memory(dtype: np.dtype[Any], path: Path) -> np.dtype[Any]:
    """Type that `real_pixels` gives to pixels of a file's `dtype`."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype == np.float16:
        return np.dtype(np.float32)
    if dtype.kind not in "iuf":
        raise ValueError(f"read(): {path} has pixels of type {dtype}; give integers or floating point numbers")
    return dtype.newbyteorder("=")
