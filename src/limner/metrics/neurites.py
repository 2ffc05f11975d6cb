"""How well membranes, or the cells between them, agree with the truth: V_rand, V_info, Rand, warping and pixel error.

For sections of electron micrographs, each scored in 2D. Everything starts from masks that are true inside cells; a cell
is a 4-connected part of such a mask. S are the segments of the prediction, T the cells of the truth. Only pixels inside
true cells count for V_rand, V_info and the Rand error (the foreground restriction); of these p_ij is the fraction in
segment i and cell j, s_i and t_j the fractions in segment i and in cell j. A pixel that the prediction gives to
membrane is a segment of its own.

==================  ==============================================================================================
`v_rand`            V_rand = sum p_ij^2 / (sum s_i^2 / 2 + sum t_j^2 / 2); split: over sum t_j^2, merge: over sum s_i^2
`v_info`            V_info = I(S; T) / (H(S) / 2 + H(T) / 2); split: I / H(S), merge: I / H(T)
`thin`              predicted membranes thinned to lines of one pixel, before V_rand and V_info
`rand_error`        1 - V_rand without thinning, the Rand error of ISBI 2012
`warping_error`     fraction of pixels that still differ after the truth was warped to the prediction (`warp`)
`splits`, ...       splits, mergers, and holes and islands that are left after this warping (`count_topology`)
`pixel_error`       1 - F-score of the pixels inside cells
`score_maps`        all of these at every threshold of a membrane probability map, and the best of each
`score_cells`       the same for a prediction that needs no threshold
==================  ==============================================================================================

What the paper leaves open follows the scripts that its authors released with Fiji's Trainable Segmentation:

- The membranes of the prediction are thinned by a watershed of the mask, those of the truth are not thinned: they do
  not count anyway. The basins of the watershed are the segments; they are not labelled anew as parts between lines, so
  a line that ends short of the image's edge merges nothing, and the image needs no continuation past its edge. (With a
  skeleton it does: see `thin`.)
- V_rand and V_info are means over the sections. The Rand error and the pixel error are computed from the pairs, and the
  pixels, of all sections together. The threshold is the same for all sections: the one with the stack's best score.
- The warping error is a mean over the sections. Outside the image is membrane.

One thing departs from them: the truth's borders are moved by `REACH` pixels at most, through Jain's mask. Without that
limit (``reach=math.inf``, as in ISBI 2012) a cell that the prediction lacks shrinks to one pixel, and the threshold
with the best warping error may be one at which hardly a cell is left.

Sections without a true cell are left out of the means of V_rand and V_info; a score that no section defines is NaN.

References
----------
Arganda-Carreras et al., Frontiers in Neuroanatomy 9:142, 2015, equations 1 to 6, doi:10.3389/fnana.2015.00142
Jain et al., Boundary learning by optimization with topological constraints, CVPR 2010, doi:10.1109/CVPR.2010.5539950
Vincent and Soille, IEEE PAMI 13(6), 1991 (the watershed), doi:10.1109/34.87344
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from limner.metrics.objects import Overlaps, count_overlaps

Mask = NDArray[np.bool_]
Segments = NDArray[np.int32]
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
REACH = 5  # pixels by which a border may be moved
HALF = 0.5  # the threshold of a map that needs no tuning
HIGHER_IS_BETTER = ("v_rand", "v_info")
LOWER_IS_BETTER = ("rand_error", "warping_error", "pixel_error")


class Agreement(NamedTuple):
    """A score in [0, 1], 1 where segments and cells are the same, and its two parts.

    `split` falls where cells are split, `merge` where they are merged; the score is the harmonic mean of the two.
    """

    score: float
    split: float
    merge: float


class Topology(NamedTuple):
    """What differs between a prediction and the truth warped to it: splits, mergers, and holes or islands."""

    splits: int
    mergers: int
    others: int


@dataclass(frozen=True)
class NeuriteScores:
    """The scores of a stack, or of one section, at one threshold; the module's table says what they are.

    Parameters
    ----------
    v_rand, v_rand_split, v_rand_merge, v_info, v_info_split, v_info_merge : float
        In [0, 1], 1 is perfect.
    rand_error, warping_error, pixel_error : float
        In [0, 1], 0 is perfect.
    splits, mergers, others : int
        As of `count_topology`, summed over the sections.
    """

    v_rand: float
    v_rand_split: float
    v_rand_merge: float
    v_info: float
    v_info_split: float
    v_info_merge: float
    rand_error: float
    warping_error: float
    pixel_error: float
    splits: int
    mergers: int
    others: int

    def to_json(self) -> dict[str, Any]:
        """Scores by name, None for NaN."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class CellScore:
    """Scores of a prediction that needs no threshold.

    Parameters
    ----------
    overall : NeuriteScores
        Of the stack.
    sections : tuple of NeuriteScores
        Of each section.
    """

    overall: NeuriteScores
    sections: tuple[NeuriteScores, ...]


