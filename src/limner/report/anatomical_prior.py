"""The report of scans that nobody labelled, segmented by an anatomical prior: one web page in one file.

`PriorReport` fills ``anatomical_prior.html.j2``, which extends ``page.html.j2``. Every scan is seen in three planes as
it stands in the head, whatever way its voxels run; a few slices of each are kept, so that the page of a whole study
opens. Its volumes stand beside those of the other scans, which is where a scan that went wrong shows. It reaches no
network.
"""

# nibabel has few type hints.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.stats import median_abs_deviation

from limner.report.page import counted, volume_text, write_page
from limner.report.section_pixels import grey_range, pack_hundredths, pack_image, pack_labels, shown_size
from limner.report.sections import Structure, check_structures, finite, mapped_colours, structures_of
from limner.space import Space
from limner.volume import Label, LabelMap, LabelTable

LONGEST_SIDE = 320  # pixels of a slice; larger ones are shown smaller
MOST_SLICES = 13  # of each plane of a scan
MOST_PICTURES = 585  # slices on a page, so that one of 15 scans at 1 mm stays below 15 MB
MARGIN = 0.04  # around the labels, as a share of their longest side; the rest of a scan is not shown
HEADROOM = 1.2  # white is this much brighter than the brightest tissue, so that outlines show over it
INNER = 0.8  # share of the labelled part over which slices are spread: its ends show little
OUTLIER = 3.0  # robust deviations from the other scans' median
LEAST_OTHERS = (
    9  # scans; by the spread of four, one volume in six would be marked where nothing is wrong, of nine, in 17
)
_LEAST_SPREAD = 1e-3  # of the median: equal volumes are not apart by rounding


@dataclass(frozen=True)
class Plane:
    """A plane of the head and what lies at the edges of its pictures."""

    name: str
    top: str
    bottom: str
    left: str
    right: str
    after: str  # where later slices lie
    before: str


# across the axes superior, posterior, left; the patient's right is on the left, as radiologists look at it
PLANES = (
    Plane("Axial", "A", "P", "R", "L", "superior", "inferior"),
    Plane("Coronal", "S", "I", "R", "L", "posterior", "anterior"),
    Plane("Sagittal", "S", "I", "A", "P", "left", "right"),
)


@dataclass(frozen=True)
class StructureRow:
    """What was found of one structure in one scan.

    Parameters
    ----------
    label : int
        Its number in the label maps, at least 1.
    name : str
        Its name.
    mm3 : float
        Its volume in mm3.
    low, high : float
        The least and the most volume among plausible segmentations, in mm3.
    dice : float or None
        Agreement with the truth, in [0, 1], NaN where undefined; None where there is no truth.

    Raises
    ------
    ValueError
        If the label is below 1, or volumes are negative, not finite or out of order.
    """

    label: int
    name: str
    mm3: float
    low: float
    high: float
    dice: float | None

    def __post_init__(self) -> None:
        if self.label < 1:
            raise ValueError(f"StructureRow(): label is {self.label}; structures have labels from 1 on")
        if not (0 <= self.mm3 < np.inf and 0 <= self.low <= self.high < np.inf):
            raise ValueError(
                f"StructureRow(): {self.name} has the volume {self.mm3} mm3, low {self.low}, high {self.high}; "
                "give finite volumes from 0 on, low before high"
            )


