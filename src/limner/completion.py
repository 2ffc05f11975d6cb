"""A completed stack: its labels, how sure they are, and which sections to label next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.annotations import SectionLabels
from limner.section_choice import suggest_sections, weighed_by_change, wrong_share
from limner.volume import LabelMap

INTERVAL = 0.9  # of areas and volumes
NORMAL_WIDTH = 1.645  # standard deviations on either side that hold INTERVAL
SURE = 0.0001  # a pixel with less than this chance, or more than all but this, is in no doubt


@dataclass(frozen=True)
class SectionResult:
    """One completed section.

    Parameters
    ----------
    labels : ndarray of int32
        Shape (Y, X).
    uncertainty : ndarray of float32
        Calibrated chance that the label is wrong, shape (Y, X), in [0, 1].
    structures : ndarray of int
        The L labels that were possible here, shape (L,).
    probabilities : ndarray of float16 or None
        Calibrated, shape (L, Y, X), where asked for.
    objective : list of float
        Eq. 1 at the network's grid, first before GEM and then after each M-step; empty for other methods.
    entropy_before, entropy_after : float
        Mean entropy of w before and after GEM, nats, not calibrated.
    seconds : float
        Time taken.
    areas : ndarray of int
        Pixels of each of `structures`, fewest, in `labels` and most, shape (3, L), see `pixels_between`.
    """

    labels: NDArray[np.int32]
    uncertainty: NDArray[np.float32]
    structures: NDArray[np.int64]
    areas: NDArray[np.int64]
    probabilities: NDArray[np.float16] | None
    objective: list[float]
    entropy_before: float
    entropy_after: float
    seconds: float

    @property
    def iterations(self) -> int:
        """EM iterations done."""
        return max(len(self.objective) - 1, 0)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """For storing."""
        return {name: np.asarray(value) for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> SectionResult:
        """The inverse of `to_arrays`."""
        values: dict[str, Any] = {n: a if a.ndim > 1 else a.tolist() for n, a in arrays.items()}
        return cls(**{"probabilities": None, **values, "structures": arrays["structures"]})


Finished = Callable[[int, SectionResult], SectionResult]  # a section's index and result; what to keep of it


@dataclass(frozen=True)
class Completion:
    """A completed stack.

    Parameters
    ----------
    labels : LabelMap
        Every section; labelled ones exactly as given.
    uncertainty : ndarray of float32
        Calibrated chance of error, shape (Z, Y, X), in [0, 1]; 0 on labelled sections.
    sections : mapping of int to SectionResult
        The unlabelled sections.
    wrong : ndarray of float
        Share of each section that is expected to be wrong, shape (Z,), in [0, 1]; 0 on labelled sections. See
        `limner.section_choice.weighed_by_change`.
    suggestions : tuple of int
        Up to three sections that would help most if labelled next, see `limner.section_choice.suggest_sections`.
    seconds : mapping of str to float
        Time per stage.
    calibration : mapping of str to float
        ``rho_scale``, ``weight_per_mm``, ``temperature``, ``area_width`` (`widest_errors`) and, on left-out sections,
        the expected calibration error before and after (``ece_before``, ``ece_after``).
    notes : tuple of str
        What the user should know.
    """

    labels: LabelMap
    uncertainty: NDArray[np.float32]
    sections: Mapping[int, SectionResult]
    wrong: NDArray[np.float64]
    suggestions: tuple[int, ...]
    seconds: Mapping[str, float]
    calibration: Mapping[str, float]
    notes: tuple[str, ...]


def common_deviation(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Standard deviation of the pixels of each structure, were all its doubtful pixels to err the same way.

    The sum of those of the pixels, ``sqrt(p (1 - p))``. Pixels that are all but sure are left out: there may be so many
    of these that they add up to more than what is in doubt.

    Parameters
    ----------
    probabilities : ndarray
        Calibrated, shape (L, Y, X), summing to 1 over L.

    Returns
    -------
    ndarray of float
        Pixels, shape (L,).

    Examples
    --------
    >>> common_deviation(np.array([[[0.5, 0.2, 1.0]], [[0.5, 0.8, 0.0]]])).round(3).tolist()
    [0.9, 0.9]
    """
    variance = np.asarray(probabilities * (1 - probabilities), dtype=np.float64)
    return np.sqrt(np.where(variance < SURE * (1 - SURE), 0.0, variance)).sum(axis=(1, 2))


