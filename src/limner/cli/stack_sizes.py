"""Stacks of large sections: opened, worked on at coarser pixels, and labelled at their own size."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.annotations import SectionLabels
from limner.completion import SectionResult
from limner.io import LabelStack, SectionStack, default_table, label_type, open_sections, read, write_sections
from limner.io.images import TIFF_ENDINGS, at_positions
from limner.io.section_stack import blank_volume, sections_of
from limner.io.sections import centre, centre_slices
from limner.reduced_stack import (
    chosen_factor,
    enlarged_labels,
    finest_factor,
    reduced_labels,
    reduced_section,
    reduced_shape,
    reduced_source,
    reduced_space,
    widths,
)
from limner.run_record import Store, content_key, read_record, stored
from limner.volume import LabelMap, Volume

FINER = 0.75  # times the images' pixel size: nobody gets more than the images hold
FEWEST = 16  # pixels of the longer side that must be left


@dataclass
class FullSize:
    """Sections at their own size, of a stack that the method sees at coarser pixels; one is in memory at a time.

    Parameters
    ----------
    stack : SectionStack
        The sections.
    grid : Volume
        Their canvas and form, around no pixels (see `blank_volume`).
    labels : LabelStack
        Labels of some sections.
    factor : int
        Pixels either way that become one.
    keep_probabilities : bool
        Whether `take` leaves a section its probabilities.
    counts : dict of int to dict of int to int
        Pixels of each label, at full size, on the sections that were read or made so far.
    """

    stack: SectionStack
    grid: Volume
    labels: LabelStack
    factor: int
    keep_probabilities: bool = False
    counts: dict[int, dict[int, int]] = field(default_factory=dict)
    _made: dict[int, tuple[np.dtype[Any], bytes]] = field(default_factory=dict)

    @property
    def canvas(self) -> tuple[int, int]:
        """(Y, X) of the largest section."""
        return self.grid.space.shape[1:]

    @property
    def working_um(self) -> float:
        """Pixel size at which the method computes."""
        return self.factor * pixel_um(self.grid)

    def working_grid(self) -> Volume:
        """The reduced stack around no pixels."""
        space = reduced_space(self.grid.space, self.factor)
        source = None if self.grid.source is None else reduced_source(self.grid.source, self.factor)
        return Volume(np.broadcast_to(np.uint8(0), space.shape), space, source)

    def take(self, z: int, result: SectionResult) -> SectionResult:
        """Make the labels of a completed section at full size, and keep them packed; gives what else is to be kept."""
        assert result.probabilities is not None
        structures = result.structures.astype(label_type(int(result.structures.max())))
        large = enlarged_labels(result.probabilities, structures, self.factor, self.canvas)
        own = np.ascontiguousarray(large[centre_slices(self.stack[z].shape, self.canvas)])
        self.counts[z] = pixel_counts(own)
        self._made[z] = own.dtype, zlib.compress(own.data, 1)  # few runs of one label each: hundreds to one
        return result if self.keep_probabilities else replace(result, probabilities=None)

    def section_labels(self, z: int) -> NDArray[np.integer[Any]]:
        """Labels of a section at its own size: as they were given, or as `take` made them."""
        shape = self.stack[z].shape
        if z not in self._made:
            given = self.labels[z]
            return given if given.shape == shape else given[centre_slices(shape, self.canvas)]
        dtype, packed = self._made[z]
        return np.frombuffer(zlib.decompress(packed), dtype).reshape(shape)

    def write_labels(self, folder: Path) -> None:
        """Write labels of all sections in the form of the images."""
        largest = max(label for counts in self.counts.values() for label in counts)
        write_sections(folder, "labels", self.section_labels, self.stack, label_type(largest))

    @property
    def areas(self) -> dict[int, dict[int, float]]:
        """Area of each label on each section, mm2."""
        mm2 = math.prod(self.grid.space.spacing[1:])
        return {z: {label: n * mm2 for label, n in counts.items()} for z, counts in self.counts.items()}


def pixel_counts(labels: NDArray[np.integer[Any]]) -> dict[int, int]:
    """Pixels of each label that occurs."""
    if labels.dtype in (np.uint8, np.uint16):
        counts = np.zeros(2**16, np.int64)
        for band in np.array_split(labels, max(1, len(labels) // 512)):  # no copy of the whole as int64
            counts += np.bincount(band.ravel(), minlength=2**16)
        return {label: int(counts[label]) for label in np.flatnonzero(counts).tolist()}
    present, found = np.unique(labels, return_counts=True)
    return dict(zip(present.tolist(), found.tolist(), strict=True))


def pixel_um(grid: Volume) -> float:
    """Side of a pixel in micrometres."""
    return 1000 * math.sqrt(math.prod(grid.space.spacing[1:]))


def open_stack(
    path: Path,
    spacing: tuple[float, float, float] | tuple[()],
    section_axis: str,
    positions: Path | None,
    working_um: float | None,
) -> tuple[Volume, SectionStack | None]:
    """The stack as `read` gives it where it is computed as it is; else a grid without pixels, and its sections.

    Raises
    ------
    ValueError
        As of `read`; also if `working_um` is finer than the images or leaves next to nothing of them.
    """

    def whole() -> Volume:
        return read(path, spacing=spacing or None, section_axis=section_axis, positions=positions)

    lazily = path.is_dir() or path.name.lower().endswith(TIFF_ENDINGS)
    try:
        stack = open_sections(path, spacing=spacing or None, section_axis=section_axis) if lazily else None
    except ValueError:
        stack = None  # read as a whole it is in order, or says what is wrong in words of its own
    volume = whole() if stack is None else blank_volume(stack, bool(spacing))
    if working_um is not None:
        check_working_um(working_um, volume)
    canvas = volume.space.shape[1:]
    if (finest_factor(canvas) if working_um is None else factor_of(working_um, volume)) == 1:
        return (volume if stack is None else whole()), None
    if stack is None:
        blank = np.broadcast_to(np.uint8(0), volume.space.shape)
        return replace(volume, pixels=blank), sections_of(volume)
    return at_positions(volume, positions), stack


def check_working_um(working_um: float, grid: Volume) -> None:
    """Raise `ValueError` for a pixel size that is none, finer than the images', or too coarse for them."""
    own_um = pixel_um(grid)
    if not 0 < working_um < math.inf:
        raise ValueError(f"--working-um: {working_um:g} is no pixel size; give micrometres above 0")
    if working_um < FINER * own_um:
        raise ValueError(
            f"--working-um: {working_um:g} um is finer than the images ({own_um:g} um); give {own_um:g} or more"
        )
    longest = max(grid.space.shape[1:])
    if longest / factor_of(working_um, grid) < min(FEWEST, longest):
        most = own_um * (longest // FEWEST)
        raise ValueError(
            f"--working-um: at {working_um:g} um fewer than {FEWEST} of the sections' {longest} pixels are left; give "
            f"{most:g} or less"
        )


def factor_of(working_um: float, grid: Volume) -> int:
    """Pixels either way that become one, so that these have about `working_um`."""
    return max(1, round(working_um / pixel_um(grid)))


def earlier_working_um(output: Path) -> float | None:
    """Pixel size of a run that is in the folder already: with corrected labels it goes on at the same."""
    try:
        found = read_record(output / "run.json").settings.get("working_um")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, int | float) else None


