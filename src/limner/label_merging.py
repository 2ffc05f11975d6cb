"""Labels of a protocol merged into the structures that are wanted: by a table of the user's, or left with right.

A table is CSV with the header ``structure,labels``; a row holds a structure's name and, after it, its labels by number,
range of numbers or name:

    structure,labels
    cerebral cortex,3,42,1000-2035
    thalamus,Left-Thalamus,Right-Thalamus
    background,24,Unknown,500-530

A merged structure keeps the number of the first label of its row; the row ``background`` takes what is to be left out.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.volume import Label, LabelMap, LabelTable

BACKGROUND = "background"
SIDES = {"left": 0, "l": 0, "lh": 0, "right": 1, "r": 1, "rh": 1}
SHOWN = 10  # labels named in a message


@dataclass(frozen=True)
class Merging:
    """Which labels make up which structure.

    Parameters
    ----------
    structures : tuple of (str, tuple of int)
        Name and labels of each; the first is background (which always holds 0). No label occurs twice.

    Examples
    --------
    >>> merging = Merging((("background", (0,)), ("thalamus", (10, 49))))
    >>> merging.to_classes(np.array([0, 49, 10]))
    array([0, 1, 1], dtype=uint8)
    >>> merging.to_labels(np.array([0, 1]))
    array([ 0, 10])
    """

    structures: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each class, background first."""
        return tuple(name for name, _ in self.structures)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Number that stands for each class in files: its first label; 0 for background."""
        return (0, *(labels[0] for _, labels in self.structures[1:]))

    def to_classes(self, labels: NDArray[np.integer[Any]], what: str = "the labels") -> NDArray[np.integer[Any]]:
        """Classes 0, 1, ... in the order of `structures`, in uint8 or uint16; same shape.

        Raises
        ------
        ValueError
            If a label is in no structure; `what` is named.
        """
        class_of = {label: i for i, (_, members) in enumerate(self.structures) for label in members}
        present, where = np.unique(labels, return_inverse=True)
        unknown = [int(label) for label in present if int(label) not in class_of]
        if unknown:
            raise ValueError(
                f"to_classes(): {what} hold labels that belong to no structure: {_listed(unknown)}; add them to the "
                f"table, in the row {BACKGROUND} to leave them out"
            )
        kind = np.uint8 if len(self.structures) <= 256 else np.uint16
        classes: NDArray[np.integer[Any]] = np.array([class_of[int(label)] for label in present], kind)
        return classes[where.reshape(labels.shape)]

    def to_labels(self, classes: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """The number that stands for each class; inverse of `to_classes` but for what was merged."""
        return np.asarray(self.numbers)[classes]

    def merge(self, label_map: LabelMap) -> LabelMap:
        """The label map with the numbers of merged structures; colours are those of each structure's first label.

        Raises
        ------
        ValueError
            As of `to_classes`.
        """
        what = "the labels" if label_map.source is None else str(label_map.source.path)
        merged = self.to_labels(self.to_classes(label_map.labels, what))
        return LabelMap(merged.astype(label_map.labels.dtype), label_map.space, self.table(label_map.table))

    def table(self, own: LabelTable) -> dict[int, Label]:
        """Names of the structures; colours from a table of the labels' own where it has them."""
        numbered = zip(self.numbers[1:], self.names[1:], strict=True)
        return {n: Label(name, own[n].colour if n in own else (0, 0, 0)) for n, name in numbered}


