"""`limner scribbles fit`: bad input, what is written, and that nothing is overwritten."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

import limner.cli.scribbles_fit
from limner.cli import main
from limner.model_file import read_model
from limner.scribble_settings import Settings
from limner.stroke_network import LabelledVolume, from_model

SHAPE = (4, 32, 40)
QUICK = ["--steps", "3", "--fields", "1", "--batch", "2", "--patch", "32", "--device", "cpu"]


def labels() -> NDArray[np.uint8]:
    array = np.zeros(SHAPE, np.uint8)
    array[:, 4:14, 5:20], array[1:, 18:28, 22:36] = 3, 12
    return array


def pixels(seed: int) -> NDArray[np.uint8]:
    return (labels() * 15 + np.random.default_rng(seed).integers(0, 20, SHAPE)).astype(np.uint8)


def write_volume(path: Path, array: NDArray[Any], um: float = 20.0) -> Path:
    path.parent.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((um / 1000, um / 1000, 0.05))
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two animals, each with images and labels of the same names."""
    for n in range(2):
        write_volume(tmp_path / f"animal{n}" / "images.nii.gz", pixels(n))
        write_volume(tmp_path / f"animal{n}" / "labels.nii.gz", labels())
    (tmp_path / "names.csv").write_text("index,name\n3,Heart\n12,Liver\n")
    return tmp_path


def fit(folder: Path, *more: str, images: int = 2) -> int:
    paths = {name: [str(folder / f"animal{n}" / f"{name}.nii.gz") for n in range(2)] for name in ("images", "labels")}
    inputs = ["--images", *paths["images"][:images], "--labels", *paths["labels"]]
    return main(["scribbles", "fit", *inputs, "-o", str(folder / "out" / "m.safetensors"), *QUICK, *more])


def test_a_model_is_trained_and_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(folder, "--label-table", str(folder / "names.csv")) == 0
    out = capsys.readouterr().out
    assert "volumes: 2 with 8 sections\n" in out
    assert "organs: Heart (3), Liver (12)\n" in out
    assert "Next: limner scribbles segment IMAGES SCRIBBLES --model" in out
    assert [p.name for p in (folder / "out").iterdir()] == ["m.safetensors"]
    file = read_model(folder / "out" / "m.safetensors", "scribbles")
    model = from_model(file)
    assert (model.n_classes, model.names) == (3, ("Heart", "Liver"))
    assert model.um_per_px == pytest.approx(20)
    record = file.record
    assert (record["volumes"], record["sections"], len(record["losses"]), record["seed"]) == (2, 8, 3, 0)
    assert record["organs"] == {"3": "Heart", "12": "Liver"}
    assert set(record["inputs"]["images"]) == {"images.nii.gz (1)", "images.nii.gz (2)"}
    assert all(len(sha) == 64 for sha in record["inputs"]["labels"].values())
    assert str(folder) not in json.dumps(record)
    assert main(["info", str(folder / "out" / "m.safetensors")]) == 0
    about = capsys.readouterr().out
    assert "model for scribbles" in about
    assert "organs: 3 Heart, 12 Liver" in about
    assert "marks to draw: 1 background, 2 Heart, 3 Liver\n" in about


def test_chosen_organs_are_numbered_in_the_order_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[LabelledVolume] = []
    real = limner.cli.scribbles_fit.fit
    monkeypatch.setattr(
        limner.cli.scribbles_fit, "fit", lambda volumes, *rest: seen.extend(volumes) or real(volumes, *rest)
    )
    assert fit(folder, "--organs", "12,3") == 0
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[0].labels, np.select([labels() == 12, labels() == 3], [1, 2]))
    assert "organs: label 12 (12), label 3 (3)" in capsys.readouterr().out
    seen.clear()
    assert fit(folder, "--organs", "12", "--overwrite") == 0
    np.testing.assert_array_equal(seen[1].labels, labels() == 12)
    assert read_model(folder / "out" / "m.safetensors").settings["n_classes"] == 2


