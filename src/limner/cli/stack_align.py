"""``limner stack align``: a rigidly aligned copy of a stack, its transforms, and labels moved along or back."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from tyro.conf import FlagCreatePairsOff, Positional, arg

from limner.cli.arguments import SectionAxis, Spacing
from limner.cli.image_files import hash_stack
from limner.cli.progress import Report, progress_on
from limner.cli.run_folder import RunFolder
from limner.cli.section_labels import is_folder, label_files, labels_of
from limner.io import SectionStack, label_type, open_sections, read_label_image, write_images, write_sections
from limner.io.label_stack import ReadSection, label_sections
from limner.io.sections import border_median, list_sections
from limner.io.transforms import SectionTransforms, read_transforms, write_transforms
from limner.registration.section_resampling import moved, small_section
from limner.registration.stack_alignment import WORDS, align, inspect, reach, working_grid
from limner.run_record import RunRecord, hash_file

ALGORITHM = 2  # raised with every change that alters results
NONE = "(default: none)"
LARGEST_ANGLE = 44.0  # more would be taken for a section turned the other way
MARGIN = 0.02  # of the reach of tissue, left around it where the canvas must grow
Labels = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class StackAlign:
    """Turn and shift the sections of a stack so that neighbours fit; turned and mirrored sections are set right.

    Writes into OUT: the aligned images in the format of IMAGES, transforms.csv and run.json; with --labels also the
    labels moved along. Where tissue would be cut off, all aligned sections are larger than those given.
    `limner stack align IMAGES --transforms OUT/transforms.csv --back LABELS -o BACK` brings labels that were made on
    the aligned stack back to the sections as given.
    """

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """The stack: a folder of PNG, TIFF or JPEG sections (natural order; sizes may differ), a multi-page TIFF, an
    OME-Zarr, or a NIfTI, NRRD, MHA or MGZ volume; grey or RGB."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="OUT", help_behavior_hint="(required)")]
    """Folder for the results, made if need be."""
    labels: Annotated[Path | None, arg(metavar="LABELS", help_behavior_hint=NONE)] = None
    """Labels of IMAGES to be moved along: a file of the same shape, or a folder that holds the labelled sections under
    the names of their images."""
    transforms: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: found by registration)")] = (
        None
    )
    """Use these transforms, as an earlier run wrote them, perhaps changed by hand."""
    back: Annotated[Path | None, arg(metavar="LABELS", help_behavior_hint=NONE)] = None
    """Labels made on the aligned stack, to be brought back to the sections as given; needs --transforms. Only the
    labels are written then."""
    max_angle: float = 30.0
    """Largest rotation of a section beside how it should lie, degrees; up to 44."""
    keep_orientation: FlagCreatePairsOff[bool] = False
    """Leave sections that are turned by 180 degrees or mirrored as they are."""
    spacing: Annotated[Spacing, arg(help_behavior_hint="(default: from IMAGES)")] = ()
    """Distance between sections, then pixels along y and x, in mm."""
    section_axis: SectionAxis = "z"
    """Axis of a volume along which its sections run: z, y, x (or k, j, i in NIfTI's words); z is the slowest."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace Limner's own files in OUT where they come from other settings or images, or were changed by hand."""

    def run(self, command_line: Sequence[str]) -> int:
        """Align the stack, or say that it is done already.

        Raises
        ------
        ValueError
            If an input or option is at fault or OUT cannot be used; nothing is written then.
        """
        folder = RunFolder(self.output)
        folder.check_apart_from(self._user_files())
        stack = read_stack(self)
        given = read_transforms(self.transforms, stack.names) if self.transforms is not None else None
        record = new_record(self, stack, command_line)
        earlier = folder.earlier_run(record, self.overwrite)
        if earlier is not None and folder.holds(earlier, record):
            print(f"{self.output} is already complete.")
            print_summary(earlier)
            return 0
        with progress_on(sys.stderr) as report:
            try:
                began = time.monotonic()
                result = self._result(stack, given, report)
                running = folder.begin(record, earlier)
                done = running.completed(
                    seconds={"registration": round(time.monotonic() - began, 2)},
                    summary=result.summary,
                    notes=result.notes,
                )
                folder.finish(running, done, partial(result.write, report=report))
            except KeyboardInterrupt:
                print("\nStopped; nothing is kept of it.", file=sys.stderr)
                return 130
        print_summary(done)
        return 0

    def _result(self, stack: SectionStack, given: SectionTransforms | None, report: Report) -> Aligned | BroughtBack:
        if self.back is not None and given is not None:
            readers = open_aligned_labels(self, stack)
            return BroughtBack(stack, given, readers, check_aligned_labels(self.back, readers, stack))
        small, spacing = read_small(stack, report)
        if given is None:
            given = find_transforms(self, small, spacing, report)
        blank = tuple(z for z, found in enumerate(given.found) if found == "blank")
        labels = largest_label(self.labels, stack) if self.labels is not None else None
        shape = canvas_of(stack, reach(small, spacing, given.matrices, blank))
        return Aligned(stack, given, on_canvas(stack, shape), self.labels, labels)

    def _user_files(self) -> dict[str, Path]:
        optional = {"--labels": self.labels, "--transforms": self.transforms, "--back": self.back}
        return {"IMAGES": self.images} | {name: path for name, path in optional.items() if path is not None}


