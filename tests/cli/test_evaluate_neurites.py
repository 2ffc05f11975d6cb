"""`limner evaluate neurites`: maps and labels, folders and stacks, polarity, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from limner.cli import main
from limner.cli.evaluate_neurites import EvaluateNeurites
from limner.metrics.neurites import REACH


def two_cells(shape: tuple[int, int] = (9, 21)) -> NDArray[np.bool_]:
    """Two cells and a membrane of one pixel between them."""
    cells = np.ones(shape, bool)
    cells[:, 10] = False
    return cells


def write(path: Path, pixels: NDArray[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(pixels))
    else:
        tifffile.imwrite(path, pixels, photometric="minisblack")
    return path


def evaluate(*arguments: object) -> dict[str, Any]:
    """Everything in the JSON file."""
    out = Path(str(arguments[0])).parent / "scores.json"
    assert main(["evaluate", "neurites", *map(str, arguments), "--json", str(out), "--overwrite"]) == 0
    values: dict[str, Any] = json.loads(out.read_text())
    return values


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three sections of probabilities and the truth of two of them, of different sizes; the second merges its cells."""
    write(tmp_path / "found" / "s1.tif", np.where(two_cells(), 0.1, 0.8).astype(np.float32))
    write(tmp_path / "found" / "s2.tif", np.where(two_cells(), 0.1, 0.3).astype(np.float32))
    write(tmp_path / "found" / "s10.tif", np.where(two_cells((7, 15)), 0.1, 0.3).astype(np.float32))
    write(tmp_path / "truth" / "s1.png", two_cells().astype(np.uint8) * 255)
    write(tmp_path / "truth" / "s10.png", two_cells((7, 15)).astype(np.uint8) * 255)
    return tmp_path / "found", tmp_path / "truth"


