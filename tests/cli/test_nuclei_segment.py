"""`limner nuclei segment` with a model that finds what is dark: what is written, resuming, bad input."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import ome_zarr_models
import pytest
import tifffile
import torch
from skimage.measure import label

import limner.cli.nuclei_results
from limner.cli import main
from limner.cli.nuclei_report import report_of
from limner.cli.nuclei_results import Found, on_pixels
from limner.io import read_objects, write_ome_zarr
from limner.io.ome_zarr import open_multiscales
from limner.io.outlines import fill_all
from limner.methods.partial_nuclei import to_model
from limner.model_file import ModelFile
from limner.space import Space
from limner.volume import Volume

PX = ("--um-per-px", "0.25")


@pytest.fixture
def model(tmp_path, dark_network, dark_settings):
    path = tmp_path / "models" / "dark.safetensors"
    path.parent.mkdir()
    to_model(dark_network, dark_settings, {}).write(path)
    return path


@pytest.fixture
def segment(model, tmp_path, capsys):
    """Runs the command; gives the exit status, stdout and stderr."""

    def run(images, *options, output=tmp_path / "out", model=model):
        capsys.readouterr()
        status = main(["nuclei", "segment", str(images), str(model), "-o", str(output), "--device", "cpu", *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def record_of(output):
    return json.loads((output / "run.json").read_text())


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def two_discs(shape=(60, 80), radius=9, at=((20, 20), (38, 60))):
    y, x = np.indices(shape)
    mask = np.any([(y - cy) ** 2 + (x - cx) ** 2 < radius**2 for cy, cx in at], axis=0)
    return np.where(mask[..., None], [60, 50, 90], [230, 220, 235]).astype(np.uint8), mask


def write_pyramid(path, image, um_per_px=0.25):
    """Tiled TIFF with levels of half the size each."""
    levels = [image]
    while max(levels[-1].shape) > 300:
        levels.append(levels[-1][::2, ::2])
    with tifffile.TiffWriter(path) as tif:
        for i, level in enumerate(levels):
            options = {"subifds": len(levels) - 1} if i == 0 else {"subfiletype": 1}
            centimetre = 1e4 / um_per_px / 2**i
            tif.write(
                level,
                tile=(128, 128),
                photometric="rgb",
                resolution=(centimetre, centimetre),
                resolutionunit="CENTIMETER",
                **options,
            )
    return path


def glass_around(image, width=450):
    return np.pad(image, [(width, width), (width, width), (0, 0)], constant_values=245)


def test_a_small_image(segment, tmp_path):
    image, mask = two_discs()
    iio.imwrite(tmp_path / "a.b.png", image)
    output = tmp_path / "out"
    status, out, _ = segment(tmp_path / "a.b.png", *PX, "--geojson", "--geojson-gz", "--probabilities", "--no-tissue")
    assert status == 0
    labels = iio.imread(output / "labels" / "a.b.png")
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, label(mask))
    area = mask.sum() / 2 / 16
    assert out.splitlines()[0] == f"a.b: 2 nuclei, {2 / (60 * 80 / 16e6):.0f} per mm2, median area {area:.1f} um2"
    rows = rows_of(output / "objects" / "a.b.csv")
    assert [(float(r["centroid_y_px"]), float(r["centroid_x_um"])) for r in rows] == [(20, 5.125), (38, 15.125)]
    assert all(float(r["mean_probability"]) > 0.98 and float(r["mean_haematoxylin"]) > 0 for r in rows)
    outlines = read_objects(output / "objects" / "a.b.geojson")
    np.testing.assert_array_equal(fill_all(outlines, [o.label for o in outlines], labels.shape), labels)
    content = json.loads((output / "objects" / "a.b.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    properties = content["features"][0]["properties"]
    assert (properties["objectType"], properties["classification"]["name"]) == ("detection", "Nucleus")
    assert properties["measurements"]["Area um^2"] == pytest.approx(area, abs=1e-4)
    unpacked = json.loads(gzip.decompress((output / "objects" / "a.b.geojson.gz").read_bytes()))
    assert [f["geometry"] for f in unpacked["features"]] == [f["geometry"] for f in content["features"]]
    probability = tifffile.imread(output / "probabilities" / "a.b.tif")
    assert probability.dtype == np.float32
    np.testing.assert_array_equal(probability > 0.5, mask)
    record = record_of(output)
    assert (record["status"], record["images"]["a.b"]["count"]) == ("complete", 2)
    assert sorted(record["outputs"]) == [
        "labels/a.b.png",
        "objects/a.b.csv",
        "objects/a.b.geojson",
        "objects/a.b.geojson.gz",
        "probabilities/a.b.tif",
        "report.html",
    ]


def test_labels_come_on_the_images_own_pixels(segment, tmp_path):
    image, mask = two_discs((120, 160), 18, ((40, 40), (76, 120)))
    iio.imwrite(tmp_path / "a.png", image)
    status, out, _ = segment(tmp_path / "a.png", "--um-per-px", "0.125", "--geojson", "--no-tissue")
    assert status == 0
    labels = iio.imread(tmp_path / "out" / "labels" / "a.png")
    assert labels.shape == mask.shape
    assert ((labels > 0) != mask).mean() < 0.01
    assert f"{2 / (120 * 160 / 64e6):.0f} per mm2" in out
    rows = rows_of(tmp_path / "out" / "objects" / "a.csv")
    assert [float(r["centroid_y_px"]) for r in rows] == pytest.approx([40, 76], abs=0.3)
    assert float(rows[0]["area_um2"]) == pytest.approx((labels == 1).sum() / 64, abs=1e-4)
    outlines = read_objects(tmp_path / "out" / "objects" / "a.geojson")
    np.testing.assert_array_equal(fill_all(outlines, [o.label for o in outlines], labels.shape), labels)


def test_nearest_pixels_by_hand():
    np.testing.assert_array_equal(on_pixels(np.arange(6).reshape(1, 6), (1, 3)), [[1, 3, 5]])
    np.testing.assert_array_equal(on_pixels(np.arange(2).reshape(2, 1), (5, 1)).ravel(), [0, 0, 1, 1, 1])


@pytest.mark.filterwarnings("default:.*um2 in the median")
@pytest.mark.parametrize(("trained", "warned"), [(15.0, False), (40.0, True), (6.0, True)])
def test_nuclei_unlike_those_trained_on_are_named(segment, tmp_path, dark_network, dark_settings, trained, warned):
    path = tmp_path / "other.safetensors"
    to_model(dark_network, dark_settings, {"median_area_um2": trained}).write(path)
    iio.imwrite(tmp_path / "a.png", two_discs()[0])
    status, _, err = segment(tmp_path / "a.png", *PX, model=path)
    assert (status, "check the pixel size" in err) == (0, warned)


def test_nuclei_per_mm2_are_those_of_tissue(segment, tmp_path):
    image, mask = two_discs((400, 400), 9)
    pixels = np.full((400, 400, 3), 250, np.uint8)
    pixels[:, :200] = (225, 190, 215)
    pixels[mask] = image[mask]
    iio.imwrite(tmp_path / "a.png", pixels)
    assert segment(tmp_path / "a.png", *PX)[0] == 0
    assert record_of(tmp_path / "out")["images"]["a"]["mm2"] == pytest.approx(400 * 200 / 16e6, rel=0.05)


@pytest.mark.filterwarnings("default:.*is grey")
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("grey.png", lambda image: image[..., 1]),
        ("rgba.png", lambda image: np.concatenate([image, np.full((*image.shape[:2], 1), 255, np.uint8)], axis=-1)),
        ("deep.tif", lambda image: image.astype(np.uint16) * 257),
        ("deep grey.tif", lambda image: image[..., 1].astype(np.uint16) * 257),
    ],
)
def test_pixels_of_other_kinds(segment, tmp_path, name, make):
    image, mask = two_discs()
    (iio.imwrite if name.endswith("png") else tifffile.imwrite)(tmp_path / name, make(image))
    status, _, err = segment(tmp_path / name, *PX)
    assert (status, f"{name} is grey: haematoxylin cannot" in err) == (0, "grey" in name)
    np.testing.assert_array_equal(iio.imread(tmp_path / "out" / "labels" / f"{Path(name).stem}.png"), label(mask))


def test_an_ome_zarr_that_states_its_pixel_size(segment, tmp_path):
    image, mask = two_discs()
    write_ome_zarr(tmp_path / "a.ome.zarr", Volume(image[np.newaxis], Space((1, *mask.shape), (1.0, 0.00025, 0.00025))))
    status, *_ = segment(tmp_path / "a.ome.zarr")
    assert status == 0
    np.testing.assert_array_equal(iio.imread(tmp_path / "out" / "labels" / "a.png"), label(mask))
    assert segment(tmp_path, output=tmp_path.parent / "all")[1].splitlines()[-1] == "2 nuclei in 1 of 1 images."


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_slide(segment, tmp_path, blobs, version):
    """A pyramid at twice the model's magnification: labels at the model's pixels, outlines at the slide's."""
    image = glass_around(np.kron(blobs((500, 450), 90), np.ones((2, 2, 1), np.uint8)), 1200)
    path = write_pyramid(tmp_path / "slide.tif", image, 0.125)
    options = ("--tile", "448", "--geojson", "--probabilities", "--ngff-version", version, "--table", "parquet")
    status, out, err = segment(path, *options)
    assert status == 0, err
    output = tmp_path / "out"
    opened = open_multiscales(output / "labels" / "slide.ome.zarr")
    labels = opened.arrays[0][...]
    assert (opened.version, opened.spacings[0][1:]) == (version, (0.00025, 0.00025))
    assert labels.shape == (image.shape[0] // 2, image.shape[1] // 2)
    dark = image[::2, ::2].mean(axis=-1) < 127.5
    assert ((labels > 0) == dark).mean() > 0.999
    ome_zarr_models.open_ome_zarr(str(output / "labels" / "slide.ome.zarr"), version=version)
    probability = open_multiscales(output / "probabilities" / "slide.ome.zarr").arrays[0][...]
    np.testing.assert_array_equal(probability > 127, dark)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(output / "objects" / "slide.parquet").to_pydict()
    assert sorted(table["label"]) == list(range(1, labels.max() + 1))
    assert len(table["label"]) > 30
    outlines = read_objects(output / "objects" / "slide.geojson")
    filled = fill_all(outlines, [o.label for o in outlines], image.shape[:2])
    np.testing.assert_array_equal(filled[::2, ::2] > 0, labels > 0)
    tissue = record_of(output)["images"]["slide"]["mm2"]
    assert dark.sum() < tissue * 16e6 < 500 * 450
    assert out.startswith(f"slide: {labels.max()} nuclei, ")
    n_tiles = len(list((output / ".resume" / "tiles" / "slide").glob("*.npz")))
    assert 4 <= n_tiles < 40  # of 144: the others are glass


@pytest.mark.slow
def test_a_stopped_slide_goes_on_where_it_stopped(segment, tmp_path, blobs, monkeypatch):
    image = glass_around(blobs((600, 700), 200))
    path = write_pyramid(tmp_path / "slide.tif", image)
    at_once = segment(path, "--tile", "448", output=tmp_path / "at once")
    separate, calls, most = limner.cli.nuclei_results.separate, [], 5

    def stopping(*given):
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(1)
        return separate(*given)

    monkeypatch.setattr(limner.cli.nuclei_results, "separate", stopping)
    status, _, err = segment(path, "--tile", "448")
    assert (status, "the same command goes on" in err) == (130, True)
    assert not (tmp_path / "out" / "labels").exists()
    assert record_of(tmp_path / "out")["status"] == "running"
    tiles = tmp_path / "out" / ".resume" / "tiles" / "slide"
    n_tiles = len(list((tmp_path / "at once" / ".resume" / "tiles" / "slide").glob("*.npz")))
    assert len(list(tiles.glob("*.npz"))) == 5
    most = 10**6
    again = segment(path, "--tile", "448")
    assert again[:2] == at_once[:2]
    assert len(calls) == n_tiles > 10
    for part in ("objects/slide.csv", "labels/slide.ome.zarr/0/c/0/0"):
        assert (tmp_path / "out" / part).read_bytes() == (tmp_path / "at once" / part).read_bytes()
    assert segment(path, "--tile", "448", "--geojson")[0] == 0  # from the tiles that are there
    assert len(calls) == n_tiles
    assert len(read_objects(tmp_path / "out" / "objects" / "slide.geojson")) > 50


@pytest.mark.slow
def test_a_run_stopped_while_results_are_written_goes_on(segment, tmp_path, blobs, monkeypatch):
    path = write_pyramid(tmp_path / "slide.tif", glass_around(blobs((400, 400), 90)))
    measure = limner.cli.nuclei_results.measure

    def stopping(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(limner.cli.nuclei_results, "measure", stopping)
    assert segment(path)[0] == 130
    monkeypatch.setattr(limner.cli.nuclei_results, "measure", measure)
    status, out, _ = segment(path)
    assert status == 0
    assert "nuclei" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".resume",
        "labels",
        "objects",
        "report.html",
        "run.json",
    ]


def folder_of(tmp_path, *names):
    folder = tmp_path / "images"
    folder.mkdir()
    image, _ = two_discs()
    for name in names:
        iio.imwrite(folder / name, image)
    (folder / "notes.txt").write_text("about these")
    return folder


def test_finished_images_of_a_batch_are_passed_over(segment, tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "a.png", "b.png")
    search, searched = limner.cli.nuclei_results.search, []

    def counted(slide, *rest):
        searched.append(slide.path.name)
        if slide.path.name == stop_at:
            raise KeyboardInterrupt
        return search(slide, *rest)

    monkeypatch.setattr("limner.cli.nuclei_segment.search", counted)
    stop_at = "b.png"
    assert segment(folder, *PX)[0] == 130
    stop_at = ""
    status, out, _ = segment(folder, *PX)
    assert status == 0
    assert searched == ["a.png", "b.png", "b.png"]
    assert [line.split(",")[0] for line in out.splitlines()] == [
        "a: 2 nuclei",
        "b: 2 nuclei",
        "4 nuclei in 2 of 2 images.",
    ]
    iio.imwrite(folder / "c.png", two_discs()[0])
    iio.imwrite(folder / "a.png", two_discs(at=((30, 40),))[0])
    status, out, _ = segment(folder, *PX)
    assert status == 0
    assert searched[3:] == ["a.png", "c.png"]  # one is another now, one is new
    assert out.splitlines()[-1] == "5 nuclei in 3 of 3 images."
    (tmp_path / "out" / "objects" / "b.csv").unlink()
    assert segment(folder, *PX)[0] == 0
    assert searched[5:] == ["b.png"]
    assert (tmp_path / "out" / "objects" / "b.csv").exists()


def test_other_settings_and_files_changed_by_hand_need_overwrite(segment, tmp_path):
    folder = folder_of(tmp_path, "a.png")
    output = tmp_path / "out"
    assert segment(folder, *PX, "--geojson")[0] == 0
    status, _, err = segment(folder, *PX, "--no-split")
    assert (status, "holds a run that differs in split" in err) == (2, True)
    (output / "labels" / "a.png").write_bytes(b"a user's")
    status, _, err = segment(folder, *PX, "--geojson")
    assert (status, "labels/a.png was changed since Limner wrote it" in err) == (2, True)
    (output / "labels" / "b.png").write_bytes(b"a user's")
    assert segment(folder, *PX, "--no-split", "--overwrite")[0] == 0
    assert iio.imread(output / "labels" / "a.png").max() == 2
    assert not (output / "objects" / "a.geojson").exists()  # of the run that was replaced
    iio.imwrite(folder / "b.png", two_discs()[0])
    status, _, err = segment(folder, *PX, "--no-split")
    assert status == 3
    assert "labels/b.png was not written by Limner" in err
    assert (output / "labels" / "b.png").read_bytes() == b"a user's"


@pytest.mark.slow
def test_a_slide_that_is_replaced_holds_nothing_of_the_earlier_run(segment, tmp_path):
    """zarr writes no chunk that is empty: one of the earlier run would stay in its place."""
    image, _ = two_discs((2200, 2200), 12, ((100, 100), (100, 2000)))
    image[1900:1907, 1900:1907] = 40  # small, alone in its chunk
    path = write_pyramid(tmp_path / "slide.tif", image)
    assert "3 nuclei" in segment(path, "--no-tissue", "--least-um2", "1")[1]
    status, out, _ = segment(path, "--no-tissue", "--least-um2", "10", "--overwrite")
    assert (status, "2 nuclei" in out) == (0, True)
    levels = open_multiscales(tmp_path / "out" / "labels" / "slide.ome.zarr").arrays
    assert [np.unique(level[...]).tolist() for level in levels] == [[0, 1, 2]] * len(levels)


def test_a_run_that_replaces_another_and_is_stopped_leaves_nothing_of_it(segment, tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "a.png", "b.png")
    assert segment(folder, *PX, "--geojson")[0] == 0
    search = limner.cli.nuclei_results.search

    def stopping(slide, *rest):
        if slide.path.name == "b.png":
            raise KeyboardInterrupt
        return search(slide, *rest)

    monkeypatch.setattr("limner.cli.nuclei_segment.search", stopping)
    assert segment(folder, *PX, "--no-split", "--overwrite")[0] == 130
    monkeypatch.setattr("limner.cli.nuclei_segment.search", search)
    assert segment(folder, *PX, "--no-split")[0] == 0
    assert sorted(p.name for p in (tmp_path / "out" / "objects").iterdir()) == ["a.csv", "b.csv"]
    assert sorted(record_of(tmp_path / "out")["outputs"]) == [
        *("labels/a.png", "labels/b.png", "objects/a.csv", "objects/b.csv", "report.html")
    ]


def test_another_image_of_the_same_name_needs_overwrite(segment, tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png")
    assert segment(folder, *PX)[0] == 0
    (tmp_path / "others").mkdir()
    iio.imwrite(tmp_path / "others" / "a.png", two_discs(at=((30, 40),))[0])
    status, _, err = segment(tmp_path / "others", *PX)
    assert (status, "holds results of another image called a, " in err) == (2, True)
    assert iio.imread(tmp_path / "out" / "labels" / "a.png").max() == 2
    assert segment(tmp_path / "others", *PX, "--overwrite")[0] == 0
    assert iio.imread(tmp_path / "out" / "labels" / "a.png").max() == 1
    assert "b.png" in (tmp_path / "out" / "report.html").read_text()  # its results are still there
    (tmp_path / "moved").mkdir()
    (folder / "b.png").rename(tmp_path / "moved" / "b.png")
    assert segment(tmp_path / "moved", *PX)[0] == 0  # the same image elsewhere


def test_what_was_found_stays_when_an_image_can_no_longer_be_read(segment, tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png")
    assert segment(folder, *PX)[0] == 0
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[:60])
    assert segment(folder, *PX)[0] == 3
    assert iio.imread(tmp_path / "out" / "labels" / "b.png").max() == 2
    (folder / "b.png").write_bytes(whole)
    assert segment(folder, *PX)[0] == 0
    assert "problem" not in record_of(tmp_path / "out")["images"]["b"]


def test_an_image_that_the_network_sees_much_larger_is_streamed(segment, tmp_path, monkeypatch):
    image, _ = two_discs((60, 80), 9)
    iio.imwrite(tmp_path / "a.png", image)
    monkeypatch.setattr(limner.cli.nuclei_results, "LARGEST_IN_MEMORY", 10_000)
    assert segment(tmp_path / "a.png", "--um-per-px", "0.5", "--no-tissue")[0] == 0  # 120 x 160 to the network
    assert (tmp_path / "out" / "labels" / "a.ome.zarr").is_dir()


def test_a_damaged_image_is_named_and_the_others_go_on(segment, tmp_path):
    folder = folder_of(tmp_path, "a.png", "c.png")
    slide = folder / "b.tif"  # its pages can be listed, its last tiles cannot be read
    noise = np.random.default_rng(0).integers(0, 200, (500, 500, 3)).astype(np.uint8)
    tifffile.imwrite(slide, noise, tile=(128, 128), photometric="rgb", compression="zlib")
    slide.write_bytes(slide.read_bytes()[:-2000])
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes()[:60])
    status, out, err = segment(folder, *PX, "--no-tissue")
    assert status == 3
    assert "b.tif cannot be read" in err
    assert "d.png cannot be read" in err
    assert [line[:2] for line in out.splitlines()] == ["a:", "c:", "4 "]
    images = record_of(tmp_path / "out")["images"]
    assert {name for name, entry in images.items() if "problem" in entry} == {"b", "d"}
    iio.imwrite(folder / "d.png", two_discs()[0])
    slide.unlink()
    status, out, _ = segment(folder, *PX, "--no-tissue")
    assert (status, out.splitlines()[-1]) == (0, "6 nuclei in 3 of 3 images.")


@pytest.mark.filterwarnings("default:.*is grey")
def test_a_slide_of_glass_is_named(segment, tmp_path):
    folder = folder_of(tmp_path, "a.png")
    glass = write_pyramid(folder / "glass.tif", np.full((700, 700, 3), 240, np.uint8))
    status, _, err = segment(glass)
    assert (status, f"--tissue: {glass} shows no tissue" in err) == (2, True)
    assert segment(folder, *PX, output=tmp_path / "both")[0] == 3
    status, out, _ = segment(glass, "--no-tissue", output=tmp_path / "everywhere")
    assert (status, out.splitlines()[0]) == (0, "glass: no nuclei on 0.0306 mm2")


def test_faults_found_before_anything_is_written(segment, tmp_path, model):
    folder = folder_of(tmp_path, "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "broken.png").write_bytes(b"none")
    other = tmp_path / "models" / "membranes.safetensors"
    ModelFile("membranes", {"w": torch.ones(2)}, {}, 0.25).write(other)
    damaged = tmp_path / "models" / "damaged.safetensors"
    damaged.write_bytes(model.read_bytes()[:-100])
    image = folder / "a.png"
    for images, options, given, message in (
        (image, (), model, f"--um-per-px: {image} does not state its pixel size; give it in micrometres"),
        (image, ("--um-per-px", "-1"), model, "--um-per-px: -1.0 is no pixel size"),
        (tmp_path / "none.png", PX, model, "none.png does not exist"),
        (tmp_path / "notes.txt", PX, model, "notes.txt is of no known format"),
        (tmp_path / "broken.png", PX, model, "broken.png cannot be read"),
        (tmp_path / "empty", PX, model, "empty holds no image"),
        (image, PX, other, "is a model for membranes; give one for nuclei"),
        (image, PX, damaged, "damaged.safetensors cannot be read"),
        (image, PX, tmp_path / "none.safetensors", "none.safetensors does not exist"),
        (image, (*PX, "--tile", "1000"), model, "--tile: a window of 1000 does not fit"),
        (image, (*PX, "--jobs", "0"), model, "--jobs: 0 is below 1"),
        (image, (*PX, "--neck-um", "0"), model, "--neck-um: 0.0 is no depth"),
        (image, (*PX, "--hole-um2", "inf"), model, "--hole-um2: inf is out of range"),
        (image, (*PX, "--least-um2", "-1"), model, "--least-um2: -1.0 is out of range"),
    ):
        status, out, err = segment(images, *options, model=given)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    for output in (folder, folder / "out", tmp_path):
        status, _, err = segment(folder, *PX, output=output)
        assert (status, "--output: " in err) == (2, True)
    tifffile.imwrite(folder / "A.ome.tif", np.zeros((9, 9), np.uint8))
    status, _, err = segment(folder, *PX)
    assert (status, "would both have results called" in err) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default")  # of distributed's own making
@pytest.mark.slow
def test_a_cluster_finds_the_same(segment, tmp_path, blobs):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    iio.imwrite(tmp_path / "a.png", blobs((500, 420), 90))
    options = (*PX, "--tile", "448")
    assert segment(tmp_path / "a.png", *options, output=tmp_path / "here")[0] == 0
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        assert segment(tmp_path / "a.png", *options, "--scheduler", address, output=tmp_path / "there")[0] == 0
    for part in ("labels/a.png", "objects/a.csv"):
        assert (tmp_path / "here" / part).read_bytes() == (tmp_path / "there" / part).read_bytes()


@pytest.mark.filterwarnings("default")  # of distributed's own making
def test_a_cluster_that_is_not_there(segment, tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="distributed is not installed")
    monkeypatch.setattr("limner.cli.cluster.SECONDS_TO_ANSWER", 0.2)
    iio.imwrite(tmp_path / "a.png", two_discs()[0])
    for address in ("tcp://127.0.0.1:1", "nowhere"):
        status, out, err = segment(tmp_path / "a.png", *PX, "--scheduler", address)
        assert (status, out) == (2, "")
        assert f"--scheduler: {address} does not answer" in err
    assert not (tmp_path / "out").exists()


def test_the_papers_windows_find_the_same(segment, tmp_path, blobs):
    iio.imwrite(tmp_path / "a.png", blobs((300, 420), 60))
    assert segment(tmp_path / "a.png", *PX, output=tmp_path / "exact")[0] == 0
    assert segment(tmp_path / "a.png", *PX, "--windows", "paper", output=tmp_path / "paper")[0] == 0
    exact, paper = (iio.imread(tmp_path / name / "labels" / "a.png") for name in ("exact", "paper"))
    assert ((exact > 0) == (paper > 0)).mean() > 0.999
    assert len(list((tmp_path / "paper" / ".resume" / "tiles" / "a").glob("*.npz"))) == 6


def test_more_nuclei_than_16_bit_hold(tmp_path):
    ids = np.zeros((2, 3), np.int32)
    ids[1, 2] = 65536
    path = limner.cli.nuclei_results._write_label_image(tmp_path, "a", ids)
    assert (path.name, tifffile.imread(path).dtype, tifffile.imread(path)[1, 2]) == ("a.tif", np.uint32, 65536)


@pytest.mark.slow
def test_what_the_report_is_made_from(segment, tmp_path, blobs):
    folder = folder_of(tmp_path, "a.png")
    (folder / "b.png").write_bytes(b"none")
    tissue = glass_around(blobs((500, 400), 90), 800)
    write_pyramid(folder / "slide.tif", tissue)
    assert segment(folder, *PX)[0] == 3
    entries = record_of(tmp_path / "out")["images"]
    found = {n: e["problem"] if "problem" in e else Found.from_entry(e) for n, e in entries.items()}
    images = {path.stem: path for path in folder.iterdir()}
    reports = {Path(r.name).stem: r for r in report_of(tmp_path / "out", found, images, 0.25)}
    assert "b.png cannot be read" in reports["b"].problem
    small, slide = reports["a"], reports["slide"]
    assert (small.count, len(small.areas_um2), [view.title for view in small.views]) == (2, 2, ["whole image"])
    assert slide.views[0].title == "overview"
    assert len(slide.views) == 4
    assert len(slide.areas_um2) == slide.count > 50
    for view in slide.views:
        assert view.image.shape[:2] == view.labels.shape
        assert (view.image[view.labels > 0].mean() < 150) == bool(view.labels.any())
