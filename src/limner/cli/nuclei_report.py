"""What the report of `limner nuclei segment` shows, gathered from the files in OUT."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from limner.cli.nuclei_results import Found, on_pixels
from limner.io.labels import read_label_image
from limner.io.ome_zarr import open_multiscales
from limner.io.slide import Slide, open_slide
from limner.report.nuclei import ImageReport, View

VIEW = 1024  # pixels along a side
MOST_VIEWS = 3  # regions of one image
IMAGES_WITH_VIEWS = 20  # of a batch, for the report holds their pixels


def report_of(
    output: Path, found: Mapping[str, Found | str], images: Mapping[str, Path], um_per_px: float | None
) -> list[ImageReport]:
    """Gather what the report shows of each image.

    Parameters
    ----------
    output : Path
        OUT, results in place.
    found : mapping of str to Found or str
        By name what was found, or the problem.
    images : mapping of str to Path
        By name the image.
    um_per_px : float or None
        As the user gave it.
    """
    reports = []
    for number, (name, result) in enumerate(found.items()):
        if isinstance(result, str):
            reports.append(ImageReport(images[name].name, None, 0, np.zeros(0), None, (), problem=result))
            continue
        table = _read_table(output / result.files[1])
        views: tuple[View, ...] = ()
        if number < IMAGES_WITH_VIEWS and images[name].exists():
            with suppress(ValueError):  # an image that was changed since must not cost the report
                views = tuple(_views(open_slide(images[name], um_per_px), output / result.files[0], result, table))
        links = {Path(file).name: file for file in result.files}
        areas, size = table["area_um2"], max(result.um_per_px)
        reports.append(ImageReport(images[name].name, size, result.count, areas, result.mm2, views, links=links))
    return reports


def _read_table(path: Path) -> dict[str, NDArray[np.float64]]:
    """Centroids and areas of a table of objects."""
    columns = ("centroid_y_px", "centroid_x_px", "area_um2")
    if path.suffix == ".parquet":
        table = importlib.import_module("pyarrow.parquet").read_table(path, columns=list(columns))
        return {column: table[column].to_numpy() for column in columns}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [[float(row[column]) for column in columns] for row in csv.DictReader(file)]
    return dict(zip(columns, np.array(rows, float).reshape(-1, len(columns)).T, strict=True))


def _views(slide: Slide, labels: Path, found: Found, table: Mapping[str, NDArray[np.float64]]) -> list[View]:
    """A small image whole; of a larger one an overview and the regions richest in nuclei."""
    arrays = open_multiscales(labels).arrays if labels.is_dir() else (read_label_image(labels),)
    finest = arrays[0]
    size = max(found.um_per_px)
    level = slide.at(size) if labels.is_dir() else slide.levels[0]
    shape = (int(finest.shape[0]), int(finest.shape[1]))
    if max(shape) <= VIEW:
        return [View("whole image", level[...], np.asarray(finest[...]), size)]
    overview = slide.thumbnail(VIEW)
    coarse = on_pixels(np.asarray(arrays[-1][...]), (overview.shape[0], overview.shape[1]))
    views = [View("overview", overview[...], coarse, size * shape[0] / overview.shape[0])]
    for top, left in _richest(shape, table["centroid_y_px"], table["centroid_x_px"]):
        region = slice(top, min(top + VIEW, shape[0])), slice(left, min(left + VIEW, shape[1]))
        views.append(View(f"from row {top}, column {left}", level[region], np.asarray(finest[region]), size))
    return views


def _richest(shape: tuple[int, int], y: NDArray[np.float64], x: NDArray[np.float64]) -> Sequence[tuple[int, int]]:
    """First row and column of the squares that hold most nuclei."""
    edges = [np.arange(0, n + VIEW, VIEW) for n in shape]
    counts, _, _ = np.histogram2d(y, x, bins=edges)
    order = np.argsort(-counts, axis=None, kind="stable")[:MOST_VIEWS]
    places = zip(*np.unravel_index(order, counts.shape), strict=True)
    return [(int(i) * VIEW, int(j) * VIEW) for i, j in places if counts[i, j] > 0]
