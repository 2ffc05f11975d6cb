"""A completed stack: its labels, how sure they are, and which sections to label next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.annotations import SectionLabels
from limner.volume import LabelMap

INTERVAL = 0.9  # of areas and volumes


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
    suggestions : tuple of int
        Up to three sections, not adjacent, that would help most if labelled next.
    seconds : mapping of str to float
        Time per stage.
    calibration : mapping of str to float
        ``rho_scale``, ``weight_per_mm``, ``temperature`` and, on left-out sections, the expected calibration error
        before and after (``ece_before``, ``ece_after``).
    notes : tuple of str
        What the user should know.
    """

    labels: LabelMap
    uncertainty: NDArray[np.float32]
    sections: Mapping[int, SectionResult]
    suggestions: tuple[int, ...]
    seconds: Mapping[str, float]
    calibration: Mapping[str, float]
    notes: tuple[str, ...]


def pixels_between(probabilities: NDArray[Any], share: float = INTERVAL) -> NDArray[np.int64]:
    """Pixels of each structure with their interval, as if all doubtful pixels of a structure erred the same way.

    Errors along a border are alike, so that pixels do not average out: an interval of 90 % goes from the pixels that
    are the structure's with a chance of .95 to those that are with a chance of .05. It is wide rather than narrow.

    Parameters
    ----------
    probabilities : ndarray
        Calibrated, shape (L, Y, X), summing to 1 over L.
    share : float
        Of the interval, in (0, 1).

    Returns
    -------
    ndarray of int
        Fewest, likeliest label's, and most pixels of each structure, shape (3, L).

    Examples
    --------
    >>> sure, doubtful = np.array([0.99, 0.01]), np.array([0.4, 0.6])
    >>> pixels_between(np.stack([sure, sure, doubtful], axis=1)[:, None])  # three pixels, one of which may be either's
    array([[2, 0],
           [2, 1],
           [3, 1]])
    """
    rest = (1 - share) / 2
    best = np.bincount(probabilities.argmax(axis=0).ravel(), minlength=len(probabilities))
    fewest, most = ((probabilities >= chance).sum(axis=(1, 2)) for chance in (1 - rest, rest))
    return np.stack([np.minimum(fewest, best), best, np.maximum(most, best)]).astype(np.int64)


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


def areas(completion: Completion) -> dict[int, list[Size]]:
    """Area of every structure on every section where it may be, mm2; on labelled sections it is known."""
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
    return found


def volumes(completion: Completion) -> list[Size]:
    """Volume of every structure, mm3: areas times half the way to either neighbouring section.

    The ends of the interval are sums of those of the sections: as if all erred the same way.
    """
    positions = completion.labels.space.section_positions
    alone = len(positions) == 1
    thickness = np.full(1, completion.labels.space.spacing[0]) if alone else np.gradient(positions)
    sums: dict[int, NDArray[np.float64]] = {}
    for z, sizes in areas(completion).items():
        for size in sizes:
            values = np.array([size.likeliest, size.fewest, size.most]) * thickness[z]
            sums[size.structure] = sums.get(size.structure, 0.0) + values
    return [Size(structure, *sums[structure].tolist()) for structure in sorted(sums)]


def suggest_sections(
    uncertainty: NDArray[np.float32], labels: NDArray[Any], labelled: Iterable[int]
) -> tuple[int, ...]:
    """Up to three sections with the highest mean uncertainty inside their structures, no two of them adjacent.

    Parameters
    ----------
    uncertainty, labels : ndarray
        Shape (Z, Y, X).
    labelled : iterable of int
        Never suggested.

    Returns
    -------
    tuple of int
        The most uncertain first; empty where nothing is uncertain.
    """
    inside = labels > 0
    mean = (uncertainty * inside).sum(axis=(1, 2)) / np.maximum(inside.sum(axis=(1, 2)), 1)
    known, chosen = set(labelled), list[int]()
    for z in np.argsort(-mean, kind="stable").tolist():
        if z not in known and mean[z] > 0 and all(abs(z - c) > 1 for c in chosen):
            chosen.append(z)
    return tuple(chosen[:3])


def assemble(
    annotations: SectionLabels,
    sections: Mapping[int, SectionResult],
    seconds: Mapping[str, float],
    calibration: Mapping[str, float],
    notes: tuple[str, ...],
) -> Completion:
    """Put completed sections and given labels together; arguments as in `Completion`."""
    given = annotations.label_map
    labels = given.labels.copy()
    uncertainty = np.zeros(labels.shape, dtype=np.float32)
    for z, result in sections.items():
        labels[z] = result.labels.astype(labels.dtype)
        uncertainty[z] = result.uncertainty
    suggestions = suggest_sections(uncertainty, labels, annotations.labelled)
    completed = LabelMap(labels, given.space, given.table, given.source)
    return Completion(completed, uncertainty, dict(sections), suggestions, dict(seconds), dict(calibration), notes)
