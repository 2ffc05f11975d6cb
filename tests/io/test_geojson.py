"""Outlines against shapely (GEOS, as QuPath's JTS) and matplotlib; files as QuPath 0.5 writes and reads them."""

import gzip
import json
import uuid

import numpy as np
import pytest
import shapely
from matplotlib.path import Path as Polygon
from shapely.geometry import shape as as_shape

from limner.io import GeoJsonStream, Outline, rasterise, read, read_label_volume, read_labels, read_objects, trace
from limner.space import Space
from limner.volume import Label, Volume

SPACING = (0.05, 0.02, 0.01)


def speckle(seed):
    """Labels with holes, corners that touch, and parts; the hardest cases for a tracer."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 16, 2)
    return ((rng.random(size) < rng.random()) * rng.integers(1, 4, size)).astype(np.int32)


def feature(rings, name=None, kind="Polygon", **properties):
    geometry = {"type": kind, "coordinates": rings}
    classification = {"classification": {"name": name, "color": [200, 0, 0]}} if name else {}
    properties = {"objectType": "annotation", **classification, **properties}
    return {"type": "Feature", "id": str(uuid.uuid4()), "geometry": geometry, "properties": properties}


def box(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def collection(*features):
    return {"type": "FeatureCollection", "features": list(features)}


def save(path, content):
    text = json.dumps(content).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("seed", range(60))
def test_tracing_and_filling_return_the_same_labels(seed):
    labels = speckle(seed)
    outlines = list(trace(labels, offset=(3, 2)))
    assert [o.label for o in outlines] == [v for v in np.unique(labels) if v]
    back = rasterise(outlines, (labels.shape[0] + 3, labels.shape[1] + 2))
    assert np.array_equal(back[3:, 2:], labels)
    assert not back[:3].any() and not back[:, :2].any()
    for outline in outlines:
        assert outline.area == (labels == outline.label).sum()


@pytest.mark.parametrize("ending", [".geojson", ".geojson.gz"])
def test_written_features_are_valid_and_come_back(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    expected = []
    with GeoJsonStream(path, class_name="nucleus") as stream:
        assert not path.exists()
        for seed in range(60):
            labels = speckle(seed)
            stream.write(trace(labels), {1: {"Area px^2": float((labels == 1).sum()), "Bad": np.nan}})
            expected += [(seed, v) for v in np.unique(labels) if v]
    content = json.loads(gzip.decompress(path.read_bytes()) if ending.endswith("gz") else path.read_text())
    assert content["type"] == "FeatureCollection"
    features = content["features"]
    assert len(features) == len(expected) == len({uuid.UUID(f["id"]) for f in features})
    for (seed, label), found in zip(expected, features, strict=True):
        assert found["type"] == "Feature"
        geometry = as_shape(found["geometry"])
        assert shapely.is_valid(geometry), shapely.is_valid_reason(geometry)
        assert geometry.area == (speckle(seed) == label).sum()
        properties = found["properties"]
        assert properties["objectType"] == "detection"
        assert properties["classification"] == {"name": "nucleus"}
        assert properties.get("measurements") == ({"Area px^2": geometry.area} if label == 1 else None)
        for part in shapely.get_parts(geometry):
            for ring in [part.exterior, *part.interiors]:
                assert ring.is_closed and ring.is_simple
    back = read_objects(path)
    assert np.array_equal(rasterise(back[:1], speckle(0).shape) > 0, speckle(0) == expected[0][1])


@pytest.mark.parametrize("seed", range(20))
def test_pixels_belong_where_their_centre_does(seed):
    """matplotlib's even-odd test of each centre, for star-shaped polygons with corners anywhere and parts outside."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.random(rng.integers(3, 12))) * 2 * np.pi
    radius = rng.uniform(2, 14, len(angles))
    ring = np.stack([12 + radius * np.cos(angles), 9 + radius * np.sin(angles)], axis=1)
    y, x = np.mgrid[:20, :24] + 0.5
    expected = Polygon(ring).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(20, 24)
    assert np.array_equal(rasterise([Outline(((ring,),), 1)], (20, 24)) > 0, expected)


