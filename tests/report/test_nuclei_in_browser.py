"""The report of nuclei in headless Chromium, used as a reader uses it."""

from types import SimpleNamespace

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


@pytest.fixture
def page(browser, nuclei_page):
    """The report, freshly opened; whatever the test did, the browser must have had nothing to complain of."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get(nuclei_page.as_uri())

    def run(script):
        return browser.execute_script(f"return {script}")

    def find(css):
        return browser.find_element("css selector", css)

    def shows(image, view=0):
        wanted = [str(image), str(view)]
        WebDriverWait(browser, 10, poll_frequency=0.05).until(
            lambda _: run("[image.dataset.image, image.dataset.view]") == wanted
        )

    def painted():  # the layers as they are seen, once nothing waits to be painted
        browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        return run("[image.toDataURL(), outlines.checkVisibility() ? outlines.toDataURL() : null]")

    opened = SimpleNamespace(driver=browser, run=run, find=find, shows=shows, painted=painted)
    shows(0)
    yield opened
    assert browser.get_log("browser") == []


def test_opens_at_the_first_image(page):
    assert page.find("#image-name").text == "tile 1.png"
    assert page.find("#facts").text.split("\n") == [
        *("Nuclei", "4"),
        *("Nuclei per mm²", "200"),
        *("Tissue", "0.02 mm²"),
        *("Median area", "35 µm²"),
        *("Half of areas", "27.5 to 52.5 µm²"),
        *("Size of a pixel", "0.25 µm"),
    ]
    assert page.run("byId('links').querySelector('a').getAttribute('href')") == "labels/tile%201%23.png"


def test_outlines_are_a_layer_of_their_own_and_follow_the_objects(page):
    image, outlines = page.painted()
    scale = page.run("placed().scale")
    row = page.run(
        "[...outlines.getContext('2d').getImageData("
        "placed().left, placed().top + 15 * placed().scale, 60 * placed().scale, 1).data]"
    )

    def colour(x):
        return row[4 * round(x * scale) :][:4]

    assert colour(10.1) == colour(30.1) == colour(49.9) == [255, 230, 0, 255]  # both ends, and where two objects touch
    assert colour(9.8) == colour(20) == colour(50.2) == [0, 0, 0, 0]
    page.find("#outline").click()
    assert page.painted() == [image, None]
    page.find("body").send_keys("o")
    assert page.painted() == [image, outlines]


def test_wheel_zooms_where_the_pointer_is_and_back(page):
    whole = page.painted()
    page.run("void zoomBy(4)")
    pointer = page.run("[0.7 * image.width, 0.4 * image.height]")
    under = "[({} - placed().left) / placed().scale, ({} - placed().top) / placed().scale]".format(*pointer)
    before = page.run(under)
    size = page.run("[image.width, image.height]")
    offset = (round(at - side / 2) for at, side in zip(pointer, size, strict=True))
    origin = ScrollOrigin.from_element(page.find("#image"), *offset)
    ActionChains(page.driver).scroll_from_origin(origin, 0, -100).perform()
    page.painted()
    assert page.run("state.zoom") == pytest.approx(4 * 1.3)
    assert page.run(under) == pytest.approx(before, abs=0.3)
    page.find("#whole").click()
    assert page.painted() == whole


def test_keys_and_buttons_zoom_and_dragging_moves(page):
    page.find("body").send_keys("+")
    page.find("#larger").click()
    page.painted()
    assert page.run("state.zoom") == pytest.approx(2.25)
    before = page.run("placed().left")
    ActionChains(page.driver).drag_and_drop_by_offset(page.find("#image"), 40, 0).perform()
    page.painted()
    assert page.run("placed().left") == pytest.approx(before + 40, abs=2)
    page.find("#image").send_keys(Keys.ARROW_RIGHT)
    page.painted()
    assert page.run("placed().left") < before
    page.shows(0)
    page.find("body").send_keys("0")
    page.painted()
    assert page.run("state.zoom") == 1


def test_views_switch(page):
    before = page.painted()
    page.driver.find_elements("css selector", "#views label")[1].click()
    page.shows(0, 1)
    assert page.painted() != before
    assert page.find("#views").text.split("\n")[-1] == "</script><script>alert(1)</script>"
    assert not page.find("#scale-bar").is_displayed()  # the size of its pixels is not known


def test_arrows_slider_and_table_choose_an_image(page):
    page.find("body").send_keys(Keys.ARROW_RIGHT)
    page.shows(1)
    assert page.find("#badge").text == "no nuclei found"
    assert not page.find("#area-plot").is_displayed()
    page.find("#slider").send_keys(Keys.END)
    page.shows(3)
    page.find("#images [data-image='0'] button").click()
    page.shows(0)
    assert page.find("#images [aria-current]").get_attribute("data-image") == "0"


def test_an_image_that_failed_says_why(page):
    page.find("#images [data-image='2'] button").click()
    page.shows(2)
    assert page.find("#badge").text == "problem"
    assert page.find("#problem").text == "the file ends after 12 of 99 bytes; copy it <again>"
    assert page.find("#empty").is_displayed()
    assert not page.find("#larger").is_enabled()
    blank = page.run(
        "((canvas) => (canvas.width = image.width, "
        "canvas.height = image.height, canvas.toDataURL()))(document.createElement('canvas'))"
    )
    assert page.painted() == [blank, blank]


def test_table_sorts_by_a_column_both_ways_with_the_unknown_last(page):
    order = "[...byId('images').tBodies[0].rows].map((row) => row.dataset.image).join('')"
    headings = page.driver.find_elements("css selector", "#images thead button")
    headings[2].click()  # nuclei per mm2: 200, 0, unknown, 2000
    assert page.run(order) == "1032"
    headings[2].click()
    assert page.run(order) == "3012"
    assert page.driver.find_elements("css selector", "#images th")[2].get_attribute("aria-sort") == "descending"
    headings[0].click()  # by name
    assert page.run(order) == "2130"


def test_histogram_shows_this_image_and_all(page):
    page.find("#slider").send_keys(Keys.END)
    page.shows(3)
    bars = page.run("[...document.querySelectorAll('#area-plot .bar title')].map((title) => title.textContent)")
    edges = page.run("report.areaEdges")
    counts = page.run("report.images[3].areaCounts")
    assert len(bars) == len(edges) - 1
    assert bars[2].startswith(f"{edges[2]:g} to {edges[3]:g} µm²: {counts[2]:,} nuclei (")
    assert page.run("document.querySelectorAll('#area-plot .curve').length") == 1
    assert page.find("#area-plot .title").text == "Area of a nucleus (µm²)"
    assert page.find("#larger-areas").text == f"{counts[-1]:,} larger, not shown"
    assert "NaN" not in page.run("byId('area-plot').innerHTML")
