"""What organs from scribbles leave in their folder: labels, uncertainty, heat maps, volumes, label table, report."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limner.annotations import Scribbles
from limner.io import read_table, write_result, write_table
from limner.methods.scribbles import Segmentation
from limner.report.scribbles import OrganRow, ScribblesReport, write_scribbles_report
from limner.scribble_settings import OF_LEARNING, OF_TRAINING
from limner.volume import LabelMap, Volume

Scores = Mapping[int, Mapping[str, float]]


def write_results(
    folder: Path,
    images: Volume,
    segmentation: Segmentation,
    report: ScribblesReport,
    label_table: Path | None = None,
    heat_maps: bool = True,
) -> None:
    """Write every result into an existing folder.

    Parameters
    ----------
    folder : Path
        Where to write ``labels``, ``uncertainty`` and ``heat_maps/organ_1``, ... (in the format of the images),
        ``structures`` (in the format of `label_table`, else CSV), ``volumes.csv`` and ``report.html``.
    images : Volume
        The sections; gives format and geometry.
    segmentation : Segmentation
        The result.
    report : ScribblesReport
        As `report_of` makes it.
    label_table : Path or None
        The user's table of names and colours, whose rows are marks.
    heat_maps : bool
        Whether to write these.
    """
    labels = segmentation.labels
    write_result(folder, "labels", labels.labels, images, labels.table)
    write_result(folder, "uncertainty", segmentation.uncertainty, images)
    if heat_maps:
        for organ, heat in zip(segmentation.organs, segmentation.heat_maps[1:], strict=True):
            write_result(folder / "heat_maps", f"organ_{organ.label}", heat, images)
    _write_structures(folder, labels, label_table)
    write_volumes(folder / "volumes.csv", segmentation)
    write_scribbles_report(folder / "report.html", report)


def write_volumes(path: Path, segmentation: Segmentation) -> None:
    """Write a CSV with a row for each organ: organ (its label), name, volume_mm3, low_mm3, high_mm3."""
    with path.open("w", newline="", encoding="utf-8") as handle:
        rows = csv.writer(handle, lineterminator="\n")
        rows.writerow(("organ", "name", "volume_mm3", "low_mm3", "high_mm3"))
        for organ in segmentation.organs:
            volumes = (f"{mm3:.6g}" for mm3 in (organ.volume_mm3, *organ.interval_mm3))
            rows.writerow((organ.label, segmentation.labels.name_of(organ.label), *volumes))


def report_of(
    images: Volume,
    scribbles: Scribbles,
    segmentation: Segmentation,
    settings: Mapping[str, object],
    truth: LabelMap | None = None,
    scores: Scores | None = None,
) -> ScribblesReport:
    """Gather what the report shows; its title is the name of the images' file or folder.

    Parameters
    ----------
    images : Volume
        The sections.
    scribbles : Scribbles
        The strokes.
    segmentation : Segmentation
        The result.
    settings : mapping of str to object
        Of the run; those of walker and cut are shown as they were used, those of a network only where there was one.
    truth : LabelMap, optional
        True labels.
    scores : mapping of int to mapping of str to float, optional
        By organ, as `limner.metrics.pixels.overlap_per_label` gives them.
    """
    return ScribblesReport(
        title=images.source.path.name if images.source is not None else "Stack",
        images=images,
        labels=segmentation.labels,
        uncertainty=segmentation.uncertainty,
        scribbles=scribbles,
        organs=[
            OrganRow(organ.label, organ.volume_mm3, organ.interval_mm3, None if scores is None else scores[organ.label])
            for organ in segmentation.organs
        ],
        suggestions=segmentation.suggestions,
        settings=_those_used({**settings, **used_options(segmentation)}),
        truth=truth,
        notes=segmentation.notes,
    )


def used_options(segmentation: Segmentation) -> dict[str, float]:
    """What random walker and graph cut used, by the names of the settings, given or not."""
    walker = segmentation.walker
    return {
        "walker_contrast": walker.contrast,
        "walker_delta": walker.delta,
        "prior_weight": walker.prior_weight,
        **dataclasses.asdict(segmentation.cut),
    }


def _those_used(settings: Mapping[str, object]) -> dict[str, object]:
    """Without the network's settings where none was used, and those of its training where a model was given."""
    unused: Sequence[str] = ()
    if settings["prior_weight"] == 0:
        unused = (*OF_TRAINING, *OF_LEARNING)
    elif settings.get("model") is not None:
        unused = OF_TRAINING
    return {name: value for name, value in settings.items() if name not in unused}


def organ_records(segmentation: Segmentation) -> dict[str, dict[str, Any]]:
    """Name, volume and interval of each organ, by its label, for the record."""
    return {
        str(organ.label): {
            "name": segmentation.labels.name_of(organ.label),
            "volume_mm3": organ.volume_mm3,
            "interval_mm3": list(organ.interval_mm3),
        }
        for organ in segmentation.organs
    }


def _write_structures(folder: Path, labels: LabelMap, label_table: Path | None) -> None:
    """Names and colours of the organs, by their labels, in the format that the user's table has."""
    if label_table is None:
        write_table(folder / "structures.csv", labels.table, "csv")
    else:
        write_table(folder / f"structures{label_table.suffix}", labels.table, read_table(label_table)[1])
