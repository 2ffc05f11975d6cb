"""`limner prior segment`: results on each scan's own grid, scores, resuming, models that are kept, bad input."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

import limner.cli.prior_segment
from limner.cli import main
from limner.io import read, read_label_volume
from limner.label_map_prior import BrainMap, Settings, fit
from limner.label_merging import each_label
from limner.methods.anatomical_prior import TASK, to_model
from limner.methods.partial_nuclei import to_model as nuclei_model
from limner.metrics.pixels import dice
from limner.model_file import read_model
from limner.registration.template import make_template
from limner.registration.volume_affine import Alignment, align
from limner.registration.volume_transform import AffineTransform, resample
from limner.volume import LabelMap, Volume

QUICK = ["--warm-up", "2", "--steps", "3", "--batch", "4"]


class Aligner:
    """Stands for `align`: all scans lie as their headers say; fails on those with a mean above `fails_above`."""

    def __init__(self) -> None:
        self.done = 0
        self.fails_above = np.inf
        self.stop_at: int | None = None
        self.turned = False

    def __call__(self, volume: Volume, template: Any, brain: Any) -> Alignment:
        del template
        self.done += 1
        if self.done == self.stop_at:
            raise KeyboardInterrupt
        failed = "it is upside down" if volume.pixels[brain].mean() > self.fails_above else ""
        return Alignment(AffineTransform(), 0.9, 0.5, self.turned, failed)


@pytest.fixture(autouse=True)
def aligner(monkeypatch: pytest.MonkeyPatch) -> Aligner:
    instead = Aligner()
    monkeypatch.setattr(limner.cli.prior_segment, "align", instead)
    return instead


@pytest.fixture(scope="module")
def model_file(brains: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior of four subjects on the phantoms' own frame."""
    template = make_template(Volume(brains.scan(0), brains.usual), 4.0)
    merging = each_label([2, 3, 4, 43])
    maps = []
    for seed in range(4):
        classes = LabelMap(merging.to_classes(brains.labels(seed)), brains.usual)
        maps.append(BrainMap(resample(classes, template.space).labels, np.ones(template.space.shape, bool)))
    settings = Settings(latent=8, width=4, levels=2, steps=3, batch=4)
    prior, _ = fit(maps, template, merging, settings)
    path = tmp_path_factory.mktemp("prior") / "p.safetensors"
    to_model(prior, {"colours": {"2": [9, 8, 7]}}).write(path)
    return path


@pytest.fixture
def scans(brains: SimpleNamespace, tmp_path: Path) -> Path:
    """Two on the usual grid, and one whose axes run otherwise, in MGZ."""
    for seed in (5, 6):
        brains.write(tmp_path / "scans" / f"s{seed}", brains.scan(seed))
    turned = Volume(brains.scan(7, space=brains.turned), brains.turned)
    write_mgz(tmp_path / "scans" / "s7.mgz", turned)
    return tmp_path / "scans"


def write_mgz(path: Path, volume: Volume) -> None:
    from limner.io.freesurfer import save_mgh

    save_mgh(path, volume.pixels, volume.space)


def run(scans: Path, prior: Path, *more: str, out: str = "out") -> int:
    root = scans.parent if scans.is_dir() else scans.parent.parent
    return main(["prior", "segment", str(scans), str(prior), "-o", str(root / out), "--device", "cpu", *QUICK, *more])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def record_of(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "run.json").read_text())
    return content


def labels_in(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "labels").iterdir())}


