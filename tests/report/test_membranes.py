import base64
import json
import re
import weakref
import zlib
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from limner.report import membranes
from limner.report.membranes import (
    LEAST_SURE,
    MOST_SHOWN,
    MembranesReport,
    SectionView,
    section_row,
    shown_sections,
    write_membranes_report,
)


def page_data(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', html, re.S)[1])


def pictures(html: str) -> list[dict]:
    return [json.loads(text) for text in re.findall(r'id="picture-\d+">(.*?)</script>', html, re.S)]


def unpack(text: str, dtype: str, size: tuple[int, int]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).reshape(size)


def cells_of(picture: dict, size: tuple[int, int]) -> np.ndarray:
    return np.array(picture["ids"])[unpack(picture["cells"], "<u2", size)]


def table_of(html: str) -> list[list[str]]:
    """Texts of the cells of the table of sections, heading and rows."""
    table = re.search(r'<table id="sections".*?</table>', html, re.S)[0]
    rows = [re.findall(r"<t[hd]\b.*?</t[hd]>", row, re.S) for row in re.findall(r"<tr>.*?</tr>", table, re.S)]
    return [[" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in row] for row in rows]


def written(report: MembranesReport, tmp_path: Path) -> str:
    write_membranes_report(tmp_path / "report.html", report)
    return (tmp_path / "report.html").read_text()


def noise(shape: tuple[int, int], with_cells: bool = True) -> SectionView:
    draw = np.random.default_rng(0)
    cells = draw.integers(0, 2**40, shape) if with_cells else None
    return SectionView(draw.integers(0, 999, shape), draw.random(shape, np.float32), cells)


def test_page_stands_alone(membranes_page: Path):
    html = membranes_page.read_text()
    assert re.findall(r"(?:src|href)\s*=", html) == []
    assert re.findall(r"(?:https?:|@import|url\()[^\s\"']*", html) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in html


def test_what_users_wrote_cannot_become_markup(membranes_page: Path):
    html = membranes_page.read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<h1>Larva &lt;2&gt;</h1>" in html


def test_a_section_is_measured():
    p = np.array([[0.2, 0.21, 0.49, 0.5, 0.79, 0.8, 0.0, 1.0]], np.float32)
    cells = np.array([[3, 3, 2**40, 0, 0, 0, 3, 0]])
    row = section_row("a", SectionView(np.zeros((1, 8)), p, cells))
    assert (row.membrane, row.unsure) == (0.5, 0.5)  # from 0.5 on; 0.2 and 0.8 are sure
    assert (row.cell_ids.tolist(), row.cell_areas_px.tolist()) == ([3, 2**40], [3, 1])
    assert section_row("a", SectionView(np.zeros((1, 8)), p)).cell_ids is None


def test_pictures_come_back(membranes_page: Path, membranes_report: MembranesReport):
    stored = pictures(membranes_page.read_text())
    assert len(stored) == 5
    for z, picture in enumerate(stored):
        view = membranes_report.view(z)
        size = view.image.shape
        np.testing.assert_array_equal(cells_of(picture, size), view.cells)
        np.testing.assert_array_equal(unpack(picture["probability"], "u1", size), np.rint(100 * view.probability))
        assert np.abs(iio.imread(base64.b64decode(picture["image"])).astype(int) - view.image).mean() < 8


def test_data_of_the_page(membranes_page: Path):
    data = page_data(membranes_page.read_text())
    assert [section["size"] for section in data["sections"]] == [[24, 36]] * 3 + [[30, 20], [24, 36]]
    assert data["sections"][0]["pixelSize"] == [4e-6, 8e-6]
    assert [section["vInfo"] for section in data["sections"]] == [0.8] * 4 + [None]  # JSON has no NaN
    assert data["unsure"] == [0, 0, round(12 * 24 / 864, 5), 0, 0]
    assert data["cellCounts"] == [2] * 5
    assert (data["suggestions"], data["start"]) == ([2], 2)


def test_table_of_sections(membranes_page: Path):
    heading, *rows = table_of(membranes_page.read_text())
    assert heading == ["Section", "Name", "Membrane %", "Unsure %", "Cells", "Median area µm²", "V_rand", "V_info"]
    small, large = (f"{n * 4 * 8e-6:.4f}" for n in (30 * 8, 24 * (8 + 24) / 2))
    assert rows == [
        ["0", "00.png", "11.1", "0.0", "2", large, "0.900", "0.800"],
        ["1", "&lt;script&gt;alert(1)&lt;/script&gt;", "11.1", "0.0", "2", large, "0.910", "0.800"],
        ["2", "02.png", "11.1", "33.3", "2", large, "0.920", "0.800"],
        ["3", "03.png", "20.0", "0.0", "2", small, "0.930", "0.800"],
        ["4", "04.png", "11.1", "0.0", "2", large, "0.940", "–"],
    ]


def test_summary(membranes_report: MembranesReport):
    same = replace(membranes_report, rows=membranes_report.rows[:3])
    area = 24 * (8 + 24) / 2
    assert same.summary == (
        f"3 sections of 36 × 24 pixels, 8 nm × 4 nm a pixel; 11.1 % membrane; "
        f"3 cells linked through the sections, median area {area * 32e-6:.3g} µm²."
    )
    assert replace(same, linked=False, spacing=(2e-3, 2e-3)).summary.startswith(
        "3 sections of 36 × 24 pixels of 2 µm; 11.1 % membrane; 6 cells, median area 1,536 µm²."
    )
    assert replace(same, spacing=None).summary.endswith("median area 384 px.")
    membrane = 100 * (4 * 24 * 4 + 30 * 4) / (4 * 24 * 36 + 30 * 20)  # of all pixels, not the mean of sections
    assert f"5 sections of different sizes, 8 nm × 4 nm a pixel; {membrane:.3g} % membrane" in membranes_report.summary
    bare = [replace(row, cell_ids=None, cell_areas_px=None) for row in same.rows]
    assert replace(same, rows=bare).summary.endswith("11.1 % membrane.")


def test_all_of_a_few_sections_are_shown():
    assert shown_sections([0.1]) == [0]
    assert shown_sections([0.1] * MOST_SHOWN) == list(range(MOST_SHOWN))


@pytest.mark.parametrize("n", [MOST_SHOWN + 1, 130, 5000])
def test_of_many_sections_the_least_sure_and_some_evenly_spread_are_shown(n: int):
    unsure = np.random.default_rng(n).random(n)
    shown = shown_sections(unsure.tolist())
    assert shown == sorted(set(shown))
    assert MOST_SHOWN - LEAST_SURE <= len(shown) <= MOST_SHOWN
    worst = set(np.argsort(unsure)[-LEAST_SURE:].tolist())
    spread = sorted(set(shown) - worst)
    assert worst <= set(shown)
    assert (
        max(np.diff([-1, *spread, n])) <= 2 * n / (MOST_SHOWN - LEAST_SURE - 1) + 2
    )  # a gap may hold one of the worst
    assert {0, n - 1} <= set(shown)


def test_sections_are_asked_for_one_at_a_time_and_let_go(tmp_path: Path):
    row = section_row("a", noise((4, 5)))
    asked, held = [], []

    def view(z: int) -> SectionView:
        assert not [one for one in held if one() is not None]
        one = noise((4, 5))
        held.append(weakref.ref(one))
        asked.append(z)
        return one

    rows = [replace(row, unsure=z / 1000) for z in range(500)]
    html = written(MembranesReport("a", rows, view), tmp_path)
    assert asked == shown_sections([row.unsure for row in rows])
    assert [section["place"] for section in page_data(html)["sections"]] == asked
    assert page_data(html)["suggestions"] == [asked.index(place) for place in (499, 498, 497)]
    assert len(page_data(html)["unsure"]) == len(table_of(html)) - 1 == 500
    assert f"Of 500 sections {len(asked)} have pictures here" in html


def test_large_sections_are_shown_smaller_and_their_pixels_larger(tmp_path: Path):
    view = noise((2000, 10))
    report = MembranesReport("a", [section_row("0", view)], lambda _: view, spacing=(1e-6, 2e-6))
    html = written(report, tmp_path)
    section = page_data(html)["sections"][0]
    assert (section["size"], section["pixelSize"], section["shape"]) == ([1000, 5], [2e-6, 4e-6], [2000, 10])
    np.testing.assert_array_equal(cells_of(pictures(html)[0], (1000, 5)), view.cells[1::2, 1::2])


def test_ids_are_told_rightly_also_where_a_picture_has_more_than_it_can_number(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(membranes, "_MOST_CELLS", 3)
    cells = np.array([[5, 2**40, 6, 0, 8]])
    view = SectionView(np.zeros((1, 5)), np.zeros((1, 5), np.float32), cells)
    html = written(MembranesReport("a", [section_row("0", view)], lambda _: view), tmp_path)
    assert cells_of(pictures(html)[0], (1, 5)).tolist() == [[5, 0, 6, 0, 8]]


@pytest.mark.parametrize("ids", [[1, 2], [0, 0]])
def test_number_0_is_no_cell_also_where_all_or_none_is_cell(ids: list[int], tmp_path: Path):
    view = SectionView(np.zeros((1, 2)), np.zeros((1, 2), np.float32), np.array([ids]))
    picture = pictures(written(MembranesReport("a", [section_row("0", view)], lambda _: view), tmp_path))[0]
    assert picture["ids"][0] == 0
    assert cells_of(picture, (1, 2)).tolist() == [ids]


def test_page_without_cells_outlines_where_the_probability_is_a_half(tmp_path: Path):
    view = SectionView(np.zeros((1, 4)), np.array([[0.0, 0.49, 0.5, 1.0]], np.float32))
    html = written(MembranesReport("a", [section_row("0", view)], lambda _: view), tmp_path)
    assert cells_of(pictures(html)[0], (1, 4)).tolist() == [[1, 1, 0, 0]]
    for absent in (
        'value="cells"',
        "<h3>Cells in each section",
        "Median area</",
        "V_rand</",
        "Please check",
        "<h2>Settings",
    ):
        assert absent not in html
    assert page_data(html)["cellCounts"] == []
    assert page_data(html)["sections"][0]["pixelSize"] is None
    assert table_of(html) == [["Section", "Membrane %", "Unsure %"], ["0", "50.0", "50.0"]]


@pytest.mark.parametrize("other", [noise((4, 6)), noise((4, 5), with_cells=False)])
def test_pixels_unlike_their_row_are_refused_and_the_old_report_stays(other: SectionView, tmp_path: Path):
    (tmp_path / "report.html").write_text("the old report")
    report = MembranesReport("a", [section_row("07.png", noise((4, 5)))], lambda _: other)
    with pytest.raises(ValueError, match=r"section 07\.png has pixels of shape"):
        written(report, tmp_path)
    assert (tmp_path / "report.html").read_text() == "the old report"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_does_not_fit_is_refused(membranes_report: MembranesReport):
    image, p = np.zeros((2, 3)), np.zeros((2, 3), np.float32)
    for arrays, message in (
        ((np.zeros((2, 3, 3)), p), r"the image has shape \(2, 3, 3\); give \(Y, X\)"),
        ((image, p[:1]), r"probability has shape \(1, 3\)"),
        ((image, p, np.zeros((3, 2), int)), r"cells has shape \(3, 2\)"),
        ((image, p + 1.5), "outside 0 to 1"),
        ((image, p * np.nan), "not numbers"),
    ):
        with pytest.raises(ValueError, match=rf"SectionView\(\): .*{message}"):
            SectionView(*arrays)
    mixed = [*membranes_report.rows, section_row("a", noise((4, 5), with_cells=False))]
    for change, message in (
        ({"rows": []}, "no sections"),
        ({"rows": mixed}, "some sections have cells"),
        ({"spacing": (4e-6, float("nan"))}, "give positive numbers or None"),
        ({"spacing": (0.0, 4e-6)}, "give positive numbers or None"),
    ):
        with pytest.raises(ValueError, match=rf"MembranesReport\(\): .*{message}"):
            replace(membranes_report, **change)
