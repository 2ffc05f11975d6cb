"""Write results in the form and geometry of the stack they belong to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from numpy.typing import DTypeLike, NDArray

from limner.io.content import Pages, Triple
from limner.io.freesurfer import FREESURFER_ENDINGS, save_mgh
from limner.io.ome_zarr import ome_zarr_version, save_ome_zarr
from limner.io.section_stack import SectionStack
from limner.io.sections import centre_slices
from limner.io.tiff import OME_TIFF_ENDINGS, save_ome_tiff, save_tiff
from limner.io.volumes import save_volume
from limner.space import Space
from limner.volume import LabelTable, MadeSections, Source, Volume

LABEL_TYPES = (np.uint8, np.uint16, np.uint32)
JPEG = (".jpg", ".jpeg")
# Formats of two files are written as one.
SINGLE_FILE_ENDINGS = {".mhd": ".mha", ".nhdr": ".nrrd"}


def write_result(
    folder: str | Path,
    stem: str,
    pixels: NDArray[Any] | MadeSections,
    like: Volume,
    table: LabelTable | None = None,
) -> Path:
    """Write labels or a map of numbers in the form that a stack was read from.

    Parameters
    ----------
    folder : str or Path
        Where to write; made if missing.
    stem : str
        Name of the result without ending.
    pixels : ndarray or MadeSections
        Shape (Z, Y, X) of `like`. Integers >= 0 are written as the smallest of uint8, uint16 and uint32 that holds
        them, floating point numbers as float32.
    like : Volume
        The stack. From a volume or TIFF comes one file of the same geometry, axes in the file's own order (``.mhd``
        becomes ``.mha``, ``.nhdr`` ``.nrrd``); from OME-Zarr an OME-Zarr of the same version; from a folder comes a
        folder with a PNG for each section (TIFF for numbers and for labels above 65535), of that section's own size;
        from memory comes ``.nii.gz``.
    table : mapping of int to Label, optional
        Names and colours of labels, which OME-Zarr holds itself; other forms have no place for it (`write_table`).

    Returns
    -------
    Path
        The file or folder written. An earlier result of the same name is replaced once the new one is complete.

    Raises
    ------
    ValueError
        If the shape is not the stack's, an integer is negative or above uint32, or the result would replace the stack
        itself.

    Examples
    --------
    >>> import tempfile
    >>> stack = Volume(np.zeros((3, 4, 5)), Space((3, 4, 5), (0.05, 0.01, 0.01)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_result(folder, "labels", np.ones((3, 4, 5), int), stack).name
    'labels.nii.gz'
    """
    folder = Path(folder)
    if pixels.shape != like.space.shape:
        raise ValueError(
            f"write_result(): pixels have shape {pixels.shape}, the stack {like.space.shape} (z, y, x); give both on "
            "one grid"
        )
    source = like.source or Source("volume", Path(), ".nii.gz")
    if not isinstance(pixels, MadeSections):
        pixels = _for_files(pixels)
    folder.mkdir(parents=True, exist_ok=True)
    geometry = _Geometry(like.space.spacing, like.space.origin, like.space.direction)
    if source.kind == "folder":
        own = (s[centre_slices(size, s.shape)] for s, size in zip(pixels, source.sizes, strict=True))
        return _write_folder(_target(folder, stem, source), own, pixels.dtype, geometry.spacing, source)
    if isinstance(pixels, MadeSections):
        pages: NDArray[Any] | Pages = Pages(pixels, pixels.shape, pixels.dtype, source.section_axis)
    else:
        pages = np.moveaxis(pixels, 0, source.section_axis)
    return _write_file(folder, stem, pages, geometry, source, table)


def write_sections(
    folder: str | Path,
    stem: str,
    sections: Iterable[NDArray[Any]] | Callable[[int], NDArray[Any]],
    stack: SectionStack,
    dtype: DTypeLike,
) -> Path:
    """Write a map of numbers or labels section by section, in the form of the stack they belong to.

    One section is in memory at a time; for an OME-Zarr as many as its chunks are deep. The whole result is in memory
    for NIfTI, NRRD, MHA and MGZ, and for a TIFF that is cut along y or x.

    Parameters
    ----------
    folder : str or Path
        Where to write; made if missing.
    stem : str
        Name of the result without ending.
    sections : iterable of ndarray, or callable
        Shape (Y, X) of each section of `stack`, in order; or a function from its index, called once for each.
    stack : SectionStack
        Its form and geometry are those of the result, as of `write_result`: of a folder comes a folder with one file a
        section, of its own size (PNG for labels up to 65535, else TIFF).
    dtype : dtype
        float32 for numbers; uint8, uint16 or uint32 for labels, such as `label_type` gives.

    Returns
    -------
    Path
        The file or folder written. An earlier result of the same name is replaced once the new one is complete; after
        an error nothing is left behind.

    Raises
    ------
    ValueError
        If there are more or fewer sections than the stack has, one has another shape, labels are no integers or do not
        fit `dtype`, or the result would replace the stack itself.

    Examples
    --------
    >>> import tempfile
    >>> import tifffile
    >>> from limner.io.section_stack import open_sections
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tifffile.imwrite(f"{folder}/a.tif", np.zeros((3, 4, 5), np.uint8), photometric="minisblack")
    ...     stack = open_sections(f"{folder}/a.tif")
    ...     path = write_sections(folder, "inverse", (255 - s[:, :] for s in stack), stack, np.uint8)
    ...     path.name, tifffile.imread(path).shape
    ('inverse.tif', (3, 4, 5))
    """
    folder, source, kind = Path(folder), stack.source, np.dtype(dtype)
    if kind not in (np.float32, *LABEL_TYPES):
        raise ValueError(f"write_sections(): dtype is {kind}; give float32, uint8, uint16 or uint32")
    given = map(sections, range(len(stack))) if callable(sections) else iter(sections)
    checked = _checked(given, stack, kind)
    folder.mkdir(parents=True, exist_ok=True)
    if source.kind == "folder":
        return _write_folder(_target(folder, stem, source), checked, kind, stack.spacing, source)
    pages = Pages(checked, (len(stack), *stack[0].shape), kind, source.section_axis)
    return _write_file(folder, stem, pages, _Geometry(stack.spacing, stack.origin, stack.direction), source, None)


def write_images(
    folder: str | Path, stem: str, sections: Iterable[NDArray[Any]], stack: SectionStack, colour: bool
) -> Path:
    """Write images section by section, in the form of a stack and in its type of pixels.

    Parameters
    ----------
    folder, stem
        As of `write_sections`, and so is how much is in memory.
    sections : iterable of ndarray
        Shape (Y, X) of each section of `stack`, in order, or (Y, X, 3) where `colour`.
    stack : SectionStack
        Its form, geometry and type of pixels are those of the result. Of a folder comes a folder with one file a
        section: TIFF where the stack has TIFF, else PNG, but TIFF for what PNG cannot hold.
    colour : bool
        Whether the sections are RGB.

    Returns
    -------
    Path
        The file or folder written, as of `write_sections`.

    Raises
    ------
    ValueError
        If there are more or fewer sections than the stack has, one has another shape or type, or the result would
        replace the stack itself.

    Examples
    --------
    >>> import tempfile
    >>> import tifffile
    >>> from limner.io.section_stack import open_sections
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tifffile.imwrite(f"{folder}/a.tif", np.zeros((3, 4, 5, 3), np.uint8), photometric="rgb")
    ...     stack = open_sections(f"{folder}/a.tif")
    ...     path = write_images(folder, "inverse", (255 - s.pixels() for s in stack), stack, colour=True)
    ...     tifffile.imread(path).shape
    (3, 4, 5, 3)
    """
    folder, source, kind = Path(folder), stack.source, stack[0].dtype
    checked = _images_checked(iter(sections), stack, (3,) * colour)
    folder.mkdir(parents=True, exist_ok=True)
    if source.kind == "folder":
        as_png = kind in ((np.uint8,) if colour else (np.uint8, np.uint16)) and source.extension in (".png", *JPEG)
        return _write_folder(_target(folder, stem, source), checked, kind, stack.spacing, source, as_png)
    pages = Pages(checked, (len(stack), *stack[0].shape, *(3,) * colour), kind, source.section_axis)
    geometry = _Geometry(stack.spacing, stack.origin, stack.direction)
    return _write_file(folder, stem, pages, geometry, source, None, images=True)


def _images_checked(
    given: Iterator[NDArray[Any]], stack: SectionStack, channels: tuple[int, ...]
) -> Iterator[NDArray[Any]]:
    """The sections, as many as the stack has, each of the right shape and type."""
    for own, section in zip(stack, given, strict=True):
        expected = (*own.shape, *channels)
        if section.shape != expected or section.dtype != own.dtype:
            raise ValueError(
                f"write_images(): section {own.name} is {section.dtype} of shape {section.shape}; give {own.dtype} of "
                f"shape {expected}"
            )
        yield section


def label_type(largest: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and uint32 that holds labels up to `largest`.

    Examples
    --------
    >>> label_type(255), label_type(256)
    (dtype('uint8'), dtype('uint16'))
    """
    for dtype in LABEL_TYPES:
        if largest <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise ValueError(f"label_type(): the largest label is {largest}; files hold up to {np.iinfo(np.uint32).max}")


def _checked(given: Iterator[NDArray[Any]], stack: SectionStack, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """The sections in the type of the file, as many as the stack has."""
    for z, own in enumerate(stack):
        section = next(given, None)
        if section is None:
            raise ValueError(f"write_sections(): {z} sections are given, the stack has {len(stack)}; give one each")
        if section.shape != own.shape:
            raise ValueError(
                f"write_sections(): section {own.name} has shape {section.shape}, in the stack {own.shape}; give "
                "both on one grid (y, x)"
            )
        if dtype.kind == "u":
            _check_labels(section, own.name, dtype)
        # Whoever writes takes no more than it needs, so what is too much must show before the last is handed over.
        if z == len(stack) - 1 and next(given, None) is not None:
            raise ValueError(f"write_sections(): more sections are given than the stack's {len(stack)}; give one each")
        yield section.astype(dtype, copy=False)


def _check_labels(section: NDArray[Any], name: str, dtype: np.dtype[Any]) -> None:
    largest = np.iinfo(dtype).max
    if section.dtype.kind not in "bui" or (section.size and not 0 <= section.min() <= section.max() <= largest):
        raise ValueError(
            f"write_sections(): section {name} holds {section.dtype} from {section.min()} to {section.max()}; give "
            f"integers from 0 to {largest}"
        )


@dataclass(frozen=True)
class _Geometry:
    """Where the pixels lie, in memory's order of axes; the spacing is None where nobody stated it."""

    spacing: Triple | None
    origin: Triple
    direction: tuple[Triple, ...]

    def in_file_order(self, section_axis: int) -> _Geometry:
        """With the section axis where the file has it; the inverse of `Content.with_sections_first`."""
        order = [1, 2]
        order.insert(section_axis, 0)
        a, b, c = order
        spacing = None if self.spacing is None else (self.spacing[a], self.spacing[b], self.spacing[c])
        return _Geometry(spacing, self.origin, tuple((row[a], row[b], row[c]) for row in self.direction))


def _write_file(
    folder: Path,
    stem: str,
    pages: NDArray[Any] | Pages,
    geometry: _Geometry,
    source: Source,
    table: LabelTable | None,
    images: bool = False,
) -> Path:
    """One file or OME-Zarr of pixels in the file's own order of axes; integers are labels unless they are `images`."""
    target = _target(folder, stem + SINGLE_FILE_ENDINGS.get(source.extension, source.extension), source)
    placed = geometry.in_file_order(source.section_axis)
    if source.kind == "ome-zarr":
        _write_zarr(target, pages, placed, source, None if images or pages.dtype.kind not in "iu" else table or {})
        return target
    by_page = source.kind == "tiff" and source.section_axis == 0
    pixels = pages if by_page or not isinstance(pages, Pages) else pages.whole()
    if source.extension in OME_TIFF_ENDINGS:
        _write_complete(target, lambda path: save_ome_tiff(path, pixels, placed.spacing))
    elif source.kind == "tiff":
        _write_complete(target, lambda path: save_tiff(path, pixels, placed.spacing, len(pixels.shape) == 4))
    else:
        whole, bare = np.asarray(pixels), placed.spacing is None
        space = Space(
            (len(whole), *whole.shape[1:]), placed.spacing or (1.0, 1.0, 1.0), placed.origin, placed.direction
        )
        if source.extension in FREESURFER_ENDINGS:
            _write_complete(target, lambda path: save_mgh(path, whole, space))
        else:
            _write_complete(target, lambda path: save_volume(path, whole, space, source.in_microns, bare))
    return target


def _for_files(pixels: NDArray[Any]) -> NDArray[Any]:
    if pixels.dtype.kind == "f":
        return pixels.astype(np.float32, copy=False)
    lowest, highest = (int(pixels.min()), int(pixels.max())) if pixels.size else (0, 0)
    if lowest < 0 or highest > np.iinfo(np.uint32).max:
        raise ValueError(f"write_result(): pixels range from {lowest} to {highest}; give integers from 0 to 4294967295")
    return pixels.astype(label_type(highest), copy=False)


def _target(folder: Path, name: str, source: Source) -> Path:
    target = folder / name
    if target.exists() and source.path.exists() and target.samefile(source.path):
        raise ValueError(f"write_result(): {target} is the stack itself; give another folder")
    return target


def _write_complete(target: Path, write: Callable[[Path], None]) -> None:
    """Write to a hidden name beside `target` (same ending, for the format hangs on it) and rename when complete."""
    partial = target.with_name(f".partial-{target.name}")
    try:
        write(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _write_zarr(
    target: Path, pixels: NDArray[Any] | Pages, placed: _Geometry, source: Source, table: LabelTable | None
) -> None:
    """Labels where there is a table, be it empty. An earlier result makes way when the new one is complete."""
    version = ome_zarr_version(source.path)
    name = target.name.removesuffix(source.extension)
    earlier = target.with_name(f".earlier-{target.name}")
    with _partial_folder(target) as partial:
        save_ome_zarr(partial, pixels, placed.spacing, placed.origin, version=version, table=table, name=name)
        if target.exists():
            shutil.rmtree(earlier, ignore_errors=True)
            target.replace(earlier)
        partial.replace(target)
    shutil.rmtree(earlier, ignore_errors=True)


def _write_folder(
    target: Path,
    sections: Iterable[NDArray[Any]],
    dtype: np.dtype[Any],
    spacing: Triple | None,
    source: Source,
    as_png: bool | None = None,
) -> Path:
    """One file a section, of its own size; PNG for what it holds, unless told."""
    as_png = dtype in (np.uint8, np.uint16) if as_png is None else as_png
    with _partial_folder(target) as partial:
        partial.mkdir()
        for name, section in zip(source.names, sections, strict=True):
            file = partial / f"{Path(name).stem}{'.png' if as_png else '.tif'}"
            if as_png:
                iio.imwrite(file, section, plugin="pillow")
            else:
                save_tiff(file, section, spacing, section.ndim == 3)
        _move_into_place(partial, target)
    return target


@contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """A hidden name beside `target` for a folder to be made and renamed; what is left there goes."""
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename the folder; where an earlier one stands, replace its files and leave what else lies there."""
    if not target.exists():
        partial.replace(target)
        return
    files = sorted(partial.iterdir())
    for file in files:
        other = (target / file.name).with_suffix(".tif" if file.suffix == ".png" else ".png")
        if other.exists():
            raise ValueError(
                f"write_result(): {other} would be another {file.name}; move it away, or name another folder"
            )
    for file in files:
        file.replace(target / file.name)
    partial.rmdir()
