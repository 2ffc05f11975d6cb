"""The report of a completed stack: one web page in one file, which shows where not to trust the labels.

`write_stack_report` fills ``stack.html.j2``, which extends ``page.html.j2``. The page holds every section as text and
decodes a section when it is shown, so that long stacks open at once. It reaches no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from limner.report.page import counted, write_page
from limner.report.section_pixels import shown_size
from limner.report.sections import (
    Structure,
    check_sections,
    check_structures,
    finite,
    packed_sections,
    section_data,
    structures_of,
    viewer_data,
)
from limner.volume import LabelMap, Volume


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
        grids = {"labels": self.labels.labels.shape}
        if self.truth is not None:
            grids["truth"] = self.truth.labels.shape
        named = {name: getattr(self, name) or () for name in ("labelled", "suggestions", "objective", "scores")}
        check_sections("StackReport()", self.images, self.uncertainty, grids, named)

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
    check_structures("write_stack_report()", structures)
    write_page(
        path,
        "stack.html.j2",
        report,
        data=_page_data(report, structures),
        pictures=_packed_sections(report, structures),
        tables=_score_tables(report, structures) if report.scores else None,
    )


def _structures(report: StackReport) -> list[Structure]:
    maps = [report.labels] if report.truth is None else [report.labels, report.truth]
    return structures_of(maps, (label for scores in (report.scores or {}).values() for label in scores["dice"]))


def _page_data(report: StackReport, structures: Sequence[Structure]) -> dict[str, Any]:
    """What the page's script needs besides the sections' pixels; holds no NaN, which JSON lacks."""
    mean = report.section_uncertainty
    return {
        **viewer_data(report.images, structures, shown_size(report.images.space.shape)),
        "sections": [_section_data(report, structures, z, float(mean[z])) for z in range(len(mean))],
        "suggestions": report.suggestions,
        "start": report.suggestions[0] if report.suggestions else int(mean.argmax()),
        "objective": {str(z): [finite(v) for v in values] for z, values in report.objective.items()},
    }


def _section_data(report: StackReport, structures: Sequence[Structure], z: int, uncertainty: float) -> dict[str, Any]:
    scores = report.scores.get(z) if report.scores else None
    # of hundreds of structures most are not on a section: what is undefined is left out
    found = {n: finite(scores["dice"].get(s.label)) for n, s in enumerate(structures)} if scores else {}
    return {
        **section_data(report.images, z, uncertainty),
        "labelled": z in report.labelled,
        "accuracy": finite(scores["accuracy"]) if scores else None,
        "dice": {n: round(value, 5) for n, value in found.items() if value is not None},
    }


def _packed_sections(report: StackReport, structures: Sequence[Structure]) -> Iterator[dict[str, str]]:
    layers = {"labels": report.labels.labels}
    if report.truth is not None:
        layers["truth"] = report.truth.labels
    size = shown_size(report.images.space.shape)
    return packed_sections(report.images, structures, report.uncertainty, layers, size)


def _score_tables(report: StackReport, structures: Sequence[Structure]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the two tables of scores: one row a section, one row a structure; what is undefined is None."""
    measured = sorted((report.scores or {}).items())
    dice = {z: _defined_dice(scores, structures) for z, scores in measured}
    columns = [(s, {z: here[s] for z, here in dice.items() if s in here}) for s in structures]
    return {
        "sections": [
            {"section": z, "accuracy": finite(scores["accuracy"]), **_summary_of(dice[z])} for z, scores in measured
        ],
        "structures": [{"structure": s, "n": len(here), **_summary_of(here)} for s, here in columns if here],
    }


def _defined_dice(scores: SectionScores, structures: Sequence[Structure]) -> dict[Structure, float]:
    values = {s: finite(scores["dice"].get(s.label)) for s in structures[1:]}
    return {s: value for s, value in values.items() if value is not None}


def _summary_of(dice: Mapping[Any, float]) -> dict[str, Any]:
    if not dice:
        return {"mean": None, "median": None, "worst": None, "lowest": None}
    values = list(dice.values())
    worst = min(dice, key=lambda key: dice[key])
    return {"mean": np.mean(values), "median": np.median(values), "worst": worst, "lowest": dice[worst]}
