"""The report of segmented nuclei: one web page in one file, in which to judge outlines, counts and areas.

`write_nuclei_report` fills ``nuclei.html.j2``, which extends ``page.html.j2``. Views are stored as text and decoded
when they are looked at; areas are stored as a histogram, so that a slide of 300,000 nuclei makes a small page. It
reaches no network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from limner.report.page import counted, write_page
from limner.report.section_pixels import pack_image, pack_labels, shown_size

LONGEST_SIDE = 1200  # pixels of a view; larger ones are shown smaller
JPEG_QUALITY = 90  # nuclei are judged by their texture
_BINS = 30  # of the histogram, about
_SHOWN_SHARE = 99.0  # per cent of areas within the histogram; the largest would squeeze the others
_MOST_NUMBERS = 65535  # a view's objects are numbered in 16 bit


@dataclass(frozen=True)
class View:
    """One picture with the outlines of its objects.

    Parameters
    ----------
    title : str
        What is seen, such as ``whole image``; views of one image are chosen by it.
    image : ndarray of uint8
        Shape (Y, X, 3), RGB.
    labels : ndarray of int
        Shape (Y, X), 0 or more; 0 is background, every object has a label of its own.
    um_per_px : float, optional
        Side of a pixel of the view in micrometres, for its scale bar; None: no scale bar.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """

    title: str
    image: NDArray[np.uint8]
    labels: NDArray[np.integer[Any]]
    um_per_px: float | None = None

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8 or not self.image.size:
            raise ValueError(
                f"View(): the image has shape {self.image.shape} and type {self.image.dtype}; give (Y, X, 3), uint8"
            )
        if self.labels.shape != self.image.shape[:2]:
            raise ValueError(
                f"View(): labels have shape {self.labels.shape}, the image {self.image.shape}; give one size"
            )


@dataclass(frozen=True)
class ImageReport:
    """What the report shows of one image.

    Parameters
    ----------
    name : str
        The image's file name.
    um_per_px : float or None
        Side of its pixels in micrometres; None: not known.
    count : int
        Nuclei found.
    areas_um2 : ndarray of float
        Shape (count,): their areas in um2; of length 0 where the size of a pixel is not known.
    tissue_mm2 : float or None
        Area of tissue in mm2, for nuclei per mm2; None: not known.
    views : sequence of View
        Pictures, the first is shown first; may be empty.
    problem : str, optional
        Why the image was not segmented, or what is doubtful, in plain words.
    links : mapping of str to str
        Results beside the report: their name and the path relative to the page's folder, parted by ``/``.

    Raises
    ------
    ValueError
        If areas are neither none nor as many as nuclei, or not positive numbers.

    Examples
    --------
    >>> tile = ImageReport("tile.png", 0.25, 4, np.array([20.0, 30.0, 40.0, 90.0]), 0.02, views=())
    >>> tile.per_mm2, tile.quartiles_um2
    (200.0, (27.5, 35.0, 52.5))
    """

    name: str
    um_per_px: float | None
    count: int
    areas_um2: NDArray[np.floating[Any]]
    tissue_mm2: float | None
    views: Sequence[View]
    problem: str | None = None
    links: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.areas_um2.shape not in ((0,), (self.count,)):
            raise ValueError(
                f"ImageReport(): {self.name} has {self.count} nuclei and areas of shape {self.areas_um2.shape}; "
                "give one area for each, or none"
            )
        if self.areas_um2.size and not (self.areas_um2.min() > 0 and np.isfinite(self.areas_um2).all()):
            raise ValueError(f"ImageReport(): {self.name} has areas that are not positive numbers; give um2")

    @property
    def per_mm2(self) -> float | None:
        """Nuclei per mm2 of tissue; None where the tissue's area is 0 or not known."""
        return self.count / self.tissue_mm2 if self.tissue_mm2 else None

    @property
    def quartiles_um2(self) -> tuple[float, float, float] | None:
        """Lower quartile, median and upper quartile of the areas; None without areas."""
        if not self.areas_um2.size:
            return None
        lower, median, upper = np.percentile(self.areas_um2, (25, 50, 75)).tolist()
        return lower, median, upper


