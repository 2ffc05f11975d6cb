"""Labels of some sections of a stack, of which one section is read at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.io.content import Content
from limner.io.geojson_sections import holds_geojson, open_geojson
from limner.io.labels import (
    as_labels,
    axis_of,
    check_geometry,
    check_have_files,
    load_label_section,
    match_files,
    own_table,
    table_of,
)
from limner.io.ome_zarr import is_ome_zarr
from limner.io.section_stack import Section, SectionStack, open_sections
from limner.io.sections import list_sections
from limner.volume import LabelTable, Volume

ReadSection = Callable[[], NDArray[np.integer[Any]]]


@dataclass(frozen=True)
class LabelStack:
    """The labelled sections of a stack, none of which is in memory; indexing reads one.

    Parameters
    ----------
    path : Path
        The file or folder.
    sections : mapping of int to callable
        What reads the labels (Y, X) of each labelled section, at the section's own size.
    table : mapping of int to Label or None
        Names and colours that the user gave or, without these, that the file holds; None: there are none.
    """

    path: Path
    sections: Mapping[int, ReadSection]
    table: LabelTable | None

    @property
    def labelled(self) -> tuple[int, ...]:
        """Indices of the labelled sections, increasing."""
        return tuple(sorted(self.sections))

    def __getitem__(self, z: int) -> NDArray[np.integer[Any]]:
        return self.sections[z]()


def open_labels(
    path: str | Path,
    like: Volume,
    *,
    labelled: Sequence[int] | None = None,
    table: LabelTable | str | Path | None = None,
) -> LabelStack:
    """Open the labels of a stack too large to be read at once.

    Parameters
    ----------
    path : str or Path
        As of `read_labels`.
    like : Volume
        The stack; its grid and form are looked at alone, see `limner.io.section_stack.blank_volume`.
    labelled : sequence of int, optional
        As of `read_labels`; of a file without it every section is read once, to see which hold a label.
    table : mapping of int to Label, str or Path, optional
        As of `read_labels`.

    Returns
    -------
    LabelStack

    Raises
    ------
    ValueError
        As of `read_labels`; what only the pixels tell is raised when they are read.

    Examples
    --------
    >>> import tempfile
    >>> import tifffile
    >>> from limner.space import Space
    >>> stack = Volume(np.zeros((3, 4, 5)), Space((3, 4, 5), (0.05, 0.01, 0.01)))
    >>> labels = np.zeros((3, 4, 5), np.uint8)
    >>> labels[2, 1:3] = 7
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tifffile.imwrite(f"{folder}/labels.tif", labels, photometric="minisblack")
    ...     opened = open_labels(f"{folder}/labels.tif", stack)
    ...     opened.labelled, int(opened[2].max())
    ((2,), 7)
    """
    path, given = Path(path), table_of(table)
    if holds_geojson(path):
        sections, given = open_geojson(path, like, given)
        check_have_files(path, like, labelled, tuple(sections))
    elif path.is_dir() and not is_ome_zarr(path):
        sections = _of_folder(path, like)
        check_have_files(path, like, labelled, tuple(sections))
    else:
        sections = _of_file(path, like)
        labelled = [z for z, read in sections.items() if read().any()] if labelled is None else labelled
        given = own_table(path) or None if given is None else given
    wanted = sorted(set(sections if labelled is None else labelled))
    if not wanted:
        raise ValueError(
            f"read_labels(): {path} labels no section; label at least one, or name those meant as labelled"
        )
    outside = [z for z in wanted if z not in sections]
    if outside:
        raise ValueError(
            f"SectionLabels(): section {outside[0]} is named as labelled, but the stack has sections 0 to "
            f"{like.space.shape[0] - 1}"
        )
    return LabelStack(path, {z: sections[z] for z in wanted}, given)


def _of_folder(folder: Path, like: Volume) -> dict[int, ReadSection]:
    source = like.source
    if source is None or source.kind != "folder":
        raise ValueError(
            f"read_labels(): {folder} is a folder, but the stack is one file; give the labels as one file of its shape"
        )
    files = match_files(list_sections(folder), folder, source)
    return {z: partial(load_label_section, file, source, z) for z, file in files.items()}


def label_sections(stack: SectionStack) -> dict[int, ReadSection]:
    """What reads the labels of each section of a file that was opened for its labels."""
    return {z: partial(_section_of_file, section) for z, section in enumerate(stack)}


def _of_file(path: Path, like: Volume) -> dict[int, ReadSection]:
    stack = open_sections(path, section_axis="zyx"[axis_of(like)], labels=True)
    shape = (len(stack), *stack[0].shape)
    if shape != like.space.shape or any(section.shape != stack[0].shape for section in stack):
        raise ValueError(
            f"read_labels(): {path} has shape {shape}, the stack {like.space.shape} (z, y, x); give labels on the "
            "stack's own grid"
        )
    check_geometry(path, Content(np.empty(0), stack.spacing, stack.source, stack.origin, stack.direction), like)
    return label_sections(stack)


def _section_of_file(section: Section) -> NDArray[np.integer[Any]]:
    whole = slice(None)
    return as_labels(section.in_colour((whole, whole))[np.newaxis], section.path)[0]
