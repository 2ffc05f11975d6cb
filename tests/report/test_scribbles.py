import base64
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from limner.annotations import Scribbles
from limner.report import scribbles
from limner.report.scribbles import OrganRow, ScribblesReport, write_scribbles_report
from limner.volume import LabelMap


def page_data(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', html, re.S)[1])


def pictures(html: str) -> list[dict]:
    return [json.loads(text) for text in re.findall(r'id="picture-\d+">(.*?)</script>', html, re.S)]


def unpack(text: str, size: tuple[int, int]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u2").reshape(size)


def organ_table(html: str) -> list[list[str]]:
    """Texts of the cells of the table of organs, row by row."""
    body = re.search(r'<table id="organs">.*?<tbody>(.*?)</tbody>', html, re.S)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in row] for row in cells]


def test_page_stands_alone(scribbles_page: Path):
    html = scribbles_page.read_text()
    assert re.findall(r"(?:src|href)\s*=", html) == []
    assert re.findall(r"(?:https?:|@import|url\()[^\s\"']*", html) == ["http://www.w3.org/2000/svg"]  # never asked
    assert "default-src 'none'" in html


def test_what_users_wrote_cannot_become_markup(scribbles_page: Path):
    html = scribbles_page.read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html  # in the table of organs
    assert "<h1>Embryo &lt;3&gt;</h1>" in html


def test_strokes_come_back_exactly_on_the_sections_that_were_drawn_on(
    scribbles_page: Path, scribbles_report: ScribblesReport
):
    stored = pictures(scribbles_page.read_text())
    assert [z for z, layers in enumerate(stored) if "strokes" in layers] == [1, 4]
    marks = scribbles_report.scribbles.to_marks().labels
    for z in (1, 4):  # labels 0, 1, 2 are structures 0, 1, 2 of the page, and a mark is one more
        np.testing.assert_array_equal(unpack(stored[z]["strokes"], (24, 36)), marks[z])
    assert all({"image", "labels", "uncertainty", "truth"} <= set(layers) for layers in stored)


def test_what_stands_where_nothing_was_drawn_is_no_stroke(scribbles_report: ScribblesReport, tmp_path: Path):
    one = scribbles_report.scribbles
    weights = one.weights * np.float32(0.5)
    labels = np.where(weights > 0, one.label_map.labels, 77)  # ignored, so no structure either
    other = replace(scribbles_report, scribbles=Scribbles(replace(one.label_map, labels=labels), weights))
    write_scribbles_report(tmp_path / "other.html", other)
    write_scribbles_report(tmp_path / "one.html", scribbles_report)
    assert (tmp_path / "other.html").read_text() == (tmp_path / "one.html").read_text()