def read_stack(command: StackAlign) -> SectionStack:
    """Open the stack and check the options; nothing is computed or written.

    Raises
    ------
    ValueError
        The first fault found, in one line.
    """
    if not 0 < command.max_angle <= LARGEST_ANGLE:
        raise ValueError(f"--max-angle: {command.max_angle:g} is out of range; give degrees above 0, up to 44")
    if command.back is not None and command.transforms is None:
        raise ValueError(
            "--back: give the transforms by which the stack was aligned, too: --transforms OUT/transforms.csv"
        )
    if command.back is not None and command.labels is not None:
        raise ValueError("--back: labels go either way, not both; leave --labels out")
    stack = open_sections(command.images, spacing=command.spacing or None, section_axis=command.section_axis)
    if stack.spacing is None:
        raise ValueError(f"--spacing: {command.images} states no spacing; give --spacing z,y,x in mm")
    if len(stack) < 2:
        raise ValueError(f"IMAGES: {command.images} holds one section; give a stack of two or more")
    return stack


def plane_spacing(stack: SectionStack) -> tuple[float, float]:
    """Spacing of the pixels along y and x, mm."""
    assert stack.spacing is not None  # checked when it was opened
    return stack.spacing[1], stack.spacing[2]


def new_record(command: StackAlign, stack: SectionStack, command_line: Sequence[str]) -> RunRecord:
    """The record of a run that is to begin: what its result depends on."""
    assert stack.spacing is not None
    settings = {
        "algorithm": ALGORITHM,
        # what is written: one kind of run does not take the place of another unasked
        "labels": command.labels is not None,
        "transforms_given": command.transforms is not None,
        "back": command.back is not None,
        "max_angle": command.max_angle,
        "keep_orientation": command.keep_orientation,
        "spacing": [float(f"{s:.9g}") for s in stack.spacing],
        "section_axis": command.section_axis,
    }
    inputs = {"images": hash_stack(command.images)}
    for name, path in (("labels", command.labels), ("back", command.back)):
        if path is not None:
            inputs[name] = hash_stack(path)
    if command.transforms is not None:
        inputs["transforms"] = {command.transforms.name: hash_file(command.transforms)}
    return RunRecord(command=tuple(command_line), settings=settings, inputs=inputs, options={}, device="cpu", seed=0)


def read_small(stack: SectionStack, report: Report) -> tuple[NDArray[np.float32], tuple[float, float]]:
    """All sections, small and on one canvas, (Z, C, y, x), and their spacing; one at a time is read in full."""
    canvas = largest_section(stack)
    shape, spacing = working_grid(canvas, plane_spacing(stack))
    sections = []
    for z, section in enumerate(stack):
        pixels = section.pixels()
        sections.append(small_section(pixels, plane_spacing(stack), shape, spacing, border_median(pixels)))
        if sections[z].shape != sections[0].shape:
            raise ValueError(
                f"IMAGES: section {section.name} of {stack.source.path} has {len(sections[z])} channels, "
                f"{stack[0].name} {len(sections[0])}; export all sections alike, grey or RGB"
            )
        report("reading", z + 1, len(stack))
    return np.stack(sections), spacing


def largest_section(stack: SectionStack) -> tuple[int, int]:
    """(Y, X) of a canvas that holds every section."""
    return max(s.shape[0] for s in stack), max(s.shape[1] for s in stack)