def test_a_folder_of_maps(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    values = evaluate(*folders)
    assert values["best"]["v_rand"]["threshold"] == 0.3
    assert values["best"]["v_rand"]["v_rand"] == values["best"]["v_info"]["v_info"] == 1
    half = values["at_half"]
    assert list(half["sections"]) == ["s1.tif", "s10.tif"]  # the others have no truth
    assert half["sections"]["s1.tif"]["v_rand"] == 1
    merged = 2 * (70**2 + 28**2) / (98**2 + 70**2 + 28**2)  # cells of 7 x 10 and 7 x 4: on no larger canvas
    assert half["sections"]["s10.tif"]["v_rand"] == pytest.approx(merged)
    assert half["overall"]["v_rand"] == pytest.approx((1 + merged) / 2)
    assert (half["overall"]["mergers"], half["overall"]["splits"]) == (1, 0)
    assert [at["threshold"] for at in values["thresholds"]] == [round(0.05 * i, 2) for i in range(1, 20)]
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = [line.split() for line in printed.out.splitlines()]
    assert lines[0] == ["2", "sections", "best", "at", "at", "0.5"]
    assert lines[1] == ["V_rand", "(thinned)", "1.0000", "0.30", f"{half['overall']['v_rand']:.4f}"]
    assert lines[10][-3:] == ["0", "0.30", "1"]  # mergers


def test_sections_can_be_chosen(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    values = evaluate(*folders, "--sections", "0")
    assert list(values["at_half"]["sections"]) == ["s1.tif"]
    assert main(["evaluate", "neurites", *map(str, folders), "--sections", "1"]) == 2
    assert "has no label file for section 1 (s2.tif); add one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("probabilities", "options"),
    [
        (np.where(two_cells(), 20, 200).astype(np.uint8), []),
        (np.where(two_cells(), 0, 1).astype(np.uint8), []),  # binary
        (np.where(two_cells(), 200, 20).astype(np.uint8), ["--pred-is", "inside"]),
        (np.where(two_cells(), 0.9, 0.2).astype(np.float32), ["--pred-is", "inside"]),
        (np.where(two_cells(), 3, 0).astype(np.uint8), ["--pred-is", "cells"]),
        (np.where(np.arange(21) < 10, 70000, 3) * np.ones((9, 1), np.uint32), ["--pred-is", "cells"]),  # they touch
    ],
)
@pytest.mark.parametrize(
    ("truth", "truth_options"),
    [
        (two_cells().astype(np.uint8) * 255, []),
        (np.where(np.arange(21) < 10, 5, 6) * two_cells().astype(np.uint16), []),
        ((~two_cells()).astype(np.uint8), ["--truth-is", "membrane"]),
    ],
)
def test_stacks_in_every_form(
    tmp_path: Path,
    probabilities: NDArray[Any],
    options: list[str],
    truth: NDArray[Any],
    truth_options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pred = write(tmp_path / "pred.tif", np.stack([probabilities] * 2))
    true = write(tmp_path / "truth.tif", np.stack([truth] * 2))
    values = evaluate(pred, true, *options, *truth_options)
    scores = values if "overall" in values else values["at_half"]
    assert list(scores["sections"]) == ["0", "1"]
    assert scores["overall"]["v_rand"] == pytest.approx(1, abs=0.06)
    assert scores["overall"]["splits"] == scores["overall"]["mergers"] == 0
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("option", ["--truth-is", "--pred-is"])
def test_warns_where_most_is_membrane(tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    pred = write(tmp_path / "pred.tif", np.where(two_cells(), 0.1, 0.8).astype(np.float32)[None])
    true = write(tmp_path / "truth.tif", two_cells().astype(np.uint8)[None])
    evaluate(pred, true, option, "membrane" if option == "--truth-is" else "inside")
    (line,) = capsys.readouterr().err.splitlines()
    path = true if option == "--truth-is" else pred
    assert line == f"limner: warning: 95% of {path} is membrane as {option} has it; is that option right?"


@pytest.mark.filterwarnings("always")
def test_warns_of_labels_taken_for_probabilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pred = write(tmp_path / "pred.tif", np.where(two_cells(), 3, 0).astype(np.uint8)[None])
    true = write(tmp_path / "truth.tif", two_cells().astype(np.uint8)[None])
    evaluate(pred, true)
    assert "no probability of" in (error := capsys.readouterr().err)
    assert "add --pred-is cells if it holds labels" in error


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.ones((9, 21), np.uint16), "holds uint16 from 1 to 1; give probabilities, as floating point numbers from"),
        (np.full((9, 21), 1.5, np.float32), "holds float32 from 1.5 to 1.5; give probabilities"),
        (np.full((9, 21), -0.5, np.float32), "holds float32 from -0.5 to -0.5; give probabilities"),
        (np.ones((9, 20), np.float32), "has shape (1, 9, 21), the stack (1, 9, 20)"),
    ],
)
def test_refuses(tmp_path: Path, pixels: NDArray[Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pred = write(tmp_path / "pred.tif", pixels[None])
    true = write(tmp_path / "truth.tif", two_cells().astype(np.uint8)[None])
    assert main(["evaluate", "neurites", str(pred), str(true)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_refuses_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "found" / "s1.png", np.ones((9, 21, 3), np.uint8))
    write(tmp_path / "truth" / "s1.png", two_cells().astype(np.uint8))
    assert main(["evaluate", "neurites", str(tmp_path / "found"), str(tmp_path / "truth")]) == 2
    assert capsys.readouterr().err.endswith("is RGB; give probabilities, one number a pixel\n")


def test_overwrites_nothing_unasked(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = write(folders[0].parent / "mine.json.png", np.zeros((2, 2), np.uint8)).rename(folders[0].parent / "mine.json")
    before = out.read_bytes()
    assert main(["evaluate", "neurites", *map(str, folders), "--json", str(out)]) == 2
    assert out.read_bytes() == before
    assert "exists; name another file or add --overwrite" in capsys.readouterr().err


@pytest.mark.filterwarnings("always")
def test_the_reach_of_the_warp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pred = write(tmp_path / "pred.tif", np.ones((1, 40, 40), np.float32))
    true = write(tmp_path / "truth.tif", np.pad(np.ones((1, 30, 30), np.uint8), ((0, 0), (5, 5), (5, 5))))
    errors = [evaluate(pred, true, "--reach", reach)["at_half"]["overall"]["warping_error"] for reach in (0, 5, "inf")]
    assert errors == pytest.approx([30**2 / 40**2, 20**2 / 40**2, 1 / 40**2])
    assert EvaluateNeurites(pred, true).reach == REACH
    capsys.readouterr()
    assert main(["evaluate", "neurites", str(pred), str(true), "--reach", "nan"]) == 2
    assert capsys.readouterr().err == "limner: error: --reach: nan is no distance; give pixels, 0 or more, or inf\n"


@pytest.mark.filterwarnings("always")
def test_labels_given_for_a_map_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids of 8 bit could be probabilities; but one never lies beside another, only beside 0."""
    y, x = np.indices((60, 60))
    labels = np.where((y % 10 == 0) | (x % 10 == 0), 0, 1 + y // 10 * 6 + x // 10).astype(np.uint8)
    truth = write(tmp_path / "truth.tif", (labels > 0).astype(np.uint8))
    found = write(tmp_path / "found.tif", labels)
    evaluate(found, truth, "--pred-is", "membrane")
    assert f"warning: {found} looks like labels of cells; add --pred-is cells" in capsys.readouterr().err
    noise = np.random.default_rng(0).integers(0, 256, labels.shape)
    evaluate(write(tmp_path / "map.tif", noise.astype(np.uint8)), truth, "--pred-is", "membrane")
    assert "looks like labels" not in capsys.readouterr().err
