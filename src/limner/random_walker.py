"""The random walker: from strokes to the chance that each voxel belongs to each class.

A walker steps from voxel to voxel, hardly ever across an edge of the image. The chance that it meets a stroke of class
l before any other is smooth where the image is, falls where the image has an edge, and is 1/2 about midway where
nothing tells: the soft sibling of the graph cut, of the same neighbours. It minimises

    E(p) = sum over neighbours a_vw w_vw (p_v - p_w)^2 + lam * sum over voxels (p_v - h_v)^2,
    w_vw = exp(-(x_v - x_w)^2 / s^2) + delta

with p fixed on strokes, a_vw as of `limner.graph_cut.face_weights`, x in 8-bit grey levels, and h a prior, such as a
network's heat map, that the walker follows where strokes are far (Grady 2005). The linear system is solved by conjugate
gradients on the implicit grid, from coarse to fine: 32 bytes a voxel.

References
----------
Grady, "Random walks for image segmentation", IEEE PAMI 28, 2006, https://doi.org/10.1109/TPAMI.2006.233.
Grady, "Multilabel random walker image segmentation using prior models", CVPR 2005,
https://doi.org/10.1109/CVPR.2005.239. Departure: delta, without which hard edges enclose voxels that no walker leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from limner.graph_cut import face_weights

SMALLEST = 32  # voxels along an axis that is halved for the coarser grid
MOST_STEPS = 5000
FINER = 10.0  # times, of the tolerance, from each grid to the coarser one


@dataclass(frozen=True)
class WalkerOptions:
    """How easily a walker crosses edges, and how far it follows a prior.

    Parameters
    ----------
    contrast : float
        s, above 0: grey levels between two voxels that a walker seldom crosses.
    delta : float
        Above 0: how often it crosses however strong the edge.
    prior_weight : float
        lam, 0 or more.
    tolerance : float
        Largest residual of a voxel, over the diagonal, at which the solution counts as found; a tenth
        of it on each coarser grid, where it costs little and decides on what lies behind strong edges.

    Raises
    ------
    ValueError
        If one of them is out of its range.
    """

    contrast: float = 8.0
    delta: float = 0.01
    prior_weight: float = 0.01
    tolerance: float = 5e-4

    def __post_init__(self) -> None:
        for name in ("contrast", "delta", "prior_weight", "tolerance"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and name != "prior_weight"):
                lowest = "0 or more" if name == "prior_weight" else "more than 0"
                raise ValueError(f"WalkerOptions(): {name} is {value}; give {lowest}")


def random_walker(
    levels: NDArray[Any],
    marks: NDArray[np.integer[Any]],
    spacing: tuple[float, float, float],
    options: WalkerOptions,
    prior: NDArray[np.floating[Any]] | None = None,
    start: NDArray[np.floating[Any]] | None = None,
) -> NDArray[np.float32]:
    """Chance of each class at each voxel.

    Parameters
    ----------
    levels : ndarray
        Shape (Z, Y, X) or (Z, Y, X, C): the image in 8-bit grey levels.
    marks : ndarray of int
        Shape (Z, Y, X): 0 unmarked, 1 to L the strokes of each class; each has one.
    spacing : tuple of float
        Between voxel centres (z, y, x), mm.
    options : WalkerOptions
        Edges and prior.
    prior : ndarray of float, optional
        Shape (L, Z, Y, X), in [0, 1].
    start : ndarray of float, optional
        Shape (L, Z, Y, X): a solution for other strokes, from which this one is not far.

    Returns
    -------
    ndarray of float32
        Shape (L, Z, Y, X), in [0, 1], adding up to 1; 1 on each class's own strokes.

    Raises
    ------
    ValueError
        If shapes differ, or fewer than two classes have strokes.

    Examples
    --------
    >>> levels = np.zeros((1, 1, 6)); levels[..., 3:] = 200
    >>> marks = np.array([[[1, 0, 0, 0, 0, 2]]])
    >>> random_walker(levels, marks, (1.0, 1.0, 1.0), WalkerOptions(tolerance=1e-7))[1].round(2)
    array([[[0.  , 0.01, 0.02, 0.98, 0.99, 1.  ]]], dtype=float32)
    """
    classes = np.unique(marks[marks > 0])
    if marks.shape != levels.shape[:3]:
        raise ValueError(
            f"random_walker(): marks have shape {marks.shape}, the image {levels.shape[:3]}; give one grid"
        )
    if len(classes) < 2 or classes[-1] != len(classes):
        raise ValueError(f"random_walker(): strokes are of classes {classes.tolist()}; give 1, 2 and up, each of them")
    shape = (len(classes), *marks.shape)
    for name, given in (("prior", prior), ("start", start)):
        if given is not None and given.shape != shape:
            raise ValueError(f"random_walker(): {name} has shape {given.shape}; give {shape}, a map for each class")
    used = options if prior is not None else replace(options, prior_weight=0.0)
    chances = _solve(levels, marks, spacing, used, prior, start)
    return np.divide(chances, chances.sum(axis=0), out=chances)


def _solve(
    levels: NDArray[Any],
    marks: NDArray[np.integer[Any]],
    spacing: tuple[float, float, float],
    options: WalkerOptions,
    prior: NDArray[np.floating[Any]] | None,
    start: NDArray[np.floating[Any]] | None,
) -> NDArray[np.float32]:
    """Each class by itself, of two the second as what the first leaves; begins with a coarser grid's solution."""
    n_classes = int(marks.max())
    steps = tuple(2 if n >= SMALLEST else 1 for n in marks.shape)
    if start is None and max(steps) > 1:
        coarse = _coarser(marks, steps)
        if len(np.unique(coarse[coarse > 0])) == n_classes:
            wider: Any = tuple(s * step for s, step in zip(spacing, steps, strict=True))
            smaller = None if prior is None else np.stack([_means(one, steps) for one in prior])
            exact = replace(options, tolerance=options.tolerance / FINER)
            start = _enlarged(_solve(_means(levels, steps), coarse, wider, exact, smaller, None), steps, marks.shape)
    grid = _Grid.of(levels, marks, spacing, options)
    chances = np.empty((n_classes, *marks.shape), np.float32)
    for label in range(1, n_classes):
        begin = start[label] if start is not None else np.full(marks.shape, 1 / n_classes, np.float32)
        chances[label] = grid.chance_of(label + 1, None if prior is None else prior[label], begin)
    if n_classes == 2:
        chances[0] = 1 - chances[1]
    else:
        begin = start[0] if start is not None else np.full(marks.shape, 1 / n_classes, np.float32)
        chances[0] = grid.chance_of(1, None if prior is None else prior[0], begin)
    return chances