@dataclass(frozen=True)
class NucleiReport:
    """What the report of a batch of images shows.

    Parameters
    ----------
    title : str
        Heading of the page.
    images : sequence of ImageReport
        At least one; they are listed in this order.
    settings : mapping of str to object
        Settings of the run, shown as a table.
    notes : sequence of str
        Warnings, shown at the top.

    Raises
    ------
    ValueError
        If there is no image.

    Examples
    --------
    >>> areas = np.array([20.0, 30.0, 40.0])
    >>> tiles = [ImageReport(name, 0.25, 3, areas, None, views=()) for name in ("1.png", "2.png")]
    >>> NucleiReport("Tiles", tiles, settings={}).summary
    '2 images; 6 nuclei, median area 30 µm².'
    """

    title: str
    images: Sequence[ImageReport]
    settings: Mapping[str, object]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("NucleiReport(): there are no images; give at least one")

    @property
    def summary(self) -> str:
        """One sentence: how many images, problems and nuclei, and their median area."""
        problems = sum(image.problem is not None for image in self.images)
        images = counted(len(self.images), "image") + (f", {problems} with a problem" if problems else "")
        areas = _all_areas(self)
        median = f", median area {np.median(areas):.3g} µm²" if areas.size else ""
        return f"{images}; {counted(sum(image.count for image in self.images), 'nucleus', 'nuclei')}{median}."


def write_nuclei_report(path: Path, report: NucleiReport) -> None:
    """Write the report as one self-contained HTML file.

    The file appears under its name only when it is complete. A file that is there already is replaced.

    Parameters
    ----------
    path : Path
        The file to write, in a folder that exists.
    report : NucleiReport
        What it shows.

    Examples
    --------
    >>> write_nuclei_report(Path("nuclei.html"), report)  # doctest: +SKIP
    """
    write_page(path, "nuclei.html.j2", report, data=_page_data(report), pictures=_packed_views(report))


def area_edges(areas_um2: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Edges of the histogram's bins: round numbers from 0 on, so that 99 of 100 areas lie between first and last.

    Parameters
    ----------
    areas_um2 : ndarray of float
        Shape (n,), in um2, all positive.

    Returns
    -------
    ndarray of float64
        Some 15 to 40 bins of equal width; two edges, 0 and 1, where there are no areas.

    Examples
    --------
    >>> area_edges(np.linspace(1, 118, 500))[[0, 1, 2, -1]].tolist()
    [0.0, 5.0, 10.0, 120.0]
    """
    if not areas_um2.size:
        return np.array([0.0, 1.0])
    largest = float(np.percentile(areas_um2, _SHOWN_SHARE))
    power = 10.0 ** math.floor(math.log10(largest / _BINS))
    width = min((step * power for step in (1, 2, 5, 10)), key=lambda step: abs(math.log(step * _BINS / largest)))
    n_bins = math.floor(largest / width) + 1  # the last edge lies beyond the largest
    return np.round(np.arange(n_bins + 1) * width, 12)


def _all_areas(report: NucleiReport) -> NDArray[np.float64]:
    return np.concatenate([image.areas_um2.astype(np.float64) for image in report.images])


def _page_data(report: NucleiReport) -> dict[str, Any]:
    """What the page's script needs besides the views' pixels; holds no NaN, which JSON lacks."""
    areas = _all_areas(report)
    edges = area_edges(areas)
    first_view = np.cumsum([0, *(len(image.views) for image in report.images)]).tolist()
    return {
        "images": [_image_data(image, first, edges) for image, first in zip(report.images, first_view, strict=False)],
        "areaEdges": edges.tolist(),
        "areaCounts": _binned(areas, edges),
    }


def _image_data(image: ImageReport, first_view: int, edges: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "name": image.name,
        "count": image.count,
        "perMm2": image.per_mm2,
        "tissueMm2": image.tissue_mm2,
        "umPerPx": image.um_per_px,
        "quartiles": image.quartiles_um2,
        "problem": image.problem,
        "links": [{"name": name, "address": quote(address)} for name, address in image.links.items()],
        "views": [{"title": view.title, "picture": n} for n, view in enumerate(image.views, first_view)],
        "areaCounts": _binned(image.areas_um2, edges),
    }


def _binned(areas_um2: NDArray[np.floating[Any]], edges: NDArray[np.float64]) -> list[int]:
    """Number of areas in each bin and, last, beyond them; a bin holds its lower edge."""
    return np.bincount(np.searchsorted(edges, areas_um2, side="right") - 1, minlength=len(edges)).tolist()


def _packed_views(report: NucleiReport) -> Iterator[dict[str, object]]:
    """Each view as text; one at a time, so that no more than one is held in memory."""
    n_views = sum(len(image.views) for image in report.images)
    for image in report.images:
        for view in image.views:
            yield _packed_view(view, shown_size((n_views, *view.labels.shape), LONGEST_SIDE))


def _packed_view(view: View, size: tuple[int, int]) -> dict[str, object]:
    labels = view.labels.astype(np.int64)
    numbers = np.where(labels > 0, (labels - 1) % _MOST_NUMBERS + 1, 0)  # only neighbours must differ
    shrunk = view.labels.shape[1] / size[1]
    return {
        "image": pack_image(view.image, (0, 255), size, JPEG_QUALITY),
        "labels": pack_labels(numbers, size),
        "size": size,
        "umPerPx": None if view.um_per_px is None else view.um_per_px * shrunk,
    }
