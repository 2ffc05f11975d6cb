"""Label tables: the names and colours of labels, in ITK-SNAP, FreeSurfer and CSV files."""

from __future__ import annotations

import colorsys
import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from limner.volume import Label, LabelTable

TableFormat = Literal["itksnap", "freesurfer", "csv"]

INDEX_COLUMNS = ("index", "idx", "id", "value", "label number", "number")
NAME_COLUMNS = ("name", "label name", "structure", "region", "description")
COLOUR_COLUMNS = (("r", "g", "b"), ("red", "green", "blue"))
ITKSNAP_ROW = re.compile(r'(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+[\d.]+\s+\d\s+\d\s+"(.*)"')
FREESURFER_ROW = re.compile(r"(\d+)\s+(\S+)\s+(\d+)\s+(\d+)\s+(\d+)(?:\s+\d+)?")
ITKSNAP_HEADER = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
################################################
"""


def read_table(path: str | Path) -> tuple[dict[int, Label], TableFormat]:
    """Read names and colours of labels; the format is told from the content.

    Parameters
    ----------
    path : str or Path
        One of: an ITK-SNAP label description file; a FreeSurfer colour table (``index name R G B A``); a CSV file
        with a header line. CSV columns are found by name: index, idx, id, value, number (else the first column);
        name, label name, structure, region, description; r, g, b or red, green, blue. Others are passed over; where
        colours are missing those of `default_colour` are taken.

    Returns
    -------
    table : dict of int to Label
        In the file's order, with row 0 where the file has one.
    format : {'itksnap', 'freesurfer', 'csv'}
        For `write_table`.

    Raises
    ------
    ValueError
        If the file is no such table, or a row is malformed or repeats an index; the line is named.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "lut.txt")
    ...     _ = file.write_text("17 Left-Hippocampus 220 216 20 0\\n")
    ...     read_table(file)
    ({17: Label(name='Left-Hippocampus', colour=(220, 216, 20))}, 'freesurfer')
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"read_table(): {path} cannot be read as text: {error}") from None
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), start=1)]
    lines = [(i, line) for i, line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"read_table(): {path} is empty; give an ITK-SNAP, FreeSurfer or CSV label table")
    table_format = _format_of(path, lines[0][1])
    rows = _csv_rows(path, lines) if table_format == "csv" else _text_rows(path, lines, table_format)
    table: dict[int, Label] = {}
    for line, index, label in rows:
        if index in table:
            raise _error(path, line, f"gives label {index} a second time; keep one row for each label")
        if max(label.colour) > 255:
            raise _error(path, line, f"has the colour {label.colour}; give numbers from 0 to 255")
        table[index] = label
    return table, table_format


def write_table(path: str | Path, table: LabelTable, format: TableFormat = "itksnap") -> None:
    """Write names and colours of labels.

    Parameters
    ----------
    path : str or Path
        The file; an earlier one of this name is replaced once the new one is complete.
    table : mapping of int to Label
        Rows are written by increasing index. ITK-SNAP needs a row 0, so a ``Clear Label`` is added where there is none.
        FreeSurfer names hold no white space: it becomes ``_``. ITK-SNAP names hold no ``"``: it becomes ``'``.
    format : {'itksnap', 'freesurfer', 'csv'}
        CSV has the header ``index,name,r,g,b``.

    Raises
    ------
    ValueError
        If the format is another.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_table(f"{folder}/lut.csv", {2: Label("CA1", (255, 0, 0))}, "csv")
    ...     print(Path(folder, "lut.csv").read_text())
    index,name,r,g,b
    2,CA1,255,0,0
    <BLANKLINE>
    """
    writers = {"itksnap": _itksnap_text, "freesurfer": _freesurfer_text, "csv": _csv_lines}
    if format not in writers:
        raise ValueError(f"write_table(): format is {format!r}; give one of {', '.join(writers)}")
    path = Path(path)
    partial = path.with_name(f".partial-{path.name}")
    rows = sorted(table.items())
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.writelines(writers[format](rows))
    partial.replace(path)


def default_table(labels: Iterable[int]) -> dict[int, Label]:
    """Names ``label N`` and colours of `default_colour` for all labels but 0, by increasing label.

    Examples
    --------
    >>> default_table([0, 7])
    {7: Label(name='label 7', colour=(120, 230, 115))}
    """
    return {n: Label(f"label {n}", default_colour(n)) for n in sorted({int(n) for n in labels} - {0})}


