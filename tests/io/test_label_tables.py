import colorsys
import csv
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from limner.io import default_colour, default_table, read_table, write_table
from limner.volume import Label

TABLE = {0: Label("background", (0, 0, 0)), 2: Label("CA1", (255, 10, 0)), 400: Label("Layer_2/3,_V1", (1, 2, 3))}

ITKSNAP = """\
################################################
# ITK-SnAP Label Description File
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
################################################
    0     0    0    0        0  0  0    "background"
    2   255   10    0      0.5  1  1    "CA1"
  400     1    2    3        1  1  0    "Layer_2/3,_V1"
"""
FREESURFER = """\
#No. Label Name:            R   G   B   A

0    background   0   0   0   0
2    CA1        255  10   0   0
400  Layer_2/3,_V1  1 2 3
"""
CSV = """\
id,Acronym,Name,Red,Green,Blue
0,BG,background,0,0,0
2,x,CA1,255,10,0

400,x,"Layer_2/3,_V1",1,2,3
"""


@pytest.mark.parametrize(("text", "expected"), [(ITKSNAP, "itksnap"), (FREESURFER, "freesurfer"), (CSV, "csv")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_format_is_told_from_the_content(tmp_path, text, expected, encoding):
    (tmp_path / "table.dat").write_text(text, encoding=encoding)
    assert read_table(tmp_path / "table.dat") == (TABLE, expected)


@pytest.mark.parametrize("table_format", ["itksnap", "freesurfer", "csv"])
def test_round_trip(tmp_path, table_format):
    write_table(tmp_path / "t", TABLE, table_format)
    assert read_table(tmp_path / "t") == (TABLE, table_format)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("table_format", ["itksnap", "csv"])
def test_names_with_spaces_quotes_and_commas(tmp_path, table_format):
    name = 'Field "CA1", inner part' if table_format == "csv" else "Field CA1, inner # part"
    write_table(tmp_path / "t", {0: Label("a b", (0, 0, 0)), 1: Label(name, (1, 2, 3))}, table_format)
    assert read_table(tmp_path / "t")[0][1].name == name


def test_csv_agrees_with_the_csv_module(tmp_path):
    write_table(tmp_path / "t.csv", {1: Label('a "b", c', (1, 2, 3))}, "csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["index", "name", "r", "g", "b"], ["1", 'a "b", c', "1", "2", "3"]]


def test_what_formats_cannot_hold(tmp_path):
    write_table(tmp_path / "t", {3: Label("inner  part", (1, 2, 3)), 4: Label("", (1, 2, 3))}, "freesurfer")
    assert [label.name for label in read_table(tmp_path / "t")[0].values()] == ["inner_part", "label_4"]
    write_table(tmp_path / "t", {3: Label('a "b"', (1, 2, 3))}, "itksnap")
    assert read_table(tmp_path / "t")[0] == {0: Label("Clear Label", (0, 0, 0)), 3: Label("a 'b'", (1, 2, 3))}


def test_csv_without_colours_or_known_index_column(tmp_path):
    (tmp_path / "t.csv").write_text("coarse,name\n0,background\n1,Isocortex\n")
    assert read_table(tmp_path / "t.csv")[0][1] == Label("Isocortex", default_colour(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ITKSNAP + '  x 1 2 3 1 1 1 "a"\n', r'line 8 of .* give IDX R G B A VIS MSH "LABEL"'),
        (FREESURFER + "500 two words 1 2 3 0\n", "line 6 of .* give index name R G B A"),
        (CSV + "5,x\n", "line 6 of .* give id,acronym,name"),
        (CSV + "five,x,y,1,2,3\n", "line 6 of .* integers"),
        (CSV + "5,x,y,1,,3\n", "line 6 of "),
        (CSV + "2,x,y,1,2,3\n", "line 6 of .* gives label 2 a second time"),
        (CSV + "5,x,y,1,256,3\n", r"line 6 of .* colour \(1, 256, 3\)"),
        ("a,b\n1,2\n", "line 1 of .* has the columns a, b; give a header"),
        ("some prose", "is no label table"),
        ("# nothing\n", "is empty"),
    ],
)
def test_malformed_rows_are_named(tmp_path, text, message):
    (tmp_path / "t").write_text(text)
    with pytest.raises(ValueError, match=r"^read_table\(\): .*" + message) as raised:
        read_table(tmp_path / "t")
    assert "\n" not in str(raised.value)


def test_no_text_and_unknown_format(tmp_path):
    (tmp_path / "t").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "t", tmp_path / "none"):
        with pytest.raises(ValueError, match="cannot be read as text"):
            read_table(path)
    with pytest.raises(ValueError, match=r"format is 'xml'; give one of itksnap, freesurfer, csv"):
        write_table(tmp_path / "t", TABLE, "xml")


def test_default_colours_can_be_told_apart():
    table = default_table(np.array([0, 3, 3, 1]))
    assert list(table.items()) == [(1, Label("label 1", default_colour(1))), (3, Label("label 3", default_colour(3)))]
    colours = [default_colour(i) for i in range(1, 257)]
    assert len(set(colours)) == 256
    assert min(colorsys.rgb_to_hsv(*c)[2] for c in colours) > 100
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in combinations(colours[:16], 2)) > 30


DATA = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "stack_stpt_mouse"


@pytest.mark.skipif(not DATA.exists(), reason="no data")
def test_tables_of_the_mouse_brain():
    coarse, fine = (read_table(DATA / name)[0] for name in ("coarse_lut.csv", "lut.csv"))
    assert coarse[1].name == "Isocortex"
    assert fine[1] == Label("Tuberomammillary nucleus, ventral part", (255, 76, 62))
    assert len(fine) > 600
