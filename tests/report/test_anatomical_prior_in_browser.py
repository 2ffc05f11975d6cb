"""The report of scans nobody labelled in headless Chromium, used as a reader uses it."""

import base64
from types import SimpleNamespace

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

MIDDLE = 6  # of 13 slices
CORTEX = (200, 40, 40)


@pytest.fixture
def page(browser, prior_page):
    """The report, freshly opened; whatever the test did, the browser must have had nothing to complain of."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get(prior_page.as_uri())

    def run(script):
        return browser.execute_script(f"return {script}")

    def wait(script):
        WebDriverWait(browser, 10, poll_frequency=0.05).until(lambda _: run(script))

    def shows(scan, *places):
        wait(f"byId('stage').dataset.shown === '{scan}: {','.join(map(str, places or (MIDDLE,) * 3))}'")

    def colour(plane, y, x):  # at shares of a plane's canvas
        canvas = f"figures[{plane}].canvas"
        place = f"-Math.floor({x} * {canvas}.width), -Math.floor({y} * {canvas}.height)"
        copied = f"(copy => (copy.drawImage({canvas}, {place}), [...copy.getImageData(0, 0, 1, 1).data]))"
        return tuple(run(f"{copied}(new OffscreenCanvas(1, 1).getContext('2d'))"))[:3]

    def find(css):
        return browser.find_element("css selector", css)

    opened = SimpleNamespace(driver=browser, run=run, wait=wait, shows=shows, colour=colour, find=find)
    shows(2)
    yield opened
    assert browser.get_log("browser") == []


def test_opens_at_the_most_uncertain_scan(page):
    assert page.find("#scan-name").text == "1002.nii.gz"
    assert page.find("#badge").text == "scan 3 of 10"
    assert page.find("#facts").text.split("\n") == [
        *("Overlap after alignment", "0.95"),
        *("Mean uncertainty", "0.05"),
        *("Mean Dice", "0.800"),
    ]
    assert not page.find("#scan-notes").is_displayed()
    thalamus = page.find("#legend tr:last-child")
    cells = [cell.text for cell in thalamus.find_elements("css selector", "th, td")]
    assert cells == ["Thalamus & co", "1,760\n1,000 – 2,000", "0.700"]
    assert page.find("#legend tr:first-child th").text == "<script>alert(1)</script>"


def test_pictures_are_square_in_millimetres_and_of_one_scale(page):
    sizes = [page.run(f"[figures[{n}].canvas.clientHeight, figures[{n}].canvas.clientWidth]") for n in range(3)]
    # the labelled part with 2, 2 and 3 mm around it
    for size, mm in zip(sizes, ((28, 42), (40, 42), (40, 28)), strict=True):
        assert size == pytest.approx([side * sizes[0][1] / 42 for side in mm], abs=2)


def test_outlines_lie_on_the_borders_of_labels(page):
    # axial: 28 x 42 mm, cortex from 2 and 3 mm on each side, black around and within
    edge = 0.5 / page.run("figures[0].canvas.width")
    for side in (3 / 42, 39 / 42):
        assert page.colour(0, 0.25, side + (edge if side < 0.5 else -edge)) == CORTEX
    assert page.colour(0, 2 / 28 + edge, 0.25) == CORTEX
    for y, x in ((0.25, 0.03), (0.25, 0.2), (0.03, 0.25)):
        assert max(page.colour(0, y, x)) < 12
    page.find("label:has([name=outline])").click()
    assert max(page.colour(0, 0.25, 3 / 42 + edge)) < 12


def test_filled_labels_and_uncertainty_lie_where_they_are(page):
    page.find("label:has([name=outline])").click()
    page.find("label:has([value=labels])").click()
    page.run("void (byId('opacity').value = 100, byId('opacity').dispatchEvent(new Event('input', {bubbles: true})))")
    assert page.colour(1, 0.2, 0.2) == CORTEX  # the thalamus begins at 12 of 42 mm from the left
    assert page.colour(1, 0.5, 0.5) == tuple(page.run("structureColours[2]"))
    page.find("label:has([value=uncertainty])").click()
    assert page.find("#colour-bar").is_displayed()
    assert max(page.colour(1, 0.2, 0.2)) < 12
    assert max(page.colour(1, 0.5, 0.5)) > 150


def test_sliders_step_through_slices(page):
    page.find("[data-plane='0'] input").send_keys(Keys.HOME)
    page.shows(2, 0, MIDDLE, MIDDLE)
    assert page.find("[data-plane='0'] .where").text.endswith("mm inferior")
    page.find("[data-plane='2'] input").send_keys(Keys.END)
    page.shows(2, 0, MIDDLE, page.run("state.planes[2].slices.length - 1"))
    assert page.find("[data-plane='2'] .where").text.endswith("mm left")
    assert "1002.nii.gz" in page.find("[data-plane='2'] canvas").get_attribute("aria-label")


def test_arrow_keys_and_buttons_step_through_scans(page):
    page.find("body").send_keys(Keys.ARROW_RIGHT)
    page.shows(3)
    page.find("#next").click()
    page.shows(4)
    page.find("body").send_keys(Keys.ARROW_RIGHT * 8)
    page.shows(9)
    assert page.find("#scan-name").text == "</script><b>"
    assert page.find("#scan-notes").text == "Turned <i>round</i>"


def test_a_structure_in_the_table_leads_to_its_slices(page):
    page.find("[data-plane='1'] input").send_keys(Keys.HOME)
    page.find("#legend tr:last-child button").click()
    page.wait("byId('stage').dataset.shown === `2: ${state.best[2]}`")
    assert page.run("state.pixels.every(({ labels }) => labels.includes(2))")


def test_one_plane_can_be_seen_alone(page):
    small = page.find("[data-plane='1'] canvas").size["width"]
    page.find("label:has([name=plane][value='1'])").click()
    assert [page.find(f"[data-plane='{n}']").is_displayed() for n in range(3)] == [False, True, False]
    assert page.find("[data-plane='1'] canvas").size["width"] > 1.2 * small


def test_gallery_shows_every_scan_and_leads_to_it(page):
    page.wait("byId('stage').dataset.gallery === 'painted'")
    middles = page.run(
        "[...document.querySelectorAll('.gallery canvas')].map((canvas) => (copy => (copy.drawImage(canvas, "
        "-Math.ceil(canvas.width / 14), -canvas.height / 2), [...copy.getImageData(0, 0, 1, 1).data]))"
        "(new OffscreenCanvas(1, 1).getContext('2d')))"
    )
    assert middles == [[*CORTEX, 255]] * 10  # the outline 3 mm from the left, of 42 mm
    assert "1 unusual" in page.find("#gallery li:nth-child(5)").text
    page.find("#gallery li:nth-child(1) button").click()
    page.shows(0)


def test_pointer_names_the_structure(page):
    ActionChains(page.driver).move_to_element(page.find("[data-plane='1'] canvas")).perform()
    assert page.find("#tip").text.split("\n") == ["Thalamus & co", "uncertainty 0.90"]
    assert "pointed" in page.find("#legend tr:last-child").get_attribute("class")


def test_tables_sort_by_a_column(page):
    page.find("#volumes thead th:last-child button").click()
    page.find("#volumes thead th:last-child button").click()
    assert page.find("#volumes tbody tr th").text == "1004.nii.gz"
    assert page.find("#volumes tbody tr td:last-child").get_attribute("class") == "outlier"


def test_print_shows_pictures_and_whole_tables(page):
    pdf = base64.b64decode(page.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"])
    assert pdf.startswith(b"%PDF")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not page.find("#switches").is_displayed()
    assert page.run("getComputedStyle(document.querySelector('.legend')).overflow") == "visible"
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
