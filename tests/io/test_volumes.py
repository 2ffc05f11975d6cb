"""NIfTI, NRRD, MHA against nibabel, pynrrd and SimpleITK."""

import gzip
import os
import re
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk

from limner.io import names_read, read, read_label_volume, write_result
from limner.io.images import load

# A rotation of 20 degrees about x and then 30 about z, in NIfTI's RAS, with spacing (i, j, k) = (0.5, 2, 3) mm.
A, B = np.deg2rad(20), np.deg2rad(30)
ABOUT_X = np.array([[1, 0, 0], [0, np.cos(A), -np.sin(A)], [0, np.sin(A), np.cos(A)]])
ABOUT_Z = np.array([[np.cos(B), -np.sin(B), 0], [np.sin(B), np.cos(B), 0], [0, 0, 1]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = ABOUT_Z @ ABOUT_X @ np.diag([0.5, 2, 3])
OBLIQUE[:3, 3] = (-10, 20, 7)
SWAPPED = OBLIQUE[:, [2, 0, 1, 3]] * (1, -1, 1, 1)  # axes permuted, one flipped


@pytest.mark.parametrize("affine", [OBLIQUE, SWAPPED, np.diag([1, 1, 1, 1])])
@pytest.mark.parametrize("axis", ["z", "y", "x"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_geometry_agrees_with_nibabel_and_comes_back(tmp_path, affine, axis, ending):
    ijk = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    nibabel.Nifti1Image(ijk, affine).to_filename(tmp_path / f"a{ending}")
    stack = read(tmp_path / f"a{ending}", section_axis=axis)
    front = {"z": 2, "y": 1, "x": 0}[axis]
    assert np.array_equal(stack.pixels, np.moveaxis(ijk.T, 2 - front, 0))
    # A voxel's physical position does not depend on the section axis; nibabel's x and y point the other way.
    index = {"z": (3, 1, 0), "y": (1, 3, 0), "x": (0, 3, 1)}[axis]  # the voxel i, j, k = 0, 1, 3
    expected = (affine @ (0, 1, 3, 1))[:3] * (-1, -1, 1)
    np.testing.assert_allclose(stack.space.to_physical(index)[::-1], expected, atol=1e-4)

    written = write_result(tmp_path / "out", "b", stack.pixels.astype(np.float64), stack)
    back = nibabel.load(written)
    assert written.name == f"b{ending}"
    assert back.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)
    np.testing.assert_allclose(back.header.get_qform(), affine, atol=1e-5)
    assert np.array_equal(back.get_fdata(), ijk)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii.gz"])
def test_written_result_has_the_geometry_that_simpleitk_reads(tmp_path, ending):
    image = sitk.GetImageFromArray(np.zeros((2, 3, 4), np.uint16))
    image.SetSpacing((0.25, 0.5, 3.0))
    image.SetOrigin((1.0, -2.0, 3.5))
    image.SetDirection((ABOUT_X @ ABOUT_Z).ravel().tolist())
    sitk.WriteImage(image, tmp_path / f"a{ending}")
    stack = read(tmp_path / f"a{ending}", section_axis="y")
    assert stack.space.spacing == (0.5, 3.0, 0.25)
    back = sitk.ReadImage(write_result(tmp_path, "b", np.full((3, 2, 4), 70000), stack))
    assert back.GetPixelID() == sitk.sitkUInt32
    assert back.IsSameImageGeometryAs(image)


def test_nrrd_agrees_with_pynrrd_both_ways(tmp_path):
    xyz = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    header = {"space": "left-posterior-superior", "space directions": np.diag([0.5, 1, 2]), "space origin": [5, 6, 7]}
    nrrd.write(str(tmp_path / "a.nrrd"), xyz, header)
    stack = read(tmp_path / "a.nrrd")
    assert np.array_equal(stack.pixels, xyz.T)
    assert (stack.space.spacing, stack.space.origin) == ((2, 1, 0.5), (7, 6, 5))
    back, back_header = nrrd.read(str(write_result(tmp_path, "b", stack.pixels, stack)))
    assert np.array_equal(back, xyz)
    assert back.dtype == np.uint8
    assert back_header["encoding"] == "gzip"
    np.testing.assert_allclose(back_header["space directions"], np.diag([0.5, 1, 2]))
    np.testing.assert_allclose(back_header["space origin"], [5, 6, 7])


def test_nrrd_without_spacings_needs_them(tmp_path):
    nrrd.write(str(tmp_path / "a.nrrd"), np.zeros((2, 3, 4), np.uint8))
    with pytest.raises(ValueError, match=r"a.nrrd has no spacing .* --spacing"):
        read(tmp_path / "a.nrrd")
    assert read(tmp_path / "a.nrrd", spacing=(3, 2, 1)).space.spacing == (3, 2, 1)


def test_nrrd_in_microns_is_read_in_mm(tmp_path):
    header = {"space dimension": 3, "space directions": np.diag([10, 10, 25]), "space units": ["um", "um", "um"]}
    nrrd.write(str(tmp_path / "a.nrrd"), np.zeros((2, 3, 4), np.uint8), header)
    stack = read(tmp_path / "a.nrrd")
    assert stack.space.spacing == pytest.approx((0.025, 0.01, 0.01))


def test_nrrd_in_microns_is_written_in_microns(tmp_path):
    header = {
        "space dimension": 3,
        "space directions": np.diag([10, 10, 25]),
        "space units": ["um", "um", "um"],
        "space origin": [100, 200, 300],
    }
    nrrd.write(str(tmp_path / "a.nrrd"), np.zeros((2, 3, 4), np.uint8), header)
    labels = np.arange(24).reshape(4, 3, 2)
    written = write_result(tmp_path / "out", "labels", labels, read(tmp_path / "a.nrrd"))
    pixels, found = nrrd.read(str(written))
    np.testing.assert_array_equal(pixels, labels.T)
    np.testing.assert_allclose(found["space directions"], np.diag([10, 10, 25]))
    np.testing.assert_allclose(found["space origin"], [100, 200, 300])
    assert found["space units"] == ["um", "um", "um"]
    back = read_label_volume(written, like=read(tmp_path / "a.nrrd"))
    np.testing.assert_array_equal(back.labels, labels)


@pytest.mark.parametrize(("given", "written"), [(".mhd", ".mha"), (".nhdr", ".nrrd")])
def test_formats_of_two_files_are_written_as_one(tmp_path, given, written):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 3, 4), np.uint8)), tmp_path / f"a{given}")
    out = write_result(tmp_path / "out", "b", np.ones((2, 3, 4), int), read(tmp_path / f"a{given}", spacing=(1, 1, 1)))
    assert out.name == f"b{written}"
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_rgb_and_rgba_volumes(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 255, (2, 3, 4, 4)).astype(np.uint8)
    for name, channels in {"rgb.nrrd": 3, "rgb.mha": 3, "rgba.mha": 4}.items():
        sitk.WriteImage(sitk.GetImageFromArray(rgba[..., :channels], isVector=True), tmp_path / name)
        stack = read(tmp_path / name, section_axis="x")
        assert np.array_equal(stack.pixels, np.moveaxis(rgba[..., :3], 2, 0))


