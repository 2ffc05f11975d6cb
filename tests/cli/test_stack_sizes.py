"""`limner stack complete` on sections larger than it computes at."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

import limner.cli.stack_complete
import limner.cli.stack_sizes
from limner.cli import main
from limner.io import open_labels, open_sections, read_labels
from limner.io.section_stack import blank_volume
from limner.space import Space
from limner.volume import Volume

SHAPE = (8, 300, 400)
LABELLED = (0, 4, 7)
QUICK = ("--method", "fusion", "--registration", "none", "--device", "cpu", "--jobs", "1")


def truth() -> NDArray[np.uint8]:
    """Ellipses that grow and turn from section to section, one within the other."""
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    labels = np.zeros(SHAPE, np.uint8)
    for z in range(SHAPE[0]):
        angle = 0.3 + 0.04 * z
        u = (x - 200.4) * np.cos(angle) + (y - 150.7) * np.sin(angle)
        v = (y - 150.7) * np.cos(angle) - (x - 200.4) * np.sin(angle)
        labels[z, (u / (150 + 2 * z)) ** 2 + (v / (105 - 3 * z)) ** 2 < 1] = 7
        labels[z, ((u - 20) / (70 - 2 * z)) ** 2 + (v / (45 + z)) ** 2 < 1] = 200
    return labels


def pixels(colour: bool = True) -> NDArray[np.uint8]:
    levels = truth().astype(int) % 97 + np.random.default_rng(0).integers(0, 40, SHAPE)
    return (
        np.stack([levels, levels // 2, 150 - levels], axis=-1).astype(np.uint8) if colour else levels.astype(np.uint8)
    )


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Sections of two sizes in colour, and labels of some."""
    (tmp_path / "sections").mkdir()
    (tmp_path / "outlines").mkdir()
    images, labels = pixels(), truth()
    for z in range(SHAPE[0]):
        own = (slice(None), slice(10, 390)) if z in (3, 4) else (slice(None), slice(None))
        iio.imwrite(tmp_path / "sections" / f"s{z}.png", images[z][own])
        if z in LABELLED:
            iio.imwrite(tmp_path / "outlines" / f"s{z}.png", labels[z][own])
    return tmp_path


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def complete(folder: Path, *options: str, images: str = "sections", labels: str = "outlines") -> int:
    files = [str(folder / images), str(folder / labels), "-o", str(folder / "out")]
    spacing = () if "--spacing" in options else ("--spacing", "0.05,0.002,0.002")
    return main(["stack", "complete", *files, *spacing, *QUICK, *options])


