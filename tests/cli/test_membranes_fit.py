"""`limner membranes fit`: what is written and said, labels of several forms, bad input, stopping and going on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
from numpy.typing import NDArray

import limner.cli.membranes_fit
from limner.checkpoint import Checkpoint
from limner.cli import main
from limner.methods.membranes import Settings, TracedSection, fit, from_model, fused_map, membrane_map
from limner.metrics.neurites import thin, v_rand
from limner.model_file import ModelFile, read_model
from limner.watershed import cells_between

QUICK = ["--width", "2", "--steps", "3", "--batch", "2", "--patch", "32", "--device", "cpu"]
SETTINGS = Settings(width=2, steps=3, batch=2, patch=32)


def membrane(seed: int, shape: tuple[int, int] = (48, 56)) -> NDArray[np.bool_]:
    """Lines of two pixels between cells, somewhere else in each section."""
    draw = np.random.default_rng(seed)
    y, x = np.indices(shape) + draw.integers(0, 16, 2)[:, None, None]
    return (y % 16 < 2) | (x % 18 < 2)


def picture(traced: NDArray[np.bool_], seed: int = 0) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).normal(0, 20, traced.shape)
    return (np.where(traced, 80, 160) + noise).clip(0, 255).astype(np.uint8)


def as_in_isbi(traced: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.where(traced, 0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five sections, one of another size; the first four are traced, the last is damaged, but nobody looks."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for i in range(4):
        traced = membrane(i, (48, 56) if i else (40, 64))
        iio.imwrite(tmp_path / "images" / f"s{i}.png", picture(traced, i))
        iio.imwrite(tmp_path / "labels" / f"s{i}.png", as_in_isbi(traced))
    damaged = (tmp_path / "images" / "s0.png").read_bytes()[:100]
    (tmp_path / "images" / "s4.png").write_bytes(damaged)
    return tmp_path


def run(folder: Path, *more: str, images: str = "images", labels: str = "labels") -> int:
    inputs = [str(folder / images), str(folder / labels), "-o", str(folder / "out" / "m.safetensors")]
    return main(["membranes", "fit", *inputs, *QUICK, *more])


def written(folder: Path) -> ModelFile:
    return read_model(folder / "out" / "m.safetensors", "membranes")


def same_weights(a: ModelFile, b: ModelFile) -> bool:
    return all(torch.equal(weight, b.weights[name]) for name, weight in a.weights.items())


def test_a_model_is_trained_and_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    out = capsys.readouterr().out
    traced = np.concatenate([membrane(i, (48, 56) if i else (40, 64)).ravel() for i in range(4)])
    assert "sections: 4 traced of 5\n" in out
    assert f"membrane: {traced.mean():.1%} of their pixels (--membrane-is 0); pixel size not stated\n" in out
    assert "3 steps of 2 patches of 32 x 32 pixels on cpu" in out
    assert "on the sections trained on, which flatters" in out
    assert f"Next: limner membranes segment IMAGES {folder}/out/m.safetensors -o OUT --cells" in out
    assert [p.name for p in (folder / "out").iterdir()] == ["m.safetensors"]
    record = written(folder).record
    assert record["training_sections"] == [f"s{i}.png" for i in range(4)]
    assert (record["validation"], len(record["losses"]), record["resumed_at_step"]) == (None, 3, 0)
    assert list(record["inputs"]["images"]) == list(record["inputs"]["labels"]) == [f"s{i}.png" for i in range(4)]
    assert all(len(sha) == 64 for sha in record["inputs"]["labels"].values())
    assert str(folder) not in json.dumps(record)


def test_the_same_as_in_python(folder: Path) -> None:
    """The network and its fusion are those of `fit()`, trained without the sections kept out and fused on them."""
    assert run(folder, "--validation", "s1,3") == 0
    traced = {i: membrane(i, (48, 56) if i else (40, 64)) for i in range(4)}
    sections = {i: TracedSection(iio.imread(folder / "images" / f"s{i}.png"), m) for i, m in traced.items()}
    held_out = [sections[1], sections[3]]
    model, _ = fit([sections[0], sections[2]], SETTINGS)
    found = from_model(written(folder))
    assert found.fusion == model.fusion
    assert found.settings == SETTINGS
    assert all(torch.equal(a, b) for a, b in zip(found.network.parameters(), model.network.parameters(), strict=True))
    scores = [
        v_rand(thin(fused_map(membrane_map(model.network, s.image), model.fusion) < 0.5), cells_between(s.membrane))
        for s in held_out
    ]
    validation = written(folder).record["validation"]
    assert validation["v_rand"] == pytest.approx(np.mean([s.score for s in scores]))
    assert from_model(written(folder)).fusion == model.fusion  # chosen on the sections trained on
    assert validation["v_rand_best"] >= validation["v_rand"]
    assert validation["v_info"] <= validation["v_info_best"] <= 1


def test_validation_is_told_and_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--validation", "2-3", "--um-per-px", "0.004") == 0
    out = capsys.readouterr().out
    assert "sections: 4 traced of 5, 2 of them kept out of training\n" in out
    assert "pixel size 0.004 um" in out
    assert "validation: V_rand 0." in out
    assert "flatters" not in out
    assert main(["info", str(folder / "out" / "m.safetensors")]) == 0
    about = capsys.readouterr().out.splitlines()
    assert about[0].endswith("model for membranes")
    assert "pixel size: 0.004 um" in about
    assert "training_sections: s0.png, s1.png" in about
    assert "validation_sections: s2.png, s3.png" in about
    assert "made from labels: s0.png, s1.png" in about
    assert "scored on validation_labels: s2.png, s3.png" in about
    assert any(line.startswith("fusion: w_f ") for line in about)
    assert any(line.startswith("validation: v_rand 0.") for line in about)
    assert not any("{" in line for line in about)


def test_info_of_a_model_of_unknown_pixel_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    assert math.isnan(written(folder).pixel_size)
    capsys.readouterr()
    assert main(["info", str(folder / "out" / "m.safetensors")]) == 0
    assert "pixel size: not stated\n" in capsys.readouterr().out


def test_labels_the_other_way_round(folder: Path) -> None:
    assert run(folder) == 0
    usual = written(folder)
    for file in (folder / "labels").iterdir():
        iio.imwrite(file, 255 - iio.imread(file))
    assert run(folder, "--membrane-is", "255", "--overwrite") == 0
    assert same_weights(usual, written(folder))
    assert written(folder).record["membrane_share"] == usual.record["membrane_share"]


def stack(n: int = 4) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images and labels of which the first is not traced and the last is without membrane."""
    traced = [membrane(i) for i in range(n)]
    labels = np.stack([as_in_isbi(m) for m in traced])
    labels[0], labels[-1] = 0, 255
    return np.stack([picture(m, i) for i, m in enumerate(traced)]), labels