def find_transforms(
    command: StackAlign, small: NDArray[np.float32], spacing: tuple[float, float], report: Report
) -> SectionTransforms:
    """Transforms by registration; arguments as `read_small` returns them."""
    found = inspect(
        small, spacing, max_angle=command.max_angle, keep_orientation=command.keep_orientation, progress=report
    )
    words = found.faults()
    faults = tuple(words.get(z, "") for z in range(len(small)))
    return SectionTransforms(align(small, spacing, found), found.fit, faults)


def canvas_of(stack: SectionStack, furthest: tuple[float, float]) -> tuple[int, int]:
    """(Y, X) of the aligned sections: that of the largest section, and as much more on all sides as tissue needs."""
    sizes = []
    for n, mm, s in zip(largest_section(stack), furthest, plane_spacing(stack), strict=True):
        beyond = mm - n / 2 * s
        sizes.append(n + 2 * int(np.ceil((beyond + MARGIN * mm) / s)) if beyond > 0 else n)
    return sizes[0], sizes[1]


def on_canvas(stack: SectionStack, shape: tuple[int, int]) -> SectionStack:
    """The stack as its aligned form will be: sections of one shape, their middle where it was."""
    largest, spacing = largest_section(stack), stack.spacing
    assert spacing is not None
    grown = [0.0, *((new - old) / 2 * s for new, old, s in zip(shape, largest, spacing[1:], strict=True))]
    origin = np.asarray(stack.origin) - np.asarray(stack.direction) @ grown
    return replace(
        stack,
        sections=tuple(replace(section, shape=shape) for section in stack),
        source=replace(stack.source, sizes=(shape,) * len(stack) if stack.source.sizes else ()),
        origin=(float(origin[0]), float(origin[1]), float(origin[2])),
    )


def some_sections(stack: SectionStack, chosen: Sequence[int]) -> SectionStack:
    """A folder's stack with some of its sections."""
    source = stack.source
    names, sizes = tuple(source.names[z] for z in chosen), tuple(source.sizes[z] for z in chosen)
    return replace(stack, sections=tuple(stack[z] for z in chosen), source=replace(source, names=names, sizes=sizes))


def largest_label(path: Path, stack: SectionStack) -> int:
    """The largest label; every file is read and checked.

    Raises
    ------
    ValueError
        If labels cannot be read or do not fit their images.
    """
    largest = 0
    for z, file, labels in labels_of(path, stack):
        if labels.shape != stack[z].shape:
            raise ValueError(
                f"--labels: {file} has size {labels.shape}, its image {stack.names[z]} {stack[z].shape} (y, x); give "
                "labels of the image's size"
            )
        largest = max(largest, int(labels.max(initial=0)))
    return largest


