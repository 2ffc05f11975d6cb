import imageio.v3 as iio
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from limner.io import read, read_label_image, read_label_volume, read_labels
from limner.space import Space
from limner.volume import Label, Volume

SPACING = (0.05, 0.02, 0.01)


@pytest.fixture
def stack():
    """A stack made in memory, 4 sections of 5 x 6."""
    return Volume(np.zeros((4, 5, 6), np.uint8), Space((4, 5, 6), SPACING))


@pytest.fixture
def folder_stack(make_folder):
    """Images s1.jpg to s12.jpg, the third smaller than the others."""
    sizes = [(8, 9)] * 12
    sizes[2] = (5, 6)
    return read(make_folder([np.full(s, 100, np.uint8) for s in sizes], "images", ".jpg"), spacing=SPACING)


def write_volume(path, labels, spacing=SPACING):
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, path)
    return path


def label_some(dtype=np.uint8, value=3):
    labels = np.zeros((4, 5, 6), dtype)
    labels[1, 2, 3] = labels[3, 0, 0] = value
    return labels


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        (np.uint16, 255, np.uint8),
        (np.uint16, 256, np.uint16),
        (np.float32, 3, np.uint8),
        (np.float64, 65536, np.int32),
        (np.int16, 7, np.uint8),
        (np.uint32, 614454277, np.int32),
    ],
)
def test_labels_take_the_smallest_type(tmp_path, stack, dtype, value, expected):
    result = read_labels(write_volume(tmp_path / "a.nrrd", label_some(dtype, value)), stack)
    assert result.labelled == (1, 3)
    assert result.label_map.labels.dtype == expected
    assert np.array_equal(result.label_map.labels, label_some(np.int64, value))
    assert result.label_map.name_of(value) == f"label {value}"


def test_named_sections_are_labelled_even_where_empty(tmp_path, stack):
    path = write_volume(tmp_path / "a.nii.gz", label_some())
    assert read_labels(path, stack, labelled=[2, 1]).labelled == (1, 2)


@pytest.mark.parametrize("axis", ["y", "x"])
def test_section_axis_follows_the_stack(tmp_path, axis):
    image = nibabel.Nifti1Image(label_some().T, np.diag([0.01, 0.02, 0.05, 1]))
    image.to_filename(tmp_path / "a.nii.gz")
    stack = read(tmp_path / "a.nii.gz", section_axis=axis)
    for section_axis in (None, axis):
        result = read_labels(tmp_path / "a.nii.gz", stack, section_axis=section_axis)
        assert np.array_equal(result.label_map.labels, stack.pixels)
        assert result.label_map.space == stack.space
    with pytest.raises(ValueError, match="give labels on the stack's own grid"):
        read_labels(tmp_path / "a.nii.gz", stack, section_axis="z")


def test_tiff_stack_needs_no_spacing(tmp_path, stack):
    tifffile.imwrite(tmp_path / "a.tif", label_some(), photometric="minisblack")
    assert read_labels(tmp_path / "a.tif", stack).labelled == (1, 3)


def test_table_is_taken_over(tmp_path, stack):
    (tmp_path / "lut.csv").write_text("index,name,r,g,b\n3,CA1,1,2,3\n")
    result = read_labels(write_volume(tmp_path / "a.nrrd", label_some()), stack, table=tmp_path / "lut.csv")
    assert result.label_map.table == {3: Label("CA1", (1, 2, 3))}


def test_shape_and_spacing_must_be_the_stacks(tmp_path, stack):
    small = write_volume(tmp_path / "small.nrrd", label_some()[:3])
    with pytest.raises(ValueError, match=r"small.nrrd has shape \(3, 5, 6\), the stack \(4, 5, 6\)"):
        read_labels(small, stack)
    coarse = write_volume(tmp_path / "coarse.nrrd", label_some(), (0.05, 0.04, 0.01))
    with pytest.raises(ValueError, match=r"spacing \(0.05, 0.04, 0.01\) mm, the stack \(0.05, 0.02, 0.01\) mm"):
        read_labels(coarse, stack)
    near = write_volume(tmp_path / "near.nrrd", label_some(), (0.05002, 0.02, 0.01))
    assert read_labels(near, stack).labelled == (1, 3)


