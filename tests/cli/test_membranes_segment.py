"""`limner membranes segment`: what is written in each form, cells, going on, bad input."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from numpy.typing import NDArray

import limner.cli.membranes_segment
from limner.cli import main
from limner.cli.run_folder import RunFolder
from limner.io import read_label_image, write_ome_zarr
from limner.methods.membranes import (
    Averaging,
    Fusion,
    Model,
    Settings,
    TracedSection,
    build,
    fused_map,
    known_noise,
    membrane_map,
    to_model,
    train,
)
from limner.space import Space
from limner.volume import Volume
from limner.watershed import cells_between, link_stack

SPACING = (0.00005, 0.000004, 0.000004)
FUSION = Fusion(0.3, 0.1)
SHAPE = (48, 56)


def section(shift: int, shape: tuple[int, int] = SHAPE) -> TracedSection:
    """Cells of 14 x 16 pixels between dark lines of two, moved by some pixels."""
    y, x = np.indices(shape)
    traced = ((y + shift) % 16 < 2) | (x % 18 < 2)
    noise = np.random.default_rng(shift).normal(0, 10, shape)
    return TracedSection((np.where(traced, 70, 170) + noise).clip(0, 255).astype(np.uint8), traced)


@pytest.fixture(scope="module")
def model() -> Model:
    settings = Settings(width=4, steps=60, batch=4, patch=32, dropout=0.0, elastic_px=0.0, rate=1e-2)
    network = build(settings)
    train(network, [section(i) for i in range(4)], settings)
    return Model(network, settings, FUSION, 0.004)


@pytest.fixture
def folder(tmp_path: Path, model: Model) -> Path:
    """Four sections, the cells of which move by a pixel from one to the next, and a model."""
    (tmp_path / "sections").mkdir()
    for i in range(4):
        iio.imwrite(tmp_path / "sections" / f"s{i}.png", section(i).image)
    to_model(model, {}).write(tmp_path / "m.safetensors")
    return tmp_path


def run(folder: Path, *more: str, images: str = "sections") -> int:
    where = [str(folder / images), str(folder / "m.safetensors"), "-o", str(folder / "out")]
    return main(["membranes", "segment", *where, "--device", "cpu", *more])


def expected(model: Model, z: int) -> NDArray[np.float32]:
    return fused_map(membrane_map(model.network, section(z).image), FUSION)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_maps_are_written_under_the_sections_names(
    folder: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder) == 0
    files = {p.relative_to(folder / "out").as_posix() for p in (folder / "out").rglob("*") if p.is_file()}
    visible = {file for file in files if not file.startswith(".")}
    assert visible == {*(f"probabilities/s{z}.tif" for z in range(4)), "sections.csv", "report.html", "run.json"}
    for z in range(4):
        found = tifffile.imread(folder / "out" / "probabilities" / f"s{z}.tif")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected(model, z), atol=1e-5)
        inside = ~section(z).membrane
        assert found[inside].mean() < 0.3 < 0.6 < found[~inside].mean()
    assert "4 sections of 56 × 48 pixels" in capsys.readouterr().out
    assert [row["section"] for row in rows(folder / "out" / "sections.csv")] == [f"s{z}.png" for z in range(4)]
    record = json.loads((folder / "out" / "run.json").read_text())
    assert record["status"] == "complete"
    assert (record["options"]["w_f"], record["options"]["depth"]) == (0.3, 0.1)
    assert set(record["inputs"]["images"]) == {f"s{z}.png" for z in range(4)}


def test_cells_of_each_section(folder: Path, model: Model) -> None:
    assert run(folder, "--cells", "--spacing", ",".join(map(str, SPACING))) == 0
    table = rows(folder / "out" / "cells.csv")
    for z in range(4):
        cells = iio.imread(folder / "out" / "cells" / f"s{z}.png")
        np.testing.assert_array_equal(cells, cells_between(expected(model, z) >= 0.5, 50))
        assert cells.max() >= 9
        of_section = [row for row in table if row["section"] == f"s{z}.png"]
        assert [int(row["id"]) for row in of_section] == list(range(1, cells.max() + 1))
        assert int(of_section[0]["pixels"]) == (cells == 1).sum()
        assert float(of_section[0]["um2"]) == pytest.approx((cells == 1).sum() * 1.6e-5)
        inner = next(row for row in of_section if int(row["id"]) == cells[24, 28])
        centre = np.argwhere(cells == cells[24, 28]).mean(axis=0)
        assert (float(inner["y_px"]), float(inner["x_px"])) == pytest.approx(tuple(centre), abs=0.05)
        edge = {*cells[0], *cells[-1], *cells[:, 0], *cells[:, -1]}
        assert {int(row["id"]) for row in of_section if row["at_edge"] == "1"} == edge - {0}


def test_linked_cells_have_one_id_through_the_stack(folder: Path, model: Model) -> None:
    assert run(folder, "--link-sections", "--spacing", ",".join(map(str, SPACING))) == 0
    cells = np.stack([iio.imread(folder / "out" / "cells" / f"s{z}.png") for z in range(4)])
    alone = [cells_between(expected(model, z) >= 0.5, 50) for z in range(4)]
    np.testing.assert_array_equal(cells, np.stack(list(link_stack(alone))))
    middle = cells[:, 24, 28]
    assert (middle == middle[0]).all()
    assert middle[0] > 0
    row = next(row for row in rows(folder / "out" / "linked_cells.csv") if int(row["id"]) == middle[0])
    assert (row["first_section"], row["last_section"], row["sections"]) == ("s0.png", "s3.png", "4")
    assert int(row["voxels"]) == (cells == middle[0]).sum()
    assert float(row["um3"]) == pytest.approx((cells == middle[0]).sum() * 1.6e-5 * 0.05)


@pytest.mark.filterwarnings("always")  # of pixels that large, which NIfTI can state
@pytest.mark.parametrize("name", ["stack.tif", "stack.nii.gz", "stack.ome.zarr"])
def test_a_volume_comes_back_as_one_file_of_its_format(folder: Path, model: Model, name: str) -> None:
    pixels = np.stack([section(z).image for z in range(4)])
    if name.endswith(".tif"):
        tifffile.imwrite(folder / name, pixels, photometric="minisblack")
    elif name.endswith(".nii.gz"):
        image = sitk.GetImageFromArray(pixels)
        image.SetSpacing((0.4, 0.4, 5.0))
        sitk.WriteImage(image, folder / name)
    else:
        write_ome_zarr(folder / name, Volume(pixels, Space(pixels.shape, SPACING)))
    assert run(folder, "--link-sections", images=name) == 0
    maps, cells = folder / "out" / "probabilities" / name, folder / "out" / "cells" / name
    assert maps.exists()
    if name.endswith(".tif"):
        found = tifffile.imread(maps)
    elif name.endswith(".nii.gz"):
        found = sitk.GetArrayFromImage(sitk.ReadImage(maps))
        assert sitk.ReadImage(cells).GetSpacing() == pytest.approx((0.4, 0.4, 5.0))
    else:
        import zarr

        found = np.asarray(zarr.open_group(maps)["0"])
    for z in range(4):
        np.testing.assert_allclose(found[z], expected(model, z), atol=1e-5)
    labels = read_label_image(cells) if name.endswith(".nii.gz") else None
    assert labels is None or labels.shape == pixels.shape


def test_the_fusion_may_be_chosen(folder: Path, model: Model) -> None:
    assert run(folder, "--w-f", "0") == 0
    alone = membrane_map(model.network, section(1).image)
    np.testing.assert_allclose(tifffile.imread(folder / "out" / "probabilities" / "s1.tif"), alone, atol=1e-5)


def test_more_is_asked_for_later_without_the_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder) == 0
    before = (folder / "out" / "probabilities" / "s0.tif").read_bytes()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("limner.section_maps.predict", refuse)
    assert run(folder) == 0
    assert "is already complete" in capsys.readouterr().out
    assert run(folder, "--cells") == 0
    assert (folder / "out" / "cells" / "s3.png").exists()
    assert (folder / "out" / "probabilities" / "s0.tif").read_bytes() == before
    assert run(folder) == 0  # cells were not asked for: they go
    assert not (folder / "out" / "cells").exists()


def test_a_run_that_was_stopped_goes_on(folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = list[int]()
    whole = limner.section_maps.predict

    def stopping(*arguments: Any, **more: Any) -> Any:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(1)
        return whole(*arguments, **more)

    monkeypatch.setattr("limner.section_maps.predict", stopping)
    assert run(folder) == 130
    assert not (folder / "out" / "probabilities").exists()
    assert len(RunFolder(folder / "out").store.stages()) == 2
    computed.clear()
    assert run(folder) == 0
    assert len(computed) == 2  # of the sections that were left
    np.testing.assert_allclose(
        tifffile.imread(folder / "out" / "probabilities" / "s0.tif"), expected(model, 0), atol=1e-5
    )


def test_maps_are_of_this_model_these_images_and_this_averaging(folder: Path, model: Model) -> None:
    """Each is changed alone; the maps kept of the run before are not taken for it."""
    assert run(folder) == 0
    where = folder / "out" / "probabilities" / "s1.tif"
    iio.imwrite(folder / "sections" / "s1.png", section(5).image)
    assert run(folder) == 2  # other images, and not asked to replace
    assert run(folder, "--overwrite") == 0
    np.testing.assert_allclose(tifffile.imread(where), expected(model, 5), atol=1e-5)
    other = Model(build(Settings(width=4, seed=7)).eval(), Settings(width=4, seed=7), FUSION, 0.004)
    to_model(other, {}).write(folder / "m.safetensors")
    assert run(folder, "--overwrite") == 0
    np.testing.assert_allclose(tifffile.imread(where), expected(other, 5), atol=1e-5)
    assert run(folder, "--overwrite", "--no-symmetries") == 0
    alone = fused_map(membrane_map(other.network, section(5).image, Averaging(symmetries=False)), FUSION)
    np.testing.assert_allclose(tifffile.imread(where), alone, atol=1e-5)


def test_noisier_sections_are_smoothed_and_said_to_be(folder: Path, model: Model) -> None:
    known = replace(model, noise=known_noise([section(i) for i in range(4)]))
    to_model(known, {}).write(folder / "m.safetensors")
    noisy = section(2).image + np.random.default_rng(0).normal(0, 40, SHAPE)
    iio.imwrite(folder / "sections" / "s2.png", noisy.clip(0, 255).astype(np.uint8))
    assert run(folder) == 0
    notes = json.loads((folder / "out" / "run.json").read_text())["notes"]
    assert any("Noisier than those" in note and "of 4" in note and "--no-match-noise" in note for note in notes)
    matched = iio.imread(folder / "out" / "probabilities" / "s2.tif")
    assert run(folder, "--no-match-noise", "--overwrite") == 0
    assert json.loads((folder / "out" / "run.json").read_text())["notes"] == []
    assert np.abs(iio.imread(folder / "out" / "probabilities" / "s2.tif") - matched).max() > 0.1


def test_cells_are_linked_past_a_section_of_one_level(folder: Path) -> None:
    iio.imwrite(folder / "sections" / "s2.png", np.zeros(SHAPE, np.uint8))
    assert run(folder, "--link-sections") == 0
    cells = [iio.imread(folder / "out" / "cells" / f"s{z}.png") for z in range(4)]
    assert cells[2].max() == 0
    assert cells[1][24, 28] == cells[3][24, 28] > 0


def test_a_smaller_tile_changes_nothing(folder: Path, model: Model) -> None:
    large = section(0, (200, 230))
    iio.imwrite(folder / "sections" / "s9.png", large.image)
    assert run(folder, "--tile", "136") == 0
    found = tifffile.imread(folder / "out" / "probabilities" / "s9.tif")
    np.testing.assert_allclose(found, fused_map(membrane_map(model.network, large.image), FUSION), atol=1e-5)
    (folder / "out" / "run.json").unlink()
    assert run(folder, "--tile", "1024", "--overwrite") == 2  # what is there is nobody's now
    shutil.rmtree(folder / "out" / "probabilities")
    for name in ("report.html", "sections.csv"):
        (folder / "out" / name).unlink()
    assert run(folder, "--tile", "1024", "--overwrite") == 0
    np.testing.assert_allclose(tifffile.imread(folder / "out" / "probabilities" / "s9.tif"), found, atol=1e-5)


def test_what_the_user_changed_is_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--cells") == 0
    edited = folder / "out" / "cells" / "s1.png"
    iio.imwrite(edited, np.zeros(SHAPE, np.uint8))
    before = edited.read_bytes()
    assert run(folder, "--link-sections") == 2
    assert "s1.png was changed since Limner wrote it" in capsys.readouterr().err
    assert edited.read_bytes() == before


@pytest.mark.filterwarnings("always")
def test_pixels_of_another_size_are_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--spacing", "0.05,4,4") == 0
    assert "Pixels of 4000 um show no membranes: is the spacing in mm" in capsys.readouterr().err
    assert run(folder, "--spacing", "0.00005,0.000008,0.000008") == 0
    assert "pixels of 0.008 um, those that the model was trained on 0.004 um" in capsys.readouterr().err


def fault(folder: Path, capsys: pytest.CaptureFixture[str], *more: str, images: str = "sections") -> str:
    assert run(folder, *more, images=images) == 2
    assert not (folder / "out").exists()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("limner: error: ")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--w-f", "1.5", "--w-f: 1.5 is out of range; give 0 or more, below 1"),
        ("--w-f", "nan", "--w-f: nan is out of range; give 0 or more, below 1"),
        ("--depth", "-1", "--depth: -1.0 is out of range; give 0 or more, below 1"),
        ("--least-cell", "-1", "--least-cell: -1 is below 0; give pixels, 0 or more"),
        ("--tile", "64", "--tile: a window of 64 does not fit halo 56"),
        ("--jobs", "0", "--jobs: 0 is below 1; give 1 or more"),
    ],
)
def test_options_that_cannot_be(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert fault(folder, capsys, option, value).startswith(message)


def test_inputs_that_cannot_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing.tif does not exist" in fault(folder, capsys, images="nothing.tif")
    iio.imwrite(folder / "sections" / "s9.png", section(0, (40, 40)).image)
    assert fault(folder, capsys, "--link-sections").startswith(
        "--link-sections: s0.png has 48 x 56 pixels, s9.png 40 x 40; align the sections to one size"
    )
    (folder / "m.safetensors").write_bytes(b"nothing")
    assert "m.safetensors cannot be read" in fault(folder, capsys)


def test_colours_are_refused_before_anything_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "sections")
    (folder / "sections").mkdir()
    colours = np.random.default_rng(0).integers(0, 255, (*SHAPE, 3), np.uint8)
    iio.imwrite(folder / "sections" / "s0.png", colours)
    assert "is in colour" in fault(folder, capsys)


def test_a_section_is_linked_to_one_of_its_size_alone(folder: Path) -> None:
    iio.imwrite(folder / "sections" / "s9.png", section(0, (40, 40)).image)
    assert run(folder, "--cells") == 0
    assert iio.imread(folder / "out" / "cells" / "s9.png").shape == (40, 40)
    assert math.isfinite(float(rows(folder / "out" / "sections.csv")[-1]["membrane"]))
