"""The report of membranes and cells in headless Chromium, used as a reader uses it."""

from dataclasses import replace

import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from limner.report.membranes import MembranesReport, SectionView, section_row, shown_sections, write_membranes_report

CYAN = (0, 225, 255)
CELL, MEMBRANE = (180, 180, 180), (60, 60, 60)


def opaque(viewer, fill: str) -> None:
    viewer.find(f"label:has([value={fill}])").click()
    viewer.run("void (byId('opacity').value = 100, byId('opacity').dispatchEvent(new Event('input', {bubbles: true})))")


def go_to(viewer, section: int) -> None:
    viewer.find(f"#uncertainty-plot [data-section='{section}']").click()
    viewer.shows(section)


def near(colour, other, by=4) -> bool:
    return max(abs(a - b) for a, b in zip(colour, other, strict=True)) <= by


def test_opens_at_the_least_sure_section(membranes_viewer):
    assert membranes_viewer.find("#section-title").text == "Section 2"
    assert membranes_viewer.find("#section-name").text == "02.png"
    assert membranes_viewer.find("#badge").text == "among the least sure"
    assert membranes_viewer.find("#facts").text.split("\n") == [
        *("Membrane", "11.1 %"),
        *("Unsure", "33.3 %"),
        *("Cells", "2"),
        *("Median area", "0.0123 µm²"),
        *("V_rand", "0.920"),
        *("V_info", "0.800"),
        *("Size", "36 × 24 px"),
    ]
    assert membranes_viewer.find(".suggestions").text.split("\n") == ["Section 2", "02.png", "33.3 % unsure"]


def test_a_section_of_another_size_keeps_its_proportions(membranes_viewer):
    def aspect():
        canvas = membranes_viewer.find("#canvas").size
        return canvas["width"] / canvas["height"]

    assert aspect() == pytest.approx(36 * 2 / 24, rel=0.01)  # pixels are twice as wide as high
    go_to(membranes_viewer, 3)
    assert aspect() == pytest.approx(20 * 2 / 30, rel=0.01)
    assert near(membranes_viewer.colour_at(29, 10), MEMBRANE)
    go_to(membranes_viewer, 4)
    assert aspect() == pytest.approx(36 * 2 / 24, rel=0.01)


def test_outlines_run_along_the_cells_on_the_grey_image(membranes_viewer):
    go_to(membranes_viewer, 0)
    one = membranes_viewer.run("36 / canvas.clientWidth")  # pixels of the section in one of the screen
    for column in (8 - 0.5 * one, 12 + 0.5 * one):
        assert membranes_viewer.colour_at(12, column) == CYAN
    assert near(membranes_viewer.colour_at(12, 10), MEMBRANE)
    assert near(membranes_viewer.colour_at(12, 4), CELL)
    assert near(membranes_viewer.colour_at(12, 25), CELL)


def test_outlines_are_switched_with_the_mouse_and_a_key(membranes_viewer):
    before = membranes_viewer.pixels()
    membranes_viewer.find("label:has([name=outline])").click()
    without = membranes_viewer.pixels()
    assert without != before
    membranes_viewer.find("body").send_keys("o")
    assert membranes_viewer.pixels() == before
    membranes_viewer.find("body").send_keys("O")
    assert membranes_viewer.pixels() == without


def test_cells_are_filled_and_a_linked_cell_keeps_its_colour(membranes_viewer):
    opaque(membranes_viewer, "cells")
    colours = []
    for section in range(5):
        go_to(membranes_viewer, section)
        colours.append([membranes_viewer.colour_at(18, column) for column in (4, 10, 16)])
    left, between, right = zip(*colours, strict=True)
    assert len(set(left)) == 1
    assert all(near(colour, MEMBRANE) for colour in between)
    assert right[0] == right[1] != right[2] == right[3] == right[4]
    assert len({left[0], right[0], right[2]}) == 3
    assert all(max(colour) - min(colour) > 60 for colour in (left[0], right[0], right[2]))  # not grey


def test_probability_is_laid_over_and_where_there_is_none_the_image_stays(membranes_viewer):
    assert not membranes_viewer.find("#colour-bar").is_displayed()
    opaque(membranes_viewer, "probability")
    assert membranes_viewer.find("#colour-bar").is_displayed()
    colours = membranes_viewer.run("report.mappedColours")
    assert membranes_viewer.colour_at(12, 10) == tuple(colours[90])
    assert membranes_viewer.colour_at(18, 24) == tuple(colours[30])
    assert near(membranes_viewer.colour_at(6, 24), CELL)


def test_opacity_can_be_changed_only_where_something_is_laid_over(membranes_viewer):
    assert not membranes_viewer.find("#opacity").is_enabled()
    membranes_viewer.find("label:has([value=cells])").click()
    before = membranes_viewer.pixels()
    membranes_viewer.find("#opacity").send_keys(Keys.ARROW_RIGHT * 5)
    assert membranes_viewer.pixels() != before
    assert membranes_viewer.find("#section-title").text == "Section 2"


def test_keys_and_slider_step(membranes_viewer):
    membranes_viewer.find("body").send_keys(Keys.ARROW_RIGHT)
    membranes_viewer.shows(3)
    membranes_viewer.find("#slider").send_keys(Keys.HOME)
    membranes_viewer.shows(0)
    assert membranes_viewer.find("#badge").text == "segmented"


