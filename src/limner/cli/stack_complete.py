"""``limner stack complete``: check everything, run or resume, write labels, uncertainty, record and report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import FlagCreatePairsOff, Positional, arg

from limner.annotations import SectionLabels
from limner.cli.arguments import Indices, SectionAxis, Spacing
from limner.cli.device import find_device
from limner.cli.evaluate import print_score
from limner.cli.image_files import hash_stack
from limner.cli.progress import progress_on
from limner.cli.run_folder import RunFolder
from limner.cli.stack_estimate import Work
from limner.cli.stack_results import report_of, write_results
from limner.cli.stack_sizes import (
    FullSize,
    earlier_working_um,
    factor_of,
    notes_on_size,
    open_stack,
    pixel_um,
    read_reduced,
    reduce_labels,
)
from limner.completion import Completion
from limner.fusion_stages import FITTED_LABELS
from limner.io import SectionStack, open_labels, read_labels
from limner.io.tissues import read_tissues
from limner.methods.stack_completion import complete
from limner.metrics.pixels import StackScore, score_stack
from limner.networks.fcn_vgg import check_vgg16_weights
from limner.parallel import jobs_on
from limner.run_record import RunRecord
from limner.stack_settings import ALGORITHM, Settings
from limner.volume import Volume

NONE = "(default: none)"
NAMED = 3  # structures in doubt, for each section
MOST_ATLASES = 6  # labelled sections that each is registered to, directly


@dataclass(frozen=True)
class StackComplete:
    """Label every section of a stack of which some sections are labelled.

    Writes into OUT: labels and uncertainty in the format of IMAGES, the label table, report.html and run.json.
    Labelled sections come out exactly as they went in. A stopped run goes on where it stopped when the same command is
    given again; so does one whose labels were corrected.
    """

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """The stack: a folder of PNG, TIFF or JPEG sections (natural order; sizes may differ), a multi-page TIFF, an
    OME-Zarr, or a NIfTI, NRRD, MHA or MGZ volume; grey or RGB."""
    labels: Annotated[Positional[Path], arg(metavar="LABELS")]
    """Labels of some sections: a file of the same shape, or a folder that holds the labelled sections under the names
    of their images. 0 is background."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="OUT", help_behavior_hint="(required)")]
    """Folder for the results, made if need be."""
    labelled: Annotated[Indices, arg(help_behavior_hint="(default: those with a label file or any label)")] = ()
    """Sections that are labelled: indices from 0; 1-9,11-19 and 0-250:10 (every tenth) work too."""
    spacing: Annotated[Spacing, arg(help_behavior_hint="(default: from IMAGES)")] = ()
    """Distance between sections, then pixels along y and x, in mm."""
    section_axis: SectionAxis = "z"
    """Axis of a volume along which its sections run: z, y, x (or k, j, i in NIfTI's words); z is the slowest."""
    positions: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: evenly spaced)")] = None
    """CSV with the position of each section: file name or index, z in mm."""
    working_um: Annotated[float | None, arg(metavar="UM", help_behavior_hint="(default: by size and structures)")] = (
        None
    )
    """Pixel size at which to compute, micrometres, rounded to a whole number of the images' pixels; labels come out at
    full size. Default: that of the images up to 1,000 pixels on the longer side; of larger ones 400 to 1,000 pixels are
    left, as the narrowest structure needs."""
    label_table: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=NONE)] = None
    """Names and colours of the structures: ITK-SNAP, FreeSurfer or CSV (index,name,r,g,b); written back likewise."""
    tissues: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=NONE)] = None
    """CSV (structure,tissue) that says which tissue each structure is made of; the network learns tissues first."""
    truth: Annotated[Path | None, arg(metavar="LABELS", help_behavior_hint=NONE)] = None
    """True labels of sections that LABELS leaves out: the result is scored on them (at --working-um), never made from
    them."""
    within_mm: float = 2.0
    """Distance in mm around the true structures up to which background counts in the scores."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    jobs: int = 0
    """Sections computed side by side on a CPU; 0: one for each core."""
    save_probabilities: FlagCreatePairsOff[bool] = False
    """Also write OUT/probabilities: one float32 TIFF a completed section, its pages listed in pages.csv."""
    refit: FlagCreatePairsOff[bool] = False
    """Fit network and scales to the labels as they are, where an earlier run's would be kept because few of them were
    changed since."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace Limner's own files in OUT where they come from other settings or images, or were changed by hand."""
    settings: Settings = field(default_factory=Settings)

    def run(self, command_line: Sequence[str]) -> int:
        """Complete the stack, or say that it is complete already.

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
        stack = read_stack(self)
        record = new_record(self, stack, command_line)
        earlier = folder.earlier_run(record, self.overwrite)
        if earlier is not None and not self.refit and folder.holds(earlier, record):
            print(f"{self.output} is already complete.")
            print_summary(self.output, earlier)
            return 0, earlier
        made = not folder.path.exists()
        running = folder.begin(record, earlier)
        if self.refit:
            folder.store.remove(FITTED_LABELS)
        _print_estimate(self, stack)
        try:
            stack = _with_pixels(stack, folder, running, lambda: folder.withdraw(earlier, made))
            completion = _complete(self, stack, folder)
            done = _finish(self, stack, folder, running, completion)
        except KeyboardInterrupt:
            print("\nStopped; the same command goes on from the last finished stage or section.", file=sys.stderr)
            return 130, running
        print_summary(self.output, done)
        return 0, done

    def _user_files(self) -> dict[str, Path]:
        optional = {
            "--truth": self.truth,
            "--positions": self.positions,
            "--label-table": self.label_table,
            "--tissues": self.tissues,
            "--vgg16-weights": _weights(self),
        }
        return {"IMAGES": self.images, "LABELS": self.labels} | {n: p for n, p in optional.items() if p is not None}


@dataclass(frozen=True)
class Stack:
    """What the user gave, read and checked.

    Parameters
    ----------
    images : Volume
        The sections.
    annotations : SectionLabels
        Labels of some of them.
    truth : SectionLabels or None
        True labels of others, on the same grid.
    tissues : mapping of int to int or None
        Tissue of each structure.
    device : str
        ``cpu``, or ``cuda`` with the GPU's name.
    full : FullSize, optional
        Sections larger than the stack is computed at: `images`, `annotations` and `truth` are then reduced, and the
        pixels of `images` not yet read.
    """

    images: Volume
    annotations: SectionLabels
    truth: SectionLabels | None
    tissues: Mapping[int, int] | None
    device: str
    full: FullSize | None = None

    @property
    def scored(self) -> tuple[int, ...]:
        """Sections with true labels that were not labelled."""
        given = set(self.annotations.labelled)
        return () if self.truth is None else tuple(z for z in self.truth.labelled if z not in given)


def read_stack(command: StackComplete) -> Stack:
    """Read and check every input; nothing is written.

    Raises
    ------
    ValueError
        The first fault found, in one line.
    """
    command.settings.check()
    if command.jobs < 0:
        raise ValueError(f"--jobs: {command.jobs} is below 0; give a number of sections, or 0 for one a core")
    if not command.within_mm >= 0:
        raise ValueError(f"--within-mm: {command.within_mm} is no distance; give 0 mm or more")
    weights = _weights(command)
    if weights is not None:
        check_vgg16_weights(weights)
    images, sections = open_stack(
        command.images, command.spacing, command.section_axis, command.positions, command.working_um
    )
    full = None
    if sections is None:
        annotations = read_labels(command.labels, images, labelled=command.labelled or None, table=command.label_table)
    else:
        annotations, full = _open_full(command, images, sections)
    if not annotations.unlabelled:
        raise ValueError(
            f"--labelled: {command.labels} labels every section of {command.images}, so nothing is left to complete; "
            "give IMAGES first and LABELS second, or name the labelled sections"
        )
    structures = np.unique(annotations.label_map.labels[list(annotations.labelled)])
    if not structures.any():
        raise ValueError(f"--labelled: the labelled sections of {command.labels} hold no structure, only background")
    truth = _read_truth(command, images, full)
    if full is not None:
        images = full.working_grid()
    tissues = None
    if command.tissues is not None:
        tissues = read_tissues(command.tissues, annotations.label_map.table, structures.tolist())
    stack = Stack(images, annotations, truth, tissues, find_device(command.device), full)
    if truth is not None and not stack.scored:
        raise ValueError(f"--truth: {command.truth} holds labels only on sections that LABELS labels; nothing to score")
    return stack


def _open_full(command: StackComplete, grid: Volume, sections: SectionStack) -> tuple[SectionLabels, FullSize]:
    """Labels at the size at which the stack is computed, and what is needed for those at full size."""
    labels = open_labels(command.labels, grid, labelled=command.labelled or None, table=command.label_table)
    working_um = command.working_um
    if working_um is None and not command.overwrite:
        working_um = earlier_working_um(command.output)
    factor = None if working_um is None else factor_of(working_um, grid)
    annotations, factor, counts = reduce_labels(labels, sections, grid, factor)
    seen = any(label for found in counts.values() for label in found)
    if seen and not annotations.label_map.labels.any():
        raise ValueError(
            f"--working-um: at {factor * pixel_um(grid):g} um nothing is left of the structures of {command.labels}; "
            "give a smaller --working-um"
        )
    return annotations, FullSize(sections, grid, labels, factor, command.save_probabilities, counts)


def _read_truth(command: StackComplete, grid: Volume, full: FullSize | None) -> SectionLabels | None:
    if command.truth is None:
        return None
    if full is None:
        return read_labels(command.truth, grid, table=command.label_table)
    labels = open_labels(command.truth, grid, table=command.label_table)
    return reduce_labels(labels, full.stack, grid, full.factor)[0]


def _print_estimate(command: StackComplete, stack: Stack) -> None:
    """Say how long it will take, where that is long, and at which size large sections are computed."""
    if stack.full is not None:
        print(notes_on_size(stack.full, stack.annotations)[0])
    space, labels = stack.images.space, stack.annotations.label_map.labels
    on_cpu = not stack.device.startswith("cuda")
    work = Work(
        sections=space.shape[0],
        unlabelled=len(stack.annotations.unlabelled),
        size=space.shape[1:] if stack.full is None else stack.full.canvas,
        working_size=space.shape[1:],
        structures=max(len(np.unique(labels[z])) for z in stack.annotations.labelled),
        steps=0 if command.settings.method == "fusion" else command.settings.training_steps,
        jobs=jobs_on("cpu" if on_cpu else "cuda", command.jobs),
        channels=3 if stack.full is not None else stack.images.pixels[0, 0, 0].size,
        all_structures=len(np.unique(labels[list(stack.annotations.labelled)])),
        pairs={"none": 0, "chained": 1, "direct": MOST_ATLASES}[command.settings.registration],
        network_pixels=command.settings.network_pixels,
        large_network=command.settings.network == "fcn_vgg16",
        whole_network=command.settings.trained_layers == "all",
    )
    if work.is_long and on_cpu:  # times on a GPU are others
        print(f"Estimated for the whole run: {work}.", flush=True)


def _with_pixels(stack: Stack, folder: RunFolder, running: RunRecord, withdraw: Callable[[], None]) -> Stack:
    """The stack with its pixels read, where these were left for now; a run that cannot read them is taken back.

    Raises
    ------
    ValueError
        As of `read_reduced`.
    """
    if stack.full is None:
        return stack
    try:
        with progress_on(sys.stderr) as report:
            images = read_reduced(stack.full, folder.store, running.inputs["images"], report)
    except ValueError:
        withdraw()
        raise
    return dataclasses.replace(stack, images=images)


def _weights(command: StackComplete) -> Path | None:
    return Path(command.settings.vgg16_weights) if command.settings.vgg16_weights else None


def new_record(command: StackComplete, stack: Stack, command_line: Sequence[str]) -> RunRecord:
    """The record of a run that is to begin: what its result depends on, and what else was asked for."""
    given = {
        "images": command.images,
        "labels": command.labels,
        "truth": command.truth,
        "table": command.label_table,
        "vgg16_weights": _weights(command),
    }
    positions = stack.images.space.positions
    settings = {
        **dataclasses.asdict(command.settings),
        "algorithm": ALGORITHM,
        "spacing": [float(f"{s:.9g}") for s in stack.images.space.spacing],
        "section_axis": command.section_axis,
        "positions": None if positions is None else list(positions),
        **({} if stack.full is None else {"working_um": float(f"{stack.full.working_um:.9g}")}),
        "tissues": None if stack.tissues is None else {str(k): v for k, v in stack.tissues.items()},
    }
    options = {
        "labelled": list(stack.annotations.labelled),
        "within_mm": command.within_mm if command.truth is not None else None,
        "save_probabilities": command.save_probabilities,
    }
    return RunRecord(
        command=tuple(command_line),
        settings=settings,
        inputs={name: hash_stack(path) for name, path in given.items() if path is not None},
        options=options,
        device=stack.device,
        seed=command.settings.seed,
    )


def _complete(command: StackComplete, stack: Stack, folder: RunFolder) -> Completion:
    full = stack.full
    more: dict[str, Any] = {} if full is None else {"finished": full.take}
    with progress_on(sys.stderr) as report:
        completion = complete(
            stack.images,
            stack.annotations,
            command.settings,
            device=stack.device.split()[0],
            jobs=command.jobs,
            store=folder.store,
            progress=report,
            tissues=stack.tissues,
            keep_probabilities=command.save_probabilities or full is not None,
            **more,
        )
    if full is None:
        return completion
    return dataclasses.replace(completion, notes=(*completion.notes, *notes_on_size(full, stack.annotations)))


def _finish(
    command: StackComplete, stack: Stack, folder: RunFolder, running: RunRecord, completion: Completion
) -> RunRecord:
    """Score, write all results, and give the completed record."""
    score = None
    if stack.truth is not None:
        score = score_stack(completion.labels, stack.truth.label_map, stack.scored, command.within_mm)
    report = report_of(stack.images, stack.annotations, completion, running.settings, stack.truth, score)
    names = {label: completion.labels.name_of(label) for label in score.pooled_dice} if score is not None else {}
    done = running.completed(
        seconds=completion.seconds,
        sections={str(z): values for z, values in _section_records(stack.images, completion)},
        calibration=completion.calibration,
        scores=score.to_json(names) if score is not None else {},
        suggestions=completion.suggestions,
        summary=report.summary,
        notes=completion.notes,
    )
    folder.finish(
        running,
        done,
        lambda path: write_results(path, stack.images, completion, command.label_table, report, stack.full),
    )
    return done


def _section_records(images: Volume, completion: Completion) -> Iterator[tuple[int, dict[str, Any]]]:
    for z, result in sorted(completion.sections.items()):
        yield (
            z,
            {
                "name": images.section_names[z],
                "seconds": result.seconds,
                "iterations": result.iterations,
                "objective": list(result.objective),
                "mean_uncertainty": float(completion.uncertainty[z].mean()),
                "wrong_share": float(completion.wrong[z]),
                "in_doubt": _most_in_doubt(completion, z),
            },
        )


def _most_in_doubt(completion: Completion, z: int) -> list[str]:
    """Names of the structures of a section with the widest intervals of their area, the widest first."""
    result = completion.sections[z]
    rows = zip(result.structures.tolist(), np.ptp(result.areas, axis=0).tolist(), strict=True)
    widest = sorted((-width, label) for label, width in rows if label and width)
    return [completion.labels.name_of(label) for _, label in widest[:NAMED]]


def print_summary(output: Path, record: RunRecord) -> None:
    """Print what came out, the scores where there are any, what to label next, and where the report is."""
    print(record.summary)
    for note in record.notes:
        print(f"Note: {note}")
    if record.scores:
        print_score(StackScore.from_json(record.scores), "against the truth")
    if record.suggestions:
        numbers = ", ".join(str(z) for z in record.suggestions)
        names = ", ".join(record.sections[str(z)]["name"] for z in record.suggestions)
        counted = f"section {numbers} (the first is 0)"
        print(f"Label next: {counted if names == numbers else f'{names}; {counted}'}.")
    print(f"Report: {output / 'report.html'}")
