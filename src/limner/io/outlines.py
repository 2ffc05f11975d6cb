"""Outlines of objects: traced along pixel edges, and filled again by the pixel-centre rule.

Points are (x, y) in pixels; pixel (row, column) covers columns to columns + 1 and rows to rows + 1, as in QuPath. A
traced outline encloses exactly its object's pixels, so that tracing and filling return the same labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Ring = NDArray[np.float64]


@dataclass(frozen=True)
class Outline:
    """One object.

    Parameters
    ----------
    polygons : tuple of tuple of ndarray
        One tuple of rings for each part: the outer ring, then its holes. A ring is (N, 2), x and y in pixels, its
        first point not repeated at the end.
    label : int
        The object's number; 0 where it has none.
    class_name : str, optional
        Its classification.
    found : bool
        Whether Limner found it, as its measurements say in GeoJSON; else somebody drew it or another program did.
    """

    polygons: tuple[tuple[Ring, ...], ...]
    label: int = 0
    class_name: str | None = None
    found: bool = False

    @property
    def area(self) -> float:
        """Area in pixels, holes taken off."""
        return float(sum(_area(rings[0]) - sum(_area(hole) for hole in rings[1:]) for rings in self.polygons))

    def scaled(self, y: float, x: float) -> Outline:
        """The outline with every length times `y` and `x`: in pixels of a finer level, say; corner (0, 0) stays."""
        return replace(self, polygons=tuple(tuple(ring * (x, y) for ring in rings) for rings in self.polygons))

    def shifted(self, y: float, x: float) -> Outline:
        """The outline moved down by `y` and to the right by `x`."""
        return replace(
            self, polygons=tuple(tuple(ring + np.array([x, y]) for ring in rings) for rings in self.polygons)
        )


def trace(labels: NDArray[np.integer], offset: tuple[int, int] = (0, 0)) -> Iterator[Outline]:
    """Outline of every label, by increasing label.

    Parameters
    ----------
    labels : ndarray of int
        Shape (Y, X), values >= 0; 0 is background.
    offset : tuple of int
        Position (y, x) of the first pixel in the full image.

    Yields
    ------
    Outline
        Horizontal and vertical edges with whole numbers as coordinates; parts that touch at a corner alone are polygons
        of their own. No ring touches itself.

    Examples
    --------
    >>> labels = np.zeros((3, 4), np.uint8); labels[1, 1:3] = 5
    >>> outline = next(trace(labels))
    >>> outline.label, outline.area, sorted(outline.polygons[0][0].tolist())
    (5, 2.0, [[1.0, 1.0], [1.0, 2.0], [3.0, 1.0], [3.0, 2.0]])
    """
    values, inverse = np.unique(labels, return_inverse=True)
    numbers = inverse.reshape(labels.shape)  # find_objects makes a list as long as the highest label
    if values.size and values[0] != 0:
        values, numbers = np.concatenate([[0], values]), numbers + 1
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        if box is None:
            continue
        mask = numbers[box] == number
        shift = np.array([box[1].start + offset[1], box[0].start + offset[0]], float)
        parts, n_parts = ndimage.label(mask)
        polygons = tuple(_rings(parts == part, shift) for part in range(1, n_parts + 1))
        yield Outline(polygons, int(values[number]))


def fill(outline: Outline, shape: tuple[int, int]) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """Pixels whose centre lies within an outline.

    Parameters
    ----------
    outline : Outline
        Rings of one polygon by the even-odd rule; polygons are united.
    shape : tuple of int
        (Y, X) of the image; what lies outside is cut off.

    Returns
    -------
    box : tuple of slice
        The part of the image that the outline may touch.
    mask : ndarray of bool
        Of that part. A centre exactly on an edge belongs to the side with the larger x (or, on a horizontal edge, y).

    Examples
    --------
    >>> square = np.array([[0.4, 0.4], [2.6, 0.4], [2.6, 2.4], [0.4, 2.4]])
    >>> box, mask = fill(Outline(((square,),)), (4, 4))
    >>> mask.sum(axis=1)
    array([3, 3])
    """
    points = np.concatenate([ring for rings in outline.polygons for ring in rings])
    low = np.clip(np.ceil(points.min(axis=0) - 0.5), 0, None).astype(int)
    high = np.clip(np.ceil(points.max(axis=0) - 0.5).astype(int), low, np.maximum(shape[::-1], low))
    box = (slice(int(low[1]), int(high[1])), slice(int(low[0]), int(high[0])))
    mask = np.zeros((high[1] - low[1], high[0] - low[0]), bool)
    for rings in outline.polygons:
        mask |= _inside(rings, low, mask.shape)
    return box, mask


def fill_all(outlines: Sequence[Outline], labels: Sequence[int], shape: tuple[int, int]) -> NDArray[np.int32]:
    """Label image (Y, X) of outlines, the larger ones first, so that what lies within another stays visible."""
    image = np.zeros(shape, np.int32)
    order = sorted(range(len(outlines)), key=lambda i: (-outlines[i].area, i))
    for i in order:
        box, mask = fill(outlines[i], shape)
        image[box][mask] = labels[i]
    return image


def _inside(rings: tuple[Ring, ...], low: NDArray[np.int_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Even-odd filling: each edge toggles all pixels of a row whose centre lies on or beyond its crossing."""
    height, width = shape
    toggles = np.zeros((height, width + 1), np.int32)
    for ring in rings:
        x, y = (ring - low).T
        x1, y1 = np.roll(x, -1), np.roll(y, -1)
        top, bottom = np.minimum(y, y1), np.maximum(y, y1)
        # rows whose centre r + 0.5 lies in [top, bottom): of two edges that meet at a centre, one crosses
        first = np.clip(np.ceil(top - 0.5), 0, height).astype(int)
        counts = np.clip(np.ceil(bottom - 0.5), 0, height).astype(int) - first
        edge = np.repeat(np.arange(len(ring)), counts)
        rows = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
        slope = (x1[edge] - x[edge]) / (y1[edge] - y[edge])
        crossing = x[edge] + (rows + 0.5 - y[edge]) * slope
        columns = np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)
        np.add.at(toggles, (rows, columns), 1)
    return np.cumsum(toggles[:, :width], axis=1) % 2 == 1


