"""What the reports of a stack's sections share: the grid they stand on, structures and their colours, packed layers.

Their templates extend ``sections.html.j2``, the viewer; a page knows a structure by its place in a list of structures.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from limner.report.section_pixels import (
    HUNDREDTHS,
    grey_range,
    nearest,
    pack_hundredths,
    pack_image,
    pack_labels,
    surround_colour,
)
from limner.volume import LabelMap, Sections, Volume

COLOUR_MAP = "inferno"  # perceptually uniform: equal steps of uncertainty look equal
MOST_STRUCTURES = 65535  # a page numbers them in 16 bit


@dataclass(frozen=True)
class Structure:
    """A label, its name and its colour as ``#rrggbb``."""

    label: int
    name: str
    colour: str


def check_sections(
    caller: str,
    images: Volume,
    uncertainty: Sections,
    grids: Mapping[str, tuple[int, ...]],
    named: Mapping[str, Iterable[int]],
) -> None:
    """Refuse what does not stand on the grid of the images.

    Parameters
    ----------
    caller : str
        What is checked, named in the error.
    images : Volume
        The sections.
    uncertainty : ndarray of float
        Shape (Z, Y, X), in [0, 1].
    grids : mapping of str to tuple of int
        Shapes (Z, Y, X) by the name of what has them.
    named : mapping of str to iterable of int
        Sections by the name of what names them.

    Raises
    ------
    ValueError
        If shapes differ, uncertainty leaves [0, 1], or a section outside the stack is named.
    """
    shape = images.space.shape
    for name, found in {**grids, "uncertainty": uncertainty.shape}.items():
        if found != shape:
            raise ValueError(f"{caller}: {name} have shape {found}, images {shape} (z, y, x); give one grid")
    if not all(section.min() >= 0 and section.max() <= 1 for section in uncertainty):  # also catches NaN
        raise ValueError(f"{caller}: uncertainty has values outside 0 to 1, or not numbers; it is a chance")
    for name, sections in named.items():
        outside = [z for z in sections if not 0 <= z < shape[0]]
        if outside:
            raise ValueError(
                f"{caller}: {name} name section {outside[0]}, but the stack has sections 0 to {shape[0] - 1}"
            )


def structures_of(maps: Sequence[LabelMap], more: Iterable[int] = ()) -> list[Structure]:
    """Background and every label that occurs, in order.

    Parameters
    ----------
    maps : sequence of LabelMap
        At least one; names and colours are those of the first that has them.
    more : iterable of int
        Labels to list even where they do not occur.

    Examples
    --------
    >>> from limner.space import Space
    >>> from limner.volume import Label
    >>> labels = LabelMap(np.array([[[0, 7, 7]]]), Space((1, 1, 3), (1.0, 1.0, 1.0)), {7: Label("Heart", (255, 0, 0))})
    >>> [(s.label, s.name, s.colour) for s in structures_of([labels])]
    [(0, 'background', '#808080'), (7, 'Heart', '#ff0000')]
    """
    present = {label for one in maps for label in one.present}
    return [Structure(0, "background", "#808080")] + [
        _structure(label, maps) for label in sorted((present | set(more)) - {0})
    ]


def check_structures(caller: str, structures: Sequence[Structure], most: int = MOST_STRUCTURES) -> None:
    """Raise ValueError, in the name of `caller`, where there are more than `most` structures besides background."""
    if len(structures) - 1 > most:
        raise ValueError(f"{caller}: {len(structures) - 1} structures; a report holds {most} at most")


def viewer_data(images: Volume, structures: Sequence[Structure], size: tuple[int, int]) -> dict[str, Any]:
    """What the viewer's script needs of the stack as a whole.

    Parameters
    ----------
    images : Volume
        The sections.
    structures : sequence of Structure
        As the page numbers them.
    size : tuple of int
        (y, x) pixels at which sections are kept.
    """
    space, pixels = images.space, images.pixels
    return {
        "structures": [{"name": s.name, "colour": s.colour} for s in structures],
        "size": size,
        "pixelSize": [space.spacing[1] * space.shape[1] / size[0], space.spacing[2] * space.shape[2] / size[1]],
        "surround": surround_colour(pixels, grey_range(pixels)),
        "mappedColours": mapped_colours(),
    }


def mapped_colours() -> list[list[int]]:
    """Red, green and blue, 0 to 255, of each hundredth from 0 to 1.

    Examples
    --------
    >>> len(mapped_colours()), mapped_colours()[0]
    (101, [0, 0, 3])
    """
    colours = matplotlib.colormaps[COLOUR_MAP](np.linspace(0, 1, HUNDREDTHS + 1), bytes=True)
    return colours[:, :3].tolist()


def section_data(images: Volume, z: int, uncertainty: float) -> dict[str, Any]:
    """What the viewer's script needs of section `z`: its file name or '', position in mm and mean uncertainty."""
    return {
        "name": images.section_names[z] if images.source is not None else "",
        "position": round(float(images.space.section_positions[z]), 6),
        "uncertainty": round(uncertainty, 5),
    }


def packed_sections(
    images: Volume,
    structures: Sequence[Structure],
    uncertainty: Sections,
    layers: Mapping[str, NDArray[np.integer[Any]]],
    size: tuple[int, int],
) -> Iterator[dict[str, str]]:
    """Each section's layers as text; one at a time, so that no more than one is held in memory.

    Parameters
    ----------
    images : Volume
        The sections.
    structures : sequence of Structure
        Hold every label of `layers`, in increasing order.
    uncertainty : ndarray of float
        Shape (Z, Y, X), in [0, 1].
    layers : mapping of str to ndarray of int
        Labels, shape (Z, Y, X), by the name under which the page finds them.
    size : tuple of int
        (y, x) pixels at which sections are kept.

    Yields
    ------
    dict of str to str
        ``image``, ``uncertainty`` and the layers of one section, packed as `limner.report.section_pixels` does.
    """
    grey = grey_range(images.pixels)
    known = np.array([s.label for s in structures])
    for z, section in enumerate(images.pixels):
        numbered = {name: np.searchsorted(known, nearest(labels[z], size)) for name, labels in layers.items()}
        yield {
            "image": pack_image(section, grey, size),
            "uncertainty": pack_hundredths(uncertainty[z], size),
            **{name: pack_labels(numbers, size) for name, numbers in numbered.items()},
        }


def finite(value: float | None) -> float | None:
    """The number, or None where there is none or it is not finite: JSON lacks NaN."""
    return None if value is None or not np.isfinite(value) else float(value)


def _structure(label: int, maps: Sequence[LabelMap]) -> Structure:
    for one in maps:
        if label in one.table:
            red, green, blue = one.table[label].colour
            return Structure(label, one.table[label].name, f"#{red:02x}{green:02x}{blue:02x}")
    hue = label * 0.61803398875 % 1  # the golden section keeps the hues of neighbouring labels apart
    rgb = colorsys.hls_to_rgb(hue, 0.6, 0.65)
    return Structure(label, maps[0].name_of(label), "#" + "".join(f"{round(255 * part):02x}" for part in rgb))
