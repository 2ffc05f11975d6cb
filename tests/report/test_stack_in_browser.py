"""The report in headless Chromium, used as a reader uses it: no test looks at how the page is made."""

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys


def test_opens_at_the_first_suggestion(viewer):
    assert viewer.find("#section-title").text == "Section 3"
    assert viewer.find("#badge").text == "completed · label next"
    assert viewer.find("#facts").text.split("\n") == [
        *("Position", "1.5 mm"),
        *("Nearest labelled section", "1 mm away"),
        *("Mean uncertainty", "0.30"),
        *("Accuracy", "0.870"),
    ]


def test_pixels_keep_their_proportions(viewer):
    canvas = viewer.find("#canvas").size
    assert canvas["width"] / canvas["height"] == pytest.approx(36 * 0.2 / (24 * 0.1), rel=0.01)


def test_slider_moves_through_the_sections(viewer):
    before = viewer.pixels()
    viewer.find("#slider").send_keys(Keys.HOME)
    viewer.shows(0)
    assert viewer.find("#section-title").text == "Section 0"
    assert viewer.find("#badge").text == "labelled by you"
    assert viewer.pixels() != before


def test_arrow_keys_step_and_stop_at_the_ends(viewer):
    body = viewer.find("body")
    body.send_keys(Keys.ARROW_RIGHT)
    viewer.shows(4)
    body.send_keys(Keys.ARROW_LEFT * 6)
    viewer.shows(0)


def test_arrow_keys_on_the_opacity_slider_do_not_change_the_section(viewer):
    before = viewer.pixels()
    viewer.find("#opacity").send_keys(Keys.ARROW_RIGHT * 5)
    assert viewer.find("#section-title").text == "Section 3"
    assert viewer.pixels() != before


def test_buttons_beside_the_slider_step(viewer):
    viewer.find("#next").click()
    viewer.shows(4)
    viewer.find("#previous").click()
    viewer.shows(3)


@pytest.mark.parametrize("switch", ["[value=uncertainty]", "[value=none]", "[name=outline]", "[name=truth]"])
def test_every_switch_changes_the_picture_and_back(viewer, switch):
    before = viewer.pixels()
    viewer.find(f"label:has({switch})").click()
    assert viewer.pixels() != before
    viewer.find(f"label:has({'[value=labels]' if 'value' in switch else switch})").click()
    assert viewer.pixels() == before


def test_colour_bar_shows_with_uncertainty_alone(viewer):
    assert not viewer.find("#colour-bar").is_displayed()
    viewer.find("label:has([value=uncertainty])").click()
    assert viewer.find("#colour-bar").is_displayed()


def test_filled_labels_have_the_colours_of_the_table(viewer):
    viewer.run("void (byId('opacity').value = 100, byId('opacity').dispatchEvent(new Event('input', {bubbles: true})))")
    row = viewer.run("[...canvas.getContext('2d').getImageData(0, canvas.height / 2, canvas.width, 1).data]")
    width = len(row) // 4
    pixels = [tuple(row[4 * x : 4 * x + 4]) for x in (width // 4, 3 * width // 4)]
    assert pixels == [(200, 40, 40, 255), (40, 90, 200, 255)]


def test_suggestions_jump(viewer):
    buttons = viewer.driver.find_elements("css selector", ".suggestions button")
    assert [button.text.split("\n")[0] for button in buttons] == ["Section 3", "Section 4", "Section 2"]
    buttons[2].click()
    viewer.shows(2)
    assert buttons[2].get_attribute("aria-current") is not None


def test_bars_of_the_plot_jump(viewer):
    viewer.find("#uncertainty-plot [data-section='1']").click()
    viewer.shows(1)


def test_table_of_scores_jumps_and_scrolls_back_to_the_image(viewer):
    viewer.find(".link[data-section='1']").click()
    viewer.shows(1)
    assert 0 <= viewer.run("byId('stage').getBoundingClientRect().top") < 200


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        (-0.25, 0.0, "<script>alert(1)</script>\nuncertainty 0.50"),
        (-0.25, 0.45, "<script>alert(1)</script>\nuncertainty 0.50\nin truth: Thalamus & co"),
        (0.25, 0.2, "Thalamus & co\nuncertainty 0.00"),
        (0.25, -0.4, "background\nuncertainty 0.00"),
    ],
)
def test_hovering_tells_structure_and_uncertainty(viewer, x, y, told):
    canvas = viewer.find("#canvas")
    offset = round(x * canvas.size["width"]), round(y * canvas.size["height"])
    ActionChains(viewer.driver).move_to_element_with_offset(canvas, *offset).perform()
    assert viewer.find("#tip").text == told


def test_legend_lists_structures_with_area_uncertainty_and_dice(viewer):
    rows = [row.text for row in viewer.driver.find_elements("css selector", "#legend tr")]
    area = 24 * 18 * 0.1 * 0.2, 16 * 18 * 0.1 * 0.2
    assert rows == [
        f"<script>alert(1)</script> {area[0]:.1f} 0.50 0.80",
        f"Thalamus & co {area[1]:.1f} 0.00 –",
    ]


def test_pointing_at_the_legend_brings_out_the_structure(viewer):
    before = viewer.pixels()
    ActionChains(viewer.driver).move_to_element(viewer.find("#legend tr")).perform()
    assert viewer.pixels() != before


def test_no_section_is_decoded_before_it_is_looked_at(viewer):
    assert sorted(viewer.run("[...decoded.keys()]")) == [2, 3, 4]  # the one shown and its neighbours


def test_every_plot_is_drawn(viewer):
    count = "document.querySelectorAll('{}').length"
    assert viewer.run(count.format("#uncertainty-plot .bar")) == 4
    assert viewer.run(count.format("#uncertainty-plot .labelled-mark")) == 2
    assert viewer.run(count.format("#uncertainty-plot .bar.suggested")) == 3
    assert viewer.run(count.format("#accuracy-plot .dot")) == 4
    assert viewer.run(count.format("#objective-plot .curve")) == 2  # the median and the section shown
    assert "NaN" not in viewer.run("[...document.querySelectorAll('.plot')].map((plot) => plot.innerHTML).join()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(viewer, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    viewer.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    ink, soft, paper = (
        viewer.run(f"getComputedStyle(document.querySelector('{css}')).{style}")
        for css, style in (("body", "color"), (".summary", "color"), ("body", "backgroundColor"))
    )
    assert contrast(ink, paper) > 10
    assert contrast(soft, paper) > 4.5  # WCAG AA


def contrast(one: str, other: str) -> float:
    """Contrast of two CSS colours, 1 to 21 (WCAG 2.1)."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour.strip("rgb()").split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
