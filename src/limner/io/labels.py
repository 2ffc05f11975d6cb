"""Read labels: those of some sections of a stack (`read_labels`), of every section (`read_label_volume`), or of one
image (`read_label_image`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.annotations import SectionLabels
from limner.io.content import Content, Triple
from limner.io.geojson_sections import holds_geojson, labels_from_geojson
from limner.io.images import TIFF_ENDINGS, axis_number, load, space_of
from limner.io.label_tables import default_table, read_table
from limner.io.ome_zarr import is_ome_zarr, ome_zarr_table
from limner.io.sections import SECTION_ENDINGS, centre, list_sections, load_section
from limner.volume import LabelMap, LabelTable, Source, Volume

LABEL_TYPES = (np.uint8, np.uint16, np.int32)


def read_labels(
    path: str | Path,
    like: Volume | LabelMap,
    *,
    labelled: Sequence[int] | None = None,
    section_axis: str | None = None,
    table: LabelTable | str | Path | None = None,
) -> SectionLabels:
    """Read the labels of a stack of which some sections are labelled.

    Parameters
    ----------
    path : str or Path
        A volume, TIFF or OME-Zarr of the stack's shape; or, for a stack read from a folder, a folder that holds the
        labelled sections alone, each named like its image (``s001.png`` for ``s001.jpg``) and of its size, or as QuPath
        GeoJSON (``s001.geojson`` or ``s001.jpg.geojson``, ``.gz`` or not). A single GeoJSON will do for a stack of one
        section.
    like : Volume or LabelMap
        The stack that the labels belong to.
    labelled : sequence of int, optional
        Indices of the labelled sections. Else those with a file, even if all background; in a volume, those that hold
        any label.
    section_axis : {'z', 'y', 'x', 'k', 'j', 'i'}, optional
        As of `read`; else that of `like`.
    table : mapping of int to Label, str or Path, optional
        Names and colours, or the file that holds them; else names ``label N`` and colours of `default_table`. The
        classes of GeoJSON get the labels that the table gives to their names; without a table 1, 2, ... in the order
        of the alphabet.

    Returns
    -------
    SectionLabels
        Labels (Z, Y, X) in the smallest of uint8, uint16 and int32 that holds them, on the grid of `like`. Palette
        images give their indices.

    Raises
    ------
    ValueError
        If a file is damaged, its labels are no integers >= 0, its shape or spacing is not the stack's, its name is no
        section's, a section named in `labelled` has no file, or no section is labelled.

    Examples
    --------
    >>> import tempfile
    >>> import tifffile
    >>> from limner.space import Space
    >>> stack = Volume(np.zeros((3, 4, 5)), Space((3, 4, 5), (0.05, 0.01, 0.01)))
    >>> labels = np.zeros((3, 4, 5), np.uint8)
    >>> labels[0, 1:3] = 7
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tifffile.imwrite(f"{folder}/labels.tif", labels, photometric="minisblack")
    ...     read_labels(f"{folder}/labels.tif", stack).labelled
    (0,)
    """
    path = Path(path)
    if holds_geojson(path):
        label_map, with_file = labels_from_geojson(path, like, table_of(table))
        check_have_files(path, like, labelled, with_file)
    elif path.is_dir() and not is_ome_zarr(path):
        label_map, with_file = _from_folder(path, like)
        check_have_files(path, like, labelled, with_file)
    else:
        label_map = _from_volume(path, like, section_axis)
        with_file = tuple(np.flatnonzero(label_map.labels.any(axis=(1, 2))).tolist())
    wanted = with_file if labelled is None else tuple(labelled)
    if not wanted:
        raise ValueError(
            f"read_labels(): {path} labels no section; label at least one, or name those meant as labelled"
        )
    return SectionLabels(_with_table(label_map, table), wanted)


def read_label_volume(
    path: str | Path,
    like: Volume | LabelMap | None = None,
    *,
    spacing: Triple | None = None,
    section_axis: str | None = None,
    table: LabelTable | str | Path | None = None,
) -> LabelMap:
    """Read labels that are there for every section, of a result or a reference.

    Parameters
    ----------
    path : str or Path
        A folder of sections, a TIFF, or a volume, as of `read`.
    like : Volume or LabelMap, optional
        The stack that the labels must fit in shape, spacing and (folders) section names.
    spacing : tuple of float, optional
        Spacing (z, y, x) in mm, goes before what the file states; not used where `like` is given.
    section_axis : {'z', 'y', 'x', 'k', 'j', 'i'}, optional
        As of `read`; else that of `like`, else z.
    table : mapping of int to Label, str or Path, optional
        As of `read_labels`.

    Returns
    -------
    LabelMap
        Labels (Z, Y, X) in the smallest of uint8, uint16 and int32 that holds them.

    Raises
    ------
    ValueError
        As of `read_labels`; also if a section has no file, or there is no spacing.

    Examples
    --------
    >>> import tempfile
    >>> import tifffile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tifffile.imwrite(f"{folder}/labels.tif", np.ones((3, 4, 5), np.uint16), photometric="minisblack")
    ...     label_map = read_label_volume(f"{folder}/labels.tif", spacing=(0.05, 0.01, 0.01))
    >>> label_map.labels.shape, label_map.name_of(1)
    ((3, 4, 5), 'label 1')
    """
    path = Path(path)
    if like is None:
        label_map = _on_its_own(path, spacing, section_axis or "z")
    elif holds_geojson(path):
        label_map, with_file = labels_from_geojson(path, like, table_of(table))
        check_have_files(path, like, range(like.space.shape[0]), with_file)
    elif path.is_dir() and not is_ome_zarr(path):
        label_map, with_file = _from_folder(path, like)
        check_have_files(path, like, range(like.space.shape[0]), with_file)
    else:
        label_map = _from_volume(path, like, section_axis)
    return _with_table(label_map, table)


def read_label_image(path: str | Path) -> NDArray[np.integer[Any]]:
    """Read the labels of one image, objects' ids say; neither spacing nor names are looked for.

    Parameters
    ----------
    path : str or Path
        A PNG (8 or 16 bit, grey or palette) or TIFF (8, 16 or 32 bit); also a volume, as of `read`.

    Returns
    -------
    ndarray of int
        Shape (Y, X), or (Z, Y, X) where the file holds several pages or a volume, in the smallest of uint8, uint16 and
        int32 that holds the labels. Palette images give their indices.

    Raises
    ------
    ValueError
        If the file is missing, damaged, a JPEG or of another format, or its labels are no integers >= 0.

    Examples
    --------
    >>> import tempfile
    >>> import tifffile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tifffile.imwrite(f"{folder}/cells.tif", np.full((4, 5), 70000, np.uint32), photometric="minisblack")
    ...     labels = read_label_image(f"{folder}/cells.tif")
    >>> labels.shape, labels.dtype
    ((4, 5), dtype('int32'))
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() in SECTION_ENDINGS and path.suffix.lower() not in TIFF_ENDINGS:
        return _load_flat(path)
    labels = as_labels(load(path, labels=True).pixels, path)
    return labels[0] if len(labels) == 1 else labels


