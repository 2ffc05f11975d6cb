"""What `limner nuclei segment` finds in one image and leaves of it: labels, table, outlines, probabilities."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

import imageio.v3 as iio
import numpy as np
import tifffile
from numpy.typing import NDArray

from limner.inference import PAPER_WINDOWS, Options
from limner.io.geojson import MEAN_PROBABILITY, GeoJsonStream
from limner.io.ome_zarr import LabelStream, NgffVersion
from limner.io.slide import Level, Slide
from limner.methods.partial_nuclei import Separation, separate
from limner.networks.tiled_unet import TiledUNet
from limner.object_table import ObjectTableStream
from limner.slide_objects import (
    PROBABILITY_STEPS,
    Measured,
    SeparatedTiles,
    Tally,
    join_tiles,
    measure,
    open_tiles,
    separate_tiles,
    tally_of,
)
from limner.tissue import TissueMap, find_tissue

Report = Callable[[str, int, int], None]
LARGEST_IN_MEMORY = 2**25  # pixels of an image whose results are plain files; larger ones are slides
MARGIN_UM = 15.0  # on either side of a seam whole nuclei are seen: the largest are about 15 um long
PAPER_MARGIN = 16  # pixels, taken from the halo of the paper's windows, so that objects can be joined across seams
MEASUREMENTS = {  # in QuPath's words
    "area_um2": "Area um^2",
    "eccentricity": "Eccentricity",
    "mean_haematoxylin": "Haematoxylin mean",
    "mean_probability": MEAN_PROBABILITY,
}


@dataclass(frozen=True)
class Finder:
    """A network and how it is used.

    Parameters
    ----------
    network : TiledUNet
        Trained.
    um_per_px : float
        At which it works.
    separation : Separation
        From probability to nuclei.
    options : Options
        Windows and where to compute.
    tissue : bool
        Whether glass is passed over on slides, and left out of areas on any image.
    """

    network: TiledUNet
    um_per_px: float
    separation: Separation
    options: Options
    tissue: bool

    def nuclei(self, probability: NDArray[np.float32]) -> NDArray[np.int32]:
        """Labels (y, x) from the probability of nucleus (y, x)."""
        return separate(probability, self.um_per_px, self.separation)


@dataclass(frozen=True)
class Wanted:
    """Which files an image leaves, beside its labels.

    Parameters
    ----------
    table : {'csv', 'parquet'}
        Format of the table of objects.
    geojson : tuple of str
        Endings of GeoJSON files.
    probabilities : bool
        Whether to write the probability of nucleus.
    ngff_version : {'0.5', '0.4'}
        Of OME-Zarr.
    """

    table: Literal["csv", "parquet"]
    geojson: tuple[str, ...]
    probabilities: bool
    ngff_version: NgffVersion


@dataclass(frozen=True)
class Found:
    """What was found in an image.

    Parameters
    ----------
    files : tuple of str
        Files and OME-Zarr folders written, relative to OUT; the labels first, then the table.
    count : int
        Number of nuclei.
    median_area_um2 : float or None
        None where there is no nucleus.
    mm2 : float
        Area of the tissue.
    um_per_px : tuple of float
        Size (y, x) of the labels' pixels.
    """

    files: tuple[str, ...]
    count: int
    median_area_um2: float | None
    mm2: float
    um_per_px: tuple[float, float]

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Found:
        """From what `run.json` says of an image."""
        y, x = entry["um_per_px"]
        return cls(tuple(entry["files"]), entry["count"], entry["median_area_um2"], entry["mm2"], (y, x))

    def in_words(self, name: str) -> str:
        """One line for the user."""
        if self.median_area_um2 is None:
            return f"{name}: no nuclei on {self.mm2:.3g} mm2"
        density = self.count / self.mm2
        return f"{name}: {self.count} nuclei, {density:.0f} per mm2, median area {self.median_area_um2:.1f} um2"


def window_options(windows: Literal["exact", "paper"], tile: int, um_per_px: float, **more: Any) -> Options:
    """Windows of side `tile` with a margin as wide as a nucleus, or the paper's 256 every 128."""
    if windows == "exact":
        return Options(window=tile, margin=ceil(MARGIN_UM / um_per_px), **more)
    assert PAPER_WINDOWS.halo is not None
    halo = PAPER_WINDOWS.halo - PAPER_MARGIN
    return Options(window=PAPER_WINDOWS.window, halo=halo, margin=PAPER_MARGIN, **more)


