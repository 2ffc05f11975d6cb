"""The report of membranes and cells in a stack of sections: one web page in one file, in which to judge outlines.

`write_membranes_report` fills ``membranes.html.j2``, which extends ``sections.html.j2``. Every section has its row of
numbers; at most `MOST_SHOWN` have pictures, which are asked for one at a time, so that a stack of any length makes a
page that opens. It reaches no network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.report.page import counted, write_page
from limner.report.section_pixels import grey_range, nearest, pack_hundredths, pack_image, pack_labels, shown_size
from limner.report.sections import finite, mapped_colours

MOST_SHOWN = 40  # sections with pictures: some 40 MB of page where they are shown at 1000 x 1000
LEAST_SURE = 3  # of these are named, and shown whatever their place
UNSURE = (0.2, 0.8)  # a pixel with a probability between these is unsure
_MOST_CELLS = 65535  # of a picture, which numbers them in 16 bit; only noise has more


@dataclass(frozen=True)
class SectionView:
    """The pixels of one section.

    Parameters
    ----------
    image : ndarray
        Grey, shape (Y, X), any real dtype. Pixels that have not 8 bits are shown from the section's 0.5 to its 99.5
        percentile.
    probability : ndarray of float32
        Of membrane, shape (Y, X), in [0, 1].
    cells : ndarray of int, optional
        Ids of the cells, shape (Y, X), 0 between them; a linked cell has one id on all of its sections.

    Raises
    ------
    ValueError
        If shapes differ or a probability leaves [0, 1].
    """

    image: NDArray[Any]
    probability: NDArray[np.float32]
    cells: NDArray[np.integer[Any]] | None = None

    def __post_init__(self) -> None:
        if self.image.ndim != 2 or not self.image.size:
            raise ValueError(f"SectionView(): the image has shape {self.image.shape}; give (Y, X), grey")
        for name, found in (("probability", self.probability), ("cells", self.cells)):
            if found is not None and found.shape != self.image.shape:
                raise ValueError(
                    f"SectionView(): {name} has shape {found.shape}, the image {self.image.shape}; give one size"
                )
        if not (self.probability.min() >= 0 and self.probability.max() <= 1):  # also catches NaN
            raise ValueError("SectionView(): probability has values outside 0 to 1, or not numbers; it is a chance")


@dataclass(frozen=True)
class SectionRow:
    """What the table says of one section; `section_row` measures it.

    Parameters
    ----------
    name : str
        The section's file name, or its number.
    shape : tuple of int
        (Y, X).
    membrane : float
        Share of its pixels with a probability of 0.5 or more.
    unsure : float
        Share of its pixels with a probability between 0.2 and 0.8.
    cell_ids : ndarray of int or None
        Shape (N,): ids of its cells; None where no cells were made.
    cell_areas_px : ndarray of int or None
        Shape (N,): their areas in pixels.
    v_rand, v_info : float, optional
        Agreement with the truth, in [0, 1]; NaN where undefined.
    """

    name: str
    shape: tuple[int, int]
    membrane: float
    unsure: float
    cell_ids: NDArray[np.integer[Any]] | None = None
    cell_areas_px: NDArray[np.integer[Any]] | None = None
    v_rand: float | None = None
    v_info: float | None = None


def section_row(name: str, view: SectionView, v_rand: float | None = None, v_info: float | None = None) -> SectionRow:
    """Measure a section.

    Parameters
    ----------
    name : str
        The section's file name, or its number.
    view : SectionView
        Its pixels.
    v_rand, v_info : float, optional
        Agreement with the truth.

    Examples
    --------
    >>> p = np.array([[0.0, 0.1, 0.6, 0.9]], np.float32)
    >>> row = section_row("07.png", SectionView(np.zeros((1, 4)), p, np.array([[5, 5, 0, 9]])))
    >>> row.membrane, row.unsure, row.cell_ids.tolist(), row.cell_areas_px.tolist()
    (0.5, 0.25, [5, 9], [2, 1])
    """
    low, high = UNSURE
    p = view.probability
    ids = areas = None
    if view.cells is not None:
        ids, areas = np.unique(view.cells[view.cells > 0], return_counts=True)
    membrane, unsure = float((p >= 0.5).mean()), float(((p > low) & (p < high)).mean())
    return SectionRow(name, (p.shape[0], p.shape[1]), membrane, unsure, ids, areas, v_rand, v_info)


@dataclass(frozen=True)
class MembranesReport:
    """What the report of a stack of sections shows.

    Parameters
    ----------
    title : str
        Heading of the page.
    rows : sequence of SectionRow
        Every section in its order, at least one; with cells all of them or none.
    view : callable
        Gives a section's pixels by its place in `rows`; called for those that are shown, one after the other.
    settings : mapping of str to object
        Settings of the run, shown as a table.
    spacing : tuple of float, optional
        (y, x) in mm, the same for all sections; None: not known, areas are then pixels.
    linked : bool
        Whether a cell has one id on all of its sections.
    notes : sequence of str
        Warnings, shown at the top.

    Raises
    ------
    ValueError
        If there is no section, some have cells and others not, or the spacing is not positive.

    Examples
    --------
    >>> view = SectionView(np.zeros((1, 4)), np.array([[0, 0, 1, 0]], np.float32), np.array([[5, 5, 0, 9]]))
    >>> rows = [section_row(name, view) for name in ("07.png", "08.png")]
    >>> MembranesReport("Larva", rows, lambda z: view, spacing=(4e-6, 4e-6), linked=True).summary
    '2 sections of 4 × 1 pixels of 4 nm; 25 % membrane; 2 cells linked through the sections, median area 2.4e-05 µm².'
    """

    title: str
    rows: Sequence[SectionRow]
    view: Callable[[int], SectionView]
    settings: Mapping[str, object] = field(default_factory=dict)
    spacing: tuple[float, float] | None = None
    linked: bool = False
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("MembranesReport(): there are no sections; give at least one")
        if len({row.cell_ids is None for row in self.rows}) == 2:
            raise ValueError("MembranesReport(): some sections have cells and others have not; give all or none")
        if self.spacing is not None and not all(0 < side < np.inf for side in self.spacing):
            raise ValueError(f"MembranesReport(): spacing is {self.spacing} mm (y, x); give positive numbers or None")

    @property
    def has_cells(self) -> bool:
        """Whether cells were made."""
        return self.rows[0].cell_ids is not None

    @property
    def area_unit(self) -> str:
        """What areas are measured in."""
        return "px" if self.spacing is None else "µm²"

    def median_area(self, rows: Sequence[SectionRow]) -> float | None:
        """Median over the cells of some sections, in `area_unit`; None where there is no cell."""
        areas = np.concatenate([np.zeros(0) if row.cell_areas_px is None else row.cell_areas_px for row in rows])
        if not areas.size:
            return None
        um2_per_px = 1.0 if self.spacing is None else self.spacing[0] * self.spacing[1] * 1e6
        return float(np.median(areas)) * um2_per_px

    @property
    def summary(self) -> str:
        """One sentence: how many sections of which size, the share of membrane, cells and their median area."""
        pixels = [row.shape[0] * row.shape[1] for row in self.rows]
        membrane = np.average([row.membrane for row in self.rows], weights=pixels)
        parts = [f"{counted(len(self.rows), 'section')} of {_sizes_text(self)}", f"{100 * membrane:.3g} % membrane"]
        return "; ".join(parts + ([_cells_text(self)] if self.has_cells else [])) + "."


def write_membranes_report(path: Path, report: MembranesReport) -> None:
    """Write the report as one self-contained HTML file.

    The file appears under its name only when it is complete. A file that is there already is replaced.

    Parameters
    ----------
    path : Path
        The file to write, in a folder that exists.
    report : MembranesReport
        What it shows.

    Raises
    ------
    ValueError
        If the pixels of a section have another size than its row says, or lack the cells it counts.

    Examples
    --------
    >>> write_membranes_report(Path("larva.html"), report)  # doctest: +SKIP
    """
    shown = shown_sections([row.unsure for row in report.rows])
    write_page(
        path,
        "membranes.html.j2",
        report,
        data=_page_data(report, shown),
        pictures=_packed_views(report, shown),
        table=[_row_data(report, place) for place in range(len(report.rows))],
        shown=shown,
        unsure_between=UNSURE,
    )


def shown_sections(unsure: Sequence[float], most: int = MOST_SHOWN) -> list[int]:
    """The sections that get pictures: all if they are few, else the least sure and others evenly spread.

    Examples
    --------
    >>> shown_sections([0.1, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1, 0.2, 0.4], most=6)
    [0, 3, 4, 7, 8]
    """
    if len(unsure) <= most:
        return list(range(len(unsure)))
    spread = np.linspace(0, len(unsure) - 1, most - LEAST_SURE).round().astype(int)
    return sorted({*spread.tolist(), *_least_sure(unsure)})


def _least_sure(unsure: Sequence[float]) -> list[int]:
    """The least sure sections, the worst first; none of a few, which are all looked at anyway."""
    worst = np.argsort(-np.asarray(unsure), kind="stable")
    return worst[: min(LEAST_SURE, len(unsure) // 3)].tolist()


def _sizes_text(report: MembranesReport) -> str:
    """Such as ``512 × 400 pixels of 4 nm``: width first, as programs for images say it."""
    shapes = {row.shape for row in report.rows}
    sizes = "{1} × {0} pixels".format(*shapes.pop()) if len(shapes) == 1 else "different sizes"
    if report.spacing is None:
        return sizes
    sides = [f"{side * 1e6:.3g} nm" if side < 1e-3 else f"{side * 1e3:.3g} µm" for side in report.spacing[::-1]]
    return f"{sizes}, {' × '.join(sides)} a pixel" if sides[0] != sides[1] else f"{sizes} of {sides[0]}"


def _cells_text(report: MembranesReport) -> str:
    ids = np.concatenate([row.cell_ids for row in report.rows if row.cell_ids is not None])
    linked = " linked through the sections" if report.linked else ""
    median = report.median_area(report.rows)
    area = "" if median is None else f", median area {_area_text(median)} {report.area_unit}"
    return f"{counted(len(np.unique(ids)) if report.linked else len(ids), 'cell')}{linked}{area}"


def _area_text(area: float) -> str:
    return f"{area:,.0f}" if area >= 100 else f"{area:.3g}"


def _page_data(report: MembranesReport, shown: Sequence[int]) -> dict[str, Any]:
    """What the page's script needs besides the pictures; holds no NaN, which JSON lacks."""
    unsure = [round(row.unsure, 5) for row in report.rows]
    return {
        "sections": [_section_data(report, place) for place in shown],
        "suggestions": [shown.index(place) for place in _least_sure(unsure)],
        "start": shown.index(int(np.argmax(unsure))),
        "unsure": unsure,
        "cellCounts": [len(row.cell_ids) for row in report.rows if row.cell_ids is not None],
        "areaUnit": report.area_unit,
        "hasCells": report.has_cells,
        "linked": report.linked,
        "mappedColours": mapped_colours(),
        "surround": "var(--hover)",
    }