def test_results_lie_on_each_scans_own_grid(
    scans: Path, model_file: Path, brains: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(scans, model_file, "--samples", "2") == 0
    output = scans.parent / "out"
    for name, seed, space in (("s5.nii.gz", 5, brains.usual), ("s7.mgz", 7, brains.turned)):
        found, scan = read_label_volume(output / "labels" / name), read(scans / name)
        np.testing.assert_allclose(found.space.origin, scan.space.origin, atol=1e-4)
        assert (found.space.direction, found.space.spacing) == (scan.space.direction, scan.space.spacing)
        true = brains.labels(seed, space)
        assert found.labels[true == 0].max() == 0
        assert min(dice(found.labels, true, label) for label in (2, 3, 4, 43)) > 0.8
        uncertainty = read(output / "uncertainty" / name).pixels
        assert uncertainty.dtype == np.float32
        assert 0 < uncertainty.max() <= 1
        assert uncertainty[true == 0].max() == 0
    assert [p.name for p in sorted((output / "samples").iterdir())] == [
        *("s5_1.nii.gz", "s5_2.nii.gz", "s6_1.nii.gz", "s6_2.nii.gz", "s7_1.mgz", "s7_2.mgz")
    ]
    assert json.loads((output / "transforms" / "s7.json").read_text())["overlap"] == 0.9
    assert (output / "report.html").read_text().startswith("<!")
    assert (output / "structures.csv").read_text().splitlines()[1] == "2,label 2,9,8,7"
    assert record_of(output)["status"] == "complete"
    assert "s7: " in capsys.readouterr().out


def test_volumes_are_in_mm3(scans: Path, model_file: Path, brains: SimpleNamespace) -> None:
    assert run(scans, model_file) == 0
    rows = rows_of(scans.parent / "out" / "volumes.csv")
    assert [row["scan"] for row in rows] == [name for name in ("s5", "s6", "s7") for _ in range(4)]
    assert all(float(row["low"]) <= float(row["mm3"]) <= float(row["high"]) for row in rows)
    for name, seed, space in (("s5", 5, brains.usual), ("s7", 7, brains.turned)):
        whole = sum(float(row["mm3"]) for row in rows if row["scan"] == name)
        brain = np.count_nonzero(brains.labels(seed, space)) * np.prod(space.spacing)
        assert 0.95 * brain < whole < 1.001 * brain


def test_another_contrast(model_file: Path, brains: SimpleNamespace, tmp_path: Path) -> None:
    brains.write(tmp_path / "dark" / "s8", brains.scan(8, "dark"))
    assert run(tmp_path / "dark" / "s8.nii.gz", model_file) == 0
    found = read_label_volume(tmp_path / "out" / "labels" / "s8.nii.gz").labels
    assert min(dice(found, brains.labels(8), label) for label in (2, 3, 4, 43)) > 0.8


def test_scores_against_the_truth(
    scans: Path, model_file: Path, brains: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(scans, model_file) == 0
    without = labels_in(scans.parent / "out")
    # numbered otherwise, one structure not told of, on another grid for the turned scan, none of s6
    own = np.zeros(256, np.uint8)
    own[[2, 3, 4]] = (7, 8, 9)
    brains.write(tmp_path / "truth" / "s5", own[brains.labels(5)])
    brains.write(tmp_path / "truth" / "s7", own[brains.labels(7, brains.turned)], brains.turned)
    (tmp_path / "t.csv").write_text("structure,labels\nLabel 2,7\nlabel 4,9\nbackground,8\n")
    options = ("--truth", str(tmp_path / "truth"), "--truth-merge", str(tmp_path / "t.csv"))
    assert run(scans, model_file, *options) == 0
    rows = rows_of(tmp_path / "out" / "dice.csv")
    assert [(row["scan"], row["label"]) for row in rows] == [("s5", "2"), ("s5", "4"), ("s7", "2"), ("s7", "4")]
    found = read_label_volume(tmp_path / "out" / "labels" / "s7.mgz").labels
    true = brains.labels(7, brains.turned)
    assert float(rows[2]["dice"]) == pytest.approx(dice(found, true, 2), abs=1e-4)
    assert labels_in(tmp_path / "out") == without
    capsys.readouterr()
    (tmp_path / "t.csv").write_text("structure,labels\nspleen,7\nbackground,8,9\n")
    assert run(scans, model_file, *options) == 2
    assert "--truth-merge: the prior has no structure spleen" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("structure,labels\nlabel 2,7\n")
    assert run(scans, model_file, *options) == 2
    assert "labels that belong to no structure: 8, 9" in capsys.readouterr().err


def test_one_that_does_not_align_is_skipped(
    scans: Path, model_file: Path, brains: SimpleNamespace, aligner: Aligner, capsys: pytest.CaptureFixture[str]
) -> None:
    brains.write(scans / "s6", brains.scan(6) + np.int16(1000) * (brains.scan(6) > 0))
    aligner.fails_above = 500.0
    assert run(scans, model_file) == 3
    output = scans.parent / "out"
    error = "align(): it is upside down; look at it beside the template, or give its brain (--masks)"
    assert f"limner: error: s6.nii.gz: {error}\n" in capsys.readouterr().err
    assert [p.name for p in sorted((output / "labels").iterdir())] == ["s5.nii.gz", "s7.mgz"]
    assert record_of(output)["images"]["s6"] == {"problem": error}
    assert "upside down" in (output / "report.html").read_text()
    assert run(scans, model_file) == 3
    kept, record = labels_in(output), record_of(output)
    aligner.fails_above = 0.0
    (scans.parent / "none").mkdir()
    for out in ("none", "new"):
        assert run(scans, model_file, out=out) == 2
    assert not any((scans.parent / "none").iterdir())  # a folder that was there stays
    assert not (scans.parent / "new").exists()
    shutil.rmtree(output / ".resume" / "stages")
    assert run(scans, model_file, "--seed", "1", "--overwrite") == 2  # what an earlier run gave stays as it was
    assert labels_in(output) == kept
    assert record_of(output) == record
    assert (output / ".resume" / "model.safetensors").is_file()


def test_scans_that_cannot_be_used(
    scans: Path, model_file: Path, brains: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = sitk.GetImageFromArray(np.zeros((8, 8, 8), np.int16))
    sitk.WriteImage(blank, str(scans / "blank.nii.gz"))
    sitk.WriteImage(sitk.JoinSeries([blank, blank]), str(scans / "frames.nii.gz"))
    colours = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(scans / "colours.nii.gz"))
    brains.write(scans / "mask", (brains.labels(0) > 0).astype(np.uint8))
    brains.write(scans / "labels", brains.labels(0).astype(np.uint8))
    (scans / "broken.mgz").write_bytes(b"nothing")
    assert run(scans, model_file) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("limner: error: ")]
    assert len(lines) == 6
    told = (
        "shows nothing, every voxel is 0",
        "cannot be read",
        "is in colour",
        "has 4 axes",
        "has one grey level",
        "is a label map",
    )
    assert all(sum(what in line for line in lines) == 1 for what in told)
    assert set(labels_in(scans.parent / "out")) == {"s5.nii.gz", "s6.nii.gz", "s7.mgz"}
    for path in scans.glob("s*"):
        path.unlink()
    assert run(scans, model_file, out="none") == 2
    assert not (scans.parent / "none").exists()


def test_a_head_with_its_skull_needs_a_mask(
    scans: Path, model_file: Path, brains: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skull = np.where(brains.labels(5) > 0, brains.scan(5), 80).astype(np.int16)
    head = brains.write(tmp_path / "heads" / "h", skull)
    mask = brains.write(tmp_path / "masks" / "h", (brains.labels(5) > 0).astype(np.uint8))
    assert run(head, model_file, "--masks", str(mask)) == 0
    found = read_label_volume(tmp_path / "out" / "labels" / "h.nii.gz").labels
    assert found[brains.labels(5) == 0].max() == 0
    assert dice((found > 0).astype(int), (brains.labels(5) > 0).astype(int), 1) > 0.99
    capsys.readouterr()
    assert run(scans, model_file, "--masks", str(tmp_path / "masks"), out="none") == 2
    assert "--masks: " in capsys.readouterr().err


def test_a_model_that_was_kept_gives_the_same(
    scans: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "models" / "m.safetensors"
    assert run(scans, model_file, "--save-model", str(model)) == 0
    monkeypatch.setattr(limner.cli.prior_segment, "fit_encoder", None)
    assert run(scans, model_file, "--save-model", str(model)) == 0  # nothing is left to do
    assert run(scans, model, out="again") == 0
    assert labels_in(tmp_path / "again") == labels_in(tmp_path / "out")
    capsys.readouterr()
    assert main(["info", str(model)]) == 0
    assert "fitted to scans: s5.nii.gz, s6.nii.gz, s7.mgz\n" in capsys.readouterr().out
    assert run(scans, model, "--save-model", str(tmp_path / "n.safetensors"), out="none") == 2
    assert "--save-model: nothing is learned" in capsys.readouterr().err
    # scans that come later join the others
    (tmp_path / "more").mkdir()
    (scans / "s5.nii.gz").rename(tmp_path / "more" / "t5.nii.gz")
    assert run(tmp_path / "more", model, out="again") == 0
    rows = rows_of(tmp_path / "again" / "volumes.csv")
    assert {row["scan"] for row in rows} == {"t5", "s5", "s6", "s7"}


def test_structures_of_one_tissue(
    scans: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "tissues.csv"
    table.write_text("structure,tissue\nbackground,fluid\n4,fluid\n")
    model = tmp_path / "model.safetensors"
    assert run(scans, model_file, "--tissues", str(table), "--save-model", str(model)) == 0
    weights = read_model(model, TASK).weights
    assert weights["tissues"].tolist() == [0, 1, 2, 0, 3]
    assert weights["means"][0] == weights["means"][3]
    capsys.readouterr()
    assert run(scans, model_file) == 2  # another run
    assert "differs in tissues" in capsys.readouterr().err
    assert run(scans, model, "--tissues", str(table), out="other") == 2
    assert "--tissues: " in capsys.readouterr().err
    table.write_text("structure,tissue\nputamen,fluid\n")
    assert run(scans, model_file, "--tissues", str(table), out="other") == 2
    assert "names the structure 'putamen'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_model_is_never_overwritten_unasked(
    scans: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m.safetensors"
    model.write_bytes(b"mine")
    assert run(scans, model_file, "--save-model", str(model)) == 2
    assert f"--save-model: {model} exists" in capsys.readouterr().err
    assert model.read_bytes() == b"mine"


def test_a_model_of_other_scans_is_replaced_where_asked(
    model_file: Path, brains: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scan = tmp_path / "m.safetensors", brains.write(tmp_path / "scans" / "s5", brains.scan(5))
    assert run(scan, model_file, "--save-model", str(model)) == 0
    of_others = model.read_bytes()
    assert run(scan, model_file, "--seed", "1", "--overwrite") == 0
    monkeypatch.setattr(limner.cli.prior_segment, "segment", None)  # all scans are done
    assert run(scan, model_file, "--seed", "1", "--save-model", str(model)) == 2
    assert model.read_bytes() == of_others
    assert run(scan, model_file, "--seed", "1", "--save-model", str(model), "--overwrite") == 0
    kept = read_model(tmp_path / "out" / ".resume" / "model.safetensors", TASK)
    assert read_model(model, TASK).record["fit_key"] == kept.record["fit_key"]
    assert model.read_bytes() != of_others


def test_a_prior_is_never_replaced_by_a_model(
    model_file: Path, brains: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior, scan = tmp_path / "p.safetensors", brains.write(tmp_path / "scans" / "s5", brains.scan(5))
    prior.write_bytes(model_file.read_bytes())
    same = tmp_path / "scans" / ".." / "p.safetensors"
    assert run(scan, prior, "--save-model", str(same), "--overwrite") == 2
    assert f"--save-model: {same} is PRIOR, which would be lost; name another file" in capsys.readouterr().err
    assert prior.read_bytes() == model_file.read_bytes()


def test_the_course_of_the_refinement_is_recorded(
    model_file: Path, brains: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment, scan = limner.cli.prior_segment.segment, brains.write(tmp_path / "scans" / "s5", brains.scan(5))

    def with_bound(*given: Any) -> Any:
        found = segment(*given)
        object.__setattr__(found, "bound", (-30.5, -20.0, -19.5) if given[-1].refine else ())
        return found

    monkeypatch.setattr(limner.cli.prior_segment, "segment", with_bound)
    assert run(scan, model_file) == 0
    course = {"first": -30.5, "last": -19.5, "iterations": 3}
    assert record_of(tmp_path / "out")["images"]["s5"]["refinement"] == course
    assert run(scan, model_file, "--no-refine") == 0
    assert "refinement" not in record_of(tmp_path / "out")["images"]["s5"]


def test_other_results_are_made_without_learning_anew(
    scans: Path, model_file: Path, aligner: Aligner, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = scans.parent / "out"
    assert run(scans, model_file, "--samples", "1") == 0
    refined = labels_in(output)
    monkeypatch.setattr(limner.cli.prior_segment, "fit_encoder", None)
    assert run(scans, model_file, "--no-refine") == 0
    assert labels_in(output) != refined
    assert not (output / "samples").exists()
    assert run(scans, model_file, "--samples", "1") == 0
    assert labels_in(output) == refined
    assert aligner.done == 3


def test_files_of_a_scan_are_told_from_those_of_another(
    model_file: Path, brains: SimpleNamespace, tmp_path: Path
) -> None:
    for name, seed in (("a", 5), ("a.b", 6), ("a_1", 7)):
        brains.write(tmp_path / "scans" / name, brains.scan(seed))
    assert run(tmp_path / "scans", model_file, "--samples", "1") == 0
    assert run(tmp_path / "scans", model_file, "--no-refine", "--samples", "2") == 0
    files = {path.name.removesuffix(".nii.gz") for path in (tmp_path / "out" / "samples").iterdir()}
    assert files == {f"{name}_{i}" for name in ("a", "a.b", "a_1") for i in (1, 2)}
    assert len(labels_in(tmp_path / "out")) == 3


def test_a_scan_that_was_damaged_for_a_while(
    scans: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = tmp_path / "m.safetensors", tmp_path / "again"
    assert run(scans, model_file, "--save-model", str(model)) == 0
    assert run(scans, model, out="again") == 0
    whole, before = (scans / "s5.nii.gz").read_bytes(), labels_in(output)
    (scans / "s5.nii.gz").write_bytes(whole[:100])
    assert run(scans, model, out="again") == 3
    assert "problem" in record_of(output)["images"]["s5"]
    (scans / "s5.nii.gz").write_bytes(whole)
    monkeypatch.setattr(limner.cli.prior_segment, "segment", None)
    assert run(scans, model, out="again") == 0
    assert "problem" not in record_of(output)["images"]["s5"]
    assert labels_in(output) == before


def test_a_stopped_run_goes_on(
    scans: Path, model_file: Path, aligner: Aligner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    aligner.stop_at = 3
    assert run(scans, model_file) == 130
    assert "Stopped; the same command goes on" in capsys.readouterr().err
    segment, segmented = limner.cli.prior_segment.segment, []

    def stopping(scan: Any, *more: Any) -> Any:
        segmented.append(scan.volume.source.path.name)
        if len(segmented) == 2:
            raise KeyboardInterrupt
        return segment(scan, *more)

    monkeypatch.setattr(limner.cli.prior_segment, "segment", stopping)
    assert run(scans, model_file) == 130
    assert set(labels_in(scans.parent / "out")) == {"s5.nii.gz"}
    monkeypatch.setattr(limner.cli.prior_segment, "fit_encoder", None)
    assert run(scans, model_file) == 0
    assert aligner.done == 4
    assert segmented == ["s5.nii.gz", "s6.nii.gz", "s6.nii.gz", "s7.mgz"]


def test_results_are_never_overwritten_unasked(
    scans: Path, model_file: Path, brains: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    output = scans.parent / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert run(scans, model_file) == 2
    assert "is not empty and holds no run of Limner's" in capsys.readouterr().err
    (output / "notes.txt").unlink()
    assert run(scans, model_file) == 0
    before = labels_in(output)
    assert run(scans, model_file, "--seed", "1") == 2
    assert "holds a run that differs in seed" in capsys.readouterr().err
    brains.write(scans / "s6", brains.scan(16))
    assert run(scans, model_file) == 2
    assert "holds a run that differs in images" in capsys.readouterr().err
    assert labels_in(output) == before
    assert run(scans, model_file, "--overwrite") == 0
    assert labels_in(output) != before


@pytest.mark.filterwarnings("default")
def test_a_header_that_may_lie_is_told_of(
    scans: Path, model_file: Path, aligner: Aligner, capsys: pytest.CaptureFixture[str]
) -> None:
    aligner.turned = True
    assert run(scans, model_file) == 0
    assert "limner: warning: s6: its header gives another orientation" in capsys.readouterr().err
    assert "check that left is left" in (scans.parent / "out" / "report.html").read_text()


def test_a_model_for_something_else(
    scans: Path, tmp_path: Path, dark_network: Any, dark_settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    nuclei_model(dark_network, dark_settings, {}).write(tmp_path / "n.safetensors")
    assert run(scans, tmp_path / "n.safetensors") == 2
    assert "is a model for nuclei; give one for anatomical prior" in capsys.readouterr().err
    assert run(scans, tmp_path / "none.safetensors") == 2
    assert "name a model that `limner prior fit` wrote" in capsys.readouterr().err


@pytest.mark.slow
def test_scans_that_lie_otherwise_are_aligned(
    scans: Path, model_file: Path, brains: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limner.cli.prior_segment, "align", align)
    for name in ("s6.nii.gz", "s7.mgz"):
        (scans / name).unlink()
    brains.write(scans / "s8", brains.scan(8, space=brains.turned), brains.turned)
    assert run(scans, model_file) == 0
    found = read_label_volume(scans.parent / "out" / "labels" / "s8.nii.gz").labels
    true = brains.labels(8, brains.turned)
    assert min(dice(found, true, label) for label in (2, 3, 4, 43)) > 0.8