def default_colour(label: int) -> tuple[int, int, int]:
    """Colour of a label that has none: a function of the label alone, far apart for neighbouring labels.

    The hue goes on by the golden section of the circle at each label; brightness and saturation take turns.

    Parameters
    ----------
    label : int
        The label; 0 is black.

    Returns
    -------
    tuple of int
        Red, green, blue, 0 to 255.

    Examples
    --------
    >>> default_colour(0), default_colour(1)
    ((0, 0, 0), (41, 96, 230))
    """
    if label == 0:
        return 0, 0, 0
    hue = label * 0.6180339887498949 % 1.0
    value = (0.9, 1.0, 0.65)[(label - 1) // 2 % 3]
    saturation = (0.82, 0.5, 1.0)[(label - 1) // 6 % 3]
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def _format_of(path: Path, first: str) -> TableFormat:
    if ITKSNAP_ROW.fullmatch(first):
        return "itksnap"
    if FREESURFER_ROW.fullmatch(first):
        return "freesurfer"
    if "," in first:
        return "csv"
    raise ValueError(
        f"read_table(): {path} is no label table (its first line is {first[:60]!r}); give an ITK-SNAP label "
        "description, a FreeSurfer colour table, or CSV with the header index,name,r,g,b"
    )


def _text_rows(path: Path, lines: list[tuple[int, str]], table_format: TableFormat) -> Iterator[tuple[int, int, Label]]:
    """Line number, index and label of each row of an ITK-SNAP or FreeSurfer table."""
    pattern = ITKSNAP_ROW if table_format == "itksnap" else FREESURFER_ROW
    expected = 'IDX R G B A VIS MSH "LABEL"' if table_format == "itksnap" else "index name R G B A"
    for line, text in lines:
        match = pattern.fullmatch(text)
        if match is None:
            raise _error(path, line, f"is {text[:60]!r}; give {expected}")
        if table_format == "itksnap":
            index, r, g, b, name = match.groups()
        else:
            index, name, r, g, b = match.groups()
        yield line, int(index), Label(name, (int(r), int(g), int(b)))


def _csv_rows(path: Path, lines: list[tuple[int, str]]) -> Iterator[tuple[int, int, Label]]:
    numbers = [i for i, _ in lines]
    header, *rows = csv.reader((text for _, text in lines), skipinitialspace=True)
    header = [column.strip().lower() for column in header]
    names = [header.index(c) for c in NAME_COLUMNS if c in header]
    if not names:
        raise _error(path, numbers[0], f"has the columns {', '.join(header)}; give a header such as index,name,r,g,b")
    index_column = next((header.index(c) for c in INDEX_COLUMNS if c in header), 0)
    colours = next(([header.index(c) for c in rgb] for rgb in COLOUR_COLUMNS if set(rgb) <= set(header)), [])
    for line, row in zip(numbers[1:], rows, strict=True):
        if len(row) != len(header) or not all(row[i].strip().isdecimal() for i in (index_column, *colours)):
            raise _error(
                path, line, f"is {','.join(row)[:60]!r}; give {','.join(header)}, index and colours as integers"
            )
        index = int(row[index_column])
        r, g, b = (int(row[i]) for i in colours) if colours else default_colour(index)
        yield line, index, Label(row[names[0]].strip(), (r, g, b))


def _itksnap_text(rows: list[tuple[int, Label]]) -> Iterator[str]:
    yield ITKSNAP_HEADER
    if not rows or rows[0][0] != 0:
        rows = [(0, Label("Clear Label", (0, 0, 0))), *rows]
    for index, label in rows:
        r, g, b = label.colour
        alpha, visible = (1, 1) if index else (0, 0)
        name = label.name.replace('"', "'")
        yield f'{index:5d} {r:5d} {g:4d} {b:4d} {alpha:8d} {visible:2d} {visible:2d}    "{name}"\n'


def _freesurfer_text(rows: list[tuple[int, Label]]) -> Iterator[str]:
    yield "# index name R G B A\n"
    for index, label in rows:
        name = re.sub(r"\s+", "_", label.name.strip()) or f"label_{index}"
        yield f"{index} {name} {' '.join(str(c) for c in label.colour)} 0\n"


def _csv_lines(rows: list[tuple[int, Label]]) -> Iterator[str]:
    yield "index,name,r,g,b\n"
    for index, label in rows:
        name = f'"{label.name.replace(chr(34), chr(34) * 2)}"' if re.search('[,"\n]', label.name) else label.name
        yield f"{index},{name},{','.join(str(c) for c in label.colour)}\n"


def _error(path: Path, line: int, found: str) -> ValueError:
    return ValueError(f"read_table(): line {line} of {path} {found}")
