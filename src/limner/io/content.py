"""What a file or folder holds before its sections are moved to the front, and the checks every format shares."""

from __future__ import annotations

import struct
from collections.abc import Iterator
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
        order = [axis, *(i for i in range(3) if i != axis)]
        a, b, c = order
        return replace(
            self,
            pixels=np.ascontiguousarray(np.moveaxis(self.pixels, axis, 0)),
            spacing=None if self.spacing is None else (self.spacing[a], self.spacing[b], self.spacing[c]),
            direction=tuple((row[a], row[b], row[c]) for row in self.direction),
            source=replace(self.source, section_axis=axis),
        )


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


def real_pixels(pixels: NDArray[Any], path: Path) -> NDArray[Any]:
    """Native byte order; bool becomes uint8 (0, 1) and float16 float32; complex pixels raise `ValueError`."""
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    if pixels.dtype == np.float16:
        return pixels.astype(np.float32)
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"read(): {path} has pixels of type {pixels.dtype}; give integers or floating point numbers")
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