@dataclass(frozen=True)
class _Grid:
    """The system's matrix: what joins each voxel to the next along z, y, x (3, Z, Y, X), and the diagonal."""

    joins: NDArray[np.float32]
    diagonal: NDArray[np.float32]
    marks: NDArray[np.integer[Any]]
    options: WalkerOptions

    @classmethod
    def of(
        cls,
        levels: NDArray[Any],
        marks: NDArray[np.integer[Any]],
        spacing: tuple[float, float, float],
        options: WalkerOptions,
    ) -> _Grid:
        joins = np.zeros((3, *marks.shape), np.float32)
        diagonal = np.full(marks.shape, options.prior_weight, np.float32)
        for axis, face in enumerate(face_weights(spacing)):
            first, second = [
                tuple(s if a == axis else slice(None) for a in range(3)) for s in (slice(None, -1), slice(1, None))
            ]
            change = (levels[second].astype(np.float32) - levels[first]) ** 2
            squared = change.sum(axis=-1) if change.ndim == 4 else change
            joins[axis][first] = face * (np.exp(-squared / np.float32(options.contrast**2)) + options.delta)
            diagonal[first] += joins[axis][first]
            diagonal[second] += joins[axis][first]
        return cls(joins, np.maximum(diagonal, 1e-6), marks, options)

    def chance_of(
        self, mark: int, prior: NDArray[np.floating[Any]] | None, start: NDArray[np.floating[Any]]
    ) -> NDArray[np.float32]:
        """Conjugate gradients, preconditioned by the diagonal."""
        free = self.marks == 0
        p = np.where(free, start, self.marks == mark).astype(np.float32)
        product = np.zeros_like(p)
        _apply(p, self.diagonal, self.joins, free, product)
        pull = 0 if prior is None else self.options.prior_weight * prior
        residual = np.where(free, pull - product, 0).astype(np.float32)
        direction = residual / self.diagonal
        along = float((residual * direction).sum(dtype=np.float64))
        for _ in range(MOST_STEPS):
            curvature = _apply(direction, self.diagonal, self.joins, free, product)
            if curvature <= 0:
                break
            step = np.float32(along / curvature)
            following, largest = _advance(p, residual, direction, product, self.diagonal, step)
            if largest < self.options.tolerance:
                break
            _turn(direction, residual, self.diagonal, np.float32(following / along))
            along = following
        return np.clip(p, 0, 1, out=p)


