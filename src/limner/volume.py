"""Pixels and labels on a grid, and the form of the file they came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from limner.space import Space


@dataclass(frozen=True)
class Source:
    """The form a volume was read from, so that results can be written back in the same form.

    Parameters
    ----------
    kind : {'volume', 'tiff', 'folder', 'ome-zarr'}
        One file with geometry (NIfTI, NRRD, MHA, MGZ), one multi-page TIFF, a folder of section images, or an OME-Zarr.
    path : Path
        The file or folder.
    extension : str
        Lower-case ending with its dot, ``.nii.gz`` in full; for a folder that of its sections.
    section_axis : {0, 1, 2}
        Axis of the file's own (z, y, x) array along which the sections run; in memory it is always axis 0.
    names : tuple of str
        File name of each section, for a folder; else empty.
    sizes : tuple of (int, int)
        Each section's own (y, x) size before it was centred on the common canvas, for a folder; else empty.
    file_spacing : tuple of float, optional
        Spacing (z, y, x in memory) in mm that the file itself states; None where it states none or the user gave
        another.
    in_microns : bool
        The file states its geometry in micrometres (NRRD); results do too.
    """

    kind: Literal["volume", "tiff", "folder", "ome-zarr"]
    path: Path
    extension: str
    section_axis: int = 0
    names: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    file_spacing: tuple[float, float, float] | None = None
    in_microns: bool = False


@dataclass(frozen=True)
class Volume:
    """Pixels on a grid.

    Parameters
    ----------
    pixels : ndarray
        Shape (Z, Y, X) for grey, (Z, Y, X, 3) for RGB; any real dtype.
    space : Space
        Its shape is (Z, Y, X).
    source : Source, optional
        The file it came from; None for a volume made in memory.
    """

    pixels: NDArray[Any]
    space: Space
    source: Source | None = None

    def __post_init__(self) -> None:
        grey = self.pixels.ndim == 3
        if not grey and not (self.pixels.ndim == 4 and self.pixels.shape[3] == 3):
            raise ValueError(
                f"Volume(): pixels have shape {self.pixels.shape}; give (z, y, x) for grey or (z, y, x, 3) for RGB"
            )
        if self.pixels.shape[:3] != self.space.shape:
            raise ValueError(f"Volume(): pixels have shape {self.pixels.shape[:3]}, the space {self.space.shape}")

    @property
    def section_names(self) -> tuple[str, ...]:
        """A name for each section: its file name, or its index where the volume is one file."""
        if self.source is not None and self.source.names:
            return self.source.names
        return tuple(str(i) for i in range(self.space.shape[0]))


@dataclass(frozen=True)
class MadeSections:
    """Numbers on a grid whose sections are made each time they are asked for: maps too large to be kept.

    Parameters
    ----------
    shape : tuple of int
        (Z, Y, X).
    make : callable
        From a section's index to its numbers, float32, shape (Y, X).

    Examples
    --------
    >>> steps = MadeSections((3, 1, 2), lambda z: np.full((1, 2), z, np.float32))
    >>> steps[2], np.asarray(steps).shape
    (array([[2., 2.]], dtype=float32), (3, 1, 2))
    """

    shape: tuple[int, int, int]
    make: Callable[[int], NDArray[np.float32]]
    dtype: ClassVar = np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, z: int) -> NDArray[np.float32]:
        if not 0 <= z < len(self):
            raise IndexError(f"MadeSections: section {z} is asked for; there are 0 to {len(self) - 1}")
        return self.make(z)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return map(self.make, range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("MadeSections: an array of it is always a copy; do not ask for copy=False")
        whole = np.empty(self.shape, dtype or self.dtype)
        for z, section in enumerate(self):
            whole[z] = section
        return whole


Sections: TypeAlias = NDArray[np.floating[Any]] | MadeSections


@dataclass(frozen=True)
class Label:
    """One row of a label table: a structure's name and its colour (red, green, blue; 0 to 255)."""

    name: str
    colour: tuple[int, int, int]


LabelTable = Mapping[int, Label]


@dataclass(frozen=True)
class LabelMap:
    """Labels on a grid, with the names of what they stand for.

    Parameters
    ----------
    labels : ndarray of int
        Shape (Z, Y, X), values >= 0; 0 is background.
    space : Space
        Its shape is (Z, Y, X).
    table : mapping of int to Label
        Names and colours; may lack labels that occur and hold labels that do not.
    source : Source, optional
        The file it came from.
    """

    labels: NDArray[np.integer[Any]]
    space: Space
    table: LabelTable = field(default_factory=dict)
    source: Source | None = None

    def __post_init__(self) -> None:
        if not np.issubdtype(self.labels.dtype, np.integer):
            raise ValueError(f"LabelMap(): labels have dtype {self.labels.dtype}; labels must be integers")
        if self.labels.shape != self.space.shape:
            raise ValueError(f"LabelMap(): labels have shape {self.labels.shape}, the space {self.space.shape}")

    @cached_property
    def present(self) -> tuple[int, ...]:
        """Labels that occur, increasing, background among them."""
        if self.labels.dtype not in (np.uint8, np.uint16):
            return tuple(sorted({label for section in self.labels for label in np.unique(section).tolist()}))
        seen = np.zeros(2**16, bool)  # several times as fast, and no copy of a section
        for section in self.labels:
            seen[section] = True
        return tuple(np.flatnonzero(seen).tolist())

    def name_of(self, label: int) -> str:
        """The structure's name, or ``label N`` where the table has none."""
        return self.table[label].name if label in self.table else f"label {label}"