def test_nifti_rgb(tmp_path):
    rgb = np.zeros((4, 3, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgb["G"][1, 2, 0] = 9
    nibabel.Nifti1Image(rgb, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    pixels = read(tmp_path / "a.nii.gz").pixels
    assert pixels.shape == (2, 3, 4, 3)
    assert pixels[0, 2, 1].tolist() == [0, 9, 0]


@pytest.mark.parametrize(
    ("shape", "expected"), [((4, 5), (1, 5, 4)), ((4, 5, 6, 1), (6, 5, 4)), ((4, 5, 1), (1, 5, 4))]
)
def test_flat_and_trailing_axes(tmp_path, shape, expected):
    nibabel.Nifti1Image(np.zeros(shape, np.float32), np.diag([0.5, 2, 1, 1])).to_filename(tmp_path / "a.nii")
    assert read(tmp_path / "a.nii").space.shape == expected


def test_nifti_2_is_named(tmp_path):
    nibabel.Nifti2Image(np.zeros((2, 3, 4), np.uint8), np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=r"a.nii.gz is NIfTI-2"):
        read(tmp_path / "a.nii.gz")


def test_big_endian_and_scaled_nifti(tmp_path):
    image = nibabel.Nifti1Image(
        np.arange(24, dtype=">i2").reshape(2, 3, 4), np.eye(4), nibabel.Nifti1Header(endianness=">")
    )
    image.header.set_slope_inter(0.5, 1)
    image.to_filename(tmp_path / "a.nii.gz")
    pixels = read(tmp_path / "a.nii.gz").pixels
    assert pixels.dtype.isnative
    np.testing.assert_allclose(pixels, nibabel.load(tmp_path / "a.nii.gz").get_fdata().T)


def test_nifti_in_microns(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((2, 3, 4), np.uint8), np.diag([10, 10, 50, 1]))
    image.header.set_xyzt_units("micron")
    image.to_filename(tmp_path / "a.nii.gz")
    assert read(tmp_path / "a.nii.gz").space.spacing == pytest.approx((0.05, 0.01, 0.01))


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_truncated_volume(tmp_path, capfd, noise, make_truncated, ending, fraction):
    sitk.WriteImage(sitk.GetImageFromArray(noise), tmp_path / f"a{ending}", useCompression=True)
    make_truncated(tmp_path / f"a{ending}", fraction)
    with pytest.raises(ValueError, match=rf"^read\(\): .*a{ending} cannot be read \(truncated.*") as raised:
        read(tmp_path / f"a{ending}")
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_nifti_cut_before_it_was_compressed(tmp_path, noise):
    sitk.WriteImage(sitk.GetImageFromArray(noise), tmp_path / "a.nii")
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()[:-100]))
    with pytest.raises(ValueError, match=r"cannot be read"):
        read(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_text_under_the_name_of_a_volume(tmp_path, capfd, ending):
    (tmp_path / f"a{ending}").write_text("this is no image\n" * 30)
    with pytest.raises(ValueError, match=rf"a{ending} cannot be read") as raised:
        read(tmp_path / f"a{ending}")
    assert not re.search(r"unpack|sitk|ImageIO", str(raised.value))  # a library's words, which tell a user nothing
    assert str(raised.value).count(f"a{ending}") == 1
    assert capfd.readouterr().err == ""


def test_time_series_and_odd_channels(tmp_path):
    nibabel.Nifti1Image(np.zeros((4, 5, 6, 7), np.int16), np.eye(4)).to_filename(tmp_path / "t.nii.gz")
    with pytest.raises(ValueError, match=r"4 axes of lengths \(7, 6, 5, 4\).*not a time series"):
        read(tmp_path / "t.nii.gz")
    for channels, dtype in [(2, np.uint8), (4, np.float32), (5, np.uint8)]:
        pixels = np.zeros((2, 3, 4, channels), dtype)
        sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=True), tmp_path / "c.mha")
        with pytest.raises(ValueError, match=rf"{channels} components"):
            read(tmp_path / "c.mha")