@pytest.mark.parametrize(
    ("direction", "origin", "message"),
    [
        ((-1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, 0), r"b.nrrd has axes that run along .*-1.0.*; resample it"),
        ((1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, 0.5), r"b.nrrd has its origin at \(0.5, 0.0, 0.0\) mm, the stack at"),
    ],
)
def test_labels_must_lie_where_the_stack_lies(tmp_path, direction, origin, message):
    """Mirrored or shifted labels of the same shape would be taken voxel by voxel."""
    write_volume(tmp_path / "a.nrrd", np.zeros((4, 5, 6), np.uint8))
    labels = sitk.GetImageFromArray(label_some())
    labels.SetSpacing(SPACING[::-1])
    labels.SetDirection(direction)
    labels.SetOrigin(origin)
    sitk.WriteImage(labels, tmp_path / "b.nrrd")
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "b.nrrd", read(tmp_path / "a.nrrd"))
    assert read_labels(tmp_path / "b.nrrd", read(tmp_path / "a.nrrd", spacing=SPACING)).labelled == (1, 3)


def test_a_given_spacing_holds_for_labels_too(tmp_path):
    stack = read(write_volume(tmp_path / "image.nrrd", label_some(), (1, 1, 1)), spacing=SPACING)
    result = read_labels(write_volume(tmp_path / "labels.nrrd", label_some(), (2, 1, 1)), stack)
    assert result.label_map.space.spacing == SPACING


def test_positions_leave_the_files_spacings_comparable(tmp_path):
    path = write_volume(tmp_path / "a.nrrd", label_some())
    (tmp_path / "z.csv").write_text("0,0\n1,0.1\n2,0.3\n3,0.6\n")
    stack = read(path, positions=tmp_path / "z.csv")
    assert read_labels(path, stack).label_map.space.positions == (0, 0.1, 0.3, 0.6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (label_some(np.float32, 1.5), "no integers"),
        (label_some(np.float32, np.nan), "no integers, or NaN"),
        (label_some(np.float32, np.inf), "no integers|above 2147483647"),
        (label_some(np.int16, -1), "negative label -1"),
        (label_some(np.uint32, 2**32 - 1), "label 4294967295"),
        (np.zeros((4, 5, 6), np.uint8), "labels no section"),
    ],
)
def test_what_is_no_label_is_refused(tmp_path, stack, labels, message):
    path = write_volume(tmp_path / "a.nrrd", labels)
    with pytest.raises(ValueError, match=message):
        read_labels(path, stack)


def test_rgb_labels_are_refused(tmp_path, stack):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5, 6, 3), np.uint8), photometric="rgb")
    with pytest.raises(ValueError, match=r"a.tif is RGB; export index labels"):
        read_labels(tmp_path / "a.tif", stack)


def test_section_outside_the_stack(tmp_path, stack):
    with pytest.raises(ValueError, match="section 9 is named as labelled"):
        read_labels(write_volume(tmp_path / "a.nrrd", label_some()), stack, labelled=[9])


def test_folder_of_some_sections(folder_stack, make_folder):
    small = np.zeros((5, 6), np.uint16)
    small[0, 0] = 300
    labels = make_folder([small, np.zeros((8, 9), np.uint8)], "labels", first=3)
    (labels / "s4.png").rename(labels / "s10.png")
    result = read_labels(labels, folder_stack)
    assert result.labelled == (2, 9)  # s10 is labelled although all background
    # The offset of a 5 x 6 section on a canvas of 8 x 9 is (1, 1); the padding is background.
    assert np.argwhere(result.label_map.labels).tolist() == [[2, 1, 1]]
    assert result.label_map.labels.max() == 300
    assert read_labels(labels, folder_stack, labelled=[9]).labelled == (9,)
    with pytest.raises(ValueError, match=r"no label file for section 4 \(s5.jpg\)"):
        read_labels(labels, folder_stack, labelled=[4, 9])


@pytest.mark.parametrize("values", [{0, 1, 2}, {0, 254, 255}])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_palette_labels_are_their_indices(tmp_path, folder_stack, values, ending):
    labels = np.resize(sorted(values), (8, 9)).astype(np.uint8)
    (tmp_path / "labels").mkdir()
    image = Image.fromarray(labels).convert("P")
    image.putpalette(np.random.default_rng(0).integers(0, 255, 768).tolist())
    image.save(tmp_path / "labels" / f"s1{ending}")
    assert np.array_equal(read_labels(tmp_path / "labels", folder_stack).label_map.labels[0], labels)


def test_one_bit_mask_is_label_1(tmp_path, folder_stack):
    (tmp_path / "labels").mkdir()
    Image.fromarray(np.eye(8, 9) > 0).save(tmp_path / "labels" / "s1.png")
    assert np.array_equal(read_labels(tmp_path / "labels", folder_stack).label_map.labels[0], np.eye(8, 9))


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("s99.png", np.zeros((8, 9), np.uint8), r"s99.png in .* named like no section .* \(the first is s1.jpg\)"),
        ("s3.png", np.zeros((8, 9), np.uint8), r"s3.png has size \(8, 9\), its image s3.jpg \(5, 6\)"),
        ("s1.png", np.zeros((8, 9, 3), np.uint8), r"s1.png is RGB"),
        ("s1.jpg", np.zeros((8, 9), np.uint8), r"s1.jpg is a JPEG"),
        ("s1.tif", np.full((8, 9), 0.5, np.float32), r"s1.tif holds values that are no integers"),
    ],
)
def test_wrong_label_files_are_named(tmp_path, folder_stack, name, label, message):
    (tmp_path / "labels").mkdir()
    iio.imwrite(tmp_path / "labels" / name, label)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "labels", folder_stack)