def test_thin_strokes_are_kept_where_sections_are_shown_smaller(
    scribbles_report: ScribblesReport, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(scribbles, "shown_size", lambda _: (6, 9))
    write_scribbles_report(tmp_path / "small.html", scribbles_report)
    html = (tmp_path / "small.html").read_text()
    strokes = unpack(pictures(html)[4]["strokes"], (6, 9))
    expected = np.zeros((6, 9), int)
    expected[1, 5:9], expected[4, 7] = 1, 3
    np.testing.assert_array_equal(strokes, expected)
    assert page_data(html)["pixelSize"] == pytest.approx([0.4, 0.8])
    assert page_data(html)["sections"][4]["strokes"] == [[0, 14], [2, 1]]  # pixels as they were drawn


def test_data_of_the_page(scribbles_page: Path):
    data = page_data(scribbles_page.read_text())
    assert [s["name"] for s in data["structures"]] == ["background", "<script>alert(1)</script>", "Heart & co"]
    assert [s["strokes"] for s in data["sections"]] == [[], [[0, 14], [1, 20]], [], [], [[0, 14], [2, 1]]]
    assert [s["uncertainty"] for s in data["sections"]] == [0.05, 0.05, 0.25, 0.05, 0.05]  # over all of the section
    assert data["suggestions"] == [2, 4]
    assert data["start"] == 2


def test_table_of_organs(scribbles_page: Path):
    assert organ_table(scribbles_page.read_text()) == [
        ["&lt;script&gt;alert(1)&lt;/script&gt;", "21.6", "20.5", "23.0", "0.900", "0.800", "0.847", "–", "20", "1"],
        ["Heart &amp; co", "14.4", "13.0", "1,500", "–", "–", "–", "–", "1", "4"],
        ["background", "–", "–", "–", "–", "–", "–", "–", "28", "1 4"],
    ]


def test_summary(scribbles_report: ScribblesReport):
    assert scribbles_report.summary == (
        "5 sections, you drew on 2; <script>alert(1)</script> 21.6 mm³ (20.5 to 23.0), "
        "Heart & co 14.4 mm³ (13.0 to 1,500)."
    )


def test_page_without_truth_scores_suggestions_or_notes(scribbles_report: ScribblesReport, tmp_path: Path):
    organs = [replace(organ, scores=None) for organ in scribbles_report.organs]
    bare = replace(scribbles_report, truth=None, organs=organs, notes=(), suggestions=(), settings={})
    write_scribbles_report(tmp_path / "bare.html", bare)
    html = (tmp_path / "bare.html").read_text()
    for absent in ("True outline", "<th>Precision", "Please check", "Draw on these next", "Settings"):
        assert absent not in html
    assert len(organ_table(html)[0]) == 6
    assert page_data(html)["start"] == 2  # the most uncertain


def test_an_organ_that_was_drawn_but_not_found_is_listed(scribbles_report: ScribblesReport, tmp_path: Path):
    labels = LabelMap(np.zeros_like(scribbles_report.labels.labels), scribbles_report.labels.space)
    lost = replace(scribbles_report, labels=labels, truth=None, organs=[OrganRow(2, 0.0, (0.0, 0.2))])
    write_scribbles_report(tmp_path / "lost.html", lost)
    html = (tmp_path / "lost.html").read_text()
    assert [s["name"] for s in page_data(html)["structures"]] == ["background", "label 1", "label 2"]
    assert organ_table(html)[0] == ["label 2", "0.00", "0.00", "0.200", "1", "4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uncertainty": np.zeros((5, 24, 35), np.float32)}, r"uncertainty have shape \(5, 24, 35\)"),
        ({"uncertainty": np.full((5, 24, 36), np.nan, np.float32)}, "not numbers"),
        ({"uncertainty": np.full((5, 24, 36), 1.5, np.float32)}, "outside 0 to 1"),
        ({"suggestions": (5,)}, "suggestions name section 5, but the stack has sections 0 to 4"),
        ({"organs": [OrganRow(2, 1.0, (1.0, 1.0))] * 2}, "two rows of label 2"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(scribbles_report: ScribblesReport, change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(scribbles_report, **change)


def test_more_structures_than_strokes_can_name_are_refused(
    scribbles_report: ScribblesReport, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(scribbles, "_structures", lambda _: [None] * 65536)  # the last one's mark would be 65536
    with pytest.raises(ValueError, match="65535 structures; a report holds 65534 at most"):
        write_scribbles_report(tmp_path / "many.html", scribbles_report)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["labels", "scribbles", "truth"])
def test_another_grid_is_refused(scribbles_report: ScribblesReport, name: str):
    space = replace(scribbles_report.images.space, shape=(5, 24, 18))
    half = LabelMap(scribbles_report.labels.labels[:, :, 9:27], space)
    other = Scribbles(half, np.ones(space.shape)) if name == "scribbles" else half
    with pytest.raises(ValueError, match=rf"ScribblesReport\(\): {name} have shape \(5, 24, 18\)"):
        replace(scribbles_report, **{name: other})


@pytest.mark.parametrize(
    ("label", "volume", "interval", "message"),
    [
        (0, 1.0, (1.0, 1.0), "label is 0"),
        (1, 1.0, (2.0, 1.0), "the lowest first"),
        (1, -1.0, (0.0, 1.0), "finite volumes"),
        (1, 1.0, (0.0, float("inf")), "finite volumes"),
        (1, 1.0, (float("nan"), 1.0), "finite volumes"),
    ],
)
def test_rows_that_make_no_sense_are_refused(label: int, volume: float, interval: tuple[float, float], message: str):
    with pytest.raises(ValueError, match=message):
        OrganRow(label, volume, interval)
