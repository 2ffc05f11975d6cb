"""How often each structure lies at each place: label frequencies over aligned label maps.

The location prior ``p_loc(s)`` of Dalca et al. 2018 [1]_: at each voxel the share of label maps that have label `s`
there, smoothed in space, and mixed with a little of every label so that no log is of 0.

References
----------
.. [1] Dalca, Guttag, Sabuncu 2018, "Anatomical priors in convolutional networks for unsupervised biomedical
   segmentation", https://doi.org/10.1109/CVPR.2018.00968
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def label_frequencies(
    maps: Iterable[tuple[NDArray[np.integer[Any]], NDArray[np.bool_] | None]],
    n_labels: int,
    spacing: tuple[float, float, float],
    sigma_mm: float = 1.5,
    floor: float = 1e-4,
) -> NDArray[np.float32]:
    """Share of the label maps that have each label at each voxel.

    Parameters
    ----------
    maps : iterable of (ndarray of int, ndarray of bool or None)
        Labels 0 to ``n_labels - 1``, all of shape (Z, Y, X), and where they are known: what lies outside a map's field
        of view does not count. None: everywhere. One map is in memory at a time if they are made one by one.
    n_labels : int
        Number of labels, background (0) among them.
    spacing : tuple of float
        Along z, y, x in mm.
    sigma_mm : float
        Standard deviation of the Gaussian that smooths counts and what is known alike; 0: none.
    floor : float
        Least frequency of any label, above 0 and below ``1 / n_labels``.

    Returns
    -------
    ndarray of float32
        Shape (L, Z, Y, X), at least `floor`, sums to 1 over L. Where no map is known it is background.

    Raises
    ------
    ValueError
        If there is no map, shapes differ, a label is out of range, or the floor is.

    Examples
    --------
    >>> maps = [(np.array([[[0, 1]]]), None), (np.array([[[1, 1]]]), None)]
    >>> label_frequencies(maps, 2, (1.0, 1.0, 1.0), sigma_mm=0, floor=0.01)[1].round(3)
    array([[[0.5 , 0.99]]], dtype=float32)
    """
    if not 0 < floor < 1 / n_labels:
        raise ValueError(f"label_frequencies(): floor is {floor}; give one above 0 and below 1 / {n_labels}")
    counts, known = _counted(maps, n_labels)
    sigmas = [sigma_mm / s for s in spacing]
    total = _smooth(known, sigmas)
    some = total > 1e-3  # of a map
    for label, own in enumerate(counts):
        share = np.divide(_smooth(own, sigmas), total, out=np.full_like(total, float(label == 0)), where=some)
        counts[label] = floor + (1 - n_labels * floor) * share
    counts /= counts.sum(axis=0)  # what rounding left
    return counts


def _counted(
    maps: Iterable[tuple[NDArray[np.integer[Any]], NDArray[np.bool_] | None]], n_labels: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """How many maps have each label, (L, Z, Y, X), and how many are known, (Z, Y, X)."""
    counts: NDArray[np.float32] | None = None
    for i, (labels, known) in enumerate(maps):
        if counts is None:
            counts = np.zeros((n_labels, *labels.shape), np.float32)
        _check(labels, known, i, counts.shape)
        for label in np.unique(labels):
            counts[label] += labels == label if known is None else (labels == label) & known
    if counts is None:
        raise ValueError("label_frequencies(): there is no label map; give at least one")
    return counts, counts.sum(axis=0)


def _check(labels: NDArray[Any], known: NDArray[np.bool_] | None, i: int, shape: tuple[int, ...]) -> None:
    if labels.shape != shape[1:] or (known is not None and known.shape != shape[1:]):
        raise ValueError(
            f"label_frequencies(): map {i} has shape {labels.shape}, the first {shape[1:]}; align them to one grid"
        )
    if labels.min() < 0 or labels.max() >= shape[0]:
        raise ValueError(
            f"label_frequencies(): map {i} has labels from {labels.min()} to {labels.max()}; give 0 to {shape[0] - 1}"
        )


def _smooth(values: NDArray[np.float32], sigmas: list[float]) -> NDArray[np.float32]:
    if not any(sigmas):
        return values
    return ndimage.gaussian_filter(values, sigmas, mode="constant")
