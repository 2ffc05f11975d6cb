"""`limner scribbles segment`: bad input, resuming, corrected strokes, overwriting, what is written.

The computation is replaced by one that calls the columns of organs organ, save where a test's name says otherwise.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

import limner.cli.scribbles_segment
import limner.stroke_network
from limner.annotations import Scribbles
from limner.cli import main
from limner.cli.scribbles_segment import read_scribbles, read_truth
from limner.graph_cut import CutOptions
from limner.io.ome_zarr import save_ome_zarr
from limner.methods.scribbles import Segmentation, Session
from limner.model_file import ModelFile
from limner.organ_maps import Organ
from limner.random_walker import WalkerOptions
from limner.space import Space
from limner.volume import LabelMap, Volume

SPACING = (0.05, 0.02, 0.01)
SHAPE = (6, 24, 32)
DRAWN = (1, 4)
VOXEL = 0.05 * 0.02 * 0.01


def truth() -> NDArray[np.uint8]:
    """Organ 1 in columns 4 to 11, organ 2 in columns 20 to 27, rows 4 to 19 of every section."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[:, 4:20, 4:12] = 1
    labels[:, 4:20, 20:28] = 2
    return labels


def marks() -> NDArray[np.uint8]:
    """On sections 1 and 4 a stroke each for background, organ 1 and organ 2."""
    strokes = np.zeros(SHAPE, np.uint8)
    strokes[DRAWN, 1, 2:30] = 1
    strokes[DRAWN, 8, 5:11] = 2
    strokes[DRAWN, 8, 21:27] = 3
    return strokes


def pixels() -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).integers(0, 4, SHAPE)
    return (40 + truth() * 80 + noise).astype(np.uint8)


def write_volume(path: Path, array: NDArray[Any], spacing: tuple[float, float, float] = SPACING) -> Path:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(path))
    return path


def read_array(path: Path) -> NDArray[Any]:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


SMALL = ["--steps", "1", "--fields", "1", "--batch", "1", "--patch", "32"]
# a network of one step knows nothing, so it is hardly listened to
QUICK = [*SMALL, "--learning-steps", "5", "--prior-weight", "0.0001"]


def tiny_model(data: Path, *more: str) -> Path:
    model = data / "model.safetensors"
    inputs = ["--images", str(data / "images.nii.gz"), "--labels", str(data / "truth.nii.gz")]
    assert main(["scribbles", "fit", *inputs, "-o", str(model), "--device", "cpu", *SMALL, *more]) == 0
    return model


class Computation:
    """Stands in for `Session.segment`: finds the truth without its last row, and counts how often it is called."""

    def __init__(self) -> None:
        self.calls = 0
        self.stops = False
        self.resumed = False

    def __call__(self, session: Session, scribbles: Scribbles) -> Segmentation:
        self.calls += 1
        assert session.store is not None
        self.resumed = session.store.load("network", "key") is not None
        session.store.save("network", "key", {"weights": np.zeros(1)})
        session.progress("network", 1, 1)
        if self.stops:
            raise KeyboardInterrupt
        space = session.images.space
        found = np.where(np.isin(truth(), scribbles.classes), truth(), 0)
        found[:, 19] = 0
        organs = [label for label in scribbles.classes if label]
        heat = np.stack([found == label for label in (0, *organs)]).astype(np.float32)
        uncertainty = np.full(space.shape, 0.25, np.float32)
        return Segmentation(
            labels=LabelMap(found, space, scribbles.label_map.table, session.images.source),
            heat_maps=heat,
            uncertainty=uncertainty,
            organs=tuple(Organ(n, VOXEL * int((found == n).sum()), (0.001, 0.02)) for n in organs),
            suggestions=(3, 0),
            cut=CutOptions(gamma=0.3),
            walker=WalkerOptions(5.5, 0.02, session.prior_weight),
            chosen={"0.3": 0.75, "1": 0.5},
            seconds={"network": 2.0},
            notes=("few strokes",),
        )


