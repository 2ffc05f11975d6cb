"""`limner info`, `limner evaluate labels`, and what every command does with errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from numpy.typing import NDArray

from limner.cli import main
from limner.cli.info import Info

SPACING = (0.05, 0.02, 0.01)


def write_volume(path: Path, array: NDArray[np.generic], spacing: tuple[float, float, float] = SPACING) -> Path:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(path))
    return path


def truth() -> NDArray[np.uint8]:
    labels = np.zeros((5, 20, 30), dtype=np.uint8)
    labels[1:4, 5:10, 5:25] = 3
    labels[1:4, 10:15, 5:25] = 7
    return labels


def test_info_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_volume(tmp_path / "images.nrrd", np.arange(5 * 20 * 30, dtype=np.uint16).reshape(5, 20, 30))
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{path}: volume (.nrrd)"
    assert "sections: 5" in out
    assert "size of a section: 20 x 30 pixels (y, x)" in out
    assert "channels: 1 (grey)" in out
    assert "data type: uint16" in out
    assert "spacing: 0.05, 0.02, 0.01 mm (z, y, x)" in out
    assert "values: 0 to 2999" in out


def test_info_along_another_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_volume(tmp_path / "images.mha", np.zeros((5, 20, 30), dtype=np.float32))
    assert main(["info", str(path), "--section-axis", "x"]) == 0
    out = capsys.readouterr().out
    assert "sections: 30" in out
    assert "spacing: 0.01, 0.05, 0.02 mm" in out


def test_info_of_a_stack_without_spacing_and_with_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.zeros((3, 4, 5), dtype=np.float32)
    pixels[1, 2, 3] = np.nan
    tifffile.imwrite(tmp_path / "stack.tif", pixels, photometric="minisblack")
    assert main(["info", str(tmp_path / "stack.tif")]) == 0
    out = capsys.readouterr().out
    assert "multi-page TIFF" in out
    assert "spacing: not stated" in out
    assert "values: 1 pixels are NaN or infinite" in out


def test_info_of_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_volume(tmp_path / "labels.nii.gz", truth())
    (tmp_path / "table.csv").write_text("index,name,r,g,b\n3,Pons,1,2,3\n")
    assert main(["info", str(path)]) == 0
    assert "limner info --labels" in capsys.readouterr().out
    assert main(["info", "--labels", str(path), "--label-table", str(tmp_path / "table.csv")]) == 0
    out = capsys.readouterr().out
    assert "sections with labels: 3 (1, 2, 3)" in out
    assert "structures: 2" in out
    assert "3  Pons: 300 pixels" in out
    assert "7  label 7: 300 pixels" in out


def files(tmp_path: Path) -> tuple[str, str]:
    predicted = truth()
    predicted[2, 10:15] = 3  # section 2: one of two equal structures is wrong, and 50 pixels beside it
    write_volume(tmp_path / "predicted.nii.gz", predicted)
    write_volume(tmp_path / "truth.nii.gz", truth())
    return str(tmp_path / "predicted.nii.gz"), str(tmp_path / "truth.nii.gz")


def test_evaluate_labels_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    assert main(["evaluate", "labels", *files(tmp_path), "--within-mm", "0", "--json", str(out)]) == 0
    scores = json.loads(out.read_text())
    assert list(scores["sections"]) == ["1", "2", "3"]
    assert scores["sections"]["1"]["accuracy"] == 1
    assert scores["sections"]["2"]["accuracy"] == 0.5
    assert scores["structures"]["3"]["dice"] == pytest.approx(2 * 300 / (300 + 400))
    assert scores["structures"]["7"]["dice"] == pytest.approx(2 * 200 / (300 + 200))
    assert scores["mean_dice"] == pytest.approx((6 / 7 + 4 / 5) / 2)
    printed = capsys.readouterr().out
    assert "0.857" in printed
    assert "scored" in printed


def test_evaluate_labels_counts_background_within_a_distance(tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    command = ["evaluate", "labels", *files(tmp_path), "--sections", "2", "--within-mm", "0.02", "--json", str(out)]
    assert main(command) == 0
    # 10 x 20 pixels of structures; one row of 0.02 mm above and below, two columns of 0.01 mm either side
    wrong, counted = 100 + 5 * 2 * 2, 10 * 20 + 2 * 20 + 2 * 2 * 10
    assert json.loads(out.read_text())["sections"]["2"]["accuracy"] == pytest.approx(1 - wrong / counted)


def test_evaluate_labels_does_not_replace_a_file_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    out.write_text("mine")
    command = ["evaluate", "labels", *files(tmp_path), "--json", str(out)]
    assert main(command) == 2
    assert out.read_text() == "mine"
    assert "exists; name another file or add --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert json.loads(out.read_text())["within_mm"] == 2


@pytest.mark.parametrize("name", ["no/scores.json", "."])
def test_evaluate_labels_looks_first_where_it_shall_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["evaluate", "labels", *files(tmp_path), "--json", str(tmp_path / name), "--overwrite"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"limner: error: --json: .*(there is no folder .*/no; |is a folder; ).*\n", printed.err)


@pytest.mark.parametrize(
    ("shape", "spacing", "found"),
    [((4, 20, 30), SPACING, "has shape"), ((5, 20, 30), (0.05, 0.02, 0.02), "has spacing")],
)
def test_evaluate_labels_refuses_other_grids(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shape: tuple[int, ...],
    spacing: tuple[float, float, float],
    found: str,
) -> None:
    predicted, _ = files(tmp_path)
    other = write_volume(tmp_path / "other.nii.gz", np.ones(shape, dtype=np.uint8), spacing)
    assert main(["evaluate", "labels", predicted, str(other)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert found in error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("limner 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["-h"],
        ["stack", "-h"],
        ["stack", "suggest", "-h"],
        ["info", "-h"],
        ["evaluate", "-h"],
        ["evaluate", "labels", "-h"],
        ["evaluate", "objects", "-h"],
        ["demo", "-h"],
    ],
)
def test_help_needs_neither_torch_nor_numpy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom limner.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'torch', 'numpy', 'SimpleITK'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: limner" in done.stdout


def test_errors_are_one_line_and_unexpected_ones_say_how_to_learn_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: BaseException) -> None:
        def run(*_: object) -> int:
            raise error

        monkeypatch.setattr(Info, "run", run)

    fail(ValueError("read(): x is\n  damaged"))
    assert main(["info", "x"]) == 2
    assert capsys.readouterr().err == "limner: error: read(): x is damaged\n"
    fail(ValueError("operands could not be broadcast"))
    assert main(["info", "x"]) == 2
    assert capsys.readouterr().err == (
        "limner: error: ValueError: operands could not be broadcast (the same command with --debug shows where)\n"
    )
    fail(PermissionError(13, "Permission denied", "/x"))
    assert main(["info", "x"]) == 2
    assert capsys.readouterr().err == "limner: error: [Errno 13] Permission denied: '/x'\n"
    fail(RuntimeError("odd"))
    with pytest.raises(RuntimeError, match="odd"):
        main(["info", "x", "--debug"])
    fail(KeyboardInterrupt())
    assert main(["info", "x"]) == 130
    assert capsys.readouterr().err.strip() == "Stopped."


def test_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*_: object) -> int:
        warnings.warn("section 3 is\n constant", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(Info, "run", run)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["info", "x"]) == 0
    assert capsys.readouterr().err == "limner: warning: section 3 is constant\n"


@pytest.mark.parametrize("columns", ["60", "200"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("info x --labelz", "Unrecognized options: --labelz; perhaps you meant --labels; `limner info -h` explains"),
        (
            "stack complete a b -o c --jbos 3",
            "Unrecognized options: --jbos, 3; perhaps you meant --jobs; `limner stack complete -h` explains",
        ),
        (
            "stack complete a b -o c --jobs x",
            "Error parsing --jobs: 'x' is no whole number; `limner stack complete -h` explains",
        ),
        (
            "stack complete a b -o c --method foo",
            "invalid choice 'foo' for argument '--method'. Expected one of ('network', 'fusion', 'product', 'gem'); "
            "`limner stack complete -h` explains",
        ),
        (
            "stack complete a b -o c --working-um abc",
            "Error parsing --working-um: 'abc' is no value for it; `limner stack complete -h` explains",
        ),
        (
            "stack complete a b -o c --jbos 3 --mehtod gem",
            "Unrecognized options: --jbos, 3, --mehtod, gem; perhaps you meant --jobs for --jbos; perhaps you meant "
            "--method for --mehtod; `limner stack complete -h` explains",
        ),
        ("stack", "Expected one of {complete, suggest, align}; `limner stack -h` explains"),
        (
            "stock complete",
            "Unrecognized options: stock, complete; available subcommands: stack, scribbles, nuclei, membranes, prior, "
            "evaluate, info, demo; `limner -h` explains",
        ),
    ],
)
def test_options_that_are_not_understood_are_told_in_one_line(
    arguments: str, says: str, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.err == f"limner: error: {says}\n"
    assert not printed.out


def test_what_is_missing_is_told_with_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["stack", "complete", "images"])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "LABELS" in told
    assert "Labels of some sections" in told
