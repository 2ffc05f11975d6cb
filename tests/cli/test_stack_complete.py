"""`limner stack complete` and `limner demo`: bad input, resuming, overwriting, what is written.

The method is replaced by one that copies the nearest labelled section, save where a test's name says otherwise.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as iio
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
from numpy.typing import NDArray

import limner.cli.demo
import limner.cli.stack_complete
from limner.annotations import SectionLabels
from limner.cli import main
from limner.fusion_stages import FITTED_LABELS
from limner.io.ome_zarr import save_ome_zarr
from limner.run_record import Store
from limner.volume import LabelMap, Volume

SPACING = (0.05, 0.02, 0.01)
SHAPE = (7, 24, 30)
LABELLED = (0, 3, 6)


def truth() -> NDArray[np.uint8]:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for z in range(SHAPE[0]):
        labels[z, 4 + z : 12 + z, 5:25] = 3
        labels[z, 12 + z : 15 + z, 5:25] = 200
    return labels


def sparse() -> NDArray[np.uint8]:
    labels = truth()
    labels[[z for z in range(SHAPE[0]) if z not in LABELLED]] = 0
    return labels


def pixels() -> NDArray[np.uint16]:
    noise = np.random.default_rng(0).integers(0, 50, SHAPE)
    return (truth().astype(np.uint16) * 20 + noise).astype(np.uint16)


def write_volume(
    path: Path, array: NDArray[Any], spacing: tuple[float, float, float] = SPACING, origin: float = 1.5
) -> Path:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((0.0, origin, 0.0))
    sitk.WriteImage(image, str(path))
    return path


class Method:
    """Stands in for the method: copies the nearest labelled section, and counts how often it is called."""

    def __init__(self) -> None:
        self.calls = 0
        self.stop_after: int | None = None
        self.resumed: list[int] = []

    def __call__(
        self, images: Volume, annotations: SectionLabels, _: Any, *, store: Any, progress: Any, **options: Any
    ) -> SimpleNamespace:
        self.calls += 1
        self.resumed = []
        labels = annotations.label_map.labels.copy()
        uncertainty = np.zeros(labels.shape, dtype=np.float32)
        sections = {}
        for done, z in enumerate(annotations.unlabelled):
            if self.stop_after == done:
                raise KeyboardInterrupt
            nearest = min(annotations.labelled, key=lambda known: abs(known - z))
            labels[z] = labels[nearest]
            uncertainty[z] = abs(nearest - z) / 10
            if store.load(f"section-{z:04}", "key") is None:
                store.save(f"section-{z:04}", "key", {"labels": labels[z]})
            else:
                self.resumed.append(z)
            structures = np.unique(labels[z])
            sections[z] = SimpleNamespace(
                objective=[1.0, 2.0],
                seconds=0.5,
                iterations=2,
                structures=structures,
                areas=np.stack([(labels[z] == structures[:, None, None]).sum(axis=(1, 2)) + i for i in (-1, 0, 1)]),
                probabilities=(labels[z] == structures[:, None, None]).astype(np.float16)
                if options["keep_probabilities"]
                else None,
            )
            progress("sections", done + 1, len(annotations.unlabelled))
        return SimpleNamespace(
            labels=LabelMap(labels, images.space, annotations.label_map.table, annotations.label_map.source),
            uncertainty=uncertainty,
            sections=sections,
            wrong=uncertainty.mean(axis=(1, 2)),
            suggestions=(1, 4),
            seconds={"sections": 2.0},
            calibration={"temperature": 1.5},
            notes=("section 4 registered badly",),
        )


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Method:
    fake = Method()
    monkeypatch.setattr(limner.cli.stack_complete, "complete", fake)
    return fake


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_volume(folder / "images.nii.gz", pixels())
    write_volume(folder / "labels.nii.gz", sparse())
    write_volume(folder / "truth.nii.gz", truth())
    (folder / "table.csv").write_text("index,name,r,g,b\n3,Pons,255,0,0\n200,Medulla,0,0,255\n")
    return folder


def command(data: Path, *options: str, images: str = "images.nii.gz", labels: str = "labels.nii.gz") -> list[str]:
    out = [] if "-o" in options else ["-o", str(data.parent / "out")]
    return ["stack", "complete", str(data / images), str(data / labels), *out, *options]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def record(data: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((data.parent / "out" / "run.json").read_text())
    return values


# --- bad input -------------------------------------------------------------------------------------------------------


def other_shape(data: Path) -> list[str]:
    write_volume(data / "labels.nii.gz", sparse()[:, :-1])
    return command(data)


def other_spacing(data: Path) -> list[str]:
    write_volume(data / "labels.nii.gz", sparse(), (0.05, 0.02, 0.02))
    return command(data)


def nothing_labelled(data: Path) -> list[str]:
    write_volume(data / "labels.nii.gz", sparse() * 0)
    return command(data)


def only_background_labelled(data: Path) -> list[str]:
    return command(data, "--labelled", "1,2")


def section_outside(data: Path) -> list[str]:
    return command(data, "--labelled", "0,3,7")


def truncated_images(data: Path) -> list[str]:
    whole = (data / "images.nii.gz").read_bytes()
    (data / "images.nii.gz").write_bytes(whole[: len(whole) // 2])
    return command(data)


def unreadable_labels(data: Path) -> list[str]:
    (data / "labels.nii.gz").write_text("no image")
    return command(data)


def absent_images(data: Path) -> list[str]:
    return command(data, images="nothing.nrrd")


def fractional_labels(data: Path) -> list[str]:
    write_volume(data / "labels.nii.gz", sparse() + np.float32(0.25))
    return command(data)


def nan_in_images(data: Path) -> list[str]:
    image = pixels().astype(np.float32)
    image[2, 3, 4] = np.nan
    write_volume(data / "images.nrrd", image)
    return command(data, images="images.nrrd")


def positions(data: Path, values: list[float]) -> list[str]:
    rows = "".join(f"{z},{value}\n" for z, value in enumerate(values))
    (data / "positions.csv").write_text("section,z_mm\n" + rows)
    return command(data, "--positions", str(data / "positions.csv"))


def duplicate_positions(data: Path) -> list[str]:
    return positions(data, [0, 0.1, 0.2, 0.2, 0.4, 0.5, 0.6])


def unsorted_positions(data: Path) -> list[str]:
    return positions(data, [0, 0.1, 0.3, 0.2, 0.4, 0.5, 0.6])


def cuda_absent(data: Path) -> list[str]:
    return command(data, "--device", "cuda")


def foreign_label_name(data: Path) -> list[str]:
    folders(data)
    (data / "outlines" / "s3.png").rename(data / "outlines" / "section3.png")
    return command(data, "--spacing", "0.05,0.02,0.01", images="sections", labels="outlines")


def sections_without_spacing(data: Path) -> list[str]:
    folders(data)
    return command(data, images="sections", labels="outlines")


def absent_table(data: Path) -> list[str]:
    return command(data, "--label-table", str(data / "nothing.csv"))


def structure_without_tissue(data: Path) -> list[str]:
    (data / "tissues.csv").write_text("structure,tissue\nPons,grey\n")
    return command(data, "--label-table", str(data / "table.csv"), "--tissues", str(data / "tissues.csv"))


def truth_without_new_sections(data: Path) -> list[str]:
    return command(data, "--truth", str(data / "labels.nii.gz"))


def negative_distance(data: Path) -> list[str]:
    return command(data, "--within-mm", "-1")


def negative_jobs(data: Path) -> list[str]:
    return command(data, "--jobs", "-1")


def absent_weights(data: Path) -> list[str]:
    return command(data, "--network", "fcn_vgg16", "--vgg16-weights", str(data / "nothing.pth"))


def positions_in_micrometres(data: Path) -> list[str]:
    (data / "positions.csv").write_text("".join(f"{z},{100 * z}\n" for z in range(SHAPE[0])))
    return command(data, "--positions", str(data / "positions.csv"))


def images_and_labels_swapped(data: Path) -> list[str]:
    return command(data, images="labels.nii.gz", labels="images.nii.gz")


def damaged_weights(data: Path) -> list[str]:
    (data / "vgg16.pth").write_text("no weights")
    return command(data, "--network", "fcn_vgg16", "--vgg16-weights", str(data / "vgg16.pth"))


def weights_of_another_network(data: Path) -> list[str]:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, data / "resnet.pth")
    return command(data, "--network", "fcn_vgg16", "--vgg16-weights", str(data / "resnet.pth"))


def out_holds_images(data: Path) -> list[str]:
    return command(data, "-o", str(data))


def out_is_a_file(data: Path) -> list[str]:
    return command(data, "-o", str(data / "table.csv"))


def out_in_images(data: Path) -> list[str]:
    folders(data)
    return command(data, "-o", str(data / "sections" / "out"), images="sections", labels="outlines")


def folders(data: Path) -> None:
    """The stack as folders of PNG: ten times larger names than indices, section 2 smaller than the others."""
    for name in ("sections", "outlines"):
        (data / name).mkdir()
    for z in range(SHAPE[0]):
        crop = slice(2, -2) if z == 2 else slice(None)
        iio.imwrite(data / "sections" / f"s{z}.png", pixels()[z, crop])
        if z in LABELLED:
            iio.imwrite(data / "outlines" / f"s{z}.png", truth()[z, crop])


BAD: list[tuple[Callable[[Path], list[str]], str]] = [
    (other_shape, r"labels\.nii\.gz has shape \(7, 23, 30\), the stack \(7, 24, 30\)"),
    (other_spacing, r"labels\.nii\.gz has spacing"),
    (nothing_labelled, r"labels\.nii\.gz labels no section"),
    (only_background_labelled, "hold no structure, only background"),
    (section_outside, "section 7 is named as labelled, but the stack has sections 0 to 6"),
    (truncated_images, r"images\.nii\.gz cannot be read"),
    (unreadable_labels, r"labels\.nii\.gz cannot be read"),
    (absent_images, r"nothing\.nrrd does not exist"),
    (fractional_labels, r"labels\.nii\.gz holds values that are no integers"),
    (nan_in_images, r"section 2 of .*images\.nrrd holds NaN"),
    (duplicate_positions, r"positions\.csv puts section 2 at 0\.2 mm and the next, 3, at 0\.2 mm"),
    (unsorted_positions, r"positions\.csv puts section 2 at 0\.3 mm and the next, 3, at 0\.2 mm"),
    (
        positions_in_micrometres,
        r"positions\.csv lie 100 mm apart, by the spacing 0\.05 mm; give both in mm",
    ),
    (images_and_labels_swapped, r"--labelled: .*images\.nii\.gz labels every section of .*; give IMAGES first"),
    (cuda_absent, "--device: cuda is asked for, but torch finds no CUDA GPU"),
    (foreign_label_name, r"section3\.png in .* is named like no section"),
    (sections_without_spacing, "has no spacing"),
    (absent_table, r"nothing\.csv cannot be read"),
    (structure_without_tissue, r"tissues\.csv has no row for structure 200 \(Medulla\)"),
    (truth_without_new_sections, "--truth: .* nothing to score"),
    (negative_distance, "--within-mm: -1"),
    (negative_jobs, "--jobs: -1 is below 0"),
    (absent_weights, r"nothing\.pth cannot be read \(No such file or directory\)"),
    (damaged_weights, r"vgg16\.pth cannot be read as weights"),
    (weights_of_another_network, r"resnet\.pth has no features\.0\.weight"),
    (out_holds_images, "--output: .* holds IMAGES"),
    (out_is_a_file, r"table\.csv is a file; name a folder"),
    (out_in_images, "--output: .* is or lies in IMAGES"),
]


@pytest.mark.parametrize(("prepare", "found"), BAD, ids=[prepare.__name__ for prepare, _ in BAD])
def test_bad_input_is_one_line_and_nothing_is_written(
    prepare: Callable[[Path], list[str]],
    found: str,
    data: Path,
    method: Method,
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
    assert method.calls == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--network-pixels", "0"),
        ("--clip-mm", "-1"),
        ("--local-steps", "-3"),
        ("--training-steps", "-5"),
        ("--rho", "nan"),
    ],
)
def test_settings_out_of_range_are_refused_and_nothing_is_written(
    data: Path, method: Method, capsys: pytest.CaptureFixture[str], options: tuple[str, str]
) -> None:
    assert main(command(data, *options)) == 2
    name = options[0].removeprefix("--").replace("-", "_")
    error = capsys.readouterr().err
    assert error.startswith(f"limner: error: Settings(): {name} is {options[1]}")
    assert error.count("\n") == 1
    assert not (data.parent / "out").exists()
    assert method.calls == 0


@pytest.mark.parametrize(("steps", "said"), [("40", False), ("40000", True)])
def test_of_a_long_run_time_and_memory_are_told_before(
    data: Path, method: Method, capsys: pytest.CaptureFixture[str], steps: str, said: bool
) -> None:
    arguments = ("--device", "cpu", "--jobs", "1", "--training-steps", steps, "--network-pixels", "30")
    assert main(command(data, *arguments, "--network", "fcn_vgg16" if said else "unet")) == 0
    assert method.calls == 1
    found = re.search(r"^Estimated for the whole run: about .* GB of memory\.$", capsys.readouterr().out, re.MULTILINE)
    assert (found is not None) == said


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_volume_comes_out_whole(data: Path, method: Method, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(data, "--label-table", str(data / "table.csv"), "--seed", "4")) == 0
    out = data.parent / "out"
    assert {p.name for p in out.iterdir()} == {
        ".resume",
        "labels.nii.gz",
        "uncertainty.nii.gz",
        "structures.csv",
        "areas.csv",
        "volumes.csv",
        "report.html",
        "run.json",
    }
    labels, images = nibabel.load(out / "labels.nii.gz"), nibabel.load(data / "images.nii.gz")
    np.testing.assert_allclose(labels.affine, images.affine)
    array = np.asarray(labels.dataobj).transpose(2, 1, 0)
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array[list(LABELLED)], truth()[list(LABELLED)])
    np.testing.assert_array_equal(array[1], truth()[0])
    uncertainty = np.asarray(nibabel.load(out / "uncertainty.nii.gz").dataobj)
    assert uncertainty.dtype == np.float32
    assert uncertainty[0, 0, 1] == np.float32(0.1)
    assert "3,Pons,255,0,0" in (out / "structures.csv").read_text()

    pixel = SPACING[1] * SPACING[2]
    with (out / "areas.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "Pons"]
    assert [int(row["section"]) for row in rows] == [z for z in range(len(array)) if (array[z] == 3).any()]
    for row in rows:
        likeliest, low, high = (float(row[name]) for name in ("area_mm2", "low_mm2", "high_mm2"))
        assert likeliest == pytest.approx((array[int(row["section"])] == 3).sum() * pixel, rel=1e-4)
        spread = 0 if row["labelled"] == "1" else pixel
        assert (high - likeliest, likeliest - low) == pytest.approx((spread, spread), abs=1e-4)
    with (out / "volumes.csv").open(newline="") as file:
        volume = {row["index"]: float(row["volume_mm3"]) for row in csv.DictReader(file)}
    assert volume["3"] == pytest.approx((array == 3).sum() * np.prod(SPACING), rel=1e-3)

    values = record(data)
    assert values["status"] == "complete"
    assert values["seed"] == 4
    assert values["settings"]["seed"] == 4
    assert values["settings"]["spacing"] == list(SPACING)
    assert values["options"]["labelled"] == list(LABELLED)
    assert list(values["inputs"]) == ["images", "labels", "table"]
    assert len(values["inputs"]["images"]["images.nii.gz"]) == 64
    assert values["command"][:3] == ["limner", "stack", "complete"]
    assert values["device"]
    assert values["seconds"] == {"sections": 2.0}
    assert list(values["sections"]) == ["1", "2", "4", "5"]
    assert values["sections"]["1"]["objective"] == [1.0, 2.0]
    assert values["calibration"] == {"temperature": 1.5}
    assert values["suggestions"] == [1, 4]
    assert [values["sections"][z]["wrong_share"] for z in "1245"] == pytest.approx([0.1] * 4)
    assert values["sections"]["1"]["in_doubt"] == ["Pons", "Medulla"]

    printed = capsys.readouterr()
    assert f"Report: {out / 'report.html'}" in printed.out
    assert "Label next: section 1, 4 (the first is 0)." in printed.out
    assert "Note: section 4 registered badly" in printed.out
    assert printed.err.startswith("sections: 4 of 4")
    assert method.calls == 1


@pytest.mark.usefixtures("method")
def test_scores_against_the_truth(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(data, "--truth", str(data / "truth.nii.gz"), "--within-mm", "0")) == 0
    scores = record(data)["scores"]
    assert list(scores["sections"]) == ["1", "2", "4", "5"]
    # every completed section lies one row beside the labelled one it copies: of 11 rows, the first or last of each
    # structure is wrong
    assert scores["median_accuracy"] == pytest.approx(9 / 11)
    printed = capsys.readouterr().out
    assert "against the truth" in printed
    assert "0.818" in printed


@pytest.mark.usefixtures("method")
def test_a_folder_of_sections_comes_out_as_one(data: Path) -> None:
    folders(data)
    options = ("--spacing", "0.05,0.02,0.01", "--save-probabilities")
    assert main(command(data, *options, images="sections", labels="outlines")) == 0
    out = data.parent / "out"
    names = [f"s{z}" for z in range(SHAPE[0])]
    assert sorted(p.name for p in (out / "labels").iterdir()) == [f"{n}.png" for n in names]
    assert sorted(p.suffix for p in (out / "uncertainty").iterdir()) == [".tif"] * len(names)
    np.testing.assert_array_equal(iio.imread(out / "labels" / "s3.png"), truth()[3])
    assert iio.imread(out / "labels" / "s2.png").shape == (20, 30)
    with (out / "probabilities" / "pages.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["section"] == "s2.tif"]
    assert [(r["page"], r["index"], r["name"]) for r in rows] == [
        ("0", "0", "background"),
        ("1", "3", "label 3"),
        ("2", "200", "label 200"),
    ]
    pages = tifffile.imread(out / "probabilities" / "s2.tif")
    assert pages.dtype == np.float32
    assert pages.shape == (3, 20, 30)
    np.testing.assert_array_equal(pages[2] > 0, iio.imread(out / "labels" / "s2.png") == 200)
    assert not (out / "probabilities" / "s3.tif").exists()


@pytest.mark.usefixtures("method")
def test_tissues_positions_and_itksnap_table(data: Path) -> None:
    (data / "tissues.csv").write_text("structure,tissue\nPons,grey\n200,white\n")
    (data / "snap.txt").write_text('0 0 0 0 0 0 0 "Clear Label"\n3 255 0 0 1 1 1 "Pons"\n200 0 0 255 1 1 1 "Medulla"\n')
    arguments = [*positions(data, [0, 0.1, 0.2, 0.4, 0.5, 0.6, 0.9]), "--tissues", str(data / "tissues.csv")]
    assert main([*arguments, "--label-table", str(data / "snap.txt")]) == 0
    values = record(data)
    assert values["settings"]["tissues"] == {"0": 0, "3": 1, "200": 2}
    assert values["settings"]["positions"] == [0, 0.1, 0.2, 0.4, 0.5, 0.6, 0.9]
    assert '"Medulla"' in (data.parent / "out" / "structures.txt").read_text()


# --- a second time ---------------------------------------------------------------------------------------------------


def test_a_complete_run_is_not_repeated(data: Path, method: Method, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(data, "--truth", str(data / "truth.nii.gz"))
    assert main(arguments) == 0
    before = tree(data.parent)
    capsys.readouterr()
    assert main(arguments) == 0
    assert method.calls == 1
    printed = capsys.readouterr().out
    assert "is already complete." in printed
    assert "against the truth" in printed
    assert tree(data.parent) == before


def test_a_stopped_run_goes_on(data: Path, method: Method, capsys: pytest.CaptureFixture[str]) -> None:
    method.stop_after = 2
    assert main(command(data)) == 130
    assert "Stopped; the same command goes on from the last finished stage or section." in capsys.readouterr().err
    out = data.parent / "out"
    assert record(data)["status"] == "running"
    assert {p.name for p in out.iterdir()} == {".resume", "run.json"}
    method.stop_after = None
    assert main(command(data)) == 0
    assert method.resumed == [1, 2]
    assert record(data)["status"] == "complete"


def test_corrected_labels_go_on_without_overwrite(data: Path, method: Method) -> None:
    assert main(command(data)) == 0
    corrected = sparse()
    corrected[3, 0] = 3
    write_volume(data / "labels.nii.gz", corrected)
    assert main(command(data)) == 0
    assert method.calls == 2
    result = sitk.GetArrayFromImage(sitk.ReadImage(str(data.parent / "out" / "labels.nii.gz")))
    assert (result[3, 0] == 3).all()
    assert main(command(data, "--labelled", "0,3")) == 0
    assert method.calls == 3
    assert record(data)["options"]["labelled"] == [0, 3]


def test_a_complete_run_is_fitted_again_only_when_asked(data: Path, method: Method) -> None:
    fitted = data.parent / "out" / ".resume" / "stages" / "fitted-labels.npz"
    assert main(command(data)) == 0
    Store(fitted.parent).save(FITTED_LABELS, "key", {})
    assert main(command(data)) == 0
    assert (method.calls, fitted.exists()) == (1, True)
    assert main(command(data, "--refit")) == 0
    assert (method.calls, fitted.exists()) == (2, False)


def test_results_corrected_by_hand_are_not_lost_unasked(
    data: Path, method: Method, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(data)) == 0
    result = data.parent / "out" / "labels.nii.gz"
    written = result.read_bytes()
    write_volume(result, truth())
    edited = tree(data.parent / "out")
    corrected = sparse()
    corrected[3, 0] = 3
    write_volume(data / "labels.nii.gz", corrected)
    capsys.readouterr()
    assert main(command(data)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{result} was changed since Limner wrote it; move it away, name another folder, or add --overwr" in error
    assert tree(data.parent / "out") == edited
    assert method.calls == 1
    write_volume(data / "labels.nii.gz", sparse())
    assert main([*command(data), "--overwrite"]) == 0
    assert result.read_bytes() == written


def test_other_settings_need_overwrite(data: Path, method: Method, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(data, "--save-probabilities")) == 0
    out = data.parent / "out"
    (out / "notes.txt").write_text("mine")
    before = tree(out)
    capsys.readouterr()
    changed = command(data, "--seed", "1", "--method", "fusion")
    assert main(changed) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "differs in method, seed; name another folder, or add --overwrite" in error
    assert tree(out) == before
    assert method.calls == 1
    assert main([*changed, "--overwrite"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "probabilities").exists()
    assert record(data)["settings"]["method"] == "fusion"


def test_a_run_of_another_algorithm_needs_overwrite(
    data: Path, method: Method, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(data)) == 0
    monkeypatch.setattr(limner.cli.stack_complete, "ALGORITHM", limner.cli.stack_complete.ALGORITHM + 1)
    assert main(command(data)) == 2
    assert "differs in algorithm;" in capsys.readouterr().err
    assert main([*command(data), "--overwrite"]) == 0
    assert method.calls == 2


def test_other_images_need_overwrite(data: Path, method: Method, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(data)) == 0
    write_volume(data / "images.nii.gz", pixels() + 1)
    assert main(command(data)) == 2
    assert "differs in images;" in capsys.readouterr().err
    assert method.calls == 1


def test_other_pixels_behind_the_same_header_are_other_images(
    data: Path, method: Method, capsys: pytest.CaptureFixture[str]
) -> None:
    write_volume(data / "images.mhd", pixels())
    write_volume(data / "labels.mhd", sparse())
    arguments = command(data, images="images.mhd", labels="labels.mhd")
    assert main(arguments) == 0
    corrected = sparse()
    corrected[3, 0] = 3
    write_volume(data / "labels.mhd", corrected)
    assert main(arguments) == 0
    assert method.calls == 2
    header = (data / "images.mhd").read_bytes()
    write_volume(data / "images.mhd", pixels() + 1)
    assert (data / "images.mhd").read_bytes() == header
    assert main(arguments) == 2
    assert "differs in images;" in capsys.readouterr().err


def test_files_that_are_no_sections_do_not_matter(
    data: Path, method: Method, capsys: pytest.CaptureFixture[str]
) -> None:
    folders(data)
    (data / "all").mkdir()
    for z in range(SHAPE[0]):
        iio.imwrite(data / "all" / f"s{z}.png", truth()[z, slice(2, -2) if z == 2 else slice(None)])
    options = ("--spacing", "0.05,0.02,0.01", "--truth", str(data / "all"))
    arguments = command(data, *options, images="sections", labels="outlines")
    assert main(arguments) == 0
    for folder in ("sections", "outlines", "all"):
        (data / folder / "notes.txt").write_text("mine")
        (data / folder / "Thumbs.db").write_bytes(b"")
    capsys.readouterr()
    assert main(arguments) == 0
    assert "is already complete." in capsys.readouterr().out
    assert method.calls == 1


def test_another_file_of_weights_goes_on(data: Path, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limner.cli.stack_complete, "check_vgg16_weights", lambda _: None)
    weights = data / "vgg16.pth"
    weights.write_bytes(b"1")
    arguments = command(data, "--vgg16-weights", str(weights))
    assert [main(arguments), main(arguments), method.calls] == [0, 0, 1]
    weights.write_bytes(b"2")
    assert [main(arguments), method.calls] == [0, 2]


def test_a_folder_with_other_files_is_left_alone(
    data: Path, method: Method, capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.parent / "out"
    out.mkdir()
    (out / "labels.nii.gz").write_text("mine")
    for asked in ((), ("--overwrite",)):
        assert main(command(data, *asked)) == 2
        assert "labels.nii.gz was not written by Limner" in capsys.readouterr().err
    assert tree(out) == {"labels.nii.gz": b"mine"}
    (out / "labels.nii.gz").rename(out / "notes.txt")
    assert main(command(data)) == 2
    assert "holds no run of Limner's" in capsys.readouterr().err
    assert tree(out) == {"notes.txt": b"mine"}
    assert method.calls == 0


@pytest.mark.usefixtures("method")
def test_ome_zarr_and_geojson_are_taken_too(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is hashed of them is all their files."""
    save_ome_zarr(data / "images.ome.zarr", pixels(), SPACING)
    save_ome_zarr(data / "labels.ome.zarr", sparse(), SPACING, table={})
    arguments = command(data, images="images.ome.zarr", labels="labels.ome.zarr")
    assert [main(arguments), main(arguments)] == [0, 0]
    assert "is already complete." in capsys.readouterr().out
    assert list(record(data)["inputs"]["images"]) == ["images.ome.zarr"]
    folders(data)
    (data / "outlines").rename(data / "pictures")
    (data / "outlines").mkdir()
    square = [[[5, 5], [15, 5], [15, 15], [5, 15], [5, 5]]]
    outline = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": square}, "properties": {}}
    (data / "outlines" / "s3.geojson").write_text(json.dumps([outline]))
    options = ("--spacing", "0.05,0.02,0.01", "-o", str(data.parent / "again"))
    assert main(command(data, *options, images="sections", labels="outlines")) == 0
    values = json.loads((data.parent / "again" / "run.json").read_text())
    assert list(values["inputs"]["labels"]) == ["s3.geojson"]


