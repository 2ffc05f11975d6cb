import base64
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from limner.report.nuclei import ImageReport, NucleiReport, View, area_edges, write_nuclei_report


def page_data(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', html, re.S)[1])


def pictures(html: str) -> list[dict]:
    return [json.loads(text) for text in re.findall(r'id="picture-\d+">(.*?)</script>', html, re.S)]


def labels_of(picture: dict) -> np.ndarray:
    deflated = zlib.decompress(base64.b64decode(picture["labels"]))
    return np.frombuffer(deflated, "<u2").reshape(picture["size"])


def rows_of(html: str) -> list[list[str]]:
    """Text of the table's cells, tags taken off."""
    rows = re.findall(r"<tr data-image=.*?</tr>", html, re.S)
    return [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd]\b.*?</t[hd]>", row, re.S)] for row in rows]


def test_page_stands_alone(nuclei_page: Path):
    html = nuclei_page.read_text()
    assert re.findall(r"(?:src|href)\s*=\s*[\"']", html) == []
    assert re.findall(r"(?:https?:|@import|url\()[^\s\"']*", html) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in html


def test_table_of_images(nuclei_page: Path):
    assert rows_of(nuclei_page.read_text()) == [
        ["tile 1.png", "4", "200", "0.020", "27.5", "35.0", "52.5", ""],
        ["empty.png", "0", "0", "0.005", "–", "–", "–", ""],
        [
            *("&lt;b&gt;&amp;&#34;.svs", "–", "–", "–", "–", "–", "–"),
            "the file ends after 12 of 99 bytes; copy it &lt;again&gt;",
        ],
        ["slide.svs", "300,000", "2,000", "150.000", "25.8", "50.5", "75.2", ""],
    ]


def test_what_users_wrote_cannot_become_markup(nuclei_page: Path):
    html = nuclei_page.read_text()
    for markup in ("<b>", "<again>", "<i>title", "<script>alert"):
        assert markup not in html
    data = page_data(html)
    assert data["images"][2]["name"] == '<b>&".svs'
    assert data["images"][0]["views"][1]["title"] == "</script><script>alert(1)</script>"
    assert "<h1>&lt;i&gt;title</h1>" in html
    assert data["images"][0]["links"] == [
        {"name": "labels", "address": "labels/tile%201%23.png"},
        {"name": "bad", "address": "javascript%3Aalert%281%29"},
    ]


def test_views_are_packed_in_their_order(nuclei_page: Path, nuclei_report: NucleiReport):
    html = nuclei_page.read_text()
    numbers = [[view["picture"] for view in image["views"]] for image in page_data(html)["images"]]
    assert numbers == [[0, 1], [2], [], [3]]
    packed = pictures(html)
    views = [view for image in nuclei_report.images for view in image.views]
    assert [picture["size"] for picture in packed] == [[60, 80], [20, 30], [30, 50], [600, 1200]]
    for picture, view in zip(packed[:3], views[:3], strict=True):
        np.testing.assert_array_equal(labels_of(picture), view.labels)
        image = iio.imread(base64.b64decode(picture["image"]))
        assert np.abs(image.astype(int) - view.image).mean() < 4
    assert [picture["umPerPx"] for picture in packed] == [0.25, None, 0.25, 8]  # 2400 px shown as 1200


def test_objects_beyond_16_bit_keep_apart_from_background_and_neighbours(tmp_path: Path):
    labels = np.array([[0, 65535, 65536, 131070, 2**40]], np.uint64)
    view = View("all", np.zeros((1, 5, 3), np.uint8), labels)
    image = ImageReport("a", 1.0, 4, np.ones(4), None, [view])
    write_nuclei_report(tmp_path / "page.html", NucleiReport("a", [image], {}))
    found = labels_of(pictures((tmp_path / "page.html").read_text())[0])[0]
    assert found[0] == 0
    assert (found[1:] > 0).all()
    assert found[1] != found[2] != found[3]


def test_areas_are_binned_not_stored(nuclei_page: Path, nuclei_report: NucleiReport):
    html = nuclei_page.read_text()
    data = page_data(html)
    assert len(html) < 1_500_000  # 300,000 areas are not in it
    edges = data["areaEdges"]
    assert data["areaCounts"] == np.sum([image["areaCounts"] for image in data["images"]], axis=0).tolist()
    assert sum(data["areaCounts"]) == 300_004
    slide = nuclei_report.images[3].areas_um2
    inside = slide[slide < edges[-1]]  # numpy's last bin would hold its upper edge
    assert data["images"][3]["areaCounts"][:-1] == np.histogram(inside, edges)[0].tolist()
    assert data["images"][3]["areaCounts"][-1] == len(slide) - len(inside) > 0


@pytest.mark.parametrize("scale", [1e-3, 0.07, 1.0, 3.3, 5e4])
def test_edges_are_round_and_hold_nearly_all(scale: float):
    areas = np.random.default_rng(0).gamma(3, 10 * scale, 5000)
    edges = area_edges(areas)
    widths = np.diff(edges)
    assert 15 <= len(widths) <= 45
    np.testing.assert_allclose(widths, widths[0])
    assert re.fullmatch(r"[125]e[+-]\d+", f"{widths[0]:.0e}")
    assert 0.98 < (areas < edges[-1]).mean() <= 1


def test_edges_of_equal_areas_and_of_none():
    assert area_edges(np.full(7, 50.0))[-1] > 50
    assert area_edges(np.zeros(0)).tolist() == [0, 1]


def test_summary(nuclei_report: NucleiReport):
    assert nuclei_report.summary == "4 images, 1 with a problem; 300,004 nuclei, median area 50.5 µm²."
    nothing = replace(nuclei_report, images=nuclei_report.images[1:2])
    assert nothing.summary == "1 image; 0 nuclei."


def test_numbers_that_are_not_known_are_none():
    image = ImageReport("a", None, 3, np.zeros(0), None, ())
    assert (image.per_mm2, image.quartiles_um2) == (None, None)
    assert replace(image, tissue_mm2=0.0).per_mm2 is None


def test_page_without_settings_notes_or_areas(nuclei_report: NucleiReport, tmp_path: Path):
    write_nuclei_report(tmp_path / "bare.html", NucleiReport("One", nuclei_report.images[1:2], {}))
    html = (tmp_path / "bare.html").read_text()
    for absent in ("Settings", "Please check", "all images", "other images"):
        assert absent not in html
    assert page_data(html)["areaCounts"] == [0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: View("a", np.zeros((2, 3)), np.zeros((2, 3), int)), r"shape \(2, 3\) and type float64"),
        (lambda: View("a", np.zeros((2, 3, 3)), np.zeros((2, 3), int)), "type float64"),
        (lambda: View("a", np.zeros((2, 3, 3), np.uint8), np.zeros((3, 3), int)), r"labels have shape \(3, 3\)"),
        (lambda: ImageReport("a", 1, 2, np.ones(3), None, ()), r"2 nuclei and areas of shape \(3,\)"),
        (lambda: ImageReport("a", 1, 2, np.array([1, np.nan]), None, ()), "not positive numbers"),
        (lambda: ImageReport("a", 1, 2, np.array([1, 0.0]), None, ()), "not positive numbers"),
        (lambda: NucleiReport("a", [], {}), "no images"),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
