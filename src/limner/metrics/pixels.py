"""How well predicted labels agree with the truth, pixel by pixel: accuracy, Dice, calibration of the confidence.

Scores are taken inside a mask around the true structures, as in Atzeni et al. (2018): on a large canvas the easy
background would otherwise drown every difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import distance_transform_edt

from limner.volume import LabelMap

LOOKUP_SIZE = 1 << 20  # labels below this are looked up in a table
Labels = NDArray[np.integer[Any]]


def evaluation_mask(truth_section: Labels, spacing_yx: tuple[float, float], within_mm: float) -> NDArray[np.bool_]:
    """Pixels that count: the union of the true structures, dilated.

    Parameters
    ----------
    truth_section : ndarray of int
        Shape (Y, X); structures are the labels above 0.
    spacing_yx : tuple of float
        Pixel spacing along y, x in mm.
    within_mm : float
        Euclidean distance in mm between pixel centres, >= 0, up to which background around the structures counts.

    Returns
    -------
    ndarray of bool
        Shape (Y, X); all False where the section holds no structure.

    References
    ----------
    Atzeni et al., MICCAI 2018, section 3 (2 mm there), doi:10.1007/978-3-030-00934-2_25

    Examples
    --------
    >>> evaluation_mask(np.array([[0, 0, 0, 7, 0]]), spacing_yx=(1.0, 0.5), within_mm=1.0)
    array([[False,  True,  True,  True,  True]])
    """
    structures = truth_section > 0
    if not structures.any():
        return structures
    distance = distance_transform_edt(~structures, sampling=spacing_yx)
    # a pixel that lies at within_mm exactly must not depend on the rounding of spacing * n
    return np.asarray(distance <= within_mm * (1 + 1e-9))


def accuracy(predicted: Labels, truth: Labels, mask: NDArray[np.bool_] | None = None) -> float:
    """Fraction of the pixels in `mask` (default: all) whose label is right, background included.

    Parameters
    ----------
    predicted, truth : ndarray of int
        Same shape.
    mask : ndarray of bool, optional
        Same shape.

    Returns
    -------
    float
        In [0, 1]; NaN where the mask is empty.

    Examples
    --------
    >>> accuracy(np.array([1, 1, 0, 2]), np.array([1, 2, 0, 2]))
    0.75
    """
    right = _agreeing(predicted, truth, "accuracy")
    counted = right if mask is None else right[mask]
    return float(counted.mean()) if counted.size else float("nan")


def confusion(predicted: Labels, truth: Labels, mask: NDArray[np.bool_] | None = None) -> tuple[Labels, Labels]:
    """Count every pair of a true and a predicted label.

    Parameters
    ----------
    predicted, truth : ndarray of int
        Same shape.
    mask : ndarray of bool, optional
        Same shape; only its pixels count.

    Returns
    -------
    labels : ndarray of int
        Shape (L,), the labels that occur in either, increasing; 0 always among them.
    counts : ndarray of int
        Shape (L, L); ``counts[i, j]`` pixels are ``labels[i]`` in truth and ``labels[j]`` as predicted.

    Examples
    --------
    >>> labels, counts = confusion(np.array([1, 1, 0, 9]), np.array([1, 9, 0, 9]))
    >>> labels
    array([0, 1, 9])
    >>> counts
    array([[1, 0, 0],
           [0, 1, 0],
           [0, 1, 1]])
    """
    _agreeing(predicted, truth, "confusion")
    if mask is not None:
        predicted, truth = predicted[mask], truth[mask]
    values = np.concatenate([truth.ravel(), predicted.ravel()]).astype(np.int64)
    labels, index = _ranked(values)
    true_index, predicted_index = np.split(index, 2)
    n = len(labels)
    return labels, np.bincount(true_index * n + predicted_index, minlength=n * n).reshape(n, n)


def _ranked(values: NDArray[np.int64]) -> tuple[Labels, NDArray[np.int64]]:
    """The distinct values and 0, increasing, and the place of each value among them."""
    if values.size and values.min() >= 0 and values.max() < LOOKUP_SIZE:  # without sorting: ten times as fast
        present = np.bincount(values, minlength=1) > 0
        present[0] = True
        return np.flatnonzero(present), (np.cumsum(present) - 1)[values]
    labels, index = np.unique(np.append(values, 0), return_inverse=True)
    return labels, index[:-1]


def dice(predicted: Labels, truth: Labels, label: int, mask: NDArray[np.bool_] | None = None) -> float:
    """Dice coefficient of one label, ``2 |P and T| / (|P| + |T|)``.

    Parameters
    ----------
    predicted, truth : ndarray of int
        Same shape.
    label : int
        The structure.
    mask : ndarray of bool, optional
        Same shape; only its pixels count.

    Returns
    -------
    float
        In [0, 1]; NaN where the label is absent from both, which neither helps nor harms a mean that skips it.

    Examples
    --------
    >>> dice(np.array([1, 1, 1, 0]), np.array([1, 0, 0, 0]), label=1)
    0.5
    """
    return dice_per_label(predicted, truth, mask).get(label, float("nan"))


def dice_per_label(predicted: Labels, truth: Labels, mask: NDArray[np.bool_] | None = None) -> dict[int, float]:
    """Dice coefficient of every label above 0 that occurs in either inside `mask`, by label.

    A label that occurs in only one of the two scores 0; one that occurs in neither has no entry.

    Examples
    --------
    >>> dice_per_label(np.array([1, 1, 0, 3]), np.array([1, 0, 0, 2]))
    {1: 0.6666666666666666, 2: 0.0, 3: 0.0}
    """
    return _dice_of(*confusion(predicted, truth, mask))


def _dice_of(labels: Labels, counts: Labels) -> dict[int, float]:
    """Dice of every label above 0 from a confusion matrix, labels without a pixel left out."""
    both = np.diag(counts)
    sizes = counts.sum(axis=0) + counts.sum(axis=1)
    return {int(label): float(2 * both[i] / sizes[i]) for i, label in enumerate(labels) if label > 0 and sizes[i] > 0}


def overlap_per_label(predicted: Labels, truth: Labels, labels: Sequence[int]) -> dict[int, dict[str, float]]:
    """Precision, recall, F1 and IoU of some labels over all pixels.

    Parameters
    ----------
    predicted, truth : ndarray of int
        Same shape.
    labels : sequence of int
        The structures to score.

    Returns
    -------
    dict of int to dict of str to float
        By label ``precision``, ``recall``, ``f1`` (the Dice coefficient) and ``iou``, in [0, 1]; NaN where there is
        nothing to divide by: precision of what was not found, recall of what is not there.

    Raises
    ------
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> overlap_per_label(np.array([1, 1, 0, 1]), np.array([1, 1, 1, 0]), [1])[1]["iou"]
    0.5
    """
    if predicted.shape != truth.shape:
        raise ValueError(
            f"overlap_per_label(): predicted has shape {predicted.shape}, truth {truth.shape}; give labels of one grid"
        )
    scores = {}
    for label in labels:
        found, true = predicted == label, truth == label
        n_found, n_true = int(np.count_nonzero(found)), int(np.count_nonzero(true))
        both = int(np.count_nonzero(found & true))
        scores[label] = {
            "precision": _share(both, n_found),
            "recall": _share(both, n_true),
            "f1": _share(2 * both, n_found + n_true),
            "iou": _share(both, n_found + n_true - both),
        }
    return scores


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def mean_dice(scores: Mapping[int, float]) -> float:
    """Mean over structures, each counted once whatever its size; NaN entries are skipped, NaN when none is left.

    Examples
    --------
    >>> mean_dice({1: 1.0, 2: 0.5, 3: float("nan")})
    0.75
    """
    known = [s for s in scores.values() if not np.isnan(s)]
    return float(np.mean(known)) if known else float("nan")


def expected_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 15, weights: ArrayLike | None = None
) -> float:
    """Mean gap between how sure predictions are and how often they are right.

    Predictions are put in `bins` equal intervals of confidence; the gap ``|mean confidence - fraction right|`` of each
    interval is averaged with the number (or weight) of predictions in it.

    Parameters
    ----------
    confidence : array_like
        Probability of the predicted class, in [0, 1]; any shape.
    correct : array_like of bool
        Whether the prediction is right; same shape.
    bins : int
        Number of intervals, >= 1.
    weights : array_like, optional
        Weight >= 0 of each prediction, same shape; default 1.

    Returns
    -------
    float
        In [0, 1]; 0 is perfectly calibrated, NaN when nothing is counted.

    Raises
    ------
    ValueError
        If the shapes differ or a confidence lies outside [0, 1].

    References
    ----------
    Guo et al., On calibration of modern neural networks, ICML 2017, equation 3.

    Examples
    --------
    >>> expected_calibration_error([0.9, 0.9], [True, False])
    0.4
    """
    sure, right = np.asarray(confidence, dtype=float).ravel(), np.asarray(correct, dtype=float).ravel()
    weight = np.ones(sure.shape) if weights is None else np.asarray(weights, dtype=float).ravel()
    if not sure.shape == right.shape == weight.shape:
        raise ValueError(
            f"expected_calibration_error(): {sure.size} confidences, {right.size} outcomes, {weight.size} weights; "
            "give one each"
        )
    if not weight.sum() > 0:
        return float("nan")
    if not ((sure >= 0) & (sure <= 1)).all():
        raise ValueError(
            f"expected_calibration_error(): confidences run from {sure.min()} to {sure.max()}; give 0 to 1"
        )
    interval = np.minimum((sure * bins).astype(int), bins - 1)
    # the weighted gap of an interval is |sum w (confidence - right)| / sum of all w
    gaps = np.bincount(interval, weights=weight * (sure - right), minlength=bins)
    return float(np.abs(gaps).sum() / weight.sum())


@dataclass(frozen=True)
class StackScore:
    """Scores of a predicted stack; every number is taken inside the sections' masks (`evaluation_mask`).

    Parameters
    ----------
    within_mm : float
        Distance around the true structures, in mm, up to which background counts.
    accuracy : mapping of int to float
        Fraction of right pixels, by section; NaN where a section's truth holds no structure.
    dice : mapping of int to mapping of int to float
        Dice by section and structure; only structures that occur in the section's truth or prediction.
    pooled_dice : mapping of int to float
        Dice by structure, over the pixels of all scored sections together.
    """

    within_mm: float
    accuracy: Mapping[int, float]
    dice: Mapping[int, Mapping[int, float]]
    pooled_dice: Mapping[int, float]

    @property
    def median_accuracy(self) -> float:
        """Median over sections, those without any true structure left out; NaN when none is left."""
        return float(np.median(known)) if (known := self._known()) else float("nan")

    @property
    def minimum_accuracy(self) -> float:
        """Accuracy of the worst section; NaN when none holds a true structure."""
        return min(self._known(), default=float("nan"))

    @property
    def mean_dice(self) -> float:
        """Mean over structures of `pooled_dice`: the "mean Dice" of Limner's tables."""
        return mean_dice(self.pooled_dice)

    def _known(self) -> list[float]:
        return [a for a in self.accuracy.values() if not np.isnan(a)]

    def to_json(self, names: Mapping[int, str] | None = None) -> dict[str, Any]:
        """The scores as JSON holds them: string keys, None for NaN.

        Parameters
        ----------
        names : mapping of int to str, optional
            Names of the structures, to stand beside their pooled Dice.
        """
        names = names or {}
        return {
            "within_mm": self.within_mm,
            "median_accuracy": _number(self.median_accuracy),
            "minimum_accuracy": _number(self.minimum_accuracy),
            "mean_dice": _number(self.mean_dice),
            "structures": {
                str(label): {"name": names.get(label, f"label {label}"), "dice": value}
                for label, value in self.pooled_dice.items()
            },
            "sections": {
                str(z): {
                    "accuracy": _number(self.accuracy[z]),
                    "mean_dice": _number(mean_dice(self.dice[z])),
                    "dice": {str(label): value for label, value in self.dice[z].items()},
                }
                for z in self.accuracy
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StackScore:
        """Scores as `to_json` wrote them.

        Examples
        --------
        >>> score = StackScore(0.2, {3: 0.5}, {3: {1: 0.25}}, {1: 0.25})
        >>> StackScore.from_json(score.to_json()) == score
        True
        """
        sections = {int(z): section for z, section in values["sections"].items()}
        return cls(
            within_mm=values["within_mm"],
            accuracy={
                z: float("nan") if section["accuracy"] is None else section["accuracy"]
                for z, section in sections.items()
            },
            dice={z: {int(n): value for n, value in section["dice"].items()} for z, section in sections.items()},
            pooled_dice={int(n): structure["dice"] for n, structure in values["structures"].items()},
        )


def score_stack(predicted: LabelMap, truth: LabelMap, sections: Sequence[int], within_mm: float) -> StackScore:
    """Score the named sections of a predicted stack against the truth.

    Each section is scored inside its own mask: the union of its true structures dilated by `within_mm` in the plane of
    the section. The mean Dice is computed from pooled counts: for each structure the pixels of all scored sections are
    added up (``2 sum |P and T| / sum (|P| + |T|)``), then the mean over the structures that occur in truth or
    prediction is taken, each structure counting once. Background counts for the accuracy, never for the Dice.

    Parameters
    ----------
    predicted, truth : LabelMap
        Labels of the same shape (Z, Y, X); the spacing is the truth's.
    sections : sequence of int
        Indices of the sections to score.
    within_mm : float
        In mm, >= 0.

    Returns
    -------
    StackScore

    Raises
    ------
    ValueError
        If the shapes differ, a section lies outside the stack or none is named, or `within_mm` is negative.

    Examples
    --------
    >>> from limner.space import Space
    >>> space = Space(shape=(2, 1, 4), spacing=(1, 1, 1))
    >>> truth = LabelMap(np.array([[[1, 1, 0, 0]], [[2, 2, 2, 0]]]), space)
    >>> predicted = LabelMap(np.array([[[1, 0, 0, 2]], [[2, 2, 2, 2]]]), space)
    >>> score = score_stack(predicted, truth, sections=[0, 1], within_mm=1)
    >>> score.accuracy  # section 0: 3 pixels count, one is wrong
    {0: 0.6666666666666666, 1: 0.75}
    >>> score.mean_dice  # (2/3 + 6/7) / 2
    0.7619047619047619
    """
    _check_stack(predicted, truth, sections, within_mm)
    spacing_yx = truth.space.spacing[1:]
    accuracies: dict[int, float] = {}
    dices: dict[int, dict[int, float]] = {}
    both: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for z in sections:
        mask = evaluation_mask(truth.labels[z], spacing_yx, within_mm)
        labels, counts = confusion(predicted.labels[z], truth.labels[z], mask)
        accuracies[z] = float(np.trace(counts) / counts.sum()) if mask.any() else float("nan")
        dices[z] = _dice_of(labels, counts)
        for i, label in enumerate(labels.tolist()):
            both[label] = both.get(label, 0) + int(counts[i, i])
            sizes[label] = sizes.get(label, 0) + int(counts[i].sum() + counts[:, i].sum())
    pooled = {label: 2 * both[label] / sizes[label] for label in sorted(sizes) if label > 0}
    return StackScore(float(within_mm), accuracies, dices, pooled)


def _check_stack(predicted: LabelMap, truth: LabelMap, sections: Sequence[int], within_mm: float) -> None:
    if predicted.labels.shape != truth.labels.shape:
        raise ValueError(
            f"score_stack(): predicted labels have shape {predicted.labels.shape}, the truth {truth.labels.shape} "
            "(z, y, x); resample one"
        )
    if not np.allclose(predicted.space.spacing, truth.space.spacing, rtol=1e-3):
        raise ValueError(
            f"score_stack(): predicted labels have spacing {predicted.space.spacing} mm, the truth "
            f"{truth.space.spacing} mm (z, y, x); resample one"
        )
    outside = [z for z in sections if not 0 <= z < len(truth.labels)]
    if outside or not len(sections):
        found = f"section {outside[0]} is named" if outside else "no section is named"
        raise ValueError(f"score_stack(): {found}, but the stack has sections 0 to {len(truth.labels) - 1}")
    if not within_mm >= 0:
        raise ValueError(f"score_stack(): within_mm is {within_mm}; give 0 mm or more")


def _agreeing(predicted: Labels, truth: Labels, function: str) -> NDArray[np.bool_]:
    if predicted.shape != truth.shape:
        raise ValueError(f"{function}(): predicted labels have shape {predicted.shape}, the truth {truth.shape}")
    return np.asarray(predicted == truth)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
