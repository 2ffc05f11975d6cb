"""Images of which some nuclei are annotated: found by their names, and read region by region around what is annotated.

An image may be anything that `open_slide` opens. Its annotation is a label image of the same size, in which 0 is not
annotated and each nucleus has a number of its own, or a GeoJSON that QuPath exported. Of a slide no more is read than
regions around its annotated nuclei.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from limner.io.geojson import GEOJSON_ENDINGS, is_geojson, rasterise, read_objects
from limner.io.labels import read_label_image
from limner.io.ome_zarr import is_ome_zarr
from limner.io.outlines import Outline
from limner.io.sections import natural_key
from limner.io.slide import SLIDE_ENDINGS, Level, open_slide
from limner.tiles import Rectangle

LABEL_ENDINGS = (".png", ".tif", ".tiff", *GEOJSON_ENDINGS)
CELL = 256  # pixels: regions are made of cells of this size
CELLS = 4  # along the longest side of a region
MOST_REGIONS = 64  # of one image: with the weights of training half a gigabyte
LARGEST_UM2 = 2500.0  # outlines above this are regions of interest: no nucleus is 56 um across

Labels = NDArray[np.int32]


@dataclass(frozen=True)
class AnnotatedImage:
    """An image with its annotation, both at one pixel size; nothing but its annotation is in memory.

    Parameters
    ----------
    path : Path
        Of the image.
    level : Level
        Its pixels.
    touched : ndarray of bool
        In which cells of `CELL` x `CELL` pixels nuclei are annotated, shape (ceil(Y / CELL), ceil(X / CELL)).
    labels_of : callable
        From a rectangle to its labels, (y, x) int32.
    nuclei : int
        How many are annotated.
    passed_over : int
        Outlines that are no nuclei, see `open_annotated`.
    """

    path: Path
    level: Level
    touched: NDArray[np.bool_]
    labels_of: Callable[[Rectangle], Labels]
    nuclei: int
    passed_over: int = 0

    @property
    def whole(self) -> Rectangle:
        """The whole image."""
        return Rectangle(0, self.level.shape[0], 0, self.level.shape[1])

    def regions(self, most: int = MOST_REGIONS) -> list[Rectangle]:
        """Where to look for annotated nuclei: the whole of a small image, of a larger one the parts around them.

        Cells with nuclei and those around them are joined to rectangles, which are cut where they are longer than
        `CELLS` cells.

        Parameters
        ----------
        most : int
            Where there are more, as many, evenly spread over the list.

        Returns
        -------
        list of Rectangle
            They do not leave the image; those of one annotated patch of tissue do not overlap.
        """
        if max(self.whole.shape) <= CELL * CELLS:
            return [self.whole]
        around = ndimage.binary_dilation(self.touched, np.ones((3, 3)))
        patches, _ = ndimage.label(around, np.ones((3, 3)))
        found = [part for box in ndimage.find_objects(patches) for part in _cut(box) if self.touched[part].any()]
        if len(found) > most:
            found = [found[i] for i in np.linspace(0, len(found) - 1, most).astype(int)]
        pixels = [Rectangle(*(CELL * n for n in (y.start, y.stop, x.start, x.stop))) for y, x in found]
        return [region.intersection(self.whole) for region in pixels]

    def read(self, region: Rectangle) -> tuple[NDArray[np.uint8], Labels]:
        """Pixels (y, x, 3) and labels (y, x) of a region."""
        return self.level[region.slices], self.labels_of(region)


def _cut(box: tuple[slice, slice]) -> Iterator[tuple[slice, slice]]:
    """Nearly equal parts of at most `CELLS` cells a side."""
    rows, columns = (
        [slice(a.start + k * n // parts, a.start + (k + 1) * n // parts) for k in range(parts)]
        for a in box
        for n in [a.stop - a.start]
        for parts in [-(-n // CELLS)]
    )
    return ((y, x) for y in rows for x in columns)


def pair_annotations(images: str | Path, labels: str | Path) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Find the annotation of each image by its name.

    Parameters
    ----------
    images : str or Path
        An image, or a folder of images.
    labels : str or Path
        A label image or GeoJSON, or a folder of these, each named as its image: ``a.png``, ``a.geojson`` and
        ``a.svs.geojson`` belong to ``a.svs``. Where both are files their names do not matter. In a folder that holds
        the images too, only GeoJSON counts as annotation.

    Returns
    -------
    pairs : list of tuple of Path
        Image and annotation, in natural order.
    without : list of Path
        Images without annotation.

    Raises
    ------
    ValueError
        If there is no image, an annotation has no image or more than one, or an image more than one annotation.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("a.svs", "b.svs", "a.svs.geojson"):
    ...     (folder / name).touch()
    >>> pairs, without = pair_annotations(folder, folder)
    >>> [(image.name, annotation.name) for image, annotation in pairs], [image.name for image in without]
    ([('a.svs', 'a.svs.geojson')], ['b.svs'])
    """
    images, labels = Path(images), Path(labels)
    for path in (images, labels):
        if not path.exists():
            raise ValueError(f"pair_annotations(): {path} does not exist")
    if is_image(images) and labels.is_file():
        return [(images, labels)], []
    image_files = [images] if is_image(images) else _listed(images, is_image, "images")
    label_files = [labels] if labels.is_file() else _label_files(labels, images)
    annotation_of: dict[Path, Path] = {}
    for file in label_files:
        image = _image_of(file, image_files, images)
        if image is None:
            continue
        if image in annotation_of:
            other = annotation_of[image].name
            raise ValueError(f"pair_annotations(): {labels} holds {other} and {file.name} for {image.name}; keep one")
        annotation_of[image] = file
    if not annotation_of:
        raise ValueError(f"pair_annotations(): {labels} holds nothing for {images}; name each annotation as its image")
    pairs = [(image, annotation_of[image]) for image in image_files if image in annotation_of]
    return pairs, [image for image in image_files if image not in annotation_of]


