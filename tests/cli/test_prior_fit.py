"""`limner prior fit`: what is written and said, merging, templates, bad input, stopping and going on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import limner.cli.prior_fit
from limner.checkpoint import Checkpoint
from limner.cli import main
from limner.label_merging import each_label
from limner.methods.anatomical_prior import from_model
from limner.model_file import ModelFile, read_model
from limner.registration.volume_affine import Alignment, align_labels
from limner.registration.volume_transform import AffineTransform
from limner.space import Space

QUICK = ["--width", "2", "--latent", "8", "--levels", "2", "--steps", "3", "--batch", "4", "--spacing-mm", "4"]
TABLE = "2 White 200 10 10 0\n3 Grey 10 200 10 0\n4 Left-Ventricle 1 2 3 0\n43 Right-Ventricle 4 5 6 0\n"


class Aligner:
    """Stands for `align_labels`: all subjects lie alike; may fail on some, or be stopped by the user."""

    def __init__(self) -> None:
        self.done = 0
        self.stop_at: int | None = None
        self.fails_from: int | None = None

    def __call__(self, label_map: Any, template: Any) -> Alignment:
        del label_map, template
        self.done += 1
        if self.done == self.stop_at:
            raise KeyboardInterrupt
        failed = "it is upside down" if self.fails_from is not None and self.done >= self.fails_from else ""
        return Alignment(AffineTransform(), 0.9, 0.5, failed=failed)


@pytest.fixture(autouse=True)
def aligner(monkeypatch: pytest.MonkeyPatch) -> Aligner:
    instead = Aligner()
    monkeypatch.setattr(limner.cli.prior_fit, "align_labels", instead)
    return instead


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "lut.txt").write_text(TABLE)
    return tmp_path / "lut.txt"


def run(label_maps: Path, *more: str) -> int:
    output = label_maps.parent / "out" / "p.safetensors"
    return main(["prior", "fit", str(label_maps), "-o", str(output), "--device", "cpu", *QUICK, *more])


def written(label_maps: Path) -> ModelFile:
    return read_model(label_maps.parent / "out" / "p.safetensors", "anatomical prior")


def refused(label_maps: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert run(label_maps, *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("limner: error: ")
    assert not (label_maps.parent / "out").exists()
    return error


def test_a_prior_is_learned_and_written(label_maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(label_maps) == 0
    out = capsys.readouterr().out
    assert "label maps: 5; overlap of brains 0.90, least 0.90\n" in out
    assert "structures: 4: label 2, label 3, label 4, label 43\n" in out
    model = written(label_maps)
    prior, encoder = from_model(model)
    assert encoder is None
    assert prior.merging.numbers == (0, 2, 3, 4, 43)
    # the likeliest label at the centres of the phantom's parts, in the frame of the label maps
    for centre, label in (((0, 60, 0), 3), ((-10, -4, 0), 2), ((14, -12, 14), 4), ((14, -12, -14), 43)):
        at = tuple(np.round(prior.template.space.to_index(centre)).astype(int))
        assert prior.merging.numbers[int(prior.location[(slice(None), *at)].argmax())] == label
    assert len(model.record["losses"]) == 3
    assert list(model.record["inputs"]["label_maps"]) == [f"m{i}.nii.gz" for i in range(5)]
    assert [p.name for p in (label_maps.parent / "out").iterdir()] == ["p.safetensors"]


def test_info_tells_of_the_prior(label_maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(label_maps) == 0
    capsys.readouterr()
    assert main(["info", str(label_maps.parent / "out" / "p.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "structures: 4\n" in out
    assert "      43  label 43: labels 43\n" in out
    assert "label maps: 5, overlaps of brains from 0.90\n" in out
    assert "48 voxels (z, y, x) of 4 mm\n" in out
    assert "fitted to scans: none" in out


def test_without_a_template_the_median_brain_is_painted(label_maps: Path, brains: SimpleNamespace) -> None:
    assert run(label_maps) == 0
    sizes = {f"m{i}": np.count_nonzero(brains.labels(i)) for i in range(5)}
    median = sorted(sizes, key=lambda name: sizes[name])[2]
    assert written(label_maps).record["template"] == f"painted from {median}"
    template = from_model(written(label_maps))[0].template
    levels = [
        template.pixels[tuple(np.round(template.space.to_index(at)).astype(int))]
        for at in ((-10, -4, 0), (14, -12, 14), (14, -12, -14))
    ]
    assert len({round(float(level), 1) for level in levels}) == 3


def test_the_users_template_is_kept(label_maps: Path, brains: SimpleNamespace, tmp_path: Path) -> None:
    image = brains.write(tmp_path / "mni", brains.scan(1))
    assert run(label_maps, "--template", str(image)) == 0
    model = written(label_maps)
    assert model.record["template"] == "mni.nii.gz"
    assert list(model.record["inputs"]["template"]) == ["mni.nii.gz"]
    template = from_model(model)[0].template
    white, ventricle = (
        tuple(np.round(template.space.to_index(at)).astype(int)) for at in ((-10, -4, 0), (14, -12, 14))
    )
    assert template.pixels[white] > 2 * template.pixels[ventricle]


def test_labels_are_merged_by_a_table(label_maps: Path, tmp_path: Path, table: Path) -> None:
    merge = tmp_path / "merge.csv"
    merge.write_text("structure,labels\nventricle,4,Right-Ventricle\nbrain,2,3\nmoon,99\n")
    assert run(label_maps, "--merge", str(merge), "--label-table", str(table)) == 0
    model = written(label_maps)
    names = from_model(model)[0].merging.structures
    assert names == (("background", (0,)), ("ventricle", (4, 43)), ("brain", (2, 3)))  # nobody shows a moon
    assert model.record["colours"]["4"] == [1, 2, 3]


def test_left_and_right_are_merged_by_name(label_maps: Path, table: Path) -> None:
    assert run(label_maps, "--merge-sides", "--label-table", str(table)) == 0
    assert ("Ventricle", (4, 43)) in from_model(written(label_maps))[0].merging.structures


def test_labels_that_the_table_does_not_know(
    label_maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "merge.csv").write_text("structure,labels\nbrain,2,3,4\n")
    error = refused(label_maps, capsys, "--merge", str(tmp_path / "merge.csv"))
    assert "m0.nii.gz hold labels that belong to no structure: 43; add them to the table" in error


def test_one_that_does_not_align_is_left_out(
    label_maps: Path, aligner: Aligner, capsys: pytest.CaptureFixture[str]
) -> None:
    aligner.fails_from = 5
    assert run(label_maps) == 3
    captured = capsys.readouterr()
    assert "m4.nii.gz cannot be aligned: it is upside down; it is left out\n" in captured.err
    assert "label maps: 4, 1 left out" in captured.out
    assert written(label_maps).record["left_out"] == {"m4": "it is upside down"}


def test_two_at_least_must_align(label_maps: Path, aligner: Aligner, capsys: pytest.CaptureFixture[str]) -> None:
    aligner.fails_from = 2
    assert run(label_maps) == 2
    assert "LABELMAPS: 1 of 5 label maps could be aligned to the template" in capsys.readouterr().err
    assert not (label_maps.parent / "out" / "p.safetensors").exists()


def test_finished_alignments_are_kept(label_maps: Path, aligner: Aligner, capsys: pytest.CaptureFixture[str]) -> None:
    aligner.stop_at = 4
    assert run(label_maps) == 130
    assert "Stopped; the same command goes on where it was." in capsys.readouterr().err
    assert run(label_maps) == 0
    assert aligner.done == 4 + 2  # the fourth, which was stopped, and the fifth
    assert [p.name for p in (label_maps.parent / "out").iterdir()] == ["p.safetensors"]


class Eager(Checkpoint):
    """Keeps every step, and is stopped by the user after the second."""

    def keep(self, network: Any, optimiser: Any, generator: Any, losses: list[float]) -> None:
        self.seconds = 0
        super().keep(network, optimiser, generator, losses)
        if len(losses) == 2:
            raise KeyboardInterrupt


def test_a_training_that_was_stopped_goes_on(
    label_maps: Path, aligner: Aligner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(label_maps) == 0
    whole, n_aligned = written(label_maps), aligner.done
    with monkeypatch.context() as patched:
        patched.setattr(limner.cli.prior_fit, "Checkpoint", Eager)
        assert run(label_maps, "--overwrite") == 130
    assert run(label_maps, "--overwrite") == 0
    assert "going on from step 2 of a run that was stopped" in capsys.readouterr().out
    assert aligner.done == 2 * n_aligned
    resumed = written(label_maps)
    assert resumed.record["resumed_at_step"] == 2
    assert all(torch.equal(weight, resumed.weights[name]) for name, weight in whole.weights.items())


def test_a_prior_is_never_overwritten_unasked(label_maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(label_maps) == 0
    before = (label_maps.parent / "out" / "p.safetensors").read_bytes()
    assert run(label_maps, "--seed", "1") == 2
    assert "p.safetensors exists; name another file or add --overwrite" in capsys.readouterr().err
    assert (label_maps.parent / "out" / "p.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rate", "0"], "--rate: 0.0 is not possible; give a number above 0"),
        (["--kl-from", "2"], "--kl-from: 2.0 "),
        (["--spacing-mm", "-1"], "--spacing-mm: -1.0 is no spacing"),
        (["--spacing-mm", "15"], "--spacing-mm: 15, at which the brain of "),
        (["--spacing-mm", "0.1"], "--spacing-mm: 0.1, at which the brain of "),
        (["--floor", "0.2"], "--floor: 0.2 of each of 5 labels, background too; give less than 1 / 5"),
        (["--merge-sides"], "--merge-sides: sides are told by the labels' names; give --label-table"),
        (["--merge", "a.csv", "--merge-sides"], "--merge-sides: --merge says which labels are one structure"),
        (["--template", "none.nii.gz"], "none.nii.gz does not exist"),
    ],
)
def test_options_that_cannot_be(
    label_maps: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert says in refused(label_maps, capsys, *options)


def test_a_spacing_that_does_not_suit_the_users_template(
    label_maps: Path, brains: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = brains.write(tmp_path / "mni", brains.scan(1))
    error = refused(label_maps, capsys, "--template", str(image), "--spacing-mm", "15")
    assert "--spacing-mm: 15, at which the brain of " in error
    assert error.endswith("; give 1.6")


def test_neighbours_in_the_numbering_are_painted_apart(brains: SimpleNamespace, tmp_path: Path) -> None:
    labels = np.zeros((60, 40, 40), np.uint8)
    for label in range(1, 6):
        labels[10 * label - 5 : 10 * label + 5, 5:35, 5:35] = label
    space = Space(labels.shape, (1.0, 1.0, 1.0))
    path = brains.write(tmp_path / "slabs", labels, space)
    template = limner.cli.prior_fit.painted_template(path, each_label(range(1, 6)), 1.0)
    at = [np.round(template.space.to_index((10 * label, 20, 20))).astype(int) for label in range(1, 6)]
    levels = [float(template.pixels[tuple(index)]) for index in at]
    np.testing.assert_allclose(levels, [0.1, 0.4, 0.7, 1.0, 0.1], atol=0.01)


def test_label_maps_that_cannot_be(
    label_maps: Path, brains: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "LABELMAPS: " in refused(label_maps.parent / "nowhere", capsys)
    assert "holds one label map; give 2 or more" in refused(label_maps / "m0.nii.gz", capsys)
    brains.write(label_maps / "m5", 0 * brains.labels(0))
    assert "m5.nii.gz shows no structure, only background" in refused(label_maps, capsys)
    frames = sitk.JoinSeries([sitk.GetImageFromArray(brains.labels(0))] * 2)
    sitk.WriteImage(frames, str(label_maps / "m5.nii.gz"))
    assert "m5.nii.gz has 4 axes" in refused(label_maps, capsys)
    sitk.WriteImage(
        sitk.GetImageFromArray(np.stack([brains.labels(0)] * 3, -1), isVector=True), str(label_maps / "m5.nii.gz")
    )
    assert "m5.nii.gz" in refused(label_maps, capsys)
    brains.write(label_maps / "m5", brains.labels(0))
    (label_maps / "M5.mha").write_bytes(b"")
    assert "have the same name; rename one of them" in refused(label_maps, capsys)


@pytest.mark.slow
def test_subjects_that_lie_elsewhere_are_aligned(
    label_maps: Path, brains: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(limner.cli.prior_fit, "align_labels", align_labels)
    for i in (0, 2, 3, 4):
        (label_maps / f"m{i}.nii.gz").unlink()
    brains.write(label_maps / "m9", brains.labels(9, brains.turned), brains.turned)
    image = brains.write(tmp_path / "mni", brains.scan(1))
    assert run(label_maps, "--template", str(image)) == 0
    assert min(written(label_maps).record["overlaps"].values()) > 0.93


def test_scans_are_no_label_maps(label_maps: Path, brains: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    brains.write(label_maps / "m1", brains.scan(1))
    assert "m1.nii.gz looks like an image: " in refused(label_maps, capsys)
