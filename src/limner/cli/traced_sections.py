"""Sections and their traced membranes, from whatever form they are kept in."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.cli.arguments import parse_indices
from limner.cli.image_files import hash_stack
from limner.cli.section_labels import Labels, is_folder, labels_of
from limner.io import open_sections
from limner.methods.membranes import TracedSection
from limner.metrics.neurites import cells_of_labels
from limner.run_record import hash_inputs

FEW_VALUES, FLAT = 16, 0.5  # values from which labels are looked at; share of neighbours that are alike in labels


@dataclass(frozen=True)
class Traced:
    """The sections of a stack whose membranes are traced.

    Parameters
    ----------
    stack : tuple of str
        Names of all sections of the stack.
    sections : mapping of str to TracedSection
        Those that are traced, by name.
    values : tuple of int
        Values that occur in their labels.
    of_one_value : tuple of str
        Names of sections whose labels hold one value alone, which traces nothing.
    um_per_px : float
        Pixel size that the images state, micrometres; NaN: none.
    hashes : mapping of str to mapping of str to str
        SHA-256 of every file read, by argument and name.
    """

    stack: tuple[str, ...]
    sections: Mapping[str, TracedSection]
    values: tuple[int, ...]
    of_one_value: tuple[str, ...]
    um_per_px: float
    hashes: Mapping[str, Mapping[str, str]]


def read_traced(images: Path, labels: Path, membrane_is: int = 0, section_axis: str = "z") -> Traced:
    """Read the sections of `images` whose membranes are traced in `labels`.

    Parameters
    ----------
    images : Path
        As of `limner.read`; no spacing is needed.
    labels : Path
        A stack of the same shape; or, for a folder of images, a folder of labels with the same names. Membrane has one
        value; all else is cells: one value for all, or an id each, and a line parts cells of two ids that touch.
    membrane_is : int
        The value of membrane.
    section_axis : {'z', 'y', 'x', 'k', 'j', 'i'}
        Axis along which sections run.

    Raises
    ------
    ValueError
        If a file cannot be read, labels do not fit their image, no section is traced, or none holds membrane.
    """
    stack = open_sections(images, section_axis=section_axis)
    sections, values, of_one_value, files = {}, set[int](), [], []
    for z, file, traced in labels_of(labels, stack):
        files.append(file.name)
        present = np.unique(traced).tolist()
        if len(present) == 1:
            of_one_value.append(stack.names[z])
            continue
        image = stack[z][:, :]
        _check_size(file, traced, stack.names[z], image)
        _check_flat(file, traced, present)
        values.update(present)
        sections[stack.names[z]] = TracedSection(image, membrane_of_labels(traced, membrane_is))
    _check_values(labels, values, membrane_is)
    _, y, x = stack.spacing or (math.nan,) * 3
    hashes = {
        "images": _hashes(images, [*sections, *of_one_value]),
        "labels": _hashes(labels, sorted(set(files))),
    }
    return Traced(stack.names, sections, tuple(sorted(values)), tuple(of_one_value), 1000 * math.sqrt(y * x), hashes)


def membrane_of_labels(labels: Labels, membrane_is: int) -> NDArray[np.bool_]:
    """Where membrane is: pixels of its value, and a line of one pixel where cells of two other values touch.

    Examples
    --------
    >>> membrane_of_labels(np.array([[0, 0, 255, 0]]), membrane_is=255)
    array([[False, False,  True, False]])
    >>> membrane_of_labels(np.array([[4, 4, 7, 7, 0, 7]]), membrane_is=0)
    array([[False,  True, False, False,  True, False]])
    """
    return ~cells_of_labels(np.where(labels == membrane_is, 0, labels.astype(np.int64) + 1))


def _check_size(file: Path, labels: Labels, name: str, image: NDArray[Any]) -> None:
    if labels.shape != image.shape:
        raise ValueError(
            f"LABELS: {file} has size {labels.shape}, its image {name} {image.shape} (y, x); give labels of the "
            "image's size"
        )


def _check_flat(file: Path, labels: Labels, present: Collection[int]) -> None:
    """Labels of cells are flat: an image that is given for them has another value at nearly every pixel."""
    if len(present) > FEW_VALUES and np.mean(labels[:, 1:] == labels[:, :-1]) < FLAT:
        raise ValueError(f"LABELS: {file} looks like an image, with {len(present)} values; give its labels")


def _check_values(path: Path, values: Collection[int], membrane_is: int) -> None:
    """Two values have to name the membrane; cells that each have an id need not leave room between them."""
    if not values:
        raise ValueError(f"LABELS: every section of {path} holds one value alone; trace membranes on one at least")
    if membrane_is not in values and (len(values) == 2 or membrane_is != 0):
        found = " and ".join(map(str, sorted(values))) if len(values) == 2 else f"{len(values)} values"
        raise ValueError(f"--membrane-is: {path} holds {found}, not {membrane_is}; give the value of membrane")


def _hashes(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Of a folder those of the files of these names."""
    return hash_inputs(path, names) if is_folder(path) else hash_stack(path)


def choose_sections(text: str, traced: Traced) -> list[str]:
    """Names of traced sections from names of files, with or without ending, and numbers from 0, separated by commas.

    Raises
    ------
    ValueError
        If one is no section of the stack, or is not traced; the message names `--validation`.
    """
    names = dict.fromkeys(name for part in text.split(",") for name in _named(part.strip(), traced.stack))
    for name in names:
        if name not in traced.sections:
            raise ValueError(f"--validation: section {name} is not traced; name sections that are")
    return list(names)


def _named(part: str, stack: Sequence[str]) -> list[str]:
    """The sections that a number, a range of numbers, or a name means; what looks like a number is one."""
    if re.fullmatch(r"[\d:-]+", part):
        try:
            indices = parse_indices(part)
        except ValueError as error:
            raise ValueError(f"--validation: {error}") from None
        if indices[-1] >= len(stack):
            raise ValueError(f"--validation: there is no section {indices[-1]}; IMAGES holds 0 to {len(stack) - 1}")
        return [stack[z] for z in indices]
    found = [name for name in stack if part in (name, Path(name).stem)]
    if not found:
        raise ValueError(
            f"--validation: {part!r} is no section of IMAGES; give numbers from 0, or names (the first is {stack[0]})"
        )
    return found
