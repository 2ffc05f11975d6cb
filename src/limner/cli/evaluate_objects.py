"""``limner evaluate objects``: AJI, panoptic quality and F1 of label images against the truth."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, arg

if TYPE_CHECKING:
    from limner.metrics.objects import ObjectScore, ObjectSummary

COLUMNS = {  # of the printed table; the JSON file holds every score
    "aji": "AJI",
    "aji_once": "AJI 1x",
    "aji_plus": "AJI+",
    "pq": "PQ",
    "dq": "DQ",
    "sq": "SQ",
    "f1": "F1",
    "pixel_f1": "px F1",
}


@dataclass(frozen=True)
class EvaluateObjects:
    """AJI, AJI+, panoptic quality and F1 of objects, nuclei say, against the true ones, and scores of the foreground.

    Objects are the ids above 0 of a label image. The table shows the mean over images, and the score of all images'
    counts pooled. AJI is Kumar et al.'s, where a prediction may serve several true objects; `AJI 1x` lets it serve one;
    AJI+ pairs one to one. PQ, DQ and SQ match at an IoU above 0.5, F1 at or above `--iou`; `px F1` is that of the
    foreground's pixels. Where a score is undefined, in an image without objects say, it is shown as `-` and left out of
    the means.
    """

    predicted: Annotated[Positional[Path], arg(metavar="PRED")]
    """Labels to score: a PNG or TIFF, or a folder of them."""
    truth: Annotated[Positional[Path], arg(metavar="TRUTH")]
    """True labels: a file of the same size, or a folder with files of the same names (endings may differ)."""
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Also write all scores, per image, per group and over all, to this new file."""
    group_by: Annotated[str | None, arg(metavar="REGEX", help_behavior_hint="(default: none)")] = None
    r"""Regular expression whose one group is found in a file's name and names its patient, say: '^(\d+)_'."""
    groups: Annotated[Path | None, arg(metavar="CSV", help_behavior_hint="(default: none)")] = None
    """Table with the columns name and group that names each file's patient, say."""
    iou: float = 0.5
    """Intersection over union from which a pair counts for F1."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace the file named by --json where there is one."""

    def run(self, command_line: Sequence[str]) -> int:
        """Score, print the table, write the JSON file."""
        del command_line
        _check_options(self)
        pairs = match_files(self.predicted, self.truth)
        group_of = find_groups(self, [truth.name for _, truth in pairs])
        scores = score_files(pairs, self.iou)
        print_scores(scores, group_of)
        if self.json is not None:
            _write_json(self.json, scores, group_of)
        return 0


def _check_options(command: EvaluateObjects) -> None:
    if command.json is not None and command.json.exists() and not command.overwrite:
        raise ValueError(f"--json: {command.json} exists; name another file or add --overwrite")
    if command.json is not None and not command.json.parent.is_dir():
        raise ValueError(f"--json: {command.json.parent} is no folder; make it, or name a file elsewhere")
    if command.group_by is not None and command.groups is not None:
        raise ValueError("--groups: --group-by is given too; give one of the two")
    if not 0 < command.iou <= 1:
        raise ValueError(f"--iou: {command.iou} is no threshold; give a number above 0 and at most 1")


def match_files(predicted: Path, truth: Path) -> list[tuple[Path, Path]]:
    """Pair each predicted file with the true one of the same name, endings aside; two files are a pair as they are.

    Parameters
    ----------
    predicted, truth : Path
        Two files, or two folders.

    Returns
    -------
    list of tuple of Path
        Predicted and true file of each image, in natural order.

    Raises
    ------
    ValueError
        If one is missing, one a file and one a folder, or a file has no counterpart.
    """
    from limner.io.sections import list_sections

    for path in (predicted, truth):
        if not path.exists():
            raise ValueError(f"match_files(): {path} does not exist")
    if predicted.is_dir() != truth.is_dir():
        folder, file = (predicted, truth) if predicted.is_dir() else (truth, predicted)
        raise ValueError(f"match_files(): {folder} is a folder, {file} is a file; give two folders or two files")
    if not predicted.is_dir():
        return [(predicted, truth)]
    found = {file.stem: file for file in list_sections(predicted)}
    wanted = {file.stem: file for file in list_sections(truth)}
    lonely = sorted(wanted.keys() ^ found.keys())
    if lonely:
        stem = lonely[0]
        file, other = (wanted[stem], predicted) if stem in wanted else (found[stem], truth)
        raise ValueError(f"match_files(): {file} has no counterpart in {other}; add one, or take the file away")
    return [(found[stem], wanted[stem]) for stem in wanted]


