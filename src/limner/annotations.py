"""Incomplete annotations, each as targets and weights in [0, 1] (weight 0: unknown)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.graph import MCP_Geometric

from limner.volume import LabelMap

# How people draw, as `simulate_scribbles` takes it to be.
_OFF_BORDER = 0.25  # of the radius of a region: how far from its border strokes stay, inside or beside it
_LENGTH = (0.5, 1.2)  # shortest and longest stroke, from end to end, as a share of the square root of the organ's area
_SMALLEST = 0.02  # of a section: as if the organ were at least as large, for the length of background strokes
_FILLED = 0.4  # of a region: nobody draws more into it
_SEEN = 9  # pixels that a method must get wrong on a section for a person to correct them there
_WANDER = 5.0  # pixels over which a hand strays from its course
_CROSSING = 3.0  # times as hard again as elsewhere is the way across an earlier stroke
_CANDIDATES = 5  # places of which the one farthest from earlier strokes is where the next begins


@dataclass(frozen=True)
class SectionLabels:
    """A stack of which some sections are labelled completely and the others not at all.

    Parameters
    ----------
    label_map : LabelMap
        Labels over the whole stack, shape (Z, Y, X); what stands on unlabelled sections is ignored.
    labelled : tuple of int
        Indices of the labelled sections, increasing. On these 0 means background; elsewhere nothing is known.

    Raises
    ------
    ValueError
        If no section is labelled, or an index lies outside the stack.
    """

    label_map: LabelMap
    labelled: tuple[int, ...]

    def __post_init__(self) -> None:
        n_sections = self.label_map.space.shape[0]
        if not self.labelled:
            raise ValueError("SectionLabels(): no section is labelled; label at least one")
        outside = [i for i in self.labelled if not 0 <= i < n_sections]
        if outside:
            raise ValueError(
                f"SectionLabels(): section {outside[0]} is named as labelled, but the stack has sections 0 to "
                f"{n_sections - 1}"
            )
        object.__setattr__(self, "labelled", tuple(sorted(set(self.labelled))))

    @classmethod
    def from_label_map(cls, label_map: LabelMap, labelled: Sequence[int] | None = None) -> SectionLabels:
        """Take the sections named in `labelled`, or where that is None every section that holds any label."""
        if labelled is None:
            labelled = np.flatnonzero((label_map.labels > 0).any(axis=(1, 2))).tolist()
        return cls(label_map, tuple(labelled))

    @property
    def unlabelled(self) -> tuple[int, ...]:
        """Indices of the sections without labels, increasing."""
        known = set(self.labelled)
        return tuple(i for i in range(self.label_map.space.shape[0]) if i not in known)

    @property
    def weights(self) -> NDArray[np.float32]:
        """Weight of each section, shape (Z,): 1 where labelled, 0 where unknown."""
        weights = np.zeros(self.label_map.space.shape[0], dtype=np.float32)
        weights[list(self.labelled)] = 1.0
        return weights


@dataclass(frozen=True)
class Scribbles:
    """A stack on which a few strokes were drawn for the background and for one or more organs.

    Parameters
    ----------
    label_map : LabelMap
        Shape (Z, Y, X); on marked pixels 0 is background, 1, 2, ... are organs. What stands elsewhere is ignored.
    weights : ndarray
        Shape (Z, Y, X), in [0, 1]; 0 where nothing was drawn.

    Raises
    ------
    ValueError
        If the shapes differ, a weight lies outside [0, 1], nothing was drawn, or background or all organs have no
        stroke.

    Notes
    -----
    A pixel holds one mark. When strokes are corrected the new marks replace the old ones, so the last stroke drawn
    over a pixel wins. Strokes are never changed in place: make new ones of the new marks.
    """

    label_map: LabelMap
    weights: NDArray[Any]

    def __post_init__(self) -> None:
        weights = self.weights.view()
        weights.flags.writeable = False
        object.__setattr__(self, "weights", weights)
        shape = self.label_map.space.shape
        if self.weights.shape != shape:
            raise ValueError(f"Scribbles(): weights have shape {self.weights.shape}, labels {shape}; give one a pixel")
        lowest, highest = self.weights.min(), self.weights.max()
        if not (lowest >= 0 and highest <= 1):
            raise ValueError(f"Scribbles(): weights go from {lowest:.3g} to {highest:.3g}; keep them in [0, 1]")
        classes = self.classes
        if not classes:
            raise ValueError("Scribbles(): no pixel is marked; draw strokes for the background and for an organ")
        if classes[0] != 0:
            raise ValueError("Scribbles(): there is no background stroke; mark some background too")
        if len(classes) == 1:
            raise ValueError("Scribbles(): all strokes mark background; mark an organ too")

    @classmethod
    def from_marks(cls, marks: LabelMap, shape: tuple[int, int, int] | None = None) -> Scribbles:
        """Take strokes as files hold them: 0 is unmarked, 1 background, 2, 3, ... are organs.

        Parameters
        ----------
        marks : LabelMap
            Shape (Z, Y, X); names in its table go with the marks.
        shape : tuple of int, optional
            (Z, Y, X) of the images that were drawn upon, where the marks' own is not known to be right.

        Returns
        -------
        Scribbles
            Every marked pixel has weight 1.

        Raises
        ------
        ValueError
            As of the class; also if a mark is negative, the shapes differ, or a stroke lies outside the images.

        Examples
        --------
        >>> from limner.space import Space
        >>> marks = LabelMap(np.array([[[0, 1, 0, 2, 2]]]), Space((1, 1, 5), (1.0, 1.0, 1.0)))
        >>> scribbles = Scribbles.from_marks(marks)
        >>> scribbles.weights, scribbles.classes
        (array([[[0, 1, 0, 1, 1]]], dtype=uint8), (0, 1))
        """
        _check_marks(marks.labels, shape or marks.space.shape)
        labels, weights = np.zeros(marks.labels.shape, marks.labels.dtype), np.zeros(marks.labels.shape, np.uint8)
        for z, section in enumerate(marks.labels):
            if section.any():  # sections that are never written to take no memory
                labels[z] = np.maximum(section, 1) - section.dtype.type(1)  # no unsigned 0 - 1
                weights[z] = section > 0
        table = {mark - 1: label for mark, label in marks.table.items() if mark > 0}
        return cls(replace(marks, labels=labels, table=table), weights)

    def to_marks(self) -> LabelMap:
        """Strokes as files hold them, the inverse of `from_marks`; weights above 0 become 1."""
        marks = np.where(self.weights > 0, self.label_map.labels.astype(np.int64) + 1, 0)
        table = {label + 1: entry for label, entry in self.label_map.table.items()}
        return replace(self.label_map, labels=marks.astype(np.min_scalar_type(marks.max())), table=table)

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """Labels that have a stroke, increasing: 0, then the organs."""
        drawn = (np.unique(self.label_map.labels[z][self.weights[z] > 0]) for z in self.sections)
        return tuple(sorted({label for labels in drawn for label in labels.tolist()}))

    @cached_property
    def sections(self) -> tuple[int, ...]:
        """Indices of the sections that were drawn upon, increasing."""
        return tuple(z for z, weights in enumerate(self.weights) if weights.any())

    def targets(self, sections: Sequence[int]) -> NDArray[np.int64]:
        """Indices into `classes` of the pixels of some sections, shape (len(sections), Y, X); 0 where unmarked."""
        chosen = list(sections)
        labels = np.where(self.weights[chosen] > 0, self.label_map.labels[chosen], 0)
        return np.searchsorted(self.classes, labels).astype(np.int64)


def _check_marks(marks: NDArray[np.integer[Any]], shape: tuple[int, int, int]) -> None:
    if marks.min() < 0:
        raise ValueError(
            f"Scribbles.from_marks(): a pixel is marked {marks.min()}; use 0 for unmarked, 1 for background, 2, 3, ... "
            "for organs"
        )
    if marks.shape == shape:
        return
    last = np.max(np.nonzero(marks), axis=1, initial=-1)
    if (last >= shape).any():
        raise ValueError(
            f"Scribbles.from_marks(): strokes reach to {tuple(last.tolist())} (z, y, x), outside the images of shape "
            f"{shape}; draw on the images themselves"
        )
    raise ValueError(
        f"Scribbles.from_marks(): the marks have shape {marks.shape}, the images {shape} (z, y, x); draw on the images "
        "themselves, or resample one"
    )


def simulate_partial(labels: NDArray[np.integer[Any]], fraction: float, seed: int) -> NDArray[np.integer[Any]]:
    """Keep a random share of the objects of a fully labelled image, as if the others had not been annotated.

    Parameters
    ----------
    labels : ndarray of int
        Instance labels, shape (Y, X) or any other; 0 is background.
    fraction : float
        Share of the objects to keep, in (0, 1]; of n objects the nearest whole number is kept, one at least.
    seed : int
        Of the draw. The draws are nested: what is kept at 0.1 is kept at 0.25 too, given the same seed.

    Returns
    -------
    ndarray of int
        Same shape, type and ids; the dropped objects are 0. All 0 where `labels` is.

    Raises
    ------
    ValueError
        If `fraction` lies outside (0, 1].

    Examples
    --------
    >>> simulate_partial(np.array([[1, 1, 0, 2, 0, 5, 7]]), fraction=0.5, seed=0)
    array([[1, 1, 0, 0, 0, 5, 0]])
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"simulate_partial(): fraction is {fraction}; give a number over 0, at most 1")
    ids = np.unique(labels[labels > 0])
    order = np.random.default_rng(seed).permutation(ids)
    kept = order[: max(1, int(fraction * len(ids) + 0.5))]
    return np.where(np.isin(labels, kept), labels, labels.dtype.type(0))


