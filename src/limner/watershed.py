"""Closed contours from a membrane probability map, and the cells between them, linked from section to section.

Chen et al. 2016 [1]_ close membranes that fade by a watershed of the map: p_f = w_f p_w + (1 - w_f) p.

References
----------
.. [1] Chen, Qi, Cheng, Heng, "Deep contextual networks for neuronal structure segmentation", AAAI 2016,
   https://doi.org/10.1609/aaai.v30i1.10141
.. [2] Beucher and Lantuejoul, "Use of watersheds in contour detection", 1979
"""

# SimpleITK has no type hints.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from limner.metrics.objects import count_overlaps


def closed_contours(probability: NDArray[np.float32], sigma: float, depth: float) -> NDArray[np.bool_]:
    """p_w: the lines of the watershed of a smoothed map; each runs on to another or to the image's edge.

    Parameters
    ----------
    probability : ndarray of float32
        Of membrane, shape (Y, X), in [0, 1].
    sigma : float
        Of the Gaussian that smooths, pixels; 0: as it is.
    depth : float
        Basins that lie less than this below the lowest pass to a neighbour are one with it, in [0, 1].

    Returns
    -------
    ndarray of bool
        Shape (Y, X), true on the lines.

    Examples
    --------
    >>> gap = np.array([[0, 0, 0.9, 0, 0], [0, 0, 0.4, 0, 0], [0, 0, 0.9, 0, 0]], np.float32)
    >>> closed_contours(gap, sigma=0, depth=0.1).astype(int)
    array([[0, 0, 1, 0, 0],
           [0, 0, 1, 0, 0],
           [0, 0, 1, 0, 0]])
    """
    smooth = ndimage.gaussian_filter(probability, sigma) if sigma > 0 else probability
    image = sitk.GetImageFromArray(np.ascontiguousarray(smooth, np.float32))
    basins = sitk.MorphologicalWatershed(image, level=depth, markWatershedLine=True, fullyConnected=False)
    return np.asarray(sitk.GetArrayViewFromImage(basins) == 0)


def fuse(probability: NDArray[np.float32], contours: NDArray[np.bool_], w_f: float) -> NDArray[np.float32]:
    """p_f = w_f p_w + (1 - w_f) p, shape (Y, X), in [0, 1].

    Examples
    --------
    >>> fuse(np.array([[0.2, 0.4, 0.4]], np.float32), np.array([[False, True, False]]), w_f=0.5)
    array([[0.1, 0.7, 0.2]], dtype=float32)
    """
    fused: NDArray[np.float32] = (w_f * contours + (1 - w_f) * probability).astype(np.float32)
    return fused


def cells_between(membrane: NDArray[np.bool_], least: int = 0) -> NDArray[np.int32]:
    """The parts of a section that membrane encloses, as 1, 2, ...; 0 on membrane and on parts that are too small.

    Parameters
    ----------
    membrane : ndarray of bool
        Shape (Y, X).
    least : int
        Pixels that a cell needs.

    Returns
    -------
    ndarray of int32
        Shape (Y, X); cells are 4-connected, in the order of rows.
    """
    parts, _ = ndimage.label(~membrane)
    sizes = np.bincount(parts.ravel(), minlength=1)
    kept = sizes >= max(least, 1)
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0)[parts].astype(np.int32)


def link_sections(
    before: NDArray[Any], cells: NDArray[np.int32], first_new: int, share: float = 0.5
) -> NDArray[np.int64]:
    """Ids of a section's cells: of a cell before, where each has most of its overlap with the other, else new ones.

    Parameters
    ----------
    before : ndarray of int
        Cells of the section before by their ids in the volume, shape (Y, X), 0 between them.
    cells : ndarray of int32
        Cells of this section as 1, 2, ..., N, shape (Y, X).
    first_new : int
        The first id that is free.
    share : float
        Least part of the smaller of the two that must lie on the other, in [0, 1].

    Returns
    -------
    ndarray of int64
        Shape (N + 1,): the id of each cell by its number here; 0 for 0 and for numbers that no pixel has.

    Raises
    ------
    ValueError
        If the sections differ in size.

    Examples
    --------
    >>> before = np.array([[7, 7, 7, 0, 9, 9]])
    >>> link_sections(before, np.array([[1, 1, 0, 2, 0, 3]], np.int32), first_new=10)
    array([ 0,  7, 10,  9])
    """
    if before.shape != cells.shape:
        raise ValueError(
            f"link_sections(): sections of shape {before.shape} and {cells.shape} found; give sections of one size"
        )
    known, numbers = (np.unique(ids[ids > 0]) for ids in (before, cells))
    overlaps = count_overlaps(cells, before)
    order = np.argsort(-overlaps.pixels, kind="stable")  # the largest overlap of each comes first
    first, second, both = (a[order] for a in (overlaps.true_index, overlaps.predicted_index, overlaps.pixels))
    best_of_first, best_of_second = (np.unique(side, return_index=True)[1] for side in (first, second))
    mutual = np.intersect1d(best_of_first, best_of_second)
    first, second, both = first[mutual], second[mutual], both[mutual]
    enough = both >= share * np.minimum(overlaps.true_sizes[first], overlaps.predicted_sizes[second])
    ids = np.zeros(int(cells.max(initial=0)) + 1, np.int64)
    ids[numbers[second[enough]]] = known[first[enough]]
    new = numbers[ids[numbers] == 0]
    ids[new] = first_new + np.arange(len(new))
    return ids


def link_stack(sections: Iterable[NDArray[np.int32]], share: float = 0.5) -> Iterator[NDArray[np.int64]]:
    """Cells of section after section under ids that are unique over the volume.

    Parameters
    ----------
    sections : iterable of ndarray of int32
        Cells of each section as 1, 2, ..., shape (Y, X), such as `cells_between` gives; taken one at a time.
    share : float
        As of `link_sections`.

    Yields
    ------
    ndarray of int64
        Shape (Y, X): ids from 1 on. A section without a cell, such as one that is missing, is passed over: the next
        one is linked to the last that has any.

    Raises
    ------
    ValueError
        If the sections differ in size.

    Examples
    --------
    >>> sections = np.array([[[1, 1, 0, 2]], [[1, 0, 2, 2]], [[0, 0, 1, 1]]], np.int32)
    >>> [ids.tolist() for ids in link_stack(sections)]
    [[[1, 1, 0, 2]], [[1, 0, 2, 2]], [[0, 0, 2, 2]]]
    """
    before, first_new = None, 1
    for cells in sections:
        ids = link_sections(np.zeros_like(cells) if before is None else before, cells, first_new, share)
        first_new = max(first_new, int(ids.max()) + 1)
        linked = ids[cells]
        if before is None or cells.any():
            before = linked
        yield linked