def reduce_labels(
    labels: LabelStack, stack: SectionStack, grid: Volume, factor: int | None
) -> tuple[SectionLabels, int, dict[int, dict[int, int]]]:
    """Labels at coarser pixels, read one section after the other.

    Parameters
    ----------
    labels : LabelStack
        Labels of some sections.
    stack, grid
        The sections, and their canvas.
    factor : int or None
        Pixels either way that become one; None: chosen by what the structures need, see `chosen_factor`.

    Returns
    -------
    annotations : SectionLabels
        The commonest label of each block of pixels.
    factor : int
    counts : dict of int to dict of int to int
        Pixels of each label at full size, for each labelled section.
    """
    canvas, counts = grid.space.shape[1:], dict[int, dict[int, int]]()

    def reduced(factor: int) -> Iterator[tuple[int, NDArray[np.integer[Any]]]]:
        for z in labels.labelled:
            given = labels[z]
            counts[z] = pixel_counts(given[centre_slices(stack[z].shape, given.shape)])
            yield z, reduced_labels(centre(given, canvas, 0), factor)

    first = factor or finest_factor(canvas)
    sections = dict(reduced(first))
    if factor is None:
        widest: dict[int, float] = {}
        for section in sections.values():
            for label, width in widths(section).items():
                widest[label] = max(width, widest.get(label, 0.0))
        factor = chosen_factor(canvas, first * min(widest.values(), default=math.inf))
        if factor != first:
            sections = dict(reduced(factor))
    space = reduced_space(grid.space, factor)
    small = np.zeros(space.shape, np.result_type(*sections.values()))
    for z, section in sections.items():
        small[z] = section
    present = sorted({label for found in counts.values() for label in found})
    table = default_table(present) if labels.table is None else labels.table
    source = None if grid.source is None else replace(reduced_source(grid.source, factor), path=labels.path)
    return SectionLabels(LabelMap(small, space, table, source), labels.labelled), factor, counts


def read_reduced(
    full: FullSize, store: Store, hashes: Mapping[str, str], report: Callable[[str, int, int], None]
) -> Volume:
    """Read the sections one by one at coarser pixels; those that are in the store already are taken from there.

    Raises
    ------
    ValueError
        If a section is damaged, holds NaN or infinity, or is in colour where the first is grey.
    """
    grid = full.working_grid()
    pixels: NDArray[Any] | None = None
    for z, section in enumerate(full.stack):
        key = content_key("reduced-1", hashes.get(section.name, dict(hashes)), z, full.canvas, full.factor)

        def reduce(z: int = z) -> dict[str, NDArray[Any]]:
            return {"pixels": reduced_section(full.stack[z], full.canvas, full.factor)}

        found = stored(store, f"reduced-{z:04}", key, reduce)["pixels"]
        if pixels is None:
            pixels = np.empty((len(full.stack), *found.shape), found.dtype)
        if found.shape != pixels.shape[1:]:
            kinds = ["grey" if p.ndim == 2 else "RGB" for p in (found, pixels[0])]
            raise ValueError(
                f"read(): section {section.name} of {full.stack.source.path} is {kinds[0]}, but the first is "
                f"{kinds[1]}; export all sections alike"
            )
        pixels[z] = found
        report("reading", z + 1, len(full.stack))
    assert pixels is not None
    return replace(grid, pixels=pixels)


def notes_on_size(full: FullSize, annotations: SectionLabels) -> tuple[str, ...]:
    """What the user should know of the size at which the stack was computed."""
    height, width = reduced_shape(full.canvas, full.factor)
    notes = [
        f"Computed at {full.working_um:g} um, {full.factor} of the images' pixels (sections of {height} x {width}); "
        "labels and areas are those at full size, uncertainty and this report at the size computed."
    ]
    labels = annotations.label_map
    lost = sorted({n for counts in full.counts.values() for n in counts} - set(labels.present))
    if lost:
        names = ", ".join(labels.name_of(n) for n in lost[:5]) + (", ..." if len(lost) > 5 else "")
        notes.append(
            f"Too small to be seen at {full.working_um:g} um and on labelled sections only: {names}; give a smaller "
            "--working-um."
        )
    return tuple(notes)