# --- the demo --------------------------------------------------------------------------------------------------------


def test_demo_scores_the_withheld_labels(data: Path, method: Method, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "structures.csv").write_text((data / "table.csv").read_text())
    out = data.parent / "out"
    assert main(["demo", "--data", str(data), "-o", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "accuracy: median" in printed
    assert "0.2 mm" in printed
    assert str(out / "report.html") in printed
    assert method.calls == 1


def test_demo_without_the_sample_says_where_to_get_it(
    data: Path, method: Method, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    monkeypatch.setattr(limner.cli.demo, "SAMPLE", Path("examples", "data", "no_such_stack"))
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "get the folder examples/data/no_such_stack from Limner's repository and name it with --data" in error
    assert main(["demo", "--data", str(data)]) == 2
    assert "holds no structures.csv" in capsys.readouterr().err
    assert not (data / "demo-out").exists()
    assert method.calls == 0


def test_the_sample_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sample = limner.cli.demo.find_sample(None)
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(sample / "labels.nii.gz")))
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(sample / "truth.nii.gz")))
    assert np.flatnonzero(labels.any(axis=(1, 2))).tolist() == list(range(0, 61, 10))
    np.testing.assert_array_equal(labels[::10], truth[::10])


# --- the real method -------------------------------------------------------------------------------------------------