def is_slide(slide: Slide, level: Level) -> bool:
    """Whether an image's results are streamed: it has several levels, or many pixels of its own or of the network's."""
    most = max(shape[0] * shape[1] for shape in (slide.shape, level.shape))
    return len(slide.levels) > 1 or most > LARGEST_IN_MEMORY


def tissue_of(slide: Slide, finder: Finder, level: Level) -> TissueMap | None:
    """Tissue of an image; None where all of it counts as tissue.

    Raises
    ------
    ValueError
        If there is none on a slide.

    Warns
    -----
    UserWarning
        If the image is grey.
    """
    thumbnail = slide.thumbnail()[...]
    tissue = find_tissue(thumbnail, level.shape[:2]) if finder.tissue else None
    if tissue is not None and not tissue.mask.any():
        if is_slide(slide, level):
            raise ValueError(f"--tissue: {slide.path} shows no tissue, only glass; add --no-tissue to look everywhere")
        tissue = None
    if (thumbnail == thumbnail[..., :1]).all():
        warnings.warn(
            f"{slide.path.name} is grey: haematoxylin cannot be told from it, and a model for stains may not fit",
            stacklevel=2,
        )
    return tissue


@dataclass(frozen=True)
class Searched:
    """An image and what the network found in its tiles.

    Parameters
    ----------
    slide : Slide
        The image, its pixel size known.
    level : Level
        The image as the network saw it.
    tissue : TissueMap or None
        None where all of it counts as tissue.
    tiles : SeparatedTiles
        Nuclei of each tile.
    """

    slide: Slide
    level: Level
    tissue: TissueMap | None
    tiles: SeparatedTiles

    @property
    def mm2(self) -> float:
        """Area of tissue."""
        (y, x), (height, width, _) = size_of(self.level), self.level.shape
        return height * y * width * x * 1e-6 * (1.0 if self.tissue is None else self.tissue.fraction)


def size_of(level: Level) -> tuple[float, float]:
    """Size (y, x) of a level's pixels in micrometres; it must be known."""
    assert level.um_per_px is not None
    return level.um_per_px


def search(slide: Slide, finder: Finder, folder: Path, key: str, report: Report) -> Searched:
    """Find the nuclei of every tile of an image.

    Parameters
    ----------
    slide : Slide
        The image, its pixel size known.
    finder : Finder
        How to find them.
    folder : Path
        Where tiles are kept; those that are there under `key` are not done again.
    key : str
        Names image, network and settings.
    report : callable
        Progress: stage, done, total.

    Returns
    -------
    Searched

    Raises
    ------
    ValueError
        If a slide shows no tissue, or the file proves damaged.
    """
    level = slide.at(finder.um_per_px)
    tissue = tissue_of(slide, finder, level)
    tiles = open_tiles(folder, finder.options.grid(finder.network, level.shape[:2]), key)

    def progress(done: int, total: int) -> None:
        report("network", done, total)

    glass = tissue if is_slide(slide, level) else None  # of small images all is looked at
    separate_tiles(finder.network, level, finder.nuclei, tiles, finder.options, tissue=glass, progress=progress)
    return Searched(slide, level, tissue, tiles)


def write_image(folder: Path, name: str, searched: Searched, wanted: Wanted, report: Report) -> Found:
    """Write what was found in an image.

    Parameters
    ----------
    folder : Path
        Where to make ``labels``, ``objects`` and, where wanted, ``probabilities``.
    name : str
        Of the files. Of a slide, labels have the network's pixels, of other images their own; coordinates in the
        table are pixels of the labels, those in GeoJSON pixels of the image's finest level.
    searched : Searched
        As `search` returned it.
    wanted : Wanted
        Which files.
    report : callable
        Progress: stage, done, total.

    Returns
    -------
    Found
    """
    for part in ("labels", "objects", *(("probabilities",) if wanted.probabilities else ())):
        (folder / part).mkdir()
    write = _write_slide if is_slide(searched.slide, searched.level) else _write_small
    return write(folder, name, searched, wanted, report)


