"""The report of a completed stack: one web page in one file, which shows where not to trust the labels.

`write_stack_report` fills ``stack.html.j2``, which extends ``page.html.j2``. The page holds every section as text and
decodes a section when it is shown, so that long stacks open at once. It reaches no network.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import matplotlib
import numpy as np
from numpy.typing import NDArray

from limner.report.page import counted, write_page
from limner.report.section_pixels import (
    UNCERTAINTY_STEPS,
    grey_range,
    pack_image,
    pack_labels,
    pack_uncertainty,
    shown_size,
    surround_colour,
)
from limner.volume import LabelMap, Volume

COLOUR_MAP = "inferno"  # perceptually uniform: equal steps of uncertainty look equal


class SectionScores(TypedDict):
    """One section against the truth: `accuracy` of its pixels, `dice` of each label; in [0, 1], NaN where undefined."""

    accuracy: float
    dice: Mapping[int, float]


@dataclass(frozen=True)
class StackReport:
    """What the report of a completed stack shows.

    Parameters
    ----------
    title : str
        Heading of the page.
    images : Volume
        The sections, pixels of shape (Z, Y, X) or (Z, Y, X, 3). Pixels that have not 8 bits are shown from the 0.5
        to the 99.5 percentile of the stack.
    labels : LabelMap
        Labels of every section, shape (Z, Y, X); its table gives names and colours.
    uncertainty : ndarray of float32
        Shape (Z, Y, X), in [0, 1]: calibrated chance that the pixel's label is wrong; 0 on labelled sections.
    labelled : tuple of int
        Sections which the user labelled.
    suggestions : tuple of int
        Sections that would help most if labelled next, the best first.
    objective : mapping of int to sequence of float
        For unlabelled sections, the objective of generalised EM after each iteration; may be empty.
    settings : mapping of str to object
        Settings of the run, shown as a table.
    truth : LabelMap, optional
        True labels, shape (Z, Y, X), shown as an outline.
    scores : mapping of int to SectionScores, optional
        Agreement with the truth, for the sections that were measured.
    notes : sequence of str
        Warnings, shown at the top.

    Raises
    ------
    ValueError
        If shapes differ, uncertainty leaves [0, 1], or a section outside the stack is named.

    Examples
    --------
    >>> from limner.space import Space
    >>> space = Space(shape=(3, 8, 9), spacing=(0.2, 0.1, 0.1))
    >>> report = StackReport(
    ...     title="Mouse 7",
    ...     images=Volume(np.zeros(space.shape, np.uint8), space),
    ...     labels=LabelMap(np.ones(space.shape, np.uint8), space),
    ...     uncertainty=np.zeros(space.shape, np.float32),
    ...     labelled=(0, 2),
    ...     suggestions=(1,),
    ... )
    >>> report.summary
    '3 sections, 2 labelled by you and 1 completed; 1 structure; mean uncertainty of completed sections 0.00.'
    """

    title: str
    images: Volume
    labels: LabelMap
    uncertainty: NDArray[np.float32]
    labelled: tuple[int, ...]
    suggestions: tuple[int, ...] = ()
    objective: Mapping[int, Sequence[float]] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    truth: LabelMap | None = None
    scores: Mapping[int, SectionScores] | None = None
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        shape = self.images.space.shape
        shapes = {"labels": self.labels.labels.shape, "uncertainty": self.uncertainty.shape}
        if self.truth is not None:
            shapes["truth"] = self.truth.labels.shape
        for name, found in shapes.items():
            if found != shape:
                raise ValueError(f"StackReport(): {name} have shape {found}, images {shape} (z, y, x); give one grid")
        if not (self.uncertainty.min() >= 0 and self.uncertainty.max() <= 1):  # also catches NaN
            raise ValueError("StackReport(): uncertainty has values outside 0 to 1, or not numbers; it is a chance")
        for name in ("labelled", "suggestions", "objective", "scores"):
            outside = [z for z in getattr(self, name) or () if not 0 <= z < shape[0]]
            if outside:
                raise ValueError(
                    f"StackReport(): {name} name section {outside[0]}, but the stack has sections 0 to {shape[0] - 1}"
                )

    @property
    def section_uncertainty(self) -> NDArray[np.float64]:
        """Mean uncertainty of each section inside its structures, or of all of it where it has none, shape (Z,)."""
        inside = (
            values[labels > 0] if labels.any() else values
            for values, labels in zip(self.uncertainty, self.labels.labels, strict=True)
        )
        return np.array([values.mean(dtype=np.float64) for values in inside])

    @property
    def summary(self) -> str:
        """One sentence: how many sections, labelled sections and structures, and the mean uncertainty."""
        completed = sorted(set(range(self.labels.space.shape[0])) - set(self.labelled))
        mean = f"{self.section_uncertainty[completed].mean():.2f}" if completed else "none to give"
        n_structures = len(set(np.unique(self.labels.labels).tolist()) - {0})
        return (
            f"{counted(self.labels.space.shape[0], 'section')}, {len(set(self.labelled))} labelled by you and "
            f"{len(completed)} completed; {counted(n_structures, 'structure')}; "
            f"mean uncertainty of completed sections {mean}."
        )


def write_stack_report(path: Path, report: StackReport) -> None:
    """Write the report as one self-contained HTML file.

    The file appears under its name only when it is complete. A file that is there already is replaced.

    Parameters
    ----------
    path : Path
        The file to write, in a folder that exists.
    report : StackReport
        What it shows.

    Raises
    ------
    ValueError
        If there are more than 65535 structures.

    Examples
    --------
    >>> write_stack_report(Path("mouse-7.html"), report)  # doctest: +SKIP
    """
    structures = _structures(report)
    if len(structures) > 65536:
        raise ValueError(f"write_stack_report(): {len(structures) - 1} structures; a report holds 65535 at most")
    write_page(
        path,
        "stack.html.j2",
        report,
        data=_page_data(report, structures),
        pictures=_packed_sections(report, structures),
        tables=_score_tables(report, structures) if report.scores else None,
    )


@dataclass(frozen=True)
class _Structure:
    label: int
    name: str
    colour: str  # '#rrggbb'


def _structures(report: StackReport) -> list[_Structure]:
    """Background and every label that occurs, in order; the page knows a structure by its place in this list."""
    maps = [report.labels] if report.truth is None else [report.labels, report.truth]
    present = {int(label) for one in maps for section in one.labels for label in np.unique(section)}
    scored = {label for scores in (report.scores or {}).values() for label in scores["dice"]}
    return [_Structure(0, "background", "#808080")] + [
        _structure(label, maps) for label in sorted((present | scored) - {0})
    ]


def _structure(label: int, maps: Sequence[LabelMap]) -> _Structure:
    for one in maps:
        if label in one.table:
            red, green, blue = one.table[label].colour
            return _Structure(label, one.table[label].name, f"#{red:02x}{green:02x}{blue:02x}")
    hue = label * 0.61803398875 % 1  # the golden section keeps the hues of neighbouring labels apart
    rgb = colorsys.hls_to_rgb(hue, 0.6, 0.65)
    return _Structure(label, maps[0].name_of(label), "#" + "".join(f"{round(255 * part):02x}" for part in rgb))


def _page_data(report: StackReport, structures: Sequence[_Structure]) -> dict[str, Any]:
    """What the page's script needs besides the sections' pixels; holds no NaN, which JSON lacks."""
    space = report.images.space
    pixels = report.images.pixels
    size = shown_size(space.shape)
    mean = report.section_uncertainty
    colours = matplotlib.colormaps[COLOUR_MAP](np.linspace(0, 1, UNCERTAINTY_STEPS + 1), bytes=True)
    return {
        "structures": [{"name": s.name, "colour": s.colour} for s in structures],
        "sections": [_section_data(report, structures, z, float(mean[z])) for z in range(space.shape[0])],
        "size": size,
        "pixelSize": [space.spacing[1] * space.shape[1] / size[0], space.spacing[2] * space.shape[2] / size[1]],
        "suggestions": report.suggestions,
        "surround": surround_colour(pixels, grey_range(pixels)),
        "start": report.suggestions[0] if report.suggestions else int(mean.argmax()),
        "objective": {str(z): [_finite(v) for v in values] for z, values in report.objective.items()},
        "uncertaintyColours": [[int(part) for part in colour[:3]] for colour in colours],
    }


def _section_data(report: StackReport, structures: Sequence[_Structure], z: int, uncertainty: float) -> dict[str, Any]:
    scores = report.scores.get(z) if report.scores else None
    return {
        "name": report.images.section_names[z] if report.images.source is not None else "",
        "position": round(float(report.images.space.section_positions[z]), 6),
        "labelled": z in report.labelled,
        "uncertainty": round(uncertainty, 5),
        "accuracy": _finite(scores["accuracy"]) if scores else None,
        "dice": {n: _finite(scores["dice"].get(s.label)) for n, s in enumerate(structures)} if scores else {},
    }


def _packed_sections(report: StackReport, structures: Sequence[_Structure]) -> Iterator[dict[str, str]]:
    """Each section's layers as text; one at a time, so that no more than one is held in memory."""
    grey = grey_range(report.images.pixels)
    size = shown_size(report.images.space.shape)
    known = np.array([s.label for s in structures])
    for z, section in enumerate(report.images.pixels):
        packed = {
            "image": pack_image(section, grey, size),
            "labels": pack_labels(np.searchsorted(known, report.labels.labels[z]), size),
            "uncertainty": pack_uncertainty(report.uncertainty[z], size),
        }
        if report.truth is not None:
            packed["truth"] = pack_labels(np.searchsorted(known, report.truth.labels[z]), size)
        yield packed


def _score_tables(report: StackReport, structures: Sequence[_Structure]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the two tables of scores: one row a section, one row a structure; what is undefined is None."""
    measured = sorted((report.scores or {}).items())
    dice = {z: _defined_dice(scores, structures) for z, scores in measured}
    columns = [(s, {z: here[s] for z, here in dice.items() if s in here}) for s in structures]
    return {
        "sections": [
            {"section": z, "accuracy": _finite(scores["accuracy"]), **_summary_of(dice[z])} for z, scores in measured
        ],
        "structures": [{"structure": s, "n": len(here), **_summary_of(here)} for s, here in columns if here],
    }


def _defined_dice(scores: SectionScores, structures: Sequence[_Structure]) -> dict[_Structure, float]:
    values = {s: _finite(scores["dice"].get(s.label)) for s in structures[1:]}
    return {s: value for s, value in values.items() if value is not None}


def _summary_of(dice: Mapping[Any, float]) -> dict[str, Any]:
    if not dice:
        return {"mean": None, "median": None, "worst": None, "lowest": None}
    values = list(dice.values())
    worst = min(dice, key=lambda key: dice[key])
    return {"mean": np.mean(values), "median": np.median(values), "worst": worst, "lowest": dice[worst]}


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