def test_sections_of_one_value_are_not_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = stack()
    for name, pixels in (("images", images), ("labels", labels)):
        tifffile.imwrite(folder / f"{name}.tif", pixels, photometric="minisblack")
        (folder / f"some_{name}").mkdir()
        for i in (1, 2):
            iio.imwrite(folder / f"some_{name}" / f"{i}.png", pixels[i])
    assert run(folder, images="images.tif", labels="labels.tif") == 0
    assert "sections: 2 traced of 4; 2 whose labels hold one value alone left out\n" in capsys.readouterr().out
    of_stack = written(folder)
    assert of_stack.record["training_sections"] == ["1", "2"]
    assert list(of_stack.record["inputs"]["labels"]) == ["labels.tif"]
    assert run(folder, "--overwrite", images="some_images", labels="some_labels") == 0
    assert same_weights(of_stack, written(folder))


def test_a_volume_states_its_pixel_size_and_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sections run along x here; labels that lie elsewhere are refused."""

    def write(name: str, pixels: NDArray[np.uint8], origin: float) -> None:
        image = sitk.GetImageFromArray(np.moveaxis(pixels, 0, 2))
        image.SetSpacing((5e-5, 4e-6, 4e-6))
        image.SetOrigin((origin, 0.0, 0.0))
        sitk.WriteImage(image, str(folder / name))

    for name, pixels, origin in zip(("i.nrrd", "l.nrrd", "off.nrrd"), (*stack(), stack()[1]), (7, 7, 0), strict=True):
        write(name, pixels, origin)
    assert run(folder, "--section-axis", "x", images="i.nrrd", labels="l.nrrd") == 0
    assert written(folder).pixel_size == pytest.approx(0.004)
    assert written(folder).record["training_sections"] == ["1", "2"]
    more = ["--section-axis", "x", "--overwrite"]
    assert run(folder, "--um-per-px", "0.005", *more, images="i.nrrd", labels="l.nrrd") == 0
    assert written(folder).pixel_size == 0.005
    capsys.readouterr()
    assert run(folder, *more, images="i.nrrd", labels="off.nrrd") == 2
    assert "has its origin at" in capsys.readouterr().err


def test_cells_by_id_are_parted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four cells that fill the section: the line between them is one pixel wide."""
    y, x = np.indices((48, 56))
    ids = (1 + (y >= 20) + 2 * (x >= 30)).astype(np.uint8)
    for i in range(4):
        iio.imwrite(folder / "images" / f"s{i}.png", picture(ids == 1))
        iio.imwrite(folder / "labels" / f"s{i}.png", ids)
    assert run(folder) == 0
    assert "4 values: cells that touch are parted" in capsys.readouterr().out
    assert written(folder).record["membrane_share"] == (48 + 56 - 1) / (48 * 56)


