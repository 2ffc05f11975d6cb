"""How well predicted objects agree with the true ones: AJI, AJI+, panoptic quality, F1; and the foreground's pixels.

Objects are the ids above 0 of a label image; which ids, and whether an object is connected, does not matter. Everything
is computed from one sparse table of overlaps (`count_overlaps`), so that an image of 10,000 x 10,000 pixels with
100,000 objects takes seconds. T and P are true and predicted objects, IoU(T, P) = |T and P| / |T or P|.

========================  ==========================================================================================
`aji`                     AJI of Kumar et al.: each T takes the P of largest IoU, which other T may take too
`aji(..., reuse=False)`   the same, but a P once taken is gone for the T of higher ids
`aji_plus`                AJI+ of Graham et al.: one to one, the sum of IoU largest
`panoptic_quality`        PQ, DQ, SQ of Kirillov et al.: pairs with IoU above 0.5
`f1`                      F1 as stardist counts it: one to one, pairs with IoU at or above a threshold
`score_objects`           all of these and the pixel scores of one image, as counts that can be pooled over images
========================  ==========================================================================================

Where definitions part:

- Kumar et al. (2017) and the script distributed with MoNuSeg since 2018-07-17 let a prediction be used again; the
  script distributed before removed it. HoVer-Net's and most published figures are of the first kind.
- cellpose's `aggregated_jaccard_index` divides the overlap of a one-to-one matching by the union of the two
  foregrounds. That is never below AJI+ on the same matching, and not computed here.
- An IoU of exactly 0.5 is a match for `f1` (stardist, cellpose) and none for `panoptic_quality` (Kirillov, HoVer-Net).
  At a threshold of 0.5, F1 and DQ agree but for such pairs.

Empty cases: where a score's denominator is zero it is NaN, and a mean over images leaves the image out. So all object
scores are NaN where there is neither a true nor a predicted object; they are 0 where only one kind is missing, but for
SQ, the mean IoU of matched pairs, which is NaN wherever no pair matches (PQ and DQ then are 0). Pixel precision is NaN
where nothing is predicted, pixel recall where nothing is true, pixel F1 and IoU where both are empty.

References
----------
Kumar et al., IEEE Transactions on Medical Imaging 36(7), 2017, algorithm 1 (AJI), doi:10.1109/TMI.2017.2677499
Graham et al., HoVer-Net, Medical Image Analysis 58, 2019 (AJI+, PQ of nuclei), doi:10.1016/j.media.2019.101563
Kirillov et al., Panoptic segmentation, CVPR 2019, equation 2 (PQ), doi:10.1109/CVPR.2019.00963
Schmidt et al., StarDist, MICCAI 2018 (matching at a threshold), doi:10.1007/978-3-030-00934-2_30
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching

Indices = NDArray[np.int64]
PANOPTIC_IOU = 0.5  # pairs must lie above it; no object can then have two partners
BLOCK = 1 << 22  # pixels counted at a time
BATCH = 512  # pairs matched at a time: the solver's time grows with the square of the objects it is given
ID_BITS = 32  # ids below 2 ** ID_BITS are packed two in a number


@dataclass(frozen=True)
class Overlaps:
    """The sparse table of overlaps of T true and P predicted objects; K pairs share a pixel.

    Parameters
    ----------
    true_sizes, predicted_sizes : ndarray of int
        Shapes (T,) and (P,): pixels of each object, in the order of the ids.
    true_index, predicted_index : ndarray of int
        Shape (K,): the objects of each pair, as indices into the sizes; increasing, the true one first.
    pixels : ndarray of int
        Shape (K,): pixels that both objects of a pair hold, >= 1.
    image_pixels : int
        Pixels of the image, background included.
    """

    true_sizes: Indices
    predicted_sizes: Indices
    true_index: Indices
    predicted_index: Indices
    pixels: Indices
    image_pixels: int

    @property
    def union(self) -> Indices:
        """Shape (K,): pixels that either object of a pair holds."""
        return self.true_sizes[self.true_index] + self.predicted_sizes[self.predicted_index] - self.pixels

    @property
    def iou(self) -> NDArray[np.float64]:
        """Shape (K,): intersection over union (Jaccard index) of each pair, in (0, 1]."""
        return self.pixels / self.union


def count_overlaps(predicted: ArrayLike, truth: ArrayLike) -> Overlaps:
    """Count the pixels of every object and of every pair of a true and a predicted object that share any.

    Parameters
    ----------
    predicted, truth : array_like of int
        Label images of the same shape (Y, X) or (Z, Y, X): ids above 0, background 0.

    Returns
    -------
    Overlaps

    Raises
    ------
    ValueError
        If the shapes differ, are not of two or three axes, or the labels are no integers or below 0.

    Examples
    --------
    >>> overlaps = count_overlaps([[7, 7, 9, 0]], [[2, 2, 2, 0]])
    >>> overlaps.predicted_sizes, overlaps.pixels
    (array([2, 1]), array([2, 1]))
    >>> overlaps.iou.round(2)
    array([0.67, 0.33])
    """
    predicted_ids, true_ids = _ids(predicted, "predicted labels"), _ids(truth, "the truth")
    if predicted_ids.shape != true_ids.shape:
        raise ValueError(
            f"count_overlaps(): predicted labels have shape {predicted_ids.shape}, the truth {true_ids.shape}; "
            "give images of one size"
        )
    codes, counts = _count_codes(predicted_ids.reshape(-1), true_ids.reshape(-1))
    true, true_at = np.unique(codes >> ID_BITS, return_inverse=True)
    other, other_at = np.unique(codes & (2**ID_BITS - 1), return_inverse=True)
    true_sizes, sizes = np.bincount(true_at, counts, len(true)), np.bincount(other_at, counts, len(other))
    both = (true[true_at] > 0) & (other[other_at] > 0)
    return Overlaps(
        true_sizes=true_sizes[true > 0].astype(np.int64),
        predicted_sizes=sizes[other > 0].astype(np.int64),
        true_index=true_at[both] - np.count_nonzero(true == 0),
        predicted_index=other_at[both] - np.count_nonzero(other == 0),
        pixels=counts[both],
        image_pixels=true_ids.size,
    )


def _ids(labels: ArrayLike, name: str) -> NDArray[np.integer[Any]]:
    """The labels as an array, checked; ids too large to be packed become ranks, in the same order."""
    ids = np.asarray(labels)
    if ids.ndim not in (2, 3):
        raise ValueError(f"count_overlaps(): shape {ids.shape} found for {name}; give (y, x) or (z, y, x)")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"count_overlaps(): type {ids.dtype} found for {name}; give integers, one id an object")
    if ids.size and ids.min() < 0:
        raise ValueError(f"count_overlaps(): label {ids.min()} found in {name}; give ids above 0 and background 0")
    if ids.size and int(ids.max()) >= 2**ID_BITS:
        values, ranks = np.unique(ids, return_inverse=True)
        return ranks.reshape(ids.shape) + int(values[0] > 0)  # background keeps 0
    return ids


def _count_codes(predicted: NDArray[Any], truth: NDArray[Any]) -> tuple[NDArray[np.uint64], Indices]:
    """Every pair of ids as ``true << ID_BITS | predicted``, increasing, and its number of pixels."""
    codes, counts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for first in range(0, truth.size, BLOCK):
        here = slice(first, first + BLOCK)
        code = truth[here].astype(np.uint64) << np.uint64(ID_BITS) | predicted[here].astype(np.uint64)
        starts = np.flatnonzero(np.append(True, code[1:] != code[:-1]))  # runs of one pair: far fewer than pixels
        codes.append(code[starts])
        counts.append(np.diff(np.append(starts, code.size)))
    values, at = np.unique(np.concatenate(codes), return_inverse=True)
    return values, np.bincount(at, np.concatenate(counts), len(values)).astype(np.int64)


def aji(predicted: ArrayLike, truth: ArrayLike, reuse: bool = True) -> float:
    """Aggregated Jaccard index of Kumar et al. (2017).

    Each true object is paired with the predicted object of largest IoU among those it overlaps. AJI is the sum of the
    pairs' intersections over the sum of their unions, to which every true object without a pair and every predicted
    object in no pair add their pixels.

    Parameters
    ----------
    predicted, truth : array_like of int
        Label images of the same shape (Y, X) or (Z, Y, X), background 0.
    reuse : bool
        True: a predicted object may be the partner of several true ones, and its pixels then count in the union of each
        pair (the paper's text, MoNuSeg's script since 2018-07-17, HoVer-Net). False: true objects choose in the order
        of their ids, and a chosen prediction is gone for those that follow, which take the best of what is left
        (MoNuSeg's earlier script, without its fault of charging object 1 to true objects that overlap nothing).

    Returns
    -------
    float
        In [0, 1]; NaN where there is no object in either image.

    Raises
    ------
    ValueError
        As of `count_overlaps`.

    Notes
    -----
    Of several predictions with the same IoU the one with the lowest id is taken, as in both scripts. The score depends
    on the ids through such ties alone; with ``reuse=False`` through the order of the true objects too.

    References
    ----------
    Kumar et al., 2017, algorithm 1, doi:10.1109/TMI.2017.2677499

    Examples
    --------
    A prediction of 6 pixels covers two true objects of 3. Used twice: (3 + 3) / (6 + 6). Used once: 3 / (6 + 3).

    >>> predicted, truth = [[5, 5, 5, 5, 5, 5]], [[1, 1, 1, 2, 2, 2]]
    >>> aji(predicted, truth)
    0.5
    >>> aji(predicted, truth, reuse=False)
    0.3333333333333333
    """
    overlaps = count_overlaps(predicted, truth)
    return _ratio(*_aggregate(overlaps, _best_for_each(overlaps) if reuse else _best_left_for_each(overlaps)))


def aji_plus(predicted: ArrayLike, truth: ArrayLike) -> float:
    """AJI+ of Graham et al. (2019): as AJI, over the one-to-one pairs whose sum of IoU is largest.

    True and predicted objects in no pair add their pixels to the denominator. Unlike `aji` it does not charge a merged
    prediction once for each true object in it.

    Parameters
    ----------
    predicted, truth : array_like of int
        Label images of the same shape (Y, X) or (Z, Y, X), background 0.

    Returns
    -------
    float
        In [0, 1]; NaN where there is no object in either image.

    Raises
    ------
    ValueError
        As of `count_overlaps`.

    References
    ----------
    Graham et al., HoVer-Net, 2019, doi:10.1016/j.media.2019.101563

    Examples
    --------
    >>> aji_plus([[5, 5, 5, 5, 5, 5]], [[1, 1, 1, 2, 2, 2]])  # 3 / (6 + 3)
    0.3333333333333333
    """
    overlaps = count_overlaps(predicted, truth)
    return _ratio(*_aggregate(overlaps, _one_to_one(overlaps, overlaps.iou)))


class PanopticQuality(NamedTuple):
    """Panoptic quality and its two factors, each in [0, 1] or NaN."""

    pq: float
    dq: float
    sq: float


def panoptic_quality(predicted: ArrayLike, truth: ArrayLike) -> PanopticQuality:
    """Panoptic quality of one class, with detection and segmentation quality.

    True and predicted objects match where their IoU is above 0.5, which no object does with two. DQ is the F1 of the
    matches, ``2 matches / (true + predicted objects)``; SQ is the mean IoU of the matches; PQ is their product.

    Parameters
    ----------
    predicted, truth : array_like of int
        Label images of the same shape (Y, X) or (Z, Y, X), background 0.

    Returns
    -------
    PanopticQuality
        `pq` and `dq` are 0 and `sq` is NaN where nothing matches; all are NaN where there is no object in either image.

    Raises
    ------
    ValueError
        As of `count_overlaps`.

    References
    ----------
    Kirillov et al., 2019, equation 2 ("recognition quality" there is DQ here), doi:10.1109/CVPR.2019.00963

    Examples
    --------
    >>> panoptic_quality([[7, 7, 7, 0, 9]], [[1, 1, 1, 1, 0]])  # one match of IoU 3/4; object 9 is false
    PanopticQuality(pq=0.5, dq=0.6666666666666666, sq=0.75)
    """
    return score_objects(predicted, truth).panoptic


def f1(predicted: ArrayLike, truth: ArrayLike, iou: float = 0.5) -> float:
    """F1 of object detection at an IoU threshold: ``2 matches / (true + predicted objects)``.

    Matches are one to one with an IoU at or above the threshold, as many as can be; this is stardist's `matching`.

    Parameters
    ----------
    predicted, truth : array_like of int
        Label images of the same shape (Y, X) or (Z, Y, X), background 0.
    iou : float
        Threshold, above 0, at most 1.

    Returns
    -------
    float
        In [0, 1]; NaN where there is no object in either image.

    Raises
    ------
    ValueError
        As of `count_overlaps`; if the threshold is out of range.

    References
    ----------
    Schmidt et al., StarDist, 2018, doi:10.1007/978-3-030-00934-2_30

    Examples
    --------
    >>> f1([[1, 1, 1, 1]], [[1, 1, 2, 2]])  # one match of IoU 1/2, three objects
    0.6666666666666666
    >>> f1([[1, 1, 1, 1]], [[1, 1, 2, 2]], iou=0.6)
    0.0
    """
    return score_objects(predicted, truth, iou).f1


@dataclass(frozen=True)
class ObjectScore:
    """Counts of one image, or of several together, and the scores that follow from them.

    Parameters
    ----------
    images : int
        Number of images.
    iou_threshold : float
        That of `f1`.
    true_objects, predicted_objects : int
        Number of objects.
    matches : int
        Pairs of `f1`.
    panoptic_matches : int
        Pairs with an IoU above 0.5.
    panoptic_iou : float
        Sum of these pairs' IoU.
    aji_intersection, aji_union, aji_once_intersection, aji_once_union, aji_plus_intersection, aji_plus_union : int
        Numerators and denominators in pixels: of `aji`, of `aji` with ``reuse=False``, and of `aji_plus`.
    image_pixels, true_pixels, predicted_pixels, shared_pixels : int
        Pixels of the image, of the true and of the predicted foreground, and of both.
    """

    images: int
    iou_threshold: float
    true_objects: int
    predicted_objects: int
    matches: int
    panoptic_matches: int
    panoptic_iou: float
    aji_intersection: int
    aji_union: int
    aji_once_intersection: int
    aji_once_union: int
    aji_plus_intersection: int
    aji_plus_union: int
    image_pixels: int
    true_pixels: int
    predicted_pixels: int
    shared_pixels: int

    @property
    def aji(self) -> float:
        """AJI, a prediction used as often as it fits best."""
        return _ratio(self.aji_intersection, self.aji_union)

    @property
    def aji_once(self) -> float:
        """AJI, a prediction used once at most, in the order of the true ids."""
        return _ratio(self.aji_once_intersection, self.aji_once_union)

    @property
    def aji_plus(self) -> float:
        """AJI+."""
        return _ratio(self.aji_plus_intersection, self.aji_plus_union)

    @property
    def panoptic(self) -> PanopticQuality:
        """PQ, DQ and SQ; PQ is 0 where DQ is, though SQ is NaN there."""
        objects = self.true_objects + self.predicted_objects
        return PanopticQuality(
            pq=_ratio(2 * self.panoptic_iou, objects),
            dq=_ratio(2 * self.panoptic_matches, objects),
            sq=_ratio(self.panoptic_iou, self.panoptic_matches),
        )

    @property
    def f1(self) -> float:
        """F1 of the objects at `iou_threshold`."""
        return _ratio(2 * self.matches, self.true_objects + self.predicted_objects)

    def scores(self) -> dict[str, float]:
        """Every score by name: those above, then precision, recall, F1, IoU and accuracy of the foreground's pixels.

        Returns
        -------
        dict of str to float
            Each in [0, 1], or NaN where its denominator is zero.
        """
        true, predicted, shared = self.true_pixels, self.predicted_pixels, self.shared_pixels
        wrong = true + predicted - 2 * shared
        return {
            "aji": self.aji,
            "aji_once": self.aji_once,
            "aji_plus": self.aji_plus,
            **self.panoptic._asdict(),
            "f1": self.f1,
            "pixel_precision": _ratio(shared, predicted),
            "pixel_recall": _ratio(shared, true),
            "pixel_f1": _ratio(2 * shared, true + predicted),
            "pixel_iou": _ratio(shared, true + predicted - shared),
            "pixel_accuracy": _ratio(self.image_pixels - wrong, self.image_pixels),
        }

    def to_json(self) -> dict[str, Any]:
        """Scores and counts as JSON holds them, None for NaN."""
        counts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**_without_nan(self.scores()), "counts": counts}


def score_objects(predicted: ArrayLike, truth: ArrayLike, iou: float = 0.5) -> ObjectScore:
    """Score the objects and the foreground of one image.

    Parameters
    ----------
    predicted, truth : array_like of int
        Label images of the same shape (Y, X) or (Z, Y, X), background 0.
    iou : float
        Threshold of `f1`, above 0, at most 1.

    Returns
    -------
    ObjectScore

    Raises
    ------
    ValueError
        As of `count_overlaps`; if the threshold is out of range.

    Examples
    --------
    >>> score = score_objects([[5, 5, 5, 5, 5, 5, 0, 3]], [[1, 1, 1, 2, 2, 2, 2, 0]])
    >>> score.aji  # (3 + 3) / (6 + 7 + 1)
    0.42857142857142855
    >>> score.f1, score.panoptic.dq  # object 5 and object 1: IoU 1/2
    (0.5, 0.0)
    >>> score.scores()["pixel_accuracy"]
    0.75
    """
    if not 0 < iou <= 1:
        raise ValueError(f"score_objects(): iou is {iou}; give a threshold above 0 and at most 1")
    overlaps = count_overlaps(predicted, truth)
    ious = overlaps.iou
    reused = _aggregate(overlaps, _best_for_each(overlaps))
    once = _aggregate(overlaps, _best_left_for_each(overlaps))
    plus = _aggregate(overlaps, _one_to_one(overlaps, ious))
    return ObjectScore(
        images=1,
        iou_threshold=float(iou),
        true_objects=len(overlaps.true_sizes),
        predicted_objects=len(overlaps.predicted_sizes),
        matches=_count_matches(overlaps, iou),
        panoptic_matches=int(np.count_nonzero(ious > PANOPTIC_IOU)),
        panoptic_iou=float(ious[ious > PANOPTIC_IOU].sum()),
        aji_intersection=reused[0],
        aji_union=reused[1],
        aji_once_intersection=once[0],
        aji_once_union=once[1],
        aji_plus_intersection=plus[0],
        aji_plus_union=plus[1],
        image_pixels=overlaps.image_pixels,
        true_pixels=int(overlaps.true_sizes.sum()),
        predicted_pixels=int(overlaps.predicted_sizes.sum()),
        shared_pixels=int(overlaps.pixels.sum()),
    )


def pool_scores(scores: Sequence[ObjectScore]) -> ObjectScore:
    """The score of several images as one: their counts added up, so that an image weighs by what it holds.

    Raises
    ------
    ValueError
        If there is no score, or their thresholds differ.

    Examples
    --------
    >>> full, empty = score_objects([[1, 1, 1]], [[1, 1, 1]]), score_objects([[0]], [[4]])
    >>> pool_scores([full, empty]).aji  # 3 / (3 + 1)
    0.75
    """
    thresholds = sorted({s.iou_threshold for s in scores})
    if len(thresholds) != 1:
        found = f"thresholds {thresholds}" if thresholds else "no score"
        raise ValueError(f"pool_scores(): {found} given; give scores of one or more images at one threshold")
    names = [f.name for f in fields(ObjectScore) if f.name != "iou_threshold"]
    return ObjectScore(iou_threshold=thresholds[0], **{n: sum(getattr(s, n) for s in scores) for n in names})


@dataclass(frozen=True)
class ObjectSummary:
    """Scores of several images: their mean, their spread, and the score of all counts together.

    Parameters
    ----------
    mean : mapping of str to float
        Mean over the images on which a score is defined, by the names of `ObjectScore.scores`; NaN where none is left.
    sd : mapping of str to float
        Standard deviation over these images with the divisor n - 1; NaN for fewer than two.
    pooled : ObjectScore
        Of `pool_scores`.
    """

    mean: Mapping[str, float]
    sd: Mapping[str, float]
    pooled: ObjectScore

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON holds it, None for NaN."""
        return {
            "images": self.pooled.images,
            "mean": _without_nan(self.mean),
            "sd": _without_nan(self.sd),
            "pooled": self.pooled.to_json(),
        }


def summarise(scores: Sequence[ObjectScore]) -> ObjectSummary:
    """Mean and standard deviation over images, each image counting once, beside the pooled score.

    Raises
    ------
    ValueError
        As of `pool_scores`.

    Examples
    --------
    >>> full, empty = score_objects([[1, 1, 1]], [[1, 1, 1]]), score_objects([[0]], [[4]])
    >>> summary = summarise([full, empty])
    >>> summary.mean["aji"], summary.pooled.aji
    (0.5, 0.75)
    >>> summary.mean["sq"]  # the second image has no matched pair
    1.0
    """
    pooled = pool_scores(scores)
    columns = {name: [s.scores()[name] for s in scores] for name in pooled.scores()}
    known = {name: [v for v in values if not np.isnan(v)] for name, values in columns.items()}
    return ObjectSummary(
        mean={name: float(np.mean(values)) if values else float("nan") for name, values in known.items()},
        sd={name: float(np.std(values, ddof=1)) if len(values) > 1 else float("nan") for name, values in known.items()},
        pooled=pooled,
    )


def summarise_groups(scores: Mapping[str, ObjectScore], group_of: Mapping[str, str]) -> dict[str, ObjectSummary]:
    """A summary for each group of images, those of one patient say.

    Parameters
    ----------
    scores : mapping of str to ObjectScore
        By image name.
    group_of : mapping of str to str
        Group of each image in `scores`; may name others too.

    Returns
    -------
    dict of str to ObjectSummary
        By group, in the order in which the groups first occur among the images.

    Raises
    ------
    ValueError
        If an image has no group; as of `pool_scores`.

    Examples
    --------
    >>> score = score_objects([[1]], [[1]])
    >>> groups = summarise_groups({"a1": score, "a2": score, "b1": score}, {"a1": "A", "a2": "A", "b1": "B"})
    >>> {name: summary.pooled.images for name, summary in groups.items()}
    {'A': 2, 'B': 1}
    """
    members: dict[str, list[ObjectScore]] = {}
    for name, score in scores.items():
        if name not in group_of:
            raise ValueError(f"summarise_groups(): image {name} has no group; name one for each image")
        members.setdefault(group_of[name], []).append(score)
    return {group: summarise(those) for group, those in members.items()}


def _aggregate(overlaps: Overlaps, pairs: Indices) -> tuple[int, int]:
    """AJI's numerator and denominator for chosen pairs, given as indices into the table."""
    alone_true = np.delete(overlaps.true_sizes, overlaps.true_index[pairs]).sum()
    alone_predicted = np.delete(overlaps.predicted_sizes, overlaps.predicted_index[pairs]).sum()
    return int(overlaps.pixels[pairs].sum()), int(overlaps.union[pairs].sum() + alone_true + alone_predicted)


def _by_preference(overlaps: Overlaps) -> Indices:
    """Pairs by true object, for each by falling IoU, ties by predicted object."""
    return np.lexsort((overlaps.predicted_index, -overlaps.iou, overlaps.true_index))


def _best_for_each(overlaps: Overlaps) -> Indices:
    """For each true object that overlaps any prediction, the pair of largest IoU."""
    order = _by_preference(overlaps)
    _, first = np.unique(overlaps.true_index[order], return_index=True)
    return order[first]


def _best_left_for_each(overlaps: Overlaps) -> Indices:
    """As `_best_for_each`, each prediction gone once it is chosen."""
    chosen, paired, gone = [], set(), set()
    order = _by_preference(overlaps)
    rows = zip(overlaps.true_index[order].tolist(), overlaps.predicted_index[order].tolist(), strict=True)
    for pair, (true, predicted) in zip(order.tolist(), rows, strict=True):
        if true not in paired and predicted not in gone:
            chosen.append(pair)
            paired.add(true)
            gone.add(predicted)
    return np.array(chosen, dtype=np.int64)


def _count_matches(overlaps: Overlaps, iou: float) -> int:
    """Number of one-to-one pairs with an IoU at or above the threshold, as many as can be."""
    return len(_one_to_one(overlaps, (overlaps.iou >= iou).astype(float)))


def _one_to_one(overlaps: Overlaps, weights: NDArray[np.float64]) -> Indices:
    """The one-to-one pairs whose weights, shape (K,), have the largest sum; pairs of weight 0 are out."""
    chosen = [np.zeros(0, np.int64)]
    for pairs in _batches(overlaps, np.flatnonzero(weights > 0)):
        chosen.append(pairs[_assign(overlaps.true_index[pairs], overlaps.predicted_index[pairs], weights[pairs])])
    return np.concatenate(chosen)


def _batches(overlaps: Overlaps, pairs: Indices) -> Iterator[Indices]:
    """Pairs in batches such that no object is in two: whole clusters of objects that overlap one another."""
    if not len(pairs):
        return
    n_true, n_predicted = len(overlaps.true_sizes), len(overlaps.predicted_sizes)
    ends = (overlaps.true_index[pairs], n_true + overlaps.predicted_index[pairs])
    graph = coo_array((np.ones(len(pairs), bool), ends), shape=(n_true + n_predicted,) * 2)
    _, cluster_of = connected_components(graph, directed=False)
    cluster = cluster_of[ends[0]]
    batch = np.cumsum(np.bincount(cluster))[cluster] // BATCH
    order = np.argsort(batch, kind="stable")
    yield from np.split(pairs[order], np.flatnonzero(np.diff(batch[order])) + 1)


def _assign(rows: Indices, columns: Indices, weights: NDArray[np.float64]) -> Indices:
    """Which of the entries of a sparse matrix to take, one a row and column at most, for the largest sum of weights."""
    _, row = np.unique(rows, return_inverse=True)
    _, column = np.unique(columns, return_inverse=True)
    n, m = row.max() + 1, column.max() + 1
    # a column of its own for each row, at the cost of weight 0, lets a row stay alone; costs must not be 0
    highest = 1 + weights.max()
    costs = np.append(highest - weights, np.full(n, highest))
    cells = (np.append(row, np.arange(n)), np.append(column, m + np.arange(n)))
    taken = np.full(n, -1)
    taken_rows, taken_columns = min_weight_full_bipartite_matching(coo_array((costs, cells), shape=(n, m + n)).tocsr())
    taken[taken_rows] = taken_columns
    return np.flatnonzero(taken[row] == column)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


def _without_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in values.items()}
