"""What a run of ``limner membranes segment`` leaves: maps, cells, tables, report."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.io import SectionStack, label_type, write_sections
from limner.methods.membranes import Segmentation
from limner.report.membranes import MembranesReport, SectionRow, SectionView, section_row, write_membranes_report
from limner.run_record import Store
from limner.watershed import link_stack

CELLS_KEY = "cells of this run"


@dataclass(frozen=True)
class Results:
    """Sections with their maps and cells, one in memory at a time.

    Parameters
    ----------
    stack : SectionStack
        The images.
    segmentation : Segmentation
        Maps of the same sections.
    store : Store
        Where cells are kept until they are written.
    with_cells, linked : bool
        Whether cells are wanted, and whether they are linked from section to section.
    """

    stack: SectionStack
    segmentation: Segmentation
    store: Store
    with_cells: bool
    linked: bool

    def find_cells(self) -> Iterator[NDArray[np.int64]]:
        """Cells of one section after the other, by ids of the section or, where they are linked, of the volume."""
        found = (self.segmentation.cells(self.segmentation.fused(z)) for z in range(len(self.stack)))
        return link_stack(found) if self.linked else (cells.astype(np.int64) for cells in found)

    def kept_cells(self, z: int) -> NDArray[np.int64]:
        """Cells of a section, as `report_of` found them."""
        found = self.store.load(_cells_stage(z), CELLS_KEY)
        if found is None:
            raise ValueError(f"Results(): cells of section {z} are missing; give the command again")
        return found["cells"]

    def view(self, z: int) -> SectionView:
        """A section for the report."""
        return SectionView(
            self.stack[z][:, :], self.segmentation.fused(z), self.kept_cells(z) if self.with_cells else None
        )


def report_of(results: Results, settings: Mapping[str, object], notes: Sequence[str]) -> MembranesReport:
    """Find the cells where they are wanted, measure every section, and describe the report of it all."""
    if results.with_cells:
        for z, cells in enumerate(results.find_cells()):
            results.store.save(_cells_stage(z), CELLS_KEY, {"cells": cells})
    names, spacing = results.stack.names, results.stack.spacing
    rows = [section_row(name, results.view(z)) for z, name in enumerate(names)]
    title = results.stack.source.path.resolve().name
    in_plane = None if spacing is None else spacing[1:]
    return MembranesReport(title, rows, results.view, settings, in_plane, results.linked, notes)


def write_results(folder: Path, results: Results, report: MembranesReport) -> None:
    """Write maps, cells, tables and report.

    Parameters
    ----------
    folder : Path
        Exists; gets ``probabilities``, ``sections.csv``, ``report.html`` and, where cells are wanted, ``cells`` and
        ``cells.csv``.
    results : Results
        What was found.
    report : MembranesReport
        Of these results.
    """
    _write(folder, "probabilities", results.segmentation.fused, results.stack, np.dtype(np.float32))
    write_section_table(folder / "sections.csv", report.rows)
    if results.with_cells:
        ids = [int(row.cell_ids.max(initial=0)) for row in report.rows if row.cell_ids is not None]
        _write(folder, "cells", results.kept_cells, results.stack, label_type(max(ids)))
        write_cells(folder / "cells.csv", report.rows, results.stack.spacing, results.linked)
    write_membranes_report(folder / "report.html", report)


def _write(
    folder: Path, name: str, sections: Callable[[int], NDArray[Any]], stack: SectionStack, dtype: np.dtype[Any]
) -> None:
    """A folder's sections under their names in `name`; a volume as one file in its format in there."""
    if stack.source.kind == "folder":
        write_sections(folder, name, sections, stack, dtype)
    else:
        stem = stack.source.path.name.removesuffix(stack.source.extension)
        write_sections(folder / name, stem, sections, stack, dtype)


def _cells_stage(z: int) -> str:
    return f"cells-{z:05}"


def write_section_table(path: Path, rows: Sequence[SectionRow]) -> None:
    """A row a section: name, size, share of membrane and of unsure pixels, cells."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["section", "height_px", "width_px", "membrane", "unsure", "cells"])
        for row in rows:
            n = "" if row.cell_ids is None else len(row.cell_ids)
            table.writerow([row.name, *row.shape, f"{row.membrane:.5f}", f"{row.unsure:.5f}", n])


def write_cells(
    path: Path, rows: Sequence[SectionRow], spacing: tuple[float, float, float] | None, linked: bool
) -> None:
    """A row a cell: of the volume where cells are linked, else of each section; um2 and um3 where spacing is known."""
    um2 = None if spacing is None else spacing[1] * spacing[2] * 1e6
    um3 = None if spacing is None or um2 is None else spacing[0] * 1e3 * um2
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        if linked:
            table.writerow(["id", "first_section", "last_section", "sections", "voxels", *(["um3"] if um3 else [])])
            for id_, first, last, n, voxels in _linked_cells(rows):
                table.writerow([id_, first, last, n, voxels, *([f"{voxels * um3:.6g}"] if um3 else [])])
            return
        table.writerow(["section", "id", "pixels", *(["um2"] if um2 else [])])
        for row in rows:
            for id_, pixels in _cells_of(row):
                table.writerow([row.name, id_, pixels, *([f"{pixels * um2:.6g}"] if um2 else [])])


def _cells_of(row: SectionRow) -> Iterator[tuple[int, int]]:
    if row.cell_ids is not None and row.cell_areas_px is not None:
        yield from zip(row.cell_ids.tolist(), row.cell_areas_px.tolist(), strict=True)


def _linked_cells(rows: Sequence[SectionRow]) -> Iterator[tuple[int, int, int, int, int]]:
    """Id, first and last section, number of sections and voxels of each cell of the volume."""
    found = dict[int, list[int]]()
    for z, row in enumerate(rows):
        for id_, pixels in _cells_of(row):
            cell = found.setdefault(id_, [z, z, 0, 0])
            cell[1:] = [z, cell[2] + 1, cell[3] + pixels]
    for id_ in sorted(found):
        first, last, n, voxels = found[id_]
        yield id_, first, last, n, voxels
