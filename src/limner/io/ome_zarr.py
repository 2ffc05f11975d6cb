"""OME-Zarr (OME-NGFF 0.4 and 0.5): images and labels in several scales, whole or as a stream of regions.

An image has the axes (z, y, x), or (y, x) where it is one section; colours are a leading axis c of length 3. Labels are
the same with `image-label` metadata: names and colours of the labels, and the image they belong to. Lengths are written
in micrometre. Of a volume's geometry NGFF keeps spacing and origin, not direction.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import zarr
from numcodecs import Zlib
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from limner.io.content import Content, Pages, PartialSpacing, Triple, complete_spacing, reading, real_pixels
from limner.io.tiff import MM_PER_UNIT
from limner.volume import Label, LabelMap, LabelTable, Source, Volume

NgffVersion = Literal["0.4", "0.5"]

CHUNK = 1024  # pixels along y and x
SMALLEST_LEVEL = 1024  # the pyramid ends with the first level that is no longer than this along y and x
CHUNK_PIXELS = 1 << 20


@dataclass(frozen=True)
class Multiscales:
    """The levels of one OME-Zarr image, finest first.

    Parameters
    ----------
    arrays : tuple of zarr.Array
        One a level; indexing reads only the chunks touched.
    axes : str
        One letter an axis, such as ``czyx``.
    spacings : tuple of (float or None) triples
        Spacing of each level along z, y, x in mm; None where an axis is missing or has no unit of length.
    origin : tuple of float
        Position of the finest level's first voxel in mm, z, y, x.
    version : str
        Of the NGFF metadata.
    image_label : mapping
        The `image-label` metadata; empty for an image.
    """

    arrays: tuple[zarr.Array[Any], ...]
    axes: str
    spacings: tuple[PartialSpacing, ...]
    origin: Triple
    version: str
    image_label: Mapping[str, Any]

    @property
    def lengths(self) -> dict[str, int]:
        """Length of the finest level along each axis."""
        return dict(zip(self.axes, self.arrays[0].shape, strict=True))


def is_ome_zarr(path: Path) -> bool:
    """Whether a path is a Zarr folder, by its ending or what it holds."""
    return path.is_dir() and (
        path.name.lower().endswith(".zarr") or any((path / name).exists() for name in ("zarr.json", ".zgroup"))
    )


def open_multiscales(path: Path, labels: bool = False) -> Multiscales:
    """Open an OME-Zarr image without reading pixels.

    Parameters
    ----------
    path : Path
        The group that holds the `multiscales` metadata, or a bioformats2raw folder, of which image ``0`` is taken.
    labels : bool
        Where the group is no label image itself but holds exactly one under ``labels``, take that.

    Raises
    ------
    ValueError
        If the folder is no OME-Zarr 0.4 or 0.5 image.
    """
    with reading(path):
        group = zarr.open_group(path, mode="r")
        metadata = _metadata(group)
        if "multiscales" not in metadata and "0" in group and isinstance(group["0"], zarr.Group):
            group = group["0"]
            metadata = _metadata(group)
    if labels and "image-label" not in metadata:
        inside = path / group.path / "labels"
        names = _metadata(zarr.open_group(inside, mode="r")).get("labels", []) if is_ome_zarr(inside) else []
        if len(names) == 1:
            return open_multiscales(inside / names[0])
        if names:
            listed = ", ".join(str(inside / name) for name in names)
            raise ValueError(f"read_labels(): {path} holds several labels; give one of {listed}")
    if not metadata.get("multiscales"):
        raise ValueError(f"read(): {path} is no OME-Zarr image (no multiscales metadata); give the folder of one image")
    with reading(path):
        return _multiscales(group, metadata)


def load_ome_zarr(path: Path, labels: bool = False) -> Content:
    """Read the finest level of an OME-Zarr image or label image.

    Parameters
    ----------
    path : Path
        An existing OME-Zarr folder.
    labels : bool
        As of `open_multiscales`.

    Returns
    -------
    Content
        Pixels (Z, Y, X) or (Z, Y, X, 3); the spacing is None where the metadata do not state it.

    Raises
    ------
    ValueError
        If the folder is damaged, of another version, or holds time points or other than 1 or 3 channels.
    """
    opened = open_multiscales(path, labels)
    array, axes = opened.arrays[0], opened.axes
    lengths = opened.lengths
    check_one_image(path, opened)
    with reading(path):
        pixels = np.asarray(array[...])
    kept = [a for a in axes if a in "zyx" or (a == "c" and lengths["c"] == 3)]
    pixels = pixels.reshape([lengths[a] for a in kept]).transpose([kept.index(a) for a in "zyxc" if a in kept])
    pixels = pixels if "z" in kept else pixels[np.newaxis]
    spacing = complete_spacing(opened.spacings[0], pixels.shape[0])
    return Content(real_pixels(pixels, path), spacing, ome_zarr_source(path), opened.origin)


def check_one_image(path: Path, opened: Multiscales) -> None:
    """Raise `ValueError` where there are time points, or other than 1 or 3 channels."""
    lengths = opened.lengths
    if lengths.get("t", 1) != 1 or lengths.get("c", 1) not in (1, 3) or set(opened.axes) - set("tczyx"):
        raise ValueError(
            f"read(): {path} has axes {opened.axes} of lengths {opened.arrays[0].shape}; give one time point, grey (1) "
            "or RGB (3)"
        )


def ome_zarr_source(path: Path) -> Source:
    """The form of an OME-Zarr."""
    return Source("ome-zarr", path, ".ome.zarr" if path.name.lower().endswith(".ome.zarr") else ".zarr")


def ome_zarr_table(path: Path) -> dict[int, Label]:
    """Names and colours that the `image-label` metadata give; empty where they give no name."""
    image_label = open_multiscales(path, labels=True).image_label
    colours = {c["label-value"]: c.get("rgba") for c in image_label.get("colors") or []}
    table = {}
    for row in image_label.get("properties") or []:
        value, name = row.get("label-value"), row.get("name")
        if isinstance(value, int) and isinstance(name, str):
            red, green, blue = (colours.get(value) or (255, 255, 255, 255))[:3]
            table[value] = Label(name, (int(red), int(green), int(blue)))
    return table


def ome_zarr_version(path: Path) -> NgffVersion:
    """0.4 where `path` is an OME-Zarr of that version, else 0.5."""
    return "0.4" if (path / ".zgroup").exists() else "0.5"


def write_ome_zarr(path: str | Path, content: Volume | LabelMap, version: NgffVersion = "0.5") -> None:
    """Write an image or labels as OME-Zarr, with a pyramid.

    Parameters
    ----------
    path : str or Path
        The folder to make, which must not be there; ``IMAGE.zarr/labels/NAME`` lists it among that image's labels.
    content : Volume or LabelMap
        Images are reduced by the mean of 2 x 2 pixels, labels by their mode (the first of equals); never along z.
    version : {'0.5', '0.4'}
        Of NGFF; 0.5 is Zarr 3, 0.4 Zarr 2.

    Raises
    ------
    ValueError
        If `path` exists.

    Examples
    --------
    >>> import tempfile
    >>> from limner.space import Space
    >>> volume = Volume(np.zeros((2, 3, 4), np.uint8), Space((2, 3, 4), (0.05, 0.01, 0.01)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_ome_zarr(f"{folder}/a.zarr", volume)
    ...     load_ome_zarr(Path(folder, "a.zarr")).spacing
    (0.05, 0.01, 0.01)
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"write_ome_zarr(): {path} exists; give another name")
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    space = content.space
    table = content.table if isinstance(content, LabelMap) else None
    pixels = content.labels if isinstance(content, LabelMap) else content.pixels
    save_ome_zarr(partial, pixels, space.spacing, space.origin, version=version, table=table, name=path.stem)
    partial.replace(path)
    _list_among_labels(path)


def save_ome_zarr(
    path: Path,
    pixels: NDArray[Any] | Pages,
    spacing: Triple | None,
    origin: Triple = (0.0, 0.0, 0.0),
    *,
    version: NgffVersion = "0.5",
    table: LabelTable | None = None,
    name: str = "image",
) -> None:
    """Write pixels (Z, Y, X) or (Z, Y, X, 3); labels where a `table` is given, be it empty. Lengths are mm.

    Of `Pages` no more are in memory than a chunk is deep.
    """
    colour = len(pixels.shape) == 4
    shape = pixels.file_shape if isinstance(pixels, Pages) else pixels.shape[:3]
    axes = "c" * colour + ("zyx" if shape[0] > 1 else "yx")
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    array = _create_array(group, "0", (*(3,) * colour, *shape[-len(axes) + colour :]), pixels.dtype, axes)
    if isinstance(pixels, Pages):
        _copy_by_slabs(pixels, array)
    else:
        _copy_by_chunks((np.moveaxis(pixels, -1, 0) if colour else pixels).reshape(array.shape), array)
    levels = _build_pyramid(group, axes, _mode_2x2 if table is not None else _mean_2x2)
    metadata: dict[str, Any] = {
        "multiscales": [_multiscales_metadata(name, axes, levels, spacing or (0.0, 0.0, 0.0), origin)]
    }
    if table is not None:
        metadata["image-label"] = _image_label_metadata(table, path, version)
    elif colour:
        metadata["omero"] = _rgb_display(pixels.dtype)
    _set_metadata(group, metadata, version)


class LabelStream:
    """Labels of one large image, written region by region, in any order, into an OME-Zarr.

    Until the end they are in a folder named ``.partial-NAME`` beside it. Leaving the ``with`` block without an error
    builds the pyramid, writes the metadata and renames the folder; after an error what was written stays, and a stream
    of the same path, shape and version goes on with it. Never more than a few chunks are in memory.

    Parameters
    ----------
    path : str or Path
        The folder to make; ``IMAGE.zarr/labels/NAME`` lists it among that image's labels.
    shape : tuple of int
        (Y, X).
    um_per_px : tuple of float, optional
        Size of a pixel (y, x) in micrometres; without it the metadata state pixels.
    version : {'0.5', '0.4'}
        Of NGFF.
    table : mapping of int to Label, optional
        Names and colours.
    values : {'labels', 'probabilities'}
        'probabilities': an image of 8 bit in steps of 1/255, reduced by the mean, in place of labels.

    Raises
    ------
    ValueError
        If `path` exists, or an unfinished stream of another shape lies there.

    Notes
    -----
    Threads may write at the same time as long as no chunk (`chunk` pixels square, from (0, 0)) is shared.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with LabelStream(f"{folder}/a.zarr", (20, 30), (0.5, 0.5)) as stream:
    ...         stream[5:10, :3] = np.full((5, 3), 7)
    ...         int(stream[0:6, 0:4].max())
    7
    """

    chunk = CHUNK

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int],
        um_per_px: tuple[float, float] | None = None,
        version: NgffVersion = "0.5",
        table: LabelTable | None = None,
        values: Literal["labels", "probabilities"] = "labels",
    ) -> None:
        self.path, self.shape = Path(path), shape
        self._labels = values == "labels"
        self._dtype: np.dtype[Any] = np.dtype(np.int32 if self._labels else np.uint8)
        self._um_per_px, self._version, self._table = um_per_px, version, table or {}
        if self.path.exists():
            raise ValueError(f"LabelStream(): {self.path} exists; give another name")
        self._partial = self.path.with_name(f".partial-{self.path.name}")
        self._group, self._array = self._open()

    def _open(self) -> tuple[zarr.Group, zarr.Array[Any]]:
        zarr_format: Literal[2, 3] = 3 if self._version == "0.5" else 2
        if not self._partial.exists():
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            group = zarr.open_group(self._partial, mode="w", zarr_format=zarr_format)
            return group, _create_array(group, "0", self.shape, self._dtype, "yx")
        with reading(self._partial):
            group = zarr.open_group(self._partial, mode="r+")
            array = group["0"]
        wanted = (self.shape, self._dtype, zarr_format)
        if not isinstance(array, zarr.Array) or (array.shape, array.dtype, array.metadata.zarr_format) != wanted:
            raise ValueError(
                f"LabelStream(): {self._partial} was begun with another shape or version; remove it to start anew"
            )
        return group, array

    def __setitem__(self, key: tuple[slice, slice], labels: NDArray[np.integer[Any]]) -> None:
        """Write labels (y, x) >= 0, or probabilities 0 to 255, of a region."""
        largest = np.iinfo(self._dtype).max
        if labels.size and (int(labels.min()) < 0 or int(labels.max()) > largest):
            raise ValueError(f"LabelStream[]: labels range from {labels.min()} to {labels.max()}; give 0 to {largest}")
        self._array[key] = labels.astype(self._dtype)

    def __getitem__(self, key: tuple[slice, slice]) -> NDArray[Any]:
        """Labels (y, x) of a region; 0 where nothing was written."""
        return np.asarray(self._array[key])

    def __enter__(self) -> LabelStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.finish()

    def finish(self) -> None:
        """Build the pyramid, write the metadata and give the folder its name."""
        for name in self._group:
            if name != "0":  # of a stream that was stopped while it built its pyramid
                del self._group[name]
        levels = _build_pyramid(self._group, "yx", _mode_2x2 if self._labels else _mean_2x2)
        y, x = self._um_per_px or (0.0, 0.0)
        metadata: dict[str, Any] = {
            "multiscales": [_multiscales_metadata(self.path.stem, "yx", levels, (0.0, y / 1e3, x / 1e3))]
        }
        if self._labels:
            metadata["image-label"] = _image_label_metadata(self._table, self.path, self._version)
        _set_metadata(self._group, metadata, self._version)
        self._partial.replace(self.path)
        if self._labels:
            _list_among_labels(self.path)