def simulate_scribbles(
    labels: NDArray[np.integer[Any]],
    organs: Sequence[int],
    sections: Sequence[int],
    seed: int,
    *,
    per_class: tuple[int, int] = (4, 5),
    thickness: float = 2.0,
    beside: float = 0.5,
    found: NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.uint8]:
    """Draw strokes into fully labelled sections, as a person might who knows them: a few smooth curves a class.

    Within an organ strokes keep off its border and spread over its parts. Some background strokes run along the organs
    a little outside, where they tell most; one lies anywhere, the others on other labelled structures, where there are
    any: label 0 is mostly outside of what was sectioned. Regions too small for all strokes get fewer.

    Parameters
    ----------
    labels : ndarray of int
        Labels of the whole volume, shape (Z, Y, X).
    organs : sequence of int
        Labels of the organs; all else is background.
    sections : sequence of int
        Sections to draw on; where an organ is absent only the others are drawn.
    seed : int
        Of every draw. The strokes of a section do not depend on which others are drawn upon.
    per_class : tuple of int
        Fewest and most strokes of a class on a section.
    thickness : float
        Width of a stroke, pixels, at least 1.
    beside : float
        Share of the background strokes that run along an organ, in [0, 1].
    found : ndarray of int, optional
        Labels of the volume as a method found them, shape (Z, Y, X): half of a class's strokes lie where it was missed,
        as when a person corrects.

    Returns
    -------
    ndarray of uint8
        Marks as `Scribbles.from_marks` takes them, shape (Z, Y, X): 0 unmarked, 1 background, 2, 3, ... the organs in
        the order given. Every mark lies in its class.

    Raises
    ------
    ValueError
        If a section is not in the volume, none of the organs is on any of the sections, or `found` is of another shape.

    Examples
    --------
    >>> labels = np.zeros((3, 60, 80), int)
    >>> labels[:, 15:45, 20:60] = 7
    >>> marks = simulate_scribbles(labels, organs=[7], sections=[1], seed=0)
    >>> np.unique(labels[marks == 2]), np.unique(labels[marks == 1]), np.unique(marks[[0, 2]])
    (array([7]), array([0]), array([0], dtype=uint8))
    """
    outside = [z for z in sections if not 0 <= z < len(labels)]
    if outside:
        raise ValueError(
            f"simulate_scribbles(): section {outside[0]} is to be drawn on, but the volume has sections 0 to "
            f"{len(labels) - 1}"
        )
    if not np.isin(labels[list(sections)], organs).any():
        raise ValueError(
            f"simulate_scribbles(): organs {list(organs)} are on none of sections {list(sections)}; choose others"
        )
    if found is not None and found.shape != labels.shape:
        raise ValueError(f"simulate_scribbles(): found has shape {found.shape}, labels {labels.shape}; give one grid")
    marks = np.zeros(labels.shape, np.uint8)
    for z in sections:
        rng = np.random.default_rng([seed, z])
        regions = [labels[z] == organ for organ in organs]
        background = ~np.logical_or.reduce(regions)
        for mark, region in enumerate((background, *regions), start=1):
            n = int(rng.integers(*per_class, endpoint=True))
            places, extent = [_inside(region, thickness)] * n, np.sqrt(region.sum())
            if mark == 1:
                places = _background_places(background, labels[z] > 0, n, beside, thickness)
                extent = np.sqrt(max((~background).sum(), _SMALLEST * background.size))
            if found is not None:
                right = found[z] == organs[mark - 2] if mark > 1 else ~np.isin(found[z], organs)
                missed = region & ~right
                if missed.sum() >= _SEEN:
                    places = [*[_inside(missed, thickness)] * round(n / 2), *places][:n]
            marks[z][_strokes(region, places, float(extent), thickness, rng)] = mark
    return marks


