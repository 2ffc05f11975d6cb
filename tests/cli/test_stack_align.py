"""`limner stack align`: what is written, in which form, labels there and back, bad input."""

import csv
import json
import re

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from scipy import ndimage

from limner.cli import main, stack_align
from limner.io import open_sections, read, write_result
from limner.space import Space
from limner.volume import Volume

N, SHAPE, SPACING = 5, (60, 70), (0.05, 0.02, 0.02)
DIRECTION = ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


@pytest.fixture(scope="module")
def sections():
    """Sections of bright, unsymmetric tissue that each lie differently, their labels and their brightness."""
    rng = np.random.default_rng(0)
    texture = ndimage.gaussian_filter(rng.normal(0, 1, (N, *SHAPE)), (2.0, 3.0, 3.0))
    y, x = np.indices(SHAPE)
    down, right = (y - 29) / 15, (x - 35) / 17
    inside = down**2 + right**2 * (1 + 0.5 * down) + 0.25 * right < 1
    grey = inside * (120 + 35 * texture / texture.std())
    labels = np.broadcast_to(inside * np.where(right > 0.2, 300, 2), grey.shape)
    placed, placed_labels = [], []
    for z in range(N):
        angle, shift = rng.uniform(-12, 12), rng.uniform(-4, 4, 2)
        for array, order, made in ((grey[z], 1, placed), (labels[z], 0, placed_labels)):
            turned = ndimage.rotate(array, angle, reshape=False, order=order)
            made.append(ndimage.shift(turned, shift, order=order))
    images = np.stack(placed) * rng.uniform(0.8, 1.2, (N, 1, 1))
    return images.clip(0, 255).astype(np.uint8), np.stack(placed_labels).astype(np.uint16)


def overlap(labels):
    """Mean Dice of the tissue of neighbours."""
    pairs = [(labels[z] > 0, labels[z + 1] > 0) for z in range(len(labels) - 1)]
    return np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs])