@dataclass(frozen=True)
class MapScore:
    """Scores of a membrane probability map at each of T thresholds.

    Parameters
    ----------
    thresholds : tuple of float
        Increasing; a pixel is membrane where its probability is at or above the threshold. 0.5 is among them.
    at : tuple of CellScore
        The scores at each threshold.
    """

    thresholds: tuple[float, ...]
    at: tuple[CellScore, ...]

    @property
    def at_half(self) -> CellScore:
        """The scores at the threshold 0.5."""
        return self.at[self.thresholds.index(HALF)]

    def best(self, name: str) -> tuple[float, CellScore]:
        """Threshold at which the whole stack's score `name` is best, and all scores there; of several that next to 0.5.

        Raises
        ------
        ValueError
            If there is no score of this name that has a best.
        """
        if name not in HIGHER_IS_BETTER + LOWER_IS_BETTER:
            known = ", ".join(HIGHER_IS_BETTER + LOWER_IS_BETTER)
            raise ValueError(f"best(): {name!r} is no score with a best threshold; give one of {known}")
        values = np.array([getattr(score.overall, name) for score in self.at])
        values = np.nan_to_num(values if name in LOWER_IS_BETTER else -values, nan=np.inf)
        i = int(np.lexsort((np.abs(np.subtract(self.thresholds, HALF)), values))[0])
        return self.thresholds[i], self.at[i]


def cells_of_labels(labels: ArrayLike) -> Mask:
    """The mask of the cells of a label map, with a gap of one pixel wherever two of them touch.

    Parameters
    ----------
    labels : array_like of int
        Shape (Y, X) or (Z, Y, X): 0 between cells. Cells are kept apart within sections, along y and x.

    Returns
    -------
    ndarray of bool
        Of the same shape, true inside cells.

    Examples
    --------
    >>> cells_of_labels([[3, 3, 5, 5, 0, 5]]).astype(int)
    array([[1, 0, 1, 1, 0, 1]])
    """
    ids = np.asarray(labels)
    cells = ids != 0
    for axis in (-2, -1):
        first, second = (np.moveaxis(ids, axis, 0)[part] for part in (slice(None, -1), slice(1, None)))
        np.moveaxis(cells, axis, 0)[:-1] &= (first == second) | (second == 0)
    return cells