def test_folder_of_labels_needs_a_folder_of_images(stack, make_folder):
    with pytest.raises(ValueError, match="is a folder, but the stack is one file"):
        read_labels(make_folder([np.zeros((5, 6), np.uint8)]), stack)


def test_volume_of_labels_for_a_folder_of_images(tmp_path, folder_stack):
    labels = np.zeros((12, 8, 9), np.uint8)
    labels[4, 3, 3] = 1
    assert read_labels(write_volume(tmp_path / "a.nrrd", labels, (1, 1, 1)), folder_stack).labelled == (4,)


def test_label_volume_on_its_own(tmp_path, make_folder):
    path = write_volume(tmp_path / "a.nrrd", label_some(np.uint16))
    label_map = read_label_volume(path, section_axis="y")
    assert np.array_equal(label_map.labels, np.moveaxis(label_some(), 1, 0))
    assert label_map.space.spacing == (0.02, 0.05, 0.01)
    folder = make_folder([np.ones((3, 4), np.uint8), np.full((5, 4), 300, np.uint16)])
    labels = read_label_volume(folder, spacing=SPACING).labels
    assert labels[0].tolist() == [[0] * 4] + [[1] * 4] * 3 + [[0] * 4]
    with pytest.raises(ValueError, match="no spacing"):
        read_label_volume(folder)


def test_label_volume_like_another(tmp_path, make_folder):
    path = write_volume(tmp_path / "a.nrrd", label_some())
    truth = read_label_volume(path)
    assert read_label_volume(path, truth).space == truth.space
    with pytest.raises(ValueError, match="has shape"):
        read_label_volume(write_volume(tmp_path / "b.nrrd", label_some()[:2]), truth)
    sections = [np.ones((3, 4), np.uint8)] * 2
    whole = read_label_volume(make_folder(sections, "whole"), spacing=SPACING)
    part = make_folder(sections[:1], "part")
    with pytest.raises(ValueError, match=r"no label file for section 1 \(s2.png\)"):
        read_label_volume(part, whole)
    assert read_labels(part, whole).labelled == (0,)


def test_label_image_of_every_width(tmp_path):
    labels = np.zeros((5, 6), np.uint32)
    labels[1:3, 2:4], labels[4, 5] = 7, 200
    for dtype, name in ((np.uint8, "a.png"), (np.uint16, "b.png"), (np.int16, "c.tif"), (np.uint32, "d.tiff")):
        value = min(np.iinfo(dtype).max, 2**31 - 1)
        wide = np.where(labels == 200, value, labels).astype(dtype)
        if name.endswith("png"):
            iio.imwrite(tmp_path / name, wide)
        else:
            tifffile.imwrite(tmp_path / name, wide, photometric="minisblack")
        np.testing.assert_array_equal(read_label_image(tmp_path / name), wide)
    pages = np.stack([labels, labels[::-1]])
    tifffile.imwrite(tmp_path / "pages.tif", pages, photometric="minisblack")
    np.testing.assert_array_equal(read_label_image(tmp_path / "pages.tif"), pages)
    write_volume(tmp_path / "volume.nii.gz", pages.astype(np.uint8))
    np.testing.assert_array_equal(read_label_image(tmp_path / "volume.nii.gz"), pages)


def test_label_image_of_a_palette_gives_indices(tmp_path):
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    image = Image.fromarray(indices, mode="P")
    image.putpalette([0, 0, 0, 250, 0, 0, 0, 250, 0])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_label_image(tmp_path / "a.png"), indices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "does not exist"),
        ("a.jpg", "is a JPEG, whose compression changes labels"),
        ("large.tif", "holds the label 4294967295; renumber"),
        ("a.txt", "is of no known format"),
    ],
)
def test_label_image_that_is_none(tmp_path, name, message):
    (tmp_path / "a.txt").write_text("1")
    iio.imwrite(tmp_path / "a.jpg", np.zeros((5, 6), np.uint8))
    tifffile.imwrite(tmp_path / "large.tif", np.full((2, 3), 2**32 - 1, np.uint32), photometric="minisblack")
    with pytest.raises(ValueError, match=message):
        read_label_image(tmp_path / name)
