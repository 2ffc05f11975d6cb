"""Heads drawn by formula on any grid, so that the true transform between two of them is known."""

import json
from dataclasses import replace

import numpy as np
import pytest

from limner.registration.template import make_template
from limner.registration.volume_affine import Alignment, align, align_labels, read_alignment
from limner.registration.volume_transform import AffineTransform, resample
from limner.space import Space
from limner.volume import LabelMap, Volume

# centre and half axes in mm (z, y, x), label; later ones lie on earlier ones
PARTS = [
    ((0, 0, 0), (62, 80, 64), 1),  # cortex
    ((-45, 45, 0), (26, 34, 48), 1),
    ((6, -4, 0), (46, 62, 50), 2),  # white matter
    ((-45, 45, 0), (16, 22, 36), 4),
    ((15, -12, 14), (10, 36, 7), 3),  # ventricles
    ((15, -12, -14), (10, 36, 7), 3),
    ((-5, 5, 16), (12, 16, 10), 5),
    ((-5, 5, -16), (12, 16, 10), 5),
    ((-10, -38, 0), (9, 12, 34), 5),
]
T1 = {0: 0.0, 1: 600.0, 2: 1000.0, 3: 150.0, 4: 950.0, 5: 750.0}
T2 = {0: 0.0, 1: 700.0, 2: 450.0, 3: 1500.0, 4: 470.0, 5: 600.0}
TEMPLATE = Space((48, 52, 44), (4.0, 4.0, 4.0), (-94.0, -102.0, -86.0))
# turned by 12 degrees about x, 0.9 as large, higher than wide, 15 to 40 mm off
COS, SIN = np.cos(np.deg2rad(12)), np.sin(np.deg2rad(12))
TRUE = np.array([[COS, -SIN, 0], [SIN, COS, 0], [0, 0, 1]]) @ np.diag([0.85, 0.92, 0.9])
MOVE = AffineTransform(tuple(map(tuple, TRUE.tolist())), (40.0, -25.0, 15.0))
# axes of the file: y up, z to the right and backwards, thick along z
SCAN = Space(
    (66, 60, 68),
    (2.5, 3.0, 3.0),
    (-50.0, 75.0, -75.0),
    ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0), (1.0, 0.0, 0.0)),
)


def labels_at(points):
    labels = np.zeros(points.shape[:-1], np.uint8)
    for centre, axes, label in PARTS:
        labels[(((points - centre) / axes) ** 2).sum(axis=-1) < 1] = label
    return labels


def points_of(space):
    index = np.stack(np.meshgrid(*(np.arange(n) for n in space.shape), indexing="ij"), axis=-1)
    return np.asarray(space.origin) + (index * space.spacing) @ np.asarray(space.direction).T


def head_labels(space, move=None):
    points = points_of(space)
    return LabelMap(labels_at(points if move is None else move.inverse()(points)), space)


def head(space, move=None, levels=T1, noise=25.0):
    labels = head_labels(space, move).labels
    pixels = np.array([levels[i] for i in range(6)])[labels]
    pixels = np.where(labels > 0, pixels + np.random.default_rng(0).normal(0, noise, labels.shape), 0)
    return Volume(np.maximum(pixels, labels > 0), space)


@pytest.fixture(scope="module")
def template():
    return make_template(head(TEMPLATE), spacing_mm=4.0)


def error_mm(alignment, true=MOVE):
    """How far points of the brain end up from where they belong, at most."""
    points = points_of(TEMPLATE)[head_labels(TEMPLATE).labels > 0]
    found = (alignment if isinstance(alignment, AffineTransform) else alignment.transform)(points)
    return np.linalg.norm(found - true(points), axis=1).max()


@pytest.mark.parametrize("levels", [T1, T2])
def test_known_transform_is_recovered_within_a_voxel(template, levels):
    assert error_mm(AffineTransform()) > 30
    alignment = align(head(SCAN, MOVE, levels), template)
    assert alignment.failed == ""
    assert not alignment.turned
    assert error_mm(alignment) < 1.5
    assert alignment.overlap > 0.93


