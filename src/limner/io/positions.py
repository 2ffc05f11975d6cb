"""Positions of unevenly spaced sections, from a table."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path


def read_positions(path: str | Path, names: Sequence[str], n_sections: int) -> tuple[float, ...]:
    """Read the position of every section in mm.

    Parameters
    ----------
    path : str or Path
        Table of two columns, section and z in mm, separated by comma, semicolon or tab; a header line may come first.
        A section is named by its file, with or without ending, or by its index from 0, the same way throughout.
    names : sequence of str
        File names of the sections in the stack's order; empty where the stack is one file.
    n_sections : int
        Number of sections.

    Returns
    -------
    tuple of float
        Positions in mm in the stack's order, increasing.

    Raises
    ------
    ValueError
        If a row is malformed, names no section or one named before, a section is missing, or positions do not increase.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = Path(folder, "positions.csv")
    ...     _ = table.write_text("section,z_mm\\ns1.png,0.0\\ns2.png,0.15\\n")
    ...     read_positions(table, ["s1.png", "s2.png"], 2)
    (0.0, 0.15)
    """
    path = Path(path)
    rows = _rows(path)
    index_of = _index_of(names, n_sections, rows)
    if not _is_number(rows[0][2]) and rows[0][1] not in index_of:
        rows = rows[1:]  # the header
    positions: dict[int, float] = {}
    for line, section, value in rows:
        index = index_of.get(section)
        if index is None:
            raise _error(path, line, f"names section {section!r}, which the stack of {n_sections} sections has not")
        if index in positions:
            raise _error(path, line, f"names section {section!r} a second time; keep one row for each section")
        positions[index] = _number(path, line, value)
    for i in range(n_sections):
        if i not in positions:
            name = names[i] if names else i
            raise ValueError(f"read_positions(): {path} has no row for section {name}; give every section a position")
    _check_increasing(path, names, positions)
    return tuple(positions[i] for i in range(n_sections))


def _rows(path: Path) -> list[tuple[int, str, str]]:
    """Line number, section and value of each line that is not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"read_positions(): {path} cannot be read as text: {error}") from None
    lines = [(i, line) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"read_positions(): {path} is empty; give rows of section and z in mm")
    delimiter = next((d for d in ",;\t" if d in lines[0][1]), ",")
    rows = []
    for line, fields in zip((i for i, _ in lines), csv.reader((t for _, t in lines), delimiter=delimiter), strict=True):
        if len(fields) < 2:
            raise _error(path, line, "has fewer than two fields; give section and z in mm")
        rows.append((line, fields[0].strip(), fields[1].strip()))
    return rows


def _index_of(names: Sequence[str], n_sections: int, rows: list[tuple[int, str, str]]) -> Mapping[str, int]:
    """Sections by file name and stem, or, where the numbers among the rows are no names, by index."""
    by_name = {Path(name).stem: i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}
    numbers = {section for _, section, _ in rows if section.isdecimal()}
    others = {section for _, section, _ in rows} - numbers
    if others & by_name.keys() or (numbers and numbers <= by_name.keys()):
        return by_name
    return {str(i): i for i in range(n_sections)}


def _number(path: Path, line: int, value: str) -> float:
    if not _is_number(value):
        raise _error(path, line, f"has {value!r} as position; give a number in mm")
    return float(value)


def _is_number(value: str) -> bool:
    try:
        return abs(float(value)) < float("inf")
    except ValueError:
        return False


def _check_increasing(path: Path, names: Sequence[str], positions: Mapping[int, float]) -> None:
    for a, b in pairwise(range(len(positions))):
        if not positions[b] > positions[a]:
            first, second = (names[a], names[b]) if names else (a, b)
            raise ValueError(
                f"read_positions(): {path} puts section {first} at {positions[a]:g} mm and the next, {second}, at "
                f"{positions[b]:g} mm; positions must increase in the stack's order"
            )


def _error(path: Path, line: int, found: str) -> ValueError:
    return ValueError(f"read_positions(): line {line} of {path} {found}")