def test_pixel_centres_by_hand():
    """A box from 0.6 to 2.5 holds the centres 1.5 alone: 0.5 lies before it, and 2.5 on its far edge."""
    for low, high, held in [(0.6, 2.5, [1]), (0.5, 2.5, [0, 1]), (0.6, 2.6, [1, 2])]:
        ring = np.array(box(low, low, high, high)[:4], float)
        assert np.flatnonzero(rasterise([Outline(((ring,),), 1)], (4, 4)).any(axis=0)).tolist() == held
        assert np.flatnonzero(rasterise([Outline(((ring,),), 1)], (4, 4)).any(axis=1)).tolist() == held


def test_neighbours_share_no_pixel_and_leave_none():
    """Two polygons along one slanted edge, which runs through pixel centres."""
    left = np.array([[0, 0], [3.5, 0], [7.5, 8], [0, 8]], float)
    right = np.array([[3.5, 0], [12, 0], [12, 8], [7.5, 8]], float)
    masks = [rasterise([Outline(((ring,),), 1)], (8, 12)) for ring in (left, right)]
    assert (masks[0] + masks[1] == 1).all()


def test_outlines_scaled_and_shifted_enclose_the_same_pixels_enlarged():
    labels = np.zeros((6, 7), int)
    labels[1:4, 2:6] = 3
    labels[2, 3] = 0
    outlines = [outline.scaled(2, 3).shifted(4, 5) for outline in trace(labels)]
    expected = np.zeros((20, 30), int)
    expected[4:16, 5:26] = np.kron(labels, np.ones((2, 3), int))
    np.testing.assert_array_equal(rasterise(outlines, (20, 30)), np.where(expected, 3, 0))


def test_holes_and_parts(tmp_path):
    rings = [[box(0, 0, 6, 5), box(1, 1, 5, 4)], [box(2, 2, 4, 3)]]
    path = save(tmp_path / "a.geojson", feature(rings, "gland", "MultiPolygon"))
    found = rasterise(read_objects(path), (5, 6))
    expected = np.ones((5, 6), int)
    expected[1:4, 1:5] = 0
    expected[2, 2:4] = 1
    assert np.array_equal(found, expected)


CLASSES = {"tumour": 1, "stroma": 7, "unclassified": 3}


@pytest.mark.parametrize("ending", [".geojson", ".json", ".geojson.gz"])
@pytest.mark.parametrize("wrap", [lambda *f: collection(*f), lambda *f: list(f)])
def test_forms_of_files(tmp_path, ending, wrap):
    small, large = feature([box(1, 1, 2, 2)], "tumour"), feature([box(0, 0, 3, 3)], "stroma")
    other = feature([box(3, 0, 4, 1)])
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 1]}, "properties": {}}
    path = save(tmp_path / f"a{ending}", wrap(small, point, large, other))
    objects = read_objects(path)
    assert [(o.label, o.class_name) for o in objects] == [(1, "tumour"), (2, "stroma"), (3, None)]
    # the small one is on top, although it comes first
    assert rasterise(objects, (3, 4)).tolist() == [[2, 2, 2, 3], [2, 1, 2, 0], [2, 2, 2, 0]]
    assert rasterise(objects, (3, 4), CLASSES).tolist() == [[7, 7, 7, 3], [7, 1, 7, 0], [7, 7, 7, 0]]
    with pytest.raises(ValueError, match="class 'stroma', but the table has tumour"):
        rasterise(objects, (3, 4), {"tumour": 1, "unclassified": 2})


@pytest.mark.parametrize(
    ("classification", "name"),
    [({"names": ["Tumour", "Positive"]}, "Tumour: Positive"), ("Tumour", "Tumour"), ({"name": "A"}, "A"), (None, None)],
)
def test_forms_of_classifications(tmp_path, classification, name):
    content = feature([box(0, 0, 1, 1)])
    content["properties"]["classification"] = classification
    assert read_objects(save(tmp_path / "a.geojson", content))[0].class_name == name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "no GeoJSON of features"),
        ({"type": "Topology"}, "feature 1 of .*type is 'Topology'"),
        (collection(feature([box(0, 0, 1, 1)]), feature([[[0, 0], [1, 1]]])), "feature 2 of .*three points"),
        (collection({"type": "Feature"}), "feature 1 of .*geometry"),
        (collection(feature([[["a", 0], [1, 1], [2, 2]]])), "feature 1 of"),
        (collection(feature([], kind="Circle")), "geometry is 'Circle'"),
    ],
)
def test_what_is_no_geojson_is_named(tmp_path, content, message):
    path = save(tmp_path / "bad.geojson", content)
    with pytest.raises(ValueError, match=message) as raised:
        read_objects(path)
    assert "bad.geojson" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("ending", [".geojson", ".geojson.gz"])