def _metadata(group: zarr.Group) -> dict[str, Any]:
    """NGFF metadata: under ``ome`` since 0.5, at the top before."""
    attributes: dict[str, Any] = dict(group.attrs)
    return attributes.get("ome", attributes)


def _set_metadata(group: zarr.Group, metadata: dict[str, Any], version: NgffVersion) -> None:
    if version == "0.5":
        group.attrs.update({"ome": {"version": "0.5", **metadata}})
        return
    for multiscales in metadata.get("multiscales", []):
        multiscales["version"] = "0.4"
    group.attrs.update(metadata)


def _multiscales(group: zarr.Group, metadata: Mapping[str, Any]) -> Multiscales:
    multiscales = metadata["multiscales"][0]
    version = str(metadata.get("version") or multiscales.get("version") or "")
    if not all(isinstance(axis, Mapping) for axis in multiscales.get("axes", [None])):
        raise ValueError(f"it is OME-Zarr {version or 'older than 0.4'}; convert it to 0.4 or 0.5")
    names = [axis["name"] for axis in multiscales["axes"]]
    mm = {axis["name"]: MM_PER_UNIT.get(axis.get("unit", "")) for axis in multiscales["axes"]}
    arrays, spacings, origin = [], [], (0.0, 0.0, 0.0)
    for dataset in multiscales["datasets"]:
        array = group[dataset["path"]]
        if not isinstance(array, zarr.Array) or len(array.shape) != len(names):
            raise ValueError(f"its level {dataset['path']} is no array with the axes {names}")
        scale, shift = _transformed(len(names), dataset, multiscales)
        by_axis = dict(zip(names, scale, strict=True))
        arrays.append(array)
        sizes = (by_axis[a] * mm[a] if a in by_axis and mm[a] else None for a in "zyx")
        z, y, x = sizes
        spacings.append((z, y, x))
        if len(arrays) == 1:
            position = dict(zip(names, shift, strict=True))
            oz, oy, ox = (position.get(a, 0.0) * (mm.get(a) or 0.0) for a in "zyx")
            origin = (oz, oy, ox)
    if not {"y", "x"} <= set(names) or any(len(n) != 1 for n in names):
        raise ValueError(f"its axes are {names}; it needs y and x")
    return Multiscales(
        tuple(arrays), "".join(names), tuple(spacings), origin, version, metadata.get("image-label") or {}
    )