def pixels_between(
    likeliest: NDArray[np.integer], deviation: NDArray[np.floating], width: float, pixels: int
) -> NDArray[np.int64]:
    """Pixels of each structure with their interval.

    Parameters
    ----------
    likeliest : ndarray of int
        Pixels of which each of the L structures is the likeliest, shape (L,).
    deviation : ndarray of float
        Their `common_deviation`, shape (L,).
    width : float
        Half the interval's width over `common_deviation`, >= 0; `widest_errors` says how to find it.
    pixels : int
        Of the section.

    Returns
    -------
    ndarray of int
        Fewest, likeliest label's, and most pixels of each structure, shape (3, L).

    Examples
    --------
    >>> pixels_between(np.array([3, 1]), np.array([0.89, 0.89]), width=1.0, pixels=4)
    array([[3, 1],
           [3, 1],
           [3, 1]])
    >>> pixels_between(np.array([3, 1]), np.array([0.89, 0.89]), width=2.0, pixels=4)
    array([[2, 0],
           [3, 1],
           [4, 2]])
    """
    either_way = np.floor(width * deviation).astype(np.int64)
    fewest, most = np.maximum(likeliest - either_way, 0), np.minimum(likeliest + either_way, pixels)
    return np.stack([fewest, likeliest, most]).astype(np.int64)


def area_errors(
    likeliest: NDArray[np.integer],
    deviation: NDArray[np.floating],
    structures: NDArray[np.integer],
    truth: NDArray[np.integer],
) -> NDArray[np.float64]:
    """By how much the area of each structure is off, over its `common_deviation`, on a section whose labels are known.

    Parameters
    ----------
    likeliest, deviation : ndarray
        As for `pixels_between`, made without the section's labels, shape (L,).
    structures : ndarray of int
        Labels of the L, shape (L,).
    truth : ndarray of int
        The section's labels, shape (Y, X).

    Returns
    -------
    ndarray of float
        For each structure above 0 that is there or may be, >= 0; infinite where a doubt of 0 is wrong.

    Examples
    --------
    >>> area_errors(np.array([2, 1]), np.array([0.89, 0.89]), np.array([0, 7]), np.array([[7, 7, 9]])).round(2)
    array([1.12,  inf])
    """
    present = np.unique(truth)
    every = np.union1d(structures, present)
    true, found, doubt = np.zeros((3, len(every)))
    true[np.searchsorted(every, present)] = np.unique(truth, return_counts=True)[1]
    place = np.searchsorted(every, structures)
    found[place], doubt[place] = likeliest, deviation
    counts = (every > 0) & (true + found + doubt > 0)
    off = np.abs(true - found)[counts]
    beyond_doubt = np.where(off > 0, np.inf, 0.0)
    return np.divide(off, doubt[counts], out=beyond_doubt, where=doubt[counts] > 0)


def widest_errors(errors: Sequence[NDArray[np.floating]], spreads: Sequence[float]) -> float:
    """What `area_errors` of known sections say of others: half an interval's width over `common_deviation` and spread.

    How often doubtful pixels of a structure err alike cannot be told from their chances; it is found from the errors.
    These grow faster with the distance to labels than the chances do, hence the spread.

    Parameters
    ----------
    errors : sequence of ndarray
        `area_errors` of each section.
    spreads : sequence of float
        How far a border may have wandered on each, see `limner.section_fusion.SectionFusion.spread`.

    Returns
    -------
    float
        So wide that `INTERVAL` of the errors, each over its section's spread, are held, or all finite ones where these
        are fewer; NaN where there are none.

    Examples
    --------
    >>> widest_errors([np.array([1.0, 2.0, 4.0]), np.array([0.1])], [2.0, 0.1])  # 0.5, 1, 2 and 1
    2.0
    """
    over = np.concatenate([[], *(e / s for e, s in zip(errors, spreads, strict=True))])
    finite = over[np.isfinite(over)]
    if not len(finite):
        return math.nan
    return float(min(np.quantile(over, INTERVAL, method="higher"), finite.max()))


@dataclass(frozen=True)
class Size:
    """Area of a structure on a section, or its volume.

    Parameters
    ----------
    structure : int
        Its label.
    likeliest, fewest, most : float
        mm2 or mm3; the last two are the ends of the interval.
    """

    structure: int
    likeliest: float
    fewest: float
    most: float


FullSizeAreas = Mapping[int, Mapping[int, float]]