def thin(cells: Mask) -> Segments:
    """Grow the cells of a section into its membranes until lines of one pixel are left between them.

    This is the watershed of the mask by its 4-connected parts; membranes that end inside a cell vanish.

    Parameters
    ----------
    cells : ndarray of bool
        Shape (Y, X), true inside cells.

    Returns
    -------
    ndarray of int32
        Shape (Y, X): 1, 2, ... the segments, 0 on the lines between them; 0 everywhere where there is no cell.

    Notes
    -----
    The basins follow from city-block distances to the cells, which a distance transform gives in a tenth of
    scikit-image's time for a watershed with lines; the two differ in which of two pixels at equal distance is the line.
    The segments are the basins themselves. Were they labelled anew as the parts between lines, then gaps would open
    where a skeleton retracts from the image's edge, and a perfect truth would score far below 1.

    Examples
    --------
    >>> thin(np.array([[1, 0, 0, 0, 1, 1]], bool))
    array([[1, 1, 0, 2, 2, 2]], dtype=int32)
    """
    seeds = _parts(cells)
    if not cells.any():
        return seeds
    nearest = ndimage.distance_transform_cdt(~cells, "taxicab", return_distances=False, return_indices=True)
    basins = seeds[tuple(nearest)]
    line = np.zeros(cells.shape, bool)
    for axis in (0, 1):
        basin, on_line, cell = (np.moveaxis(a, axis, 0) for a in (basins, line, cells))
        meet = (basin[:-1] != basin[1:]) & ~on_line[:-1] & ~on_line[1:]
        on_line[:-1] |= meet & ~cell[:-1]
        on_line[1:] |= meet & cell[:-1]  # two cells that touch are one: the other pixel is membrane
    return np.where(line, np.int32(0), basins)


def _parts(mask: Mask) -> Segments:
    """The 4-connected parts of a mask as 1, 2, ..."""
    return np.asarray(ndimage.label(mask)[0], np.int32)


def v_rand(segments: ArrayLike, truth: ArrayLike) -> Agreement:
    """Foreground-restricted Rand score of a section: V_rand = sum p_ij^2 / (sum s_i^2 / 2 + sum t_j^2 / 2).

    Parameters
    ----------
    segments : array_like of int
        Shape (Y, X): ids of the predicted segments; each pixel of 0 is a segment of its own.
    truth : array_like of int
        Shape (Y, X): ids of the true cells; pixels of 0 do not count.

    Returns
    -------
    Agreement
        `split` is sum p_ij^2 / sum t_j^2: the chance that two pixels of a cell are in one segment; `merge`
        sum p_ij^2 / sum s_i^2: that two pixels of a segment are in one cell. NaN where there is no true cell.

    Raises
    ------
    ValueError
        As of `limner.metrics.objects.count_overlaps`.

    Notes
    -----
    A pixel makes a pair with itself here, as in the paper. scikit-image's `adapted_rand_error` leaves such pairs out,
    and takes segment 0 for one segment.

    References
    ----------
    Arganda-Carreras et al., 2015, equations 1 to 3, doi:10.3389/fnana.2015.00142

    Examples
    --------
    A cell of 4 pixels split in halves: the chance falls to (2^2 + 2^2) / 4^2.

    >>> v_rand([[1, 1, 2, 2]], [[7, 7, 7, 7]])
    Agreement(score=0.6666666666666666, split=0.5, merge=1.0)
    """
    return _rand(_pairs(_restricted(segments, truth)))


def v_info(segments: ArrayLike, truth: ArrayLike) -> Agreement:
    """Foreground-restricted information theoretic score of a section: V_info = I(S; T) / (H(S) / 2 + H(T) / 2).

    Parameters
    ----------
    segments, truth : array_like of int
        As of `v_rand`.

    Returns
    -------
    Agreement
        `split` is I / H(S), `merge` I / H(T). A part is 1 where its entropy is 0: one segment splits nothing, and a
        single cell cannot be merged. NaN where there is no true cell.

    Raises
    ------
    ValueError
        As of `limner.metrics.objects.count_overlaps`.

    References
    ----------
    Arganda-Carreras et al., 2015, equations 4 to 6, doi:10.3389/fnana.2015.00142

    Examples
    --------
    Two cells, of which one is split in halves: H(T) = 1 bit, H(S) = 1.5 bits, and S tells all of T.

    >>> score = v_info([[1, 1, 2, 2, 3, 3, 3, 3]], [[7, 7, 7, 7, 8, 8, 8, 8]])
    >>> round(score.score, 6), round(score.split, 6), score.merge
    (0.8, 0.666667, 1.0)
    """
    return _information(_restricted(segments, truth))