@pytest.mark.filterwarnings("always")
def test_membrane_that_is_the_larger_class_is_doubted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--membrane-is", "255") == 0
    error = capsys.readouterr().err
    assert f"of {folder}/labels is membrane as --membrane-is 255 has it; is it 0?" in error


class Eager(Checkpoint):
    """Keeps every step, and is stopped by the user after the second."""

    stop_after = 2

    def keep(self, *state: Any) -> None:
        self.seconds = 0
        super().keep(*state)
        if len(state[-1]) == self.stop_after:
            raise KeyboardInterrupt


def stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("while_training", [True, False])
def test_a_run_that_was_stopped_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], while_training: bool
) -> None:
    assert run(folder) == 0
    whole = written(folder)
    step = 2 if while_training else 3
    with monkeypatch.context() as patched:
        patched.setattr(limner.cli.membranes_fit, "Checkpoint", Eager)
        if not while_training:
            patched.setattr(Eager, "stop_after", -1)
            patched.setattr(limner.cli.membranes_fit, "membrane_map", stopped)
        assert run(folder, "--overwrite") == 130
    assert f"Stopped; the same command goes on from step {step}." in capsys.readouterr().err
    assert (folder / "out" / ".m.safetensors.partial").is_file()
    assert same_weights(whole, written(folder))
    assert run(folder, "--overwrite") == 0
    assert f"going on from step {step} of a run that was stopped" in capsys.readouterr().out
    resumed = written(folder)
    assert resumed.record["resumed_at_step"] == step
    assert same_weights(whole, resumed)
    assert resumed.settings == whole.settings
    assert [p.name for p in (folder / "out").iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("change", [["--seed", "1"], ["--validation", "s3"], ["labels"]])
def test_a_stopped_run_of_something_else_is_not_gone_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: list[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(limner.cli.membranes_fit, "Checkpoint", Eager)
        assert run(folder) == 130
    if change == ["labels"]:
        iio.imwrite(folder / "labels" / "s3.png", as_in_isbi(membrane(9)))
        change = []
    capsys.readouterr()
    assert run(folder, *change) == 0
    assert "other settings or inputs: starting anew" in capsys.readouterr().out
    assert written(folder).record["resumed_at_step"] == 0


def test_a_model_is_never_overwritten_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    before = (folder / "out" / "m.safetensors").read_bytes()
    assert run(folder, "--seed", "1") == 2
    assert "m.safetensors exists; name another file or add --overwrite" in capsys.readouterr().err
    assert (folder / "out" / "m.safetensors").read_bytes() == before


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *more: str, **inputs: str) -> str:
    assert run(folder, *more, **inputs) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("limner: error: ")
    assert "\n" not in error
    assert not (folder / "out").exists()
    return error


def test_options_that_cannot_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--um-per-px: 0.0 is no pixel size" in refused(folder, capsys, "--um-per-px", "0")
    assert "--patch: 40 is no multiple of 16" in refused(folder, capsys, "--patch", "40")
    assert "--output: m.pt does not end in .safetensors" in refused(folder, capsys, "-o", "m.pt")
    assert "labels holds 0 and 255, not 1; give the value" in refused(folder, capsys, "--membrane-is", "1")
    for text, found in {
        "0-3": "all 4 traced sections are kept out; leave some to train on",
        "7": "there is no section 7; IMAGES holds 0 to 4",
        "4": "section s4.png is not traced; name sections that are",
        "t1": "'t1' is no section of IMAGES; give numbers from 0, or names (the first is s0.png)",
        "3-1": "'3-1' runs backwards",
    }.items():
        assert f"--validation: {found}" in refused(folder, capsys, "--validation", text)


def test_images_and_labels_that_do_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere does not exist" in refused(folder, capsys, images="nowhere")
    assert "nowhere does not exist" in refused(folder, capsys, labels="nowhere")
    iio.imwrite(folder / "labels" / "s1.png", as_in_isbi(membrane(1))[:-8])
    assert "s1.png has size (40, 56), its image s1.png (48, 56) (y, x)" in refused(folder, capsys)
    iio.imwrite(folder / "labels" / "s1.png", np.stack([picture(membrane(1), i) for i in range(3)], axis=-1))
    assert "s1.png is RGB; export index labels" in refused(folder, capsys)
    iio.imwrite(folder / "labels" / "s1.png", as_in_isbi(membrane(1)))
    iio.imwrite(folder / "images" / "s1.png", np.stack([picture(membrane(1), i) for i in range(3)], axis=-1))
    assert "section s1.png" in (error := refused(folder, capsys))
    assert "is in colour" in error
    iio.imwrite(folder / "labels" / "other.png", as_in_isbi(membrane(1)))
    iio.imwrite(folder / "images" / "s1.png", picture(membrane(1)))
    assert "other.png is named like no section of" in refused(folder, capsys)


def test_labels_that_trace_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(4):
        iio.imwrite(folder / "labels" / f"s{i}.png", np.full((48, 56) if i else (40, 64), 255, np.uint8))
    assert "holds one value alone; trace membranes on one at least" in refused(folder, capsys)


def test_images_that_are_no_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = (pixels.astype(np.float32) for pixels in stack())
    images[2, 5, 5] = np.nan
    tifffile.imwrite(folder / "i.tif", images, photometric="minisblack")
    tifffile.imwrite(folder / "l.tif", labels.astype(np.uint8), photometric="minisblack")
    assert "section 2 of" in (error := refused(folder, capsys, images="i.tif", labels="l.tif"))
    assert "holds NaN or infinity" in error
    tifffile.imwrite(folder / "l.tif", labels[:3].astype(np.uint8), photometric="minisblack")
    assert "shape (3, 48, 56), the stack (4, 48, 56)" in refused(folder, capsys, images="i.tif", labels="l.tif")


def test_grey_sections_saved_in_colour_are_taken_as_grey(folder: Path) -> None:
    assert run(folder) == 0
    grey = written(folder)
    for i in range(4):
        file = folder / "images" / f"s{i}.png"
        iio.imwrite(file, np.stack([iio.imread(file)] * 3, axis=-1))
    assert run(folder, "--overwrite") == 0
    assert same_weights(grey, written(folder))


def test_an_image_given_for_labels_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images" / "s4.png").unlink()
    assert "looks like an image" in refused(folder, capsys, labels="images")