def _on_its_own(path: Path, spacing: Triple | None, section_axis: str) -> LabelMap:
    content = load(path, labels=True).with_sections_first(axis_number(section_axis, path))
    labels = as_labels(content.pixels, path)
    source = replace(content.source, file_spacing=None if spacing is not None else content.spacing)
    return LabelMap(labels, space_of(content, spacing), own_table(path), source)


def _from_volume(path: Path, like: Volume | LabelMap, section_axis: str | None) -> LabelMap:
    axis = axis_number(section_axis, path) if section_axis is not None else axis_of(like)
    content = load(path, labels=True).with_sections_first(axis)
    labels = as_labels(content.pixels, path)
    if labels.shape != like.space.shape:
        raise ValueError(
            f"read_labels(): {path} has shape {labels.shape}, the stack {like.space.shape} (z, y, x); give labels on "
            "the stack's own grid"
        )
    check_geometry(path, content, like)
    return LabelMap(labels, like.space, own_table(path), replace(content.source, file_spacing=content.spacing))


def own_table(path: Path) -> LabelTable:
    """Names and colours that the file itself holds."""
    return ome_zarr_table(path) if is_ome_zarr(path) else {}


def axis_of(like: Volume | LabelMap) -> int:
    """Axis of the stack's file along which its sections run."""
    return 0 if like.source is None else like.source.section_axis


def check_geometry(path: Path, content: Content, like: Volume | LabelMap) -> None:
    """Raise `ValueError` where the file states another spacing, origin or direction than the stack's."""
    _check_stated_spacing(path, content, like)
    _check_place(path, content, like)


def _check_stated_spacing(path: Path, content: Content, like: Volume | LabelMap) -> None:
    """Compare what the two files state; where the user gave the stack's spacing, the files' own say nothing."""
    expected = like.space.spacing if like.source is None else like.source.file_spacing
    if content.spacing is None or expected is None or np.allclose(content.spacing, expected, rtol=1e-3, atol=0):
        return
    raise ValueError(
        f"read_labels(): {path} has spacing {_rounded(content.spacing)} mm, the stack {_rounded(expected)} mm (z, y, "
        "x); resample one, or give spacing= (--spacing) to the stack if a header is wrong"
    )


