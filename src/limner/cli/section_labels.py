"""Labels of the sections of a stack, one after another, from whatever form they are kept in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.io import SectionStack, read_label_image, read_labels
from limner.io.ome_zarr import is_ome_zarr
from limner.io.sections import list_sections
from limner.space import Space
from limner.volume import Volume

ANY_SPACING = (1.0, 1.0, 1.0)  # in mm, where the images state none
Labels = NDArray[np.integer[Any]]


def is_folder(path: Path) -> bool:
    """Whether a path is a folder of sections."""
    return path.is_dir() and not is_ome_zarr(path)


def labels_of(path: Path, stack: SectionStack) -> Iterator[tuple[int, Path, Labels]]:
    """Of every section that has labels its index, the file of its labels, and these, shape (Y, X).

    Of a folder of files one section is in memory at a time; every section of a file counts as labelled.

    Raises
    ------
    ValueError
        If a file cannot be read or is named like no section, or a stack of labels has another shape.
    """
    if is_folder(path) and stack.source.kind == "folder":
        yield from ((z, file, read_label_image(file)) for z, file in label_files(path, stack))
        return
    shape = (len(stack), *stack[0].shape)
    space = Space(shape, stack.spacing or ANY_SPACING, stack.origin, stack.direction)
    source = replace(stack.source, file_spacing=stack.spacing)
    like = Volume(np.broadcast_to(np.uint8(0), shape), space, source)  # no pixel of it is looked at
    found = read_labels(path, like, labelled=range(len(stack))).label_map.labels
    yield from ((z, path, labels) for z, labels in enumerate(found))


def label_files(folder: Path, stack: SectionStack) -> Iterator[tuple[int, Path]]:
    """Index and file of every section of a folder that has labels in another, under the name of its image.

    Raises
    ------
    ValueError
        If a file is named like no section.
    """
    index_of = {Path(name).stem: z for z, name in enumerate(stack.names)}
    for file in list_sections(folder):
        if file.stem not in index_of:
            raise ValueError(
                f"LABELS: {file} is named like no section of {stack.source.path}; name each label file like its image "
                f"(the first is {stack.names[0]})"
            )
        yield index_of[file.stem], file