@dataclass(frozen=True)
class Aligned:
    """An aligned stack that is to be written.

    Parameters
    ----------
    stack, aligned : SectionStack
        The sections as given, and the form of the aligned ones.
    transforms : SectionTransforms
        Of every section.
    labels : Path or None
        To be moved along.
    largest : int or None
        The largest of the labels.
    """

    stack: SectionStack
    transforms: SectionTransforms
    aligned: SectionStack
    labels: Path | None
    largest: int | None

    @property
    def summary(self) -> str:
        """One line on what came out."""
        beside = np.abs((self.transforms.rotations + 90) % 180 - 90)
        fit = self.transforms.fit[~np.isnan(self.transforms.fit)]
        quality = f"; median fit to the neighbours {np.median(fit):.3f}" if len(fit) else ""
        y, x = self.aligned[0].shape
        return (
            f"{len(self.stack)} sections aligned, {y} x {x} pixels each; turned by up to {beside.max():.1f} "
            f"degrees{quality}."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What is wrong with which sections."""
        what = {"blank": "left as it is", **dict.fromkeys(WORDS.values(), "set right")}
        return tuple(
            f"Section {name} is {found}; {what.get(found, 'aligned as well as it goes: look at it')}."
            for name, found in zip(self.stack.names, self.transforms.found, strict=True)
            if found
        )

    def write(self, folder: Path, report: Report) -> None:
        """Write images, labels where there are any, and transforms into a folder."""
        colour = self.stack[0].pixels().ndim == 3
        write_images(folder, "images", self._images(report), self.aligned, colour)
        write_transforms(folder / "transforms.csv", self.transforms, self.stack.names)
        if self.labels is not None and self.largest is not None:
            aligned = self.aligned
            if is_folder(self.labels) and self.stack.source.kind == "folder":
                aligned = some_sections(aligned, [z for z, _ in label_files(self.labels, self.stack)])
            write_sections(folder, "labels", self._labels(self.labels), aligned, label_type(self.largest))

    def _images(self, report: Report) -> Iterator[NDArray[Any]]:
        for z, section in enumerate(self.stack):
            pixels = section.pixels()
            yield moved(
                pixels,
                self.transforms.matrices[z],
                plane_spacing(self.stack),
                self.aligned[z].shape,
                fill=border_median(pixels),
            )
            report("writing", z + 1, len(self.stack))

    def _labels(self, path: Path) -> Iterator[Labels]:
        for z, _, labels in labels_of(path, self.stack):
            matrix, shape = self.transforms.matrices[z], self.aligned[z].shape
            yield moved(labels, matrix, plane_spacing(self.stack), shape, nearest=True)


@dataclass(frozen=True)
class BroughtBack:
    """Labels made on an aligned stack that are to be written on the sections as given.

    Parameters
    ----------
    stack : SectionStack
        The sections as given.
    transforms : SectionTransforms
        Of every section.
    labels : mapping of int to callable
        What reads the labels of each section that has any, on the aligned canvas; one is in memory at a time.
    largest : int
        The largest of the labels.
    """

    stack: SectionStack
    transforms: SectionTransforms
    labels: Mapping[int, ReadSection]
    largest: int

    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line on what came out."""
        return f"Labels of {len(self.labels)} sections brought back to the sections as given."

    def write(self, folder: Path, report: Report) -> None:
        """Write labels into a folder."""
        stack = self.stack
        if stack.source.kind == "folder":
            stack = some_sections(stack, sorted(self.labels))
        write_sections(folder, "labels", self._made(report), stack, label_type(self.largest))

    def _made(self, report: Report) -> Iterator[Labels]:
        for done, (z, read) in enumerate(sorted(self.labels.items()), start=1):
            matrix = self.transforms.matrices[z]
            # a rotation's inverse is its transpose
            inverse = np.column_stack([matrix[:, :2].T, -matrix[:, :2].T @ matrix[:, 2]])
            yield moved(read(), inverse, plane_spacing(self.stack), self.stack[z].shape, nearest=True)
            report("writing", done, len(self.labels))


def open_aligned_labels(command: StackAlign, stack: SectionStack) -> dict[int, ReadSection]:
    """What reads labels made on the aligned stack, of each section that has any.

    Raises
    ------
    ValueError
        If they cannot be opened or are of another number of sections.
    """
    path = command.back
    assert path is not None
    if is_folder(path) and stack.source.kind == "folder":
        return {z: partial(read_label_image, file) for z, file in label_files(path, stack)}
    if is_folder(path):
        found: dict[int, ReadSection] = {z: partial(read_label_image, f) for z, f in enumerate(list_sections(path))}
    else:
        found = label_sections(open_sections(path, section_axis=command.section_axis, labels=True))
    if len(found) != len(stack):
        raise ValueError(
            f"--back: {path} has {len(found)} sections, {command.images} {len(stack)}; give labels of the aligned stack"
        )
    return found


def check_aligned_labels(path: Path, labels: Mapping[int, ReadSection], stack: SectionStack) -> int:
    """The largest of the labels; each section is read once.

    Raises
    ------
    ValueError
        If labels are not of one size, or smaller than the sections that the aligned canvas holds.
    """
    needed, largest, first = largest_section(stack), 0, None
    for _, read in sorted(labels.items()):
        section = read()
        first = section.shape if first is None else first
        if section.shape != first or any(has < needs for has, needs in zip(section.shape, needed, strict=True)):
            raise ValueError(
                f"--back: labels in {path} have shape {section.shape}; on the aligned stack all have one, {needed} "
                "(y, x) or more; give labels made on that"
            )
        largest = max(largest, int(section.max(initial=0)))
    return largest


def print_summary(record: RunRecord) -> None:
    """Print what came out and what the user should know."""
    print(record.summary)
    for note in record.notes:
        print(f"Note: {note}")