def _background_places(
    background: NDArray[np.bool_], labelled: NDArray[np.bool_], n: int, beside: float, thickness: float
) -> list[NDArray[np.bool_]]:
    """Where each of `n` background strokes may run: along organs, one anywhere, the others on other structures."""
    anywhere, others = _inside(background, thickness), background & labelled
    along = [] if background.all() else [_beside(~background, thickness)] * round(beside * n)
    elsewhere = [_inside(others, thickness) if others.any() else anywhere] * n
    return [*along, anywhere, *elsewhere][:n]


def _inside(region: NDArray[np.bool_], thickness: float) -> NDArray[np.bool_]:
    """Where the middle of a stroke may run in a region (Y, X): off the border, as far as the width of a part allows."""
    depth = ndimage.distance_transform_edt(region)
    parts, n = ndimage.label(region, structure=np.ones((3, 3)))
    deepest = ndimage.maximum(depth, parts, np.arange(n + 1))
    margin = np.maximum(_OFF_BORDER * deepest, np.minimum(thickness, deepest / 2))
    return region & (depth >= margin[parts])


def _beside(organs: NDArray[np.bool_], thickness: float) -> NDArray[np.bool_]:
    """A band around the organs (Y, X), off their border."""
    gap = max(_OFF_BORDER * ndimage.distance_transform_edt(organs).max(), thickness)
    distance = ndimage.distance_transform_edt(~organs)
    return (distance >= gap) & (distance <= 2 * gap)


