import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from limner.report import sections, stack
from limner.report.stack import StackReport, write_stack_report
from limner.space import Space
from limner.volume import LabelMap


def page_data(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', html, re.S)[1])


def test_page_stands_alone(page: Path):
    html = page.read_text()
    assert re.findall(r"(?:src|href)\s*=", html) == []
    assert re.findall(r"(?:https?:|@import|url\()[^\s\"']*", html) == [
        "http://www.w3.org/2000/svg"
    ]  # a name, never asked
    assert "default-src 'none'" in html  # and the browser would refuse


def test_page_holds_every_section_once(page: Path):
    sections = re.findall(r'id="picture-(\d+)">(.*?)</script>', page.read_text(), re.S)
    assert [int(number) for number, _ in sections] == [0, 1, 2, 3, 4, 5]
    assert all(set(json.loads(text)) == {"image", "labels", "uncertainty", "truth"} for _, text in sections)
    assert len(page_data(page.read_text())["sections"]) == 6


def test_what_users_wrote_cannot_become_markup(page: Path):
    html = page.read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html  # in the table of scores
    assert page_data(html)["structures"][1]["name"] == "<script>alert(1)</script>"
    assert "<h1>Mouse &lt;7&gt;</h1>" in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html


def test_data_of_the_page(page: Path):
    data = page_data(page.read_text())
    assert [s["name"] for s in data["structures"]] == ["background", "<script>alert(1)</script>", "Thalamus & co"]
    assert data["structures"][2]["colour"] == "#285ac8"
    assert [s["labelled"] for s in data["sections"]] == [True, False, False, False, False, True]
    assert [s["position"] for s in data["sections"]] == [0, 0.5, 1, 1.5, 2, 2.5]
    assert data["pixelSize"] == pytest.approx([0.1, 0.2])
    assert data["objective"]["3"] == [-70, None, -20]  # JSON has no NaN
    assert data["sections"][2]["dice"] == {"1": 0.8}
    assert data["sections"][0]["accuracy"] is None
    assert data["start"] == 3


def test_pixel_size_grows_where_sections_are_shown_smaller(report: StackReport, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stack, "shown_size", lambda _: (12, 9))
    write_stack_report(tmp_path / "small.html", report)
    data = page_data((tmp_path / "small.html").read_text())
    assert data["size"] == [12, 9]
    assert data["pixelSize"] == pytest.approx([0.2, 0.8])


def test_section_uncertainty_is_the_mean_inside_structures(report: StackReport):
    inside = 24 * 18 + 16 * 18  # pixels of the two structures
    expected = np.array([0, 0.1, 0.2, 0.5, 0.4, 0]) * 24 * 18 / inside
    np.testing.assert_allclose(report.section_uncertainty, expected, rtol=1e-6)
    empty = replace(report, labels=LabelMap(np.zeros_like(report.labels.labels), report.labels.space))
    np.testing.assert_allclose(empty.section_uncertainty, np.array([0, 0.1, 0.2, 0.5, 0.4, 0]) / 2, rtol=1e-6)


def test_summary(report: StackReport):
    assert report.summary == (
        "6 sections, 2 labelled by you and 4 completed; 2 structures; mean uncertainty of completed sections 0.18."
    )
    everything = replace(report, labelled=tuple(range(6)))
    assert "6 labelled by you and 0 completed" in everything.summary


def test_tables_of_scores_leave_out_what_is_undefined(report: StackReport):
    tables = stack._score_tables(report, stack._structures(report))
    assert [row["section"] for row in tables["sections"]] == [1, 2, 3, 4]
    assert [(row["structure"].label, row["n"], row["median"]) for row in tables["structures"]] == [(7, 4, 0.8)]
    assert tables["sections"][0]["worst"].label == 7


def test_page_without_truth_scores_objective_or_notes(report: StackReport, tmp_path: Path):
    bare = replace(report, truth=None, scores=None, objective={}, notes=(), suggestions=(), settings={})
    write_stack_report(tmp_path / "bare.html", bare)
    html = (tmp_path / "bare.html").read_text()
    for absent in (
        "True outline",
        "Accuracy against the truth",
        "Progress of the fit",
        "Please check",
        "Label these next",
    ):
        assert absent not in html
    assert page_data(html)["start"] == 3  # the most uncertain


def test_labels_without_a_table_get_names_and_colours_of_their_own(report: StackReport):
    bare = replace(report, labels=replace(report.labels, table={}), truth=None)
    structures = stack._structures(bare)
    assert [s.name for s in structures] == ["background", "label 7", "label 300"]
    assert len({s.colour for s in structures}) == 3
    assert all(re.fullmatch("#[0-9a-f]{6}", s.colour) for s in structures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uncertainty": np.zeros((6, 24, 35), np.float32)}, r"uncertainty have shape \(6, 24, 35\)"),
        ({"uncertainty": np.full((6, 24, 36), np.nan, np.float32)}, "not numbers"),
        ({"uncertainty": np.full((6, 24, 36), 1.5, np.float32)}, "outside 0 to 1"),
        ({"suggestions": (6,)}, "suggestions name section 6, but the stack has sections 0 to 5"),
        ({"scores": {-1: {"accuracy": 1.0, "dice": {}}}}, "scores name section -1"),
        ({"truth": LabelMap(np.zeros((1, 2, 3), int), Space((1, 2, 3), (1, 1, 1)))}, r"truth have shape \(1, 2, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(report: StackReport, change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(report, **change)


def test_too_many_structures_are_refused(report: StackReport, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stack, "_structures", lambda _: [None] * 65537)
    with pytest.raises(ValueError, match="65536 structures; a report holds 65535 at most"):
        write_stack_report(tmp_path / "many.html", report)


def test_a_write_that_fails_leaves_the_old_report_and_nothing_else(report: StackReport, tmp_path: Path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("the old report")

    def fail(*_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(sections, "pack_hundredths", fail)
    with pytest.raises(OSError, match="disk full"):
        write_stack_report(path, report)
    assert path.read_text() == "the old report"
    assert list(tmp_path.iterdir()) == [path]
