"""Rigid transforms of the sections of a stack, as a table that people can read and mend."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("section", "rotation_deg", "shift_y_mm", "shift_x_mm", "mirrored", "fit", "found")


@dataclass(frozen=True)
class SectionTransforms:
    """How each section lies beside the aligned stack.

    Parameters
    ----------
    matrices : ndarray
        Shape (Z, 2, 3): the point `p` (y, x; mm from the middle of the aligned section) is found at
        ``matrix[:, :2] @ p + matrix[:, 2]`` mm from the middle of the section as given. Rotations, with or without a
        mirror, and shifts.
    fit : ndarray
        Quality of fit, shape (Z,), up to 1; NaN where there is none.
    found : tuple of str
        What is wrong with each section; empty where nothing is.

    Raises
    ------
    ValueError
        If a matrix is no rotation or mirror.
    """

    matrices: NDArray[np.float64]
    fit: NDArray[np.float64]
    found: tuple[str, ...]

    def __post_init__(self) -> None:
        linear = self.matrices[:, :, :2]
        rigid = np.isclose(linear @ linear.transpose(0, 2, 1), np.eye(2), atol=1e-6).all(axis=(1, 2))
        if not rigid.all():
            raise ValueError(
                f"SectionTransforms(): the matrix of section {int(rigid.argmin())} is no rotation; give rigid ones"
            )

    @property
    def mirrored(self) -> NDArray[np.bool_]:
        """Whether left and right of each section have changed places, shape (Z,)."""
        return np.linalg.det(self.matrices[:, :, :2]) < 0

    @property
    def rotations(self) -> NDArray[np.float64]:
        """By how much each section as given is turned counter-clockwise, before it is mirrored; degrees, (Z,)."""
        first = self.matrices[:, 0, :2]  # the mirror changes the second row alone
        return np.degrees(np.arctan2(-first[:, 1], first[:, 0]))

    @classmethod
    def of_parameters(
        cls,
        rotations: NDArray[np.float64],
        shifts: NDArray[np.float64],
        mirrored: NDArray[np.bool_],
        fit: NDArray[np.float64],
        found: tuple[str, ...],
    ) -> SectionTransforms:
        """From rotations in degrees (Z,), shifts in mm (Z, 2) and mirrors (Z,)."""
        angle = np.radians(rotations)
        sign = np.where(mirrored, -1.0, 1.0)
        rows = [
            np.stack([np.cos(angle), -np.sin(angle), shifts[:, 0]], axis=1),
            np.stack([sign * np.sin(angle), sign * np.cos(angle), shifts[:, 1]], axis=1),
        ]
        return cls(np.stack(rows, axis=1), fit, found)

    def __len__(self) -> int:
        return len(self.matrices)


def write_transforms(path: str | Path, transforms: SectionTransforms, names: Sequence[str]) -> None:
    """Write a CSV with one row a section.

    Parameters
    ----------
    path : str or Path
        The file.
    transforms : SectionTransforms
        Of every section.
    names : sequence of str
        File names of the sections, or their indices.
    """
    with Path(path).open("w", newline="", encoding="utf-8") as handle:
        rows = csv.writer(handle, lineterminator="\n")
        rows.writerow(COLUMNS)
        parameters = zip(
            names,
            transforms.rotations.tolist(),
            transforms.matrices[:, :, 2].tolist(),
            transforms.mirrored.tolist(),
            transforms.fit.tolist(),
            transforms.found,
            strict=True,
        )
        for name, rotation, (y, x), mirrored, fit, found in parameters:
            # + 0.0: no minus before a zero
            numbers = [f"{round(value, 6) + 0.0:g}" for value in (rotation, y, x)]
            rows.writerow((name, *numbers, int(mirrored), "" if math.isnan(fit) else f"{fit:.4f}", found))


def read_transforms(path: str | Path, names: Sequence[str]) -> SectionTransforms:
    """Read what `write_transforms` wrote, perhaps changed by hand; only the first five columns are needed.

    Parameters
    ----------
    path : str or Path
        The file.
    names : sequence of str
        File names of the sections, or their indices, in the stack's order.

    Returns
    -------
    SectionTransforms
        In the stack's order, in which the rows need not be.

    Raises
    ------
    ValueError
        If a column or a section is missing, or a row is malformed or names no section or one named before.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = Path(folder, "transforms.csv")
    ...     _ = table.write_text("section,rotation_deg,shift_y_mm,shift_x_mm,mirrored\\ns1.png,90,0.5,0,0\\n")
    ...     read_transforms(table, ["s1.png"]).matrices[0].round(3)
    array([[ 0. , -1. ,  0.5],
           [ 1. ,  0. ,  0. ]])
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            table = csv.DictReader(handle)
            missing = [name for name in COLUMNS[:5] if name not in (table.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"read_transforms(): {path} has no column {missing[0]}; give a table with "
                    f"{', '.join(COLUMNS[:5])} as `limner stack align` writes it"
                )
            rows = {}
            for line, row in enumerate(table, start=2):
                if row["section"] not in names or row["section"] in rows:
                    again = "a second time" if row["section"] in rows else "which the stack has not"
                    raise ValueError(f"read_transforms(): line {line} of {path} names {row['section']!r} {again}")
                rows[row["section"]] = _parsed(path, line, row)
    except UnicodeDecodeError:
        raise ValueError(f"read_transforms(): {path} is no text; give the table of transforms") from None
    absent = [name for name in names if name not in rows]
    if absent:
        raise ValueError(f"read_transforms(): {path} has no row for section {absent[0]}; give every section one")
    numbers = np.array([rows[name][0] for name in names])
    found = tuple(rows[name][1] for name in names)
    return SectionTransforms.of_parameters(numbers[:, 0], numbers[:, 1:3], numbers[:, 3] == 1, numbers[:, 4], found)


def _parsed(path: Path, line: int, row: dict[str, str]) -> tuple[list[float], str]:
    try:
        numbers = [float(row[name]) for name in COLUMNS[1:5]]
        fit = float(row.get("fit") or "nan")
    except (TypeError, ValueError):
        numbers, fit = [math.nan], math.nan
    if not all(map(math.isfinite, numbers)) or numbers[3] not in (0, 1):
        raise ValueError(
            f"read_transforms(): line {line} of {path} is {', '.join(str(v) for v in row.values())}; give a rotation "
            "in degrees, shifts in mm, and 1 for mirrored, else 0"
        )
    return [*numbers, fit], row.get("found") or ""
