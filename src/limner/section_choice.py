"""Which sections of a stack to label next: those by which the most that is expected to be wrong comes right.

A border that wanders from section to section is unsure, between two labelled sections, like a Brownian bridge: its
variance at distances a and b from them is in proportion to ``a b / (a + b)``. Labelling a section brings every section
of its gap nearer to a label, and what is expected to be wrong on them falls in proportion. So a section is worth most
in the middle of a wide gap in which much changes, and the next one is rarely worth most beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

SMALLEST_GAIN = 1e-9  # of a section; less is rounding


@dataclass(frozen=True)
class Suggestion:
    """A section to label, and why.

    Parameters
    ----------
    section : int
        Its index.
    gain : float
        By how much labelling it is expected to lower the sum over sections of the share that is wrong, once the
        suggestions before it are labelled. 1 is a whole section.
    wrong : float
        Share of it that is expected to be wrong as it is, in [0, 1].
    distance_mm : float
        To the nearest section that is labelled as it is; NaN where none is.
    """

    section: int
    gain: float
    wrong: float
    distance_mm: float


def wrong_share(uncertainty: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Share of a section that is expected to be wrong, beside the pixels of its structures.

    The expected number of wrong pixels, those called background among them, over what the structures may take up. Of a
    section whose structures are small much may be wrong though few pixels are.

    Parameters
    ----------
    uncertainty : ndarray
        Chance that the label is wrong, shape (Y, X), in [0, 1].
    labels : ndarray of int
        Shape (Y, X); 0 is background.

    Returns
    -------
    float
        In [0, 1]; 0 where nothing is there or unsure.

    Examples
    --------
    >>> wrong_share(np.array([[0.0, 0.5, 0.5, 0.0]]), np.array([[1, 1, 0, 0]]))  # one pixel; two or three are structure
    0.4
    """
    wrong = uncertainty.sum(dtype=np.float64)
    may_be = np.count_nonzero(labels) + uncertainty[labels == 0].sum(dtype=np.float64)
    return float(wrong / may_be) if may_be else 0.0


def bridge_variance(positions: ArrayLike, labelled: Iterable[int]) -> NDArray[np.float64]:
    """Variance of a border on each section, up to a factor: that of a Brownian bridge between the labelled sections.

    Parameters
    ----------
    positions : array_like
        Of the Z sections, mm, increasing.
    labelled : iterable of int
        Labelled sections.

    Returns
    -------
    ndarray of float
        Shape (Z,), mm; the distance itself beyond the first or last labelled section, infinite where none is labelled.

    Examples
    --------
    >>> bridge_variance([0.0, 1.0, 2.0, 4.0, 5.0], [0, 3]).tolist()  # 1 * 3 / 4, 2 * 2 / 4; then 1 mm beyond
    [0.0, 0.75, 1.0, 0.0, 1.0]
    """
    z = np.asarray(positions, dtype=np.float64)
    known = z[sorted(set(labelled))]
    if not len(known):
        return np.full(len(z), np.inf)
    right = np.searchsorted(known, z)
    after = known[np.minimum(right, len(known) - 1)] - z
    before = z - known[np.maximum(right - 1, 0)]
    inside = (right > 0) & (right < len(known))
    gap = np.where(inside, before + after, 1.0)
    return np.where(inside, before * after / gap, np.where(right > 0, before, after))


def weighed_by_change(
    wrong: ArrayLike, positions: ArrayLike, changes: Mapping[tuple[int, int], float]
) -> NDArray[np.float64]:
    """What is expected to be wrong between labelled sections, shared out again by how much changes in each gap.

    The uncertainty knows how far away the labels are, and little of how fast anatomy changes there; how unlike the
    labels on either side are once they are registered says that. The sum over all gaps stays as it was, but for what
    would be more than a whole section.

    Parameters
    ----------
    wrong : array_like
        Share of each section that is expected to be wrong, shape (Z,), see `wrong_share`.
    positions : array_like
        Of the sections, mm, increasing, shape (Z,).
    changes : mapping of (int, int) to float
        For each two labelled sections that follow one another, the share of them that is unlike, in [0, 1].

    Returns
    -------
    ndarray of float
        Shape (Z,), in [0, 1]. Sections that lie in no gap are as they were.

    Examples
    --------
    >>> weighed_by_change([0, 0.2, 0, 0.2, 0, 0.3], range(6), {(0, 2): 0.1, (2, 4): 0.3}).round(6).tolist()
    [0.0, 0.1, 0.0, 0.3, 0.0, 0.3]
    """
    given, z = np.asarray(wrong, dtype=np.float64), np.asarray(positions, dtype=np.float64)
    weighed, inside = np.zeros_like(given), np.zeros(len(given), dtype=bool)
    for (before, after), change in changes.items():
        gap = slice(before + 1, after)
        # a variance of a quarter of the gap, half-way, stands for all of the change
        weighed[gap] = change * bridge_variance(z, (before, after))[gap] * 4 / (z[after] - z[before])
        inside[gap] = True
    if not weighed.sum() > 0:
        return given
    return np.where(inside, np.minimum(weighed * (given[inside].sum() / weighed.sum()), 1.0), given)


def suggest_sections(
    wrong: ArrayLike, positions: ArrayLike, labelled: Sequence[int], most: int = 3
) -> tuple[Suggestion, ...]:
    """The sections to label next, each chosen as if those before it were labelled.

    Parameters
    ----------
    wrong : array_like
        Share of each section that is expected to be wrong, shape (Z,), see `weighed_by_change`.
    positions : array_like
        Of the sections, mm, increasing, shape (Z,).
    labelled : sequence of int
        Labelled sections; never suggested, and nothing is wrong on them. One at least.
    most : int
        So many sections.

    Returns
    -------
    tuple of Suggestion
        The one with the highest gain first; fewer, or none, where nothing more can be gained.

    Raises
    ------
    ValueError
        If shapes differ, no section is labelled or `most` is below 1.

    Examples
    --------
    >>> [s.section for s in suggest_sections([0, 0.1, 0.2, 0.1, 0, 0.2, 0.5, 0.2, 0], range(9), [0, 4, 8], most=2)]
    [6, 2]
    """
    expected, z, known = np.asarray(wrong, dtype=np.float64), np.asarray(positions, dtype=np.float64), {*labelled}
    if expected.shape != z.shape:
        raise ValueError(f"suggest_sections(): {expected.shape} shares, {z.shape} positions; give one each a section")
    if not known:
        raise ValueError("suggest_sections(): no section is labelled; give one at least")
    if most < 1:
        raise ValueError(f"suggest_sections(): most is {most}; give 1 or more")
    variance = bridge_variance(z, known)
    rate = np.divide(expected, variance, out=np.zeros_like(expected), where=variance > 0)  # wrong per mm of variance
    distance = np.abs(z[:, None] - z[sorted(known)]).min(axis=1)
    left, chosen = float(rate @ variance), list[Suggestion]()
    while len(chosen) < most and len(known) < len(z):
        after = {k: float(rate @ bridge_variance(z, {*known, k})) for k in range(len(z)) if k not in known}
        lowest = min(after.values())
        best = next(k for k, value in after.items() if value - lowest <= SMALLEST_GAIN)  # the first of equals
        if left - after[best] <= SMALLEST_GAIN:
            break
        chosen.append(Suggestion(best, left - after[best], float(expected[best]), float(distance[best])))
        left, known = after[best], {*known, best}
    return tuple(chosen)
