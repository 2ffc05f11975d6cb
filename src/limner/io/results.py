"""Write results in the form and geometry of the stack they belong to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

from limner.io.ome_zarr import ome_zarr_version, save_ome_zarr
from limner.io.sections import centre_slices
from limner.io.tiff import OME_TIFF_ENDINGS, save_ome_tiff, save_tiff
from limner.io.volumes import save_volume
from limner.space import Space
from limner.volume import LabelTable, MadeSections, Source, Volume

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
    if source.kind == "folder":  # its sections are written one by one: those of a map are made then
        return _write_folder(_target(folder, stem, source), pixels, like.space, source)
    pixels = np.asarray(pixels)
    target = _target(folder, stem + SINGLE_FILE_ENDINGS.get(source.extension, source.extension), source)
    pixels, space = _in_file_order(pixels, like.space, source)
    if source.kind == "ome-zarr":
        _write_zarr(target, pixels, space, source, table)
    elif source.extension in OME_TIFF_ENDINGS:
        _write_complete(target, lambda path: save_ome_tiff(path, pixels, space.spacing))
    elif source.kind == "tiff":
        _write_complete(target, lambda path: save_tiff(path, pixels, space.spacing))
    else:
        _write_complete(target, lambda path: save_volume(path, pixels, space, source.in_microns))
    return target


def _for_files(pixels: NDArray[Any]) -> NDArray[Any]:
    if pixels.dtype.kind == "f":
        return pixels.astype(np.float32, copy=False)
    lowest, highest = (int(pixels.min()), int(pixels.max())) if pixels.size else (0, 0)
    for dtype in (np.uint8, np.uint16, np.uint32):
        if lowest >= 0 and highest <= np.iinfo(dtype).max:
            return pixels.astype(dtype, copy=False)
    raise ValueError(f"write_result(): pixels range from {lowest} to {highest}; give integers from 0 to 4294967295")


def _target(folder: Path, name: str, source: Source) -> Path:
    target = folder / name
    if target.exists() and source.path.exists() and target.samefile(source.path):
        raise ValueError(f"write_result(): {target} is the stack itself; give another folder")
    return target


def _in_file_order(pixels: NDArray[Any], space: Space, source: Source) -> tuple[NDArray[Any], Space]:
    """Move the section axis back to where the file has it; the inverse of `Content.with_sections_first`."""
    axis = source.section_axis
    order = [1, 2]
    order.insert(axis, 0)
    a, b, c = order
    moved = np.moveaxis(pixels, 0, axis)
    return moved, Space(
        shape=(moved.shape[0], moved.shape[1], moved.shape[2]),
        spacing=(space.spacing[a], space.spacing[b], space.spacing[c]),
        origin=space.origin,
        direction=tuple((row[a], row[b], row[c]) for row in space.direction),
    )


def _write_complete(target: Path, write: Callable[[Path], None]) -> None:
    """Write to a hidden name beside `target` (same ending, for the format hangs on it) and rename when complete."""
    partial = target.with_name(f".partial-{target.name}")
    try:
        write(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _write_zarr(target: Path, pixels: NDArray[Any], space: Space, source: Source, table: LabelTable | None) -> None:
    """Integers are labels, with or without names. An earlier result makes way when the new one is complete."""
    partial, earlier = (target.with_name(f".{word}-{target.name}") for word in ("partial", "earlier"))
    shutil.rmtree(partial, ignore_errors=True)
    labels = (table or {}) if pixels.dtype.kind in "iu" else None
    version = ome_zarr_version(source.path)
    name = target.name.removesuffix(source.extension)
    save_ome_zarr(partial, pixels, space.spacing, space.origin, version=version, table=labels, name=name)
    if target.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        target.replace(earlier)
    partial.replace(target)
    shutil.rmtree(earlier, ignore_errors=True)


def _write_folder(target: Path, pixels: NDArray[Any] | MadeSections, space: Space, source: Source) -> Path:
    """One file a section, cropped to the section's own size."""
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    as_png = pixels.dtype in (np.uint8, np.uint16)
    for name, size, section in zip(source.names, source.sizes, pixels, strict=True):
        own = section[centre_slices(size, section.shape)]
        file = partial / f"{Path(name).stem}{'.png' if as_png else '.tif'}"
        if as_png:
            iio.imwrite(file, own, plugin="pillow")
        else:
            save_tiff(file, own, space.spacing)
    _move_into_place(partial, target)
    return target


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename the folder; where an earlier one stands, replace its files and leave what else lies there."""
    if not target.exists():
        partial.replace(target)
        return
    for file in sorted(partial.iterdir()):
        file.replace(target / file.name)
    partial.rmdir()