def _coarser(marks: NDArray[np.integer[Any]], steps: tuple[int, ...]) -> NDArray[np.integer[Any]]:
    """The highest mark of each block: organs before background."""
    padded = np.pad(marks, [(0, -n % step) for n, step in zip(marks.shape, steps, strict=True)])
    blocks = [part for n, step in zip(padded.shape, steps, strict=True) for part in (n // step, step)]
    highest: NDArray[np.integer[Any]] = padded.reshape(blocks).max(axis=(1, 3, 5))
    return highest


def _means(volume: NDArray[Any], steps: tuple[int, ...]) -> NDArray[np.float32]:
    """Means of blocks of (Z, Y, X) or (Z, Y, X, C); those at the end repeat the last voxel."""
    missing = [(0, -n % step) for n, step in zip(volume.shape, steps, strict=False)]
    padded = np.pad(volume, missing + [(0, 0)] * (volume.ndim - 3), mode="edge")
    blocks = [part for n, step in zip(padded.shape, steps, strict=False) for part in (n // step, step)]
    means: NDArray[np.float32] = padded.reshape(*blocks, *volume.shape[3:]).mean(axis=(1, 3, 5), dtype=np.float32)
    return means


def _enlarged(chances: NDArray[np.float32], steps: tuple[int, ...], shape: tuple[int, ...]) -> NDArray[np.float32]:
    for axis, step in enumerate(steps, start=1):
        chances = np.repeat(chances, step, axis=axis)
    return chances[:, : shape[0], : shape[1], : shape[2]]


@njit(cache=True, parallel=True, fastmath=True)
def _apply(p, diagonal, joins, free, product):  # type: ignore[no-untyped-def]
    """The matrix times p where voxels are free, else 0; gives the scalar product of that with p."""
    n_z, n_y, n_x = p.shape
    sums = np.zeros(n_z)
    for z in prange(n_z):
        total = 0.0
        for y in range(n_y):
            for x in range(n_x):
                if not free[z, y, x]:
                    product[z, y, x] = 0
                    continue
                value = diagonal[z, y, x] * p[z, y, x]
                if z + 1 < n_z:
                    value -= joins[0, z, y, x] * p[z + 1, y, x]
                if y + 1 < n_y:
                    value -= joins[1, z, y, x] * p[z, y + 1, x]
                if x + 1 < n_x:
                    value -= joins[2, z, y, x] * p[z, y, x + 1]
                if z > 0:
                    value -= joins[0, z - 1, y, x] * p[z - 1, y, x]
                if y > 0:
                    value -= joins[1, z, y - 1, x] * p[z, y - 1, x]
                if x > 0:
                    value -= joins[2, z, y, x - 1] * p[z, y, x - 1]
                product[z, y, x] = value
                total += value * p[z, y, x]
        sums[z] = total
    return sums.sum()


@njit(cache=True, parallel=True, fastmath=True)
def _advance(p, residual, direction, product, diagonal, step):  # type: ignore[no-untyped-def]
    """A step along the direction; gives the square of the new residual, preconditioned, and its largest entry."""
    n_z, n_y, n_x = p.shape
    sums = np.zeros(n_z)
    largest = np.zeros(n_z)
    for z in prange(n_z):
        total = 0.0
        most = 0.0
        for y in range(n_y):
            for x in range(n_x):
                p[z, y, x] += step * direction[z, y, x]
                left = residual[z, y, x] - step * product[z, y, x]
                residual[z, y, x] = left
                total += left * left / diagonal[z, y, x]
                most = max(most, abs(left / diagonal[z, y, x]))
        sums[z] = total
        largest[z] = most
    return sums.sum(), largest.max()


@njit(cache=True, parallel=True, fastmath=True)
def _turn(direction, residual, diagonal, ratio):  # type: ignore[no-untyped-def]
    for z in prange(direction.shape[0]):
        for y in range(direction.shape[1]):
            for x in range(direction.shape[2]):
                direction[z, y, x] = residual[z, y, x] / diagonal[z, y, x] + ratio * direction[z, y, x]
