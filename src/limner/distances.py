"""Signed distances to structures, in mm, clipped, computed only where they matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def signed_distance(mask: NDArray[np.bool_], spacing: tuple[float, float], clip_mm: float) -> NDArray[np.float32]:
    """Distance of every pixel centre to a structure's border, positive inside.

    Parameters
    ----------
    mask : ndarray of bool
        Shape (Y, X), True inside the structure.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    clip_mm : float
        Distances beyond this are set to it, mm.

    Returns
    -------
    ndarray of float32
        Shape (Y, X), mm, in [-clip_mm, clip_mm]. The border runs halfway between pixels that differ. A structure
        that is absent has -clip_mm everywhere, one that fills the image clip_mm.

    Examples
    --------
    >>> signed_distance(np.array([[False, True, True]]), (1.0, 1.0), 10.0)
    array([[-0.5,  0.5,  1.5]], dtype=float32)
    """
    distance = np.full(mask.shape, -clip_mm, dtype=np.float32)
    if not mask.any():
        return distance
    if mask.all():
        return -distance
    window = _window(mask, spacing, clip_mm)
    inside = mask[window]
    near = np.where(inside, _to_border(inside, spacing), -_to_border(~inside, spacing))
    distance[window] = np.clip(near, -clip_mm, clip_mm)
    return distance


def _to_border(mask: NDArray[np.bool_], spacing: tuple[float, float]) -> NDArray[np.float64]:
    """Distance from the pixels of a mask to the nearest pixel outside it, less half a pixel, mm.

    Half a pixel is half the spacing along y or x if that pixel lies straight along one of them. Else it is half the
    smaller spacing: oblique borders come close to the centres of pixels.
    """
    if spacing[0] == spacing[1]:
        return ndimage.distance_transform_edt(mask, sampling=spacing) - spacing[0] / 2
    distance, nearest = ndimage.distance_transform_edt(mask, sampling=spacing, return_indices=True)
    longer = int(np.argmax(spacing))
    across = 1 - longer
    straight = nearest[across] == np.indices(mask.shape, sparse=True)[across]
    return distance - np.where(straight, spacing[longer], spacing[across]) / 2


def _window(mask: NDArray[np.bool_], spacing: tuple[float, float], clip_mm: float) -> tuple[slice, slice]:
    """The mask's bounding box grown by `clip_mm`, outside of which every distance is clipped."""
    rows, columns = ndimage.find_objects(mask.astype(np.uint8))[0]
    margin = [int(np.ceil(clip_mm / s)) + 1 for s in spacing]
    return (
        slice(max(rows.start - margin[0], 0), rows.stop + margin[0]),
        slice(max(columns.start - margin[1], 0), columns.stop + margin[1]),
    )


def signed_distances(
    labels: NDArray[np.integer[Any]], structures: Sequence[int], spacing: tuple[float, float], clip_mm: float
) -> NDArray[np.float32]:
    """`signed_distance` to each of several structures of one section.

    Parameters
    ----------
    labels : ndarray of int
        Shape (Y, X).
    structures : sequence of int
        The L labels wanted, 0 (background) like any other.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    clip_mm : float
        Distances beyond this are set to it, mm.

    Returns
    -------
    ndarray of float32
        Shape (L, Y, X), mm.
    """
    return np.stack([signed_distance(labels == s, spacing, clip_mm) for s in structures])
