"""MGZ and MGH against nibabel."""

import gzip
import subprocess
import sys

import nibabel
import numpy as np
import pytest

from limner.io import open_sections, read, read_label_volume, write_result

A, B = np.deg2rad(20), np.deg2rad(30)
ABOUT_X = np.array([[1, 0, 0], [0, np.cos(A), -np.sin(A)], [0, np.sin(A), np.cos(A)]])
ABOUT_Z = np.array([[np.cos(B), -np.sin(B), 0], [np.sin(B), np.cos(B), 0], [0, 0, 1]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = ABOUT_Z @ ABOUT_X @ np.diag([0.5, 2, 3])
OBLIQUE[:3, 3] = (-10, 20, 7)
CONFORMED = np.array([[-1.0, 0, 0, 128], [0, 0, 1, -128], [0, -1, 0, 128], [0, 0, 0, 1]])  # FreeSurfer's own: LIA


def loaded(path):
    """nibabel leaves the file open if it is given the path."""
    content = path.read_bytes()
    return nibabel.MGHImage.from_bytes(gzip.decompress(content) if path.suffix == ".mgz" else content)


def type_of(image):
    return image.get_data_dtype().newbyteorder("=")


@pytest.mark.parametrize("affine", [OBLIQUE, CONFORMED])
@pytest.mark.parametrize("axis", ["z", "y", "x"])
@pytest.mark.parametrize("ending", [".mgz", ".mgh"])
def test_geometry_agrees_with_nibabel_and_comes_back(tmp_path, affine, axis, ending):
    ijk = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    nibabel.MGHImage(ijk, affine).to_filename(tmp_path / f"a{ending}")
    stack = read(tmp_path / f"a{ending}", section_axis=axis)
    front = {"z": 2, "y": 1, "x": 0}[axis]
    assert np.array_equal(stack.pixels, np.moveaxis(ijk.T, 2 - front, 0))
    assert stack.pixels.dtype == np.int16
    assert stack.pixels.dtype.isnative
    index = {"z": (3, 1, 0), "y": (1, 3, 0), "x": (0, 3, 1)}[axis]  # the voxel i, j, k = 0, 1, 3
    expected = (affine @ (0, 1, 3, 1))[:3] * (-1, -1, 1)
    np.testing.assert_allclose(stack.space.to_physical(index)[::-1], expected, atol=1e-4)

    written = write_result(tmp_path / "out", "b", stack.pixels.astype(np.float64), stack)
    back = loaded(written)
    assert written.name == f"b{ending}"
    assert [p.name for p in written.parent.iterdir()] == [written.name]
    assert type_of(back) == np.float32
    np.testing.assert_allclose(back.affine, affine, atol=1e-4)
    assert np.array_equal(back.get_fdata(), ijk)


@pytest.mark.parametrize(
    ("largest", "dtype"), [(255, "u1"), (2035, "i2"), (12175, "i2"), (40000, "i4"), (2**31 - 1, "i4")]
)
def test_labels_come_back_in_a_type_that_holds_them(tmp_path, largest, dtype):
    nibabel.MGHImage(np.zeros((4, 3, 2), np.uint8), OBLIQUE).to_filename(tmp_path / "a.mgz")
    stack = read(tmp_path / "a.mgz")
    labels = np.zeros((2, 3, 4), np.int64)
    labels[1, 2, 0] = largest
    written = write_result(tmp_path / "out", "labels", labels, stack)
    assert type_of(loaded(written)) == np.dtype(dtype)
    assert np.array_equal(read_label_volume(written, like=stack).labels, labels)


def test_a_label_that_no_type_of_the_format_holds(tmp_path):
    nibabel.MGHImage(np.zeros((4, 3, 2), np.uint8), OBLIQUE).to_filename(tmp_path / "a.mgz")
    with pytest.raises(ValueError, match=r"^write_result\(\): the largest label is 2147483648; MGZ holds up to"):
        write_result(tmp_path / "out", "labels", np.full((2, 3, 4), 2**31), read(tmp_path / "a.mgz"))
    assert not list((tmp_path / "out").iterdir())


def test_spacing_is_as_it_was_meant(tmp_path):
    nibabel.MGHImage(np.zeros((4, 3, 2), np.float32), np.diag([0.7, 0.7, 0.8, 1])).to_filename(tmp_path / "a.mgz")
    assert read(tmp_path / "a.mgz").space.spacing == (0.8, 0.7, 0.7)


def test_several_frames_are_no_volume(tmp_path):
    nibabel.MGHImage(np.zeros((4, 5, 6, 7), np.float32), np.eye(4)).to_filename(tmp_path / "t.mgz")
    with pytest.raises(
        ValueError, match=r"^read\(\): .*t.mgz has 4 axes of lengths \(7, 6, 5, 4\).*not a time series$"
    ):
        read(tmp_path / "t.mgz")


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("ending", [".mgz", ".mgh"])
def test_truncated(tmp_path, noise, make_truncated, ending, fraction):
    nibabel.MGHImage(noise.astype(np.int32), np.eye(4)).to_filename(tmp_path / f"a{ending}")
    make_truncated(tmp_path / f"a{ending}", fraction)
    with pytest.raises(ValueError, match=rf"^read\(\): .*a{ending} cannot be read \(truncated.*") as raised:
        read(tmp_path / f"a{ending}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ending", [".mgz", ".mgh"])
def test_text_under_the_name_of_a_volume(tmp_path, ending):
    (tmp_path / f"a{ending}").write_text("this is no image\n" * 30)
    with pytest.raises(ValueError, match=rf"a{ending} cannot be read") as raised:
        read(tmp_path / f"a{ending}")
    assert str(raised.value).count(f"a{ending}") == 1


def test_nan_and_sections(tmp_path):
    ijk = np.zeros((4, 5, 6), np.float32)
    ijk[0, 0, 2] = np.nan
    nibabel.MGHImage(ijk, np.eye(4)).to_filename(tmp_path / "a.mgz")
    with pytest.raises(ValueError, match=r"section 2 of .*a.mgz holds NaN"):
        read(tmp_path / "a.mgz")
    nibabel.MGHImage(ijk[:, :, 3:], np.eye(4)).to_filename(tmp_path / "b.mgz")
    assert open_sections(tmp_path / "b.mgz")[0].shape == (5, 4)


def test_the_result_never_replaces_the_scan(tmp_path):
    nibabel.MGHImage(np.zeros((4, 3, 2), np.uint8), OBLIQUE).to_filename(tmp_path / "a.mgz")
    stack = read(tmp_path / "a.mgz")
    with pytest.raises(ValueError, match=r"is the stack itself"):
        write_result(tmp_path, "a", np.ones((2, 3, 4), int), stack)


def test_nibabel_is_imported_only_for_such_a_file():
    code = "import sys, limner, limner.io; sys.exit('nibabel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