def test_labels_come_out_at_full_size_with_smooth_borders(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert complete(folders, "--working-um", "8", "--save-probabilities") == 0
    printed = capsys.readouterr().out
    assert "Computed at 8 um, 4 of the images' pixels (sections of 75 x 100);" in printed
    out, labels = folders / "out", truth()
    for z in LABELLED:
        given = iio.imread(folders / "outlines" / f"s{z}.png")
        np.testing.assert_array_equal(iio.imread(out / "labels" / f"s{z}.png"), given)
    pages = table(out / "probabilities" / "pages.csv")
    smooth, blocks = 0, 0
    for z in (1, 2, 5, 6):
        found = iio.imread(out / "labels" / f"s{z}.png")
        assert found.shape == SHAPE[1:]
        structures = np.array([int(p["index"]) for p in pages if p["section"] == f"s{z}.tif"])
        coarse = structures[tifffile.imread(out / "probabilities" / f"s{z}.tif").argmax(axis=0)]
        smooth += (found != labels[z]).sum()
        blocks += (np.kron(coarse, np.ones((4, 4), int)) != labels[z]).sum()
    assert smooth < 0.6 * blocks
    assert iio.imread(out / "labels" / "s3.png").shape == (300, 380)
    assert tifffile.imread(out / "uncertainty" / "s3.tif").shape == (75, 95)


def test_areas_are_those_of_the_labels_at_full_size(folders: Path) -> None:
    complete(folders, "--working-um", "8")
    rows = table(folders / "out" / "areas.csv")
    for row in rows:
        labels = iio.imread(folders / "out" / "labels" / row["section"])
        area = (labels == int(row["index"])).sum() * 0.002**2
        assert float(row["area_mm2"]) == pytest.approx(area, rel=1e-5)
        assert float(row["low_mm2"]) <= float(row["area_mm2"]) <= float(row["high_mm2"])
    assert len(rows) == 16
    between = [r for r in rows if r["labelled"] == "0"]
    assert all(float(r["low_mm2"]) < float(r["high_mm2"]) for r in between)


def test_a_stopped_run_goes_on_and_reads_no_section_twice(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, reads = limner.cli.stack_sizes.reduced_section, []

    def read(section: Any, *rest: Any) -> Any:
        reads.append(section.name)
        if len(reads) == 6:
            raise KeyboardInterrupt
        return real(section, *rest)

    monkeypatch.setattr(limner.cli.stack_sizes, "reduced_section", read)
    assert complete(folders, "--working-um", "8") == 130
    assert complete(folders, "--working-um", "8") == 0
    assert reads == [*(f"s{z}.png" for z in range(6)), "s5.png", "s6.png", "s7.png"]
    whole = {p.name: p.read_bytes() for p in (folders / "out" / "labels").iterdir()}
    monkeypatch.undo()
    (folders / "out").rename(folders / "stopped")
    complete(folders, "--working-um", "8")
    assert {p.name: p.read_bytes() for p in (folders / "out" / "labels").iterdir()} == whole


def test_the_size_is_chosen_from_the_structures_and_kept(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if 100 pixels were many: what is narrow calls for more of them, but labels corrected later do not."""
    monkeypatch.setattr("limner.reduced_stack.LARGEST", 200)
    monkeypatch.setattr("limner.reduced_stack.SMALLEST", 20)
    assert complete(folders) == 0
    chosen = json.loads((folders / "out" / "run.json").read_text())["settings"]["working_um"]
    assert 2 * 2 < chosen < 20 * 2
    file = folders / "outlines" / "s4.png"
    labels = iio.imread(file)
    labels[100:160, 40:43] = 5  # a ribbon of 3 pixels
    iio.imwrite(file, labels)
    assert complete(folders) == 0
    again = json.loads((folders / "out" / "run.json").read_text())["settings"]["working_um"]
    assert again == chosen
    np.testing.assert_array_equal(iio.imread(folders / "out" / "labels" / "s4.png"), labels)
    assert "label 5; give a smaller --working-um" in capsys.readouterr().out
    assert complete(folders, "--overwrite", "--seed", "1") == 0
    assert json.loads((folders / "out" / "run.json").read_text())["settings"]["working_um"] == 4


def test_small_sections_and_those_at_their_own_size_are_computed_as_they_are(folders: Path) -> None:
    complete(folders)
    plain = {p.name: p.read_bytes() for p in (folders / "out" / "labels").iterdir()}
    assert "working_um" not in json.loads((folders / "out" / "run.json").read_text())["settings"]
    assert tifffile.imread(folders / "out" / "uncertainty" / "s0.tif").shape == SHAPE[1:]
    (folders / "out").rename(folders / "plain")
    complete(folders, "--working-um", "2")
    assert {p.name: p.read_bytes() for p in (folders / "out" / "labels").iterdir()} == plain


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("0.5", "0.5 um is finer than the images (2 um); give 2 or more"),
        ("100", "fewer than 16 of the sections' 400 pixels are left; give 50 or less"),
        ("-3", "-3 is no pixel size"),
        ("nan", "nan is no pixel size"),
        ("inf", "inf is no pixel size"),
    ],
)
def test_bad_pixel_sizes_are_one_line(
    folders: Path, option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complete(folders, f"--working-um={option}") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folders / "out").exists()


@pytest.mark.parametrize("fault", ["truncated", "grey", "labels of another size", "structure lost"])
def test_faults_of_large_stacks_are_one_line_and_leave_nothing(
    folders: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folders / "sections" / "s5.png"
    message = "s5.png cannot be read"
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:40_000])
    elif fault == "grey":
        iio.imwrite(file, pixels(colour=False)[5])
        message = "is grey, but the first is RGB"
    elif fault == "labels of another size":
        iio.imwrite(folders / "outlines" / "s7.png", truth()[7, :200])
        message = "s7.png has size (200, 400), its image s7.png (300, 400)"
    else:
        for z in LABELLED:
            dots = np.zeros_like(iio.imread(folders / "outlines" / f"s{z}.png"))
            dots[50, 50] = 3
            iio.imwrite(folders / "outlines" / f"s{z}.png", dots)
        message = "give a smaller --working-um"
    assert complete(folders, "--working-um", "8") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().count("\n") == 0
    assert not (folders / "out").exists()


def test_a_volume_comes_out_as_one(tmp_path: Path) -> None:
    from limner.io import write_result

    space = Space(SHAPE, (0.05, 0.002, 0.002), (0.0, 1.5, -2.0))
    labels = truth()
    labels[[z for z in range(SHAPE[0]) if z not in LABELLED]] = 0
    write_result(tmp_path, "images", pixels(colour=False), Volume(np.zeros(SHAPE), space))
    write_result(tmp_path, "labels", labels, Volume(np.zeros(SHAPE), space))
    write_result(tmp_path, "truth", truth(), Volume(np.zeros(SHAPE), space))
    options = ("--spacing", "0.05,0.002,0.002", "--working-um", "8", "--truth", str(tmp_path / "truth.nii.gz"))
    assert complete(tmp_path, *options, images="images.nii.gz", labels="labels.nii.gz") == 0
    from limner.io import read

    out = read(tmp_path / "out" / "labels.nii.gz")
    assert out.space.shape == SHAPE
    np.testing.assert_allclose(out.space.origin, space.origin)
    np.testing.assert_array_equal(out.pixels[list(LABELLED)], labels[list(LABELLED)])
    uncertainty = read(tmp_path / "out" / "uncertainty.nii.gz")
    assert uncertainty.space.shape == (8, 75, 100)
    np.testing.assert_allclose(uncertainty.space.origin, (0.0, 1.503, -1.997))
    scores = json.loads((tmp_path / "out" / "run.json").read_text())["scores"]
    assert scores["median_accuracy"] > 0.97


def test_a_stack_that_cannot_be_opened_section_by_section_is_reduced_all_the_same(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert complete(folders, "--working-um", "8") == 0
    (folders / "out").rename(folders / "lazily")

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("cannot be opened")

    monkeypatch.setattr(limner.cli.stack_sizes, "open_sections", refuse)
    assert complete(folders, "--working-um", "8") == 0
    assert tifffile.imread(folders / "out" / "uncertainty" / "s0.tif").shape == (75, 100)
    for z in range(SHAPE[0]):
        lazily = iio.imread(folders / "lazily" / "labels" / f"s{z}.png")
        np.testing.assert_array_equal(iio.imread(folders / "out" / "labels" / f"s{z}.png"), lazily)
    assert complete(folders, "--working-um", "0.5") == 2


@pytest.mark.parametrize("kind", ["folder", "palette", "volume"])
def test_opened_labels_are_those_that_are_read(folders: Path, kind: str) -> None:
    stack_path, labels_path = folders / "sections", folders / "outlines"
    if kind != "folder":
        labels = truth()
        labels[[1, 2, 3, 5, 6]] = 0
        stack_path, labels_path = folders / "images.tif", folders / "labels.tif"
        tifffile.imwrite(stack_path, pixels(), photometric="rgb")
        colours = np.random.default_rng(0).integers(0, 2**16, (3, 256), dtype=np.uint16)
        more: dict[str, Any] = {"photometric": "minisblack"}
        if kind == "palette":
            more = {"photometric": "palette", "colormap": colours}
        tifffile.imwrite(labels_path, labels, **more)
    grid = blank_volume(open_sections(stack_path, spacing=(0.05, 0.002, 0.002)), spacing_given=True)
    opened, whole = open_labels(labels_path, grid), read_labels(labels_path, grid)
    assert opened.labelled == whole.labelled == LABELLED
    for z in LABELLED:
        given = opened[z]
        inset = (400 - given.shape[1]) // 2
        np.testing.assert_array_equal(given, whole.label_map.labels[z][:, inset : 400 - inset])
