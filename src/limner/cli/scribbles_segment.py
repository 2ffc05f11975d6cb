"""``limner scribbles segment``: check everything, run or resume, write organs, their volumes, record and report."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import FlagCreatePairsOff, Positional, arg

from limner.annotations import Scribbles
from limner.cli.arguments import SectionAxis, Spacing
from limner.cli.device import find_device
from limner.cli.image_files import hash_stack
from limner.cli.progress import progress_on
from limner.cli.run_folder import RunFolder
from limner.cli.scribbles_results import organ_records, report_of, used_options, write_results
from limner.io import default_colour, read, read_label_volume, read_labels, read_table
from limner.io.geojson_sections import holds_geojson
from limner.methods.scribbles import ALGORITHM, Segmentation, Session
from limner.metrics.pixels import overlap_per_label
from limner.model_file import read_model
from limner.report.scribbles import SCORES
from limner.run_record import RunRecord, hash_file, to_plain
from limner.scribble_settings import Settings
from limner.stroke_network import TASK, from_model
from limner.volume import Label, LabelMap, LabelTable, Volume

NONE = "(default: none)"
LARGEST_HEAT_MAPS = 200_000_000  # bytes of all together that are written unasked
MOST_DRAWN = 0.5  # of a section; files with more hold finished labels
MOST_IN_A_ROW = 15  # sections drawn on; likewise
MOST_MARKS = 64  # different ones; files with more hold an image


@dataclass(frozen=True)
class ScribblesSegment:
    """Make organs in 3D of a few strokes on a few sections.

    Writes into OUT: labels, uncertainty and heat maps in the format of IMAGES, volumes.csv, the label table,
    report.html and run.json. Look at the report, draw more strokes where it errs, and give the same command again. What
    a network saw in the sections is kept for that, and for a run that was stopped, and so is the gamma that was chosen;
    the rest is done anew.
    """

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """The stack: a folder of PNG, TIFF or JPEG sections (natural order; sizes may differ), a multi-page TIFF, an
    OME-Zarr, or a NIfTI, NRRD, MHA or MGZ volume; grey or RGB."""
    scribbles: Annotated[Positional[Path], arg(metavar="SCRIBBLES")]
    """The strokes: a label file of the same shape, or a folder that holds the sections drawn on under the names of
    their images. 0 is unmarked, 1 background, 2, 3, ... the organs; both background and an organ need strokes."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="OUT", help_behavior_hint="(required)")]
    """Folder for the results, made if need be. Organs are labelled 1, 2, ... there, 0 is background."""
    model: Annotated[Path | None, arg(metavar="MODEL", help_behavior_hint="(default: the strokes alone)")] = None
    """A model that `limner scribbles fit` trained on other volumes. Draw its organs, in its order or under its names:
    `limner info MODEL` tells them."""
    label_table: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=NONE)] = None
    """Names and colours of the marks as they are in SCRIBBLES (organs from 2 on): ITK-SNAP, FreeSurfer or CSV
    (index,name,r,g,b); written back likewise, numbered as in OUT."""
    truth: Annotated[Path | None, arg(metavar="LABELS", help_behavior_hint=NONE)] = None
    """True labels of every section, numbered as in OUT: the result is scored on them, never made from them."""
    spacing: Annotated[Spacing, arg(help_behavior_hint="(default: from IMAGES)")] = ()
    """Distance between sections, then pixels along y and x, in mm."""
    section_axis: SectionAxis = "z"
    """Axis of a volume along which its sections run: z, y, x (or k, j, i in NIfTI's words); z is the slowest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    save_heat_maps: FlagCreatePairsOff[bool] = False
    """Write OUT/heat_maps even where they take more than 200 MB together; smaller ones are always written."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace Limner's own files in OUT where they come from other settings or images, or were changed by hand."""
    settings: Settings = field(default_factory=Settings)

    def run(self, command_line: Sequence[str]) -> int:
        """Segment the organs, or say that it is done already.

        Raises
        ------
        ValueError
            If an input is at fault or OUT cannot be used; nothing is written then.
        """
        status, _ = self.run_and_score(command_line)
        return status

    def run_and_score(self, command_line: Sequence[str]) -> tuple[int, RunRecord]:
        """As `run`; also gives the record, complete unless the exit status is not 0."""
        folder = RunFolder(self.output)
        folder.check_apart_from(self._user_files())
        given = read_inputs(self)
        record = new_record(self, given, command_line)
        earlier = folder.earlier_run(record, self.overwrite)
        if earlier is not None and folder.holds(earlier, record):
            print(f"{self.output} is already complete.")
            print_summary(self.output, earlier)
            return 0, earlier
        running = folder.begin(record, earlier)
        try:
            segmentation = _segment(given, folder)
            done = _finish(self, given, folder, running, segmentation)
        except KeyboardInterrupt:
            print("\nStopped; the same command begins again, with what a network saw in the sections.", file=sys.stderr)
            return 130, running
        print_summary(self.output, done)
        return 0, done

    def _user_files(self) -> dict[str, Path]:
        optional = {"--model": self.model, "--label-table": self.label_table, "--truth": self.truth}
        return {"IMAGES": self.images, "SCRIBBLES": self.scribbles} | {n: p for n, p in optional.items() if p}