def _strokes(
    region: NDArray[np.bool_],
    places: Sequence[NDArray[np.bool_]],
    extent: float,
    thickness: float,
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    """Pixels (Y, X) of one stroke in each of `places`, of a class that is right within `region`."""
    drawn = np.zeros(region.shape, bool)
    far = np.full(region.shape, np.inf)  # from all strokes so far
    for place in places:
        if not place.any() or drawn.sum() > _FILLED * region.sum():
            continue
        stroke = _painted(_curve(place, far, rng.uniform(*_LENGTH) * extent, rng), thickness, region.shape)
        far = np.minimum(far, ndimage.distance_transform_edt(~stroke))
        drawn |= stroke & region
    return drawn


def _curve(
    place: NDArray[np.bool_], far: NDArray[np.float64], reach: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A smooth curve (N, 2) within `place` (Y, X), about `reach` pixels from end to end, or as far as there is way.

    It begins away from earlier strokes, to which `far` (Y, X) is the distance, and takes the easiest way over ground
    that is uneven by chance and hard to cross where they are.
    """
    candidates = rng.choice(np.argwhere(place), _CANDIDATES)
    start = candidates[np.argmax(far[tuple(candidates.T)])]
    corner = np.maximum(start - int(reach + _WANDER), 0)
    window = tuple(slice(c, s + int(reach + _WANDER) + 1) for c, s in zip(corner, start, strict=True))
    near = place[window]
    ground = ndimage.gaussian_filter(rng.standard_normal(near.shape), _WANDER, mode="wrap")
    hardness = np.exp(ground / max(ground.std(), 1e-12)) * (1 + _CROSSING * np.exp(-far[window] / _WANDER))
    ways = MCP_Geometric(np.where(near, hardness, -1))
    costs, _ = ways.find_costs([tuple(start - corner)])
    ends = np.argwhere(np.isfinite(costs))
    distance = np.linalg.norm(ends - (start - corner), axis=1)
    distance[distance > reach] = 0
    end = rng.choice(ends[distance >= 0.9 * distance.max()])
    path = np.array(ways.traceback(tuple(end)), dtype=float)
    return _smoothed(path, near) + corner


def _smoothed(path: NDArray[np.float64], place: NDArray[np.bool_]) -> NDArray[np.float64]:
    """A path (N, 2) made as smooth as it can be within `place` (Y, X)."""
    for sigma in (4.0, 2.0, 1.0):
        smooth = ndimage.gaussian_filter1d(path, sigma, axis=0, mode="nearest")
        if place[tuple(np.rint(smooth).astype(int).T)].all():
            return smooth
    return path


def _painted(points: NDArray[np.float64], thickness: float, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Pixels of an image of `shape` (Y, X) within half the thickness of a curve (N, 2), and those it runs through."""
    painted = np.zeros(shape, bool)
    painted[tuple(np.rint(points).astype(int).T)] = True  # a thin stroke has no gaps
    first = np.maximum(points.min(axis=0) - thickness, 0).astype(int)
    last = (points.max(axis=0) + thickness).astype(int)
    window = painted[first[0] : last[0] + 1, first[1] : last[1] + 1]
    distance, _ = cKDTree(points).query(np.argwhere(np.ones_like(window)) + first)
    window |= (distance <= thickness / 2).reshape(window.shape)
    return painted