@dataclass(frozen=True)
class ScanView:
    """A scan and what was found in it, on the scan's own grid.

    Parameters
    ----------
    name : str
        The scan's file name.
    image : ndarray
        Grey, shape (Z, Y, X), any real dtype; shown from its 0.5 percentile to a little above its 99.5.
    labels : ndarray of int
        Shape (Z, Y, X), in the label maps' numbers; 0 is background.
    uncertainty : ndarray of float32
        Shape (Z, Y, X), in [0, 1]: entropy of the mean over plausible segmentations.
    space : Space
        The scan's grid; its direction says what is up.
    overlap : float
        Dice of the scan's brain and the template's after alignment, in [0, 1].
    rows : tuple of StructureRow
        Its structures.
    notes : tuple of str
        What is doubtful about the scan.

    Raises
    ------
    ValueError
        If shapes differ or uncertainty leaves [0, 1].

    Examples
    --------
    >>> space = Space((1, 2, 2), (2.0, 1.0, 1.0))
    >>> labels, uncertainty = np.array([[[0, 10], [10, 10]]]), np.array([[[0, 0.1], [0.2, 0.3]]], np.float32)
    >>> rows = (StructureRow(10, "Thalamus", mm3=6.0, low=5.0, high=6.5, dice=0.9),)
    >>> scan = ScanView("1000.nii.gz", np.zeros((1, 2, 2)), labels, uncertainty, space, 0.95, rows, ())
    >>> round(scan.mean_uncertainty, 3), scan.mean_dice
    (0.2, 0.9)
    """

    name: str
    image: NDArray[Any]
    labels: NDArray[np.integer[Any]]
    uncertainty: NDArray[np.float32]
    space: Space
    overlap: float
    rows: tuple[StructureRow, ...]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("image", "labels", "uncertainty"):
            found = getattr(self, name).shape
            if found != self.space.shape:
                raise ValueError(
                    f"ScanView(): {self.name}: {name} of shape {found}, the grid {self.space.shape} (z, y, x); give one"
                )
        if not (self.uncertainty.min() >= 0 and self.uncertainty.max() <= 1):  # also catches NaN
            raise ValueError(f"ScanView(): {self.name}: uncertainty outside 0 to 1, or not numbers; give 0 to 1")

    @cached_property
    def mean_uncertainty(self) -> float:
        """Inside the structures, or of the whole scan where it has none."""
        inside = self.labels > 0
        return float((self.uncertainty[inside] if inside.any() else self.uncertainty).mean(dtype=np.float64))

    @property
    def mean_dice(self) -> float | None:
        """Over the structures for which it is defined; None where there is none."""
        return _mean([row.dice for row in self.rows])

    def cropped(self) -> ScanView:
        """The labelled part and a margin, copied, in smaller types; all of it where nothing is labelled.

        Hold these where scans are many or large: nothing else is shown.
        """
        boxes = find_objects((self.labels > 0).astype(np.uint8)) or [(slice(None),) * 3]
        part = _widened(boxes[0], self.space)
        labels = self.labels[part].astype(np.min_scalar_type(int(self.labels.max(initial=0))))
        return replace(
            self,
            image=self.image[part].copy(),
            labels=labels,
            uncertainty=self.uncertainty[part].copy(),
            space=Space(
                (labels.shape[0], labels.shape[1], labels.shape[2]),
                self.space.spacing,
                _triple(self.space.to_physical([side.start for side in part])),
                self.space.direction,
            ),
        )


