"""``limner evaluate labels``: accuracy and Dice of a labelled stack against the truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from limner.cli.arguments import Indices, SectionAxis, Spacing

if TYPE_CHECKING:
    from limner.metrics.pixels import StackScore
    from limner.volume import LabelMap


@dataclass(frozen=True)
class EvaluateLabels:
    """Accuracy and Dice of a labelled stack against the truth, near the true structures.

    A pixel counts when it lies inside a true structure of its section or within `--within-mm` of one. Accuracy is the
    fraction of these pixels whose label, background included, is right: median and minimum over sections. Dice is taken
    per structure over the pixels of all sections together; the mean counts each structure once. Name the sections that
    were completed with --sections: those that were labelled by hand are right by definition.
    """

    predicted: Annotated[Positional[Path], arg(metavar="PRED")]
    """Labels to score: a volume, a multi-page TIFF, or a folder with every section."""
    truth: Annotated[Positional[Path], arg(metavar="TRUTH")]
    """True labels: a file of the same shape, or a folder of sections under the same names."""
    within_mm: float = 2.0
    """Distance in mm around the true structures up to which background counts. Atzeni et al.: 2, for human brains."""
    sections: Annotated[Indices, arg(help_behavior_hint="(default: those that hold a true label)")] = ()
    """Sections to score: indices from 0; 1-9,11-19 and 0-250:10 (every tenth) work too."""
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Also write the scores, per section and structure, to this new file."""
    spacing: Annotated[Spacing, arg(help_behavior_hint="(default: from PRED)")] = ()
    """Distance between sections, then pixels along y and x, in mm; needed when PRED does not state it."""
    section_axis: SectionAxis = "z"
    """Axis of a volume along which its sections run: z, y, x (or k, j, i in NIfTI's words); z is the slowest."""
    label_table: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Names of the structures: ITK-SNAP, FreeSurfer or CSV (index,name,r,g,b)."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace the file named by --json where there is one."""

    def run(self, command_line: Sequence[str]) -> int:
        """Score, print the table, write the JSON file."""
        del command_line
        if self.json is not None:
            check_json_file(self.json, self.overwrite)
        score, truth = score_files(self)
        print_structures(score, truth)
        print_score(score, "scored")
        if self.json is not None:
            _write_json(self.json, score, truth)
        return 0


def score_files(command: EvaluateLabels) -> tuple[StackScore, LabelMap]:
    """Read both label stacks and score them; the truth comes back for its names."""
    from limner.io import read_label_volume, read_labels
    from limner.metrics.pixels import score_stack

    predicted = read_label_volume(command.predicted, spacing=command.spacing or None, section_axis=command.section_axis)
    truth = read_labels(
        command.truth,
        predicted,
        labelled=command.sections or None,
        section_axis=command.section_axis,
        table=command.label_table,
    )
    score = score_stack(predicted, truth.label_map, truth.labelled, command.within_mm)
    return score, truth.label_map


def print_structures(score: StackScore, truth: LabelMap) -> None:
    """Print the Dice of each structure."""
    from rich.console import Console
    from rich.table import Table

    table = Table("label", "structure", "Dice", box=None, pad_edge=False)
    table.columns[0].justify = table.columns[2].justify = "right"
    for label, value in score.pooled_dice.items():
        table.add_row(str(label), truth.name_of(label), f"{value:.3f}")
    Console(highlight=False, markup=False).print(table)


def print_score(score: StackScore, row: str) -> None:
    """Print median and minimum accuracy and mean Dice as a table of one row."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "accuracy: median", "minimum", "mean Dice", "sections", "within", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row(
        row,
        f"{score.median_accuracy:.3f}",
        f"{score.minimum_accuracy:.3f}",
        f"{score.mean_dice:.3f}",
        str(len(score.accuracy)),
        f"{score.within_mm:g} mm",
    )
    Console(highlight=False, markup=False).print(table)


def check_json_file(path: Path, overwrite: bool) -> None:
    """Check before the work that the file of ``--json`` can be written.

    Raises
    ------
    ValueError
        If it is a folder, lies in none, or exists and is not to be replaced.
    """
    if path.is_dir():
        raise ValueError(f"--json: {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"--json: there is no folder {path.parent}; make it, or name a file in another")
    if path.exists() and not overwrite:
        raise ValueError(f"--json: {path} exists; name another file or add --overwrite")


def _write_json(path: Path, score: StackScore, truth: LabelMap) -> None:
    from limner.run_record import write_atomically

    names = {label: truth.name_of(label) for label in score.pooled_dice}
    text = json.dumps(score.to_json(names), indent=2, allow_nan=False)
    write_atomically(path, lambda handle: handle.write(text.encode() + b"\n"))
