"""A completed stack: its labels, how sure they are, and which sections to label next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.annotations import SectionLabels
from limner.volume import LabelMap


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
    """

    labels: NDArray[np.int32]
    uncertainty: NDArray[np.float32]
    structures: NDArray[np.int64]
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