@pytest.fixture
def computation(monkeypatch: pytest.MonkeyPatch) -> Computation:
    fake = Computation()
    monkeypatch.setattr(Session, "segment", lambda session, scribbles: fake(session, scribbles))
    return fake


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_volume(folder / "images.nii.gz", pixels())
    write_volume(folder / "strokes.nii.gz", marks())
    write_volume(folder / "truth.nii.gz", truth())
    (folder / "table.csv").write_text("index,name,r,g,b\n1,outside,0,0,0\n2,Heart,255,0,0\n3,Liver,0,0,255\n")
    return folder


def command(data: Path, *options: str, images: str = "images.nii.gz", scribbles: str = "strokes.nii.gz") -> list[str]:
    out = [] if "-o" in options else ["-o", str(data.parent / "out")]
    device = [] if "--device" in options else ["--device", "cpu"]
    return ["scribbles", "segment", str(data / images), str(data / scribbles), *out, *device, *options]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def record(data: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((data.parent / "out" / "run.json").read_text())
    return values


def folders(data: Path) -> None:
    """The stack as PNG, section 2 smaller than the others, and strokes on the sections drawn on alone."""
    for name in ("sections", "strokes"):
        (data / name).mkdir()
    for z in range(SHAPE[0]):
        crop = slice(2, -2) if z == 2 else slice(None)
        iio.imwrite(data / "sections" / f"s{z}.png", pixels()[z, crop])
        if z in DRAWN:
            iio.imwrite(data / "strokes" / f"s{z}.png", marks()[z, crop])


# --- bad input -------------------------------------------------------------------------------------------------------


def strokes_of(data: Path, array: NDArray[Any], spacing: tuple[float, float, float] = SPACING) -> list[str]:
    write_volume(data / "strokes.nii.gz", array, spacing)
    return command(data)


def only_background(data: Path) -> list[str]:
    return strokes_of(data, np.where(marks() == 1, 1, 0).astype(np.uint8))


def no_background(data: Path) -> list[str]:
    return strokes_of(data, np.where(marks() > 1, marks(), 0))


def no_stroke(data: Path) -> list[str]:
    return strokes_of(data, marks() * 0)


def other_shape(data: Path) -> list[str]:
    return strokes_of(data, np.pad(marks(), ((0, 0), (0, 4), (0, 0)), constant_values=2))


def other_spacing(data: Path) -> list[str]:
    return strokes_of(data, marks(), (0.05, 0.02, 0.02))


def negative_mark(data: Path) -> list[str]:
    return strokes_of(data, marks().astype(np.int16) - 1)


def unreadable_strokes(data: Path) -> list[str]:
    (data / "strokes.nii.gz").write_text("no image")
    return command(data)


def absent_strokes(data: Path) -> list[str]:
    return command(data, scribbles="nothing.nii.gz")


def images_as_strokes(data: Path) -> list[str]:
    return command(data, scribbles="images.nii.gz")


def images_and_strokes_swapped(data: Path) -> list[str]:
    return command(data, images="strokes.nii.gz", scribbles="images.nii.gz")


def a_mark_on_every_pixel(data: Path) -> list[str]:
    return strokes_of(data, truth() + np.uint8(1))


def colours_as_strokes(data: Path) -> list[str]:
    folders(data)
    iio.imwrite(data / "strokes" / "s1.png", np.stack([marks()[1]] * 3, axis=-1))
    return command(data, "--spacing", "0.05,0.02,0.01", images="sections", scribbles="strokes")


def outlines_as_strokes(data: Path) -> list[str]:
    (data / "strokes.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    return command(data, scribbles="strokes.geojson")


def section_without_image(data: Path) -> list[str]:
    folders(data)
    (data / "strokes" / "s4.png").rename(data / "strokes" / "s9.png")
    return command(data, "--spacing", "0.05,0.02,0.01", images="sections", scribbles="strokes")


def absent_images(data: Path) -> list[str]:
    return command(data, images="nothing.nrrd")


def absent_model(data: Path) -> list[str]:
    return command(data, "--model", str(data / "nothing.safetensors"))


def model_for_nuclei(data: Path) -> list[str]:
    ModelFile("nuclei", {"w": torch.ones(1)}, {}, 0.25).write(data / "nuclei.safetensors")
    return command(data, "--model", str(data / "nuclei.safetensors"))


def absent_table(data: Path) -> list[str]:
    return command(data, "--label-table", str(data / "nothing.csv"))


def truth_numbered_otherwise(data: Path) -> list[str]:
    write_volume(data / "truth.nii.gz", truth() * 40)
    return command(data, "--truth", str(data / "truth.nii.gz"))


def working_size_too_fine(data: Path) -> list[str]:
    return command(data, "--working-um", "2")


def negative_gamma(data: Path) -> list[str]:
    return command(data, "--gamma", "-1")


def cuda_absent(data: Path) -> list[str]:
    return command(data, "--device", "cuda")


def out_holds_images(data: Path) -> list[str]:
    return command(data, "-o", str(data))


def out_is_a_file(data: Path) -> list[str]:
    return command(data, "-o", str(data / "table.csv"))


BAD: list[tuple[Callable[[Path], list[str]], str]] = [
    (only_background, "all strokes mark background; mark an organ too, background strokes are 1 and organs begin at 2"),
    (no_background, "there is no background stroke; mark some background too"),
    (no_stroke, r"strokes\.nii\.gz labels no section"),
    (other_shape, r"strokes\.nii\.gz has shape \(6, 28, 32\), the stack \(6, 24, 32\)"),
    (other_spacing, r"strokes\.nii\.gz has spacing"),
    (negative_mark, r"strokes\.nii\.gz holds the negative label -1"),
    (unreadable_strokes, r"strokes\.nii\.gz cannot be read"),
    (absent_strokes, r"nothing\.nii\.gz does not exist"),
    (images_as_strokes, r"SCRIBBLES: .*images\.nii\.gz is IMAGES itself"),
    (
        images_and_strokes_swapped,
        r"SCRIBBLES: .*images\.nii\.gz holds .*, as an image or a finished label map does; give IMAGES first",
    ),
    (a_mark_on_every_pixel, r"SCRIBBLES: .*strokes\.nii\.gz holds a mark on every pixel"),
    (colours_as_strokes, r"s1\.png is RGB"),
    (outlines_as_strokes, r"SCRIBBLES: .*strokes\.geojson is GeoJSON"),
    (section_without_image, r"s9\.png in .* is named like no section"),
    (absent_images, r"nothing\.nrrd does not exist"),
    (absent_model, r"nothing\.safetensors does not exist; name a model that `limner scribbles fit` wrote"),
    (model_for_nuclei, "is a model for nuclei; give one for scribbles"),
    (absent_table, r"nothing\.csv cannot be read"),
    (truth_numbered_otherwise, r"--truth: .*truth\.nii\.gz holds no label 1, 2; number the organs as in OUT"),
    (working_size_too_fine, "--working-um: 2 um is finer than the images"),
    (negative_gamma, r"--gamma: -1\.0 is not possible"),
    (cuda_absent, "--device: cuda is asked for, but torch finds no CUDA GPU"),
    (out_holds_images, "--output: .* holds IMAGES"),
    (out_is_a_file, r"table\.csv is a file; name a folder"),
]


@pytest.mark.parametrize(("prepare", "found"), BAD, ids=[prepare.__name__ for prepare, _ in BAD])
def test_bad_input_is_one_line_and_nothing_is_written(
    prepare: Callable[[Path], list[str]],
    found: str,
    data: Path,
    computation: Computation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = prepare(data)
    before = tree(data.parent)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("limner: error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert re.search(found, printed.err), printed.err
    assert "--debug" not in printed.err, printed.err
    assert tree(data.parent) == before
    assert not (data.parent / "out").exists()
    assert computation.calls == 0


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_volume_comes_out_whole(data: Path, computation: Computation, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(data, "--seed", "4")) == 0
    out = data.parent / "out"
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and ".resume" not in p.parts} == {
        "labels.nii.gz",
        "uncertainty.nii.gz",
        "heat_maps/organ_1.nii.gz",
        "heat_maps/organ_2.nii.gz",
        "structures.csv",
        "volumes.csv",
        "report.html",
        "run.json",
    }
    labels = read_array(out / "labels.nii.gz")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels[:, :19], truth()[:, :19])
    assert not labels[:, 19].any()
    heat = read_array(out / "heat_maps" / "organ_2.nii.gz")
    assert heat.dtype == np.float32
    np.testing.assert_array_equal(heat > 0, labels == 2)
    assert (read_array(out / "uncertainty.nii.gz") == 0.25).all()
    rows = list(csv.DictReader((out / "volumes.csv").read_text().splitlines()))
    assert [(r["organ"], r["name"], r["low_mm3"], r["high_mm3"]) for r in rows] == [
        ("1", "organ 1", "0.001", "0.02"),
        ("2", "organ 2", "0.001", "0.02"),
    ]
    assert float(rows[0]["volume_mm3"]) == pytest.approx(6 * 15 * 8 * VOXEL)

    values = record(data)
    assert values["status"] == "complete"
    assert values["seed"] == values["settings"]["seed"] == 4
    assert values["settings"]["model"] is None
    assert values["settings"]["gamma"] is None
    assert values["chosen"] == {
        "walker_contrast": 5.5,
        "walker_delta": 0.02,
        "prior_weight": 0,
        "gamma": 0.3,
        "contrast": 10,
        "delta": 0.1,
        "left_out_right": {"0.3": 0.75, "1": 0.5},
    }
    assert list(values["inputs"]) == ["images", "scribbles"]
    assert values["organs"]["2"]["name"] == "organ 2"
    assert values["organs"]["2"]["interval_mm3"] == [0.001, 0.02]
    assert values["suggestions"] == [3, 0]
    assert values["command"][:3] == ["limner", "scribbles", "segment"]

    printed = capsys.readouterr()
    assert "6 sections, you drew on 2; organ 1 0.00720 mm³ (0.00100 to 0.0200)" in printed.out
    assert "Draw next: section 3, 0 (the first is 0); then give the same command again." in printed.out
    assert "Note: few strokes" in printed.out
    assert f"Report: {out / 'report.html'}" in printed.out
    assert printed.err.startswith("network: 1 of 1")
    assert computation.calls == 1


@pytest.mark.usefixtures("computation")
def test_names_are_of_marks_and_written_back_as_labels(data: Path) -> None:
    assert main(command(data, "--label-table", str(data / "table.csv"))) == 0
    out = data.parent / "out"
    assert (out / "structures.csv").read_text() == "index,name,r,g,b\n1,Heart,255,0,0\n2,Liver,0,0,255\n"
    assert [row["name"] for row in csv.DictReader((out / "volumes.csv").read_text().splitlines())] == ["Heart", "Liver"]
    assert record(data)["organs"]["1"]["name"] == "Heart"
    (data / "itksnap.txt").write_text('2 255 0 0 1 1 1 "Heart"\n')
    again = data.parent / "again"
    assert main(command(data, "-o", str(again), "--label-table", str(data / "itksnap.txt"))) == 0
    assert '1   255    0    0        1  1  1    "Heart"' in (again / "structures.txt").read_text()
    assert '"organ 2"' in (again / "structures.txt").read_text()


@pytest.mark.filterwarnings("always")
def test_names_that_are_not_the_models_are_told(
    data: Path, computation: Computation, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "labels.csv").write_text("index,name\n1,liver\n2,heart\n")
    model = tiny_model(data, "--label-table", str(data / "labels.csv"))
    assert main(command(data, "--label-table", str(data / "table.csv"), "--model", str(model))) == 0
    assert "warning" not in capsys.readouterr().err  # another order is no matter
    (data / "labels.csv").write_text("index,name\n1,Liver\n2,Gut\n")
    tiny_model(data, "--label-table", str(data / "labels.csv"), "--overwrite")
    assert main(command(data, "--label-table", str(data / "table.csv"), "--model", str(model), "--overwrite")) == 0
    error = capsys.readouterr().err
    assert "limner: warning: --model: it learned Liver, Gut, the strokes are for Heart, Liver" in error
    (data / "table.csv").write_text("index,name\n2,liver\n3,gut\n")
    assert main(command(data, "--label-table", str(data / "table.csv"), "--model", str(model), "--overwrite")) == 0
    assert "warning" not in capsys.readouterr().err
    assert computation.calls == 3


@pytest.mark.usefixtures("computation")
def test_a_mark_that_is_left_out_leaves_its_label_out(data: Path) -> None:
    write_volume(data / "strokes.nii.gz", np.where(marks() == 2, 0, marks()))
    assert main(command(data)) == 0
    out = data.parent / "out"
    assert [p.name for p in (out / "heat_maps").iterdir()] == ["organ_2.nii.gz"]
    assert np.unique(read_array(out / "labels.nii.gz")).tolist() == [0, 2]
    assert list(record(data)["organs"]) == ["2"]


@pytest.mark.usefixtures("computation")
def test_scores_against_the_truth(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(data, "--truth", str(data / "truth.nii.gz"))
    assert main(arguments) == 0
    # one row of sixteen is missed
    expected = {"precision": 1, "recall": 15 / 16, "f1": 30 / 31, "iou": 15 / 16}
    assert record(data)["scores"]["1"] == pytest.approx(expected)
    first = capsys.readouterr().out
    assert re.search(r"1\s+organ 1\s+1\.000\s+0\.938\s+0\.968\s+0\.938", first)
    assert "0.968" in (data.parent / "out" / "report.html").read_text()
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{data.parent / 'out'} is already complete.\n{first}"


@pytest.mark.usefixtures("computation")
def test_an_organ_that_is_not_in_the_truth_has_no_recall(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(data / "truth.nii.gz", np.where(truth() == 1, 1, 0).astype(np.uint8))
    assert main(command(data, "--truth", str(data / "truth.nii.gz"))) == 0
    assert record(data)["scores"]["2"] == {"precision": 0, "recall": None, "f1": 0, "iou": 0}
    assert re.search(r"2\s+organ 2\s+0\.000\s+-\s+0\.000\s+0\.000", capsys.readouterr().out)


@pytest.mark.usefixtures("computation")
def test_a_folder_of_sections_comes_out_as_one(data: Path) -> None:
    folders(data)
    options = ("--spacing", "0.05,0.02,0.01")
    assert main(command(data, *options, images="sections", scribbles="strokes")) == 0
    out = data.parent / "out"
    names = [f"s{z}" for z in range(SHAPE[0])]
    assert sorted(p.name for p in (out / "labels").iterdir()) == [f"{n}.png" for n in names]
    assert sorted(p.name for p in (out / "heat_maps" / "organ_1").iterdir()) == [f"{n}.tif" for n in names]
    assert iio.imread(out / "labels" / "s2.png").shape == (20, 32)
    assert list(record(data)["inputs"]["scribbles"]) == ["s1.png", "s4.png"]


@pytest.mark.usefixtures("computation")
def test_ome_zarr_comes_out_as_such(data: Path) -> None:
    save_ome_zarr(data / "images.ome.zarr", pixels(), SPACING)
    save_ome_zarr(data / "strokes.ome.zarr", marks(), SPACING, table={})
    assert main(command(data, images="images.ome.zarr", scribbles="strokes.ome.zarr")) == 0
    assert (data.parent / "out" / "labels.ome.zarr").is_dir()
    assert record(data)["organs"]["1"]["name"] == "organ 1"


def test_large_heat_maps_are_written_when_asked_for(
    data: Path, computation: Computation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limner.cli.scribbles_segment, "LARGEST_HEAT_MAPS", 2 * 4 * pixels().size - 1)
    assert main(command(data)) == 0
    heat_maps = data.parent / "out" / "heat_maps"
    assert not heat_maps.exists()
    assert main(command(data, "--save-heat-maps")) == 0
    assert len(list(heat_maps.iterdir())) == 2
    assert computation.calls == 2
    assert main(command(data)) == 0
    assert not heat_maps.exists()


# --- again -----------------------------------------------------------------------------------------------------------


def test_the_same_command_again_says_so(
    data: Path, computation: Computation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(data)) == 0
    before = tree(data.parent / "out")
    capsys.readouterr()
    assert main(command(data)) == 0
    assert capsys.readouterr().out.startswith(f"{data.parent / 'out'} is already complete.\n6 sections")
    assert tree(data.parent / "out") == before
    assert computation.calls == 1


def test_a_stopped_run_goes_on(data: Path, computation: Computation, capsys: pytest.CaptureFixture[str]) -> None:
    computation.stops = True
    assert main(command(data)) == 130
    assert "Stopped; the same command begins again" in capsys.readouterr().err
    assert record(data)["status"] == "running"
    assert not (data.parent / "out" / "labels.nii.gz").exists()
    computation.stops = False
    assert main(command(data)) == 0
    assert computation.resumed
    assert record(data)["status"] == "complete"


def test_more_strokes_go_on_without_overwrite(data: Path, computation: Computation) -> None:
    assert main(command(data)) == 0
    more = marks()
    more[3, 1, 2:30] = 1
    write_volume(data / "strokes.nii.gz", more)
    assert main(command(data)) == 0
    assert computation.calls == 2
    assert computation.resumed
    assert "you drew on 3" in record(data)["summary"]


@pytest.mark.parametrize("change", ["settings", "images", "model"])
def test_another_run_needs_overwrite(
    data: Path, computation: Computation, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    assert main(command(data)) == 0
    before = tree(data.parent / "out")
    options: list[str] = []
    if change == "images":
        write_volume(data / "images.nii.gz", pixels() + 1)
    elif change == "settings":
        options = ["--gamma", "2", "--seed", "1"]
    else:
        options = ["--model", str(tiny_model(data))]
    capsys.readouterr()
    assert main(command(data, *options)) == 2
    named = {"settings": "gamma, seed", "images": "images", "model": "model"}[change]
    assert f"differs in {named}; name another folder, or add --overwrite" in capsys.readouterr().err
    assert tree(data.parent / "out") == before
    assert computation.calls == 1
    assert main(command(data, *options, "--overwrite")) == 0
    assert computation.calls == 2


def test_results_corrected_by_hand_are_not_lost_unasked(
    data: Path, computation: Computation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(data)) == 0
    result = data.parent / "out" / "labels.nii.gz"
    write_volume(result, truth())
    assert main(command(data)) == 2
    assert f"{result} was changed since Limner wrote it" in capsys.readouterr().err
    np.testing.assert_array_equal(read_array(result), truth())
    assert computation.calls == 1


def test_a_folder_with_other_files_is_left_alone(
    data: Path, computation: Computation, capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.parent / "out"
    (out / "heat_maps").mkdir(parents=True)
    (out / "heat_maps" / "mine.txt").write_text("mine")
    for asked in ((), ("--overwrite",)):
        assert main(command(data, *asked)) == 2
        assert "heat_maps was not written by Limner" in capsys.readouterr().err
    assert tree(out) == {"heat_maps/mine.txt": b"mine"}
    assert computation.calls == 0


def shown_settings(data: Path) -> set[str]:
    html = (data.parent / "out" / "report.html").read_text()
    return set(re.findall(r"<tr><th[^>]*>(\w+)</th>", html[html.index('<table class="settings">') :]))


@pytest.mark.usefixtures("computation")
def test_the_report_shows_settings_of_a_network_only_where_there_was_one(data: Path) -> None:
    assert main(command(data)) == 0
    walked = shown_settings(data)
    assert walked >= {"gamma", "walker_contrast", "working_um", "seed"}
    assert not walked & {"steps", "width", "tau", "learning_steps"}
    assert main(command(data, "--prior-weight", "0.1", "--overwrite")) == 0
    assert shown_settings(data) >= {"steps", "width", "tau", "learning_steps"}
    assert main(command(data, "--model", str(tiny_model(data)), "--overwrite")) == 0
    assert not shown_settings(data) & {"steps", "width"}
    assert shown_settings(data) >= {"tau", "learning_steps"}


@pytest.mark.filterwarnings("always")
@pytest.mark.usefixtures("computation")
def test_finished_labels_given_as_strokes_are_warned_of(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(data)) == 0
    assert "finished" not in capsys.readouterr().err
    finished = marks()
    finished[4, :, 4:28] = 2
    assert main(strokes_of(data, finished)) == 0
    printed = capsys.readouterr().err
    assert printed.count("warning") == 1
    assert re.search(
        r"SCRIBBLES: marks of .*strokes\.nii\.gz cover 7\d% of section 4, as in a finished label map", printed
    )


def test_marks_on_many_sections_in_a_row_are_warned_of(tmp_path: Path) -> None:
    space = Space((40, 8, 9), SPACING)
    images = Volume(np.zeros(space.shape, np.uint8), space)
    drawn = np.zeros(space.shape, np.uint8)
    drawn[3:19, 2, 2], drawn[3:19, 5, 5] = 1, 2
    drawn[30, 2, 2] = 1
    path = tmp_path / "strokes.nii.gz"
    write_volume(path, drawn)
    with pytest.warns(UserWarning, match="are on every section from 3 to 18, as in a finished label map"):
        read_scribbles(path, images)
    drawn[10] = 0
    write_volume(path, drawn)
    read_scribbles(path, images)


def test_labels_of_the_truth_that_are_no_organs_are_warned_of(tmp_path: Path) -> None:
    space = Space((3, 8, 9), SPACING)
    images = Volume(np.zeros(space.shape, np.uint8), space)
    drawn = np.zeros(space.shape, np.uint8)
    drawn[1, 2, 2], drawn[1, 5, 5] = 1, 2
    path = tmp_path / "truth.nii.gz"
    write_volume(path, drawn)
    with pytest.warns(UserWarning, match=r"label 2 of .* is none of the organs \(1\)"):
        read_truth(path, images, Scribbles.from_marks(LabelMap(drawn, space)))


# --- the real method -------------------------------------------------------------------------------------------------


def test_strokes_become_organs_and_features_are_kept_while_they_change(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Organs that differ in grey level from all around them come out, and strokes as they were drawn."""
    arguments = command(data, *QUICK, "--truth", str(data / "truth.nii.gz"))
    assert main(arguments) == 0
    values = record(data)
    assert min(values["scores"][organ]["iou"] for organ in ("1", "2")) > 0.95
    low, high = values["organs"]["1"]["interval_mm3"]
    assert low <= values["organs"]["1"]["volume_mm3"] <= high
    stages = data.parent / "out" / ".resume" / "stages"
    kept = {path: path.stat().st_mtime_ns for path in stages.iterdir()}
    assert {path.name for path in kept} >= {"network.npz", "features-00000.npz"}

    def trained(*_: object) -> None:
        raise AssertionError("the network was trained again")

    monkeypatch.setattr(limner.stroke_network, "train", trained)
    more = marks()
    more[3, 22, 5:11] = 2  # where the image says background
    write_volume(data / "strokes.nii.gz", more)
    assert main([*arguments, "--debug"]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    labels = read_array(data.parent / "out" / "labels.nii.gz")
    np.testing.assert_array_equal(labels[more > 0], more[more > 0] - 1)


def test_with_a_model_and_at_a_coarser_size(data: Path) -> None:
    coarser = ["--working-um", "70"]
    assert main(command(data, *QUICK, *coarser)) == 0
    uncertainty = read_array(data.parent / "out" / "uncertainty.nii.gz")
    assert 0 <= uncertainty.min() <= uncertainty.max() <= 1
    again = data.parent / "again"
    assert main(command(data, *QUICK, "--model", str(tiny_model(data)), "-o", str(again))) == 0
    assert json.loads((again / "run.json").read_text())["inputs"]["model"].keys() == {"model.safetensors"}
    found = read_array(again / "labels.nii.gz")
    assert (found[1:5] == truth()[1:5]).mean() > 0.95