def near_borders(cells: Mask, reach: float = REACH) -> Mask:
    """Pixels of a section, on either side, that lie within `reach` pixels of a border between cell and membrane.

    All pixels where the reach is infinite. The image's edge is no border.

    Examples
    --------
    >>> near_borders(np.array([[1, 1, 1, 0, 0, 0]], bool), reach=2)
    array([[False,  True,  True,  True,  True, False]])
    """
    if math.isinf(reach):
        return np.ones(cells.shape, bool)
    border = ndimage.morphological_gradient(cells.astype(np.uint8), size=3) > 0
    return np.asarray(ndimage.distance_transform_edt(~border) <= reach - 1) if border.any() else border


def warp(truth: Mask, predicted: Mask, movable: Mask | None = None, certainty: NDArray[Any] | None = None) -> Mask:
    """Warp the true cells of a section towards the predicted ones without changing their topology.

    Pixels at which the two differ are flipped in the truth one after the other, each only if it is simple: if its flip
    neither splits, merges, makes nor removes a cell (4-connected) or a part of the membrane (8-connected). Outside the
    section is membrane. It ends when no pixel that differs is simple.

    Parameters
    ----------
    truth, predicted : ndarray of bool
        Shape (Y, X), true inside cells.
    movable : ndarray of bool, optional
        Shape (Y, X): pixels that may be flipped; default: `near_borders` of the truth.
    certainty : ndarray of float, optional
        Shape (Y, X): pixels of higher certainty are tried first, as the distance of a probability from the threshold;
        else in the order of rows.

    Returns
    -------
    ndarray of bool
        Shape (Y, X): the warped truth.

    References
    ----------
    Jain et al., 2010, section 3, doi:10.1109/CVPR.2010.5539950

    Examples
    --------
    A membrane that lies one pixel off is moved, and nothing differs any more.

    >>> truth = np.array([[1, 1, 0, 0, 1]] * 3, bool)
    >>> predicted = np.array([[1, 0, 0, 1, 1]] * 3, bool)
    >>> bool((warp(truth, predicted) == predicted).all())
    True
    """
    source, target = np.pad(truth, 1).astype(np.uint8), np.pad(predicted, 1).astype(np.uint8)
    may_flip = np.pad(near_borders(truth) if movable is None else movable, 1)
    order = np.flatnonzero((source != target) & may_flip)
    if certainty is not None:
        order = order[np.argsort(-np.pad(certainty, 1).ravel()[order], kind="stable")]
    y, x = source.shape[1], 1
    around = np.array([x, x - y, -y, -y - x, -x, y - x, y, y + x])  # anticlockwise from the right
    _flip_simple(source.ravel(), target.ravel(), order, around, simple_points())
    return source[1:-1, 1:-1].astype(bool)


@cache
def simple_points() -> Mask:
    """Which of the 256 neighbourhoods make a pixel simple, for 4-connected cells in 8-connected membrane.

    Bit k of the index is the k-th neighbour, anticlockwise from the right, 1 in cells. A pixel is simple where its
    connectivity number, sum over the 4-neighbours k of x_k - x_k x_(k+1) x_(k+2), is 1.

    References
    ----------
    Yokoi, Toriwaki and Fukumura, Computer Graphics and Image Processing 4, 1975, doi:10.1016/0146-664X(75)90006-7
    """
    x = np.arange(256)[:, None] >> np.arange(8) & 1
    here, corner, following = x[:, ::2], x[:, 1::2], np.roll(x[:, ::2], -1, axis=1)
    return np.asarray((here - here * corner * following).sum(axis=1) == 1)


