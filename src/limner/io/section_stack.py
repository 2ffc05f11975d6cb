"""A stack of which only the sections, and of these the regions, that are asked for are read.

What bounds the memory: of a TIFF the tiles or strips touched (a page of few pieces is decoded once and kept until
another is asked for), of an OME-Zarr the chunks touched, of a folder the last section decoded. NIfTI, NRRD, MHA and MGZ
files cannot be read in part: they are in memory from the start, and so is a TIFF that is cut along y or x.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.io.content import (
    Content,
    Triple,
    check_finite,
    complete_spacing,
    reading,
    real_pixels,
    type_in_memory,
    without_alpha,
)
from limner.io.images import TIFF_ENDINGS, axis_number, load, space_of
from limner.io.ome_zarr import check_one_image, is_ome_zarr, ome_zarr_source, open_multiscales
from limner.io.sections import centre_slices, check_spacings, list_sections, load_section, section_header
from limner.io.tiff import OpenPages, open_pages, through_palette, tiff_source
from limner.io.tiff_planes import Plane, planes_of, read_plane
from limner.space import IDENTITY
from limner.volume import Source, Volume

# Pages in fewer pieces than this are decoded once and kept: every window would touch most of them.
FEWEST_PIECES = 4

ReadRegion = Callable[[int, int, int, int, int], NDArray[Any]]  # section, y0, y1, x0, x1; (y, x) or (y, x, channels)


@dataclass(frozen=True)
class Section:
    """One section of a stack; indexing it reads and gives grey pixels.

    Parameters
    ----------
    name : str
        File name, or its index in a file of many.
    shape : tuple of int
        (Y, X).
    dtype : dtype
        Of the pixels: as stored, but bool as uint8 and float16 as float32.
    path : Path
        The stack, for messages.
    read : callable
        From y0, y1, x0, x1 to pixels as they are stored, (y, x) or (y, x, channels).
    """

    name: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    path: Path
    read: Callable[[int, int, int, int], NDArray[Any]]

    def __getitem__(self, region: tuple[slice, slice]) -> NDArray[Any]:
        """Pixels (y, x) of two slices, as NumPy cuts them; steps are above 0.

        Raises
        ------
        ValueError
            If the file is damaged, the colours are not grey (three equal channels are), or NaN or infinity is there.
        """
        return self._region(region, self._grey)

    def in_colour(self, region: tuple[slice, slice]) -> NDArray[Any]:
        """As indexing, but colours stay: (y, x), or (y, x, 3) where the section is in colour; alpha is dropped."""
        return self._region(region, lambda pixels: without_alpha(pixels, self.path) if pixels.ndim == 3 else pixels)

    def _region(self, region: tuple[slice, slice], channels: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[Any]:
        both = isinstance(region, tuple) and len(region) == 2 and all(isinstance(s, slice) for s in region)
        if not both or any(s.step is not None and s.step < 1 for s in region):
            raise ValueError(f"Section[]: the index is {region!r}; give two slices, rows and columns, steps above 0")
        (y0, y1, down), (x0, x1, right) = (s.indices(n) for s, n in zip(region, self.shape, strict=True))
        if y1 <= y0 or x1 <= x0:
            return np.zeros((max(y1 - y0, 0), max(x1 - x0, 0)), self.dtype)[::down, ::right]
        pixels = channels(real_pixels(self.read(y0, y1, x0, x1), self.path))[::down, ::right]
        check_finite(pixels, self.name, self.path)
        return pixels

    def pixels(self) -> NDArray[Any]:
        """The whole section, (Y, X), or (Y, X, 3) where it is in colours.

        Raises
        ------
        ValueError
            If the file is damaged, or NaN or infinity is there.
        """
        whole = real_pixels(self.read(0, self.shape[0], 0, self.shape[1]), self.path)
        check_finite(whole, self.name, self.path)
        return without_alpha(whole, self.path) if whole.ndim == 3 else whole

    def _grey(self, pixels: NDArray[Any]) -> NDArray[Any]:
        colours = without_alpha(pixels, self.path) if pixels.ndim == 3 else pixels
        if colours.ndim == 2:
            return colours
        if not (colours[..., :1] == colours).all():
            raise ValueError(
                f"open_sections(): section {self.name} of {self.path} is in colour; export the sections as grey"
            )
        return colours[..., 0]


@dataclass(frozen=True)
class SectionStack:
    """The sections of a stack, none of which is read before it is indexed. Threads may read at the same time.

    Parameters
    ----------
    sections : tuple of Section
        In order; those of a folder may differ in size.
    source : Source
        The form of the file or folder, in which `write_sections` writes results.
    spacing : tuple of float or None
        Along z, y, x in mm; None where neither the file nor the user states all three.
    origin : tuple of float
        Physical position of the first pixel in mm, LPS, order z, y, x.
    direction : tuple of tuple of float
        As of `Space`.
    """

    sections: tuple[Section, ...]
    source: Source
    spacing: Triple | None
    origin: Triple = (0.0, 0.0, 0.0)
    direction: tuple[Triple, ...] = IDENTITY

    def __post_init__(self) -> None:
        if self.spacing is not None and not all(np.isfinite(s) and s > 0 for s in self.spacing):
            raise ValueError(
                f"open_sections(): {self.source.path} has spacing {self.spacing}; give spacing=(z, y, x) in mm, all "
                "above 0"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """File names of a folder's sections; else "0", "1", ..."""
        return tuple(section.name for section in self.sections)

    def __len__(self) -> int:
        return len(self.sections)

    def __getitem__(self, z: int) -> Section:
        return self.sections[z]

    def __iter__(self) -> Iterator[Section]:
        return iter(self.sections)