def test_sheared_nifti(tmp_path):
    sheared = np.array([[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), sheared).to_filename(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=r"axes of .*a.nii.gz are not at right angles"):
        read(tmp_path / "a.nii.gz")


def test_infinite_pixels_name_the_section_along_the_chosen_axis(tmp_path):
    zyx = np.zeros((2, 3, 4), np.float32)
    zyx[0, 2, 1] = np.inf
    sitk.WriteImage(sitk.GetImageFromArray(zyx), tmp_path / "a.mha")
    with pytest.raises(ValueError, match=r"section 2 of .*NaN or infinity"):
        read(tmp_path / "a.mha", section_axis="j")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nifti_with_nan_or_infinity(tmp_path, ending, dtype, order, value):
    """SimpleITK reads these as 0 and says nothing."""
    ijk = np.ones((4, 3, 6), order + dtype)  # sections k
    ijk[3, 2, 4] = value
    ijk[1, 0, 5] = value
    image = nibabel.Nifti1Image(ijk, np.eye(4), nibabel.Nifti1Header(endianness=order))
    image.set_data_dtype(ijk.dtype)
    image.to_filename(tmp_path / f"a{ending}")
    header = nibabel.load(tmp_path / f"a{ending}").header
    assert (header.endianness, header.get_data_dtype()) == (order, np.dtype(order + dtype))
    with pytest.raises(ValueError, match=rf"^read\(\): section 4 of .*a{ending} holds NaN or infinity; .*") as raised:
        read(tmp_path / f"a{ending}")
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"section 1 of .* holds NaN"):  # the voxel of section 5 along k
        read(tmp_path / f"a{ending}", section_axis="i")