@njit(cache=True)
def _flip_simple(
    source: NDArray[np.uint8],
    target: NDArray[np.uint8],
    order: NDArray[np.int64],
    around: NDArray[np.int64],
    simple: Mask,
) -> None:
    """Flip in `source` (raveled, with a margin) what differs from `target` and is simple, until nothing is."""
    left, before = len(order), -1
    while left != before:
        before, left = left, 0
        for k in range(before):
            pixel, code = order[k], 0
            for bit in range(8):
                code |= source[pixel + around[bit]] << bit
            if simple[code]:
                source[pixel] = target[pixel]
            else:
                order[left] = pixel
                left += 1


def count_topology(warped: Mask, predicted: Mask) -> Topology:
    """Count what is left between the warped truth and the prediction: splits, mergers, holes and islands.

    Parameters
    ----------
    warped, predicted : ndarray of bool
        Shape (Y, X), true inside cells; the warped truth as of `warp`.

    Returns
    -------
    Topology
        A connected patch of superfluous membrane between k parts of the cells that both have counts as k - 1 splits, a
        patch of missing membrane between k cells as k - 1 mergers; patches that touch fewer than two count as others:
        holes in cells, and cells, that are too many or missing.

    Notes
    -----
    The counts of ISBI 2012 come from the same idea; its script groups pixels somewhat differently.
    """
    splits, no_split = _count_between(warped & ~predicted, _parts(warped & predicted))
    mergers, no_merger = _count_between(~warped & predicted, _parts(warped))
    return Topology(splits, mergers, no_split + no_merger)


