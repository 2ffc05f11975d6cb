"""The report of organs found from scribbles: one web page in one file, which shows what the strokes led to.

`write_scribbles_report` fills ``scribbles.html.j2``, which extends ``sections.html.j2``. The user's strokes are drawn
over the sections, beside outlines and uncertainty, so that it is seen where more of them are needed. It reaches no
network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.annotations import Scribbles
from limner.report.page import counted, volume_text, write_page
from limner.report.section_pixels import pack_strokes, shown_size
from limner.report.sections import (
    MOST_STRUCTURES,
    Structure,
    check_sections,
    check_structures,
    finite,
    packed_sections,
    section_data,
    structures_of,
    viewer_data,
)
from limner.volume import LabelMap, Sections, Volume

SCORES = {"precision": "Precision", "recall": "Recall", "f1": "F1", "iou": "IoU"}


@dataclass(frozen=True)
class OrganRow:
    """What was found of one organ.

    Parameters
    ----------
    label : int
        Its label, at least 1.
    volume_mm3 : float
        Its volume in mm3.
    interval_mm3 : tuple of float
        The lowest and the highest volume that the evidence leaves open, in mm3.
    scores : mapping of str to float, optional
        Agreement with the truth, ``precision``, ``recall``, ``f1`` and ``iou`` in [0, 1]; NaN where undefined.

    Raises
    ------
    ValueError
        If the label is below 1, or volumes are negative, not finite or out of order.
    """

    label: int
    volume_mm3: float
    interval_mm3: tuple[float, float]
    scores: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.label < 1:
            raise ValueError(f"OrganRow(): label is {self.label}; organs have labels from 1 on, 0 is background")
        low, high = self.interval_mm3
        if not (0 <= low <= high and np.isfinite(high) and self.volume_mm3 >= 0 and np.isfinite(self.volume_mm3)):
            raise ValueError(
                f"OrganRow(): label {self.label} has volume {self.volume_mm3} mm3 and interval {self.interval_mm3}; "
                "give finite volumes from 0 on, the lowest first"
            )


@dataclass(frozen=True)
class ScribblesReport:
    """What the report of organs found from scribbles shows.

    Parameters
    ----------
    title : str
        Heading of the page.
    images : Volume
        The sections, pixels of shape (Z, Y, X) or (Z, Y, X, 3). Pixels that have not 8 bits are shown from the 0.5
        to the 99.5 percentile of the stack.
    labels : LabelMap
        What was found, shape (Z, Y, X): 0 is background, 1, 2, ... are organs; its table gives names and colours.
    uncertainty : ndarray of float32 or MadeSections
        Shape (Z, Y, X), in [0, 1]: chance that the pixel's label is wrong.
    scribbles : Scribbles
        The user's strokes, shape (Z, Y, X).
    organs : sequence of OrganRow
        Rows of the table of organs, in this order.
    suggestions : tuple of int
        Sections where strokes would help most, the best first.
    settings : mapping of str to object
        Settings of the run, shown as a table.
    truth : LabelMap, optional
        True labels, shape (Z, Y, X), shown as an outline.
    notes : sequence of str
        Warnings, shown at the top.

    Raises
    ------
    ValueError
        If shapes differ, uncertainty leaves [0, 1], a section outside the stack is suggested, or an organ has two rows.

    Examples
    --------
    >>> from limner.space import Space
    >>> from limner.volume import Label
    >>> marks = LabelMap(np.array([[[0, 1, 0, 2]], [[0, 0, 0, 0]]]), Space((2, 1, 4), (0.2, 0.1, 0.1)))
    >>> scribbles = Scribbles.from_marks(marks)
    >>> report = ScribblesReport(
    ...     title="Embryo 3",
    ...     images=Volume(np.zeros((2, 1, 4), np.uint8), marks.space),
    ...     labels=LabelMap(np.array([[[0, 0, 1, 1]]] * 2), marks.space, {1: Label("Heart", (200, 40, 40))}),
    ...     uncertainty=np.zeros((2, 1, 4), np.float32),
    ...     scribbles=scribbles,
    ...     organs=[OrganRow(1, volume_mm3=0.008, interval_mm3=(0.006, 0.01))],
    ... )
    >>> report.summary
    '2 sections, you drew on 1; Heart 0.00800 mm³ (0.00600 to 0.0100).'
    """

    title: str
    images: Volume
    labels: LabelMap
    uncertainty: Sections
    scribbles: Scribbles
    organs: Sequence[OrganRow]
    suggestions: tuple[int, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    truth: LabelMap | None = None
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        grids = {"labels": self.labels.labels.shape, "scribbles": self.scribbles.weights.shape}
        if self.truth is not None:
            grids["truth"] = self.truth.labels.shape
        named = {"suggestions": self.suggestions}
        check_sections("ScribblesReport()", self.images, self.uncertainty, grids, named)
        rows = [organ.label for organ in self.organs]
        twice = sorted({label for label in rows if rows.count(label) > 1})
        if twice:
            raise ValueError(f"ScribblesReport(): organs have two rows of label {twice[0]}; give each organ one")

    @property
    def section_uncertainty(self) -> NDArray[np.float64]:
        """Mean uncertainty of all pixels of each section, shape (Z,)."""
        return np.array([section.mean(dtype=np.float64) for section in self.uncertainty])

    @property
    def summary(self) -> str:
        """One sentence: how many sections, how many were drawn on, and each organ's volume."""
        n_sections = counted(self.images.space.shape[0], "section")
        found = [
            f"{self.labels.name_of(organ.label)} {volume_text(organ.volume_mm3)} mm³ "
            f"({' to '.join(map(volume_text, organ.interval_mm3))})"
            for organ in self.organs
        ]
        return f"{n_sections}, you drew on {len(self.scribbles.sections)}; {', '.join(found) or 'no organs'}."


