import csv

import numpy as np
import pytest

from limner.io.transforms import SectionTransforms, read_transforms, write_transforms

NAMES = ("a.png", "b.png", "c.png", "d.png")


@pytest.fixture
def transforms():
    """As given; turned; mirrored left to right; mirrored top to bottom and shifted."""
    linear = np.array([np.eye(2), [[0.6, -0.8], [0.8, 0.6]], np.diag([1, -1]), np.diag([-1, 1])])
    shifts = np.array([[0, 0], [0.5, -1.25], [0, 0], [2, 3]])
    matrices = np.concatenate([linear, shifts[:, :, None]], axis=2).astype(float)
    return SectionTransforms(matrices, np.array([0.9, np.nan, 0.5, 1]), ("", "blank", "", "torn, or folded"))


def test_a_table_comes_back(tmp_path, transforms):
    write_transforms(tmp_path / "t.csv", transforms, NAMES)
    back = read_transforms(tmp_path / "t.csv", NAMES)
    np.testing.assert_allclose(back.matrices, transforms.matrices, atol=1e-5)
    np.testing.assert_allclose(back.fit, transforms.fit)
    assert back.found == transforms.found


def test_columns_mean_what_they_say(tmp_path, transforms):
    write_transforms(tmp_path / "t.csv", transforms, NAMES)
    with (tmp_path / "t.csv").open(newline="") as handle:
        rows = {row["section"]: row for row in csv.DictReader(handle)}
    assert [rows[n]["mirrored"] for n in NAMES] == ["0", "0", "1", "1"]
    assert float(rows["b.png"]["rotation_deg"]) == pytest.approx(np.degrees(np.arctan2(0.8, 0.6)), abs=1e-4)
    assert rows["c.png"]["rotation_deg"] == "0"
    assert abs(float(rows["d.png"]["rotation_deg"])) == 180  # top to bottom: mirrored left to right, and turned
    assert (rows["b.png"]["shift_y_mm"], rows["b.png"]["shift_x_mm"]) == ("0.5", "-1.25")
    assert rows["b.png"]["fit"] == ""


def test_a_positive_rotation_is_counter_clockwise(transforms):
    """The aligned section's right (x) is found further up (-y) in the section as given."""
    up = transforms.matrices[1][:, :2] @ np.array([0.0, 1.0])
    assert transforms.rotations[1] > 0
    assert up[0] < 0 < up[1]


def test_rows_may_stand_in_any_order(tmp_path, transforms):
    write_transforms(tmp_path / "t.csv", transforms, NAMES)
    lines = (tmp_path / "t.csv").read_text().splitlines()
    (tmp_path / "u.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
    np.testing.assert_allclose(read_transforms(tmp_path / "u.csv", NAMES).matrices, transforms.matrices, atol=1e-5)


HEADER = "section,rotation_deg,shift_y_mm,shift_x_mm,mirrored\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("section,rotation_deg\na.png,0\n", "has no column shift_y_mm"),
        ("", "has no column section"),
        (HEADER + "x.png,0,0,0,0\n", "names 'x.png' which the stack has not"),
        (HEADER + "a.png,0,0,0,0\na.png,0,0,0,0\n", "names 'a.png' a second time"),
        (HEADER + "a.png,0,0,0,0\n", "has no row for section b.png"),
        (HEADER + "a.png,left,0,0,0\n", "line 2 .* give a rotation"),
        (HEADER + "a.png,0,0\n", "line 2 .* give a rotation"),
        (HEADER + "a.png,nan,0,0,0\n", "line 2 .* give a rotation"),
        (HEADER + "a.png,0,0,0,2\n", "line 2 .* 1 for mirrored"),
    ],
)
def test_bad_tables_are_told(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_transforms(tmp_path / "t.csv", NAMES)


def test_no_table_at_all(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="is no text"):
        read_transforms(tmp_path / "t.csv", NAMES)


def test_a_matrix_that_scales_is_refused():
    with pytest.raises(ValueError, match="section 1 is no rotation"):
        SectionTransforms(np.stack([np.eye(2, 3), 2 * np.eye(2, 3)]), np.zeros(2), ("", ""))