def test_nifti_with_nan_beyond_the_first_block(tmp_path):
    """Blocks of 4 MiB; all but the very last voxel finite, and a header extension shifts the pixels."""
    ijk = np.ones((128, 128, 70), np.float32)  # 4.4 MiB
    ijk[-1, -1, -1] = np.nan
    image = nibabel.Nifti1Image(ijk, np.eye(4))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"scanned on a Monday" * 7))
    image.to_filename(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=r"section 69 of .* holds NaN"):
        read(tmp_path / "a.nii.gz")
    assert np.argwhere(np.isnan(load(tmp_path / "a.nii.gz").pixels)).tolist() == [[69, 127, 127]]
    with pytest.raises(ValueError, match=r"a.nii.gz holds values that are no integers, or NaN"):
        read_label_volume(tmp_path / "a.nii.gz")


def test_nifti_bytes_after_the_pixels_are_no_pixels(tmp_path):
    pixels = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(pixels), tmp_path / "a.nii")
    with (tmp_path / "a.nii").open("ab") as file:
        file.write(np.full(9, np.nan, np.float32).tobytes())
    assert np.array_equal(read(tmp_path / "a.nii").pixels, pixels)
    integers = np.frombuffer(np.full(24, np.nan, "f4").tobytes(), np.int32).reshape(2, 3, 4)  # the bits of NaN
    sitk.WriteImage(sitk.GetImageFromArray(integers), tmp_path / "b.nii")
    assert np.array_equal(read(tmp_path / "b.nii").pixels, integers)


DATA = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "stack_stpt_mouse" / "stpt_native_50x40x40um.nii.gz"


@pytest.mark.skipif(not DATA.exists(), reason="no data")
def test_mouse_brain():
    stack = read(DATA)
    assert stack.pixels.shape == (270, 193, 271)
    assert stack.space.spacing == (0.05, 0.04, 0.04)


@pytest.mark.parametrize("header", ["a.mhd", "a.nhdr"])
def test_detached_pixels_are_among_the_files_read(tmp_path, header):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 3, 4), np.uint8)), tmp_path / header)
    (data,) = {p.name for p in tmp_path.iterdir()} - {header}
    assert names_read(tmp_path / header) == (header, data)


@pytest.mark.parametrize("ending", [".mha", ".nrrd", ".nii.gz"])
def test_a_file_with_its_own_pixels_is_read_alone(tmp_path, ending):
    noise = np.random.default_rng(0).integers(0, 256, (9, 30, 40), np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(noise), tmp_path / f"a{ending}")
    assert names_read(tmp_path / f"a{ending}") == (f"a{ending}",)


@pytest.mark.parametrize("kind", ["list", "pattern"])
@pytest.mark.parametrize("header", ["a.mhd", "a.nhdr"])
def test_pixels_detached_into_several_files(tmp_path, header, kind):
    """One raw file a section; SimpleITK reads these headers, so they are as the formats want them."""
    sections = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    names = ("raw/s01.raw", "raw/s02.raw")
    (tmp_path / "raw").mkdir()
    for name, section in zip(names, sections, strict=True):
        (tmp_path / name).write_bytes(section.tobytes())
    (tmp_path / "raw" / "notes.txt").write_text("mine")
    files = {"list": "LIST\n" + "\n".join(names) + "\n", "pattern": "raw/s%02d.raw 1 2 1\n"}[kind]
    if header == "a.mhd":
        text = f"ObjectType = Image\nNDims = 3\nDimSize = 4 3 2\nElementType = MET_UCHAR\nElementDataFile = {files}"
    else:
        text = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 4 3 2\nencoding: raw\nspacings: 1 1 1\ndata file: {files}"
    (tmp_path / header).write_text(text)
    assert np.array_equal(read(tmp_path / header).pixels, sections)
    assert names_read(tmp_path / header) == (header, *names)
