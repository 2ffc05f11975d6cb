"""The ontology table that says which tissue each structure is made of."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from limner.volume import LabelTable

SHOWN = 12  # structures named in a message


def read_tissues(path: str | Path, table: LabelTable, structures: Iterable[int]) -> dict[int, int]:
    """Read which tissue type each structure belongs to.

    Parameters
    ----------
    path : str or Path
        CSV with a header line and the columns ``structure`` (a label's index, or its name in `table`) and ``tissue``
        (any text or number; equal entries are one tissue). Other columns are passed over.
    table : mapping of int to Label
        Names of the labels.
    structures : iterable of int
        Labels that need a tissue; 0 needs none.

    Returns
    -------
    dict of int to int
        Label -> tissue, numbered from 1 in the order in which the tissues first occur; background, 0, is tissue 0.

    Raises
    ------
    ValueError
        If a column is missing, a row names an unknown structure or one a second time, or a structure has no row.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "tissues.csv")
    ...     _ = file.write_text("structure,tissue\\n1,grey\\n2,white\\n3,grey\\n")
    ...     read_tissues(file, {}, [1, 2, 3])
    {0: 0, 1: 1, 2: 2, 3: 1}
    """
    path = Path(path)
    index_of = {label.name: index for index, label in table.items()}
    number_of: dict[str, int] = {}
    tissues = {0: 0}
    for line, structure, tissue in _rows(path):
        if structure == "0":
            continue
        index = int(structure) if structure.isdecimal() else index_of.get(structure)
        if index is None:
            raise ValueError(
                f"read_tissues(): line {line} of {path} names the structure {structure!r}, which the label table "
                "lacks; give its index or name"
            )
        if index in tissues:
            raise ValueError(f"read_tissues(): line {line} of {path} names the structure {structure!r} a second time")
        tissues[index] = number_of.setdefault(tissue, len(number_of) + 1)
    missing = sorted(set(structures) - set(tissues))
    if missing:
        name = table[missing[0]].name if missing[0] in table else "label"
        raise ValueError(f"read_tissues(): {path} has no row for structure {missing[0]} ({name}); give each a tissue")
    return tissues


def read_shared_tissues(path: str | Path, structures: Sequence[tuple[str, tuple[int, ...]]]) -> list[int]:
    """Read which structures are of one tissue, so that they show alike; those that are not named are each their own.

    Parameters
    ----------
    path : str or Path
        As of `read_tissues`; background may be given a tissue too, by its name or as 0. Names of structures and
        tissues are compared without regard to case.
    structures : sequence of (str, tuple of int)
        Name of each structure and the labels that make it up, any of which stands for it; background first.

    Returns
    -------
    list of int
        The tissue of each structure, 0, 1, ... in the order in which they first occur.

    Raises
    ------
    ValueError
        If a column is missing, a row names an unknown structure or one a second time, or there is no row.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "tissues.csv")
    ...     _ = file.write_text("structure,tissue\\nbackground,fluid\\n4,fluid\\n")
    ...     read_shared_tissues(file, [("background", (0,)), ("cortex", (3, 42)), ("ventricle", (4, 43))])
    [0, 1, 0]
    """
    path = Path(path)
    names = [name for name, _ in structures]
    index_of = {str(label): i for i, (_, labels) in enumerate(structures) for label in labels}
    index_of |= {name.lower(): i for i, name in enumerate(names)}
    tissue_of: dict[int, str] = {}
    for line, structure, tissue in _rows(path):
        index = index_of.get(structure.lower())
        if index is None:
            known = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            raise ValueError(
                f"read_shared_tissues(): line {line} of {path} names the structure {structure!r}, which is none of "
                f"{known}; give the name of one of these, or the number of a label in it"
            )
        if index in tissue_of:
            raise ValueError(
                f"read_shared_tissues(): line {line} of {path} names the structure {structure!r} a second time"
            )
        tissue_of[index] = tissue.lower()
    if not tissue_of:
        raise ValueError(f"read_shared_tissues(): {path} names no structure; give those that share a tissue")
    number_of: dict[str | int, int] = {}
    return [number_of.setdefault(tissue_of.get(i, i), len(number_of)) for i in range(len(names))]


def _rows(path: Path) -> list[tuple[int, str, str]]:
    """Line number, structure and tissue of each row."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"read_tissues(): {path} cannot be read as text: {error}") from None
    reader = csv.DictReader(lines)
    columns = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
    if "structure" not in columns or "tissue" not in columns:
        raise ValueError(
            f"read_tissues(): {path} has no columns structure and tissue; give a CSV with that header line"
        )
    rows = []
    for row in reader:
        structure, tissue = (row[columns[name]] or "" for name in ("structure", "tissue"))
        if not structure.strip() or not tissue.strip():
            raise ValueError(
                f"read_tissues(): line {reader.line_num} of {path} has an empty field; give structure and tissue"
            )
        rows.append((reader.line_num, structure.strip(), tissue.strip()))
    return rows
