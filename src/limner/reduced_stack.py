"""A stack of large sections at coarser pixels, and labels back at the sections' own size.

A whole number of pixels, `factor` either way, becomes one: means of grey levels and colours, the commonest label. One
section is in memory at a time, and of most files only a band of it. Labels come back from the probabilities at the
coarser pixels, enlarged linearly, so that borders are smooth; what is enlarged is never kept for a whole section.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.io import Section
from limner.io.sections import centre_slices
from limner.space import Space
from limner.volume import Source

LARGEST = 1000  # pixels of the longer side; larger sections are reduced unless the user asks for another size
SMALLEST = 400  # pixels of the longer side to which sections are reduced where their structures allow it
NARROWEST = 4.0  # pixels that the narrowest structure is to keep in width
BAND = 512  # rows of a section in memory at a time, about


def reduced_shape(shape: tuple[int, int], factor: int) -> tuple[int, int]:
    """Size (Y, X) of a section once `factor` pixels either way are one; what is left at the end becomes one too."""
    return -(-shape[0] // factor), -(-shape[1] // factor)


def reduced_space(space: Space, factor: int) -> Space:
    """The grid of the reduced stack; its first pixel lies in the middle of those that it stands for.

    Examples
    --------
    >>> reduced_space(Space((3, 10, 12), (0.05, 0.001, 0.001)), 4).shape
    (3, 3, 3)
    """
    z, y, x = space.spacing
    shift = (factor - 1) / 2
    return replace(
        space,
        shape=(space.shape[0], *reduced_shape(space.shape[1:], factor)),
        spacing=(z, y * factor, x * factor),
        origin=tuple(space.to_physical((0, shift, shift)).tolist()),
    )


def reduced_source(source: Source, factor: int) -> Source:
    """The form of the stack with the sections of a folder at their reduced sizes, so that maps are written at these."""
    return replace(source, sizes=tuple(reduced_shape(size, factor) for size in source.sizes), file_spacing=None)


def reduced_section(section: Section, canvas: tuple[int, int], factor: int) -> NDArray[Any]:
    """One section, read band by band, as the means of its pixels.

    Parameters
    ----------
    section : Section
        Grey or in colour.
    canvas : tuple of int
        (Y, X) of the largest section, on which this one is centred; around it lies the median of its border.
    factor : int
        Pixels either way that become one, at least 1.

    Returns
    -------
    ndarray
        Shape (y, x) or (y, x, 3) with `reduced_shape` of the canvas, in the section's type; integers are rounded. Where
        the canvas ends within a pixel its edge is repeated.

    Raises
    ------
    ValueError
        If the file is damaged or holds NaN or infinity.
    """
    placed = centre_slices(section.shape, canvas)
    fill = _border_median(section) if section.shape != canvas else None
    height, width = reduced_shape(canvas, factor)
    rows = max(1, BAND // factor)
    bands = []
    for first in range(0, height, rows):
        last = min(first + rows, height)
        top, bottom = first * factor, min(last * factor, canvas[0])
        own = slice(max(top - placed[0].start, 0), max(bottom - placed[0].start, 0))
        pixels = section.in_colour((own, slice(None)))
        if fill is not None:
            band = np.empty((bottom - top, canvas[1], *fill.shape), pixels.dtype)
            band[...] = fill
            start = max(placed[0].start - top, 0)
            if len(pixels):
                band[start : start + len(pixels), placed[1]] = pixels
            pixels = band
        bands.append(_block_means(pixels, (last - first, width), factor))
    return np.concatenate(bands)


def _border_median(section: Section) -> NDArray[Any]:
    """As `limner.io.sections.border_median`."""
    whole = slice(None)
    edges = [(slice(0, 1), whole), (slice(-1, None), whole), (whole, slice(0, 1)), (whole, slice(-1, None))]
    pixels = [section.in_colour(edge) for edge in edges]
    median = np.median(np.concatenate([p.reshape(-1, *p.shape[2:]) for p in pixels]), axis=0)
    return (median if section.dtype.kind == "f" else np.rint(median)).astype(section.dtype)


def _block_means(pixels: NDArray[Any], shape: tuple[int, int], factor: int) -> NDArray[Any]:
    """(Y, X[, 3]) as means of blocks, (y, x[, 3])."""
    missing = [(0, n * factor - have) for n, have in zip(shape, pixels.shape, strict=False)]
    if any(after for _, after in missing):
        pixels = np.pad(pixels, [*missing, (0, 0)][: pixels.ndim], mode="edge")
    # rows first: sums along them are those of whole rows in memory, several times as fast
    exact = np.dtype(np.uint32 if pixels.dtype == np.uint8 else np.float64)
    rows = pixels.reshape(shape[0], factor, -1).sum(axis=1, dtype=exact)
    sums = rows.reshape(shape[0], shape[1], factor, *pixels.shape[2:]).sum(axis=2)
    means = sums / factor**2
    return (means if pixels.dtype.kind == "f" else np.rint(means)).astype(pixels.dtype)


def reduced_labels(labels: NDArray[np.integer[Any]], factor: int) -> NDArray[np.integer[Any]]:
    """The commonest label of every block of `factor` x `factor` pixels; of equals the lowest.

    Parameters
    ----------
    labels : ndarray of int
        Shape (Y, X). Where it ends within a block its edge is repeated.
    factor : int
        At least 1.

    Returns
    -------
    ndarray of int
        `reduced_shape`, in the same type.

    Examples
    --------
    >>> reduced_labels(np.array([[7, 7, 1, 2], [7, 1, 2, 1], [5, 5, 5, 5]]), 2)
    array([[7, 1],
           [5, 5]])
    """
    height, width = reduced_shape((labels.shape[0], labels.shape[1]), factor)
    reduced = np.empty((height, width), labels.dtype)
    rows = max(1, BAND // factor)
    for first in range(0, height, rows):
        last = min(first + rows, height)
        band = labels[first * factor : last * factor]
        missing = (last - first) * factor - len(band), width * factor - band.shape[1]
        band = np.pad(band, ((0, missing[0]), (0, missing[1])), mode="edge")
        blocks = band.reshape(last - first, factor, width, factor)
        lowest, highest = blocks.min(axis=(1, 3)), blocks.max(axis=(1, 3))
        mixed = lowest != highest
        lowest[mixed] = _commonest(blocks.transpose(0, 2, 1, 3)[mixed].reshape(-1, factor**2))
        reduced[first:last] = lowest
    return reduced


def _commonest(rows: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """The commonest value of each row (N, M), of equals the lowest; shape (N,)."""
    ordered = np.sort(rows, axis=1)
    best, most, run = ordered[:, 0].copy(), np.ones(len(rows), np.int64), np.ones(len(rows), np.int64)
    for column in range(1, rows.shape[1]):
        run = np.where(ordered[:, column] == ordered[:, column - 1], run + 1, 1)
        longer = run > most
        best[longer] = ordered[longer, column]
        np.maximum(most, run, out=most)
    return best


def widths(labels: NDArray[np.integer[Any]]) -> dict[int, float]:
    """How wide each structure is, in pixels: twice its area over its circumference, as if it were a ribbon.

    Parameters
    ----------
    labels : ndarray of int
        Shape (Y, X).

    Returns
    -------
    dict of int to float
        For each label above 0. Of a long ribbon along an axis its width, of a disc about 0.8 of its radius.

    Examples
    --------
    >>> labels = np.zeros((100, 9), int)
    >>> labels[:, 3:6] = 4
    >>> widths(labels)
    {4: 3.0}
    """
    present, index = np.unique(labels, return_inverse=True)
    index = index.reshape(labels.shape)
    sides = np.zeros(len(present))
    for a, b in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1])):
        differ = a != b
        sides += np.bincount(a[differ], minlength=len(present)) + np.bincount(b[differ], minlength=len(present))
    area = np.bincount(index.ravel(), minlength=len(present))
    found = zip(present.tolist(), (2 * area / np.maximum(sides, 1)).tolist(), strict=True)
    return {label: width for label, width in found if label > 0}


def finest_factor(shape: tuple[int, int]) -> int:
    """Pixels that become one where the longer side is to have `LARGEST` at most; 1: nothing is reduced."""
    return max(1, math.ceil(max(shape) / LARGEST))


def chosen_factor(shape: tuple[int, int], narrowest: float) -> int:
    """Pixels either way that become one, by what the structures need.

    Parameters
    ----------
    shape : tuple of int
        (Y, X) of the sections.
    narrowest : float
        `widths` of the narrowest structure where it is widest, pixels of the sections.

    Returns
    -------
    int
        As many as leave it `NARROWEST` pixels, but so that the longer side has `SMALLEST` to `LARGEST`.

    Examples
    --------
    >>> [chosen_factor((6000, 8000), narrowest) for narrowest in (10.0, 60.0, 500.0)]
    [8, 15, 20]
    >>> chosen_factor((700, 1000), 3.0)
    1
    """
    finest = finest_factor(shape)
    if finest == 1:
        return 1
    return int(min(max(narrowest / NARROWEST, finest), max(finest, max(shape) // SMALLEST)))


def enlarged_labels(
    probabilities: NDArray[np.floating[Any]],
    structures: NDArray[np.integer[Any]],
    factor: int,
    shape: tuple[int, int],
) -> NDArray[np.integer[Any]]:
    """Labels at full size: at every pixel the likeliest of the probabilities enlarged linearly.

    Where the four probabilities around a pixel agree on the likeliest label, so does what lies between them; the
    others, along borders, are worked out, each for the labels that may win there alone. The result is exact, and its
    cost grows with the length of borders, not with the number of labels.

    Parameters
    ----------
    probabilities : ndarray
        Shape (L, y, x), summing to 1 over L.
    structures : ndarray of int
        Labels of the L, shape (L,).
    factor : int
        Pixels either way that each of them stands for.
    shape : tuple of int
        (Y, X) of the result, `reduced_shape` of which is (y, x).

    Returns
    -------
    ndarray of int
        Shape (Y, X), in the type of `structures`.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Examples
    --------
    >>> inside = np.array([[[0.9, 0.3, 0.0]]])
    >>> enlarged_labels(np.concatenate([inside, 1 - inside]), np.array([7, 0]), 4, (4, 12))[0]  # even 2/3 of the way
    array([7, 7, 7, 7, 7, 0, 0, 0, 0, 0, 0, 0])
    """
    if probabilities.shape != (len(structures), *reduced_shape(shape, factor)):
        raise ValueError(
            f"enlarged_labels(): probabilities have shape {probabilities.shape}; give "
            f"{(len(structures), *reduced_shape(shape, factor))}, that of {shape} pixels over {factor}"
        )
    padded = np.pad(probabilities.astype(np.float32), ((0, 0), (1, 1), (1, 1)), mode="edge")
    best = padded.argmax(axis=0)
    large = np.empty(shape, structures.dtype)
    # a cell spans the middles of 2 x 2 pixels; the first one begins before the first row of the result
    before, rows = (factor + 1) // 2, max(1, BAND // factor)
    for first in range(0, best.shape[0] - 1, rows):
        last = min(first + rows, best.shape[0] - 1)
        cells = _cells(padded[:, first : last + 1], best[first : last + 1], factor)
        top = first * factor - before
        own = slice(max(top, 0), min(top + len(cells), shape[0]))
        if own.start < own.stop:
            large[own] = structures[cells[own.start - top : own.stop - top, before : before + shape[1]]]
    return large


def _cells(values: NDArray[np.float32], best: NDArray[np.intp], factor: int) -> NDArray[np.intp]:
    """Index of the likeliest label, ((y - 1) factor, (x - 1) factor), between values (L, y, x) whose own are `best`."""
    corners = [(slice(a, a + best.shape[0] - 1), slice(b, b + best.shape[1] - 1)) for a in (0, 1) for b in (0, 1)]
    agreed = best[corners[0]]
    rows, columns = np.nonzero(np.logical_or.reduce([best[corner] != agreed for corner in corners[1:]]))
    found = np.repeat(np.repeat(agreed, factor, axis=0), factor, axis=1)
    weights = _corner_weights(factor)
    around = np.stack(
        [values[:, a : a + len(agreed), b : b + agreed.shape[1]][:, rows, columns] for a in (0, 1) for b in (0, 1)],
        axis=-1,
    )
    highest = np.zeros((len(rows), factor**2), np.float32)
    winner = np.zeros(highest.shape, np.intp)
    for label, here in enumerate(around):
        # the likeliest of L has 1 / L at least, and what lies between is no more than the largest
        near = np.flatnonzero(here.max(axis=1, initial=0) >= 0.999 / len(values))
        between = here[near] @ weights
        wins = between > highest[near]
        winner[near] = np.where(wins, label, winner[near])
        highest[near] = np.where(wins, between, highest[near])
    blocks = found.reshape(len(agreed), factor, agreed.shape[1], factor)
    blocks[rows, :, columns, :] = winner.reshape(-1, factor, factor)
    return found


def _corner_weights(factor: int) -> NDArray[np.float32]:
    """Share of the four corners in every pixel of a cell, shape (4, factor**2)."""
    # how far from its first corner to its second each pixel lies; the first pixel as in `enlarged_labels`
    along = (np.arange(factor) - (factor + 1) // 2 + 0.5) / factor + 0.5
    ends = np.stack([1 - along, along])
    return np.einsum("ay,bx->abyx", ends, ends).reshape(4, -1).astype(np.float32)