@dataclass(frozen=True)
class Inputs:
    """What the user gave, read and checked.

    Parameters
    ----------
    images : Volume
        The sections.
    scribbles : Scribbles
        The strokes, with the organs' names.
    truth : LabelMap or None
        True labels on the same grid.
    session : Session
        Images, settings and model as the method takes them; nothing is computed yet.
    device : str
        ``cpu``, or ``cuda`` with the GPU's name.
    """

    images: Volume
    scribbles: Scribbles
    truth: LabelMap | None
    session: Session
    device: str


def read_inputs(command: ScribblesSegment) -> Inputs:
    """Read and check every input; nothing is written.

    Raises
    ------
    ValueError
        The first fault found, in one line.
    """
    command.settings.check()
    device = find_device(command.device)
    model = None if command.model is None else from_model(read_model(command.model, TASK))
    if command.images.resolve() == command.scribbles.resolve():
        raise ValueError(f"SCRIBBLES: {command.scribbles} is IMAGES itself; give the file in which strokes were drawn")
    images = read(command.images, spacing=command.spacing or None, section_axis=command.section_axis)
    scribbles = read_scribbles(command.scribbles, images, command.label_table)
    truth = None if command.truth is None else read_truth(command.truth, images, scribbles)
    names = {organ: scribbles.label_map.name_of(organ) for organ in scribbles.classes[1:]}
    if model is not None and any(name != f"organ {organ}" for organ, name in names.items()):
        _compare_names(model.names, list(names.values()))
    session = Session.open(images, command.settings, model, device.split()[0])
    return Inputs(images, scribbles, truth, session, device)


def read_scribbles(path: Path, images: Volume, label_table: Path | None = None) -> Scribbles:
    """The strokes that a file or folder holds for a stack, with names and colours of the organs.

    Parameters
    ----------
    path : Path
        A label file of the stack's shape, or a folder with the sections drawn on; 0 is unmarked, 1 background, 2, 3,
        ... are organs.
    images : Volume
        The stack.
    label_table : Path, optional
        Names and colours of the marks.

    Returns
    -------
    Scribbles
        An organ without a name is called ``organ N``, by its label.

    Raises
    ------
    ValueError
        If the file cannot be read, is not on the stack's grid, holds an image instead of strokes, or background or all
        organs have no stroke.
    """
    if holds_geojson(path):
        raise ValueError(f"SCRIBBLES: {path} is GeoJSON, whose classes have no numbers; draw the strokes into labels")
    marks = read_labels(path, images).label_map
    present = marks.present
    if len(present) > MOST_MARKS or present[0] > 0:
        found = f"{len(present)} different marks" if len(present) > MOST_MARKS else "a mark on every pixel"
        raise ValueError(
            f"SCRIBBLES: {path} holds {found}, as an image or a finished label map does; give IMAGES first, then "
            "strokes that leave most pixels 0"
        )
    given = {} if label_table is None else read_table(label_table)[0]
    if present[-1] == 1:
        raise ValueError(
            f"SCRIBBLES: {path} holds marks 0 and 1 alone: all strokes mark background; mark an organ too, background "
            "strokes are 1 and organs begin at 2"
        )
    table = _named([mark for mark in present if mark > 1], {**marks.table, **given})
    scribbles = Scribbles.from_marks(dataclasses.replace(marks, table=table), images.space.shape)
    _compare_with_strokes(path, scribbles)
    return scribbles


def _compare_with_strokes(path: Path, scribbles: Scribbles) -> None:
    """Warn of a finished label map: nobody draws strokes over half of a section, or on so many sections in a row."""
    shares = {z: float((scribbles.weights[z] > 0).mean()) for z in scribbles.sections}
    fullest = max(shares, key=lambda z: shares[z])
    found = f"cover {shares[fullest]:.0%} of section {fullest}" if shares[fullest] > MOST_DRAWN else ""
    row = _longest_row(scribbles.sections)
    if len(row) > MOST_IN_A_ROW:
        found = f"are on every section from {row[0]} to {row[-1]}"
    if found:
        warnings.warn(
            f"SCRIBBLES: marks of {path} {found}, as in a finished label map; of strokes 0 is unmarked, 1 background, "
            "2, 3, ... are organs",
            stacklevel=3,
        )


def _longest_row(sections: Sequence[int]) -> list[int]:
    """The most sections that follow one another."""
    gaps = np.flatnonzero(np.diff(sections) > 1) + 1
    return max((part.tolist() for part in np.split(np.asarray(sections), gaps)), key=len)