@dataclass(frozen=True)
class PriorReport:
    """What the report of scans that nobody labelled shows.

    Parameters
    ----------
    scans : sequence of ScanView
        The scans that were segmented, each with a name of its own.
    failed : mapping of str to str
        The others: name, and why.
    table : mapping of int to Label
        Names and colours of structures; a black one (0, 0, 0) gets a colour that is not used.
    settings : mapping of str to object
        Settings of the run, shown as a table.
    notes : sequence of str
        Warnings, shown at the top.

    Raises
    ------
    ValueError
        If there is neither a scan nor a failed one, or two scans have one name.

    Examples
    --------
    >>> space = Space((1, 2, 2), (2.0, 1.0, 1.0))
    >>> rows = (StructureRow(10, "Thalamus", mm3=6.0, low=5.0, high=6.5, dice=0.9),)
    >>> uncertainty = np.full((1, 2, 2), 0.25, np.float32)
    >>> scan = ScanView("1000.nii.gz", np.zeros((1, 2, 2)), np.full((1, 2, 2), 10), uncertainty, space, 0.95, rows, ())
    >>> print(PriorReport([scan], {"1001.nii.gz": "it shows no brain"}, {}, {}, ()).summary)
    1 scan segmented, 1 failed.
    Mean Dice against the truth: 0.900.
    """

    scans: Sequence[ScanView]
    failed: Mapping[str, str]
    table: LabelTable
    settings: Mapping[str, object]
    notes: Sequence[str]

    def __post_init__(self) -> None:
        names = [*(scan.name for scan in self.scans), *self.failed]
        if not names:
            raise ValueError("PriorReport(): there is no scan; give one at least")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"PriorReport(): two scans are called {twice[0]}; give each a name of its own")

    @property
    def title(self) -> str:
        """Heading of the page: the scan's name where there is one alone."""
        return self.scans[0].name if len(self.scans) == 1 and not self.failed else "Segmented scans"

    @property
    def mean_dice(self) -> float | None:
        """Mean of the scans' own; None where there is no truth."""
        return _mean([scan.mean_dice for scan in self.scans])

    @property
    def summary(self) -> str:
        """One to three lines: scans done and failed, mean Dice where there is truth, the most uncertain of several."""
        failed = f", {len(self.failed)} failed" if self.failed else ""
        lines = [f"{counted(len(self.scans), 'scan')} segmented{failed}."]
        if self.mean_dice is not None:
            lines.append(f"Mean Dice against the truth: {self.mean_dice:.3f}.")
        if len(self.scans) > 1:
            worst = max(self.scans, key=lambda scan: scan.mean_uncertainty)
            lines.append(f"Most uncertain: {worst.name}, {worst.mean_uncertainty:.2f} in the mean; look at it first.")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write the report as one self-contained HTML file.

        The file appears under its name only when it is complete. A file that is there already is replaced.

        Parameters
        ----------
        path : Path
            The file to write, in a folder that exists.

        Raises
        ------
        ValueError
            If there are more than 65535 structures.
        """
        structures = _structures(self)
        check_structures("PriorReport.write()", structures)
        columns = _columns(self, structures)
        write_page(
            path,
            "anatomical_prior.html.j2",
            self,
            data=_page_data(self, structures),
            pictures=(_packed_scan(scan, structures, slices_a_plane(len(self.scans))) for scan in self.scans),
            planes=PLANES,
            columns=columns,
            outlier=OUTLIER,
            least_others=LEAST_OTHERS,
            flags=[sum(column["cells"][n]["flag"] != "" for column in columns) for n in range(len(self.scans))],
        )


def slices_a_plane(n_scans: int) -> int:
    """Slices of each plane of each scan: an odd number, so that one is the middle, and fewer where scans are many.

    Examples
    --------
    >>> [slices_a_plane(n) for n in (1, 15, 20, 1000)]
    [13, 13, 9, 1]
    """
    most = min(MOST_SLICES, MOST_PICTURES // (len(PLANES) * n_scans))
    return max(1, most - 1 + most % 2)


def upright(scan: ScanView) -> ScanView:
    """The scan with axes that run to superior, posterior and left, or as near as its voxels allow: none is resampled.

    Parameters
    ----------
    scan : ScanView
        On a grid of any direction.

    Examples
    --------
    >>> upside_down = Space((2, 1, 1), (3.0, 1.0, 1.0), direction=((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    >>> labels = np.array([[[1]], [[2]]])
    >>> scan = ScanView("a", labels, labels, np.zeros((2, 1, 1), np.float32), upside_down, 1.0, (), ())
    >>> upright(scan).labels.ravel(), upright(scan).space.origin
    (array([2, 1]), (-3.0, 0.0, 0.0))
    """
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    old = scan.space
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = np.array(old.direction) * old.spacing, old.origin
    turn = io_orientation(matrix)
    image, labels, uncertainty = (apply_orientation(a, turn) for a in (scan.image, scan.labels, scan.uncertainty))
    turned = matrix @ inv_ornt_aff(turn, old.shape)
    spacing = _triple(np.linalg.norm(turned[:3, :3], axis=0))
    direction = tuple(_triple(row) for row in turned[:3, :3] / spacing)
    space = Space(image.shape, spacing, _triple(turned[:3, 3]), direction)
    return replace(scan, image=image, labels=labels, uncertainty=uncertainty, space=space)


def slice_of(voxels: NDArray[Any], axis: int, place: int) -> NDArray[Any]:
    """A slice of upright voxels as it is shown: anterior up where it is axial, else superior.

    Parameters
    ----------
    voxels : ndarray
        Shape (Z, Y, X), axes to superior, posterior, left.
    axis : int
        What is cut across, a place in `PLANES`.
    place : int
        Which slice.

    Examples
    --------
    >>> slice_of(np.array([[["feet"]], [["head"]]]), 1, 0).ravel().tolist()
    ['head', 'feet']
    """
    section = np.take(voxels, place, axis)
    return section if axis == 0 else section[::-1]


def deviations(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """How far each value lies from the median of the others, in robust deviations of those (1.4826 MAD).

    Parameters
    ----------
    values : ndarray of float
        Shape (N,), NaN where there is none.

    Returns
    -------
    ndarray of float64
        Shape (N,); NaN where there is no value, or fewer than `LEAST_OTHERS` others.

    Examples
    --------
    >>> deviations(np.array([10, 11, 9, 10, 12, 8, 10, 11, 9, 30.0])).round(1).tolist()
    [0.0, 0.7, -0.7, 0.0, 1.3, -1.3, 0.0, 0.7, -0.7, 13.5]
    """
    found = np.full(len(values), np.nan)
    for n in np.flatnonzero(np.isfinite(values)):
        others = np.delete(values, n)
        others = others[np.isfinite(others)]
        if len(others) >= LEAST_OTHERS:
            median = np.median(others)
            spread = max(median_abs_deviation(others, scale="normal"), _LEAST_SPREAD * abs(median), 1e-12)
            found[n] = (values[n] - median) / spread
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(defined)) if defined else None


def _widened(box: Sequence[slice], space: Space) -> tuple[slice, ...]:
    """A box with `MARGIN` around it, inside the grid."""
    ends = [side.indices(length)[:2] for side, length in zip(box, space.shape, strict=True)]
    longest_mm = max((stop - start) * mm for (start, stop), mm in zip(ends, space.spacing, strict=True))
    margins = [math.ceil(MARGIN * longest_mm / mm) for mm in space.spacing]
    return tuple(
        slice(max(0, start - margin), min(length, stop + margin))
        for (start, stop), margin, length in zip(ends, margins, space.shape, strict=True)
    )


def _triple(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _structures(report: PriorReport) -> list[Structure]:
    """Background and every label that has a row or occurs; names are those of the rows."""
    names = {label: row.name for label, row in report.table.items()}
    names.update((row.label, row.name) for scan in report.scans for row in scan.rows)
    table = {label: Label(name, _colour(report.table, label, n)) for n, (label, name) in enumerate(names.items())}
    maps = [LabelMap(scan.labels, scan.space, table) for scan in report.scans]
    return structures_of(maps, (row.label for scan in report.scans for row in scan.rows))


def _colour(table: LabelTable, label: int, n: int) -> tuple[int, int, int]:
    """The table's colour, or where it has none the `n`-th of a series in which neighbours are far apart."""
    if label in table and table[label].colour != (0, 0, 0):
        return table[label].colour
    rgb = colorsys.hls_to_rgb(n * 0.6180339887498949 % 1, (0.6, 0.7, 0.5)[n % 3], 0.9)
    red, green, blue = (round(255 * part) for part in rgb)
    return red, green, blue


def _page_data(report: PriorReport, structures: Sequence[Structure]) -> dict[str, Any]:
    """What the page's script needs besides the slices; holds no NaN, which JSON lacks."""
    uncertain = [scan.mean_uncertainty for scan in report.scans]
    return {
        "scans": [_scan_data(scan, structures) for scan in report.scans],
        "structures": [{"name": s.name, "colour": s.colour} for s in structures],
        "planes": [{"name": plane.name, "after": plane.after, "before": plane.before} for plane in PLANES],
        "mappedColours": mapped_colours(),
        "start": int(np.argmax(uncertain)) if uncertain else 0,
    }


def _scan_data(scan: ScanView, structures: Sequence[Structure]) -> dict[str, Any]:
    place = {structure.label: n for n, structure in enumerate(structures)}
    return {
        "name": scan.name,
        "overlap": finite(scan.overlap),
        "uncertainty": round(scan.mean_uncertainty, 5),
        "dice": scan.mean_dice,
        "notes": scan.notes,
        "rows": [
            {
                "structure": place[row.label],
                "volumes": [volume_text(mm3) for mm3 in (row.mm3, row.low, row.high)],
                "dice": finite(row.dice),
            }
            for row in scan.rows
        ],
    }


def _packed_scan(scan: ScanView, structures: Sequence[Structure], n_slices: int) -> dict[str, Any]:
    """A scan's slices as text: three planes, and of each structure the slices that show most of it."""
    shown = upright(scan.cropped())
    black, brightest = grey_range(shown.image.astype(np.float32))
    grey = black, black + HEADROOM * (brightest - black)
    numbers = np.searchsorted([s.label for s in structures], shown.labels)
    shown = replace(shown, labels=numbers)
    places = [_places(length, n_slices) for length in shown.space.shape]
    return {
        "planes": [_packed_plane(shown, grey, axis, places[axis]) for axis in range(len(PLANES))],
        "best": _best(numbers, places, len(structures)),
    }


def _places(length: int, n: int) -> list[int]:
    """The middles of `n` equal parts of the inner share of an axis; fewer where it has fewer slices.

    >>> _places(100, 1), _places(100, 5), _places(2, 5)
    ([50], [18, 34, 50, 66, 82], [0, 1])
    """
    shares = 0.5 + INNER * ((np.arange(n) + 0.5) / n - 0.5)
    return sorted({int(round(share * length, 6)) for share in shares})


def _packed_plane(shown: ScanView, grey: tuple[float, float], axis: int, places: Sequence[int]) -> dict[str, Any]:
    rows, columns = (a for a in range(3) if a != axis)
    shape, spacing = shown.space.shape, shown.space.spacing
    size = shown_size((1, shape[rows], shape[columns]), LONGEST_SIDE)
    middle = places[len(places) // 2]
    return {
        "size": size,
        "mm": [round(shape[a] * spacing[a], 6) for a in (rows, columns)],
        "offsets": [round((place - middle) * spacing[axis], 3) for place in places],
        "slices": [_packed_slice(shown, grey, axis, place, size) for place in places],
    }


def _packed_slice(
    shown: ScanView, grey: tuple[float, float], axis: int, place: int, size: tuple[int, int]
) -> dict[str, str]:
    return {
        "image": pack_image(slice_of(shown.image, axis, place), grey, size),
        "labels": pack_labels(slice_of(shown.labels, axis, place), size),
        "uncertainty": pack_hundredths(slice_of(shown.uncertainty, axis, place), size),
    }


def _best(numbers: NDArray[np.integer[Any]], places: Sequence[Sequence[int]], n_structures: int) -> list[list[int]]:
    """The slice of each plane on which most of a structure is seen, for each structure."""
    best = []
    for axis, held in enumerate(places):
        areas = [np.bincount(np.take(numbers, place, axis).ravel(), minlength=n_structures) for place in held]
        best.append(np.argmax(areas, axis=0).tolist())
    return [list(one) for one in zip(*best, strict=True)]


def _columns(report: PriorReport, structures: Sequence[Structure]) -> list[dict[str, Any]]:
    """The structures' columns of the tables of all scans, in the order of the scans' rows."""
    of_label = {structure.label: structure for structure in structures}
    rows = [{row.label: row for row in scan.rows} for scan in report.scans]
    order = dict.fromkeys(label for here in rows for label in here)
    return [_column(of_label[label], [here.get(label) for here in rows]) for label in order]


def _column(structure: Structure, rows: Sequence[StructureRow | None]) -> dict[str, Any]:
    volumes = np.array([np.nan if row is None else row.mm3 for row in rows])
    cells = [_cell(row, away) for row, away in zip(rows, deviations(volumes).tolist(), strict=True)]
    return {
        "structure": structure,
        "cells": cells,
        "median": volume_text(float(np.nanmedian(volumes))),
        "dice": _mean([cell["dice"] for cell in cells]),
    }


def _cell(row: StructureRow | None, away: float) -> dict[str, Any]:
    if row is None:
        return {"mm3": None, "text": "–", "range": "", "dice": None, "flag": ""}
    side = "above" if away > 0 else "below"
    return {
        "mm3": row.mm3,
        "text": volume_text(row.mm3),
        "range": f"{volume_text(row.low)} to {volume_text(row.high)} mm³",
        "dice": finite(row.dice),
        "flag": f"{abs(away):.1f} deviations {side} the other scans" if abs(away) > OUTLIER else "",
        "mark": "▲" if away > 0 else "▼",
    }