def is_image(path: Path) -> bool:
    """Whether a file or OME-Zarr folder may be an image, by its ending."""
    return is_ome_zarr(path) if path.is_dir() else path.suffix.lower() in SLIDE_ENDINGS


def _is_labels(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(LABEL_ENDINGS)


def _label_files(folder: Path, images: Path) -> list[Path]:
    if folder.is_dir() and folder.samefile(images.parent if is_image(images) else images):
        return _listed(folder, is_geojson, "GeoJSON files beside the images")
    return _listed(folder, _is_labels, "label images or GeoJSON files")


def _listed(folder: Path, wanted: Callable[[Path], bool], what: str) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"pair_annotations(): {folder} is of no known format; give a folder of {what}, or one file")
    files = [path for path in folder.iterdir() if not path.name.startswith(".") and wanted(path)]
    if not files:
        raise ValueError(f"pair_annotations(): {folder} holds no {what}; give a folder of {what}, or one file")
    return sorted(files, key=lambda path: (natural_key(path.name), path.name))


def _image_of(file: Path, image_files: Sequence[Path], images: Path) -> Path | None:
    """The image of an annotation; None where one image is given and this belongs to another."""
    found = [image for image in image_files if _names(image) & _names(file)]
    if len(found) > 1:
        raise ValueError(
            f"pair_annotations(): {file} may belong to {found[0].name} or {found[1].name}; name it {found[0].name}"
            f"{file.suffix} or take one image away"
        )
    if not found and images.is_dir() and not is_image(images):
        raise ValueError(
            f"pair_annotations(): {file} is named like no image in {images}; name each annotation as its image (the "
            f"first is {image_files[0].name})"
        )
    return found[0] if found else None


def _names(path: Path) -> set[str]:
    """What a file may be called by: an image by its name with or without ending, an annotation without."""
    name = path.name
    ending = max((e for e in GEOJSON_ENDINGS if name.lower().endswith(e)), key=len, default="")
    stem = name[: -len(ending)] if ending else path.stem
    return {stem, stem.removesuffix(".ome")} | ({name} if not ending else set())


def open_annotated(
    image: str | Path, labels: str | Path, um_per_px: float, image_um_per_px: float | None = None
) -> AnnotatedImage:
    """Open an image and its annotation at a pixel size.

    Parameters
    ----------
    image : str or Path
        As of `open_slide`: grey, 16-bit and RGBA images become 8-bit RGB.
    labels : str or Path
        A label image of the same size (8, 16 or 32 bit), or QuPath GeoJSON in pixels of the full resolution. Labels are
        resampled by the nearest pixel; an outline takes the pixels whose centres it holds, a QuPath cell those of its
        nucleus. Every outline is a nucleus but three kinds, which are passed over, their pixels being not
        annotated: those of a class that ends in ``*`` (``Ignore*``, ``Region*``), which QuPath ignores too; those
        larger than `LARGEST_UM2`, which are regions of interest; and nuclei that Limner found, for a model must not
        learn from its own mistakes.
    um_per_px : float
        Size of the pixels to be read, micrometres.
    image_um_per_px : float, optional
        Size of the image's own pixels, micrometres; goes before what the file states.

    Returns
    -------
    AnnotatedImage

    Raises
    ------
    ValueError
        If the image's pixel size is neither stated nor given, a file is damaged, labels are no integers or of another
        size than the image, or an outline lies outside the image.

    Warns
    -----
    UserWarning
        If a label image has several objects under one number, as a mask of 0 and 255 has: each connected part is then a
        nucleus.

    Examples
    --------
    >>> import tempfile
    >>> import imageio.v3 as iio
    >>> folder = tempfile.mkdtemp()
    >>> iio.imwrite(f"{folder}/a.png", np.full((40, 60, 3), 200, np.uint8))
    >>> iio.imwrite(f"{folder}/labels.png", np.arange(2400).reshape(40, 60).clip(0, 5).astype(np.uint8) % 5)
    >>> annotated = open_annotated(f"{folder}/a.png", f"{folder}/labels.png", um_per_px=0.5, image_um_per_px=0.25)
    >>> pixels, labels = annotated.read(annotated.whole)
    >>> pixels.shape, labels.shape, annotated.nuclei
    ((20, 30, 3), (20, 30), 4)
    """
    image, labels = Path(image), Path(labels)
    slide = open_slide(image, image_um_per_px)
    if slide.um_per_px is None:
        raise ValueError(
            f"open_annotated(): {image} does not state its pixel size; give it in micrometres (on the command line "
            "--um-per-px)"
        )
    level = slide.at(um_per_px)
    if is_geojson(labels):
        return _with_outlines(image, labels, level, (slide.shape[0], slide.shape[1]))
    found = _read_instances(labels)
    if found.shape != slide.shape[:2]:
        raise ValueError(
            f"open_annotated(): {labels} has size {found.shape}, its image {image.name} {slide.shape[:2]} (y, x); give "
            "labels of the image's size"
        )
    return _with_labels(image, found, level)