def _check_place(path: Path, content: Content, like: Volume | LabelMap) -> None:
    """Volumes state where they lie: mirrored or shifted labels would be taken voxel by voxel and end up elsewhere."""
    if content.source.kind != "volume" or like.source is None or like.source.kind != "volume":
        return
    if like.source.file_spacing is None:  # the user says that headers are wrong
        return
    if not np.allclose(content.direction, like.space.direction, atol=1e-3):
        raise ValueError(
            f"read_labels(): {path} has axes that run along {_rounded(np.ravel(content.direction))}, the stack's along "
            f"{_rounded(np.ravel(like.space.direction))} (direction, z, y, x); resample it to the stack's grid, or "
            "give spacing= (--spacing) to the stack if a header is wrong"
        )
    if (np.abs(np.subtract(content.origin, like.space.origin)) > 0.5 * min(like.space.spacing)).any():
        raise ValueError(
            f"read_labels(): {path} has its origin at {_rounded(content.origin)} mm, the stack at "
            f"{_rounded(like.space.origin)} mm (z, y, x); resample it to the stack's grid, or give spacing= "
            "(--spacing) to the stack if a header is wrong"
        )


def _rounded(spacing: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(f"{s:.6g}") for s in spacing)


def _from_folder(folder: Path, like: Volume | LabelMap) -> tuple[LabelMap, tuple[int, ...]]:
    """Labels on the grid of `like`, and the indices of the sections that have a file."""
    source = like.source
    if source is None or source.kind != "folder":
        raise ValueError(
            f"read_labels(): {folder} is a folder, but the stack is one file; give the labels as one file of its shape"
        )
    files = match_files(list_sections(folder), folder, source)
    sections = {i: load_label_section(file, source, i) for i, file in files.items()}
    labels = np.zeros(like.space.shape, dtype=np.result_type(*sections.values()))
    for i, section in sections.items():
        labels[i] = centre(section, like.space.shape[1:], 0)
    return LabelMap(labels, like.space, source=replace(source, path=folder)), tuple(sorted(files))


def match_files(files: list[Path], folder: Path, source: Source) -> dict[int, Path]:
    """Section index of each label file, matched by the name without its ending."""
    index_of = {Path(name).stem: i for i, name in enumerate(source.names)}
    for file in files:
        if file.stem not in index_of:
            raise ValueError(
                f"read_labels(): {file.name} in {folder} is named like no section of {source.path}; name each label "
                f"file like its image (the first is {source.names[0]})"
            )
    return {index_of[file.stem]: file for file in files}


def load_label_section(file: Path, source: Source, index: int) -> NDArray[np.integer[Any]]:
    """Labels (Y, X) of a section of a folder, of its image's size."""
    section = _load_flat(file)
    if section.shape != source.sizes[index]:
        raise ValueError(
            f"read_labels(): {file} has size {section.shape}, its image {source.names[index]} {source.sizes[index]} "
            "(y, x); give labels of the image's size"
        )
    return section


def _load_flat(file: Path) -> NDArray[np.integer[Any]]:
    """Labels (Y, X) of a PNG or a TIFF of one page."""
    if file.suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(f"read_labels(): {file} is a JPEG, whose compression changes labels; export PNG or TIFF")
    return as_labels(load_section(file, labels=True)[0][np.newaxis], file)[0]


def check_have_files(
    folder: Path, like: Volume | LabelMap, labelled: Sequence[int] | None, with_file: tuple[int, ...]
) -> None:
    """Raise `ValueError` where a section that is named as labelled has no file."""
    missing = sorted(set(labelled or ()) - set(with_file))
    if missing and 0 <= missing[0] < like.space.shape[0]:
        name = like.source.names[missing[0]] if like.source is not None else missing[0]
        raise ValueError(f"read_labels(): {folder} has no label file for section {missing[0]} ({name}); add one")


def as_labels(pixels: NDArray[Any], path: Path) -> NDArray[np.integer[Any]]:
    """Check that pixels (Z, Y, X) are labels; the smallest of uint8, uint16 and int32 that holds them.

    Raises
    ------
    ValueError
        If they are RGB, not integral, negative, or above the range of int32; `path` is named.
    """
    if pixels.ndim == 4:
        raise ValueError(f"read_labels(): {path} is RGB; export index labels, one integer a pixel")
    # NaN is unequal to everything, itself included.
    if pixels.dtype.kind == "f" and not (np.rint(pixels) == pixels).all():
        raise ValueError(f"read_labels(): {path} holds values that are no integers, or NaN; export index labels")
    lowest, highest = (pixels.min(), pixels.max()) if pixels.size else (0, 0)
    if lowest < 0:
        raise ValueError(f"read_labels(): {path} holds the negative label {lowest:.0f}; labels start at 0 (background)")
    for dtype in LABEL_TYPES:
        if highest <= np.iinfo(dtype).max:
            return pixels.astype(dtype, copy=False)
    raise ValueError(f"read_labels(): {path} holds the label {highest:.0f}; renumber labels above 2147483647")


def _with_table(label_map: LabelMap, table: LabelTable | str | Path | None) -> LabelMap:
    """The given table, else that of the file itself, else names ``label N``."""
    given = table_of(table)
    if given is None:
        given = {**default_table(label_map.present), **label_map.table}
    return replace(label_map, table=given)


def table_of(table: LabelTable | str | Path | None) -> LabelTable | None:
    """A table as it is given, or read from its file."""
    return read_table(table)[0] if isinstance(table, str | Path) else table