def read_merging(path: str | Path, table: LabelTable | None = None) -> Merging:
    """Read a table of structures.

    Parameters
    ----------
    path : str or Path
        CSV, see the top of this module. Names of labels are compared without regard to case.
    table : mapping of int to Label, optional
        The labels' names, of FreeSurfer's colour table say (`limner.io.read_table`); needed where rows name labels.

    Raises
    ------
    ValueError
        If the file is no such table, a label is given twice, or a name is none of the table's; the line is named.
    """
    path = Path(path)
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines(), skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"read_merging(): {path} cannot be read as text: {error}") from None
    if not rows or [cell.strip().lower() for cell in rows[0][:2]] != ["structure", "labels"]:
        raise ValueError(f"read_merging(): {path} has no header; let its first line be structure,labels")
    numbers = {label.name.lower(): n for n, label in (table or {}).items()}
    members: dict[str, list[int]] = {BACKGROUND: [0]}
    taken = {0: BACKGROUND}
    for line, row in enumerate(rows[1:], start=2):
        name, *cells = [cell.strip() for cell in row] or [""]
        if not any((name, *cells)) or name.startswith("#"):
            continue
        for label in _labels_of(cells, numbers, f"line {line} of {path}"):
            if taken.setdefault(label, name) != name:
                raise ValueError(
                    f"read_merging(): line {line} of {path} gives label {label} to {name!r}, which {taken[label]!r} "
                    "has; give each label to one structure"
                )
            members.setdefault(name, []).append(label)
    return Merging(tuple((name, tuple(dict.fromkeys(labels))) for name, labels in members.items()))


def merge_sides(labels: Iterable[int], table: LabelTable) -> Merging:
    """Left and right made one where their names differ in the side alone; every other label is a structure of its own.

    Parameters
    ----------
    labels : iterable of int
        Labels that occur.
    table : mapping of int to Label
        Their names, such as ``Left-Thalamus``, ``ctx-rh-insula``, ``thalamus (left)``, ``L_CA1``.

    Examples
    --------
    >>> table = {10: Label("Left-Thalamus", (0, 0, 0)), 49: Label("Right-Thalamus", (0, 0, 0))}
    >>> merge_sides([0, 10, 49, 16], table).structures
    (('background', (0,)), ('Thalamus', (10, 49)), ('label 16', (16,)))
    """
    wanted = sorted({int(n) for n in labels} - {0})
    found = {n: _without_side(table[n].name) for n in wanted if n in table}
    sides: dict[str, dict[int, int]] = {}
    for n, (name, side) in found.items():
        if side is not None:
            sides.setdefault(name.lower(), {}).setdefault(side, n)
    pairs = {min(pair.values()): tuple(sorted(pair.values())) for pair in sides.values() if len(pair) == 2}
    second = {labels[1] for labels in pairs.values()}
    structures: list[tuple[str, tuple[int, ...]]] = [(BACKGROUND, (0,))]
    for n in wanted:
        if n in pairs:
            structures.append((found[n][0], pairs[n]))
        elif n not in second:
            structures.append((table[n].name if n in table else f"label {n}", (n,)))
    return Merging(tuple(structures))


def each_label(labels: Iterable[int], table: Mapping[int, Label] | None = None) -> Merging:
    """Nothing merged: a structure for every label that occurs."""
    names = {n: (table or {})[n].name if n in (table or {}) else f"label {n}" for n in {int(n) for n in labels} - {0}}
    return Merging(((BACKGROUND, (0,)), *((names[n], (n,)) for n in sorted(names))))


def _without_side(name: str) -> tuple[str, int | None]:
    """The name without the word that says left (0) or right (1), and which it was."""
    words = re.split(r"([-_.\s()]+)", name)
    for i, word in enumerate(words):
        if word.lower() in SIDES:
            kept = "".join(words[:i]).rstrip("-_. (") + "".join(words[i + 1 :]).rstrip(") ")
            return kept.lstrip("-_. )"), SIDES[word.lower()]
    return name, None


def _labels_of(cells: list[str], numbers: Mapping[str, int], where: str) -> list[int]:
    labels: list[int] = []
    for cell in filter(None, cells):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", cell)
        if ends is not None:
            labels += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
        elif cell.lower() in numbers:
            labels.append(numbers[cell.lower()])
        else:
            raise ValueError(
                f"read_merging(): {where} names the label {cell!r}, which no label table names; give its number, or "
                "the table that has it"
            )
    if not labels:
        raise ValueError(f"read_merging(): {where} names no label; give some after the structure's name, or delete it")
    return labels


def _listed(labels: list[int]) -> str:
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return ", ".join(str(label) for label in labels[:SHOWN]) + more