def open_sections(
    path: str | Path, *, spacing: Triple | None = None, section_axis: str = "z", labels: bool = False
) -> SectionStack:
    """Open a stack to read it section by section and window by window.

    Parameters
    ----------
    path : str or Path
        As of `read`: a folder of PNG, TIFF or JPEG sections, a TIFF or OME-TIFF, an OME-Zarr, or a NIfTI, NRRD or MHA
        file.
    spacing : tuple of float, optional
        Spacing (z, y, x) in mm, goes before what the file states. It may be unknown.
    section_axis : {'z', 'y', 'x', 'k', 'j', 'i'}
        As of `read`.
    labels : bool
        Keep palette indices of a file, which otherwise become colours.

    Returns
    -------
    SectionStack
        Grey, or in colour where asked for with `Section.in_colour`; `read` would give the same pixels, but centres a
        folder's sections on one canvas.

    Raises
    ------
    ValueError
        If the path is missing or of another format, headers are damaged, or the sections of a folder differ in type or
        spacing. What only the pixels tell is raised when they are read: damage, colours, NaN and infinity.

    Examples
    --------
    >>> import tempfile
    >>> import imagecodecs
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for i in range(3):
    ...         pixels = np.full((4, 5 + i), i, np.uint8)
    ...         _ = Path(folder, f"s{i}.png").write_bytes(imagecodecs.png_encode(pixels))
    ...     stack = open_sections(folder)
    ...     stack.names[1], stack[1].shape, int(stack[1][2:4, :3].max())
    ('s1.png', (4, 6), 1)
    """
    path = Path(path)
    axis = axis_number(section_axis, path)
    if spacing is not None and len(spacing) != 3:
        raise ValueError(f"open_sections(): spacing is {spacing}; give three numbers in mm: z, y, x")
    stack = _open(path, axis, labels)
    return stack if spacing is None else replace(stack, spacing=spacing)


def _open(path: Path, axis: int, labels: bool) -> SectionStack:
    if path.is_dir() and is_ome_zarr(path):
        return _of_ome_zarr(path, axis)
    if path.is_dir():
        return _of_folder(path)
    if path.name.lower().endswith(TIFF_ENDINGS) and path.exists() and axis == 0:
        found = _of_tiff(path, labels)
        if found is not None:
            return found
    return _of_content(load(path, labels).with_sections_first(axis))