def test_fusion_end_to_end(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The method itself, at its fastest: labelled sections come out as they went in, the others near the truth."""
    arguments = command(data, "--method", "fusion", "--device", "cpu", "--truth", str(data / "truth.nii.gz"))
    assert main([*arguments, "--within-mm", "0.02", "--save-probabilities"]) == 0
    result = sitk.GetArrayFromImage(sitk.ReadImage(str(data.parent / "out" / "labels.nii.gz")))
    np.testing.assert_array_equal(result[list(LABELLED)], truth()[list(LABELLED)])
    scores = record(data)["scores"]
    # copying the nearest labelled section scores 9/11 on structures that move a row a section
    assert scores["minimum_accuracy"] > 0.85
    uncertainty = sitk.GetArrayFromImage(sitk.ReadImage(str(data.parent / "out" / "uncertainty.nii.gz")))
    assert not uncertainty[list(LABELLED)].any()
    assert 0 <= uncertainty.min() <= uncertainty.max() <= 1
    capsys.readouterr()
    assert main([*arguments, "--within-mm", "0.02", "--save-probabilities"]) == 0
    assert "is already complete." in capsys.readouterr().out


def test_labels_alone_are_interpolated_when_they_stand_for_the_images(data: Path) -> None:
    """A stack without images: without registration nothing of the labels' file but its grid counts as an image."""
    out, moved = data.parent / "out", data.parent / "moved"
    settings = ["--method", "fusion", "--registration", "none", "--jobs", "1"]
    assert main(command(data, *settings, images="labels.nii.gz")) == 0
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "labels.nii.gz")))
    assert (found[list(LABELLED)] == truth()[list(LABELLED)]).all()
    assert (found == truth()).mean() > 0.99 > (np.repeat(sparse()[::3], 3, axis=0)[: SHAPE[0]] == truth()).mean()
    write_volume(data / "noise.nii.gz", np.random.default_rng(3).integers(0, 900, SHAPE).astype(np.uint16))
    assert main(command(data, *settings, "-o", str(moved), images="noise.nii.gz")) == 0
    assert (sitk.GetArrayFromImage(sitk.ReadImage(str(moved / "labels.nii.gz"))) == found).all()
