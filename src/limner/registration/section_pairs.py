"""Rigid registration of pairs of sections that may also be turned by 180 degrees or mirrored.

A transform is a matrix (2, 3) in mm, as in `limner.registration.affine`: the point `p` (y, x; mm from the centre) of
the fixed section matches ``matrix[:, :2] @ p + matrix[:, 2]`` in the moving one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from limner.losses.similarity import global_correlation
from limner.registration import affine
from limner.registration.warp import Spacing2D, warp

# factors along y and x; which of the first two flips an orientation holds is its number's bits, so that the orientation
# of one section seen from another is the exclusive or of both numbers
FLIPS = ((1, 1), (-1, 1), (1, -1), (-1, -1))
AS_IS, TOP_TO_BOTTOM, LEFT_TO_RIGHT, TURNED = range(4)
COARSE_PIXELS = 68  # longer side at which all orientations and rotations are tried
PAIRS_AT_ONCE = 32
COARSE_STEPS, FINE_STEPS = 30, 40


@dataclass(frozen=True)
class PairFits:
    """Pairs of sections, registered in each of the four `FLIPS` of the moving one.

    Parameters
    ----------
    pairs : ndarray of int
        Fixed and moving section, shape (K, 2).
    matrices : ndarray of float64
        Transforms, shape (K, 4, 2, 3), mm; each holds its flip.
    correlation : ndarray of float64
        Of the fixed and the moved section, shape (K, 4), in [-1, 1].
    """

    pairs: NDArray[np.int64]
    matrices: NDArray[np.float64]
    correlation: NDArray[np.float64]


def fit_pairs(
    sections: Tensor,
    pairs: Sequence[tuple[int, int]],
    spacing: Spacing2D,
    max_angle: float = 60.0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> PairFits:
    """Register pairs of sections in all orientations: every rotation and shift is tried on small images, then refined.

    Parameters
    ----------
    sections : Tensor
        Shape (Z, C, Y, X), in [0, 1], 0 in the background; reduced here to `COARSE_PIXELS`.
    pairs : sequence of (int, int)
        Fixed and moving section.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    max_angle : float
        Largest rotation tried either way, degrees.
    progress : callable, optional
        Called with the number of pairs done and of all pairs.

    Returns
    -------
    PairFits
    """
    shape = (sections.shape[2], sections.shape[3])
    shrink = max(1.0, max(shape) / COARSE_PIXELS)
    level = (max(2, round(shape[0] / shrink)), max(2, round(shape[1] / shrink)))
    step = (spacing[0] * shape[0] / level[0], spacing[1] * shape[1] / level[1])
    small = F.interpolate(sections, size=level, mode="bilinear", align_corners=False, antialias=True)
    matrices, correlation = [np.zeros((0, 4, 2, 3))], [np.zeros((0, 4))]
    for begin in range(0, len(pairs), PAIRS_AT_ONCE):
        batch = list(pairs[begin : begin + PAIRS_AT_ONCE])
        fixed, moving = (small[[pair[i] for pair in batch]] for i in (0, 1))
        found = []
        for flip in FLIPS:
            flipped = moving.flip([axis for axis, factor in zip((2, 3), flip, strict=True) if factor < 0])
            start = affine.search_rigid(fixed, flipped, step, max_angle)
            found.append(_refined(fixed, flipped, step, start, flip, COARSE_STEPS))
        matrices.append(np.stack([matrix for matrix, _ in found], axis=1))
        correlation.append(np.stack([score for _, score in found], axis=1))
        progress(begin + len(batch), len(pairs))
    indices = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return PairFits(indices, np.concatenate(matrices), np.concatenate(correlation))


def refine_pairs(
    sections: Tensor,
    pairs: NDArray[np.int64],
    orientations: NDArray[np.int64],
    matrices: NDArray[np.float64],
    spacing: Spacing2D,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Refine transforms of pairs on sections as they are given.

    Parameters
    ----------
    sections, spacing, progress
        As for `fit_pairs`; the sections are not reduced.
    pairs : ndarray of int
        Shape (K, 2).
    orientations : ndarray of int
        Which of `FLIPS` each transform holds, shape (K,).
    matrices : ndarray
        Transforms to start from, shape (K, 2, 3), mm.

    Returns
    -------
    matrices, correlation : ndarray of float64
        Shapes (K, 2, 3) and (K,).
    """
    refined, correlation = np.array(matrices), np.zeros(len(pairs))
    done = 0
    for orientation, flip in enumerate(FLIPS):
        alike = np.flatnonzero(orientations == orientation)
        for batch in np.array_split(alike, range(PAIRS_AT_ONCE, len(alike), PAIRS_AT_ONCE)):
            if not len(batch):
                continue
            fixed, moving = (sections[pairs[batch, i]] for i in (0, 1))
            flipped = moving.flip([axis for axis, factor in zip((2, 3), flip, strict=True) if factor < 0])
            start = torch.from_numpy(matrices[batch] * np.array(flip)[:, None]).float()
            refined[batch], correlation[batch] = _refined(fixed, flipped, spacing, start, flip, FINE_STEPS)
            done += len(batch)
            progress(done, len(pairs))
    return refined, correlation


def _refined(
    fixed: Tensor, flipped: Tensor, spacing: Spacing2D, start: Tensor, flip: tuple[int, int], steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Refined transforms to the moving sections as they are, and correlations, of a batch."""
    everywhere = torch.ones_like(fixed[:, :1])
    matrix = affine.refine(fixed, flipped, everywhere, spacing, start, rigid=True, steps=steps)
    # what is turned out of the canvas is background
    field = affine.to_displacement(matrix, (fixed.shape[2], fixed.shape[3]), spacing)
    score = global_correlation(fixed, warp(flipped, field, spacing, outside="zeros"), everywhere)
    # flipped(q) = moving(flip q): the flip comes after the match
    return matrix.double().numpy() * np.array(flip)[:, None], score.double().numpy()