def _named(marks: Sequence[int], table: LabelTable) -> LabelTable:
    """Names and colours of marks; those without a name are called by the number of the organ, which is one less."""
    named = {mark: label for mark, label in table.items() if label.name != f"label {mark}"}
    return {mark: named.get(mark, Label(f"organ {mark - 1}", default_colour(mark - 1))) for mark in marks}


def read_truth(path: Path, images: Volume, scribbles: Scribbles) -> LabelMap:
    """True labels of every section.

    Raises
    ------
    ValueError
        If they cannot be read, are not on the stack's grid, or hold none of the organs.
    """
    truth = read_label_volume(path, images)
    organs = scribbles.classes[1:]
    if not np.isin(truth.labels, organs).any():
        listed = ", ".join(map(str, organs))
        raise ValueError(
            f"--truth: {path} holds no label {listed}; number the organs as in OUT, one less than the marks"
        )
    others = sorted(set(truth.present) - {0, *organs})
    if others:
        warnings.warn(
            f"--truth: label {others[0]} of {path} is none of the organs ({', '.join(map(str, organs))}) and not "
            "scored; labels there are numbered as in OUT, one less than the marks",
            stacklevel=2,
        )
    return dataclasses.replace(truth, table=scribbles.label_map.table)


def _compare_names(learned: Sequence[str], drawn: Sequence[str]) -> None:
    if len(learned) == len(drawn) and sorted(map(str.casefold, learned)) != sorted(map(str.casefold, drawn)):
        warnings.warn(
            f"--model: it learned {', '.join(learned)}, the strokes are for {', '.join(drawn)}; if these are not the "
            "same organs in the same order, the model misleads",
            stacklevel=2,
        )


def new_record(command: ScribblesSegment, given: Inputs, command_line: Sequence[str]) -> RunRecord:
    """The record of a run that is to begin: what its result depends on, and what else was asked for."""
    files = {
        "images": command.images,
        "scribbles": command.scribbles,
        "model": command.model,
        "truth": command.truth,
        "table": command.label_table,
    }
    settings = {
        **dataclasses.asdict(command.settings),
        "algorithm": ALGORITHM,
        "model": None if command.model is None else hash_file(command.model),
        "spacing": [float(f"{s:.9g}") for s in given.images.space.spacing],
        "section_axis": command.section_axis,
    }
    organs = len(given.scribbles.classes) - 1
    size = organs * math.prod(given.images.space.shape) * np.dtype(np.float32).itemsize
    return RunRecord(
        command=tuple(command_line),
        settings=settings,
        inputs={name: hash_stack(path) for name, path in files.items() if path is not None},
        options={"heat_maps": command.save_heat_maps or size <= LARGEST_HEAT_MAPS},
        device=given.device,
        seed=command.settings.seed,
    )


def _segment(given: Inputs, folder: RunFolder) -> Segmentation:
    with progress_on(sys.stderr) as report:
        session = dataclasses.replace(given.session, store=folder.store, progress=report)
        return session.segment(given.scribbles)


def _finish(
    command: ScribblesSegment, given: Inputs, folder: RunFolder, running: RunRecord, segmentation: Segmentation
) -> RunRecord:
    """Score, write all results, and give the completed record."""
    scores = None
    if given.truth is not None:
        organs = [organ.label for organ in segmentation.organs]
        scores = overlap_per_label(segmentation.labels.labels, given.truth.labels, organs)
    report = report_of(given.images, given.scribbles, segmentation, running.settings, given.truth, scores)
    done = running.completed(
        seconds=segmentation.seconds,
        organs=organ_records(segmentation),
        chosen={**used_options(segmentation), "left_out_right": dict(segmentation.chosen)},
        scores=to_plain(scores or {}),
        suggestions=segmentation.suggestions,
        summary=report.summary,
        notes=segmentation.notes,
    )
    heat_maps = bool(running.options["heat_maps"])
    folder.finish(
        running,
        done,
        lambda path: write_results(path, given.images, segmentation, report, command.label_table, heat_maps),
    )
    return done


def print_summary(output: Path, record: RunRecord) -> None:
    """Print what came out, the scores where there are any, where to draw next, and where the report is."""
    print(record.summary)
    for note in record.notes:
        print(f"Note: {note}")
    if record.scores:
        print_scores(record.scores, record.organs)
    if record.suggestions:
        sections = ", ".join(str(z) for z in record.suggestions)
        print(f"Draw next: section {sections} (the first is 0); then give the same command again.")
    print(f"Report: {output / 'report.html'}")


def print_scores(scores: Mapping[str, Mapping[str, float | None]], organs: Mapping[str, Mapping[str, Any]]) -> None:
    """Print precision, recall, F1 and IoU of each organ, by its label; a dash where there is none."""
    from rich.console import Console
    from rich.table import Table

    table = Table("label", "organ", *SCORES.values(), box=None, pad_edge=False)
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    for label, values in scores.items():
        numbers = [values.get(name) for name in SCORES]
        table.add_row(label, organs[label]["name"], *("-" if n is None else f"{n:.3f}" for n in numbers))
    Console(highlight=False, markup=False).print(table)