def _transformed(n_axes: int, *holders: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Scale and translation of a level: its own transformations, then those of the whole."""
    scale, shift = np.ones(n_axes), np.zeros(n_axes)
    for holder in holders:
        for transformation in holder.get("coordinateTransformations") or []:
            if transformation["type"] == "scale":
                factor = np.asarray(transformation["scale"], float)
                scale, shift = scale * factor, shift * factor
            elif transformation["type"] == "translation":
                shift = shift + np.asarray(transformation["translation"], float)
    return scale.tolist(), shift.tolist()


def _create_array(
    group: zarr.Group, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], axes: str
) -> zarr.Array[Any]:
    lengths = dict(zip(axes, shape, strict=True))
    chunk = {a: min(n, CHUNK) if a in "yx" else n for a, n in lengths.items()}
    if "z" in chunk:
        chunk["z"] = max(1, min(chunk["z"], CHUNK_PIXELS // (chunk["y"] * chunk["x"])))
    three = group.metadata.zarr_format == 3
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype.newbyteorder("="),
        chunks=tuple(max(1, chunk[a]) for a in axes),
        # with checksums; Blosc's decoder reads on past the end of a truncated chunk and returns what it finds
        compressors=ZstdCodec(level=3, checksum=True) if three else Zlib(level=4),
        fill_value=0,
        dimension_names=list(axes) if three else None,
        chunk_key_encoding={"name": "default" if three else "v2", "separator": "/"},
    )


def _copy_by_chunks(pixels: NDArray[Any], array: zarr.Array[Any]) -> None:
    for region in _regions(array.shape, array.chunks):
        array[region] = pixels[region]


def _copy_by_slabs(pages: Pages, array: zarr.Array[Any]) -> None:
    """Slabs as deep as the chunks along the sections' axis, so that each chunk is written once."""
    colour = len(pages.shape) - 3
    flat = len(array.shape) - colour == 2  # of a single plane the array has no z
    axis = pages.section_axis - flat + colour
    one = axis < colour  # and that plane is the section
    depth = 1 if one else array.chunks[axis]
    region = [slice(None)] * len(array.shape)
    start = 0
    for slab in pages.slabs(depth):
        if not one:
            region[axis] = slice(start, start + slab.shape[pages.section_axis])
        kept = slab[0] if flat else slab
        array[tuple(region)] = np.moveaxis(kept, -1, 0) if len(pages.shape) == 4 else kept
        start += depth


def _regions(shape: tuple[int, ...], step: tuple[int, ...]) -> list[tuple[slice, ...]]:
    starts = product(*(range(0, n, s) for n, s in zip(shape, step, strict=True)))
    return [tuple(slice(a, min(a + s, n)) for a, s, n in zip(at, step, shape, strict=True)) for at in starts]


def _build_pyramid(group: zarr.Group, axes: str, reduce: Callable[[NDArray[Any]], NDArray[Any]]) -> int:
    """Add levels half as large along y and x until they are small; chunk by chunk. Returns the number of levels."""
    n_levels = 1
    array = group["0"]
    assert isinstance(array, zarr.Array)
    while max(array.shape[-2:]) > SMALLEST_LEVEL:
        shape = (*array.shape[:-2], -(-array.shape[-2] // 2), -(-array.shape[-1] // 2))
        smaller = _create_array(group, str(n_levels), shape, array.dtype, axes)
        for region in _regions(shape, smaller.chunks):
            wide = tuple(slice(2 * s.start, 2 * s.stop) for s in region[-2:])
            block = np.asarray(array[(*region[:-2], *wide)])
            if block.any():
                smaller[region] = reduce(block)
        array = smaller
        n_levels += 1
    return n_levels


def _quarters(block: NDArray[Any]) -> list[NDArray[Any]]:
    """The four pixels of each 2 x 2 square; the last row or column of an odd length is repeated."""
    odd = [(0, 0)] * (block.ndim - 2) + [(0, n % 2) for n in block.shape[-2:]]
    even = np.pad(block, odd, mode="edge")
    return [even[..., y::2, x::2] for y in (0, 1) for x in (0, 1)]


def _mean_2x2(block: NDArray[Any]) -> NDArray[Any]:
    mean = np.mean(np.stack(_quarters(block)), axis=0, dtype=np.float64)
    return (mean if block.dtype.kind == "f" else np.rint(mean)).astype(block.dtype)


def _mode_2x2(block: NDArray[Any]) -> NDArray[Any]:
    """The commonest of four labels; of equally common ones the first in reading order."""
    a, b, c, d = _quarters(block)
    rest = np.where((b == c) | (b == d), b, np.where(c == d, c, a))
    return np.where((a == b) | (a == c) | (a == d), a, rest)


def _multiscales_metadata(
    name: str, axes: str, n_levels: int, spacing: Triple, origin: Triple = (0.0, 0.0, 0.0)
) -> dict[str, Any]:
    """One entry of `multiscales`; a spacing of 0 along y: not known, so scales are in pixels and have no unit."""
    known = spacing[1] > 0
    size = dict(zip("zyx", (_micrometre(s) if known else 1.0 for s in spacing), strict=True))
    start = dict(zip("zyx", (_micrometre(o) for o in origin), strict=True))
    datasets = []
    for level in range(n_levels):
        factor = {a: float(1 << level) if a in "yx" else 1.0 for a in axes}
        scale = [size.get(a, 1.0) * factor[a] for a in axes]
        # the first pixel of a coarser level has its centre in the middle of those it stands for
        shift = [start.get(a, 0.0) + size.get(a, 0.0) * (factor[a] - 1) / 2 for a in axes]
        transformations: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        if any(shift):
            transformations.append({"type": "translation", "translation": shift})
        datasets.append({"path": str(level), "coordinateTransformations": transformations})
    unit = {"unit": "micrometer"} if known else {}
    listed = [{"name": a, "type": "channel"} if a == "c" else {"name": a, "type": "space", **unit} for a in axes]
    return {"name": name, "axes": listed, "datasets": datasets}


def _micrometre(mm: float) -> float:
    """50.0 for 0.05, free of the rounding of the product."""
    return float(f"{mm * 1e3:.12g}")


def _image_label_metadata(table: LabelTable, path: Path, version: NgffVersion) -> dict[str, Any]:
    """`image-label`: colours and names where known, and the image two floors up where the labels lie within one."""
    metadata: dict[str, Any] = {"version": "0.4"} if version == "0.4" else {}
    known = {index: label for index, label in sorted(table.items()) if index > 0}
    if known:
        metadata["colors"] = [{"label-value": i, "rgba": [*label.colour, 255]} for i, label in known.items()]
        metadata["properties"] = [{"label-value": i, "name": label.name} for i, label in known.items()]
    if _image_of(path) is not None:
        metadata["source"] = {"image": "../../"}
    return metadata


def _image_of(path: Path) -> Path | None:
    """The image group that labels at IMAGE/labels/NAME belong to."""
    image = path.parent.parent
    return image if path.parent.name == "labels" and is_ome_zarr(image) else None


def _list_among_labels(path: Path) -> None:
    image = _image_of(path)
    if image is None:
        return
    version = ome_zarr_version(image)
    if version != ome_zarr_version(path):
        raise ValueError(f"write_ome_zarr(): {path} and its image {image} differ in version; give version {version!r}")
    with reading(image):
        group = zarr.open_group(path.parent, mode="a", zarr_format=3 if version == "0.5" else 2)
        names = [*_metadata(group).get("labels", []), path.name]
        _set_metadata(group, {"labels": sorted(set(names))}, version)


def _rgb_display(dtype: np.dtype[Any]) -> dict[str, Any]:
    """How viewers show three channels as one colour image."""
    highest = float(np.iinfo(dtype).max) if dtype.kind in "ui" else 1.0
    window = {"min": 0.0, "max": highest, "start": 0.0, "end": highest}
    colours = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
    return {"channels": [{"label": n, "color": c, "active": True, "window": window} for n, c in colours]}