@pytest.mark.parametrize(
    ("row", "column", "told"),
    [
        (5, 4, "cell 7\nprobability of membrane 0.00"),
        (18, 24, "cell 70001\nprobability of membrane 0.30"),
        (5, 10, "no cell\nprobability of membrane 0.90"),
    ],
)
def test_hovering_tells_cell_and_probability(membranes_viewer, row, column, told):
    membranes_viewer.pointer_to(row, column).perform()
    assert membranes_viewer.find("#tip").text == told


def test_a_cell_that_is_clicked_is_brought_out_on_its_other_sections(membranes_viewer):
    def right_is_brought_out():
        colour = membranes_viewer.colour_at(6, 24)
        return max(colour) - min(colour) > 60

    plain = membranes_viewer.pixels()
    membranes_viewer.pointer_to(18, 24).click().perform()  # cell 70001
    assert right_is_brought_out()
    assert near(membranes_viewer.colour_at(6, 4), CELL)
    go_to(membranes_viewer, 4)
    assert right_is_brought_out()
    go_to(membranes_viewer, 1)  # cell 70000
    assert not right_is_brought_out()
    go_to(membranes_viewer, 2)
    membranes_viewer.pointer_to(6, 24).click().perform()
    assert membranes_viewer.pixels() == plain


def test_table_sorts_and_jumps(membranes_viewer):
    order = "[...byId('sections').tBodies[0].rows].map((row) => row.cells[0].textContent).join('')"
    headings = membranes_viewer.driver.find_elements("css selector", "#sections thead button")
    headings[6].click()  # V_rand, up
    headings[6].click()
    assert membranes_viewer.run(order) == "43210"
    headings[7].click()  # V_info: what is not known comes last
    assert membranes_viewer.run(order)[-1] == "4"
    membranes_viewer.find("#sections .link[data-section='3']").click()
    membranes_viewer.shows(3)
    assert 0 <= membranes_viewer.run("byId('stage').getBoundingClientRect().top") < 200


def test_plots_hold_every_section(membranes_viewer):
    count = "document.querySelectorAll('{}').length"
    for plot in ("#uncertainty-plot", "#cells-plot"):
        assert membranes_viewer.run(count.format(f"{plot} .bar")) == 5
        assert membranes_viewer.run(count.format(f"{plot} .bar.suggested")) == 1
    titles = "[...document.querySelectorAll('{} title')].map((title) => title.textContent)"
    assert membranes_viewer.run(titles.format("#uncertainty-plot"))[1:3] == [
        "Section 1: 0.0 % unsure",
        "Section 2: 33.3 % unsure",
    ]
    assert membranes_viewer.run(titles.format("#cells-plot"))[0] == "Section 0: 2 cells"
    assert "NaN" not in membranes_viewer.run(
        "[...document.querySelectorAll('.plot')].map((one) => one.innerHTML).join()"
    )
    membranes_viewer.find("#cells-plot [data-section='4']").click()
    membranes_viewer.shows(4)


def test_of_a_long_stack_the_bars_lead_to_the_nearest_picture(open_page, membranes_report, tmp_path):
    first = membranes_report.rows[0]
    rows = [replace(first, name=str(z), unsure=0.2 if z == 77 else 0.1) for z in range(100)]
    report = replace(membranes_report, rows=rows, view=lambda _: membranes_report.view(0))
    write_membranes_report(tmp_path / "long.html", report)
    viewer = open_page(tmp_path / "long.html", shown_sections([row.unsure for row in rows]).index(77))
    assert viewer.find("#section-title").text == "Section 77"
    assert viewer.run("byId('slider').max") == str(viewer.run("report.sections.length") - 1)
    places = np.array(viewer.run("report.sections.map((section) => section.place)"))
    leads = viewer.run("[...document.querySelectorAll('#uncertainty-plot .hit')].map((hit) => +hit.dataset.section)")
    assert len(leads) == 100
    for place, section in enumerate(leads):
        assert abs(places[section] - place) == np.abs(places - place).min()
    assert viewer.run("document.querySelectorAll('#uncertainty-plot .bar.without').length") == 100 - len(places)


def test_without_cells_and_spacing(open_page, tmp_path):
    probability = np.zeros((20, 40), np.float32)
    probability[:, 18:22] = 1
    view = SectionView(np.full((20, 40), 180, np.uint8), probability)
    report = MembranesReport("One", [section_row("0", view)], lambda _: view)
    write_membranes_report(tmp_path / "one.html", report)
    viewer = open_page(tmp_path / "one.html", 0)
    assert not viewer.find("#scale-bar").is_displayed()
    assert viewer.find("#section-name").text == ""
    assert "Cells" not in viewer.find("#facts").text
    assert viewer.colour_at(10, 18 - viewer.run("0.5 * 40 / canvas.clientWidth")) == CYAN
    for column, name in ((10, "cell"), (20, "membrane")):
        viewer.pointer_to(10, column).perform()
        assert viewer.find("#tip").text.split("\n")[0] == name
    before = viewer.pixels()
    viewer.pointer_to(10, 10).click().perform()  # nothing to follow
    assert viewer.pixels() == before
