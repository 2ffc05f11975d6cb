"""A completed stack, organs from strokes, membranes, images, scans, their reports, and a browser."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limner.annotations import Scribbles
from limner.report.anatomical_prior import PriorReport, ScanView, StructureRow
from limner.report.membranes import MembranesReport, SectionView, section_row, write_membranes_report
from limner.report.nuclei import ImageReport, NucleiReport, View, write_nuclei_report
from limner.report.scribbles import OrganRow, ScribblesReport, write_scribbles_report
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

    def colour_at(self, row: float, column: float) -> tuple[int, int, int]:
        """The colour shown at a place of the section, in its pixels from the first corner."""
        place = f"-Math.floor({column} / width * canvas.width), -Math.floor({row} / height * canvas.height)"
        copied = f"(copy => (copy.drawImage(canvas, {place}), [...copy.getImageData(0, 0, 1, 1).data]))"
        return tuple(self.run(f"{copied}(new OffscreenCanvas(1, 1).getContext('2d'))"))[:3]

    def pointer_to(self, row: float, column: float) -> Any:
        """The pointer on its way to a place of the section; what it does there can follow."""
        from selenium.webdriver.common.action_chains import ActionChains

        canvas, size = self.find("#canvas"), self.run("[height, width]")
        y, x = (place / side - 0.5 for place, side in zip((row, column), size, strict=True))
        offset = round(x * canvas.size["width"]), round(y * canvas.size["height"])
        return ActionChains(self.driver).move_to_element_with_offset(canvas, *offset)


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
def open_page(browser: Any) -> Iterator[Callable[[Path, int], Viewer]]:
    """Opens a page afresh at section `first`; whatever the test does then, the browser must have no complaint."""

    def open_at(page: Path, first: int) -> Viewer:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})  # whatever the last test asked for
        browser.get(page.as_uri())
        viewer = Viewer(browser)
        viewer.shows(first)
        return viewer

    yield open_at
    assert browser.get_log("browser") == []


@pytest.fixture
def viewer(open_page: Callable[[Path, int], Viewer], page: Path) -> Viewer:
    """The report of the completed stack."""
    return open_page(page, 3)


@pytest.fixture(scope="session")
def scribbles_report() -> ScribblesReport:
    """Five black sections of 24 x 36 pixels, twice as wide as high; 1 and 4 are drawn on.

    The left half of every section is an organ with an unfriendly name, the right half from row 8 on another; rows 0 to
    7 of the right half are background. On sections 1 and 4 a stroke of one pixel runs along row 4, columns 20 to 33, of
    background; on section 1 one of two pixels, rows 12 and 13, columns 4 to 13, of organ 1; on section 4 pixel (16, 30)
    of organ 2. Uncertainty is 0.5 in the left half of section 2, 0.1 in those of the others.
    """
    shape = (5, 24, 36)
    space = Space(shape=shape, spacing=(0.5, 0.1, 0.2))
    labels = np.zeros(shape, np.uint8)
    labels[:, :, :18] = 1
    labels[:, 8:, 18:] = 2
    truth = labels.copy()
    truth[:, 20:, :18] = 2
    uncertainty = np.zeros(shape, np.float32)
    uncertainty[:, :, :18] = np.array([0.1, 0.1, 0.5, 0.1, 0.1])[:, None, None]
    marks = np.zeros(shape, np.uint8)
    marks[[1, 4], 4, 20:34] = 1
    marks[1, 12:14, 4:14] = 2
    marks[4, 16, 30] = 3
    table = {1: Label(EVIL_NAME, (200, 40, 40)), 2: Label("Heart & co", (40, 90, 200))}
    scores = {"precision": 0.9, "recall": 0.8, "f1": 0.847, "iou": float("nan")}
    return ScribblesReport(
        title="Embryo <3>",
        images=Volume(np.zeros(shape, np.uint8), space),
        labels=LabelMap(labels, space, table),
        uncertainty=uncertainty,
        scribbles=Scribbles.from_marks(LabelMap(marks, space)),
        organs=(OrganRow(1, 21.6, (20.5, 23.0), scores), OrganRow(2, 14.4, (13.0, 1500.0))),
        suggestions=(2, 4),
        settings={"gamma": 2.0},
        truth=LabelMap(truth, space, table),
        notes=("Few strokes",),
    )


@pytest.fixture(scope="session")
def scribbles_page(scribbles_report: ScribblesReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "embryo.html"
    write_scribbles_report(path, scribbles_report)
    return path


@pytest.fixture
def scribbles_viewer(open_page: Callable[[Path, int], Viewer], scribbles_page: Path) -> Viewer:
    """The report of organs from scribbles."""
    return open_page(scribbles_page, 2)


@pytest.fixture(scope="session")
def nuclei_report() -> NucleiReport:
    """A tile with two views, one without nuclei, one that failed, and a slide of 300,000 nuclei, seen at half size.

    The tile of 60 x 80 pixels has objects at rows 5 to 25: 1 in columns 10 to 30, 2 in columns 30 to 50.
    """
    draw = np.random.default_rng(0)

    def view(title: str, height: int, width: int, um_per_px: float | None, labels: np.ndarray | None = None) -> View:
        image = np.full((height, width, 3), (230, 200, 225), np.uint8) - draw.integers(0, 8, (height, width, 1), "u1")
        return View(title, image, np.zeros((height, width), int) if labels is None else labels, um_per_px)

    touching = np.zeros((60, 80), np.uint16)
    touching[5:25, 10:30], touching[5:25, 30:50] = 1, 2
    sparse = np.kron(np.arange(60 * 120).reshape(60, 120), np.ones((20, 20), int))
    views = [
        view("Whole image", 60, 80, 0.25, touching),
        view("</script><script>alert(1)</script>", 20, 30, None, touching[:20, :30]),
    ]
    links = {"labels": "labels/tile 1#.png", "bad": "javascript:alert(1)"}
    images = [
        ImageReport("tile 1.png", 0.25, 4, np.array([20.0, 30.0, 40.0, 90.0]), 0.02, views, links=links),
        ImageReport("empty.png", 0.25, 0, np.zeros(0), 0.005, [view("Whole image", 30, 50, 0.25)]),
        ImageReport('<b>&".svs', None, 0, np.zeros(0), None, (), "the file ends after 12 of 99 bytes; copy it <again>"),
        ImageReport(
            "slide.svs", 0.5, 300_000, np.linspace(1, 100, 300_000), 150.0, [view("Slide", 1200, 2400, 4.0, sparse)]
        ),
    ]
    return NucleiReport("<i>title", images, {"window": 1024}, ("Please look",))


@pytest.fixture(scope="session")
def nuclei_page(nuclei_report: NucleiReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "nuclei.html"
    write_nuclei_report(path, nuclei_report)
    return path


def _membranes_view(z: int) -> SectionView:
    shape = (30, 20) if z == 3 else (24, 36)
    image, probability, cells = np.full(shape, 180, np.uint8), np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    image[:, 8:12], probability[:, 8:12] = 60, 0.9
    cells[:, :8], cells[:, 12:] = 7, 70_000 if z < 2 else 70_001
    if z == 2:
        probability[12:, 12:] = 0.3
    return SectionView(image, probability, cells)


@pytest.fixture(scope="session")
def membranes_report() -> MembranesReport:
    """Five sections of 24 x 36 pixels, twice as wide as high; section 3 has 30 x 20.

    Columns 8 to 11 are membrane, with a probability of 0.9. To the left lies cell 7, to the right cell 70000 on
    sections 0 and 1, cell 70001 on the others. On section 2 the lower half of the right cell has a probability of 0.3.
    """
    names = ("00.png", EVIL_NAME, "02.png", "03.png", "04.png")
    scores = [(0.9 + 0.01 * z, float("nan") if z == 4 else 0.8) for z in range(5)]
    return MembranesReport(
        title="Larva <2>",
        rows=[section_row(name, _membranes_view(z), *scores[z]) for z, name in enumerate(names)],
        view=_membranes_view,
        settings={"w_f": 0.3},
        spacing=(4e-6, 8e-6),
        linked=True,
        notes=("Section 3 has another size",),
    )


@pytest.fixture(scope="session")
def membranes_page(membranes_report: MembranesReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "larva.html"
    write_membranes_report(path, membranes_report)
    return path


@pytest.fixture
def membranes_viewer(open_page: Callable[[Path, int], Viewer], membranes_page: Path) -> Viewer:
    """The report of membranes and cells."""
    return open_page(membranes_page, 2)


def _brain_scan(name: str, uncertainty: float, thalamus_mm3: float, notes: tuple[str, ...] = ()) -> ScanView:
    """A head of 30 x 40 x 24 voxels of 2 x 1 x 3 mm, axes to superior, posterior, left.

    Cortex (3) fills indices 6 to 23, 8 to 31, 6 to 17, thalamus (10) those from 12 to 17, 16 to 23, 9 to 14 of it.
    Uncertainty is that of the thalamus, 0 elsewhere. One voxel in the corner at the anterior left above is bright.
    """
    space = Space((30, 40, 24), (2.0, 1.0, 3.0), origin=(-10.0, 5.0, 7.0))
    labels = np.zeros(space.shape, np.int64)
    labels[6:24, 8:32, 6:18] = 3
    labels[12:18, 16:24, 9:15] = 10
    rows = (
        StructureRow(3, EVIL_NAME, 30_000.0, 29_000.0, 31_000.0, 0.9),
        StructureRow(10, "Thalamus & co", thalamus_mm3, 1000.0, 2000.0, None if notes else 0.7),
    )
    doubt = np.where(labels == 10, uncertainty, 0).astype(np.float32)
    return ScanView(name, np.zeros(space.shape, np.int16), labels, doubt, space, 0.95, rows, notes)


@pytest.fixture(scope="session")
def prior_report() -> PriorReport:
    """Ten scans: the third is the most uncertain, the fifth has a large thalamus, the last notes; one more failed."""
    scans = [
        _brain_scan(f"100{n}.nii.gz", 0.9 if n == 2 else 0.1, 5000.0 if n == 4 else 1720.0 + 20 * n) for n in range(9)
    ]
    scans.append(_brain_scan("</script><b>", 0.1, 1730.0, notes=("Turned <i>round</i>",)))
    table = {3: Label("the table's name", (200, 40, 40)), 10: Label("Thalamus", (0, 0, 0))}
    failed = {'<u>1006".nii': "it shows <no> brain"}
    return PriorReport(scans, failed, table, {"latent": 1000}, ("Few label maps",))


@pytest.fixture(scope="session")
def prior_page(prior_report: PriorReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "prior.html"
    prior_report.write(path)
    return path