def write_scribbles_report(path: Path, report: ScribblesReport) -> None:
    """Write the report as one self-contained HTML file.

    The file appears under its name only when it is complete. A file that is there already is replaced.

    Parameters
    ----------
    path : Path
        The file to write, in a folder that exists.
    report : ScribblesReport
        What it shows.

    Raises
    ------
    ValueError
        If there are more than 65534 structures.

    Examples
    --------
    >>> write_scribbles_report(Path("embryo-3.html"), report)  # doctest: +SKIP
    """
    structures = _structures(report)
    check_structures("write_scribbles_report()", structures, MOST_STRUCTURES - 1)  # a mark is one more than its class
    strokes = _stroke_counts(report.scribbles)
    write_page(
        path,
        "scribbles.html.j2",
        report,
        data=_page_data(report, structures, strokes),
        pictures=_packed_sections(report, structures),
        rows=_organ_rows(report, structures, strokes),
        score_names=SCORES if any(organ.scores for organ in report.organs) else {},
    )


def _structures(report: ScribblesReport) -> list[Structure]:
    maps = [report.labels] if report.truth is None else [report.labels, report.truth]
    return structures_of(maps, (*report.scribbles.classes, *(organ.label for organ in report.organs)))


def _stroke_counts(scribbles: Scribbles) -> dict[int, dict[int, int]]:
    """Number of marked pixels of each label on each section that was drawn on."""
    counts = {}
    for z in scribbles.sections:
        labels, n_pixels = np.unique(scribbles.label_map.labels[z][scribbles.weights[z] > 0], return_counts=True)
        counts[z] = dict(zip(labels.tolist(), n_pixels.tolist(), strict=True))
    return counts


def _page_data(
    report: ScribblesReport, structures: Sequence[Structure], strokes: Mapping[int, Mapping[int, int]]
) -> dict[str, Any]:
    """What the page's script needs besides the sections' pixels; `strokes` as `_stroke_counts` gives them."""
    mean = report.section_uncertainty
    number = {structure.label: n for n, structure in enumerate(structures)}
    drawn = {z: [[number[label], n_pixels] for label, n_pixels in here.items()] for z, here in strokes.items()}
    return {
        **viewer_data(report.images, structures, shown_size(report.images.space.shape)),
        "sections": [
            {**section_data(report.images, z, float(mean[z])), "strokes": drawn.get(z, [])} for z in range(len(mean))
        ],
        "suggestions": report.suggestions,
        "start": report.suggestions[0] if report.suggestions else int(mean.argmax()),
    }


def _packed_sections(report: ScribblesReport, structures: Sequence[Structure]) -> Iterator[dict[str, str]]:
    layers = {"labels": report.labels.labels}
    if report.truth is not None:
        layers["truth"] = report.truth.labels
    size = shown_size(report.images.space.shape)
    known = np.array([structure.label for structure in structures])
    marks, drawn = report.scribbles.label_map.labels, set(report.scribbles.sections)
    for z, packed in enumerate(packed_sections(report.images, structures, report.uncertainty, layers, size)):
        if z in drawn:
            strokes, numbers = report.scribbles.weights[z] > 0, np.zeros(marks.shape[1:], np.uint16)
            numbers[strokes] = np.searchsorted(known, marks[z][strokes]) + 1
            packed["strokes"] = pack_strokes(numbers, size)
        yield packed


def _organ_rows(
    report: ScribblesReport, structures: Sequence[Structure], strokes: Mapping[int, Mapping[int, int]]
) -> list[dict[str, Any]]:
    """Rows of the table of organs; the last is background, of which there are strokes alone."""
    of_label = {structure.label: structure for structure in structures}
    rows = [
        {
            "volumes": [volume_text(mm3) for mm3 in (organ.volume_mm3, *organ.interval_mm3)],
            "scores": [finite((organ.scores or {}).get(name)) for name in SCORES],
            **_strokes_of(of_label[organ.label], strokes),
        }
        for organ in report.organs
    ]
    return [*rows, {"volumes": ["–"] * 3, "scores": [None] * len(SCORES), **_strokes_of(structures[0], strokes)}]


def _strokes_of(structure: Structure, strokes: Mapping[int, Mapping[int, int]]) -> dict[str, Any]:
    here = {z: counts[structure.label] for z, counts in strokes.items() if structure.label in counts}
    return {"structure": structure, "pixels": sum(here.values()), "sections": list(here)}
