"""What a completed stack leaves in its folder: labels, uncertainty, label table, probabilities, report."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from limner.annotations import SectionLabels
from limner.cli.stack_sizes import FullSize
from limner.completion import Completion, FullSizeAreas, Size, areas, volumes
from limner.io import default_table, read_table, write_result, write_table
from limner.io.sections import centre_slices
from limner.metrics.pixels import StackScore
from limner.report.stack import SectionScores, StackReport, write_stack_report
from limner.volume import LabelMap, Volume


def write_results(
    folder: Path,
    images: Volume,
    completion: Completion,
    label_table: Path | None,
    report: StackReport,
    full: FullSize | None = None,
) -> None:
    """Write every result into an existing folder.

    Parameters
    ----------
    folder : Path
        Where to write ``labels`` and ``uncertainty`` (in the format of the images), ``structures`` (in the format of
        `label_table`, else CSV), ``areas.csv``, ``volumes.csv``, ``report.html`` and, where the completion kept them,
        ``probabilities``.
    images : Volume
        The sections; gives format and geometry.
    completion : Completion
        The result.
    label_table : Path or None
        The user's table of names and colours.
    report : StackReport
        As `report_of` makes it.
    full : FullSize, optional
        Sections larger than those that the method saw: labels are written at their size, and areas are theirs.
    """
    if full is None:
        write_result(folder, "labels", completion.labels.labels, images)
    else:
        full.write_labels(folder)
    write_result(folder, "uncertainty", completion.uncertainty, images)
    _write_structures(folder, completion.labels, label_table)
    write_sizes(folder, images, completion, full.areas if full is not None else None)
    if any(result.probabilities is not None for result in completion.sections.values()):
        write_probabilities(folder / "probabilities", images, completion)
    write_stack_report(folder / "report.html", report)


def report_of(
    images: Volume,
    annotations: SectionLabels,
    completion: Completion,
    settings: Mapping[str, object],
    truth: SectionLabels | None,
    score: StackScore | None,
) -> StackReport:
    """Gather what the report shows; its title is the name of the images' file or folder."""
    scores: dict[int, SectionScores] | None = None
    if score is not None:
        scores = {z: {"accuracy": score.accuracy[z], "dice": score.dice[z]} for z in score.accuracy}
    return StackReport(
        title=images.source.path.name if images.source is not None else "Stack",
        images=images,
        labels=completion.labels,
        uncertainty=completion.uncertainty,
        labelled=annotations.labelled,
        suggestions=completion.suggestions,
        objective={z: result.objective for z, result in completion.sections.items() if len(result.objective)},
        settings=settings,
        truth=truth.label_map if truth is not None else None,
        scores=scores,
        notes=completion.notes,
    )


def _write_structures(folder: Path, labels: LabelMap, label_table: Path | None) -> None:
    """Names and colours of every label that occurs or that the user's table names, in the format it was given."""
    table = {**default_table(np.unique(labels.labels).tolist()), **labels.table}
    if label_table is None:
        write_table(folder / "structures.csv", table, "csv")
        return
    given, table_format = read_table(label_table)
    write_table(folder / f"structures{label_table.suffix}", {**table, **given}, table_format)


def write_sizes(
    folder: Path, images: Volume, completion: Completion, at_full_size: FullSizeAreas | None = None
) -> None:
    """Write ``areas.csv``, a row for each structure on each section, and ``volumes.csv``, a row for each structure.

    Parameters
    ----------
    folder : Path
        An existing one.
    images : Volume
        The sections; gives their names.
    completion : Completion
        Areas are in mm2, volumes in mm3, each with the ends of its interval of 90 %.
    at_full_size : mapping, optional
        As of `limner.completion.areas`.
    """

    def cells(size: Size) -> tuple[object, ...]:
        numbers = (f"{value:.6g}" for value in (size.likeliest, size.fewest, size.most))
        return size.structure, completion.labels.name_of(size.structure), *numbers

    with (folder / "areas.csv").open("w", newline="", encoding="utf-8") as handle:
        rows = csv.writer(handle, lineterminator="\n")
        rows.writerow(("section", "z_mm", "labelled", "index", "name", "area_mm2", "low_mm2", "high_mm2"))
        for z, sizes in areas(completion, at_full_size).items():
            place = (images.section_names[z], f"{images.space.section_positions[z]:.6g}")
            rows.writerows((*place, int(z not in completion.sections), *cells(size)) for size in sizes)
    with (folder / "volumes.csv").open("w", newline="", encoding="utf-8") as handle:
        rows = csv.writer(handle, lineterminator="\n")
        rows.writerow(("index", "name", "volume_mm3", "low_mm3", "high_mm3"))
        rows.writerows(cells(size) for size in volumes(completion, at_full_size))


def write_probabilities(folder: Path, images: Volume, completion: Completion) -> None:
    """Write the class probabilities of each completed section.

    Each section gets one float32 TIFF, named like its image (``0007.tif`` where the stack is one file), with one page a
    structure. ``pages.csv`` says what the pages are: section, page (from 0), index and name of the structure. Sections
    list only the structures that were possible there; every other structure has probability 0.

    Parameters
    ----------
    folder : Path
        Made here.
    images : Volume
        The sections; those of a folder are cropped to their own size.
    completion : Completion
        Sections whose probabilities were not kept are passed over.
    """
    folder.mkdir(parents=True)
    with (folder / "pages.csv").open("w", newline="", encoding="utf-8") as handle:
        rows = csv.writer(handle, lineterminator="\n")
        rows.writerow(("section", "page", "index", "name"))
        for z, result in sorted(completion.sections.items()):
            if result.probabilities is None:
                continue
            name = f"{_section_stem(images, z)}.tif"
            pages = np.asarray(_own_size(result.probabilities, images, z), dtype=np.float32)
            tifffile.imwrite(folder / name, pages, photometric="minisblack", compression="zlib")
            for page, label in enumerate(np.asarray(result.structures).tolist()):
                structure = "background" if label == 0 else completion.labels.name_of(label)
                rows.writerow((name, page, label, structure))


def _section_stem(images: Volume, z: int) -> str:
    named = images.source is not None and images.source.names
    return Path(images.section_names[z]).stem if named else f"{z:04}"


def _own_size(pages: NDArray[np.floating], images: Volume, z: int) -> NDArray[np.floating]:
    """Cropped to the size that the section has in its folder."""
    if images.source is None or not images.source.sizes:
        return pages
    return pages[(slice(None), *centre_slices(images.source.sizes[z], images.space.shape[1:]))]
