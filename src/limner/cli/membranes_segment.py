"""``limner membranes segment``: check everything, find membranes tile by tile, resume, write maps, cells and report."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from limner.cli.arguments import SectionAxis, Spacing
from limner.cli.cluster import check_scheduler
from limner.cli.device import find_device
from limner.cli.image_files import hash_stack
from limner.cli.membranes_results import Results, report_of, write_results
from limner.cli.progress import progress_on
from limner.cli.run_folder import RunFolder
from limner.inference import Options
from limner.io import SectionStack, open_sections
from limner.methods.membranes import TASK, Averaging, Fusion, Model, from_model, segment
from limner.model_file import read_model
from limner.parallel import keep_freed_memory
from limner.run_record import RunRecord, content_key, hash_file

ALGORITHM = 1  # raised whenever the same settings give other maps
SEEN = 256  # pixels of the first section, either way, that are looked at before anything is computed
COARSEST_UM = 1.0  # of pixels; membranes are some 10 nm thick
UNLIKE = 1.25  # times the pixel size that the model was trained at


@dataclass(frozen=True)
class MembranesSegment:
    """Find the membranes of a stack of electron micrographs, and the cells between them.

    Writes into OUT: probabilities/ with the probability of membrane of each section, in which gaps are closed, so that
    0.5 is the threshold; with --cells cells/ and cells.csv; sections.csv, report.html and run.json. Sections are read
    and computed window by window. A run that was stopped goes on from the last window when the command is given again.
    """

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """The sections: a folder of PNG, TIFF or JPEG (sizes may differ), a multi-page TIFF, an OME-Zarr, or a NIfTI, NRRD,
    MHA or MGZ volume; grey."""
    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """A model that `limner membranes fit` wrote."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="OUT", help_behavior_hint="(required)")]
    """Folder for the results, made if need be."""
    cells: FlagCreatePairsOff[bool] = False
    """Also write the cells between membranes, numbered 1, 2, ... in each section."""
    link_sections: FlagCreatePairsOff[bool] = False
    """Also write the cells, linked from section to section by overlap: one number for a cell in the whole volume."""
    least_cell: int = 50
    """Pixels that a cell needs; smaller gaps in membranes are none."""
    w_f: Annotated[float | None, arg(metavar="W", help_behavior_hint="(default: the model's)")] = None
    """Weight of the contours that the watershed closes, below 1; 0: the network's map alone."""
    depth: Annotated[float | None, arg(metavar="D", help_behavior_hint="(default: the model's)")] = None
    """Cells whose border is nowhere this much higher than their inside become one with a neighbour, 0 to 1."""
    averaging: Averaging = field(default_factory=Averaging)
    """What probabilities are a mean of."""
    match_noise: bool = True
    """Smooth sections that are clearly noisier than those that the model was trained on down to their noise, by a
    Gaussian of up to 2 pixels."""
    spacing: Annotated[Spacing, arg(help_behavior_hint="(default: from IMAGES)")] = ()
    """Distance between sections, then pixels along y and x, in mm; for areas and volumes alone."""
    section_axis: SectionAxis = "z"
    """Axis of a volume along which its sections run: z, y, x (or k, j, i in NIfTI's words); z is the slowest."""
    tile: int = 1024
    """Side of the windows in pixels; bounds the memory, changes nothing in the result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    jobs: int = 1
    """Windows of a section side by side, for sections larger than --tile: one is read while another is computed."""
    scheduler: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="(default: threads here)")] = None
    """Address of a dask.distributed cluster whose workers compute the windows, those of one section at a time."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace Limner's own files in OUT where they come from other images, another model or averaging, or were changed
    by hand. Cells and fusion are made anew without asking."""

    def run(self, command_line: Sequence[str]) -> int:
        """Find membranes and cells, or say that it is done already.

        Raises
        ------
        ValueError
            If an input or option is at fault or OUT cannot be used; nothing is written then.
        """
        keep_freed_memory()
        folder = RunFolder(self.output)
        folder.check_apart_from({"IMAGES": self.images, "MODEL": self.model})
        given = read_inputs(self)
        record = new_record(self, given, command_line)
        earlier = folder.earlier_run(record, self.overwrite)
        if earlier is not None and folder.holds(earlier, record):
            print(f"{self.output} is already complete.")
            print_summary(self.output, earlier)
            return 0
        running = folder.begin(record, earlier)
        try:
            done = _segment(self, given, folder, running)
        except KeyboardInterrupt:
            print("\nStopped; the same command goes on from the last finished window.", file=sys.stderr)
            return 130
        print_summary(self.output, done)
        return 0


@dataclass(frozen=True)
class Inputs:
    """What the user gave, read and checked.

    Parameters
    ----------
    stack : SectionStack
        The sections; no pixel is read yet.
    model : Model
        With the fusion that the user gave.
    options : Options
        Windows and where they are computed.
    device : str
        ``cpu``, or ``cuda`` with the GPU's name.
    notes : tuple of str
        What the user should know.
    """

    stack: SectionStack
    model: Model
    options: Options
    device: str
    notes: tuple[str, ...] = ()


def read_inputs(command: MembranesSegment) -> Inputs:
    """Read the model and open the stack; nothing is computed or written.

    Raises
    ------
    ValueError
        The first fault found, in one line.
    """
    _check_options(command)
    device = find_device(command.device) if command.scheduler is None else command.device
    if command.scheduler is not None:
        check_scheduler(command.scheduler)
    model = from_model(read_model(command.model, TASK))
    fusion = dataclasses.replace(model.fusion, v_rand=None)
    if command.w_f is not None:
        fusion = dataclasses.replace(fusion, w_f=command.w_f)
    if command.depth is not None:
        fusion = dataclasses.replace(fusion, depth=command.depth)
    compute: dict[str, Any] = {"jobs": command.jobs, "device": device.split()[0], "scheduler": command.scheduler}
    options = Options(window=command.tile, **compute)
    try:
        options.grid(command.averaging.of(model.network), (1, 1))
    except ValueError as error:
        raise ValueError(f"--tile: {str(error).removeprefix('TileGrid(): ')}") from None
    stack = open_sections(command.images, spacing=command.spacing or None, section_axis=command.section_axis)
    _check_sizes(command, stack)
    _check_pixels(stack)
    notes = (*_notes(stack, model), *_notes_on_fusion(command, fusion))
    for note in notes:
        warnings.warn(note, stacklevel=2)  # before the work; the report repeats it
    return Inputs(stack, dataclasses.replace(model, fusion=fusion), options, device, notes)


def _check_options(command: MembranesSegment) -> None:
    for name in ("w_f", "depth"):
        value = getattr(command, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is out of range; give 0 or more, below 1")
    if command.least_cell < 0:
        raise ValueError(f"--least-cell: {command.least_cell} is below 0; give pixels, 0 or more")
    if command.jobs < 1:
        raise ValueError(f"--jobs: {command.jobs} is below 1; give 1 or more")


def _check_sizes(command: MembranesSegment, stack: SectionStack) -> None:
    sizes = dict[tuple[int, int], str]()
    for section in stack:
        sizes.setdefault(section.shape, section.name)
    if command.link_sections and len(sizes) > 1:
        (first, one), (second, other), *_ = sizes.items()
        raise ValueError(
            f"--link-sections: {one} has {first[0]} x {first[1]} pixels, {other} {second[0]} x {second[1]}; align the "
            "sections to one size, or give --cells alone"
        )


def _check_pixels(stack: SectionStack) -> None:
    """Read a little of the first section: a damaged file or colours are told before anything is computed."""
    height, width = (n // 2 for n in stack[0].shape)
    stack[0][height : height + SEEN, width : width + SEEN]


def _notes(stack: SectionStack, model: Model) -> tuple[str, ...]:
    """A note where the sections have pixels of another size than the model was trained at."""
    if stack.spacing is None:
        return ()
    um_per_px = 1000 * math.sqrt(stack.spacing[1] * stack.spacing[2])
    if um_per_px > COARSEST_UM:
        return (f"Pixels of {um_per_px:.4g} um show no membranes: is the spacing in mm (4 nm are 0.000004)?",)
    if math.isnan(model.um_per_px):
        return ()
    if 1 / UNLIKE <= um_per_px / model.um_per_px <= UNLIKE:
        return ()
    return (
        f"The sections have pixels of {um_per_px:.4g} um, those that the model was trained on {model.um_per_px:.4g} "
        "um: resample the sections, or check --spacing.",
    )


def _notes_on_fusion(command: MembranesSegment, fusion: Fusion) -> tuple[str, ...]:
    if command.depth is None or fusion.w_f > 0:
        return ()
    return ("--depth counts for nothing where w_f is 0, as in this model: the watershed is left out; add --w-f 0.3.",)


def _notes_on_noise(smoothed: Sequence[float]) -> tuple[str, ...]:
    """A note where sections were smoothed."""
    sigmas = [sigma for sigma in smoothed if sigma]
    if not sigmas:
        return ()
    ends = sorted({f"{min(sigmas):.1f}", f"{max(sigmas):.1f}"})
    return (
        f"Noisier than those that the model was trained on and smoothed by a Gaussian of {' to '.join(ends)} pixels: "
        f"{len(sigmas)} of {len(smoothed)} sections; --no-match-noise leaves them as they are.",
    )


def new_record(command: MembranesSegment, given: Inputs, command_line: Sequence[str]) -> RunRecord:
    """The record of a run that is to begin: what its maps depend on, and what else was asked for."""
    model = hash_file(command.model)
    fusion = {name: getattr(given.model.fusion, name) for name in ("w_f", "depth", "sigma")}
    settings = {
        "algorithm": ALGORITHM,
        "model": model,
        **dataclasses.asdict(command.averaging),
        "match_noise": command.match_noise and given.model.noise > 0,
        "section_axis": command.section_axis,
    }
    cells = command.cells or command.link_sections
    spacing = None if given.stack.spacing is None else [float(f"{s:.9g}") for s in given.stack.spacing]
    return RunRecord(
        command=tuple(command_line),
        settings=settings,
        inputs={"images": hash_stack(command.images), "model": {command.model.name: model}},
        options={
            **fusion,
            "cells": cells,
            "link_sections": command.link_sections,
            "least_cell": command.least_cell if cells else None,
            "spacing": spacing,
        },
        device=given.device,
        seed=0,
    )


def _segment(command: MembranesSegment, given: Inputs, folder: RunFolder, running: RunRecord) -> RunRecord:
    """Compute the maps that are missing, write everything, and give the completed record."""
    images = running.inputs["images"]
    keys = [content_key(running.settings, images.get(name, images), z) for z, name in enumerate(given.stack.names)]
    began = time.monotonic()
    with progress_on(sys.stderr) as tell:
        segmentation = segment(
            given.stack.sections,
            given.model,
            folder.store,
            keys,
            command.averaging,
            given.options,
            lambda done, total: tell("membranes", done, total),
            command.least_cell,
            command.match_noise,
        )
    found = time.monotonic()
    wanted = bool(running.options["cells"]), bool(running.options["link_sections"])
    results = Results(given.stack, segmentation, folder.store, *wanted)
    with progress_on(sys.stderr) as tell:
        results.find(lambda done, total: tell("fusion and cells" if wanted[0] else "fusion", done, total))
    notes = (*given.notes, *_notes_on_noise(segmentation.smoothed))
    report = report_of(results, settings_shown(running), notes)
    seconds = {"membranes": round(found - began, 2), "cells": round(time.monotonic() - found, 2)}
    done = running.completed(seconds=seconds, summary=report.summary, notes=notes)
    folder.finish(running, done, lambda path: write_results(path, results, report))
    results.forget()
    return done


def settings_shown(record: RunRecord) -> dict[str, object]:
    """Settings for the report: the model by its name."""
    shown = {**record.settings, **record.options, "model": ", ".join(record.inputs["model"])}
    return {name: value for name, value in shown.items() if value is not None and name != "algorithm"}


def print_summary(output: Path, record: RunRecord) -> None:
    """Print what came out, notes, and where the report is."""
    print(record.summary)
    print(f"Report: {output / 'report.html'}")
