"""The report of organs from scribbles in headless Chromium, used as a reader uses it."""

import pytest
from selenium.webdriver.common.keys import Keys

RED, BLUE, BLACK, WHITE = (200, 40, 40), (40, 90, 200), (0, 0, 0), (255, 255, 255)


def go_to(viewer, section: int) -> None:
    viewer.find(f"#uncertainty-plot [data-section='{section}']").click()
    viewer.shows(section)


def test_opens_at_the_first_suggestion(scribbles_viewer):
    assert scribbles_viewer.find("#section-title").text == "Section 2"
    assert scribbles_viewer.find("#badge").text == "draw here next"
    assert scribbles_viewer.find("#facts").text.split("\n") == [
        *("Position", "1 mm"),
        *("Nearest section you drew on", "0.5 mm away"),
        *("Mean uncertainty", "0.25"),
    ]


def test_a_section_that_was_drawn_on_says_so(scribbles_viewer):
    go_to(scribbles_viewer, 1)
    assert scribbles_viewer.find("#badge").text == "you drew here"
    assert scribbles_viewer.find("#facts").text.split("\n")[-4:] == [
        *("Strokes of background", "14 px"),
        *("Strokes of <script>alert(1)</script>", "20 px"),
    ]
    go_to(scribbles_viewer, 4)
    assert scribbles_viewer.find("#badge").text == "you drew here · draw more"
    go_to(scribbles_viewer, 3)
    assert scribbles_viewer.find("#badge").text == "not drawn on"


def test_strokes_have_the_colour_of_their_organ_and_a_white_edge(scribbles_viewer):
    scribbles_viewer.find("label:has([value=none])").click()
    go_to(scribbles_viewer, 1)
    assert scribbles_viewer.colour_at(13, 9) == RED
    assert scribbles_viewer.colour_at(4.5, 27) == BLACK
    assert scribbles_viewer.colour_at(13, 17) == BLACK  # no stroke: the image itself
    one = scribbles_viewer.run("24 / canvas.clientHeight")  # pixels of the section in one of the screen
    for row, column in ((12 - 0.7 * one, 9), (14 + 0.7 * one, 9), (4 - 0.7 * one, 27), (5 + 0.7 * one, 27)):
        assert scribbles_viewer.colour_at(row, column) == WHITE
    go_to(scribbles_viewer, 4)
    assert scribbles_viewer.colour_at(16.5, 30.5) == BLUE


@pytest.mark.parametrize("fill", ["labels", "uncertainty", "none"])
def test_strokes_can_be_switched_off_and_on(scribbles_viewer, fill):
    go_to(scribbles_viewer, 1)
    scribbles_viewer.find(f"label:has([value={fill}])").click()
    before = scribbles_viewer.pixels()
    scribbles_viewer.find("label:has([name=strokes])").click()
    assert scribbles_viewer.pixels() != before
    assert scribbles_viewer.colour_at(13, 9) != RED
    scribbles_viewer.find("label:has([name=strokes])").click()
    assert scribbles_viewer.pixels() == before


def test_where_nothing_was_drawn_the_switch_changes_nothing(scribbles_viewer):
    before = scribbles_viewer.pixels()
    scribbles_viewer.find("label:has([name=strokes])").click()
    assert scribbles_viewer.pixels() == before


def test_strokes_of_a_pixel_smaller_than_the_screens_are_still_seen(scribbles_viewer):
    go_to(scribbles_viewer, 4)
    scribbles_viewer.run("void (canvas.width = 18, canvas.height = 12, canvas.style.width = '18px', paint())")
    assert scribbles_viewer.colour_at(16.5, 30.5) == BLUE


def test_slider_and_keys_move_through_the_sections(scribbles_viewer):
    scribbles_viewer.find("#slider").send_keys(Keys.END)
    scribbles_viewer.shows(4)
    scribbles_viewer.find("body").send_keys(Keys.ARROW_LEFT)
    scribbles_viewer.shows(3)


def test_plot_marks_drawn_and_suggested_sections(scribbles_viewer):
    count = "document.querySelectorAll('#uncertainty-plot {}').length"
    assert scribbles_viewer.run(count.format(".bar")) == 5
    assert scribbles_viewer.run(count.format(".labelled-mark")) == 2
    assert scribbles_viewer.run(count.format(".bar.suggested")) == 2
    titles = "[...document.querySelectorAll('#uncertainty-plot title')].map((title) => title.textContent)"
    assert scribbles_viewer.run(titles)[1:3] == [
        "Section 1: mean uncertainty 0.05, you drew here",
        "Section 2: mean uncertainty 0.25",
    ]


def test_suggestions_and_the_table_of_organs_jump(scribbles_viewer):
    scribbles_viewer.driver.find_elements("css selector", ".suggestions button")[1].click()
    scribbles_viewer.shows(4)
    scribbles_viewer.find("#organs .link[data-section='1']").click()
    scribbles_viewer.shows(1)
    assert 0 <= scribbles_viewer.run("byId('stage').getBoundingClientRect().top") < 200


@pytest.mark.parametrize(
    ("row", "column", "told"),
    [
        (13, 9, "<script>alert(1)</script>\nuncertainty 0.10\nyour stroke: <script>alert(1)</script>"),
        (4.5, 27, "background\nuncertainty 0.00\nyour stroke: background"),
        (23, 9, "<script>alert(1)</script>\nuncertainty 0.10\nin truth: Heart & co"),
        (16, 27, "Heart & co\nuncertainty 0.00"),
    ],
)
def test_hovering_tells_organ_uncertainty_and_stroke(scribbles_viewer, row, column, told):
    go_to(scribbles_viewer, 1)
    scribbles_viewer.pointer_to(row, column).perform()
    assert scribbles_viewer.find("#tip").text == told


def test_legend_lists_organs_with_area_and_uncertainty(scribbles_viewer):
    rows = [row.text for row in scribbles_viewer.driver.find_elements("css selector", "#legend tr")]
    area = 24 * 18 * 0.1 * 0.2, 16 * 18 * 0.1 * 0.2
    assert rows == [f"<script>alert(1)</script> {area[0]:.1f} 0.50", f"Heart & co {area[1]:.1f} 0.00"]