def sections_of(volume: Volume) -> SectionStack:
    """The sections of a stack that is in memory; those of a folder at their own sizes, cut out of the canvas."""
    space, source = volume.space, volume.source or Source("volume", Path(), ".nii.gz")
    stack = _of_content(Content(volume.pixels, space.spacing, source, space.origin, space.direction))
    if not source.sizes:
        return stack

    def read(z: int, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        return volume.pixels[z][centre_slices(source.sizes[z], space.shape[1:])][y0:y1, x0:x1].copy()

    return replace(stack, sections=_sections(read, source.sizes, volume.pixels.dtype, source))


def blank_volume(stack: SectionStack, spacing_given: bool = False) -> Volume:
    """The grid and form of a stack, as `read` would give them, around pixels that are all 0 and take no memory.

    Parameters
    ----------
    stack : SectionStack
        Sections of different sizes lie on a canvas of the largest.
    spacing_given : bool
        Whether the user gave the spacing, so that what the file states says nothing.

    Raises
    ------
    ValueError
        If there is no spacing.
    """
    canvas = max(s.shape[0] for s in stack), max(s.shape[1] for s in stack)
    pixels = np.broadcast_to(np.uint8(0), (len(stack), *canvas))
    space = space_of(Content(pixels, stack.spacing, stack.source, stack.origin, stack.direction), None)
    return Volume(pixels, space, replace(stack.source, file_spacing=None if spacing_given else stack.spacing))


class _LastDecoded:
    """Decodes whole sections, and keeps the last one for the windows that follow; threads wait for one another."""

    def __init__(self, decode: Callable[[int], NDArray[Any]]) -> None:
        self._decode, self._lock = decode, threading.Lock()
        self._kept: tuple[int, NDArray[Any]] | None = None

    def __call__(self, z: int, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        with self._lock:
            if self._kept is None or self._kept[0] != z:
                self._kept = None  # never two in memory
                self._kept = (z, self._decode(z))
            return self._kept[1][y0:y1, x0:x1].copy()


def _of_folder(folder: Path) -> SectionStack:
    files = list_sections(folder)
    headers = [section_header(file) for file in files]
    for file, header in zip(files, headers, strict=True):
        if header.dtype != headers[0].dtype:
            raise ValueError(
                f"open_sections(): {file} is {header.dtype}, but {files[0].name} is {headers[0].dtype}; export all "
                "sections alike"
            )
    spacings = [header.spacing for header in headers]
    check_spacings(files, spacings)
    sizes = tuple(header.shape for header in headers)
    source = Source("folder", folder, files[0].suffix.lower(), names=tuple(f.name for f in files), sizes=sizes)
    read = _LastDecoded(lambda z: load_section(files[z])[0])
    sections = _sections(read, sizes, headers[0].dtype, source)
    return SectionStack(sections, source, complete_spacing(spacings[0], len(files)))


def _sections(
    read: ReadRegion, shapes: tuple[tuple[int, int], ...], dtype: np.dtype[Any], source: Source
) -> tuple[Section, ...]:
    names = source.names or [str(z) for z in range(len(shapes))]
    parts = zip(names, shapes, strict=True)
    return tuple(Section(name, shape, dtype, source.path, partial(read, z)) for z, (name, shape) in enumerate(parts))


def _of_tiff(path: Path, labels: bool) -> SectionStack | None:
    """None where the pages are not laid out as sections, and the file must be read as a whole."""
    with open_pages(path, labels) as pages:
        with reading(path):
            planes = _planes_of_sections(path, pages)
        if planes is None:
            return None
        palette, spacing, dtype = pages.palette, pages.spacing, pages.dtype_in_memory(path)

    def read(z: int, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        with reading(path):
            parts = [read_plane(plane, (y0, y1, x0, x1)) for plane in planes[z]]
        pixels = np.concatenate(parts, axis=-1)
        return pixels if palette is None else through_palette(pixels[..., 0], palette)

    first = planes[0][0]
    whole = _LastDecoded(lambda z: read(z, 0, first.size[0], 0, first.size[1]))
    sections = _sections(
        whole if _in_few_pieces(first) else read, (first.size,) * len(planes), dtype, tiff_source(path)
    )
    return SectionStack(sections, tiff_source(path), complete_spacing(spacing, len(planes)))


def _planes_of_sections(path: Path, pages: OpenPages) -> list[list[Plane]] | None:
    """The pages of each section: one, or one a channel."""
    page = pages.series[0].keyframe
    within = len(pages.axes) - len(page.shape)
    if page.axes not in ("YX", "YXS", "SYX") or pages.shape[within:] != page.shape:
        return None
    of_series = [planes_of(path, series) for series in pages.series]
    planes = [plane for found in of_series for plane in found or []]
    if None in of_series:
        return None
    numbers = np.arange(len(planes)).reshape(pages.shape[:within])
    leading = pages.axes[:within]
    numbers = np.moveaxis(numbers, leading.index("Z"), 0) if "Z" in leading else numbers[np.newaxis]
    return [[planes[i] for i in row] for row in numbers.reshape(len(numbers), -1)]


def _in_few_pieces(plane: Plane) -> bool:
    return plane.tile[0] * plane.tile[1] * FEWEST_PIECES > plane.size[0] * plane.size[1]


def _of_ome_zarr(path: Path, axis: int) -> SectionStack:
    opened = open_multiscales(path)
    check_one_image(path, opened)
    array, lengths = opened.arrays[0], opened.lengths
    colour = lengths.get("c", 1) == 3
    along, down, right = [a for a in "zyx" if a == "zyx"[axis]] + [a for a in "zyx" if a != "zyx"[axis]]

    def read(z: int, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        wanted: dict[str, int | slice] = {
            along: z,
            down: slice(y0, y1),
            right: slice(x0, x1),
            "c": slice(None) if colour else 0,
        }
        with reading(path):
            pixels = np.asarray(array[tuple(wanted.get(a, 0) for a in opened.axes)])
        kept = [a for a in opened.axes if isinstance(wanted.get(a), slice)]
        pixels = pixels.transpose([kept.index(a) for a in (down, right, "c") if a in kept])
        return pixels.reshape(y1 - y0, x1 - x0, *pixels.shape[-1:] * colour)  # one section may have no z

    shape, n = (lengths.get(down, 1), lengths.get(right, 1)), lengths.get(along, 1)
    spacing = complete_spacing(opened.spacings[0], lengths.get("z", 1))
    content = Content(np.empty(0), spacing, ome_zarr_source(path), opened.origin).with_geometry_first(axis)
    sections = _sections(read, (shape,) * n, type_in_memory(array.dtype, path), content.source)
    return SectionStack(sections, content.source, content.spacing, content.origin, content.direction)


def _of_content(content: Content) -> SectionStack:
    """Sections of a file that is read as a whole."""
    pixels = content.pixels

    def read(z: int, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        return pixels[z, y0:y1, x0:x1].copy()

    shape = (pixels.shape[1], pixels.shape[2])
    sections = _sections(read, (shape,) * len(pixels), pixels.dtype, content.source)
    return SectionStack(sections, content.source, content.spacing, content.origin, content.direction)
