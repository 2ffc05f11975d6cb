"""A small completed stack, its report, and a browser to open it in."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limner.report.stack import StackReport, write_stack_report
from limner.space import Space
from limner.volume import Label, LabelMap, Volume

CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
EVIL_NAME = "<script>alert(1)</script>"


@pytest.fixture(scope="session")
def report() -> StackReport:
    """Six sections of 24 x 36 pixels, twice as wide as high; 0 and 5 are labelled.

    The left half of every section is a structure with an unfriendly name, the right half from row 8 on another; rows
    0 to 7 of the right half are background. Uncertainty is 0.5 in the left half of section 3, 0.1 times z in others.
    """
    shape = (6, 24, 36)
    space = Space(shape=shape, spacing=(0.5, 0.1, 0.2))
    labels = np.zeros(shape, dtype=np.uint16)
    labels[:, :, :18] = 7
    labels[:, 8:, 18:] = 300
    table = {7: Label(EVIL_NAME, (200, 40, 40)), 300: Label("Thalamus & co", (40, 90, 200))}
    uncertainty = np.zeros(shape, dtype=np.float32)
    uncertainty[1:5, :, :18] = np.array([0.1, 0.2, 0.5, 0.4])[:, None, None]
    truth = labels.copy()
    truth[:, 20:, :18] = 300
    pixels = np.random.default_rng(0).integers(100, 4000, shape).astype(np.uint16)
    return StackReport(
        title="Mouse <7>",
        images=Volume(pixels, space),
        labels=LabelMap(labels, space, table),
        uncertainty=uncertainty,
        labelled=(0, 5),
        suggestions=(3, 4, 2),
        objective={1: [-90.0, -40.0, -30.0], 2: [-80.0, -60.0], 3: [-70.0, float("nan"), -20.0]},
        settings={"lambda": 2.0, "name": "<b>bold</b>"},
        truth=LabelMap(truth, space, table),
        scores={z: {"accuracy": 0.9 - 0.01 * z, "dice": {7: 0.8, 300: float("nan")}} for z in (1, 2, 3, 4)},
        notes=("Section 2: registration failed",),
    )


@pytest.fixture(scope="session")
def page(report: StackReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "mouse.html"
    write_stack_report(path, report)
    return path


@dataclass
class Viewer:
    """The report in a browser, and what the tests ask of it."""

    driver: Any

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def shows(self, section: int) -> None:
        """Wait until the section's pixels are on the canvas."""
        from selenium.webdriver.support.ui import WebDriverWait

        drawn = f"return document.getElementById('canvas').dataset.section === '{section}'"
        WebDriverWait(self.driver, 10, poll_frequency=0.05).until(lambda driver: driver.execute_script(drawn))

    def find(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def pixels(self) -> str:
        return self.run("document.getElementById('canvas').toDataURL()")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; it opens files and asks no network."""
    if not (CHROMIUM.exists() and CHROMEDRIVER.exists()):
        pytest.skip("chromium is not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(executable_path=str(CHROMEDRIVER), log_output=subprocess.DEVNULL)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def viewer(browser: Any, page: Path) -> Iterator[Viewer]:
    """The report, freshly opened; whatever the test did, the browser must have had nothing to complain of."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})  # whatever the last test asked for
    browser.get(page.as_uri())
    opened = Viewer(browser)
    opened.shows(3)
    yield opened
    assert browser.get_log("browser") == []
