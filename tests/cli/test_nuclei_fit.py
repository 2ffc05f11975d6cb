"""`limner nuclei fit`: bad input, what is written, stopping and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray

import limner.cli.nuclei_fit
from limner.checkpoint import Checkpoint
from limner.cli import main
from limner.io import trace
from limner.model_file import ModelFile, read_model

QUICK = ["--width", "1", "--steps", "3", "--batch", "2", "--patch", "64", "--stride", "64", "--device", "cpu"]


def nuclei(shape: tuple[int, int] = (96, 96)) -> NDArray[np.uint16]:
    """Nine nuclei of 14 x 14 pixels."""
    labels = np.zeros(shape, np.uint16)
    for i, (y, x) in enumerate(np.ndindex(3, 3), start=1):
        labels[9 + 32 * y : 23 + 32 * y, 9 + 32 * x : 23 + 32 * x] = i
    return labels


def picture(labels: NDArray[np.uint16], seed: int = 0) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).normal(0, 6, (*labels.shape, 3))
    colours = np.where((labels > 0)[..., None], (100, 70, 150), (235, 190, 215))
    return (colours + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, two of them with two of their nine nuclei annotated."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for i in range(3):
        iio.imwrite(tmp_path / "images" / f"t{i}.png", picture(nuclei(), i))
    for i in range(2):
        partial = np.where(np.isin(nuclei(), (1 + i, 5)), nuclei(), 0).astype(np.uint16)
        tifffile.imwrite(tmp_path / "labels" / f"t{i}.tif", partial)
    return tmp_path


def fit(folder: Path, *more: str, um: str = "0.25") -> int:
    inputs = [str(folder / "images"), str(folder / "labels"), "-o", str(folder / "out" / "m.safetensors")]
    return main(["nuclei", "fit", *inputs, *(["--um-per-px", um] if um else []), *QUICK, *more])


def test_a_model_is_trained_scored_and_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = folder / "scored"
    scored.mkdir()
    iio.imwrite(scored / "v.png", picture(nuclei(), 7))
    tifffile.imwrite(scored / "v_labels.tif", nuclei())
    assert fit(folder, "--validation", str(scored / "v.png"), str(scored / "v_labels.tif")) == 0
    out = capsys.readouterr().out
    assert "images: 2 annotated; 1 without annotation left out" in out
    assert "nuclei annotated: 4\n" in out
    assert "validation, mean of 1 images: AJI" in out
    assert [p.name for p in (folder / "out").iterdir()] == ["m.safetensors"]
    model = read_model(folder / "out" / "m.safetensors", "nuclei")
    assert (model.pixel_size, model.settings["steps"], model.settings["width"]) == (0.25, 3, 1)
    record = model.record
    assert record["median_area_um2"] == 14 * 14 / 16
    assert (record["nuclei"], record["images"], len(record["losses"]), record["seed"]) == (4, 2, 3, 0)
    assert set(record["inputs"]["labels"]) == {"t0.tif", "t1.tif"}
    assert all(len(sha) == 64 for sha in record["inputs"]["images"].values())
    assert record["validation"]["pooled"]["counts"]["true_objects"] == 9
    assert str(folder) not in json.dumps(record)
    assert main(["info", str(folder / "out" / "m.safetensors")]) == 0
    about = capsys.readouterr().out
    assert "model for nuclei" in about
    assert "made from labels: t0.tif, t1.tif" in about
    assert "validation: aji " in about


def test_outlines_from_qupath_train_as_labels_do(folder: Path) -> None:
    """The same nuclei as GeoJSON beside the images: the same weights."""
    assert fit(folder) == 0
    for i in range(2):
        rings = [o.polygons[0][0].tolist() for o in trace(tifffile.imread(folder / "labels" / f"t{i}.tif"))]
        features = [
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
            for ring in rings
        ]
        (folder / "images" / f"t{i}.png.geojson").write_text(json.dumps(features))
    images, output = str(folder / "images"), str(folder / "q.safetensors")
    assert main(["nuclei", "fit", images, images, "-o", output, "--um-per-px", "0.25", *QUICK]) == 0
    first, second = read_model(folder / "out" / "m.safetensors"), read_model(folder / "q.safetensors")
    for name, weight in first.weights.items():
        assert torch.equal(weight, second.weights[name])


class Eager(Checkpoint):
    """Keeps every step, and is stopped by the user after the second."""

    stop_after = 2

    def keep(self, *state: Any) -> None:
        self.seconds = 0
        super().keep(*state)
        if len(state[-1]) == self.stop_after:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(folder) == 0
    whole = read_model(folder / "out" / "m.safetensors")

    monkeypatch.setattr(limner.cli.nuclei_fit, "Checkpoint", Eager)
    capsys.readouterr()
    assert fit(folder, "--overwrite") == 130
    assert "Stopped; the same command goes on from step 2." in capsys.readouterr().err
    assert (folder / "out" / ".m.safetensors.partial").is_file()
    assert torch.equal(read_model(folder / "out" / "m.safetensors").weights["head.bias"], whole.weights["head.bias"])
    monkeypatch.setattr(Eager, "stop_after", -1)
    assert fit(folder, "--overwrite") == 0
    assert "going on from step 2 of a run that was stopped" in capsys.readouterr().out
    resumed = read_model(folder / "out" / "m.safetensors")
    assert resumed.record["resumed_at_step"] == 2
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name])
    assert [p.name for p in (folder / "out").iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("change", ["settings", "labels", "damage"])
def test_a_stopped_run_of_something_else_is_not_gone_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(limner.cli.nuclei_fit, "Checkpoint", Eager)
        assert fit(folder) == 130
    if change == "labels":
        tifffile.imwrite(folder / "labels" / "t0.tif", nuclei())
    if change == "damage":
        (folder / "out" / ".m.safetensors.partial").write_bytes(b"something else")
    capsys.readouterr()
    assert fit(folder, *(["--seed", "1"] if change == "settings" else [])) == 0
    assert "other settings or inputs: starting anew" in capsys.readouterr().out
    assert read_model(folder / "out" / "m.safetensors").record["resumed_at_step"] == 0


def test_a_model_is_never_overwritten_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(folder) == 0
    before = (folder / "out" / "m.safetensors").read_bytes()
    assert fit(folder, "--seed", "1") == 2
    assert "m.safetensors exists; name another file or add --overwrite" in capsys.readouterr().err
    assert (folder / "out" / "m.safetensors").read_bytes() == before
    assert fit(folder, "--seed", "1", "--overwrite") == 0
    assert (folder / "out" / "m.safetensors").read_bytes() != before


def test_training_goes_on_from_a_model_that_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(folder) == 0
    start = folder / "start.safetensors"
    (folder / "out" / "m.safetensors").rename(start)
    assert fit(folder, "--from", str(start)) == 0
    assert list(read_model(folder / "out" / "m.safetensors").record["inputs"]["start"]) == ["start.safetensors"]
    (folder / "out" / "m.safetensors").unlink()
    assert fit(folder, "--from", str(start), "--width", "2") == 2
    assert "--from: " in (error := capsys.readouterr().err)
    assert "has width 1, the new model 2; give --width 1" in error
    ModelFile("membranes", {"w": torch.ones(1)}, {}, 0.25).write(start)
    assert fit(folder, "--from", str(start)) == 2
    assert "is a model for membranes; give one for nuclei" in capsys.readouterr().err


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *more: str, um: str = "0.25") -> str:
    assert fit(folder, *more, um=um) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("limner: error: ")
    assert "\n" not in error
    assert not (folder / "out").exists()
    return error


def test_bad_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not state its pixel size" in (error := refused(folder, capsys, um=""))
    assert "--um-per-px" in error
    assert "--um-per-px: 0.0 is no pixel size" in refused(folder, capsys, um="0")
    assert "--output: model.pt does not end in .safetensors" in refused(folder, capsys, "-o", "model.pt")
    assert "Settings(): patch is 5; give a number from 32" in refused(folder, capsys, "--patch", "5")
    same = [str(folder / "images" / "t0.png"), str(folder / "labels" / "t0.tif")]
    assert "--validation: t0.png is trained on too" in refused(folder, capsys, "--validation", *same)
    tifffile.imwrite(folder / "labels" / "t0.tif", nuclei()[:50])
    assert "t0.tif has size (50, 96), its image t0.png (96, 96)" in refused(folder, capsys)
    tifffile.imwrite(folder / "labels" / "t0.tif", picture(nuclei()), photometric="rgb")
    assert "t0.tif is RGB; export index labels" in refused(folder, capsys)
    for i in range(2):
        tifffile.imwrite(folder / "labels" / f"t{i}.tif", np.zeros((96, 96), np.uint16))
    assert "labels holds no nucleus; outline some" in refused(folder, capsys)
    (folder / "labels" / "t0.tif").rename(folder / "labels" / "other.tif")
    assert "other.tif is named like no image" in refused(folder, capsys)


def test_an_image_smaller_than_a_patch_will_do(folder: Path) -> None:
    assert fit(folder, "--patch", "128") == 0


def test_validation_images_that_do_not_fit_into_memory_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limner.cli.nuclei_fit, "LARGEST_VALIDATION", 1000)
    iio.imwrite(folder / "v.png", picture(nuclei(), 7))
    tifffile.imwrite(folder / "v.tif", nuclei())
    assert fit(folder, "--validation", str(folder / "v.png"), str(folder / "v.tif")) == 2
    assert "v.png has (96, 96) pixels at 0.25 um; give tiles cut from it" in capsys.readouterr().err


def test_few_regions_are_read_of_many_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limner.cli.nuclei_fit, "MOST_REGIONS_IN_ALL", 5)
    asked = []
    regions = limner.cli.nuclei_fit.AnnotatedImage.regions
    monkeypatch.setattr(
        limner.cli.nuclei_fit.AnnotatedImage, "regions", lambda self, most: asked.append(most) or regions(self, most)
    )
    assert fit(folder) == 0
    assert asked == [2, 2]