def table(folder):
    with (folder / "transforms.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def write_volume(folder, name, pixels):
    space = Space(pixels.shape, SPACING, (1.0, 2.0, 3.0), DIRECTION)
    return write_result(folder, name, pixels, Volume(np.zeros(space.shape), space))


def test_a_volume_and_its_labels_are_aligned_and_come_back(tmp_path, sections, capsys):
    images, labels = sections
    image_file, label_file = write_volume(tmp_path, "i", images), write_volume(tmp_path, "l", labels)
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(["stack", "align", str(image_file), "--labels", str(label_file), "-o", str(out)]) == 0
    assert "5 sections aligned" in capsys.readouterr().out
    aligned, moved = read(out / "images.nii.gz"), read(out / "labels.nii.gz")
    assert aligned.pixels.dtype == np.uint8
    assert moved.pixels.dtype == np.uint16
    assert overlap(labels) < 0.9 < 0.96 < overlap(moved.pixels)
    assert aligned.space.direction == DIRECTION
    assert set(np.unique(moved.pixels)) == {0, 2, 300}
    # labels lie on the tissue of the aligned images
    assert np.mean((moved.pixels > 0) == (aligned.pixels > 30)) > 0.97
    again = ["--transforms", str(out / "transforms.csv"), "--back", str(out / "labels.nii.gz"), "-o", str(back)]
    assert main(["stack", "align", str(image_file), *again]) == 0
    returned = read(back / "labels.nii.gz")
    assert returned.space == read(image_file).space
    assert np.mean(returned.pixels == labels) > 0.98
    assert sorted(p.name for p in back.iterdir() if not p.name.startswith(".")) == ["labels.nii.gz", "run.json"]
    assert main(["stack", "align", str(image_file), *again]) == 0
    assert "already complete" in capsys.readouterr().out


def write_folder(folder, images, labels, colour):
    """Sections of two sizes, and labels of two of them."""
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for z in range(N):
        cut = np.s_[:, :] if z % 2 else np.s_[2:-2, 1:-1]
        pixels = images[z][cut]
        rgb = np.stack([255 - pixels, 255 - pixels // 2, 255 - pixels // 3], axis=-1)
        iio.imwrite(folder / "images" / f"s{z}.png", rgb if colour else pixels)
        if z in (0, 3):
            iio.imwrite(folder / "labels" / f"s{z}.png", labels[z][cut])
    return str(folder / "images"), str(folder / "labels")


@pytest.mark.parametrize("colour", [False, True])
def test_a_folder_of_sections_of_different_sizes(tmp_path, sections, colour):
    images, labels = write_folder(tmp_path, *sections, colour)
    out, back = tmp_path / "out", tmp_path / "back"
    spacing = ["--spacing", "0.05,0.02,0.02"]
    assert main(["stack", "align", images, "--labels", labels, *spacing, "-o", str(out)]) == 0
    stack = open_sections(out / "images")
    assert stack.names == tuple(f"s{z}.png" for z in range(N))
    assert len({section.shape for section in stack}) == 1
    tissue = [s.pixels()[..., 0] < 225 if colour else s.pixels() > 30 for s in stack]
    assert overlap(np.stack(tissue)) > 0.96
    if colour:  # what was turned in from outside is glass
        assert min(section.pixels()[0, 0].min() for section in stack) > 240
    assert sorted(p.name for p in (out / "labels").iterdir()) == ["s0.png", "s3.png"]
    given = ["--transforms", str(out / "transforms.csv"), "--back", str(out / "labels")]
    assert main(["stack", "align", images, *given, *spacing, "-o", str(back)]) == 0
    for name in ("s0.png", "s3.png"):
        returned, own = iio.imread(back / "labels" / name), iio.imread(tmp_path / "labels" / name)
        assert returned.shape == own.shape
        assert np.mean(returned == own) > 0.98


@pytest.mark.parametrize("kind", ["folder", "file", "folder for a file"])
def test_labels_come_back_with_one_section_in_memory_at_a_time(tmp_path, sections, kind, monkeypatch):
    """What is read is written before the next is read, but for the look at all of them at the beginning."""
    images, labels = sections
    where, rows = tmp_path / "aligned", "\n".join(f"{z},{3 * z},0.02,0,0" for z in range(N))
    (tmp_path / "t.csv").write_text(f"section,rotation_deg,shift_y_mm,shift_x_mm,mirrored\n{rows}\n")
    if kind == "folder":
        write_folder(tmp_path, *sections, colour=False)
        rows = "\n".join(f"s{z}.png,{3 * z},0.02,0,0" for z in range(N))
        (tmp_path / "t.csv").write_text(f"section,rotation_deg,shift_y_mm,shift_x_mm,mirrored\n{rows}\n")
    else:
        tifffile.imwrite(tmp_path / "images.tif", images, photometric="minisblack")
    where.mkdir()
    for z in range(N):
        iio.imwrite(where / f"s{z}.png", labels[z])
    if kind == "file":
        where = tmp_path / "aligned.tif"
        tifffile.imwrite(where, labels, photometric="minisblack")
    events = []
    opened, made = stack_align.open_aligned_labels, stack_align.moved

    def noted(*arguments):
        found = opened(*arguments)
        return {z: lambda z=z: events.append(f"read {z}") or found[z]() for z in found}

    def moving(*arguments, **more):
        events.append("moved")
        return made(*arguments, **more)

    monkeypatch.setattr(stack_align, "open_aligned_labels", noted)
    monkeypatch.setattr(stack_align, "moved", moving)
    stack = str(tmp_path / ("images" if kind == "folder" else "images.tif"))
    given = ["--transforms", str(tmp_path / "t.csv"), "--back", str(where), "--spacing", "0.05,0.02,0.02"]
    assert main(["stack", "align", stack, *given, "-o", str(tmp_path / "back")]) == 0
    assert events[:N] == [f"read {z}" for z in range(N)]
    assert events[N:] == [event for z in range(N) for event in (f"read {z}", "moved")]
    if kind == "folder":
        first = iio.imread(tmp_path / "back" / "labels" / "s0.png")
    else:
        first = tifffile.imread(tmp_path / "back" / "labels.tif")[0]
    shifted = np.roll(labels[0], 1, axis=0)  # not turned, and one pixel up on the way there
    assert np.array_equal(first, shifted if first.shape == SHAPE else shifted[2:-2, 1:-1])


def test_turned_sections_are_set_right_or_kept(tmp_path, sections, capsys):
    images = sections[0].copy()
    images[2] = images[2, ::-1, ::-1]
    images[3] = images[3, :, ::-1]
    tifffile.imwrite(tmp_path / "a.tif", images, photometric="minisblack")
    command = ["stack", "align", str(tmp_path / "a.tif"), "--spacing", "0.05,0.02,0.02", "-o"]
    assert main([*command, str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "Note: Section 2 is turned by 180 degrees; set right." in printed
    assert "Note: Section 3 is mirrored left to right; set right." in printed
    rows = table(tmp_path / "out")
    assert [row["mirrored"] for row in rows] == ["0", "0", "0", "1", "0"]
    assert abs(float(rows[2]["rotation_deg"])) > 150
    assert max(abs(float(rows[z]["rotation_deg"])) for z in (0, 1, 3, 4)) < 30
    assert overlap(tifffile.imread(tmp_path / "out" / "images.tif") > 30) > 0.96
    assert main([*command, str(tmp_path / "kept"), "--keep-orientation"]) == 0
    rows = table(tmp_path / "kept")
    assert {row["mirrored"] for row in rows} == {"0"}
    assert abs(float(rows[2]["rotation_deg"])) < 90


def test_no_tissue_is_cut_off(tmp_path):
    """Sections with tissue in a corner each: the canvas grows, and the file says where it begins."""
    images = np.zeros((3, 40, 50), np.uint8)
    images[0, :18, :24], images[1, :18, :24], images[2, :18, :24] = 200, 190, 210
    images[:, 5:9, 4:14] = 90
    file = write_volume(tmp_path, "i", images)
    lines = ["section,rotation_deg,shift_y_mm,shift_x_mm,mirrored"]
    # the aligned middle is found further down and right: what is up and left goes beyond the border
    lines += [f"{z},0,{0.1 if z else 0},{0.2 if z else 0},0" for z in range(3)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    assert main(["stack", "align", str(file), "--transforms", str(tmp_path / "t.csv"), "-o", str(out)]) == 0
    before, after = read(file), read(out / "images.nii.gz")
    assert (after.pixels > 50).sum(axis=(1, 2)).tolist() == (images > 50).sum(axis=(1, 2)).tolist()
    grown = [new - old for new, old in zip(after.space.shape, before.space.shape, strict=True)]
    assert grown[0] == 0
    assert all(n >= 10 and n % 2 == 0 for n in grown[1:])
    # the first section was not moved: its first tissue pixel lies at the same place in space
    at = np.argwhere(after.pixels[0] > 50)[0]
    direction, step = np.array(DIRECTION), np.array(SPACING)
    place = np.array(after.space.origin) + direction @ (np.array([0, *at]) * step)
    np.testing.assert_allclose(place, before.space.origin, atol=1e-6)


def test_a_run_with_labels_is_noted(tmp_path, sections):
    file = write_volume(tmp_path, "i", sections[0])
    assert main(["stack", "align", str(file), "--max-angle", "20", "-o", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["settings"]["max_angle"] == 20
    assert set(record["outputs"]) == {"images.nii.gz", "transforms.csv"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-angle", "60"], "--max-angle: 60 is out of range"),
        (["--back", "i.nii.gz"], "--back: give the transforms"),
        (["--transforms", "t.csv"], "has no column rotation_deg"),
        (["--labels", "small.nii.gz"], "has shape"),
        (["--transforms", "good.csv", "--back", "short.nii.gz"], "--back: .* has 2 sections"),
        (["--transforms", "good.csv", "--back", "small.nii.gz"], "--back: labels in small.nii.gz have shape"),
        (["--transforms", "good.csv", "--back", "i.nii.gz", "--labels", "i.nii.gz"], "labels go either way"),
    ],
)
def test_bad_input_is_told_and_nothing_written(tmp_path, sections, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_volume(tmp_path, "i", sections[0])
    write_volume(tmp_path, "small", sections[1][:, :20])
    write_volume(tmp_path, "short", sections[1][:2])
    (tmp_path / "t.csv").write_text("section\n0\n")
    rows = "\n".join(f"{z},0,0,0,0" for z in range(N))
    (tmp_path / "good.csv").write_text(f"section,rotation_deg,shift_y_mm,shift_x_mm,mirrored\n{rows}\n")
    assert main(["stack", "align", "i.nii.gz", *options, "-o", "out"]) == 2
    error = capsys.readouterr().err
    assert error.count("limner: error:") == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_one_kind_of_run_does_not_take_the_place_of_another(tmp_path, sections, capsys):
    file, labels = write_volume(tmp_path, "i", sections[0]), write_volume(tmp_path, "l", sections[1])
    out, table = str(tmp_path / "out"), tmp_path / "t.csv"
    assert main(["stack", "align", str(file), "--labels", str(labels), "-o", out]) == 0
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    table.write_bytes((tmp_path / "out" / "transforms.csv").read_bytes())
    aligned = tmp_path / "aligned.nii.gz"
    aligned.write_bytes((tmp_path / "out" / "labels.nii.gz").read_bytes())
    for options in ([], ["--transforms", str(table), "--back", str(aligned)]):
        assert main(["stack", "align", str(file), *options, "-o", out]) == 2
        assert "differs in" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files


def test_a_stack_without_spacing_is_told(tmp_path, sections, capsys):
    tifffile.imwrite(tmp_path / "a.tif", sections[0], photometric="minisblack")
    assert main(["stack", "align", str(tmp_path / "a.tif"), "-o", str(tmp_path / "out")]) == 2
    assert "states no spacing" in capsys.readouterr().err


def test_grey_and_colour_do_not_mix(tmp_path, sections, capsys):
    (tmp_path / "s").mkdir()
    iio.imwrite(tmp_path / "s" / "0.png", sections[0][0])
    iio.imwrite(tmp_path / "s" / "1.png", np.stack([sections[0][1]] * 3, axis=-1))
    assert main(["stack", "align", str(tmp_path / "s"), "--spacing", "1,1,1", "-o", str(tmp_path / "out")]) == 2
    assert "export all sections alike" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