def _write_small(folder: Path, name: str, searched: Searched, wanted: Wanted, report: Report) -> Found:
    """Everything in memory, on the image's own pixels."""
    own, shape = searched.slide.levels[0], searched.level.shape[:2]
    ids, probability = np.zeros(shape, np.int32), np.zeros(shape, np.uint8)
    join_tiles(searched.tiles, ids, probability, lambda done, total: report("objects", done, total))
    ids, probability = (on_pixels(found, (own.shape[0], own.shape[1])) for found in (ids, probability))
    files = [_write_label_image(folder / "labels", name, ids)]
    if wanted.probabilities:
        path = folder / "probabilities" / f"{name}.tif"
        tifffile.imwrite(path, probability.astype(np.float32) / PROBABILITY_STEPS, compression="zlib")
        files.append(path)
    tally = tally_of(ids, probability)
    parts = measure(tally, ids, own, size_of(own), lambda done, total: report("measures", done, total))
    files[1:1] = _write_objects(folder / "objects", name, parts, (1.0, 1.0), wanted)
    return _found(folder, files, tally, size_of(own), searched.mm2)


def _write_slide(folder: Path, name: str, searched: Searched, wanted: Wanted, report: Report) -> Found:
    """Everything as a stream, on the network's pixels."""
    level, size = searched.level, size_of(searched.level)
    shape, file = (level.shape[0], level.shape[1]), f"{name}.ome.zarr"
    labels = LabelStream(folder / "labels" / file, shape, size, wanted.ngff_version)
    probability = None
    if wanted.probabilities:
        place = folder / "probabilities" / file
        probability = LabelStream(place, shape, size, wanted.ngff_version, values="probabilities")
    tally = join_tiles(searched.tiles, labels, probability, lambda done, total: report("objects", done, total))
    parts = measure(tally, labels, level, size, lambda done, total: report("measures", done, total))
    files = [labels.path, *_write_objects(folder / "objects", name, parts, level.downsample, wanted)]
    labels.finish()
    if probability is not None:
        probability.finish()
        files.append(probability.path)
    return _found(folder, files, tally, size, searched.mm2)


def on_pixels(values: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """An image (Y, X) on another grid over the same area: of each pixel of `shape` what lies at its centre.

    Examples
    --------
    >>> on_pixels(np.array([[1, 2]]), (2, 4))
    array([[1, 1, 2, 2],
           [1, 1, 2, 2]])
    """
    if values.shape == shape:
        return values
    rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(shape, values.shape, strict=True))
    return values[np.ix_(rows, columns)]


def _write_label_image(folder: Path, name: str, ids: NDArray[np.int32]) -> Path:
    """16 bit PNG, or 32 bit TIFF where there are too many nuclei for it."""
    if ids.max(initial=0) <= np.iinfo(np.uint16).max:
        path = folder / f"{name}.png"
        iio.imwrite(path, ids.astype(np.uint16), plugin="pillow")
    else:
        path = folder / f"{name}.tif"
        tifffile.imwrite(path, ids.astype(np.uint32), compression="zlib")
    return path


def _write_objects(
    folder: Path, name: str, parts: Iterable[Measured], downsample: tuple[float, float], wanted: Wanted
) -> list[Path]:
    """The table and, where wanted, outlines times `downsample` (y, x); gives the files."""
    with ExitStack() as stack:
        table = stack.enter_context(ObjectTableStream(folder / f"{name}.{wanted.table}"))
        streams = [
            stack.enter_context(GeoJsonStream(folder / f"{name}{ending}", class_name="Nucleus"))
            for ending in wanted.geojson
        ]
        for part in parts:
            table.append(part.table)
            outlines = [outline.scaled(*downsample) for outline in part.outlines()] if streams else []
            for stream in streams:
                stream.write(outlines, _measurements(part.table))
    return [table.path, *(stream.path for stream in streams)]


def _measurements(table: Mapping[str, NDArray[Any]]) -> dict[int, dict[str, float]]:
    """What QuPath shows of each object, by label."""
    rows = zip(table["label"].tolist(), *(table[column].round(4).tolist() for column in MEASUREMENTS), strict=True)
    return {label: dict(zip(MEASUREMENTS.values(), values, strict=True)) for label, *values in rows}


def _found(folder: Path, files: Sequence[Path], tally: Tally, size: tuple[float, float], mm2: float) -> Found:
    areas = tally.pixels[tally.present] * size[0] * size[1]
    median = float(np.median(areas)) if len(areas) else None
    return Found(tuple(path.relative_to(folder).as_posix() for path in files), len(areas), median, mm2, size)