def test_by_default_every_label_of_any_volume_is_an_organ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(folder / "animal0" / "labels.nii.gz", np.where(labels() == 3, labels(), 0))
    write_volume(folder / "animal1" / "labels.nii.gz", np.where(labels() == 12, labels(), 0))
    assert fit(folder) == 0
    assert "organs: label 3 (3), label 12 (12)" in capsys.readouterr().out


def test_a_model_is_never_overwritten_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(folder) == 0
    before = (folder / "out" / "m.safetensors").read_bytes()
    assert fit(folder, "--seed", "1") == 2
    assert "m.safetensors exists; name another file or add --overwrite" in capsys.readouterr().err
    assert (folder / "out" / "m.safetensors").read_bytes() == before
    assert fit(folder, "--seed", "1", "--overwrite") == 0
    assert (folder / "out" / "m.safetensors").read_bytes() != before


def test_a_stopped_training_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(limner.cli.scribbles_fit, "fit", stopped)
    assert fit(folder) == 130
    assert "Stopped; no model was written." in capsys.readouterr().err
    assert not (folder / "out").exists()


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *more: str, images: int = 2) -> str:
    assert fit(folder, *more, images=images) == 2
    printed = capsys.readouterr()
    error = printed.err.strip()
    assert error.startswith("limner: error: ")
    assert "\n" not in error
    assert "--debug" not in error
    assert printed.out == ""
    assert not (folder / "out").exists()
    return error


def test_bad_options_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--labels: 2 are given for 1 of --images" in refused(folder, capsys, images=1)
    assert "--output: model.pt does not end in .safetensors" in refused(folder, capsys, "-o", "model.pt")
    assert "--width: 5 is no multiple of 8" in refused(folder, capsys, "--width", "5")
    assert "--organs: no volume holds label 7" in refused(folder, capsys, "--organs", "3,7")
    assert "nothing.csv cannot be read" in refused(folder, capsys, "--label-table", "nothing.csv")


def test_bad_volumes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = folder / "animal1"
    write_volume(second / "labels.nii.gz", labels()[:, :-1])
    assert "has shape (4, 31, 40), the stack (4, 32, 40)" in refused(folder, capsys)
    write_volume(second / "labels.nii.gz", np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) % 100)
    error = refused(folder, capsys)
    assert "labels.nii.gz holds 99 labels; name those to learn with --organs" in error
    strokes = labels()
    strokes[1:3] = 0
    write_volume(second / "labels.nii.gz", strokes)
    error = refused(folder, capsys)
    assert "holds labels on 2 of the 4 sections from 0 to 3; label every section in full" in error
    write_volume(second / "images.nii.gz", pixels(1), um=30)
    write_volume(second / "labels.nii.gz", labels(), um=30)
    error = refused(folder, capsys)
    assert "--images: pixels measure 20 um in " in error
    assert "30 um in " in error
    for n in range(2):
        write_volume(folder / f"animal{n}" / "images.nii.gz", pixels(n))
        write_volume(folder / f"animal{n}" / "labels.nii.gz", labels() * 0)
    assert "hold background alone; give labelled organs" in refused(folder, capsys)
    (second / "images.nii.gz").unlink()
    assert "images.nii.gz does not exist" in refused(folder, capsys)


@pytest.mark.parametrize("organs", ["0,3", "3,3", "3-5", "heart"])
def test_organs_that_are_no_labels_are_refused(organs: str) -> None:
    with pytest.raises(ValueError, match=r"is no list of labels|names background"):
        limner.cli.scribbles_fit.parse_organs(organs)


def test_help_tells_the_options_that_count(capsys: pytest.CaptureFixture[str]) -> None:
    """What only strokes, random walker and cut depend on is no option of a training."""
    helps = {}
    for name in ("fit", "segment"):
        with pytest.raises(SystemExit):
            main(["scribbles", name, "-h"])
        helps[name] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    settings = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Settings)}
    assert helps["segment"] >= settings
    counts = {"--working-um", "--width", "--fields", "--steps", "--batch", "--rate", "--patch", "--seed"}
    assert helps["fit"] & settings == counts