def test_two_runs_give_the_same_numbers(template):
    scan = head(SCAN, MOVE)
    assert align(scan, template) == align(scan, template)


def test_intensities_of_any_scale_and_a_hot_voxel(template):
    scan = head(SCAN, MOVE)
    scan.pixels[33, 30, 34] = 1e7
    assert error_mm(align(replace(scan, pixels=scan.pixels * 1e-6), template)) < 1.5


@pytest.mark.parametrize("how", ["cropped", "zeroed"])
def test_missing_field_of_view(template, how):
    """The lower 30 mm of the brain are not there: its centre lies 13 mm too high."""
    scan = head(SCAN, MOVE)
    low = int(np.flatnonzero(scan.pixels.any(axis=(0, 2)))[0]) + 10  # the file's second axis runs upwards
    if how == "cropped":
        origin = tuple(scan.space.to_physical((0, low, 0)).tolist())
        space = replace(scan.space, shape=(66, 60 - low, 68), origin=origin)
        scan = Volume(scan.pixels[:, low:], space)
    else:
        pixels = scan.pixels.copy()
        pixels[:, :low] = 0
        scan = replace(scan, pixels=pixels)
    alignment = align(scan, template)
    assert alignment.failed == ""
    assert error_mm(alignment) < 4.0


@pytest.mark.parametrize("turn", [np.diag([-1.0, -1.0, 1.0]), np.array([[0, 1.0, 0], [0, 0, 1.0], [1.0, 0, 0]])])
def test_header_with_another_orientation(template, turn):
    scan = head(SCAN, MOVE)
    direction = tuple(map(tuple, (turn @ np.asarray(SCAN.direction)).tolist()))
    origin = tuple((turn @ np.asarray(SCAN.origin)).tolist())
    alignment = align(replace(scan, space=replace(SCAN, direction=direction, origin=origin)), template)
    turned = AffineTransform(tuple(map(tuple, (turn @ TRUE).tolist())), tuple((turn @ np.asarray(MOVE.shift)).tolist()))
    assert alignment.turned
    assert error_mm(alignment, turned) < 4.0


def test_what_does_not_align_is_said_to_have_failed(template):
    draw = np.random.default_rng(0)
    inside = head_labels(SCAN, MOVE).labels > 0
    noise = np.where(inside, draw.uniform(1, 1000, inside.shape), 0)
    assert "share" in align(Volume(noise, SCAN), template).failed
    block = np.zeros(SCAN.shape)
    block[30:36, 5:55, 10:60] = draw.uniform(1, 1000, (6, 50, 50))
    assert "of the template's brain" in align(Volume(block, SCAN), template).failed


def test_brains_that_overlap_little_have_failed(template, monkeypatch):
    monkeypatch.setattr("limner.registration.volume_affine.LEAST_OVERLAP", 0.999)
    failed = align(head(SCAN, MOVE), template).failed
    assert failed.startswith("the brains overlap by 0.9")


def test_label_map_is_aligned_by_usual_intensities(template):
    alignment = align_labels(head_labels(SCAN, MOVE), template, T1)
    assert alignment.failed == ""
    assert error_mm(alignment) < 2.0


def test_labels_without_intensities_may_have_any_numbers(template):
    label_map = head_labels(SCAN, MOVE)
    renumbered = np.array([0, 1030, 2, 53, 17, 4])[label_map.labels]
    alignment = align_labels(replace(label_map, labels=renumbered), template)
    assert error_mm(alignment) < 4.0


