"""Sections moved rigidly, and made small for registration, one at a time.

Points are (y, x) in mm from the middle of a section; a matrix takes points of the section to be made to the one given.
"""

# mypy: disable-error-code="no-untyped-call"
# SimpleITK has no type hints.

from __future__ import annotations

from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from limner.registration.warp import Spacing2D

IDENTITY = np.eye(2, 3)


def moved(
    section: NDArray[Any],
    matrix: NDArray[np.float64],
    spacing: Spacing2D,
    shape: tuple[int, int],
    *,
    new_spacing: Spacing2D | None = None,
    fill: NDArray[Any] | float = 0,
    nearest: bool = False,
) -> NDArray[Any]:
    """A section seen through a transform.

    Parameters
    ----------
    section : ndarray
        Shape (Y, X) or (Y, X, C).
    matrix : ndarray
        Shape (2, 3), mm: what the result shows at `p` is at ``matrix[:, :2] @ p + matrix[:, 2]``.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    shape : tuple of int
        (Y, X) of the result.
    new_spacing : tuple of float, optional
        Of the result; else as of the section.
    fill : float or ndarray
        What is seen outside the section, for each channel.
    nearest : bool
        Take the nearest pixel, as labels need; else interpolate linearly, and round for integers.

    Returns
    -------
    ndarray
        Shape `shape`, with the channels and type of the section.

    Examples
    --------
    >>> moved(np.array([[1, 2, 3]]), np.array([[1.0, 0, 0], [0, 1, 0.5]]), (0.5, 0.5), (1, 3))  # one pixel on
    array([[2, 3, 0]])
    """
    channels = section if section.ndim == 3 else section[:, :, None]
    fills = np.broadcast_to(np.asarray(fill), channels.shape[2])
    made = np.empty((*shape, channels.shape[2]), section.dtype)
    linear, shift = matrix[:, :2], matrix[:, 2]
    transform = sitk.AffineTransform(2)
    transform.SetMatrix(linear[::-1, ::-1].ravel().tolist())
    transform.SetTranslation(shift[::-1].tolist())
    grid = _grid(shape, new_spacing or spacing)
    interpolation = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    wide = np.float64 if section.dtype.itemsize > 2 else np.float32
    for c in range(channels.shape[2]):  # one at a time: wide numbers take room
        plane = np.ascontiguousarray(channels[:, :, c], dtype=None if nearest else wide)
        image = sitk.GetImageFromArray(plane)
        size, origin, steps = _grid(plane.shape, spacing)
        del size
        image.SetOrigin(origin)
        image.SetSpacing(steps)
        seen = sitk.Resample(
            image, grid[0], transform, interpolation, grid[1], grid[2], (1.0, 0.0, 0.0, 1.0), float(fills[c])
        )
        plane = sitk.GetArrayViewFromImage(seen)
        made[:, :, c] = plane if nearest or section.dtype.kind == "f" else np.rint(plane)
    return made if section.ndim == 3 else made[:, :, 0]


def _grid(shape: tuple[int, ...], spacing: Spacing2D) -> tuple[list[int], list[float], list[float]]:
    """Size, origin and spacing in SimpleITK's order, of a grid with its middle at 0."""
    origin = [-(n - 1) / 2 * s for n, s in zip(shape, spacing, strict=True)]
    return list(shape[::-1]), origin[::-1], list(spacing[::-1])


def small_section(
    section: NDArray[Any], spacing: Spacing2D, shape: tuple[int, int], new_spacing: Spacing2D, fill: NDArray[Any]
) -> NDArray[np.float32]:
    """A section with fewer, larger pixels, each about the mean of what it covers.

    Parameters
    ----------
    section : ndarray
        Shape (Y, X) or (Y, X, C).
    spacing, new_spacing : tuple of float
        Pixel spacing (y, x) in mm, before and after.
    shape : tuple of int
        (Y, X) of the result, which lies with its middle on that of the section.
    fill : ndarray
        What is beyond the section, for each channel.

    Returns
    -------
    ndarray of float32
        Shape (C, *shape).
    """
    channels = section if section.ndim == 3 else section[:, :, None]
    # whole pixels first: their mean is exact, and the rest is less than a factor of two
    by = [max(1, min(int(new / old), n)) for new, old, n in zip(new_spacing, spacing, channels.shape, strict=False)]
    size = [n // k for n, k in zip(channels.shape, by, strict=False)]
    cut = channels[: size[0] * by[0], : size[1] * by[1]]
    mean = cut.reshape(size[0], by[0], size[1], by[1], -1).mean(axis=(1, 3), dtype=np.float32)
    step = (spacing[0] * by[0], spacing[1] * by[1])
    # the middle moves where rows or columns were cut off
    lost = [(n - m * k) / 2 * s for n, m, k, s in zip(channels.shape, size, by, spacing, strict=False)]
    matrix = IDENTITY + np.array([[0, 0, lost[0]], [0, 0, lost[1]]])
    small = moved(mean, matrix, step, shape, new_spacing=new_spacing, fill=fill)
    return np.ascontiguousarray(np.moveaxis(small, -1, 0), dtype=np.float32)