def _read_instances(path: Path) -> NDArray[np.integer[Any]]:
    labels = read_label_image(path)
    values = np.unique(labels[labels > 0])
    if len(values) != 1:
        return labels
    parts, n_parts = ndimage.label(labels)
    if n_parts == 1:
        return labels
    warnings.warn(
        f"open_annotated(): {path} knows only one label, {values[0]}; each of its {n_parts} connected parts is taken "
        "for a nucleus",
        stacklevel=3,
    )
    return np.asarray(parts)


def _with_labels(image: Path, labels: NDArray[np.integer[Any]], level: Level) -> AnnotatedImage:
    """Labels (Y, X) of the finest level, taken at the centres of the pixels of `level`."""
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * factor).astype(int), whole - 1)
        for n, factor, whole in zip(level.shape, level.downsample, labels.shape, strict=False)
    )

    def labels_of(region: Rectangle) -> Labels:
        y, x = region.slices
        return labels[np.ix_(rows[y], columns[x])].astype(np.int32)

    touched = np.zeros(_cells(level), bool)
    for y, x in np.ndindex(touched.shape):
        part = Rectangle(y * CELL, (y + 1) * CELL, x * CELL, (x + 1) * CELL)
        touched[y, x] = labels_of(part).any()
    return AnnotatedImage(image, level, touched, labels_of, len(np.unique(labels[labels > 0])))


def _with_outlines(image: Path, file: Path, level: Level, shape: tuple[int, int]) -> AnnotatedImage:
    """Outlines in pixels of the finest level, whose size is `shape`."""
    outlines = read_objects(file, nuclei=True)
    _check_inside(outlines, shape, file, image)
    scaled = [outline.scaled(*(1 / n for n in level.downsample)) for outline in outlines]
    largest = LARGEST_UM2 / np.prod(level.um_per_px or (1.0, 1.0))
    nuclei = [o for o in scaled if not (o.found or (o.class_name or "").endswith("*") or o.area > largest)]
    boxes = _boxes(nuclei)

    def labels_of(region: Rectangle) -> Labels:
        low, high = np.array((region.left, region.top)), np.array((region.right, region.bottom))
        meeting = np.flatnonzero(((boxes[:, 0] < high) & (boxes[:, 1] > low)).all(axis=1))
        return rasterise([nuclei[i].shifted(-region.top, -region.left) for i in meeting], region.shape)

    touched = np.zeros(_cells(level), bool)
    for low, high in (boxes / CELL).clip(0).astype(int):
        touched[low[1] : high[1] + 1, low[0] : high[0] + 1] = True
    return AnnotatedImage(image, level, touched, labels_of, len(nuclei), len(outlines) - len(nuclei))


def _cells(level: Level) -> tuple[int, int]:
    return -(-level.shape[0] // CELL), -(-level.shape[1] // CELL)


def _check_inside(outlines: Sequence[Outline], shape: tuple[int, int], file: Path, image: Path) -> None:
    boxes = _boxes(outlines)
    outside = np.flatnonzero(((boxes[:, 1] <= 0) | (boxes[:, 0] >= shape[::-1])).any(axis=1))
    if len(outside):
        x, y = boxes[outside[0], 0]
        raise ValueError(
            f"open_annotated(): an outline of {file} lies at y {y:.0f}, x {x:.0f}, outside {image.name} of size "
            f"{shape} (y, x); export the annotations of this image, in pixels of its full resolution"
        )


def _boxes(outlines: Sequence[Outline]) -> NDArray[np.float64]:
    """Least and largest (x, y) of each outline, shape (N, 2, 2)."""
    points = [np.concatenate([ring for rings in o.polygons for ring in rings]) for o in outlines]
    return np.array([(p.min(axis=0), p.max(axis=0)) for p in points]).reshape(-1, 2, 2)