def _area(ring: Ring) -> float:
    return abs(_signed_area(ring))


def _signed_area(ring: Ring) -> float:
    x, y = ring.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _rings(mask: NDArray[np.bool_], shift: NDArray[np.float64]) -> tuple[Ring, ...]:
    """Outer ring and holes of one 4-connected part."""
    rings = [np.array(ring, float) for walk in _walks(mask) for ring in _simple(walk)]
    rings.sort(key=_area, reverse=True)  # the outer ring is the largest
    return tuple(ring + shift for ring in rings)


def _walks(mask: NDArray[np.bool_]) -> Iterator[list[tuple[int, int]]]:
    """Closed walks along pixel edges, the object at the right hand (y runs down); corners only."""
    padded = np.pad(mask, 1).astype(np.int8)
    across = np.diff(padded, axis=0)[:, 1:-1]  # horizontal edges: row of the edge, column of the pixel
    along = np.diff(padded, axis=1)[1:-1]  # vertical edges
    step: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for edges, start, end in (
        (across == 1, (0, 0), (1, 0)),  # object below: eastwards
        (across == -1, (1, 0), (0, 0)),  # object above: westwards
        (along == 1, (0, 1), (0, 0)),  # object to the east: northwards
        (along == -1, (0, 0), (0, 1)),  # object to the west: southwards
    ):
        for y, x in np.argwhere(edges).tolist():
            step.setdefault((x + start[0], y + start[1]), []).append((x + end[0], y + end[1]))
    while step:
        at = first = next(iter(step))
        came: tuple[int, int] = (0, 0)
        walk = []
        while at in step:
            ends = step[at]
            # where two pixels touch at a corner, turn right, along the same pixel
            turn = (-came[1], came[0])
            right = (at[0] + turn[0], at[1] + turn[1])
            to = right if right in ends else ends[-1]
            ends.remove(to)
            if not ends:
                del step[at]
            went = (to[0] - at[0], to[1] - at[1])
            if went != came:
                walk.append(at)
            at, came = to, went
            if at == first and at not in step:
                break
        yield walk


def _simple(walk: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Cut a closed walk where it touches itself, so that no ring meets a corner twice."""
    path: list[tuple[int, int]] = []
    position: dict[tuple[int, int], int] = {}
    for corner in walk:
        if corner in position:
            start = position[corner]
            yield path[start:]
            for cut in path[start + 1 :]:
                del position[cut]
            del path[start + 1 :]
        else:
            position[corner] = len(path)
            path.append(corner)
    if path:
        yield path
