"""Images with some of their nuclei: which belongs to which, pixel size, and regions around what is annotated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from limner.io.annotated_images import CELL, open_annotated, pair_annotations
from limner.io.geojson import MEAN_PROBABILITY, GeoJsonStream
from limner.io.outlines import trace
from limner.io.slide import Level


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def square(x: float, y: float, side: float = 4, name: str | None = None) -> dict[str, Any]:
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    properties = {"classification": {"name": name}} if name else {}
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def save(path: Path, *features: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def image(path: Path, shape: tuple[int, ...] = (40, 60, 3), dtype: type = np.uint8) -> Path:
    iio.imwrite(path, np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype))
    return path


# ---- which belongs to which ---------------------------------------------------------------------------------------


def test_annotations_are_found_by_name(tmp_path: Path) -> None:
    images = touch(
        tmp_path / "images", "s10.svs", "s2.png", "c.ome.tif", "d.ome.tif", "lonely.tif", "notes.txt", ".s.png"
    )
    labels = touch(tmp_path / "labels", "s2.tif", "s10.geojson.gz", "c.geojson", "d.ome.tif.geojson", "readme.md")
    pairs, without = pair_annotations(images, labels)
    assert {a.name: b.name for a, b in pairs} == {
        "c.ome.tif": "c.geojson",
        "d.ome.tif": "d.ome.tif.geojson",
        "s2.png": "s2.tif",
        "s10.svs": "s10.geojson.gz",
    }
    assert [path.name for path in without] == ["lonely.tif"]


def test_two_files_are_a_pair_whatever_they_are_called(tmp_path: Path) -> None:
    folder = touch(tmp_path / "a", "image.png", "nuclei.geojson")
    files = (folder / "image.png", folder / "nuclei.geojson")
    assert pair_annotations(*files) == ([files], [])


def test_one_image_takes_its_own_annotation_out_of_a_folder(tmp_path: Path) -> None:
    folder = touch(tmp_path / "a", "x.png", "x.geojson", "y.geojson")
    assert pair_annotations(folder / "x.png", folder)[0] == [(folder / "x.png", folder / "x.geojson")]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (["a.png"], ["b.png"], r"b\.png is named like no image in .*the first is a\.png"),
        (["a.png"], [], r"holds no label images or GeoJSON files"),
        ([], ["a.png"], r"holds no images; give a folder"),
        (["a.png"], ["a.png", "a.geojson"], r"holds a\.geojson and a\.png for a\.png; keep one"),
        (["a.png", "a.tif"], ["a.geojson"], r"may belong to a\.png or a\.tif"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path: Path, images: list[str], labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^pair_annotations\(\): .*{message}"):
        pair_annotations(touch(tmp_path / "images", *images), touch(tmp_path / "labels", *labels))


def test_what_is_not_there_or_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none does not exist"):
        pair_annotations(tmp_path / "none", tmp_path)
    with pytest.raises(ValueError, match=r"a\.txt is of no known format"):
        pair_annotations(touch(tmp_path / "x", "a.txt") / "a.txt", tmp_path)
    with pytest.raises(ValueError, match=r"labels holds nothing for .*x\.png; name each annotation as its image"):
        pair_annotations(touch(tmp_path / "images", "x.png") / "x.png", touch(tmp_path / "labels", "y.png"))


# ---- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"), [((40, 60), np.uint8), ((40, 60, 4), np.uint8), ((40, 60), np.uint16), ((40, 60, 3), np.uint16)]
)
def test_grey_alpha_and_16_bit_become_rgb(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    path = tmp_path / "a.tif"
    pixels = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    tifffile.imwrite(path, pixels, photometric="minisblack" if len(shape) == 2 else "rgb")
    iio.imwrite(tmp_path / "l.png", np.arange(2400, dtype=np.uint8).reshape(40, 60) % 7)
    annotated = open_annotated(path, tmp_path / "l.png", 0.25, 0.25)
    found, labels = annotated.read(annotated.whole)
    assert (found.shape, found.dtype, labels.shape, labels.dtype) == ((40, 60, 3), np.uint8, (40, 60), np.int32)


def test_labels_and_outlines_are_brought_to_the_pixel_size(tmp_path: Path) -> None:
    """Pixels of 0.25 um to 0.5 um: a square of 8 at (16, 8) becomes one of 4 at (8, 4), whichever way it is given."""
    labels = np.zeros((40, 60), np.uint16)
    labels[16:24, 8:16] = 500
    tifffile.imwrite(tmp_path / "l.tif", labels)
    save(tmp_path / "l.geojson", square(8, 16, 8))
    for name, number in (("l.tif", 500), ("l.geojson", 1)):
        annotated = open_annotated(image(tmp_path / "a.png"), tmp_path / name, 0.5, 0.25)
        found = annotated.read(annotated.whole)[1]
        expected = np.zeros((20, 30), int)
        expected[8:12, 4:8] = number if name == "l.tif" else 1
        np.testing.assert_array_equal(found > 0, expected > 0)
        assert annotated.nuclei == 1


def test_regions_of_interest_and_ignored_classes_are_no_nuclei(tmp_path: Path) -> None:
    features = [square(0, 0), square(10, 0, name="Tumor"), square(20, 0, name="Ignore*"), square(0, 0, 39)]
    annotated = open_annotated(image(tmp_path / "a.png"), save(tmp_path / "a.geojson", *features), 2.0, 2.0)
    labels = annotated.read(annotated.whole)[1]
    assert (annotated.nuclei, annotated.passed_over) == (2, 2)  # 39 px are 78 um
    assert (labels[:4, :4] > 0).all()
    assert (labels[:4, 10:14] > 0).all()
    assert np.count_nonzero(labels) == 32


def test_what_limner_found_is_not_learnt_from(tmp_path: Path) -> None:
    labels = np.zeros((40, 60), np.int32)
    labels[5:12, 5:12], labels[20:30, 20:30] = 1, 2
    with GeoJsonStream(tmp_path / "found.geojson", class_name="Nucleus") as stream:
        stream.write(trace(labels), {label: {MEAN_PROBABILITY: 0.9} for label in (1, 2)})
    found = json.loads((tmp_path / "found.geojson").read_text())["features"]
    path = save(tmp_path / "a.geojson", *found, square(45, 5))
    annotated = open_annotated(image(tmp_path / "a.png"), path, 0.25, 0.25)
    assert (annotated.nuclei, annotated.passed_over) == (1, 2)


def test_of_a_cell_the_nucleus_is_taken(tmp_path: Path) -> None:
    cell = square(0, 0, 20) | {"nucleusGeometry": square(6, 8)["geometry"]}
    annotated = open_annotated(image(tmp_path / "a.png"), save(tmp_path / "a.geojson", cell), 0.25, 0.25)
    labels = annotated.read(annotated.whole)[1]
    assert (labels[8:12, 6:10] > 0).all()
    assert np.count_nonzero(labels) == 16


def test_a_mask_of_one_value_is_taken_apart(tmp_path: Path) -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[:4, :4] = mask[10:14, 10:14] = 255
    iio.imwrite(tmp_path / "m.png", mask)
    with pytest.warns(UserWarning, match=r"m\.png knows only one label, 255; each of its 2 connected parts"):
        annotated = open_annotated(image(tmp_path / "a.png"), tmp_path / "m.png", 0.25, 0.25)
    assert annotated.nuclei == 2
    assert set(np.unique(annotated.read(annotated.whole)[1])) == {0, 1, 2}


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    picture = image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has size \(30, 60\), its image a\.png \(40, 60\)"):
        open_annotated(picture, image(touch(tmp_path / "labels") / "a.png", (30, 60)), 0.25, 0.25)
    with pytest.raises(ValueError, match=r"colours\.png is RGB; export index labels"):
        open_annotated(picture, image(tmp_path / "colours.png"), 0.25, 0.25)
    outside = save(tmp_path / "a.geojson", square(0, 0), square(100, 7))
    with pytest.raises(ValueError, match=r"an outline of .*a\.geojson lies at y 7, x 100, outside a\.png of size"):
        open_annotated(picture, outside, 0.25, 0.25)
    with pytest.raises(ValueError, match=r"a\.png does not state its pixel size; .*--um-per-px"):
        open_annotated(picture, save(tmp_path / "b.geojson", square(0, 0)), 0.25)


# ---- regions ------------------------------------------------------------------------------------------------------


def of_slide(path: Path, monkeypatch: pytest.MonkeyPatch, *features: dict[str, Any], size: int = 20_000) -> Any:
    """An endless-looking slide of which no more than a region may be read at once."""

    def read(y0: int, y1: int, x0: int, x1: int) -> NDArray[np.uint8]:
        assert max(y1 - y0, x1 - x0) <= 4 * CELL
        return np.full((y1 - y0, x1 - x0, 3), 200, np.uint8)

    class Slide:
        um_per_px = (0.25, 0.25)
        shape = (size, size, 3)

        def at(self, _: float) -> Level:
            return Level(self.shape, (0.25, 0.25), (1.0, 1.0), read)

    monkeypatch.setattr("limner.io.annotated_images.open_slide", lambda *_: Slide())
    return open_annotated(path / "slide.svs", save(path / "slide.geojson", *features), 0.25)


def test_a_small_image_is_one_region(tmp_path: Path) -> None:
    annotated = open_annotated(image(tmp_path / "a.png"), save(tmp_path / "a.geojson", square(0, 0)), 0.25, 0.25)
    assert annotated.regions() == [annotated.whole]


def test_of_a_slide_regions_around_its_nuclei_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in a corner, one across the border of two cells, and a row of them longer than a region."""
    row = [square(5000 + 200 * i, 15_000, 20) for i in range(20)]
    annotated = of_slide(tmp_path, monkeypatch, square(19_990, 0, 10), square(2550, 2550, 20), *row)
    regions = annotated.regions()
    covered: set[int] = set()
    for region in regions:
        pixels, labels = annotated.read(region)
        assert pixels.shape[:2] == labels.shape == region.shape
        assert labels.any()
        covered |= set(np.unique(labels)) - {0}
    assert covered == set(range(1, 23))
    for i, a in enumerate(regions):
        for b in regions[i + 1 :]:
            assert 0 in a.intersection(b).shape
    lone = next(r for r in regions if r.top < 2550 < r.bottom)
    assert (lone.top, lone.bottom, lone.left, lone.right) == (8 * CELL, 12 * CELL, 8 * CELL, 12 * CELL)
    labels = annotated.labels_of(lone)
    assert np.count_nonzero(labels) == 400
    assert labels[2550 - lone.top, 2550 - lone.left] == 2


def test_no_more_regions_than_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = [square(x, y, 10) for x in range(0, 20_000, 2000) for y in range(0, 20_000, 2000)]
    annotated = of_slide(tmp_path, monkeypatch, *everywhere)
    regions = annotated.regions(most=10)
    assert len(set(regions)) == 10
    assert regions[0].top == 0
    assert regions[-1].bottom > 18_000


def test_a_large_label_image_is_cut_likewise(tmp_path: Path) -> None:
    labels = np.zeros((1100, 2000), np.uint16)
    labels[1090:1100, 1990:2000] = 9
    tifffile.imwrite(tmp_path / "l.tif", labels)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((1100, 2000, 3), np.uint8), photometric="rgb")
    annotated = open_annotated(tmp_path / "a.tif", tmp_path / "l.tif", 0.25, 0.25)
    (region,) = annotated.regions()
    assert (region.top, region.bottom, region.left, region.right) == (3 * CELL, 1100, 6 * CELL, 2000)
    np.testing.assert_array_equal(annotated.labels_of(region), labels[region.slices])
