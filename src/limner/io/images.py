"""Read a stack from a folder of sections, a TIFF, an OME-Zarr, or a NIfTI, NRRD, MHA or MGZ volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from limner.io.content import Content, Triple, check_finite
from limner.io.freesurfer import FREESURFER_ENDINGS, load_mgh
from limner.io.ome_zarr import is_ome_zarr, load_ome_zarr
from limner.io.positions import read_positions
from limner.io.sections import list_sections, load_folder
from limner.io.tiff import load_tiff
from limner.io.volumes import VOLUME_ENDINGS, detached_names, load_volume
from limner.space import Space
from limner.volume import Volume

TIFF_ENDINGS = (".tif", ".tiff")
SECTION_AXES = {"z": 0, "y": 1, "x": 2, "k": 0, "j": 1, "i": 2}


def read(
    path: str | Path,
    *,
    spacing: Triple | None = None,
    section_axis: str = "z",
    positions: str | Path | None = None,
) -> Volume:
    """Read a stack of sections.

    Parameters
    ----------
    path : str or Path
        A folder of PNG, TIFF or JPEG sections (natural order), a TIFF or OME-TIFF, an OME-Zarr (0.4 or 0.5), or a
        ``.nii``, ``.nii.gz``, ``.nrrd``, ``.nhdr``, ``.mha``, ``.mhd``, ``.mgz`` or ``.mgh`` file.
    spacing : tuple of float, optional
        Spacing in mm: between sections, then y and x within a section. Overrides what the file states.
    section_axis : {'z', 'y', 'x', 'k', 'j', 'i'}
        Axis of a volume along which the sections run: z, y, x are the axes of SimpleITK's array, k, j, i the same as
        NIfTI names them. That axis comes first in memory.
    positions : str or Path, optional
        Table of section positions in mm, see `read_positions`.

    Returns
    -------
    Volume
        Pixels (Z, Y, X) grey or (Z, Y, X, 3) RGB, values as stored (bool as uint8, float16 as float32, alpha dropped).
        Sections of different sizes are centred on the largest, each padded with the median of its own border.

    Raises
    ------
    ValueError
        If the path is missing, of another format, damaged or without spacing, or holds NaN or infinity.

    Examples
    --------
    >>> import tempfile
    >>> import imagecodecs
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for i in range(3):
    ...         _ = Path(folder, f"s{i}.png").write_bytes(imagecodecs.png_encode(np.zeros((4, 5), np.uint8)))
    ...     read(folder, spacing=(0.05, 0.01, 0.01)).pixels.shape
    (3, 4, 5)
    """
    path = Path(path)
    content = load(path).with_sections_first(axis_number(section_axis, path))
    _check_finite(path, content)
    source = replace(content.source, file_spacing=content.spacing if spacing is None else None)
    volume = Volume(content.pixels, space_of(content, spacing), source)
    return at_positions(volume, positions)


def at_positions(volume: Volume, positions: str | Path | None) -> Volume:
    """The stack with its sections where a table says, see `read_positions`; None: evenly spaced as it is.

    Raises
    ------
    ValueError
        If the table does not fit the stack, or seems not to be in mm.
    """
    if positions is None:
        return volume
    table = read_positions(positions, volume.section_names, volume.space.shape[0])
    _check_unit(Path(positions), table, volume.space.spacing[0])
    return replace(volume, space=volume.space.with_positions(table))


def _check_unit(path: Path, positions: Sequence[float], spacing: float) -> None:
    """Positions in micrometres are the usual mistake: a thousand times what the spacing says."""
    step = float(np.median(np.diff(positions))) if len(positions) > 1 else spacing
    if not 1 / 300 < step / spacing < 300:
        raise ValueError(
            f"read(): the sections in {path} lie {step:g} mm apart, by the spacing {spacing:g} mm; give both in mm"
        )


def load(path: Path, labels: bool = False) -> Content:
    """What `path` holds, its axes as in the file; `labels` keeps palette indices and pads sections with 0."""
    if not path.exists():
        raise ValueError(f"read(): {path} does not exist")
    if is_ome_zarr(path):
        return load_ome_zarr(path, labels)
    if path.is_dir():
        return load_folder(path, labels)
    name = path.name.lower()
    if name.endswith(TIFF_ENDINGS):
        return load_tiff(path, labels)
    # The longest ending that fits, so that .nii.gz is not taken for .gz.
    ending = max((e for e in VOLUME_ENDINGS + FREESURFER_ENDINGS if name.endswith(e)), key=len, default=None)
    if ending is None:
        raise ValueError(
            f"read(): {path} is of no known format; give a folder of PNG, TIFF or JPEG sections, an OME-Zarr, or "
            f"a file ending in {', '.join(TIFF_ENDINGS + VOLUME_ENDINGS + FREESURFER_ENDINGS)}"
        )
    return load_mgh(path, ending) if ending in FREESURFER_ENDINGS else load_volume(path, ending)


def names_read(path: Path) -> tuple[str, ...]:
    """Names of the files that are read for `path`, relative to the folder that it is or lies in.

    Parameters
    ----------
    path : Path
        As of `read`: of a folder its sections alone, of a header with detached pixels these too.

    Examples
    --------
    >>> names_read(Path("stack.tif"))
    ('stack.tif',)
    """
    if path.is_dir():
        return tuple(file.name for file in list_sections(path))
    may_be_detached = path.name.lower().endswith((".mhd", ".mha", ".nhdr", ".nrrd"))
    return (path.name, *(detached_names(path) if may_be_detached else ()))


def axis_number(section_axis: str, path: Path) -> int:
    """Index of a section axis in the file's (z, y, x) array; a folder's sections always run along z."""
    axis = SECTION_AXES.get(section_axis)
    if axis is None:
        raise ValueError(f"read(): section_axis is {section_axis!r}; give one of {', '.join(SECTION_AXES)}")
    if axis != 0 and path.is_dir() and not is_ome_zarr(path):
        raise ValueError(
            f"read(): section_axis is {section_axis!r}, but {path} is a folder of sections; leave section_axis out"
        )
    return axis


def space_of(content: Content, spacing: Triple | None) -> Space:
    """The grid of `content`; a given `spacing` (z, y, x in mm) goes before its own."""
    spacing = spacing if spacing is not None else content.spacing
    if spacing is None:
        raise ValueError(
            f"read(): {content.source.path} has no spacing along z, y and x; give spacing=(z, y, x) in mm "
            "(on the command line --spacing z,y,x)"
        )
    if len(spacing) != 3:
        raise ValueError(f"read(): spacing is {spacing}; give three numbers in mm: z, y, x")
    z, y, x = (float(s) for s in spacing)
    shape = (content.pixels.shape[0], content.pixels.shape[1], content.pixels.shape[2])
    return Space(shape, (z, y, x), content.origin, content.direction)


def _check_finite(path: Path, content: Content) -> None:
    names: Sequence[str | int] = content.source.names or range(len(content.pixels))
    for name, section in zip(names, content.pixels, strict=True):
        check_finite(section, name, path)
