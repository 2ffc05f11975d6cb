import csv
import sys

import numpy as np
import pytest
from skimage.color import hed2rgb, rgb2hed
from skimage.measure import label, regionprops_table

from limner.object_table import COLUMNS, ObjectTableStream, object_table

LABELS = np.zeros((40, 50), np.int32)
LABELS[4:14, 10:30] = 70000
LABELS[30:32, 5:7] = 3


def test_place_and_size_by_hand():
    table = object_table(LABELS, None, (0.5, 0.25), offset=(100, 200))
    assert tuple(table) == COLUMNS
    assert table["label"].tolist() == [3, 70000]
    assert table["centroid_y_px"].tolist() == [130.5, 108.5]
    assert table["centroid_x_px"].tolist() == [205.5, 219.5]
    assert table["centroid_y_um"].tolist() == [65.5, 54.5]  # the middle of rows 104 to 113 is 109 from the corner
    assert table["centroid_x_um"].tolist() == [51.5, 55.0]
    assert table["area_um2"].tolist() == [0.5, 25.0]
    assert np.isnan(table["mean_haematoxylin"]).all()
    assert np.isnan(table["mean_probability"]).all()


def test_eccentricity_by_hand_and_in_micrometres():
    """A bar of n x m pixels has second moments (n^2 - 1) / 12 and (m^2 - 1) / 12."""
    square = object_table(LABELS, None, (0.5, 0.25))["eccentricity"]
    # 10 pixels of 0.5 um by 20 of 0.25 um are a square
    assert square[1] == pytest.approx(0, abs=0.1)
    bar = object_table(LABELS, None, (1.0, 1.0))["eccentricity"]
    assert bar[1] == pytest.approx(np.sqrt(1 - 10**2 / 20**2), abs=0.01)


@pytest.mark.parametrize("spacing", [(0.5, 0.5), (0.25, 1.0)])
def test_shapes_are_those_of_scikit_image(spacing):
    draw = np.random.default_rng(2)
    labels = label(draw.random((60, 70)) < 0.5, connectivity=1)
    image = draw.integers(0, 256, (*labels.shape, 3)).astype(np.uint8)
    table = object_table(labels, image, spacing)
    wanted = ("label", "centroid", "area", "intensity_mean")
    expected = regionprops_table(labels, rgb2hed(image)[..., 0], properties=wanted)
    shapes = regionprops_table(labels, properties=("eccentricity",), spacing=spacing)
    np.testing.assert_array_equal(table["label"], expected["label"])
    np.testing.assert_allclose(table["centroid_y_px"], expected["centroid-0"])
    np.testing.assert_allclose(table["mean_haematoxylin"], expected["intensity_mean"])
    np.testing.assert_allclose(table["eccentricity"], shapes["eccentricity"], atol=1e-6)


def test_mean_haematoxylin_of_a_known_mixture():
    stains = np.zeros((*LABELS.shape, 3))
    stains[..., 1] = 0.02
    stains[LABELS == 3, 0] = 0.05
    stains[LABELS == 70000, 0] = np.linspace(0.05, 0.15, 200)
    image = np.rint(hed2rgb(stains) * 255).astype(np.uint8)
    found = object_table(LABELS, image, (1.0, 1.0))["mean_haematoxylin"]
    assert found == pytest.approx([0.05, 0.1], abs=0.01)
    with pytest.raises(ValueError, match="give RGB of the same size"):
        object_table(LABELS, image[:-1], (1.0, 1.0))


def test_no_objects():
    table = object_table(np.zeros((4, 5), int), np.zeros((4, 5, 3), np.uint8), (1.0, 1.0))
    assert {len(column) for column in table.values()} == {0}


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_regions_appended_are_the_whole_table(tmp_path, ending):
    if ending == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    path = tmp_path / "new" / f"a{ending}"
    image = np.random.default_rng(0).integers(0, 256, (*LABELS.shape, 3)).astype(np.uint8)
    with ObjectTableStream(path) as stream:
        for rows in (slice(25, 40), slice(0, 2), slice(2, 25)):
            part = object_table(LABELS[rows], image[rows], (0.5, 0.25), (rows.start, 0))
            stream.append({**part, "mean_probability": part["label"] / 1e5})
        assert not path.exists()
    expected = object_table(LABELS, image, (0.5, 0.25))
    expected["mean_probability"] = expected["label"] / 1e5
    if ending == ".csv":
        with path.open() as file:
            rows = list(csv.DictReader(file))
        found = {c: [float(row[c]) for row in rows] for c in COLUMNS}
    else:
        found = parquet.read_table(path).to_pydict()
    for column in COLUMNS:
        assert found[column] == pytest.approx(expected[column], abs=6e-5)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_stopped_table_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("earlier")
    with pytest.raises(KeyboardInterrupt), ObjectTableStream(path):
        raise KeyboardInterrupt
    assert path.read_text() == "earlier"


def test_wrong_endings_and_missing_pyarrow(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must end in .csv or .parquet"):
        ObjectTableStream(tmp_path / "a.txt")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a.parquet needs pyarrow, which is not installed; pip install"):
        ObjectTableStream(tmp_path / "a.parquet")
