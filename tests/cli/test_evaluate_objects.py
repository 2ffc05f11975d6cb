"""`limner evaluate objects`: files and folders, groups, and what it refuses."""

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
from limner.metrics.objects import score_objects


def squares(*ids: int, shift: int = 0) -> NDArray[np.uint16]:
    """Squares of 4 x 4 pixels in a row of 6 pixels' period."""
    labels = np.zeros((8, 60), dtype=np.uint16)
    for i, value in enumerate(ids):
        labels[2:6, 6 * i + shift : 6 * i + shift + 4] = value
    return labels


def write(path: Path, labels: NDArray[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(labels))
    else:
        tifffile.imwrite(path, labels, photometric="minisblack")
    return path


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Patient 1 with one right and one shifted image, patient 2 with nothing found and an image without objects."""
    write(tmp_path / "truth" / "01_1.png", squares(1, 2))
    write(tmp_path / "truth" / "01_10.tif", squares(1, 300))
    write(tmp_path / "truth" / "02_1.png", squares(5))
    write(tmp_path / "truth" / "02_2.png", squares())
    write(tmp_path / "found" / "01_1.png", squares(9, 4))
    write(tmp_path / "found" / "01_10.png", squares(1, 2, shift=1))
    write(tmp_path / "found" / "02_1.tif", squares().astype(np.uint32))
    write(tmp_path / "found" / "02_2.png", squares().astype(np.uint8))
    return [str(tmp_path / "found"), str(tmp_path / "truth")]


def evaluate(folders: list[str], *options: str) -> dict[str, Any]:
    out = Path(folders[0]).parent / "scores.json"
    assert main(["evaluate", "objects", *folders, "--json", str(out), *options]) == 0
    values: dict[str, Any] = json.loads(out.read_text())
    return values


def test_folders_by_hand(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    values = evaluate(folders)
    images = values["images"]
    assert list(images) == ["01_1.png", "01_10.tif", "02_1.png", "02_2.png"]
    assert images["01_1.png"]["aji"] == images["01_1.png"]["pq"] == 1
    # a square of 4 x 4 shifted by one pixel: 12 of 20, IoU .6
    assert images["01_10.tif"]["aji"] == images["01_10.tif"]["sq"] == pytest.approx(0.6)
    assert images["01_10.tif"]["f1"] == 1
    assert images["02_1.png"]["pq"] == 0
    assert images["02_1.png"]["sq"] is None
    assert images["02_2.png"]["aji"] is None
    assert images["02_2.png"]["group"] is None
    assert values["groups"] == {}
    overall = values["overall"]
    assert overall["images"] == 4
    assert overall["mean"]["aji"] == pytest.approx((1 + 0.6 + 0) / 3)
    assert overall["sd"]["aji"] == pytest.approx(np.std([1, 0.6, 0], ddof=1))
    assert overall["pooled"]["aji"] == pytest.approx((32 + 24) / (32 + 40 + 16))
    assert overall["pooled"]["f1"] == pytest.approx(2 * 4 / (5 + 4))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["01_1.png", "2", "2", *["1.000"] * 8]
    assert lines[4].split() == ["02_2.png", "0", "0", *["-"] * 8]
    assert lines[5].split()[:2] == ["mean", "0.533"]
    assert lines[7].split()[:4] == ["pooled", "5", "4", "0.636"]


def test_groups_by_a_rule(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    values = evaluate(folders, "--group-by", r"^(\d+)_")
    assert values["images"]["02_2.png"]["group"] == "02"
    assert list(values["groups"]) == ["01", "02"]
    first = values["groups"]["01"]
    assert first["images"] == 2
    assert first["mean"]["aji"] == pytest.approx(0.8)
    assert first["pooled"]["aji"] == pytest.approx(56 / 72)
    assert values["groups"]["02"]["mean"]["aji"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ["01", "2", "4", "4", "0.800"]
    assert len(lines) == 1 + 2 + 3


def test_groups_by_a_table(folders: list[str], tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    table.write_text("name,width,group\n01_1.png,60,A\n01_10,60,B\n02_1.tif,60,B\n02_2.png,60,A\nother,1,C\n")
    values = evaluate(folders, "--groups", str(table))
    assert {name: image["group"] for name, image in values["images"].items()} == {
        "01_1.png": "A",
        "01_10.tif": "B",
        "02_1.png": "B",  # named with another ending
        "02_2.png": "A",
    }
    assert values["groups"]["B"]["mean"]["aji"] == pytest.approx(0.3)


def test_two_files_may_have_different_names(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found, truth = Path(folders[0]) / "01_10.png", Path(folders[1]) / "01_1.png"
    values = evaluate([str(found), str(truth)], "--iou", "0.7")
    assert values["iou_threshold"] == 0.7
    assert values["images"]["01_1.png"]["aji"] == pytest.approx(0.6)
    assert values["images"]["01_1.png"]["f1"] == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # nothing to average


def test_volumes_and_32_bit_labels(tmp_path: Path) -> None:
    truth = np.zeros((3, 8, 9), dtype=np.uint32)
    truth[1:, 2:5, 2:5] = 100_000
    truth[0, 6:, 6:] = 70_000
    predicted = np.roll(truth, 1, axis=2)
    files = [str(write(tmp_path / "p" / "a.tif", predicted)), str(write(tmp_path / "t" / "b.tif", truth))]
    expected = score_objects(predicted, truth).scores()
    assert evaluate(files)["images"]["b.tif"]["aji"] == expected["aji"]
    assert 0 < expected["aji"] < 1


def test_a_file_is_not_replaced_unasked(folders: list[str], tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    out.write_text("mine")
    assert main(["evaluate", "objects", *folders, "--json", str(out)]) == 2
    assert out.read_text() == "mine"
    assert evaluate(folders, "--overwrite")["overall"]["images"] == 4


def spoil(folders: list[str], how: str) -> None:
    found, truth = Path(folders[0]), Path(folders[1])
    if how == "missing prediction":
        (found / "02_1.tif").unlink()
    elif how == "missing truth":
        (truth / "02_1.png").unlink()
    elif how == "size":
        write(found / "01_10.png", squares()[:7])
    elif how == "float":
        write(found / "02_1.tif", np.full((8, 60), 0.5, dtype=np.float32))
    elif how == "negative":
        write(found / "02_1.tif", np.full((8, 60), -1, dtype=np.int16))
    elif how == "RGB":
        write(found / "02_2.png", np.zeros((8, 60, 3), dtype=np.uint8))
    elif how == "truncated":
        (found / "02_2.png").write_bytes((found / "02_2.png").read_bytes()[:40])
    else:
        (found / "02_1.tif").rename(found / "02_1.jpg")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing prediction", "02_1.png has no counterpart in"),
        ("missing truth", "02_1.tif has no counterpart in"),
        ("size", "has size (7, 60)"),
        ("float", "holds values that are no integers"),
        ("negative", "holds the negative label -1"),
        ("RGB", "is RGB; export index labels"),
        ("truncated", "cannot be read"),
        ("JPEG", "is a JPEG, whose compression changes labels"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, message: str
) -> None:
    spoil(folders, how)
    out = tmp_path / "scores.json"
    assert main(["evaluate", "objects", *folders, "--json", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert "--debug" not in printed.err
    assert printed.out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found", "truth"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group-by", "("], "--group-by: '(' is no regular expression"),
        (["--group-by", r"\d+"], "has 0 groups in parentheses; give it one"),
        (["--group-by", "^(01)"], "finds no group in 02_1.png"),
        (["--groups", "{tmp}/none.csv"], "cannot be read as text"),
        (["--groups", "{tmp}/columns.csv"], "has columns name, patient; give it name and group"),
        (["--groups", "{tmp}/short.csv"], "has no row for 01_10.tif"),
        (["--groups", "{tmp}/twice.csv"], "line 3 names a file a second time"),
        (["--groups", "{tmp}/blank.csv"], "line 2 lacks a name or a group"),
        (["--groups", "{tmp}/short.csv", "--group-by", "(.)"], "--group-by is given too"),
        (["--iou", "0"], "--iou: 0.0 is no threshold"),
        (["--json", "{tmp}/nowhere/scores.json"], "is no folder; make it"),
    ],
)
def test_bad_options(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "columns.csv").write_text("name,patient\n01_1.png,1\n")
    (tmp_path / "short.csv").write_text("name,group\n01_1.png,1\n")
    (tmp_path / "twice.csv").write_text("name,group\n01_1.png,1\n01_1.png,2\n")
    (tmp_path / "blank.csv").write_text("name,group\n01_1.png,\n")
    assert main(["evaluate", "objects", *folders, *(o.replace("{tmp}", str(tmp_path)) for o in options)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_file_against_a_folder_and_a_missing_path(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    file = str(Path(folders[0]) / "01_1.png")
    assert main(["evaluate", "objects", file, folders[1]]) == 2
    assert f"{folders[1]} is a folder, {file} is a file; give two folders or two files" in capsys.readouterr().err
    assert main(["evaluate", "objects", folders[0], folders[1] + "x"]) == 2
    assert f"{folders[1]}x does not exist" in capsys.readouterr().err