def test_truncated_geojson(tmp_path, make_truncated, ending):
    path = save(tmp_path / f"bad{ending}", collection(*[feature([box(i, 0, i + 1, 1)]) for i in range(50)]))
    with pytest.raises(ValueError, match="cannot be read"):
        read_objects(make_truncated(path, 0.7))


def test_a_stopped_stream_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.geojson.gz"
    for stop in (False, True, False):
        try:
            with GeoJsonStream(path, "annotation", table={3: Label("CA1", (1, 2, 3))}) as stream:
                stream.write(trace(np.full((2, 2), 3)))
                if stop:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert (tmp_path / ".partial-a.geojson.gz").exists()
        else:
            first = path.read_bytes()
        assert path.read_bytes() == first  # equal results are equal files
    assert [p.name for p in tmp_path.iterdir()] == ["a.geojson.gz"]
    properties = json.loads(gzip.decompress(first))["features"][0]["properties"]
    assert properties == {"objectType": "annotation", "classification": {"name": "CA1", "color": [1, 2, 3]}}
    with GeoJsonStream(tmp_path / "empty.geojson"):
        pass
    assert read_objects(tmp_path / "empty.geojson") == []
    with pytest.raises(ValueError, match=r"must end in \.geojson"):
        GeoJsonStream(tmp_path / "a.txt")


@pytest.fixture
def folder_stack(make_folder):
    """Sections s1.jpg to s12.jpg of 8 x 9, the third 5 x 6."""
    sizes = [(8, 9)] * 12
    sizes[2] = (5, 6)
    return read(make_folder([np.full(s, 100, np.uint8) for s in sizes], "images", ".jpg"), spacing=SPACING)


def test_labels_of_a_stack(tmp_path, folder_stack):
    folder = tmp_path / "outlines"
    folder.mkdir()
    save(folder / "s3.geojson", collection(feature([box(0, 0, 1, 1)], "CA3"), feature([box(2, 0, 3, 1)], "CA1")))
    save(folder / "s10.jpg.geojson.gz", collection())
    labels = read_labels(folder, folder_stack)
    assert labels.labelled == (2, 9)  # an empty file: a section that is all background
    assert {i: label.name for i, label in labels.label_map.table.items()} == {1: "CA1", 2: "CA3"}
    # the offset of a 5 x 6 section on a canvas of 8 x 9 is (1, 1)
    assert np.argwhere(labels.label_map.labels == 2).tolist() == [[2, 1, 1]]
    assert np.argwhere(labels.label_map.labels == 1).tolist() == [[2, 1, 3]]
    (tmp_path / "lut.csv").write_text("index,name,r,g,b\n300,CA1,1,2,3\n4,CA3,1,2,3\n")
    given = read_labels(folder, folder_stack, table=tmp_path / "lut.csv").label_map
    assert given.labels.dtype == np.uint16
    assert np.unique(given.labels).tolist() == [0, 4, 300]
    assert given.name_of(300) == "CA1"
    (tmp_path / "lut.csv").write_text("index,name,r,g,b\n4,CA3,1,2,3\n")
    with pytest.raises(ValueError, match=r"s3.geojson.*class 'CA1', but the table has CA3"):
        read_labels(folder, folder_stack, table=tmp_path / "lut.csv")
    with pytest.raises(ValueError, match=r"no label file for section 0 \(s1.jpg\)"):
        read_label_volume(folder, folder_stack)
    save(folder / "s99.geojson", collection())
    with pytest.raises(ValueError, match=r"s99.geojson in .* named like no section"):
        read_labels(folder, folder_stack)
    (folder / "s99.geojson").rename(folder / "s10.geojson")
    with pytest.raises(ValueError, match=r"holds both s10\.\w+.*; keep one"):
        read_labels(folder, folder_stack)


def test_one_file_for_one_section(tmp_path):
    path = save(tmp_path / "a.geojson", feature([box(1, 0, 3, 1)], "CA1"))
    one = Volume(np.zeros((1, 2, 4)), Space((1, 2, 4), SPACING))
    assert read_labels(path, one).label_map.labels.tolist() == [[[0, 1, 1, 0], [0, 0, 0, 0]]]
    with pytest.raises(ValueError, match="the stack has 2 sections; give a folder"):
        read_labels(path, Volume(np.zeros((2, 2, 4)), Space((2, 2, 4), SPACING)))
