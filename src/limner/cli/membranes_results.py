"""What a run of ``limner membranes segment`` leaves: maps, cells, tables, report."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.io import SectionStack, label_type, write_sections
from limner.methods.membranes import Segmentation
from limner.report.membranes import MembranesReport, SectionRow, SectionView, section_row, write_membranes_report
from limner.run_record import Store
from limner.watershed import link_stack

KEY = "results of a run"  # always made anew: what the network found is what takes long
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Results:
    """Sections with their maps and cells: found once, kept until they are written, one in memory at a time.

    Parameters
    ----------
    stack : SectionStack
        The images.
    segmentation : Segmentation
        Maps of the same sections.
    store : Store
        Where maps and cells are kept.
    with_cells, linked : bool
        Whether cells are wanted, and whether they are linked from section to section.
    """

    stack: SectionStack
    segmentation: Segmentation
    store: Store
    with_cells: bool
    linked: bool

    def find(self, progress: Progress = lambda *_: None) -> None:
        """Fuse each map with its watershed, find the cells, and keep both."""
        found = map(self._fuse, range(len(self.stack)))
        numbered = link_stack(self._cells(fused, z) for z, fused in enumerate(found)) if self.linked else None
        for z in range(len(self.stack)):
            cells = next(numbered) if numbered is not None else self._cells(next(found), z)
            self.store.save(f"cells-{z:05}", KEY, {"cells": cells})
            progress(z + 1, len(self.stack))

    def _fuse(self, z: int) -> NDArray[np.float32]:
        fused = self.segmentation.fused(z)
        self.store.save(f"fused-{z:05}", KEY, {"fused": fused})
        return fused

    def _cells(self, fused: NDArray[np.float32], z: int) -> NDArray[np.int32]:
        if not self.with_cells:
            return np.zeros((0, 0), np.int32)
        return self.segmentation.cells(fused, self.stack[z][:, :])

    def fused(self, z: int) -> NDArray[np.float32]:
        """The map of a section that `find` kept."""
        return self._kept("fused", z)

    def cells(self, z: int) -> NDArray[np.integer[Any]]:
        """Its cells, by ids of the section or, where they are linked, of the volume."""
        return self._kept("cells", z)

    def _kept(self, name: str, z: int) -> NDArray[Any]:
        found = self.store.load(f"{name}-{z:05}", KEY)
        if found is None:
            raise ValueError(f"Results(): {name} of section {z} are missing; give the command again")
        return found[name]

    def forget(self) -> None:
        """Remove what `find` kept, when it is written."""
        for z, name in product(range(len(self.stack)), ("fused", "cells")):
            self.store.remove(f"{name}-{z:05}")

    def view(self, z: int) -> SectionView:
        """A section for the report."""
        return SectionView(self.stack[z][:, :], self.fused(z), self.cells(z) if self.with_cells else None)


def report_of(results: Results, settings: Mapping[str, object], notes: Sequence[str]) -> MembranesReport:
    """Measure every section, and describe the report of it all."""
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
        Exists; gets ``probabilities``, ``sections.csv``, ``report.html`` and, where cells are wanted, ``cells``,
        ``cells.csv`` and ``linked_cells.csv``.
    results : Results
        What was found.
    report : MembranesReport
        Of these results.
    """
    _write(folder, "probabilities", results.fused, results.stack, np.dtype(np.float32))
    write_section_table(folder / "sections.csv", report.rows)
    if results.with_cells:
        ids = [int(row.cell_ids.max(initial=0)) for row in report.rows if row.cell_ids is not None]
        _write(folder, "cells", results.cells, results.stack, label_type(max(ids)))
        write_cells(folder / "cells.csv", results)
    if results.linked:
        write_linked_cells(folder / "linked_cells.csv", report.rows, results.stack.spacing)
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


def write_section_table(path: Path, rows: Sequence[SectionRow]) -> None:
    """A row a section: name, size, share of membrane and of unsure pixels, cells."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["section", "height_px", "width_px", "membrane", "unsure", "cells"])
        for row in rows:
            n = "" if row.cell_ids is None else len(row.cell_ids)
            table.writerow([row.name, *row.shape, f"{row.membrane:.5f}", f"{row.unsure:.5f}", n])


def write_cells(path: Path, results: Results) -> None:
    """A row for each cell of each section: size, um2 where spacing is known, centre, whether it is cut by the edge."""
    spacing = results.stack.spacing
    um2 = None if spacing is None else spacing[1] * spacing[2] * 1e6
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["section", "id", "pixels", *(["um2"] if um2 else []), "y_px", "x_px", "at_edge"])
        for z, name in enumerate(results.stack.names):
            for id_, pixels, y, x, at_edge in _measured(results.cells(z)):
                area = [f"{pixels * um2:.6g}"] if um2 else []
                table.writerow([name, id_, pixels, *area, f"{y:.1f}", f"{x:.1f}", int(at_edge)])


def _measured(cells: NDArray[np.integer[Any]]) -> Iterator[tuple[int, int, float, float, bool]]:
    """Id, pixels, centre (y, x) and whether it lies at the section's edge, of each cell."""
    ids, places = np.unique(cells, return_inverse=True)
    places = places.ravel()
    pixels = np.bincount(places)
    y, x = (np.bincount(places, index.ravel()) / pixels for index in np.indices(cells.shape))
    outline = np.concatenate([cells[0], cells[-1], cells[:, 0], cells[:, -1]])
    rows = zip(ids.tolist(), pixels.tolist(), y.tolist(), x.tolist(), np.isin(ids, outline).tolist(), strict=True)
    yield from (row for row in rows if row[0] > 0)


def write_linked_cells(path: Path, rows: Sequence[SectionRow], spacing: tuple[float, float, float] | None) -> None:
    """A row for each cell of the volume: first and last section, how many, voxels, um3 where spacing is known."""
    um3 = None if spacing is None else spacing[0] * spacing[1] * spacing[2] * 1e9
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "first_section", "last_section", "sections", "voxels", *(["um3"] if um3 else [])])
        for id_, on in sorted(_by_id(rows).items()):
            names, voxels = [name for name, _ in on], sum(pixels for _, pixels in on)
            table.writerow([id_, names[0], names[-1], len(on), voxels, *([f"{voxels * um3:.6g}"] if um3 else [])])


def _by_id(rows: Sequence[SectionRow]) -> dict[int, list[tuple[str, int]]]:
    """Names of the sections that each cell of the volume is on, and its pixels there."""
    found = dict[int, list[tuple[str, int]]]()
    for row in rows:
        if row.cell_ids is not None and row.cell_areas_px is not None:
            for id_, pixels in zip(row.cell_ids.tolist(), row.cell_areas_px.tolist(), strict=True):
                found.setdefault(id_, []).append((row.name, pixels))
    return found