def areas(completion: Completion, at_full_size: FullSizeAreas | None = None) -> dict[int, list[Size]]:
    """Area of every structure on every section where it may be, mm2; on labelled sections it is known.

    Parameters
    ----------
    completion : Completion
        The result.
    at_full_size : mapping of int to mapping of int to float, optional
        For each section the area of each structure, mm2, where sections are larger than those that the method saw: they
        take the place of the likeliest areas, and intervals move with them.
    """
    space = completion.labels.space
    mm2 = space.spacing[1] * space.spacing[2]
    found: dict[int, list[Size]] = {}
    for z, labels in enumerate(completion.labels.labels):
        if z in completion.sections:
            result = completion.sections[z]
            rows = zip(result.structures.tolist(), *result.areas.tolist(), strict=True)
            sizes = [Size(s, best * mm2, few * mm2, most * mm2) for s, few, best, most in rows if most]
        else:
            present, counts = np.unique(labels, return_counts=True)
            sizes = [Size(s, *(n * mm2,) * 3) for s, n in zip(present.tolist(), counts.tolist(), strict=True)]
        found[z] = [size for size in sizes if size.structure != 0]
        if at_full_size is not None:
            found[z] = _moved(found[z], at_full_size[z])
    return found


def _moved(sizes: Sequence[Size], likeliest: Mapping[int, float]) -> list[Size]:
    """Sizes with other likeliest areas and intervals as wide as before; with structures that have one alone."""
    widths = {s.structure: (s.likeliest - s.fewest, s.most - s.likeliest) for s in sizes}
    moved = []
    for structure in sorted(widths.keys() | likeliest.keys() - {0}):
        area, (below, above) = likeliest.get(structure, 0.0), widths.get(structure, (0.0, 0.0))
        moved.append(Size(structure, area, max(0.0, area - below), area + above))
    return moved


def volumes(completion: Completion, at_full_size: FullSizeAreas | None = None) -> list[Size]:
    """Volume of every structure, mm3: areas times half the way to either neighbouring section.

    Between two labelled sections all errors are taken to be alike, so that the ends of the interval are sums of those
    of the sections; different gaps err on their own, so that what they add to either end adds in squares.
    `at_full_size` is as of `areas`.
    """
    positions = completion.labels.space.section_positions
    alone = len(positions) == 1
    thickness = np.full(1, completion.labels.space.spacing[0]) if alone else np.gradient(positions)
    gap = np.cumsum([z not in completion.sections for z in range(len(positions))])  # one number a gap
    sums: dict[int, dict[int, NDArray[np.float64]]] = {}
    for z, sizes in areas(completion, at_full_size).items():
        for size in sizes:
            off = (size.likeliest, size.likeliest - size.fewest, size.most - size.likeliest)
            gaps = sums.setdefault(size.structure, {})
            gaps[gap[z]] = gaps.get(gap[z], 0.0) + np.array(off) * thickness[z]
    found = []
    for structure in sorted(sums):
        likeliest, below, above = np.array(list(sums[structure].values())).T
        volume = float(likeliest.sum())
        ends = volume - math.sqrt(np.square(below).sum()), volume + math.sqrt(np.square(above).sum())
        found.append(Size(structure, volume, max(0.0, ends[0]), ends[1]))
    return found


def beyond_labels(annotations: SectionLabels) -> tuple[str, ...]:
    """A note where sections lie outside the labelled ones."""
    first, last = annotations.labelled[0], annotations.labelled[-1]
    beyond = [z for z in annotations.unlabelled if not first < z < last]
    if not beyond:
        return ()
    return (f"{len(beyond)} sections lie outside the labelled range; each rests on one labelled section.",)


def assemble(
    annotations: SectionLabels,
    sections: Mapping[int, SectionResult],
    seconds: Mapping[str, float],
    calibration: Mapping[str, float],
    notes: tuple[str, ...],
    changes: Mapping[tuple[int, int], float],
) -> Completion:
    """Put completed sections and given labels together, and choose what to label next.

    Parameters
    ----------
    annotations : SectionLabels
        The given labels.
    sections, seconds, calibration, notes
        As in `Completion`.
    changes : mapping of (int, int) to float
        As for `limner.section_choice.weighed_by_change`.
    """
    given = annotations.label_map
    labels = given.labels.copy()
    uncertainty = np.zeros(labels.shape, dtype=np.float32)
    for z, result in sections.items():
        labels[z] = result.labels.astype(labels.dtype)
        uncertainty[z] = result.uncertainty
    positions = given.space.section_positions
    shares = [wrong_share(doubt, found) for doubt, found in zip(uncertainty, labels, strict=True)]
    wrong = weighed_by_change(shares, positions, changes)
    return Completion(
        labels=LabelMap(labels, given.space, given.table, given.source),
        uncertainty=uncertainty,
        sections=dict(sections),
        wrong=wrong,
        suggestions=tuple(s.section for s in suggest_sections(wrong, positions, annotations.labelled)),
        seconds=dict(seconds),
        calibration=dict(calibration),
        notes=notes,
    )
