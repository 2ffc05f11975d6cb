import imageio.v3 as iio
import nibabel
import numpy as np
import pytest

from limner.io import read, read_label_volume, write_result
from limner.space import Space
from limner.volume import MadeSections, Volume

SPACING = (0.05, 0.02, 0.01)


@pytest.fixture
def stack():
    return Volume(np.zeros((2, 3, 4), np.uint8), Space((2, 3, 4), SPACING))


@pytest.fixture
def folder_stack(make_folder):
    return read(make_folder([np.zeros((4, 3), np.uint8), np.zeros((4, 6), np.uint8)]), spacing=SPACING)


@pytest.mark.parametrize(
    ("value", "dtype", "written"),
    [(255, np.int64, "u1"), (256, np.uint8, "u2"), (65536, np.int64, "u4"), (True, bool, "u1"), (0.5, float, "f4")],
)
def test_smallest_type_that_holds_the_values(tmp_path, stack, value, dtype, written):
    pixels = np.full((2, 3, 4), value, np.result_type(dtype, np.min_scalar_type(value)))
    path = write_result(tmp_path / "new" / "folder", "labels", pixels, stack)
    back = nibabel.load(path)
    assert path.name == "labels.nii.gz"  # a stack from memory
    assert back.get_data_dtype() == written
    assert (np.asarray(back.dataobj) == value).all()
    np.testing.assert_allclose(back.header.get_zooms(), SPACING[::-1])


@pytest.mark.parametrize(
    ("value", "ending", "dtype"),
    [(9, ".png", np.uint8), (300, ".png", np.uint16), (70000, ".tif", np.uint32), (0.25, ".tif", np.float32)],
)
def test_folder_results(tmp_path, folder_stack, value, ending, dtype):
    pixels = np.zeros(folder_stack.space.shape, type(value))
    pixels[:, 1, 2] = value
    folder = write_result(tmp_path / "out", "labels", pixels, folder_stack)
    assert sorted(p.name for p in folder.iterdir()) == [f"s1{ending}", f"s2{ending}"]
    first, second = (iio.imread(folder / f"s{i}{ending}") for i in (1, 2))
    assert first.dtype == second.dtype == dtype
    # The 4 x 3 section lies at (0, 1) of the 4 x 6 canvas.
    assert (first.shape, second.shape) == ((4, 3), (4, 6))
    assert first[1, 1] == second[1, 2] == value
    if value != 0.25:
        assert np.array_equal(read_label_volume(folder, folder_stack).labels, pixels)


@pytest.mark.parametrize("kind", ["folder", "volume"])
def test_maps_made_section_by_section_are_written_as_arrays_are(tmp_path, folder_stack, stack, kind):
    like = folder_stack if kind == "folder" else stack
    whole = np.random.default_rng(0).random(like.space.shape, np.float32)
    made = write_result(tmp_path / "made", "heat", MadeSections(whole.shape, lambda z: whole[z]), like)
    array = write_result(tmp_path / "array", "heat", whole, like)
    files = [made] if made.is_file() else sorted(made.iterdir())
    for file in files:
        assert file.read_bytes() == (array / file.name if array.is_dir() else array).read_bytes()


def test_nothing_partial_stays_and_other_files_do(tmp_path, folder_stack, stack):
    for like in (folder_stack, stack):
        for value in (1, 2):
            written = write_result(tmp_path / "out", "labels", np.full(like.space.shape, value), like)
            if written.is_dir():
                (written / "notes.txt").write_text("mine")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["labels", "labels.nii.gz"]
    assert iio.imread(tmp_path / "out" / "labels" / "s1.png").max() == 2
    assert (tmp_path / "out" / "labels" / "notes.txt").read_text() == "mine"


def test_failure_leaves_an_earlier_result(tmp_path, stack, monkeypatch):
    target = write_result(tmp_path, "labels", np.ones((2, 3, 4), int), stack)
    before = target.read_bytes()

    def full_disk(path, *_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("limner.io.results.save_volume", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_result(tmp_path, "labels", np.zeros((2, 3, 4), int), stack)
    assert [p.name for p in tmp_path.iterdir()] == [target.name]
    assert target.read_bytes() == before


def test_positions_do_not_change_the_geometry_of_the_file(tmp_path):
    affine = np.diag([0.01, 0.02, 0.05, 1])
    nibabel.Nifti1Image(np.zeros((4, 3, 2), np.uint8), affine).to_filename(tmp_path / "a.nii.gz")
    (tmp_path / "z.csv").write_text("0,0\n1,0.3\n")
    stack = read(tmp_path / "a.nii.gz", positions=tmp_path / "z.csv")
    written = write_result(tmp_path, "labels", np.zeros((2, 3, 4), int), stack)
    np.testing.assert_allclose(nibabel.load(written).affine, affine)
    again = read(tmp_path / "a.nii.gz", spacing=(0.07, 0.02, 0.01), positions=tmp_path / "z.csv")
    written = write_result(tmp_path, "with_spacing", np.zeros((2, 3, 4), int), again)
    np.testing.assert_allclose(nibabel.load(written).header.get_zooms(), (0.01, 0.02, 0.07))


def test_given_spacing_is_written(tmp_path):
    nibabel.Nifti1Image(np.zeros((4, 3, 2), np.uint8), np.eye(4)).to_filename(tmp_path / "a.nii")
    written = write_result(tmp_path, "b", np.zeros((2, 3, 4), int), read(tmp_path / "a.nii", spacing=SPACING))
    np.testing.assert_allclose(nibabel.load(written).header.get_zooms(), SPACING[::-1])


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((2, 3, 5), int), r"shape \(2, 3, 5\), the stack \(2, 3, 4\)"),
        (np.full((2, 3, 4), -1), "from -1 to -1"),
        (np.full((2, 3, 4), 2**32), "give integers from 0 to 4294967295"),
    ],
)
def test_what_cannot_be_written(tmp_path, stack, pixels, message):
    with pytest.raises(ValueError, match=message):
        write_result(tmp_path, "labels", pixels, stack)
    assert not list(tmp_path.iterdir())


def test_the_stack_itself_is_never_replaced(tmp_path, folder_stack):
    nibabel.Nifti1Image(np.zeros((4, 3, 2), np.uint8), np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    for stem, like in {"a": read(tmp_path / "a.nii.gz"), "stack": folder_stack}.items():
        with pytest.raises(ValueError, match="is the stack itself"):
            write_result(tmp_path, stem, np.zeros(like.space.shape, int), like)