def _count_between(differs: Mask, parts: Segments) -> tuple[int, int]:
    """Sum over the patches of `differs` of the parts that each touches, less one; and patches that touch below two."""
    patches, n = ndimage.label(np.pad(differs, 1), np.ones((3, 3)))
    part, base = np.pad(parts, 1).ravel(), np.int64(parts.max()) + 1
    at, width = np.flatnonzero(patches), patches.shape[1]
    pairs = [patches.ravel()[at] * base + part[at + step] for step in (-width, -1, 1, width)]
    pair = np.unique(np.concatenate([p[p % base > 0] for p in pairs]))
    touched = np.bincount(pair // base, minlength=n + 1)[1:]
    return int(np.maximum(touched - 1, 0).sum()), int((touched < 2).sum())


def score_cells(predicted: Iterable[Mask], truth: Iterable[Mask], reach: float = REACH) -> CellScore:
    """Score predicted cells against the true ones, section by section.

    Parameters
    ----------
    predicted, truth : iterable of ndarray of bool
        Sections (Y, X), true inside cells, or an array (Z, Y, X) of them; labels through `cells_of_labels`.
    reach : float
        Pixels by which the truth's borders may be moved for the warping error, >= 0; `math.inf`: without limit.

    Returns
    -------
    CellScore

    Raises
    ------
    ValueError
        If there is no section, the numbers of sections differ, two sections differ in size, a section is no mask, or
        the reach is negative.

    Examples
    --------
    >>> truth = np.array([[[1, 1, 1, 0, 1, 1, 1]] * 3], bool)
    >>> merged = truth.copy()
    >>> merged[0, 1, 3] = True
    >>> scores = score_cells(merged, truth).overall
    >>> scores.v_rand, scores.mergers, round(scores.warping_error, 3)  # 162 / ((18^2 + 162) / 2), one pixel of 21
    (0.6666666666666666, 1, 0.048)
    """
    pairs = _pair_up("score_cells", predicted, truth, reach)
    for cells, _ in pairs:
        _check_mask("score_cells", "a prediction", cells)
    counts = [_count(cells, _prepare(true, reach)) for cells, true in pairs]
    return _cell_score(counts)


def score_maps(
    probabilities: Iterable[NDArray[Any]],
    truth: Iterable[Mask],
    thresholds: Sequence[float] = THRESHOLDS,
    reach: float = REACH,
) -> MapScore:
    """Score membrane probabilities against the true cells at every threshold.

    Parameters
    ----------
    probabilities : iterable of ndarray of float
        Sections (Y, X) in [0, 1], 1 on membrane, or an array (Z, Y, X) of them.
    truth : iterable of ndarray of bool
        The same sections, true inside cells.
    thresholds : sequence of float
        Above 0, at most 1; 0.5 is added where it is missing.
    reach : float
        As of `score_cells`.

    Returns
    -------
    MapScore

    Raises
    ------
    ValueError
        As of `score_cells`; if a probability or a threshold is out of range.

    Examples
    --------
    >>> truth = np.array([[[1, 1, 1, 0, 1, 1, 1]] * 3], bool)
    >>> score = score_maps(np.where(truth, 0.1, 0.4), truth, thresholds=(0.2, 0.3))
    >>> score.best("v_rand")[0], score.best("v_rand")[1].overall.v_rand
    (0.3, 1.0)
    >>> score.at_half.overall.v_rand
    0.6666666666666666
    """
    levels = tuple(sorted({*map(float, thresholds), HALF}))
    if not all(0 < level <= 1 for level in levels):
        raise ValueError(f"score_maps(): thresholds are {tuple(thresholds)}; give numbers above 0 and at most 1")
    counts = []
    for p, t in _pair_up("score_maps", probabilities, truth, reach):
        if p.dtype.kind != "f" or not (p.min() >= 0 and p.max() <= 1):
            raise ValueError(f"score_maps(): {p.dtype} from {p.min()} to {p.max()} found; give probabilities in [0, 1]")
        true = _prepare(t, reach)
        counts.append([_count(p < level, true, np.abs(p - level)) for level in levels])
    return MapScore(levels, tuple(_cell_score(list(at)) for at in zip(*counts, strict=True)))


class _Truth(NamedTuple):
    """The true cells of a section: what does not depend on the prediction."""

    cells: Mask
    ids: Segments
    near_borders: Mask


class _Counts(NamedTuple):
    """All that the scores of a section at one threshold are made of."""

    rand: Agreement
    info: Agreement
    pairs: tuple[float, float, float]
    cell_pixels: tuple[int, int, int]  # shared, predicted, true
    warping_error: float
    topology: Topology


def _pair_up(
    name: str, predicted: Iterable[Any], truth: Iterable[Any], reach: float
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    if not reach >= 0:
        raise ValueError(f"{name}(): reach is {reach}; give pixels, 0 or more")
    found, true = [np.asarray(p) for p in predicted], [np.asarray(t) for t in truth]
    if not true or len(found) != len(true):
        raise ValueError(f"{name}(): {len(found)} sections predicted, {len(true)} true; give the same, one or more")
    for i, (p, t) in enumerate(zip(found, true, strict=True)):
        if p.shape != t.shape or p.ndim != 2 or p.size == 0:
            raise ValueError(f"{name}(): section {i} has shape {p.shape}, its truth {t.shape}; give both as one (y, x)")
        _check_mask(name, "the truth", t)
    return list(zip(found, true, strict=True))


def _check_mask(name: str, what: str, section: NDArray[Any]) -> None:
    if section.dtype != bool:
        raise ValueError(
            f"{name}(): {what} is of type {section.dtype}; give masks, of labels through cells_of_labels()"
        )


def _prepare(cells: Mask, reach: float) -> _Truth:
    return _Truth(cells, _parts(cells), near_borders(cells, reach))


def _count(cells: Mask, truth: _Truth, certainty: NDArray[Any] | None = None) -> _Counts:
    thinned = _restricted(thin(cells), truth.ids)
    warped = warp(truth.cells, cells, truth.near_borders, certainty)
    return _Counts(
        rand=_rand(_pairs(thinned)),
        info=_information(thinned),
        pairs=_pairs(_restricted(_parts(cells), truth.ids)),
        cell_pixels=(int((cells & truth.cells).sum()), int(cells.sum()), int(truth.cells.sum())),
        warping_error=float((warped != cells).mean()),
        topology=count_topology(warped, cells),
    )


def _cell_score(counts: Sequence[_Counts]) -> CellScore:
    return CellScore(_pool(counts), tuple(_pool([one]) for one in counts))


def _pool(counts: Sequence[_Counts]) -> NeuriteScores:
    """V_rand, V_info and the warping error as means over the sections, the other scores from their sums."""
    rand, info = (Agreement(*_means([getattr(c, name) for c in counts])) for name in ("rand", "info"))
    pairs, cell_pixels = (np.sum([getattr(c, name) for c in counts], axis=0) for name in ("pairs", "cell_pixels"))
    topology = Topology(*(int(n) for n in np.sum([c.topology for c in counts], axis=0)))
    return NeuriteScores(
        v_rand=rand.score,
        v_rand_split=rand.split,
        v_rand_merge=rand.merge,
        v_info=info.score,
        v_info_split=info.split,
        v_info_merge=info.merge,
        rand_error=1 - _ratio(2 * pairs[0], pairs[1] + pairs[2]),
        warping_error=float(np.mean([c.warping_error for c in counts])),
        pixel_error=1 - _ratio(2 * cell_pixels[0], cell_pixels[1] + cell_pixels[2]),
        splits=topology.splits,
        mergers=topology.mergers,
        others=topology.others,
    )


def _means(scores: Sequence[Agreement]) -> list[float]:
    defined = [s for s in scores if not math.isnan(s.score)]
    return [float(m) for m in np.mean(defined, axis=0)] if defined else [math.nan] * 3


def _restricted(segments: ArrayLike, truth: ArrayLike) -> Overlaps:
    """Overlaps of segments and true cells inside the true cells."""
    return count_overlaps(np.where(np.asarray(truth) > 0, segments, 0), truth)


def _pairs(overlaps: Overlaps) -> tuple[float, float, float]:
    """Pairs of pixels of one segment and one cell, of one segment, of one cell: n^2 times the sums of squares."""
    single = int(overlaps.true_sizes.sum() - overlaps.pixels.sum())  # pixels given to membrane
    return (
        float(np.square(overlaps.pixels, dtype=float).sum()) + single,
        float(np.square(overlaps.predicted_sizes, dtype=float).sum()) + single,
        float(np.square(overlaps.true_sizes, dtype=float).sum()),
    )


def _rand(pairs: tuple[float, float, float]) -> Agreement:
    shared, predicted, true = pairs
    return Agreement(_ratio(2 * shared, predicted + true), _ratio(shared, true), _ratio(shared, predicted))


def _information(overlaps: Overlaps) -> Agreement:
    """1 - H(S|T) / H(S), 1 - H(T|S) / H(T), and the same of the sums: exactly 1 where nothing is split or merged."""
    sizes, n = overlaps.true_sizes, overlaps.true_sizes.sum()
    if n == 0:
        return Agreement(math.nan, math.nan, math.nan)
    shared = overlaps.pixels
    single = sizes - np.bincount(overlaps.true_index, shared, len(sizes))
    of_segments = _surprise(overlaps.predicted_sizes, n) + float((single * np.log(n)).sum())
    of_cells = _surprise(sizes, n)
    split = _surprise(shared, sizes[overlaps.true_index]) + float((single * np.log(sizes)).sum())
    merged = _surprise(shared, overlaps.predicted_sizes[overlaps.predicted_index])
    return Agreement(
        _complement(split + merged, of_segments + of_cells),
        _complement(split, of_segments),
        _complement(merged, of_cells),
    )


def _surprise(sizes: NDArray[np.int64], among: Any) -> float:
    """Entropy, times the number of pixels, of parts of these sizes within wholes of the sizes `among`."""
    return float((sizes * np.log(among / sizes)).sum())


def _complement(lost: float, entropy: float) -> float:
    return 1 - lost / entropy if entropy > 0 else 1.0


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else math.nan