def test_results_return_to_the_scans_own_grid(template):
    alignment = align(head(SCAN, MOVE), template)
    there = resample(head_labels(TEMPLATE), template.space)
    back = resample(there, SCAN, alignment.transform.inverse())
    true = head_labels(SCAN, MOVE).labels
    assert back.space == SCAN
    for label, least in {1: 0.85, 2: 0.9, 3: 0.75, 4: 0.85, 5: 0.8}.items():
        found = back.labels == label
        assert 2 * (found & (true == label)).sum() / (found.sum() + (true == label).sum()) > least


def test_alignment_is_kept(tmp_path):
    alignment = Alignment(MOVE, 0.95, 0.21, turned=True, failed="")
    alignment.write(tmp_path / "scan.json")
    assert read_alignment(tmp_path / "scan.json") == alignment
    assert [p.name for p in tmp_path.iterdir()] == ["scan.json"]
    assert json.loads((tmp_path / "scan.json").read_text())["transform"]["shift"] == [40, -25, 15]


@pytest.mark.parametrize("text", ["", "{}", '{"transform": {"linear": [[1]], "shift": [0, 0, 0]}}', "[1]"])
def test_a_file_that_is_no_alignment(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"^read_alignment\(\): .*a.json holds no alignment .*; align the scan again$"):
        read_alignment(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"b.json holds no alignment"):
        read_alignment(tmp_path / "b.json")


def test_bad_input(template):
    scan = Volume(np.zeros((4, 5, 6)), Space((4, 5, 6), (1.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match=r"^align\(\): the volume of shape \(4, 5, 6\) is all background; "):
        align(scan, template)
    with pytest.raises(ValueError, match=r"^align\(\): the brain's mask has shape \(2, 2, 2\), the image \(4, 5, 6\)"):
        align(scan, template, np.ones((2, 2, 2), bool))
    with pytest.raises(ValueError, match=r"^align\(\): the image is in colour; give a grey one"):
        align(Volume(np.zeros((4, 5, 6, 3)), scan.space), template)
    with pytest.raises(ValueError, match=r"^align\(\): the sections are unevenly spaced"):
        align(replace(scan, space=scan.space.with_positions([0, 1, 2, 5])), template)
    with pytest.raises(ValueError, match=r"^paint\(\): labels \[2\] have no intensity"):
        align_labels(LabelMap(np.full((4, 5, 6), 2), scan.space), template, {1: 0.5})


SIMPLE = [((0, 0, 0), (56, 70, 56), 60.0), ((-42, 40, 0), (24, 30, 44), 60.0), ((6, -4, 0), (42, 54, 44), 100.0)]
SIMPLE += [((-42, 40, 0), (14, 20, 32), 100.0), ((14, -12, 14), (12, 34, 9), 25.0), ((14, -12, -14), (12, 34, 9), 25.0)]
COARSE = Space((36, 40, 32), (4.0, 4.0, 4.0), (-74.0, -78.0, -62.0))
FLIPPED = Space(
    (30, 32, 40), (4.2, 4.4, 4.0), (62.0, -78.0, -61.0), ((0.0, -1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))
)


def simple_head(seed, space):
    """A head whose left and right are alike, a little stretched."""
    points = points_of(space) / (1 + np.random.default_rng(seed).normal(0, 0.03, 3))
    pixels = np.zeros(space.shape)
    for centre, axes, level in SIMPLE:
        pixels[(((points - centre) / np.array(axes)) ** 2).sum(axis=-1) < 1] = level
    noisy = pixels + np.random.default_rng(100 + seed).normal(0, 4, space.shape)
    return Volume(np.where(pixels > 0, np.maximum(noisy, 1), 0), space)


@pytest.mark.parametrize(("seed", "space"), [(7, FLIPPED), (6, COARSE)])
def test_a_long_first_step_neither_mirrors_nor_blows_up_the_brain(seed, space):
    found = align(simple_head(seed, space), make_template(simple_head(0, COARSE), 4.0))
    assert not found.failed and found.overlap > 0.95
    assert np.diag(found.transform.linear) == pytest.approx(np.ones(3), abs=0.15)