def find_groups(command: EvaluateObjects, names: Sequence[str]) -> dict[str, str]:
    """Group of each file by its name, from ``--group-by`` or ``--groups``; empty where neither is given.

    Raises
    ------
    ValueError
        If the expression or the table is malformed, or names no group for a file.
    """
    if command.group_by is not None:
        return _groups_by_rule(command.group_by, names)
    if command.groups is None:
        return {}
    listed = _read_groups(command.groups)
    group_of = {name: listed.get(name, listed.get(Path(name).stem)) for name in names}
    for name, group in group_of.items():
        if group is None:
            raise ValueError(f"--groups: {command.groups} has no row for {name}; name a group for every file")
    return {name: group for name, group in group_of.items() if group is not None}


def _groups_by_rule(rule: str, names: Sequence[str]) -> dict[str, str]:
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise ValueError(f"--group-by: {rule!r} is no regular expression: {error}") from None
    if pattern.groups != 1:
        raise ValueError(f"--group-by: {rule!r} has {pattern.groups} groups in parentheses; give it one")
    group_of = {}
    for name in names:
        match = pattern.search(name)
        if match is None or not match[1]:
            raise ValueError(f"--group-by: {rule!r} finds no group in {name}; give one that fits every file's name")
        group_of[name] = match[1]
    return group_of


def _read_groups(path: Path) -> dict[str, str]:
    """Group by name as the table gives it, and by name without ending."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--groups: {path} cannot be read as text: {error}") from None
    rows = csv.DictReader(lines)
    if not {"name", "group"} <= set(rows.fieldnames or ()):
        raise ValueError(f"--groups: {path} has columns {', '.join(rows.fieldnames or ())}; give it name and group")
    listed: dict[str, str] = {}
    for row in rows:
        name, group = (row["name"] or "").strip(), (row["group"] or "").strip()
        if not name or not group or name in listed:
            found = "names a file a second time" if name in listed else "lacks a name or a group"
            raise ValueError(f"--groups: {path} line {rows.line_num} {found}; give each file one row: name,group")
        listed[name] = group
    return {Path(name).stem: group for name, group in listed.items()} | listed


def score_files(pairs: Sequence[tuple[Path, Path]], iou: float) -> dict[str, ObjectScore]:
    """Read and score one image after the other; by the true file's name.

    Raises
    ------
    ValueError
        If a file is no label image, or the two of a pair differ in size.
    """
    from limner.io import read_label_image
    from limner.metrics.objects import score_objects

    scores = {}
    for predicted_file, true_file in pairs:
        predicted, truth = read_label_image(predicted_file), read_label_image(true_file)
        if predicted.shape != truth.shape:
            raise ValueError(
                f"score_files(): {predicted_file} has size {predicted.shape}, {true_file} {truth.shape}; give labels "
                "of one size"
            )
        scores[true_file.name] = score_objects(predicted, truth, iou)
    return scores


def print_scores(scores: Mapping[str, ObjectScore], group_of: Mapping[str, str]) -> None:
    """Print a table: the means of each group, or each image where there are no groups; then mean, SD and pooled."""
    from rich.console import Console
    from rich.table import Table

    from limner.metrics.objects import summarise, summarise_groups

    overall = summarise(list(scores.values()))
    groups = summarise_groups(scores, group_of) if group_of else {}
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("group" if groups else "image", overflow="fold")
    for title in (*(["images"] if groups else []), "true", "found", *COLUMNS.values()):
        table.add_column(title, justify="right")

    def add(name: str, counts: ObjectScore | None, values: Mapping[str, float]) -> None:
        numbers = [] if counts is None else [counts.images, counts.true_objects, counts.predicted_objects]
        first = [str(n) for n in numbers] or [""] * 3
        table.add_row(name, *(first if groups else first[1:]), *(_three_digits(values[key]) for key in COLUMNS))

    for name, group in groups.items():
        add(name, group.pooled, group.mean)
    for name, score in {} if groups else scores.items():
        add(name, score, score.scores())
    if len(scores) > 1:
        add("mean", None, overall.mean)
        add("SD", None, overall.sd)
        add("pooled", overall.pooled, overall.pooled.scores())
    Console(highlight=False, markup=False).print(table)


def _three_digits(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"  # NaN is unequal to itself


def _write_json(path: Path, scores: Mapping[str, ObjectScore], group_of: Mapping[str, str]) -> None:
    from limner.metrics.objects import summarise, summarise_groups
    from limner.run_record import write_atomically

    groups: Mapping[str, ObjectSummary] = summarise_groups(scores, group_of) if group_of else {}
    overall = summarise(list(scores.values()))
    content: dict[str, Any] = {
        "iou_threshold": overall.pooled.iou_threshold,
        "images": {name: {"group": group_of.get(name), **score.to_json()} for name, score in scores.items()},
        "groups": {name: group.to_json() for name, group in groups.items()},
        "overall": overall.to_json(),
    }
    text = json.dumps(content, indent=2, allow_nan=False)
    write_atomically(path, lambda handle: handle.write(text.encode() + b"\n"))