def _section_data(report: MembranesReport, place: int) -> dict[str, Any]:
    """A shown section: its row, and the size at which it is shown."""
    row = report.rows[place]
    size = shown_size((1, *row.shape))
    per_shown = [old / new for old, new in zip(row.shape, size, strict=True)]
    sides = None if report.spacing is None else [side * n for side, n in zip(report.spacing, per_shown, strict=True)]
    return {**_row_data(report, place), "size": size, "shape": row.shape, "pixelSize": sides}


def _row_data(report: MembranesReport, place: int) -> dict[str, Any]:
    row = report.rows[place]
    return {
        "place": place,
        "name": "" if row.name == str(place) else row.name,
        "membrane": round(row.membrane, 5),
        "unsure": round(row.unsure, 5),
        "cells": None if row.cell_ids is None else len(row.cell_ids),
        "area": report.median_area([row]),
        "vRand": finite(row.v_rand),
        "vInfo": finite(row.v_info),
    }


def _packed_views(report: MembranesReport, shown: Sequence[int]) -> Iterator[dict[str, object]]:
    """Each shown section as text; one at a time, so that no more than one is held in memory."""
    for place in shown:
        yield _packed_view(report.view(place), report.rows[place])


def _packed_view(view: SectionView, row: SectionRow) -> dict[str, object]:
    if view.image.shape != row.shape or (view.cells is None) != (row.cell_ids is None):
        raise ValueError(
            f"write_membranes_report(): section {row.name} has pixels of shape {view.image.shape} "
            f"{'without' if view.cells is None else 'with'} cells, unlike its row; give the pixels that were measured"
        )
    size = shown_size((1, *row.shape))
    cells = (view.probability < 0.5).astype(np.uint8) if view.cells is None else view.cells
    numbers, ids = _numbered(nearest(cells, size))
    return {
        "image": pack_image(view.image, grey_range(view.image[None]), size),
        "probability": pack_hundredths(view.probability, size),
        "cells": pack_labels(numbers, size),
        "ids": ids,
    }


def _numbered(cells: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], list[int]]:
    """Cells numbered 0, 1, 2, ... as a picture holds them, and the id of each number; 0 is 0."""
    ids, numbers = np.unique(np.append(cells.ravel(), 0).astype(np.int64), return_inverse=True)
    numbers = np.where(numbers > _MOST_CELLS, 0, numbers)[:-1].reshape(cells.shape)
    return numbers, ids[: _MOST_CELLS + 1].tolist()
